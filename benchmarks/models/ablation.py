"""Does each phase of MOHAWK pay, and with which mixer? The same student, the same number of tokens, without and with
phases 1 and 2.

SmolLM2-135M-Instruct becomes the demo's hybrid by phase 3 alone, by phases 2 and 3, and by all three, each from
attention's start and from one whose mixers were fitted (`student.init: calibrated`), with each mixer. Every run sees
the same total of training tokens: earlier phases take theirs from later ones, and so do fits, which see them more than
once. Since a short schedule may want another learning rate than a long one, each first tries some, times the demo's in
all its phases, with one seed; the rate that is best on held-out text of the training source is run with the other
seeds, and what the table says is of text of another source.

Runs are ordinary `mohawk convert` runs: each stops and resumes like one, and what is done is not done again; with
--keep nor is what ablation.json has of as many tokens, whatever version it is of. When all are there, a step of the
teacher and of a student of each mixer is timed, in turns; an untrained one, which takes as long. The table, its JSON
with every run, and a plot go to benchmarks/results/.

    python benchmarks/models/ablation.py [--mixers mamba2 gated_delta] [--tokens 65536] [--seeds 3] [--rates 0.5 1 2]
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

SCHEDULES = {  # share of the token budget for each phase; what the paper's ablation compares
    "3": {"end_to_end": 1.0},
    "calibrated, 3": {"calibration": 1 / 8, "end_to_end": 7 / 8},
    "2-3": {"hidden": 0.5, "end_to_end": 0.5},
    "1-2-3": {"mixing": 1 / 12, "hidden": 5 / 12, "end_to_end": 0.5},
    "calibrated, 2-3": {"calibration": 1 / 8, "hidden": 3 / 8, "end_to_end": 0.5},
    "calibrated, 1-2-3": {"calibration": 1 / 8, "mixing": 1 / 12, "hidden": 7 / 24, "end_to_end": 0.5},
}
PHASES = ("mixing", "hidden", "end_to_end")
CONTEXTS = (512, 4096)  # at which decoding is timed
ROUNDS, STEPS = 3, 16  # how often each model has its turn, and steps in a turn


@dataclass(frozen=True)
class Run:
    """One conversion. rate: times the demo's learning rates."""

    mixer: str
    phases: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        phases = self.phases.replace(", ", "-")
        return f"{self.mixer}-{phases}-rate-{self.rate:g}-seed-{self.seed}"


def settings_for(run: Run, tokens: float, output: Path) -> list[str]:
    """What differs from the demo's recipe."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.schema.files import shipped

    demo, shares = Recipe.load(shipped("demo")).phases, SCHEDULES[run.phases]
    settings = [
        f"student.mixer={run.mixer}",
        f"seed={run.seed}",
        f"output={output}",
        "evaluation.contexts=[16]",  # decoding is timed when all runs are there
        "evaluation.decode_tokens=1",
        "evaluation.continuation_tokens=2",
        "evaluation.longest=null",
    ]
    if "calibration" in shares:
        settings += ["student.init=calibrated", f"student.calibration_tokens={tokens * shares['calibration']:.0f}"]
    for phase in PHASES:
        if phase not in shares:
            settings.append(f"phases.{phase}=null")
            continue
        budget = tokens * shares[phase]
        if phase == "hidden":
            solved = min(demo.hidden.solve_tokens, int(budget) // 2)
            settings.append(f"phases.hidden.solve_tokens={solved}")
            budget -= solved
        settings.append(f"phases.{phase}.tokens={budget:.0f}")
        settings.append(f"phases.{phase}.learning_rate={getattr(demo, phase).learning_rate * run.rate:g}")
    return settings


def measured(results: Path, tokens: float) -> dict[Run, dict]:
    """What ablation.json has of runs of as many tokens."""
    if not results.is_file():
        return {}
    kept = json.loads(results.read_text(encoding="utf-8"))
    if kept["about"]["tokens"] != tokens:
        return {}
    return {Run(r["mixer"], r["phases"], r["rate"], r["seed"]): r for r in kept["rows"]}


def done(run: Run, tokens: float, folder: Path) -> dict:
    """What a run found, which is converted first where it has not been."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.conversion.run import convert
    from mohawk.demo import fetch
    from mohawk.demo.run import local_settings
    from mohawk.schema.files import shipped

    output = folder / run.name
    if not (output / "results.json").is_file():
        convert(Recipe.load(shipped("demo"), local_settings(str(fetch.smollm2())) + settings_for(run, tokens, output)))
    return row(run, json.loads((output / "results.json").read_text(encoding="utf-8")))


def row(run: Run, results: dict) -> dict:
    """A run's figures. tuned_on: the KL on held-out text, by which a rate is chosen."""
    first, last = results["evaluation"]["before"], list(results["evaluation"].values())[-1]
    return asdict(run) | {
        "kl": last["evaluation"]["kl"], "ratio": float(last["evaluation"]["perplexity_ratio"]),
        "top1_agreement": last["evaluation"]["top1_agreement"], "kl_before": first["evaluation"]["kl"],
        "tuned_on": last["held_out"]["kl"],
        "tokens": {phase: found["tokens"] for phase, found in results["phases"].items()},
        "machine": results["machine"],
    }  # fmt: skip


class Progress:
    """How many runs are done, and how long the rest will take at the pace of those that this process has made."""

    def __init__(self, total: int, clock=time.monotonic):
        self.total, self.begun, self.made, self.clock = total, 0, [], clock

    def __call__(self, run: Run, work):
        """What `work` gives; it takes no time where the run was there."""
        self.begun += 1
        start = self.clock()
        print(f"run {self.begun} of {self.total}: {run.name}{self._rest()}", flush=True)
        found = work()
        if (took := self.clock() - start) > 5:
            self.made.append(took)
        return found

    def _rest(self) -> str:
        if not self.made:
            return ""
        left = statistics.mean(self.made) * (self.total - self.begun + 1)
        return f"; about {left / 60:.0f} minutes for what is left"


def all_rows(options: argparse.Namespace, do, progress: Progress) -> list[dict]:
    """Every run, in order: for each mixer and schedule the rates, then the other seeds with the best of them."""
    rows = []
    for mixer in options.mixers:
        for phases in options.schedules:

            def made(rate: float, seed: int, mixer=mixer, phases=phases) -> dict:
                run = Run(mixer, phases, rate, seed)
                return progress(run, lambda: do(run))

            tried = [made(rate, 0) for rate in options.rates]
            rows += tried
            best = min(tried, key=lambda found: found["tuned_on"])["rate"]
            rows += [made(best, seed) for seed in range(1, options.seeds)]
            print("\n".join(table(summary(rows), options.tokens)), flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """For each mixer and schedule the mean and the sample standard deviation over seeds with the rate that was
    chosen."""
    found = []
    for mixer, phases in dict.fromkeys((r["mixer"], r["phases"]) for r in rows):
        mine = [r for r in rows if (r["mixer"], r["phases"]) == (mixer, phases)]
        rate = min((r for r in mine if r["seed"] == 0), key=lambda r: r["tuned_on"])["rate"]
        seeds = [r for r in mine if r["rate"] == rate]
        line = {"mixer": mixer, "phases": phases, "rate": rate, "rates": sorted({r["rate"] for r in mine})}
        line |= {"seeds": len(seeds), "kl_before": statistics.mean(r["kl_before"] for r in seeds)}
        for name in ("kl", "ratio", "top1_agreement"):
            values = [r[name] for r in seeds]
            line[name] = {"mean": statistics.mean(values), "values": values}
            line[name]["deviation"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def timed(options: argparse.Namespace) -> dict[str, list[list[dict]]]:
    """Who -> the speeds of each round: the teacher and a student of each mixer, one after another in every round, so
    that a machine that grows slower does so for all."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.loading.models import load_teacher
    from mohawk.measures.compare import decode_speed
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.schema.files import shipped

    layers = Recipe.load(shipped("demo")).student.ssm_layers
    models = {"teacher": load_teacher(fetch.smollm2())}
    models |= {mixer: hybrid_from_teacher(models["teacher"], layers, mixer).eval() for mixer in options.mixers}
    rounds: dict[str, list[list[dict]]] = {name: [] for name in models}
    for turn in range(ROUNDS):
        print(f"timing decoding, round {turn + 1} of {ROUNDS}", flush=True)
        for name, model in models.items():
            rounds[name].append([asdict(speed) for speed in decode_speed(model, CONTEXTS, STEPS)])
    return rounds


def decoding(rounds: dict[str, list[list[dict]]]) -> dict[str, list[dict]]:
    """Who -> for each context the median over rounds of tokens per second, and the bytes of a state."""
    return {
        name: [
            {
                "context": many[0]["context"], "state_bytes": many[0]["state_bytes"],
                "tokens_per_s": statistics.median(one["tokens_per_s"] for one in many),
            }
            for many in zip(*turns, strict=True)
        ]
        for name, turns in rounds.items()
    }  # fmt: skip


def table(lines: list[dict], tokens: float) -> list[str]:
    most = max(line["seeds"] for line in lines)
    told = "mean ± standard deviation over seeds" if most > 1 else "one seed"
    text = [
        f"SmolLM2-135M-Instruct, 15 of 30 layers replaced, {tokens:,.0f} training tokens a run; text of another "
        f"source; {told}. Learning rates: times the demo's, the best on held-out text.",
        "",
        "| mixer | phases | learning rates | seeds | KL (nats) | perplexity ratio | same top token | KL before |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]

    def cell(line: dict, name: str, form: str) -> str:
        value, deviation = line[name]["mean"], line[name]["deviation"]
        return f"{value:{form}}" + (f" ± {deviation:{form}}" if deviation is not None else "")

    for line in lines:
        rates = f"{line['rate']:g} of {', '.join(f'{rate:g}' for rate in line['rates'])}"
        text.append(
            f"| {line['mixer']} | {line['phases']} | {rates} | {line['seeds']} | "
            f"{cell(line, 'kl', '.4f')} | {cell(line, 'ratio', '.3f')} | {cell(line, 'top1_agreement', '.1%')} | "
            f"{line['kl_before']:.2f} |"
        )
    return text


def decoding_table(found: dict[str, list[dict]]) -> list[str]:
    contexts = [f"{one['context']:,}" for one in found["teacher"]]
    heads = [f"tokens/s after {context}" for context in contexts] + [f"state after {context}" for context in contexts]
    text = ["| one sequence | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    for name, rows in found.items():
        cells = [f"{one['tokens_per_s']:.1f}" for one in rows] + [f"{one['state_bytes'] / 1e6:.1f} MB" for one in rows]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return text


def draw(lines: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    mixers, places = (list(dict.fromkeys(line[what] for line in lines)) for what in ("mixer", "phases"))
    width = 0.8 / len(mixers)
    for turn, mixer in enumerate(mixers):
        own = [line for line in lines if line["mixer"] == mixer]
        x = [places.index(line["phases"]) + width * (turn - (len(mixers) - 1) / 2) for line in own]
        errors = [line["kl"]["deviation"] or 0 for line in own]
        bars = axis.bar(x, [line["kl"]["mean"] for line in own], width * 0.95, yerr=errors, capsize=3, label=mixer)
        axis.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        for place, line in zip(x, own, strict=True):
            axis.plot([place] * line["seeds"], line["kl"]["values"], "k.", markersize=3)
    axis.set_xticks(range(len(places)), [name.replace(", ", "\n") for name in places])
    axis.set_xlabel("phases")
    axis.set_ylabel("KL(teacher ‖ student), nats per token")
    axis.set_title("The same tokens, without and with phases 1 and 2")
    axis.margins(y=0.2)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["mamba2", "gated_delta"], help="mixers to compare")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="which of them")
    parser.add_argument("--tokens", type=float, default=65536, help="training tokens of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs with the best rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2], help="times the demo's learning rates")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    parser.add_argument("--keep", action="store_true", help="take rows of the ablation.json there is, and run the rest")
    options = parser.parse_args()
    progress = Progress(len(options.mixers) * len(options.schedules) * (len(options.rates) + options.seeds - 1))
    known = measured(options.results / "ablation.json", options.tokens) if options.keep else {}
    rows = all_rows(options, lambda run: known.get(run) or done(run, options.tokens, options.runs), progress)
    lines, speeds = summary(rows), decoding(timed(options))
    options.results.mkdir(parents=True, exist_ok=True)
    from mohawk.core.devices import machine

    timed_on = machine("cpu")["devices"][0]  # rows that were kept may be of another
    about = {"timed_on": timed_on, "tokens": options.tokens, "seeds": options.seeds, "date": time.strftime("%Y-%m-%d")}
    written = {"about": about, "summary": lines, "decoding": speeds, "rows": rows}
    (options.results / "ablation.json").write_text(json.dumps(written, indent=1) + "\n")
    draw(lines, options.results / "ablation.png")
    chosen = "".join(f" '{name}'" for name in options.schedules) if options.schedules != list(SCHEDULES) else ""
    chosen = chosen and f" --schedules{chosen}"
    command = (
        f"models/ablation.py --mixers {' '.join(options.mixers)}{chosen} --tokens {options.tokens:.0f} "
        f"--seeds {options.seeds} --rates {' '.join(f'{rate:g}' for rate in options.rates)}"
    )
    told = made_by(rows[0]["machine"], command)
    plot = "![ablation](benchmarks/results/ablation.png)"
    text = [
        *table(lines, options.tokens),
        "",
        *decoding_table(speeds),
        "",
        f"Decoding: {timed_on}.",
        "",
        told,
        "",
        plot,
    ]
    if options.results == RESULTS:
        put_in_docs("ablation", text)
    else:
        (options.results / "ablation.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

"""What is a cut worth? SmolLM2-135M-Instruct without 10, 25 and 50 % of its parameters outside embedding and head.

Units kept by importance (activations), by magnitude (norms of weights) and by chance, before and after equal healing;
less width (hidden channels, heads, MLPs) against less depth (whole layers, and so much of the MLPs that parameters are
equal); one cut against two rounds of cutting and healing with the same tokens in all. Runs are ordinary `mohawk prune`
runs, each stops and resumes like one, and what is done is not done again; the table, its JSON and a plot go to
benchmarks/results/.

    python benchmarks/models/pruning.py [--tokens 98304] [--cuts 0.1 0.25 0.5] [--seed 0] [--runs runs/pruning]
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

STRATEGIES = ("importance", "magnitude", "random")
TEXTS = {"held_out": "held-out text of the training sources", "evaluation": "text of another source"}
COLORS = {"importance": "#1f6feb", "magnitude": "#d9730d", "random": "#8c959f", "depth": "#1a7f37"}
TOLERANCE = 0.02  # of the parameters


@dataclass(frozen=True)
class Case:
    """One run: how much goes, of what, by what, in how many rounds."""

    cut: float
    of: str = "width"
    strategy: str = "importance"
    rounds: int = 1

    @property
    def name(self) -> str:
        return f"{self.of}-{self.cut:g}-{self.strategy}" + f"-{self.rounds}-rounds" * (self.rounds > 1)


def cases(cuts: list[float]) -> list[Case]:
    return [
        *(Case(cut, strategy=strategy) for cut in cuts for strategy in STRATEGIES),
        *(Case(cut, of="depth") for cut in cuts),
        Case(max(cuts), rounds=2),
    ]


def sizes_for(case: Case, config) -> dict:
    """The sizes that a case cuts to, the same for every strategy."""
    from mohawk.models.cutting.sizes import sizes_of
    from mohawk.pruning.search import Budget, Costs, candidates
    from mohawk.pruning.sizes import empty_model, parameters_of

    own, inside = sizes_of(config), parameters_of(empty_model(config))[1]
    budget = Budget("nonembedding", (1 - case.cut) * inside, TOLERANCE)
    depth = own.layers if case.of == "width" else math.ceil((1 - case.cut) * own.layers)
    width = "all" if case.of == "width" else "ffn"
    found = candidates(Costs(config, "nonembedding"), budget, depths=[depth], widths=[width])[0]
    return {name: value for name, value in asdict(found).items() if value != getattr(own, name)}


def recipe_for(case: Case, options: argparse.Namespace, config, teacher: str):
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo.run import local_settings
    from mohawk.pruning.recipe import PruneRecipe
    from mohawk.schema.files import shipped

    data = Recipe.load(shipped("demo"), local_settings(teacher)).model_dump(mode="json")
    tokens = options.tokens // case.rounds
    return PruneRecipe.from_dict(
        {
            "teacher": data["teacher"],
            "data": data["data"],
            "prune": {**sizes_for(case, config), "strategy": case.strategy, "rounds": case.rounds},
            "calibration": {"tokens": options.calibration, "sequence_length": options.length, "batch_size": 4},
            "heal": {
                "tokens": tokens, "batch_size": 4, "gradient_accumulation": 2, "sequence_length": options.length,
                "learning_rate": 5e-4, "decay": 0.3, "save_every": 20,
            },
            "evaluation": {
                "sequence_length": options.length, "batch_size": 4, "tokens": options.evaluated, "contexts": [64],
                "decode_tokens": 2, "continuation_tokens": 20,
            },
            "seed": options.seed,
            "output": str(options.runs / case.name),
        }
    )  # fmt: skip


def row(case: Case, run: Path, tokens: int) -> dict:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if results["recipe"]["heal"]["tokens"] != tokens // case.rounds:
        raise SystemExit(f"{run} was healed on another number of tokens; delete it, or give another --runs")
    cuts = [json.loads((run / "rounds" / str(i + 1) / "cut.json").read_text()) for i in range(case.rounds)]
    # before: as cut, before any healing; of two rounds the last cut
    stages = {"before": f"prune_{case.rounds}", "after": f"heal_{case.rounds}"}
    found = {when: results["evaluation"][stage] for when, stage in stages.items()}
    return {
        **asdict(case),
        "sizes": cuts[-1]["after"],
        "layers": cuts[-1]["layers"],
        "parameters": cuts[-1]["parameters"],
        "outside": cuts[-1]["outside_embedding_and_head"],
        "tokens": sum(phase["tokens"] for phase in results["phases"].values()),
        "seconds": sum(phase["seconds"] for phase in results["phases"].values()),
        "found": {when: {text: texts[text] for text in TEXTS if text in texts} for when, texts in found.items()},
        "machine": results["machine"],
    }


def table(rows: list[dict], text: str = "evaluation") -> list[str]:
    told = rows[0]["found"]["after"][text]
    lines = [
        f"SmolLM2-135M-Instruct, {TEXTS[text]} ({told['tokens']:,} tokens, the teacher's perplexity "
        f"{told['teacher_perplexity']:.2f}), every run healed on {rows[0]['tokens']:,} tokens in all, one seed. "
        "The cut is of the parameters outside embedding and head; KL from the teacher in nats per token.",
        "",
        "| cut | of | by | rounds | layers / hidden / MLP / heads | KL as cut | KL healed | perplexity healed | "
        "same top token |",
        "|---:|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        before, after, sizes = r["found"]["before"][text], r["found"]["after"][text], r["sizes"]
        lines.append(
            f"| {r['cut']:.0%} | {r['of']} | {r['strategy']} | {r['rounds']} | {sizes['layers']} / {sizes['hidden']} / "
            f"{sizes['ffn']} / {sizes['heads']} | {figure(before['kl'])} | {figure(after['kl'])} | "
            f"{figure(after['student_perplexity'])} | {after['top1_agreement']:.1%} |"
        )
    return lines


def figure(value: float | str) -> str:
    value = float(value)  # also reads "inf" and "nan"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def draw(rows: list[dict], target: Path, text: str = "evaluation") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mohawk.runs.figures import log_axis

    def kl(found: list[dict], when: str) -> list[float]:
        return [float(r["found"][when][text]["kl"]) for r in found]

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4), layout="constrained")
    for name in STRATEGIES:
        own = [r for r in rows if (r["of"], r["strategy"], r["rounds"]) == ("width", name, 1)]
        x = [100 * r["cut"] for r in own]
        axes[0].plot(x, kl(own, "before"), "--", color=COLORS[name], marker="x", ms=5, label=f"{name}, as cut")
        axes[0].plot(x, kl(own, "after"), color=COLORS[name], marker="o", ms=5, label=f"{name}, healed")
    for name, color in (("width", COLORS["importance"]), ("depth", COLORS["depth"])):
        own = [r for r in rows if (r["of"], r["strategy"], r["rounds"]) == (name, "importance", 1)]
        x = [100 * r["cut"] for r in own]
        axes[1].plot(x, kl(own, "before"), "--", color=color, marker="x", ms=5, label=f"{name}, as cut")
        axes[1].plot(x, kl(own, "after"), color=color, marker="o", ms=5, label=f"{name}, healed")
    most = max(r["cut"] for r in rows)
    ends = [r for r in rows if (r["of"], r["strategy"], r["cut"]) == ("width", "importance", most)]
    bars = axes[2].bar(
        [f"{r['rounds']} round" + "s" * (r["rounds"] > 1) for r in ends],
        kl(ends, "after"),
        width=0.5,
        color=COLORS["importance"],
    )
    axes[2].bar_label(bars, fmt="%.3f")
    axes[2].set_title(f"{most:.0%} of the width, equal tokens in all")
    axes[0].set_title("what stays, by which scores")
    axes[1].set_title("width or depth")
    for axis in axes[:2]:
        axis.set_xlabel("cut of the parameters outside embedding and head, %")
        log_axis(axis)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_ylabel("KL(teacher ‖ student), nats per token")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304, help="of healing, of each run in all")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="shares that go")
    parser.add_argument("--calibration", type=int, default=32_768, help="tokens that importance is measured on")
    parser.add_argument("--evaluated", type=int, default=8192, help="tokens of each text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as depth")
    parser.add_argument("--teacher", help="another checkpoint, instead of SmolLM2")
    parser.add_argument("--runs", type=Path, default=Path("runs/pruning"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    options = parser.parse_args()
    from mohawk.demo import fetch
    from mohawk.loading.configs import load_config
    from mohawk.pruning.run import prune

    teacher = options.teacher or str(fetch.smollm2())
    config, rows = load_config(teacher), []
    for case in cases(options.cuts):
        if options.only in case.name:
            run = options.runs / case.name
            if not (run / "results.json").is_file():
                prune(recipe_for(case, options, config, teacher))
                shutil.rmtree(run / "phases")  # gigabytes; the figures and the final student stay
            rows.append(row(case, run, options.tokens))
            print("\n".join(table(rows)), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in vars(options).items() if key not in ("runs", "results")}
    about = {**asked, "model": "SmolLM2-135M-Instruct", "date": time.strftime("%Y-%m-%d")}
    lines = table(rows)
    (options.results / "pruning.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (options.results / "pruning.md").write_text("\n".join(lines) + "\n")
    draw(rows, options.results / "pruning.png")
    if options.results == RESULTS:
        command = f"models/pruning.py --tokens {options.tokens} --cuts {' '.join(map(str, options.cuts))}"
        told = made_by(rows[0]["machine"], command)
        put_in_docs("pruning", [*lines, "", told, "", "![pruning](benchmarks/results/pruning.png)"])


if __name__ == "__main__":
    main()

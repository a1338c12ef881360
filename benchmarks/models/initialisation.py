"""What should a mixer start from? The starts that each has, before training and after equal tokens of phases 1 and 2.

| start | projections | convolution, gate |
|---|---|---|
| random | random | random |
| neutral | random | identity, 1: Phi-Mamba's |
| attention | q -> C, k -> B, v -> x, o -> out; of delta rules q, k, v and o | identity up to a scale, constant |
| attention, z from W_O | the same, z rows from W_O and W_V | the same, as AWS hybrid-model-factory gates |
| calibrated | attention's with each mixer's default gate, then all of a mixer fitted to attention's output | the same |

A delta rule has no neutral start, and Gated DeltaNet no constant gate. A calibrated start takes its tokens from phase
2; it sees each of them more than once.

SmolLM2-135M-Instruct becomes the demo's hybrid once for each, by the demo's recipe with other budgets and without phase
3. Runs are ordinary `mohawk convert` runs, each stops and resumes like one, and what is done is not done again; with
--keep nor is what initialisation.json has of as many tokens, whatever version it is of. The table, its JSON and a plot
go to benchmarks/results/.

    python benchmarks/models/initialisation.py [--mixing 2048] [--hidden 8192] [--mixers mamba2 gated_delta]
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

STARTS = {  # name -> (student.init, student.gate)
    "random": ("random", "open"),
    "neutral": ("neutral", "open"),
    "attention": ("attention", "open"),
    "attention, z from W_O": ("attention", "output"),
    "calibrated": ("calibrated", None),
}
MIXERS = {  # the starts of each
    "mamba2": tuple(STARTS),
    "discrete_mamba2": tuple(STARTS),
    "gated_delta": ("random", "attention, z from W_O", "calibrated"),
    "kimi_delta": ("random", "attention", "attention, z from W_O", "calibrated"),
}
STAGES = ("before", "mixing", "hidden")


def recipe_for(mixer: str, start: str, mixing: float, hidden: float, output: Path):
    """The demo's recipe from another start, up to the end of phase 2, as part of which least squares count."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.demo.run import local_settings
    from mohawk.schema.files import shipped

    init, gate = STARTS[start]
    settings = local_settings(str(fetch.smollm2()))
    solved = min(Recipe.load(shipped("demo")).phases.hidden.solve_tokens, int(hidden) // 3)
    if init == "calibrated":
        hidden -= solved
        settings.append(f"student.calibration_tokens={solved}")
    settings += [
        f"student.mixer={mixer}",
        f"student.init={init}",
        f"student.gate={gate or 'null'}",
        f"phases.mixing.tokens={mixing:.0f}",
        f"phases.hidden.tokens={hidden - solved:.0f}",
        f"phases.hidden.solve_tokens={solved}",
        "phases.end_to_end=null",
        "evaluation.tokens=2048",
        "evaluation.contexts=[64]",
        "evaluation.longest=null",
        "evaluation.decode_tokens=2",
        "evaluation.continuation_tokens=2",
        f"output={output}",
    ]
    return Recipe.load(shipped("demo"), settings)


def measured(results: Path, mixing: float, hidden: float) -> dict[tuple[str, str], dict]:
    """What initialisation.json has of runs of as many tokens, by mixer and start."""
    if not results.is_file():
        return {}
    kept = json.loads(results.read_text(encoding="utf-8"))
    if (kept["about"]["mixing"], kept["about"]["hidden"]) != (mixing, hidden):
        return {}
    return {(r["mixer"], r["start"]): r for r in kept["rows"]}


def row(mixer: str, start: str, run: Path) -> dict:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    found = {stage: results["evaluation"][stage]["evaluation"] for stage in STAGES}
    return {
        "mixer": mixer, "start": start, "kl": {stage: found[stage]["kl"] for stage in STAGES},
        "ratio": found["hidden"]["perplexity_ratio"], "top1_agreement": found["hidden"]["top1_agreement"],
        "tokens": {phase: trained["tokens"] for phase, trained in results["phases"].items()},
        "evaluated_tokens": found["hidden"]["tokens"], "machine": results["machine"],
    }  # fmt: skip


def table(rows: list[dict], mixing: float, hidden: float) -> list[str]:
    lines = [
        f"SmolLM2-135M-Instruct, half of its layers replaced; phase 1 with {mixing:,.0f} tokens, phase 2 with "
        f"{hidden:,.0f}; KL from the teacher in nats per token, text of another source, one seed.",
        "",
        "| mixer | start | KL before | after phase 1 | after phases 1 and 2 | perplexity ratio | same top token |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        kl = r["kl"]
        lines.append(
            f"| {r['mixer']} | {r['start']} | {kl['before']:.3f} | {kl['mixing']:.3f} | {kl['hidden']:.4f} | "
            f"{float(r['ratio']):.3f} | {r['top1_agreement']:.1%} |"
        )
    return lines


def draw(rows: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mohawk.runs.figures import log_axis

    mixers = list(dict.fromkeys(r["mixer"] for r in rows))
    figure, axes = plt.subplots(
        1, len(mixers), figsize=(1 + 3.6 * len(mixers), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, mixer in zip(axes[0], mixers, strict=True):
        for r in rows:
            if r["mixer"] == mixer:
                axis.plot(range(len(STAGES)), [r["kl"][stage] for stage in STAGES], marker="o", label=r["start"])
        axis.set_xticks(range(len(STAGES)), ["before", "after phase 1", "after phase 2"])
        log_axis(axis)
        axis.grid(alpha=0.25)
        axis.margins(x=0.15)
        axis.set_title(mixer)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("KL(teacher ‖ student), nats per token")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="mixers to compare")
    parser.add_argument("--mixing", type=float, default=2048, help="tokens of phase 1")
    parser.add_argument(
        "--hidden", type=float, default=8192, help="tokens of phase 2, its least-squares start included"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/initialisation"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    parser.add_argument(
        "--keep", action="store_true", help="take rows of the initialisation.json there is, and run the rest"
    )
    options = parser.parse_args()
    from mohawk.conversion.run import convert

    results = options.results / "initialisation.json"
    known = measured(results, options.mixing, options.hidden) if options.keep else {}
    rows = []
    for mixer in options.mixers:
        for start in MIXERS[mixer]:
            if (mixer, start) in known:
                rows.append(known[mixer, start])
                continue
            run = options.runs / f"{mixer}-{start.replace(', ', '-').replace(' ', '-')}"
            if not (run / "results.json").is_file():
                convert(recipe_for(mixer, start, options.mixing, options.hidden, run))
            rows.append(row(mixer, start, run))
            print("\n".join(table(rows, options.mixing, options.hidden)), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    about = {"mixing": options.mixing, "hidden": options.hidden, "date": time.strftime("%Y-%m-%d")}
    lines = table(rows, options.mixing, options.hidden)
    results.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (options.results / "initialisation.md").write_text("\n".join(lines) + "\n")
    draw(rows, options.results / "initialisation.png")
    if options.results == RESULTS:
        command = f"models/initialisation.py --mixing {options.mixing:.0f} --hidden {options.hidden:.0f}"
        command += "" if options.mixers == list(MIXERS) else f" --mixers {' '.join(options.mixers)}"
        told = made_by(rows[0]["machine"], command)
        plot = "![initialisation](benchmarks/results/initialisation.png)"
        put_in_docs("initialisation", [*lines, "", told, "", plot])


if __name__ == "__main__":
    main()

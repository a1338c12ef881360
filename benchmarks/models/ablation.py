"""Does each phase of MOHAWK pay? The same student, the same number of tokens, with and without phases 1 and 2.

SmolLM2-135M-Instruct becomes the demo's hybrid six times: phase 3 alone, phases 2 and 3, and all three, each from
attention initialisation and from random mixers. Every run sees the same total of training tokens (the earlier phases
take theirs from phase 3, and the least-squares start of phase 2 takes its from phase 2) and is evaluated on text of
another source. Runs are ordinary `mohawk convert` runs and resume; the table, its JSON and a plot go to
benchmarks/results/.

    python benchmarks/models/ablation.py [--tokens 65536] [--runs runs/ablation]
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

SCHEDULES = {  # share of the token budget for each phase; what the paper's ablation compares
    "3": {"end_to_end": 1.0},
    "2-3": {"hidden": 0.5, "end_to_end": 0.5},
    "1-2-3": {"mixing": 1 / 12, "hidden": 5 / 12, "end_to_end": 0.5},
}
INITS = ("attention", "random")


def recipe_for(init: str, schedule: dict[str, float], tokens: float, output: Path):
    """The demo's recipe with another start and other budgets."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.demo.run import local_settings
    from mohawk.schema.files import shipped

    settings = local_settings(str(fetch.smollm2()))
    settings += [
        f"student.init={init}",
        f"output={output}",
        "evaluation.contexts=[512]",
        "evaluation.decode_tokens=2",
    ]
    solved = Recipe.load(shipped("demo")).phases.hidden.solve_tokens
    for phase in ("mixing", "hidden", "end_to_end"):
        budget = tokens * schedule.get(phase, 0) - (solved if phase == "hidden" else 0)
        settings.append(f"phases.{phase}.tokens={budget:.0f}" if budget > 0 else f"phases.{phase}=null")
    return Recipe.load(shipped("demo"), settings)


def row(init: str, name: str, run: Path) -> dict:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    last = list(results["evaluation"].values())[-1]["evaluation"]
    start = results["evaluation"]["before"]["evaluation"]
    return {
        "init": init, "phases": name, "kl": last["kl"], "ratio": last["perplexity_ratio"],
        "top1_agreement": last["top1_agreement"], "kl_before": start["kl"],
        "tokens": {phase: found["tokens"] for phase, found in results["phases"].items()},
        "machine": results["machine"],
    }  # fmt: skip


def draw(rows: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for offset, init in enumerate(INITS):
        own = [r for r in rows if r["init"] == init]
        x = [i + 0.38 * (offset - 0.5) for i in range(len(own))]
        bars = axis.bar(x, [r["kl"] for r in own], width=0.36, label=f"{init} initialisation")
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
    axis.set_xticks(range(len(SCHEDULES)), [f"phase{'s' * (len(name) > 1)} {name}" for name in SCHEDULES])
    axis.set_ylabel("KL(teacher ‖ student), nats per token")
    axis.set_title("The same tokens, with and without phases 1 and 2")
    axis.margins(y=0.2)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


def table(rows: list[dict], tokens: float) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, {tokens:,.0f} training tokens a run; text of another source.",
        "",
        "| init | phases | KL (nats) | perplexity ratio | same top token | KL before |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['init']} | {r['phases']} | {r['kl']:.4f} | {float(r['ratio']):.3f} | {r['top1_agreement']:.1%} | "
            f"{r['kl_before']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=65536, help="training tokens of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    options = parser.parse_args()
    from mohawk.conversion.run import convert

    rows = []
    for init in INITS:
        for name, schedule in SCHEDULES.items():
            run = options.runs / f"{init}-{name}"
            if not (run / "results.json").is_file():
                convert(recipe_for(init, schedule, options.tokens, run))
            rows.append(row(init, name, run))
            print(table(rows, options.tokens), flush=True)
    RESULTS.mkdir(exist_ok=True)
    about = {"tokens": options.tokens, "date": time.strftime("%Y-%m-%d")}
    (RESULTS / "ablation.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    told = made_by(rows[0]["machine"], f"models/ablation.py --tokens {options.tokens:.0f}")
    put_in_docs(
        "ablation",
        [*table(rows, options.tokens).splitlines(), "", told, "", "![ablation](benchmarks/results/ablation.png)"],
    )
    draw(rows, RESULTS / "ablation.png")


if __name__ == "__main__":
    main()

"""Which method of distillation does most with the same tokens? SmolLM2-135M teaches every second layer of itself.

Every method trains the same student (but for `from scratch`, whose weights are random) on the same rows in the same
order, with the same optimiser, at one learning rate: distillation_rates.py gives each the best of several. Runs are
ordinary `mohawk distill` runs, each stops and resumes like one, and what is done is not done again; the table, its
JSON and a plot go to benchmarks/results/, where rows of methods that are not asked for stay as they are.

    python benchmarks/models/distillation.py [--tokens 204800] [--seed 0] [--methods ...] [--runs runs/distillation]
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

ONLY_CE = {"kd_weight": 0.0, "ce_weight": 1.0}
METHODS = {  # name -> what its stage says
    "from scratch, cross entropy": {**ONLY_CE, "scratch": True},
    "cross entropy": ONLY_CE,
    "KD, T 1": {},
    "KD, T 2": {"temperature": 2.0},
    "KD, T 4": {"temperature": 4.0},
    "KD + cross entropy": {"kd_weight": 0.5, "ce_weight": 0.5},
    "KD + hidden states": {"hidden": {"weight": 0.1, "layers": "uniform", "normalise": "layer"}},
    "KD + attention": {"attention": {"weight": 0.1, "layers": "uniform", "metric": "kl"}},
    "KD from cached top 64": {"cache": "top-k"},
    "KD from 12 random samples": {"cache": "samples"},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "TAID": {"taid": {}},
}
TEXTS = {"held_out": "held-out text of the training sources", "evaluation": "text of another source"}


def recipe_for(name: str, tokens: int, seed: int, runs: Path, caches: Path):
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.demo.run import local_settings
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.schema.files import shipped

    data = Recipe.load(shipped("demo"), local_settings(str(fetch.smollm2()))).model_dump(mode="json")
    for source in data["data"]["train"]:
        source["sampling_weight"] = 1.0  # a mixture of just as many rows as are trained on, so that a cache is of them
    stage = dict(METHODS[name])
    student = {"layers": "every_second", "scratch": stage.pop("scratch", False)}
    if "cache" in stage:
        stage["cache"] = str(caches / stage["cache"])
    return DistillRecipe.from_dict(
        {
            "teacher": data["teacher"],
            "student": student,
            "data": data["data"],
            "stages": [
                {
                    "tokens": tokens, "batch_size": 4, "gradient_accumulation": 2, "sequence_length": 256,
                    "learning_rate": 1e-3, "decay": 0.3, "save_every": 20, **stage,
                }
            ],
            "evaluation": {
                "sequence_length": 512, "batch_size": 4, "tokens": 8192, "contexts": [64], "decode_tokens": 2,
                "continuation_tokens": 20,
            },
            "seed": seed,
            "output": str(runs / name.replace(", ", "-").replace(" ", "-").replace("+", "and")),
        }
    )  # fmt: skip


def write_caches(recipe, kinds: set[str], tokens: int, caches: Path) -> None:
    """What the teacher says of the rows that are trained on, once for all runs that learn from it."""
    from mohawk.distillation.cache import cache_teacher

    stage = recipe.stages[0]
    for kind in sorted(kinds):
        cache_teacher(
            recipe, caches / kind, kind=kind, k=64, draws=12, temperature=1.0, sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
        )  # fmt: skip


def row(name: str, run: Path) -> dict:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    last = list(results["evaluation"])[-1]
    (phase,) = results["phases"].values()
    stage = results["recipe"]["stages"][0]
    if stage["cache"] is not None:
        stage["cache"] = Path(stage["cache"]).name
    return {
        "method": name, "before": results["evaluation"]["before"], "texts": results["evaluation"][last],
        "tokens": phase["tokens"], "seconds": phase["seconds"], "parameters": results["parameters"],
        "machine": results["machine"], "recipe": stage,
    }  # fmt: skip


def table(rows: list[dict]) -> list[str]:
    lines = []
    for text, about in TEXTS.items():
        found = rows[0]["texts"][text]
        lines += [
            f"**On {about}** ({found['tokens']:,} tokens; the teacher's perplexity "
            f"{float(found['teacher_perplexity']):.2f})",
            "",
            "| method | perplexity | ratio | KL (nats) | same top token |",
            "|---|---:|---:|---:|---:|",
        ]
        for r in rows:
            f = r["texts"][text]
            lines.append(
                f"| {r['method']} | {float(f['student_perplexity']):.2f} | {float(f['perplexity_ratio']):.3f} | "
                f"{float(f['kl']):.3f} | {f['top1_agreement']:.1%} |"
            )
        lines.append("")
    notes = [f"{r['method']}: {r['note']}." for r in rows if "note" in r]
    return lines + notes if notes else lines[:-1]


def kept_rows(path: Path, tokens: int, made: list[dict]) -> list[dict]:
    """Those made, and of other methods those that were measured with as many tokens, in the order of METHODS."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"about": {}, "rows": []}
    rows = {r["method"]: r for r in old["rows"] if old["about"]["tokens"] == tokens}
    rows |= {r["method"]: r for r in made}
    return sorted(rows.values(), key=lambda r: list(METHODS).index(r["method"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=204_800, help="that every method trains on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table, its JSON and the plot")
    options = parser.parse_args()
    from mohawk.distillation.plots import plot_variants
    from mohawk.distillation.run import distill

    runs = options.runs / f"seed-{options.seed}"
    recipes = {m: recipe_for(m, options.tokens, options.seed, runs, runs / "caches") for m in options.methods}
    kinds = {METHODS[m]["cache"] for m in options.methods if "cache" in METHODS[m]}
    rows = []
    for method, recipe in recipes.items():
        run = Path(recipe.output)
        if not (run / "results.json").is_file():
            if "cache" in METHODS[method]:
                write_caches(recipe, kinds, options.tokens, runs / "caches")
            distill(recipe)
        rows.append(row(method, run))
        print("\n".join(table(rows)), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    name = "distillation" if options.seed == 0 else f"distillation_seed_{options.seed}"
    rows = kept_rows(options.results / f"{name}.json", options.tokens, rows)
    about = {"tokens": options.tokens, "seed": options.seed, "date": time.strftime("%Y-%m-%d")}
    (options.results / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (options.results / f"{name}.md").write_text("\n".join(table(rows)) + "\n")
    plot_variants([{"name": r["method"], "texts": r["texts"]} for r in rows], options.results / f"{name}.png")
    if options.results == RESULTS and options.seed == 0:
        parameters = rows[0]["parameters"]
        head = (
            f"SmolLM2-135M-Instruct ({parameters['teacher'] / 1e6:.0f}M parameters) and every second layer of it "
            f"({parameters['student'] / 1e6:.0f}M), {rows[0]['tokens']:,} tokens each:"
        )
        told = made_by(rows[0]["machine"], f"models/distillation.py --tokens {options.tokens}")
        plot = "![methods](benchmarks/results/distillation.png)"
        put_in_docs("distillation", [head, "", *table(rows), "", told, "", plot])


if __name__ == "__main__":
    main()

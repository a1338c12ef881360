"""Which layers should stay attention? The layers a ranking keeps, against an even spread of as many.

All 30 layers of SmolLM2-135M-Instruct get mixers, trained once by phases 1 and 2 of the demo's recipe; `mohawk select`
ranks them on held-out text of the training sources. Then, for several numbers of attention layers, the student of the
layers chosen and the one of an even spread are measured on text of another source and on key-value recall in lists that
the ranking has not seen. With --distil, both also go through a short phase 3 at one budget (`mohawk compose`, `mohawk
convert`). Every step resumes.

    python benchmarks/models/layer_choice.py [--run runs/all_layers] [--by kl both] [--distil 40960]
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

BUDGETS = (22, 15, 8, 4, 0)
DISTILLED = 8  # attention layers of the students that go through phase 3
COLORS = {"kl": "#1f6feb", "both": "#1a7f37", "recall": "#8250df", "alone": "#0a8f8f", "even": "#d9730d"}


def all_layers(run: Path):
    """The demo's recipe for every layer, up to phase 2."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.demo import fetch
    from mohawk.demo.run import local_settings
    from mohawk.schema.files import shipped

    settings = local_settings(str(fetch.smollm2()))
    settings += ["student.ssm_layers=all", "phases.hidden.tokens=30720", "phases.end_to_end=null", f"output={run}"]
    settings += ["evaluation.tokens=2048", "evaluation.contexts=[64]"]
    settings += ["evaluation.decode_tokens=2", "evaluation.continuation_tokens=20"]
    return Recipe.load(shipped("demo"), settings)


def even(kept: int, total: int) -> list[int]:
    """`kept` attention layers at equal distances, as far from both ends as from each other."""
    return [int((i + 0.5) * total / kept) for i in range(kept)]


def choices(found: dict, names: list[str]) -> Iterator[tuple[str, list[int]]]:
    """(ranking or "even", attention layers) for every budget."""
    total = found["num_layers"]
    for kept in BUDGETS:
        for name in names:
            yield name, sorted(found["rankings"][name]["order"][total - kept :])
        if 0 < kept < total:
            yield "even", even(kept, total)


def measure(run: Path, found: dict, names: list[str]) -> list[dict]:
    """Perplexity, KL and recall of the students of all choices, before phase 3, measured once."""
    from mohawk.core.json_files import read_json, write_json

    wanted = [("teacher", list(range(found["num_layers"]))), *choices(found, names)]
    kept, student = run / "selection" / "choices.json", found["settings"]["student"]
    known = read_json(kept) or {}
    if known.get("student") != student:
        known = {"student": student}
    missing = [attention for _, attention in wanted if key(attention) not in known]
    for attention, result in evaluated(run, missing) if missing else ():
        known[key(attention)] = result
        write_json(kept, known)
    return [{"choice": name, "attention": attention, **known[key(attention)]} for name, attention in wanted]


def key(attention: list[int]) -> str:
    return ",".join(map(str, attention))


def evaluated(run: Path, wanted: list[list[int]]) -> Iterator[tuple[list[int], dict]]:
    """The figures of the students with these attention layers, one after the other."""
    from rich.console import Console
    from tqdm import tqdm

    from mohawk.conversion.recipe import Recipe
    from mohawk.conversion.run import opened
    from mohawk.conversion.swap import keep_attention
    from mohawk.losses.heads import Head
    from mohawk.measures.compare import compare, packed_hidden_states
    from mohawk.measures.recall import recall_batches, recall_of
    from mohawk.models.families import decoder_layers
    from mohawk.models.hybrid import HybridForCausalLM

    conversion = opened(Recipe.load(run / "recipe.yaml"), run, Console())
    states, head = conversion.texts["evaluation"], Head.of(conversion.teacher).frozen()
    lists = recall_batches(conversion.tokenizer, 2048, seed=1)
    student = HybridForCausalLM.from_pretrained(run / "phases" / "hidden" / "student").to(conversion.device).eval()
    mixers, settings = list(decoder_layers(student)), {"device": conversion.device, "autocast": conversion.autocast}
    for attention in tqdm(wanted, desc="choices"):
        for i, layer in enumerate(mixers):
            decoder_layers(student)[i] = layer
        student.config.layer_types = ["linear_attention"] * len(mixers)
        keep_attention(student, conversion.teacher, [i for i in range(len(mixers)) if i not in attention])
        hidden = (packed_hidden_states(student, batch, **settings) for batch in lists)
        result = asdict(compare(student, states, autocast=conversion.autocast))
        yield attention, result | {"recall": asdict(recall_of(hidden, lists, head))}


def distil(run: Path, found: dict, names: list[str], tokens: float) -> list[dict]:
    """The students of one budget after phase 3 of `tokens` tokens at the demo's settings."""
    from mohawk.conversion.compose import compose
    from mohawk.conversion.recipe import Recipe
    from mohawk.conversion.run import convert
    from mohawk.schema.files import shipped

    last = Recipe.load(shipped("demo")).phases.end_to_end.model_dump(mode="json") | {"tokens": int(tokens)}
    settings = [f"phases.end_to_end.{key}={json.dumps(value)}" for key, value in last.items()]
    rows = []
    for name, attention in choices(found, names):
        if len(attention) == DISTILLED:
            output = run.with_name(f"{run.name}-{DISTILLED}-{name}")
            convert(Recipe.load(compose(run, attention=attention, output=output, overrides=settings) / "recipe.yaml"))
            results = json.loads((output / "results.json").read_text(encoding="utf-8"))
            stages = {stage: texts["evaluation"] for stage, texts in results["evaluation"].items()}
            rows.append({"choice": name, "attention": attention, "tokens": int(tokens), "stages": stages})
    return rows


def draw(rows: list[dict], total: int, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mohawk.runs.figures import log_axis

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    teacher, names = rows[0], list(dict.fromkeys(row["choice"] for row in rows[1:]))
    panels = (
        ("distance from the teacher", "KL(teacher ‖ student), nats per token", lambda row: row["kl"]),
        ("prediction", "perplexity", lambda row: row["student_perplexity"]),
        ("looking things up", "values recalled from a list, %", lambda row: 100 * row["recall"]["accuracy"]),
    )
    for axis, (title, label, value) in zip(axes, panels, strict=True):
        ends = [teacher] + [row for row in rows[1:] if not row["attention"]]
        for name in names:
            own = [row for row in rows[1:] if row["choice"] == name]
            own = [teacher, *own, *(end for end in ends[1:2] if own[-1]["attention"])]
            x = [100 * len(row["attention"]) / total for row in own]
            told = "even spread" if name == "even" else f"mohawk select --by {name}"
            style = {"ls": "--", "marker": "s"} if name == "even" else {"marker": "o"}
            axis.plot(x, [value(row) for row in own], color=COLORS[name], ms=4, label=told, **style)
        axis.set_title(title)
        axis.set_xlabel("layers that stay attention, %")
        axis.set_ylabel(label)
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    log_axis(axes[1])
    axes[0].legend(frameon=False)
    figure.savefig(target, dpi=110)


def table(rows: list[dict], distilled: list[dict], total: int) -> list[str]:
    teacher, names = rows[0], [n for n in dict.fromkeys(row["choice"] for row in rows[1:]) if n != "even"]
    lines = [
        f"SmolLM2-135M-Instruct, mixers for all {total} layers after phases 1 and 2; text of another source, before "
        f"phase 3. The teacher: perplexity {teacher['student_perplexity']:.2f}, recalls "
        f"{teacher['recall']['accuracy']:.1%} of {teacher['recall']['values']} values.",
        "",
        "| attention layers | chosen by | layers | KL (nats) | perplexity | values recalled |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for row in rows[1:]:
        if row["attention"] or row["choice"] == names[0]:
            lines.append(
                f"| {len(row['attention'])} | {row['choice'] if row['attention'] else ''} | "
                f"{', '.join(map(str, row['attention'])) or 'none'} | {row['kl']:.3f} | "
                f"{row['student_perplexity']:.2f} | {row['recall']['accuracy']:.1%} |"
            )
    if distilled:
        lines += ["", f"After phase 3 with {distilled[0]['tokens']:,} tokens:", ""]
        lines += [
            "| attention layers | chosen by | KL before | KL after | perplexity after |",
            "|---:|---|---:|---:|---:|",
        ]
        for row in distilled:
            before, after = row["stages"]["hidden"], row["stages"]["end_to_end"]
            lines.append(
                f"| {len(row['attention'])} | {row['choice']} | {before['kl']:.3f} | {after['kl']:.3f} | "
                f"{after['student_perplexity']:.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/all_layers"), help="folder of the all-layer run")
    parser.add_argument("--by", nargs="+", default=["kl"], help="rankings to compare with the even spread")
    parser.add_argument("--tokens", type=int, default=2048, help="of text that the ranking is measured on")
    parser.add_argument("--lazy", action="store_true", help="as of mohawk select")
    parser.add_argument("--distil", type=float, default=0, metavar="TOKENS", help="of phase 3 at one budget; 0: none")
    options = parser.parse_args()
    from mohawk.conversion.run import convert
    from mohawk.conversion.select import select
    from mohawk.core.devices import machine
    from mohawk.core.folders import is_complete

    if not is_complete(options.run / "phases" / "hidden" / "student"):
        convert(all_layers(options.run))
    for by in options.by:
        found = select(options.run, by=by, tokens=options.tokens, lazy=options.lazy)
    rows = measure(options.run, found, options.by)
    distilled = distil(options.run, found, options.by, options.distil) if options.distil else []
    about = {"model": "SmolLM2-135M-Instruct", "date": time.strftime("%Y-%m-%d"), "machine": machine("cpu")}
    results = {"about": about, "selection": found, "rows": rows, "distilled": distilled}
    (RESULTS / "layer_choice.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = table(rows, distilled, found["num_layers"])
    draw(rows, found["num_layers"], RESULTS / "layer_choice.png")
    command = f"models/layer_choice.py --by {' '.join(options.by)}"
    command += f" --tokens {options.tokens}" * (options.tokens != 2048) + " --lazy" * options.lazy
    command += f" --distil {options.distil:.0f}" * (options.distil > 0)
    told = made_by(about["machine"], command)
    put_in_docs("layer_choice", [*lines, "", told, "", "![layer choice](benchmarks/results/layer_choice.png)"])
    print("\n".join(lines))


if __name__ == "__main__":
    main()

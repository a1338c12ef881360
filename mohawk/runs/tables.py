"""A run's figures as tables of strings, for the screen and for its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mohawk.loading.describe import size_text
from mohawk.loading.tasks import CAUSAL
from mohawk.measures.paired import NORMAL
from mohawk.runs.plots import RETRIEVALS, TEXTS

if TYPE_CHECKING:
    from rich.console import Console

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
AFTER = {
    "before": "before phase 1",
    "mixing": "after phase 1, matrices",
    "hidden": "after phase 2, hidden states",
    "end_to_end": "after phase 3, end to end",
}


def who_of(found: Mapping[str, Any]) -> list[str]:
    """Those of teacher and student whom something says anything of: a run may have no teacher."""
    return [who for who in ("teacher", "student") if who in found]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The run's figures as tables of strings: quality for each text, size and speed, training."""
    made: list[Table] = [tuple(table) for table in results.get("own_tables", ())]
    stages = results.get("stages", AFTER)  # which earlier results did not have
    task = results.get("task", CAUSAL)
    if task == "classification":
        made += class_tables(results["evaluation"], stages)
    for text, name in TEXTS.items() if task != "classification" else ():
        rows, alone, tokens = [], [], 0
        for stage, name_of_stage in stages.items():
            if found := results["evaluation"].get(stage, {}).get(text):
                tokens = found["tokens"]
                if "kl" not in found:
                    alone.append([name_of_stage, *_alone_row(found)])
                    continue
                rows.append(
                    [
                        name_of_stage,
                        figure_text(found["student_perplexity"]),
                        figure_text(found["teacher_perplexity"]),
                        figure_text(found["perplexity_ratio"]),
                        figure_text(found["kl"]),
                        f"{found['top1_agreement']:.1%}",
                    ]
                )
        if alone:
            header = ["student", "perplexity", "bits per byte", "teacher's", "top token is right"]
            kept = [i for i in range(len(header)) if any(row[i] for row in alone)]
            cells = [[row[i] for i in kept] for row in alone]
            made.append((f"On {name} ({tokens:,} tokens)", [header[i] for i in kept], cells))
        if rows:
            header = ["student", "perplexity", "teacher's", "ratio", "KL (nats)", "same top token"]
            made.append((f"On {name} ({tokens:,} {'tokens' if task == CAUSAL else 'masked words'})", header, rows))
    last = next((found for stage in reversed(stages) if (found := results["evaluation"].get(stage))), {})
    made += agreement_tables(last, results["evaluation"].get("before"))
    made += behaviour_tables(results.get("behaviour") or {})
    if layers := results.get("layers"):
        made.append(layer_table(layers))
    decoding, parameters = results["decoding"], results["parameters"]
    rows = [["parameters", *(f"{parameters[who]:,}" for who in who_of(parameters))]]
    for speeds in zip(*(decoding[who] for who in who_of(decoding)), strict=True):
        context = f"after {speeds[0]['context']:,} tokens"
        rows.append([f"state {context}", *(size_text(s["state_bytes"]) for s in speeds)])
        rows.append([f"decoding {context}", *(f"{s['tokens_per_s']:.1f} tokens/s" for s in speeds)])
    # states and speeds of two dtypes are not comparable unless the reader knows
    header = ["", *(f"{who} ({results['dtypes'][who]})" for who in who_of(results["dtypes"]))]
    what = "Size and speed (one sequence, greedy, median)" if task == CAUSAL else "Size"
    made.append((what, header, rows))
    tenths = all("first_tenth" in phase for phase in results["phases"].values())
    first, last = ("first_tenth", "last_tenth") if tenths else ("first_loss", "last_loss")  # which 0.1.0 wrote
    rows = [
        [
            stages[name].removeprefix("after "),
            f"{phase['steps']:,}",
            f"{phase['tokens']:,}",
            time_text(phase["seconds"]),
            f"{figure_text(phase[first])} → {figure_text(phase[last])}",
            str(phase["skipped_steps"]),
        ]
        for name, phase in results["phases"].items()
    ]
    if rows:
        loss = f"loss, first → last {'tenth' if tenths else 'step'}"
        made.append(("Training", ["phase", "steps", "tokens", "time", loss, "steps skipped"], rows))
    if results.get("quantized"):
        made += quantized_tables(results["quantized"])
    return made + (task_tables(results["tasks"]) if results.get("tasks") else [])


def class_tables(evaluation: Mapping[str, Any], stages: Mapping[str, str]) -> list[Table]:
    """How classes are told before and after each stage, a table a text."""
    made: list[Table] = []
    for text, name in TEXTS.items():
        rows, texts = [], 0
        for stage, name_of_stage in stages.items():
            if found := evaluation.get(stage, {}).get(text):
                row = [name_of_stage, *(percent_text(found[f"{who}_accuracy"]) for who in ("student", "teacher"))]
                for key in ("f1", "roc_auc"):
                    each = (found[f"{who}_{key}"] for who in ("student", "teacher"))
                    row += ["-" if value is None else figure_text(value) for value in each]
                rows.append([*row, figure_text(found["kl"]), percent_text(found["top1_agreement"])])
                texts = found["tokens"]
        if rows:
            header = ["student", "accuracy", "teacher's", "F1", "teacher's", "ROC-AUC", "teacher's", "KL (nats)"]
            made.append((f"On {name} ({texts:,} texts)", [*header, "same class"], rows))
    return made


def _alone_row(found: Mapping[str, Any]) -> list[str]:
    """A student's figures without a teacher's; an empty text where one is not known."""
    bits = [
        "" if (value := found[key]) is None else figure_text(value)
        for key in ("bits_per_byte", "teacher_bits_per_byte")
    ]
    return [figure_text(found["student_perplexity"]), *bits, f"{found['student_accuracy']:.1%}"]


def agreement_tables(
    texts: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Table]:
    """Beyond the means: errors, the worst token, what a draft would keep, and calibration; of what was measured on each
    text, a text a column. before: the same before training."""
    apart = source_tables(texts, before or {})
    texts = {text: found for text, found in texts.items() if found.get("acceptance") is not None}
    if not texts:
        return apart
    names = [TEXTS.get(text, text) for text in texts]

    def row(name: str, show: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [name, *map(show, texts.values())]

    def share(key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda found: percent_text(found[key])

    rows = [
        row("perplexity ratio, 95 % interval", lambda found: ratio_interval(found)),
        row("KL, 95 % interval", lambda found: kl_interval(found)),
        row("KL of the worst token", lambda found: figure_text(found["worst_kl"])),
        row("same tokens among the top 5", share("top5_overlap")),
        row("a drafted token passes (1 - TV)", share("acceptance")),
    ]
    for k in range(max(len(found["accepted"]) for found in texts.values())):
        kept = [found["accepted"][k] for found in texts.values()]
        rows.append([f"kept of {k + 1} drafted", *("-" if n is None else f"{n:.2f}" for n in kept)])
    made: list[Table] = [("Agreement, token by token", ["", *names], rows)]
    rows = [
        [TEXTS.get(text, text), who, *(percent_text(found[f"{who}_{key}"]) for key in ("accuracy", "confidence"))]
        + [percent_text(found[f"{who}_calibration"])]
        for text, found in texts.items()
        for who in ("teacher", "student")
    ]
    header = ["text", "model", "top token is right", "its mean probability", "calibration error (ECE)"]
    return [*apart, *made, ("Calibration", header, rows)]


def source_tables(texts: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Each source of a text by itself, where there are several; also how much of what the student knew before training
    it has kept: its accuracy as a share of what it was."""
    made: list[Table] = []
    header = ["source", "tokens", "perplexity", "teacher's", "ratio, 95 %", "KL (nats), 95 %", "same top token"]
    header += ["top token is right", "before", "kept"]
    for text, found in texts.items():
        rows, earlier = [], (before.get(text) or {}).get("sources") or {}
        for name, its in (found.get("sources") or {}).items():
            row = [name, f"{its['tokens']:,}"]
            row += [figure_text(its[f"{who}_perplexity"]) for who in ("student", "teacher")]
            row += [ratio_interval(its), kl_interval(its), percent_text(its["top1_agreement"])]
            now, then = its["student_accuracy"], earlier.get(name, {}).get("student_accuracy")
            row += [percent_text(now), "" if then is None else percent_text(then)]
            rows.append([*row, "" if not then else percent_text(now / then)])
        if rows:
            made.append((f"By source: {TEXTS.get(text, text)}", header, rows))
    return made


def behaviour_tables(found: Mapping[str, Any]) -> list[Table]:
    """What was written, retrieved and read in long texts, as `mohawk.measures.behaviour` found it."""
    made: list[Table] = []
    if retrieved := found.get("retrieval"):
        rows = []
        for kind, told in retrieved.items():
            shares = {who: _weighted(told[who], told["asked"]) for who in ("teacher", "student")}
            asked = sum(told["asked"]) * len(told["depths"])
            error = f"{100 * told['difference']:+.1f} ± {100 * NORMAL * told['difference_error']:.1f} points"
            lengths = " to ".join(f"{length:,}" for length in sorted({told["lengths"][0], told["lengths"][-1]}))
            cells = [RETRIEVALS.get(kind, kind), lengths, f"{asked:,}", *map(percent_text, shares.values()), error]
            rows.append(cells)
        header = ["words hidden", "tokens", "asked", "teacher", "student", "difference, 95 %"]
        made.append(("Retrieval from anywhere in a text (pictured below)", header, rows))
    for text, bins in (found.get("positions") or {}).items():
        rows = [
            [f"{each['first']:,} to {each['last']:,}", f"{each['tokens']:,}"]
            + [figure_text(each[key]) for key in ("teacher", "student", "ratio")]
            for each in bins
        ]
        header = ["positions", "tokens", "teacher", "student", "ratio"]
        made.append((f"Perplexity by position in long rows of {TEXTS.get(text, text)}", header, rows))
    if told := found.get("written"):
        rows = [
            [
                who,
                f"{of['length']:.1f}",
                percent_text(of["ended"]),
                "-" if of["repeated"] is None else percent_text(of["repeated"]),
                "-" if of["perplexity"] is None else figure_text(of["perplexity"]),
            ]
            for who, of in ((who, told[who]) for who in ("teacher", "student"))
        ]
        header = ["", "tokens, mean", "ended by themselves", "repeated 4-grams", "perplexity to the teacher"]
        made.append(
            (f"What {told['prompts']} prompts are continued with (greedy, {told['tokens']} tokens)", header, rows)
        )
        same = told["same"]
        rows = [["tokens before the first that differs, mean", f"{same['first']:.1f}"]]
        rows += [[name, f"{score:.1f}"] for name, score in same["scores"].items()]
        made.append(("The student's continuations against the teacher's", ["", "of 100 where a score"], rows))
    return made


def quantized_tables(found: Mapping[str, Any]) -> list[Table]:
    """The student's weights in fewer bits beside the student: a table for each text."""
    formats = found["formats"]
    made: list[Table] = []
    for text, name in TEXTS.items():
        rows = []
        for kind, told in formats.items():
            if (compared := told["texts"].get(text)) is None:
                continue
            differs = max(told["consistency"].values(), default=None)
            rows.append(
                [kind, size_text(told["bytes"])]
                + [figure_text(compared[key]) for key in ("student_perplexity", "perplexity_ratio", "kl")]
                + [percent_text(compared["top1_agreement"]), "-" if differs is None else f"{differs:.0e}"]
            )
        if rows:
            header = ["weights", "file", "perplexity", "to the teacher's", "KL (nats)", "same top token"]
            title = f"Quantised, on {name} ({found['dtype']} where not quantised)"
            made.append((title, [*header, "decoding differs"], rows))
    return made


def _weighted(shares: list[list[float]], asked: list[int]) -> float:
    """The share of all answers: shares by length and depth, asked by length."""
    each = [sum(by_depth) / len(by_depth) for by_depth in shares]
    return sum(share * count for share, count in zip(each, asked, strict=True)) / sum(asked)


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Which layers stayed attention, and what replacing each alone cost where `mohawk select` measured that."""
    ranked = [layer for layer in layers if "kl" in layer]
    if not ranked:
        kinds = {True: "attention stayed", False: "replaced"}
        rows = [
            [told, ", ".join(str(layer["layer"]) for layer in layers if layer["stayed"] is stayed) or "none"]
            for stayed, told in kinds.items()
        ]
        return "Layers", ["", "numbers, from 0"], rows
    rows = [
        [
            str(layer["layer"]),
            "stayed attention" if layer["stayed"] else "replaced",
            figure_text(layer["kl"]),
            f"{percent_text(layer['recall'])} (of {percent_text(layer['recalled'])})",
        ]
        for layer in ranked
    ]
    header = ["layer", "", "KL alone, before phase 3", "recalled with it replaced alone"]
    return "Layers, and what replacing each alone costs", header, rows


def ratio_interval(found: Mapping[str, Any]) -> str:
    """A 95 % interval of the perplexities' ratio; "-" where the text was too short for one."""
    error, ratio = found.get("log_ratio_error"), found["perplexity_ratio"]
    if error is None:
        return "-"
    if not (math.isfinite(error) and math.isfinite(ratio)):
        return "not finite"
    return f"{figure_text(ratio * math.exp(-NORMAL * error))} to {figure_text(ratio * math.exp(NORMAL * error))}"


def kl_interval(found: Mapping[str, Any]) -> str:
    """A 95 % interval of the mean KL; "-" where the text was too short for one."""
    error, kl = found.get("kl_error"), found["kl"]
    if error is None:
        return "-"
    if not math.isfinite(error):
        return "not finite"
    return f"{figure_text(max(0.0, kl - NORMAL * error))} to {figure_text(kl + NORMAL * error)}"


def percent_text(share: float | None) -> str:
    """A share as tables show it."""
    return f"{share:.1%}" if share is not None and math.isfinite(share) else "not finite"


WRITTEN = "_written"  # the end of the name of a task that generates what another one scores
TASK_TITLES = {
    "other": "Tasks",
    "knowledge": "Tasks of knowledge, apart from any mean",
    "retrieval": "Tasks of retrieval, apart from any mean",
    "behaviour": "Tasks of behaviour, each apart: a first look, no audit",
}


def task_tables(found: Mapping[str, Any]) -> list[Table]:
    """Each task's figures with their standard errors: what is known and what is retrieved in tables of their own.

    A mean over tasks is only there where the harness's group asks for one, below all the tasks it is of.
    """
    header = ["task", "metric", "questions", "teacher", "student", "difference"]
    made: list[Table] = []
    for kind, title in TASK_TITLES.items():
        rows = []
        for name, task in found["tasks"].items():
            if task["kind"] == kind:
                asked = f"{task['questions']:,} of {task['of']:,}"
                shots = f", {task['fewshot']}-shot" if task["fewshot"] else ""
                for metric, values in task["metrics"].items():
                    rows.append([name, f"{metric}{shots}", asked, *_with_errors(values)])
        if rows:
            made.append((f"{title} (± standard error)", header, rows))
    if beside := _written_beside_scored(found["tasks"]):
        made.append(beside)
    rows = [
        [name, metric, f"mean over {len(group['members'])}", *_with_errors(values)]
        for name, group in found["groups"].items()
        for metric, values in group["metrics"].items()
    ]
    if rows:
        made.append(("Means over the tasks of a group, each of which is above", header, rows))
    return made


def _written_beside_scored(tasks: Mapping[str, Any]) -> Table | None:
    """The same questions scored by likelihood and answered by generating; None where no task was asked in both ways."""
    rows = []
    for name, written in tasks.items():
        scored = tasks.get(name.removesuffix(WRITTEN))
        if not name.endswith(WRITTEN) or scored is None or scored["questions"] != written["questions"]:
            continue
        row = [name.removesuffix(WRITTEN), f"{written['questions']:,}"]
        for task, metric in ((scored, "acc"), (written, "exact_match")):
            values = task["metrics"][metric]
            error = values["difference_stderr"]
            within = "" if error is None else f" ± {NORMAL * error:.3f}"
            row += [f"{values[who]:.3f}" for who in ("teacher", "student")]
            row.append(f"{values['difference']:+.3f}{within}")
        rows.append(row)
    if not rows:
        return None
    ways = [f"{way}: {what}" for way in ("scored", "written") for what in ("teacher", "student", "difference, 95 %")]
    return "The same questions, scored by likelihood and written", ["task", "questions", *ways], rows


def _with_errors(values: Mapping[str, Any]) -> list[str]:
    """A metric's three columns; the sign of a difference is always written."""
    made = []
    for who in ("teacher", "student", "difference"):
        value, error = values[who], values[f"{who}_stderr"]
        figure = f"{value:{'+' if who == 'difference' else ''}.3f}" if math.isfinite(value) else figure_text(value)
        made.append(figure if error is None else f"{figure} ± {error:.3f}")
    return made


def print_tables(made: list[Table], console: Console) -> None:
    """Tables as `tables` makes them, on the screen. Where it is narrow, names and headers wrap; figures stay whole."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    for title, header, rows in made:
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
        padding = 3 * len(header)
        least = [max(map(len, [*name.split(), *(row[i] for row in rows)])) for i, name in enumerate(header)]
        left = console.width - padding - sum(least[1:])  # for the names, where headers wrap
        whole = sum(widths) + padding > console.width and left >= min(widths[0], 12)
        for i, name in enumerate(header):
            wide = least[i] if i and whole else None
            table.add_column(
                name, justify="right" if i else "left", no_wrap=not (i or whole), width=wide, overflow="fold"
            )
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def figure_text(value: float | None) -> str:
    """A number as tables show it."""
    if value is None or math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"
    return f"{value:.2e}"


def time_text(seconds: float) -> str:
    """A duration as tables show it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

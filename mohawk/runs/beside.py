"""Several runs beside each other: what each gave up against its state, its tokens and its time."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from mohawk.loading.describe import size_text
from mohawk.runs.figures import BLUE, number, subplots
from mohawk.runs.plots import TEXTS
from mohawk.runs.tables import Table, figure_text, time_text
from mohawk.runs.verdict import last_evaluation

Runs = Mapping[str, Mapping[str, Any]]  # results.json by the run's name


def side_by_side(runs: Runs) -> list[Table]:
    """A table of quality for each text that some run was measured on, and one of costs; a run a row."""
    made: list[Table] = []
    for text, name in TEXTS.items():
        rows = []
        for run, results in runs.items():
            if found := last_evaluation(results).get(text):
                if "kl" not in found:  # of a student beside no teacher, or beside one with other tokens
                    rows.append([run, figure_text(found["student_perplexity"]), *["-"] * 4])
                    continue
                values = (found[key] for key in ("student_perplexity", "teacher_perplexity", "perplexity_ratio", "kl"))
                rows.append([run, *map(figure_text, values), f"{found['top1_agreement']:.1%}"])
        if rows:
            header = ["run", "perplexity", "teacher's", "ratio", "KL (nats)", "same top token"]
            made.append((f"On {name}", header, rows))
    context = common_context(runs)
    header = ["run", "parameters", "training tokens", "training time"]
    if context is not None:
        header += [f"state after {context:,} tokens", f"decoding after {context:,} tokens"]
    rows = []
    for run, results in runs.items():
        tokens, seconds = spent(results)
        row = [run, f"{results['parameters']['student']:,}", f"{tokens:,}", time_text(seconds)]
        if context is not None:
            speed = at_context(results, context)
            row += [size_text(speed["state_bytes"]), f"{speed['tokens_per_s']:.1f} tokens/s"]
        rows.append(row)
    made.append(("What each costs", header, rows))
    return made


def tradeoffs(runs: Runs) -> list[tuple[str, bytes]]:
    """A picture (caption, SVG) for each text that two runs or more were measured on: KL against the bytes of the state,
    training tokens and training time, a point a run."""
    return [
        (f"KL from the teacher on {name}, against what each run costs: lower and further left is better", svg)
        for text, name in TEXTS.items()
        if (svg := _tradeoff(runs, text)) is not None
    ]


def common_context(runs: Runs) -> int | None:
    """The longest context after which all runs' students were timed."""
    timed = [{speed["context"] for speed in results["decoding"].get("student", ())} for results in runs.values()]
    return max(set.intersection(*timed), default=None) if timed else None


def at_context(results: Mapping[str, Any], context: int) -> Mapping[str, Any]:
    """A student's speed and state after that many tokens."""
    return next(speed for speed in results["decoding"]["student"] if speed["context"] == context)


def spent(results: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens and seconds of all of a run's training."""
    phases = results["phases"].values()
    return sum(phase["tokens"] for phase in phases), sum(phase["seconds"] for phase in phases)


def _tradeoff(runs: Runs, text: str) -> bytes | None:
    kls = {run: number(last_evaluation(results).get(text, {}).get("kl")) for run, results in runs.items()}
    kls = {run: kl for run, kl in kls.items() if math.isfinite(kl)}
    if len(kls) < 2:
        return None
    context, costs = common_context(runs), {}
    if context is not None:
        costs[f"bytes of state after {context:,} tokens"] = {
            run: at_context(runs[run], context)["state_bytes"] for run in kls
        }
    costs["training tokens"] = {run: spent(runs[run])[0] for run in kls}
    costs["seconds of training"] = {run: spent(runs[run])[1] for run in kls}
    figure, axes = subplots(1, len(costs), width=4.4, height=3.6)
    for axis, (label, cost) in zip(axes[0], costs.items(), strict=True):
        axis.plot([cost[run] for run in kls], list(kls.values()), "o", color=BLUE)
        for run, kl in kls.items():
            axis.annotate(run, (cost[run], kl), xytext=(5, 5), textcoords="offset points", fontsize=8, parse_math=False)
        axis.set_xlabel(label)
        axis.set_ylabel("KL (nats per token)")
        axis.set_ylim(0, 1.2 * max(*kls.values(), 1e-9))
        axis.set_xlim(left=0, right=1.25 * max(*cost.values(), 1e-9))
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()

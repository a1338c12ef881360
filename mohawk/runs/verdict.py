"""What a run came to, in five lines: is the student fit to use, what was given up, what was gained, from which context
on it pays, and what it cost.

Each is told from what is in results.json, and says so where something was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mohawk.loading.describe import size_text
from mohawk.loading.tasks import CAUSAL
from mohawk.measures.consistency import PATHS, TOLERANCE, broken_in
from mohawk.runs.plots import RETRIEVALS, TEXTS

ABOUT = 0.05  # two speeds closer than this, as a share, are called the same: a median of one short run is no better


@dataclass(frozen=True)
class Line:
    """One line of a verdict. state: `bad` is a student that nobody should use, `good` what was asked about and found
    well, `plain` a figure that its reader has to judge."""

    asks: str
    says: str
    state: Literal["good", "bad", "plain"] = "plain"


def verdict(results: Mapping[str, Any]) -> list[Line]:
    """Five lines about the student that results.json is of; three of one that writes no text."""
    if results.get("task", CAUSAL) != CAUSAL:
        counts = results["parameters"]
        smaller = f"{counts['teacher'] / counts['student']:.3g} x fewer parameters" if counts["student"] else ""
        return [
            Line("given up", _given_up_by_encoder(results)),
            Line("gained", smaller),
            Line("cost", _cost(results)),
        ]  # fmt: skip
    return [
        fitness(results.get("consistency") or {}, results.get("decoded_in") or results["dtypes"]["student"]),
        Line("given up" if "teacher" in results["parameters"] else "reached", _given_up(results)),
        Line("gained", _gained(results["decoding"])),
        Line("pays", _pays(results["decoding"])),
        Line("cost", _cost(results)),
    ]


def last_evaluation(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What was measured of the last student, by the text's name; empty where nothing was."""
    found = results["evaluation"]
    return found[list(found)[-1]] if found else {}


def fitness(found: Mapping[str, float], dtype: str) -> Line:
    """Whether what a student generates is what its likelihoods are of: `mohawk.measures.consistency.inconsistencies` of
    one with parameters of this dtype."""
    asks = "fit to use"
    if not found:
        return Line(asks, "not known: whether the student generates by the function that was measured was not tried")
    if broken := broken_in(found, dtype):
        return Line(
            asks,
            f"NO: decoding is broken ({broken}), so that what it generates is not what the figures below are of",
            "bad",
        )
    ways = sum(path in PATHS for path in found)
    allowed = TOLERANCE[dtype]
    return Line(
        asks,
        f"it generates by the function that was measured: of {ways} ways to decode none differs from a full forward by "
        f"more than {max(found.values()):.0e} of the largest logit ({allowed:.0e} allowed)",
        "good",
    )


def _given_up(results: Mapping[str, Any]) -> str:
    texts = last_evaluation(results)
    if not texts:
        return "not measured"
    told = []
    for name, found in texts.items():
        if "kl" not in found:
            bits, theirs = found["bits_per_byte"], found["teacher_bits_per_byte"]
            of_bytes = "" if bits is None else f", {bits:.3f} bits per byte"
            beside = "" if bits is None or theirs is None else f" (the teacher, whose tokens are others, {theirs:.3f})"
            told.append(
                f"on {TEXTS.get(name, name)} perplexity {_figure(found['student_perplexity'])}{of_bytes}{beside}"
            )
            continue
        told.append(
            f"on {TEXTS.get(name, name)} perplexity {_figure(found['teacher_perplexity'])} became "
            f"{_figure(found['student_perplexity'])} ({_figure(found['perplexity_ratio'])} x), KL "
            f"{_figure(found['kl'])} nats, the same top token at {found['top1_agreement']:.1%}"
        )
    behaved = results.get("behaviour") or {}
    if found := behaved.get("retrieval"):
        lost = ", ".join(
            f"{100 * each['difference']:+.0f} ± {100 * 1.96 * each['difference_error']:.0f} points {RETRIEVALS[kind]}"
            for kind, each in found.items()
        )
        told.append(f"words found again in long texts: {lost}")
    if (found := behaved.get("written")) and found["student"]["repeated"] is not None:
        shares = [found[who]["repeated"] for who in ("student", "teacher")]
        told.append(f"it repeats {shares[0]:.0%} of what it writes" + _beside(shares[1]))
    return "; ".join(told)


def _given_up_by_encoder(results: Mapping[str, Any]) -> str:
    told = []
    for name, found in last_evaluation(results).items():
        where, same = f"on {TEXTS.get(name, name)}", f"{found['top1_agreement']:.1%}"
        if results["task"] == "classification":
            pairs = [("accuracy", "accuracy"), ("F1", "f1"), ("ROC-AUC", "roc_auc")]
            became = ", ".join(
                f"{word} {_figure(found[f'teacher_{key}'])} became {_figure(found[f'student_{key}'])}"
                for word, key in pairs
                if found[f"teacher_{key}"] is not None
            )
            told.append(f"{where} {became}, KL {_figure(found['kl'])} nats, the same class of {same}")
        else:
            told.append(
                f"{where} the perplexity of masked words {_figure(found['teacher_perplexity'])} became "
                f"{_figure(found['student_perplexity'])} ({_figure(found['perplexity_ratio'])} x), KL "
                f"{_figure(found['kl'])} nats, the same word at {same}"
            )
    return "; ".join(told) or "not measured"


def _beside(teacher: float | None) -> str:
    return "" if teacher is None else f" (the teacher {teacher:.0%})"


def _gained(decoding: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """At the longest context that was measured."""
    if not decoding.get("teacher"):
        return _alone(decoding)
    teacher, student = decoding["teacher"][-1], decoding["student"][-1]
    sizes = [who["state_bytes"] for who in (teacher, student)]
    speeds = [who["tokens_per_s"] for who in (teacher, student)]
    state = f"the state of one sequence is {size_text(sizes[1])} instead of {size_text(sizes[0])}"
    if sizes[1]:
        state += f" ({sizes[0] / sizes[1]:.2g} x smaller)" if sizes[1] < sizes[0] else " (no smaller)"
    faster = speeds[1] / speeds[0]
    speed = "about as fast" if abs(math.log(faster)) < ABOUT else f"{faster:.2g} x as fast"
    return (
        f"after {teacher['context']:,} tokens {state}, and decoding is {speed} ({speeds[1]:.1f} instead of "
        f"{speeds[0]:.1f} tokens/s)"
    )


def _alone(decoding: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What a student without a teacher decodes like at the longest context."""
    if not decoding.get("student") or "teacher" in decoding:
        return "not measured"
    last = decoding["student"][-1]
    return (
        f"no teacher to compare with; after {last['context']:,} tokens the state of one sequence is "
        f"{size_text(last['state_bytes'])}, and decoding {last['tokens_per_s']:.1f} tokens/s"
    )


def _pays(decoding: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not decoding.get("teacher"):
        return "not measured" if "teacher" in decoding or not decoding else "no teacher to compare with"
    contexts = [measured["context"] for measured in decoding["teacher"]]

    def ahead(key: str, gain: Callable[[float, float], float]) -> list[float]:
        """How far the student is ahead at each context; below 0 it is behind."""
        pairs = zip(decoding["teacher"], decoding["student"], strict=True)
        return [gain(teacher[key], student[key]) for teacher, student in pairs]

    smaller = ahead("state_bytes", lambda teacher, student: teacher - student)
    faster = ahead("tokens_per_s", lambda teacher, student: math.log(student / teacher) - ABOUT)
    return f"its state is smaller {_from(contexts, smaller)}; it decodes faster {_from(contexts, faster, exact=False)}"


def _from(contexts: Sequence[int], ahead: Sequence[float], *, exact: bool = True) -> str:
    """From which context on a student stays ahead.

    exact: what is compared grows evenly with the context, as states do, so that where it changes sides between two
    contexts is where a line through both does.
    """
    if ahead[-1] <= 0:
        return f"at none of the contexts measured (to {contexts[-1]:,} tokens)"
    behind = [i for i, by in enumerate(ahead) if by <= 0]
    if not behind:
        return f"from {contexts[0]:,} tokens on, the shortest context measured"
    i = behind[-1]
    if not exact:
        return f"from somewhere between {contexts[i]:,} and {contexts[i + 1]:,} tokens on"
    crossing = contexts[i] - ahead[i] * (contexts[i + 1] - contexts[i]) / (ahead[i + 1] - ahead[i])
    return f"from {math.ceil(crossing):,} tokens on"


def _cost(results: Mapping[str, Any]) -> str:
    phases, counts = results["phases"].values(), results["parameters"]
    tokens, hours = sum(p["tokens"] for p in phases), sum(p["seconds"] for p in phases) / 3600
    skipped = sum(p["skipped_steps"] for p in phases)
    device = results["machine"]["device"]
    told = f"{tokens:,} training tokens in {hours:.2g} hours on {device}" if phases else "no training"
    became = f"{counts['teacher']:,} became " if "teacher" in counts else ""
    told += f"; parameters {became}{counts['student']:,}"
    return told + (f"; {skipped} steps were skipped, whose loss or gradient was not finite" if skipped else "")


def _figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "not finite"
    return "∞" if math.isinf(value) else f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.2g}"

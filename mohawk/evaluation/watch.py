"""`mohawk watch`: whether a served model still answers as it did, by the log of its prompts, answers and latencies.

A log's lines are JSON objects with the fields of `generate-data`'s answers: `prompt` (or `messages`) and `response`;
`logprob`, the sum over `tokens` of them, or `logprobs`, a list; and `latency` and `first_token` in seconds. Only
`response` is needed, or `error` where there was no answer.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mohawk.core.json_files import parse_json, write_text
from mohawk.core.places import home
from mohawk.core.run_folder import STUDENT, has_recipe
from mohawk.data.messages import Messages, canonical
from mohawk.data.records import Prompt
from mohawk.errors import Alarm, UserError
from mohawk.measures.drift import Drift, drift_of_tokens, drift_of_values
from mohawk.runs.page import finished
from mohawk.runs.tables import Table, figure_text, print_tables

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UNLIKELY = 0.01  # a drift that chance gives less often than this is one
QUANTILES = (0.5, 0.9, 0.95, 0.99)  # of latencies
SLOW = 0.95  # the quantile that --max-latency bounds
SCORED = 64  # answers that a teacher reads, evenly spread over a log


@dataclass(frozen=True)
class Answer:
    """A line of a log. logprob: of the answer, nats, over `tokens` tokens; seconds: by what they are of."""

    prompt: str | Messages | None
    response: str
    logprob: float | None
    tokens: int | None
    seconds: Mapping[str, float]
    failed: bool

    @property
    def confidence(self) -> float | None:
        """The geometric mean of its tokens' probabilities."""
        return None if self.logprob is None or not self.tokens else math.exp(min(0.0, self.logprob) / self.tokens)


@dataclass(frozen=True)
class Answers:
    """What a log holds. unreadable: how many of its lines are no answers; first: what is wrong with the first one."""

    name: str
    answers: list[Answer]
    unreadable: int = 0
    first: str | None = None
    longest: int | None = None  # tokens at which all answers were cut

    @property
    def given(self) -> list[Answer]:
        """Those that are answers."""
        return [answer for answer in self.answers if not answer.failed]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is allowed: a population stability index, seconds that 95 % of answers stay within, a share of failures."""

    psi: float = 0.25
    latency: float | None = None
    errors: float | None = None


@dataclass
class Watched:
    """What came of a log. drifts: by what drifted; perplexities: the teacher's, of the baseline's answers and now;
    seconds: quantiles, by what they are of."""

    log: Answers
    drifts: dict[str, Drift] = field(default_factory=dict)
    perplexities: tuple[float, float] | None = None
    seconds: dict[str, dict[float, float]] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)

    @property
    def errors(self) -> float:
        """The share of requests without an answer."""
        return 1 - len(self.log.given) / len(self.log.answers)


def watch(
    path: Path | str,
    baseline: Path | str | None = None,
    *,
    tokenizer: str | None = None,
    teacher: str | None = None,
    last: int | None = None,
    limits: Limits | None = None,
    prometheus: Path | None = None,
    console: Console | None = None,
) -> Watched:
    """Compare a log with a baseline, print what came of it and write it for Prometheus.

    baseline: a finished run, whose report holds answers of its student, or another log. tokenizer: what lengths are
    counted by; default: the run's student's, else the teacher's, else words. teacher: a model that reads both sides'
    answers. last: only the log's last so many lines.

    Raises:
        UserError: a file is no log or no run, or holds no answer.
        Alarm: what was found is beyond the limits; all is printed and written before.
    """
    if teacher is not None and baseline is None:
        raise UserError("--teacher needs --baseline RUN|LOG, whose answers it reads too")
    allowed = limits or Limits()
    found = Watched(read_log(home(path), last))
    then = None if baseline is None else _baseline(home(baseline), str(baseline))
    if then is not None:
        reader = _tokenizer(baseline, tokenizer, teacher)
        found.drifts = drifts(then, found.log, reader)
        if teacher is not None:
            _read_by(teacher, tokenizer, then, found)
    found.seconds = _quantiles(found.log.answers)
    found.alarms = _alarms(found, allowed)
    _print(found, then, console)
    if prometheus is not None:
        write_text(home(prometheus), as_prometheus(found))
    if found.alarms:
        raise Alarm("\n".join(f"{path}: {line}" for line in found.alarms))
    return found


def read_log(path: Path, last: int | None = None) -> Answers:
    """The answers of a log; a last line that is cut is still being written. Raises UserError where none is one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a log of JSON lines")
    lines: deque[tuple[int, bytes]] = deque(maxlen=last)
    with open(path, "rb") as file:
        lines.extend((number, line) for number, line in enumerate(file, 1) if line.strip() and not _is_cut(line))
    answers, unreadable, first = [], 0, None
    for number, line in lines:
        try:
            answers.append(as_answer(parse_json(line)))
        except ValueError as error:
            unreadable += 1
            first = first or f"{path}:{number}: {error}"
    if not any(not answer.failed for answer in answers):
        raise UserError(first or f"{path}: holds no answer" + f", {len(answers)} failures" * bool(answers))
    return Answers(str(path), answers, unreadable, first)


def _is_cut(line: bytes) -> bool:
    if line.endswith(b"\n"):
        return False
    try:
        parse_json(line)
    except ValueError:
        return True
    return False


def as_answer(row: Any) -> Answer:
    """A log's line. Raises ValueError, saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"got a JSON {type(row).__name__}; a line is an object")
    failed = row.get("error") not in (None, False, "")
    if not failed and not isinstance(row.get("response"), str):
        raise ValueError("no text in `response`, and no `error`")
    prompt = row.get("prompt", row.get("messages"))
    if not (prompt is None or isinstance(prompt, str)):
        try:
            prompt = canonical(prompt)
        except ValueError as error:
            raise ValueError(f"its prompt is neither a text nor messages: {error}") from None
    seconds = {name: _number(row, name, 0.0) for name in ("latency", "first_token") if row.get(name) is not None}
    logprob = _number(row, "logprob") if row.get("logprob") is not None else None
    tokens = int(_number(row, "tokens", 0.0)) if row.get("tokens") is not None else None
    if (each := row.get("logprobs")) is not None:
        if not isinstance(each, list) or not all(_is_number(value) for value in each):
            raise ValueError("`logprobs` is no list of numbers")
        try:
            logprob, tokens = math.fsum(each), len(each)
        except OverflowError:
            raise ValueError("`logprobs` has no finite sum") from None
    return Answer(prompt, "" if failed else row["response"], logprob, tokens, seconds, failed)


def drifts(then: Answers, now: Answers, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Drift]:
    """Of prompts' and answers' lengths, of tokens and confidences: those that both sides have."""
    sides = then.given, now.given
    unit = "words" if tokenizer is None else "tokens"
    texts = [[cut(answer.response, tokenizer, then.longest) for answer in side] for side in sides]
    asked = [
        [len(cut(_text(answer.prompt), tokenizer, None)) for answer in side if answer.prompt is not None]
        for side in sides
    ]
    sure = [[sure for answer in side if (sure := answer.confidence) is not None] for side in sides]
    found = {
        # a report's prompts are pieces of text, all of one length: no user's
        f"{unit} of prompts": drift_of_values(*asked) if then.longest is None else None,
        f"{unit} of answers": drift_of_values(*([len(text) for text in side] for side in texts)),
        f"which {unit}": drift_of_tokens(*texts),
        "confidence": drift_of_values(*sure),
    }
    return {name: drift for name, drift in found.items() if drift is not None}


def cut(text: str, tokenizer: PreTrainedTokenizerBase | None, longest: int | None) -> list[Any]:
    """A text's tokens, or its words, and no more than `longest` of them."""
    pieces = text.split() if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(pieces)[:longest]


def as_prometheus(found: Watched) -> str:
    """All of it in Prometheus's text format, as node_exporter's textfile collector takes it."""
    told: dict[str, tuple[str, list[tuple[str, float]]]] = {
        "answers": ("Requests in the log that were answered.", [("", len(found.log.given))]),
        "errors": ("Requests in the log without an answer.", [("", len(found.log.answers) - len(found.log.given))]),
        "unreadable_lines": ("Lines of the log that are no answers.", [("", found.log.unreadable)]),
        "alarm": ("1 where something is beyond its limit.", [("", int(bool(found.alarms)))]),
    }
    words = {
        "psi": "Population stability index against the baseline.",
        "kl": "KL(now || baseline), nats.",
        "chance": "How probable so large an index is where nothing changed.",
    }
    for name, text in words.items():
        rows = [(f'{{of="{of}"}}', getattr(drift, name)) for of, drift in found.drifts.items()]
        told[name] = (text, rows)
    if found.perplexities is not None:
        told["teacher_perplexity"] = ("The teacher's perplexity of the answers.", [("", found.perplexities[1])])
    for of, values in found.seconds.items():
        rows = [(f'{{quantile="{quantile}"}}', value) for quantile, value in values.items()]
        told[f"{of}_seconds"] = ("Quantiles, in seconds.", rows)
    lines = []
    for name, (text, rows) in told.items():
        if rows:
            lines += [f"# HELP mohawk_watch_{name} {text}", f"# TYPE mohawk_watch_{name} gauge"]
            lines += [f"mohawk_watch_{name}{label} {value!r}" for label, value in rows]
    return "\n".join(lines) + "\n"


def _baseline(path: Path, name: str) -> Answers:
    if not path.is_dir():
        return read_log(path)
    written = (finished(path, name).results.get("behaviour") or {}).get("written") or {}
    if not written.get("answers"):
        raise UserError(
            f"--baseline: {name}'s report holds no answers: an earlier version wrote it, or evaluation.longest is "
            "null; give a log of a time when all was well"
        )
    try:
        answers = [as_answer(row) for row in written["answers"]]
    except ValueError as error:  # a broken student's log-probabilities, say
        raise UserError(f"--baseline: an answer in {name}'s report is none: {error}") from None
    return Answers(name, answers, longest=written["tokens"])


def _text(prompt: str | Messages) -> str:
    """What a prompt asks, as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _is_number(value: Any) -> bool:
    if type(value) is int:  # which JSON has of any length
        return abs(value) <= sys.float_info.max
    return type(value) is float and math.isfinite(value)


def _number(row: Mapping[str, Any], name: str, least: float = -math.inf) -> float:
    value = row[name]
    if not _is_number(value) or value < least:
        raise ValueError(f"`{name}` is no number" + " of at least 0" * (least == 0))
    return float(value)


def _tokenizer(baseline: Any, tokenizer: str | None, teacher: str | None) -> PreTrainedTokenizerBase | None:
    """What counts lengths; None: words do."""
    from mohawk.loading.models import load_tokenizer

    if tokenizer is not None:
        return load_tokenizer(tokenizer, who="", option="--tokenizer")
    if has_recipe(home(baseline)):
        return load_tokenizer(home(baseline) / STUDENT, who="", option="--tokenizer")
    return None if teacher is None else load_tokenizer(teacher, who="", option="--tokenizer")


def _read_by(teacher: str, tokenizer: str | None, then: Answers, found: Watched) -> None:
    """Puts the teacher's perplexities, and the drift of its log-probabilities per token, into what was found."""
    import torch

    from mohawk.generation.decoding import Decoding, local_teacher, sequence_logprob

    reader = local_teacher(teacher, Decoding(), tokenizer=tokenizer)
    scores: list[list[tuple[float, int]]] = []
    for side in (then, found.log):
        asked = [answer for answer in side.given if answer.prompt is not None and answer.response]
        asked = asked[:: -(-len(asked) // SCORED) or 1]
        scores.append([])
        for answer in asked:
            assert answer.prompt is not None
            prompt = reader.encode(Prompt("", "", answer.prompt, side.name))
            text = cut(answer.response, reader.tokenizer, then.longest)
            if text and (reader.limit is None or len(prompt) + len(text) <= reader.limit):
                with torch.inference_mode():
                    scores[-1].append((sequence_logprob(reader.model, prompt, text), len(text)))
    drift = drift_of_values(*([logprob / tokens for logprob, tokens in side] for side in scores))
    if drift is None:
        log.warning("--teacher: no answer with a prompt that fits the teacher's positions on one side: nothing to read")
        return
    found.drifts["the teacher's log p per token"] = drift
    then_nll, now_nll = (-sum(p for p, _ in side) / sum(n for _, n in side) for side in scores)
    found.perplexities = math.exp(then_nll), math.exp(now_nll)


def _quantiles(answers: Sequence[Answer]) -> dict[str, dict[float, float]]:
    found = {}
    for name in ("latency", "first_token"):
        values = [answer.seconds[name] for answer in answers if name in answer.seconds]
        if values:
            found[name] = {q: float(np.quantile(values, q, method="inverted_cdf")) for q in QUANTILES}
    return found


def _alarms(found: Watched, limits: Limits) -> list[str]:
    said = [
        f"{name}: population stability index {drift.psi:.2f}, above {limits.psi:g}"
        for name, drift in found.drifts.items()
        if drifted(drift, limits)
    ]
    if limits.latency is not None:
        if "latency" not in found.seconds:
            raise UserError(f"--max-latency: {found.log.name} has no `latency` in any line; leave it out")
        slow = found.seconds["latency"][SLOW]
        if slow > limits.latency:
            said.append(f"latency: {slow:.3g} s at the {100 * SLOW:.0f}th percentile, above {limits.latency:g} s")
    if limits.errors is not None and found.errors > limits.errors:
        said.append(f"errors: {found.errors:.1%} of requests, above {limits.errors:.1%}")
    return said


def drifted(drift: Drift, limits: Limits) -> bool:
    """Whether it is one: large, and not by chance."""
    return drift.psi > limits.psi and drift.chance <= UNLIKELY


def _print(found: Watched, then: Answers | None, console: Console | None) -> None:
    from rich.console import Console

    console = console or Console()
    now = found.log
    line = f"{now.name}: {len(now.given):,} answers, {len(now.answers) - len(now.given):,} failures"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if now.first is not None:
        line = f"{now.unreadable:,} lines are no answers; the first: {now.first}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    made: list[Table] = []
    if then is not None:
        rows = []
        for name, drift in found.drifts.items():
            means = ["", ""] if drift.means is None else [figure_text(mean) for mean in drift.means]
            row = [name, *means, f"{drift.then:,}", f"{drift.now:,}", f"{drift.psi:.3f}", f"{drift.kl:.3f}"]
            rows.append([*row, f"{drift.chance:.3f}"])
        header = ["", "mean then", "now", "values then", "now", "PSI", "KL (nats)", "by chance"]
        made.append((f"Against {then.name}, {len(then.given):,} answers", header, rows))
        if found.perplexities is not None:
            rows = [["perplexity to the teacher", *map(figure_text, found.perplexities)]]
            made.append(("Read by the teacher", ["", "then", "now"], rows))
    if found.seconds:
        rows = [
            [name.replace("_", " "), *(f"{value:.3f}" for value in values.values())]
            for name, values in found.seconds.items()
        ]
        made.append(("Seconds", ["", *(f"{100 * q:g} %" for q in QUANTILES)], rows))
    print_tables(made, console)
    if then is not None and then.longest is not None:
        line = f"The report's answers were cut at {then.longest} tokens, and so are the log's for this comparison."
        console.print(line, highlight=False, soft_wrap=True)

"""Which of a teacher's answers are kept: by length, repetition, agreement among them, and a scorer of the user's."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mohawk.data.records import Messages, Prompt
from mohawk.errors import UserError
from mohawk.generation.decoding import Response


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an answer has to meet; None asks for nothing.

    min_tokens, max_tokens: generated tokens (words, where an endpoint does not count). max_repetition: the share of
    `ngram`-word runs that came before in the same answer, at most. min_agreement: the share of the prompt's samples
    with the same answer, at least; the answer is the response, or what `answer` finds in it (a regular expression: the
    last match, its first group if it has one), normalised by `normalizer` ("module:function", text -> text or None) or
    `normalize`. An answer that is not found agrees with none. scorer: "module:function", (prompt, response) -> float,
    and min_score: what it has to give.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    max_repetition: float | None = None
    ngram: int = 4
    min_agreement: float | None = None
    answer: str | None = None
    normalizer: str | None = None
    scorer: str | None = None
    min_score: float | None = None

    def __post_init__(self):
        for name in ("max_repetition", "min_agreement"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise UserError(f"{name}: got {value}; allowed: a share from 0 to 1")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens: got {self.min_tokens}, above max_tokens {self.max_tokens}")
        if self.ngram < 1:
            raise UserError(f"ngram: got {self.ngram}; allowed: at least 1")
        if (self.scorer is None) != (self.min_score is None):
            raise UserError("scorer and min_score belong together; give both or neither")
        if self.min_agreement is None and (self.answer is not None or self.normalizer is not None):
            raise UserError("answer and normalizer are of min_agreement; set it, or leave them out")
        if self.answer is not None:
            try:
                re.compile(self.answer)
            except re.error as error:
                raise UserError(f"answer: {self.answer!r} is no regular expression: {error}") from None

    def settings(self) -> dict[str, Any]:
        """What decides the verdicts: the fields that are set, and the code of the user's functions."""
        given = {
            k: v for k, v in asdict(self).items() if v is not None and (k != "ngram" or self.max_repetition is not None)
        }
        for name in ("scorer", "normalizer"):
            if name in given:
                path = _source_of(load_function(given[name], name), given[name])
                given[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        return given


@dataclass(frozen=True)
class Verdict:
    """reason: the first filter that rejects the answer, or None. measured: what the filters found, by their names."""

    reason: str | None
    measured: dict[str, float | int | None]


class Judge:
    """The filters with their functions loaded. Raises UserError where one cannot be."""

    def __init__(self, filters: Filters):
        self.filters = filters
        self.scorer = load_function(filters.scorer, "scorer") if filters.scorer else None
        self.normalizer = load_function(filters.normalizer, "normalizer") if filters.normalizer else normalize

    def verdicts(self, prompt: Prompt, responses: Sequence[Response]) -> list[Verdict]:
        """One per answer of a prompt. All the answers that came vote on agreement, whatever else is wrong with them."""
        filters = self.filters
        answers = (
            [None if r.error else self._answer(prompt, r.text) for r in responses] if filters.min_agreement else []
        )
        votes = Counter(answer for answer in answers if answer is not None)
        found = []
        for k, response in enumerate(responses):
            if response.error is not None:
                found.append(Verdict("error", {}))
                continue
            measured: dict[str, float | int | None] = {}
            failed: list[str] = []

            def check(name: str, value: float, passes: bool, measured=measured, failed=failed) -> None:
                measured[name] = value if math.isfinite(value) else None
                if not passes:
                    failed.append(name)

            if filters.min_tokens is not None or filters.max_tokens is not None:
                length = response.tokens if response.tokens is not None else len(response.text.split())
                check("length", length, (filters.min_tokens or 0) <= length <= (filters.max_tokens or math.inf))
            if filters.max_repetition is not None:
                share = repetition(response.text, filters.ngram)
                check("repetition", share, share <= filters.max_repetition)
            if filters.min_agreement:
                answer = answers[k]
                share = votes[answer] / len(responses) if answer is not None else 0.0
                check("agreement", share, share >= filters.min_agreement)
            if self.scorer is not None and not failed:  # the dear one only for what is left
                score = self._score(self.scorer, prompt, response.text)
                assert filters.min_score is not None  # given with the scorer
                check("score", score, score >= filters.min_score)
            found.append(Verdict(failed[0] if failed else None, measured))
        return found

    def _answer(self, prompt: Prompt, text: str) -> str | None:
        if self.filters.answer is not None:
            matches = list(re.finditer(self.filters.answer, text))
            if not matches:
                return None
            text = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
        answer = _called(self.normalizer, "normalizer", prompt, text)
        if answer is not None and not isinstance(answer, str):
            raise UserError(f"normalizer: gave {type(answer).__name__} for {prompt.where}; it gives a text or None")
        return answer

    def _score(self, scorer: Callable[..., Any], prompt: Prompt, text: str) -> float:
        score = _called(scorer, "scorer", prompt, prompt.content, text)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise UserError(f"scorer: gave {type(score).__name__} for {prompt.where}; it gives a number") from None


def repetition(text: str, ngram: int) -> float:
    """The share of a text's runs of `ngram` words that occurred before in it; 0 where it has none."""
    words = text.split()
    runs = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def normalize(text: str) -> str | None:
    """An answer to compare: lower case, single spaces, no commas in numbers, no punctuation around; None if empty."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    return " ".join(text.split()).strip(" .,;:!?\"'`*()[]$") or None


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules of the working directory are found too. Raises UserError."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"{option}: got {name!r}; give module:function, such as scoring:score for scoring.py")
    here = "" not in sys.path and str(Path.cwd()) not in sys.path
    if here:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises on import
        raise UserError(f"{option}: cannot import {module}: {type(error).__name__}: {error}") from error
    finally:
        if here:
            sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise UserError(f"{option}: {module} has no function {function}")
    return found


def _source_of(function: Callable[..., Any], name: str) -> str | None:
    """The file of a function's code, or of the module that names it; None where these are compiled."""
    for found in (function, sys.modules[name.partition(":")[0]]):
        try:
            return inspect.getsourcefile(found)
        except TypeError:  # a built-in one, or an object that can be called
            continue
    return None


def _called(function: Callable[..., Any], option: str, prompt: Prompt, *given: str | Messages) -> Any:
    try:
        return function(*given)
    except Exception as error:
        raise UserError(f"{option}: failed on an answer to {prompt.where}: {type(error).__name__}: {error}") from error

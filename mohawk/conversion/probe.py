"""What a choice of layers costs: KL from the teacher on text, and key-value recall, each value measured once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import opened
from mohawk.conversion.swap import LayerSwap
from mohawk.core.folders import MANIFEST
from mohawk.core.lines import append_line, missing_lines, read_lines, sums_of, write_lines
from mohawk.core.run_folder import MEASURED, RECIPE, has_lost_sum
from mohawk.core.terminal import Bar
from mohawk.data.next_tokens import IGNORED
from mohawk.kernels.kd.interface import TeacherHidden, linear_kd_loss
from mohawk.losses.heads import Head
from mohawk.measures.recall import PAIRS, recall_batches, recall_of
from mohawk.models.casting import cast
from mohawk.models.hybrid import HybridForCausalLM

log = logging.getLogger(__name__)


def short_fingerprint(student: Path) -> str:
    """A few characters that stand for the student in a folder: other weights have others."""
    return hashlib.sha256((student / MANIFEST).read_bytes()).hexdigest()[:16]


class Probe:
    """KL and recall of any choice of a run's layers, each measured once and kept in the run's folder."""

    def __init__(self, folder: Path, student_folder: Path, tokens: int, console: Console):
        plain = Recipe.load(folder / RECIPE)
        overrides = [f"evaluation.tokens={tokens}"]
        if plain.data.validation_share > 0:  # the other source's text is for judging the choice by
            overrides.append("data.evaluation=[]")
        recipe = Recipe.load(folder / RECIPE, overrides)
        run = opened(recipe, folder, console, trains=False)
        # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
        student = HybridForCausalLM.from_pretrained(student_folder).to(run.device)
        teacher = run.teacher
        cast(teacher, student.dtype)
        name, states = next(iter(run.texts.items()))
        lists = recall_batches(run.tokenizer, tokens, batch_size=recipe.evaluation.batch_size)
        self.layers, self.num_layers = student.config.ssm_layers, student.config.num_hidden_layers
        self.tokens = states.tokens
        self.settings = {
            "student": short_fingerprint(student_folder), "text": name, "tokens": tokens, "pairs": PAIRS,
            "sequence_length": recipe.evaluation.sequence_length, "precision": str(run.autocast),
        }  # fmt: skip
        self._text = LayerSwap(teacher, student, states.batches, autocast=run.autocast)
        self._lists = LayerSwap(teacher, student, lists, autocast=run.autocast)
        self._head = Head.of(teacher).frozen()
        self._weight = self._head.weight.to(run.autocast or torch.float32)
        self._expected = list(self._text.final_hidden(()))
        self._file = folder / MEASURED
        self._bar: Bar | None = None
        self._counted: set[tuple[str, tuple[int, ...]]] = set()  # by the bar
        self._known: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._recollect()

    def rebase(self, chosen: Collection[int]) -> None:
        """Measure from now on what differs little from this choice."""
        self._text.rebase(chosen)
        self._lists.rebase(chosen)

    def kl(self, chosen: Collection[int]) -> float:
        """Mean KL(teacher || student), nats per token, with these layers replaced."""
        return self._measured("kl", chosen, self._kl)

    def recall(self, chosen: Collection[int]) -> dict[str, float]:
        """A `mohawk.measures.recall.Recall` as a dict, with these layers replaced."""
        return self._measured("recall", chosen, self._recall)

    def progress(self, name: str, total: int, *, at_most: bool = False) -> Bar:
        """Within it, measurements move a bar."""
        self._bar, self._counted = Bar(name, total, at_most=at_most), set()
        return self._bar

    @torch.no_grad()
    def _kl(self, chosen: Collection[int]) -> float:
        total, count, head = 0.0, 0, self._head
        logits = {"logit_scale": head.scale, "logit_softcap": head.softcap}
        for hidden, expected, batch in zip(
            self._text.final_hidden(chosen), self._expected, self._text.batches, strict=True
        ):
            real = batch["labels"][:, 1:] != IGNORED
            rows, teacher = (states[:, :-1][real].to(self._weight.dtype) for states in (hidden, expected))
            total += linear_kd_loss(
                rows, self._weight, TeacherHidden(teacher, self._weight, bias=head.bias, **logits),
                student_bias=head.bias, reduction="sum", **logits,
            ).item()  # fmt: skip
            count += len(rows)
        return total / count

    def _recall(self, chosen: Collection[int]) -> dict[str, float]:
        return asdict(recall_of(self._lists.final_hidden(chosen), self._lists.batches, self._head))

    def _measured(self, kind: str, chosen: Collection[int], measure: Callable[[Collection[int]], Any]) -> Any:
        key = kind, tuple(sorted(chosen))
        fresh = key not in self._known
        if fresh:
            self._known[key] = measure(frozenset(chosen))
            append_line(self._file, json.dumps([*key, self._known[key]]))
        if (bar := self._bar) is not None and key not in self._counted:
            self._counted.add(key)
            bar.add(1) if fresh else bar.skip(1)
            bar.say(f"{bar.name}  {bar.done} of {bar.at_most}{bar.total} measured")
        return self._known[key]

    def _recollect(self) -> None:
        """Reads what a call with the same settings has measured, and begins the file anew with that."""
        head = json.dumps(self.settings)
        if self._file.is_file() and not sums_of(self._file).exists() and has_lost_sum(self._file):
            log.warning("%s has lost the checksums of its lines: measuring again", self._file)
            self._file.unlink()
        lines = read_lines(self._file) if self._file.is_file() else []
        for line, whole in lines[1:] if lines[:1] == [(head, True)] else []:
            if whole and (found := _read(line)) is not None:  # a kill may have cut a line short
                kind, chosen, value = found
                self._known[kind, chosen] = value
        kept = (json.dumps([*key, value]) for key, value in self._known.items())
        write_lines(self._file, [head, *kept])


def damaged_measurements(file: Path) -> int:
    """How many lines of a file of measurements are not as they were written."""
    first, *rest = read_lines(file) or [("", False)]
    lost = max(0, missing_lines(file) - 1) + (not first[1])
    return lost + sum(not whole or _read(line) is None for line, whole in rest)


def _read(line: str) -> tuple[str, tuple[int, ...], Any] | None:
    """A measurement; None where it is none."""
    try:
        kind, chosen, value = json.loads(line)
        key = kind, tuple(map(int, chosen))
        number = type(value) is float if kind == "kl" else set(value) == {"accuracy", "loss", "values"}
    except (ValueError, TypeError, RecursionError):
        return None
    return (*key, value) if number else None

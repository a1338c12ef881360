"""Teachers that are asked while a student trains: one model or several, the student's own average, parts of a batch.

A teacher is called with a batch and what is wanted of it, and gives a list of `Answer`s, which cover the batch's rows
between them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mohawk.errors import UserError
from mohawk.heads import Head, final_hidden_states, in_autocast
from mohawk.kernels.kd_teachers import Teacher, TeacherHidden, TeacherMixture
from mohawk.teachers import check_decoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mohawk.teacher_cache import TeacherCache

# What a model is watched with during its pass: a context that collects tensors of its layers into a dict.
Watch = Callable[[nn.Module], AbstractContextManager[dict[Any, Any]]]
INPUTS = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True)
class Answer:
    """What a teacher says of some rows of a batch.

    source: (rows, n, ...) what a loss compares the student with. rows: their indices (int64), None for all.
    seen: what each watch collected.
    """

    source: Teacher
    rows: Tensor | None = None
    seen: list[dict[Any, Any]] = field(default_factory=list)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's columns that a model's forward takes."""
    return {name: batch[name] for name in INPUTS if name in batch}


class ModelTeacher:
    """One frozen causal language model.

    micro_batch: rows at a time, fewer than the student's where the teacher is the larger one.
    """

    def __init__(self, model: nn.Module, micro_batch: int | None = None):
        check_decoder(model, "teacher")
        self.model = model.requires_grad_(False).eval()
        self.micro_batch = micro_batch

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> tuple[Tensor, list[dict]]:
        """Final hidden states (b, n, H), and what the watches collected."""
        inputs = model_inputs(batch)
        if watches or not self.micro_batch:
            with contextlib.ExitStack() as stack:
                seen = [stack.enter_context(watch(self.model)) for watch in watches]
                return final_hidden_states(self.model, inputs), seen
        parts = zip(*(tensor.split(self.micro_batch) for tensor in inputs.values()), strict=True)
        return torch.cat([final_hidden_states(self.model, dict(zip(inputs, part, strict=True))) for part in parts]), []

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        hidden, seen = self.hidden(batch, watches)
        return [Answer(Head.of(self.model).teacher(hidden), seen=seen)]

    @property
    def vocab_size(self) -> int:
        return len(Head.of(self.model).weight)


class Ensemble:
    """Several frozen teachers at once.

    combine: probabilities (the mixture sum_i w_i p_i), logits (the softmax of sum_i w_i z_i), or row (each row is
    answered by the teacher that its column `teacher` names, from 0). weights: divided by their sum; None: all alike.
    Layers are watched in the first teacher.
    """

    def __init__(
        self,
        teachers: Sequence[ModelTeacher],
        combine: Literal["probabilities", "logits", "row"] = "probabilities",
        weights: Sequence[float] | None = None,
    ):
        self.teachers, self.combine = list(teachers), combine
        given = list(weights) if weights is not None else [1.0] * len(self.teachers)
        if len(given) != len(self.teachers) or not all(w > 0 for w in given):
            raise ValueError(f"weights: got {given} for {len(self.teachers)} teachers; allowed: one above 0 for each")
        self.weights = [w / sum(given) for w in given]
        self.heads = [Head.of(teacher.model) for teacher in self.teachers]
        check_together(combine, [teacher.model.config for teacher in self.teachers])

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        if self.combine == "row":
            return list(self._by_row(batch, watches))
        found = [t.hidden(batch, watches if i == 0 else ()) for i, t in enumerate(self.teachers)]
        seen = found[0][1]
        sources = [head.teacher(hidden) for head, (hidden, _) in zip(self.heads, found, strict=True)]
        if self.combine == "probabilities":
            return [Answer(TeacherMixture(sources, self.weights), seen=seen)]
        return [Answer(self._mean_of_logits([hidden for hidden, _ in found]), seen=seen)]

    def _mean_of_logits(self, hidden: Sequence[Tensor]) -> TeacherHidden:
        """sum_i w_i s_i (h_i W_i^T + b_i) is one product: hidden states and heads, side by side."""
        scales = [w * head.scale for w, head in zip(self.weights, self.heads, strict=True)]
        wide = torch.cat([scale * h for scale, h in zip(scales, hidden, strict=True)], -1)
        head = torch.cat([head.weight.to(wide.device) for head in self.heads], 1)
        biases = [scale * head.bias for scale, head in zip(scales, self.heads, strict=True) if head.bias is not None]
        return TeacherHidden(in_autocast(wide), in_autocast(head), in_autocast(sum(biases) if biases else None))

    def _by_row(self, batch, watches):
        if "teacher" not in batch:
            raise UserError("teachers: combine: row needs data that name a teacher for each example (teacher_field)")
        column = batch["teacher"]
        if watches:
            raise UserError("teachers: combine: row has no layers in common to match; leave out hidden and attention")
        if int(column.max()) >= len(self.teachers) or int(column.min()) < 0:
            raise UserError(
                f"teachers: an example names teacher {int(column.max())}; there are {len(self.teachers)}, from 0"
            )
        for i, teacher in enumerate(self.teachers):
            rows = (column == i).nonzero().squeeze(1)
            if len(rows):
                ((answer),) = teacher({name: batch[name][rows] for name in INPUTS if name in batch})
                yield Answer(answer.source, rows)

    @property
    def vocab_size(self) -> int:
        return min(len(head.weight) for head in self.heads)


def check_together(combine: str, configs: Sequence[PretrainedConfig]) -> None:
    """UserError where teachers of these configurations have no common answer."""
    texts = [config.get_text_config() for config in configs]
    if len(texts) < 2 or combine == "row":
        return
    if combine == "logits" and any(getattr(text, "final_logit_softcapping", None) is not None for text in texts):
        raise UserError("teachers: logits with a softcap (Gemma 2) have no mean here; use combine: probabilities")
    if len(sizes := {text.vocab_size for text in texts}) > 1:
        given = ", ".join(map(str, sorted(sizes)))
        raise UserError(f"teachers: vocabularies of {given} entries can't be combined; use combine: row")


class AverageTeacher(ModelTeacher):
    """The student's own exponential moving average: `average = decay * average + (1 - decay) * student` after each step
    (Tarvainen and Valpola, 2017). A decay of 1 keeps the student as it was at the start."""

    def __init__(self, student: nn.Module, decay: float, micro_batch: int | None = None):
        super().__init__(copy.deepcopy(student), micro_batch)
        self.student, self.decay = student, decay

    @torch.no_grad()
    def update(self) -> None:
        if self.decay < 1:
            for average, tensor in self._pairs():
                average.lerp_(tensor.to(average.dtype), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The average's tensors by the student's names of them; none where it never changes."""
        names = [name for name, p in self.student.named_parameters() if p.requires_grad]
        own = dict(self.model.named_parameters())
        return {f"average.{name}": own[name] for name in names} if self.decay < 1 else {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    def _pairs(self):
        own = dict(self.model.named_parameters())
        return ((own[name], p) for name, p in self.student.named_parameters() if p.requires_grad)


class CachedTeacher:
    """Answers that come with the batch, from a cache that `mohawk cache` wrote (mohawk/teacher_cache.py)."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache
        self.vocab_size = cache.layout.vocab_size

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        source = self.cache.teacher(batch)
        if isinstance(source, TeacherHidden):
            products = {name: in_autocast(getattr(source, name)) for name in ("hidden", "head", "bias")}
            source = dataclasses.replace(source, **products)
        return [Answer(source)]

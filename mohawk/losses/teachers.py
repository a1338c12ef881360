"""Teachers that are asked while a student trains: one model or several, the student's own average, parts of a batch.

A teacher is called with a batch and what is wanted of it, and gives a list of `Answer`s, which cover the batch's rows
between them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from mohawk.errors import UserError
from mohawk.kernels.kd.teachers import TeacherHidden, TeacherMixture, TeacherSource
from mohawk.loading.causal import plain_model
from mohawk.losses.heads import Head, in_autocast, readable_ids
from mohawk.losses.tasks import CAUSAL_LM, Task, task_of
from mohawk.models.sharding import fill, is_sharded, local, reshard, whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig

    from mohawk.loading.causal import CausalLM
    from mohawk.teacher_cache.reader import TeacherCache

log = logging.getLogger(__name__)

# What a model is watched with during its pass: a context that collects tensors of its layers into a dict.
Watch = Callable[["CausalLM"], AbstractContextManager[dict[Any, Any]]]
CHECKPOINTED = "_checkpoint_wrapped_module."  # in names of a model that accelerate lets compute its layers again


@dataclass(frozen=True)
class Answer:
    """What a teacher says of some rows of a batch.

    source: (rows, n, ...) what a loss compares the student with. rows: their indices (int64), None for all.
    seen: what each watch collected.
    """

    source: TeacherSource
    rows: Tensor | None = None
    seen: list[dict[Any, Any]] = field(default_factory=list)


class ModelTeacher:
    """One model, which answers in eval mode and without gradients.

    micro_batch: rows at a time, fewer than the student's where the teacher is the larger one. task: what it is for, as
    `KnowledgeDistiller` takes it.
    """

    def __init__(self, model: CausalLM, micro_batch: int | None = None, task: Task | str = "causal_lm"):
        self.task = task_of(task) if isinstance(task, str) else task
        self.task.check(model, "teacher")
        self.model, self.micro_batch = model, micro_batch
        self.adapted: PeftModel | None = None  # peft's model around this one, whose adapter is not the teacher's

    def beside(self, student: CausalLM) -> None:
        """Freezes the teacher but for what it shares with a student that trains it.

        A model and peft's adapter around it may be teacher and student: the adapter is then switched off whenever the
        teacher is asked. Raises ValueError where the student is the teacher, or shares adapters in another way.
        """
        around = is_around(student, self.model)
        if around:
            self.adapted = student
        elif self.model is student:
            raise ValueError("teacher: got the student itself; use mohawk.teacher_models.AverageTeacher")
        elif set(_adapters(self.model)) & set(_adapters(student)):
            raise ValueError(
                "teacher and student share adapters, but neither is peft's model around the other; give the student's "
                "own base model (student.get_base_model()), or a copy"
            )
        own = {id(p) for p in student.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
        if not around and not set(self.model.modules()) & set(student.modules()):
            self.model.eval()
        with self.answering():  # in which some adapters are taken out of the model
            asked = list((plain_model(student) if around else self.model).parameters())
        off = _adapter_parameters(student) if around else ()
        if moving := _shared_and_trained([p for p in asked if id(p) not in off], student):
            log.warning(
                "teacher and student share %d parameters that train (the first: %s), so that the teacher changes with "
                "the student; give the teacher a copy, or freeze them",
                len(moving),
                moving[0],
            )

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within, the model is in eval mode, without the student's adapter and gradients; all restored."""
        training = [module for module in self.model.modules() if module.training]
        parameters = [] if self.adapted is None else list(self.adapted.parameters())
        trained = [p.requires_grad for p in parameters]
        off = contextlib.nullcontext() if self.adapted is None else self.adapted.disable_adapter()
        try:
            with torch.no_grad(), off:
                for module in training:
                    module.training = False
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, flag in zip(parameters, trained, strict=True):  # switched on, all of an adapter trains
                parameter.requires_grad_(flag)

    def hidden(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> tuple[Tensor, list[dict]]:
        """Final hidden states (b, n, H), and what the watches collected."""
        hidden, seen, _ = self.asked(batch, watches)
        return hidden, seen

    def asked(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> tuple[Tensor, list[dict], Head]:
        """What `hidden` gives, and the head that goes with the hidden states."""
        inputs, check_ids = readable_inputs(self.task, self.model, batch, "teacher")
        with self.answering(), contextlib.ExitStack() as stack:
            seen = [stack.enter_context(watch(self.model)) for watch in watches]
            rows = len(next(iter(inputs.values()))) if watches or not self.micro_batch else self.micro_batch
            parts = zip(*(tensor.split(max(1, rows)) for tensor in inputs.values()), strict=True)
            hidden = [self.task.states(self.model, dict(zip(inputs, part, strict=True))) for part in parts]
            check_ids()  # the loss, which is next, waits for the device as well
            if self.adapted is not None:
                self._check(seen)
            return hidden[0] if len(hidden) == 1 else torch.cat(hidden), seen, self.task.head(self.model)

    def _check(self, seen: list[dict]) -> None:
        # a state-space layer's matrix is made when it is compared, where the adapter is on again
        mixers = (getattr(record, "mixer", None) for found in seen for record in found.values())
        if any(mixer is not None and any(_adapters(mixer)) for mixer in mixers):
            raise ValueError(
                "teacher: with the student's own base as teacher, the matrix of a state-space layer that the adapter "
                "adapts can't be matched; give the teacher a copy, or leave the mixers out of the adapter"
            )

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        hidden, seen, head = self.asked(batch, watches)
        return [Answer(head.teacher(hidden), seen=seen)]

    @property
    def vocab_size(self) -> int:
        return self.task.words(self.model)


def readable_inputs(
    task: Task, model: CausalLM, batch: Mapping[str, Tensor], who: str
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """What a model reads of a batch, its ids such that it can; and what raises UserError where some were not (see
    `readable_ids`)."""
    inputs = task.inputs_of(model, batch)
    if "input_ids" not in inputs:
        return inputs, lambda: None
    inputs["input_ids"], check = readable_ids(model, inputs["input_ids"], who)
    return inputs, check


def is_around(student: CausalLM, model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether the student is peft's model around this one, or around what this one is, adapter and all."""
    if not hasattr(student, "disable_adapter"):
        return False
    return any(model is module for module in (student, student.base_model, plain_model(student)))


def _adapters(model: nn.Module) -> Iterator[Any]:
    """peft's layers in a model."""
    return (m for m in model.modules() if hasattr(m, "adapter_layer_names"))


def _adapter_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that peft added to a model: those in its layers, but not of what the layers are around."""
    added = (attrgetter(name)(layer) for layer in _adapters(model) for name in layer.adapter_layer_names)
    return {id(p) for part in added for p in (part.parameters() if isinstance(part, nn.Module) else [part])}


def _shared_and_trained(teacher: Sequence[Tensor], student: nn.Module) -> list[str]:
    """Names, in the student, of parameters that train and lie in the memory of the teacher's."""
    memory = {_place(p) for p in teacher if p.numel() and p.device.type != "meta"}
    trained = ((name, p) for name, p in student.named_parameters() if p.requires_grad and p.numel())
    return [name for name, p in trained if p.device.type != "meta" and _place(p) in memory]


def _place(parameter: Tensor) -> tuple[torch.device, int]:
    """Where a parameter's values lie; of one that is not a plain tensor (sharded, packed), which one it is."""
    plain = type(parameter) in (nn.Parameter, Tensor)
    return parameter.device, parameter.untyped_storage().data_ptr() if plain else id(parameter)


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
        self.task = self.teachers[0].task if self.teachers else CAUSAL_LM
        check_together(combine, [plain_model(teacher.model).config for teacher in self.teachers], self.task.name)

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        if self.combine == "row":
            return list(self._by_row(batch, watches))
        found = [t.asked(batch, watches if i == 0 else ()) for i, t in enumerate(self.teachers)]
        hidden, (seen, *_), heads = zip(*found, strict=True)
        if self.combine == "probabilities":
            sources = [head.teacher(h) for head, h in zip(heads, hidden, strict=True)]
            return [Answer(TeacherMixture(sources, self.weights), seen=seen)]
        return [Answer(self._mean_of_logits(hidden, heads), seen=seen)]

    @torch.no_grad()
    def _mean_of_logits(self, hidden: Sequence[Tensor], heads: Sequence[Head]) -> TeacherHidden:
        """sum_i w_i s_i (h_i W_i^T + b_i) is one product: hidden states and heads, side by side."""
        scales = [w * head.scale for w, head in zip(self.weights, heads, strict=True)]
        wide = torch.cat([scale * h for scale, h in zip(scales, hidden, strict=True)], -1)
        head = torch.cat([head.weight.to(wide.device) for head in heads], 1)
        biases = [scale * head.bias for scale, head in zip(scales, heads, strict=True) if head.bias is not None]
        bias = in_autocast(torch.stack(biases).sum(0)) if biases else None
        return TeacherHidden(in_autocast(wide), in_autocast(head), bias)

    def _by_row(self, batch, watches):
        if "teacher" not in batch:
            raise UserError("teachers: combine: row needs data that name a teacher for each example (teacher_field)")
        column, names = batch["teacher"], [name for name in (*self.task.inputs, *self.task.told) if name in batch]
        if watches:
            raise UserError("teachers: combine: row has no layers in common to match; leave out hidden and attention")
        if int(column.max()) >= len(self.teachers) or int(column.min()) < 0:
            raise UserError(
                f"teachers: an example names teacher {int(column.max())}; there are {len(self.teachers)}, from 0"
            )
        for i, teacher in enumerate(self.teachers):
            rows = (column == i).nonzero().squeeze(1)
            if is_sharded(teacher.model):  # of which every process has a part: all ask it, whatever their rows are
                ((answer),) = teacher({name: batch[name] for name in names})
                if len(rows):
                    yield Answer(taken(answer.source, rows), rows)
            elif len(rows):
                ((answer),) = teacher({name: batch[name][rows] for name in names})
                yield Answer(answer.source, rows)

    @property
    def vocab_size(self) -> int:
        return min(teacher.vocab_size for teacher in self.teachers)


def taken(source: TeacherSource, rows: Tensor) -> TeacherSource:
    """What a teacher says of some of the rows that it said it of."""
    return source.map_rows(lambda x, trailing: x[rows])


def teacher_in_parts(teacher: object) -> bool:
    """Whether every process has a part of a teacher's models, so that all have to ask it equally often."""
    models = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    return any(isinstance(one, ModelTeacher) and is_sharded(one.model) for one in models)


def check_together(combine: str, configs: Sequence[PretrainedConfig], task: str = "causal_lm") -> None:
    """UserError where teachers of these configurations have no common answer."""
    if task == "classification":
        counts: set[Any] = {config.num_labels for config in configs}
        if len(counts) > 1:
            given = ", ".join(map(str, sorted(counts)))
            raise UserError(f"teachers: they tell {given} classes; give teachers of the same classes")
        return
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
    (Tarvainen and Valpola, 2017). A decay of 1 keeps the student as it was at the start. copy_of: how a sharded student
    is copied."""

    def __init__(
        self,
        student: CausalLM,
        decay: float,
        micro_batch: int | None = None,
        copy_of: Callable[[CausalLM], CausalLM] = copy.deepcopy,
        task: Task | str = "causal_lm",
    ):
        super().__init__(copy_of(student), micro_batch, task)
        self.student, self.decay = student, decay
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self) -> None:
        if self.decay == 1:
            return
        reshard(self.model), reshard(self.student)
        own = dict(self.model.named_parameters())
        for name, parameter in self._trained():
            average = own[name]
            if is_sharded(average):
                local(average).lerp_(local(parameter).to(average.dtype), 1 - self.decay)
                continue
            with _gathered(parameter) as value:  # what someone else has spread since the copy was made
                average.lerp_(value.to(average), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The average's tensors by the student's names of them; none where it never changes."""
        names = [name for name, _ in self._trained()]
        reshard(self.model)  # what is kept, and moved, are its parts
        own = dict(self.model.named_parameters())
        return {f"average.{name}": own[name] for name in names} if self.decay < 1 else {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            fill(tensor, tensors[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's parameters that train, by the names that the copy has for them."""
        named = self.student.named_parameters()
        return ((name.replace(CHECKPOINTED, ""), p) for name, p in named if p.requires_grad)


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter whole, wherever its parts are; all processes must ask."""
    if not hasattr(parameter, "ds_id"):  # of DeepSpeed's ZeRO-3
        yield whole(parameter)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.detach()


class CachedTeacher:
    """Answers that come with the batch, from a `TeacherCache` that `mohawk cache` wrote."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache
        self.vocab_size = cache.layout.vocab_size

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Answer]:
        source = self.cache.teacher(batch)
        if isinstance(source, TeacherHidden):
            products = {name: in_autocast(getattr(source, name)) for name in ("hidden", "head", "bias")}
            source = dataclasses.replace(source, **products)
        return [Answer(source)]

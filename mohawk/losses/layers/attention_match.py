"""Attention distillation: a student's mixing matrices against its teacher's, layer pair by layer pair.

No n x n array is made. Each model's forward runs as it is, with an attention function that notes queries and keys (of
a state-space layer its input, from which it computes what its matrix is made of), and `mixing_distance` compares the
two strip by strip, with gradients into the student's queries and keys.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.kernels.mixing.interface import head_mean_distance, mixing_distance
from mohawk.kernels.mixing.metrics import OF_MEANS
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing
from mohawk.models.decoders import check_checkpointing, check_layers, decoder, first_tensor, layers_config
from mohawk.models.sharding import gathers, run_in
from mohawk.models.state_mixer import StateMixer
from mohawk.models.teacher_forcing import RECORDING, AttentionRecord, recording_attention, tag, tagged, untag

OF_ATTENTION = ("kl", "scores")  # what a state-space matrix has not
HEADS = ("auto", "mean", "group")
LAYER_KINDS = ("full_attention", "sliding_attention", "linear_attention")  # of layers; in the last, ours alone


@dataclasses.dataclass
class MixerRecord:
    """What one state-space layer was called with."""

    mixer: StateMixer
    hidden_states: Tensor | None = None  # (b, n, D), behind the layer's input norm
    group: nn.Module | None = None  # as whose forward the mixer's matrices are whole; None: they are

    def mixing(self, segment_ids: Tensor | None = None) -> SSDMixing | DeltaMixing:
        assert self.hidden_states is not None  # the model has run
        if self.group is None:
            return self.mixer.mixing(self.hidden_states, segment_ids=segment_ids)
        made: list[SSDMixing | DeltaMixing] = []

        def tensors(hidden_states: Tensor) -> dict[str, Tensor]:
            made.append(self.mixer.mixing(hidden_states, segment_ids=segment_ids))
            given = {name: x for name, x in vars(made[0]).items() if isinstance(x, Tensor)}
            # parameters lose their memory behind it
            return {name: x.clone() if _is_parameters(x) else x for name, x in given.items()}

        found: dict[str, Any] = run_in(self.group, tensors, self.hidden_states)
        return dataclasses.replace(made[0], **found)


def _is_parameters(x: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


LayerRecord = AttentionRecord | MixerRecord


@contextmanager
def collect_attention(
    model: nn.Module, layers: Collection[int], *, values: bool = False
) -> Iterator[dict[int, LayerRecord]]:
    """Notes what the mixing matrices of some layers are made of in the model's forward passes within it.

    Yields a dict: layer -> record, which each forward pass overwrites; `record.mixing(segment_ids)` is the layer's
    matrix, unmaterialised, with the graph of the forward. With gradient checkpointing, do the backward within.

    Args:
        model: a causal LM or an encoder of transformers whose attention goes through its AttentionInterface, or a
            hybrid; also behind peft. Within, attention runs through sdpa (or ours, where scores are bounded).
        layers: from 0.
        values: note attention's values too.

    Raises:
        ValueError: a layer that the model does not have, attention that cannot be recorded, reentrant gradient
            checkpointing; within, attention that queries and keys do not tell (sinks, position biases).
    """
    name = type(model).__name__
    (body, modules), config = decoder(model), layers_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"attention of {name}: an encoder's and a decoder's cannot be matched; match hidden states")
    check_layers(f"attention of {name}", layers, len(modules))
    check_checkpointing(f"attention of {name}", modules)
    kinds = getattr(config, "layer_types", None)
    records: dict[int, LayerRecord] = {}
    noting: list[tuple[nn.Module, LayerRecord]] = []
    hooks = []
    for layer in sorted(set(layers)):
        mixer = next((module for module in modules[layer].modules() if isinstance(module, StateMixer)), None)
        if mixer is None and kinds is not None and kinds[layer] not in LAYER_KINDS:
            raise ValueError(f"attention of {name}: layer {layer} is of {kinds[layer]}, which cannot be recorded")
        if mixer is None:
            records[layer] = AttentionRecord(keeps_value=values)
        else:
            records[layer] = MixerRecord(mixer, group=gathers(modules[layer], mixer))
        if mixer is None:
            noting += [(module, records[layer]) for module in modules[layer].modules()]

    # tagged in the forward alone: a checkpointed layer that runs again in the backward is not noted again
    def begin(module, args):
        for part, record in noting:
            tag(part, record)

    def end():
        for part, record in noting:
            untag(part, record)

    def note_input(record: MixerRecord):
        def note(module, args, kwargs):
            if tagged(module, record):
                record.hidden_states = first_tensor(args, kwargs)

        return note

    for record in records.values():
        if isinstance(record, MixerRecord):
            noting.append((record.mixer, record))
            hooks.append(record.mixer.register_forward_pre_hook(note_input(record), with_kwargs=True))

    def finish(*_):
        end()
        for layer, record in records.items():
            if isinstance(record, AttentionRecord) and record.window is None and kinds is not None:
                if kinds[layer] == "sliding_attention":  # the window is in its mask alone
                    raise ValueError(f"attention of {name}: layer {layer} does not tell its window; leave it out")

    hooks += [body.register_forward_pre_hook(begin), body.register_forward_hook(finish)]
    try:
        with recording_attention(model):
            attends = any(isinstance(record, AttentionRecord) for record in records.values())
            if attends and getattr(config, "_attn_implementation", None) != RECORDING:
                raise ValueError(_NOT_RECORDED.format(name=name))
            yield records
    finally:
        end()
        for hook in hooks:
            hook.remove()


_NOT_RECORDED = (
    "attention of {name}: it does not go through transformers' AttentionInterface, so its queries and keys cannot be "
    "recorded; distil its hidden states or logits"
)


class AttentionMatch:
    """Mean over layer pairs of the distance between mixing matrices. It has no parameters.

    Of one pair, averaged over batch and heads:
    - "mse": the mean over all n x n entries of (S - A)^2, n being a row's real tokens;
    - "scores": the same of what the softmax takes, scale * q k^T, where both see (TinyBERT, arXiv 1909.10351, section
      3.1); between attentions only;
    - "frobenius": ||S - A||_F (MOHAWK's first phase, arXiv 2408.10189);
    - "kl": KL(A || S) of each row, averaged over the real rows (MiniLM, arXiv 2002.10957); between attentions only,
      and infinite, so refused, where the teacher sees more than the student.

    Head counts: equal ones are compared head by head. Where they differ no pairing is known, and means over heads
    are compared instead (TextBrewer, arXiv 2002.12620); MiniLM v2's relation heads need no pairing either, but compare
    other matrices than attention's own.

    Args:
        pairs: (student layer, teacher layer), as `layer_map` makes them.
        loss: "mse", "scores", "kl" or "frobenius".
        heads: "auto": as above; "mean": means over all heads, also of equal counts; "group": means over groups of
            consecutive heads, as many as both counts have in common (their greatest common divisor): for a student
            whose heads come from the teacher's, in the teacher's order.

    Raises:
        ValueError: options that do not exist.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], *, loss: str = "mse", heads: str = "auto"):
        for name, value, allowed in (("loss", loss, OF_MEANS), ("heads", heads, HEADS)):
            if value not in allowed:
                raise ValueError(f"attention match: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not pairs:
            raise ValueError("attention match: got no layer pairs; give one or more (student layer, teacher layer)")
        self.pairs = [tuple(pair) for pair in pairs]
        self.loss, self.heads = loss, heads

    @property
    def student_layers(self) -> list[int]:
        """The student's layers that are compared: what to give `collect_attention`."""
        return sorted({student for student, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """The teacher's layers that are compared."""
        return sorted({teacher for _, teacher in self.pairs})

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raises ValueError, before anything is run, for what these two models do not have or cannot record."""
        for model, layers in ((student, self.student_layers), (teacher, self.teacher_layers)):
            for layer, record in check_recorded(model, layers).items():
                if self.loss in OF_ATTENTION and isinstance(record, MixerRecord):
                    raise ValueError(_no_attention(self.loss, f"layer {layer} of {type(model).__name__}"))
        if self.loss == "kl":
            check_windows("attention match", self.pairs, student, teacher)

    def __call__(
        self, student: Mapping[int, LayerRecord], teacher: Mapping[int, LayerRecord], segment_ids: Tensor | None = None
    ) -> Tensor:
        """The mean over pairs of each pair's loss, a scalar in float32, or float64 if either side is.

        Args:
            student, teacher: what `collect_attention` noted of their forward passes on the same rows. The teacher gets
                no gradient and may lie on another device.
            segment_ids: (b, n), the documents of packed rows, -1 at padding; of a batch with an attention mask,
                `attention_mask.long() - 1`; None: each row one document without padding.
        """
        return torch.stack(list(self.losses(student, teacher, segment_ids).values())).mean()

    def losses(
        self, student: Mapping[int, LayerRecord], teacher: Mapping[int, LayerRecord], segment_ids: Tensor | None = None
    ) -> dict[tuple[int, int], Tensor]:
        """Each pair's loss, a scalar; arguments as in `__call__`, which is their mean."""
        losses = {}
        for i, j in self.pairs:
            mine = _mixing(student, i, "student", segment_ids)
            with torch.no_grad():
                theirs = _moved(_mixing(teacher, j, "teacher", segment_ids), mine.tensors[0].device)
            attentions = isinstance(mine, AttentionMixing) and isinstance(theirs, AttentionMixing)
            if self.loss in OF_ATTENTION and not attentions:
                raise ValueError(_no_attention(self.loss, f"the pair of layers {i} (student) and {j} (teacher)"))
            losses[i, j] = self._distance(mine, theirs)
        return losses

    def _distance(self, student: Mixing, teacher: Mixing) -> Tensor:
        heads = student.shape[1], teacher.shape[1]
        if self.heads == "auto":
            groups = heads[0] if heads[0] == heads[1] else 1
        else:
            groups = 1 if self.heads == "mean" else math.gcd(*heads)
        if (groups, groups) == heads and self.loss != "scores":
            return mixing_distance(student, teacher, metric=self.loss)
        return head_mean_distance(student, teacher, metric=self.loss, groups=groups)


def check_recorded(model: nn.Module, layers: Collection[int]) -> dict[int, LayerRecord]:
    """What a pass would note of a model's layers, empty. Raises ValueError as `collect_attention`."""
    with collect_attention(model, layers) as records:
        return records


def check_windows(where: str, pairs: Sequence[Sequence[int]], student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError where a KL is infinite: the teacher sees more than the student."""
    for i, j in pairs:
        mine, theirs = _window(student, i), _window(teacher, j)
        if mine is not None and (theirs is None or theirs > mine):
            raise ValueError(
                f"{where}: kl is infinite where the teacher sees more: layer {i} of the student looks back "
                f"{mine} tokens, layer {j} of the teacher {theirs or 'all'}; pair layers of one kind, or take mse"
            )


def parted(mask: Tensor) -> bool:
    """Whether a mask (b, n), 0 at padding, has padding between a row's tokens."""
    return bool((F.pad(mask.bool().long(), (1, 1)).diff(dim=-1).clamp_min(0).sum(-1) > 1).any())


def side_by_side(records: Mapping[int, LayerRecord], mask: Tensor) -> dict[int, LayerRecord]:
    """What the matrices of a forward pass are made of with each row's real tokens first, in their order.

    That is the matrix over the real tokens, for attention whose mask hides padding and for mixers, which pass over it.
    Raises ValueError where a window counts the padding in between.
    """
    order = mask.bool().logical_not().long().argsort(dim=1, stable=True)

    def moved(x: Tensor | None, dim: int) -> Tensor:
        assert x is not None  # the model has run
        shape = [1] * x.dim()
        shape[0], shape[dim] = order.shape
        return x.gather(dim, order.to(x.device).view(shape).expand_as(x))

    found: dict[int, LayerRecord] = {}
    for layer, record in records.items():
        if isinstance(record, MixerRecord):
            found[layer] = dataclasses.replace(record, hidden_states=moved(record.hidden_states, 1))
            continue
        if record.window is not None and record.window < mask.shape[1]:
            raise ValueError(
                f"attention match: layer {layer} has a window of {record.window}, which counts the padding between a "
                "row's tokens; move the padding to one end"
            )
        value = None if record.value is None else moved(record.value, 2)
        found[layer] = dataclasses.replace(
            record, query=moved(record.query, 2), key=moved(record.key, 2), value=value
        )  # fmt: skip
    return found


def _window(model: nn.Module, layer: int) -> int | None:
    """How many tokens a layer's attention looks back; None: all."""
    inner: Iterator[Any] = decoder(model)[1][layer].modules()
    for module in inner:
        if hasattr(module, "sliding_window"):
            return module.sliding_window
    config = layers_config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _no_attention(loss: str, what: str) -> str:
    compared = "distributions" if loss == "kl" else "what a softmax takes"
    return f"attention match: {loss} compares {compared}; {what} has a state-space matrix, take mse or frobenius"


def recorded(where: str, records: Mapping[int, LayerRecord], layer: int, side: str) -> LayerRecord:
    """What was noted of a layer. Raises ValueError where that is nothing."""
    record = records.get(layer)
    if record is None:
        have = ", ".join(map(str, sorted(records))) or "none"
        raise ValueError(f"{where}: nothing recorded of the {side}'s layer {layer}; there are {have}")
    if (record.query if isinstance(record, AttentionRecord) else record.hidden_states) is None:
        raise ValueError(
            f"{where}: the {side}'s layer {layer} made no attention that could be recorded; run the model "
            "within collect_attention, or distil its hidden states instead"
        )
    return record


def _mixing(records: Mapping[int, LayerRecord], layer: int, side: str, segment_ids: Tensor | None) -> Mixing:
    record = recorded("attention match", records, layer, side)
    noted = record.query if isinstance(record, AttentionRecord) else record.hidden_states
    assert noted is not None  # as `recorded` says
    return record.mixing(None if segment_ids is None else segment_ids.to(noted.device))


def _moved(mixing: Mixing, device: torch.device) -> Mixing:
    tensors: dict[str, Any] = {
        name: x.to(device) for name, x in vars(mixing).items() if isinstance(x, Tensor) and x.device != device
    }
    return dataclasses.replace(mixing, **tensors) if tensors else mixing

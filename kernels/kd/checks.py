"""Everything that can be wrong with a call of `kd_loss` or `linear_kd_loss`, said in one line before any
work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.teachers import (
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
)
from mohawk.kernels.kd.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mohawk.kernels.kd.call import Settings

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference", "chunked", "triton")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def _number(name: str, value: object, ok: Callable[[float], bool], allowed: str) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_settings(s: Settings, has_labels: bool, normalizer: float | Tensor | None) -> None:
    """The options that need no shapes."""
    _one_of("divergence", s.divergence, tuple(DIVERGENCES))
    _one_of("reduction", s.reduction, REDUCTIONS)
    _one_of("backend", s.backend, BACKENDS)
    _one_of("return_parts", s.return_parts, (False, True, "rows"))
    # Beyond, T^2 raises the rounding of the divergence above its value.
    _number("temperature", s.temperature, lambda x: 1e-3 <= x <= 1e3, "a number from 0.001 to 1000")
    _number("kd_weight", s.kd_weight, lambda x: x >= 0, "a finite number, 0 or above")
    _number("ce_weight", s.ce_weight, lambda x: x >= 0, "a finite number, 0 or above")
    _number("beta", s.beta, lambda x: 0 <= x <= 1, "a number from 0 (forward KL) to 1 (reverse KL)")
    _number("lam", s.lam, lambda x: 0 <= x < 1, "a number from 0 (no skew) to below 1")
    if s.ce_weight and not has_labels:
        raise ValueError(f"ce_weight is {s.ce_weight} but labels is None; pass labels or set ce_weight to 0")
    if isinstance(s.ignore_index, bool) or not isinstance(s.ignore_index, int):
        raise ValueError(f"ignore_index is {s.ignore_index!r}; it must be a whole number")
    if normalizer is None:
        return
    if s.reduction != "mean":
        raise ValueError(f"normalizer is given but reduction is {s.reduction!r}; it replaces the count in 'mean'")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; it must be one number")
        if normalizer.requires_grad:
            raise ValueError("normalizer requires grad, but none is computed for it; pass normalizer.detach()")
    else:
        _number("normalizer", normalizer, lambda x: x >= 0, "a finite number above 0")


def positive(normalizer: float | Tensor) -> float:
    """The normalizer where there are rows to divide by it. (Without any, as when all labels of all accumulation steps
    are ignored, it may be 0.)"""
    value = normalizer.item() if isinstance(normalizer, Tensor) else normalizer
    _number("normalizer", value, lambda x: x > 0, "above 0 where there are real rows, and finite")
    return float(value)


def check_student(student: tuple[Tensor, ...], s: Settings) -> None:
    """Logits, or hidden states with their head."""
    if not s.linear:
        _float("student_logits", student[0])
        return
    bias = student[2] if len(student) > 2 else None
    check_head("student", student[0], student[1], bias, s.logit_scale, s.logit_softcap, s.autocast)


def _float(name: str, x: object, dims: int | None = None) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if hasattr(x, "full_tensor"):
        how = "pass x.full_tensor(), call inside the module that owns it, or split the vocabulary with group="
        raise ValueError(f"{name} is a DTensor (FSDP2 or tensor parallel); {how}")
    if x.layout != torch.strided or x.is_meta:
        what = "on the meta device" if x.is_meta else f"{x.layout}"
        raise ValueError(f"{name} is {what}; it must be a dense tensor with values")
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; it must be a float dtype")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {dims} dimension{'s' * (dims > 1)}")
    if dims is None and x.dim() < 1:
        raise ValueError(f"{name} is a scalar; its last dimension must be the vocabulary or the hidden size")


def _device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the student is on {device}")


def check_head(
    side: str,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    autocast: bool,
) -> None:
    """Hidden states with their head; under autocast their dtypes may differ."""
    _float(f"{side} hidden states", hidden)
    _float(f"{side} head", head, 2)
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side} hidden size is {hidden.shape[-1]} but the head has shape {tuple(head.shape)}; "
            "the head must be (vocab, hidden), as in nn.Linear.weight"
        )
    if not head.shape[1]:
        raise ValueError(f"{side} hidden size is 0")
    if hidden.dtype != head.dtype and not autocast:
        raise ValueError(
            f"{side} hidden states are {hidden.dtype} but the head is {head.dtype}; "
            "cast one of them, or call under torch.autocast"
        )
    _device(f"{side} head", head, hidden.device)
    if bias is not None:
        _float(f"{side} bias", bias, 1)
        _device(f"{side} bias", bias, hidden.device)
        if bias.shape[0] != head.shape[0]:
            raise ValueError(f"{side} bias has {bias.shape[0]} entries but the head has {head.shape[0]} rows")
    _number(f"{side} logit_scale", scale, lambda x: True, "a finite number")
    if softcap is not None:
        _number(f"{side} logit_softcap", softcap, lambda x: x > 0, "None or a finite number above 0")


def _leading(name: str, shape: torch.Size, expected: torch.Size, what: str = "the student's") -> None:
    if shape != expected:
        raise ValueError(f"{name} has leading dimensions {tuple(shape)} but {what} are {tuple(expected)}")


def check_teacher(
    teacher: Teacher,
    lead: torch.Size,
    device: torch.device,
    vocabulary: Vocabulary,
    s: Settings,
    kept: Tensor | None = None,
) -> None:
    """A teacher source against the student's leading dimensions and vocabulary. Ids are looked at in the rows that
    are `kept` (None: all): a cache may have anything in its padding."""
    if isinstance(teacher, TeacherTAID):
        if not isinstance(teacher.teacher, (TeacherLogits, TeacherHidden, TeacherMixture)):
            kind = type(teacher.teacher).__name__
            raise ValueError(f"TeacherTAID takes a dense teacher or a mixture, not {kind}")
        _number("TeacherTAID.t", teacher.t, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        check_teacher(teacher.teacher, lead, device, vocabulary, s)
    elif isinstance(teacher, TeacherMixture):
        _check_mixture(teacher, lead, device, vocabulary, s)
    elif isinstance(teacher, TeacherLogits):
        _float("teacher logits", teacher.logits)
        _device("teacher logits", teacher.logits, device)
        _leading("teacher logits", teacher.logits.shape[:-1], lead)
        _same_vocab(teacher.logits.shape[-1], vocabulary, s)
    elif isinstance(teacher, TeacherHidden):
        scale, softcap = teacher.logit_scale, teacher.logit_softcap
        check_head("teacher", teacher.hidden, teacher.head, teacher.bias, scale, softcap, s.autocast)
        _device("teacher hidden states", teacher.hidden, device)
        _leading("teacher hidden states", teacher.hidden.shape[:-1], lead)
        _same_vocab(teacher.head.shape[0], vocabulary, s)
    elif isinstance(teacher, (TeacherTopK, TeacherSamples)):
        _check_ids(teacher, lead, device, vocabulary.size, s.divergence, kept)
    else:
        raise ValueError(
            f"teacher is a {type(teacher).__name__}; it must be a logits tensor or one of TeacherLogits, "
            "TeacherHidden, TeacherTopK, TeacherSamples, TeacherMixture, TeacherTAID"
        )


def dense_entries(teacher: object) -> list[int]:
    """How many entries each dense teacher inside one has, as far as it is one: this comes before its check."""
    while isinstance(teacher, TeacherTAID):
        teacher = teacher.teacher
    several = isinstance(teacher, TeacherMixture) and isinstance(teacher.teachers, Sequence)
    found = []
    for one in teacher.teachers if several else [teacher]:
        rows = getattr(one, "logits", None) if isinstance(one, TeacherLogits) else getattr(one, "head", None)
        if isinstance(rows, Tensor) and rows.dim():
            found.append(rows.shape[-1] if isinstance(one, TeacherLogits) else rows.shape[0])
    return found


def _same_vocab(entries: int, vocabulary: Vocabulary, s: Settings) -> None:
    if entries == vocabulary.entries or s.vocab_size is not None and entries >= vocabulary.local:
        return
    raise ValueError(
        f"the student's vocabulary has {vocabulary.entries} entries and the teacher's {entries}; "
        "pass vocab_size=the number of real tokens to cut both"
    )


def _check_mixture(
    teacher: TeacherMixture, lead: torch.Size, device: torch.device, vocabulary: Vocabulary, s: Settings
) -> None:
    if DIVERGENCES[s.divergence].on_logits:
        raise ValueError(f"divergence {s.divergence!r} compares logits; a mixture of teachers has probabilities only")
    if not isinstance(teacher.teachers, Sequence):
        raise ValueError(f"TeacherMixture.teachers is a {type(teacher.teachers).__name__}; it must be a list or tuple")
    if not len(teacher.teachers):
        raise ValueError("TeacherMixture has no teachers")
    for one in teacher.teachers:
        if not isinstance(one, (TeacherLogits, TeacherHidden)):
            raise ValueError(f"TeacherMixture takes TeacherLogits and TeacherHidden, not {type(one).__name__}")
        check_teacher(one, lead, device, vocabulary, s)
    if teacher.weights is not None:
        if len(teacher.weights) != len(teacher.teachers):
            counts = f"{len(teacher.teachers)} teachers and {len(teacher.weights)} weights"
            raise ValueError(f"TeacherMixture has {counts}; it must have as many")
        for weight in teacher.weights:
            _number("a weight of TeacherMixture", weight, lambda x: 1e-30 <= x <= 1e30, "a number from 1e-30 to 1e30")


def _check_ids(
    teacher: TeacherTopK | TeacherSamples, lead, device, vocab: int, divergence: str, kept: Tensor | None
) -> None:
    kind = type(teacher).__name__
    values = teacher.logprobs if isinstance(teacher, TeacherTopK) else teacher.weights
    name = f"{kind}.{'logprobs' if isinstance(teacher, TeacherTopK) else 'weights'}"
    if DIVERGENCES[divergence].on_logits:
        raise ValueError(f"divergence {divergence!r} compares logits; {kind} has probabilities only")
    if isinstance(teacher, TeacherTopK) and DIVERGENCES[divergence].no_top_k:
        raise ValueError(
            f"divergence {divergence!r} can't be taken over a top k, {DIVERGENCES[divergence].no_top_k}; "
            "use a dense teacher, or 'tvd'"
        )
    if isinstance(teacher, TeacherSamples) and divergence != "forward_kl":
        raise ValueError(
            f"divergence {divergence!r} can't be estimated from samples: only 'forward_kl' is linear in the teacher's "
            "probabilities, any other estimate would be biased; use 'forward_kl', or a dense or top-k teacher"
        )
    _float(name, values)
    if not isinstance(teacher.ids, Tensor) or teacher.ids.dtype != torch.int64:
        raise ValueError(f"{kind}.ids must be an int64 tensor")
    if teacher.ids.shape != values.shape:
        raise ValueError(f"{kind}.ids has shape {tuple(teacher.ids.shape)} but {name} {tuple(values.shape)}")
    _device(f"{kind}.ids", teacher.ids, device)
    _device(name, values, device)
    _leading(f"{kind}.ids", teacher.ids.shape[:-1], lead)
    if values.shape[-1] < 1:
        raise ValueError(f"{kind}.ids holds no ids: its last dimension is 0")
    if isinstance(teacher, TeacherTopK) and teacher.tail_logprob is not None:
        _float("TeacherTopK.tail_logprob", teacher.tail_logprob, len(lead))
        _device("TeacherTopK.tail_logprob", teacher.tail_logprob, device)
        _leading("TeacherTopK.tail_logprob", teacher.tail_logprob.shape, lead)
    ids = teacher.ids if kept is None else teacher.ids[kept]
    values = values if kept is None else values[kept]
    if not values.numel():
        return
    low, high = (int(x) for x in torch.stack(torch.aminmax(ids)).tolist())
    if low < 0 or high >= vocab:
        raise ValueError(f"{kind}.ids run from {low} to {high}; they must be in 0..{vocab - 1}")
    if isinstance(teacher, TeacherTopK):
        ordered = ids.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("TeacherTopK.ids repeats an id within a row; each may appear once")
        # Rounded to bfloat16, log-probabilities may add up to a few percent more.
        masses, names = values.float().exp().sum(-1), "logprobs hold"
        if teacher.tail_logprob is not None:
            tail = teacher.tail_logprob if kept is None else teacher.tail_logprob[kept]
            masses, names = masses + tail.float().exp(), "logprobs and tail_logprob hold"
        if (mass := masses.max().item()) > 1.1:
            raise ValueError(
                f"TeacherTopK.{names} a mass of {mass:.4g} in a row; they must be log-probabilities, at most 1 "
                "in sum: pass log_softmax(logits), gathered at the ids"
            )
    elif bool((values < 0).any()):
        raise ValueError("TeacherSamples.weights has negative entries; they must be 0 or above")


def check_rows(
    labels: Tensor | None,
    token_weights: Tensor | None,
    lead: torch.Size,
    device: torch.device,
    vocab: int,
    ignore_index: int,
) -> None:
    """Labels and token weights against the student's leading dimensions."""
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels).__name__)}")
        _device("labels", labels, device)
        _leading("labels", labels.shape, lead)
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if bool(wrong.any()):
            raise ValueError(
                f"labels contain {int(labels[wrong][0])}; allowed: 0..{vocab - 1} and ignore_index ({ignore_index})"
            )
    if token_weights is not None:
        _float("token_weights", token_weights, len(lead))
        _device("token_weights", token_weights, device)
        _leading("token_weights", token_weights.shape, lead)
        if token_weights.requires_grad:
            raise ValueError("token_weights requires grad, but none is computed for it; pass token_weights.detach()")

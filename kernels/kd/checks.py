"""Everything that can be wrong with a call of `kd_loss` or `linear_kd_loss`, said in one line before any
work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mohawk.kernels.common.tensors import unusable, whole_number
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.vocabulary import VocabularySlice

if TYPE_CHECKING:
    from mohawk.kernels.kd.options import Settings

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference", "chunked", "triton")
PRECISIONS = ("full", "rounded")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def check_number(name: str, value: object, ok: Callable[[float], bool], allowed: str) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not ok(float(value)):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_settings(s: Settings, has_labels: bool, normalizer: float | Tensor | None) -> None:
    """Check the options that need no shapes."""
    one_of("divergence", s.divergence, tuple(DIVERGENCES))
    one_of("reduction", s.reduction, REDUCTIONS)
    one_of("backend", s.backend, BACKENDS)
    one_of("precision", s.precision, PRECISIONS)
    one_of("return_parts", s.return_parts, (False, True, "rows"))
    # Beyond, T^2 raises the rounding of the divergence above its value.
    check_number("temperature", s.temperature, lambda x: 1e-3 <= x <= 1e3, "a number from 0.001 to 1000")
    check_number("kd_weight", s.kd_weight, lambda x: x >= 0, "a finite number, 0 or above")
    check_number("ce_weight", s.ce_weight, lambda x: x >= 0, "a finite number, 0 or above")
    check_number("beta", s.beta, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    check_number("lam", s.lam, lambda x: 0 <= x < 1, "a number from 0 (no skew) to below 1")
    if s.ce_weight and not has_labels:
        raise ValueError(f"ce_weight is {s.ce_weight} but labels is None; pass labels or set ce_weight to 0")
    if whole_number(s.ignore_index) is None:
        raise ValueError(f"ignore_index is {s.ignore_index!r}; it must be a whole number")
    if normalizer is None:
        return
    if s.reduction != "mean":
        raise ValueError(f"normalizer is given but reduction is {s.reduction!r}; it replaces the count in 'mean'")
    if isinstance(normalizer, Tensor):
        with_values("normalizer", normalizer)
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; it must be one number")
        if normalizer.requires_grad:
            raise ValueError("normalizer requires grad, but none is computed for it; pass normalizer.detach()")
    else:
        check_number("normalizer", normalizer, lambda x: x >= 0, "a finite number above 0")


def positive(normalizer: float | Tensor) -> float:
    """The normalizer where there are rows to divide by it. (Without any, as when all labels of all accumulation steps
    are ignored, it may be 0.)"""
    value = normalizer.item() if isinstance(normalizer, Tensor) else normalizer
    check_number("normalizer", value, lambda x: x > 0, "above 0 where there are real rows, and finite")
    return float(value)


def check_student(student: tuple[Tensor, ...], s: Settings) -> None:
    """Check a student's logits, or hidden states with their head."""
    if not s.linear:
        floating("student_logits", student[0])
        return
    bias = student[2] if len(student) > 2 else None
    check_head("student", student[0], student[1], bias, s.logit_scale, s.logit_softcap, s.under_autocast)


def with_values(name: str, x: object) -> None:
    if (reason := unusable(x)) is not None:
        raise ValueError(f"{name} {reason}")


def floating(name: str, x: object, dims: int | None = None) -> None:
    with_values(name, x)
    assert isinstance(x, Tensor)
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
    """Check hidden states with their head; under autocast their dtypes may differ."""
    floating(f"{side} hidden states", hidden)
    floating(f"{side} head", head, 2)
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
        floating(f"{side} bias", bias, 1)
        _device(f"{side} bias", bias, hidden.device)
        if bias.shape[0] != head.shape[0]:
            raise ValueError(f"{side} bias has {bias.shape[0]} entries but the head has {head.shape[0]} rows")
    check_number(f"{side} logit_scale", scale, lambda x: True, "a finite number")
    if softcap is not None:
        check_number(f"{side} logit_softcap", softcap, lambda x: x > 0, "None or a finite number above 0")


def leading(name: str, shape: torch.Size, expected: torch.Size, what: str = "the student's") -> None:
    if shape != expected:
        raise ValueError(f"{name} has leading dimensions {tuple(shape)} but {what} are {tuple(expected)}")


class Against(NamedTuple):
    """The student that a teacher is checked against."""

    lead: torch.Size
    device: torch.device
    vocabulary: VocabularySlice
    settings: Settings
    kept: Tensor | None = None  # the rows that count, of shape `lead`; None: all

    def beside(self, name: str, x: Tensor, trailing: int) -> None:
        """Check that a tensor is on the student's device and has its leading dimensions."""
        _device(name, x, self.device)
        leading(name, x.shape[: x.dim() - trailing], self.lead)

    def real(self, x: Tensor) -> Tensor:
        """The rows that count."""
        return x if self.kept is None else x[self.kept]


def same_vocab(entries: int, student: Against) -> None:
    """Check that a teacher has as many entries as the student, or more where that is allowed."""
    vocabulary = student.vocabulary
    if entries == vocabulary.entries or student.settings.vocab_size is not None and entries >= vocabulary.local:
        return
    raise ValueError(
        f"the student's vocabulary has {vocabulary.entries} entries and the teacher's {entries}; "
        "pass vocab_size=the number of real tokens to cut both"
    )


def of_probabilities(teacher: object, divergence: str) -> None:
    """Check what can be asked of a source that has no logits."""
    if DIVERGENCES[divergence].on_logits:
        kind = type(teacher).__name__
        raise ValueError(f"divergence {divergence!r} compares logits; {kind} has probabilities only")


def check_ids(kind: str, ids: Tensor, field: str, values: Tensor, student: Against) -> None:
    """Check ids (..., k) with a value each."""
    name, vocab = f"{kind}.{field}", student.vocabulary.size
    floating(name, values)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise ValueError(f"{kind}.ids must be an int64 tensor")
    with_values(f"{kind}.ids", ids)
    if ids.shape != values.shape:
        raise ValueError(f"{kind}.ids has shape {tuple(ids.shape)} but {name} {tuple(values.shape)}")
    _device(name, values, student.device)
    student.beside(f"{kind}.ids", ids, trailing=1)
    if values.shape[-1] < 1:
        raise ValueError(f"{kind}.ids holds no ids: its last dimension is 0")
    ids = student.real(ids)
    if not ids.numel():
        return
    low, high = (int(x) for x in torch.stack(torch.aminmax(ids)).tolist())
    if low < 0 or high >= vocab:
        raise ValueError(f"{kind}.ids run from {low} to {high}; they must be in 0..{vocab - 1}")


def check_rows(
    labels: Tensor | None,
    token_weights: Tensor | None,
    lead: torch.Size,
    device: torch.device,
    vocab: int,
    ignore_index: int,
) -> None:
    """Check labels and token weights against the student's leading dimensions."""
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels).__name__)}")
        with_values("labels", labels)
        _device("labels", labels, device)
        leading("labels", labels.shape, lead)
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if bool(wrong.any()):
            raise ValueError(
                f"labels contain {int(labels[wrong][0])}; allowed: 0..{vocab - 1} and ignore_index ({ignore_index})"
            )
    if token_weights is not None:
        floating("token_weights", token_weights, len(lead))
        _device("token_weights", token_weights, device)
        leading("token_weights", token_weights.shape, lead)
        if token_weights.requires_grad:
            raise ValueError("token_weights requires grad, but none is computed for it; pass token_weights.detach()")

"""Mixing matrices written out, and the distance between two, with gradients, without either: MOHAWK's first phase."""

import importlib.util
import inspect
import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mohawk.kernels.common.operators import call_operator, register_kernel
from mohawk.kernels.common.tensors import check_untransformed, whole_number
from mohawk.kernels.mixing.checks import check, check_head_means
from mohawk.kernels.mixing.chunked import distance_chunked, write_matrix
from mohawk.kernels.mixing.mean_heads import head_means_chunked
from mohawk.kernels.mixing.metrics import described
from mohawk.kernels.mixing.operands import KINDS, AttentionMixing, DeltaMixing, Mixing, SSDMixing
from mohawk.kernels.mixing.reference import distance_reference


def mixing_distance(
    student: Mixing,
    teacher: Mixing,
    *,
    metric: str = "frobenius",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """How far the student's matrix S is from the teacher's A, per batch row and head, reduced over both.

    metric: one of those listed below, or, between two attentions, "kl" sum_j A (log A - log S)
    averaged over rows. Rows and columns of padding (segment -1) count as equal; their values must be finite.

    Batch and seq must agree, and both matrices be causal, or neither, as those of encoders. If the head counts differ,
    one divides the other and each head of the smaller side is compared with a group of consecutive heads of the
    larger, as in grouped-query attention.
    reduction: "mean" or "sum" over (batch, heads), or "none". backend: "reference" builds both matrices,
    "chunked" never holds more than some rows of them, memory linear in seq.

    Products are of float32; those of "triton" are of bfloat16, with float32 sums, where all of q, k, C and B are, and
    under autocast to bfloat16, to which it rounds them.

    Returns float32, or float64 if any input is. Differentiable in the student's tensors, never in the
    teacher's; the gradients are made together with the value. Raises ValueError for what does not fit
    together, RuntimeError in a second derivative, which only the reference has.
    """
    if torch.compiler.is_compiling():
        return _compiled(student, teacher, metric, reduction, backend)
    check(student, teacher, metric, reduction, backend)
    if backend == "reference":
        with torch.no_grad():
            fixed = _detached(teacher)
        values = distance_reference(student, fixed, metric)
        return {"mean": values.mean, "sum": values.sum, "none": lambda: values}[reduction]()
    check_untransformed("mixing_distance", *student.tensors, *teacher.tensors)
    if backend == "triton":
        _check_triton(student, teacher)
    if backend == "triton" or (backend == "auto" and _triton_is_best(student, teacher)):
        if isinstance(student, DeltaMixing):
            from mohawk.kernels.mixing.triton_delta import distance_triton_delta

            return distance_triton_delta(student, teacher, metric, reduction)
        from mohawk.kernels.mixing.triton_backend import distance_triton

        return distance_triton(student, teacher, metric, reduction)
    return distance_chunked(student, teacher, metric, reduction)


if mixing_distance.__doc__:  # python -OO has none
    mixing_distance.__doc__ = (
        inspect.cleandoc(mixing_distance.__doc__) + "\n\nMetrics:\n" + textwrap.indent(described(), "    ")
    )


def head_mean_distance(student: Mixing, teacher: Mixing, *, metric: str = "mse", groups: int = 1) -> Tensor:
    """How far the mean of the student's matrices over heads is from the mean of the teacher's.

    metric: "mse" ||S - A||_F^2 / n^2 of n real tokens, "frobenius" ||S - A||_F, or between two attentions "kl"
    sum_j A (log A - log S) averaged over rows and "scores", the mse of what their softmax takes (scale * q k^T, capped
    if there is a softcap; entries that either does not see count as equal), with S and A the means over all heads, or,
    with groups above 1, over each of so many groups of consecutive heads, which divides both head counts. Padding
    (segment -1) counts as equal, as in `mixing_distance`.

    Returns the mean over batch and groups, a scalar in float32, or float64 if any input is. Differentiable in the
    student's tensors, never in the teacher's; memory linear in seq. Raises ValueError for what does not fit together,
    RuntimeError in a second derivative.
    """
    check_head_means(student, teacher, metric, groups)
    return head_means_chunked(student, teacher, metric, groups)


def mixing_matrix(
    mixing: Mixing,
    rows: tuple[int, int] | None = None,
    *,
    heads: Sequence[int] | None = None,
    mean_heads: bool = False,
) -> Tensor:
    """The matrix of a mixing, (batch, heads, rows, seq), written strip by strip; not differentiable.

    rows: the range (i0, i1) of rows, all if None. heads: which heads, all if None. mean_heads: their mean,
    (batch, rows, seq), summed strip by strip. Besides the result, one head's operands and one strip of 64
    rows are held, so some rows of a long context cost little. float64 inputs give float64, all others
    float32. Padding (segment -1) is a segment like any other here. Raises ValueError for rows or heads that
    do not exist.
    """
    if not isinstance(mixing, Mixing):
        raise ValueError(f"mixing_matrix: takes {KINDS}, got {type(mixing).__name__}")
    batch, count, seq = mixing.shape
    first, last = rows if isinstance(rows, (tuple, list)) and len(rows) == 2 else (0, seq if rows is None else -1)
    first, last = _place(first), _place(last)
    if not 0 <= first <= last <= seq:
        raise ValueError(f"mixing_matrix: rows must be (i0, i1) with 0 <= i0 <= i1 <= {seq}, got {rows}")
    if heads is not None and not isinstance(heads, Iterable):
        raise ValueError(f"mixing_matrix: heads must be a list of heads, got {heads!r}")
    given = list(range(count)) if heads is None else heads.tolist() if isinstance(heads, Tensor) else list(heads)
    chosen = [_place(head) for head in given]
    if not all(0 <= head < count for head in chosen):
        raise ValueError(f"mixing_matrix: heads must be whole numbers between 0 and {count - 1}, got {given}")
    if mean_heads and not chosen:
        raise ValueError("mixing_matrix: the mean over heads needs at least one head, got none")
    return write_matrix(mixing, first, last, chosen, mean_heads)


def _compiled(student: Mixing, teacher: Mixing, metric: str, reduction: str, backend: str) -> Tensor:
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    kind = student.tensors[0].device.type if isinstance(student, Mixing) else "cpu"
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    words = [metric, reduction, backend, "half" if half else "whole"]
    for mixing, fixed in ((student, False), (teacher, True)):
        if not isinstance(mixing, Mixing):
            raise ValueError(f"mixing_distance: student and teacher must be {KINDS}, got {type(mixing).__name__}")
        words.append(type(mixing).__name__)
        tensors += [x.detach() if fixed and x is not None else x for x in (*mixing.tensors, mixing.segment_ids)]
        if isinstance(mixing, AttentionMixing):
            given = (mixing.scale, mixing.window, mixing.softcap)
            words.append("".join("0" if x is None else "1" for x in given) + str(int(mixing.causal)))
            numbers += [0.0 if x is None else float(x) for x in given]
    (value,) = call_operator("mixing_distance", tensors, " ".join(words), numbers, reads_values=True)
    return value


PLAIN = ("scale", "window", "softcap", "causal")  # what an attention has beside tensors
_BY_NAME = {kind.__name__: kind for kind in (AttentionMixing, SSDMixing, DeltaMixing)}


def _as_operator(tensors: list[Tensor | None], words: str, numbers: list[float]) -> list[Tensor]:
    metric, reduction, backend, precision, *kinds = words.split()
    given, values, names = iter(tensors), iter(numbers), iter(kinds)
    mixings: list[Mixing] = []
    for name in names:
        kind = _BY_NAME[name]
        fields = [f for f in kind.__match_args__ if f not in PLAIN]
        made: dict[str, Any] = {field: next(given) for field in fields}
        if kind is AttentionMixing:
            *given_words, causal = next(names)
            made["causal"] = causal == "1"
            for field, there in zip(PLAIN[:3], given_words, strict=True):
                value = next(values)
                if there == "1":
                    made[field] = int(value) if field == "window" else value
        mixings.append(kind(**made))
    kind = mixings[0].tensors[0].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "half"):
        return [mixing_distance(*mixings, metric=metric, reduction=reduction, backend=backend)]


def _shapes(tensors: list[Tensor | None], words: str) -> list[Tensor]:
    _, reduction, _, _, *kinds = words.split()
    heads, batch, at = [], 0, 0
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    for name in kinds:
        if name not in _BY_NAME:
            continue
        first = tensors[at]
        assert first is not None
        of_heads = tensors[at + 2] if name == "SSDMixing" else first
        assert of_heads is not None
        heads.append(of_heads.shape[1] if name == "AttentionMixing" else of_heads.shape[2])
        batch = first.shape[0]
        at += len(_BY_NAME[name].__match_args__) - (len(PLAIN) if name == "AttentionMixing" else 0)
    shape = (batch, max(heads)) if reduction == "none" else ()
    first = tensors[0]
    assert first is not None
    return [first.new_empty(shape, dtype=torch.float64 if wide else torch.float32)]


register_kernel("mixing_distance", _as_operator, _shapes)


def _detached(mixing: Mixing) -> Mixing:
    fields: dict[str, Any] = {
        name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(mixing).items()
    }
    return type(mixing)(**fields)


def _triton_is_best(student: Mixing, teacher: Mixing) -> bool:
    if not student.tensors[0].is_cuda or importlib.util.find_spec("triton") is None:
        return False
    from mohawk.kernels.mixing.triton_backend import fits_triton

    return fits_triton(student, teacher)


def _check_triton(student: Mixing, teacher: Mixing) -> None:
    where = "mixing_distance: backend 'triton'"
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{where} needs the package triton: run pip install '.[triton]' in mohawk's checkout, or take 'chunked'"
        )
    from mohawk.kernels.mixing.triton_backend import fits_triton

    if not fits_triton(student, teacher):
        raise ValueError(
            f"{where} is not for float64, a head_dim or state_size above 256, attention that is not causal, nor for a "
            "DeltaMixing as the teacher of another kind; take 'chunked'"
        )
    device = student.tensors[0].device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{where} can't be used: the student is on {device}; it needs a CUDA or ROCm device; take 'chunked'"
        )


def _place(value: object) -> int:
    """The number as an int; -1, which is never a valid place, for what is no whole number."""
    whole = whole_number(value)
    return -1 if whole is None else whole

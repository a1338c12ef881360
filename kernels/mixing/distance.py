"""The distance between two mixing matrices, with gradients, without either matrix: MOHAWK's first phase."""

import importlib.util
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor

from mohawk.kernels.mixing.checks import check
from mohawk.kernels.mixing.chunked import distance_chunked
from mohawk.kernels.mixing.definition import DeltaMixing, Mixing
from mohawk.kernels.mixing.metrics import described
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

    metric: one of the table in metrics.py, listed below, or, between two attentions, "kl" sum_j A (log A - log S)
    averaged over rows. Rows and columns of padding (segment -1) count as equal; their values must be finite.

    Batch and seq must agree. If the head counts differ, one divides the other and each head of the smaller
    side is compared with a group of consecutive heads of the larger, as in grouped-query attention.
    reduction: "mean" or "sum" over (batch, heads), or "none". backend: "reference" builds both matrices,
    "chunked" never holds more than some rows of them, memory linear in seq.

    Products are of float32; those of "triton" are of bfloat16, with float32 sums, where all of q, k, C and B are, and
    under autocast to bfloat16, to which it rounds them.

    Returns float32, or float64 if any input is. Differentiable in the student's tensors, never in the
    teacher's; the gradients are made together with the value. Raises ValueError for what does not fit
    together, RuntimeError in a second derivative, which only the reference has.
    """
    check(student, teacher, metric, reduction, backend)
    if backend == "reference":
        with torch.no_grad():
            fixed = _detached(teacher)
        values = distance_reference(student, fixed, metric)
        return {"mean": values.mean, "sum": values.sum, "none": lambda: values}[reduction]()
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
            f"{where} is not for float64, a softcap, a head_dim or state_size above 256, nor for a DeltaMixing as the "
            "teacher of another kind; take 'chunked'"
        )

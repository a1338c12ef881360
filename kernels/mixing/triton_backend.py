"""The distance of two mixing matrices on GPUs, by the kernels of triton_kernels.py; nothing is longer than a row."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from mohawk.kernels.mixing import chunked
from mohawk.kernels.mixing.metrics import reads_teacher
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, is_causal
from mohawk.kernels.mixing.triton_kernels import normaliser_kernel, pass_kernel
from mohawk.kernels.mixing.triton_launch import (
    NORMALISER,
    capability_major,
    padded_width,
    product_dtype,
    side_of,
)
from mohawk.kernels.mixing.triton_tiles import Side

BACKEND = "triton"  # as `mohawk doctor` names it


def tiles(usual: bool, width: int, dtype: torch.dtype, major: int, softcap: bool = False) -> dict:
    """How to launch. usual: a state-space student and an attention teacher, the pair that needs fewest registers;
    width: the larger of head_dim and state_size padded to a power of 2; major: of CUDA's compute capability, 0 for AMD;
    softcap: of the student's scores.

    The largest blocks found that spill no registers on sm_80, sm_90, sm_100 and gfx942, for which triton_report.py
    compiles them. Float32 takes three products in tf32 for each, whose sum has its precision in chunks this short; AMD
    has products in float32.
    """
    precision, most = "ieee", None
    if dtype == torch.float32:
        block, step, chunk, warps, stages, precision = 16 if width > 128 else 32, 16, 32, 8, 1, "tf32x3"
        if major == 9 and usual and width <= 128:
            block, chunk, warps = 64, 64 if width <= 64 else 32, 4  # which wgmma takes
        elif width <= 64:
            warps = 4  # eight would make every product twice
    elif width > 128 or not (usual or major in (0, 9, 10)):
        block, step, chunk, warps, stages = 32, 32, 32, 8, 1 if softcap and width > 128 and major == 8 else 2
    elif major == 9 and width <= 64:
        # Three programs a multiprocessor have their turn while others wait for tensor cores.
        block, step, chunk, warps, stages = 64, 32 if usual else 16, 64, 4, 2
        most = None if softcap else 168
    else:
        block, step, chunk, warps, stages = 128, 32, 128, 8, 2
        if major == 9 and not usual:
            block, chunk = 64, 64
        elif major == 10 and not usual:
            stages = 1
        elif major not in (0, 9, 10):
            block, chunk = 64, 32
    if major == 0:  # 64 threads a warp
        block, warps, stages, precision = min(block, 64), 4, 1, "ieee"
    launch = {
        "BLOCK": block,
        "STEP": step,
        "CHUNK": chunk,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,  # as triton does by itself only up to 3.9
    }
    return launch if most is None else launch | {"maxnreg": most}


def _bounds(student: Side, teacher: Side) -> tuple[Tensor | None, Tensor | None]:
    """(batch, seq) int32: the first column each row, and the end of the rows each column has anything in."""
    if student.first is None or teacher.first is None:
        return None, None
    first = torch.minimum(student.first, teacher.first)
    index = torch.arange(first.shape[1], dtype=torch.int32, device=first.device).expand_as(first)
    return first, torch.searchsorted(first, index.contiguous(), right=True, out_int32=True)


def _without_padding(first: Tensor | None, real: Tensor) -> Tensor:
    """`first` such that rows of padding see nothing."""
    if first is None:
        first = torch.zeros(real.shape, dtype=torch.int32, device=real.device)
    return first.masked_fill(~real, real.shape[1])


def sums_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, real: Tensor | None, wanted: bool, half: bool = False
):
    """(batch, heads) float64 sums of squares of S - A (kl: of the rows' divergences) and, where the metric reads it, of
    A; if wanted, the gradients of half the former (kl: of the sum) with respect to the student's tensors, per head:
    (batch, heads, seq, ...), D's (batch, heads). real: (batch, seq) which tokens are no padding, None if all are. half:
    see `_dtype`."""
    batch, _, seq = student.shape
    heads = max(student.shape[1], teacher.shape[1])
    device = student.tensors[0].device
    assert not isinstance(student, DeltaMixing) and not isinstance(teacher, DeltaMixing)  # `fits_triton`
    dtype = product_dtype(student, teacher, half=half)
    s, t = side_of(student, dtype), side_of(teacher, dtype)
    widths = {"STUDENT_WIDTH": padded_width(s.width), "TEACHER_WIDTH": padded_width(t.width)}
    usual, capped = s.most is None and t.most is not None, s.softcap is not None
    launch = tiles(usual, max(widths.values()), dtype, capability_major(device), capped)
    programs = triton.cdiv(seq, launch["BLOCK"]) * batch
    for side in (s, t):
        if side.most is not None:
            normaliser_kernel[(programs * side.heads,)](
                side, seq, side.heads, WIDTH=padded_width(side.width), **launch | NORMALISER
            )

    def per_row(dtype: torch.dtype, *width: int) -> Tensor:
        return torch.empty(batch, heads, seq, *width, dtype=dtype, device=device)

    bounds = _bounds(s, t)
    if real is not None:
        s, t = (side._replace(first=_without_padding(side.first, real)) for side in (s, t))
        real = None if metric == "kl" else real.to(torch.int8).contiguous()
    squares, row_weights, column_weights = (per_row(torch.float64) for _ in range(3))
    sizes = per_row(torch.float64) if reads_teacher(metric) else None
    diagonals = per_row(torch.float32)
    d_left, d_right = (per_row(torch.float32, s.width) if wanted else None for _ in range(2))
    if metric != "kl":  # all others are made of the same sums
        metric = "squared" if sizes is None else "relative"
    for rows, bound, gradients in ((True, bounds[0], d_left), (False, bounds[1], d_right)):
        if rows or wanted:
            pass_kernel[(programs * heads,)](
                s, t, real, bound, squares, sizes, row_weights, column_weights, diagonals, gradients, seq, heads,
                ROWS=rows, METRIC=metric, GRADIENTS=wanted, **widths, **launch,
            )  # fmt: skip
    total, size = (None if value is None else value.sum(-1) for value in (squares, sizes))
    assert total is not None
    if d_left is None or d_right is None:
        return total, size, ()
    if isinstance(student, AttentionMixing):
        scale = student.resolved_scale()
        return total, size, (d_left.mul_(scale), d_right.mul_(scale))
    d_decay = (row_weights - column_weights).flip(-1).cumsum(-1).flip(-1)
    d_scale = None
    if s.weight is not None:
        d_scale = (d_right.unflatten(1, (s.right_heads, -1)) * s.right.unsqueeze(2)).sum(-1).flatten(1, 2)
        d_right.unflatten(1, (s.heads, -1)).mul_(s.weight[:, :, None, :, None])
    return total, size, (d_left, d_right, d_decay, d_scale, diagonals.sum(-1, dtype=torch.float64))


def distance_triton(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, sums: Callable = sums_and_gradients
) -> Tensor:
    """Shapes and meaning as in `mohawk.kernels.mixing.interface.mixing_distance`, float32. sums: by which kernels."""
    device = student.tensors[0].device
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    run = functools.partial(_value_and_gradients, sums=functools.partial(sums, half=half))
    if not student.tensors[0].numel():
        run = chunked.value_and_gradients
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return chunked.differentiable(student, teacher, metric, reduction, run)


def _value_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, wanted: bool, sums: Callable
) -> tuple[Tensor, list[Tensor | None]]:
    """(batch, heads) distances, and the gradients of their reduction (per head if there is none)."""
    real = chunked.real_tokens(student, teacher)
    total, size, per_head = sums(student, teacher, metric, real, wanted)
    values, factor = chunked.distance_and_factor(metric, total, size, student.shape[2], real)
    gradients: list[Tensor | None] = [None] * len(student.tensors)
    if wanted:
        factor = factor / values.numel() if reduction == "mean" else factor
        for index, (tensor, gradient) in enumerate(zip(student.tensors, per_head, strict=True)):
            if tensor is not None and gradient is not None and tensor.requires_grad:
                gradient = gradient.mul_(factor.view(*factor.shape, *(1,) * (gradient.dim() - 2)))
                if reduction != "none":
                    gradient = chunked.fold(gradient, tensor.shape, isinstance(student, AttentionMixing))
                gradients[index] = gradient.to(torch.float32)
    return values.to(torch.float32), gradients


def fits_triton(student: Mixing, teacher: Mixing) -> bool:
    """Whether the kernels cover this pair: causal, no float64, head_dim and state_size at most 256, and a delta rule as
    a teacher only of another (triton_delta.py)."""
    if isinstance(teacher, DeltaMixing) and not isinstance(student, DeltaMixing):
        return False
    for mixing in (student, teacher):
        if not is_causal(mixing) or any(x is not None and x.dtype == torch.float64 for x in mixing.tensors):
            return False
        if mixing.tensors[0].shape[-1] > 256:
            return False
    return True

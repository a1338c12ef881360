"""The distance of two mixing matrices on GPUs, by the kernels of triton_kernels.py; nothing is longer than a row."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from mohawk.kernels.common.segments import RESET, segment_starts
from mohawk.kernels.mixing import chunked
from mohawk.kernels.mixing.metrics import reads_teacher
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing
from mohawk.kernels.mixing.triton_kernels import Side, normaliser_kernel, pass_kernel

BACKEND = "triton"  # as `mohawk doctor` names it

NORMALISER = {"num_warps": 4}  # its launch is otherwise the pass's


def tiles(usual: bool, width: int, dtype: torch.dtype, major: int) -> dict:
    """How to launch. usual: a state-space student and an attention teacher, the pair that needs fewest registers;
    width: the larger of head_dim and state_size padded to a power of 2; major: of CUDA's compute capability, 0 for AMD.

    The largest blocks found that spill no registers on sm_80, sm_90, sm_100 and gfx942, for which triton_report.py
    compiles them. Float32 takes three products in tf32 for each, whose sum has its precision in chunks this short; AMD
    has products in float32.
    """
    precision = "ieee"
    if dtype == torch.float32:
        block, step, chunk, warps, stages, precision = 16 if width > 128 else 32, 16, 32, 8, 1, "tf32x3"
    elif width > 128 or not (usual or major in (0, 9, 10)):
        block, step, chunk, warps, stages = 32, 32, 32, 8, 2
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
    return {
        "BLOCK": block,
        "STEP": step,
        "CHUNK": chunk,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,  # as triton does by itself only up to 3.9
    }


def _major(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter's
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def _width(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _operands(mixing: AttentionMixing | SSDMixing) -> tuple[Tensor, Tensor]:
    """left and right of a Side, not yet contiguous."""
    if isinstance(mixing, AttentionMixing):
        return mixing.q, mixing.k
    return mixing.C.transpose(1, 2), mixing.B.transpose(1, 2)


def _dtype(*mixings: AttentionMixing | SSDMixing, half: bool = False) -> torch.dtype:
    """The products' operands' dtype; half: bfloat16. Float16 is widened: gradients times decays leave its range."""
    given = {tensor.dtype for mixing in mixings for tensor in _operands(mixing)}
    return torch.bfloat16 if half or given == {torch.bfloat16} else torch.float32


def _first_seen(mixing: Mixing) -> Tensor | None:
    """(batch, seq) int32: the first token each row sees; None if that is token 0 everywhere."""
    batch, _, seq = mixing.shape
    first = None if mixing.segment_ids is None else segment_starts(mixing.segment_ids)
    window = mixing.window if isinstance(mixing, AttentionMixing) else None
    if window is not None and window < seq:
        by_window = torch.arange(1 - window, seq - window + 1, device=mixing.tensors[0].device).clamp(min=0)
        first = by_window.expand(batch, seq) if first is None else torch.maximum(first, by_window)
    return None if first is None else first.to(torch.int32).contiguous()


def _side(mixing: AttentionMixing | SSDMixing, dtype: torch.dtype) -> Side:
    left, right = (value.to(dtype).contiguous() for value in _operands(mixing))
    most = inverse = sums = weight = D = scale = None
    if isinstance(mixing, AttentionMixing):
        scale = mixing.resolved_scale() * math.log2(math.e)
        most, inverse = torch.empty(2, *mixing.shape, dtype=torch.float32, device=left.device)
    else:
        # Borders of segments are masked in the kernels: in the sums they would only cost digits.
        decays = mixing.log_decay.transpose(1, 2).to(torch.float64).clamp(min=RESET)
        sums = (decays.cumsum(-1) * math.log2(math.e)).contiguous()
        if mixing.input_scale is not None:
            weight = mixing.input_scale.transpose(1, 2).float().contiguous()
        D = None if mixing.D is None else mixing.D.float().contiguous()
    sizes = (mixing.shape[1], left.shape[1], right.shape[1], left.shape[3])
    return Side(left, right, _first_seen(mixing), most, inverse, sums, weight, D, scale, *sizes)


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
    dtype = _dtype(student, teacher, half=half)
    s, t = _side(student, dtype), _side(teacher, dtype)
    widths = {"STUDENT_WIDTH": _width(s.width), "TEACHER_WIDTH": _width(t.width)}
    launch = tiles(s.most is None and t.most is not None, max(widths.values()), dtype, _major(device))
    programs = triton.cdiv(seq, launch["BLOCK"]) * batch
    for side in (s, t):
        if side.most is not None:
            normaliser_kernel[(programs * side.heads,)](
                side, seq, side.heads, WIDTH=_width(side.width), **launch | NORMALISER
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
    """Whether the kernels cover this pair: no float64 or softcap, head_dim and state_size at most 256, and a delta rule
    as a teacher only of another (triton_delta.py)."""
    if isinstance(teacher, DeltaMixing) and not isinstance(student, DeltaMixing):
        return False
    for mixing in (student, teacher):
        if any(value is not None and value.dtype == torch.float64 for value in mixing.tensors):
            return False
        if isinstance(mixing, AttentionMixing) and mixing.softcap is not None:
            return False
        if mixing.tensors[0].shape[-1] > 256:
            return False
    return True

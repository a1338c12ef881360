"""State-space duality in Triton: how the kernels of triton_kernels.py are launched, and the gradients put together."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.ssd.chunked import ssd_chunked
from mohawk.kernels.ssd.triton_kernels import (
    Operand,
    inputs_kernel,
    pairs_kernel,
    passing_kernel,
    scan_kernel,
    states_kernel,
)

BACKEND = "triton"  # as `mohawk doctor` names it

PROGRAMS = 512  # of pairs_kernel, which cuts the heads of a group into parts until there are as many: enough for a GPU


def tiles(half: bool, major: int) -> dict:
    """How to launch. half: whether x, B and C are bfloat16; major: of CUDA's compute capability, 0 for AMD.

    The largest blocks found that spill no registers on sm_80, sm_90, sm_100 and gfx942, for which ssd.triton_report
    compiles them. AMD has products in float32; elsewhere one is made of six in bfloat16.
    """
    dim = state = 64 if half and major not in (0, 8) else 32
    if major == 8 and not half:
        dim = 16
    return {
        "CHUNK": 64,
        "DIM": dim,
        "STATE": state,
        "THIRDS": major != 0,
        "num_warps": 4 if major == 0 else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _launch(x: Tensor, B: Tensor, C: Tensor) -> dict:
    return tiles({x.dtype, B.dtype, C.dtype} == {torch.bfloat16}, _major(x.device))


PASSING = {"BLOCK": 256, "num_warps": 4}


def _major(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter's
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def _operand(value: Tensor | None) -> Operand:
    """(batch, tokens[, heads[, width]]) as kernels take it."""
    if value is None:
        return Operand(None, 0, 0, 0)
    if value.dim() == 4 and value.stride(3) != 1:
        value = value.contiguous()
    return Operand(value, value.stride(0), value.stride(1), 0 if value.dim() == 2 else value.stride(2))


class _Sizes(NamedTuple):
    """Arguments that the kernels have in common."""

    seq: int
    heads: int
    chunks: int
    per_group_B: int
    per_group_C: int
    head_dim: int
    state_size: int

    @classmethod
    def of(cls, x: Tensor, B: Tensor, C: Tensor, chunk: int) -> _Sizes:
        _, seq, heads, head_dim = x.shape
        chunks = triton.cdiv(seq, chunk)
        return cls(seq, heads, chunks, heads // B.shape[2], heads // C.shape[2], head_dim, B.shape[3])


def _states(
    values: Operand,
    keys: Operand,
    per_group: int,
    shared: tuple[Operand, Operand, Operand],
    batch: int,
    sizes: _Sizes,
    across: Tensor | None,
    to_end: bool,
    launch: dict,
    device: torch.device,
) -> Tensor:
    """What each chunk adds to the state (or to its gradient): (batch, heads, chunks, head_dim, state_size)."""
    states = torch.empty(
        batch, sizes.heads, sizes.chunks, sizes.head_dim, sizes.state_size, dtype=torch.float32, device=device
    )
    blocks = triton.cdiv(sizes.head_dim, launch["DIM"]) * triton.cdiv(sizes.state_size, launch["STATE"])
    states_kernel[(batch * sizes.heads * sizes.chunks, blocks)](
        values, keys, *shared, states, across, sizes.seq, sizes.heads, sizes.chunks, per_group, sizes.head_dim,
        sizes.state_size, TO_END=to_end, **launch,
    )  # fmt: skip
    return states


def _pass_on(states: Tensor, across: Tensor, outer: Tensor | None, reverse: bool) -> Tensor:
    """Carries states from chunk to chunk, in place; returns what comes out, float32."""
    batch, heads, chunks, *state = states.shape
    carried = torch.empty(batch, heads, *state, dtype=torch.float32, device=states.device)
    size = math.prod(state)
    outer = None if outer is None else outer.contiguous()
    grid = (batch * heads, triton.cdiv(size, PASSING["BLOCK"]))
    passing_kernel[grid](states, across, outer, carried, chunks, size, REVERSE=reverse, **PASSING)
    return carried


def _parts(heads: int, pair_groups: int, programs: int) -> int:
    """Into how many parts pairs_kernel cuts the heads: whole pairs of groups, or equal parts of them, where there are
    `programs` for each part."""
    per_group = heads // pair_groups
    for splits in range(1, per_group + 1):
        if per_group % splits == 0 and (programs * pair_groups * splits >= PROGRAMS or splits == per_group):
            return pair_groups * splits
    raise AssertionError("per_group is a divisor of itself")


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, B, C, input_scale, D, initial_state, segment_ids):
        launch = _launch(x, B, C)
        sizes = _Sizes.of(x, B, C, launch["CHUNK"])
        batch = x.shape[0]
        at_x, at_B, at_C = map(_operand, (x, B, C))
        shared = _operand(log_decay), _operand(input_scale), _operand(segment_ids)
        across = torch.empty(batch, sizes.heads, sizes.chunks, dtype=torch.float32, device=x.device)
        entering = _states(at_x, at_B, sizes.per_group_B, shared, batch, sizes, across, True, launch, x.device)
        final = _pass_on(entering, across, initial_state, reverse=False)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        skip = None if D is None else D.contiguous()
        scan_kernel[(across.numel(),)](at_x, at_B, at_C, *shared, skip, entering, y, *sizes, **launch)
        ctx.save_for_backward(x, log_decay, B, C, input_scale, D, segment_ids, entering, across)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order("ssd has no second derivative; use backend='reference' for it")
    def backward(ctx, dy, d_final):
        x, log_decay, B, C, input_scale, D, segment_ids, entering, across = ctx.saved_tensors
        with _on(x.device):
            launch = _launch(x, B, C)
            sizes = _Sizes.of(x, B, C, launch["CHUNK"])
            batch, seq, heads, _ = x.shape
            dy = torch.zeros_like(x) if dy is None else dy
            at_x, at_dy, at_B, at_C = map(_operand, (x, dy, B, C))
            shared = _operand(log_decay), _operand(input_scale), _operand(segment_ids)
            leaving = _states(at_dy, at_C, sizes.per_group_C, shared, batch, sizes, None, False, launch, x.device)
            d_initial = _pass_on(leaving, across, d_final, reverse=True)

            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            d_decay = torch.empty(log_decay.shape, dtype=log_decay.dtype, device=x.device)
            d_scale = skip = per_chunk = None
            if input_scale is not None:
                d_scale = torch.empty(input_scale.shape, dtype=input_scale.dtype, device=x.device)
            if D is not None:
                skip = D.contiguous()
                per_chunk = torch.empty(batch * sizes.chunks, heads, dtype=torch.float32, device=x.device)
            inputs_kernel[(across.numel(),)](
                at_x, at_dy, at_B, at_C, *shared, skip, entering, leaving, dx, d_decay, d_scale, per_chunk, *sizes,
                **launch,
            )  # fmt: skip

            blocks = triton.cdiv(sizes.state_size, launch["STATE"])
            pair_groups = math.lcm(B.shape[2], C.shape[2])
            parts = _parts(heads, pair_groups, batch * sizes.chunks * blocks)
            dB, dC = (
                torch.empty(
                    batch, seq, parts, sizes.state_size, device=x.device,
                    dtype=value.dtype if value.shape[2] == parts else torch.float32,
                )
                for value in (B, C)
            )  # fmt: skip
            pairs_kernel[(batch * sizes.chunks * parts, blocks)](
                at_x, at_dy, at_B, at_C, *shared, entering, leaving, dB, dC, *sizes[:3], parts, *sizes[3:], **launch
            )
            dB, dC = (
                made if made.shape == value.shape else made.unflatten(2, (value.shape[2], -1)).sum(3).to(value.dtype)
                for made, value in ((dB, B), (dC, C))
            )
        return (
            dx,
            d_decay,
            dB,
            dC,
            d_scale,
            None if D is None or per_chunk is None else per_chunk.sum(0, dtype=torch.float64).to(D.dtype),
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            None,
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def ssd_triton(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `mohawk.kernels.ssd.interface.ssd`, no float64 x. Returns y in x's dtype and the final state."""
    given = (x, log_decay, B, C, input_scale, D, initial_state, segment_ids)
    if not x.numel() or not B.numel():
        return ssd_chunked(*given)
    with _on(x.device):
        return _TritonScan.apply(*given)

"""Decoding steps in Triton: how the kernels of triton_kernels.py are launched."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from mohawk.kernels.decode.triton_kernels import Rows, Window, delta_kernel, ssd_kernel

BACKEND = "triton"  # as `mohawk doctor` names it


def tiles(rows: int, columns: int, amd: bool) -> dict[str, int]:
    """How to launch for heads' states of this size: in one tile, with the warps for which decode.triton_report found no
    spills. AMD's have twice as many threads."""
    wide, high = (max(8, 1 << (size - 1).bit_length()) for size in (columns, rows))
    warps = max(1, wide * high // 1024)
    warps = min(8, warps) if amd else 16 if warps > 4 else warps
    return {"ROWS": high, "COLUMNS": wide, "num_warps": warps, "num_stages": 1}


def ssd_decode_triton(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    D: Tensor | None,
    gate_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    real: Tensor | None,
) -> Tensor:
    """As `ssd_decode_reference`, for states of float32 or less."""
    batch, heads, rows, columns = state.shape
    groups = (inputs.shape[1] - heads * rows) // (2 * columns)
    fixed = [None if x is None else x.contiguous() for x in (weight, bias, A_log, dt_bias, D, gate_bias, norm_weight)]
    out = torch.empty(batch, heads * rows, dtype=inputs.dtype, device=state.device)
    between = None
    if norm_weight is not None and groups != heads:
        between = torch.empty(out.shape, dtype=torch.float32, device=state.device)
    with _on(state.device), _contiguous(state) as held:
        ssd_kernel[(batch, groups)](
            _window(window), *map(_rows, (inputs, gate, decay)), *fixed, _bytes(real), held, between, out, norm_eps,
            heads, groups, rows, columns, SILU=silu, KERNEL=weight.shape[1], PER_GROUP=heads // groups,
            **tiles(rows, columns, torch.version.hip is not None),
        )  # fmt: skip
    return out


def delta_decode_triton(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    beta: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    norm_eps: float,
    sigmoid: bool,
    real: Tensor | None,
) -> Tensor:
    """As `delta_decode_reference`, for states of float32 or less."""
    batch, heads, rows, columns = state.shape
    groups = (inputs.shape[1] - heads * columns) // (2 * rows)
    fixed = [None if x is None else x.contiguous() for x in (weight, bias, A_log, dt_bias, norm_weight)]
    out = torch.empty(batch, heads * columns, dtype=inputs.dtype, device=state.device)
    by_channel = decay.dim() == 3
    with _on(state.device), _contiguous(state) as held:
        delta_kernel[(batch, groups)](
            _window(window), *map(_rows, (inputs, gate, beta, decay.flatten(1))), *fixed, _bytes(real), held, out,
            norm_eps, rows**-0.5, heads, groups, rows, columns, BY_CHANNEL=by_channel, SIGMOID=sigmoid,
            KERNEL=weight.shape[1], PER_GROUP=heads // groups, **tiles(rows, columns, torch.version.hip is not None),
        )  # fmt: skip
    return out


@contextlib.contextmanager
def _contiguous(state: Tensor):
    """The state, or a copy of it that is contiguous, and written back."""
    held = state.contiguous()
    yield held
    if held is not state:
        state.copy_(held)


def _window(window: Tensor) -> Window:
    return Window(window, *window.stride())


def _rows(x: Tensor) -> Rows:
    x = x if x.stride(1) == 1 else x.contiguous()
    return Rows(x, x.stride(0))


def _bytes(real: Tensor | None) -> Tensor | None:
    return None if real is None else real.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

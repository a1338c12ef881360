"""Depthwise causal convolution over the sequence, the short one in front of a state-space scan.

Four shifted multiply-adds with the backward written out: `torch.nn.Conv1d` with groups = channels is slow
to train on a CPU and knows neither states nor packed documents.
"""

import functools
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.common.packages import usable
from mohawk.kernels.common.segments import check_segment_ids, segment_runs, segment_starts

ACTIVATIONS = (None, "silu")


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t, c] = activation(bias[c] + sum_j weight[c, j] * x[t - (kernel - 1) + j, c]).

    x: (batch, seq, channels). weight: (channels, kernel), the last tap that of the token itself. bias:
    (channels,). activation: None or "silu". initial_state: (batch, channels, kernel - 1), the inputs before
    the first token, oldest first; zeros if not given. segment_ids: (batch, seq) integers; where the id
    changes nothing earlier is seen (the first segment goes on from initial_state). One token with a state
    is a decoding step.

    Returns y like x, and with return_final_state also the state after the last token, like initial_state in
    x's dtype. Differentiable in x, weight, bias and initial_state; sums are float32 inside. Raises
    ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, activation, initial_state, segment_ids)
    package = _package_function() if x.is_cuda and _fits_package(x, weight, initial_state, segment_ids) else None
    if package is not None:
        y = by_package(package, x, weight, bias, activation, initial_state, segment_ids)
    else:
        y = _CausalConv.apply(x, weight, bias, initial_state, segment_ids, activation == "silu")
    if not return_final_state:
        return y
    batch, seq, channels = x.shape
    kept = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, kept)
    final = torch.cat((initial_state.to(x.dtype), x[:, max(0, seq - kept) :].transpose(1, 2)), dim=2)
    final = final[:, :, final.shape[2] - kept :]
    if segment_ids is not None and seq and kept:
        # What the next token, of the last token's segment, may see: nothing from before that segment began.
        start = segment_starts(segment_ids)[:, -1]
        back = torch.arange(kept, 0, -1, device=x.device)
        visible = (seq - back >= start.unsqueeze(1)) | (segment_runs(segment_ids)[:, -1:] == 0)
        final = final * visible.unsqueeze(1)
    return y, final


def causal_conv1d_step(
    window: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """The convolution's output for the last token of a window that is as long as the kernel.

    window: (batch, channels, kernel), oldest input first. weight, bias, activation: as in `causal_conv1d`. Returns
    (batch, channels) in window's dtype; sums are float32 inside (float64 for float64). Raises ValueError for shapes
    that do not fit.
    """
    if window.dim() != 3 or window.shape[1:] != weight.shape:
        raise ValueError(
            f"causal_conv1d_step: window must be (batch, channels, kernel) for a weight (channels, kernel), "
            f"got {tuple(window.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d_step: activation must be None or 'silu', got {activation!r}")
    wide = _wide(window)
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (torch.nn.functional.silu(y) if activation == "silu" else y).to(window.dtype)


@functools.cache
def _package_function() -> Callable | None:
    """`causal_conv1d_fn` of the causal-conv1d package, None where it cannot be imported; looked up once."""
    if not usable("causal_conv1d"):
        return None
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


def _fits_package(x: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> bool:
    """It takes 2 to 4 taps, channels in eights, no float64, and not states and segments at once."""
    return (
        x.numel() > 0
        and x.dtype != torch.float64
        and 2 <= weight.shape[1] <= 4
        and x.shape[2] % 8 == 0
        and (initial_state is None or segment_ids is None)
    )


def by_package(
    function: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """y by the causal-conv1d package's `causal_conv1d_fn`: (batch, channels, seq), channels last in memory."""
    state = None
    if initial_state is not None:
        state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y = function(
        x.contiguous().transpose(1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        seq_idx=None if segment_ids is None else segment_runs(segment_ids).to(torch.int32),
        initial_states=state,
        activation=activation,
    )
    return y.transpose(1, 2)


class _CausalConv(torch.autograd.Function):
    """One batch row at a time, which stays in the cache, and in it one segment after the other."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, segment_ids, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
        ctx.silu = silu
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        taps = weight.to(_wide(x)).t().contiguous()
        for row, pieces in enumerate(_pieces(x, segment_ids)):
            state = None if initial_state is None else initial_state[row].t().to(taps.dtype)
            pre = _convolve(x[row].to(taps.dtype), taps, bias, state, pieces)
            y[row] = torch.nn.functional.silu(pre) if silu else pre
        return y

    @staticmethod
    @first_order("causal_conv1d has no second derivative")
    def backward(ctx, dy):
        x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
        taps = weight.to(_wide(x)).t().contiguous()
        kept = taps.shape[0] - 1
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(taps[0])
        d_initial = None if initial_state is None else torch.zeros_like(initial_state)
        for row, pieces in enumerate(_pieces(x, segment_ids)):
            wide = x[row].to(taps.dtype)
            state = None if initial_state is None else initial_state[row].t().to(taps.dtype)
            d_pre = dy[row].to(taps.dtype)
            if ctx.silu:
                pre = _convolve(wide, taps, bias, state, pieces)
                d_pre = torch.ops.aten.silu_backward(d_pre, pre)
            d_row = d_pre * taps[kept]
            d_taps[kept] += (d_pre * wide).sum(0)
            for start, stop in pieces:
                for back in range(1, min(kept, stop - start - 1) + 1):
                    d_piece = d_pre[start + back : stop]
                    d_row[start : stop - back].addcmul_(d_piece, taps[kept - back])
                    d_taps[kept - back] += (d_piece * wide[start : stop - back]).sum(0)
            if state is not None and d_initial is not None and pieces:
                d_state = torch.zeros_like(state)
                for back, seen, held in _from_state(kept, pieces[0][1]):
                    d_state[held].addcmul_(d_pre[seen], taps[kept - back])
                    d_taps[kept - back] += (d_pre[seen] * state[held]).sum(0)
                d_initial[row] = d_state.t()
            d_bias += d_pre.sum(0)
            dx[row] = d_row
        return (
            dx,
            d_taps.t().to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            d_initial,
            None,
            None,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pieces(x: Tensor, segment_ids: Tensor | None) -> list[list[tuple[int, int]]]:
    """The segments (start, stop) of each batch row, none where there are no tokens."""
    batch, seq, _ = x.shape
    if segment_ids is None or not seq:
        return [[(0, seq)] if seq else []] * batch
    rows = []
    for changes in (segment_ids[:, 1:] != segment_ids[:, :-1]).cpu():
        borders = [0, *(changes.nonzero().flatten() + 1).tolist(), seq]
        rows.append(list(zip(borders[:-1], borders[1:], strict=True)))
    return rows


def _from_state(kept: int, length: int) -> list[tuple[int, slice, slice]]:
    """Tap by tap (back tokens before its own) the first segment's tokens that read the state, and what of it."""
    reads = []
    for back in range(1, kept + 1):
        count = min(back, length)
        reads.append((back, slice(0, count), slice(kept - back, kept - back + count)))
    return reads


def _convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor | None, pieces: list[tuple[int, int]]
) -> Tensor:
    """(seq, channels) of one batch row before the activation. taps: (kernel, channels). state: (kept, channels)."""
    kept = taps.shape[0] - 1
    out = x * taps[kept] if bias is None else torch.addcmul(bias.to(x.dtype), x, taps[kept])
    for start, stop in pieces:
        for back in range(1, min(kept, stop - start - 1) + 1):
            out[start + back : stop].addcmul_(x[start : stop - back], taps[kept - back])
    if state is not None and pieces:
        for back, seen, held in _from_state(kept, pieces[0][1]):
            out[seen].addcmul_(state[held], taps[kept - back])
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    where = "causal_conv1d"
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{where}: x must be floating point (batch, seq, channels), got {x.dtype} {tuple(x.shape)}")
    batch, seq, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"{where}: weight must be (channels, kernel) with {channels} channels, "
            f"got {tuple(weight.shape)}; squeeze a Conv1d weight of (channels, 1, kernel)"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{where}: bias must be (channels,) = ({channels},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be None or 'silu', got {activation!r}")
    state_shape = (batch, channels, weight.shape[1] - 1)
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(
            f"{where}: initial_state must be (batch, channels, kernel - 1) = {state_shape}, "
            f"got {tuple(initial_state.shape)}"
        )
    check_segment_ids(segment_ids, batch, seq, where)

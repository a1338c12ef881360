"""The convolution in torch, on any device, with the backward written out: multiply-adds of shifted rows.

One batch row is a chunk, which stays in the cache, and in it one segment comes after the other.
"""

import torch
from torch import Tensor

from mohawk.kernels.common.first_order import first_order

BACKEND = "chunked"


def causal_conv1d_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Shapes as in `causal_conv1d`. Returns y like x."""
    return _ChunkedConv.apply(x, weight, bias, initial_state, segment_ids, activation == "silu")


class _ChunkedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, segment_ids, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
        ctx.silu = silu
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        taps = weight.to(accumulator_dtype(x)).t().contiguous()
        for row, pieces in enumerate(_pieces(x, segment_ids)):
            state = None if initial_state is None else initial_state[row].t().to(taps.dtype)
            pre = _convolve(x[row].to(taps.dtype), taps, bias, state, pieces)
            y[row] = torch.nn.functional.silu(pre) if silu else pre
        return y

    @staticmethod
    @first_order("causal_conv1d has no second derivative")
    def backward(ctx, dy):
        x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
        taps = weight.to(accumulator_dtype(x)).t().contiguous()
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


def accumulator_dtype(x: Tensor) -> torch.dtype:
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
    """For each distance that a tap looks back: which tokens read the state by it, and which of its tokens."""
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

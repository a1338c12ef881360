"""Recurrences as ONNX can hold them: torch's `scan` over chunks of tokens, whose number a graph need not know.

The same sums as in `mohawk.kernels.ssd.chunked` and `mohawk.kernels.common.delta_chunks`, a chunk a step, so that the
work grows with the length and only one chunk's matrices are there at a time. Decays are summed in float64 and their
differences, at most 0, taken there. ONNX has no triangular solver: a delta chunk's inverse is put together from blocks
of twice the size each time, exactly as elimination would.

Letters: b batch, n sequence, h heads, g groups of B and C, p head dim, N state size, t tokens of a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SSD_CHUNK = 64
DELTA_CHUNK = 32
CHANNEL_CHUNK = 16  # with a decay for each channel the entries of a chunk are t x t x N
GONE = -1e4  # exp of it is 0, of sums of it too, and no sum of it is infinite


def ssd_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, *, input_scale: Tensor | None, D: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """`mohawk.kernels.ssd.interface.ssd` in float32 from a state: (y (b, n, h, p), the state after the last token).

    Shapes as there; initial_state: (b, h, p, N).
    """
    heads, groups = x.shape[2], B.shape[2]
    scaled = x if input_scale is None else x * input_scale.unsqueeze(-1)

    def step(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x_bhtp, decays_bht, B_bgtN, C_bgtN = (value.transpose(1, 2) for value in chunk)
        sums = decays_bht.double().cumsum(-1)
        from_start, to_end = sums.exp().float(), (sums[..., -1:] - sums).exp().float()
        B_bhtN, C_bhtN = (_per_head(value, heads // groups) for value in (B_bgtN, C_bgtN))
        mixing = C_bhtN @ B_bhtN.mT * _decay_between(sums)
        y = mixing @ x_bhtp + (C_bhtN * from_start.unsqueeze(-1)) @ state.mT
        state = state * from_start[..., -1:, None] + (x_bhtp * to_end.unsqueeze(-1)).mT @ B_bhtN
        return state, y.transpose(1, 2)

    y, state = _over_chunks(step, initial_state, (scaled, log_decay.clamp(min=GONE), B, C), SSD_CHUNK)
    return y + x * D.unsqueeze(-1), state


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, log_decay: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """`mohawk.kernels.delta.interface.gated_delta_rule` in float32 from a state: (y (b, n, h, p), the state after).

    Shapes as there; initial_state: (b, h, N, p).
    """
    by_channel = log_decay.dim() == 4
    length = CHANNEL_CHUNK if by_channel else DELTA_CHUNK

    def step(state: Tensor, chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, beta, decays = (value.transpose(1, 2) for value in chunk)
        sums = (decays if by_channel else decays.unsqueeze(-1)).double().cumsum(2)
        from_start, to_end = sums.exp().float(), (sums[:, :, -1:] - sums).exp().float()
        if by_channel:
            differences = (sums.unsqueeze(3) - sums.unsqueeze(2)).clamp(max=0).exp().float()  # (b, h, t, t, N)
            k_decayed = k.unsqueeze(2) * differences
            scores, overlaps = ((of.unsqueeze(3) * k_decayed).sum(-1).tril() for of in (q, k))
        else:
            decay = _decay_between(sums.squeeze(-1))
            scores, overlaps = (of @ k.mT * decay for of in (q, k))
        inverse = _unit_inverse((beta.unsqueeze(-1) * overlaps).tril(-1), length)
        writes = inverse * beta.unsqueeze(2)
        written = writes @ v - writes @ (k * from_start) @ state
        y = (q * from_start) @ state + scores @ written
        state = state * from_start[:, :, -1].unsqueeze(-1) + (k * to_end).mT @ written
        return state, y.transpose(1, 2)

    return _over_chunks(step, initial_state, (q, k, v, beta, log_decay.clamp(min=GONE)), length)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: Tensor) -> Tensor:
    """`mohawk.kernels.causal_conv1d.interface.causal_conv1d` behind the inputs `before` (b, channels, kernel - 1)."""
    n, kernel = x.shape[1], weight.shape[1]
    seen = torch.cat([before.transpose(1, 2), x], 1)
    y = seen[:, :n] * weight[:, 0]
    for tap in range(1, kernel):
        y = y + seen[:, tap : tap + n] * weight[:, tap]
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y


def _over_chunks(step: Callable, state: Tensor, values: tuple[Tensor, ...], length: int) -> tuple[Tensor, Tensor]:
    """Values (b, n, ...) in chunks (b, length, ...), the last filled up with zeros, one after the other through
    `step(state, chunk) -> (state, y)`. Returns (y, state)."""
    n = values[0].shape[1]
    chunks = (n + length - 1) // length
    cut = []
    for value in values:
        sides = [0, 0] * (value.dim() - 2) + [0, chunks * length - n]
        cut.append(F.pad(value, sides).unflatten(1, (chunks, length)).transpose(0, 1))
    if torch.compiler.is_exporting():
        from torch._higher_order_ops import scan

        state, y = scan(step, state, tuple(cut))
    else:  # the same, without what `scan` compiles first
        made = []
        for chunk in zip(*cut, strict=True):
            state, of_chunk = step(state, chunk)
            made.append(of_chunk)
        y = torch.stack(made)
    return y.transpose(0, 1).flatten(1, 2)[:, :n], state


def _per_head(value: Tensor, count: int) -> Tensor:
    """(b, g, t, N) -> (b, g * count, t, N), each group so many times."""
    return value if count == 1 else value.unsqueeze(2).expand(-1, -1, count, -1, -1).flatten(1, 2)


def _decay_between(sums: Tensor) -> Tensor:
    """(..., t) sums of log decays in float64 -> (..., t, t) float32 exp(sums_i - sums_j) for j <= i, else 0."""
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp(max=0).exp().float().tril()


def _unit_inverse(lower: Tensor, length: int) -> Tensor:
    """(1 + lower)^-1 for a strictly lower triangle: once blocks of a size are inverted, so are those of twice it."""
    place = torch.arange(length)
    inverse = torch.eye(length).expand_as(lower)
    size = 1
    while size < length:
        row, column = place[:, None] // size, place // size
        between = (row == column + 1) & (row % 2 == 1)  # the lower left quarter of each pair of blocks
        inverse = inverse - inverse @ (lower * between) @ inverse
        size *= 2
    return inverse

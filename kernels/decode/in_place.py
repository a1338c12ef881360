"""Decoding steps in torch, on any device, in as few operations as torch allows: on a CPU a step is little but their
number. There is no padding here.

What is written for that: the convolution's window is read tap by tap, which is quick where its taps lie apart (see
`by_tap`); casts and views are left out where they would change nothing; the state is changed where it lies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk.kernels.decode.reference import NORM_EPS

BACKEND = "in_place"


def by_tap(window: Tensor) -> Tensor:
    """(b, c, k) -> the same in memory that holds all channels of a tap side by side."""
    if window.stride(1) == 1:
        return window
    batch, channels, kernel = window.shape
    # no view: one made without gradients could not be written to where they are recorded
    return torch.empty_strided(
        window.shape, (channels * kernel, 1, channels), dtype=window.dtype, device=window.device
    ).copy_(window)


@torch.no_grad()
def ssd_decode_in_place(
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
) -> Tensor:
    """As `ssd_decode_reference`."""
    wide = _wide(state.dtype)
    batch, heads, head_dim, state_size = state.shape
    inner = heads * head_dim
    size = (inputs.shape[1] - inner) // 2
    groups = size // state_size
    convolved = _as(_convolve(window, inputs, weight, bias, silu), wide)
    x = convolved[:, :inner].view(batch, heads, head_dim)
    B = convolved[:, inner : inner + size].view(batch, groups, 1, state_size)
    C = convolved[:, inner + size :].view(batch, groups, 1, state_size)
    if groups != heads:
        B, C = B.repeat_interleave(heads // groups, 1), C.repeat_interleave(heads // groups, 1)
    raw, scaled = _as(decay, wide), x
    if A_log is None:
        between = F.softplus(raw).neg_().exp_()
    else:
        dt = F.softplus(raw if dt_bias is None else raw + _as(dt_bias, wide))
        between = _as(A_log, wide).exp().mul(dt).neg_().exp_()
        scaled = x * dt.unsqueeze(-1)
    own = _as(state, wide)
    own.mul_(between.view(batch, heads, 1, 1)).addcmul_(scaled.unsqueeze(-1), B)
    # a sum, not a matrix product, which autocast and the precision of torch's matrix products would round
    y = (own * C).sum(-1)
    if D is not None:
        y.addcmul_(x, _as(D, wide).unsqueeze(-1))
    if own is not state:
        state.copy_(own)
    if inputs.dtype != wide:
        y = y.to(inputs.dtype).to(wide)
    z = _as(gate, wide)
    y = y.view(batch, inner).mul_(F.silu(z if gate_bias is None else z + _as(gate_bias, wide)))
    if norm_weight is not None:
        grouped = y.view(batch, groups, inner // groups)
        grouped.mul_(_one_by_root(grouped.square().mean(-1, True), norm_eps))
        y.mul_(_as(norm_weight, wide))
    return _as(y, inputs.dtype)


@torch.no_grad()
def delta_decode_in_place(
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
) -> Tensor:
    """As `delta_decode_reference`."""
    wide = _wide(state.dtype)
    batch, heads, key_dim, value_dim = state.shape
    size = (inputs.shape[1] - heads * value_dim) // 2
    groups = size // key_dim
    convolved = _as(_convolve(window, inputs, weight, bias, True), wide)
    qk = convolved[:, : 2 * size].view(batch, 2, groups, key_dim, 1)
    qk = qk * _one_by_root(qk.square().sum(-2, True), NORM_EPS)
    if groups != heads:
        qk = qk.repeat_interleave(heads // groups, 2)
    k, v = qk[:, 1], convolved[:, 2 * size :].view(batch, heads, value_dim)
    log_decay = _as(decay, wide)
    if A_log is not None:
        raw = log_decay if dt_bias is None else log_decay + _as(dt_bias, wide)
        log_decay = _as(A_log, wide).exp().mul(F.softplus(raw)).neg_()
    own = _as(state, wide)
    channels = decay.shape[2] if decay.dim() == 3 else 1
    own.mul_(log_decay.exp().view(batch, heads, channels, 1))
    change = (v - (own * k).sum(-2)).mul_(_as(beta, wide).sigmoid().unsqueeze(-1))
    own.addcmul_(k, change.unsqueeze(-2))
    y = (own * qk[:, 0]).sum(-2).mul_(key_dim**-0.5)
    if own is not state:
        state.copy_(own)
    y.mul_(_one_by_root(y.square().mean(-1, True), norm_eps)).mul_(_as(norm_weight, wide))
    z = _as(gate, wide)
    y = y.view(gate.shape).mul_(z.sigmoid() if sigmoid else F.silu(z))
    return _as(y, inputs.dtype)


def _convolve(window: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Put the inputs (b, c) behind the window's others, and return what is convolved (b, c)."""
    wide, taps = _wide(inputs.dtype), window.mT
    seen = torch.cat((taps[:, 1:], _as(inputs, window.dtype).unsqueeze(1)), 1)
    taps.copy_(seen)
    y = (_as(_as(seen, inputs.dtype), wide) * _as(weight, wide).t()).sum(1)
    if bias is not None:
        y.add_(_as(bias, wide))
    return _as(F.silu(y, inplace=True) if silu else y, inputs.dtype)


def _one_by_root(value: Tensor, eps: float) -> Tensor:
    return value.add_(eps).rsqrt_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)` without a call of torch where it is already."""
    return x if x.dtype == dtype else x.to(dtype)

"""Decoding steps by their definition, on states in up to float64, which are replaced at the end.

Letters: b batch, c channels of the convolution, h heads, p head dim or value dim, g groups, N state size or key dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKEND = "reference"
NORM_EPS = 1e-6  # inside the root of a query's or key's norm


@torch.no_grad()
def ssd_decode_reference(
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
    """As `mohawk.kernels.decode.interface.ssd_decode_step`; silu: whether it follows the convolution."""
    wide = torch.promote_types(state.dtype, torch.float32)
    heads, head_dim, state_size = state.shape[1:]
    seen, convolved = _convolved(window, inputs, weight, bias, silu)
    x, B, C = convolved.to(wide).tensor_split([heads * head_dim, (heads * head_dim + inputs.shape[1]) // 2], -1)
    groups = B.shape[1] // state_size
    B, C = (v.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for v in (B, C))
    x = x.unflatten(-1, (heads, -1))
    scaled, raw = x, decay.to(wide)
    if A_log is None:
        log_decay = -F.softplus(raw)
    else:
        dt = F.softplus(raw if dt_bias is None else raw + dt_bias.to(wide))
        log_decay = -dt * A_log.to(wide).exp()
        scaled = x * dt.unsqueeze(-1)
    after = log_decay.exp()[..., None, None] * state.to(wide) + scaled.unsqueeze(-1) * B.unsqueeze(-2)
    y = (after * C.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + x * D.to(wide).unsqueeze(-1)
    z = gate.to(wide) if gate_bias is None else gate.to(wide) + gate_bias.to(wide)
    y = y.to(inputs.dtype).to(wide).flatten(1) * F.silu(z)
    if norm_weight is not None:
        y = y.unflatten(-1, (groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps)
        y = y.flatten(1) * norm_weight.to(wide)
    return _kept(window, seen, state, after, y.to(inputs.dtype), real)


@torch.no_grad()
def delta_decode_reference(
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
    """As `mohawk.kernels.decode.interface.delta_decode_step`; sigmoid: whether the gate is one, or a SiLU."""
    wide = torch.promote_types(state.dtype, torch.float32)
    heads, key_dim, value_dim = state.shape[1:]
    seen, convolved = _convolved(window, inputs, weight, bias, True)
    size = (inputs.shape[1] - heads * value_dim) // 2
    q, k, v = convolved.to(wide).tensor_split([size, 2 * size], -1)
    q, k = (value.unflatten(-1, (-1, key_dim)) for value in (q, k))
    q, k = (value * torch.rsqrt(value.square().sum(-1, keepdim=True) + NORM_EPS) for value in (q, k))
    q, k = (value.repeat_interleave(heads // value.shape[1], 1) for value in (q * key_dim**-0.5, k))
    log_decay = decay.to(wide)
    if A_log is not None:
        raw = log_decay if dt_bias is None else log_decay + dt_bias.to(wide)
        log_decay = -A_log.to(wide).exp() * F.softplus(raw)
    log_decay = log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay[..., None, None]
    decayed = log_decay.exp() * state.to(wide)
    change = beta.to(wide).sigmoid().unsqueeze(-1) * (v.unflatten(-1, (heads, -1)) - (decayed * k[..., None]).sum(-2))
    after = decayed + k.unsqueeze(-1) * change.unsqueeze(-2)
    y = (after * q.unsqueeze(-1)).sum(-2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(wide)
    z = gate.to(wide).unflatten(-1, (heads, -1))
    y = y * (z.sigmoid() if sigmoid else F.silu(z))
    return _kept(window, seen, state, after, y.flatten(1).to(inputs.dtype), real)


def _convolved(window: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool):
    """The window after the inputs, and what is convolved (b, c), rounded as `causal_conv1d` rounds it."""
    seen = torch.cat([window[..., 1:], inputs.unsqueeze(-1).to(window.dtype)], -1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    y = (seen.to(inputs.dtype).to(wide) * weight.to(wide)).sum(-1)
    y = y if bias is None else y + bias.to(wide)
    return seen, (F.silu(y) if silu else y).to(inputs.dtype)


def _kept(window: Tensor, seen: Tensor, state: Tensor, after: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
    """Put what the step leaves into the cache, where there was a token, and zeros into y where there was none."""
    if real is not None:
        seen = torch.where(real[:, None, None], seen, window)
        after = torch.where(real[:, None, None, None], after, state.to(after.dtype))
        y = torch.where(real[:, None], y, 0)
    window.copy_(seen)
    state.copy_(after)
    return y

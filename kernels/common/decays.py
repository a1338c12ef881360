"""Decays between the tokens of a chunk, from cumulative logarithms, and the sums that their gradients are."""

import torch
from torch import Tensor


def decay_between(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., t) cumulative log decays in float64 -> (..., t, t) exp(sums_i - sums_j) for j <= i, else 0.

    Below float64 each sum is split into two parts, since their difference must keep what a strong decay earlier in the
    chunk would push out of one.
    """
    high = sums.to(dtype)
    decay = high.unsqueeze(-1) - high.unsqueeze(-2)
    if dtype != torch.float64:
        low = (sums - high).to(dtype)
        decay += low.unsqueeze(-1)
        decay -= low.unsqueeze(-2)
    hidden = torch.full(decay.shape[-2:], float("-inf"), dtype=dtype, device=decay.device).triu_(1)
    return decay.add_(hidden).exp_()  # masking every entry by itself takes several times as long


def sums_from(value: Tensor, dim: int = -1) -> Tensor:
    """Sums along a dimension from each place to the end."""
    return value.flip(dim).cumsum(dim).flip(dim)


def sums_before(value: Tensor, dim: int = -1) -> Tensor:
    """Sums along a dimension of what is in front of each place. Not cumsum - value: the place's own value may be so
    much larger that nothing would be left of them."""
    out = torch.zeros_like(value)
    length = value.shape[dim] - 1
    if length > 0:
        torch.cumsum(value.narrow(dim, 0, length), dim, out=out.narrow(dim, 1, length))
    return out

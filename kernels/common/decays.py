"""Decays between the tokens of a chunk, from cumulative logarithms."""

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
    return decay.exp_().tril_()

"""The convolution by its definition, as torch has it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> Tensor:
    """Shapes as in `causal_conv1d`; rows of one segment. Returns y like x."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    seen = torch.cat((initial_state.to(x.dtype), x.transpose(1, 2)), dim=2)
    y = F.conv1d(seen, weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if activation == "silu" else y

"""The causal-conv1d package's kernels, on NVIDIA GPUs."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.common.packages import usable
from mohawk.kernels.common.segments import segment_runs


@functools.cache
def package_function() -> Callable | None:
    """`causal_conv1d_fn` of the causal-conv1d package, None where it cannot be imported; looked up once."""
    if not usable("causal_conv1d"):
        return None
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


def fits_package(x: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> bool:
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

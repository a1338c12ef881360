"""What can be wrong with a call of causal_conv1d, said in one line before any work."""

from torch import Tensor

from mohawk.kernels.common.segments import check_segment_ids
from mohawk.kernels.common.tensors import check_floating, check_given, check_tensors

ACTIVATIONS = (None, "silu")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    where = "causal_conv1d"
    check_given(where, x=x, weight=weight)
    check_tensors(where, bias=bias, initial_state=initial_state)
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
    check_floating(where, "x", x.device, x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_segment_ids(segment_ids, batch, seq, where)

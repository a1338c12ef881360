"""What can be wrong with a call of ssd or ssd_step, said in one line before any work."""

from torch import Tensor

from mohawk.kernels.common.segments import check_segment_ids
from mohawk.kernels.common.tensors import check_floating, check_given, check_tensors


def fits_step(
    state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, input_scale: Tensor | None, D: Tensor | None
) -> bool:
    """Whether the usual arguments fit, in a few microseconds: the full check takes longer than the step itself."""
    batch, heads, _ = x.shape
    return (
        log_decay.shape == (batch, heads)
        and (input_scale is None or input_scale.shape == (batch, heads))
        and B.shape == C.shape == (batch, heads, B.shape[-1])
        and state.shape == (*x.shape, B.shape[-1])
        and (D is None or D.shape == (heads,))
        and all(t.is_floating_point() and t.device == x.device for t in (state, x, log_decay, B, C))
        and all(t is None or (t.is_floating_point() and t.device == x.device) for t in (input_scale, D))
    )


def check(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    where: str = "ssd",
) -> None:
    given = {"x": x, "log_decay": log_decay, "B": B, "C": C}
    check_given(where, **given)
    optional = {"input_scale": input_scale, "D": D, "the state": initial_state}
    check_tensors(where, **optional)
    if x.dim() != 4:
        raise ValueError(f"{where}: x must be (batch, seq, heads, head_dim), got {tuple(x.shape)}")
    batch, seq, heads, head_dim = x.shape
    per_head = (batch, seq, heads)
    if tuple(log_decay.shape) != per_head:
        raise ValueError(f"{where}: log_decay must be (batch, seq, heads) = {per_head}, got {tuple(log_decay.shape)}")
    for name, value in (("B", B), ("C", C)):
        if value.dim() != 4 or value.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{where}: {name} must be (batch, seq, groups, state_size) with batch, seq = {batch}, {seq}, "
                f"got {tuple(value.shape)}"
            )
        if value.shape[2] < 1 or heads % value.shape[2]:
            raise ValueError(f"{where}: the {value.shape[2]} groups of {name} must divide the {heads} heads of x")
    if B.shape[3] != C.shape[3]:
        raise ValueError(f"{where}: B and C must have one state_size, got {B.shape[3]} and {C.shape[3]}")
    if input_scale is not None and tuple(input_scale.shape) != per_head:
        raise ValueError(
            f"{where}: input_scale must be (batch, seq, heads) = {per_head}, got {tuple(input_scale.shape)}"
        )
    if D is not None and tuple(D.shape) != (heads,):
        raise ValueError(f"{where}: D must be (heads,) = ({heads},), got {tuple(D.shape)}")
    state_shape = (batch, heads, head_dim, B.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(
            f"{where}: the state must be (batch, heads, head_dim, state_size) = {state_shape}, "
            f"got {tuple(initial_state.shape)}"
        )
    check_segment_ids(segment_ids, batch, seq, where)
    check_floating(where, "x", x.device, **given, **optional)

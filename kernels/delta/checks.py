"""What can be wrong with a call of gated_delta_rule or gated_delta_step, said in one line before any work."""

from torch import Tensor

from mohawk.kernels.common.delta_chunks import check_gates
from mohawk.kernels.common.segments import check_segment_ids
from mohawk.kernels.common.tensors import check_floating, check_given, check_tensors


def fits_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> bool:
    """Whether the usual arguments fit, in a few microseconds: the full check takes longer than the step itself."""
    tensors = (state, q, k, v, beta, log_decay)
    return (
        q.shape == k.shape
        and beta.shape == v.shape[:2]
        and log_decay.shape in (beta.shape, k.shape)
        and state.shape == (*k.shape, v.shape[-1])
        and all(t.is_floating_point() and t.device == v.device for t in tensors)
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    where: str = "gated_delta_rule",
) -> None:
    given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    check_given(where, **given)
    optional = {"the state": initial_state}
    check_tensors(where, **optional)
    if v.dim() != 4:
        raise ValueError(f"{where}: v must be (batch, seq, heads, value_dim), got {tuple(v.shape)}")
    batch, seq, heads, value_dim = v.shape
    for name, value in (("k", k), ("q", q)):
        if value.dim() != 4 or value.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"{where}: {name} must be (batch, seq, heads, key_dim) with batch, seq, heads = {batch}, {seq}, "
                f"{heads} as v has them, got {tuple(value.shape)}"
            )
    if q.shape != k.shape:
        raise ValueError(f"{where}: q and k must have one key_dim, got {q.shape[3]} and {k.shape[3]}")
    check_gates(where, k, beta, log_decay)
    state_shape = (batch, heads, k.shape[3], value_dim)
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(
            f"{where}: the state must be (batch, heads, key_dim, value_dim) = {state_shape}, "
            f"got {tuple(initial_state.shape)}"
        )
    check_segment_ids(segment_ids, batch, seq, where)
    check_floating(where, "v", v.device, **given, **optional)

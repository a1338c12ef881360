"""The gated delta rule by its definition: one token after the other, in up to float64."""

import torch
from torch import Tensor

from mohawk.kernels.common.segments import decays_with_resets

BACKEND = "reference"  # as `mohawk doctor` names it


def delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `mohawk.kernels.delta.interface.gated_delta_rule`. Returns y in v's dtype and the final state."""
    batch, seq, heads, width = k.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    decay = decays_with_resets(log_decay, segment_ids).to(compute).exp()
    decay = (decay if decay.dim() == 4 else decay.unsqueeze(-1)).unsqueeze(-1)
    q_in, k_in, v_in, beta_in = (value.to(compute) for value in (q, k, v, beta))
    if initial_state is None:
        state = v_in.new_zeros(batch, heads, width, v.shape[3])
    else:
        state = initial_state.to(compute)
    outputs = []
    for t in range(seq):
        state = decay[:, t] * state
        stored = torch.einsum("bhdp,bhd->bhp", state, k_in[:, t])
        change = beta_in[:, t].unsqueeze(-1) * (v_in[:, t] - stored)
        state = state + k_in[:, t].unsqueeze(-1) * change.unsqueeze(-2)
        outputs.append(torch.einsum("bhdp,bhd->bhp", state, q_in[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_in)
    return y.to(v.dtype), state

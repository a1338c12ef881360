"""State-space duality by its definition: one token after the other, in up to float64."""

import torch
from torch import Tensor

from mohawk.kernels.common.segments import decays_with_resets

BACKEND = "reference"  # as `mohawk doctor` names it


def ssd_reference(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `mohawk.kernels.ssd.interface.ssd`. Returns y in x's dtype and the final state."""
    batch, seq, heads, head_dim = x.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    decay = decays_with_resets(log_decay, segment_ids).to(compute).exp()
    B_bnhN = B.to(compute).repeat_interleave(heads // B.shape[2], dim=2)
    C_bnhN = C.to(compute).repeat_interleave(heads // C.shape[2], dim=2)
    x_in = x.to(compute)
    scaled = x_in if input_scale is None else x_in * input_scale.to(compute).unsqueeze(-1)
    if initial_state is None:
        state = x_in.new_zeros(batch, heads, head_dim, B.shape[3])
    else:
        state = initial_state.to(compute)
    outputs = []
    for t in range(seq):
        state = decay[:, t, :, None, None] * state + scaled[:, t, :, :, None] * B_bnhN[:, t, :, None, :]
        outputs.append(torch.einsum("bhpN,bhN->bhp", state, C_bnhN[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x_in)
    if D is not None:
        y = y + x_in * D.to(compute).unsqueeze(-1)
    return y.to(x.dtype), state

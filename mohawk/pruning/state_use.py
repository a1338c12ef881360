"""How much each state dimension of a mixer contributes to what the layer reads out of its state."""

import torch
from einops import rearrange, reduce
from torch import Tensor

from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.mixers import SSMMixer


@torch.no_grad()
def state_use(mixer: SSMMixer, projected: Tensor, segment_ids: Tensor) -> Tensor:
    """Size of each state dimension's share of the scan's output, y = sum over n of C[n] h[n].

    Args:
        mixer: either kind of Mamba-2.
        projected: (b, n, rows of in_proj), what in_proj put out in a forward.
        segment_ids: (b, n), documents of packed rows, -1 at padding.

    Returns:
        (b, n, groups, N) float32: |C[n]| times the L2 norm, over the group's heads and their channels, of the state.
        The states of one token are alive at a time, so this takes n steps and no more memory than its result.
    """
    rows = mixer.slices()
    convolved = mixer.conv1d(projected[..., rows["xBC"]], segment_ids=segment_ids)
    x, B, C = (part.float() for part in mixer._cut(convolved))
    log_decay, input_scale = mixer.decay(projected[..., rows["decay"]])
    if input_scale is not None:
        x = x * input_scale[..., None]
    n, groups = x.shape[1], mixer.num_groups
    starts = segment_ids.diff(dim=1, prepend=segment_ids[:, :1] - 1) != 0
    decay = rearrange(torch.exp(log_decay).masked_fill(starts[..., None], 0.0), "b n (g h) -> b n g h 1 1", g=groups)
    x = rearrange(x, "b n (g h) p -> b n g h p 1", g=groups)
    B = rearrange(B, "b n g N -> b n g 1 1 N")
    state = torch.zeros_like(x[:, 0] * B[:, 0])
    squares = torch.empty_like(C)
    for t in range(n):
        state = state * decay[:, t] + x[:, t] * B[:, t]
        squares[:, t] = state.square().sum((2, 3))
    return C.abs() * squares.sqrt()


@torch.no_grad()
def delta_state_use(mixer: DeltaMixer, hidden_states: Tensor, segment_ids: Tensor) -> Tensor:
    """`state_use` of a gated delta rule, y = sum over n of q[n] S[n].

    Args:
        mixer: either kind of it.
        hidden_states: (b, n, D), the mixer's input.
        segment_ids: (b, n), documents of packed rows, -1 at padding.

    Returns:
        (b, n, groups, N) float32: |q[n]| times the L2 norm of the state under key channel n, over the group's heads and
        their channels. What that channel does to other keys, as the rule corrects what stands under them, is not in it.
    """
    inputs, _, raw = mixer.project(hidden_states)
    q, k, v = (part.float() for part in mixer._cut(mixer.conv1d(inputs, segment_ids=segment_ids)))
    beta, log_decay = (gate.float() for gate in mixer.gates(raw, None))
    starts = segment_ids.diff(dim=1, prepend=segment_ids[:, :1] - 1) != 0
    decay = log_decay.exp().view(*beta.shape, -1, 1).masked_fill(starts[..., None, None, None], 0.0)
    q = q[:, :, :: mixer.num_heads // mixer.num_groups]  # heads of a group share them
    state, squares = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, ..., None, :]), torch.empty_like(q)
    for t in range(k.shape[1]):
        state = state * decay[:, t]
        change = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, ..., None]).sum(-2))
        state = state + k[:, t, ..., None] * change[..., None, :]
        squares[:, t] = reduce(state.square(), "b (g h) N p -> b g N", "sum", g=mixer.num_groups)
    return q.abs() * squares.sqrt()

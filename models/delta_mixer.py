"""Gated DeltaNet (arXiv 2412.06464) as a mixer: a state that corrects what it holds under a key.

Shapes: b batch, n sequence, D hidden size, h value heads of width p, g key heads of width N, k conv kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.kernels.delta.scan import gated_delta_rule, gated_delta_step
from mohawk.kernels.mixing.definition import DeltaMixing
from mohawk.models.state_mixer import StateMixer, segments_of_padding, wide

NORM_EPS = 1e-6  # inside the root of a query's or key's norm


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head's channels, then times silu(gate): norm first, as Gated DeltaNet has it.

    In float32, in float64 for float64 inputs.
    """

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(..., h, p), (..., h, p) -> the same."""
        x = wide(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * wide(self.weight) * F.silu(wide(gate))


class GatedDeltaMixer(StateMixer):
    """Gated DeltaNet exactly as transformers' `Qwen3_5GatedDeltaNet` computes it, state-dict keys included.

    q, k and v go through the convolution and a SiLU; q and k are divided by their norms and q by sqrt(N); beta =
    sigmoid(b), log decay = -exp(A_log) softplus(a + dt_bias); the output is RMSNorm(y) silu(z) per head, then out_proj.

    Arguments as in `StateMixer`. Qwen3.5 has no bias on out_proj; `bias` is for teachers whose output projection has
    one.
    """

    activation = "silu"
    conv_has_bias = False
    gate_in_projection = False
    outside_matrix = (*StateMixer.outside_matrix, "in_proj_z.weight")

    def __init__(self, *args, norm_eps: float = 1e-6, **kwargs):
        super().__init__(*args, norm_eps=norm_eps, **kwargs)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        # the paper's released initialisation, uniform in (0, 16), spread over the heads
        self.A_log = nn.Parameter(torch.log(torch.linspace(16 / self.num_heads, 16, self.num_heads)))
        self.norm = HeadRMSNorm(self.head_dim, norm_eps)
        self.in_proj_qkv = nn.Linear(self.hidden_size, self.conv_size, bias=False)
        self.in_proj_z = nn.Linear(self.hidden_size, self.inner_size, bias=False)
        self.in_proj_b = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.in_proj_a = nn.Linear(self.hidden_size, self.num_heads, bias=False)

    def slices(self) -> dict[str, slice]:
        """Which rows of in_proj_qkv, and channels of the convolution, are queries, keys and values."""
        s = self.group_size
        return {"q": slice(0, s), "k": slice(s, 2 * s), "v": slice(2 * s, None)}

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states), self._raw(hidden_states)

    def recur(
        self,
        convolved: Tensor,
        raw: Tensor,
        padded: Tensor | None,
        segment_ids: Tensor | None,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._cut(convolved)
        beta, log_decay = self._gates(raw, padded)
        gates = {"beta": beta, "log_decay": log_decay, "segment_ids": segment_ids}
        if not keep:
            return gated_delta_rule(q, k, v, **gates), None
        return gated_delta_rule(q, k, v, **gates, initial_state=state, return_final_state=True)

    def recur_step(self, convolved: Tensor, raw: Tensor, padded: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._cut(convolved)
        beta, log_decay = self._gates(raw, padded)
        return gated_delta_step(state, q, k, v, beta=beta, log_decay=log_decay)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        return self.norm(y.unflatten(-1, heads), z.unflatten(-1, heads)).flatten(-2)

    def mixing(
        self, hidden_states: Tensor, segment_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> DeltaMixing:
        """As in `StateMixer`: q, k (b, n, h, N), beta and log_decay (b, n, h)."""
        if padding_mask is not None and segment_ids is None:
            segment_ids = segments_of_padding(padding_mask)
        channels = slice(0, 2 * self.group_size)
        if type(self.in_proj_qkv) is nn.Linear and not self.in_proj_qkv.weight.is_meta:
            qk = F.linear(hidden_states, self.in_proj_qkv.weight[channels])
        else:
            qk = self.in_proj_qkv(hidden_states)[..., channels]
        q, k = self.conv1d(qk, channels=channels, segment_ids=segment_ids).split(self.group_size, -1)
        beta, log_decay = self._gates(self._raw(hidden_states), None)
        q, k = self._normalised(q, self.state_size**-0.5), self._normalised(k, 1.0)
        return DeltaMixing(q, k, beta, log_decay, segment_ids)

    def _raw(self, hidden_states: Tensor) -> Tensor:
        """(b, n, 2h): b, then a."""
        return torch.cat([self.in_proj_b(hidden_states), self.in_proj_a(hidden_states)], -1)

    def _gates(self, raw: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """beta and log decay, each (..., h); where padded, nothing decays (and the keys are 0)."""
        b, a = wide(raw).chunk(2, -1)
        log_decay = -torch.exp(wide(self.A_log)) * F.softplus(a + wide(self.dt_bias))
        return b.sigmoid(), log_decay if padded is None else log_decay.masked_fill(padded, 0)

    def _cut(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> q and k (..., h, N), normalised, and v (..., h, p)."""
        q, k, v = convolved.split([self.group_size, self.group_size, self.inner_size], -1)
        v = wide(v).unflatten(-1, (self.num_heads, self.head_dim))
        return self._normalised(q, self.state_size**-0.5), self._normalised(k, 1.0), v

    def _normalised(self, x: Tensor, scale: float) -> Tensor:
        """(..., g*N) -> (..., h, N) of norm `scale`, once for every value head that shares it."""
        x = wide(x).unflatten(-1, (self.num_groups, self.state_size))
        x = x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) * scale)
        return x.repeat_interleave(self.num_heads // self.num_groups, -2)

"""Mixers with the gated delta rule: a state that corrects what it holds under a key.

`GatedDeltaMixer` is Gated DeltaNet (arXiv 2412.06464), whose decay is one number for each head and token;
`KimiDeltaMixer` is Kimi Delta Attention (arXiv 2510.26692), whose decay differs from channel to channel of the keys.

Shapes: b batch, n sequence, D hidden size, h value heads of width p, g key heads of width N, k conv kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.kernels.decode.interface import delta_decode_step
from mohawk.kernels.delta.interface import gated_delta_rule, gated_delta_step
from mohawk.kernels.mixing.operands import DeltaMixing
from mohawk.models.state_mixer import StateMixer, segments_of_padding, wide

NORM_EPS = 1e-6  # inside the root of a query's or key's norm


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head's channels, then times activation(gate): norm first, as Gated DeltaNet has it.

    In float32, in float64 for float64 inputs.
    """

    def __init__(self, size: int, eps: float = 1e-6, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.activation = eps, activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """(..., h, p), (..., h, p) -> the same."""
        x = wide(x)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * wide(self.weight)
        return normed * self.activation(wide(gate))


class DeltaMixer(StateMixer):
    """What the two share: queries, keys and values go through the convolution and a SiLU; q and k are divided by their
    norms and q by sqrt(N); the rule; a norm of each head and a gate. Subclasses say what is projected.

    Arguments as in `StateMixer`; `bias` is for teachers whose output projection has one.
    """

    activation = "silu"
    conv_has_bias = False
    gate_in_projection = False

    # --- what a subclass defines ---------------------------------------------------------------------------------

    def input_weights(self) -> dict[str, Tensor]:
        """What projects the input of each part of the convolution: q and k (g*N, D) and v (h*p, D), to be set in
        place."""
        raise NotImplementedError

    def queries_and_keys(self, hidden_states: Tensor) -> Tensor:
        """(b, n, D) -> (b, n, 2*g*N), before the convolution."""
        raise NotImplementedError

    def raw_gates(self, hidden_states: Tensor) -> Tensor:
        """(b, n, D) -> (b, n, ...): what `gates` reads."""
        raise NotImplementedError

    def gates(self, raw: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """(..., any) -> beta (..., h) and log decay (..., h) or (..., h, N), which is 0 where padded (..., 1): nothing
        decays there, and keys are 0."""
        raise NotImplementedError

    def normed(self, y: Tensor, z: Tensor) -> Tensor:
        """(..., h, p) outputs of the rule and gate -> the same: norm and gate."""
        raise NotImplementedError

    def decode_options(self) -> dict[str, Any]:
        """What `delta_decode_step` is to know of the decay, beside what `raw_gates` holds, and of the gate."""
        raise NotImplementedError

    # --- shared --------------------------------------------------------------------------------------------------

    def decode(
        self, window: Tensor, state: Tensor, inputs: Tensor, z: Tensor, raw: Tensor, real: Tensor | None
    ) -> Tensor:
        beta, decay = raw[:, : self.num_heads], raw[:, self.num_heads :]
        if decay.shape[1] != self.num_heads:
            decay = decay.view(-1, self.num_heads, self.state_size)
        conv = self.conv1d
        return delta_decode_step(
            window, state, inputs, z, beta, decay, weight=conv.weight[:, 0], bias=conv.bias, real=real,
            **self.decode_options(),
        )  # fmt: skip

    def slices(self) -> dict[str, slice]:
        """Which channels of the convolution are queries, keys and values."""
        s = self.group_size
        return {"q": slice(0, s), "k": slice(s, 2 * s), "v": slice(2 * s, None)}

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
        beta, log_decay = self.gates(raw, padded)
        gates = {"beta": beta, "log_decay": log_decay, "segment_ids": segment_ids}
        if not keep:
            return gated_delta_rule(q, k, v, **gates), None
        return gated_delta_rule(q, k, v, **gates, initial_state=state, return_final_state=True)

    def recur_step(self, convolved: Tensor, raw: Tensor, padded: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._cut(convolved)
        beta, log_decay = self.gates(raw, padded)
        return gated_delta_step(state, q, k, v, beta=beta, log_decay=log_decay)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        return self.normed(y.unflatten(-1, heads), z.unflatten(-1, heads)).flatten(-2)

    def mixing(
        self, hidden_states: Tensor, segment_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> DeltaMixing:
        """As in `StateMixer`: q, k (b, n, h, N), beta (b, n, h), log_decay (b, n, h) or (b, n, h, N)."""
        if padding_mask is not None and segment_ids is None:
            segment_ids = segments_of_padding(padding_mask)
        qk = self.queries_and_keys(hidden_states)
        qk = self.conv1d(qk, channels=slice(0, 2 * self.group_size), segment_ids=segment_ids)
        q, k = qk.split(self.group_size, -1)
        beta, log_decay = self.gates(self.raw_gates(hidden_states), None)
        q, k = self._normalised(q, self.state_size**-0.5), self._normalised(k, 1.0)
        return DeltaMixing(q, k, beta, log_decay, segment_ids)

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


class GatedDeltaMixer(DeltaMixer):
    """Gated DeltaNet exactly as transformers' `Qwen3_5GatedDeltaNet` computes it, state-dict keys included.

    q, k and v go through the convolution and a SiLU; q and k are divided by their norms and q by sqrt(N); beta =
    sigmoid(b), log decay = -exp(A_log) softplus(a + dt_bias); the output is RMSNorm(y) silu(z) per head, then out_proj.

    Arguments as in `StateMixer`. Qwen3.5 has no bias on out_proj; `bias` is for teachers whose output projection has
    one.
    """

    label = "Gated DeltaNet"
    kept_bytes = {4: (20.0, 16.0, 61.1), 2: (24.0, 8.0, 53.1)}
    constant_gate = False  # silu(0) = 0, and z has no bias
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

    def input_weights(self) -> dict[str, Tensor]:
        return {name: self.in_proj_qkv.weight[rows] for name, rows in self.slices().items()}

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states), self.raw_gates(hidden_states)

    def queries_and_keys(self, hidden_states: Tensor) -> Tensor:
        channels = slice(0, 2 * self.group_size)
        if type(self.in_proj_qkv) is nn.Linear and not self.in_proj_qkv.weight.is_meta:
            return F.linear(hidden_states, self.in_proj_qkv.weight[channels])
        return self.in_proj_qkv(hidden_states)[..., channels]

    def raw_gates(self, hidden_states: Tensor) -> Tensor:
        """(b, n, 2h): b, then a."""
        return torch.cat([self.in_proj_b(hidden_states), self.in_proj_a(hidden_states)], -1)

    def gates(self, raw: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        b, a = wide(raw).chunk(2, -1)
        log_decay = -torch.exp(wide(self.A_log)) * F.softplus(a + wide(self.dt_bias))
        return b.sigmoid(), log_decay if padded is None else log_decay.masked_fill(padded, 0)

    def normed(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y, z)

    def read_by_decode(self) -> tuple[tuple[Any, type[nn.Module]], ...]:
        return *super().read_by_decode(), (self.norm, HeadRMSNorm)

    def decode_options(self) -> dict[str, Any]:
        norm = self.norm
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, "norm_weight": norm.weight, "norm_eps": norm.eps}


class ForgetGate(nn.Module):
    """Kimi Delta Attention's decay, of each channel of each head's keys, by way of `rank` channels."""

    def __init__(self, hidden_size: int, num_heads: int, rank: int, state_size: int):
        super().__init__()
        self.sizes = hidden_size, num_heads, rank, state_size
        self.f_a_proj = nn.Linear(hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, num_heads * state_size, bias=False)
        # the released initialisation, A uniform in (1, 16) and dt log-uniform in (1e-3, 1e-1), spread over heads and
        # over the channels of each
        dt = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), state_size)).repeat(num_heads)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, num_heads)).view(1, 1, num_heads, 1))

    def fresh(self) -> "ForgetGate":
        """A new gate on a model of width 1: cheap, and its vectors are those of any new gate."""
        return ForgetGate(1, *self.sizes[1:])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(b, n, D) -> log decays (b, n, h*N) in float32, in float64 for float64 inputs."""
        _, num_heads, _, state_size = self.sizes
        f = wide(self.f_b_proj(self.f_a_proj(hidden_states))) + wide(self.dt_bias)
        decay = F.softplus(f).unflatten(-1, (num_heads, state_size))
        return (-torch.exp(wide(self.A_log)) * decay).flatten(-2)


class KimiDeltaMixer(DeltaMixer):
    """Kimi Delta Attention exactly as transformers' `KimiLinearDeltaAttention` computes it, state-dict keys included.

    q, k and v go through the convolution and a SiLU; q and k are divided by their norms and q by sqrt(N); beta =
    sigmoid(b), log decay = -exp(A_log) softplus(f + dt_bias) of every channel of the keys; the output is RMSNorm(y)
    sigmoid(g) per head, then o_proj. f and g are projected by way of p channels.

    Arguments as in `StateMixer`. Kimi Linear has N = p, and no bias on o_proj; `bias` is for teachers whose output
    projection has one.

    Raises:
        ValueError: num_groups other than num_heads: every head has queries and keys of its own.
    """

    label = "Kimi Delta Attention"
    kept_bytes = {4: (20.0, 16.0, 68.9), 2: (28.0, 8.0, 61.0)}
    output_name = "o_proj"
    outside_matrix = ("o_proj.weight", "o_proj.bias", "o_norm.weight", "v_proj.weight", "g_a_proj.weight",
                      "g_b_proj.weight")  # fmt: skip

    def __init__(self, *args, norm_eps: float = 1e-5, **kwargs):
        super().__init__(*args, norm_eps=norm_eps, **kwargs)
        if self.num_groups != self.num_heads:
            raise ValueError(
                f"num_groups: got {self.num_groups} for {self.num_heads} heads; in Kimi Delta Attention every head has "
                "queries and keys of its own, so give as many or leave it out"
            )
        D, p = self.hidden_size, self.head_dim
        self.q_proj = nn.Linear(D, self.group_size, bias=False)
        self.k_proj = nn.Linear(D, self.group_size, bias=False)
        self.v_proj = nn.Linear(D, self.inner_size, bias=False)
        self.forget_gate = ForgetGate(D, self.num_heads, p, self.state_size)
        self.b_proj = nn.Linear(D, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(D, p, bias=False)
        self.g_b_proj = nn.Linear(p, self.inner_size, bias=False)
        self.o_norm = HeadRMSNorm(p, norm_eps, torch.sigmoid)

    def input_weights(self) -> dict[str, Tensor]:
        return {"q": self.q_proj.weight, "k": self.k_proj.weight, "v": self.v_proj.weight}

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = torch.cat([self.queries_and_keys(hidden_states), self.v_proj(hidden_states)], -1)
        return inputs, self.g_b_proj(self.g_a_proj(hidden_states)), self.raw_gates(hidden_states)

    def queries_and_keys(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states)], -1)

    def raw_gates(self, hidden_states: Tensor) -> Tensor:
        """(b, n, h + h*N): b, then the log decay itself."""
        return torch.cat([wide(self.b_proj(hidden_states)), self.forget_gate(hidden_states)], -1)

    def gates(self, raw: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        b, log_decay = raw.split([self.num_heads, self.group_size], -1)
        log_decay = log_decay.unflatten(-1, (self.num_heads, self.state_size))
        return b.sigmoid(), log_decay if padded is None else log_decay.masked_fill(padded[..., None], 0)

    def normed(self, y: Tensor, z: Tensor) -> Tensor:
        return self.o_norm(y, z)

    def read_by_decode(self) -> tuple[tuple[Any, type[nn.Module]], ...]:
        return *super().read_by_decode(), (self.o_norm, HeadRMSNorm)

    def decode_options(self) -> dict[str, Any]:
        norm = self.o_norm
        return {"norm_weight": norm.weight, "norm_eps": norm.eps, "gate_activation": "sigmoid"}

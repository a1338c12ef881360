"""Mamba-2 mixers that take the place of a decoder layer's self-attention; delta rules' are in delta_mixer.py.

Both are the same skeleton (in_proj -> causal conv -> state-space scan -> gate -> out_proj) and differ in what the
MOHAWK literature varies: `Mamba2Mixer` is the continuous form, number for number the mixer of transformers' Bamba
(dt, A_log, SiLU after the conv, gated RMSNorm); `DiscreteMamba2Mixer` is the form of the MOHAWK paper, Phi-Mamba and
Llamba (decay straight from in_proj, no activation, no norm, a plain gate).

Shapes: b batch, n sequence, D hidden size, h heads, p head dim, g groups, N state size, k conv kernel.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.kernels.decode.interface import ssd_decode_step
from mohawk.kernels.mixing.operands import SSDMixing
from mohawk.kernels.ssd.interface import ssd, ssd_step
from mohawk.models.delta_mixer import GatedDeltaMixer, KimiDeltaMixer
from mohawk.models.state_mixer import StateMixer, segments_of_padding, wide

OPEN_GATE = 1.278464542761  # silu(OPEN_GATE) = 1


class GatedRMSNorm(nn.Module):
    """RMSNorm of `x * silu(gate)` over each of `num_groups` groups of channels (Mamba-2, section 7).

    In float32, in float64 for float64 inputs.
    """

    def __init__(self, size: int, num_groups: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = wide(x) * F.silu(wide(gate))
        grouped = gated.unflatten(-1, (self.num_groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped * scale).flatten(-2) * self.weight


class SSMMixer(StateMixer):
    """What the two Mamba-2 mixers share: shapes and the scan. Subclasses say how the projection is cut.

    Arguments as in `StateMixer`; `bias` is one switch for in_proj and out_proj, as in Bamba.
    """

    label = "Mamba-2"

    def __init__(self, *args, bias: bool = False, **kwargs):
        super().__init__(*args, bias=bias, **kwargs)
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.in_proj = nn.Linear(self.hidden_size, self.projection_size(), bias=bias)

    @property
    def conv_bias(self) -> Tensor:
        """The bias of the convolution, which in Mamba-2 has one."""
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    # --- what a subclass defines ---------------------------------------------------------------------------------

    def projection_size(self) -> int:
        """Rows of in_proj."""
        raise NotImplementedError

    def slices(self) -> dict[str, slice]:
        """Which rows of in_proj make x, B, C (B and C adjacent to each other), z and the decay."""
        raise NotImplementedError

    def decay(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, n, h) projected decay rows -> (log_decay, input_scale or None), each (b, n, h), float32 or float64."""
        raise NotImplementedError

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """(b, n, h*p) scan output and gate -> input of out_proj."""
        raise NotImplementedError

    def gate_bias(self) -> Tensor:
        """(h*p) the constant part of the gate, to be set in place."""
        return self.in_proj.bias[self.slices()["z"]]

    # --- shared --------------------------------------------------------------------------------------------------

    def _heads(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return B.unflatten(-1, (self.num_groups, -1)), C.unflatten(-1, (self.num_groups, -1))

    def mixing(
        self, hidden_states: Tensor, segment_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> SSDMixing:
        """The layer's mixing matrix, unmaterialised: only the projections it depends on are computed.

        Args:
            hidden_states: (b, n, D), the layer's normalised input.
            segment_ids: (b, n) integers, documents of a packed row; -1 is padding.
            padding_mask: (b, n), 0 at padding before or after a row's tokens; made into segment ids if none are given.

        Returns:
            SSDMixing with C, B (b, n, g, N), log_decay and input_scale (b, n, h), D (h,).

        Raises:
            ValueError: padding between a row's tokens, which a matrix over all positions has no place for.
        """
        rows = self.slices()
        first = min(rows["B"].start, rows["C"].start)
        if padding_mask is not None and segment_ids is None:
            segment_ids = segments_of_padding(padding_mask)
        BC_rows = slice(first, first + 2 * self.group_size)
        if self._plain():
            # B, C and the decay rows are neighbours in Mamba-2's order and nearly so in the discrete one
            BC = F.linear(hidden_states, *self._rows(BC_rows))
            raw = F.linear(hidden_states, *self._rows(rows["decay"]))
        else:
            projected = self.in_proj(hidden_states)
            BC, raw = projected[..., BC_rows], projected[..., rows["decay"]]
        BC = self.conv1d(BC, channels=slice(self.inner_size, self.conv_size), segment_ids=segment_ids)
        B, C = self._heads(*BC.split(self.group_size, -1))
        log_decay, input_scale = self.decay(raw)
        return SSDMixing(C=C, B=B, log_decay=log_decay, input_scale=input_scale, D=self.D, segment_ids=segment_ids)

    def _plain(self) -> bool:
        """Whether in_proj is its weight and bias; with an adapter, quantised or offloaded it has to be called."""
        return type(self.in_proj) is nn.Linear and not self.in_proj.weight.is_meta

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        bias = self._trained_bias()
        return self.in_proj.weight[rows], None if bias is None else bias[rows]

    def _trained_bias(self) -> Tensor | None:
        """in_proj's bias, whose rows for x, B and C get no gradient.

        The conv behind them has a bias of its own; and transformers' Bamba lets these through the padding of a batch
        into the conv, so that a student which learned them would answer otherwise there.
        """
        bias = self.in_proj.bias
        if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
            return bias
        fixed = self.slices()["xBC"]
        return torch.cat([bias[: fixed.start], bias[fixed].detach(), bias[fixed.stop :]])

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, bias = self.slices(), self._trained_bias()
        if bias is self.in_proj.bias or not self._plain():
            projected = self.in_proj(hidden_states)
        else:
            projected = F.linear(hidden_states, self.in_proj.weight, bias)
        return projected[..., rows["xBC"]], projected[..., rows["z"]], projected[..., rows["decay"]]

    def recur(
        self,
        convolved: Tensor,
        raw: Tensor,
        padded: Tensor | None,
        segment_ids: Tensor | None,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        log_decay, input_scale = self.decay(raw)
        if padded is not None:
            log_decay = log_decay.masked_fill(padded, 0)
        x, B, C = self._cut(convolved)
        options = {"input_scale": input_scale, "D": self.D, "segment_ids": segment_ids}
        if not keep:
            return ssd(x, log_decay, B, C, **options), None
        return ssd(x, log_decay, B, C, **options, initial_state=state, return_final_state=True)

    def recur_step(self, convolved: Tensor, raw: Tensor, padded: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, input_scale = self.decay(raw)
        if padded is not None:
            log_decay = log_decay.masked_fill(padded, 0)
        x, B, C = self._cut(convolved)
        return ssd_step(state, x, log_decay, B, C, D=self.D, input_scale=input_scale)

    def decode(
        self, window: Tensor, state: Tensor, inputs: Tensor, z: Tensor, raw: Tensor, real: Tensor | None
    ) -> Tensor:
        conv = self.conv1d
        return ssd_decode_step(
            window, state, inputs, z, raw, weight=conv.weight[:, 0], bias=conv.bias, activation=self.activation,
            D=self.D, real=real, **self.decode_options(),
        )  # fmt: skip

    def decode_options(self) -> dict[str, Any]:
        """What `ssd_decode_step` is to know of the decay and of the gate."""
        raise NotImplementedError

    def _cut(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> x (..., h, p), B and C (..., g, N)."""
        x, B, C = xBC.split([self.inner_size, self.group_size, self.group_size], -1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), *self._heads(B, C)


class Mamba2Mixer(SSMMixer):
    """Mamba-2 (arXiv 2405.21060) exactly as transformers' `BambaMixer` computes it, state-dict keys included.

    in_proj rows are [z | x | B | C | dt]; dt = softplus(dt + dt_bias), log decay = -dt * exp(A_log), the input is
    scaled by dt; SiLU follows the conv; the output is RMSNorm(y * silu(z)) per group, then out_proj.
    """

    activation = "silu"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, self.num_heads)))
        # dt log-uniform in [1e-3, 1e-1] (the paper's released initialisation), spread over heads
        dt = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), self.num_heads))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = GatedRMSNorm(self.inner_size, self.num_groups, self.norm_eps)

    def projection_size(self) -> int:
        return self.inner_size + self.conv_size + self.num_heads

    def slices(self) -> dict[str, slice]:
        d, s = self.inner_size, self.group_size
        return {
            "z": slice(0, d),
            "xBC": slice(d, d + self.conv_size),
            "x": slice(d, 2 * d),
            "B": slice(2 * d, 2 * d + s),
            "C": slice(2 * d + s, 2 * d + 2 * s),
            "decay": slice(2 * d + 2 * s, None),
        }

    def decay(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(wide(raw) + wide(self.dt_bias))
        return -dt * torch.exp(wide(self.A_log)), dt

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y, z)

    def read_by_decode(self) -> tuple[tuple[Any, type[nn.Module]], ...]:
        return *super().read_by_decode(), (self.norm, GatedRMSNorm)

    def decode_options(self) -> dict[str, Any]:
        norm = self.norm
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, "norm_weight": norm.weight, "norm_eps": norm.eps}


class DiscreteMamba2Mixer(SSMMixer):
    """Discrete Mamba-2 of the MOHAWK paper (arXiv 2408.10189), Phi-Mamba and Llamba, state-dict keys included.

    in_proj rows are [x | B | C | z | a]; log decay = -softplus(a) per token and head; no activation after the conv,
    no norm; the output is out_proj(y * silu(z + z_bias)).
    """

    kept_bytes = {4: (20.0, 16.0, 48.1), 2: (18.0, 8.0, 32.2)}
    gate_in_projection = False
    outside_matrix = (*StateMixer.outside_matrix, "z_bias")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.z_bias = nn.Parameter(torch.full((self.inner_size,), OPEN_GATE))

    def projection_size(self) -> int:
        return self.conv_size + self.inner_size + self.num_heads

    def slices(self) -> dict[str, slice]:
        d, s = self.inner_size, self.group_size
        return {
            "xBC": slice(0, d + 2 * s),
            "x": slice(0, d),
            "B": slice(d, d + s),
            "C": slice(d + s, d + 2 * s),
            "z": slice(d + 2 * s, 2 * d + 2 * s),
            "decay": slice(2 * d + 2 * s, None),
        }

    def decay(self, raw: Tensor) -> tuple[Tensor, None]:
        return -F.softplus(wide(raw)), None

    def gate_bias(self) -> Tensor:
        return self.z_bias

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        return wide(y) * F.silu(wide(z) + wide(self.z_bias))

    def decode_options(self) -> dict[str, Any]:
        return {"gate_bias": self.z_bias}


# By the names in mixer_names.py.
MIXERS: dict[str, type[StateMixer]] = {
    "mamba2": Mamba2Mixer,
    "discrete_mamba2": DiscreteMamba2Mixer,
    "gated_delta": GatedDeltaMixer,
    "kimi_delta": KimiDeltaMixer,
}

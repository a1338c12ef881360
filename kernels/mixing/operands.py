"""Mixing matrices: the matrix that a sequence mixer applies to its values, head by head; lower triangular if causal.

Attention is softmax(scale * q k^T) with rows that sum to 1. A state-space head (SSD, arXiv 2405.21060) is
S[i, j] = (C_i . B_j) exp(log_decay_{j+1} + ... + log_decay_i) input_scale_j for j <= i, plus D on the
diagonal. A delta-rule head (Gated Delta Networks, arXiv 2412.06464) has T[i, j] = q_i . p_j(i), where p_j(j) =
beta_j k_j is what token j writes and each later token t turns it into (I - beta_t k_t k_t^T) exp(log_decay_t) p_j. All
are described by what they are made of; `mixing_matrix` writes one out, `mixing_distance` compares two without.
"""

import math
import numbers
from dataclasses import dataclass

from torch import Tensor

from mohawk.kernels.common.delta_chunks import check_gates
from mohawk.kernels.common.segments import check_segment_ids
from mohawk.kernels.common.tensors import check_floating, check_given, check_tensors, whole_number


@dataclass(frozen=True, eq=False)
class AttentionMixing:
    """Softmax attention, causal unless it is said otherwise.

    q: (batch, heads, seq, head_dim), k: (batch, kv_heads, seq, head_dim), both after rotary embedding;
    kv_heads divides heads and query head h reads kv head h // (heads // kv_heads).

    scale: 1 / sqrt(head_dim) if None. window: a token sees itself and the window - 1 tokens before it;
    everything if None. segment_ids: (batch, seq) integers; a token sees only its own segment (a run of
    equal ids), -1 is padding. softcap: c bounds the scores s to c tanh(s / c), as in Gemma 2. causal: false where a
    token sees those behind it too, as in an encoder; a window then reaches as far ahead as back.
    """

    q: Tensor
    k: Tensor
    scale: float | None = None
    window: int | None = None
    segment_ids: Tensor | None = None
    softcap: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        q, k, where = self.q, self.k, "AttentionMixing"
        check_given(where, q=q, k=k)
        if not isinstance(self.causal, bool):
            raise ValueError(f"{where}: causal must be True or False, got {self.causal!r}")
        if q.dim() != 4 or k.dim() != 4:
            shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"{where}: q and k must be (batch, heads, seq, head_dim), got {shapes}")
        if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"{where}: q and k must agree in batch, seq and head_dim, got {shapes}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"{where}: {k.shape[1]} kv heads must divide {q.shape[1]} heads")
        if not q.shape[3]:
            raise ValueError(f"{where}: head_dim is 0")
        if self.window is not None:
            window = whole_number(self.window)
            if window is None or window < 1:
                raise ValueError(f"{where}: window must be None or a whole number from 1 up, got {self.window!r}")
            object.__setattr__(self, "window", window)
        for name, value, least in (("scale", self.scale, -math.inf), ("softcap", self.softcap, 0.0)):
            if value is None:
                continue
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or not math.isfinite(value) or value <= least:
                allowed = "a finite number" + (" above 0" if least == 0 else "")
                raise ValueError(f"{where}: {name} must be None or {allowed}, got {value!r}")
            object.__setattr__(self, name, float(value))
        check_floating(where, "the rest", q.device, q=q, k=k)
        check_segment_ids(self.segment_ids, q.shape[0], q.shape[2], where)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, seq)."""
        batch, heads, seq, _ = self.q.shape
        return batch, heads, seq

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return (self.q, self.k)

    def resolved_scale(self) -> float:
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False)
class SSDMixing:
    """A state-space layer's matrix.

    C and B: (batch, seq, groups, state_size), log_decay and input_scale: (batch, seq, heads), D: (heads,), as
    in `ssd`; the numbers of groups divide heads and may differ.

    segment_ids: (batch, seq) integers; the state starts anew at each segment (a run of equal ids), -1 is
    padding.
    """

    C: Tensor
    B: Tensor
    log_decay: Tensor
    input_scale: Tensor | None = None
    D: Tensor | None = None
    segment_ids: Tensor | None = None

    def __post_init__(self) -> None:
        where = "SSDMixing"
        check_given(where, C=self.C, B=self.B, log_decay=self.log_decay)
        check_tensors(where, input_scale=self.input_scale, D=self.D)
        if self.log_decay.dim() != 3:
            raise ValueError(f"{where}: log_decay must be (batch, seq, heads), got {tuple(self.log_decay.shape)}")
        batch, seq, heads = self.log_decay.shape
        for name, value in (("C", self.C), ("B", self.B)):
            if value.dim() != 4 or tuple(value.shape[:2]) != (batch, seq):
                raise ValueError(
                    f"{where}: {name} must be (batch, seq, groups, state_size) with batch, seq = "
                    f"{batch}, {seq}, got {tuple(value.shape)}"
                )
            if value.shape[2] < 1 or heads % value.shape[2]:
                raise ValueError(f"{where}: the {value.shape[2]} groups of {name} must divide the {heads} heads")
        if self.B.shape[3] != self.C.shape[3]:
            raise ValueError(f"{where}: C and B must have one state_size, got {self.C.shape[3]} and {self.B.shape[3]}")
        if self.input_scale is not None and self.input_scale.shape != self.log_decay.shape:
            raise ValueError(
                f"{where}: input_scale must be (batch, seq, heads) = {(batch, seq, heads)}, "
                f"got {tuple(self.input_scale.shape)}"
            )
        if self.D is not None and tuple(self.D.shape) != (heads,):
            raise ValueError(f"{where}: D must be (heads,) = ({heads},), got {tuple(self.D.shape)}")
        given = {"C": self.C, "B": self.B, "log_decay": self.log_decay}
        check_floating(where, "the rest", self.C.device, **given, input_scale=self.input_scale, D=self.D)
        check_segment_ids(self.segment_ids, batch, seq, where)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, seq)."""
        batch, seq, heads = self.log_decay.shape
        return batch, heads, seq

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return (self.C, self.B, self.log_decay, self.input_scale, self.D)


@dataclass(frozen=True, eq=False)
class DeltaMixing:
    """A gated delta rule's matrix, as `gated_delta_rule` applies it to v.

    q and k: (batch, seq, heads, d), taken as they are, that is normalised and scaled. beta: (batch, seq, heads).
    log_decay: (batch, seq, heads), or (batch, seq, heads, d) for a decay of each channel (Kimi Linear, arXiv
    2510.26692).

    segment_ids: (batch, seq) integers; the state starts anew at each segment (a run of equal ids), -1 is
    padding.
    """

    q: Tensor
    k: Tensor
    beta: Tensor
    log_decay: Tensor
    segment_ids: Tensor | None = None

    def __post_init__(self) -> None:
        q, k, where = self.q, self.k, "DeltaMixing"
        check_given(where, q=q, k=k, beta=self.beta, log_decay=self.log_decay)
        if q.dim() != 4 or q.shape != k.shape:
            shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
            raise ValueError(f"{where}: q and k must be (batch, seq, heads, d), both alike, got {shapes}")
        if not q.shape[3]:
            raise ValueError(f"{where}: d is 0")
        check_gates(where, k, self.beta, self.log_decay)
        check_floating(where, "the rest", q.device, q=q, k=k, beta=self.beta, log_decay=self.log_decay)
        check_segment_ids(self.segment_ids, q.shape[0], q.shape[1], where)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, seq)."""
        batch, seq, heads, _ = self.q.shape
        return batch, heads, seq

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.q, self.k, self.beta, self.log_decay)


Mixing = AttentionMixing | SSDMixing | DeltaMixing


def is_causal(mixing: Mixing) -> bool:
    """Whether nothing is above the diagonal."""
    return not isinstance(mixing, AttentionMixing) or mixing.causal


KINDS = "an AttentionMixing, an SSDMixing or a DeltaMixing"

"""What can be wrong with a call of mixing_distance or head_mean_distance, said in one line before any work."""

import torch
from torch import Tensor

from mohawk.kernels.common.segments import segment_ends, segment_starts
from mohawk.kernels.mixing.chunked import real_tokens
from mohawk.kernels.mixing.metrics import METRICS, OF_MEANS
from mohawk.kernels.mixing.operands import KINDS, AttentionMixing, DeltaMixing, Mixing, is_causal

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference", "chunked", "triton")


def check(student: Mixing, teacher: Mixing, metric: str, reduction: str, backend: str) -> None:
    where = "mixing_distance"
    for name, value, allowed in (
        ("metric", metric, (*METRICS, "kl")),
        ("reduction", reduction, REDUCTIONS),
        ("backend", backend, BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    check_mixings(where, student, teacher)
    heads, heads_t = student.shape[1], teacher.shape[1]
    if min(heads, heads_t) < 1 or max(heads, heads_t) % min(heads, heads_t):
        raise ValueError(
            f"{where}: one number of heads must divide the other, got {heads} (student) and {heads_t} (teacher)"
        )
    if metric == "kl":
        check_kl(student, teacher)


def check_head_means(student: Mixing, teacher: Mixing, metric: str, groups: int) -> None:
    where = "head_mean_distance"
    if metric not in OF_MEANS:
        raise ValueError(f"{where}: metric must be one of {', '.join(OF_MEANS)}, got {metric!r}")
    check_mixings(where, student, teacher)
    heads, heads_t = student.shape[1], teacher.shape[1]
    if groups < 1 or heads % groups or heads_t % groups:
        raise ValueError(f"{where}: {groups} groups must divide the heads, {heads} (student) and {heads_t} (teacher)")
    if metric == "kl":
        check_kl(student, teacher)
    for mixing in (student, teacher):
        if metric == "scores" and not isinstance(mixing, AttentionMixing):
            raise ValueError(f"{where}: metric 'scores' compares two attentions; {a_kind(mixing)} has no scores")


def check_mixings(where: str, student: Mixing, teacher: Mixing) -> None:
    """Raises ValueError, from `where`, unless both are mixings of one batch, length and device."""
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Mixing):
            raise ValueError(f"{where}: {name} must be {KINDS}, got {type(value).__name__}")
    (batch, _, seq), (batch_t, _, seq_t) = student.shape, teacher.shape
    if (batch, seq) != (batch_t, seq_t):
        raise ValueError(
            f"{where}: student and teacher must agree in batch and seq, got {batch}, {seq} and {batch_t}, {seq_t}"
        )
    if student.tensors[0].device != teacher.tensors[0].device:
        raise ValueError(
            f"{where}: student on {student.tensors[0].device}, teacher on {teacher.tensors[0].device}; "
            "move them to one device"
        )

    if is_causal(student) != is_causal(teacher):
        kinds = ("causal" if is_causal(mixing) else "not" for mixing in (student, teacher))
        raise ValueError(
            f"{where}: student and teacher must both be causal or both not, got {next(kinds)} (student) and "
            f"{next(kinds)} (teacher)"
        )


def a_kind(mixing: Mixing) -> str:
    """What kind a mixing is, for a sentence: "an SSDMixing"."""
    return f"a{'' if isinstance(mixing, DeltaMixing) else 'n'} {type(mixing).__name__}"


def check_kl(student: Mixing, teacher: Mixing) -> None:
    where = "mixing_distance: metric 'kl'"
    for mixing in (student, teacher):
        if not isinstance(mixing, AttentionMixing):
            raise ValueError(f"{where} compares two attentions; rows of {a_kind(mixing)} are no distributions")
    assert isinstance(student, AttentionMixing) and isinstance(teacher, AttentionMixing)
    if student.window is None and student.segment_ids is None:
        return
    hidden = _first_column(teacher) < _first_column(student)
    if not student.causal:
        hidden |= _last_column(teacher) > _last_column(student)
    real = real_tokens(student, teacher)
    if real is not None:
        hidden &= real
    if bool(hidden.any()):
        raise ValueError(
            f"{where} is infinite when the teacher sees more than the student: "
            f"windows {student.window} (student) and {teacher.window} (teacher), or other segment_ids"
        )


def _first_column(mixing: AttentionMixing) -> Tensor:
    """(batch, seq) the first token that each token sees."""
    batch, _, seq = mixing.shape
    index = torch.arange(seq, device=mixing.q.device).expand(batch, seq)
    first = torch.zeros_like(index) if mixing.segment_ids is None else segment_starts(mixing.segment_ids)
    return first if mixing.window is None else torch.maximum(first, index - mixing.window + 1)


def _last_column(mixing: AttentionMixing) -> Tensor:
    """(batch, seq) the last token that each token sees, where it sees those behind it too."""
    batch, _, seq = mixing.shape
    index = torch.arange(seq, device=mixing.q.device).expand(batch, seq)
    last = torch.full_like(index, seq - 1) if mixing.segment_ids is None else segment_ends(mixing.segment_ids)
    return last if mixing.window is None else torch.minimum(last, index + mixing.window - 1)

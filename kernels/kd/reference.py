"""The definition of the distillation losses: plain torch, differentiable by autograd, float64 where the
inputs are float64 and float32 otherwise. Everything is whole and dense here; the other backends are tested
against it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.teachers import (
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTopK,
    mixture_weights,
    tail_of,
)

BACKEND = "reference"  # as `mohawk doctor` names it


def head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """`scale * (hidden @ head.T + bias)`, softcapped, in `dtype`."""
    logits = hidden.to(dtype) @ head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _teacher_scores(teacher: Teacher, student: Tensor, temperature: float, vocab: int) -> Tensor:
    """Tempered, unnormalised log-probabilities of a dense teacher, (rows, vocab)."""
    dtype = student.dtype
    if isinstance(teacher, TeacherLogits):
        return teacher.logits.to(dtype)[:, :vocab] / temperature
    if isinstance(teacher, TeacherHidden):
        logits = head_logits(
            teacher.hidden, teacher.head, teacher.bias, teacher.logit_scale, teacher.logit_softcap, dtype
        )
        return logits[:, :vocab] / temperature
    if isinstance(teacher, TeacherMixture):
        parts = [_teacher_scores(one, student, temperature, vocab) for one in teacher.teachers]
        weighted = [
            torch.log_softmax(part, -1) + math.log(w) for part, w in zip(parts, mixture_weights(teacher), strict=True)
        ]
        return torch.logsumexp(torch.stack(weighted), 0)
    inner = _teacher_scores(teacher.teacher, student, temperature, vocab)
    if teacher.t == 1.0:
        return inner
    own = student.detach() / temperature
    return (1 - teacher.t) * own + teacher.t * inner if teacher.t else own


def _bucket_scores(student: Tensor, teacher: TeacherTopK, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over k ids and the rest, each (rows, k + 1)."""
    z = student / temperature
    lp = teacher.logprobs.to(z.dtype)
    tail = tail_of(lp, teacher.tail_logprob, z.shape[-1])
    if lp.shape[-1] >= z.shape[-1]:  # nothing is left, and autograd of a logsumexp of nothing is NaN
        rest = torch.full_like(z[:, :1], float("-inf"))
    else:
        rest = torch.logsumexp(z.scatter(1, teacher.ids, float("-inf")), -1, keepdim=True)
    return torch.cat([lp, tail[:, None]], -1), torch.cat([z.gather(1, teacher.ids), rest], -1)


def row_losses(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    beta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """T^2 * divergence and cross-entropy of each row, unweighted. student is (rows, vocab), already cut,
    without ignored rows and in the dtype of the computation; the teacher has the same rows."""
    vocab, entry = student.shape[-1], DIVERGENCES[divergence]
    size = vocab if entry.mean else 1
    if isinstance(teacher, TeacherSamples):
        lq = torch.log_softmax(student / temperature, -1).gather(1, teacher.ids)
        weights = teacher.weights.to(lq.dtype)
        kd = -(weights * lq.masked_fill(weights == 0, 0.0)).sum(-1) * temperature**2
    elif entry.on_logits:
        with torch.no_grad():
            target = _teacher_scores(teacher, student, 1.0, vocab)
        kd = entry.definition(student, target) / size
    else:
        if isinstance(teacher, TeacherTopK):
            scores, buckets = _bucket_scores(student, teacher, temperature)
        else:
            with torch.no_grad():
                scores = _teacher_scores(teacher, student, temperature, vocab)
            buckets = student / temperature
        lp, lq = torch.log_softmax(scores, -1), torch.log_softmax(buckets, -1)
        kd = entry.definition(lp, lq, beta, lam) / size * temperature**2
    if labels is None:
        return kd, torch.zeros_like(kd)
    return kd, F.cross_entropy(student, labels, reduction="none")

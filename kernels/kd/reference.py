"""The definition of the distillation losses: plain torch, differentiable by autograd, float64 where the
inputs are float64 and float32 otherwise. Everything is whole and dense here; the other backends are tested
against it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.teachers import TeacherSource

BACKEND = "reference"  # as `mohawk doctor` names it


def _teacher_scores(teacher: TeacherSource, student: Tensor, temperature: float) -> Tensor:
    """Tempered, unnormalised log-probabilities of a dense teacher or a mixture, (rows, vocab)."""
    parts = [one.scores(student.dtype)[:, : student.shape[-1]] / temperature for one in teacher.parts()]
    scores, shares = parts[0], teacher.shares()
    if shares is not None:
        weighted = [torch.log_softmax(part, -1) + math.log(w) for part, w in zip(parts, shares, strict=True)]
        scores = torch.logsumexp(torch.stack(weighted), 0)
    if teacher.step == 1.0:
        return scores
    own = student.detach() / temperature
    return (1 - teacher.step) * own + teacher.step * scores if teacher.step else own


def row_losses(
    student: Tensor,
    teacher: TeacherSource,
    labels: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    beta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """T^2 * divergence and cross-entropy of each row, unweighted. student is (rows, vocab), already cut,
    without ignored rows and in the dtype of the computation; the teacher has the same rows."""
    entry = DIVERGENCES[divergence]
    size = student.shape[-1] if entry.mean else 1

    def between(lp: Tensor, lq: Tensor) -> Tensor:
        return entry.definition(lp, lq, beta, lam) / size

    if not teacher.parts():
        kd = teacher.compared(student / temperature, between) * temperature**2
    elif entry.on_logits:
        with torch.no_grad():
            target = _teacher_scores(teacher, student, 1.0)
        kd = entry.definition(student, target) / size
    else:
        with torch.no_grad():
            scores = _teacher_scores(teacher, student, temperature)
        kd = between(torch.log_softmax(scores, -1), torch.log_softmax(student / temperature, -1)) * temperature**2
    if labels is None:
        return kd, torch.zeros_like(kd)
    return kd, F.cross_entropy(student, labels, reduction="none")

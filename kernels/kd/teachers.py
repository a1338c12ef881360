"""What a distillation loss can compare the student with: dense logits, hidden states with their head, a
cached top k, random samples, and two ways of combining dense teachers. All hold tensors as given; none is
ever copied, and none receives a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Dense logits, (..., vocab), of any float dtype. -inf means probability zero."""

    logits: Tensor


@dataclass(frozen=True, eq=False)
class TeacherHidden:
    """Final hidden states (..., hidden) and the head's weight (vocab, hidden), bias (vocab).

    The logits are `logit_scale * (hidden @ head.T + bias)`, then `logit_softcap * tanh(logits /
    logit_softcap)` where a softcap is given (Gemma 2). They are formed chunk by chunk in float32.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """A cached top k: int64 ids (..., k) without repeats in a row, their log-probabilities (..., k).

    The rest of the vocabulary is one bucket of log mass `tail_logprob` (...); left out, it is the mass that
    `logprobs` leave over, at least the rounding of 1 (1e-7 in float32): give it where a reverse KL meets teachers
    surer than that. The log-probabilities are the teacher's at the temperature of the loss: from a cut
    distribution they can't be tempered afterwards. The divergence is taken over k + 1 buckets, so it is a
    lower bound of the dense one, and zero for a student that agrees (renormalising over k would not be). An
    entry with logprob -inf is an id known to have no mass.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TeacherSamples:
    """int64 ids drawn from the teacher, (..., k), and their weights (..., k) of a float dtype: counts over draws when
    they are drawn from the (tempered) teacher itself, importance weights otherwise. Ids may repeat.

    The loss is `-sum w log q(id)`: an unbiased estimate of the cross-entropy, which differs from the forward
    KL by the teacher's entropy, so that its gradient is an unbiased estimate of the KL's (arXiv 2503.16870).
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class TeacherMixture:
    """Several dense teachers as one: `log sum_i w_i p_i`, each p_i tempered first. The weights are positive
    and are divided by their sum; None weighs all alike."""

    teachers: Sequence[TeacherLogits | TeacherHidden]
    weights: Sequence[float] | None = None


@dataclass(frozen=True, eq=False)
class TeacherTAID:
    """TAID's moving target (arXiv 2501.16937): `softmax((1 - t) stopgrad(z_student) + t z_teacher)`, from a
    dense teacher or a mixture. `t` goes from about 0.4 to 1 during training: `TAIDSchedule` has the rule."""

    teacher: TeacherLogits | TeacherHidden | TeacherMixture
    t: float


Teacher = TeacherLogits | TeacherHidden | TeacherTopK | TeacherSamples | TeacherMixture | TeacherTAID


@dataclass
class TAIDSchedule:
    """TAID's adaptive t: call `update(loss)` once a step and pass the returned t to `TeacherTAID`.

    After step n of `steps`, counted from 0, `t = min(end, max(start + (end - start) n / steps, t + alpha
    sigmoid(momentum) (1 - t)))` as in the authors' code, where momentum is an exponential average (`decay`) of the
    relative fall of the loss: t grows at least so fast that it ends at `end`, and faster while the student is
    learning. The first loss has none before it and moves nothing.

    t: now, and at the start. steps: of the whole training; without them `update` raises a ValueError.
    (`KnowledgeDistiller` says them where its trainer does.) step: the next one's index.
    """

    t: float = 0.4
    alpha: float = 5e-4
    decay: float = 0.99
    end: float = 1.0
    momentum: float = 0.0
    last_loss: float | None = None
    steps: int | None = None
    step: int = 0
    start: float | None = None

    def __post_init__(self):
        self.start = self.t if self.start is None else self.start

    def update(self, loss: float, step: int | None = None) -> float:
        """One step with this loss (a float); the new t. step: its index, if it is not the one after the last."""
        if self.steps is None:
            raise ValueError(
                "TAIDSchedule: its t has to reach the end with the training, so give steps=, how many it has"
            )
        step = self.step if step is None else step
        if self.last_loss is not None and self.start is not None:
            change = (self.last_loss - loss) / (self.last_loss + 1e-15)
            self.momentum = self.decay * self.momentum + (1 - self.decay) * change
            sigmoid = torch.sigmoid(torch.tensor(self.momentum, dtype=torch.float64)).item()
            least = self.start + (self.end - self.start) * step / self.steps
            self.t = min(self.end, max(least, self.t + self.alpha * sigmoid * (1 - self.t)))
        self.last_loss, self.step = loss, step + 1
        return self.t


def dense_parts(teacher: Teacher) -> list[TeacherLogits | TeacherHidden]:
    """The dense teachers inside one; empty for a top k or samples."""
    if isinstance(teacher, TeacherTAID):
        return dense_parts(teacher.teacher)
    if isinstance(teacher, TeacherMixture):
        return list(teacher.teachers)
    if isinstance(teacher, (TeacherLogits, TeacherHidden)):
        return [teacher]
    return []


def mixture_weights(mixture: TeacherMixture) -> list[float]:
    """The weights of a mixture, summing to one."""
    given = mixture.weights if mixture.weights is not None else [1.0] * len(mixture.teachers)
    total = float(sum(given))
    return [float(w) / total for w in given]


def tail_of(logprobs: Tensor, tail_logprob: Tensor | None, vocab: int) -> Tensor:
    """The log mass outside a top k, (rows): as given, or log(1 - sum exp(logprobs)) taken in log space.

    `1 - sum` of rounded probabilities goes negative and NaN; log(-expm1(lse)) does not, with lse cut at 0. Less than
    the rounding of 1 can't be told from nothing, and a reverse KL would be infinite for it: that much is always left,
    unless the k are the whole vocabulary.
    """
    if tail_logprob is not None:
        return tail_logprob.to(logprobs.dtype)
    mass = torch.logsumexp(logprobs, -1).clamp(max=0.0)
    if logprobs.shape[-1] >= vocab:
        return torch.full_like(mass, float("-inf"))
    return torch.log((-torch.expm1(mass)).clamp_min(torch.finfo(mass.dtype).eps))

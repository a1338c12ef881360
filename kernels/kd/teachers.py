"""What a distillation loss can compare the student with: dense logits, hidden states with their head, a
cached top k, random samples, and two ways of combining dense teachers. All hold tensors as given; none is
ever copied, and none receives a gradient.

A source is a frozen dataclass of tensors, numbers and other sources, derived from `Dense` where it has a score for
every word, else from `TeacherSource`. Its class carries all that the loss needs to know of it; for one that is not
dense, chunked.py and triton_backend.py may have a faster way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mohawk.kernels.common.sharded import gathered, own_part, slices
from mohawk.kernels.kd import checks, products
from mohawk.kernels.kd.divergences import DIVERGENCES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from mohawk.kernels.kd.checks import Against

SOURCES: dict[str, type[TeacherSource]] = {}  # by the names of their classes, which enter themselves


@dataclass(frozen=True, eq=False)
class TeacherSource:
    """A source. A class says which of its tensors have rows, checks them, and either names the dense teachers in it
    (`parts`) or compares the student with itself (`compared`)."""

    # Its tensors that have rows, and how many dimensions they have behind those of the rows.
    ROWS: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls, source: bool = True) -> None:
        if source:
            SOURCES[cls.__name__] = cls

    def check(self, student: Against) -> None:
        """Raises ValueError, in one line, for what doesn't fit the student, its vocabulary or the settings. Values are
        looked at in the rows that are kept: a cache may have anything in its padding."""
        raise NotImplementedError

    def entries(self) -> list[int]:
        """How many entries each dense teacher inside has, as far as it is one: this comes before the check."""
        return []

    def parts(self) -> Sequence[Dense]:
        """The dense teachers inside. Where there are none, the source has its own `compared`."""
        return ()

    def shares(self) -> list[float] | None:
        """The weights of the parts of a mixture, summing to one; None where the source is no mixture."""
        return None

    @property
    def step(self) -> float:
        """How far from the student to the teacher the target is: TAID's t."""
        return 1.0

    def compared(self, u: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """By definition, where there are no parts: what each row differs by, differentiable in the student's tempered
        logits u (rows, vocab). `divergence` takes log-probabilities of the teacher and of the student."""
        raise NotImplementedError

    def probability(self, ids: Tensor, vocab: int | None) -> Tensor:
        """(rows) probability of one id in each flat row, at temperature 1 and among the first `vocab` entries."""
        raise ValueError(f"confidence: needs a teacher's probabilities, which {type(self).__name__} does not have")

    def entropy(self, vocab: int | None) -> Tensor:
        """(rows) entropy in nats of each flat row, at temperature 1 and among the first `vocab` entries."""
        raise ValueError(f"confidence: needs a teacher's probabilities, which {type(self).__name__} does not have")

    def map_rows(self, f: Callable[[Tensor, int], Tensor]) -> Self:
        """The source with f(tensor, trailing dimensions) in place of each tensor that has rows, all detached."""
        fields = {name: self._mapped(name, getattr(self, name), f) for name in self.__match_args__}
        return replace(self, **fields)

    @torch.no_grad()
    def without_parts(self, group: ProcessGroup | None) -> Self:
        """The source without DTensors: heads gathered and logits whole or, where the vocabulary is split among a group,
        this process's slices of both."""
        return self._inside(lambda one: one.without_parts(group))

    def rounded(self, dtype: torch.dtype) -> Self:
        """The source with what is multiplied (hidden states, heads) in that dtype."""
        return self._inside(lambda one: one.rounded(dtype))

    def with_rounded_logits(self) -> Self:
        """The source with logits of bfloat16 hidden states rounded to it on a CPU."""
        return self._inside(lambda one: one.with_rounded_logits())

    def _inside(self, f: Callable[[TeacherSource], TeacherSource]) -> Self:
        """The source with f of each source in it."""
        made: dict[str, object] = {}
        for name in self.__match_args__:
            value = getattr(self, name)
            if isinstance(value, TeacherSource):
                made[name] = f(value)
            elif isinstance(value, (list, tuple)) and any(isinstance(one, TeacherSource) for one in value):
                made[name] = [f(one) if isinstance(one, TeacherSource) else one for one in value]
        return replace(self, **made) if made else self

    def _mapped(self, name: str, value: object, f: Callable[[Tensor, int], Tensor]) -> object:
        if isinstance(value, Tensor):
            return f(value.detach(), self.ROWS[name]) if name in self.ROWS else value.detach()
        if isinstance(value, TeacherSource):
            return value.map_rows(f)
        return [self._mapped(name, one, f) for one in value] if isinstance(value, Sequence) else value


class Dense(TeacherSource, source=False):
    """A source with a score for every word. `scores` is enough; what else is here is for one that lies in memory as
    logits, or is made fastest for many rows at once."""

    # Whether the loss keeps a tile of its own for it, which `fill` and `finish` make the logits in.
    in_tile: ClassVar[bool] = False

    def parts(self) -> Sequence[Dense]:
        return (self,)

    def scores(self, dtype: torch.dtype) -> Tensor:
        """Logits (rows, entries) by definition. For flat rows."""
        raise NotImplementedError

    def stored(self) -> Tensor | None:
        """The logits where they are in memory."""
        return None

    def fill(self, take: Callable[[Tensor], Tensor], tile: Tensor) -> None:
        """The product of a head, for all rows of a tile (rows, local entries); `take` gives these rows of a tensor."""

    def finish(self, tile: Tensor) -> None:
        """Turns the product into the logits, in place, for some rows of the tile."""

    def probability(self, ids: Tensor, vocab: int | None) -> Tensor:
        return self.scores(torch.float32)[:, :vocab].log_softmax(-1).gather(1, ids[:, None]).squeeze(1).exp()

    def entropy(self, vocab: int | None) -> Tensor:
        return entropy_of(self.scores(torch.float32)[:, :vocab].log_softmax(-1))


@dataclass(frozen=True, eq=False)
class TeacherLogits(Dense):
    """Dense logits, (..., vocab), of any float dtype. -inf means probability zero."""

    logits: Tensor

    ROWS = {"logits": 1}

    def check(self, student: Against) -> None:
        checks.floating("teacher logits", self.logits)
        student.beside("teacher logits", self.logits, trailing=1)
        checks.same_vocab(self.logits.shape[-1], student)

    @torch.no_grad()
    def without_parts(self, group: ProcessGroup | None) -> TeacherLogits:
        logits, split = slices(self.logits)
        return replace(self, logits=gathered(self.logits) if split is not None and group is None else logits)

    def entries(self) -> list[int]:
        return [self.logits.shape[-1]] if isinstance(self.logits, Tensor) and self.logits.dim() else []

    def scores(self, dtype: torch.dtype) -> Tensor:
        return self.logits.to(dtype)

    def stored(self) -> Tensor:
        return self.logits


@dataclass(frozen=True, eq=False)
class TeacherHidden(Dense):
    """Final hidden states (..., hidden) and the head's weight (vocab, hidden), bias (vocab).

    The logits are `logit_scale * (hidden @ head.T + bias)`, then `logit_softcap * tanh(logits /
    logit_softcap)` where a softcap is given (Gemma 2). They are formed chunk by chunk in float32; under autocast as
    `linear_kd_loss` says of the student's.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    ROWS = {"hidden": 1}
    in_tile = True
    rounds: ClassVar[bool] = False

    def check(self, student: Against) -> None:
        scale, softcap = self.logit_scale, self.logit_softcap
        checks.check_head(
            "teacher", self.hidden, self.head, self.bias, scale, softcap, student.settings.autocast is not None
        )
        student.beside("teacher hidden states", self.hidden, trailing=1)
        checks.same_vocab(self.head.shape[0], student)

    @torch.no_grad()
    def without_parts(self, group: ProcessGroup | None) -> TeacherHidden:
        parts = (None if x is None else gathered(x) if group is None else own_part(x) for x in (self.head, self.bias))
        head, bias = parts
        assert head is not None
        return replace(self, head=head, bias=bias)

    def rounded(self, dtype: torch.dtype) -> TeacherHidden:
        return replace(self, hidden=self.hidden.detach().to(dtype), head=self.head.detach().to(dtype))

    def with_rounded_logits(self) -> TeacherHidden:  # one derived from it makes logits of its own
        return _RoundedHidden(**vars(self)) if type(self) is TeacherHidden else self

    def entries(self) -> list[int]:
        return [self.head.shape[0]] if isinstance(self.head, Tensor) and self.head.dim() else []

    def scores(self, dtype: torch.dtype) -> Tensor:
        low = torch.bfloat16 if self.rounds and products.is_rounded(self.hidden, self.head) else None
        scale, softcap = self.logit_scale, self.logit_softcap
        return products.head_logits(self.hidden, self.head, self.bias, scale, softcap, dtype, low)

    def fill(self, take: Callable[[Tensor], Tensor], tile: Tensor) -> None:
        products.logits_product(take(self.hidden), self.head[: tile.shape[1]], tile, self.rounds)

    def finish(self, tile: Tensor) -> None:
        products.finish_logits(tile, self.bias, self.logit_scale, self.logit_softcap)


class _RoundedHidden(TeacherHidden, source=False):
    rounds = True


@dataclass(frozen=True, eq=False)
class TeacherTopK(TeacherSource):
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

    ROWS = {"ids": 1, "logprobs": 1, "tail_logprob": 0}

    def check(self, student: Against) -> None:
        name = student.settings.divergence
        checks.of_probabilities(self, name)
        if why := DIVERGENCES[name].no_top_k:
            other = DIVERGENCES[name].instead
            raise ValueError(
                f"divergence {name!r} can't be taken over a top k, {why}; use a dense teacher, or {other!r}"
            )
        tail = self.tail_logprob
        checks.check_ids("TeacherTopK", self.ids, "logprobs", self.logprobs, student)
        if tail is not None:
            checks.floating("TeacherTopK.tail_logprob", tail, len(student.lead))
            student.beside("TeacherTopK.tail_logprob", tail, trailing=0)
        ids, values = student.real(self.ids), student.real(self.logprobs)
        if not values.numel():
            return
        ordered = ids.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("TeacherTopK.ids repeats an id within a row; each may appear once")
        # Rounded to bfloat16, log-probabilities may add up to a few percent more.
        masses, names = values.float().exp().sum(-1), "logprobs hold"
        if tail is not None:
            masses, names = masses + student.real(tail).float().exp(), "logprobs and tail_logprob hold"
        if (mass := masses.max().item()) > 1.1:
            raise ValueError(
                f"TeacherTopK.{names} a mass of {mass:.4g} in a row; they must be log-probabilities, at most 1 "
                "in sum: pass log_softmax(logits), gathered at the ids"
            )

    def compared(self, u: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        # Over k ids and the rest.
        lp = self.logprobs.to(u.dtype)
        tail = tail_of(lp, self.tail_logprob, u.shape[-1])
        if lp.shape[-1] >= u.shape[-1]:  # nothing is left, and autograd of a logsumexp of nothing is NaN
            rest = torch.full_like(u[:, :1], float("-inf"))
        else:
            rest = torch.logsumexp(u.scatter(1, self.ids, float("-inf")), -1, keepdim=True)
        buckets = torch.cat([u.gather(1, self.ids), rest], -1)
        return divergence(torch.cat([lp, tail[:, None]], -1).log_softmax(-1), buckets.log_softmax(-1))

    def probability(self, ids: Tensor, vocab: int | None) -> Tensor:
        hit, logprobs = self.ids == ids[:, None], self.logprobs.float()
        vocab = vocab or int(self.ids.max()) + 1
        rest = tail_of(logprobs, self.tail_logprob, vocab).exp() / max(1, vocab - self.ids.shape[1])
        return torch.where(hit.any(-1), (logprobs.exp() * hit).sum(-1), rest)

    def entropy(self, vocab: int | None) -> Tensor:
        """Of the k, and of the rest as if its mass were spread evenly over the other entries."""
        logprobs = self.logprobs.float()
        vocab = vocab or int(self.ids.max()) + 1
        others = max(1, vocab - self.ids.shape[1])
        each = tail_of(logprobs, self.tail_logprob, vocab) - math.log(others)
        return entropy_of(logprobs) + others * entropy_of(each[:, None])


@dataclass(frozen=True, eq=False)
class TeacherSamples(TeacherSource):
    """int64 ids drawn from the teacher, (..., k), and their weights (..., k) of a float dtype: counts over draws when
    they are drawn from the (tempered) teacher itself, importance weights otherwise. Ids may repeat.

    The loss is `-sum w log q(id)`: an unbiased estimate of the cross-entropy, which differs from the forward
    KL by the teacher's entropy, so that its gradient is an unbiased estimate of the KL's (arXiv 2503.16870).
    """

    ids: Tensor
    weights: Tensor

    ROWS = {"ids": 1, "weights": 1}

    def check(self, student: Against) -> None:
        checks.of_probabilities(self, student.settings.divergence)
        if student.settings.divergence != "forward_kl":
            raise ValueError(
                f"divergence {student.settings.divergence!r} can't be estimated from samples: only 'forward_kl' is "
                "linear in the teacher's probabilities, any other estimate would be biased; use 'forward_kl', or a "
                "dense or top-k teacher"
            )
        checks.check_ids("TeacherSamples", self.ids, "weights", self.weights, student)
        if bool((student.real(self.weights) < 0).any()):
            raise ValueError("TeacherSamples.weights has negative entries; they must be 0 or above")

    def compared(self, u: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        lq = u.log_softmax(-1).gather(1, self.ids)
        weights = self.weights.to(lq.dtype)
        return -(weights * lq.masked_fill(weights == 0, 0.0)).sum(-1)


@dataclass(frozen=True, eq=False)
class TeacherMixture(TeacherSource):
    """Several dense teachers as one: `log sum_i w_i p_i`, each p_i tempered first. The weights are positive
    and are divided by their sum; None weighs all alike."""

    teachers: Sequence[Dense]
    weights: Sequence[float] | None = None

    def check(self, student: Against) -> None:
        if DIVERGENCES[student.settings.divergence].on_logits:
            name = student.settings.divergence
            raise ValueError(f"divergence {name!r} compares logits; a mixture of teachers has probabilities only")
        if not isinstance(self.teachers, Sequence):
            raise ValueError(f"TeacherMixture.teachers is a {type(self.teachers).__name__}; it must be a list or tuple")
        if not len(self.teachers):
            raise ValueError("TeacherMixture has no teachers")
        for one in self.teachers:
            if not isinstance(one, Dense):
                dense = " and ".join(name for name, kind in SOURCES.items() if issubclass(kind, Dense))
                raise ValueError(f"TeacherMixture takes {dense}, not {type(one).__name__}")
            one.check(student)
        if self.weights is not None:
            if len(self.weights) != len(self.teachers):
                counts = f"{len(self.teachers)} teachers and {len(self.weights)} weights"
                raise ValueError(f"TeacherMixture has {counts}; it must have as many")
            for weight in self.weights:
                allowed = "a number from 1e-30 to 1e30"
                checks.check_number("a weight of TeacherMixture", weight, lambda x: 1e-30 <= x <= 1e30, allowed)

    def entries(self) -> list[int]:
        teachers = self.teachers if isinstance(self.teachers, Sequence) else ()
        return [n for one in teachers if isinstance(one, Dense) for n in one.entries()]

    def parts(self) -> Sequence[Dense]:
        return self.teachers

    def shares(self) -> list[float]:
        given = self.weights if self.weights is not None else [1.0] * len(self.teachers)
        total = float(sum(given))
        return [float(w) / total for w in given]

    def probability(self, ids: Tensor, vocab: int | None) -> Tensor:
        shares = zip(self.shares(), self.teachers, strict=True)
        return torch.stack([w * one.probability(ids, vocab) for w, one in shares]).sum(0)

    def entropy(self, vocab: int | None) -> Tensor:
        each = [one.scores(torch.float32)[:, :vocab].log_softmax(-1) for one in self.teachers]
        shares = [math.log(w) for w in self.shares()]
        return entropy_of(torch.stack([one + w for one, w in zip(each, shares, strict=True)]).logsumexp(0))


@dataclass(frozen=True, eq=False)
class TeacherTAID(TeacherSource):
    """TAID's moving target (arXiv 2501.16937): `softmax((1 - t) stopgrad(z_student) + t z_teacher)`, from a
    dense teacher or a mixture. `t` goes from about 0.4 to 1 during training: `TAIDSchedule` has the rule."""

    teacher: Dense | TeacherMixture
    t: float

    def check(self, student: Against) -> None:
        if not isinstance(self.teacher, (Dense, TeacherMixture)):
            raise ValueError(f"TeacherTAID takes a dense teacher or a mixture, not {type(self.teacher).__name__}")
        checks.check_number("TeacherTAID.t", self.t, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self.teacher.check(student)

    def entries(self) -> list[int]:
        return self.teacher.entries() if isinstance(self.teacher, TeacherSource) else []

    def parts(self) -> Sequence[Dense]:
        return self.teacher.parts()

    def shares(self) -> list[float] | None:
        return self.teacher.shares()

    @property
    def step(self) -> float:
        return self.t


def entropy_of(logprobs: Tensor) -> Tensor:
    """(rows) of log-probabilities (rows, entries): -sum p log p, where an entry without mass counts nothing."""
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)


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

"""A tile of rows in torch: the teacher's scores; divergence, cross-entropy and the gradient of both, which takes the
place of the student's logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mohawk.kernels.kd import gradients as kd_gradients
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.options import KDTask, Options, take
from mohawk.kernels.kd.teachers import TeacherSamples, TeacherSource, TeacherTopK, tail_of
from mohawk.kernels.kd.vocabulary import Known, exchange


class Scores:
    """A teacher's tempered scores (unnormalised log-probabilities), tile by tile."""

    def __init__(self, task: KDTask):
        teacher = task.teacher
        self.parts, self.shares, self.step = teacher.parts(), teacher.shares(), teacher.step
        self.rows, self.options, self.dtype = task.rows, task.options, task.scale.dtype
        self.in_tiles = [one for one in self.parts if one.in_tile]
        self.tiles: list[Tensor] = []
        self.start = 0

    def load(self, start: int, stop: int, tiles: list[Tensor]) -> None:
        """Makes the scores that come from a matrix product, for all rows start..stop at once, in `tiles`."""
        self.start, self.tiles = start, [tile[: stop - start] for tile in tiles]
        for one, tile in zip(self.in_tiles, self.tiles, strict=True):
            one.fill(lambda x: take(x, self.rows, start, stop), tile)

    def _part(self, k: int, start: int, stop: int) -> Tensor:
        """Scores of one dense teacher for rows start..stop; not to be overwritten where they are the teacher's own."""
        one, temperature = self.parts[k], self.options.settings.temperature
        ours, stored = True, one.stored()
        if one.in_tile:
            at = sum(other.in_tile for other in self.parts[:k])
            scores = self.tiles[at][start - self.start : stop - self.start]
            one.finish(scores)
        elif stored is not None:
            scores = take(stored, self.rows, start, stop)[:, : self.options.vocabulary.local]
            ours = self.rows is not None or scores.dtype != self.dtype
            scores = scores.to(self.dtype)
        else:
            part = one.map_rows(lambda x, trailing: take(x, self.rows, start, stop))
            scores = part.scores(self.dtype)[:, : self.options.vocabulary.local]
        if temperature == 1.0:
            return scores
        return scores.div_(temperature) if ours else scores / temperature

    def _towards(self, scores: Tensor, student: Tensor) -> Tensor:
        """TAID's target: the student's scores moved towards the teacher's by the share t."""
        t = self.step
        if t == 1.0:
            return scores
        # Not torch.lerp: -inf on both sides would be NaN.
        return (student * (1 - t)).add_(scores, alpha=t) if t else student

    def unnormalised(self, start: int, stop: int, student: Tensor) -> Iterator[Tensor]:
        """The scores of rows start..stop whose log-normalisers have to be known: one for each teacher of a mixture,
        else the teacher's own. `student` holds the student's tempered logits. Not to be overwritten."""
        if self.shares is not None:
            return (self._part(k, start, stop) for k in range(len(self.parts)))
        return iter([self._towards(self._part(0, start, stop), student)])

    def combined(self, parts: Iterable[Tensor], norms: Sequence[Tensor] | None, student: Tensor) -> Tensor:
        """The teacher's scores, not to be overwritten, from its parts and, where ranks share the vocabulary, the
        log-normalisers of these."""
        parts = iter(parts)
        if self.shares is None:
            return next(parts)
        weighted = (
            log_softmax(next(parts), norms[k] if norms else None).add_(math.log(weight))
            for k, weight in enumerate(self.shares)
        )
        return self._towards(functools.reduce(torch.logaddexp, weighted), student)

    def norm(self, combined: Tensor, known: Known) -> Tensor:
        """The log-normalisers of the combined scores where ranks share the vocabulary."""
        if self.shares is None:
            return known.teachers[0]
        if self.step == 1.0:
            return torch.zeros_like(known.teachers[0])
        return torch.logsumexp(self.options.vocabulary.every(torch.logsumexp(combined, -1)), 0)


def log_softmax(scores: Tensor, norm: Tensor | None = None) -> Tensor:
    """A new tensor: log-probabilities over the whole vocabulary, whose log-normalisers are given where this is only
    a slice of it."""
    return torch.log_softmax(scores, -1) if norm is None else scores - norm.unsqueeze(-1)


# kd and ce of a tile of the student's logits, which becomes the gradient: see torch_tile.
Tile = Callable[[Tensor, KDTask, Scores, tuple[int, int], bool, Tensor | None], tuple[Tensor, Tensor]]
# Of sources that are not dense, from (task, span, u, log-probabilities of the student where they are already
# there, want_grad, known): the value of each row and its gradient in u.
Compare = Callable[[KDTask, tuple[int, int], Tensor, Tensor | None, bool, Known | None], tuple[Tensor, Tensor | None]]


def distribution(
    scores: Tensor,
    u: Tensor,
    lq: Tensor | None,
    options: Options,
    want_grad: bool,
    norm: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence of softmax(scores) and softmax(u) per row and its gradient in u; lq may be given and is kept.

    `norm` and `known` are given where these are slices of a shared vocabulary.
    """
    function = kd_gradients.of_distributions(options.settings.divergence)
    size = options.vocabulary.size if DIVERGENCES[options.settings.divergence].mean else 1
    total: kd_gradients.Total = kd_gradients.own_total
    if known is not None:
        total = options.vocabulary.total if known.reverse_kl is None else lambda _: known.reverse_kl

    lp = log_softmax(scores, norm)
    own = log_softmax(u, known and known.student) if lq is None else lq.clone()
    value, grad = function(lp, own, options.settings.beta, options.settings.lam, want_grad, total)
    broken = torch.isnan(value)
    if grad is not None and bool(broken.any()):  # the gradient says it too, where a sign or a floor would not
        grad.masked_fill_(broken.unsqueeze(-1), float("nan"))
    if size != 1:
        value, grad = value / size, None if grad is None else grad.div_(size)
    return value, grad


def take_topk(task: KDTask, span: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """ids and log-probabilities (rows, k), and the log mass of the rest (rows)."""
    teacher, rows = task.teacher, task.rows
    assert isinstance(teacher, TeacherTopK)
    lp = take(teacher.logprobs, rows, *span).to(dtype)
    tail = None if teacher.tail_logprob is None else take(teacher.tail_logprob, rows, *span)
    return take(teacher.ids, rows, *span), lp, tail_of(lp, tail, task.options.vocabulary.size)


def take_samples(task: KDTask, span: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ids and weights (rows, k)."""
    teacher, rows = task.teacher, task.rows
    assert isinstance(teacher, TeacherSamples)
    return take(teacher.ids, rows, *span), take(teacher.weights, rows, *span).to(dtype)


def _topk(
    task: KDTask,
    span: tuple[int, int],
    u: Tensor,
    lq: Tensor | None,
    want_grad: bool,
    known: Known | None,
) -> tuple[Tensor, Tensor | None]:
    """The divergence over k + 1 buckets: the gradient in a bucket's logit is shared out within the bucket."""
    vocabulary = task.options.vocabulary
    ids, lp, tail = take_topk(task, span, u.dtype)
    others = vocabulary.scatter(u, ids, float("-inf"))
    if known is None:
        rest, chosen = torch.logsumexp(others, -1), vocabulary.gather(u, ids)
    else:
        rest, chosen = known.rest, known.chosen
        assert rest is not None and chosen is not None  # exchanged for the ids of a top k
    rest = rest[:, None]
    buckets, scores = torch.cat([chosen, rest], -1), torch.cat([lp, tail[:, None]], -1)
    # Every rank has all buckets.
    value, grad = distribution(scores, buckets, None, task.options, want_grad)
    value = vocabulary.once(value)
    if grad is None:
        return value, None
    # Where nothing is left in the rest, others - rest is -inf - -inf.
    share = others.sub_(rest.clamp_min(torch.finfo(u.dtype).min)).exp_().mul_(grad[:, -1:])
    return value, vocabulary.scatter(share, ids, grad[:, :-1])


def _samples(
    task: KDTask,
    span: tuple[int, int],
    u: Tensor,
    lq: Tensor | None,
    want_grad: bool,
    known: Known | None,
) -> tuple[Tensor, Tensor | None]:
    vocabulary = task.options.vocabulary
    ids, weights = take_samples(task, span, u.dtype)
    lq = log_softmax(u, known and known.student) if lq is None else lq
    value = -(weights * vocabulary.gather(lq, ids).masked_fill_(weights == 0, 0.0)).sum(-1)
    if not want_grad:
        return value, None
    grad = lq.exp().mul_(weights.sum(-1, keepdim=True))
    return value, vocabulary.scatter_add(grad, ids, -weights)


def _by_autograd(
    task: KDTask,
    span: tuple[int, int],
    u: Tensor,
    lq: Tensor | None,
    want_grad: bool,
    known: Known | None,
) -> tuple[Tensor, Tensor | None]:
    """A source that is not dense and has no way of its own below; the vocabulary is whole."""
    s = task.options.settings
    entry = DIVERGENCES[s.divergence]
    size = task.options.vocabulary.size if entry.mean else 1
    part = task.teacher.map_rows(lambda x, trailing: take(x, task.rows, *span))
    u = u.detach().requires_grad_(want_grad)
    with torch.set_grad_enabled(want_grad):
        value = part.compared(u, lambda lp, lq: entry.definition(lp, lq, s.beta, s.lam) / size)
    return value.detach(), torch.autograd.grad(value, u, torch.ones_like(value))[0] if want_grad else None


BY_HAND: dict[type[TeacherSource], Compare] = {TeacherTopK: _topk, TeacherSamples: _samples}


def _exchange(
    z: Tensor,
    u: Tensor,
    task: KDTask,
    scores: Scores,
    parts: list[Tensor],
    span: tuple[int, int],
    want_grad: bool,
) -> Known:
    """What `torch_tile` has to know of the other ranks' slices."""
    options, teacher = task.options, task.teacher
    distributions = options.need_kd and not options.on_logits
    needs_raw = options.need_ce and options.settings.temperature != 1.0
    ready = scores.shares is None and len(parts) == 1
    return exchange(
        options.vocabulary,
        u if distributions or options.need_ce and not needs_raw else None,
        z if needs_raw else None,
        parts if distributions else (),
        reverse_kl=want_grad and options.settings.divergence == "reverse_kl" and ready,
        products=kd_gradients.finite(z, *parts) if parts and options.settings.divergence == "cosine" else None,
        ids=take(teacher.ids, scores.rows, *span) if distributions and type(teacher) is TeacherTopK else None,
    )


def torch_tile(
    z: Tensor,
    task: KDTask,
    scores: Scores,
    span: tuple[int, int],
    want_grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """kd and ce of the rows of z, the student's float logits; z becomes the gradient of sum(scale * loss).

    into: where the gradient goes in another dtype; what z is then, is not said.
    """
    start, stop = span
    options, labels, scale = task.options, task.labels, task.scale
    temperature, vocabulary = options.settings.temperature, options.vocabulary
    u = z if temperature == 1.0 else z / temperature
    want = want_grad and options.settings.kd_weight != 0.0
    known, parts = None, ()
    if options.need_kd and scores.parts:
        parts = scores.unnormalised(start, stop, u)
    if vocabulary.group is not None:
        parts = list(parts)
        known = _exchange(z, u, task, scores, parts, span, want)
    lq = log_softmax(u, known and known.student) if options.need_ce and temperature == 1.0 else None

    kd = ce = z.new_zeros(stop - start)
    kd_grad = ce_grad = None
    if options.need_kd:
        if not scores.parts:
            compare = BY_HAND.get(type(task.teacher), _by_autograd)
            kd, kd_grad = compare(task, span, u, lq, want, known)
        elif options.on_logits:
            products = None if known is None else known.products
            kd, kd_grad = kd_gradients.of_logits(options.settings.divergence)(z, *parts, want, vocabulary, products)
        else:
            target = scores.combined(parts, known and known.teachers, u)
            norm = known and scores.norm(target, known)
            kd, kd_grad = distribution(target, u, lq, options, want, norm, known)
        kd = kd * temperature**2
    if options.need_ce:
        assert labels is not None
        log_prob = lq if lq is not None else log_softmax(z, known and known.raw)
        target = labels[start:stop, None]
        ce = -vocabulary.gather(log_prob, target).squeeze(1)
        if want_grad and options.settings.ce_weight != 0.0:
            minus_one = z.new_full(target.shape, -1.0)
            ce_grad = vocabulary.scatter_add(log_prob.exp_(), target, minus_one)
    if want_grad:
        row = scale[start:stop, None]
        if kd_grad is not None:
            torch.mul(kd_grad, row * (options.settings.kd_weight * temperature), out=z)
            if ce_grad is not None:
                z.addcmul_(ce_grad, row, value=options.settings.ce_weight)
        elif ce_grad is not None:
            torch.mul(ce_grad, row * options.settings.ce_weight, out=z)
        else:
            z.zero_()
        if into is not None:
            into.copy_(z)
    return kd, ce

"""A tile of rows in torch: divergence, cross-entropy and the gradient of both, in place of the student's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.kd import gradients as kd_gradients
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.options import KDTask, Options, take
from mohawk.kernels.kd.scores import Scores, log_softmax
from mohawk.kernels.kd.teachers import TeacherSamples, TeacherSource, TeacherTopK, tail_of
from mohawk.kernels.kd.vocabulary import Known, exchange

# kd and ce of a tile of the student's logits, which becomes the gradient: see torch_tile.
Tile = Callable[[Tensor, KDTask, Scores, tuple[int, int], bool], tuple[Tensor, Tensor]]
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
) -> tuple[Tensor, Tensor]:
    """kd and ce of the rows of z, the student's float logits; z becomes the gradient of sum(scale * loss)."""
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
    return kd, ce

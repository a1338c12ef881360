"""Gradients of the divergences by hand, on tiles of rows, for the chunked backend; those of divergences.py that have
none here are differentiated by autograd.

Each function gets lp and lq, the log-probabilities of teacher and student (rows, vocab), and may overwrite
both. It returns the divergence of each row and, if `want_grad`, its gradient with respect to the student's
tempered logits u, where lq = log_softmax(u): for D = f(q) that is q * (f'(q) - sum q f'(q)).

Where ranks share the vocabulary, values are this rank's part of the sum and gradients are whole: `total` makes a sum
over this rank's entries one over all.
float32 tiles are enough: to forward, reverse and skewed KL, sums of a log(a / b), the sum of b - a is added, zero in
exact arithmetic, which cancels the rounding of both log-normalisers to first order (in JSD they cancel by themselves).
It is added term by term and made of the same y = log(b / a): a (expm1(y) - y) is never negative, and their sum keeps
its digits where a and b come together. JSD and the skewed KLs come here only between their ends, which are forward and
reverse KL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES, NOT_THERE, Divergence, head_share
from mohawk.kernels.kd.vocabulary import VocabularySlice

ValueAndGradient = tuple[Tensor, Tensor | None]
Total = Callable[[Tensor], Tensor]


def own_total(x: Tensor) -> Tensor:
    """The total of a vocabulary of which no other rank has a part."""
    return x


def _floored(log: Tensor) -> Tensor:
    """In place: no probability below the smallest normal number, beside which any other's expm1(log_b - log_a) stays
    finite. Its own terms are nothing."""
    return log.clamp_(min=_floor(log))


def _floor(log: Tensor) -> float:
    return -87.0 if log.dtype == torch.float32 else -708.0


def _with_ratio(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """a, floored, and y = log(b / a) in log_b's memory, for sums of a (expm1(y) - y).

    Where a was raised to the floor and b is masked, with -inf or the lowest finite number, y is made smaller by as
    much, so that a y is what it was: nothing for words that both sides mask, of which the floor would make nats.
    """
    floor, masked = _floor(log_a), -1e20
    if not log_b.numel() or log_b.amin() > masked:
        return _floored(log_a).exp(), log_b.sub_(log_a)
    raised = torch.sub(log_a, floor).clamp_(max=0.0).exp_()
    y = log_b.sub_(_floored(log_a))
    raised.masked_fill_(y > masked, 1.0)
    return log_a.exp(), y.masked_fill_(raised == 0, 0.0).mul_(raised)


def _excess(b: Tensor, a: Tensor) -> Tensor:
    """b - 2 a where it is positive, else 0: what a min(b / a - 1, 1) lacks of b - a. A b far above a, taken as
    a exp(log(b / a)), would have the rounding of a large logarithm."""
    return torch.sub(b, a, alpha=2).clamp_(min=0.0)


def _centre(q: Tensor, slope: Tensor, total: Total) -> Tensor:
    """q * (slope - sum q slope) in slope's memory."""
    slope.mul_(q)
    return slope.addcmul_(q, total(slope.sum(-1)).unsqueeze(-1), value=-1)


def forward_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    q = lq.clamp(min=_floor(lq)).exp_() if want_grad else lq
    p, y = _with_ratio(lp, lq)
    less = torch.expm1(y, out=lp)  # q / p - 1
    value = torch.sub(less, y, out=y).mul_(p).sum(-1)
    if not want_grad:
        return value, None
    grad = less.clamp_(max=1.0).mul_(p).add_(_excess(q, p))  # q - p
    # Of a whole vocabulary the sum is known to be 0; over ranks it would take a collective more.
    return value, grad.addcmul_(p, grad.sum(-1, keepdim=True), value=-1) if total is own_total else grad


def reverse_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    q, y = _with_ratio(lq, lp)
    value = torch.expm1(y, out=lq).sub_(y).mul_(q).sum(-1)
    if not want_grad:
        return value, None
    y.mul_(q)
    kl = total(-y.sum(-1))
    return value, q.mul_(-kl.unsqueeze(-1)).sub_(y)


def _expm1_of_ratio(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """r = log a - log b of floored logarithms in log_a's memory, and a / b - 1 = expm1(r).

    Mixtures are taken from it: log((1 - w) b + w a) = log b + log1p(w expm1(r)), which keeps its relative
    precision where the two agree, as a log of rounded sums would not.
    """
    r = log_a.sub_(log_b)
    return r, torch.expm1(r)


def jsd(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    # The smaller weight goes into the logarithm: the other way round its own term would be lost in the rounding of 1.
    if beta >= 0.5:
        q, p, to_student, to_teacher, terms = _to_mixture(_floored(lq), _floored(lp), 1 - beta)
    else:
        p, q, to_teacher, to_student, terms = _to_mixture(_floored(lp), _floored(lq), beta)
    value = terms.sum(-1)
    if not want_grad:
        return value, None
    to_student.mul_(q)  # -q log(q / m)
    from_student = total(-to_student.sum(-1)).unsqueeze(-1)
    return value, to_student.addcmul_(q, from_student).mul_(beta - 1)


def _to_mixture(log_b: Tensor, log_a: Tensor, w: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """b, a, log(m / b), log(m / a) and the terms of w KL(b, m) + (1 - w) KL(a, m) for m = (1 - w) a + w b."""
    a, b = log_a.exp(), log_b.exp()
    r, x = _expm1_of_ratio(log_b, log_a)
    log_m_a = x.mul_(w).log1p()
    log_m_b = torch.sub(log_m_a, r, out=r)
    terms = x.clamp_(max=w).sub_(log_m_a).mul_(a).add_(_excess(b, a), alpha=w).mul_(1 - w)
    terms.addcmul_(torch.expm1(log_m_b).clamp_(max=1 - w).sub_(log_m_b), b, value=w)
    return b, a, log_m_b, log_m_a, terms.add_(_excess(a, b), alpha=w * (1 - w))


def _mixture(log_a: Tensor, log_b: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """log(m / b), m / b - 1 and m / b of m = (1 - lam) a + lam b; the last in log_a's memory."""
    ratio, x = _expm1_of_ratio(log_a, log_b)
    x.mul_(1 - lam)  # m / b - 1, precise where m is near b
    ratio.exp_().mul_(1 - lam).add_(lam)  # m / b, precise where little of m is left: there 1 + x has lost lam
    return torch.where(x < -0.5, ratio.log(), torch.log1p(x)), x, ratio


def skew_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    p, q = _floored(lp).exp(), _floored(lq).exp()
    log_m, slope, ratio = _mixture(lq, lp, lam)  # log(m / p), m / p - 1, m / p
    value = torch.sub(slope.clamp(max=1 - lam), log_m, out=log_m).mul_(p).add_(_excess(q, p), alpha=1 - lam).sum(-1)
    if not want_grad:
        return value, None
    return value, _centre(q, slope.div_(ratio), total).mul_(1 - lam)


def skew_reverse_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    p, q = _floored(lp).exp(), _floored(lq).exp()
    log_m, slope, ratio = _mixture(lp, lq, lam)  # log(m / q), m / q - 1, m / q
    value = slope.clamp(max=1 - lam).sub_(log_m).mul_(q).add_(_excess(p, q), alpha=1 - lam).sum(-1)
    if not want_grad:
        return value, None
    slope.div_(ratio).mul_(lam).sub_(log_m)  # log(q / m) - lam q / m + lam
    return value, _centre(q, slope, total)


def adaptive_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    share = head_share(lp, lq, beta)
    forward, grad = forward_kl(lp.clone(), lq.clone(), beta, lam, want_grad, total)
    reverse, grad_of_reverse = reverse_kl(lp, lq, beta, lam, want_grad, total)
    value = share * forward + (1 - share) * reverse
    if grad is None or grad_of_reverse is None:
        return value, None
    share = share.unsqueeze(-1)
    return value, grad.mul_(share).addcmul_(grad_of_reverse, 1 - share)


def tvd(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    q = lq.exp_()
    difference = torch.sub(q, lp.exp_())
    value = difference.abs().sum(-1) / 2
    if not want_grad:
        return value, None
    return value, _centre(q, difference.sign_().mul_(0.5), total)


def probability_mse(lp: Tensor, lq: Tensor, beta: float, lam: float, want_grad: bool, total: Total) -> ValueAndGradient:
    q = lq.exp_()
    difference = torch.sub(q, lp.exp_())
    value = difference.square().sum(-1)
    if not want_grad:
        return value, None
    return value, _centre(q, difference.mul_(2), total)


DISTRIBUTION = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "probability_mse": probability_mse,
}


# On logits: z and t are raw, the gradient is with respect to z, entries that are not there on either side are left
# out.


def finite(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """New tensors, 0 where either has no word. +inf (an overflow) stays."""
    out = _not_there(z, t)
    return z.masked_fill(out, 0.0), t.masked_fill(out, 0.0)


def _not_there(z: Tensor, t: Tensor) -> Tensor:
    return (z < NOT_THERE) | (t < NOT_THERE)


def mse(
    z: Tensor, t: Tensor, want_grad: bool, vocabulary: VocabularySlice, products: Tensor | None = None
) -> ValueAndGradient:
    difference = torch.sub(z, t).masked_fill_(_not_there(z, t), 0.0)
    value = difference.square().sum(-1) / vocabulary.size
    return value, difference.mul_(2 / vocabulary.size) if want_grad else None


def cosine(
    z: Tensor, t: Tensor, want_grad: bool, vocabulary: VocabularySlice, products: Tensor | None = None
) -> ValueAndGradient:
    """`products` are |z|^2, |t|^2 and z t over all ranks, (3, rows), where they share the vocabulary."""
    z, t = finite(z, t)
    squares = torch.stack([z.square().sum(-1), t.square().sum(-1)]) if products is None else products[:2]
    # As torch.nn.functional.cosine_similarity: each norm at least 1e-8.
    norms = squares.sqrt().unsqueeze(-1)
    floored = norms.clamp_min(1e-8)
    z.div_(floored[0])
    difference = torch.sub(z, t.div_(floored[1]))
    # 1 - cos = |z - t|^2 / 2 for unit vectors, without the cancellation; vectors of norm 0 make up for the
    # rest.
    value = difference.square().sum(-1) / 2
    value += vocabulary.once((1 - (norms / floored).square()).sum(0).squeeze(-1) / 2)
    if not want_grad:
        return value, None
    inverse = torch.where(norms[0] > 1e-8, 1 / floored[0], 0.0)
    product = value if products is None else 1 - products[2] / (floored[0] * floored[1]).squeeze(-1)
    return value, difference.addcmul_(z, product.unsqueeze(-1), value=-1).mul_(inverse)


LOGITS = {"mse": mse, "cosine": cosine}


def by_hand(name: str) -> bool:
    return name in DISTRIBUTION or name in LOGITS


def of_distributions(name: str) -> Callable[..., ValueAndGradient]:
    """The function of (lp, lq, beta, lam, want_grad, total) that computes this divergence."""
    return DISTRIBUTION.get(name) or functools.partial(_by_autograd, DIVERGENCES[name].definition)


def _by_autograd(
    definition: Callable[..., Tensor],
    lp: Tensor,
    lq: Tensor,
    beta: float,
    lam: float,
    want_grad: bool,
    total: Total,
) -> ValueAndGradient:
    with torch.set_grad_enabled(want_grad):
        value = definition(lp, lq.requires_grad_(want_grad), beta, lam)
    if not want_grad:
        return value, None
    (slope,) = torch.autograd.grad(value, lq, torch.ones_like(value))  # q * f'(q)
    lq.requires_grad_(False)
    return value.detach(), slope.sub(lq.exp_().mul_(total(slope.sum(-1)).unsqueeze(-1)))


def of_logits(name: str) -> Callable[..., ValueAndGradient]:
    """The function of (z, t, want_grad, vocabulary, products) that computes this divergence. One without a gradient
    here sees the whole vocabulary alone."""
    return LOGITS.get(name) or functools.partial(_of_logits_by_autograd, DIVERGENCES[name])


def _of_logits_by_autograd(
    divergence: Divergence, z: Tensor, t: Tensor, want_grad: bool, vocabulary: VocabularySlice, products: None = None
) -> ValueAndGradient:
    size = vocabulary.size if divergence.mean else 1
    z = z.detach().requires_grad_(want_grad)
    with torch.set_grad_enabled(want_grad):
        value = divergence.definition(z, t) / size
    return value.detach(), torch.autograd.grad(value, z, torch.ones_like(value))[0] if want_grad else None

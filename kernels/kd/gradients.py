"""Gradients of the divergences by hand, on tiles of rows, for the chunked backend; those of divergences.py that have
none here are differentiated by autograd.

Each function gets lp and lq, the log-probabilities of teacher and student (rows, vocab), and may overwrite
both. It returns the divergence of each row and, if `want_grad`, its gradient with respect to the student's
tempered logits u, where lq = log_softmax(u): for D = f(q) that is q * (f'(q) - sum q f'(q)).

`guard` sets terms of probability 0 to 0. Without it a row with -inf logits may come out NaN; the caller then
calls again with it, so that rows without -inf pay nothing. Where ranks share the vocabulary, values are this
rank's part of the sum and gradients are whole: `total` makes a sum over this rank's entries one over all.
float32 tiles are enough: in forward, reverse and skewed KL the added sum(q - p), zero in exact arithmetic, cancels
the rounding of both log-normalisers to first order (in JSD they cancel by themselves). JSD and the skewed KLs come
here only between their ends, which are forward and reverse KL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES, Divergence
from mohawk.kernels.kd.vocabulary import Vocabulary

Rows = tuple[Tensor, Tensor | None]
Total = Callable[[Tensor], Tensor]


def _times(prob: Tensor, log_ratio: Tensor, guard: bool) -> Tensor:
    """prob * log_ratio in log_ratio's memory."""
    if guard:
        log_ratio.masked_fill_(prob == 0, 0.0)
    return log_ratio.mul_(prob)


def _centre(q: Tensor, slope: Tensor, total: Total) -> Tensor:
    """q * (slope - sum q slope) in slope's memory."""
    slope.mul_(q)
    return slope.addcmul_(q, total(slope.sum(-1)).unsqueeze(-1), value=-1)


def forward_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total) -> Rows:
    p = lp.exp()
    ratio = lp.sub_(lq)
    grad = lq.exp_().sub_(p)
    kl = _times(p, ratio, guard).sum(-1)
    return kl + grad.sum(-1), grad if want_grad else None


def reverse_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total) -> Rows:
    q = lq.exp()
    ratio = lq.sub_(lp)
    gap = lp.exp_().sub_(q).sum(-1)
    grad = _times(q, ratio, guard)
    kl = grad.sum(-1)
    value = kl + gap
    if not want_grad:
        return value, None
    return value, grad.addcmul_(q, total(kl).unsqueeze(-1), value=-1)


def _expm1_of_ratio(log_a: Tensor, log_b: Tensor, guard: bool) -> tuple[Tensor, Tensor]:
    """r = log a - log b in log_a's memory, and a / b - 1 = expm1(r).

    Mixtures are taken from it: log((1 - w) b + w a) = log b + log1p(w expm1(r)), which keeps its relative
    precision where the two agree, as a log of rounded sums would not. Beyond +-80 one side is nothing beside
    the other.
    """
    limit = 80.0 if log_a.dtype == torch.float32 else 700.0
    r = log_a.sub_(log_b)
    if guard:
        r.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
    r.clamp_(-limit, limit)
    return r, torch.expm1(r)


def _mixture(log_a: Tensor, log_b: Tensor, lam: float, guard: bool) -> tuple[Tensor, Tensor]:
    """log(m / b) and 1 - b / m of m = (1 - lam) a + lam b, in log_a's memory and a new tensor."""
    ratio, x = _expm1_of_ratio(log_a, log_b, guard)
    x.mul_(1 - lam)  # m / b - 1, precise where m is near b
    ratio.exp_().mul_(1 - lam).add_(lam)  # m / b, precise where little of m is left: there 1 + x has lost lam
    log = torch.where(x < -0.5, ratio.log(), torch.log1p(x))
    return log, x.div_(ratio)


def jsd(lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total) -> Rows:
    p, q = lp.exp(), lq.exp()
    # The smaller weight goes into the logarithm: the other way round its own term would be lost in the rounding
    # of 1.
    if beta >= 0.5:
        r, m = _expm1_of_ratio(lq, lp, guard)
        m.mul_(1 - beta).log1p_()  # log m - log p
        r.sub_(m).mul_(q)  # q (log q - log m)
    else:
        r, x = _expm1_of_ratio(lp, lq, guard)
        x.mul_(beta).log1p_()  # log m - log q
        m = torch.sub(x, r)
        r = x.neg_().mul_(q)
    from_student = r.sum(-1)
    value = (1 - beta) * from_student - beta * m.mul_(p).sum(-1)
    if not want_grad:
        return value, None
    return value, r.addcmul_(q, total(from_student).unsqueeze(-1), value=-1).mul_(1 - beta)


def skew_kl(lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total) -> Rows:
    p, q = lp.exp(), lq.exp()
    gap = torch.sub(q, p).sum(-1) * (1 - lam)
    log_m, slope = _mixture(lq, lp, lam, guard)  # log(m / p), 1 - p / m
    value = gap - p.mul_(log_m).sum(-1)
    if not want_grad:
        return value, None
    return value, _centre(q, slope, total).mul_(1 - lam)


def skew_reverse_kl(
    lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total
) -> Rows:
    p, q = lp.exp(), lq.exp()
    gap = p.sub_(q).sum(-1) * (1 - lam)
    log_m, slope = _mixture(lp, lq, lam, guard)  # log(m / q), 1 - q / m
    value = gap - torch.mul(q, log_m).sum(-1)
    if not want_grad:
        return value, None
    slope.mul_(lam).sub_(log_m)  # log(q / m) - lam q / m + lam
    return value, _centre(q, slope, total)


def tvd(lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total) -> Rows:
    q = lq.exp_()
    difference = torch.sub(q, lp.exp_())
    value = difference.abs().sum(-1) / 2
    if not want_grad:
        return value, None
    return value, _centre(q, difference.sign_().mul_(0.5), total)


def probability_mse(
    lp: Tensor, lq: Tensor, beta: float, lam: float, guard: bool, want_grad: bool, total: Total
) -> Rows:
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
    "tvd": tvd,
    "probability_mse": probability_mse,
}


# On logits: z and t are raw, the gradient is with respect to z, entries that are -inf on either side are left
# out.


def finite(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """New tensors, 0 where either is -inf. +inf (an overflow) stays."""
    out = torch.isneginf(z) | torch.isneginf(t)
    return z.masked_fill(out, 0.0), t.masked_fill(out, 0.0)


def mse(z: Tensor, t: Tensor, want_grad: bool, vocabulary: Vocabulary, products: Tensor | None = None) -> Rows:
    difference = torch.sub(z, t).masked_fill_(torch.isneginf(z) | torch.isneginf(t), 0.0)
    value = difference.square().sum(-1) / vocabulary.size
    return value, difference.mul_(2 / vocabulary.size) if want_grad else None


def cosine(z: Tensor, t: Tensor, want_grad: bool, vocabulary: Vocabulary, products: Tensor | None = None) -> Rows:
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
    whole = value if products is None else 1 - products[2] / (floored[0] * floored[1]).squeeze(-1)
    return value, difference.addcmul_(z, whole.unsqueeze(-1), value=-1).mul_(inverse)


LOGITS = {"mse": mse, "cosine": cosine}


def by_hand(name: str) -> bool:
    return name in DISTRIBUTION or name in LOGITS


def of_distributions(name: str) -> Callable[..., Rows]:
    """The function of (lp, lq, beta, lam, guard, want_grad, total) that computes this divergence."""
    return DISTRIBUTION.get(name) or functools.partial(_by_autograd, DIVERGENCES[name].definition)


def _by_autograd(
    definition: Callable[..., Tensor],
    lp: Tensor,
    lq: Tensor,
    beta: float,
    lam: float,
    guard: bool,
    want_grad: bool,
    total: Total,
) -> Rows:
    with torch.set_grad_enabled(want_grad):
        value = definition(lp, lq.requires_grad_(want_grad), beta, lam)
    if not want_grad:
        return value, None
    (slope,) = torch.autograd.grad(value, lq, torch.ones_like(value))  # q * f'(q)
    lq.requires_grad_(False)
    return value.detach(), slope.sub(lq.exp_().mul_(total(slope.sum(-1)).unsqueeze(-1)))


def of_logits(name: str) -> Callable[..., Rows]:
    """The function of (z, t, want_grad, vocabulary, products) that computes this divergence. One without a gradient
    here sees the whole vocabulary alone."""
    return LOGITS.get(name) or functools.partial(_of_logits_by_autograd, DIVERGENCES[name])


def _of_logits_by_autograd(
    divergence: Divergence, z: Tensor, t: Tensor, want_grad: bool, vocabulary: Vocabulary, products: None = None
) -> Rows:
    size = vocabulary.size if divergence.mean else 1
    z = z.detach().requires_grad_(want_grad)
    with torch.set_grad_enabled(want_grad):
        value = divergence.definition(z, t) / size
    return value.detach(), torch.autograd.grad(value, z, torch.ones_like(value))[0] if want_grad else None

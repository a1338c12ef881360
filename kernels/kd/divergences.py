"""Every divergence of the distillation losses: its definition and what it can be used with.

An entry of `DIVERGENCES` is all that a divergence needs: the recipes' list, the checks, the texts and every backend
read this table. The reference differentiates the definition; so does the chunked backend, tile by tile, until
gradients.py has a gradient by hand, which is faster and keeps its precision where student and teacher come together.
Triton computes what triton_backend.py has terms for and leaves the rest to the chunked backend.

Importing this module brings no torch, so that recipes can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Stands for -inf and keeps autograd out of inf - inf: exp of it is 0 in float32 and float64.
LOW = -8e37
# Between raw logits, a logit below this is a word that is not there: -inf, and the numbers that models suppress words
# with, whose squares are infinite in float32.
NOT_THERE = -1e15


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One divergence of rows.

    Args:
        definition: the sum over the vocabulary, (rows), differentiable by autograd. Of distributions it is given (log p
            of the teacher, log q of the student, beta, lam), each distribution (rows, vocab); of logits (student,
            teacher).
        text: what it is, for those who choose one.
        on_logits: compares raw logits, and knows no temperature.
        mean: the sum is divided by the size of the vocabulary.
        ends: where beta or lam make another divergence of it, that one's name: {"beta": {0.0: name}}. The definition is
            only asked for what lies between.
        no_top_k: why it can't be taken over the buckets of a top k; None where it can.
        instead: the name of one to take over a top k in its place.
        whole: it is no sum over words, so that ranks which share the vocabulary can't have parts of it.
    """

    definition: Callable[..., Tensor]
    text: str
    on_logits: bool = False
    mean: bool = False
    ends: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    no_top_k: str | None = None
    instead: str = "tvd"
    whole: bool = False


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a log(a / b), as sum (a log(a / b) + b - a), in which no term is negative: the sum of b - a is nothing, but
    with it the rounding of both normalisers and of the terms cancels where a and b are close."""
    a, b = log_a.exp(), log_b.exp()
    # Where a is 0 the term is 0 whatever log b is; filling the factor (not the product) keeps the gradient 0 too.
    ratio = (log_a - log_b).masked_fill(a == 0, 0.0)
    near = (ratio.abs() < 1) & (a != 0)
    return (a * ratio + (a * ratio.masked_fill(~near, 0.0).neg().expm1()).where(near, b - a)).sum(-1)


def _log_mix(weight_a: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.clamp(min=LOW) + math.log(weight_a)).logaddexp(log_b.clamp(min=LOW) + math.log1p(-weight_a))


def _jsd(lp: Tensor, lq: Tensor, beta: float, lam: float) -> Tensor:
    lm = _log_mix(beta, lp, lq)
    return beta * _kl(lp, lm) + (1 - beta) * _kl(lq, lm)


def head_share(lp: Tensor, lq: Tensor, mass: float) -> Tensor:
    """(rows): what share of sum |p - q| lies in the teacher's head, without gradient; 1/2 where the sum is 0.

    The head is the teacher's most likely words, as many as hold a mass of `mass` at most, the likeliest one in any
    case (as in the authors' code, arXiv 2404.02657). Words of one probability are in it together or not at all, so that
    their numbering does not matter.
    """
    p = lp.detach().exp()
    gap = (p - lq.detach().exp()).abs_()
    some = min(p.shape[-1], 256)  # mostly enough, and far faster than to sort all
    top = p.topk(some, -1).values
    if some < p.shape[-1] and bool((top.sum(-1) <= mass).any()):
        top = p.sort(-1, descending=True).values
    size = (top.cumsum(-1) <= mass).sum(-1, keepdim=True).clamp(min=1)
    last = top.gather(-1, size - 1)
    after = top.gather(-1, size.clamp(max=top.shape[-1] - 1))
    cut = (after == last) & (size < top.shape[-1]) & (last < top[:, :1])  # through words of one probability
    head = (p > last) | (p == last) & ~cut
    total = gap.sum(-1)
    return (gap.masked_fill(~head, 0.0).sum(-1) / total).masked_fill(total == 0, 0.5)


def _adaptive_kl(lp: Tensor, lq: Tensor, beta: float, lam: float) -> Tensor:
    share = head_share(lp, lq, beta)
    return share * _kl(lp, lq) + (1 - share) * _kl(lq, lp)


# Between raw logits a word below NOT_THERE on either side is left out; +inf is an overflow and stays visible.


def _both_there(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    out = (student < NOT_THERE) | (teacher < NOT_THERE)
    return student.masked_fill(out, 0.0), teacher.masked_fill(out, 0.0)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _both_there(student, teacher)
    return (student - teacher).square().sum(-1)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos as half the square of what unit vectors differ by, which keeps its digits where the two come together.
    Each norm is at least 1e-8, as in torch's cosine_similarity; what a shorter vector lacks of 1 is added."""
    value = 0.0
    units = []
    for x in _both_there(student, teacher):
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp_min(1e-8)
        value = value + (1 - unit.square().sum(-1)).where(norm.squeeze(-1) < 1e-8, 0.0) / 2
        units.append(unit)
    return value + (units[0] - units[1]).square().sum(-1) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        definition=lambda lp, lq, beta, lam: _kl(lp, lq),
        text="KL(p, q) of teacher p and student q",
    ),
    "reverse_kl": Divergence(definition=lambda lp, lq, beta, lam: _kl(lq, lp), text="KL(q, p)"),
    "jsd": Divergence(
        definition=_jsd,
        text="beta KL(p, m) + (1 - beta) KL(q, m) for m = beta p + (1 - beta) q, as in GKD; at beta 0 forward and at 1 "
        "reverse KL",
        ends={"beta": {0.0: "forward_kl", 1.0: "reverse_kl"}},
    ),
    "skew_kl": Divergence(
        definition=lambda lp, lq, beta, lam: _kl(lp, _log_mix(lam, lp, lq)),
        text="KL(p, lam p + (1 - lam) q), as in DistiLLM",
        ends={"lam": {0.0: "forward_kl"}},
    ),
    "skew_reverse_kl": Divergence(
        definition=lambda lp, lq, beta, lam: _kl(lq, _log_mix(lam, lq, lp)),
        text="KL(q, (1 - lam) p + lam q), as in DistiLLM",
        ends={"lam": {0.0: "reverse_kl"}},
    ),
    "adaptive_kl": Divergence(
        definition=_adaptive_kl,
        text="s KL(p, q) + (1 - s) KL(q, p), AKL of arXiv 2404.02657: s, which has no gradient, is the share of "
        "sum |p - q| in p's head, its likeliest words of mass beta at most; at beta 1 forward KL",
        ends={"beta": {1.0: "forward_kl"}},
        no_top_k="whose tail is one bucket: how far its words are apart is not known",
        instead="jsd",
        whole=True,
    ),
    "tvd": Divergence(
        definition=lambda lp, lq, beta, lam: 0.5 * (lp.exp() - lq.exp()).abs().sum(-1),
        text="total variation, half the sum of |p - q|",
    ),
    "probability_mse": Divergence(
        definition=lambda lp, lq, beta, lam: (lp.exp() - lq.exp()).square().sum(-1),
        text="the mean of (p - q)^2 over the vocabulary",
        mean=True,
        no_top_k="whose tail is one bucket: the square of a sum is no sum of squares",
    ),
    "mse": Divergence(
        definition=_mse, text="between raw logits, their mean squared difference", on_logits=True, mean=True
    ),
    "cosine": Divergence(definition=_cosine, text="between raw logits, 1 - their cosine similarity", on_logits=True),
}


def plain(name: str, beta: float, lam: float) -> str:
    """The divergence that this one is with these numbers: at its ends another."""
    ends = DIVERGENCES[name].ends
    for number, value in (("beta", beta), ("lam", lam)):
        name = ends.get(number, {}).get(value, name)
    return name


def described() -> str:
    """One line for each: its name and what it is."""
    return "\n".join(f"{name}: {one.text}" for name, one in DIVERGENCES.items())

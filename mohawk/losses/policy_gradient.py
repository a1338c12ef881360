"""MiniLLM's gradient (Gu et al. 2023, arXiv 2306.08543): reverse KL of whole sequences, from the student's own samples.

A token's reverse KL has the gradient of that step alone, exactly. What the token does to those behind it is added as a
policy gradient: -R log q(token), where R is made of log p - log q of the later tokens of its sample.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED

PolicyGradient = Literal["normalized", "sum"]
KINDS = ("normalized", "sum")


def later_rewards(reward: Tensor, labels: Tensor, kind: PolicyGradient) -> Tensor:
    """(b, n) float64: at each label of a sample the sum, or the mean, of the rewards of the sample's later labels; 0
    elsewhere and at a sample's last label.

    Args:
        reward: (b, n), log p - log q of each label; read where there is one.
        labels: (b, n) int64, aligned (`next_labels`); labels side by side are of one sample.
        kind: normalized: the mean, so that long samples are not preferred or avoided for their length, as in MiniLLM;
            sum: with which the gradient is that of the sequences' reverse KL.
    """
    real = labels != IGNORED
    n = labels.shape[1]
    totals = torch.where(real, reward.double(), 0.0).cumsum(-1)
    counts = real.cumsum(-1)
    last = real & ~torch.nn.functional.pad(real[:, 1:], (0, 1))
    place = torch.arange(n, device=labels.device).expand_as(labels)
    ends = place.masked_fill(~last, n - 1).flip(-1).cummin(-1).values.flip(-1)
    later = totals.gather(-1, ends) - totals
    if kind == "normalized":
        later = later / (counts.gather(-1, ends) - counts).clamp(min=1)
    return later.masked_fill(~real | last, 0.0)


def policy_term(cross_entropy: Tensor, teacher_logprobs: Tensor, labels: Tensor, kind: PolicyGradient) -> Tensor:
    """(b, n): a term of each label whose value is 0 and whose gradient is that of -R log q(label), R a constant.

    Args:
        cross_entropy: (b, n), -log q of each label, with the student's gradients.
        teacher_logprobs: (b, n), log p of each label.
        labels, kind: as in `later_rewards`.
    """
    surrogate = later_rewards(teacher_logprobs + cross_entropy.detach(), labels, kind).to(cross_entropy.dtype)
    surrogate = surrogate * cross_entropy
    return surrogate - surrogate.detach()


def check_policy_gradient(kind: str | None, divergence: str, temperature: Any, others: dict[str, bool]) -> None:
    """ValueError where MiniLLM's gradient can't be had. others: whether what it excludes is asked for, by name."""
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"policy_gradient: got {kind!r}; allowed: {', '.join(KINDS)}, None")
    if divergence != "reverse_kl":
        raise ValueError(f"policy_gradient: of the divergence {divergence}; it is that of reverse_kl, so use this")
    if temperature != 1.0:
        raise ValueError(
            f"policy_gradient: at the temperature {temperature}; it is of the distributions at 1, so use 1"
        )
    for name, asked in others.items():
        if asked:
            raise ValueError(
                f"policy_gradient: beside {name}, with which it is no gradient of reverse KL; leave one out"
            )

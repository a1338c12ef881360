"""Two sides judged on the same questions: how often one is preferred, with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL = 1.959964  # standard errors to each side of a 95 % interval


@dataclass(frozen=True)
class Preference:
    """How often A is preferred to B.

    wins, ties, losses: of A. rate: share of wins, ties counted half. low, high: its 95 % interval. chance: the sign
    test's two-sided probability of wins and losses as uneven as these where neither is better. difference: mean of A's
    score minus B's, and error, its standard error (None of fewer than two); both None where nothing was scored.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    chance: float
    difference: float | None = None
    error: float | None = None


def preference(scores: Sequence[tuple[float | None, float | None]]) -> Preference:
    """Of A's and B's scores of each question, at least one; None, a side that did not answer, is worse than any score,
    and in no mean. Raises ValueError where there is none."""
    if not scores:
        raise ValueError("no question was judged")
    ranks = [tuple(-math.inf if score is None else score for score in pair) for pair in scores]
    wins, losses = sum(a > b for a, b in ranks), sum(a < b for a, b in ranks)
    ties = len(scores) - wins - losses
    rate = (wins + ties / 2) / len(scores)
    both = [a - b for a, b in scores if a is not None and b is not None]
    return Preference(
        wins, ties, losses, rate, *wilson(rate, len(scores)), sign_test(wins, losses),
        statistics.fmean(both) if both else None,
        statistics.stdev(both) / math.sqrt(len(both)) if len(both) > 1 else None,
    )  # fmt: skip


def wilson(share: float, count: int, z: float = NORMAL) -> tuple[float, float]:
    """Wilson's score interval of a share of so many. Of values between 0 and 1 that are not all 0 or 1, such as ties
    counted half, it is wider than need be, never narrower: their variance is below share * (1 - share)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Probability, where both are equally likely, of numbers that are at least as uneven."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)

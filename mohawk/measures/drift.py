"""Whether what a model meets and writes now is still distributed as it was.

The population stability index is the sum over bins of (now - then) ln(now / then), which is KL in both directions. Few
answers have a large one by chance alone, so each comes with how often chance would give as large a one: values are
dealt anew to both sides. Bins are those of both sides together, so that dealing does not change them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10  # at most, of equally many values
LEAST = 5  # values in a bin, of the side that has fewer
WORDS = 50  # the most frequent tokens; all others count as one
DRAWS = 999  # shuffles of both sides, by which chance is told
PRIOR = 0.5  # added to each bin's count: one that is empty on one side has no finite ratio


@dataclass(frozen=True)
class Drift:
    """How far one distribution went from another.

    psi: population stability index. kl: KL(now || then), nats. chance: how probable so large an index is where nothing
    changed. then, now: how many values there were. means: of both; None for tokens.
    """

    psi: float
    kl: float
    chance: float
    then: int
    now: int
    means: tuple[float, float] | None = None


def drift_of_values(then: Sequence[float], now: Sequence[float], *, seed: int = 0) -> Drift | None:
    """Of one number per answer, such as lengths; None where either side has none."""
    if not (len(then) and len(now)):
        return None
    edges = bin_edges(np.concatenate([then, now]), min(len(then), len(now)))
    counts = [np.bincount(np.searchsorted(edges, side, side="right"), minlength=len(edges) + 1) for side in (then, now)]
    psi, kl = stability(*counts)
    generator, pooled = np.random.default_rng(seed), counts[0] + counts[1]
    shuffled = generator.multivariate_hypergeometric(pooled, len(then), size=DRAWS, method="marginals")
    by_chance = stability(shuffled, pooled - shuffled)[0]
    means = float(np.mean(then)), float(np.mean(now))
    return Drift(float(psi), float(kl), _share_of(by_chance, float(psi)), len(then), len(now), means)


def drift_of_tokens(
    then: Sequence[Sequence[Hashable]], now: Sequence[Sequence[Hashable]], *, seed: int = 0
) -> Drift | None:
    """Of the tokens that answers consist of: the WORDS most frequent ones, and all others together; None where either
    side has none.

    Chance shuffles whole answers, since the tokens of one are not independent of each other.
    """
    frequent = Counter(token for answer in (*then, *now) for token in answer).most_common(WORDS)
    column = {token: i for i, (token, _) in enumerate(frequent)}
    rows = np.zeros((len(then) + len(now), len(column) + 1), dtype=np.int64)
    for row, answer in zip(rows, (*then, *now), strict=True):
        for token, count in Counter(answer).items():
            row[column.get(token, len(column))] += count
    before, after = rows[: len(then)].sum(0), rows[len(then) :].sum(0)
    if not (before.sum() and after.sum()):
        return None
    psi, kl = stability(before, after)
    generator, total, few = np.random.default_rng(seed), rows.sum(0), min(len(then), len(now))
    smaller = np.stack([rows[generator.choice(len(rows), few, replace=False)].sum(0) for _ in range(DRAWS)])
    sides = (smaller, total - smaller) if few == len(then) else (total - smaller, smaller)
    by_chance = stability(*sides)[0]
    return Drift(float(psi), float(kl), _share_of(by_chance, float(psi)), int(before.sum()), int(after.sum()))


def bin_edges(values: np.ndarray, fewest: int) -> np.ndarray:
    """Where bins begin: up to BINS with equally many of the values, LEAST of `fewest`; and a value that fills a bin
    alone, such as the length at which answers are cut, has one of its own."""
    bins = min(BINS, max(2, fewest // LEAST))
    edges = np.quantile(values, np.arange(bins) / bins, method="higher")
    alone, counts = np.unique(values, return_counts=True)
    alone = alone[counts * bins >= len(values)]
    return np.unique(np.concatenate([edges, alone, np.nextafter(alone, math.inf)]))


def stability(then: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(population stability index, KL(now || then)) of counts (..., bins), of bins that either side has."""
    there = then + now > 0
    p, q = (np.where(there, counts + PRIOR, 0.0) for counts in (then, now))
    p, q = (side / side.sum(-1, keepdims=True) for side in (p, q))
    ratio = np.log(np.where(there, q, 1.0) / np.where(there, p, 1.0))
    return ((q - p) * ratio).sum(-1), (q * ratio).sum(-1)


def _share_of(by_chance: np.ndarray, psi: float) -> float:
    """How often chance gave as large an index, which is itself one of the draws."""
    return float((1 + np.count_nonzero(by_chance >= psi - 1e-12)) / (1 + len(by_chance)))

"""Drift and preference against figures by hand and by counting."""

import itertools
import math

import numpy as np
import pytest

from mohawk.measures.drift import bin_edges, drift_of_tokens, drift_of_values, stability
from mohawk.measures.paired import preference, sign_test, wilson


def test_the_index_by_hand():
    # with half a one more in each bin: (4, 2) of 6 and (1, 3) of 4; the third bin is empty on both sides
    psi, kl = stability(np.array([3.5, 1.5, 0]), np.array([0.5, 2.5, 0]))
    there = [(2 / 3, 1 / 4), (1 / 3, 3 / 4)]
    assert psi == pytest.approx(sum((q - p) * math.log(q / p) for p, q in there))
    assert kl == pytest.approx(sum(q * math.log(q / p) for p, q in there))


def test_bins_hold_equally_many_and_what_fills_one_has_its_own():
    assert bin_edges(np.arange(100), 100).tolist() == list(range(0, 100, 10))
    edges = bin_edges(np.array([*range(50), *[60] * 50]), 10)  # two bins, and one of the answers that were cut
    assert edges.tolist() == [0, 60, np.nextafter(60, math.inf)]
    assert drift_of_values([60] * 8, [60] * 50).psi == 0
    assert drift_of_values([60] * 8, [61] * 50).chance == 0.001


def test_chance_is_how_often_a_deal_gives_as_large_an_index():
    then, now = [1, 1, 1, 2], [2, 2, 2, 2]
    index = {}
    for chosen in itertools.combinations(range(8), 4):
        side = [(then + now)[i] for i in chosen]
        first = np.array([side.count(1), side.count(2)])
        index[chosen] = stability(first, np.array([3, 5]) - first)[0]
    exact = np.mean([value >= index[0, 1, 2, 3] - 1e-12 for value in index.values()])
    assert drift_of_values(then, now).chance == pytest.approx(exact, abs=0.03) and exact == pytest.approx(1 / 7)


def test_chance_is_even_where_nothing_changed_and_small_where_something_did():
    draw = np.random.default_rng(0)
    chances = [drift_of_values(draw.normal(size=60), draw.normal(size=90)).chance for _ in range(60)]
    assert 0.3 < np.mean(np.array(chances) <= 0.5) < 0.7
    assert drift_of_values(draw.normal(size=60), draw.normal(1.5, size=90)).chance == 0.001
    assert drift_of_values([], [1.0]) is None and drift_of_tokens([[1]], [[]]) is None
    # an answer that says one word over and over is one answer: its words are not independent of each other
    once = drift_of_tokens([list("abcdefgh")] * 8, [*[list("abcdefgh")] * 8, ["a"] * 64])
    all_ = drift_of_tokens([list("abcdefgh")] * 8, [["a"] * 8] * 9)
    assert once.chance > 0.4 and once.psi > 0.25 and all_.chance == 0.001


def test_preference_by_hand():
    found = preference([(2, 1), (1, 1), (0, 1), (3, None), (None, None), (5, 2)])
    assert (found.wins, found.ties, found.losses, found.rate) == (3, 2, 1, 4 / 6)
    assert (found.difference, found.error) == (0.75, pytest.approx(math.sqrt(35 / 12 / 4)))  # of 1, 0, -1, 3
    assert found.chance == sign_test(3, 1) == 10 / 16  # 2 (1 + 4) of 16
    low, high = wilson(0.9, 10)
    for end in (low, high):  # where the share lies that many standard errors off
        assert abs(0.9 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 10))
    assert wilson(1, 5)[1] == 1 and wilson(1, 5)[0] == pytest.approx(0.5655, abs=1e-4)
    with pytest.raises(ValueError, match="no question"):
        preference([])

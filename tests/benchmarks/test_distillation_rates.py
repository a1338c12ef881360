"""Methods of distillation, each at its best rate: where the grid goes on, what is chosen, and the table."""

import math

import pytest

from benchmarks.models.distillation_rates import (
    EXTENSIONS,
    RATES,
    SMALL,
    best_rate,
    draw_rates,
    next_rate,
    small_recipe,
    spread,
    swept,
    swept_table,
)


def world(best: float, rates: list):
    """Runs whose KL is lowest at a rate on held-out text, and lower still at every higher one on the other."""

    def run(rate: float, seed: int) -> dict:
        rates.append((rate, seed))
        held = abs(math.log(rate / best)) + 0.1
        other = {"kl": 1 / rate + seed, "perplexity_ratio": 2.0, "top1_agreement": 0.5}
        return {"held_out": {"kl": held}, "evaluation": other}

    return run


@pytest.mark.parametrize("best, at_end", [(1e-3, False), (9e-3, False), (1e-4, False), (1.0, True)])
def test_the_grid_goes_on_until_the_best_lies_within(best, at_end):
    asked: list = []
    row = swept("JSD", world(best, asked))
    rates = {rate for rate, seed in asked if seed == 0}
    assert set(RATES) <= rates and len(rates) <= len(RATES) + EXTENSIONS
    assert row["at_end"] == at_end
    assert row["learning_rate"] == min(rates, key=lambda rate: abs(math.log(rate / best)))
    assert [(rate, seed) for rate, seed in asked if seed] == [(row["learning_rate"], 1), (row["learning_rate"], 2)]
    assert spread(row, "kl") == pytest.approx((1 / row["learning_rate"] + 1, 1))


def test_a_rate_that_diverged_is_not_the_best():
    found = {3e-4: 2.0, 1e-3: math.inf, 3e-3: math.nan}
    assert best_rate(found) == 3e-4 and next_rate(found) == 1e-4


def test_table_and_plot(tmp_path):
    rows = [swept(method, world(1e-3, [])) for method in ("KD, T 1", "JSD")]
    about = {"starts": {"far": {"layers": [0, 2], "scale": 3.0, "before": 9.5}}}
    lines = swept_table("far", about, rows)
    assert lines[0] == "**Far**: layers 0, 2, logits times 3.0; KL 9.50 before training"
    assert lines[-1] == "| JSD | 1001.000 ± 1.000 | 2.000 ± 0.000 | 50.0% ± 0.0% | 0.001 |"
    draw_rates({"far": rows, "near": rows}, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", SMALL)
def test_every_method_is_a_recipe(method, tmp_path):
    from benchmarks.models.distillation_rates import METHODS

    stage = {**METHODS[method], "learning_rate": 1e-3}
    recipe = small_recipe("teacher", "student", {"train": ["a.txt"]}, stage, 1024, 2, tmp_path / "run")
    assert recipe.seed == 2 and recipe.stages[0].steps() == 2

"""The ablation of phases: equal tokens, a rate chosen on other text than the table's, and what is said of seeds."""

import argparse
import statistics

import pytest

from benchmarks.models.ablation import (
    SCHEDULES,
    Progress,
    Run,
    all_rows,
    decoding,
    decoding_table,
    draw,
    row,
    settings_for,
    summary,
    table,
)
from mohawk.conversion.recipe import Recipe
from mohawk.schema.files import shipped


@pytest.mark.parametrize("tokens", [6144, 1e6])
@pytest.mark.parametrize("phases", SCHEDULES)
@pytest.mark.parametrize("mixer", ["mamba2", "gated_delta"])
def test_every_schedule_reads_as_many_tokens(mixer, phases, tokens, tmp_path):
    recipe = Recipe.load(shipped("demo"), settings_for(Run(mixer, phases, 2.0, 3), tokens, tmp_path / "run"))
    active = dict(recipe.phases.active())
    assert list(active) == [name for name in SCHEDULES[phases] if name != "calibration"]
    solved = getattr(active.get("hidden"), "solve_tokens", 0) + (recipe.student.calibration_tokens or 0)
    assert sum(phase.tokens for phase in active.values()) + solved == pytest.approx(tokens, abs=2)
    assert (recipe.student.init == "calibrated") == phases.startswith("calibrated")
    assert recipe.seed == 3 and recipe.student.mixer == mixer
    before = Recipe.load(shipped("demo")).phases
    for name, phase in active.items():
        assert phase.learning_rate == pytest.approx(2 * getattr(before, name).learning_rate)


def results(kl: float, held_out: float) -> dict:
    """A run's results.json, as far as it is read."""

    def stage(kl, held_out):
        return {
            name: {"kl": value, "perplexity_ratio": 1 + value, "top1_agreement": 1 - value}
            for name, value in (("evaluation", kl), ("held_out", held_out))
        }

    return {
        "evaluation": {"before": stage(2.0, 2.5), "end_to_end": stage(kl, held_out)},
        "phases": {"end_to_end": {"tokens": 512}},
        "machine": {"devices": ["cpu: x"]},
    }  # fmt: skip


def rows_of(seeds=3):
    """Of a made-up world in which rate 1 is best on held-out text and rate 2 on the other."""
    made = []

    def do(run: Run) -> dict:
        made.append(run)
        held_out = {0.5: 0.4, 1.0: 0.3, 2.0: 0.5}[run.rate]
        kl = {0.5: 0.4, 1.0: 0.3, 2.0: 0.2}[run.rate] + 0.01 * run.seed + 0.1 * (run.mixer == "mamba2")
        return row(run, results(kl, held_out))

    options = argparse.Namespace(
        mixers=["mamba2", "gated_delta"], schedules=list(SCHEDULES), rates=[0.5, 1.0, 2.0], seeds=seeds, tokens=65536
    )
    total = 2 * len(SCHEDULES) * (2 + seeds)
    rows = all_rows(options, do, Progress(total))
    assert len(made) == len(set(made)) == len({run.name for run in made}) == total
    return rows


def test_the_rate_is_chosen_on_text_that_the_table_does_not_show(capsys):
    lines = summary(rows_of())
    assert [(line["mixer"], line["phases"]) for line in lines] == [
        (mixer, phases) for mixer in ("mamba2", "gated_delta") for phases in SCHEDULES
    ]
    values = [0.4, 0.41, 0.42]
    assert all(line["rate"] == 1.0 and line["seeds"] == 3 for line in lines)
    assert lines[0]["kl"]["values"] == pytest.approx(values)
    assert lines[0]["kl"]["mean"] == pytest.approx(0.41)
    assert lines[0]["kl"]["deviation"] == pytest.approx(statistics.stdev(values))
    text = "\n".join(table(lines, 65536))
    assert "| mamba2 | 2-3 | 1 of 0.5, 1, 2 | 3 | 0.4100 ± 0.0100 | 1.410 ± 0.010 | 59.0% ± 1.0% | 2.00 |" in text
    assert "mean ± standard deviation over seeds" in text
    assert "run 60 of 60: gated_delta-calibrated-1-2-3-rate-1-seed-2" in capsys.readouterr().out


def test_one_seed_has_no_spread(tmp_path):
    lines = summary(rows_of(seeds=1))
    assert "| gated_delta | 3 | 1 of 0.5, 1, 2 | 1 | 0.3000 | 1.300 | 70.0% | 2.00 |" in table(lines, 65536)
    assert "one seed" in table(lines, 65536)[0]
    pytest.importorskip("matplotlib")
    draw(lines, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_decoding_is_the_median_of_its_rounds():
    def speed(tokens_per_s, factor=1):
        return [{"context": n, "tokens_per_s": tokens_per_s, "state_bytes": factor * n * 1000} for n in (512, 4096)]

    student = [speed(19.0), speed(3.0), speed(20.0)]  # the second under load
    found = decoding({"teacher": [speed(40.0, 2)] * 3, "mamba2": student, "gated_delta": [speed(20.0)] * 3})
    assert found["mamba2"][1] == {"context": 4096, "state_bytes": 4096000, "tokens_per_s": 19.0}
    assert decoding_table(found) == [
        "| one sequence | tokens/s after 512 | tokens/s after 4,096 | state after 512 | state after 4,096 |",
        "|---|---:|---:|---:|---:|",
        "| teacher | 40.0 | 40.0 | 1.0 MB | 8.2 MB |",
        "| mamba2 | 19.0 | 19.0 | 0.5 MB | 4.1 MB |",
        "| gated_delta | 20.0 | 20.0 | 0.5 MB | 4.1 MB |",
    ]


def test_what_is_left_is_estimated_from_the_runs_that_were_made(capsys):
    times = iter([0, 100, 100, 101, 200, 500])
    progress = Progress(10, clock=lambda: next(times))
    for seed in range(3):  # 100 s, one that was there, 300 s
        progress(Run("mamba2", "3", 1.0, seed), lambda: {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "run 1 of 10: mamba2-3-rate-1-seed-0"
    assert second.endswith("; about 15 minutes for what is left")  # 9 of 100 s
    assert third.endswith("; about 13 minutes for what is left")

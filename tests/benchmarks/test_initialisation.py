"""The starts that are compared: each is one that its mixer has."""

import json
import sys

import pytest

from benchmarks.models.initialisation import MIXERS, STAGES, main, recipe_for
from mohawk.conversion.plan import student_options
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher


@pytest.mark.parametrize("mixer, start", [(mixer, start) for mixer, starts in MIXERS.items() for start in starts])
def test_every_start_can_be_made(mixer, start, monkeypatch, tmp_path):
    monkeypatch.setattr("mohawk.demo.fetch.smollm2", lambda: tmp_path)
    monkeypatch.setattr("mohawk.demo.run.local_settings", lambda teacher: [])
    recipe = recipe_for(mixer, start, 6144, 18432, tmp_path / "run")
    solved = recipe.phases.hidden.solve_tokens + (recipe.student.calibration_tokens or 0)
    assert recipe.phases.hidden.tokens + solved == 18432
    options = student_options(recipe.student) | {"ssm_layers": [1]}
    student = hybrid_from_teacher(tiny_teacher(), **options)
    assert student.config.mixer_of(1) == mixer
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


@pytest.mark.parametrize("mixing, runs", [(2048, ["kimi_delta-calibrated"]), (4096, None)])
def test_rows_are_kept_when_asked(mixing, runs, monkeypatch, tmp_path):
    """What is there of as many tokens is not run again, and stays in the table."""
    starts = [(mixer, start) for mixer, several in MIXERS.items() for start in several]
    found = {
        stage: {"evaluation": {"kl": 1, "perplexity_ratio": 2, "top1_agreement": 0.5, "tokens": 9}} for stage in STAGES
    }
    made = []

    def convert(recipe):
        made.append(recipe.output.name)
        recipe.output.mkdir(parents=True)
        results = {"evaluation": found, "phases": {}, "machine": "here"}
        (recipe.output / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr("mohawk.conversion.run.convert", convert)
    monkeypatch.setattr("mohawk.demo.fetch.smollm2", lambda: tmp_path)
    monkeypatch.setattr("mohawk.demo.run.local_settings", lambda teacher: [])
    kept = [
        {"mixer": mixer, "start": start, "kl": dict.fromkeys(STAGES, 3.0), "ratio": 4, "top1_agreement": 0.25}
        for mixer, start in starts[:-1]
    ]
    results = tmp_path / "results"
    results.mkdir()
    (results / "initialisation.json").write_text(
        json.dumps({"about": {"mixing": 2048.0, "hidden": 8192.0}, "rows": kept})
    )
    words = ["--keep", "--mixing", str(mixing), "--runs", str(tmp_path / "runs"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["initialisation.py", *words])
    main()
    rows = json.loads((results / "initialisation.json").read_text())["rows"]
    assert [(row["mixer"], row["start"]) for row in rows] == starts
    assert len(made) == len(starts) if runs is None else made == runs
    assert [row["kl"]["hidden"] for row in rows] == [1 if runs is None else 3.0] * (len(starts) - 1) + [1]

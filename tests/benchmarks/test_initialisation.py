"""The starts that are compared: each is one that its mixer has."""

import pytest

from benchmarks.models.initialisation import MIXERS, recipe_for
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

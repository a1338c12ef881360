"""The layout of a run's folder: every name in it, in one place.

recipe.yaml, run.json, .lock     what the run is made of; what it is bound to; who works on it
metrics.jsonl, log.txt           every logged step; what it said
phases/NAME/                     checkpoints of a phase, round or stage, and its `student`; of some stages the `base`
                                 that an adapter is for, and the `adapter`
evaluation/NAME.json             measured before and after each; `tasks` and `again` by `mohawk evaluate`
results.json, report.md, plots/  what came of it
student/                         the last one
composed.json                    which run's phases a composed run goes on from
selection.json, selection/       the ranking of `mohawk select`, and every measurement of it
"""

from __future__ import annotations

from pathlib import Path

RECIPE = "recipe.yaml"
RUN_FILE = "run.json"
LOCK = ".lock"
METRICS = "metrics.jsonl"
LOG = "log.txt"
STUDENT = "student"
RESULTS = "results.json"
REPORT = "report.md"
COMPOSED = "composed.json"
SELECTION = "selection.json"
MEASURED = "selection/measured.jsonl"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and not one that a recipe happens to lie in."""
    return has_recipe(folder) and any((folder / name).is_file() for name in (RUN_FILE, LOCK))


def has_recipe(folder: Path) -> bool:
    """Whether a folder holds a run's recipe."""
    return (folder / RECIPE).is_file()


def phase_folder(run: Path, name: str) -> Path:
    """Where a phase, round or stage keeps its checkpoints and students."""
    return run / "phases" / name


def phase_student(run: Path, name: str) -> Path:
    """The student that a phase left."""
    return phase_folder(run, name) / STUDENT


def evaluation_file(run: Path, name: str) -> Path:
    """What was measured after a phase, or under another name."""
    return run / "evaluation" / f"{name}.json"


def tasks_file(run: Path) -> Path:
    """What `mohawk evaluate --tasks` found, kept apart since a run can do without."""
    return evaluation_file(run, "tasks")


def again_file(run: Path) -> Path:
    """What `mohawk evaluate` measured once more."""
    return evaluation_file(run, "again")


def plot_file(run: Path, name: str) -> Path:
    """A picture of the report."""
    return run / "plots" / f"{name}.png"

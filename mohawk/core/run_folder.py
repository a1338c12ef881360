"""The layout of a run's folder: every name in it, in one place.

recipe.yaml, run.json, .lock     what the run is made of; what it is bound to; who works on it
metrics.jsonl, log.txt           every logged step; what it said
phases/NAME/                     checkpoints of a phase, round or stage, and its `student`; of some stages the `base`
                                 that an adapter is for, and the `adapter`
rounds/N/                        of a round of pruning: the sum of what it begins with, units' and layers' scores, its
                                 search (and phases/ of the candidates' healing), and its cut
matrices/NAME.safetensors        of a stage: mixing matrices, for pictures
evaluation/NAME.json             measured before and after each; `tasks` and `again` by `mohawk evaluate`, `quantized`
                                 by `mohawk quantize`
vocabulary.json                  which tokens a pruning kept, and why
results.json, report.md,         what came of it
report.html, plots/
student/                         the last one
export/TARGET/                   the last one for another runtime, by `mohawk export`
quantized/FORMAT/                the last one with weights in fewer bits, by `mohawk quantize`
composed.json                    which run's phases a composed run goes on from
selection.json, selection/       the ranking of `mohawk select`, and every measurement of it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

RECIPE = "recipe.yaml"
RUN_FILE = "run.json"
LOCK = ".lock"
METRICS_FILE = "metrics.jsonl"
LOG = "log.txt"
STUDENT = "student"
BASE = "base"
ADAPTER = "adapter"
PHASES = "phases"
ROUNDS = "rounds"
BEGINS_WITH = "begins_with.json"  # this and the four below in a round's folder
IMPORTANCE = "importance.safetensors"
LAYERS = "layers.json"
SEARCH = "search.json"
CUT = "cut.json"
MATRICES = "matrices"
VOCABULARY = "vocabulary.json"
PLOTS = "plots"
RESULTS = "results.json"
REPORT = "report.md"
PAGE = "report.html"
COMPOSED = "composed.json"
SELECTION = "selection.json"
MEASURED = "selection/measured.jsonl"
SUMMED = (  # every file that is written at once and whole, with its sum beside it
    RECIPE, RUN_FILE, RESULTS, REPORT, PAGE, SELECTION, COMPOSED, VOCABULARY, f"{MATRICES}/*.safetensors",
    f"{PLOTS}/*.png", "evaluation/*.json", f"{ROUNDS}/*/*.json", f"{ROUNDS}/*/*.safetensors",
)  # fmt: skip
SUMMED_LINES = (METRICS_FILE, MEASURED)  # every file that grows by lines, with a checksum for each


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and not one that a recipe happens to lie in."""
    return has_recipe(folder) and any((folder / name).is_file() for name in (RUN_FILE, LOCK))


def has_recipe(folder: Path) -> bool:
    """Whether a folder holds a run's recipe."""
    return (folder / RECIPE).is_file()


def phase_folder(run: Path, name: str) -> Path:
    """Where a phase, round or stage keeps its checkpoints and students."""
    return run / PHASES / name


def phase_student(run: Path, name: str) -> Path:
    """The student that a phase left."""
    return phase_folder(run, name) / STUDENT


def left_by_phases(run: Path) -> list[Path]:
    """All checkpoints, students, adapters and what these are for; also those that are not finished."""
    return list(run.glob(f"{PHASES}/*/*"))


def round_folder(run: Path, number: int) -> Path:
    """Where a round of pruning, from 1, keeps what it measured and cut."""
    return run / ROUNDS / str(number)


def of_rounds(run: Path, name: str) -> Iterator[Path]:
    """The file of this name of each round that has one."""
    return run.glob(f"{ROUNDS}/*/{name}")


def matrices_file(run: Path, stage: str) -> Path:
    """The mixing matrices that were kept of a stage."""
    return run / MATRICES / f"{stage}.safetensors"


def evaluation_file(run: Path, name: str) -> Path:
    """What was measured after a phase, or under another name."""
    return run / "evaluation" / f"{name}.json"


def evaluation_files(run: Path) -> list[Path]:
    """All that was measured."""
    return list(run.glob("evaluation/*.json"))


def tasks_file(run: Path) -> Path:
    """What `mohawk evaluate --tasks` found, kept apart since a run can do without."""
    return evaluation_file(run, "tasks")


def again_file(run: Path) -> Path:
    """What `mohawk evaluate` measured once more."""
    return evaluation_file(run, "again")


def quantized_file(run: Path) -> Path:
    """What `mohawk quantize` measured of the student in each format."""
    return evaluation_file(run, "quantized")


def quantized_folder(run: Path, name: str) -> Path:
    """The student with its weights in that format."""
    return run / "quantized" / name


def plot_file(run: Path, name: str) -> Path:
    """A picture of the report."""
    return run / PLOTS / f"{name}.png"


def plot_names(run: Path) -> list[str]:
    """All pictures of the report, as a page in the run's folder names them."""
    return sorted(f"{PLOTS}/{path.name}" for path in (run / PLOTS).glob("*.png"))


def summed_files(run: Path) -> Iterator[Path]:
    """Every file that is written at once and whole, with its sum beside it."""
    yield from sorted(path for pattern in SUMMED for path in run.glob(pattern))


def has_lost_sum(path: Path) -> bool:
    """Whether a file without a sum, or without checksums of its lines, had one: it is part of a run whose run.json says
    that all are written with theirs, which runs that an earlier version began do not."""
    for run in list(path.absolute().parents)[:3]:
        named = path.absolute().relative_to(run)
        if any(
            len(named.parts) == pattern.count("/") + 1 and named.match(pattern) for pattern in SUMMED + SUMMED_LINES
        ):
            try:
                told = json.loads((run / RUN_FILE).read_bytes())
            except (FileNotFoundError, ValueError, RecursionError):  # no run, or a damaged file, which others tell
                continue
            if isinstance(told, dict) and told.get("sums") is True:
                return True
    return False


def summed_folders(run: Path) -> Iterator[Path]:
    """Every folder that has a manifest: what phases left, the last student, and what was made of it."""
    left = [path for name in (STUDENT, "checkpoint-*", ADAPTER, BASE) for path in run.glob(f"{PHASES}/*/{name}")]
    made = [run / STUDENT, run / PLOTS / "matrices", *run.glob("export/[!.]*"), *run.glob("quantized/[!.]*")]
    yield from sorted(path for path in (*made, *left) if path.is_dir())

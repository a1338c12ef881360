"""Whose a run's folder is: one recipe's, and one program's at a time.

Everything a run makes lies in its folder, each part whole or absent, so the same command goes on where a stopped run
was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mohawk.core.folders import drop_file, locked, why_altered
from mohawk.core.json_files import write_text
from mohawk.core.lines import sums_of
from mohawk.core.processes import on_first
from mohawk.core.run_folder import (
    METRICS_FILE,
    RECIPE,
    ROUNDS,
    RUN_FILE,
    STUDENT,
    left_by_phases,
    phase_folder,
    phase_student,
    summed_files,
)
from mohawk.errors import UserError
from mohawk.runs.binding import bound, write_bound
from mohawk.schema.base import Phase, RecipeFile, sections
from mohawk.training.saving import is_over

log = logging.getLogger(__name__)

# What may change when a stopped run goes on: what does not decide what the steps so far meant,
CHANGEABLE = (
    "device",
    "sharding.kind",
    "sharding.within",
    "sharding.stages",
    "activation_checkpointing",
    ".save_every",
    ".save_minutes",
    ".keep_checkpoints",
    ".log_every",
    ".decode_tokens",
    ".contexts",
    ".prompt",
    ".continuation_tokens",
)
UNTIL_FINISHED = (".learning_rate", ".max_grad_norm")  # and in a phase that still has steps to come, or has to begin
PLACES = ("output", "data.cache")  # a moved run is the same run


@contextmanager
def claimed(run: Path, recipe: RecipeFile) -> Iterator[None]:
    """Within the block the folder is this recipe's and this process's, or this program's in several processes.

    recipe: of any kind.

    Raises:
        UserError: the folder is another recipe's, another program's, in use, or cannot be written.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_claimed(run, recipe)))
        yield


@contextmanager
def _claimed(run: Path, recipe: RecipeFile) -> Iterator[None]:
    written = run / RECIPE
    with ExitStack() as stack:
        changed = check_folder(run, recipe)
        anew = bool(changed) and not _trained(run)
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run))
            if anew and _trained(run):
                raise UserError(f"output: another process has trained in {run} meanwhile; choose another output")
            if anew:
                _forget(run)
            write_bound(run, recipe)  # first: of the two it is the one to go by
            write_text(written, recipe.to_yaml())
        except OSError as error:
            raise UserError(f"output: {run} cannot be written ({error.strerror}); choose another output") from error
        if changed:
            how = "beginning anew, as nothing was trained" if anew else "resuming"
            log.info("%s; changed since the last start: %s", how, ", ".join(changed))
        yield


def check_folder(run: Path, recipe: RecipeFile) -> list[str]:
    """Dotted names of the fields that differ from the recipe already in `run`; nothing is written.

    Raises UserError where `claimed` would refuse the folder.
    """
    refuse_unwritable(run)
    return _changes(run, recipe)


def refuse_unwritable(run: Path) -> None:
    """UserError where there is no place for a run's folder."""
    there = next(place for place in (run, *run.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"output: {run} cannot be written, as {there} is no folder to write into; choose another output"
        )


def _changes(run: Path, recipe: RecipeFile) -> list[str]:
    """Dotted names of the fields that differ from the recipe already in `run`.

    Raises UserError if the folder holds something else, another kind of run, or a run that cannot be resumed with these
    differences.
    """
    if not any((run / name).is_file() for name in (RECIPE, RUN_FILE)):
        if run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"output: {run} exists and is not a run of mohawk; choose another output")
        return []
    old = _written(run, type(recipe))
    changed = _changed(old, recipe)
    if not _trained(run):  # such as one that died of a path that is mended now
        return changed
    fixed = [name for name in changed if not (_changeable(run, recipe, name) or _same_rows(old, recipe, name))]
    if fixed:
        raise UserError(
            f"output: {run} holds a run that was started with another {', '.join(fixed)}; choose another output, or "
            "delete the folder to start over"
        )
    return changed


def _trained(run: Path) -> bool:
    """Whether there is anything in a run that the text was trained on or scored by, whole or not."""
    left = (path for path in (*left_by_phases(run), *run.glob(f"{ROUNDS}/*")) if not path.name.startswith("."))
    return (run / STUDENT).exists() or any(left)


def _forget(run: Path) -> None:
    """Delete what a run that trained nothing has measured: of another recipe it may be another value."""
    for path in list(summed_files(run)):
        if path.name not in (RECIPE, RUN_FILE):
            drop_file(path)
    for path in (run / METRICS_FILE, sums_of(run / METRICS_FILE)):  # of steps that no checkpoint holds
        path.unlink(missing_ok=True)


def _written(run: Path, kind: type) -> Any:
    """The recipe of the run that is there: run.json's, which no one edits; of an earlier version's run, recipe.yaml."""
    path, known = run / RECIPE, bound(run)
    if known is not None and path.is_file() and (problem := why_altered(path)) is not None:
        log.warning("%s %s; going by %s", path, problem, RUN_FILE)
    try:
        return kind.load(path) if known is None else kind.from_dict(known["recipe"])
    except UserError as error:
        line = str(error).splitlines()[0]
        if known is None and path.is_file() and not path.read_bytes().strip():
            raise UserError(f"output: {path} is empty; put the run's recipe there, or choose another output") from error
        raise UserError(f"output: {run} holds a run of another kind ({line}); choose another output") from error


def _changeable(run: Path, recipe: RecipeFile, name: str) -> bool:
    """Whether a field of a run's recipe, by its dotted name, may differ from what it was."""
    if name.endswith(UNTIL_FINISHED):
        section = name.rpartition(".")[0]
        order = list(steps := recipe.trained())
        which = next((step for step in reversed(order) if steps[step][0] == section), None)
        if which is None or section in recipe.held_fast(run):
            return False
        # with a later one's student this one is not trained again, wherever its own has gone
        trained = any(phase_student(run, step).exists() for step in order[order.index(which) :])
        return not trained and not is_over(phase_folder(run, which), steps[which][1])
    return name in PLACES or name.endswith(CHANGEABLE)


def _same_rows(old: Any, new: Any, name: str) -> bool:
    """Whether a field of a phase only cuts a step's rows otherwise, as one does when memory is short."""
    at, _, field = name.rpartition(".")
    if field not in ("batch_size", "gradient_accumulation"):
        return False
    before, now = (dict(sections(recipe)).get(at) for recipe in (old, new))
    return isinstance(before, Phase) and isinstance(now, Phase) and before.rows == now.rows


def _changed(old: Any, new: Any) -> list[str]:
    """Dotted names of the fields that differ: `stages.0.tokens`, or `number of stages` where that differs."""

    def walk(before: Any, after: Any, at: str) -> Iterator[str]:
        inside = f"{at}." if at else ""
        if isinstance(before, dict) and isinstance(after, dict):
            for key in before.keys() | after.keys():
                yield from walk(before.get(key), after.get(key), f"{inside}{key}")
        elif _mappings(before) and _mappings(after) and len(before) == len(after):
            for i, pair in enumerate(zip(before, after, strict=True)):
                yield from walk(*pair, f"{inside}{i}")
        elif before != after:
            lists = _mappings(before) and _mappings(after)
            yield f"number of {at}" if lists else at

    return sorted(walk(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def _mappings(value: Any) -> bool:
    """Whether it is a list of sections, as stages are, rather than one of numbers or words."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)

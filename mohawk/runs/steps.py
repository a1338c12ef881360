"""The steps of a run, one after another, each of which leaves a student in a folder of its own.

A finished step is its `student/` folder, an unfinished one has checkpoints.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mohawk.core.folders import (
    about_of,
    drop_file,
    is_complete,
    is_made_of_others,
    made_of,
    weights_sum,
    write_whole,
)
from mohawk.core.processes import from_first, is_first, on_first, together, wish
from mohawk.core.run_folder import RESULTS, STUDENT, evaluation_file, phase_folder, phase_student
from mohawk.data.packing import collate
from mohawk.errors import UserError
from mohawk.loading.models import load_teacher
from mohawk.loading.nonfinite import refuse_nonfinite
from mohawk.loading.parts import FILE_BYTES, write_in_parts
from mohawk.loading.remote_code import add_code
from mohawk.loading.tasks import CAUSAL, task_in
from mohawk.models.sharding import is_sharded
from mohawk.runs.binding import of_this_run, record_of
from mohawk.runs.context import RunContext, measure_stage
from mohawk.runs.report import finish
from mohawk.runs.sharding import MOST, device_bytes
from mohawk.training.objective import Objective
from mohawk.training.saving import is_over
from mohawk.training.trainer import PhaseTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What a run does next.

    Attributes:
        name: phases/<name>/ is its folder.
        take: the student after it, from the one before it (None: there is none yet) and the name of the step before.
        settings: what it trains by; None: it does not train.
        beside: what it leaves besides its student; whole folders.
        needed: that it is done again when its student is lost, even where later steps are finished.
        then: what becomes of the student once it was measured; the next step begins with what this gives.
    """

    name: str
    take: Callable[[Any, str | None], PreTrainedModel]
    settings: Any = None
    beside: Sequence[Path] = ()
    needed: bool = False
    then: Callable[[PreTrainedModel], Any] | None = None


def take_steps(
    run: RunContext,
    steps: Sequence[Step],
    student: Any,
    *,
    keep: Callable[[str, PreTrainedModel], None] | None = None,
    begun_elsewhere: bool = False,
) -> Any:
    """Take every step that is not finished, measure every student once, and give the last one.

    student: what the first step begins with; None: the teacher. keep: see `measure_stage`. begun_elsewhere: finished
    steps were another run's, so that what is lost of them cannot be made again here. Raises UserError where a step was
    made of another student than the one before it has now.
    """
    from_first(lambda: _refuse_replaced(run, steps))
    finished = max((i for i, step in enumerate(steps) if is_taken(run, step.name)), default=-1)
    names, reached = [step.name for step in steps], True  # whether `student` is what the next step begins with
    for i, step in enumerate(steps):
        before = names[i - 1] if i else None
        lost = _lost(run, step) if i <= finished else []
        anew = i > finished or bool(lost) and step.needed
        if anew or lost and not begun_elsewhere and _is_made_again(run, step, names, lost, reached):
            if anew:
                _forget(run, step.name)  # what was measured of a student that was deleted or damaged since
            student, reached = step.take(student, before), True
            write_student(run, step.name, student, before)
        elif phase_student(run.folder, step.name) not in lost:
            student, reached = load_student(run, step.name), True
        else:
            reached = False
            continue
        gc.collect()  # an optimizer's state, say, before the evaluation that follows
        measure_stage(run, step.name, student, keep)
        if step.then is not None:
            student = step.then(student)
            gc.collect()
    return student


def train(
    run: RunContext,
    name: str,
    phase: Any,
    objective: Objective,
    rows: Any,
    before: str | None,
    *,
    section: str,
    report_to: Sequence[str] = (),
) -> None:
    """Train a phase to its end, or go on with it.

    rows: the dataset. before: the step before, if any. section: where its settings stand in the recipe.
    """
    asked, told = run.recipe.activation_checkpointing, wish()
    recompute = name in run.recompute if asked == "auto" else asked
    set_checkpointing(objective.student, recompute or told is not None and told.activation_checkpointing)
    trainer = PhaseTrainer(
        objective, name=name, phase=phase, run_dir=run.folder, train_dataset=rows,
        collate=getattr(rows, "collate", collate),
        precision=run.recipe.precision, device=run.recipe.device, seed=run.recipe.seed, report_to=report_to,
        origin=from_first(lambda: _origin(run, before)), section=section,
    )  # fmt: skip
    begin = time.monotonic()
    trainer.train_phase()
    log.info("%s: %.0f s", name, time.monotonic() - begin)
    for parameter in objective.student.parameters():
        parameter.grad = None


def set_checkpointing(student: Any, on: bool) -> None:
    """Whether the layers of a student compute their insides again in the backward pass. Raises UserError where its
    class cannot."""
    if on and not student.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing: got true, which {type(student).__name__} does not support; set it to false"
        )
    if on:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        student.gradient_checkpointing_disable()


def is_taken(run: RunContext, step: str) -> bool:
    """Whether a step's student is there, and this run's; the same on all processes. Raises UserError for another's."""

    def complete() -> bool:
        folder = phase_student(run.folder, step)
        if not is_complete(folder):
            return False
        if not of_this_run(run.folder, about_of(folder)):
            raise UserError(f"{folder}: is of another run; put this one's back, or delete it to train the phase again")
        return True

    return from_first(complete)


def load_student(run: RunContext, step: str) -> PreTrainedModel:
    """A finished step's student, which trains on."""
    folder = phase_student(run.folder, step)
    found = load_teacher(
        folder, device=run.device, spread=run.spread_student, who="student", task=task_in(run.recipe)
    )  # fmt: skip
    return found.requires_grad_(True)


def whole_models(
    run: RunContext,
    student: PreTrainedModel,
    *,
    corrected: Path | None = None,
    folder: Path | str | None = None,
    dtype: str = "auto",
) -> tuple[PreTrainedModel, Any] | None:
    """Student and teacher (None where a run has none) as one process has them, for the first one to measure; models in
    parts are read again from their files. None where they do not fit into its memory.

    corrected: the teacher's folder, where it is not the recipe's any more. folder, dtype: the student's; default the
    run's final one, as it was saved.
    """
    if run.parts is None:
        return student, run.teacher
    models = [student] if run.teacher is None else [student, run.teacher]
    needed = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    if needed > MOST * device_bytes(run.device):
        return None
    about, teacher = run.recipe.teacher, None
    if about is not None:
        named = (about.model, about.where) if corrected is None else (corrected, {})
        teacher = load_teacher(named[0], dtype=about.dtype, device=run.device, **named[1])
    found = load_teacher(folder or run.folder / STUDENT, dtype=dtype, device=run.device, who="student")
    return found, teacher


def finish_run(run: RunContext, student: PreTrainedModel, **told: Any) -> None:
    """Measure the final student and write the report, on the first process. told: to `mohawk.runs.report.finish`."""
    if task_in(run.recipe) != CAUSAL:  # which writes no text
        finish(
            run.folder, run.recipe, student.eval(), run.teacher, run.tokenizer, run.console, whole=False, **told
        )  # fmt: skip
        return
    models = whole_models(run, student)
    student, teacher = models or (student, run.teacher)
    own = run.teacher_tokenizer
    if own is not None:
        told["student_tokenizer"] = run.tokenizer
    finish(
        run.folder, run.recipe, student.eval(), teacher, own or run.tokenizer, run.console, whole=models is not None,
        texts={} if own is not None else long_rows(run), **told,
    )  # fmt: skip


def long_rows(run: RunContext) -> dict[str, torch.Tensor]:
    """Up to two rows of each text that is held out, (rows, n) token ids laid end to end, as long as the evaluation's
    longest text or as all that there is; none where that is null."""
    longest, found = run.recipe.evaluation.longest, {}
    if longest is None:
        return found
    for name, kept in run.data.held_out(longest, 2 * longest, run.pad).items():
        rows = [kept[i] for i in range(min(2, len(kept)))] if name in ("held_out", "evaluation") else []
        if full := [row["input_ids"] for row in rows if row["segment_ids"][-1] >= 0]:  # without padding
            found[name] = torch.stack(full)
    return found


def write_student(run: RunContext, step: str, student: PreTrainedModel, before: str | None) -> None:
    """A step's student; all processes must ask. Raises UserError, and leaves what is there, where a weight is not
    finite."""
    _write(run, phase_student(run.folder, step), student, before)


def write_final(run: RunContext, student: PreTrainedModel, last: str | None, tokenizer: Any = None) -> None:
    """The run's student, made of the one that the step `last` left, with its tokenizer. Raises as `write_student`."""
    _write(run, run.folder / STUDENT, student, last, tokenizer or run.tokenizer)


def is_final(run: RunContext, last: str | None, *, same_weights: bool = True) -> bool:
    """Whether the run's student is whole, and made of the one that the step `last` left.

    same_weights: how one of an earlier version shows that, which does not say what it is made of.
    """
    final = run.folder / STUDENT
    if not is_complete(final):
        return False
    if about := about_of(final):
        return about.get("from") == _origin(run, last).get("from")
    return not same_weights or last is None or weights_sum(final) == weights_sum(phase_student(run.folder, last))


def write_plain(model: PreTrainedModel, folder: Path) -> None:
    """A model in a folder of its own; all processes must ask."""
    _write_whole(model, folder, {}, lambda partial: None)


def _write(run: RunContext, folder: Path, student: PreTrainedModel, before: str | None, tokenizer: Any = None) -> None:
    def complete(partial: Path) -> None:
        add_code(partial, student)
        if tokenizer is not None:  # a student to be used
            drop_file(run.folder / RESULTS)  # speeds and continuations of an earlier one
            tokenizer.save_pretrained(partial)

    _write_whole(student, folder, from_first(lambda: _origin(run, before)), complete)


def _write_whole(model: PreTrainedModel, folder: Path, about: dict[str, Any], complete: Callable[[Path], None]) -> None:
    """A model's folder; complete: puts what else belongs to it there. Raises UserError, and leaves what is there, where
    a weight is not finite."""

    def check() -> None:
        refuse_nonfinite(model, f"{folder}: this student", "it is not written; lower the learning rate")

    def write() -> None:
        check()
        with write_whole(folder, replace=True, about=about) as partial:
            model.save_pretrained(partial, max_shard_size=FILE_BYTES)
            complete(partial)

    if not is_sharded(model):
        on_first(write)
        return
    check()
    with contextlib.ExitStack() as stack:  # of the first process
        writing = write_whole(folder, replace=True, about=about)
        partial = together(lambda: stack.enter_context(writing) if is_first() else None)
        write_in_parts(model, partial)
        together(lambda: partial and complete(partial))
        together(stack.close)


def _origin(run: RunContext, before: str | None) -> dict[str, Any]:
    """What a step's checkpoints and student are of: this run, its inputs, the weights that the step before left."""
    of = record_of(run.folder)
    return of if before is None else of | made_of(phase_student(run.folder, before))


def _refuse_replaced(run: RunContext, steps: Sequence[Step]) -> None:
    """UserError where a finished step went on from another student than the step before it has now, as where a folder
    was copied in its place."""
    for before, step in itertools.pairwise(steps):
        earlier, later = (phase_student(run.folder, one.name) for one in (before, step))
        # one that is needed may have been trained again meanwhile, which a GPU does not do bit for bit
        if before.needed or not (is_complete(earlier) and is_complete(later)):
            continue
        if is_made_of_others(later, earlier):
            raise UserError(
                f"{later}: was made of another student than {earlier} is now; put back the one that it was made of, or "
                f"delete {later.parent} to train {step.name} again"
            )


def _lost(run: RunContext, step: Step) -> list[Path]:
    """What a step left that is missing or damaged."""
    lost = [] if is_taken(run, step.name) else [phase_student(run.folder, step.name)]
    return lost + from_first(lambda: [folder for folder in step.beside if not is_complete(folder)])


def _is_made_again(run: RunContext, step: Step, names: Sequence[str], lost: Sequence[Path], reached: bool) -> bool:
    """Whether all that a step left is made again of its last checkpoint, without training; else one line says how to
    have it again.

    names: of all steps. reached: the student that the step begins with is there.
    """
    folder = phase_folder(run.folder, step.name)
    trains = reached and step.settings is not None
    again = trains and from_first(lambda: is_over(folder, step.settings))
    missing = ", ".join(map(str, lost))
    if again:
        log.warning("%s is missing or damaged; making it again of the last checkpoint of %s", missing, step.name)
    else:
        rest = " ".join(str(phase_folder(run.folder, name)) for name in names[names.index(step.name) :])
        log.warning(
            "%s is missing or damaged; going on without it. To have it again, and train what comes after it anew, "
            "run: rm -r %s, then the same command", missing, rest,
        )  # fmt: skip
    return again


def _forget(run: RunContext, stage: str) -> None:
    def forget() -> None:
        for path in (evaluation_file(run.folder, stage), run.folder / RESULTS):
            drop_file(path)

    on_first(forget)

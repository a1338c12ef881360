"""A recipe, run: checkpoint -> student -> phase 1 -> phase 2 -> phase 3 -> evaluation -> a student that generates."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from mohawk.conversion.calibration import calibrate
from mohawk.conversion.footprint import Hardware
from mohawk.conversion.pipeline import dealt
from mohawk.conversion.plan import Plan, make_plan, objective_for, print_plan, student_options
from mohawk.conversion.readout import solve_output_projections
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import about_of, newest_complete
from mohawk.core.processes import first_before_others, from_first, on_first
from mohawk.core.run_folder import COMPOSED, evaluation_file, phase_folder
from mohawk.data.packing import PackedDataset, collate
from mohawk.errors import UserError
from mohawk.loading.configs import load_config
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.runs.binding import bound
from mohawk.runs.context import RunContext, TextData, measure_stage, open_run, read_text
from mohawk.runs.matrices import draw_matrices, save_matrices
from mohawk.runs.sharding import Parts, parts_of, stage_of
from mohawk.runs.start import start
from mohawk.runs.steps import Step, finish_run, is_final, is_taken, take_steps, train, write_final
from mohawk.runs.tables import AFTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def convert(recipe: Recipe, *, dry_run: bool = False, hardware: Hardware | None = None) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `Recipe.load` or `Recipe.from_dict`.
        dry_run: print the plan and return; the teacher's configuration and tokenizer and texts' first rows are read.
        hardware: what a dry run's plan is for; default: what there is.

    Raises:
        UserError: the teacher cannot be loaded or converted, the data hold no text, or the output folder holds the
            run of another recipe.
        Interrupted: a signal stopped the run after it saved.
    """

    def plan(console: Console) -> Plan:
        about = recipe.teacher
        config = first_before_others(lambda: load_config(about.model, **about.where))
        planned = make_plan(recipe, config, hardware)
        print_plan(planned, recipe, console)
        return planned

    def work(folder: Path, console: Console, planned: Plan) -> None:
        run = opened(recipe, folder, console, parts=parts_of(recipe, planned.sharded))
        run.recompute |= {phase.name for phase in planned.phases if phase.strategy.recompute}
        run.stage = stage_of(recipe)
        run_phases(run)

    start(recipe, dry_run=dry_run, plan=plan, work=work)


def opened(
    recipe: Recipe, folder: Path, console: Console, *, trains: bool = True, parts: Parts | None = None
) -> RunContext[TextData]:
    """A conversion's folder with its teacher and texts; see `open_run`."""
    return open_run(recipe, folder, console, read=functools.partial(read_text, recipe), trains=trains, parts=parts)


def run_phases(run: RunContext[TextData]) -> None:
    """The phases of the recipe that are not finished, the final student and the report."""
    begin = time.monotonic()
    phases = list(run.recipe.phases.active())
    composed = (run.folder / COMPOSED).is_file()
    if composed and not any(is_taken(run, name) for name, _ in phases):
        raise UserError(f"{run.folder}: the composed student is missing or damaged; run mohawk compose again")

    def keep(stage: str, student: PreTrainedModel) -> None:
        assert isinstance(student, HybridForCausalLM)
        if stage in ("before", "mixing"):
            # gathered matrices are in autocast's dtype, so that they are multiplied under autocast alone
            dtype = None if run.parts is None else run.parts.dtype
            with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
                save_matrices(run.folder, stage, student, run.teacher, run.sample())

    def step(name: str, phase: Any) -> Step:
        def take(student: HybridForCausalLM, before: str | None) -> HybridForCausalLM:
            rows = _rows(run, name, phase)
            train_phase(run, name, phase, student, run.teacher, rows, before, f"phases.{name}")
            return student

        return Step(name, take, phase)

    if phases:
        from_first(lambda: _check_start(run, phases[0][0]))
    student = untrained_student(run.recipe, run.teacher, run.parts)
    past = bool(phases) and is_taken(run, phases[0][0])  # after that the start is there to be measured alone
    measured = from_first(lambda: evaluation_file(run.folder, "before").is_file())
    if run.recipe.student.init == "calibrated" and not (past and measured):
        _calibrate(run, student)
    measure_stage(run, "before", student, keep)
    student = take_steps(
        run, [step(name, phase) for name, phase in phases], student, keep=keep, begun_elsewhere=composed
    )
    last = phases[-1][0] if phases else None
    if not from_first(lambda: is_final(run, last)):
        write_final(run, student, last)
    on_first(lambda: _finish(run, student))
    log.info("run finished in %.0f s", time.monotonic() - begin)


def _check_start(run: RunContext[TextData], first: str) -> None:
    """UserError for a run that an earlier version stopped in phase 1, where its student had random values that phase 1
    does not train: they were drawn otherwise then, and a checkpoint does not hold them."""
    if first != "mixing" or run.recipe.student.init not in ("random", "neutral"):
        return
    if (stopped := newest_complete(phase_folder(run.folder, first))) is None:
        return
    began = (bound(run.folder) or {}).get("versions", {})
    if "run" not in about_of(stopped) or began.get("mohawk", "").startswith("0.1."):
        raise UserError(
            f"{run.folder}: an earlier version of mohawk stopped this run in phase 1, and student.init: "
            f"{run.recipe.student.init} draws other values now, so that it would go on with another student; finish it "
            "with that version, or begin it anew under another output"
        )


def _calibrate(run: RunContext[TextData], student: HybridForCausalLM) -> None:
    """Fits the mixers as they start to attention's outputs, on the first rows of the training text."""
    length = run.recipe.evaluation.sequence_length
    rows = PackedDataset(run.data.text.train, length, seed=run.recipe.seed, pad_token_id=run.pad)
    tokens, steps = run.recipe.student.calibration()
    batches = list(_batches(rows, tokens, length, 1))
    log.info("start: fitting mixers to %d tokens", len(batches) * length)
    calibrate(student, run.teacher, batches, steps=steps, autocast=run.autocast)


def _batches(rows: Any, tokens: int, length: int, size: int) -> Iterator[dict[str, Tensor]]:
    """The first `tokens` of rows of `length`, `size` rows at once."""
    count = min(len(rows), -(-tokens // length))
    return (collate([rows[i] for i in range(start, min(start + size, count))]) for start in range(0, count, size))


def _finish(run: RunContext[TextData], student: HybridForCausalLM) -> None:
    """Draws the mixing matrices, measures the final student and writes the report."""
    draw_matrices(run.folder)
    finish_run(run, student, stages=AFTER, labels=loss_labels(run.recipe))


def train_phase(
    run: RunContext,
    name: str,
    phase: Any,
    student: HybridForCausalLM,
    teacher: PreTrainedModel,
    rows: Any,
    before: str | None,
    section: str,
) -> None:
    """One of the three phases, of a student of `teacher`. rows: the dataset. before: the step before, if any. section:
    where its settings stand in the recipe."""

    if name == "hidden" and phase.solve_tokens:
        if from_first(lambda: newest_complete(phase_folder(run.folder, name)) is None):
            length, size = phase.sequence_length, phase.batch_size
            log.info("%s: solving output projections on the first %d tokens", name, phase.solve_tokens)
            batches = _batches(rows, phase.solve_tokens, length, size)
            solve_output_projections(student, teacher, batches, autocast=run.autocast)

    def make() -> Any:
        return objective_for(name, phase, student, teacher)

    stage = None if name == "end_to_end" else run.stage
    with nullcontext(make()) if stage is None else dealt(student, teacher, stage, make) as objective:
        train(run, name, phase, objective, rows, before, section=section)
    student.requires_grad_(True)


def _rows(run: RunContext[TextData], name: str, phase: Any) -> PackedDataset:
    """The training text in rows of a phase's length."""
    text = run.data.text.train
    passes = phase.steps() * phase.tokens_per_step / text.tokens
    if passes > 1:
        run.console.print(f"{name}: reads its {text.tokens:,} tokens of text {passes:.1f} times")
    return PackedDataset(text, phase.sequence_length, seed=run.recipe.seed, pad_token_id=run.pad)


def untrained_student(recipe: Recipe, teacher: PreTrainedModel, parts: Parts | None = None) -> HybridForCausalLM:
    """The student before phase 1; the same one whenever it is made again, also in parts."""
    spread = None if parts is None else parts.student
    torch.manual_seed(recipe.seed)
    # trained in float32 whatever the teacher's dtype; autocast chooses the products'
    return hybrid_from_teacher(teacher, dtype=torch.float32, spread=spread, **student_options(recipe.student))


def loss_labels(recipe: Recipe) -> dict[str, str]:
    """What each phase's loss is, for a plot's axis."""
    phases = recipe.phases
    labels = {}
    if phases.mixing is not None:
        frobenius = "‖S − A‖ per head, mean" if phases.mixing.metric == "frobenius" else None
        labels["mixing"] = frobenius or f"{phases.mixing.metric} distance of the matrices"
    if phases.hidden is not None:
        labels["hidden"] = f"L2 distance per token, {phases.hidden.match.replace('_', ' ')}s"
    if (last := phases.end_to_end) is not None:
        divergence = last.divergence.replace("_", " ").replace("kl", "KL")
        plain = (last.kd_weight, last.ce_weight, last.temperature) == (1, 0, 1)
        labels["end_to_end"] = f"{divergence}, nats per token" if plain else "distillation loss per token"
    return labels

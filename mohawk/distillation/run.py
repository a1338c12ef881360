"""Standard distillation, run: teachers and a student -> stages of training -> evaluation -> a student."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mohawk.conversion.footprint import Hardware
from mohawk.core.extras import need
from mohawk.core.processes import first_before_others, from_first, on_first, wish
from mohawk.data.aligned_rows import TeacherRows, TokenAligner
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
from mohawk.distillation.build import check_caches, checked_cache, load, loss_label
from mohawk.distillation.encoders import EncoderData
from mohawk.distillation.plan import Plan, make_plan, print_plan
from mohawk.distillation.recipe import DistillRecipe
from mohawk.distillation.sources import StageData, examples_of
from mohawk.distillation.stages import StageTrainer, made, stage_step
from mohawk.errors import UserError
from mohawk.loading.tasks import CAUSAL, task_in
from mohawk.models.casting import cast
from mohawk.models.sharding import copy_of
from mohawk.runs.context import RunContext, measure_stage, open_run
from mohawk.runs.sharding import Parts, parts_of
from mohawk.runs.start import start
from mohawk.runs.steps import finish_run, is_final, take_steps, write_final
from mohawk.teacher_cache.reader import CachedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.loading.parts import Spread

log = logging.getLogger(__name__)


def distill(recipe: DistillRecipe, *, dry_run: bool = False, hardware: Hardware | None = None) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `DistillRecipe.load` or `DistillRecipe.from_dict`.
        dry_run: print the plan and return; configurations, tokenizers and the first rows of texts are read.
        hardware: what a dry run's plan is for; default: what there is.

    Raises:
        UserError: a model cannot be loaded, the recipe does not fit the models, the data hold no text, or the output
            folder holds another run.
        Interrupted: a signal stopped the run after it saved.
    """

    if recipe.task != CAUSAL and wish() is not None:
        raise UserError(f"task: {recipe.task}: its models are whole on each process, but accelerate is set to FSDP")

    def plan(console: Console) -> Plan:
        planned = first_before_others(lambda: make_plan(recipe, hardware))
        print_plan(planned, recipe, console)
        return planned

    def work(folder: Path, console: Console, planned: Plan) -> None:
        run = opened(recipe, folder, console, parts=parts_of(recipe, planned.sharded))
        run.recompute |= {need.name for need in planned.needs if need.strategy.recompute}
        run.gathers |= from_first(lambda: {need.name for need in planned.needs if need.gathers})
        run_stages(run)

    if recipe.has_adapter():
        need("lora", "student.lora")
    start(
        recipe,
        dry_run=dry_run,
        plan=plan,
        further=functools.partial(check_caches, recipe),
        work=work,
    )


def opened(
    recipe: DistillRecipe, folder: Path, console: Console, *, trains: bool = True, parts: Parts | None = None
) -> RunContext[StageData]:
    """A distillation's folder with its first teacher and data; see `open_run`."""

    def load_teacher(device: torch.device, spread: Spread | None) -> PreTrainedModel:
        assert recipe.teacher is not None  # nothing is loaded where there is none
        return load(recipe.teacher, device, spread=spread, task=task_in(recipe))

    return open_run(
        recipe, folder, console, trains=trains, parts=parts, read=functools.partial(read_data, recipe),
        load=load_teacher,
    )  # fmt: skip


def read_data(recipe: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """`StageData` or `EncoderData` of a recipe. Raises UserError, also where a stage's cache is of another text."""
    if task_in(recipe) != CAUSAL:
        return EncoderData(recipe, tokenizer)
    data = StageData(recipe, tokenizer)
    cached = [stage for stage in recipe.stages if stage.cache is not None]
    align = getattr(recipe, "align", None)
    theirs = run_tokenizers(recipe).teacher if align is not None and cached else None
    for stage in cached:
        rows, cache = data.rows(stage, pad=0), checked_cache(stage, None if theirs is None else align)
        if theirs is not None:
            examples = examples_of(data.asked(stage), tokenizer, theirs, stage.sequence_length)
            rows = TeacherRows(rows, TokenAligner(tokenizer, theirs, examples=examples), cache.layout.sequence_length)
        CachedRows(rows, cache)
    return data


def run_stages(run: RunContext[StageData]) -> None:
    """The stages of the recipe that are not finished, the final student and the report."""
    begin = time.monotonic()
    student = untrained(run)
    measure_stage(run, "before", student)
    trainer = StageTrainer(run)
    student = take_steps(run, [stage_step(trainer, i, stage) for i, stage in enumerate(run.recipe.stages)], student)
    last = run.recipe.stages[-1].name
    student = as_saved(run, student)
    if not from_first(lambda: is_final(run, last, same_weights=run.recipe.save_dtype == "float32")):
        write_final(run, student, last)
    on_first(lambda: _finish(run, student))
    log.info("run finished in %.0f s", time.monotonic() - begin)


def as_saved(run: RunContext[StageData], student: PreTrainedModel) -> PreTrainedModel:
    """The last stage's student in the dtype that the run's student is saved in; where it is whole, the same object."""
    dtype = getattr(torch, run.recipe.save_dtype)
    if run.parts is None:
        cast(student, dtype)
        return student
    return student if student.dtype == dtype else copy_of(student, run.parts.teacher, dtype)


def _finish(run: RunContext[StageData], student: PreTrainedModel) -> None:
    """Measures the final student and writes the report."""
    stages = run.recipe.stages
    names = {"before": "before training", **{stage.name: f"after {stage.name}" for stage in stages}}
    align = getattr(run.recipe, "align", None) if run.teacher_tokenizer is not None else None
    labels = {stage.name: loss_label(stage, align) for stage in stages}
    finish_run(run, student, stages=names, labels=labels)


def untrained(run: RunContext[StageData]) -> PreTrainedModel:
    """The student before the first stage; the same one whenever it is made again."""
    base, about = run.teacher, run.recipe.teacher
    if run.recipe.student.model is None and (about.quantize or about.device_map):
        # rounded or spread weights can be asked, but not trained
        plain = about.model_copy(update={"quantize": None, "device_map": None})
        base = load(plain, run.device, task=task_in(run.recipe))
    return made(run, run.recipe.student, base)

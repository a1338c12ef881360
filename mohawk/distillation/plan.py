"""What a distillation will do, worked out from its recipe and configurations alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohawk.core.precision import pick_device
from mohawk.distillation.build import checked_cache, loss_label, matchings_for, mistakes, shaped
from mohawk.distillation.recipe import DistillRecipe, DistillStudent, RampSection, Stage
from mohawk.errors import UserError
from mohawk.loading.configs import building, load_config
from mohawk.loading.models import parameter_count
from mohawk.losses.schedules import temperature_for
from mohawk.losses.teachers import check_together
from mohawk.models.cutting.cuts import resolve_layers
from mohawk.models.decoders import decoder
from mohawk.models.families import needed_attention
from mohawk.training.trackers import trackers


@dataclass
class StagePlan:
    """One stage. student: the new one that it begins with, on the meta device; None: the one before."""

    stage: Stage
    student: PreTrainedModel | None
    temperature: float | RampSection


@dataclass
class Plan:
    """A distillation, before it runs. teacher, student: on the meta device, the latter as the first stage gets it.

    memory: bytes of models and optimizer where a process holds them whole.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    stages: list[StagePlan]
    memory: int


def make_plan(recipe: DistillRecipe) -> Plan:
    """Sizes and stages, from configurations alone. Raises UserError for what does not fit the models."""
    config = load_config(recipe.teacher.model, **recipe.teacher.where)
    further = [load_config(one.model, **one.where, who=f"teachers.{i}") for i, one in enumerate(recipe.teachers)]
    check_together(recipe.combine, [config, *further])
    trackers(recipe.report_to)
    teacher = _meta(config, recipe.teacher.trust_remote_code)
    student = first = _planned(recipe.student, teacher, recipe)
    stages: list[StagePlan] = []
    for i, stage in enumerate(recipe.stages):
        before = student
        if stage.student is not None:
            student = _planned(stage.student, student, recipe, f"stages.{i}.student")
        with mistakes(f"stages.{i} ({stage.name})"):
            matchings_for(stage, student, {"teacher": teacher, "previous": before}.get(stage.learn_from, student))
        if stage.cache is not None:
            checked_cache(stage)
        temperature = stage.temperature
        if temperature == "auto":
            temperature = temperature_for(*map(parameter_count, (teacher, student)))
        stages.append(StagePlan(stage, None if stage.student is None else student, temperature))
    asked = [(recipe.teacher, teacher)]
    asked += [(one, _meta(of, one.trust_remote_code)) for one, of in zip(recipe.teachers, further, strict=True)]
    teachers = sum(parameter_count(model) * (4 if one.dtype == "float32" else 2) for one, model in asked)
    largest = max(map(parameter_count, (first, *(one.student for one in stages if one.student is not None))))
    return Plan(teacher, first, stages, teachers + 16 * largest)  # weights, gradients and two moments in float32


def print_plan(plan: Plan, recipe: DistillRecipe, console: Console) -> None:
    """The plan as a person reads it."""
    console.print(f"[bold]Teacher[/bold] {recipe.teacher.model}: {_size(plan.teacher)}")
    console.print(f"[bold]Student[/bold] {recipe.student.model or 'from the teacher'}: {_size(plan.student)}")
    table = Table("stage", "learns from", "by", "temperature", "tokens", "steps", "learning rate")
    for planned in plan.stages:
        stage = planned.stage
        if planned.student is not None:
            console.print(f"[bold]From {stage.name} on[/bold]: {_size(planned.student)}")
        table.add_row(
            stage.name,
            f"cache {stage.cache}" if stage.cache else stage.learn_from,
            loss_label(stage).removesuffix(" per token"),
            _number(planned.temperature),
            f"{stage.tokens:,}", f"{stage.steps():,}", f"{stage.learning_rate:g}",
        )  # fmt: skip
    console.print(table)
    for data in (recipe.data, *(stage.data for stage in recipe.stages if stage.data)):
        for source in data.train:
            if (own := source.own_loss) is not None:
                terms = {"divergence": own.kd_weight, "cross entropy": own.ce_weight}
                given = " + ".join(f"{_number(weight)} x {name}" for name, weight in terms.items() if weight != 0)
                console.print(f"[bold]Beside them[/bold] {given} of {source.source}, per token of its own")


def _number(value: float | RampSection) -> str:
    return f"{value.start:g} to {value.end:g}" if isinstance(value, RampSection) else f"{value:.3g}"


def _meta(config: Any, trust_remote_code: bool, who: str = "teacher") -> PreTrainedModel:
    with torch.device("meta"), building(config, config.name_or_path, who):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=needed_attention(config), trust_remote_code=trust_remote_code
        )


def _planned(
    given: DistillStudent, base: PreTrainedModel, recipe: DistillRecipe, where: str = "student"
) -> PreTrainedModel:
    """The student's shape, on the meta device."""
    if given.model is not None:
        config = load_config(given.model, **given.where, who=f"{where}.model")
        base = _meta(config, given.trust_remote_code, f"{where}.model")
    if type(base).__module__.startswith("transformers_modules."):  # where transformers puts a checkpoint's own code
        raise UserError(
            f"{where}: {type(base).__name__} is of code that came with its checkpoint, so that no run can save it and "
            f"load it again; name a student of a class in transformers in {where}.model"
        )
    if given.layers is not None:
        with mistakes(f"{where}.layers"):
            resolve_layers(given.layers, len(decoder(base)[1]))
    with torch.device("meta"):
        student = shaped(given, base, recipe.seed, where)
    if (lora := given.lora) is not None:
        with mistakes(f"{where}.lora"):
            from mohawk.loading.lora import check_adapter, reaches_head

            names = check_adapter(student, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.bits,
                                  device=pick_device(recipe.device))  # fmt: skip
            if lora.dropout and reaches_head(student, names):
                raise ValueError(
                    f"LoRA: with a dropout of {lora.dropout:g} before the output embedding, logits are not hidden "
                    "states times a weight; set dropout to 0, or leave the output embedding out of targets"
                )
    return student


def _size(model: PreTrainedModel) -> str:
    return f"{type(model).__name__}, {len(decoder(model)[1])} layers, {parameter_count(model) / 1e6:.1f}M parameters"

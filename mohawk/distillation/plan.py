"""What a distillation will do, worked out from its recipe and configurations alone: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from mohawk.conversion.footprint import Hardware, Strategy
from mohawk.conversion.plan import GIB, planned_for, print_hardware
from mohawk.core.precision import pick_device
from mohawk.core.processes import wish
from mohawk.distillation.build import checked_cache, divergence_label, loss_label, matchings_for, mistakes, shaped
from mohawk.distillation.footprint import Need, allowed_ways, fit, sampling_bytes, stage_footprint, stage_operations
from mohawk.distillation.recipe import DistillRecipe, DistillStudent, RampSection, Stage
from mohawk.errors import UserError
from mohawk.loading.configs import load_config
from mohawk.loading.models import model_shape, parameter_count, with_classes
from mohawk.loading.tasks import CAUSAL
from mohawk.losses.schedules import temperature_for
from mohawk.losses.teachers import check_together
from mohawk.models.cutting.cuts import resolve_layers
from mohawk.models.decoders import decoder
from mohawk.schema.base import TeacherSection
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

    needs: what each stage needs of a process. hardware: what the plan is for. sharded: whether models are in parts
    there.
    """

    teacher: PreTrainedModel | None
    student: PreTrainedModel
    stages: list[StagePlan]
    needs: list[Need]
    hardware: Hardware
    sharded: bool


def make_plan(recipe: DistillRecipe, hardware: Hardware | None = None) -> Plan:
    """Sizes and stages, from configurations alone, and how models are held. Raises UserError for what does not fit the
    models.

    hardware: what the plan is for; default: the processes and devices that there are.
    """
    task = recipe.task
    if task != CAUSAL:  # whose models are whole on each process
        recipe = recipe.model_copy(update={"sharding": recipe.sharding.model_copy(update={"kind": "none"})})
    hardware, bits16 = planned_for(recipe, hardware)
    given, teacher = recipe.teacher, None
    configs, asked = [], []
    if given is not None:
        configs = [load_config(given.model, **given.where, task=task)]
        teacher = model_shape(configs[0], given.trust_remote_code, task=task)
        asked = [(given, teacher)]
    further = [
        load_config(one.model, **one.where, who=f"teachers.{i}", task=task) for i, one in enumerate(recipe.teachers)
    ]
    check_together(recipe.combine, [*configs, *further], task)
    trackers(recipe.report_to)
    student = first = _planned(recipe.student, teacher, recipe)
    asked += [
        (one, model_shape(of, one.trust_remote_code, task=task))
        for one, of in zip(recipe.teachers, further, strict=True)
    ]
    teachers = [(model, bytes_of(one)) for one, model in asked]
    stages: list[StagePlan] = []
    needs: list[Need] = []
    for i, stage in enumerate(recipe.stages):
        before = student
        if stage.student is not None:
            student = _planned(stage.student, student, recipe, f"stages.{i}.student")
        with mistakes(f"stages.{i} ({stage.name})"):
            matchings_for(stage, student, {"teacher": teacher, "previous": before}.get(stage.learn_from, student))
        if stage.cache is not None:
            checked_cache(stage, recipe.align)
        temperature = stage.temperature
        if temperature == "auto":
            assert teacher is not None  # refused among the contradictions
            temperature = temperature_for(*map(parameter_count, (teacher, student)))
        stages.append(StagePlan(stage, None if stage.student is None else student, temperature))
        needs.append(need_of(recipe, stage, student, teachers, before, hardware, bits16))
    sharded = fit(needs, recipe, hardware)
    for i, stage in enumerate(recipe.stages):
        if sharded or wish() is not None:
            _check_average(recipe, stage, f"stages.{i} ({stage.name})")
    if sharded and recipe.align is not None:
        raise UserError(
            "align: needs whole models on each process, which are in parts here; set sharding.kind: none, or leave "
            "align out"
        )
    return Plan(teacher, first, stages, needs, hardware, sharded)


def _check_average(recipe: DistillRecipe, stage: Stage, where: str) -> None:
    """UserError where models in parts cannot do what a stage asks."""
    if stage.learn_from in ("average", "start") and (stage.student or recipe.student).lora is not None:
        raise UserError(
            f"{where}: learn_from: {stage.learn_from} of adapters needs whole models, which are in parts here; set "
            "sharding.kind: none, or leave lora out"
        )


def bytes_of(teacher: TeacherSection) -> int:
    """Of one of its parameters, where `auto` is taken for 16 bits."""
    return 4 if teacher.dtype == "float32" else 2


def need_of(
    recipe: Any,
    stage: Stage,
    student: PreTrainedModel,
    teachers: Sequence[tuple[PreTrainedModel, int]],
    before: PreTrainedModel | None,
    hardware: Hardware,
    bits16: bool,
) -> Need:
    """What a stage needs of a process.

    Args:
        recipe: of a distillation, or of a pruning.
        student, teachers: on the meta device; the first teacher is held in every stage, for what is measured on
            held-out text. before: the student that the stage found.
    """
    lora = (stage.student or recipe.student).lora
    held, answers = list(teachers[:1]), teachers  # beside the student, and who is run
    if stage.learn_from == "previous":
        held, answers = [*held, (before or student, 4)], [(before or student, 4)]
    elif stage.learn_from in ("average", "start"):
        held, answers = [*held, (student, 4)], [(student, 4)]
    elif stage.cache is not None:
        answers = []
    else:
        held = list(teachers)
    trained, student_bytes = sum(p.numel() for p in student.parameters()), 4.0
    if lora is not None:
        linear = (module for module in decoder(student)[0].modules() if isinstance(module, torch.nn.Linear))
        trained = sum(lora.rank * (module.in_features + module.out_features) for module in linear)
        student_bytes = 0.5 if lora.bits == 4 else 4.0

    def held_as(strategy: Strategy) -> dict[str, int]:
        return stage_footprint(
            stage, student, held, trained, itemsize=2 if bits16 else 4, strategy=strategy,
            processes=hardware.processes, student_bytes=student_bytes, triton=hardware.triton,
        )  # fmt: skip

    def works_as(strategy: Strategy) -> float:
        return stage_operations(stage, student, [model for model, _ in answers], strategy.recompute)

    def to_sample(strategy: Strategy, held: dict[str, int]) -> int:
        return sampling_bytes(student, held, 2 if bits16 else 4)

    return Need(
        stage.name, stage.tokens, held_as, works_as, allowed_ways(stage, student, recipe),
        to_sample if stage.on_policy is not None else None,
    )  # fmt: skip


def print_plan(plan: Plan, recipe: DistillRecipe, console: Console) -> None:
    """The plan as a person reads it."""
    if recipe.teacher is not None and plan.teacher is not None:
        console.print(f"[bold]Teacher[/bold] {recipe.teacher.model}: {_size(plan.teacher)}")
    else:
        console.print("[bold]Teacher[/bold] none")
    console.print(f"[bold]Student[/bold] {recipe.student.model or 'from the teacher'}: {_size(plan.student)}")
    if recipe.align is not None:
        console.print(f"[bold]Tokens[/bold] of each model's own tokenizer, aligned by bytes ({recipe.align})")
    columns = "stage", "learns from", "by", "temperature", "tokens", "steps", "learning rate", "memory (estimate)"
    table = Table(*columns)
    for planned, need in zip(plan.stages, plan.needs, strict=True):
        stage = planned.stage
        if planned.student is not None:
            console.print(f"[bold]From {stage.name} on[/bold]: {_size(planned.student)}")
        table.add_row(
            stage.name,
            f"cache {stage.cache}" if stage.cache else _learns_from(recipe, stage),
            loss_label(stage, recipe.align).removesuffix(" per token"),
            _number(planned.temperature),
            *stage.told(), f"{stage.learning_rate:g}",
            f"{need.memory / GIB:.1f} GiB",
        )  # fmt: skip
    console.print(table)
    print_hardware(plan.needs, plan.hardware, [(stage.name, stage) for stage in recipe.stages], console)
    for data in (recipe.data, *(stage.data for stage in recipe.stages if stage.data)):
        for source in data.train:
            if (own := source.own_loss) is not None:
                divergence = "divergence" if own.divergence is None else divergence_label(own.divergence)
                terms = {divergence: own.kd_weight, "cross entropy": own.ce_weight}
                given = " + ".join(f"{_number(weight)} x {name}" for name, weight in terms.items() if weight != 0)
                console.print(f"[bold]Beside them[/bold] {given} of {source.source}, per token of its own")


def _learns_from(recipe: DistillRecipe, stage: Stage) -> str:
    return "the text" if recipe.teacher is None and stage.learn_from == "teacher" else stage.learn_from


def _number(value: float | RampSection) -> str:
    return f"{value.start:g} to {value.end:g}" if isinstance(value, RampSection) else f"{value:.3g}"


def _planned(
    given: DistillStudent, base: PreTrainedModel | None, recipe: DistillRecipe, where: str = "student"
) -> PreTrainedModel:
    """The student's shape, on the meta device. base: what it is made of where it names no model."""
    if given.model is not None:
        config = load_config(given.model, **given.where, who=f"{where}.model", task=recipe.task)
        if recipe.task == "classification" and recipe.teacher is not None:
            about = recipe.teacher
            with_classes(config, load_config(about.model, **about.where, task=recipe.task))
        base = model_shape(config, given.trust_remote_code, f"{where}.model", recipe.task)
    assert base is not None  # refused among the contradictions
    if type(base).__module__.startswith("transformers_modules."):  # where transformers puts a checkpoint's own code
        raise UserError(
            f"{where}: {type(base).__name__} is of code that came with its checkpoint, so that no run can save it and "
            f"load it again; name a student of a class in transformers in {where}.model"
        )
    if given.layers is not None:
        with mistakes(f"{where}.layers"):
            resolve_layers(given.layers, len(decoder(base)[1]))
    with torch.device("meta"):
        student = shaped(given, base, recipe.seed, where, recipe.task)
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

"""What a conversion will do, worked out from the recipe and the teacher's configuration alone: no weights are read."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective, PhaseObjective
from mohawk.conversion.recipe import Recipe, Student
from mohawk.errors import UserError
from mohawk.loading.configs import building
from mohawk.models.families import check_supported, decoder_shape, needed_attention
from mohawk.models.from_teacher import choose_layers, hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER

GIB = 2**30


@dataclass
class PhasePlan:
    """One phase, in numbers."""

    name: str
    trained: int  # parameters
    groups: dict[str, int]  # what kind of parameter -> how many are trained
    tokens: int
    steps: int
    memory: int  # bytes, estimated peak of the process: parameters, optimizer, activations


@dataclass
class Plan:
    """A conversion, before it runs."""

    layer_types: list[str]
    student: HybridForCausalLM  # on the meta device
    teacher_parameters: int
    phases: list[PhasePlan]


def objective_for(name: str, phase: Any, student: HybridForCausalLM, teacher: PreTrainedModel) -> PhaseObjective:
    """The objective of one phase as its recipe asks."""
    if name == "mixing":
        return MixingObjective(student, teacher, metric=phase.metric)
    if name == "hidden":
        return HiddenObjective(student, teacher, match=phase.match, train_mlp=phase.train_mlp)
    return EndToEndObjective(
        student, teacher, train=phase.train, divergence=phase.divergence, temperature=phase.temperature,
        kd_weight=phase.kd_weight, ce_weight=phase.ce_weight,
    )  # fmt: skip


def make_plan(recipe: Recipe, teacher_config) -> Plan:
    """Resolves layers, trainable parameters, steps and memory.

    Raises:
        UserError: the teacher cannot be converted, or the recipe does not fit it.
    """
    try:
        check_supported(teacher_config)
        choose_layers(recipe.student.ssm_layers, decoder_shape(teacher_config).num_layers)
        with torch.device("meta"):
            attention = needed_attention(teacher_config)
            with building(teacher_config, recipe.teacher.model):
                teacher = AutoModelForCausalLM.from_config(teacher_config, attn_implementation=attention)
            student = hybrid_from_teacher(teacher, **student_options(recipe.student))
    except ValueError as error:
        raise UserError(str(error)) from error
    phases = []
    for name, phase in recipe.phases.active():
        objective = objective_for(name, phase, student, teacher)
        groups: dict[str, int] = {}
        for parameter_name, parameter in objective.trained():
            kind = parameter_kind(parameter_name, student.config.ssm_layers)
            groups[kind] = groups.get(kind, 0) + parameter.numel()
        trained = sum(groups.values())
        phases.append(
            PhasePlan(
                name,
                trained,
                groups,
                int(phase.tokens),
                phase.steps(),
                _memory(recipe, phase, name, student, teacher, trained),
            )
        )
    return Plan(student.config.layer_types, student, sum(p.numel() for p in teacher.parameters()), phases)


def student_options(s: Student) -> dict:
    """Arguments of `hybrid_from_teacher` that a recipe's student holds."""
    return {
        "ssm_layers": s.ssm_layers, "mixer": s.mixer, "init": s.init, "gate": s.gate,
        "state_size": s.state_size, "conv_kernel": s.conv_kernel,
    }  # fmt: skip


def parameter_kind(name: str, ssm_layers: list[int]) -> str:
    if ".self_attn." in name:
        return "mixers" if int(name.split(".layers.")[1].split(".")[0]) in ssm_layers else "attention"
    for part, kind in ((".mlp.", "MLPs"), ("embed_tokens", "embeddings"), ("lm_head", "head")):
        if part in name:
            return kind
    return "norms"


def _memory(recipe: Recipe, phase, name: str, student, teacher, trained: int) -> int:
    """Bytes at the peak of a phase, to about a third: parameters, gradients and two Adam moments, activations."""
    shape = decoder_shape(student.config.base_config)
    tokens = phase.batch_size * phase.sequence_length
    width = shape.hidden_size + 2 * (student.config.intermediate_size or shape.hidden_size)
    layers = shape.num_layers if name == "end_to_end" else 2
    activations = 4 * tokens * (6 * width * layers + 4 * shape.hidden_size * 3)
    bytes_each = 2 if recipe.teacher.dtype == "bfloat16" else 4
    parameters = (
        sum(p.numel() for p in student.parameters()) * 4 + sum(p.numel() for p in teacher.parameters()) * bytes_each
    )
    return parameters + 12 * trained + activations


def print_plan(plan: Plan, recipe: Recipe, console: Console) -> None:
    """The plan as a person reads it."""
    config = plan.student.config
    ssm = config.ssm_layers
    kept = [i for i in range(len(plan.layer_types)) if i not in ssm]
    console.print(f"[bold]Teacher[/bold] {recipe.teacher.model}: {plan.teacher_parameters / 1e6:.1f}M parameters")
    console.print(
        f"[bold]Student[/bold] {sum(p.numel() for p in plan.student.parameters()) / 1e6:.1f}M parameters; "
        f"{len(ssm)} of {len(plan.layer_types)} layers become {config.mixer} "
        f"({config.mixer_num_heads} heads x {config.mixer_head_dim}, state {config.mixer_state_size})"
    )
    layers = Table("layer", "mixer", "weights from")
    source = {
        "attention": "q, k, v, o" if config.mixer == "gated_delta" else "q -> C, k -> B, v -> x, o -> out_proj",
        "neutral": "random, conv and gate passing on",
        "random": "random",
    }[recipe.student.init]
    for i, kind in enumerate(plan.layer_types):
        is_ssm = kind == SSM_LAYER
        layers.add_row(
            str(i),
            config.mixer if is_ssm else kind.replace("_", " "),
            f"{source}; MLP and norms copied" if is_ssm else "copied",
        )
    console.print(layers)
    stays = f" and the attention of layers {_ranges(kept)}" if kept else ""
    console.print(f"Embeddings, norms, MLPs, head{stays} are copied from the teacher.")
    phases = Table("phase", "trains", "frozen", "tokens", "steps", "memory (estimate)")
    total = sum(p.numel() for p in plan.student.parameters())
    for phase in plan.phases:
        trains = ", ".join(f"{kind} {count / 1e6:.2f}M" for kind, count in phase.groups.items())
        phases.add_row(
            phase.name, trains, f"{(total - phase.trained) / 1e6:.1f}M", f"{phase.tokens:,}", str(phase.steps),
            f"{phase.memory / GIB:.1f} GiB",
        )  # fmt: skip
    console.print(phases)


def _ranges(indices: list[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"

"""What a conversion will do, worked out from the recipe and the teacher's configuration alone: no weights are read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohawk.conversion.footprint import Hardware, Strategy, footprint, operations, strategies
from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective, PhaseObjective
from mohawk.conversion.recipe import Hybrid, Recipe, student_mistakes
from mohawk.core.precision import autocast_dtype, pick_device
from mohawk.core.processes import count
from mohawk.errors import UserError
from mohawk.loading.configs import building
from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.families import FAMILIES, check_supported, decoder_shape, needed_attention
from mohawk.models.from_teacher import choose_layers, gate_of, hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig
from mohawk.models.mixers import MIXERS
from mohawk.runs.sharding import check_within, device_bytes, stages_in
from mohawk.training.pipeline import deal

GIB = 2**30
UNKNOWN = 2**63  # bytes of a device that is not here


@dataclass
class PhasePlan:
    """One phase, in numbers.

    held: bytes at its peak, by what they are of, where it is held as `strategy` says. operations: floating-point, of
    one token.
    """

    name: str
    trained: int  # parameters
    groups: dict[str, int]  # what kind of parameter -> how many are trained
    layers: dict[int, int]  # of which layer -> how many
    tokens: int
    steps: int
    strategy: Strategy
    held: dict[str, int]
    operations: float

    @property
    def memory(self) -> int:
        return sum(self.held.values())


@dataclass
class Plan:
    """A conversion, before it runs.

    hardware: what it is for. sharded: whether its models are in parts there.
    """

    layer_types: list[str]
    student: HybridForCausalLM  # on the meta device
    teacher_parameters: int
    phases: list[PhasePlan]
    hardware: Hardware
    sharded: bool


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


def make_plan(recipe: Recipe, teacher_config: Any, hardware: Hardware | None = None) -> Plan:
    """Resolves layers, trainable parameters, steps, memory and how models are held.

    hardware: what the plan is for; default: the processes and devices that there are.

    Raises:
        UserError: the teacher cannot be converted, or the recipe does not fit it.
    """
    hardware, bits16 = planned_for(recipe, hardware)
    try:
        check_supported(teacher_config)
        with student_mistakes(("student",)):
            choose_layers(recipe.student.ssm_layers, decoder_shape(teacher_config).num_layers)
        with torch.device("meta"):
            attention = needed_attention(teacher_config)
            with building(teacher_config, recipe.teacher.model):
                teacher = AutoModelForCausalLM.from_config(teacher_config, attn_implementation=attention)
            with student_mistakes(("student",)):
                student = hybrid_from_teacher(teacher, **student_options(recipe.student))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    each = 4 if recipe.teacher.dtype == "float32" else 2

    def held(planned: PhasePlan, strategy: Strategy) -> dict[str, int]:
        name, trained = planned.name, planned.trained
        phase = getattr(recipe.phases, name)
        if strategy.stages > 1:
            trained = max(sum(planned.layers.get(i, 0) for i in own) for own in deal(replaced, strategy.stages))
        return footprint(
            name, phase, student, teacher, trained, teacher_bytes=each, itemsize=2 if bits16 else 4,
            strategy=strategy, processes=hardware.processes, triton=hardware.triton,
        )  # fmt: skip

    replaced, stages = student.config.ssm_layers, recipe.sharding.stages or 1
    if stages > len(replaced):
        raise UserError(
            f"sharding.stages: got {stages}, but {len(replaced)} layers are converted, at least one of which each "
            "stage needs; give fewer stages"
        )
    phases: list[PhasePlan] = []
    for name, phase in recipe.phases.active():
        objective = objective_for(name, phase, student, teacher)
        groups: dict[str, int] = {}
        layers: dict[int, int] = {}
        for parameter_name, parameter in objective.trained():
            if ".layers." in parameter_name:
                i = int(parameter_name.split(".layers.")[1].split(".")[0])
                layers[i] = layers.get(i, 0) + parameter.numel()
            kind = parameter_kind(parameter_name, student.config.ssm_layers)
            groups[kind] = groups.get(kind, 0) + parameter.numel()
        trained = sum(groups.values())
        phases.append(PhasePlan(name, trained, groups, layers, int(phase.tokens), phase.steps(), Strategy(), {}, 0.0))

    def fitting(sharded: bool | None) -> bool:
        """Each phase the fastest way that fits, else the leanest; whether all fit."""
        fits, processes = True, hardware.processes
        for planned in phases:
            asked = getattr(recipe.phases, planned.name)
            for strategy in strategies(recipe, hardware, sharded):
                planned.strategy = replace(strategy, stages=stages_in(recipe, f"phases.{planned.name}", processes))
                planned.held = held(planned, planned.strategy)
                if planned.memory <= hardware.memory:
                    break
            fits = fits and planned.memory <= hardware.memory
            planned.operations = operations(planned.name, asked, student, teacher, planned.strategy.recompute)
        return fits

    ways = {strategy.parts > 1 for strategy in strategies(recipe, hardware)}
    sharded = ways == {True}
    if not fitting(sharded) and len(ways) == 2:  # a run's models are held one way in all phases
        sharded = True
        fitting(sharded)
    return Plan(
        student.config.layer_types, student, sum(p.numel() for p in teacher.parameters()), phases, hardware, sharded
    )


def planned_for(recipe: Any, hardware: Hardware | None) -> tuple[Hardware, bool]:
    """What a plan is for, by default what there is, and whether products are in 16 bits there. Raises UserError."""
    if recipe.device == "cuda" and not torch.cuda.is_available():  # a plan for another machine, whose GPU is not known
        here, fast = Hardware(count(), UNKNOWN), recipe.precision != "float32"
    else:
        device = pick_device(recipe.device)
        here, fast = Hardware(count(), device_bytes(device)), autocast_dtype(recipe.precision, device) is not None
        here = replace(here, triton=device.type == "cuda")
    hardware = hardware or here
    check_within(recipe, hardware.processes)
    return replace(hardware, triton=here.triton or hardware.flops is not None), fast or hardware.flops is not None


def student_options(s: Hybrid) -> dict:
    """Arguments of `hybrid_from_teacher` that a recipe's student holds."""
    return {
        "ssm_layers": s.ssm_layers, "mixer": s.mixer, "gate": s.gate,
        "init": "attention" if s.init == "calibrated" else s.init,  # which is what calibration begins with
        "state_size": s.state_size, "conv_kernel": s.conv_kernel,
    }  # fmt: skip


def parameter_kind(name: str, ssm_layers: list[int]) -> str:
    if ".self_attn." in name:
        return "mixers" if int(name.split(".layers.")[1].split(".")[0]) in ssm_layers else "attention"
    if any(f".{family.mlp}." in name for family in FAMILIES.values()):
        return "MLPs"
    for part, kind in (("embed_tokens", "embeddings"), ("lm_head", "head")):
        if part in name:
            return kind
    return "norms"


def print_plan(plan: Plan, recipe: Recipe, console: Console) -> None:
    """The plan as a person reads it."""
    config = plan.student.config
    ssm = config.ssm_layers
    kept = [i for i in range(len(plan.layer_types)) if i not in ssm]
    console.print(f"[bold]Teacher[/bold] {recipe.teacher.model}: {plan.teacher_parameters / 1e6:.1f}M parameters")
    console.print(
        f"[bold]Student[/bold] {sum(p.numel() for p in plan.student.parameters()) / 1e6:.1f}M parameters; "
        f"{len(ssm)} of {len(plan.layer_types)} layers become {config.mixer_words} "
        f"({config.mixer_num_heads} heads x {config.mixer_head_dim}, state {config.mixer_state_size})"
    )
    layers = Table("layer", "mixer", "weights from", "gate")
    for i, kind in enumerate(plan.layer_types):
        if kind != SSM_LAYER:
            layers.add_row(str(i), kind.replace("_", " "), "copied")
            continue
        name = config.mixer_of(i)
        copied = "q, k, v, o" if issubclass(MIXERS[name], DeltaMixer) else "q -> C, k -> B, v -> x, o -> out_proj"
        start = gate_of(name, recipe.student.gate)
        gate = {"attention": start, "calibrated": start, "neutral": "open", "random": "random"}
        source = {
            "attention": copied,
            "calibrated": f"{copied}, fitted",
            "neutral": "random, conv and gate passing on",
            "random": "random",
        }[recipe.student.init]
        layers.add_row(str(i), name, source, gate[recipe.student.init])
    console.print(layers)
    if recipe.student.init == "calibrated":
        tokens, steps = recipe.student.calibration()
        each = f", {steps:,} steps a layer" if steps else ", by least squares alone"
        console.print(f"Mixers are fitted to attention's outputs on {tokens:,} tokens first{each}.")
    stays = f" and the attention of layers {_ranges(kept)}" if kept else ""
    console.print(f"Embeddings, norms, MLPs, head{stays} are copied from the teacher.")
    print_exports(config, console)
    phases = Table("phase", "trains", "frozen", "tokens", "steps", "memory (estimate)")
    total = sum(p.numel() for p in plan.student.parameters())
    for phase in plan.phases:
        trains = ", ".join(f"{kind} {count / 1e6:.2f}M" for kind, count in phase.groups.items())
        phases.add_row(
            phase.name, trains, f"{(total - phase.trained) / 1e6:.1f}M", f"{phase.tokens:,}", str(phase.steps),
            f"{phase.memory / GIB:.1f} GiB",
        )  # fmt: skip
    console.print(phases)
    print_hardware(plan.phases, plan.hardware, recipe.phases.active(), console)


def print_exports(config: HybridConfig, console: Console) -> None:
    """What `mohawk export` will be able to write of such a student, and why not the rest."""
    from mohawk.models.formats.refusals import WHY_NOT

    can, cannot = [], []
    for name, why_not in WHY_NOT.items():
        if (reason := why_not(config, False)) is None:
            can.append(name)
        elif why_not(config, True) is None:
            can.append(f"{name} with --pad-expand")
        else:
            cannot.append(f"not {name}: {reason}")
    console.print(f"[bold]Export[/bold] --to {', '.join([*can, 'hybrid'])}", highlight=False)
    for line in cannot:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def print_hardware(
    phases: Sequence[Any], hardware: Hardware, sections: Iterable[tuple[str, Any]], console: Console
) -> None:
    """What each process holds, and how long it takes, where there are several or the plan is for other hardware.

    phases: `PhasePlan`s, or what has the same strategy, held, memory, tokens and operations. sections: their settings
    in the recipe, by name.
    """
    if hardware.processes > 1:
        table = Table("GiB of a process", *(phase.name for phase in phases))
        table.add_row("models are", *(str(phase.strategy) for phase in phases))
        for part in dict.fromkeys(name for phase in phases for name in phase.held):
            table.add_row(part, *(f"{phase.held.get(part, 0) / GIB:.2f}" for phase in phases))
        table.add_row("in all", *(f"{phase.memory / GIB:.2f}" for phase in phases))
        console.print(table)
    for planned, (name, phase) in zip(phases, sections, strict=True):
        stages = planned.strategy.stages
        if phase.rows % (dealt := hardware.processes // stages):
            to = f"{dealt} processes" if stages == 1 else f"{dealt} pipelines of {stages} stages"
            console.print(
                f"[bold]{name}[/bold]: a step's {phase.rows} rows cannot be dealt evenly to {to}; this phase would be "
                "refused"
            )
    beyond = [phase for phase in phases if phase.memory > hardware.memory]
    if beyond:
        named = ", ".join(f"{phase.name} {phase.memory / GIB:.1f} GiB" for phase in beyond)
        console.print(
            f"[bold]More than the {hardware.memory / GIB:.1f} GiB of a device[/bold]: {named}. More processes, "
            "a smaller batch_size (with more gradient_accumulation), or a shorter sequence_length need less."
        )
    if hardware.flops is None:
        return
    table = Table("", *(phase.name for phase in phases), "in all")
    rates = [hardware.flops * hardware.utilisation / phase.operations for phase in phases]
    if any(phase.tokens is None for phase in phases):  # whose text has to be read first
        table.add_row("tokens a second", *(f"{rate * hardware.processes:,.0f}" for rate in rates), "")
        console.print(table)
        return
    hours = [phase.tokens / rate / 3600 for phase, rate in zip(phases, rates, strict=True)]
    table.add_row("GFLOP a token", *(f"{phase.operations / 1e9:,.1f}" for phase in phases), "")
    table.add_row("tokens a second", *(f"{rate * hardware.processes:,.0f}" for rate in rates), "")
    table.add_row("device-hours", *(f"{one:,.1f}" for one in hours), f"{sum(hours):,.1f}")
    table.add_row(
        "hours", *(f"{one / hardware.processes:,.2f}" for one in hours), f"{sum(hours) / hardware.processes:,.2f}"
    )
    console.print(table)
    console.print(
        f"At {hardware.utilisation:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s on {hardware.processes} devices; what "
        "a run reaches depends on its kernels and its network."
    )


def _ranges(indices: list[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"

"""One student of several runs' mixers: whose each layer gets, and whether they fit together.

Phases 1 and 2 train each layer by itself on the teacher's own hidden states, so layers of runs with the same teacher
can stand side by side, whatever their mixers are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mohawk.conversion.probe import short_fingerprint
from mohawk.conversion.recipe import FROM_ATTENTION, Recipe
from mohawk.conversion.select import trained_student
from mohawk.conversion.swap import keep_attention
from mohawk.core.json_files import read_json
from mohawk.core.places import home
from mohawk.core.run_folder import SELECTION
from mohawk.errors import UserError
from mohawk.loading.models import load_teacher
from mohawk.models.casting import cast
from mohawk.models.families import decoder_layers
from mohawk.models.from_teacher import gate_of
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig, one_name
from mohawk.runs.binding import check_models, models_of
from mohawk.runs.kept import Selection

SHAPE = ("num_heads", "head_dim", "state_size", "num_groups", "conv_kernel")  # one for all mixers of a student


@dataclass(frozen=True)
class TrainedRun:
    """A run whose phases 1 and 2 are done. student: the folder of the student that the last of them left."""

    folder: Path
    recipe: Recipe
    student: Path
    config: HybridConfig

    @classmethod
    def open(cls, run: str | Path) -> TrainedRun:
        """Raises UserError: no run, phases that are not finished, or a teacher that has changed since."""
        folder = home(run)
        recipe, student = trained_student(folder)
        check_models(folder, recipe)
        return cls(folder, recipe, student, HybridConfig.from_pretrained(student))


def mixers_from(run: TrainedRun, others: Sequence[tuple[TrainedRun, Sequence[int]]]) -> dict[int, TrainedRun]:
    """Layer -> the run whose mixer it gets, for every layer of which one of the runs has a mixer.

    others: further runs, each with the layers that come from it; with none, each layer comes from that of `run` and
        such runs whose mixer alone leaves the least KL, as `mohawk select` has measured it in each of them.

    Raises:
        UserError: runs that do not fit together, layers that cannot come from a run, or no measurements to go by.
    """
    for other, _ in others:
        _check_fit(run, other)
    chosen = _cheapest([run, *(other for other, layers in others if not layers)])
    named: dict[int, TrainedRun] = {}
    for other, layers in others:
        if missing := sorted(set(layers) - set(other.config.ssm_layers)):
            raise UserError(
                f"--mixers-of: {other.folder} has no mixer in layers {missing}, only in {other.config.ssm_layers}"
            )
        if twice := sorted(set(layers) & set(named)):
            raise UserError(f"--mixers-of: layers {twice} are asked of two runs; name each layer once")
        named |= dict.fromkeys(layers, other)
    return {i: run for i, run in sorted((chosen | named).items())}


def _cheapest(runs: Sequence[TrainedRun]) -> dict[int, TrainedRun]:
    """Layer -> the run whose mixer leaves the least KL there, the rest being attention; of one run it is not asked."""
    if len(runs) == 1:
        return dict.fromkeys(runs[0].config.ssm_layers, runs[0])
    found: dict[int, tuple[float, TrainedRun]] = {}
    settings: dict[str, Any] | None = None
    for run in runs:
        selection = read_json(run.folder / SELECTION, Selection)
        if selection is None or selection["settings"].get("student") != short_fingerprint(run.student):
            raise UserError(
                f"{run.folder}: what its mixers cost has not been measured, so there is nothing to choose by; run: "
                f"mohawk select {run.folder} --by alone, or name the layers: --mixers-of RUN I ..."
            )
        measured = {name: value for name, value in selection["settings"].items() if name != "student"}
        if settings is not None and measured != settings:
            raise UserError(
                f"{run.folder} was measured otherwise than {runs[0].folder} ({measured}, not {settings}); run mohawk "
                "select on both with the same --tokens, or name the layers: --mixers-of RUN I ..."
            )
        settings = measured
        for row in selection["layers"]:
            kl = row["kl"] if row["kl"] < math.inf else math.inf  # of a mixer that breaks the model it is NaN
            if row["layer"] not in found or kl < found[row["layer"]][0]:
                found[row["layer"]] = kl, run
    return {i: run for i, (_, run) in found.items()}


def _check_fit(run: TrainedRun, other: TrainedRun) -> None:
    """UserError where layers of the two cannot stand in one student."""

    def refuse(what: str, one: Any, two: Any, hint: str) -> None:
        raise UserError(f"--mixers-of: {other.folder} has another {what} than {run.folder} ({two}, not {one}); {hint}")

    teachers = [{name: digest for name, (_, digest) in models_of(each.recipe)} for each in (run, other)]
    if teachers[0] != teachers[1]:
        one, two = (each.recipe.teacher.model for each in (run, other))
        refuse("teacher", one, two, "layers are trained on one teacher's hidden states, so take runs of the same one")
    for name in SHAPE:
        one, two = (getattr(each.config, f"mixer_{name}") for each in (run, other))
        if one != two:
            refuse(f"{name} of mixers", one, two, "a student has one for all its mixers")
    if run.config.dtype != other.config.dtype:
        refuse("dtype", run.config.dtype, other.config.dtype, "a student has one")
    for name in ("init", "calibration_tokens", "calibration_steps"):
        one, two = (getattr(each.recipe.student, name) for each in (run, other))
        if one != two:
            refuse(f"student.{name}", one, two, "the new run's recipe has one for all")


def starting_gate(chosen: Mapping[int, TrainedRun]) -> str | None:
    """`student.gate` of a recipe that starts these layers as their runs did.

    Raises:
        UserError: there is none.
    """
    asked = {i: (run.config.mixer_of(i), run.recipe.student.gate) for i, run in chosen.items()}
    gates = {gate_of(mixer, gate) for mixer, gate in asked.values()}
    from_attention = all(run.recipe.student.init in FROM_ATTENTION for run in chosen.values())
    if from_attention and all(gate_of(mixer, None) == gate_of(mixer, gate) for mixer, gate in asked.values()):
        return None
    if len(gates) > 1:
        told = ", ".join(f"layer {i} ({mixer}) {gate_of(mixer, gate)}" for i, (mixer, gate) in asked.items())
        raise UserError(
            f"--mixers-of: the runs' gates started differently ({told}), which student.gate of one recipe cannot say; "
            "take runs with the same student.gate, or each with its mixer's own (null)"
        )
    return gates.pop()


def mixed_config(run: TrainedRun, chosen: Mapping[int, TrainedRun]) -> HybridConfig:
    """The configuration of a student with these layers' mixers, and attention elsewhere.

    Where some of their runs' mixers have biases, all have: a student has one switch for them.
    """
    config = copy.deepcopy(run.config)
    config.keep_mixers(())
    config.layer_types = [SSM_LAYER if i in chosen else kind for i, kind in enumerate(config.layer_types)]
    config.mixer = one_name({i: source.config.mixer_of(i) for i, source in chosen.items()}, config.mixer_kinds[0])
    config.mixer_bias = any(source.config.mixer_bias for source in chosen.values())
    return config


def mixed_student(run: TrainedRun, chosen: Mapping[int, TrainedRun], teacher: PreTrainedModel) -> HybridForCausalLM:
    """A student with these layers from their runs, each with its norms and MLP, and the teacher's elsewhere.

    teacher: on the CPU; cast to the students' dtype, and its layers are shared. Biases that only other runs' mixers
        have are 0.
    """
    student = _loaded(run)
    cast(teacher, student.dtype)
    for source in {each.folder: each for each in chosen.values()}.values():
        if source.folder != run.folder:
            layers = decoder_layers(_loaded(source))
            for i in (i for i, each in chosen.items() if each.folder == source.folder):  # named once or twice
                decoder_layers(student)[i] = layers[i]
    config = mixed_config(run, chosen)
    for name in ("layer_types", "mixer", "mixer_bias"):
        setattr(student.config, name, getattr(config, name))
    for i in chosen:
        _add_biases(decoder_layers(student)[i].self_attn, config, i)
    return keep_attention(student, teacher, list(chosen))


def _loaded(run: TrainedRun) -> HybridForCausalLM:
    student = load_teacher(run.student, dtype="auto", who="student").requires_grad_(True)
    assert isinstance(student, HybridForCausalLM)
    return student


def _add_biases(mixer: nn.Module, config: HybridConfig, layer: int) -> None:
    """Zeros for the biases that a mixer has none of and the configuration asks for, in place."""
    with torch.device("meta"):
        asked = config.make_mixer(layer)
    for name, module in asked.named_modules():
        own = mixer.get_submodule(name)
        if isinstance(module, nn.Linear) and module.bias is not None and own.bias is None:
            own.bias = nn.Parameter(torch.zeros(own.out_features, dtype=own.weight.dtype))

"""Whether the processes of a run hold models in parts, and how models come into their parts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mohawk.core.precision import MOST, autocast_dtype, device_bytes, pick_device
from mohawk.core.processes import count, from_first, own_group, several, wish
from mohawk.errors import UserError
from mohawk.models.sharding import shard
from mohawk.schema.base import Phase, sections
from mohawk.training.batches import check_dealt
from mohawk.training.pipeline import PipelineStage, make_stage

GROUPS = ("within", "stages")  # of `sharding`: what has to divide the number of processes
VIEW = r"FSDP2-wrapped module \((.*FSDPLinear|\w*(ForCausalLM|LMHeadModel))\) returned a view tensor"
STAGED = ("phases.mixing", "phases.hidden")  # whose layers do not reach each other
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """How models are spread over a run's processes.

    mesh: of one dimension, or of two: groups that hold the same, processes that share (HSDP). dtype: of matrices while
    they are whole, which is autocast's.
    """

    mesh: DeviceMesh
    dtype: torch.dtype | None

    def student(self, model: nn.Module) -> None:
        """Spread a model that trains, in place."""
        shard(model, self.mesh, dtype=self.dtype)

    def teacher(self, model: nn.Module) -> None:
        """Spread a model that is only asked, in place."""
        shard(model, self.mesh, dtype=self.dtype, trains=False)


def parts_of(recipe: Any, wanted: bool) -> Parts | None:
    """How the models of a run are spread; None where each process holds them whole.

    recipe: which `check_sharding` has passed. wanted: whether the plan has them in parts, where it leaves that open.
    """
    if not several() and recipe.sharding.kind == "full":
        log.warning("sharding.kind: full in one process, which holds all of it; start several with torchrun")
    if not several() or recipe.sharding.kind == "none":
        return None
    if not from_first(lambda: wanted or recipe.sharding.kind == "full" or wish() is not None):
        return None
    device = pick_device(recipe.device)
    within = recipe.sharding.within or count()
    if within == count():
        mesh = init_device_mesh(device.type, (count(),))
    else:
        ranks = torch.arange(count()).view(-1, within)
        groups = [own_group(ranks.T.tolist()), own_group(ranks.tolist())]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicas", "parts"))
    # said of the logits of a head with a bias, which nothing changes in place
    warnings.filterwarnings("ignore", VIEW, UserWarning)
    shared = "" if within == count() else f", in {count() // within} groups of {within}"
    log.info("models are in parts on %d processes%s", count(), shared)
    return Parts(mesh, autocast_dtype(recipe.precision, device))


def stage_of(recipe: Any) -> PipelineStage | None:
    """Which layers' stage this process has in phases 1 and 2 of a conversion; None where each process has all."""
    stages = recipe.sharding.stages
    if stages is None or stages == 1:
        return None
    if not several():
        log.warning("sharding.stages: %d in one process, which has all layers; start several with torchrun", stages)
        return None
    log.info("layers are dealt to %d stages, %d processes each, in phases 1 and 2", stages, count() // stages)
    return make_stage(stages)


def parts_to_ask(recipe: Any, needed: Callable[[], int]) -> Parts | None:
    """How models that are only asked are spread: in parts where the recipe says so, or leaves it open and they do not
    fit into a process. needed: their bytes. Raises UserError."""
    _check_groups(recipe, ("within",))  # stages are of training
    left_open = several() and recipe.sharding.kind == "auto"
    device = pick_device(recipe.device)
    return parts_of(recipe, left_open and from_first(lambda: needed() > MOST * device_bytes(device)))


def check_sharding(recipe: Any) -> None:
    """UserError where what a recipe says of sharding does not fit the processes that were started."""
    _check_groups(recipe)
    for name, phase in sections(recipe):
        if isinstance(phase, Phase):
            check_dealt(phase, name, stages=stages_in(recipe, name, count()))


def _check_groups(recipe: Any, names: Sequence[str] = GROUPS) -> None:
    if recipe.sharding.kind == "none" and wish() is not None:
        raise UserError("sharding.kind: got none, but accelerate is set to FSDP; leave one of the two out")
    check_within(recipe, count(), names)


def stages_in(recipe: Any, section: str, processes: int) -> int:
    """Over how many of so many processes a phase's layers are dealt, by where its settings stand."""
    asked = getattr(recipe.sharding, "stages", None)
    return asked if asked and processes > 1 and section in STAGED else 1


def check_within(recipe: Any, processes: int, names: Sequence[str] = GROUPS) -> None:
    """UserError where so many processes are no whole number of groups or pipelines."""
    for name in names:
        given = getattr(recipe.sharding, name, None)
        if given is not None and processes > 1 and processes % given:
            advice = ", as a rule the GPUs of a machine" if name == "within" else ""
            raise UserError(
                f"sharding.{name}: got {given}, which does not divide the {processes} processes; give a divisor{advice}"
            )

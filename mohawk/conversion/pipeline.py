"""Layers dealt to processes for phases 1 and 2 (`sharding.stages`): which, how each has its own whole, and how what it
trained comes back to all.

Where models are whole on every process, it works on its own layers of them. Where they are in parts, it has whole
copies of its own beside the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mohawk.conversion.objectives import LayerwiseObjective
from mohawk.models.families import decoder_layers
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import fill, is_sharded, reshard, stay_whole, whole
from mohawk.training.pipeline import PipelineStage, deal


@contextmanager
def dealt(
    student: HybridForCausalLM, teacher: PreTrainedModel, stage: PipelineStage, make: Callable[[], LayerwiseObjective]
) -> Iterator[LayerwiseObjective]:
    """Within, the objective that `make` gives walks this process's layers alone; afterwards all processes have what
    each has trained. All of them must ask."""
    ranges = deal(student.config.ssm_layers, stage.stages)
    mine, originals = ranges[stage.index], list(decoder_layers(student))
    with _taken(student, mine, False), _taken(teacher, mine, stage.index == 0):
        objective = make()
        objective.stage, objective.walk = stage, mine
        yield objective
        copies = list(decoder_layers(student))
        trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    stay_whole(originals, False)  # the objective has asked it of those alone that this process does not walk
    owners = {i: index for index, layers in enumerate(ranges) for i in layers}
    for name in trained:
        _, _, layer, inner = name.split(".", 3)  # model.layers.3.norm.weight
        i = int(layer)
        _hand_out(originals[i].get_parameter(inner), copies[i].get_parameter(inner), owners[i])


@torch.no_grad()
def _hand_out(original: nn.Parameter, own: nn.Parameter, owner: int) -> None:
    """Gives all processes, or each its part of, what the one of rank `owner` has of a parameter."""
    mine = dist.get_rank() == owner
    values = own.detach() if mine else torch.empty(original.shape, dtype=original.dtype, device=original.device)
    dist.broadcast(values, src=owner)  # of the first pipeline, whose ranks are its stages
    if not (mine and own is original):
        fill(original, values)


@contextmanager
def _taken(model: PreTrainedModel, mine: range, embedding: bool) -> Iterator[None]:
    """Within, a model in parts has whole copies of its own layers, and of its embedding if asked, in their place; a
    tensor at a time is gathered, by all processes. One that is whole is as it was."""
    if not is_sharded(model):
        yield
        return
    reshard(model)
    layers, embed = decoder_layers(model), model.get_input_embeddings()
    originals = list(layers)
    with torch.device("meta"):
        twin = type(model)(model.config)
    copies = decoder_layers(twin)
    for i, layer in enumerate(originals):
        _fill_copy(copies[i], layer, i in mine)
    _fill_copy(twin.get_input_embeddings(), embed, embedding)
    try:
        for i in mine:
            layers[i] = copies[i]
        if embedding:
            model.set_input_embeddings(twin.get_input_embeddings())
        yield
    finally:
        for i in mine:
            layers[i] = originals[i]
        if embedding:
            model.set_input_embeddings(embed)


@torch.no_grad()
def _fill_copy(copy: nn.Module, original: nn.Module, wanted: bool) -> None:
    """Gathers what a module holds, and keeps it in a copy on the meta device if that is wanted."""
    for name, tensor in (*original.named_parameters(), *original.named_buffers()):
        values = whole(tensor)
        if not wanted:
            continue
        inside, _, last = name.rpartition(".")
        values = values.clone()
        given = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        setattr(copy.get_submodule(inside), last, given)
    for module, before in zip(copy.modules(), original.modules(), strict=True):
        if "config" in before.__dict__:  # which attention reads, and others set
            module.__dict__["config"] = before.__dict__["config"]

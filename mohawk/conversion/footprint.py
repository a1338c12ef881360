"""What a phase of a conversion needs of each process: bytes by what they are of, and floating-point operations.

Parameters are counted on the models' shapes. What a layer keeps for its backward pass was counted on torch's saved
tensors (a decoder of Llama's shape), per token: `KEPT` bytes for each channel of the residual stream, of the MLP and of
attention or mixer. What no count gives, the loss's workspace for one, is measured by
`benchmarks/models/sharding.py` and `plans.py` beside what this says. What the libraries take is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mohawk.core.processes import wish
from mohawk.kernels.kd.chunked import TILE_BYTES, TRITON_TILE_BYTES
from mohawk.models.decoders import decoder
from mohawk.models.families import decoder_layers, decoder_shape
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import MIXERS
from mohawk.training.pipeline import AHEAD, deal

# What a layer with attention keeps; of one with a mixer its class says it, as here: bytes a token and channel of
# (residual stream, MLP, attention), in float32 and under bfloat16 autocast
KEPT = {4: (20.6, 16.1, 16.7), 2: (22.6, 8.1, 8.7)}
PASSES = 24 << 20  # bytes of what the loss makes of the few rows of logits that it works on, on a CPU


@dataclass(frozen=True)
class Hardware:
    """What a plan is for.

    processes: how many take part, each with a device of `memory` bytes. flops: floating-point operations a second of
    one at its peak, of which a run reaches the share `utilisation`; None: not known. triton: whether the loss's logits
    are swept by Triton's kernels, which take larger tiles of them.
    """

    processes: int
    memory: int
    flops: float | None = None
    utilisation: float = 0.4
    triton: bool = False


@dataclass(frozen=True)
class Strategy:
    """How a phase is held.

    parts: over how many processes a model is spread; 1: each has it whole. recompute: whether layers keep their inputs
    alone for the backward pass. stages: over how many processes the layers are dealt; 1: each has all.
    """

    parts: int = 1
    recompute: bool = False
    stages: int = 1

    def __str__(self) -> str:
        held = "whole" if self.parts == 1 else f"in {self.parts} parts"
        if self.stages > 1:
            held += f", in {self.stages} stages"
        return f"{held}, recomputing" if self.recompute else held


def strategies(recipe: Any, hardware: Hardware, sharded: bool | None = None) -> list[Strategy]:
    """The ways that a recipe, or what accelerate launch was told, allows on so many processes, the fastest first.
    sharded: whether models are in parts; None: as these have it."""
    told = wish()
    within = recipe.sharding.within or hardware.processes
    wanted = {"none": [False], "full": [True], "auto": [False, True] if told is None else [True]}[recipe.sharding.kind]
    spread = [False] if hardware.processes == 1 else wanted if sharded is None else [sharded]
    again = [False, True] if recipe.activation_checkpointing == "auto" else [recipe.activation_checkpointing]
    if told is not None and told.activation_checkpointing:
        again = [True]
    return [Strategy(within if parts else 1, recompute) for parts in spread for recompute in again]


def footprint(
    name: str,
    phase: Any,
    student: HybridForCausalLM,
    teacher: PreTrainedModel,
    trained: int,
    *,
    teacher_bytes: int,
    itemsize: int,
    strategy: Strategy,
    processes: int = 1,
    triton: bool = False,
) -> dict[str, int]:
    """Bytes of one process at the peak of a phase, by what they are of.

    Args:
        student, teacher: on any device, the meta device too.
        trained: how many parameters the phase trains; with stages, those of the stage that trains most.
        teacher_bytes: of one of the teacher's parameters. itemsize: of what matrices are multiplied in, 4 or 2.
        processes: that a step's rows are dealt to. triton: see `Hardware`.
    """
    parts, last = strategy.parts, name == "end_to_end"
    dealt = processes // strategy.stages
    tokens = min(phase.batch_size, -(-phase.rows // dealt)) * phase.sequence_length
    shape, config = decoder_shape(student.config.base_config), student.config
    width, replaced = shape.hidden_size, set(config.ssm_layers)
    layers = [_count(layer) for layer in decoder(student)[1]]
    theirs = [_count(layer) for layer in decoder(teacher)[1]]
    matrices, vectors = _both(student)
    head = student.lm_head.weight.numel()

    def kept(i: int) -> int:
        kept_bytes = MIXERS[config.mixer_of(i)].kept_bytes if i in replaced else KEPT
        inner = config.mixer_num_heads * config.mixer_head_dim if i in replaced else shape.num_heads * shape.head_dim
        return kept_by(decoder(student)[1][i], config.base_config, kept_bytes, inner, tokens, itemsize)

    found = {
        "teacher": teacher_bytes * _count(teacher) // parts,
        "student": 4 * (matrices // parts + vectors),
        "gradients": 4 * trained // parts,
        "optimizer": 8 * trained // parts,
    }
    if strategy.stages > 1:
        found["gradients"], found["optimizer"] = 4 * trained, 8 * trained
        if parts > 1:  # whole copies of a stage's layers beside the parts; the first has the embedding too
            ranges = deal(sorted(replaced), strategy.stages)
            embedding = student.model.embed_tokens.weight.numel()
            found["teacher"] += teacher_bytes * (max(sum(theirs[i] for i in own) for own in ranges) + embedding)
            found["student"] += 4 * max(sum(layers[i] for i in own) for own in ranges)
        if itemsize == 2:
            found["autocast copies"] = 2 * max(map(rounded_parameters, decoder(student)[1]))
        found["handed on"] = AHEAD * teacher_bytes * tokens * width
    elif parts > 1:
        found["gathered"] = gathered(itemsize, [(student, 4)], [(teacher, teacher_bytes)])
    elif itemsize == 2:
        each = list(map(rounded_parameters, decoder(student)[1]))
        found["autocast copies"] = 2 * (matrices - head - sum(layers) + sum(each))
        if not last or strategy.recompute:
            found["autocast copies"] = 2 * max(each)
    if not last:
        found["activations"] = max(map(kept, range(len(layers)))) + 10 * tokens * width
        return found
    if strategy.recompute:
        found["activations"] = 4 * tokens * width * len(layers) + max(map(kept, range(len(layers))))
    else:
        found["activations"] = sum(map(kept, range(len(layers))))
    add_loss(
        found, head=head, words=config.vocab_size, tokens=tokens, width=width, itemsize=itemsize, parts=parts,
        layer=max(map(kept, range(len(layers)))), one_pass=phase.batch_size * processes >= phase.rows, triton=triton,
    )  # fmt: skip
    return found


def gathered(
    itemsize: int, students: Sequence[tuple[torch.nn.Module, int]], teachers: Sequence[tuple[torch.nn.Module, int]]
) -> int:
    """Bytes of the layers that are whole at one time, of the largest of each model: two, one of them twice meanwhile;
    and one's gradient before and while it is summed. With each model come the bytes of one of its parameters, which a
    layer's experts keep while they are whole."""

    def whole(layer: torch.nn.Module, own: int) -> int:
        rounded = rounded_parameters(layer)
        return itemsize * rounded + own * (_count(layer) - rounded)

    def largest(models: Sequence[tuple[torch.nn.Module, int]]) -> int:
        return max((whole(layer, own) for model, own in models for layer in decoder(model)[1]), default=0)

    trained = max((_count(layer) for model, _ in students for layer in decoder(model)[1]), default=0)
    return 3 * largest(students) + largest(teachers) + 8 * trained


def rounded_parameters(layer: torch.nn.Module) -> int:
    """Parameters of a layer that products in 16 bits have copies of: all but its experts, of which slices are taken."""
    return _count(layer) - sum(p.numel() for p in _experts(layer))


def _experts(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in layer.parameters() if p.dim() > 2 and p.shape[1] > 1]  # a convolution has 1 there


def kept_by(layer: torch.nn.Module, config: Any, kept_bytes: Any, inner: int, tokens: int, itemsize: int) -> int:
    """Bytes that a layer keeps for its backward pass. config: of the decoder. kept_bytes: as `KEPT`. inner: channels of
    attention or mixer."""
    a, b, c = kept_bytes[itemsize]
    width = config.hidden_size
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts := [p.shape for p in _experts(layer)] if chosen else []:
        # products of experts are in float32 whatever autocast says, each on a copy of its tokens, and give one
        neurons = min(sum(shape[1:]) - width for shape in experts)
        of_mlp = chosen * (KEPT[4][1] * neurons + 8 * width)
    else:
        of_mlp = b * (getattr(config, "intermediate_size", None) or 4 * width)
    return int(tokens * (a * width + of_mlp + c * inner))


def add_loss(
    found: dict[str, int],
    *,
    head: int,
    words: int,
    tokens: int,
    width: int,
    itemsize: int,
    parts: int,
    layer: int,
    one_pass: bool,
    triton: bool,
) -> None:
    """Adds what a loss on logits needs, and takes away what is not there at the same time.

    Args:
        found: bytes of everything else, by what they are of.
        head: parameters of an output embedding of `words` rows. tokens, width: of the hidden states.
        layer: bytes that a layer keeps for its backward pass, at most.
        one_pass: whether a step has a single backward pass. triton: see `Hardware`.
    """
    logits = 8 * tokens * words  # of both sides, a tile of them at once
    logits = min(TRITON_TILE_BYTES, logits) if triton else min(TILE_BYTES, logits) + min(PASSES, logits)
    # both heads, the head's gradient in float32 while it is made, hidden states and their gradients
    heads = (4 + (2 * itemsize if parts > 1 or itemsize == 2 else 0)) * head
    found["head and loss"] = heads + logits + 6 * tokens * width
    layers = found.get("gathered", 0)
    if layers:  # while there are logits no layer is whole, and the other way round
        found["gathered"] = max(0, layers - logits)
    if one_pass:  # gradients take the place of activations, and count as far as they take more
        freed = found["activations"] + found["head and loss"] + found.get("gathered", 0)
        found["gradients"] = max(0, found["gradients"] + layer + layers - freed)


def operations(name: str, phase: Any, student: HybridForCausalLM, teacher: PreTrainedModel, recompute: bool) -> float:
    """Floating-point operations of one token in a phase: products of matrices, attention and mixing matrices."""
    base, config = student.config.base_config, student.config
    shape = decoder_shape(base)
    n, inner = phase.sequence_length, shape.num_heads * shape.head_dim
    replaced, total = len(config.ssm_layers), shape.num_layers
    body = sum(used_parameters(layer, base) for layer in decoder(student)[1])
    of_teacher = 2 * sum(used_parameters(layer, base) for layer in decoder(teacher)[1]) + total * 2 * n * inner
    mixers = sum(used_parameters(decoder_layers(student)[i].self_attn, base) for i in config.ssm_layers)
    if name == "mixing":
        return of_teacher + 4 * mixers + replaced * 8 * n * inner
    if name == "hidden":
        mlps = sum(used_parameters(decoder(student)[1][i], base) for i in config.ssm_layers) - mixers
        return of_teacher + (6 * mixers + (4 * mlps if phase.match == "block_output" else 0))
    attention = (total - replaced) * 2 * n * inner * (3.5 + recompute)
    return of_teacher + body * (8 if recompute else 6) + attention + 8 * student.lm_head.weight.numel()


def used_parameters(module: torch.nn.Module, config: Any) -> float:
    """Parameters that one token is multiplied with: of a mixture of experts, those of the experts it is sent to.

    config: of the decoder.
    """
    chosen = getattr(config, "num_experts_per_tok", None)
    return sum(
        p.numel() * (chosen / p.shape[0] if chosen and "experts." in name else 1)
        for name, p in module.named_parameters()
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _both(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters that are spread over processes, and those that all have (mohawk.models.sharding.shard)."""
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p.shape[1] > 1)
    return matrices, _count(model) - matrices

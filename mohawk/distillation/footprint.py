"""What a stage of distillation needs of each process: bytes by what they are of, and floating-point operations.

Counted as a conversion's phase 3 is (mohawk/conversion/footprint.py, whose numbers of what a layer keeps for its
backward pass were measured), for any causal language model, with the teachers and matchings that a stage has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from mohawk.conversion.footprint import (
    KEPT,
    Hardware,
    Strategy,
    add_loss,
    gathered,
    kept_by,
    rounded_parameters,
    strategies,
    used_parameters,
)
from mohawk.core.processes import wish
from mohawk.models.decoders import decoder
from mohawk.models.mixers import MIXERS


@dataclass
class Need:
    """What a stage needs, as a plan tells it.

    tokens: None where they are known once the stage's text is read. held_as: bytes at its peak, by what they are of,
    where it is held in some way. works_as: floating-point operations of one token. ways: those that it may be held in;
    None: all that the recipe allows. to_sample: bytes more where its student, in parts otherwise, is whole while it
    writes samples; None: it writes none. strategy, held, operations: of the way that `fit` chose; gathers: whether it
    has room for these bytes.
    """

    name: str
    tokens: int | None
    held_as: Callable[[Strategy], dict[str, int]]
    works_as: Callable[[Strategy], float]
    ways: Callable[[Strategy], bool] | None = None
    to_sample: Callable[[Strategy, dict[str, int]], int] | None = None
    strategy: Strategy = Strategy()
    held: dict[str, int] = field(default_factory=dict)
    operations: float = 0.0
    gathers: bool = False

    @property
    def memory(self) -> int:
        return sum(self.held.values())


def fit(needs: Sequence[Need], recipe: Any, hardware: Hardware) -> bool:
    """Choose the fastest way for each stage that fits into a device, else the leanest; whether models are in parts,
    which they are in all stages of a run or in none."""

    def fitting(sharded: bool) -> bool:
        for need in needs:
            for strategy in strategies(recipe, hardware, sharded):
                if need.ways is not None and not need.ways(strategy):
                    continue
                need.strategy, need.held = strategy, need.held_as(strategy)
                if need.memory <= hardware.memory:
                    break
            need.operations = need.works_as(need.strategy)
            need.gathers = False
            if need.to_sample is not None and need.strategy.parts > 1:
                more = need.to_sample(need.strategy, need.held)
                if need.memory + more <= hardware.memory:
                    need.gathers, need.held["samples"] = True, more
        return all(need.memory <= hardware.memory for need in needs)

    ways = {strategy.parts > 1 for strategy in strategies(recipe, hardware)}
    if ways == {True} or not fitting(False) and True in ways:
        fitting(True)
        return True
    return False


def allowed_ways(stage: Any, student: PreTrainedModel, recipe: Any) -> Callable[[Strategy], bool] | None:
    """Which ways a stage may be held in, where `activation_checkpointing: auto` leaves it to the plan: a layer cannot
    compute its insides again where its class does not know how, nor where its attention is watched."""
    told = wish()
    if recipe.activation_checkpointing != "auto" or told is not None and told.activation_checkpointing:
        return None
    watched = any(getattr(stage, key, None) is not None for key in ("attention", "relations"))
    can = student.supports_gradient_checkpointing and not watched
    return None if can else lambda strategy: not strategy.recompute


def stage_footprint(
    stage: Any,
    student: PreTrainedModel,
    teachers: Sequence[tuple[PreTrainedModel, int]],
    trained: int,
    *,
    itemsize: int,
    strategy: Strategy,
    processes: int = 1,
    student_bytes: float = 4,
    triton: bool = False,
) -> dict[str, int]:
    """Bytes of one process at the peak of a stage, by what they are of.

    Args:
        stage: of a recipe.
        student, teachers: on any device, the meta device too; of each teacher the bytes of one of its parameters.
        trained: how many parameters the stage trains.
        itemsize: of what matrices are multiplied in, 4 or 2.
        processes: that a step's rows are dealt to.
        student_bytes: of one of the student's matrices' parameters. triton: see `Hardware`.
    """
    parts, config = strategy.parts, student.config.get_text_config()
    tokens = min(stage.batch_size, -(-stage.rows // processes)) * stage.sequence_length
    width, layers = config.hidden_size, [_count(layer) for layer in decoder(student)[1]]
    matrices = sum(p.numel() for p in student.parameters() if p.dim() > 1 and p.shape[1] > 1)
    head = _head(student)
    kept = _kept(student, tokens, itemsize)
    found = {
        "teacher": sum(each * _count(model) for model, each in teachers) // parts,
        "student": int(student_bytes * matrices) // parts + 4 * (_count(student) - matrices),
        "gradients": 4 * trained // parts,
        "optimizer": 8 * trained // parts,
    }
    if parts > 1:
        found["gathered"] = gathered(itemsize, [(student, 4)], teachers)
    elif itemsize == 2:
        each = list(map(rounded_parameters, decoder(student)[1]))
        copied = max(each) if strategy.recompute else matrices - head - sum(layers) + sum(each)
        found["autocast copies"] = 2 * copied
    again = 4 * tokens * width * len(layers) + max(kept)
    found["activations"] = again if strategy.recompute else sum(kept)
    words: Any = config.vocab_size if head else config.num_labels
    add_loss(
        found, head=head, words=words, tokens=tokens, width=width, itemsize=itemsize, parts=parts, layer=max(kept),
        one_pass=stage.batch_size * processes >= stage.rows, triton=triton,
    )  # fmt: skip
    if (matched := _matched(stage, student, [model for model, _ in teachers], tokens)) > 0:
        found["matchings"] = matched
    return found


def sampling_bytes(student: PreTrainedModel, held: dict[str, int], itemsize: int) -> int:
    """Bytes that a whole student takes beyond what is free while nothing trains, in a stage whose bytes are `held`."""
    room = sum(held.get(name, 0) for name in ("gathered", "activations", "head and loss", "gradients"))
    return max(0, itemsize * _count(student) - room)


def stage_operations(
    stage: Any, student: PreTrainedModel, teachers: Sequence[PreTrainedModel], recompute: bool
) -> float:
    """Floating-point operations of one token in a stage: products of matrices and attention; without samples."""
    passes = [(student, 8 if recompute else 6, 3.5 + recompute), *((model, 2, 1.0) for model in teachers)]
    work = 0.0
    for model, products, attention in passes:
        config = model.config.get_text_config()
        body = sum(used_parameters(layer, config) for layer in decoder(model)[1])
        layers = len(decoder(model)[1]) - len(getattr(model.config, "ssm_layers", ()))
        work += products * body + min(products, 6) * _head(model)
        work += attention * layers * 2 * stage.sequence_length * _inner(config)
    return work


def _kept(model: PreTrainedModel, tokens: int, itemsize: int) -> list[int]:
    """Bytes that each layer keeps for its backward pass."""
    config: Any = model.config
    text = config.get_text_config()
    mixers = set(getattr(config, "ssm_layers", ()))
    found = []
    for i, layer in enumerate(decoder(model)[1]):
        kept = MIXERS[config.mixer_of(i)].kept_bytes if i in mixers else KEPT
        inner = config.mixer_num_heads * config.mixer_head_dim if i in mixers else _inner(text)
        found.append(kept_by(layer, text, kept, inner, tokens, itemsize))
    return found


def _head(model: Any) -> int:
    """Parameters of the output embedding."""
    output = model.get_output_embeddings()
    return 0 if output is None else _count(output)  # that of classes is small


def _inner(config: Any) -> int:
    """Channels of all query heads of a layer."""
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    return heads * size if heads and size else config.hidden_size


def _matched(stage: Any, student: PreTrainedModel, teachers: Sequence[PreTrainedModel], tokens: int) -> int:
    """Bytes of what a stage's matchings keep: float32 hidden states, or queries and keys, of both sides."""
    pairs, models = len(decoder(student)[1]), [student, *teachers[:1]]
    configs = [model.config.get_text_config() for model in models]
    hidden, attention, relations = (getattr(stage, key, None) for key in ("hidden", "attention", "relations"))
    each = 0 if hidden is None else sum(config.hidden_size for config in configs)
    each += 0 if attention is None else sum(2 * _inner(config) for config in configs)
    last = 0 if relations is None else sum(3 * _inner(config) for config in configs)
    if relations is not None and relations.layers is not None:  # of more than the last layer, perhaps
        each, last = each + last, 0
    return 4 * tokens * (pairs * each + last)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

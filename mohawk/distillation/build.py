"""What the words of a distillation's recipe stand for: teachers, students, losses between layers, caches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from mohawk.conversion.plan import student_options
from mohawk.conversion.recipe import student_mistakes
from mohawk.core.processes import several
from mohawk.data.text import tokenizer_key
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
from mohawk.distillation.contradictions import MATCHED
from mohawk.distillation.recipe import DistillData, DistillStudent, DistillTeacher, RampSection, Stage
from mohawk.errors import UserError
from mohawk.loading.causal import plain_model
from mohawk.loading.models import load_teacher
from mohawk.loading.tasks import CAUSAL
from mohawk.losses.distiller import OwnLoss
from mohawk.losses.layers.attention_match import AttentionMatch
from mohawk.losses.layers.hidden_match import HiddenMatch, layer_map
from mohawk.losses.layers.matching import Matching, match_attention, match_hidden, match_relations
from mohawk.losses.layers.relation_match import RelationMatch
from mohawk.losses.schedules import Ramp
from mohawk.models.cutting.cuts import keep_layers, resolve_layers
from mohawk.models.cutting.depth import keep_any_layers
from mohawk.models.decoders import decoder
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.generation_settings import saveable
from mohawk.models.random_weights import random_model
from mohawk.models.sharding import copied
from mohawk.schema.base import FieldError
from mohawk.schema.yaml_text import field_path
from mohawk.teacher_cache.reader import TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.distillation.recipe import StageRecipe
    from mohawk.loading.causal import CausalLM
    from mohawk.loading.parts import Spread


def checked_cache(stage: Stage, align: str | None = None) -> TeacherCache:
    """Opens a stage's cache and checks its settings; text, tokenizer and teacher are checked once they are read.

    align: how the teacher's tokens, which the cache is then of, are compared with the student's. Raises UserError for
    what does not fit the stage.
    """
    assert stage.cache is not None
    cache, temperature = TeacherCache(stage.cache), stage.temperature
    if align is not None and cache.layout.kind == "samples":
        raise UserError(
            f"stages ({stage.name}): align needs a teacher's probabilities, which samples do not tell; cache a top k, "
            "or hidden states"
        )
    if align == "spans" and cache.layout.kind == "top-k" and temperature != 1:
        raise UserError(
            f"stages ({stage.name}): align: spans compares likelihoods, which this top k has at temperature "
            f"{cache.temperature:g} alone; set temperature: 1, or cache hidden states"
        )
    if isinstance(temperature, RampSection) and cache.temperature is not None:
        raise UserError(
            f"stages ({stage.name}): cache: its temperature is {cache.temperature:g} throughout, the stage's "
            f"goes from {temperature.start:g} to {temperature.end:g}; give a number, or cache hidden states"
        )
    if stage.confidence and cache.layout.kind == "samples":
        raise UserError(
            f"stages ({stage.name}): confidence needs probabilities, which samples do not tell; leave it out"
        )
    cache.check(
        sequence_length=stage.sequence_length if align is None else None, divergence=stage.divergence,
        temperature=temperature if isinstance(temperature, (int, float)) else None,
    )  # fmt: skip
    return cache


def check_caches(recipe: StageRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where a stage's cache does not fit it, or was made with another tokenizer or seed."""
    align = getattr(recipe, "align", None)
    if align is not None and any(stage.cache is not None for stage in recipe.stages):
        teachers = run_tokenizers(cast(Any, recipe)).teacher
        tokenizer, align = (tokenizer, None) if teachers is None else (teachers, align)
    for stage in recipe.stages:
        if stage.cache is not None:
            cache = checked_cache(stage, align)
            cache.check(tokenizer_hash=tokenizer_key(tokenizer), seed=recipe.seed)
            for own in own_losses(stage.data or recipe.data).values():
                cache.check(divergence=own.divergence)


def load(
    given: DistillTeacher,
    device: torch.device,
    who: str = "teacher",
    *,
    spread: Spread | None = None,
    task: str = CAUSAL,
) -> PreTrainedModel:
    """A recipe's teacher, on its device or devices, or in parts (see `load_teacher`)."""
    if given.device_map and several():
        raise UserError(
            f"{who}.device_map: got auto in several processes, which would all spread over the same GPUs; leave it out"
        )
    return load_teacher(
        given.model, **given.where, dtype=given.dtype, device=device, quantize=given.quantize,
        device_map=given.device_map, spread=spread, who=who, task=task,
    )  # fmt: skip


def shaped_in_parts(
    given: DistillStudent, base: PreTrainedModel, seed: int, spread: Spread, where: str = "student"
) -> PreTrainedModel:
    """As `shaped`, of a model in parts: the student is in parts too, and none is ever whole on a process."""
    with torch.device("meta"):
        shape, kept = type(base)(copy.deepcopy(base.config)), None
    with mistakes(f"{where}.layers"):
        if given.layers is not None:
            kept = resolve_layers(given.layers, len(decoder(base)[1]))
            shape = keep_layers(shape, kept)
    if given.scratch:
        shape = _random(shape, seed, base.device, spread, where)
    else:
        copied(base, shape, spread, functools.partial(_of_layer, base, kept))
        shape.generation_config = saveable(base.generation_config)
    if given.hybrid is not None:
        with student_mistakes(field_path(f"{where}.hybrid")):
            torch.manual_seed(seed)
            shape = hybrid_from_teacher(shape, spread=spread, **student_options(given.hybrid))
    return shape


def _random(
    shape: PreTrainedModel, seed: int, device: torch.device, spread: Spread | None, where: str
) -> PreTrainedModel:
    """A model of this shape with random weights, the same in parts or whole."""
    with mistakes(f"{where}.scratch"):
        return random_model(type(shape), copy.deepcopy(shape.config), seed, device, spread)


def _of_layer(base: PreTrainedModel, kept: Sequence[int] | None, name: str) -> str:
    """The name in `base` of a tensor of a model of some of its layers."""
    _, stack = decoder(base)
    prefix = next(place for place, module in base.named_modules() if module is stack)
    if kept is None or not name.startswith(f"{prefix}."):
        return name
    index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{kept[int(index)]}.{rest}"


def shaped(
    given: DistillStudent, base: PreTrainedModel, seed: int, where: str = "student", task: str = CAUSAL
) -> PreTrainedModel:
    """A student before training: `base` itself copied, some of its layers, its shape with random weights, a hybrid.

    where: it stands in the recipe, for messages.
    """
    with mistakes(f"{where}.layers"):
        if given.layers is not None and task != CAUSAL:
            student = keep_any_layers(base, resolve_layers(given.layers, len(decoder(base)[1])))
        elif given.layers is not None:
            student = keep_layers(base, given.layers)
        else:
            student = base if given.scratch else copy.deepcopy(base)
    if given.scratch:
        student = _random(student, seed, base.device, None, where)
    if given.hybrid is not None:
        with student_mistakes(field_path(f"{where}.hybrid")):
            torch.manual_seed(seed)
            student = hybrid_from_teacher(student, **student_options(given.hybrid))
    return student


def matchings_for(stage: Stage, student: CausalLM, teacher: CausalLM | None) -> dict[str, Matching]:
    """The losses between layers that a stage asks for. Raises ValueError for what the models do not have."""
    found: dict[str, Matching] = {}
    if all(getattr(stage, key) is None for key in MATCHED):
        return found
    if teacher is None:
        raise ValueError(f"{', '.join(MATCHED)} need a teacher model to match")
    depths = [len(decoder(model)[1]) for model in (student, teacher)]
    if (hidden := stage.hidden) is not None:
        match = HiddenMatch(
            layer_map(hidden.layers, *depths, embeddings=hidden.embeddings),
            *(plain_model(model).config.get_text_config().hidden_size for model in (student, teacher)),
            loss=hidden.loss, rank=hidden.rank, shared=hidden.shared, normalise=hidden.normalise,
        )  # fmt: skip
        found["hidden"] = match_hidden(match.to(student.device), schedule_of(hidden.weight))
    if (attention := stage.attention) is not None:
        match = AttentionMatch(layer_map(attention.layers, *depths), loss=attention.metric)
        match.check(student, teacher)
        found["attention"] = match_attention(match, schedule_of(attention.weight))
    if (asked := stage.relations) is not None:
        last = [[depth - 1 for depth in depths]]
        pairs = layer_map(last if asked.layers is None else asked.layers, *depths)
        match = RelationMatch(
            pairs, queries=asked.queries, keys=asked.keys, values=asked.values, heads=asked.heads
        )  # fmt: skip
        match.check(student, teacher)
        found["relations"] = match_relations(match, schedule_of(asked.weight))
    return found


@contextmanager
def mistakes(where: str) -> Iterator[None]:
    """Within the block, a ValueError becomes a FieldError about the recipe's field at that place."""
    try:
        yield
    except ValueError as error:
        raise FieldError(field_path(where), str(error)) from error


def schedule_of(value: Any) -> Any:
    """A recipe's number or ramp as training has it."""
    return Ramp(value.start, value.end, value.shape, value.until) if isinstance(value, RampSection) else value


def own_losses(data: DistillData) -> dict[int, OwnLoss]:
    """Losses of sources that have their own, by their places."""
    given = {i: source.own_loss for i, source in enumerate(data.train) if source.own_loss is not None}
    return {
        i: OwnLoss(schedule_of(loss.kd_weight), schedule_of(loss.ce_weight), loss.divergence, loss.beta, loss.lam)
        for i, loss in given.items()
    }


def divergence_label(name: str) -> str:
    return name.replace("_", " ").replace("kl", "KL")


def loss_label(stage: Stage, align: str | None = None) -> str:
    """What a stage's loss is of. align: how a teacher with other tokens is compared."""
    parts = [] if stage.kd_weight == 0 else [divergence_label(stage.divergence)]
    if parts and align is not None and stage.learn_from == "teacher":
        parts = ["sorted probabilities (ULD)"] if align == "uld" else [f"{parts[0]} of spans"]
    if parts and stage.cache is not None and checked_cache(stage, align).layout.kind == "samples":
        parts = ["cross entropy with the teacher's samples"]
    parts += ["cross entropy"] * (stage.ce_weight != 0)
    parts += [name for name in MATCHED if getattr(stage, name)]
    return " + ".join(parts) + " per token"

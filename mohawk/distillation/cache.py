"""`mohawk cache`: a recipe's teacher, run once over the rows that a phase or stage trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.conversion.recipe import Recipe
from mohawk.distillation.recipe import StageRecipe
from mohawk.errors import UserError
from mohawk.teacher_cache.writer import write_cache

if TYPE_CHECKING:
    from mohawk.conversion.recipe import EndToEndPhase
    from mohawk.distillation.recipe import Stage
    from mohawk.schema.base import RecipeFile
    from mohawk.teacher_cache.reader import TeacherCache


def cache_teacher(
    recipe: RecipeFile,
    output: str | Path,
    *,
    stage: str | None = None,
    kind: str = "top-k",
    k: int = 64,
    draws: int = 12,
    temperature: float | None = None,
    sequence_length: int | None = None,
    tokens: int | None = None,
    batch_size: int | None = None,
) -> TeacherCache:
    """`write_cache` with a recipe's teacher, text and seed: the rows that its phase 3 trains on, or a stage of its.

    stage: of a distillation, by name; by default the first that learns from the teacher. What else is left out is the
    stage's (temperature, sequence_length, batch_size). tokens: only so many, instead of one pass over the text. Raises
    UserError.
    """
    from mohawk.core.precision import autocast_dtype, pick_device
    from mohawk.data.same_tokenizer import teacher_tokenizer
    from mohawk.data.text import tokenizer_key
    from mohawk.loading.configs import load_config
    from mohawk.loading.models import load_teacher
    from mohawk.runs.inputs import check_inputs
    from mohawk.teacher_cache.answers import check_range

    asked, about = _stage_of(recipe, stage), recipe.teacher
    check_inputs(recipe)
    if temperature is None and kind != "hidden":
        if not isinstance(asked.temperature, (int, float)):
            raise UserError(
                "temperature: the stage's is no number, but an answer is cached at one; give --temperature T, and the "
                "same in the stage that reads the cache, or --kind hidden, which serves any"
            )
        temperature = asked.temperature
    device = pick_device(recipe.device)
    tokenizer = teacher_tokenizer(about.model, tokenizer=about.tokenizer, **about.where)
    dataset = _rows_of(recipe, asked, sequence_length or asked.sequence_length, tokenizer)
    length = len(dataset[0]["input_ids"])
    if kind == "top-k":  # before weights are loaded
        check_range("k", k, 1, load_config(about.model, **about.where).get_text_config().vocab_size)
    rows = None if tokens is None else min(len(dataset), -(-tokens // length))
    loading = {name: getattr(about, name) for name in ("quantize", "device_map") if getattr(about, name, None)}
    teacher = load_teacher(about.model, dtype=about.dtype, device=device, **about.where, **loading)
    return write_cache(
        output, teacher, dataset, kind=kind, k=k, draws=draws, seed=recipe.seed, rows=rows,
        temperature=1.0 if temperature is None else temperature, batch_size=batch_size or asked.batch_size,
        autocast=autocast_dtype(recipe.precision, device), tokenizer_hash=tokenizer_key(tokenizer),
    )  # fmt: skip


def _stage_of(recipe: RecipeFile, name: str | None) -> EndToEndPhase | Stage:
    """The phase or stage whose rows are cached."""
    if isinstance(recipe, Recipe):
        if name is not None:
            raise UserError(
                f"--stage {name}: a conversion has phases, and phase 3 learns from the logits; leave it out"
            )
        if recipe.phases.end_to_end is None:
            raise UserError("phases.end_to_end is null, so nothing learns from a cache; give the phase")
        return recipe.phases.end_to_end
    assert isinstance(recipe, StageRecipe)
    if recipe.teachers:
        raise UserError("teachers: a cache holds one teacher's answers; leave the further ones out, or train online")
    learning = {stage.name: stage for stage in recipe.stages if stage.learn_from == "teacher" and stage.data is None}
    if name is None and learning:
        return next(iter(learning.values()))
    if name not in learning:
        wanted = "there is none" if name is None else f"got --stage {name}; allowed: {', '.join(learning) or 'none'}"
        raise UserError(f"stages: a cache is for a stage that learns from the teacher on the recipe's text; {wanted}")
    return learning[name]


def _rows_of(recipe: RecipeFile, asked: EndToEndPhase | Stage, length: int, tokenizer: Any) -> Any:
    """The dataset that a phase or stage trains on. What fills up its rows is of no account."""
    if isinstance(recipe, StageRecipe):
        from mohawk.distillation.sources import load_sources, training_rows

        names = [recipe.teacher.name or "0"]
        sources = load_sources(recipe.data, names, tokenizer)
        wanted = asked.steps() * asked.batch_size * asked.gradient_accumulation
        return training_rows(recipe.data, sources, length, wanted, recipe.seed, 0)
    from mohawk.data.packing import PackedDataset, load_data

    data = load_data(
        [source.model_dump() for source in recipe.data.train], tokenizer,
        validation_share=recipe.data.validation_share, cache=recipe.data.cache,
    )  # fmt: skip
    return PackedDataset(data.train, length, seed=recipe.seed)

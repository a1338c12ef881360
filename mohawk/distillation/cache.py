"""`mohawk cache`: a recipe's teacher, run once over the rows that a phase or stage trains on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mohawk.conversion.recipe import Recipe
from mohawk.core.places import home
from mohawk.core.processes import first_before_others, joined, on_first
from mohawk.distillation.recipe import DistillRecipe, Stage, StageRecipe
from mohawk.errors import UserError
from mohawk.teacher_cache.reader import TeacherCache
from mohawk.teacher_cache.writer import write_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mohawk.conversion.recipe import EndToEndPhase
    from mohawk.data.tokenizers.run_tokenizers import RunTokenizers
    from mohawk.loading.parts import Spread
    from mohawk.schema.base import RecipeFile


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
    endpoint: Mapping[str, Any] | None = None,
) -> TeacherCache:
    """`write_cache` with a recipe's teacher, text and seed: the rows that its phase 3 trains on, or a stage of its.

    stage: of a distillation, by name; by default the first that learns from the teacher. What else is left out is the
    stage's (temperature, sequence_length, batch_size). tokens: only so many, instead of one pass over the text.
    endpoint: ask a server instead of loading the teacher: url, and what else `mohawk.generation.endpoint` takes (model,
    key_env, concurrency, timeout, retries, request). Of a teacher whose tokens are aligned with the student's, the rows
    are of its own tokens. In all the processes that torchrun or accelerate started. Raises UserError.
    """
    from mohawk.core.precision import autocast_dtype, pick_device
    from mohawk.data.text import tokenizer_key
    from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
    from mohawk.distillation.plan import bytes_of
    from mohawk.loading.configs import load_config
    from mohawk.loading.models import load_teacher, model_shape, parameter_count
    from mohawk.loading.tasks import CAUSAL, task_in
    from mohawk.runs.inputs import check_inputs, positions_of, refuse_too_long
    from mohawk.runs.sharding import parts_to_ask
    from mohawk.teacher_cache.answers import check_range

    if (task := task_in(recipe)) != CAUSAL:
        raise UserError(f"task: got {task}; caches are of causal_lm alone: an encoder's masks change with each step")
    with joined(recipe.device):
        asked, about = _stage_of(recipe, stage), cast(Any, recipe.teacher)
        if about is None and endpoint is None:
            raise UserError(
                "teacher: teacher is null, so there is nobody to ask; name one, or a server that answers for it with "
                "--endpoint"
            )
        first_before_others(lambda: check_inputs(recipe))
        if sequence_length is not None and about is not None:
            refuse_too_long("", sequence_length, about.model, positions_of(about))
        if temperature is None and kind != "hidden":
            if not isinstance(asked.temperature, (int, float)):
                raise UserError(
                    "temperature: the stage's is no number, but an answer is cached at one; give --temperature T, and "
                    "the same in the stage that reads the cache, or --kind hidden, which serves any"
                )
            temperature = asked.temperature
        device = pick_device(recipe.device)
        tokenizers = run_tokenizers(recipe)
        tokenizer = tokenizers.teacher or tokenizers.text
        length = sequence_length or asked.sequence_length
        rows_of_text = first_before_others(lambda: _rows_of(recipe, asked, length, tokenizers.text))
        rows = None if tokens is None else min(len(rows_of_text), -(-tokens // length))
        dataset = rows_of_text
        if tokenizers.teacher is not None:
            dataset = first_before_others(lambda: _of_teacher(recipe, tokenizers, rows_of_text, length, rows))
        source: Any = about if about is not None else cast(DistillRecipe, recipe).student
        entries = load_config(source.model, **source.where).get_text_config().vocab_size
        if kind == "top-k":  # before weights are loaded
            check_range("k", k, 1, entries)
        if endpoint is not None:
            if temperature != 1:
                raise UserError(
                    f"--endpoint: a server's log-probabilities are at temperature 1, the stage's is {temperature:g}; "
                    "set temperature: 1 there"
                )
            return _from_endpoint(
                endpoint, output, dataset, about, tokenizer, k=k, vocab_size=entries, rows=rows,
                tokenizer_hash=tokenizer_key(tokenizer),
            )  # fmt: skip
        loading = {name: getattr(about, name) for name in ("quantize", "device_map") if getattr(about, name, None)}
        write = functools.partial(
            write_cache, output, dataset=dataset, kind=kind, k=k, draws=draws, seed=recipe.seed, rows=rows,
            temperature=1.0 if temperature is None else temperature, batch_size=batch_size or asked.batch_size,
            autocast=autocast_dtype(recipe.precision, device), tokenizer_hash=tokenizer_key(tokenizer),
        )  # fmt: skip

        def load(spread: Spread | None) -> PreTrainedModel:
            return load_teacher(
                about.model, dtype=about.dtype, device=device, spread=spread, **about.where, **loading
            )  # fmt: skip

        def needed() -> int:
            shape = model_shape(load_config(about.model, **about.where), about.trust_remote_code)
            return parameter_count(shape) * bytes_of(about)

        parts = parts_to_ask(recipe, needed)
        if parts is not None:
            return write(teacher=load(parts.teacher))
        on_first(lambda: write(teacher=load(None)))  # which has all that it takes
        return TeacherCache(home(output))


def _of_teacher(recipe: RecipeFile, tokenizers: RunTokenizers, rows_of_text: Any, length: int, rows: int | None) -> Any:
    """Rows of the student's tokens as a teacher with another tokenizer reads them."""
    from mohawk.data.aligned_rows import TeacherRows, TokenAligner
    from mohawk.distillation.sources import examples_of

    assert isinstance(recipe, DistillRecipe) and tokenizers.teacher is not None
    examples = examples_of(recipe.data, tokenizers.text, tokenizers.teacher, length)
    aligner = TokenAligner(tokenizers.text, tokenizers.teacher, examples=examples)
    return TeacherRows(rows_of_text, aligner, rows=rows)


def _from_endpoint(
    endpoint: Mapping[str, Any], output: str | Path, dataset: Any, about: Any, tokenizer: Any, *, k: int, **keep: Any
) -> TeacherCache:
    """The cache of a server's answers, by the first process."""
    from mohawk.distillation.endpoint_cache import cache_endpoint
    from mohawk.generation.generate_data import json_object
    from mohawk.generation.prompt_logprobs import PromptScorer

    options = dict(endpoint)
    if isinstance(request := options.get("request"), str):
        options["request"] = json_object(request)
    url, model = options.pop("url"), options.pop("model", None)
    if model is None and about is None:
        raise UserError("--model: give the name by which the server knows the teacher, as teacher is null")

    def ask() -> None:
        scorer = PromptScorer(url, model or about.model, tokenizer, k, **options)
        cache_endpoint(output, scorer, dataset, **keep)

    on_first(ask)
    return TeacherCache(home(output))


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

        names = ["0" if recipe.teacher is None else recipe.teacher.name or "0"]
        sources = load_sources(recipe.data, names, tokenizer)
        assert isinstance(asked, Stage)
        return training_rows(recipe.data, sources, length, asked.asked_rows(), recipe.seed, 0)
    from mohawk.data.packing import PackedDataset, load_data

    data = load_data(
        [source.model_dump() for source in recipe.data.train], tokenizer,
        validation_share=recipe.data.validation_share, cache=recipe.data.cache,
    )  # fmt: skip
    return PackedDataset(data.train, length, seed=recipe.seed)

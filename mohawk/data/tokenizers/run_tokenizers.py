"""Which tokenizer cuts a recipe's text: the teacher's, or the student's own where it has no teacher, or one of another
tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.data.tokenizers.same_tokenizer import check_embedding_rows, check_same, own_tokenizer, teacher_tokenizer
from mohawk.errors import UserError
from mohawk.loading.configs import load_config
from mohawk.loading.models import load_tokenizer
from mohawk.loading.tasks import CAUSAL, task_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.schema.base import RecipeFile


@dataclass(frozen=True)
class RunTokenizers:
    """text: what cuts the text that a run reads, and what its student is saved with. teacher: the teacher's own, where
    that is another one, or one with another chat template, and its tokens are aligned with the text's; None
    otherwise."""

    text: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | None = None


def run_tokenizers(recipe: RecipeFile) -> RunTokenizers:
    """The tokenizers of a recipe. Raises UserError as `teacher_tokenizer`, and where a student lacks its own."""
    about, task = recipe.teacher, task_in(recipe)
    align = getattr(recipe, "align", None)
    if task != CAUSAL:
        found = load_tokenizer(about.model, tokenizer=about.tokenizer, option="teacher.tokenizer", **about.where)
        rows = load_config(about.model, **about.where, task=task).get_text_config().vocab_size
        check_embedding_rows(found, rows, f"teacher: {about.model}")
        return RunTokenizers(found)
    if about is not None:
        theirs = teacher_tokenizer(about.model, tokenizer=about.tokenizer, **about.where)
        if align is None:
            return RunTokenizers(theirs)
        own = _student_tokenizer(recipe)
        try:
            check_same(theirs, own, "student.model")
        except UserError:
            return RunTokenizers(own, theirs)
        if own.chat_template and own.chat_template != theirs.chat_template and _has_pairs(recipe):
            return RunTokenizers(own, theirs)
        return RunTokenizers(theirs)
    return RunTokenizers(_student_tokenizer(recipe))


def _has_pairs(recipe: Any) -> bool:
    """Whether a recipe reads prompts and responses, which may be chats."""
    own = [stage.data for stage in recipe.stages if stage.data is not None]
    return any(source.kind == "pairs" for data in [recipe.data, *own] for source in data.train)


def why_uncompared(recipe: RecipeFile) -> str | None:
    """Why a run's student is not compared with its teacher token by token; None where it is."""
    if recipe.teacher is None:
        return "the run has no teacher"
    if getattr(recipe, "align", None) is not None and run_tokenizers(recipe).teacher is not None:
        return "the teacher's tokens are others than the student's (align)"
    return None


def _student_tokenizer(recipe: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model that a recipe's student is made of."""
    given = recipe.student
    assert given.model is not None  # refused among the recipe's contradictions
    own = own_tokenizer(given.model, **given.where, who="student.model")
    if own is None:
        raise UserError(
            f"student.model: {given.model} has no tokenizer, which is to cut the text; give a folder that has one"
        )
    rows = load_config(given.model, **given.where, who="student.model").get_text_config().vocab_size
    check_embedding_rows(own, rows, f"student.model: {given.model}")
    return own


def tokenizer_source(recipe: RecipeFile) -> str | Path:
    """What a recipe gives that the text's tokenizer comes from, for messages."""
    about: Any = recipe.teacher
    if about is None or getattr(recipe, "align", None) is not None:
        return recipe.student.model  # pyrefly: ignore[missing-attribute]  # a distillation's, which has one
    return about.tokenizer or about.model

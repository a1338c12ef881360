"""What runs of encoders read, and how they end: masked words and labelled texts in place of text from left to right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from mohawk.data.encoder_rows import (
    LabelFields,
    Labelled,
    LabelledRows,
    TextRows,
    joined,
    read_labelled,
    split_labelled,
)
from mohawk.data.masking import Masking
from mohawk.data.packing import Data, Documents, load_data
from mohawk.data.source_files import as_source
from mohawk.distillation.recipe import DistillData, DistillRecipe, Stage
from mohawk.errors import UserError
from mohawk.loading.configs import load_config
from mohawk.loading.tasks import class_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 64  # rows of labelled text whose tokens are compared with the teacher's vocabulary


def masking_of(recipe: DistillRecipe, tokenizer: PreTrainedTokenizerBase, *, dynamic: bool | None = None) -> Masking:
    """A recipe's masks of a tokenizer's words. dynamic: whatever the recipe says. Raises UserError."""
    asked = recipe.masking
    return Masking.of(
        tokenizer, share=asked.share, masked=asked.masked, random=asked.random,
        dynamic=asked.dynamic if dynamic is None else dynamic, seed=recipe.seed,
    )  # fmt: skip


def label_fields(recipe: DistillRecipe) -> LabelFields:
    """Which fields of a row are text, pair and class, and what the teacher's classes are called. Raises UserError."""
    assert recipe.teacher is not None  # refused among the contradictions
    config: Any = load_config(recipe.teacher.model, **recipe.teacher.where, task=recipe.task)
    return LabelFields(recipe.data.label_field, recipe.data.pair_field, class_names(config), config.num_labels)


class EncoderData:
    """What the stages of an encoder's distillation read; see `mohawk.distillation.sources.StageData`."""

    def __init__(self, recipe: DistillRecipe, tokenizer: PreTrainedTokenizerBase):
        """Read all of it. Raises UserError."""
        self._recipe, self._tokenizer = recipe, tokenizer
        self._labelled = recipe.task == "classification"
        self._fields = label_fields(recipe) if self._labelled else None
        self._masking = None if self._labelled else masking_of(recipe, tokenizer, dynamic=False)
        self._read = self._load(recipe.data, evaluation=True)
        self._own = [
            (stage.data, self._load(self.asked(stage), evaluation=False)) for stage in recipe.stages if stage.data
        ]
        if not any(kept for kept in (self._read.held_out, self._read.evaluation) if kept is not None and len(kept)):
            raise UserError("data: nothing to evaluate on; raise data.validation_share, or give data.evaluation")

    def _load(self, asked: DistillData, *, evaluation: bool) -> Any:
        """(train, held_out, evaluation), of documents or labelled texts."""
        other = asked.evaluation if evaluation else []
        if self._fields is None:
            plain = [[as_source(source).__dict__ for source in sources] for sources in (asked.train, other)]
            return load_data(
                plain[0], self._tokenizer, evaluation=plain[1], validation_share=asked.validation_share,
                cache=asked.cache,
            )  # fmt: skip
        read = [joined([read_labelled(source, self._fields) for source in of]) if of else None
                for of in (asked.train, other)]  # fmt: skip
        assert read[0] is not None  # a recipe has text to train on
        train, held_out = split_labelled(read[0], asked.validation_share)
        made: Any = Data
        return made(train, held_out, read[1])

    def asked(self, stage: Stage) -> DistillData:
        """The recipe's part that says what a stage trains on."""
        if stage.data is None:
            return self._recipe.data
        own = self._recipe.data
        kept = {"validation_share": own.validation_share, "cache": stage.data.cache or own.cache}
        return stage.data.model_copy(update=kept)

    def rows(self, stage: Stage, pad: int) -> Dataset:
        """The dataset that a stage trains on; pad: fills up rows."""
        read = next((read for data, read in self._own if data is stage.data), self._read)
        if isinstance(read.train, Labelled):
            return LabelledRows(read.train, self._tokenizer, stage.sequence_length, pad_token_id=pad)
        return TextRows(
            read.train, self._tokenizer, stage.sequence_length, seed=self._recipe.seed, pad_token_id=pad
        )  # fmt: skip

    def texts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Token ids of every text; of labelled ones, those of the first rows."""
        for read in (self._read, *(read for _, read in self._own)):
            for kept in (read.train, read.held_out, read.evaluation):
                if isinstance(kept, Labelled):
                    ids = [self._tokenizer(text)["input_ids"] for text in kept.texts[:LOOKED_AT]]
                    yield "the labelled texts", np.array([token for row in ids for token in row], dtype=np.int64)
                else:
                    yield from ((text.name, text.tokens) for text in (kept.texts if kept is not None else ()))

    def held_out(self, sequence_length: int, tokens: int, pad: int) -> dict[str, Dataset]:
        """Rows of held-out text, whose masks are the same ones whenever they are read, or of labelled texts."""
        found: dict[str, Dataset] = {}
        for name, kept in (("held_out", self._read.held_out), ("evaluation", self._read.evaluation)):
            if isinstance(kept, Labelled) and len(kept):
                count = max(1, tokens // sequence_length)
                found[name] = LabelledRows(kept, self._tokenizer, sequence_length, pad_token_id=pad, count=count)
            elif isinstance(kept, Documents) and kept.tokens:
                found[name] = TextRows(
                    kept, self._tokenizer, sequence_length, tokens=min(tokens, kept.tokens), pad_token_id=pad,
                    masking=self._masking,
                )  # fmt: skip
        return found

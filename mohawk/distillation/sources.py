"""The rows that a distillation trains on: texts, prompts and responses, or several sources in proportion."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from mohawk.data.aligned_rows import Examples
from mohawk.data.mixture import AnsweredBy, Mixture
from mohawk.data.packing import Data, Documents, PackedDataset, load_data
from mohawk.data.pairs import Pairs, PairsDataset, check_pairs, read_pairs, split_pairs
from mohawk.distillation.recipe import DistillData, DistillSource, Stage
from mohawk.errors import UserError
from mohawk.losses.rationales import TEMPLATES, read_rationale_pairs
from mohawk.runs.context import TextData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What a recipe's `data` gives: text, packed by document, and pairs by source; held-out parts of both.

    text: None where every source is of pairs. pairs, held_out_pairs: by the source's place in the recipe.
    """

    text: Data | None
    pairs: dict[int, Pairs]
    held_out_pairs: dict[int, Pairs]


def load_sources(asked: DistillData, teachers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Sources:
    """Tokenise all sources, or find them in the cache.

    teachers: their names, which an example's `teacher_field` may give. Raises UserError.
    """
    texts = [source for source in asked.train if source.kind == "text"]
    evaluation = [source.model_dump() for source in asked.evaluation]
    text = None
    if texts:
        text = load_data(
            [_plain(source) for source in texts], tokenizer, evaluation=evaluation,
            validation_share=asked.validation_share, cache=asked.cache,
        )  # fmt: skip
    elif evaluation:
        # evaluation text needs no training text beside it
        other = load_data(evaluation, tokenizer, validation_share=0, cache=asked.cache).train
        text = Data(Documents((), other.spans[:0]), Documents((), other.spans[:0]), other)
    pairs, held_out = {}, {}
    for i, source in enumerate(asked.train):
        if source.kind == "text":
            continue
        if source.kind == "rationales":
            found = read_rationale_pairs(
                [_plain(source)], tokenizer, templates=source.templates or TEMPLATES,
                label_prefix=source.label_prefix, rationale_prefix=source.rationale_prefix,
                rationale_weight=source.rationale_weight,
            )  # fmt: skip
        else:
            found = read_pairs(
                [_plain(source)], tokenizer, prompt_field=source.prompt_field, response_field=source.response_field,
                messages_field=source.messages_field, chat=source.chat, turns=source.turns,
                teacher_field=source.teacher_field, teachers=teachers if source.teacher_field else (),
                weight_field=source.weight_field, cache=asked.cache,
            )  # fmt: skip
        pairs[i], held_out[i] = split_pairs(found, asked.validation_share)
    return Sources(text, pairs, held_out)


class StageData:
    """What the stages of a distillation read: most of them the recipe's data, some their own.

    A stage's own documents are held out as the recipe's are, so that none is trained on.
    """

    def __init__(self, recipe: Any, tokenizer: PreTrainedTokenizerBase):
        """Tokenise all, and check that the stages can read it. Raises UserError."""
        self._asked, self._seed = recipe.data, recipe.seed
        given = [recipe.teacher, *recipe.teachers]
        teachers = [teacher.name or str(i) for i, teacher in enumerate(given) if teacher is not None]
        self._teachers = teachers

        def checked(data: DistillData, stages: Sequence[Stage]) -> Sources:
            sources = load_sources(data, teachers, tokenizer)
            for length in sorted({stage.sequence_length for stage in stages}):
                check_pair_rows(data, sources, length)
            return sources

        self.sources = checked(recipe.data, [stage for stage in recipe.stages if stage.data is None])
        self._own = [
            (stage.data, checked(self.asked(stage), [stage])) for stage in recipe.stages if stage.data is not None
        ]
        text = self.sources.text
        documents = () if text is None else (text.held_out, text.evaluation)
        pairs = any(len(pairs) for pairs in self.sources.held_out_pairs.values())
        if not pairs and not any(kept is not None and kept.tokens for kept in documents):
            raise UserError("data: nothing to evaluate on; raise data.validation_share, or give data.evaluation")

    def asked(self, stage: Stage) -> DistillData:
        """The recipe's part that says what a stage trains on."""
        if stage.data is None:
            return self._asked
        kept = {"validation_share": self._asked.validation_share, "cache": stage.data.cache or self._asked.cache}
        return stage.data.model_copy(update=kept)

    def of(self, stage: Stage) -> Sources:
        """The data that a stage trains on: its own, or the recipe's."""
        return next((sources for data, sources in self._own if data is stage.data), self.sources)

    def rows(self, stage: Stage, pad: int) -> Any:
        """The dataset that a stage trains on; pad: fills up rows."""
        asked, sources = self.asked(stage), self.of(stage)
        wanted = stage.asked_rows()
        return training_rows(asked, sources, stage.sequence_length, wanted, self._seed, pad, self._teachers)

    def texts(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name of every text or source of pairs of the recipe's data, and its token ids."""
        if self.sources.text is not None:
            yield from TextData(self.sources.text).texts()
        for kept in (self.sources.pairs, self.sources.held_out_pairs):
            for i, pairs in kept.items():
                yield self._asked.train[i].source, pairs.tokens

    def held_out(self, sequence_length: int, tokens: int, pad: int) -> dict[str, Dataset]:
        """Rows of held-out text and of held-out prompts and responses, by name."""
        text = self.sources.text
        found = {} if text is None else TextData(text).held_out(sequence_length, tokens, pad)
        pairs = held_out_rows(self._asked, self.sources, sequence_length, tokens, pad)
        return found if pairs is None else found | {"held_out_pairs": pairs}


def training_rows(
    asked: DistillData,
    sources: Sources,
    sequence_length: int,
    rows: int | None,
    seed: int,
    pad: int,
    teachers: Sequence[str] = (),
) -> Any:
    """A dataset of rows of `sequence_length` tokens: text alone, packed over all its sources, or a mixture of sources.

    rows: how many a stage will ask for: a mixture holds its proportions over so many. None: each row once. teachers:
    their names, one of which a source may give, whose rows then have their place as the column `teacher`.
    """
    train = asked.train
    plain = not sources.pairs and all(
        s.sampling_weight is None and s.loss_weight == 1 and not s.own_loss and not s.teacher for s in train
    )
    if plain:
        assert sources.text is not None
        return PackedDataset(sources.text.train, sequence_length, seed=seed, pad_token_id=pad)
    parts, at = [], 0
    for i, source in enumerate(train):
        if source.kind != "text":
            parts.append(_pairs_rows(source, sources.pairs[i], sequence_length, seed, pad))
        else:
            assert sources.text is not None
            documents = sources.text.train
            own = Documents(documents.texts, documents.spans[documents.spans[:, 0] == at])
            parts.append(PackedDataset(own, sequence_length, seed=seed, pad_token_id=pad))
            at += 1
        if source.teacher is not None:
            parts[-1] = AnsweredBy(parts[-1], teachers.index(source.teacher))
    if len(parts) == 1 and train[0].loss_weight == 1:
        return parts[0]
    if any(s.sampling_weight is not None for s in train):
        weights = [1.0 if s.sampling_weight is None else s.sampling_weight for s in train]
    else:  # in proportion to their size
        weights = [float(len(part)) for part in parts]
    return Mixture(parts, weights, [source.loss_weight for source in train], rows=rows, seed=seed)


def check_pair_rows(asked: DistillData, sources: Sources, sequence_length: int) -> None:
    """UserError where pairs make no rows of `sequence_length` tokens, or lack what their weighting goes by."""
    for i, pairs in sources.pairs.items():
        source = asked.train[i]
        check_pairs(
            pairs, sequence_length, weighting=source.weighting, length_normalized=source.length_normalized,
            too_long=source.too_long,
        )  # fmt: skip


def rows_by_source(
    asked: DistillData, sources: Sources, sequence_length: int, seed: int, pad: int
) -> dict[str, PairsDataset]:
    """The rows of each source of pairs or rationales by itself, by its name."""
    return {
        asked.train[i].source: _pairs_rows(asked.train[i], pairs, sequence_length, seed, pad)
        for i, pairs in sources.pairs.items()
    }


def held_out_rows(asked: DistillData, sources: Sources, sequence_length: int, tokens: int, pad: int) -> Any:
    """Rows of the held-out prompts and responses; None where there are none."""
    parts = [
        _pairs_rows(asked.train[i], pairs, sequence_length, 0, pad)
        for i, pairs in sources.held_out_pairs.items()
        if len(pairs)
    ]
    if not parts:
        return None
    rows = min(max(1, -(-tokens // sequence_length)), sum(map(len, parts)))
    return Mixture(parts, [float(len(part)) for part in parts], rows=rows, seed=0)


def _pairs_rows(source: DistillSource, pairs: Pairs, sequence_length: int, seed: int, pad: int) -> PairsDataset:
    return PairsDataset(
        pairs, sequence_length, weighting=source.weighting, length_normalized=source.length_normalized,
        too_long=source.too_long, seed=seed, pad_token_id=pad,
    )  # fmt: skip


def examples_of(
    asked: DistillData, tokenizer: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase, sequence_length: int
) -> list[Examples]:
    """The prompts and responses of a recipe's data as both tokenizers have them, each by its own template."""
    found = []
    for source in asked.train:
        if source.kind != "pairs":
            continue
        ours, theirs = (
            read_pairs(
                [_plain(source)], one, prompt_field=source.prompt_field, response_field=source.response_field,
                messages_field=source.messages_field, chat=source.chat, turns=source.turns,
                weight_field=source.weight_field, cache=asked.cache,
            )
            for one in (tokenizer, teachers)
        )  # fmt: skip
        found.append(Examples(ours, theirs, sequence_length))
    return found


def _plain(source: DistillSource) -> dict[str, Any]:
    """A source as `mohawk.data.text` takes it."""
    return {key: getattr(source, key) for key in ("source", "split", "field", "subset", "format")}

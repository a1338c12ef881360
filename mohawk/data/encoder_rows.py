"""Rows that encoders read: text between the tokenizer's first and last special token, or a labelled text or pair.

Rows of text are RoBERTa's full sentences (arXiv 1907.11692, section 4.2): documents laid end to end with separators
between them, each row [CLS] ... [SEP]. Labelled rows are [CLS] text [SEP] or [CLS] text [SEP] pair [SEP].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mohawk.data.masking import ROW, Masking
from mohawk.data.packing import Documents, PackedDataset
from mohawk.data.packing import collate as stacked
from mohawk.data.records import read_records
from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTHS = ("input_ids", "attention_mask", "token_type_ids")  # columns as long as a row
LEAST = 4  # tokens of a row: a word and a half between two special tokens


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows into a batch as long as the longest of them, without the padding that all have."""
    batch = stacked(rows)
    longest = max(1, int(batch["attention_mask"].sum(-1).max()))
    return {name: column[:, :longest] if column.dim() == 2 else column for name, column in batch.items()}


class TextRows(Dataset):
    """Rows of text, as `PackedDataset` orders them: `input_ids` and `attention_mask` (n), and `row`, the row's place.

    sequence_length: n, special tokens included. masking: puts the same masks into a row whenever it is read, and its
    words into `labels` (n); None: masks are drawn as a step is taken. Raises UserError for rows too short or no text.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        tokens: float | None = None,
        seed: int = 0,
        pad_token_id: int = 0,
        masking: Masking | None = None,
    ):
        if sequence_length < LEAST:
            raise UserError(f"sequence_length: got {sequence_length}; a row of an encoder needs at least {LEAST}")
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.first, self.last, self.length, self.pad = first, last, sequence_length, pad_token_id
        inner = sequence_length - (first is not None) - (last is not None)
        self.packed = PackedDataset(documents, inner, tokens=tokens, seed=seed, pad_token_id=pad_token_id)
        self.masking = masking

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        packed = self.packed[index]
        ids = packed["input_ids"][packed["segment_ids"] >= 0]
        if self.first is not None:
            ids = ids[ids != self.first]  # of documents that begin within the row, behind a separator
        if self.last is not None and len(ids) and ids[-1] == self.last:
            ids = ids[:-1]
        ends = [[] if token is None else [token] for token in (self.first, self.last)]
        ids = torch.cat([torch.tensor(ends[0], dtype=torch.long), ids, torch.tensor(ends[1], dtype=torch.long)])
        row = {name: torch.full((self.length,), fill) for name, fill in zip(LENGTHS[:2], (self.pad, 0), strict=True)}
        row["input_ids"][: len(ids)], row["attention_mask"][: len(ids)] = ids, 1
        row[ROW] = torch.tensor(index)
        if self.masking is None:
            return row
        batch = self.masking({name: column[None] for name, column in row.items()}, 0)
        return {name: column[0] for name, column in batch.items()}


@dataclass(frozen=True)
class Labelled:
    """Texts with a class each. pairs: the second text of each, None where there is none. labels: (rows,) int64."""

    texts: list[str]
    pairs: list[str | None]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, kept: np.ndarray) -> Labelled:
        """Those where `kept` (rows,) bool holds."""
        places = np.flatnonzero(kept)
        return Labelled([self.texts[i] for i in places], [self.pairs[i] for i in places], self.labels[places])


@dataclass(frozen=True)
class LabelFields:
    """Which fields of a row are what. names: the number of each class by its name; of so many classes."""

    label: str
    pair: str
    names: Mapping[str, int]
    classes: int


def labelled_row(
    where: str, row: Mapping[str, Any], text_field: str, fields: LabelFields
) -> tuple[str, str | None, int]:
    """(text, second text or None, class) of a row. Raises UserError with what is wrong, and where."""
    for name in (text_field, fields.label):
        if name not in row or row[name] is None:
            raise UserError(f"{where}: no field {name!r}; its fields: {', '.join(map(str, row)) or 'none'}")
    text, pair, label = row[text_field], row.get(fields.pair), row[fields.label]
    for name, value in ((text_field, text), (fields.pair, pair)):
        if not isinstance(value, str) and not (value is None and name == fields.pair):
            raise UserError(f"{where}: field {name!r} holds {type(value).__name__}, not text")
    if isinstance(label, str) and label in fields.names:
        return text, pair, fields.names[label]
    if type(label) is int and 0 <= label < fields.classes:
        return text, pair, label
    known = sorted(fields.names, key=lambda name: fields.names[name])
    raise UserError(
        f"{where}: field {fields.label!r}: got {label!r}; allowed: 0 to {fields.classes - 1}, or "
        f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}, the teacher's classes"
    )


def read_labelled(source: Any, fields: LabelFields) -> Labelled:
    """All rows of a source. Raises UserError with file and line, also for a source without rows."""
    read = [labelled_row(where, row, source.field, fields) for where, row in read_records(source)]
    if not read:
        raise UserError(f"data: {source.source} has no rows; remove it or give it labelled texts")
    texts, pairs, labels = zip(*read, strict=True)
    return Labelled(list(texts), list(pairs), np.array(labels, dtype=np.int64))


def joined(parts: Sequence[Labelled]) -> Labelled:
    """All of several, in their order."""
    texts, pairs = ([x for part in parts for x in getattr(part, name)] for name in ("texts", "pairs"))
    return Labelled(texts, pairs, np.concatenate([part.labels for part in parts]))


def split_labelled(rows: Labelled, share: float) -> tuple[Labelled, Labelled]:
    """(training, held-out) rows; about `share` of the distinct texts are held out, whichever their hashes say. Raises
    UserError where that leaves either side empty."""
    keys = [
        f"{text}\0{pair or ''}".encode("utf-8", "surrogatepass")
        for text, pair in zip(rows.texts, rows.pairs, strict=True)
    ]
    digests = np.array(
        [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys], np.uint64
    )
    unique = np.unique(digests)
    count = round(share * len(unique))
    if share > 0 and not 0 < count < len(unique):
        raise UserError(
            f"data.validation_share: {share} of {len(unique)} labelled texts holds out {count}; give more, or set 0"
        )
    held = np.isin(digests, unique[:count])
    return rows.take(~held), rows.take(held)


class LabelledRows(Dataset):
    """Labelled texts as an encoder reads them: `input_ids`, `attention_mask` and, where the tokenizer makes them,
    `token_type_ids` (n), and the class in `labels`. What is longer than `sequence_length` is cut, the longer text of
    two first. count: only so many, drawn at random, always the same ones: files are often sorted by class."""

    collate = staticmethod(collate)

    def __init__(
        self,
        rows: Labelled,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        pad_token_id: int = 0,
        count: int | None = None,
    ):
        self.rows, self.tokenizer, self.length, self.pad = rows, tokenizer, sequence_length, pad_token_id
        self.places: Sequence[int] = range(len(rows))
        if count is not None and count < len(rows):
            drawn = np.random.default_rng(0).permutation(len(rows))[:count]
            self.places = [int(place) for place in np.sort(drawn)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = self.places[index]
        read = self.tokenizer(
            self.rows.texts[index], self.rows.pairs[index], truncation="longest_first", max_length=self.length
        )
        row: dict[str, Tensor] = {}
        for name in LENGTHS:
            if name in read:
                row[name] = torch.full((self.length,), self.pad if name == "input_ids" else 0)
                row[name][: len(read[name])] = torch.tensor(read[name])
        if "attention_mask" not in row:
            row["attention_mask"] = (torch.arange(self.length) < len(read["input_ids"])).long()
        return row | {"labels": torch.tensor(self.rows.labels[index])}

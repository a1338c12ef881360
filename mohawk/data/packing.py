"""Tokenised text to packed rows: held out by document, shuffled, packed with segment ids.

    tokenize(source, tokenizer)        one source -> TokenizedText, a folder of token ids on disk (text.py)
    split_documents(texts, share)      -> (training Documents, held-out Documents)
    PackedDataset(documents, length)   a torch map-style dataset of rows
    collate(rows)                      -> a batch

Token ids stay on disk, memory-mapped: what is in memory is some 50 bytes per document and 8 per row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mohawk.core.terminal import SHOWN
from mohawk.data.next_tokens import IGNORED
from mohawk.data.text import TokenizedText, tokenize
from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """Some documents of some tokenised texts.

    texts: where their tokens lie. spans: int64 (documents, 3): which text, first token, one past the last.
    """

    texts: tuple[TokenizedText, ...]
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def tokens(self) -> int:
        """How many tokens the documents have together."""
        return int((self.spans[:, 2] - self.spans[:, 1]).sum())


@dataclass(frozen=True)
class Data:
    """What a recipe's `data` gives: documents to train on, held-out ones, and another source's (or None)."""

    train: Documents
    held_out: Documents
    evaluation: Documents | None


def load_data(
    train: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    evaluation: Sequence[Any] | None = None,
    validation_share: float = 0.01,
    cache: Path | str | None = None,
) -> Data:
    """Tokenise all sources (or find them in the cache) and hold out. Raises UserError."""
    texts = [tokenize(source, tokenizer, cache=cache) for source in train]
    kept, held_out = split_documents(texts, validation_share)
    other = [tokenize(source, tokenizer, cache=cache) for source in evaluation or ()]
    return Data(kept, held_out, split_documents(other)[0] if other else None)


def split_documents(texts: Sequence[TokenizedText], share: float = 0.0) -> tuple[Documents, Documents]:
    """Split into (training, held-out) documents; about `share` of all tokens are held out.

    The split depends on the documents' text alone, not on a seed or on their order, so the same text is held
    out in every run. Documents are ranked by a hash of their text and taken whole, in that order, while they
    fit; identical documents always fall on the same side. Where documents are so long that this leaves less
    than half the share (a single book, say), the tail of one is cut off and held out instead, and every copy
    of that document loses its tail in training. Raises UserError when share is not in [0, 1) or the text is
    too short to hold anything out.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.validation_share: got {share}; allowed: 0 up to, but not including, 1")
    texts = tuple(texts)
    spans = np.concatenate(
        [
            np.stack([np.full(len(t), i, dtype=np.int64), t.offsets[:-1], t.offsets[1:]], axis=1)
            for i, t in enumerate(texts)
        ]
    )
    nothing = Documents(texts, spans[:0])
    if share == 0:
        return Documents(texts, spans), nothing
    lengths = spans[:, 2] - spans[:, 1]
    target = int(lengths.sum() * share)
    if target < 2:
        raise UserError(
            f"data.validation_share: {share} of {lengths.sum()} tokens is too little to hold out; "
            "raise it, give more text, or set it to 0"
        )
    # digests are hashes already: their order is as good as random, and the same everywhere
    unique, group = np.unique(np.concatenate([t.digests for t in texts]), return_inverse=True)
    sizes = np.bincount(group, weights=lengths).astype(np.int64)
    chosen = np.zeros(len(unique), dtype=bool)
    taken = 0
    # a quarter over the target is allowed, or short texts with few documents would hold out next to nothing
    for g in np.flatnonzero(sizes <= 1.25 * target):
        if taken + sizes[g] <= 1.25 * target:
            chosen[g] = True
            taken += sizes[g]
        if taken >= target:
            break
    held = spans[chosen[group]]
    train = spans[~chosen[group]]
    if taken < 0.5 * target:
        groups = group[~chosen[group]]
        tail = target - taken
        longest = lengths[~chosen[group]]
        # any document that keeps most of itself will do; failing that, the longest
        roomy = np.flatnonzero(longest >= 2 * tail)
        which = groups[roomy[np.argmin(groups[roomy])] if len(roomy) else np.argmax(longest)]
        copies = np.flatnonzero(groups == which)
        tail = min(tail, int(longest[copies[0]]) - 1)
        cut = train[copies[:1]].copy()
        train = train.copy()
        train[copies, 2] -= tail
        cut[:, 1] = cut[:, 2] - tail
        held = np.concatenate([held, cut])
        log.info("held out the last %d tokens of a long document of %s", tail, texts[cut[0, 0]].name, extra=SHOWN)
    return Documents(texts, train), Documents(texts, held)


class PackedDataset(torch.utils.data.Dataset):
    """Rows of `sequence_length` tokens packed from documents, in a fixed order that `seed` decides.

    In each epoch the documents are shuffled and laid end to end, the result is cut into rows, and the rows
    are shuffled (neighbouring rows of a long document would otherwise share a batch). Nothing is dropped: a
    document that runs over a row's end continues in another row as a new segment, and the epoch's last row is
    padded. Each row is a dict of LongTensors (sequence_length):

    input_ids; position_ids, from 0 in every segment; segment_ids 0, 1, 2, ..., and -1 for padding; labels,
    not shifted, -100 at padding and at the first token of every segment, so that nothing is predicted across
    documents.

    tokens: the budget; None is one epoch. Beyond one epoch the text is read again in a new order.
    Raises UserError for sequence_length < 2 or no text.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        *,
        tokens: float | None = None,
        seed: int = 0,
        pad_token_id: int = 0,
    ):
        if sequence_length < 2:
            raise UserError(f"sequence_length: got {sequence_length}; predicting a token needs at least 2")
        if len(documents) == 0:
            raise UserError("data: no documents to pack; give text, or a validation_share above 0")
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.rows_per_epoch = -(-documents.tokens // sequence_length)
        self.rows = self.rows_per_epoch if tokens is None else max(1, -(-int(tokens) // sequence_length))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        if self.rows > self.rows_per_epoch:
            log.info(
                "the text has %d tokens and %d are asked for: it is read %.1f times, reshuffled each time",
                documents.tokens,
                self.rows * sequence_length,
                self.rows / self.rows_per_epoch,
                extra=SHOWN,
            )

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What one epoch reads: document order, where each document ends once laid end to end, and row order."""
        if epoch not in self._epochs:
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(len(self.documents))
            spans = self.documents.spans[order]
            ends = np.cumsum(spans[:, 2] - spans[:, 1])
            rows = generator.permutation(self.rows_per_epoch)
            if len(self._epochs) > 7:  # a sampler may jump between epochs, but not hold many in memory
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = (order, ends, rows)
        return self._epochs[epoch]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        n = self.sequence_length
        input_ids = np.full(n, self.pad_token_id, dtype=np.int64)
        position_ids = np.arange(n, dtype=np.int64)
        segment_ids = np.full(n, -1, dtype=np.int64)
        labels = np.full(n, IGNORED, dtype=np.int64)
        filled = 0
        for segment, (here, text, start) in enumerate(self._pieces(index)):
            take, filled = here.stop - here.start, here.stop
            input_ids[here] = self.documents.texts[text].tokens[start : start + take]
            labels[here] = input_ids[here]
            labels[here.start] = IGNORED
            position_ids[here] = np.arange(take)
            segment_ids[here] = segment
        position_ids[filled:] = np.arange(n - filled)
        columns = {"input_ids": input_ids, "position_ids": position_ids}
        columns |= {"segment_ids": segment_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in columns.items()}

    def _pieces(self, index: int) -> Iterator[tuple[slice, int, int]]:
        """What a row is made of: where in it, which of the documents' texts, and from which of its tokens on."""
        index = range(self.rows)[index]  # IndexError past the end, negative from the end
        epoch, row = divmod(index, self.rows_per_epoch)
        order, ends, rows = self._epoch(epoch)
        n = self.sequence_length
        begin, filled = int(rows[row]) * n, 0
        which = int(np.searchsorted(ends, begin, side="right"))
        while filled < n and which < len(order):
            text, first, last = map(int, self.documents.spans[order[which]])
            skip = begin + filled - (int(ends[which]) - (last - first))  # tokens of it that lie in earlier rows
            take = min(n - filled, last - first - skip)
            yield slice(filled, filled + take), text, first + skip
            filled, which = filled + take, which + 1


class BySource(PackedDataset):
    """The same rows with one column more, `sources` (n,): the index in `self.sources`, names without doubles, of the
    text that a token is of; -1 at padding."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        names = [text.name for text in self.documents.texts]
        self.sources = tuple(dict.fromkeys(names))
        self._source_of = [self.sources.index(name) for name in names]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sources = torch.full((self.sequence_length,), -1)
        for here, text, _ in self._pieces(index):
            sources[here] = self._source_of[text]
        return super().__getitem__(index) | {"sources": sources}


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into a batch: dict of LongTensors (batch, sequence_length)."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

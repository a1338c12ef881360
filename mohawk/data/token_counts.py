"""How often each token occurs in a recipe's data, and which ones a smaller vocabulary is asked to keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from mohawk.data.packing import Documents, PackedDataset
from mohawk.data.pair_tokens import Pairs

LENGTH = 4096  # of the rows that documents are read in; of no other effect


def token_counts(documents: Documents | None, pairs: Iterable[Pairs], vocabulary: int) -> np.ndarray:
    """(vocabulary,) int64, how often each id occurs in documents and in prompts and responses."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    rows = PackedDataset(documents, LENGTH) if documents is not None and documents.tokens else []
    for i in range(len(rows)):
        row = rows[i]
        counts += np.bincount(row["input_ids"][row["segment_ids"] >= 0].numpy(), minlength=vocabulary)
    for one in pairs:
        counts += np.bincount(one.tokens, minlength=vocabulary)
    return counts


def most_frequent(counts: np.ndarray, asked: int | Literal["corpus"]) -> list[int]:
    """Ids that occur at all ("corpus"), or so many of the most frequent, ascending; of equal ones the first."""
    if asked == "corpus":
        return np.flatnonzero(counts).tolist()
    return [int(i) for i in np.sort(np.argsort(-counts, kind="stable")[:asked])]

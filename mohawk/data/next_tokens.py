"""Which positions of a batch predict which tokens: the same ones for every loss, count and measurement."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def next_column(column: Tensor, fill: float) -> Tensor:
    """A column (b, n) aligned with the positions that predict it; the last position predicts nothing."""
    return F.pad(column[:, 1:], (0, 1), value=fill)


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """(b, n) int64: the label that each position predicts, -100 where it predicts none.

    A position predicts the token behind it where both are real, of one document, and that token has a label.

    batch: `labels` (b, n), unshifted, -100 where nothing is learned; `attention_mask` (b, n), 0 at padding, on any
    side; `segment_ids` (b, n), the document of each token, -1 at padding.
    """
    labels = next_column(batch["labels"], IGNORED)
    mask, segments = batch.get("attention_mask"), batch.get("segment_ids")
    if mask is not None and mask.dim() == 2:  # others are their makers' to align with the labels
        real = mask.bool()
        labels = labels.masked_fill(~(real & next_column(real, False)), IGNORED)
    if segments is not None:
        labels = labels.masked_fill((segments < 0) | (segments != next_column(segments, -1)), IGNORED)
    return labels


def positions(attention_mask: Tensor) -> Tensor:
    """(b, n) int64: each token's place among the real ones of its row, from 0, whatever the padding's side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

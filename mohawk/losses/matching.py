"""Losses between layers of student and teacher, as a distillation's loss takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mohawk.data.next_tokens import IGNORED, next_column, next_labels
from mohawk.losses.attention_match import AttentionMatch, collect_attention, parted, side_by_side
from mohawk.losses.hidden_match import HiddenMatch, collect_hidden
from mohawk.losses.schedules import Ramp
from mohawk.losses.teachers import Watch


@dataclass(frozen=True)
class Matching:
    """A loss between layers of student and teacher.

    student, teacher: what is watched in each during its pass. loss: called as loss(student_seen, teacher_seen, batch),
    a mean over the positions that predict a label, or, with `by_row`, over rows. module: whose parameters train with
    the student's, if it has any.
    """

    loss: Callable[[Any, Any, Mapping[str, Tensor]], Tensor]
    student: Watch
    teacher: Watch
    weight: float | Ramp = 1.0
    module: nn.Module | None = None
    by_row: bool = False


def match_hidden(match: HiddenMatch, weight: float | Ramp = 1.0) -> Matching:
    """A matching of hidden states, layer pair by layer pair, at the positions that predict a label."""

    def loss(student, teacher, batch):
        # a position's hidden state predicts the next token, so that token's weight is its
        weights = next_column(batch["weights"], 0.0) if "weights" in batch else None
        return match(student, teacher, next_labels(batch) != IGNORED, weights)

    return Matching(
        loss,
        student=lambda model: collect_hidden(model, match.student_layers),
        teacher=lambda model: collect_hidden(model, match.teacher_layers),
        weight=weight,
        module=match,
    )


def match_attention(match: AttentionMatch, weight: float | Ramp = 1.0) -> Matching:
    """A matching of mixing matrices, layer pair by layer pair, of whole rows without their padding."""

    def loss(student, teacher, batch):
        mask = batch.get("attention_mask")
        if "segment_ids" in batch or mask is None or not parted(mask):
            return match(student, teacher, segments(batch))
        # a document is a run of tokens, so those that padding parts are put together
        student, teacher = (side_by_side(records, mask) for records in (student, teacher))
        return match(student, teacher, mask.long().sort(dim=1, descending=True).values - 1)

    return Matching(
        loss,
        student=lambda model: collect_attention(model, match.student_layers),
        teacher=lambda model: collect_attention(model, match.teacher_layers),
        weight=weight,
        by_row=True,
    )


def segments(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(b, n) int64: the document of each token, -1 at padding; None where every row is one document."""
    if "segment_ids" in batch:
        return batch["segment_ids"]
    return batch["attention_mask"].long() - 1 if "attention_mask" in batch else None

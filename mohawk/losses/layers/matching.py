"""Losses between layers of student and teacher, as a distillation's loss takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mohawk.data.next_tokens import IGNORED, next_column, next_labels
from mohawk.losses.layers.attention_match import AttentionMatch, collect_attention, parted, side_by_side
from mohawk.losses.layers.hidden_match import HiddenMatch, collect_hidden
from mohawk.losses.layers.relation_match import RelationMatch
from mohawk.losses.schedules import Ramp
from mohawk.losses.teachers import Watch

PLACES = "places"  # of a batch that is no causal model's: (b, n) bool, the positions compared; None: all


@dataclass(frozen=True)
class Matching:
    """A loss between layers of student and teacher.

    student, teacher: what is watched in each during its pass. loss: called as loss(student_seen, teacher_seen, batch),
    a mean over the positions that predict a label, or, with `by_row`, over rows. module: whose parameters train with
    the student's, if it has any. part: whose hidden states these are, of an encoder and a decoder.
    """

    loss: Callable[[Any, Any, Mapping[str, Tensor]], Tensor]
    student: Watch
    teacher: Watch
    weight: float | Ramp = 1.0
    module: nn.Module | None = None
    by_row: bool = False
    part: Literal["decoder", "encoder"] = "decoder"


def match_hidden(
    match: HiddenMatch, weight: float | Ramp = 1.0, *, part: Literal["decoder", "encoder"] = "decoder"
) -> Matching:
    """A matching of hidden states, layer pair by layer pair, at the positions that predict a label, or, of an encoder,
    at all real tokens. part: of a model with an encoder and a decoder, whose layers are meant.

    Raises ValueError for a part that there is not.
    """
    if part not in ("decoder", "encoder"):
        raise ValueError(f"match_hidden: part must be decoder or encoder, got {part!r}")

    def loss(student, teacher, batch):
        if PLACES in batch:
            return match(student, teacher, batch[PLACES])
        # a position's hidden state predicts the next token, so that token's weight is its
        weights = next_column(batch["weights"], 0.0) if "weights" in batch else None
        return match(student, teacher, next_labels(batch) != IGNORED, weights)

    return Matching(
        loss,
        student=lambda model: collect_hidden(model, match.student_layers, part),
        teacher=lambda model: collect_hidden(model, match.teacher_layers, part),
        weight=weight,
        module=match,
        part=part,
    )


def match_attention(match: AttentionMatch, weight: float | Ramp = 1.0) -> Matching:
    """A matching of mixing matrices, layer pair by layer pair, of whole rows without their padding."""
    return _of_rows(match, weight, values=False)


def match_relations(match: RelationMatch, weight: float | Ramp = 1.0) -> Matching:
    """A matching of relations between tokens, layer pair by layer pair, of whole rows without their padding."""
    return _of_rows(match, weight, values=True)


def _of_rows(match: AttentionMatch | RelationMatch, weight: float | Ramp, values: bool) -> Matching:
    def loss(student, teacher, batch):
        mask = batch.get("attention_mask")
        if "segment_ids" in batch or mask is None or not parted(mask):
            return match(student, teacher, segments(batch))
        # a document is a run of tokens, so those that padding parts are put together
        student, teacher = (side_by_side(records, mask) for records in (student, teacher))
        return match(student, teacher, mask.long().sort(dim=1, descending=True).values - 1)

    return Matching(
        loss,
        student=lambda model: collect_attention(model, match.student_layers, values=values),
        teacher=lambda model: collect_attention(model, match.teacher_layers, values=values),
        weight=weight,
        by_row=True,
    )


def segments(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(b, n) int64: the document of each token, -1 at padding; None where every row is one document."""
    if "segment_ids" in batch:
        return batch["segment_ids"]
    return batch["attention_mask"].long() - 1 if "attention_mask" in batch else None

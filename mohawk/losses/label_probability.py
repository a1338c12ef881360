"""How sure a teacher is, of the labels and of anything at all: by which a distillation can weigh its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED
from mohawk.kernels.kd.teachers import TeacherSource

# By what a token's divergence is weighed: not at all, by the label's probability, and by that or the teacher's entropy
# with what is lost given to the cross entropy (`KnowledgeDistiller`).
Confidence = bool | Literal["label", "entropy"]
CONFIDENCES = (False, True, "label", "entropy")


@torch.no_grad()
def label_probability(source: TeacherSource, labels: Tensor, vocab_size: int | None = None, rows: int = 256) -> Tensor:
    """(...,) float32: the teacher's probability of each label, 0 where it is ignored or beyond `vocab_size`.

    source: any teacher of `kd_loss` but samples. At temperature 1; of a top k at the temperature it was cut at, where
    ids outside it have the tail's mass spread evenly over the rest of `vocab_size` entries.
    """

    def of(part: TeacherSource, ids: Tensor) -> Tensor:
        return part.probability(ids, vocab_size)

    return _by_rows(source, labels, (labels != IGNORED) & (labels < (vocab_size or math.inf)), of, rows)


@torch.no_grad()
def teacher_certainty(source: TeacherSource, labels: Tensor, vocab_size: int, rows: int = 256) -> Tensor:
    """(...,) float32: 1 - H / log(vocab_size) where there is a label, 0 elsewhere; H is the teacher's entropy in nats.

    1 where the teacher knows one word, 0 where all are alike to it. source, vocab_size: as of `label_probability`; of a
    top k the rest of its mass counts as spread evenly over the other entries.
    """

    def of(part: TeacherSource, ids: Tensor) -> Tensor:
        return (1 - part.entropy(vocab_size) / math.log(max(2, vocab_size))).clamp(0, 1)

    return _by_rows(source, labels, labels != IGNORED, of, rows)


def _by_rows(
    source: TeacherSource, labels: Tensor, real: Tensor, of: Callable[[TeacherSource, Tensor], Tensor], rows: int
) -> Tensor:
    """`of` of a teacher's real rows and their labels, so many rows at once; 0 in the others."""
    flat, found = labels.flatten(), torch.zeros(labels.numel(), device=labels.device)
    for part in real.flatten().nonzero().squeeze(1).split(rows):
        rows_of = source.map_rows(lambda x, trailing, part=part: x.flatten(0, labels.dim() - 1)[part])
        found[part] = of(rows_of, flat[part]).float()
    return found.view_as(labels)

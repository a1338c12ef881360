"""What a teacher thinks of the labels: by which a distillation can weigh its tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED
from mohawk.kernels.kd.teachers import TeacherSource


@torch.no_grad()
def label_probability(source: TeacherSource, labels: Tensor, vocab_size: int | None = None, rows: int = 256) -> Tensor:
    """(...,) float32: the teacher's probability of each label, 0 where it is ignored or beyond `vocab_size`.

    source: any teacher of `kd_loss` but samples. At temperature 1; of a top k at the temperature it was cut at, where
    ids outside it have the tail's mass spread evenly over the rest of `vocab_size` entries.
    """
    flat, found = labels.flatten(), torch.zeros(labels.numel(), device=labels.device)
    real = ((flat != IGNORED) & (flat < (vocab_size or math.inf))).nonzero().squeeze(1)
    for part in real.split(rows):
        rows_of = source.map_rows(lambda x, trailing, part=part: x.flatten(0, labels.dim() - 1)[part])
        found[part] = rows_of.probability(flat[part], vocab_size).float()
    return found.view_as(labels)

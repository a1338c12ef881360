"""What one call of a distillation loss computes: its options, and its task as every backend gets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.teachers import TeacherSource
from mohawk.kernels.kd.vocabulary import VocabularySlice


class Settings(NamedTuple):
    """The options of a call that are not tensors."""

    divergence: str
    temperature: float
    kd_weight: float
    ce_weight: float
    beta: float
    lam: float
    ignore_index: int
    vocab_size: int | None
    reduction: str
    return_parts: bool | str
    backend: str
    inplace: bool = False
    linear: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    precision: str = "full"  # or "rounded": logits made by a product in bfloat16
    autocast: torch.dtype | None = None  # the caller's: hidden states and head may then differ in dtype

    @property
    def under_autocast(self) -> bool:
        return self.autocast is not None

    @property
    def rounds(self) -> bool:
        return self.precision == "rounded"


@dataclass(frozen=True)
class Options:
    """What a checked call asks for. In its `settings` the divergence has its plain name, and the temperature is 1 for
    divergences of raw logits."""

    settings: Settings
    vocabulary: VocabularySlice
    need_kd: bool
    need_ce: bool

    @property
    def on_logits(self) -> bool:
        return DIVERGENCES[self.settings.divergence].on_logits


@dataclass
class KDTask:
    """A checked call: a teacher of flat rows, which of them count, and for what."""

    options: Options
    teacher: TeacherSource
    labels: Tensor | None  # of the rows that count
    rows: Tensor | None  # their indices; None: all
    scale: Tensor  # of each of these rows in the reduced loss


class StudentHead(NamedTuple):
    """The student's head, as `linear_kd_loss` takes it."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype  # of the student's own weight, which this may be a copy of, and of its gradient
    rounded: bool = False  # whether its products may be rounded to bfloat16


@dataclass
class RowLosses:
    """Per-row results: T^2 * divergence and cross-entropy, unweighted."""

    kd: Tensor
    ce: Tensor


def take(x: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    """x's entries for the chosen rows (None: all) from start to stop."""
    return x[start:stop] if rows is None else x.index_select(0, rows[start:stop])

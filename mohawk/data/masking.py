"""Masked words of a row, drawn by seed, step and row: the same ones wherever and whenever that step is taken.

BERT (arXiv 1810.04805, section 3.1) masks each word with a probability of 15 %: of those 80 % become the mask token,
10 % another word, and 10 % stay. RoBERTa (arXiv 1907.11692, section 4.1) draws anew each time that a row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED
from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW = "row"  # column of a batch: which row of the data each is


@dataclass(frozen=True)
class Masking:
    """Draws the masks of a batch; called as masking(batch, step) it gives the batch with `input_ids` and `labels`.

    Args:
        mask_token: the id that stands for a masked word.
        words: ids that a masked word may become, (w,) int64.
        special: ids that are never masked.
        share: how many of the words are masked; of those `masked` become the mask token, `random` another word, and the
            rest stays.
        dynamic: draw anew at each step; else a row has the same masks whenever it is read.
        seed: of all draws.

    Raises:
        ValueError: shares that are none.
    """

    mask_token: int
    words: np.ndarray = field(repr=False)
    special: frozenset[int] = frozenset()
    share: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    dynamic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"masking: share must be above 0 and at most 1, got {self.share!r}")
        if not (self.masked >= 0 and self.random >= 0 and self.masked + self.random <= 1):
            raise ValueError(
                f"masking: masked and random must be shares with a sum of at most 1, got {self.masked!r} and "
                f"{self.random!r}"
            )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, **options) -> Masking:
        """Of a tokenizer's words. options: share, masked, random, dynamic, seed. Raises UserError for a tokenizer
        without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"masking: the tokenizer ({type(tokenizer).__name__}) has no mask token; give the tokenizer of a model "
                "that fills in masked words"
            )
        special = frozenset(tokenizer.all_special_ids)
        words = np.array(sorted(set(range(len(tokenizer))) - special), dtype=np.int64)
        return cls(tokenizer.mask_token_id, words, special, **options)

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """batch: `input_ids` (b, n) int64, `attention_mask` (b, n) or none, and `row` (b), the place of each row in its
        data (default: in the batch). labels: the ids that were masked, -100 elsewhere."""
        ids = batch["input_ids"].cpu().numpy()
        real = batch["attention_mask"].cpu().numpy() > 0 if "attention_mask" in batch else np.ones(ids.shape, bool)
        maskable = real & ~np.isin(ids, list(self.special))
        rows: Sequence[int] = batch[ROW].tolist() if ROW in batch else range(len(ids))
        changed, labels = ids.copy(), np.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            draw = np.random.default_rng([self.seed, step + 1 if self.dynamic else 0, row])
            chance, kind = draw.random(ids.shape[1]), draw.random(ids.shape[1])
            others = draw.integers(len(self.words), size=ids.shape[1])
            chosen = maskable[i] & (chance < self.share)
            labels[i, chosen] = ids[i, chosen]
            changed[i, chosen & (kind < self.masked)] = self.mask_token
            another = chosen & (kind >= self.masked) & (kind < self.masked + self.random)
            changed[i, another] = self.words[others[another]]
        given = {name: column for name, column in batch.items() if name != ROW}
        device = batch["input_ids"].device
        made = {"input_ids": changed, "labels": labels}
        return given | {name: torch.from_numpy(values).to(device) for name, values in made.items()}

"""Several data sources in one dataset: sampled in given proportions that hold from the first rows on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mohawk.errors import UserError


class Mixture(torch.utils.data.Dataset):
    """Rows of several datasets in the proportions of `sampling_weights`, with `source` and scaled `weights`.

    Of the first m rows, part k has m w_k rows to less than one, for every m: a run that is stopped early has the right
    mixture too. Each part is read in its own order, and from its beginning again when it is used up. Which parts come
    first is decided by `seed`. Mixing generated data with ground truth by beta is Mixture([generated, truth],
    [beta, 1 - beta]).

    datasets: map-style, of rows with the same columns and shapes; `weights` may be missing in some and is 1 then, and
    `task`, where some have it, 0.
    sampling_weights: per part, at least 0 (a part of 0 is never read); divided by their sum. loss_weights: per part,
    multiplies the row's `weights` (float32, (sequence_length)); None is 1. rows: how many; None is as many as the parts
    have together. The row's `source` () int64 is its part. Raises UserError.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        sampling_weights: Sequence[float],
        loss_weights: Sequence[float] | None = None,
        rows: int | None = None,
        seed: int = 0,
    ):
        self.datasets = list(datasets)
        for name, given in (("sampling_weights", sampling_weights), ("loss_weights", loss_weights)):
            if given is None:
                continue
            if len(given) != len(self.datasets):
                raise UserError(f"{name}: got {len(given)} for {len(self.datasets)} data sources; give one for each")
            if wrong := [w for w in given if not 0 <= w < math.inf]:
                raise UserError(f"{name}: got {wrong[0]}; allowed: numbers of at least 0")
        total = math.fsum(sampling_weights)
        if not total > 0:
            raise UserError("sampling_weights: all are 0; give one data source more than that")
        self.loss_weights = [1.0] * len(self.datasets) if loss_weights is None else [float(w) for w in loss_weights]
        self.sampling_weights = [w / total for w in sampling_weights]
        read = [k for k, w in enumerate(self.sampling_weights) if w > 0]
        if empty := [k for k in read if len(self.datasets[k]) == 0]:
            raise UserError(f"data source {empty[0]} is empty; leave it out, or give it rows")
        rows = sum(len(self.datasets[k]) for k in read) if rows is None else rows
        if rows < 1:
            raise UserError(f"rows: got {rows}; allowed: at least 1")
        self.tasks = any("task" in self.datasets[k][0] for k in read)
        self._check_columns(read)
        self.parts = chairman_order([self.sampling_weights[k] for k in read], rows, seed)
        self.parts = np.asarray(read, dtype=np.int32)[self.parts]
        # which of its part's rows each row is
        self.turns = np.empty(rows, dtype=np.int64)
        for k in read:
            mine = self.parts == k
            self.turns[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self.parts))[index]
        k = int(self.parts[index])
        row = dict(self.datasets[k][int(self.turns[index]) % len(self.datasets[k])])
        weights = row.get("weights")
        if weights is None:
            weights = torch.ones(row["input_ids"].shape, dtype=torch.float32)
        if self.tasks and "task" not in row:
            row["task"] = torch.zeros_like(row["input_ids"])
        return {**row, "weights": weights * self.loss_weights[k], "source": torch.tensor(k)}

    def _check_columns(self, read: list[int]) -> None:
        """Rows of all parts have to be stacked in one batch."""
        first = None
        for k in read:
            row = self.datasets[k][0].items()
            shapes = {name: tuple(v.shape) for name, v in row if name not in ("weights", "task", "source")}
            first = shapes if first is None else first
            if shapes != first:
                name = next(n for n in sorted(shapes.keys() | first.keys()) if shapes.get(n) != first.get(n))
                here, there = (f"shape {s[name]}" if name in s else "none" for s in (shapes, first))
                raise UserError(f"data source {k}: column {name!r}: {here}, but data source {read[0]} has {there}")


class AnsweredBy(torch.utils.data.Dataset):
    """The rows of a dataset, all of which one teacher answers: their column `teacher` () int64 is its place."""

    def __init__(self, dataset: Any, teacher: int):
        self.dataset, self.teacher = dataset, teacher

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.dataset[index], "teacher": torch.tensor(self.teacher)}


def chairman_order(weights: Sequence[float], rows: int, seed: int = 0) -> np.ndarray:
    """int32 (rows): which part each row is of, so that in every prefix each has its share to less than one row.

    weights: positive, of sum 1. Tijdeman's chairman assignment (1980): among the parts that are behind by at least
    1/(2K - 2), the one that must come soonest; no prefix is off by more than 1 - 1/(2K - 2). `seed` breaks ties.
    """
    order = np.zeros(rows, dtype=np.int32)
    if len(weights) == 1:
        return order
    least = 1 / (2 * len(weights) - 2)
    shuffled = np.random.default_rng(seed).permutation(len(weights))
    parts = [(int(k), float(weights[k])) for k in shuffled]
    counts = [0] * len(weights)
    for m in range(1, rows + 1):
        chosen, soonest = -1, math.inf
        for k, w in parts:
            behind = m * w - counts[k]
            # what is equal but for rounding is a tie, for the first of the shuffled parts
            if behind >= least - 1e-9 and (due := (1 - least - behind) / w) < soonest - 1e-9:
                chosen, soonest = k, due
        counts[chosen] += 1
        order[m - 1] = chosen
    return order

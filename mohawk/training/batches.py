"""Which examples each step of a phase trains on."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from mohawk.core.processes import count
from mohawk.data.next_tokens import IGNORED
from mohawk.errors import UserError

NOTHING = -1  # the index of a row that teaches nothing


class WithNothing(torch.utils.data.Dataset):
    """A dataset, and at NOTHING its first row without labels: for a process that is dealt none of a step's rows."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index != NOTHING:
            return self.dataset[index]
        row = self.dataset[0]
        return {**row, "labels": torch.full_like(row["labels"], IGNORED)}


class Batches:
    """Indices of the examples of each micro-batch of a phase, for one process: a batch sampler.

    The order is one random permutation of the data after another, each from (seed, pass). A step takes the next `rows`
    of them, of which the processes take equal parts: it has the same examples in one process or several.

    rows: of a step. batch_size: of a micro-batch, at most; a step's last may be smaller. steps: of the phase; the first
    `done` of them are left out. in_all: rows of the whole phase, of which the last step has what is left: the processes
    take as equal parts of it as can be, in as many micro-batches each, where [NOTHING] is one without a row. None:
    every step has all its rows. Raises ValueError where the rows cannot be dealt evenly.
    """

    def __init__(
        self,
        examples: int,
        *,
        rows: int,
        batch_size: int,
        steps: int,
        seed: int,
        done: int = 0,
        rank: int = 0,
        processes: int = 1,
        in_all: int | None = None,
    ):
        if rows % processes:
            raise ValueError(f"{rows} rows a step cannot be dealt evenly to {processes} processes")
        self.examples, self.rows, self.steps, self.done, self.seed = examples, rows, steps, done, seed
        own = rows // processes
        starts = range(rank * own, (rank + 1) * own, batch_size)
        # of each micro-batch of this process, the places of its rows among those of the step
        self._places = [range(start, min(start + batch_size, (rank + 1) * own)) for start in starts]
        self._last = self._places
        if in_all is not None and (left := in_all - (steps - 1) * rows) < rows:
            first, stop = rank * left // processes, (rank + 1) * left // processes
            largest = -(-left // processes)  # of what a process has
            parts = -(-largest // batch_size)
            cuts = [first + k * (stop - first) // parts for k in range(parts + 1)]
            self._last = [range(a, b) for a, b in itertools.pairwise(cuts)]

    @property
    def per_step(self) -> int:
        """How many micro-batches of this process make a step."""
        return len(self._places)

    def __len__(self) -> int:
        left = self.steps - self.done
        return 0 if left <= 0 else (left - 1) * self.per_step + len(self._last)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for step in range(self.done, self.steps):
            for places in self._last if step == self.steps - 1 else self._places:
                indices = [] if places else [NOTHING]
                for place in places:
                    turn, offset = divmod(step * self.rows + place, self.examples)
                    if turn not in orders:
                        orders = {turn: self._order(turn)}
                    indices.append(orders[turn][offset])
                yield indices

    def _order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
        return torch.randperm(self.examples, generator=generator).tolist()


def rows_per_step(phase: Any) -> int:
    """How many rows a step has, over all processes."""
    return phase.batch_size * phase.gradient_accumulation


def steps_of(phase: Any, examples: int) -> int:
    """How many steps a phase has, by its tokens or by so many examples in each of its epochs."""
    rows = rows_per_step(phase)
    if (epochs := getattr(phase, "epochs", None)) is not None:
        return -(-epochs * examples // rows)
    return math.ceil(phase.tokens / (rows * phase.sequence_length))


def check_dealt(phase: Any, name: str, stages: int = 1) -> None:
    """UserError where the processes cannot have equal parts of a step. stages: how many of them have the same rows, and
    other layers."""
    if (rows := rows_per_step(phase)) % (dealt := count() // stages):
        to = f"{dealt} processes" if stages == 1 else f"{dealt} pipelines of {stages} stages (sharding.stages)"
        raise UserError(
            f"{name}: a step has {rows} rows (batch_size x gradient_accumulation, over all processes), which cannot be "
            f"dealt evenly to {to}; start another number of processes, or change one of the two"
        )

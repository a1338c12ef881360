"""Which examples each step of a phase trains on."""

from collections.abc import Iterator
from typing import Any

import torch

from mohawk.core.processes import count
from mohawk.errors import UserError


class Batches:
    """Indices of the examples of each micro-batch of a phase, for one process: a batch sampler.

    The order is one random permutation of the data after another, each from (seed, pass). A step takes the next `rows`
    of them, of which the processes take equal parts: it has the same examples in one process or several.

    rows: of a step. batch_size: of a micro-batch, at most; a step's last may be smaller. steps: of the phase; the first
    `done` of them are left out. Raises ValueError where the rows cannot be dealt evenly.
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
    ):
        if rows % processes:
            raise ValueError(f"{rows} rows a step cannot be dealt evenly to {processes} processes")
        self.examples, self.rows, self.steps, self.done, self.seed = examples, rows, steps, done, seed
        own = rows // processes
        starts = range(rank * own, (rank + 1) * own, batch_size)
        # of each micro-batch of this process, the places of its rows among those of the step
        self._places = [range(start, min(start + batch_size, (rank + 1) * own)) for start in starts]

    @property
    def per_step(self) -> int:
        """How many micro-batches of this process make a step."""
        return len(self._places)

    def __len__(self) -> int:
        return max(0, self.steps - self.done) * self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for step in range(self.done, self.steps):
            for places in self._places:
                indices = []
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


def check_dealt(phase: Any, name: str, stages: int = 1) -> None:
    """UserError where the processes cannot have equal parts of a step. stages: how many of them have the same rows, and
    other layers."""
    if (rows := rows_per_step(phase)) % (dealt := count() // stages):
        to = f"{dealt} processes" if stages == 1 else f"{dealt} pipelines of {stages} stages (sharding.stages)"
        raise UserError(
            f"{name}: a step has {rows} rows (batch_size x gradient_accumulation, over all processes), which cannot be "
            f"dealt evenly to {to}; start another number of processes, or change one of the two"
        )

"""Which examples each step of a phase trains on."""

from collections.abc import Iterator

import torch


class Batches:
    """Indices of the examples of each micro-batch of a phase, for one process: a batch sampler.

    The order is one random permutation of the data after another, each from (seed, pass), cut into batches
    that are dealt to the processes in turn: a step has the same examples in one process or several.

    batches: of the phase; the first `done` of them are left out.
    """

    def __init__(
        self,
        examples: int,
        *,
        batch_size: int,
        batches: int,
        seed: int,
        done: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.batches = batches
        self.done = done
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(0, self.batches - self.done)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for batch in range(self.done, self.batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            indices = []
            for position in range(first, first + self.batch_size):
                turn, offset = divmod(position, self.examples)
                if turn not in orders:
                    orders = {turn: self._order(turn)}
                indices.append(orders[turn][offset])
            yield indices

    def _order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) % 2**63)
        return torch.randperm(self.examples, generator=generator).tolist()

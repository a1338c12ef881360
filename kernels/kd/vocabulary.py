"""The vocabulary of a loss: whole, or one slice per rank of a process group (vocab-parallel heads).

With slices, a call costs one gather to learn who has how much, one per chunk of rows for its statistics (two for
some: exchange.py says which and why), and the values are added up once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.kernels.common.tensors import whole_number


class VocabularySlice:
    """`entries` on this rank, of which `local` are real, from the global id `start`; `size` real ones over
    all ranks; the `widest` slice of any."""

    def __init__(
        self,
        local: int,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
        rows: int = 0,
        device: torch.device | str = "cpu",
        teachers: Sequence[int] = (),
    ):
        self.group = group
        self.start, self.rank, self.ranks = 0, 0, 1
        sizes, teacher_sizes = [local], []
        if group is not None:
            if not isinstance(group, dist.ProcessGroup):
                raise ValueError(f"group is a {type(group).__name__}; it must be a ProcessGroup of torch.distributed")
            self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("this process is not one of the group that it passed; only its ranks may call")
            # One gather tells every rank the same, so that all of them raise, or none.
            mine = torch.tensor([local, rows, min(teachers, default=0), max(teachers, default=0)], device=device)
            sizes, counts, *teacher_sizes = self.every(mine).T.tolist()
            if len(set(counts)) > 1:
                raise ValueError(f"the ranks of the group have {counts} rows; each must have all rows")
            self.start = sum(sizes[: self.rank])
        if not all(sizes):
            raise ValueError(f"the student's vocabulary is empty: its slices have {sizes} entries")
        self.size = sum(sizes)
        self.widest = max(sizes)
        self.entries = self.local = local
        if vocab_size is not None:
            given, vocab_size = vocab_size, whole_number(vocab_size)
            if vocab_size is None or vocab_size < 1:
                raise ValueError(f"vocab_size is {given!r}; it must be None or a whole number above 0")
            if vocab_size > self.size:
                raise ValueError(f"vocab_size is {vocab_size} but the student has only {self.size} entries")
            self.size = vocab_size
            self.local = min(local, max(0, vocab_size - self.start))
        if group is not None and teachers:
            self._check_slices(sizes, *teacher_sizes, cut=vocab_size is not None)

    def _check_slices(self, sizes: list[int], least: list[int], most: list[int], cut: bool) -> None:
        """The real entries of each rank are the same words on both sides; `least` and `most` of the teachers."""
        end = 0
        for rank, (size, low, high) in enumerate(zip(sizes, least, most, strict=True)):
            start, end = end, end + size
            # Behind the last real word of all, a slice may be of any length.
            fits = cut and end >= self.size and low >= self.size - start
            if not (fits or low == high == size):
                raise ValueError(
                    f"rank {rank} of the group has {size} entries of the student's vocabulary and {high} of the "
                    "teacher's; slices must begin at the same word on both sides, up to vocab_size"
                )

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.group is None:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def once(self, x: Tensor) -> Tensor:
        """Something every rank has, so that `total` counts it once."""
        return x if self.rank == 0 else torch.zeros_like(x)

    def every(self, local: Tensor) -> Tensor:
        """That of each rank, in front of each other: (ranks, ...)."""
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.stack(parts)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Global ids as columns of this rank (0 where they are another's), and which are ours (None: all)."""
        if self.group is None:
            return ids, None
        ours = (ids >= self.start) & (ids < self.start + self.local)
        return torch.where(ours, ids - self.start, 0), ours

    def gather(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (rows, local) at global ids (rows, k), 0 for ids of other ranks."""
        columns, ours = self.locate(ids)
        if ours is None:
            return x.gather(1, columns)
        if x.shape[1] == 0:
            return x.new_zeros(ids.shape)
        return x.gather(1, columns).masked_fill_(~ours, 0.0)

    def scatter_add(self, x: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """x[row, ids] += values where the ids are ours, in place."""
        columns, ours = self.locate(ids)
        if ours is not None:
            if x.shape[1] == 0:
                return x
            values = values.masked_fill(~ours, 0.0)
        return x.scatter_add_(1, columns, values)

    def scatter(self, x: Tensor, ids: Tensor, values: Tensor | float) -> Tensor:
        """A copy of x with x[row, ids] = values where the ids are ours."""
        columns, ours = self.locate(ids)
        if ours is None:
            return x.scatter(1, columns, values)
        # One spare column takes what belongs to other ranks.
        padded = torch.cat([x, x.new_zeros(len(x), 1)], 1)
        return padded.scatter_(1, torch.where(ours, columns, x.shape[1]), values)[:, :-1]

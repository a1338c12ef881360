"""The vocabulary of a loss: whole, or one slice per rank of a process group (vocab-parallel heads).

With slices, a call costs one gather to learn who has how much, one per chunk of rows for its statistics (two for
some), and the values are added up once at the end.

Each rank has a slice of every row. Of a chunk of them it sends a few numbers per row (log-normalisers of its slices,
partial sums) and each rank combines all of them for itself, in the same order, so that all come to the same numbers.
That one gather is enough for the value and the gradient of forward KL, reverse KL, mse, cosine, a top k (which sends
the student's k logits along: whole buckets are then everywhere, for any divergence) and samples, with or without
cross-entropy. A second collective, one float per row, is needed for

- the gradient of jsd, skew_kl, skew_reverse_kl, tvd and probability_mse of dense teachers: it holds the sum over the
  vocabulary of a function of p and q that is not linear in their logarithms, and p and q need the first one's
  normalisers;
- the gradient of reverse KL from a mixture of teachers, whose p needs the normalisers of its teachers;
- the normaliser of TAID towards a mixture, for the same reason.

Values are this rank's part of the sum over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

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


@final
@dataclass
class Known:
    """Statistics of rows over the whole vocabulary, each (rows) unless said; None where they weren't asked for,
    or where nothing is shared and they are found on the way."""

    student: Tensor | None = None  # log-normaliser of the tempered logits
    raw: Tensor | None = None  # and of the untempered
    teachers: Sequence[Tensor] = ()  # of each of the teacher's parts
    reverse_kl: Tensor | None = None
    products: Tensor | None = None  # |z|^2, |t|^2 and z t, (3, rows)
    chosen: Tensor | None = None  # tempered logits at the ids of a top k, (rows, k)
    rest: Tensor | None = None  # log mass, unnormalised, of the tempered logits at all other ids


def slice_reverse_kl(u: Tensor, v: Tensor, u_norm: Tensor, v_norm: Tensor) -> Tensor:
    """KL(softmax(u), softmax(v)) of this rank's slices (rows, local) as if each were a whole vocabulary, from their
    log-normalisers; 0 where u has no mass here."""
    u_norm, v_norm = (n.masked_fill(n == float("-inf"), 0.0).unsqueeze(-1) for n in (u_norm, v_norm))
    log_ratio = u - u_norm
    q = log_ratio.exp()
    log_ratio -= v - v_norm
    return log_ratio.masked_fill_(q == 0, 0.0).mul_(q).sum(-1)


def whole_kl(a: Tensor, b: Tensor, kl: Tensor) -> Tensor:
    """KL(softmax(u), softmax(v)) of the whole rows, (rows), from those of the slices (`slice_reverse_kl`) and their
    log-normalisers a and b, each (ranks, rows)."""
    shift = (a - torch.logsumexp(a, 0)) - (b - torch.logsumexp(b, 0))
    weight = torch.softmax(a, 0)
    kl = kl.masked_fill(b == float("-inf"), float("inf"))  # inf - inf in the Triton sweep
    return ((kl + shift).masked_fill(weight == 0, 0.0) * weight).sum(0)


def exchange(
    vocabulary: VocabularySlice,
    student: Tensor | None,
    raw: Tensor | None,
    teachers: Sequence[Tensor],
    *,
    reverse_kl: bool = False,
    products: tuple[Tensor, Tensor] | None = None,
    ids: Tensor | None = None,
) -> Known:
    """One collective for a chunk of rows.

    `student`, `raw` and each of `teachers` are this rank's scores (rows, local), to be normalised; `reverse_kl` asks
    for that of `student` from the one teacher; `products` are logits z and t without infinities; `ids` (rows, k)
    are global and ask for the tempered student's buckets.
    """
    normalised = [x for x in (student, raw, *teachers) if x is not None]
    columns = [torch.logsumexp(x, -1) for x in normalised]
    if reverse_kl:
        assert student is not None
        columns.append(slice_reverse_kl(student, teachers[0], columns[0], columns[-1]))
    if products is not None:
        z, t = products
        columns += [z.square().sum(-1), t.square().sum(-1), (z * t).sum(-1)]
    own = None
    if ids is not None:
        assert student is not None
        own = vocabulary.gather(student, ids)
        columns.append(torch.logsumexp(vocabulary.scatter(student, ids, float("-inf")), -1))
    if not columns and own is None:
        return Known()
    packed = torch.stack(columns, -1)
    everyone = vocabulary.every(packed if own is None else torch.cat([packed, own], -1))

    known, at = Known(), iter(range(len(columns)))
    slices = everyone[..., : len(columns)]
    if student is not None:
        known.student = torch.logsumexp(slices[..., next(at)], 0)
    if raw is not None:
        known.raw = torch.logsumexp(slices[..., next(at)], 0)
    first = len(normalised) - len(teachers)
    known.teachers = [torch.logsumexp(slices[..., next(at)], 0) for _ in teachers]
    if reverse_kl:
        known.reverse_kl = whole_kl(slices[..., 0], slices[..., first], slices[..., next(at)])
    if products is not None:
        known.products = torch.stack([slices[..., next(at)].sum(0) for _ in range(3)])
    if own is not None:
        known.rest = torch.logsumexp(slices[..., next(at)], 0)
        known.chosen = everyone[..., len(columns) :].sum(0)
    return known

"""Strips of a delta rule's matrix and the gradients of what it is made of, in memory linear in seq.

Cut into chunks of tokens, the matrix is (common/delta_chunks.py has the right-hand sides)

    on the diagonal             scores writes
    in rows I, columns J < I    seen_I crossing_{I-1}^T ... crossing_{J+1}^T left_J^T
    seen     = Q . from_start - scores erases              what a chunk's rows see of the state in front of it
    crossing = diag(across) - erases^T (K . to_end)        what a chunk makes of the state in front of it, transposed
    left     = writes^T (K . to_end)                       what a chunk's columns leave in the state behind it

So a strip of rows is walked leftwards with one t x d factor: times left_J^T it is a tile, times crossing_J^T what goes
on. The gradient walks back to the right with one of the same size: each tile's gradient times left_J comes in on the
way, and its products with the factors of the first walk, kept for this strip, are the gradients of crossing and left.

What a chunk is made of is a few thousandths of the work and is done in float64: where keys repeat themselves crossing
is a small difference of large numbers.

Letters: b batch rows of the block, h its heads, r both, c chunks, t tokens of a chunk, m columns, d channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mohawk.kernels.common.delta_chunks import DeltaChunks, chunk_length, padded
from mohawk.kernels.common.segments import decays_with_resets, segment_starts
from mohawk.kernels.mixing.operands import DeltaMixing

if TYPE_CHECKING:
    from mohawk.kernels.mixing.strips import Block

# Of the chunks' own matrices, of which there are dozens, that are worked on at a time: what a cache holds, or what
# keeps a GPU busy.
SOME_ENTRIES, SOME_ENTRIES_OF_A_GPU = 1 << 15, 1 << 22


def chunk_of(seq: int) -> int:
    """Tokens of a chunk. What chunks are made of costs the more the longer they are, walks the less."""
    return chunk_length(seq, 64 if seq < 8192 else 128)


class DeltaStrips:
    def __init__(
        self, mixing: DeltaMixing, block: Block, dtype: torch.dtype, gradients: bool, chunk: int | None = None
    ) -> None:
        self.heads, self.seq = block.stop - block.start, mixing.shape[2]
        self.dtype, self.device, self.keep = dtype, mixing.q.device, gradients
        self.chunk = chunk or chunk_of(self.seq)
        ids = None if mixing.segment_ids is None else mixing.segment_ids[block.rows]
        self.starts = None if ids is None else segment_starts(ids).amin(0).tolist()

        def cut(value_bnh: Tensor) -> Tensor:
            """A tensor of the block as (chunks, heads, tokens of a chunk, ...)."""
            value = padded(block.per_head(value_bnh.transpose(1, 2)), self.chunk, dtype)
            return value.flatten(0, 1).transpose(0, 1).contiguous()

        self.given = tuple(cut(value) for value in (mixing.q, mixing.k, mixing.beta))
        self.batch = self.given[0].shape[1] // self.heads
        # The block's heads only: in float64, all heads of a long row would outweigh a slice of its matrix.
        decays = decays_with_resets(block.take(mixing.log_decay.transpose(1, 2)).transpose(1, 2), ids)
        self.decays = padded(_repeated(decays.transpose(1, 2), self.heads), self.chunk, torch.float64)
        self.decays = self.decays.flatten(0, 1).transpose(0, 1)
        width = self.given[0].shape[-1]
        whole = self.given[0].shape[:3]
        made = [(*whole, width), (*whole[:2], width, width), (*whole, width)]
        self.seen, self.crossing, self.left = (torch.empty(x, dtype=dtype, device=self.device) for x in made)
        for some in self._some():
            inside = self._inside(some)
            for out, value in zip((self.seen, self.crossing, self.left), _parts(inside), strict=True):
                out[some] = _flushed(value.to(dtype)).view_as(out[some])
        if gradients:
            self.d_own = self.seen.new_zeros(*whole, self.chunk)
            self.d_seen, self.d_crossing, self.d_left = (torch.zeros(x, dtype=dtype, device=self.device) for x in made)

    def _some(self) -> Iterator[slice]:
        """Ranges of chunks, so few at a time that what is made of them stays small."""
        count, pairs, chunk, width = self.given[0].shape
        entries = SOME_ENTRIES if self.device.type == "cpu" else SOME_ENTRIES_OF_A_GPU
        step = max(1, entries // (pairs * chunk * max(chunk, width)))
        return (slice(start, start + step) for start in range(0, count, step))

    def _inside(self, some: slice) -> DeltaChunks:
        q, k, beta = (value[some].flatten(0, 1).to(torch.float64) for value in self.given)
        sums = self.decays[some].flatten(0, 1).cumsum(1)
        return DeltaChunks(q, k, beta, sums if sums.dim() == 3 else sums.unsqueeze(-1))

    def own(self, some: slice) -> Tensor:
        """(c, r, t, t) the tiles on the diagonal."""
        inside = self._inside(some)
        tiles = _flushed(torch.bmm(inside.scores, inside.writes).to(self.dtype))
        return tiles.view(-1, *self.given[0].shape[1:3], self.chunk)

    def first_column(self, row: int) -> int:
        return 0 if self.starts is None else self.starts[row]

    def _pieces(self, row: int, end: int) -> Iterator[tuple[int, slice, slice]]:
        """For each chunk that the rows row..end touch: its number, which of its tokens, and where in the strip."""
        for at in range(row // self.chunk, -(-end // self.chunk)):
            begin = at * self.chunk
            low, high = max(row, begin), min(end, begin + self.chunk)
            yield at, slice(low - begin, high - begin), slice(low - row, high - row)

    def strip(self, row: int, end: int, first: int) -> Tensor:
        """(b, h, t, m) entries of rows row..end and columns first..end."""
        out = torch.zeros(len(self.given[0][0]), end - row, end - first, dtype=self.dtype, device=self.device)
        self.walks: list[list[Tensor]] = []
        for at, tokens, rows in self._pieces(row, end):
            begin = max(first - at * self.chunk, 0)
            start = at * self.chunk + begin - first
            own = self.own(slice(at, at + 1))[0]
            out[:, rows, start : start + tokens.stop - begin] = own[:, tokens, begin : tokens.stop]
            walk, last = [self.seen[at, :, tokens]], first // self.chunk
            for column in range(at - 1, last - 1, -1):
                inner = max(first - column * self.chunk, 0)
                start = column * self.chunk + inner - first
                tile = torch.bmm(walk[-1], self.left[column, :, inner:].mT)
                out[:, rows, start : start + self.chunk - inner] = tile
                if column > last:
                    step = _flushed(torch.bmm(walk[-1], self.crossing[column].mT))
                    walk = [*walk, step] if self.keep else [step]
            self.walks.append(walk)
        return out.unflatten(0, (-1, self.heads))

    def difference(self, teacher: Tensor, row: int, end: int, first: int) -> Tensor:
        """Turn the teacher's strip into student minus teacher."""
        return torch.sub(self.strip(row, end, first), teacher, out=teacher)

    def accumulate(self, residual: Tensor, row: int, end: int, first: int) -> None:
        """Add the gradients of half the sum of squares of `residual`, the strip's difference."""
        flat = residual.flatten(0, 1)
        for (at, tokens, rows), walk in zip(self._pieces(row, end), self.walks, strict=True):
            begin = max(first - at * self.chunk, 0)
            start = at * self.chunk + begin - first
            self.d_own[at, :, tokens, begin : tokens.stop] += flat[:, rows, start : start + tokens.stop - begin]
            d_walk, last = None, first // self.chunk
            for column in range(last, at):
                before = walk[at - 1 - column]
                inner = max(first - column * self.chunk, 0)
                start = column * self.chunk + inner - first
                d_tile = flat[:, rows, start : start + self.chunk - inner]
                self.d_left[column, :, inner:].baddbmm_(d_tile.mT, before)
                d_before = torch.bmm(d_tile, self.left[column, :, inner:])
                if d_walk is not None:
                    self.d_crossing[column].baddbmm_(d_walk.mT, before)
                    d_before.baddbmm_(d_walk, self.crossing[column])
                d_walk = d_before
            if d_walk is not None:
                self.d_seen[at, :, tokens] += d_walk

    def gradients(self) -> tuple[Tensor, ...]:
        made = [torch.empty_like(value) for value in (*self.given, self.decays)]
        d_parts = (self.d_own, self.d_seen, self.d_crossing, self.d_left)
        for some in self._some():
            given = (value[some].flatten(0, 1).to(torch.float64) for value in d_parts)
            found = _gradients(self._inside(some), *given)
            for out, value in zip(made, found, strict=True):
                out[some].copy_(value.view_as(out[some]))
        return tuple(
            value.transpose(0, 1).unflatten(0, (-1, self.heads)).flatten(2, 3)[:, :, : self.seq] for value in made
        )


def _repeated(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)


def _flushed(value: Tensor) -> Tensor:
    """A walk fades by and by. What is this small (4e-31 in float32) leaves products with ordinary numbers that are
    denormal, in which CPUs are tens of times slower; a strong decay has the same zeros."""
    return torch.nn.functional.hardshrink(value, torch.finfo(value.dtype).tiny ** 0.8)


def _parts(inside: DeltaChunks) -> tuple[Tensor, Tensor, Tensor]:
    """seen, crossing and left of the chunks."""
    across = torch.diag_embed(inside.across.expand(-1, inside.k.shape[-1]))
    return (
        torch.baddbmm(inside.q_from_start, inside.scores, inside.erases, alpha=-1),
        torch.baddbmm(across, inside.erases.mT, inside.k_to_end, alpha=-1),
        torch.bmm(inside.writes.mT, inside.k_to_end),
    )


def _gradients(
    inside: DeltaChunks, d_own: Tensor, d_seen: Tensor, d_crossing: Tensor, d_left: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, beta and the log decays."""
    return inside.gradients(
        d_scores=torch.bmm(d_own, inside.writes.mT).baddbmm_(d_seen, inside.erases.mT, alpha=-1),
        d_writes=torch.bmm(inside.scores.mT, d_own).baddbmm_(inside.k_to_end, d_left.mT),
        d_erases=torch.bmm(inside.scores.mT, d_seen).baddbmm_(inside.k_to_end, d_crossing.mT).neg_(),
        d_q_from_start=d_seen,
        d_k_to_end=torch.bmm(inside.writes, d_left).baddbmm_(inside.erases, d_crossing, alpha=-1),
        d_across=d_crossing.diagonal(dim1=1, dim2=2),
    )

"""Mixing matrices in strips of rows, with the gradients of what they are made of: what the chunked backend walks over.

A strip of a state-space matrix left of the diagonal is one matrix product of rows C_i exp(sums_i - sums_r)
and columns B_j input_scale_j exp(sums_r - sums_j), r the token before the strip: both exponents are sums of
log decays, at most 0, so nothing overflows. Only the diagonal tile needs the decays entry by entry. Those of a
delta rule are in delta_strips.py.

Letters: b batch rows of the block, h its heads, t rows of a strip, m its columns, n seq, N state_size, d
head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels.common.decays import decay_between, sums_before, sums_from
from mohawk.kernels.common.segments import (
    decays_with_resets,
    group_slice,
    segment_ends,
    segment_runs,
    segment_starts,
)
from mohawk.kernels.mixing.delta_strips import DeltaStrips, chunk_of
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing

STRIP = 64  # rows
HIDDEN = -1e30  # a score whose exponential is 0; finite, so that log-probabilities have no NaN


@dataclass(frozen=True)
class Block:
    rows: slice  # of the batch
    start: int  # heads start..stop of `heads`
    stop: int
    heads: int  # the larger of the two matrices' head counts

    def take(self, value_bh: Tensor) -> Tensor:
        """The block's slice of a (batch, heads or groups, ...) tensor, groups left as they are."""
        return value_bh[self.rows, group_slice(self.start, self.stop, self.heads, value_bh.shape[1])]

    def per_head(self, value_bh: Tensor) -> Tensor:
        """The block's slice with each group repeated for its heads: for small tensors."""
        return _repeated(self.take(value_bh), self.stop - self.start)


def _repeated(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)


def _flat(value: Tensor) -> Tensor:
    return value.flatten(0, 1)


def _transposed(value_bnh: Tensor) -> Tensor:
    return value_bnh.transpose(1, 2)


class _AttentionStrips:
    """Strips of an attention matrix, and the gradients of q and k. stop: the end of a strip's columns; None: that of
    its rows, as of all causal matrices."""

    def __init__(self, mixing: AttentionMixing, block: Block, dtype: torch.dtype, gradients: bool) -> None:
        self.heads = block.stop - block.start
        self.dtype, self.device = dtype, mixing.q.device
        self.scale, self.softcap = mixing.resolved_scale(), mixing.softcap
        self.window, self.causal = mixing.window, mixing.causal
        self.q = block.take(mixing.q).to(dtype)
        self.k = block.take(mixing.k).to(dtype).contiguous()
        self.batch = self.q.shape[0]
        tile = strip_of(self.q.shape[2], tall=True)
        self.later = torch.ones(tile, tile, dtype=torch.bool, device=self.q.device).triu(1)
        self.runs = self.starts = self.ends = None
        if mixing.segment_ids is not None:
            ids = mixing.segment_ids[block.rows]
            self.runs, self.starts = segment_runs(ids), segment_starts(ids).amin(0).tolist()
            self.ends = None if self.causal else segment_ends(ids).amax(0).tolist()
        if gradients:
            batch, _, seq, width = self.q.shape
            self.dq = torch.zeros(batch, self.heads, seq, width, dtype=dtype, device=self.q.device)
            self.dk = torch.zeros_like(self.dq)

    def first_column(self, row: int) -> int:
        first = 0 if self.starts is None else self.starts[row]
        return first if self.window is None else max(first, row - self.window + 1)

    def last_column(self, end: int) -> int:
        """One past the last that the rows before `end` see."""
        if self.causal:
            return end
        last = self.q.shape[2] if self.ends is None else self.ends[end - 1] + 1
        return last if self.window is None else min(last, end - 1 + self.window)

    def scores(self, row: int, end: int, first: int, stop: int | None = None) -> Tensor:
        """(b, h, t, m) masked scores of rows row..end and columns first..stop."""
        batch, kv_heads, _, width = self.k.shape
        rows, stop = end - row, stop or end
        q = _repeated(self.q[:, :, row:end], self.heads) * self.scale
        # The query heads of one kv head are stacked as rows of one product.
        stacked = q.reshape(batch * kv_heads, -1, width)
        keys = _flat(self.k[:, :, first:stop])
        scores = torch.bmm(stacked, keys.transpose(1, 2)).view(batch, self.heads, rows, stop - first)
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            scores, self.slope, self.slope_at = self.softcap * bounded, 1 - bounded.square(), first
        if self.causal:
            scores[..., row - first :].masked_fill_(self.later[:rows, :rows], HIDDEN)
        if self.window is not None and stop - first > self.window:
            index = torch.arange(first, stop, device=scores.device)
            back = index[row - first : end - first].unsqueeze(1) - index
            scores.masked_fill_(back.abs_() >= self.window, HIDDEN)
        if self.runs is not None:
            hidden = self.runs[:, row:end].unsqueeze(2) != self.runs[:, first:stop].unsqueeze(1)
            scores.masked_fill_(hidden.unsqueeze(1), HIDDEN)
        return scores

    def _seen(self, normalise, row: int, end: int, first: int, stop: int | None, fill: float) -> Tensor:
        """What `normalise` makes of the scores of the columns that these rows see; `fill` in the others."""
        stop = stop or end
        start, last = max(first, self.first_column(row)), min(stop, self.last_column(end))
        own = normalise(self.scores(row, end, start, last), -1)
        if (start, last) == (first, stop):
            return own
        wide = own.new_full((*own.shape[:-1], stop - first), fill)
        wide[..., start - first : last - first] = own
        return wide

    def strip(self, row: int, end: int, first: int, stop: int | None = None) -> Tensor:
        """(b, h, t, m) probabilities of rows row..end and columns first..stop."""
        return self._seen(torch.softmax, row, end, first, stop, 0)

    def log_strip(self, row: int, end: int, first: int, stop: int | None = None) -> Tensor:
        return self._seen(torch.log_softmax, row, end, first, stop, HIDDEN)

    def difference(self, teacher: Tensor, row: int, end: int, first: int, stop: int | None = None) -> Tensor:
        """Turn the teacher's strip into student minus teacher."""
        self.probabilities = self.strip(row, end, first, stop)
        return torch.sub(self.probabilities, teacher, out=teacher)

    def accumulate(self, residual: Tensor, row: int, end: int, first: int, stop: int | None = None) -> None:
        """Add the gradients of half the sum of squares of `residual`, the strip's difference."""
        weighted = residual * self.probabilities
        d_scores = weighted - self.probabilities * weighted.sum(-1, keepdim=True)
        self.accumulate_scores(d_scores, row, end, first, stop)

    def accumulate_scores(self, d_scores: Tensor, row: int, end: int, first: int, stop: int | None = None) -> None:
        if self.softcap is not None:  # columns beside those with scores have probability 0
            d_scores, at = d_scores.clone(), self.slope_at - first
            d_scores[..., at : at + self.slope.shape[-1]] *= self.slope
        stop = stop or end
        keys = _repeated(self.k[:, :, first:stop], self.heads)
        queries = _repeated(self.q[:, :, row:end], self.heads)
        self.dq[:, :, row:end] += (d_scores @ keys).mul_(self.scale)
        self.dk[:, :, first:stop] += (d_scores.transpose(-1, -2) @ queries).mul_(self.scale)

    def gradients(self) -> tuple[Tensor, ...]:
        return self.dq, self.dk


class _SSDStrips:
    """Strips of a state-space matrix, and the gradients of C, B, log_decay, input_scale and D."""

    def __init__(self, mixing: SSDMixing, block: Block, dtype: torch.dtype, gradients: bool) -> None:
        self.heads = block.stop - block.start
        self.dtype, self.device = dtype, mixing.C.device
        self.C = block.take(_transposed(mixing.C)).to(dtype).contiguous()
        self.B = block.take(_transposed(mixing.B)).to(dtype).contiguous()
        self.batch = self.C.shape[0]
        ids = None if mixing.segment_ids is None else mixing.segment_ids[block.rows]
        # The block's heads only: in float64, all heads of a long row would outweigh a slice of its matrix.
        decays = decays_with_resets(_transposed(block.take(_transposed(mixing.log_decay))), ids)
        self.sums = _repeated(_transposed(decays), self.heads).cumsum(-1)
        whole = Block(slice(None), block.start, block.stop, block.heads)
        self.scale = None
        if mixing.input_scale is not None:
            self.scale = block.per_head(_transposed(mixing.input_scale)).to(dtype).contiguous()
        self.D = None if mixing.D is None else whole.per_head(mixing.D.to(dtype)[None])
        self.starts = None if ids is None else segment_starts(ids).amin(0).tolist()
        if gradients:
            batch, _, seq, width = self.C.shape
            shape = (batch, self.heads, seq)
            # Written by the strip that holds the row, added to by later strips.
            self.dC = torch.empty(*shape, width, dtype=dtype, device=self.C.device)
            self.dB = torch.empty_like(self.dC)  # of B_j input_scale_j
            self.d_decay = torch.empty(shape, dtype=torch.float64, device=self.C.device)
            self.dD = torch.zeros(batch, self.heads, dtype=torch.float64, device=self.C.device)

    def first_column(self, row: int) -> int:
        return 0 if self.starts is None else self.starts[row]

    def _scaled(self, value_bgtN: Tensor, weight_bht: Tensor | None) -> Tensor:
        """(b, h, t, N): each group's rows times each head's weights."""
        if weight_bht is None:
            return _repeated(value_bgtN, self.heads)
        batch, groups, rows, width = value_bgtN.shape
        weight = weight_bht.view(batch, groups, self.heads // groups, rows, 1)
        return (value_bgtN.unsqueeze(2) * weight).reshape(batch, self.heads, rows, width)

    def _prepare(self, row: int, end: int, first: int) -> None:
        sums = self.sums[:, :, row:end]
        scale = None if self.scale is None else self.scale[:, :, row:end]
        self.C_tile = self._scaled(self.C[:, :, row:end], None)
        self.B_tile = self._scaled(self.B[:, :, row:end], scale)
        # Sums from the tile's first token, so that strong decays before it cost no digits.
        self.decay = decay_between(sums - sums[..., :1], self.dtype)
        if row == first:
            return
        before = self.sums[:, :, row - 1 : row]
        self.row_decay = (self.sums[:, :, row:end] - before).exp().to(self.dtype)
        self.column_decay = (before - self.sums[:, :, first:row]).exp().to(self.dtype)
        weight = self.column_decay
        if self.scale is not None:
            weight = weight * self.scale[:, :, first:row]
        self.C_rows = self.C_tile * self.row_decay.unsqueeze(-1)
        self.B_columns = self._scaled(self.B[:, :, first:row], weight)

    def _tile(self) -> Tensor:
        """The tile on the diagonal, without D."""
        tile = torch.bmm(_flat(self.C_tile), _flat(self.B_tile).transpose(1, 2)).view_as(self.decay)
        return tile.mul_(self.decay)

    def _add_D(self, tile: Tensor) -> None:
        if self.D is not None:
            tile.diagonal(dim1=-2, dim2=-1).add_(self.D.unsqueeze(-1))

    def _left(self) -> Tensor:
        left = torch.bmm(_flat(self.C_rows), _flat(self.B_columns).transpose(1, 2))
        return left.view(*self.C_rows.shape[:3], -1)

    def strip(self, row: int, end: int, first: int) -> Tensor:
        """(b, h, t, m) entries of rows row..end and columns first..end."""
        self._prepare(row, end, first)
        tile = self._tile()
        self._add_D(tile)
        return tile if row == first else torch.cat((self._left(), tile), dim=-1)

    def difference(self, teacher: Tensor, row: int, end: int, first: int) -> Tensor:
        """Turn the teacher's strip into student minus teacher."""
        self._prepare(row, end, first)
        own = teacher[..., row - first :]
        self.tile = self._tile()
        torch.sub(self.tile, own, out=own)
        self._add_D(own)
        if row > first:
            left = teacher[..., : row - first]
            torch.sub(self._left(), left, out=left)
        return teacher

    def accumulate(self, residual: Tensor, row: int, end: int, first: int) -> None:
        """Add the gradients of half the sum of squares of `residual`, the strip's difference."""
        flat = _flat(residual)
        own = residual[..., row - first :]
        self.dD += own.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        # An entry's gradient raises the sum of decays at its row and lowers it at its column; the diagonal
        # has none.
        weighted = self.tile.mul_(own)
        weighted.diagonal(dim1=-2, dim2=-1).zero_()
        weighted = weighted.to(torch.float64)
        d_sums = weighted.sum(-1) - weighted.sum(-2)
        d_scores = _flat(self.decay.mul_(own))
        dC = torch.bmm(d_scores, _flat(self.B_tile)).view_as(self.C_tile)
        self.dB[:, :, row:end] = torch.bmm(d_scores.transpose(1, 2), _flat(self.C_tile)).view_as(self.C_tile)
        if row > first:
            left = flat[..., : row - first]
            dC_rows = torch.bmm(left, _flat(self.B_columns)).view_as(self.C_rows)
            dB_columns = torch.bmm(left.transpose(1, 2), _flat(self.C_rows)).view_as(self.B_columns)
            d_sums += (dC_rows * self.C_rows).sum(-1)
            # A decay left of the strip acts on all the strip's rows and on the columns before it: a sum
            # from the left, in which nothing cancels.
            columns = (dB_columns * self.B_columns).sum(-1).to(torch.float64)
            self.d_decay[:, :, first:row] += sums_before(columns)
            dC.addcmul_(dC_rows, self.row_decay.unsqueeze(-1))
            self.dB[:, :, first:row].addcmul_(dB_columns, self.column_decay.unsqueeze(-1))
        self.dC[:, :, row:end] = dC
        self.d_decay[:, :, row:end] = sums_from(d_sums)

    def gradients(self) -> tuple[Tensor | None, ...]:
        B = _repeated(self.B, self.heads)
        d_scale = None if self.scale is None else (self.dB * B).sum(-1)
        dB = self.dB if self.scale is None else self.dB.mul_(self.scale.unsqueeze(-1))
        return self.dC, dB, self.d_decay, d_scale, None if self.D is None else self.dD


def strip_of(seq: int, tall: bool) -> int:
    """Rows of a strip. tall: there is a delta rule, whose walks take as many steps for some of a chunk's rows as for
    all."""
    return max(1, chunk_of(seq) if tall else min(STRIP, seq))


def columns_of(row: int, end: int, *sides) -> tuple[int, ...]:
    """The columns in which rows row..end of any of the matrices have anything, as methods of theirs take it: the first,
    and one past the last where that is not `end`."""
    first = min(row, *(side.first_column(row) for side in sides))
    ahead = [side for side in sides if isinstance(side, _AttentionStrips) and not side.causal]
    return (first, max(side.last_column(end) for side in ahead)) if ahead else (first,)


def strips_of(mixing: Mixing, block: Block, dtype: torch.dtype, gradients: bool):
    if isinstance(mixing, AttentionMixing):
        return _AttentionStrips(mixing, block, dtype, gradients)
    if isinstance(mixing, DeltaMixing):
        return DeltaStrips(mixing, block, dtype, gradients)
    return _SSDStrips(mixing, block, dtype, gradients)

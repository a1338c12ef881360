"""The distance of two mixing matrices row strip by row strip, in torch, on any device.

Work goes in blocks (some heads of some batch rows) and in a block in strips of STRIP rows, all visible
columns at once: the teacher's strip, the student's minus it, the sum of squares, and from the same
difference the gradients of the student's tensors. So each tile of either matrix is made once, and nothing
is longer than STRIP x seq.

A strip of a state-space matrix left of the diagonal is one matrix product of rows C_i exp(sums_i - sums_r)
and columns B_j input_scale_j exp(sums_r - sums_j), r the token before the strip: both exponents are sums of
log decays, at most 0, so nothing overflows. Only the diagonal tile needs the decays entry by entry.

The distance's own factor (1 / norm for frobenius) is known only when a block is done; until then gradients
are those of half the sum of squares, per head, and the factor is applied before heads are summed into
groups.

Letters: b batch rows of the block, h its heads, t rows of a strip, m its columns, n seq, N state_size, d
head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels.first_order import anchors, first_order
from mohawk.kernels.mixing import AttentionMixing, Mixing, SSDMixing
from mohawk.kernels.mixing_segments import (
    decays_with_resets,
    group_slice,
    head_blocks,
    segment_runs,
    segment_starts,
)

# Rows of a strip, and how many entries of a strip (over the block's heads) are worked on at a time.
STRIP = 64
STRIP_ENTRIES = 1 << 19
HIDDEN = -1e30  # a score whose exponential is 0; finite, so that log-probabilities have no NaN


@dataclass(frozen=True)
class _Block:
    rows: slice  # of the batch
    start: int  # heads start..stop of `heads`
    stop: int
    heads: int  # the larger of the two matrices' head counts

    def take(self, value_bh: Tensor) -> Tensor:
        """The block's slice of a (batch, heads or groups, ...) tensor, groups left as they are."""
        return value_bh[self.rows, group_slice(self.start, self.stop, self.heads, value_bh.shape[1])]

    def per_head(self, value_bh: Tensor) -> Tensor:
        """The same with each group repeated for its heads: for small tensors."""
        return _repeated(self.take(value_bh), self.stop - self.start)


def _repeated(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)


def _flat(value: Tensor) -> Tensor:
    return value.flatten(0, 1)


def _transposed(value_bnh: Tensor) -> Tensor:
    return value_bnh.transpose(1, 2)


class _AttentionStrips:
    """Strips of an attention matrix, and the gradients of q and k."""

    def __init__(self, mixing: AttentionMixing, block: _Block, dtype: torch.dtype, gradients: bool) -> None:
        self.heads = block.stop - block.start
        self.dtype, self.device = dtype, mixing.q.device
        self.scale, self.softcap = mixing.resolved_scale(), mixing.softcap
        self.window = mixing.window
        self.q = block.take(mixing.q).to(dtype)
        self.k = block.take(mixing.k).to(dtype).contiguous()
        self.batch = self.q.shape[0]
        tile = min(STRIP, self.q.shape[2])
        self.later = torch.ones(tile, tile, dtype=torch.bool, device=self.q.device).triu(1)
        self.runs = self.starts = None
        if mixing.segment_ids is not None:
            ids = mixing.segment_ids[block.rows]
            self.runs, self.starts = segment_runs(ids), segment_starts(ids).amin(0).tolist()
        if gradients:
            batch, _, seq, width = self.q.shape
            self.dq = torch.zeros(batch, self.heads, seq, width, dtype=dtype, device=self.q.device)
            self.dk = torch.zeros_like(self.dq)

    def first_column(self, row: int) -> int:
        first = 0 if self.starts is None else self.starts[row]
        return first if self.window is None else max(first, row - self.window + 1)

    def _scores(self, row: int, end: int, first: int) -> Tensor:
        """(b, h, t, m) masked scores of rows row..end and columns first..end."""
        batch, kv_heads, _, width = self.k.shape
        rows = end - row
        q = _repeated(self.q[:, :, row:end], self.heads) * self.scale
        # The query heads of one kv head are stacked as rows of one product.
        stacked = q.reshape(batch * kv_heads, -1, width)
        keys = _flat(self.k[:, :, first:end])
        scores = torch.bmm(stacked, keys.transpose(1, 2)).view(batch, self.heads, rows, end - first)
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            scores, self.slope = self.softcap * bounded, 1 - bounded.square()
        scores[..., row - first :].masked_fill_(self.later[:rows, :rows], HIDDEN)
        if self.window is not None and end - first > self.window:
            index = torch.arange(first, end, device=scores.device)
            scores.masked_fill_(index[row - first :].unsqueeze(1) - index >= self.window, HIDDEN)
        if self.runs is not None:
            hidden = self.runs[:, row:end].unsqueeze(2) != self.runs[:, first:end].unsqueeze(1)
            scores.masked_fill_(hidden.unsqueeze(1), HIDDEN)
        return scores

    def _widened(self, strip: Tensor, columns: int, fill: float) -> Tensor:
        if strip.shape[-1] == columns:
            return strip
        wide = strip.new_full((*strip.shape[:-1], columns), fill)
        wide[..., columns - strip.shape[-1] :] = strip
        return wide

    def strip(self, row: int, end: int, first: int) -> Tensor:
        """(b, h, t, m) probabilities of rows row..end and columns first..end."""
        own = torch.softmax(self._scores(row, end, max(first, self.first_column(row))), -1)
        return self._widened(own, end - first, 0)

    def log_strip(self, row: int, end: int, first: int) -> Tensor:
        own = torch.log_softmax(self._scores(row, end, max(first, self.first_column(row))), -1)
        return self._widened(own, end - first, HIDDEN)

    def difference(self, teacher: Tensor, row: int, end: int, first: int) -> Tensor:
        """Turn the teacher's strip into student minus teacher."""
        self.probabilities = self.strip(row, end, first)
        return torch.sub(self.probabilities, teacher, out=teacher)

    def accumulate(self, residual: Tensor, row: int, end: int, first: int) -> None:
        """Add the gradients of half the sum of squares of `residual`, the strip's difference."""
        weighted = residual * self.probabilities
        d_scores = weighted - self.probabilities * weighted.sum(-1, keepdim=True)
        self.accumulate_scores(d_scores, row, end, first)

    def accumulate_scores(self, d_scores: Tensor, row: int, end: int, first: int) -> None:
        if self.softcap is not None:  # columns in front of those with scores have probability 0
            d_scores = d_scores.clone()
            d_scores[..., d_scores.shape[-1] - self.slope.shape[-1] :] *= self.slope
        keys = _repeated(self.k[:, :, first:end], self.heads)
        queries = _repeated(self.q[:, :, row:end], self.heads)
        self.dq[:, :, row:end] += (d_scores @ keys).mul_(self.scale)
        self.dk[:, :, first:end] += (d_scores.transpose(-1, -2) @ queries).mul_(self.scale)

    def gradients(self) -> tuple[Tensor, ...]:
        return self.dq, self.dk


class _SSDStrips:
    """Strips of a state-space matrix, and the gradients of C, B, log_decay, input_scale and D."""

    def __init__(self, mixing: SSDMixing, block: _Block, dtype: torch.dtype, gradients: bool) -> None:
        self.heads = block.stop - block.start
        self.dtype, self.device = dtype, mixing.C.device
        self.C = block.take(_transposed(mixing.C)).to(dtype).contiguous()
        self.B = block.take(_transposed(mixing.B)).to(dtype).contiguous()
        self.batch = self.C.shape[0]
        ids = None if mixing.segment_ids is None else mixing.segment_ids[block.rows]
        # The block's heads only: in float64, all heads of a long row would outweigh a slice of its matrix.
        decays = decays_with_resets(_transposed(block.take(_transposed(mixing.log_decay))), ids)
        self.sums = _repeated(_transposed(decays), self.heads).cumsum(-1)
        whole = _Block(slice(None), block.start, block.stop, block.heads)
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
        # Sums from the tile's first token; split into two floats, so that after a strong decay weak ones
        # count.
        sums = sums - sums[..., :1]
        high = sums.to(self.dtype)
        decay = high.unsqueeze(-1) - high.unsqueeze(-2)
        if self.dtype != torch.float64:
            low = (sums - high).to(self.dtype)
            decay += low.unsqueeze(-1)
            decay -= low.unsqueeze(-2)
        self.decay = decay.exp_().tril_()
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
            self.d_decay[:, :, first:row] += columns.cumsum(-1) - columns
            dC.addcmul_(dC_rows, self.row_decay.unsqueeze(-1))
            self.dB[:, :, first:row].addcmul_(dB_columns, self.column_decay.unsqueeze(-1))
        self.dC[:, :, row:end] = dC
        self.d_decay[:, :, row:end] = d_sums.flip(-1).cumsum(-1).flip(-1)

    def gradients(self) -> tuple[Tensor | None, ...]:
        B = _repeated(self.B, self.heads)
        d_scale = None if self.scale is None else (self.dB * B).sum(-1)
        dB = self.dB if self.scale is None else self.dB.mul_(self.scale.unsqueeze(-1))
        return self.dC, dB, self.d_decay, d_scale, None if self.D is None else self.dD


def _strips(mixing: Mixing, block: _Block, dtype: torch.dtype, gradients: bool):
    kind = _AttentionStrips if isinstance(mixing, AttentionMixing) else _SSDStrips
    return kind(mixing, block, dtype, gradients)


def _blocks(mixings: tuple[Mixing, ...], heads: int, strip: int) -> Iterator[_Block]:
    batch, _, seq = mixings[0].shape
    counts = []
    for mixing in mixings:
        counts.append(mixing.shape[1])
        attention = isinstance(mixing, AttentionMixing)
        counts += [mixing.k.shape[1]] if attention else [mixing.C.shape[2], mixing.B.shape[2]]
    per_head = strip * seq
    ranges = head_blocks(heads, tuple(counts), max(1, STRIP_ENTRIES // per_head))
    rows = max(1, STRIP_ENTRIES // (per_head * (ranges[0][1] - ranges[0][0])))
    for row in range(0, batch, rows):
        for start, stop in ranges:
            yield _Block(slice(row, min(row + rows, batch)), start, stop, heads)


def _dtype(*mixings: Mixing) -> torch.dtype:
    wide = any(value is not None and value.dtype == torch.float64 for m in mixings for value in m.tensors)
    return torch.float64 if wide else torch.float32


def distance_chunked(student: Mixing, teacher: Mixing, metric: str, reduction: str) -> Tensor:
    """Shapes and meaning as in `mohawk.kernels.mixing_distance.mixing_distance`."""
    return _differentiable(student, teacher, metric, reduction, _value_and_gradients)


def distance_triton(student: Mixing, teacher: Mixing, metric: str, reduction: str) -> Tensor:
    """The same by the kernels of `mohawk.kernels.mixing_triton`."""
    return _differentiable(student, teacher, metric, reduction, _by_triton)


def _differentiable(student: Mixing, teacher: Mixing, metric: str, reduction: str, run) -> Tensor:
    places = anchors(student.tensors)
    return _Distance.apply(student, teacher, metric, reduction, run, places, *student.tensors, *places)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, metric, reduction, run, places, *tensors):
        tensors, wanted, ctx.anchors = tensors[: len(tensors) - len(places)], bool(places), places
        with torch.autocast(tensors[0].device.type, enabled=False):
            values, gradients = run(student, teacher, metric, reduction, wanted)
        ctx.reduction = reduction
        ctx.student = [None if value is None else (value.shape, value.dtype) for value in tensors]
        ctx.attention = isinstance(student, AttentionMixing)
        ctx.save_for_backward(*gradients)
        return {"mean": values.mean, "sum": values.sum, "none": lambda: values}[reduction]()

    @staticmethod
    @first_order("mixing_distance has no second derivative; use backend='reference' for it")
    def backward(ctx, upstream):
        results = []
        for gradient, like in zip(ctx.saved_tensors, ctx.student, strict=True):
            if gradient is None:
                results.append(None)
                continue
            shape, dtype = like
            if ctx.reduction == "none":  # (b, h, ...), h not yet summed into groups
                extra = (1,) * (gradient.dim() - 2)
                gradient = gradient * upstream.view(*upstream.shape, *extra)
                gradient = _fold(gradient, shape, ctx.attention)
            else:
                gradient = gradient * upstream
            results.append(gradient.to(dtype))
        return (None, None, None, None, None, None, *results, *[None] * len(ctx.anchors))


def _fold(gradient_bh: Tensor, shape: torch.Size, attention: bool) -> Tensor:
    """Sum a per-head gradient (b, h, ...) into its tensor's shape: heads into groups, D's over the batch."""
    if len(shape) == 1:
        return gradient_bh.sum(0).unflatten(0, (shape[0], -1)).sum(-1)
    count = shape[1] if attention else shape[2]
    if gradient_bh.shape[1] != count:
        gradient_bh = gradient_bh.unflatten(1, (count, -1)).sum(2)
    return gradient_bh if attention else gradient_bh.transpose(1, 2)


def _value_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """(batch, heads) distances, and the gradients of their reduction (per head if there is none)."""
    batch, _, seq = student.shape
    heads = max(student.shape[1], teacher.shape[1])
    dtype = _dtype(student, teacher)
    device = student.tensors[0].device
    values = torch.zeros(batch, heads, dtype=torch.float64, device=device)
    weight = 1 / max(1, batch * heads) if reduction == "mean" else 1.0
    gradients: list[Tensor | None] = [None] * len(student.tensors)
    attention = isinstance(student, AttentionMixing)
    strip = min(STRIP, seq)
    blocks = list(_blocks((student, teacher), heads, strip)) if values.numel() and seq else []
    if wanted:
        for index, value in enumerate(student.tensors):
            if value is not None and value.requires_grad:
                shape = value.shape
                if reduction == "none":
                    shape = (batch, heads, *((seq, *value.shape[3:]) if value.dim() > 1 else ()))
                once = bool(blocks) and not _shared(blocks[0], value.shape, attention)
                make = torch.empty if once else torch.zeros
                gradients[index] = make(shape, dtype=dtype, device=device)
    if not blocks:
        return values.to(dtype), gradients

    real = _real_tokens(student, teacher)
    for block in blocks:
        mine = _strips(student, block, dtype, wanted)
        theirs = _strips(teacher, block, dtype, False)
        masks = None if real is None else real[block.rows]
        total, size = _sweep(mine, theirs, seq, strip, metric, masks, wanted)
        value, factor = _finish(metric, total, size, seq, masks)
        values[block.rows, block.start : block.stop] = value
        if wanted:
            factor = (factor * weight).to(dtype)
            for out, like, gradient in zip(gradients, student.tensors, mine.gradients(), strict=True):
                if out is None or gradient is None:
                    continue
                gradient = gradient.to(dtype).mul_(factor.view(*factor.shape, *(1,) * (gradient.dim() - 2)))
                if reduction == "none":
                    out[block.rows, block.start : block.stop] = gradient
                else:
                    _add_block(out, gradient, block, like.shape, attention)
    return values.to(dtype), gradients


def _by_triton(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    from mohawk.kernels.mixing_triton import sums_and_gradients

    real = _real_tokens(student, teacher)
    total, size, per_head = sums_and_gradients(student, teacher, wanted)
    values, factor = _finish(metric, total, size, student.shape[2], real)
    gradients: list[Tensor | None] = [None] * len(student.tensors)
    if wanted:
        factor = factor / max(1, values.numel()) if reduction == "mean" else factor
        for index, (value, gradient) in enumerate(zip(student.tensors, per_head, strict=True)):
            if value is not None and value.requires_grad:
                gradient = gradient * factor.view(*factor.shape, *(1,) * (gradient.dim() - 2))
                gradient = gradient if reduction == "none" else _fold(gradient, value.shape, False)
                gradients[index] = gradient.to(torch.float32)
    return values.to(torch.float32), gradients


def _groups(shape: torch.Size, attention: bool) -> int:
    """The number of heads or groups of a student's tensor."""
    return shape[0] if len(shape) == 1 else shape[1] if attention else shape[2]


def _shared(block: _Block, shape: torch.Size, attention: bool) -> bool:
    """Whether several blocks add to the same entries of a tensor's gradient."""
    return len(shape) == 1 or block.stop - block.start < block.heads // _groups(shape, attention)


def _add_block(out: Tensor, gradient_bh: Tensor, block: _Block, shape: torch.Size, attention: bool) -> None:
    groups = group_slice(block.start, block.stop, block.heads, _groups(shape, attention))
    width = groups.stop - groups.start
    if gradient_bh.shape[1] != width:
        gradient_bh = gradient_bh.unflatten(1, (width, -1)).sum(2)
    if len(shape) == 1:
        out[groups] += gradient_bh.sum(0)
        return
    target = out[block.rows, groups] if attention else out[block.rows, :, groups].transpose(1, 2)
    if _shared(block, shape, attention):
        target += gradient_bh
    else:
        target.copy_(gradient_bh)


def _real_tokens(student: Mixing, teacher: Mixing) -> Tensor | None:
    """(batch, seq) which tokens are no padding, None if all are."""
    real = None
    for ids in (student.segment_ids, teacher.segment_ids):
        if ids is not None:
            real = (ids >= 0) if real is None else real & (ids >= 0)
    return None if real is None or bool(real.all()) else real


def _sweep(mine, theirs, seq: int, strip: int, metric: str, real: Tensor | None, wanted: bool):
    """One block's sums over all strips, (b, h): squared differences (or KL), and the teacher's squares."""
    # Rows are short enough for sums in float32; their sum is not.
    rows = torch.empty(mine.batch, mine.heads, seq, dtype=mine.dtype, device=mine.device)
    sizes = torch.empty_like(rows) if metric == "relative" else None
    padded = None if real is None else (~real).any(0).tolist()
    for row in range(0, seq, strip):
        end = min(row + strip, seq)
        first = min(row, mine.first_column(row), theirs.first_column(row))
        mask = None
        if padded is not None and any(padded[first:end]):
            mask = (real[:, row:end].unsqueeze(2) & real[:, first:end].unsqueeze(1)).unsqueeze(1)
        if metric == "kl":
            rows[:, :, row:end] = _kl_strip(mine, theirs, row, end, first, mask, wanted)
            continue
        strip_entries = theirs.strip(row, end, first)
        if metric == "relative":
            if mask is not None:
                strip_entries *= mask
            sizes[:, :, row:end] = torch.linalg.vector_norm(strip_entries, dim=-1)
        residual = mine.difference(strip_entries, row, end, first)
        if mask is not None:
            residual *= mask
        rows[:, :, row:end] = torch.linalg.vector_norm(residual, dim=-1)
        if wanted:
            mine.accumulate(residual, row, end, first)
    rows = rows.to(torch.float64)
    if metric == "kl":
        return rows.sum(-1), None
    return rows.square_().sum(-1), None if sizes is None else sizes.to(torch.float64).square_().sum(-1)


def _kl_strip(mine, theirs, row: int, end: int, first: int, mask: Tensor | None, wanted: bool) -> Tensor:
    """(b, h, t) the KL of each row."""
    log_s, log_a = mine.log_strip(row, end, first), theirs.log_strip(row, end, first)
    a = log_a.exp()
    terms = a * (log_a - log_s)
    residual = log_s.exp_().sub_(a)
    if mask is not None:
        # A padded row is left out; a padded column is never seen from a real row.
        rows = mask.diagonal(offset=row - first, dim1=-2, dim2=-1).unsqueeze(-1)
        terms, residual = terms * rows, residual.mul_(rows)
    if wanted:
        mine.accumulate_scores(residual, row, end, first)
    return terms.sum(-1)


def _finish(metric: str, total: Tensor, size: Tensor | None, seq: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The distance, and the factor for the gradients of half the sum of squares (for kl: of the sum)."""
    if metric == "kl":
        rows = seq if real is None else real.sum(-1).clamp(min=1).unsqueeze(1)
        return total / rows, torch.ones_like(total) / rows
    if metric == "squared":
        return total, torch.full_like(total, 2.0)
    if metric == "mse":
        return total / max(1, seq) ** 2, torch.full_like(total, 2.0 / max(1, seq) ** 2)
    norm = total.sqrt()
    if metric == "frobenius":
        return norm, torch.where(norm > 0, 1 / norm, 0)
    size = size.sqrt()
    usable = (size > 0) & (norm > 0)
    return torch.where(size > 0, norm / size, 0), torch.where(usable, 1 / (norm * size), 0)


@torch.no_grad()
def write_matrix(mixing: Mixing, first_row: int, last_row: int, chosen: list[int], mean: bool) -> Tensor:
    """See `mohawk.kernels.mixing.mixing_matrix`."""
    batch, heads, seq = mixing.shape
    dtype = _dtype(mixing)
    device = mixing.tensors[0].device
    rows = last_row - first_row
    out = torch.zeros(batch, *([] if mean else [len(chosen)]), rows, seq, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for place, head in enumerate(chosen):
            for item in range(batch if rows else 0):
                strips = _strips(mixing, _Block(slice(item, item + 1), head, head + 1, heads), dtype, False)
                for row in range(first_row, last_row, STRIP):
                    end = min(row + STRIP, last_row)
                    first = min(row, strips.first_column(row))
                    tile = strips.strip(row, end, first)[0, 0]
                    target = out[item] if mean else out[item, place]
                    here = target[row - first_row : end - first_row, first:end]
                    here.add_(tile, alpha=1 / len(chosen)) if mean else here.copy_(tile)
    return out

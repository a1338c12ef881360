"""The distance of two mixing matrices row strip by row strip, in torch, on any device.

Work goes in blocks (some heads of some batch rows) and in a block in strips of STRIP rows or so, all visible
columns at once: the teacher's strip, the student's minus it, the sum of squares, and from the same
difference the gradients of the student's tensors. So each tile of either matrix is made once, and nothing
is larger than a strip.

The distance's own factor (1 / norm for frobenius) is known only when a block is done; until then gradients
are those of half the sum of squares, per head, and the factor is applied before heads are summed into
groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mohawk.kernels.common.first_order import anchors, first_order
from mohawk.kernels.common.segments import group_slice, head_blocks
from mohawk.kernels.mixing.metrics import METRICS, reads_teacher
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing
from mohawk.kernels.mixing.strips import STRIP, Block, columns_of, strip_of, strips_of

BACKEND = "chunked"  # as `mohawk doctor` names it

STRIP_ENTRIES = 1 << 19  # of a strip, over the block's heads, that are worked on at a time


def _blocks(mixings: tuple[Mixing, ...], heads: int, strip: int) -> Iterator[Block]:
    batch, _, seq = mixings[0].shape
    counts = []
    for mixing in mixings:
        counts.append(mixing.shape[1])
        if isinstance(mixing, AttentionMixing):
            counts.append(mixing.k.shape[1])
        elif isinstance(mixing, SSDMixing):
            counts += [mixing.C.shape[2], mixing.B.shape[2]]
    per_head = strip * seq
    ranges = head_blocks(heads, tuple(counts), max(1, STRIP_ENTRIES // per_head))
    rows = max(1, STRIP_ENTRIES // (per_head * (ranges[0][1] - ranges[0][0])))
    for row in range(0, batch, rows):
        for start, stop in ranges:
            yield Block(slice(row, min(row + rows, batch)), start, stop, heads)


def compute_dtype(*mixings: Mixing) -> torch.dtype:
    wide = any(value is not None and value.dtype == torch.float64 for m in mixings for value in m.tensors)
    return torch.float64 if wide else torch.float32


def distance_chunked(student: Mixing, teacher: Mixing, metric: str, reduction: str) -> Tensor:
    """Shapes and meaning as in `mohawk.kernels.mixing.interface.mixing_distance`."""
    return differentiable(student, teacher, metric, reduction, value_and_gradients)


def differentiable(student: Mixing, teacher: Mixing, metric: str, reduction: str, run) -> Tensor:
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
                gradient = fold(gradient, shape, ctx.attention)
            else:
                gradient = gradient * upstream
            results.append(gradient.to(dtype))
        return (None, None, None, None, None, None, *results, *[None] * len(ctx.anchors))


def fold(gradient_bh: Tensor, shape: torch.Size, attention: bool) -> Tensor:
    """Sum a per-head gradient (b, h, ...) into its tensor's shape: heads into groups, D's over the batch."""
    if len(shape) == 1:
        return gradient_bh.sum(0).unflatten(0, (shape[0], -1)).sum(-1)
    count = shape[1] if attention else shape[2]
    if gradient_bh.shape[1] != count:
        gradient_bh = gradient_bh.unflatten(1, (count, -1)).sum(2)
    return gradient_bh if attention else gradient_bh.transpose(1, 2)


def value_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, wanted: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """(batch, heads) distances, and the gradients of their reduction (per head if there is none)."""
    batch, _, seq = student.shape
    heads = max(student.shape[1], teacher.shape[1])
    dtype = compute_dtype(student, teacher)
    device = student.tensors[0].device
    values = torch.zeros(batch, heads, dtype=torch.float64, device=device)
    weight = 1 / max(1, batch * heads) if reduction == "mean" else 1.0
    gradients: list[Tensor | None] = [None] * len(student.tensors)
    attention = isinstance(student, AttentionMixing)
    strip = strip_of(seq, isinstance(student, DeltaMixing) or isinstance(teacher, DeltaMixing))
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

    real = real_tokens(student, teacher)
    for block in blocks:
        mine = strips_of(student, block, dtype, wanted)
        theirs = strips_of(teacher, block, dtype, False)
        masks = None if real is None else real[block.rows]
        total, size = _sweep(mine, theirs, seq, strip, metric, masks, wanted)
        value, factor = distance_and_factor(metric, total, size, seq, masks)
        values[block.rows, block.start : block.stop] = value
        if wanted:
            factor = (factor * weight).to(dtype)
            for out, like, gradient in zip(gradients, student.tensors, mine.gradients(), strict=True):
                if out is None or like is None or gradient is None:
                    continue
                gradient = gradient.to(dtype).mul_(factor.view(*factor.shape, *(1,) * (gradient.dim() - 2)))
                if reduction == "none":
                    out[block.rows, block.start : block.stop] = gradient
                else:
                    add_block(out, gradient, block, like.shape, attention)
    return values.to(dtype), gradients


def _groups(shape: torch.Size, attention: bool) -> int:
    """The number of heads or groups of a student's tensor."""
    return shape[0] if len(shape) == 1 else shape[1] if attention else shape[2]


def _shared(block: Block, shape: torch.Size, attention: bool) -> bool:
    """Whether several blocks add to the same entries of a tensor's gradient."""
    return len(shape) == 1 or block.stop - block.start < block.heads // _groups(shape, attention)


def add_block(out: Tensor, gradient_bh: Tensor, block: Block, shape: torch.Size, attention: bool) -> None:
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


def real_tokens(student: Mixing, teacher: Mixing) -> Tensor | None:
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
    sizes = torch.empty_like(rows) if reads_teacher(metric) else None
    padded = None if real is None else (~real).any(0).tolist()
    for row in range(0, seq, strip):
        end = min(row + strip, seq)
        columns = columns_of(row, end, mine, theirs)
        first, stop = columns[0], columns[-1] if columns[1:] else end
        mask = None
        if padded is not None and any(padded[first:stop]):
            assert real is not None
            mask = (real[:, row:end].unsqueeze(2) & real[:, first:stop].unsqueeze(1)).unsqueeze(1)
        if metric == "kl":
            rows[:, :, row:end] = _kl_strip(mine, theirs, row, end, columns, mask, wanted)
            continue
        strip_entries = theirs.strip(row, end, *columns)
        if sizes is not None:
            if mask is not None:
                strip_entries *= mask
            sizes[:, :, row:end] = torch.linalg.vector_norm(strip_entries, dim=-1)
        residual = mine.difference(strip_entries, row, end, *columns)
        if mask is not None:
            residual *= mask
        rows[:, :, row:end] = torch.linalg.vector_norm(residual, dim=-1)
        if wanted:
            mine.accumulate(residual, row, end, *columns)
    rows = rows.to(torch.float64)
    if metric == "kl":
        return rows.sum(-1), None
    return rows.square_().sum(-1), None if sizes is None else sizes.to(torch.float64).square_().sum(-1)


def _kl_strip(mine, theirs, row: int, end: int, columns: tuple[int, ...], mask: Tensor | None, wanted: bool) -> Tensor:
    """(b, h, t) the KL of each row."""
    log_s, log_a = mine.log_strip(row, end, *columns), theirs.log_strip(row, end, *columns)
    a = log_a.exp()
    terms = a * (log_a - log_s)
    residual = log_s.exp_().sub_(a)
    if mask is not None:
        # A padded row is left out; a padded column is never seen from a real row.
        rows = mask.diagonal(offset=row - columns[0], dim1=-2, dim2=-1).unsqueeze(-1)
        terms, residual = terms * rows, residual.mul_(rows)
    if wanted:
        mine.accumulate_scores(residual, row, end, *columns)
    return terms.sum(-1)


def distance_and_factor(
    metric: str, total: Tensor, size: Tensor | None, seq: int, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The distance, and the factor for the gradients of half the sum of squares (for kl: of the sum)."""
    if metric == "kl":
        rows = seq if real is None else real.sum(-1).clamp(min=1).unsqueeze(1)
        return total / rows, torch.ones_like(total) / rows
    tokens = max(1, seq) if real is None else real.sum(-1, keepdim=True).clamp(min=1).to(total.dtype)
    # Those of scores are between what is compared there instead of matrices.
    return METRICS["mse" if metric == "scores" else metric].of_squares(total, size, tokens)


@torch.no_grad()
def write_matrix(mixing: Mixing, first_row: int, last_row: int, chosen: list[int], mean: bool) -> Tensor:
    """See `mohawk.kernels.mixing.interface.mixing_matrix`."""
    batch, heads, seq = mixing.shape
    dtype = compute_dtype(mixing)
    device = mixing.tensors[0].device
    rows = last_row - first_row
    out = torch.zeros(batch, *([] if mean else [len(chosen)]), rows, seq, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for place, head in enumerate(chosen):
            for item in range(batch if rows else 0):
                strips = strips_of(mixing, Block(slice(item, item + 1), head, head + 1, heads), dtype, False)
                for row in range(first_row, last_row, STRIP):
                    end = min(row + STRIP, last_row)
                    columns = columns_of(row, end, strips)
                    tile = strips.strip(row, end, *columns)[0, 0]
                    target = out[item] if mean else out[item, place]
                    seen = slice(columns[0], columns[0] + tile.shape[-1])
                    here = target[row - first_row : end - first_row, seen]
                    here.add_(tile, alpha=1 / len(chosen)) if mean else here.copy_(tile)
    return out

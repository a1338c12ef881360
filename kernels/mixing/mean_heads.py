"""The distance between two mixing matrices whose heads do not pair up: of the means over their heads.

A student with other heads than its teacher can be held to the teacher's mean matrix (TextBrewer's attention losses,
arXiv 2002.12620), or to the means of groups of consecutive heads. Work goes as in chunked.py, strips of rows
of all heads at a time: the heads' strips, their means, the difference of those, and from it every head's gradients.
Nothing is longer than a strip of some rows of seq for each head.

Letters: b batch, h heads, g groups, t rows of a strip, m its columns.
"""

from functools import partial

import torch
from torch import Tensor

from mohawk.kernels.mixing.chunked import add_block, compute_dtype, differentiable, distance_and_factor, real_tokens
from mohawk.kernels.mixing.operands import AttentionMixing, Mixing
from mohawk.kernels.mixing.strips import HIDDEN, STRIP, Block, columns_of, strips_of

STRIP_ENTRIES = 1 << 21  # of a strip, over the heads, that are worked on at a time


def head_means_chunked(student: Mixing, teacher: Mixing, metric: str, groups: int) -> Tensor:
    """`head_mean_distance` of what was checked."""
    return differentiable(student, teacher, metric, "mean", partial(_value_and_gradients, groups=groups))


def _value_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, reduction: str, wanted: bool, groups: int
) -> tuple[Tensor, list[Tensor | None]]:
    """(batch, groups) distances, and the gradients of their mean."""
    batch, heads, seq = student.shape
    dtype, device = compute_dtype(student, teacher), student.tensors[0].device
    values = torch.zeros(batch, groups, dtype=torch.float64, device=device)
    attention = isinstance(student, AttentionMixing)
    gradients = [
        torch.zeros(x.shape, dtype=dtype, device=device) if wanted and x is not None and x.requires_grad else None
        for x in student.tensors
    ]
    if not (batch and seq):
        return values.to(dtype), gradients
    row_entries = max(heads, teacher.shape[1]) * seq
    strip = min(STRIP, seq, max(1, STRIP_ENTRIES // row_entries))
    rows = max(1, STRIP_ENTRIES // (strip * row_entries))
    real = real_tokens(student, teacher)
    # a head's share of its group's mean (kl's gradient has it in its weights)
    share = 1.0 if metric == "kl" else groups / heads
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        block = Block(part, 0, heads, heads)
        mine = strips_of(student, block, dtype, wanted)
        theirs = strips_of(teacher, Block(part, 0, teacher.shape[1], teacher.shape[1]), dtype, False)
        masks = None if real is None else real[part]
        sums = torch.zeros(mine.batch, groups, dtype=torch.float64, device=device)
        for row in range(0, seq, strip):
            end = min(row + strip, seq)
            columns = columns_of(row, end, mine, theirs)
            step = {"kl": _kl_strip, "scores": _scores_strip}.get(metric, _squared_strip)
            sums += step(mine, theirs, row, end, columns, masks, groups, wanted).sum(-1, dtype=torch.float64)
        values[part], factor = distance_and_factor(metric, sums, None, seq, masks)
        if not wanted:
            continue
        factor = (factor * share / values.numel()).to(dtype).repeat_interleave(heads // groups, 1)
        for out, like, gradient in zip(gradients, student.tensors, mine.gradients(), strict=True):
            if out is not None and like is not None and gradient is not None:
                gradient = gradient.to(dtype) * factor.view(*factor.shape, *(1,) * (gradient.dim() - 2))
                add_block(out, gradient, block, like.shape, attention)
    return values.to(dtype), gradients


def _mean(strip_bhtm: Tensor, groups: int) -> Tensor:
    return strip_bhtm.unflatten(1, (groups, -1)).mean(2)


def _real_entries(real: Tensor, row: int, end: int, columns: tuple[int, ...]) -> Tensor:
    """(b, 1, t, m) which entries of a strip are between two tokens that are no padding."""
    first, stop = columns[0], columns[-1] if columns[1:] else end
    return (real[:, row:end].unsqueeze(2) & real[:, first:stop].unsqueeze(1)).unsqueeze(1)


def _squared_strip(mine, theirs, row, end, columns, real, groups, wanted) -> Tensor:
    """(b, g, t) squared differences of a strip's rows; adds the gradients of half of them by the means."""
    target = theirs.strip(row, end, *columns)
    nothing = torch.zeros(mine.batch, mine.heads, *target.shape[2:], dtype=mine.dtype, device=mine.device)
    matrix = mine.difference(nothing, row, end, *columns)
    residual = _mean(matrix, groups).sub_(_mean(target, groups))
    if real is not None:
        residual *= _real_entries(real, row, end, columns)
    if wanted:
        mine.accumulate(residual.repeat_interleave(mine.heads // groups, 1), row, end, *columns)
    return residual.square().sum(-1)


def _scores_strip(mine, theirs, row, end, columns, real, groups, wanted) -> Tensor:
    """(b, g, t) squared differences of a strip's scores; adds the gradients of half of them by the scores."""
    scores, target = mine.scores(row, end, *columns), theirs.scores(row, end, *columns)
    seen = (scores[:, :1] > HIDDEN / 2) & (target[:, :1] > HIDDEN / 2)  # alike in all heads
    if real is not None:
        seen &= _real_entries(real, row, end, columns)
    residual = (_mean(scores, groups) - _mean(target, groups)).masked_fill_(~seen, 0.0)
    if wanted:
        mine.accumulate_scores(residual.repeat_interleave(mine.heads // groups, 1), row, end, *columns)
    return residual.square().sum(-1)


def _kl_strip(mine, theirs, row, end, columns, real, groups, wanted) -> Tensor:
    """(b, g, t) the KL of a strip's rows; adds its gradients by the scores."""
    per_group = mine.heads // groups
    a = _mean(theirs.strip(row, end, *columns), groups)
    log_heads = mine.log_strip(row, end, *columns)
    # in logarithms, so that a probability that underflows still has a gradient
    log_heads_g = log_heads.unflatten(1, (groups, per_group))
    log_sum = torch.logsumexp(log_heads_g, 2)
    log_s = log_sum - torch.tensor(per_group, dtype=a.dtype).log()
    terms = torch.xlogy(a, a) - a * log_s
    if real is not None:
        rows = real[:, row:end].unsqueeze(1).unsqueeze(-1)
        terms, a = terms * rows, a * rows
    if wanted:
        # d/d log p of head h is -a times the head's part of the sum; through the softmax of its scores
        d_log = (log_heads_g - log_sum.unsqueeze(2)).exp_().mul_(a.unsqueeze(2)).neg_().flatten(1, 2)
        d_scores = d_log - log_heads.exp() * d_log.sum(-1, keepdim=True)
        mine.accumulate_scores(d_scores, row, end, *columns)
    return terms.sum(-1)

"""What Triton kernels of mixing matrices share: a matrix as they take it, and the entries of one of its tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Side(NamedTuple):
    """One of the two matrices as the kernels take it: pointers and sizes, None where its kind has no such thing."""

    left: Any  # q or C: (batch, left_heads, seq, width)
    right: Any  # k or B: (batch, right_heads, seq, width)
    first: Any  # (batch, seq) int32: the first token a row sees; None if that is token 0 everywhere
    most: Any  # attention: (batch, heads, seq) float32 largest score of a row
    inverse: Any  # attention: (batch, heads, seq) float32 inverse of the sum of exponentials less that score
    sums: Any  # state-space: (batch, heads, seq) float64 cumulative decays
    weight: Any  # state-space: (batch, heads, seq) float32 input_scale, None if all are 1
    D: Any  # state-space: (heads,) float32, None if 0
    scale: Any  # attention: of the scores, for base 2
    softcap: Any  # attention: what scores are bounded to, for base 2; None if they are not
    heads: Any
    left_heads: Any
    right_heads: Any
    width: Any


@triton.jit
def offset_of(batch, head, heads, own_heads, size):
    """Where, in a (batch, own_heads, size) operand, the part is that a head of `heads` reads."""
    return (batch * own_heads + head // (heads // own_heads)).to(tl.int64) * size


@triton.jit
def load_operand(pointer, tokens, seq, start, width, WIDTH: tl.constexpr):
    """(tokens, WIDTH) of a (seq, width) operand from column `start`, zeros beyond either."""
    column = start + tl.arange(0, WIDTH)
    inside = (tokens[:, None] < seq) & (column[None, :] < width)
    return tl.load(pointer + tokens[:, None] * width + column[None, :], mask=inside, other=0.0)


@triton.jit
def held_operand(pointer, tokens, seq, width, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The own operand's tile, unless it is so wide that it is read anew, chunk by chunk, for each product."""
    if WIDTH <= CHUNK:
        return load_operand(pointer, tokens, seq, 0, width, WIDTH)
    else:
        return 0


@triton.jit
def tile_products(
    held, own_pointer, own, step_pointer, step, seq, width, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(own, step) tile of own operand times step operand transposed."""
    if WIDTH <= CHUNK:
        step_tile = load_operand(step_pointer, step, seq, 0, width, WIDTH)
        products = tl.dot(held, tl.trans(step_tile), input_precision=PRECISION)
    else:
        products = tl.zeros((own.shape[0], step.shape[0]), tl.float32)
        for start in range(0, WIDTH, CHUNK):
            own_chunk = load_operand(own_pointer, own, seq, start, width, CHUNK)
            step_chunk = load_operand(step_pointer, step, seq, start, width, CHUNK)
            products = tl.dot(own_chunk, tl.trans(step_chunk), products, input_precision=PRECISION)
    return products


@triton.jit
def edge_vectors(side, batch, at, tokens, origin, seq, ROW: tl.constexpr, DIAGONAL: tl.constexpr):
    """What entries depend on by their row or column: (most or decay, inverse or low part of the decay, weight,
    first token seen). at: where the head's part of a (batch, heads, seq) operand is.

    Decays run from `origin`, a cumulative one, to the row or from the column to it: as factors, or, for tiles on the
    diagonal, as exponents in two float32 parts. Rows beyond seq get entries of 0.
    """
    value, low, weight, first = 0.0, 0.0, 1.0, 0
    inside = tokens < seq
    if side.sums is None:
        if ROW:
            value = tl.load(side.most + at + tokens, mask=inside, other=float("inf"))
            low = tl.load(side.inverse + at + tokens, mask=inside, other=0.0)
    else:
        local = tl.load(side.sums + at + tokens, mask=inside, other=float("-inf") if ROW else float("inf")) - origin
        if DIAGONAL:
            value = local.to(tl.float32)
            low = (local - value).to(tl.float32)
        elif ROW:
            value = tl.exp2(local.to(tl.float32))
        else:
            value = tl.exp2((-local).to(tl.float32))
        if side.weight is not None:
            if not ROW:
                weight = tl.load(side.weight + at + tokens, mask=inside, other=0.0)
    if side.first is not None:
        if ROW:
            first = tl.load(side.first + batch.to(tl.int64) * seq + tokens, mask=inside, other=0)
    return value, low, weight, first


@triton.jit
def _tanh(value):
    """By exponentials; near 0, where those would cancel, by its series, whose next term is below float32's digits."""
    small = tl.exp(-2 * tl.abs(value))
    far = (1 - small) / (1 + small)
    square = value * value
    near = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(value) < 0.25, value * near, tl.where(value < 0, -far, far))


@triton.jit
def scores_of(side, products):
    """Attention's scores to base 2, and their slope by the products, but for the scale: 1 without a softcap."""
    scores, slope = products * side.scale, 1.0
    if side.softcap is not None:
        bounded = _tanh(scores / side.softcap)
        scores, slope = side.softcap * bounded, 1 - bounded * bounded
    return scores, slope


@triton.jit
def tile_entries(side, D, products, own, step, of_own, of_step, seq, ROWS: tl.constexpr, DIAGONAL: tl.constexpr):
    """A tile of the matrix from a tile of q k^T or C B^T: (entries, by, strict).

    Attention: `by` is the entries' logarithm. State-space: the factor between the gradients of an entry and of the
    product it is made from, but for the part per own token where that is a factor; `strict` is the entries without
    the matrix's diagonal, on which no decay acts. With a softcap `strict` is the slope of attention's scores.
    """
    own_value, own_low, own_weight, own_first = of_own
    step_value, step_low, step_weight, step_first = of_step
    row = own[:, None] if ROWS else step[None, :]
    column = step[None, :] if ROWS else own[:, None]
    seen = (column <= row) & (row < seq)
    if side.first is not None:
        seen = seen & (column >= (own_first[:, None] if ROWS else step_first[None, :]))
    if side.sums is None:
        scores, slope = scores_of(side, products)
        by = scores - (own_value[:, None] if ROWS else step_value[None, :])
        inverse = own_low[:, None] if ROWS else step_low[None, :]
        entries = tl.exp2(by) * inverse
        by += tl.log2(inverse)
        if DIAGONAL or side.first is not None:
            entries = tl.where(seen, entries, 0.0)
        strict = entries if side.softcap is None else slope
    elif DIAGONAL:
        exponents = (own_value[:, None] - step_value[None, :]) + (own_low[:, None] - step_low[None, :])
        by = tl.exp2(tl.where(seen, exponents if ROWS else -exponents, float("-inf")))
        if side.weight is not None:
            if ROWS:
                by *= step_weight[None, :]
        entries = products * by
        if side.weight is not None:
            if not ROWS:
                entries *= own_weight[:, None]
        strict = tl.where(row == column, 0.0, entries)
        if side.D is not None:
            entries = tl.where((row == column) & seen, entries + D, entries)
    else:
        by = (step_value * step_weight)[None, :]
        if side.first is not None:
            by = tl.where(seen, by, 0.0)
        entries = products * (own_value * own_weight)[:, None] * by
        strict = entries
    return entries, by, strict

"""The Triton kernels of state-space duality in chunks (arXiv 2405.21060, section 6), forward and backward.

Forward: `states_kernel` makes what each chunk adds to the state, `passing_kernel` carries the state from chunk to chunk
and leaves in the place of each addition the state that enters there, `scan_kernel` makes the outputs of a chunk from
its own tokens and from that state. Backward: the first two kernels again, from the last chunk to the first, for the
gradients of the states; then `inputs_kernel` makes the gradients of x, decay, input scale and D, head by head, and
`pairs_kernel` those of B and C, whose heads it adds up.

Operands are read where they lie, by their strides. Products are as exact as float32's, on tensor cores for bfloat16: a
float32 is the sum of three bfloat16. Each product has an operand as it is in memory on one side, so where that is
bfloat16 it takes three products, between two such operands one, and between two float32 six, those that float32 can
hold. Cumulative decays are float64 and to base 2, with which GPUs count; a border between segments is a decay to
exactly 0.

Loops leave addresses and masks inside (`disable_licm`): kept in registers they would not leave enough for the rest.

Letters as in chunked.py; in comments, i is a token that reads and j one that writes, both of one chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from mohawk.kernels.common.segments import RESET

LOG2E = tl.constexpr(math.log2(math.e))
CUT = tl.constexpr(RESET)


class Operand(NamedTuple):
    """A tensor (batch, tokens, heads, ...) as kernels take it: its pointer, None if there is none, and strides. The
    last dimension, if there is another, is contiguous."""

    pointer: Any
    batch: Any
    token: Any
    head: Any


@triton.jit
def _at(operand, batch, first, head):
    """Where, in an operand, the part of a head from token `first` on begins."""
    return (
        operand.pointer
        + batch.to(tl.int64) * operand.batch
        + first.to(tl.int64) * operand.token
        + head.to(tl.int64) * operand.head
    )


@triton.jit
def _tile(operand, batch, first, head, seq, start, width, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """(CHUNK, WIDTH) of an operand from token `first` and column `start`, zeros beyond either."""
    token, column = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    inside = (first + token[:, None] < seq) & (start + column[None, :] < width)
    at = _at(operand, batch, first, head) + start
    return tl.load(at + token[:, None] * operand.token + column[None, :], mask=inside, other=0.0)


@triton.jit
def _vector(operand, batch, first, head, seq, CHUNK: tl.constexpr):
    """(CHUNK,) of an operand with a number for each token and head, zeros beyond."""
    token = tl.arange(0, CHUNK)
    return tl.load(_at(operand, batch, first, head) + token * operand.token, mask=first + token < seq, other=0.0)


@triton.jit
def _state_tile(pointer, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a contiguous (rows, columns) state, zeros beyond."""
    i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(pointer + i[:, None] * columns + j[None, :], mask=inside, other=0.0)


@triton.jit
def _decays(log_decay, segments, batch, first, head, seq, CHUNK: tl.constexpr):
    """(CHUNK,) cumulative log decays from the chunk's beginning to each token, and the whole chunk's: float64, to base
    2. As `decays_with_resets` has them, NaN too."""
    token = tl.arange(0, CHUNK)
    value = _vector(log_decay, batch, first, head, seq, CHUNK).to(tl.float64)
    value = tl.where(value < CUT, CUT, value)
    if segments.pointer is not None:
        inside = (first + token < seq) & (first + token > 0)
        at = _at(segments, batch, first, head) + token * segments.token
        here, before = tl.load(at, mask=inside, other=0), tl.load(at - segments.token, mask=inside, other=0)
        value += tl.where(here != before, CUT, 0.0)
    value *= LOG2E
    return tl.cumsum(value, 0), tl.sum(value, 0)


@triton.jit
def _decays_between(sums):
    """(CHUNK, CHUNK) decay from token j to token i, 0 where j is behind i. Each sum is two float32, since their
    difference must keep what a strong decay earlier in the chunk would push out of one."""
    high = sums.to(tl.float32)
    low = (sums - high).to(tl.float32)
    exponents = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    token = tl.arange(0, sums.shape[0])
    return tl.exp2(tl.where(token[None, :] <= token[:, None], exponents, float("-inf")))


@triton.jit
def _thirds(value):
    """float32 as the sum of three bfloat16."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, total, THIRDS: tl.constexpr):
    """total + a b, each float32 or as it is in memory. THIRDS: float32 as bfloat16, else on units for float32."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        total = tl.dot(a, b, total)
    elif b.dtype == tl.bfloat16:
        high, middle, low = _thirds(a.to(tl.float32))
        total = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, total)))
    elif a.dtype == tl.bfloat16:
        high, middle, low = _thirds(b.to(tl.float32))
        total = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, total)))
    elif THIRDS:
        high, middle, low = _thirds(a.to(tl.float32))
        high_b, middle_b, low_b = _thirds(b.to(tl.float32))
        total = tl.dot(high, low_b, total)
        total = tl.dot(low, high_b, total)
        total = tl.dot(middle, middle_b, total)
        total = tl.dot(high, middle_b, total)
        total = tl.dot(middle, high_b, total)
        total = tl.dot(high, high_b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _pairs(
    left, left_head, right, right_head, batch, first, seq, width, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    THIRDS: tl.constexpr,
):  # fmt: skip
    """(CHUNK, CHUNK) products of a chunk's rows in two operands."""
    total = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in tl.range(0, width, WIDTH, disable_licm=True):
        a = _tile(left, batch, first, left_head, seq, start, width, CHUNK, WIDTH)
        b = _tile(right, batch, first, right_head, seq, start, width, CHUNK, WIDTH)
        total = _product(a, tl.trans(b), total, THIRDS)
    return total


@triton.jit
def _place(heads, chunks, CHUNK: tl.constexpr):
    """(batch row, head, first token, where it is in a (batch, heads, chunks) tensor) of this program."""
    program = tl.program_id(0)
    head = program % heads
    chunk = (program // heads) % chunks
    batch = program // heads // chunks
    return batch, head, chunk * CHUNK, ((batch * heads + head) * chunks + chunk).to(tl.int64)


@triton.jit(do_not_specialize=["seq", "heads", "chunks"])
def states_kernel(
    values, keys, log_decay, scale, segments, states, across, seq, heads, chunks, per_group, head_dim, state_size,
    TO_END: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, THIRDS: tl.constexpr,
):  # fmt: skip
    """states (batch, heads, chunks, head_dim, state_size): the sum over a chunk's tokens of values times keys and, with
    TO_END, input scale and decay to the chunk's end, else the decay from its beginning. across (batch, heads, chunks):
    the decay of the whole chunk, if it is wanted. per_group: heads that have a head of keys in common."""
    batch, head, first, place = _place(heads, chunks, CHUNK)
    columns = tl.cdiv(state_size, STATE)
    row, column = tl.program_id(1) // columns * DIM, tl.program_id(1) % columns * STATE
    sums, total = _decays(log_decay, segments, batch, first, head, seq, CHUNK)
    if TO_END:
        weight = tl.exp2((total - sums).to(tl.float32))
        if scale.pointer is not None:
            weight *= _vector(scale, batch, first, head, seq, CHUNK).to(tl.float32)
    else:
        weight = tl.exp2(sums.to(tl.float32))
    value = _tile(values, batch, first, head, seq, row, head_dim, CHUNK, DIM).to(tl.float32) * weight[:, None]
    key = _tile(keys, batch, first, head // per_group, seq, column, state_size, CHUNK, STATE)
    state = _product(tl.trans(value), key, tl.zeros((DIM, STATE), tl.float32), THIRDS)
    i, j = row + tl.arange(0, DIM), column + tl.arange(0, STATE)
    at = states + place * head_dim * state_size + i[:, None] * state_size + j[None, :]
    tl.store(at, state, mask=(i[:, None] < head_dim) & (j[None, :] < state_size))
    if across is not None:
        if tl.program_id(1) == 0:
            tl.store(across + place, tl.exp2(total.to(tl.float32)))


@triton.jit(do_not_specialize=["chunks"])
def passing_kernel(states, across, outer, carried, chunks, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """states (batch x heads, chunks, size): in place of what each chunk adds, what has been carried to it, from `outer`
    on (batch x heads, size), 0 if None; what is carried out at the end goes to `carried`."""
    pair = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    state = tl.zeros((BLOCK,), tl.float32)
    if outer is not None:
        state = tl.load(outer + pair * size + element, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, chunks):
        place = pair * chunks + (chunks - 1 - step if REVERSE else step)
        at = states + place * size + element
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = state * tl.load(across + place) + added
    tl.store(carried + pair * size + element, state, mask=inside)


@triton.jit(do_not_specialize=["seq", "heads", "chunks"])
def scan_kernel(
    x, B, C, log_decay, scale, segments, D, entering, y, seq, heads, chunks, per_group_B, per_group_C, head_dim,
    state_size, CHUNK: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, THIRDS: tl.constexpr,
):  # fmt: skip
    """The outputs of one head in one chunk. y: (batch, seq, heads, head_dim), contiguous."""
    batch, head, first, place = _place(heads, chunks, CHUNK)
    of_B, of_C = head // per_group_B, head // per_group_C
    sums, _ = _decays(log_decay, segments, batch, first, head, seq, CHUNK)
    mixing = _pairs(C, of_C, B, of_B, batch, first, seq, state_size, CHUNK, STATE, THIRDS) * _decays_between(sums)
    if scale.pointer is not None:
        mixing *= _vector(scale, batch, first, head, seq, CHUNK).to(tl.float32)[None, :]
    from_start = tl.exp2(sums.to(tl.float32))
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    entering += place * head_dim * state_size
    token = first + tl.arange(0, CHUNK)
    for row in tl.range(0, head_dim, DIM, disable_licm=True):
        out = tl.zeros((CHUNK, DIM), tl.float32)
        for column in tl.range(0, state_size, STATE, disable_licm=True):
            reads = _tile(C, batch, first, of_C, seq, column, state_size, CHUNK, STATE)
            state = _state_tile(entering, row, column, head_dim, state_size, DIM, STATE)
            out = _product(reads, tl.trans(state), out, THIRDS)
        own = _tile(x, batch, first, head, seq, row, head_dim, CHUNK, DIM)
        out = _product(mixing, own, out * from_start[:, None], THIRDS)
        if D is not None:
            out += own.to(tl.float32) * skip
        column = row + tl.arange(0, DIM)
        at = y + ((batch.to(tl.int64) * seq + token) * heads + head)[:, None] * head_dim + column[None, :]
        tl.store(at, out, mask=(token[:, None] < seq) & (column[None, :] < head_dim))


@triton.jit(do_not_specialize=["seq", "heads", "chunks"])
def inputs_kernel(
    x, dy, B, C, log_decay, scale, segments, D, entering, leaving, dx, d_decay, d_scale, d_D, seq, heads, chunks,
    per_group_B, per_group_C, head_dim, state_size,
    CHUNK: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, THIRDS: tl.constexpr,
):  # fmt: skip
    """Gradients that are each head's own, of one chunk. entering: the states before it, leaving: the gradient of that
    behind it. dx: like y in `scan_kernel`; d_decay, d_scale: (batch, seq, heads); d_D: (batch, chunks, heads)."""
    batch, head, first, place = _place(heads, chunks, CHUNK)
    of_B, of_C = head // per_group_B, head // per_group_C
    sums, total = _decays(log_decay, segments, batch, first, head, seq, CHUNK)
    mixing = _pairs(C, of_C, B, of_B, batch, first, seq, state_size, CHUNK, STATE, THIRDS) * _decays_between(sums)
    to_end = tl.exp2((total - sums).to(tl.float32))
    weight = tl.full((CHUNK,), 1.0, tl.float32)
    if scale.pointer is not None:
        weight = _vector(scale, batch, first, head, seq, CHUNK).to(tl.float32)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    entering += place * head_dim * state_size
    leaving += place * head_dim * state_size
    token = first + tl.arange(0, CHUNK)
    at_rows = (batch.to(tl.int64) * seq + token) * heads + head

    # An entry's gradient raises the sum of decays at its row and lowers it at its column, in float64, where what both
    # have in common cancels. The diagonal has no decay: left in, its rounding would drown the small entries that strong
    # decays leave.
    i = tl.arange(0, CHUNK)
    entries = _pairs(dy, head, x, head, batch, first, seq, head_dim, CHUNK, DIM, THIRDS) * mixing * weight[None, :]
    entries = tl.where(i[None, :] < i[:, None], entries, 0.0).to(tl.float64)
    d_sums = tl.sum(entries, 1) - tl.sum(entries, 0)

    from_earlier = tl.zeros((CHUNK,), tl.float32)
    to_later = tl.zeros((CHUNK,), tl.float32)
    by_scale = tl.zeros((CHUNK,), tl.float32)
    by_D = tl.zeros((CHUNK,), tl.float32)
    by_across = tl.zeros((DIM,), tl.float32)
    for row in tl.range(0, head_dim, DIM, disable_licm=True):
        upstream = _tile(dy, batch, first, head, seq, row, head_dim, CHUNK, DIM)
        read = tl.zeros((CHUNK, DIM), tl.float32)
        for column in tl.range(0, state_size, STATE, disable_licm=True):
            reader = _tile(C, batch, first, of_C, seq, column, state_size, CHUNK, STATE)
            enter = _state_tile(entering, row, column, head_dim, state_size, DIM, STATE)
            read = _product(reader, tl.trans(enter), read, THIRDS)
        from_earlier += tl.sum(upstream.to(tl.float32) * read, 1)
        own = _tile(x, batch, first, head, seq, row, head_dim, CHUNK, DIM)
        written = tl.zeros((CHUNK, DIM), tl.float32)
        for column in tl.range(0, state_size, STATE, disable_licm=True):
            writer = _tile(B, batch, first, of_B, seq, column, state_size, CHUNK, STATE)
            leave = _state_tile(leaving, row, column, head_dim, state_size, DIM, STATE)
            written = _product(writer, tl.trans(leave), written, THIRDS)
            enter = _state_tile(entering, row, column, head_dim, state_size, DIM, STATE)
            by_across += tl.sum(enter * leave, 1)
        wide_own, wide_upstream = own.to(tl.float32), upstream.to(tl.float32)
        to_later += tl.sum(wide_own * written, 1)
        gradient = _product(tl.trans(mixing), upstream, written * to_end[:, None], THIRDS)
        by_scale += tl.sum(wide_own * gradient, 1)
        by_D += tl.sum(wide_own * wide_upstream, 1)
        gradient = gradient * weight[:, None] + wide_upstream * skip
        column = row + tl.arange(0, DIM)
        at = dx + at_rows[:, None] * head_dim + column[None, :]
        tl.store(at, gradient, mask=(token[:, None] < seq) & (column[None, :] < head_dim))
    if d_scale is not None:
        tl.store(d_scale + at_rows, by_scale, mask=token < seq)
    if d_D is not None:
        chunk = first // CHUNK
        tl.store(d_D + (batch.to(tl.int64) * chunks + chunk) * heads + head, tl.sum(by_D, 0))

    from_earlier *= tl.exp2(sums.to(tl.float32))
    to_later *= to_end * weight
    d_sums += from_earlier.to(tl.float64)
    # A token's own decay is in the sums from it on, and in the decays to the end from all before it.
    later, after = to_later.to(tl.float64)[None, :], d_sums[None, :]
    gradient = tl.sum(tl.where(i[None, :] < i[:, None], later, after), 1)
    gradient += tl.sum(by_across, 0).to(tl.float64) * tl.exp2(total.to(tl.float32))
    tl.store(d_decay + at_rows, gradient.to(tl.float32), mask=token < seq)


@triton.jit(do_not_specialize=["seq", "heads", "chunks", "parts"])
def pairs_kernel(
    x, dy, B, C, log_decay, scale, segments, entering, leaving, dB, dC, seq, heads, chunks, parts, per_group_B,
    per_group_C, head_dim, state_size,
    CHUNK: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, THIRDS: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C in one chunk, added up over the heads of one part. dB, dC: (batch, seq, parts,
    state_size), contiguous. Heads of a part have one head of B and one of C."""
    batch, part, first, _ = _place(parts, chunks, CHUNK)
    column = tl.program_id(1) * STATE
    per_part = heads // parts
    of_B, of_C = part * per_part // per_group_B, part * per_part // per_group_C
    d_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    from_states_B = tl.zeros((CHUNK, STATE), tl.float32)
    from_states_C = tl.zeros((CHUNK, STATE), tl.float32)
    for number in tl.range(0, per_part, disable_licm=True):
        head = part * per_part + number
        at = ((batch * heads + head) * chunks + first // CHUNK).to(tl.int64) * head_dim * state_size
        sums, total = _decays(log_decay, segments, batch, first, head, seq, CHUNK)
        to_end = tl.exp2((total - sums).to(tl.float32))
        entries = _pairs(dy, head, x, head, batch, first, seq, head_dim, CHUNK, DIM, THIRDS) * _decays_between(sums)
        if scale.pointer is not None:
            weight = _vector(scale, batch, first, head, seq, CHUNK).to(tl.float32)
            entries *= weight[None, :]
            to_end *= weight
        d_scores += entries
        reads = tl.zeros((CHUNK, STATE), tl.float32)
        for row in tl.range(0, head_dim, DIM, disable_licm=True):
            upstream = _tile(dy, batch, first, head, seq, row, head_dim, CHUNK, DIM)
            enter = _state_tile(entering + at, row, column, head_dim, state_size, DIM, STATE)
            reads = _product(upstream, enter, reads, THIRDS)
        from_states_C += reads * tl.exp2(sums.to(tl.float32))[:, None]
        writes = tl.zeros((CHUNK, STATE), tl.float32)
        for row in tl.range(0, head_dim, DIM, disable_licm=True):
            own = _tile(x, batch, first, head, seq, row, head_dim, CHUNK, DIM)
            leave = _state_tile(leaving + at, row, column, head_dim, state_size, DIM, STATE)
            writes = _product(own, leave, writes, THIRDS)
        from_states_B += writes * to_end[:, None]
    writer = _tile(B, batch, first, of_B, seq, column, state_size, CHUNK, STATE)
    reader = _tile(C, batch, first, of_C, seq, column, state_size, CHUNK, STATE)
    token, column = first + tl.arange(0, CHUNK), column + tl.arange(0, STATE)
    at = ((batch.to(tl.int64) * seq + token) * parts + part)[:, None] * state_size + column[None, :]
    inside = (token[:, None] < seq) & (column[None, :] < state_size)
    tl.store(dC + at, _product(d_scores, writer, from_states_C, THIRDS), mask=inside)
    tl.store(dB + at, _product(tl.trans(d_scores), reader, from_states_B, THIRDS), mask=inside)

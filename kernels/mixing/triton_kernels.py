"""The Triton kernels of the distance of two mixing matrices, any pair of kinds but delta rules (triton_delta.py).

`normaliser_kernel` finds what normalises the rows of an attention. `pass_kernel` then makes every tile of both
matrices twice. With ROWS each program owns a block of rows and steps through the columns they see: the value, and the
gradients of q, or of C and D. Without, each owns a block of columns and steps through the rows that see them: the
gradients of k, or of B. A tile's first axis is the program's own, its second the step's, so sums over a tile go along
the second and the tile is an operand of the gradient's product as it is.

Off the diagonal an entry of a state-space matrix is C B^T times a factor per row and one per column, decays to and
from the border of the own block, with exponents at most 0; only tiles on the diagonal take an exponential per entry.
Cumulative decays are float64 in memory and differences of them are taken there. Logarithms are to base 2, with which
GPUs count.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mohawk.kernels.mixing.triton_tiles import (
    edge_vectors,
    held_operand,
    load_operand,
    offset_of,
    scores_of,
    tile_entries,
    tile_products,
)

LN2 = tl.constexpr(math.log(2))
HIDDEN = tl.constexpr(-1e30)  # a score whose exponential is 0; finite, so that differences have no NaN


@triton.jit
def _absorb(
    q_tile, q, k, side, rows, begin, first, most, total, seq, DIAGONAL: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the columns from `begin` into the largest score and the sum of exponentials below it."""
    columns = begin + tl.arange(0, STEP)
    products = tile_products(q_tile, q, rows, k, columns, seq, side.width, WIDTH, CHUNK, PRECISION)
    scores, _ = scores_of(side, products)
    if DIAGONAL or side.first is not None:
        seen = columns[None, :] <= rows[:, None]
        if side.first is not None:
            seen = seen & (columns[None, :] >= first[:, None])
        scores = tl.where(seen, scores, HIDDEN)
    # Where a row has seen nothing yet, `most` is HIDDEN and the terms are 1: gone with the first real score.
    higher = tl.maximum(most, tl.max(scores, 1))
    total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
    return higher, total


# Lengths are not worth a variant of a kernel each.
@triton.jit(do_not_specialize=["seq", "heads"])
def normaliser_kernel(
    side, seq, heads, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write side.most and side.inverse, what the softmax subtracts from scores and multiplies exponentials by."""
    blocks = tl.cdiv(seq, BLOCK)
    pair = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # the long ones first
    batch, head = pair // heads, pair % heads
    q = side.left + offset_of(batch, head, heads, side.left_heads, seq * side.width)
    k = side.right + offset_of(batch, head, heads, side.right_heads, seq * side.width)
    at = pair.to(tl.int64) * seq
    rows = block * BLOCK + tl.arange(0, BLOCK)
    q_tile = held_operand(q, rows, seq, side.width, WIDTH, CHUNK)
    begin, first = 0, 0
    if side.first is not None:
        firsts = side.first + batch.to(tl.int64) * seq
        first = tl.load(firsts + rows, mask=rows < seq, other=0)
        begin = tl.load(firsts + block * BLOCK) // STEP * STEP
    most = tl.full((BLOCK,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, block * BLOCK, STEP):
        most, total = _absorb(
            q_tile, q, k, side, rows, start, first, most, total, seq, False, STEP, WIDTH, CHUNK, PRECISION
        )
    for start in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, seq), STEP):
        most, total = _absorb(
            q_tile, q, k, side, rows, start, first, most, total, seq, True, STEP, WIDTH, CHUNK, PRECISION
        )
    tl.store(side.most + at + rows, most, mask=rows < seq)
    tl.store(side.inverse + at + rows, 1 / total, mask=rows < seq)


@triton.jit
def _visit(
    student, teacher, student_own, teacher_own, student_step, teacher_step, student_tile, teacher_tile, of_student,
    of_teacher, student_at, teacher_at, student_origin, teacher_origin, student_D, teacher_D, batch, own, begin, real,
    row_weights, column_weights, seq, total, size, weight, diagonal, mass, centre, gradient, plain,
    ROWS: tl.constexpr, DIAGONAL: tl.constexpr, METRIC: tl.constexpr, GRADIENTS: tl.constexpr, STEP: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Make one tile of both matrices and take it into the sums."""
    step = begin + tl.arange(0, STEP)
    by_step = edge_vectors(teacher, batch, teacher_at, step, teacher_origin, seq, not ROWS, DIAGONAL)
    products = tile_products(
        teacher_tile, teacher_own, own, teacher_step, step, seq, teacher.width, TEACHER_WIDTH, CHUNK, PRECISION
    )
    A, log_A, _ = tile_entries(teacher, teacher_D, products, own, step, of_teacher, by_step, seq, ROWS, DIAGONAL)
    by_step = edge_vectors(student, batch, student_at, step, student_origin, seq, not ROWS, DIAGONAL)
    products = tile_products(
        student_tile, student_own, own, student_step, step, seq, student.width, STUDENT_WIDTH, CHUNK, PRECISION
    )
    S, by, strict = tile_entries(student, student_D, products, own, step, of_student, by_step, seq, ROWS, DIAGONAL)
    residual = S - A
    if real is not None:
        columns = step if ROWS else own
        kept = tl.load(real + columns, mask=columns < seq, other=0) != 0
        kept = kept[None, :] if ROWS else kept[:, None]
        residual = tl.where(kept, residual, 0.0)
        A = tl.where(kept, A, 0.0)
    if ROWS:
        if METRIC == "kl":
            total += tl.sum(A * (log_A - by), 1) * LN2
        else:
            total += tl.sum(residual * residual, 1)
        if METRIC == "relative":
            size += tl.sum(A * A, 1)
    if GRADIENTS:
        other = load_operand(student_step, step, seq, 0, student.width, STUDENT_WIDTH)
        if student.sums is not None:
            if not DIAGONAL or other.dtype != tl.float32:
                weight += tl.sum(residual * strict, 1)
            elif ROWS:
                # The decays' gradient is made of rows' sums less columns', and the entries here, the largest, are in
                # both: taken from one tile they leave no rounding of their own.
                gained = (residual * strict).to(tl.float64)
                weight += tl.sum(gained, 1)
                tl.store(column_weights + step, tl.sum(gained, 0), mask=step < seq)
            if ROWS and DIAGONAL:
                diagonal += tl.sum(tl.where(own[:, None] == step[None, :], residual, 0.0), 1)
            residual = residual * by
        elif METRIC != "kl":
            if ROWS:
                # A row's scores get S (R - sum of R S). The sum is known when the row is done, so until then
                # its mean over what is done, which leaves nothing large to cancel in the product below.
                mass += tl.sum(S, 1)
                weight += tl.sum(S * residual, 1)
                better = tl.where(mass > 0, weight.to(tl.float32) / mass, 0.0)
                gradient += (centre - better)[:, None] * plain
                centre = better
                sloped = S if student.softcap is None else S * strict
                plain = tl.dot(sloped.to(other.dtype), other, plain, input_precision=PRECISION)
                residual = S * (residual - centre[:, None])
            else:
                of_rows = tl.load(row_weights + step, mask=step < seq, other=0.0).to(tl.float32)
                residual = S * (residual - of_rows[None, :])
        if student.softcap is not None:
            residual *= strict
        gradient = tl.dot(residual.to(other.dtype), other, gradient, input_precision=PRECISION)
    return total, size, weight, diagonal, mass, centre, gradient, plain


@triton.jit(do_not_specialize=["seq", "heads"])
def pass_kernel(
    student, teacher, real, bounds, squares, sizes, row_weights, column_weights, diagonals, gradients, seq, heads,
    ROWS: tl.constexpr, METRIC: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the rows, or the columns, of each head's S - A = R.

    Written with ROWS: squares, of R (kl: the divergences); sizes, of A, for "relative"; row_weights, with a
    state-space student the sum of R S off the diagonal, with attention that of R S; diagonals, R's entry there.
    Written without: column_weights, for a state-space student; of float32 operands' tiles on the diagonal with ROWS,
    and the rest is added without. gradients: (batch, heads, seq, width) of the own operand, for half the sum of
    squares, but for input_scale or attention's scale. real: (batch, seq), 0 for columns to leave out. bounds:
    (batch, seq), the first column that a row, or the end of the rows that a column has anything in; None if all.
    """
    blocks = tl.cdiv(seq, BLOCK)
    pair = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if ROWS:
        block = blocks - 1 - block  # the long ones first
    batch = pair // heads
    head = pair % heads
    student_at = offset_of(batch, head, heads, student.heads, seq)
    teacher_at = offset_of(batch, head, heads, teacher.heads, seq)
    size = seq * student.width
    student_own = student.left + offset_of(batch, head, heads, student.left_heads, size)
    student_step = student.right + offset_of(batch, head, heads, student.right_heads, size)
    size = seq * teacher.width
    teacher_own = teacher.left + offset_of(batch, head, heads, teacher.left_heads, size)
    teacher_step = teacher.right + offset_of(batch, head, heads, teacher.right_heads, size)
    if not ROWS:
        student_own, student_step = student_step, student_own
        teacher_own, teacher_step = teacher_step, teacher_own
    student_D, teacher_D = 0.0, 0.0
    if student.D is not None:
        student_D = tl.load(student.D + head // (heads // student.heads))
    if teacher.D is not None:
        teacher_D = tl.load(teacher.D + head // (heads // teacher.heads))
    at = pair.to(tl.int64) * seq
    row_weights += at
    column_weights += at
    if real is not None:
        real += batch.to(tl.int64) * seq
    own = block * BLOCK + tl.arange(0, BLOCK)
    inside = own < seq
    end = tl.minimum(block * BLOCK + BLOCK, seq)
    student_tile = held_operand(student_own, own, seq, student.width, STUDENT_WIDTH, CHUNK)
    teacher_tile = held_operand(teacher_own, own, seq, teacher.width, TEACHER_WIDTH, CHUNK)

    total = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    centre = tl.zeros((BLOCK,), tl.float32)
    gradient = tl.zeros((BLOCK, STUDENT_WIDTH), tl.float32)
    plain = gradient

    # Left of the diagonal, or below it; decays from the last token before the block, or the last in it.
    low, high = block * BLOCK + BLOCK, seq
    border = end - 1
    if ROWS:
        low, high = 0, block * BLOCK
        border = tl.maximum(high, 1) - 1
    if bounds is not None:
        bounds += batch.to(tl.int64) * seq
        if ROWS:
            low = tl.load(bounds + block * BLOCK) // STEP * STEP
        else:
            high = tl.load(bounds + end - 1)
    student_origin, teacher_origin = 0.0, 0.0
    if student.sums is not None:
        student_origin = tl.load(student.sums + student_at + border)
    if teacher.sums is not None:
        teacher_origin = tl.load(teacher.sums + teacher_at + border)
    of_student = edge_vectors(student, batch, student_at, own, student_origin, seq, ROWS, False)
    of_teacher = edge_vectors(teacher, batch, teacher_at, own, teacher_origin, seq, ROWS, False)
    for begin in range(low, high, STEP):
        total, size, weight, diagonal, mass, centre, gradient, plain = _visit(
            student, teacher, student_own, teacher_own, student_step, teacher_step, student_tile, teacher_tile,
            of_student, of_teacher, student_at, teacher_at, student_origin, teacher_origin, student_D, teacher_D,
            batch, own, begin, real, row_weights, column_weights, seq, total, size, weight, diagonal, mass, centre,
            gradient, plain,
            ROWS, False, METRIC, GRADIENTS, STEP, STUDENT_WIDTH, TEACHER_WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
    if student.sums is not None:
        gradient *= of_student[0][:, None]

    # On the diagonal; decays from the block's first token.
    if student.sums is not None:
        student_origin = tl.load(student.sums + student_at + block * BLOCK)
    if teacher.sums is not None:
        teacher_origin = tl.load(teacher.sums + teacher_at + block * BLOCK)
    of_student = edge_vectors(student, batch, student_at, own, student_origin, seq, ROWS, True)
    of_teacher = edge_vectors(teacher, batch, teacher_at, own, teacher_origin, seq, ROWS, True)
    for begin in tl.range(block * BLOCK, end, STEP, num_stages=1):
        total, size, weight, diagonal, mass, centre, gradient, plain = _visit(
            student, teacher, student_own, teacher_own, student_step, teacher_step, student_tile, teacher_tile,
            of_student, of_teacher, student_at, teacher_at, student_origin, teacher_origin, student_D, teacher_D,
            batch, own, begin, real, row_weights, column_weights, seq, total, size, weight, diagonal, mass, centre,
            gradient, plain,
            ROWS, True, METRIC, GRADIENTS, STEP, STUDENT_WIDTH, TEACHER_WIDTH, CHUNK, PRECISION,
        )  # fmt: skip

    if ROWS:
        tl.store(squares + at + own, total, mask=inside)
        if METRIC == "relative":
            tl.store(sizes + at + own, size, mask=inside)
    if GRADIENTS:
        if ROWS:
            tl.store(row_weights + own, weight, mask=inside)
            if student.sums is not None:
                tl.store(diagonals + at + own, diagonal, mask=inside)
            elif METRIC != "kl":
                gradient += (centre - weight.to(tl.float32))[:, None] * plain
        elif student.sums is not None:
            if student_own.dtype.element_ty == tl.float32:
                weight += tl.load(column_weights + own, mask=inside, other=0.0)
            tl.store(column_weights + own, weight, mask=inside)
        column = tl.arange(0, STUDENT_WIDTH)
        target = gradients + (at + own)[:, None] * student.width + column[None, :]
        tl.store(target, gradient, mask=inside[:, None] & (column[None, :] < student.width))

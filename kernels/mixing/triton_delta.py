"""The distance of a delta rule's matrix from another in Triton: the walks of delta_strips.py, many strips at once.

What the chunks are made of comes from torch (DeltaStrips). `walk_kernel` takes one strip, a chunk of rows, to the left:
every tile of both matrices, their difference, its squares. `return_kernel` takes the gradient back to the right. Both
write each step down; from that the gradients of the chunks' matrices are products of torch again, with nothing left to
add up by atomics. Some strips are under way at a time, so what is written down is linear in seq, and as a walk's factor
is read back from there, no head is too wide for the registers.

A second delta rule is taken into the first: T - T' is one of twice the channels, of [seen | seen'], [left | -left'] and
both crossings.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk.kernels.mixing.delta_strips import DeltaStrips
from mohawk.kernels.mixing.metrics import reads_teacher
from mohawk.kernels.mixing.operands import DeltaMixing, Mixing
from mohawk.kernels.mixing.strips import Block
from mohawk.kernels.mixing.triton_backend import distance_triton
from mohawk.kernels.mixing.triton_kernels import normaliser_kernel
from mohawk.kernels.mixing.triton_launch import (
    NORMALISER,
    capability_major,
    first_seen,
    padded_width,
    product_dtype,
    side_of,
)
from mohawk.kernels.mixing.triton_tiles import edge_vectors, held_operand, offset_of, tile_entries, tile_products

BACKEND = "triton"  # as `mohawk doctor` names it
PROGRAMS = 256  # strips under way at a time, over the heads of a batch row: enough for a GPU


@triton.jit
def _block(pointer, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a contiguous (rows, columns) matrix from (row, column), zeros beyond."""
    i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(pointer + i[:, None] * columns + j[None, :], mask=inside, other=0.0)


@triton.jit
def _put(pointer, value, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(pointer + i[:, None] * columns + j[None, :], value, mask=inside)


@triton.jit
def _difference(
    S, teacher, teacher_tile, teacher_own, teacher_step, of_teacher, teacher_at, origin, D, batch, own, begin, real,
    seq, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, TEACHER_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(S - A, A) of one tile, zero in padding."""
    step = begin + tl.arange(0, BLOCK)
    if TEACHER_WIDTH == 0:  # triton 3.6 cannot compare a tuple that holds None with None
        A = tl.zeros((BLOCK, BLOCK), tl.float32)
    else:
        by_step = edge_vectors(teacher, batch, teacher_at, step, origin, seq, False, DIAGONAL)
        products = tile_products(
            teacher_tile, teacher_own, own, teacher_step, step, seq, teacher.width, TEACHER_WIDTH, CHUNK, PRECISION
        )
        A, _, _ = tile_entries(teacher, D, products, own, step, of_teacher, by_step, seq, True, DIAGONAL)
    residual = S - A
    if real is not None:
        kept = (tl.load(real + own, mask=own < seq, other=0) != 0)[:, None]
        kept = kept & (tl.load(real + step, mask=step < seq, other=0) != 0)[None, :]
        residual, A = tl.where(kept, residual, 0.0), tl.where(kept, A, 0.0)
    return residual, A


@triton.jit(do_not_specialize=["seq", "heads", "chunks", "start", "wave"])
def walk_kernel(
    seen, crossing, left, own_tiles, teacher, real, bounds, squares, sizes, walks, residuals, d_own, seq, heads, chunks,
    start, wave, width,
    SIZES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of one batch row: squares of S - A and, with SIZES, sizes of A, (heads, seq); d_own, the
    difference on the diagonal.

    seen, left: (chunks, heads, BLOCK, width), crossing: (chunks, heads, width, width), own_tiles, d_own: (chunks,
    heads, BLOCK, BLOCK). walks: (heads, chunks, wave, BLOCK, width) a strip's factor at each chunk of columns,
    residuals: the same of (BLOCK, BLOCK). The strips are `start` and the ones behind it, `wave` at most.
    TEACHER_WIDTH: 0 where there is no teacher.
    """
    pair = tl.program_id(0)
    place = tl.program_id(1)
    at = start + place
    at_walks = walks + ((pair * chunks).to(tl.int64) * wave + place) * BLOCK * width
    at_residuals = residuals + ((pair * chunks).to(tl.int64) * wave + place) * BLOCK * BLOCK
    walk_step = wave.to(tl.int64) * BLOCK * width
    residual_step = wave.to(tl.int64) * BLOCK * BLOCK
    own = at * BLOCK + tl.arange(0, BLOCK)
    batch = tl.zeros((), tl.int32)
    teacher_tile, teacher_own, teacher_step, of_teacher = 0, 0, 0, (0.0, 0.0, 1.0, 0)
    teacher_at, origin, D = 0, 0.0, 0.0
    if TEACHER_WIDTH:
        teacher_at = offset_of(batch, pair, heads, teacher.heads, seq)
        teacher_own = teacher.left + offset_of(batch, pair, heads, teacher.left_heads, seq * teacher.width)
        teacher_step = teacher.right + offset_of(batch, pair, heads, teacher.right_heads, seq * teacher.width)
        teacher_tile = held_operand(teacher_own, own, seq, teacher.width, TEACHER_WIDTH, CHUNK)
        if teacher.D is not None:
            D = tl.load(teacher.D + pair // (heads // teacher.heads))
        if teacher.sums is not None:
            origin = tl.load(teacher.sums + teacher_at + at * BLOCK)
        of_teacher = edge_vectors(teacher, batch, teacher_at, own, origin, seq, True, True)
    total = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)

    # On the diagonal.
    here = (at * heads + pair).to(tl.int64)
    S = _block(own_tiles + here * BLOCK * BLOCK, 0, 0, BLOCK, BLOCK, BLOCK, BLOCK)
    residual, A = _difference(
        S, teacher, teacher_tile, teacher_own, teacher_step, of_teacher, teacher_at, origin, D, batch, own, at * BLOCK,
        real, seq, True, BLOCK, TEACHER_WIDTH, CHUNK, PRECISION,
    )  # fmt: skip
    total += tl.sum(residual * residual, 1)
    if SIZES:
        size += tl.sum(A * A, 1)
    if d_own is not None:
        _put(d_own + here * BLOCK * BLOCK, residual, 0, BLOCK, BLOCK, BLOCK, BLOCK)

    # To the left of it.
    first = 0
    if bounds is not None:
        first = tl.load(bounds + at * BLOCK) // BLOCK
    if TEACHER_WIDTH:
        if teacher.sums is not None:
            origin = tl.load(teacher.sums + teacher_at + tl.maximum(at * BLOCK, 1) - 1)
        of_teacher = edge_vectors(teacher, batch, teacher_at, own, origin, seq, True, False)
    if at > first:
        for begin in range(0, WIDTH, CHUNK):
            some = _block(seen + here * BLOCK * width, 0, begin, BLOCK, width, BLOCK, CHUNK)
            _put(at_walks + (at - 1) * walk_step, some, begin, BLOCK, width, BLOCK, CHUNK)
    for back in range(0, at - first):
        tl.debug_barrier()  # what the program has written down is there for all of its threads
        column = at - 1 - back
        there = (column * heads + pair).to(tl.int64)
        walk = at_walks + column * walk_step
        S = tl.zeros((BLOCK, BLOCK), tl.float32)
        for begin in range(0, WIDTH, CHUNK):
            some = _block(walk, 0, begin, BLOCK, width, BLOCK, CHUNK)
            columns = _block(left + there * BLOCK * width, 0, begin, BLOCK, width, BLOCK, CHUNK)
            S = tl.dot(some, tl.trans(columns), S, input_precision=PRECISION)
        residual, A = _difference(
            S, teacher, teacher_tile, teacher_own, teacher_step, of_teacher, teacher_at, origin, D, batch, own,
            column * BLOCK, real, seq, False, BLOCK, TEACHER_WIDTH, CHUNK, PRECISION,
        )  # fmt: skip
        total += tl.sum(residual * residual, 1)
        if SIZES:
            size += tl.sum(A * A, 1)
        if d_own is not None:
            _put(at_residuals + column * residual_step, residual, 0, BLOCK, BLOCK, BLOCK, BLOCK)
        if column > first:
            for out in range(0, WIDTH, CHUNK):
                after = tl.zeros((BLOCK, CHUNK), tl.float32)
                for begin in range(0, WIDTH, CHUNK):
                    some = _block(walk, 0, begin, BLOCK, width, BLOCK, CHUNK)
                    turn = _block(crossing + there * width * width, out, begin, width, width, CHUNK, CHUNK)
                    after = tl.dot(some, tl.trans(turn), after, input_precision=PRECISION)
                _put(at_walks + (column - 1) * walk_step, after, out, BLOCK, width, BLOCK, CHUNK)
    at_rows = pair.to(tl.int64) * seq + own
    tl.store(squares + at_rows, total, mask=own < seq)
    if SIZES:
        tl.store(sizes + at_rows, size, mask=own < seq)


@triton.jit(do_not_specialize=["heads", "chunks", "start", "wave"])
def return_kernel(
    crossing, left, bounds, residuals, d_walks, d_seen, heads, chunks, start, wave, width,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shapes as in `walk_kernel`. d_walks: like walks, at each chunk of columns what has come in on the way to it;
    d_seen: like seen, what comes out."""
    pair = tl.program_id(0)
    place = tl.program_id(1)
    at = start + place
    at_walks = d_walks + ((pair * chunks).to(tl.int64) * wave + place) * BLOCK * width
    at_residuals = residuals + ((pair * chunks).to(tl.int64) * wave + place) * BLOCK * BLOCK
    walk_step = wave.to(tl.int64) * BLOCK * width
    residual_step = wave.to(tl.int64) * BLOCK * BLOCK
    here = (at * heads + pair).to(tl.int64)
    first = 0
    if bounds is not None:
        first = tl.load(bounds + at * BLOCK) // BLOCK
    for column in range(first, at):
        there = (column * heads + pair).to(tl.int64)
        for out in range(0, WIDTH, CHUNK):
            after = tl.zeros((BLOCK, CHUNK), tl.float32)
            for begin in range(0, BLOCK, CHUNK):
                some = _block(at_residuals + column * residual_step, 0, begin, BLOCK, BLOCK, BLOCK, CHUNK)
                columns = _block(left + there * BLOCK * width, begin, out, BLOCK, width, CHUNK, CHUNK)
                after = tl.dot(some, columns, after, input_precision=PRECISION)
            if column > first:
                for begin in range(0, WIDTH, CHUNK):
                    some = _block(at_walks + column * walk_step, 0, begin, BLOCK, width, BLOCK, CHUNK)
                    turn = _block(crossing + there * width * width, begin, out, width, width, CHUNK, CHUNK)
                    after = tl.dot(some, turn, after, input_precision=PRECISION)
            if column + 1 < at:
                _put(at_walks + (column + 1) * walk_step, after, out, BLOCK, width, BLOCK, CHUNK)
            else:
                _put(d_seen + here * BLOCK * width, after, out, BLOCK, width, BLOCK, CHUNK)
        tl.debug_barrier()  # what the program has written down is there for all of its threads


def tiles(major: int) -> dict:
    """How to launch. major: of CUDA's compute capability, 0 for AMD, which has products in float32; elsewhere three in
    tf32 have its precision. Nothing spills on sm_80, sm_90, sm_100 and gfx942, for which triton_report.py compiles
    them; with wider steps it would before sm_100."""
    return {
        "BLOCK": 64,
        "CHUNK": 32 if major in (0, 10) else 16,
        "PRECISION": "ieee" if major == 0 else "tf32x3",
        "num_warps": 4 if major == 0 else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


@dataclasses.dataclass
class _Matrices:
    """What the kernels walk over, of one batch row."""

    seen: Tensor
    crossing: Tensor
    left: Tensor
    own: Tensor

    @classmethod
    def of(cls, strips: DeltaStrips) -> _Matrices:
        return cls(strips.seen, strips.crossing, strips.left, strips.own(slice(None)))

    def less(self, other: _Matrices) -> _Matrices:
        """The matrices of the difference from another delta rule: both side by side, the other's with a minus."""
        width, more = self.seen.shape[-1], other.seen.shape[-1]
        crossing = self.crossing.new_zeros(*self.crossing.shape[:2], width + more, width + more)
        crossing[..., :width, :width], crossing[..., width:, width:] = self.crossing, other.crossing
        seen, left = torch.cat((self.seen, other.seen), -1), torch.cat((self.left, -other.left), -1)
        return _Matrices(seen, crossing, left, self.own - other.own)


def _walk(
    made: _Matrices,
    teacher,
    real: Tensor | None,
    bounds: Tensor | None,
    seq: int,
    launch: dict,
    metric: str,
    wanted: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """(heads, seq) float64 squares and, where the metric reads it, sizes; if wanted, the gradients of seen, crossing,
    left and own for half the sum of squares."""
    chunks, heads, block, width = made.seen.shape
    new = functools.partial(torch.zeros, device=made.seen.device)
    squares = new(heads, seq, dtype=torch.float64)
    sizes = new(heads, seq, dtype=torch.float64) if reads_teacher(metric) and teacher is not None else None
    wave = max(1, min(chunks, PROGRAMS // heads))
    walks, residuals = new(heads, chunks, wave, block, width), new(heads, chunks, wave, block, block)
    d_walks = torch.zeros_like(walks) if wanted else None
    gradients = tuple(torch.zeros_like(x) for x in dataclasses.astuple(made)) if wanted else ()
    options = {name: launch[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    shared = {name: launch[name] for name in ("BLOCK", "CHUNK", "PRECISION")} | {"WIDTH": padded_width(width)} | options
    widths = {"TEACHER_WIDTH": 0 if teacher is None else padded_width(teacher.width)}
    for start in range(0, chunks, wave):
        grid = (heads, min(wave, chunks - start))
        for scratch in (walks, residuals, d_walks):
            if scratch is not None and start:
                scratch.zero_()
        walk_kernel[grid](
            made.seen, made.crossing, made.left, made.own, teacher, real, bounds, squares, sizes, walks, residuals,
            gradients[3] if wanted else None, seq, heads, chunks, start, wave, width,
            SIZES=sizes is not None, **widths, **shared,
        )  # fmt: skip
        if d_walks is None:
            continue
        d_seen, d_crossing, d_left, _ = gradients
        return_kernel[grid](
            made.crossing, made.left, bounds, residuals, d_walks, d_seen, heads, chunks, start, wave, width, **shared
        )
        some = slice(start + grid[1] - 1)  # the chunks to the left of the last of these
        factors = walks[:, some].flatten(2, 3)
        d_left[some] += (residuals[:, some].flatten(2, 3).mT @ factors).transpose(0, 1)
        d_crossing[some] += (d_walks[:, some].flatten(2, 3).mT @ factors).transpose(0, 1)
    return squares, sizes, gradients


def _row(mixing: Mixing, row: int) -> Mixing:
    """One row of the batch."""
    fields = {"segment_ids", "q", "k", "C", "B", "beta", "log_decay", "input_scale"}
    return dataclasses.replace(
        mixing,
        **{n: v[row : row + 1] for n, v in vars(mixing).items() if n in fields and isinstance(v, Tensor)},
    )


def _bounds(student: Mixing, teacher: Mixing) -> Tensor | None:
    """(1, seq) int32: the first column each row has anything in; None if all."""
    first = first_seen(student), first_seen(teacher)
    return None if first[0] is None or first[1] is None else torch.minimum(*first)


def sums_and_gradients(
    student: Mixing, teacher: Mixing, metric: str, real: Tensor | None, wanted: bool, half: bool = False
):
    """As `mohawk.kernels.mixing.triton_backend.sums_and_gradients`, of a delta student and any teacher."""
    assert isinstance(student, DeltaMixing)
    batch, _, seq = student.shape
    heads = max(student.shape[1], teacher.shape[1])
    device = student.q.device
    launch = tiles(capability_major(device))
    totals, sizes, gradients = [], [], []
    for row in range(batch):
        block = Block(slice(row, row + 1), 0, heads, heads)
        strips = DeltaStrips(student, block, torch.float32, wanted, launch["BLOCK"])
        made, side = _Matrices.of(strips), None
        here = None if real is None else real[row].to(torch.int8)
        one = _row(teacher, row)
        bounds = _bounds(_row(student, row), one)
        size = None
        if isinstance(one, DeltaMixing):
            theirs = _Matrices.of(DeltaStrips(teacher, block, torch.float32, False, launch["BLOCK"]))
            if reads_teacher(metric):
                size, _, _ = _walk(theirs, None, here, bounds, seq, launch, "squared", False)
            made = made.less(theirs)
        else:
            side = side_of(one, product_dtype(one, half=half))
            if side.most is not None:
                programs = triton.cdiv(seq, launch["BLOCK"]) * side.heads
                names = ("BLOCK", "CHUNK", "PRECISION", "num_stages", "enable_fp_fusion")
                options: dict = {name: launch[name] for name in names} | NORMALISER
                normaliser_kernel[(programs,)](
                    side, seq, side.heads, STEP=launch["CHUNK"], WIDTH=padded_width(side.width), **options
                )
        squares, found, parts = _walk(made, side, here, bounds, seq, launch, metric, wanted)
        totals.append(squares.sum(-1))
        sizes.append(found if size is None else size)
        if wanted:
            width = student.q.shape[-1]
            d_seen, d_crossing, d_left, strips.d_own = parts
            strips.d_seen, strips.d_left = d_seen[..., :width], d_left[..., :width]
            strips.d_crossing = d_crossing[..., :width, :width]
            gradients.append(strips.gradients())
    size = torch.stack([x.sum(-1) for x in sizes]) if reads_teacher(metric) else None
    return torch.stack(totals), size, tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))


distance_triton_delta = functools.partial(distance_triton, sums=sums_and_gradients)

"""The distance of a state-space matrix from an attention matrix in three Triton kernels.

One for the softmax's row sums; one that goes through the tiles of a block of rows for the value, dC and the
diagonal; one that goes through the tiles of a block of columns for dB. So each tile is made twice for value
and gradients, and nothing is longer than a row. A tile left of the diagonal is C B^T times a factor per row
and one per column, decays to and from the token before the row block, with exponents at most 0; only
diagonal tiles take an exponential per entry. Sums of decays are float64 in memory, and differences of them
are taken there, before anything is rounded.

Student: SSDMixing. Teacher: AttentionMixing. Other pairs are for the chunked backend.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk.kernels.mixing import AttentionMixing, SSDMixing
from mohawk.kernels.mixing_segments import RESET, segment_runs


@triton.jit
def _visible(rows, columns, row_runs, column_runs, seq, WINDOW: tl.constexpr):
    seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] < seq)
    seen = seen & (row_runs[:, None] == column_runs[None, :])
    if WINDOW > 0:
        seen = seen & (rows[:, None] - columns[None, :] < WINDOW)
    return seen


@triton.jit
def _rows_of(pointer, index, mask, stride, width, WIDTH: tl.constexpr):
    """A (tile, WIDTH) block of a row-major operand, zeros beyond `width` and outside the mask."""
    column = tl.arange(0, WIDTH)
    return tl.load(
        pointer + index[:, None] * stride + column[None, :],
        mask=mask[:, None] & (column[None, :] < width),
        other=0.0,
    )


@triton.jit
def row_sums_kernel(
    q, k, log_sums, runs, scale, seq, heads, q_heads, kv_heads, head_dim,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """log_sums: (batch, heads, seq) log of the softmax's denominator."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    q += (batch * q_heads + head // (heads // q_heads)).to(tl.int64) * seq * head_dim
    k += (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * seq * head_dim
    runs += batch.to(tl.int64) * seq
    rows = block * TILE + tl.arange(0, TILE)
    row_runs = tl.load(runs + rows, mask=rows < seq, other=-1)
    q_tile = _rows_of(q, rows, rows < seq, head_dim, head_dim, HEAD_DIM)
    most = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, (block * TILE - WINDOW + 1) // TILE * TILE)
    for first in range(start, (block + 1) * TILE, TILE):
        columns = first + tl.arange(0, TILE)
        column_runs = tl.load(runs + columns, mask=columns < seq, other=-2)
        k_tile = _rows_of(k, columns, columns < seq, head_dim, head_dim, HEAD_DIM)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = _visible(rows, columns, row_runs, column_runs, seq, WINDOW)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        terms = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        total = total * tl.exp(most - higher) + tl.sum(terms, 1)
        most = higher
    tl.store(log_sums + pair.to(tl.int64) * seq + rows, most + tl.log(total), mask=rows < seq)


@triton.jit
def _residual(
    q_tile, k_tile, C_tile, B_tile, log_sums, rows, columns, row_runs, column_runs, row_student, column_student,
    row_real, column_real, row_decay, column_weight, row_low, column_low, column_scale, D, scale, seq,
    WINDOW: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """S, S without its diagonal, A and the masked S - A of one tile. Off the diagonal row_decay and column_weight are
    factors; on it they are sums of decays, high parts, with their low parts beside them."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    seen = _visible(rows, columns, row_runs, column_runs, seq, WINDOW)
    teacher = tl.where(seen, tl.exp(scores - log_sums[:, None]), 0.0)
    products = tl.dot(C_tile, tl.trans(B_tile), input_precision="ieee")
    if DIAGONAL:
        exponents = (row_decay[:, None] - column_weight[None, :]) + (row_low[:, None] - column_low[None, :])
        lower = (columns[None, :] <= rows[:, None]) & (rows[:, None] < seq)
        factor = tl.where(lower, tl.exp(tl.where(lower, exponents, 0.0)), 0.0) * column_scale[None, :]
    else:
        factor = row_decay[:, None] * column_weight[None, :]
    factor = tl.where(row_student[:, None] == column_student[None, :], factor, 0.0)
    student = products * factor
    off_diagonal = student
    if DIAGONAL:
        same = columns[None, :] == rows[:, None]
        off_diagonal = tl.where(same, 0.0, student)
        student = tl.where(same, student + D, student)
    real = (row_real[:, None] != 0) & (column_real[None, :] != 0)
    teacher = tl.where(real, teacher, 0.0)
    residual = tl.where(real, student - teacher, 0.0)
    return residual, off_diagonal, teacher, factor


@triton.jit
def row_pass_kernel(
    q, k, C, B, sums, input_scale, D, log_sums, runs, student_runs, real,
    squares, teacher_squares, dC, diagonal, row_weights,
    scale, seq, heads, q_heads, kv_heads, C_groups, B_groups, head_dim, state_size,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, WINDOW: tl.constexpr,
    GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Per row of each head: sums of squares of S - A and of A, dC, the diagonal of S - A, sum of (S - A) S."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    q += (batch * q_heads + head // (heads // q_heads)).to(tl.int64) * seq * head_dim
    k += (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * seq * head_dim
    C += (batch * C_groups + head // (heads // C_groups)).to(tl.int64) * seq * state_size
    B += (batch * B_groups + head // (heads // B_groups)).to(tl.int64) * seq * state_size
    at = pair.to(tl.int64) * seq
    sums += at
    input_scale += at
    runs += batch.to(tl.int64) * seq
    student_runs += batch.to(tl.int64) * seq
    real += batch.to(tl.int64) * seq
    rows = block * TILE + tl.arange(0, TILE)
    inside = rows < seq
    row_runs = tl.load(runs + rows, mask=inside, other=-1)
    row_student = tl.load(student_runs + rows, mask=inside, other=-1)
    row_real = tl.load(real + rows, mask=inside, other=0)
    row_log_sums = tl.load(log_sums + at + rows, mask=inside, other=0.0)
    q_tile = _rows_of(q, rows, inside, head_dim, head_dim, HEAD_DIM)
    C_tile = _rows_of(C, rows, inside, state_size, state_size, STATE)
    D_head = tl.load(D + pair)
    row_sums = tl.load(sums + rows, mask=inside, other=0.0)

    total = tl.zeros((TILE,), tl.float32)
    size = tl.zeros((TILE,), tl.float32)
    weight = tl.zeros((TILE,), tl.float64)
    dC_rows = tl.zeros((TILE, STATE), tl.float32)
    if block > 0:
        before = tl.load(sums + block * TILE - 1)
        row_decay = tl.exp((row_sums - before).to(tl.float32))
        for first in range(0, block * TILE, TILE):
            columns = first + tl.arange(0, TILE)
            column_runs = tl.load(runs + columns)
            column_student = tl.load(student_runs + columns)
            column_real = tl.load(real + columns)
            column_scale = tl.load(input_scale + columns)
            column_weight = tl.exp((before - tl.load(sums + columns)).to(tl.float32)) * column_scale
            k_tile = _rows_of(k, columns, columns < seq, head_dim, head_dim, HEAD_DIM)
            B_tile = _rows_of(B, columns, columns < seq, state_size, state_size, STATE)
            residual, own, teacher, factor = _residual(
                q_tile, k_tile, C_tile, B_tile, row_log_sums, rows, columns, row_runs, column_runs, row_student,
                column_student, row_real, column_real, row_decay, column_weight, row_decay, column_weight,
                column_scale, D_head, scale, seq, WINDOW, False,
            )  # fmt: skip
            total += tl.sum(residual * residual, 1)
            size += tl.sum(teacher * teacher, 1)
            if GRADIENTS:
                weight += tl.sum(residual * own, 1)
                dC_rows += tl.dot((residual * factor).to(B_tile.dtype), B_tile, input_precision="ieee")
    # The tile on the diagonal: sums from its first token, in two float32 parts.
    local = row_sums - tl.load(sums + block * TILE)
    high = local.to(tl.float32)
    low = (local - high).to(tl.float32)
    own_scale = tl.load(input_scale + rows, mask=inside, other=0.0)
    k_tile = _rows_of(k, rows, inside, head_dim, head_dim, HEAD_DIM)
    B_tile = _rows_of(B, rows, inside, state_size, state_size, STATE)
    residual, own, teacher, factor = _residual(
        q_tile, k_tile, C_tile, B_tile, row_log_sums, rows, rows, row_runs, row_runs, row_student, row_student,
        row_real, row_real, high, high, low, low, own_scale, D_head, scale, seq, WINDOW, True,
    )  # fmt: skip
    total += tl.sum(residual * residual, 1)
    size += tl.sum(teacher * teacher, 1)
    tl.store(squares + at + rows, total, mask=inside)
    tl.store(teacher_squares + at + rows, size, mask=inside)
    if GRADIENTS:
        weight += tl.sum(residual * own, 1)
        dC_rows += tl.dot((residual * factor).to(B_tile.dtype), B_tile, input_precision="ieee")
        same = rows[:, None] == rows[None, :]
        tl.store(diagonal + at + rows, tl.sum(tl.where(same, residual, 0.0), 1), mask=inside)
        tl.store(row_weights + at + rows, weight, mask=inside)
        column = tl.arange(0, STATE)
        target = dC + (at + rows)[:, None] * state_size + column[None, :]
        tl.store(target, dC_rows, mask=inside[:, None] & (column[None, :] < state_size))


@triton.jit
def column_pass_kernel(
    q, k, C, B, sums, input_scale, D, log_sums, runs, student_runs, real,
    dB, column_weights,
    scale, seq, heads, q_heads, kv_heads, C_groups, B_groups, head_dim, state_size,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Per column of each head: the gradient of B_j (before input_scale_j) and the sum of (S - A) S."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    q += (batch * q_heads + head // (heads // q_heads)).to(tl.int64) * seq * head_dim
    k += (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * seq * head_dim
    C += (batch * C_groups + head // (heads // C_groups)).to(tl.int64) * seq * state_size
    B += (batch * B_groups + head // (heads // B_groups)).to(tl.int64) * seq * state_size
    at = pair.to(tl.int64) * seq
    sums += at
    input_scale += at
    log_sums += at
    runs += batch.to(tl.int64) * seq
    student_runs += batch.to(tl.int64) * seq
    real += batch.to(tl.int64) * seq
    columns = block * TILE + tl.arange(0, TILE)
    inside = columns < seq
    column_runs = tl.load(runs + columns, mask=inside, other=-2)
    column_student = tl.load(student_runs + columns, mask=inside, other=-2)
    column_real = tl.load(real + columns, mask=inside, other=0)
    column_scale = tl.load(input_scale + columns, mask=inside, other=0.0)
    column_sums = tl.load(sums + columns, mask=inside, other=0.0)
    k_tile = _rows_of(k, columns, inside, head_dim, head_dim, HEAD_DIM)
    B_tile = _rows_of(B, columns, inside, state_size, state_size, STATE)
    D_head = tl.load(D + pair)

    local = column_sums - tl.load(sums + block * TILE)
    high = local.to(tl.float32)
    low = (local - high).to(tl.float32)
    q_tile = _rows_of(q, columns, inside, head_dim, head_dim, HEAD_DIM)
    C_tile = _rows_of(C, columns, inside, state_size, state_size, STATE)
    own_log_sums = tl.load(log_sums + columns, mask=inside, other=0.0)
    residual, own, teacher, factor = _residual(
        q_tile, k_tile, C_tile, B_tile, own_log_sums, columns, columns, column_runs, column_runs, column_student,
        column_student, column_real, column_real, high, high, low, low, column_scale, D_head, scale, seq,
        WINDOW, True,
    )  # fmt: skip
    lower = (columns[None, :] <= columns[:, None]) & inside[:, None]
    exponents = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    # Without input_scale: the gradient is that of the product B_j input_scale_j.
    bare = tl.where(lower, tl.exp(tl.where(lower, exponents, 0.0)), 0.0)
    bare = tl.where(column_student[:, None] == column_student[None, :], bare, 0.0)
    weight = tl.sum(residual * own, 0).to(tl.float64)
    dB_columns = tl.dot(tl.trans((residual * bare).to(C_tile.dtype)), C_tile, input_precision="ieee")
    for first in range((block + 1) * TILE, seq, TILE):
        rows = first + tl.arange(0, TILE)
        row_inside = rows < seq
        row_runs = tl.load(runs + rows, mask=row_inside, other=-1)
        row_student = tl.load(student_runs + rows, mask=row_inside, other=-1)
        row_real = tl.load(real + rows, mask=row_inside, other=0)
        row_log_sums = tl.load(log_sums + rows, mask=row_inside, other=0.0)
        before = tl.load(sums + first - 1)
        row_decay = tl.exp((tl.load(sums + rows, mask=row_inside, other=0.0) - before).to(tl.float32))
        column_decay = tl.exp((before - column_sums).to(tl.float32))
        q_tile = _rows_of(q, rows, row_inside, head_dim, head_dim, HEAD_DIM)
        C_tile = _rows_of(C, rows, row_inside, state_size, state_size, STATE)
        row_decay = tl.where(row_inside, row_decay, 0.0)
        column_decay = tl.where(inside, column_decay, 0.0)
        residual, own, teacher, factor = _residual(
            q_tile, k_tile, C_tile, B_tile, row_log_sums, rows, columns, row_runs, column_runs, row_student,
            column_student, row_real, column_real, row_decay, column_decay * column_scale, row_decay,
            column_decay, column_scale, D_head, scale, seq, WINDOW, False,
        )  # fmt: skip
        weight += tl.sum(residual * own, 0)
        same = row_student[:, None] == column_student[None, :]
        bare = tl.where(same, residual * (row_decay[:, None] * column_decay[None, :]), 0.0)
        dB_columns += tl.dot(tl.trans(bare.to(C_tile.dtype)), C_tile, input_precision="ieee")
    tl.store(column_weights + at + columns, weight, mask=inside)
    column = tl.arange(0, STATE)
    target = dB + (at + columns)[:, None] * state_size + column[None, :]
    tl.store(target, dB_columns, mask=inside[:, None] & (column[None, :] < state_size))


def tile_and_warps(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a tile and warps of a program, for the larger of head_dim and state_size padded to a power of 2.

    The largest tiles that spill no registers on sm_80, sm_90, sm_100 and gfx942; float32 products without tensor
    cores hold whole operands in registers.
    """
    return (16 if dtype == torch.float32 else 32), 4


def _width(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _per_head(value_bnh: Tensor, heads: int) -> Tensor:
    value = value_bnh.transpose(1, 2)
    return value.repeat_interleave(heads // value.shape[1], 1).contiguous()


def _dtype(student: SSDMixing, teacher: AttentionMixing) -> torch.dtype:
    """Of the products' operands: the inputs' own if they share one."""
    given = {student.C.dtype, student.B.dtype, teacher.q.dtype, teacher.k.dtype}
    return given.pop() if len(given) == 1 else torch.float32


def fits_triton(student, teacher, metric: str) -> bool:
    """Whether the kernels cover this pair of mixings."""
    return (
        isinstance(student, SSDMixing)
        and isinstance(teacher, AttentionMixing)
        and metric != "kl"
        and teacher.softcap is None
        # Wider ones spill registers, float32 first.
        and max(student.C.shape[3], teacher.q.shape[3]) <= (64 if _dtype(student, teacher) == torch.float32 else 128)
        and not any(v is not None and v.dtype == torch.float64 for v in (*student.tensors, *teacher.tensors))
    )


def sums_and_gradients(student: SSDMixing, teacher: AttentionMixing, wanted: bool):
    """(batch, heads) sums of squares of S - A and of A in float64 and, if wanted, the gradients of half the former
    with respect to C, B, log_decay, input_scale and D, per head: (batch, heads, seq, ...), D's (batch,
    heads)."""
    batch, _, seq = student.shape
    heads = max(student.shape[1], teacher.shape[1])
    device = student.C.device
    dtype = _dtype(student, teacher)
    q, k = teacher.q.to(dtype).contiguous(), teacher.k.to(dtype).contiguous()
    C, B = (value.to(dtype).transpose(1, 2).contiguous() for value in (student.C, student.B))
    # Segments are masked in the kernels: borders in the sums would only cost them digits.
    sums = _per_head(student.log_decay.to(torch.float64).clamp(min=RESET), heads).cumsum(-1)
    scale = student.input_scale
    scale = torch.ones_like(sums, dtype=torch.float32) if scale is None else _per_head(scale.float(), heads)
    D = torch.zeros(batch, heads, dtype=torch.float32, device=device)
    if student.D is not None:
        D += student.D.float().repeat_interleave(heads // student.D.shape[0])

    def runs(ids: Tensor | None) -> Tensor:
        if ids is None:
            return torch.zeros(batch, seq, dtype=torch.int32, device=device)
        return segment_runs(ids).to(torch.int32)

    real = torch.ones(batch, seq, dtype=torch.int32, device=device)
    for ids in (student.segment_ids, teacher.segment_ids):
        if ids is not None:
            real *= ids >= 0
    tile, warps = tile_and_warps(max(_width(q.shape[3]), _width(C.shape[3])), dtype)
    blocks = {"TILE": tile, "HEAD_DIM": _width(q.shape[3]), "WINDOW": teacher.window or 0}
    blocks.update(num_warps=warps, num_stages=1)
    grid = (triton.cdiv(seq, tile), batch * heads)
    per_row = (batch, heads, seq)
    log_sums, squares, teacher_squares, diagonal = (
        torch.empty(per_row, dtype=torch.float32, device=device) for _ in range(4)
    )
    row_weights, column_weights = (torch.empty(per_row, dtype=torch.float64, device=device) for _ in range(2))
    dC, dB = (
        torch.empty((*per_row, C.shape[3]) if wanted else 0, dtype=torch.float32, device=device) for _ in range(2)
    )
    teacher_runs = runs(teacher.segment_ids)
    sizes = (seq, heads, q.shape[1], k.shape[1])
    attention_scale = teacher.resolved_scale()
    row_sums_kernel[grid](q, k, log_sums, teacher_runs, attention_scale, *sizes, q.shape[3], **blocks)
    inputs = (q, k, C, B, sums, scale, D, log_sums, teacher_runs, runs(student.segment_ids), real)
    sizes = (attention_scale, *sizes, C.shape[1], B.shape[1], q.shape[3], C.shape[3])
    blocks["STATE"] = _width(C.shape[3])
    row_pass_kernel[grid](
        *inputs, squares, teacher_squares, dC, diagonal, row_weights, *sizes, **blocks, GRADIENTS=wanted
    )
    total, size = (value.sum(-1, dtype=torch.float64) for value in (squares, teacher_squares))
    if not wanted:
        return total, size, None
    column_pass_kernel[grid](*inputs, dB, column_weights, *sizes, **blocks)
    d_decay = (row_weights - column_weights).flip(-1).cumsum(-1).flip(-1)
    B_heads = B.repeat_interleave(heads // B.shape[1], 1)
    d_scale = (dB * B_heads).sum(-1)
    gradients = (dC, dB * scale.unsqueeze(-1), d_decay, d_scale, diagonal.sum(-1, dtype=torch.float64))
    return total, size, gradients

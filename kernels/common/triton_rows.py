"""Rows of a matrix in memory, swept in blocks by one program or several for each.

A block is (BLOCK / GROUP, GROUP): a group is what a thread loads at once, 16 bytes. Rows are cut where such groups
begin in memory, in front of the row's first entry if need be, so that all blocks but the first and the last are loaded
whole, however long rows are and wherever they begin.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def lattice(*arrays: Tensor) -> tuple[tuple[int, int], tuple[bool, ...], int]:
    """Where groups of 16 bytes begin in the rows of arrays (rows, vocab), each a row's entries side by side in memory:
    (phase, turn), such that one begins (phase + row * turn) % group entries before the row does; whether that is so in
    each of the arrays; and the group, of the narrowest array's entries."""
    narrow = min(arrays, key=lambda x: x.element_size())
    group = 16 // narrow.element_size()

    def place(x: Tensor) -> tuple[int, int]:
        return x.data_ptr() // x.element_size(), x.stride(0)

    first, turn = place(narrow)
    aligned = []
    for x in arrays:
        own = 16 // x.element_size()
        aligned.append(all((a - b) % own == 0 for a, b in zip(place(x), (first, turn), strict=True)))
    return (first % group, turn % group), tuple(aligned), group


@triton.jit
def load_row(rows_ptr, phase, turn, HAS_ROWS: tl.constexpr, GROUP: tl.constexpr):
    """The row, and how many entries before its first one a group of 16 bytes begins."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row).to(tl.int64)
    return row, ((phase + row * turn) % GROUP).to(tl.int32)


@triton.jit
def start_of(ptr, row, stride, first, ALIGNED: tl.constexpr):
    """Where the row's blocks begin; the row itself does `first` entries later. ALIGNED: at a multiple of 16 bytes."""
    ptr += row * stride - first
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def rounds(first, vocab, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, end, step): this program's blocks are at columns k * step for k in begin..end. Without EDGES those that
    are whole, and with it the first and the last, where they are not."""
    splits, split = tl.num_programs(1), tl.program_id(1)
    last = first + vocab
    blocks, whole = tl.cdiv(last, BLOCK), last // BLOCK
    low, high = blocks * split // splits, blocks * (split + 1) // splits
    after = (first > 0).to(tl.int32)  # the first whole block
    if EDGES:
        begin = tl.where((low == 0) & (after == 1), 0, 1)
        # The last block may be the first one too.
        tail = (high == blocks) & (low < high) & (blocks > whole) & ((whole > 0) | (after == 0))
        return begin, tl.where(tail, 2, 1), whole * BLOCK
    else:
        return tl.maximum(low, after), tl.minimum(high, whole), BLOCK


@triton.jit
def columns_of(start, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    return start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def load_block(ptr, columns, first, vocab, EDGES: tl.constexpr):
    if EDGES:
        x = tl.load(ptr + columns, mask=(columns >= first) & (columns < first + vocab), other=float("-inf"))
    else:
        x = tl.load(ptr + columns)
    return x.to(tl.float32)

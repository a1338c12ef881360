"""The distillation losses in torch on any device: rows in chunks, the gradient made by hand in the forward.

Two nested loops. The outer one takes as many rows as make an efficient matrix product and fills a float32
tile of logits for the student and one for each teacher that comes as hidden states. The inner one takes so
few rows that a dozen elementwise passes over them stay in the cache, and overwrites the student's tile with
its gradient (tile.py, with gradients.py; the products are in products.py). Memory is a few tiles,
whatever the number of rows, and a sum in float32 of the head's gradient or what takes its place (`keeps_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mohawk.kernels.kd import products as kd_products
from mohawk.kernels.kd.options import KDTask, Options, RowLosses, StudentHead, take
from mohawk.kernels.kd.tile import Scores, Tile, torch_tile
from mohawk.kernels.kd.vocabulary import VocabularySlice

BACKEND = "chunked"  # as `mohawk doctor` names it

# All tiles of logits together: 256 rows of two 49152-word vocabularies in float32. A GPU needs more rows for each pass
# over the heads, which it could read in the time that it multiplies a few hundred rows with them; it gets them where
# Triton sweeps the tiles, since torch's elementwise passes would make several more of the size.
TILE_BYTES = 96 << 20
# 1024 rows of two 151936-word vocabularies.
TRITON_TILE_BYTES = 5 << 28
# Rows that a GPU's matrix products compute as one: those of a number between are as slow as of the next multiple.
GPU_ROWS = 128
# oneDNN's bfloat16 product multiplies what lies behind a row of a strided matrix, up to a whole step, by zeros: it has
# to be finite
READ_AHEAD = 64
CACHE_BYTES = 2 << 20  # of one array in the elementwise passes on CPU


def _spans(n: int, step: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """n rows in nearly equal spans of at most `step`, all but the last of a multiple of `multiple` rows where `step` is
    that many or more."""
    if n == 0:
        return
    multiple = multiple if step >= multiple else 1
    parts = math.ceil(n / multiple)
    count = math.ceil(parts / max(1, step // multiple))
    for k in range(count):
        yield parts * k // count * multiple, min(n, parts * (k + 1) // count * multiple)


def _outer_rows(tiles: int, tile: Tile, vocabulary: VocabularySlice, dtype: torch.dtype) -> int:
    most = TILE_BYTES if tile is torch_tile else TRITON_TILE_BYTES
    return max(1, most // (max(1, tiles * vocabulary.widest) * dtype.itemsize))


def _inner_rows(tile: Tile, device: torch.device, vocabulary: VocabularySlice, dtype: torch.dtype, outer: int) -> int:
    if tile is not torch_tile:
        return max(1, outer)
    if vocabulary.group is not None:
        # Fewer, larger collectives; the same number on every rank, whatever its threads and slice.
        return max(1, 8 * CACHE_BYTES // (vocabulary.widest * dtype.itemsize))
    if device.type != "cpu":
        return max(1, outer)
    return max(torch.get_num_threads(), CACHE_BYTES // (vocabulary.widest * dtype.itemsize))


def from_logits(logits: Tensor, task: KDTask, grad: Tensor | None, tile: Tile | None = None) -> RowLosses:
    """kd and ce of each row of the student's logits (n, vocab) that the task chooses.

    `grad` (n, vocab), zero in the other rows and possibly `logits` itself, receives the gradient of
    sum(scale * (kd_weight * kd + ce_weight * ce)).
    """
    tile = tile or torch_tile
    options, rows, scale = task.options, task.rows, task.scale
    n, vocabulary, dtype = len(scale), options.vocabulary, scale.dtype
    vocab = vocabulary.local
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    scores = Scores(task)
    step = _outer_rows(1 + len(scores.in_tiles), tile, vocabulary, dtype)
    tiles = [scale.new_empty((min(n, step), vocab)) for _ in scores.in_tiles] if options.need_kd else []
    for first, last in _spans(n, step):
        if options.need_kd:
            scores.load(first, last, tiles)
        for start, stop in _spans(last - first, _inner_rows(tile, logits.device, vocabulary, dtype, last - first)):
            start, stop = first + start, first + stop
            z = take(logits, rows, start, stop)[:, :vocab]
            if rows is None and z.dtype == dtype and grad is not None:
                z = z.clone()
            z = z.to(dtype)
            kd[start:stop], ce[start:stop] = tile(z, task, scores, (start, stop), grad is not None, None)
            if grad is None:
                continue
            if rows is None:
                grad[start:stop, :vocab] = z
            else:
                grad[:, :vocab].index_copy_(0, rows[start:stop], z.to(grad.dtype))
    return summed(kd, ce, options)


def summed(kd: Tensor, ce: Tensor, options: Options) -> RowLosses:
    kd, ce = options.vocabulary.total(torch.stack([kd, ce]))
    return RowLosses(kd, ce)


def keeps_gradient(rows: int, hidden: Tensor, head: Tensor) -> bool:
    """Whether the gradients of all rows' logits are kept, in bfloat16, for one product with the head's gradient as its
    result: where they take no more memory than the float32 sum over chunks that it makes unnecessary."""
    return 0 < rows <= 2 * head.shape[1] and head.dtype == hidden.dtype == torch.bfloat16


def _empty_head_gradient(head: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Zero beyond the first `vocab` words."""
    grad = head.new_empty(head.shape, dtype=dtype)
    grad[vocab:] = 0
    return grad


def _room_for_rounded(
    z: Tensor, kept: Tensor | None, free: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Where the gradient z (rows, vocab) of a span's logits goes in 16 bits, and what lies READ_AHEAD behind its rows
    where that has to be cleared.

    It goes where all rows' gradients are `kept`; else row by row into the `free` tile, where a teacher's float32 logits
    have had their last use; else into new memory.
    """
    rows, vocab = z.shape
    if kept is not None:
        return kept, None
    if free is None or vocab < READ_AHEAD:
        return z.new_empty(z.shape, dtype=dtype), None
    store = free.view(dtype)[:rows]
    return store[:, :vocab], store[:, vocab : vocab + READ_AHEAD]


def from_hidden(
    hidden: Tensor,
    head: StudentHead,
    task: KDTask,
    hidden_grad: Tensor | None,
    bias_grad: Tensor | None,
    want_head_grad: bool,
    tile: Tile | None = None,
) -> tuple[RowLosses, Tensor | None]:
    """As `from_logits`, from hidden states (n, hidden) and a head (vocab, hidden); with the gradient of its weight.

    `hidden_grad` (n, hidden) is zero in the rows that don't count, and summed over the ranks of a shared
    vocabulary; `bias_grad` is in the dtype of the task's `scale` (float32, or float64). Each may be None. The gradient
    of the weight is in that dtype too, or in the weight's where `keeps_gradient`. Both are zero beyond the real
    vocabulary, or everywhere if no row counts.
    """
    tile = tile or torch_tile
    options, rows, scale = task.options, task.rows, task.scale
    n, vocabulary, dtype = len(scale), options.vocabulary, scale.dtype
    vocab = vocabulary.local
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    want_grad = want_head_grad or not (hidden_grad is None and bias_grad is None)
    scores = Scores(task)
    count = 1 + (len(scores.in_tiles) if options.need_kd else 0)
    multiple = GPU_ROWS if head.weight.is_cuda else 1
    spans = list(_spans(n, _outer_rows(count, tile, vocabulary, dtype), multiple))
    most = max((last - first for first, last in spans), default=0)
    tiles = [scale.new_empty((most, vocab)) for _ in range(count)]
    weight = head.weight[:vocab]
    inner = _inner_rows(tile, weight.device, vocabulary, dtype, most)
    kept = head_grad = None
    if want_head_grad and head.dtype == weight.dtype and keeps_gradient(n, hidden, weight):
        kept = weight.new_empty((n, vocab))
    elif want_head_grad:
        head_grad = _empty_head_gradient(head.weight, vocab if n else 0, dtype)
    # Where it is not kept, cuBLAS takes it for both products, oneDNN for one.
    round_grad = weight.dtype == hidden.dtype == torch.bfloat16
    round_grad = round_grad and (hidden_grad is not None or want_grad and weight.is_cuda)
    # Nothing is made of the gradient in float32.
    tile_rounds = kept is not None and head.softcap is None and head.scale == 1.0 and bias_grad is None
    for first, last in spans:
        z_tile = tiles[0][: last - first]
        part = take(hidden, rows, first, last)
        kd_products.logits_product(part, weight, z_tile, head.rounded)
        if options.need_kd:
            scores.load(first, last, tiles[1:])
        rounded = behind = None
        if kept is not None or round_grad:
            rounded, behind = _room_for_rounded(
                z_tile, None if kept is None else kept[first:last], tiles[1] if count == 2 else None, hidden.dtype
            )
        for start, stop in _spans(last - first, inner):
            z = z_tile[start:stop]
            kd_products.finish_logits(z, head.bias, head.scale, head.softcap)
            damping = None
            if want_grad and head.softcap is not None:
                damping = 1 - (z / head.softcap).square_()
            span = (first + start, first + stop)
            into = rounded[start:stop] if rounded is not None and tile_rounds else None
            kd[span[0] : span[1]], ce[span[0] : span[1]] = tile(z, task, scores, span, want_grad, into)
            if damping is not None:
                z *= damping
            if want_grad and head.scale != 1.0:
                z *= head.scale
            if rounded is not None and into is None:
                rounded[start:stop] = z
        if behind is not None:
            behind.zero_()
        if hidden_grad is not None:
            if rows is None:
                kd_products.hidden_gradient(z_tile, weight, rounded, hidden_grad[first:last])
            else:
                packed = hidden_grad.new_empty((last - first, hidden.shape[1]))
                kd_products.hidden_gradient(z_tile, weight, rounded, packed)
                hidden_grad.index_copy_(0, rows[first:last], packed)
        if head_grad is not None:
            kd_products.add_head_gradient(z_tile, part, rounded, head_grad[:vocab], first == 0, head.dtype)
        if bias_grad is not None:
            bias_grad[:vocab] += z_tile.sum(0)
    if kept is not None:
        tiles = z_tile = z = damping = None  # before the head's gradient takes their memory
        scores.tiles = []
        head_grad = _empty_head_gradient(head.weight, vocab, weight.dtype)
        kd_products.head_gradient(kept, take(hidden, rows, 0, n), head_grad[:vocab])
    if hidden_grad is not None and vocabulary.group is not None:
        hidden_grad.copy_(vocabulary.total(hidden_grad))
    return summed(kd, ce, options), head_grad

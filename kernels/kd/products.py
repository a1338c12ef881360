"""From hidden states to logits and back: matrix products with float32 results from 16-bit operands, on any device.

Rounding logits to bfloat16 before the softmax is what ruins distillation gradients (3 % at a KL of 0.3, 30 %
at 0.003); a product that keeps its float32 accumulator costs nothing of the kind. On CUDA that is
`out_dtype`. CPU torch has no such overload, but oneDNN multiplies float32 copies of bfloat16 numbers with
bfloat16 instructions when asked to, where the processor has them for such copies (AMX), which is exact for them;
the copies are made slice by slice. Float32 operands are multiplied as float32.

Other CPUs multiply bfloat16 numbers fast only where the result is bfloat16 too. `rounds` is for those who want that:
two of the four products of a loss take less than half of the time, and logits have the rounding that the first lines
warn of.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

# Of a head that is copied: large enough for oneDNN, small beside the tiles.
SLICE_BYTES = 4 << 20


class _Bf16Instructions:
    """Inside, float32 matrix products on CPU round their operands to bfloat16 and accumulate in float32.

    torch has this setting for the whole process alone. So the first thread inside sets it and the last one puts it
    back, for one product at a time; float32 products of other threads at that time are rounded as well.
    """

    def __init__(self):
        self.lock, self.threads, self.before = threading.Lock(), 0, "none"

    def __enter__(self) -> None:
        backend = torch.backends.mkldnn
        with self.lock:
            if not self.threads:
                self.before = backend.matmul.fp32_precision  # pyrefly: ignore[missing-attribute]  # set as it is loaded
                if self.before == backend.fp32_precision:
                    self.before = "none"  # as it was inherited; set to the same, it would not follow any more
                backend.matmul.fp32_precision = "bf16"  # pyrefly: ignore[missing-attribute]
            self.threads += 1

    def __exit__(self, *_) -> None:
        with self.lock:
            self.threads -= 1
            if not self.threads:
                torch.backends.mkldnn.matmul.fp32_precision = self.before  # pyrefly: ignore[missing-attribute]


_bf16_instructions = _Bf16Instructions()


@functools.cache
def _has_bf16_instructions() -> bool:
    """Whether oneDNN multiplies float32 copies with them: on x86 with AMX alone."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported()


def _exact_in_bf16(*operands: Tensor) -> bool:
    on_cpu = all(one.dtype == torch.bfloat16 and one.device.type == "cpu" for one in operands)
    return on_cpu and _has_bf16_instructions()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch leaves float32 products to an MKL that takes half this processor's vectors: on AMD's it keeps to
    AVX2, where oneDNN has AVX-512. An older torch doesn't tell the processor's name; there it stays with MKL."""
    backends = torch.backends
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return amd and backends.mkl.is_available() and backends.mkldnn.is_available()


def _onednn_is_faster(rows: int, inner: int, out: Tensor) -> bool:
    """Whether oneDNN is faster at a float32 product (rows, inner) @ (inner, many), copies for it included."""
    suits = out.dtype == torch.float32 and out.device.type == "cpu" and rows >= 8 and inner >= 128
    return suits and bool(torch.backends.mkldnn.enabled) and _mkl_is_slow()


def _padded(matrix: Tensor) -> Tensor:
    """The matrix with rows of 0 up to one of a few counts, at most an eighth more beyond 256: oneDNN keeps what it has
    compiled for each shape, and the number of rows that count is another one in each step."""
    rows = len(matrix)
    step = max(32, 1 << max(0, rows.bit_length() - 4))
    return functional.pad(matrix, (0, 0, 0, -rows % step))


def _slices(matrix: Tensor, dtype: torch.dtype, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix slice by slice, copied into one buffer where they are in another dtype; at once where they
    are not and no `width` is given: as if they were so wide for the size of the slices."""
    if matrix.dtype == dtype and width is None:
        yield slice(0, matrix.shape[0]), matrix
        return
    step = max(1, SLICE_BYTES // ((width or matrix.shape[1]) * dtype.itemsize))
    buffer = None
    if matrix.dtype != dtype:
        buffer = matrix.new_empty((min(step, matrix.shape[0]), matrix.shape[1]), dtype=dtype)
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step]
        yield slice(start, start + len(part)), part if buffer is None else buffer[: len(part)].copy_(part)


def _half_on_gpu(*operands: Tensor) -> bool:
    """Whether cuBLAS multiplies these with a float32 result."""
    return operands[0].is_cuda and operands[0].dtype.itemsize == 2 and len({one.dtype for one in operands}) == 1


def _float32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of 16-bit operands on a GPU, with a float32 result."""
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def operand_dtype(autocast: torch.dtype | None, hidden: Tensor, rounds: bool = False) -> torch.dtype | None:
    """What hidden states and heads are rounded to under autocast: its dtype, where their products are faster in it, as
    they are in bfloat16 on any CPU where logits may be rounded too. None: nothing is rounded."""
    if hidden.dtype == torch.float64 or autocast not in (torch.bfloat16, torch.float16):
        return None
    fast = hidden.device.type != "cpu" or autocast == torch.bfloat16 and (rounds or _has_bf16_instructions())
    return autocast if fast else None


def is_rounded(*operands: Tensor) -> bool:
    """Whether a product of these comes in bfloat16 where that is asked for: on a CPU, which has to choose."""
    return all(one.dtype == torch.bfloat16 and one.device.type == "cpu" for one in operands)


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x rounded to a dtype, still in its own, with a gradient that is not."""
    return x if dtype is None else x + (x.to(dtype).to(x.dtype) - x).detach()


def head_logits(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    low: torch.dtype | None = None,
) -> Tensor:
    """Logits by their definition, differentiable: `scale * (hidden @ head.T + bias)`, softcapped, in `dtype`; of the
    product rounded to `low` where that is given."""
    logits = rounded(hidden.to(dtype) @ head.to(dtype).T, low)
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def finish_logits(tile: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
    """Turns `hidden @ head.T` into logits, in place."""
    if bias is not None:
        tile += bias[: tile.shape[1]]
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)


def logits_product(hidden: Tensor, head: Tensor, out: Tensor, rounds: bool = False) -> None:
    """out = hidden @ head.T with the precision of `out` (float32, or float64); where `rounds` asks for it and
    `is_rounded`, rounded to bfloat16."""
    if rounds and is_rounded(hidden, head):
        step = max(1, SLICE_BYTES // (2 * max(1, len(hidden))))
        for start in range(0, len(head), step):
            out[:, start : start + step] = hidden @ head[start : start + step].T
        return
    if _half_on_gpu(hidden, head) and out.dtype == torch.float32:
        _float32_product(hidden, head.T, out)
        return
    exact = _exact_in_bf16(hidden, head)
    wide = hidden.to(out.dtype)
    if not exact and _onednn_is_faster(wide.shape[0], wide.shape[1], out):
        rows, wide = len(wide), _padded(wide).to_mkldnn()
        for columns, part in _slices(head, out.dtype, max(wide.shape)):
            out[:, columns] = functional.linear(wide, part.to_mkldnn()).to_dense()[:rows]
        return
    with _bf16_instructions if exact else contextlib.nullcontext():
        for columns, part in _slices(head, out.dtype):
            torch.mm(wide, part.T, out=out[:, columns])


def hidden_gradient(grad: Tensor, head: Tensor, rounded: Tensor | None, out: Tensor) -> None:
    """out = grad @ head, with grad (rows, vocab) in float32 or float64 and out in the dtype of the hidden states, or
    in grad's.

    `rounded` is grad in the head's 16-bit dtype where the caller has it: the sum over the vocabulary is
    float32 inside the product either way, and only its terms are rounded. On a CPU they are for 16-bit results alone.
    """
    if rounded is not None and _half_on_gpu(rounded, head):
        # Asked for bfloat16, cuBLAS may add parts of so long a sum in bfloat16.
        out.copy_(_float32_product(rounded, head))
    elif rounded is not None and rounded.dtype == head.dtype == out.dtype:
        torch.mm(rounded, head, out=out)
    elif head.dtype == grad.dtype == out.dtype:
        torch.mm(grad, head, out=out)
    else:
        total = grad.new_zeros(out.shape)
        with _bf16_instructions if _exact_in_bf16(head, out) else contextlib.nullcontext():
            for columns, part in _slices(head, grad.dtype):
                total.addmm_(grad[:, columns], part)
        out.copy_(total)


def add_head_gradient(
    grad: Tensor, hidden: Tensor, rounded: Tensor | None, total: Tensor, first: bool, dtype: torch.dtype
) -> None:
    """total += grad.T @ hidden, with grad and total in float32 or float64; `first`: total = grad.T @ hidden.

    `rounded` as in `hidden_gradient`; `dtype` is what the total will be rounded to: on a CPU, terms are rounded for a
    16-bit one alone.
    """
    if rounded is not None and _half_on_gpu(rounded, hidden):
        if first:
            _float32_product(rounded.T, hidden, total)
        else:  # the product adds to what is there as it writes: no other array, and one pass over this one
            torch.addmm(total, rounded.T, hidden, out_dtype=torch.float32, out=total)
        return
    with _bf16_instructions if dtype == hidden.dtype and _exact_in_bf16(hidden) else contextlib.nullcontext():
        total.addmm_(grad.T, hidden.to(total.dtype), beta=0 if first else 1)


def head_gradient(rounded: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out = rounded.T @ hidden, all in one 16-bit dtype; its sums are float32 and rounded once."""
    torch.mm(rounded.T, hidden, out=out)

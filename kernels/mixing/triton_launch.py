"""What launches of Triton kernels of mixing matrices share: widths, dtypes, and a matrix as the kernels take it."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from mohawk.kernels.common.segments import RESET, segment_starts
from mohawk.kernels.mixing.operands import AttentionMixing, Mixing, SSDMixing
from mohawk.kernels.mixing.triton_tiles import Side

NORMALISER = {"num_warps": 4}  # its launch is otherwise the pass's


def capability_major(device: torch.device) -> int:
    """Of CUDA's compute capability; 0 for AMD, 8 for the interpreter."""
    if device.type != "cuda":
        return 8
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def padded_width(size: int) -> int:
    """A power of 2 that holds so many channels."""
    return max(16, triton.next_power_of_2(size))


def _operands(mixing: AttentionMixing | SSDMixing) -> tuple[Tensor, Tensor]:
    """left and right of a Side, not yet contiguous."""
    if isinstance(mixing, AttentionMixing):
        return mixing.q, mixing.k
    return mixing.C.transpose(1, 2), mixing.B.transpose(1, 2)


def product_dtype(*mixings: AttentionMixing | SSDMixing, half: bool = False) -> torch.dtype:
    """The products' operands' dtype; half: bfloat16. Float16 is widened: gradients times decays leave its range."""
    given = {tensor.dtype for mixing in mixings for tensor in _operands(mixing)}
    return torch.bfloat16 if half or given == {torch.bfloat16} else torch.float32


def first_seen(mixing: Mixing) -> Tensor | None:
    """(batch, seq) int32: the first token each row sees; None if that is token 0 everywhere."""
    batch, _, seq = mixing.shape
    first = None if mixing.segment_ids is None else segment_starts(mixing.segment_ids)
    window = mixing.window if isinstance(mixing, AttentionMixing) else None
    if window is not None and window < seq:
        by_window = torch.arange(1 - window, seq - window + 1, device=mixing.tensors[0].device).clamp(min=0)
        first = by_window.expand(batch, seq) if first is None else torch.maximum(first, by_window)
    return None if first is None else first.to(torch.int32).contiguous()


def side_of(mixing: AttentionMixing | SSDMixing, dtype: torch.dtype) -> Side:
    """One of the matrices with operands in `dtype`; an attention's `most` and `inverse` are yet to be found."""
    left, right = (value.to(dtype).contiguous() for value in _operands(mixing))
    most = inverse = sums = weight = D = scale = softcap = None
    if isinstance(mixing, AttentionMixing):
        scale = mixing.resolved_scale() * math.log2(math.e)
        softcap = None if mixing.softcap is None else mixing.softcap * math.log2(math.e)
        most, inverse = torch.empty(2, *mixing.shape, dtype=torch.float32, device=left.device)
    else:
        # Borders of segments are masked in the kernels: in the sums they would only cost digits.
        decays = mixing.log_decay.transpose(1, 2).to(torch.float64).clamp(min=RESET)
        sums = (decays.cumsum(-1) * math.log2(math.e)).contiguous()
        if mixing.input_scale is not None:
            weight = mixing.input_scale.transpose(1, 2).float().contiguous()
        D = None if mixing.D is None else mixing.D.float().contiguous()
    sizes = (mixing.shape[1], left.shape[1], right.shape[1], left.shape[3])
    return Side(left, right, first_seen(mixing), most, inverse, sums, weight, D, scale, softcap, *sizes)

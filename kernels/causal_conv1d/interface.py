"""Depthwise causal convolution over the sequence, the short one in front of a state-space scan.

`torch.nn.Conv1d` with groups = channels is slow to train on a CPU and knows neither states nor packed documents.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mohawk.kernels.causal_conv1d.checks import ACTIVATIONS, check
from mohawk.kernels.causal_conv1d.chunked import accumulator_dtype, causal_conv1d_chunked
from mohawk.kernels.causal_conv1d.package_backend import by_package, fits_package, package_function
from mohawk.kernels.common.operators import call_operator, register_kernel
from mohawk.kernels.common.packages import no_triton
from mohawk.kernels.common.segments import segment_runs, segment_starts
from mohawk.kernels.common.tensors import transformed

TRITON = "mohawk.kernels.causal_conv1d.triton_backend"


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t, c] = activation(bias[c] + sum_j weight[c, j] * x[t - (kernel - 1) + j, c]).

    x: (batch, seq, channels). weight: (channels, kernel), the last tap that of the token itself. bias:
    (channels,). activation: None or "silu". initial_state: (batch, channels, kernel - 1), the inputs before
    the first token, oldest first; zeros if not given. segment_ids: (batch, seq) integers; where the id
    changes nothing earlier is seen (the first segment goes on from initial_state). One token with a state
    is a decoding step.

    Returns y like x, and with return_final_state also the state after the last token, like initial_state in
    x's dtype. Differentiable in x, weight, bias and initial_state; sums are float32 inside. Raises
    ValueError for shapes that do not fit.
    """
    check(x, weight, bias, activation, initial_state, segment_ids)
    if torch.compiler.is_compiling():
        tensors, segmented = (x, weight, bias, initial_state, segment_ids), segment_ids is not None
        y, final = call_operator("causal_conv1d", tensors, activation or "", reads_values=segmented)
        return (y, final) if return_final_state else y
    if any(transformed(value) for value in (x, weight, bias, initial_state)):
        raise ValueError(
            "causal_conv1d: a tensor is inside a transform of torch.func (grad, vmap, jvp); use torch.autograd, or "
            "torch.nn.functional.conv1d"
        )
    package = package_function() if x.is_cuda and fits_package(x, weight, initial_state, segment_ids) else None
    if package is not None:
        y = by_package(package, x, weight, bias, activation, initial_state, segment_ids)
    elif x.is_cuda and x.numel() and no_triton(x, TRITON) is None:
        from mohawk.kernels.causal_conv1d.triton_backend import causal_conv1d_triton

        y = causal_conv1d_triton(x, weight, bias, initial_state, segment_ids, activation)
    else:
        y = causal_conv1d_chunked(x, weight, bias, initial_state, segment_ids, activation)
    if not return_final_state:
        return y
    batch, seq, channels = x.shape
    kept = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, kept)
    final = torch.cat((initial_state.to(x.dtype), x[:, max(0, seq - kept) :].transpose(1, 2)), dim=2)
    final = final[:, :, final.shape[2] - kept :]
    if segment_ids is not None and seq and kept:
        # What the next token, of the last token's segment, may see: nothing from before that segment began.
        start = segment_starts(segment_ids)[:, -1]
        back = torch.arange(kept, 0, -1, device=x.device)
        visible = (seq - back >= start.unsqueeze(1)) | (segment_runs(segment_ids)[:, -1:] == 0)
        final = final * visible.unsqueeze(1)
    return y, final


def _as_operator(tensors: list[Tensor | None], activation: str, numbers: list[float]) -> list[Tensor]:
    x, weight, bias, initial_state, segment_ids = tensors
    assert x is not None and weight is not None
    return list(
        causal_conv1d(
            x, weight, bias, activation=activation or None, initial_state=initial_state, segment_ids=segment_ids,
            return_final_state=True,
        )
    )  # fmt: skip


def _shapes(tensors: list[Tensor | None], activation: str) -> list[Tensor]:
    x, weight, *_ = tensors
    assert x is not None and weight is not None
    return [x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)]


register_kernel("causal_conv1d", _as_operator, _shapes)


def causal_conv1d_step(
    window: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """The convolution's output for the last token of a window that is as long as the kernel.

    window: (batch, channels, kernel), oldest input first. weight, bias, activation: as in `causal_conv1d`. Returns
    (batch, channels) in window's dtype; sums are float32 inside (float64 for float64). Raises ValueError for shapes
    that do not fit.
    """
    if window.dim() != 3 or window.shape[1:] != weight.shape:
        raise ValueError(
            f"causal_conv1d_step: window must be (batch, channels, kernel) for a weight (channels, kernel), "
            f"got {tuple(window.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d_step: activation must be None or 'silu', got {activation!r}")
    wide = accumulator_dtype(window)
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (torch.nn.functional.silu(y) if activation == "silu" else y).to(window.dtype)

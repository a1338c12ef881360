"""Depthwise causal convolution over the sequence, the short one in front of a state-space scan.

Four shifted multiply-adds with the backward written out: `torch.nn.Conv1d` with groups = channels is slow
to train on a CPU and knows neither states nor packed documents.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.mixing_segments import check_segment_ids, segment_runs, segment_starts

ACTIVATIONS = (None, "silu")


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
    _check(x, weight, bias, activation, initial_state, segment_ids)
    package = (
        _package_function() if x.is_cuda and _fits_package(x, weight, initial_state, segment_ids) else None
    )
    if package is not None:
        y = by_package(package, x, weight, bias, activation, initial_state, segment_ids)
    else:
        y = _CausalConv.apply(x, weight, bias, initial_state, segment_ids, activation == "silu")
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


@functools.cache
def _package_function() -> Callable | None:
    """`causal_conv1d_fn` of the causal-conv1d package, None where it is not installed; looked up once."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return None
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


def _fits_package(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> bool:
    """The package takes 2 to 4 taps, channels in eights, no float64, and not states and segments at once."""
    return (
        x.numel() > 0
        and x.dtype != torch.float64
        and 2 <= weight.shape[1] <= 4
        and x.shape[2] % 8 == 0
        and (initial_state is None or segment_ids is None)
    )


def by_package(
    function: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """y by the causal-conv1d package's `causal_conv1d_fn`: (batch, channels, seq), channels last in memory."""
    state = None
    if initial_state is not None:
        state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y = function(
        x.contiguous().transpose(1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        seq_idx=None if segment_ids is None else segment_runs(segment_ids).to(torch.int32),
        initial_states=state,
        activation=activation,
    )
    return y.transpose(1, 2)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, segment_ids, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
        ctx.silu = silu
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        visible = _visible(segment_ids, weight.shape[1])
        taps = weight.to(_wide(x)).t().contiguous()
        for row in range(x.shape[0]):  # a row at a time stays in the cache
            padded = _padded(x, initial_state, row, taps.shape[0])
            pre = _convolve(padded, taps, bias, visible, row)
            y[row] = torch.nn.functional.silu(pre) if silu else pre
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
        wide = _wide(x)
        seq = x.shape[1]
        kernel = weight.shape[1]
        visible = _visible(segment_ids, kernel)
        taps = weight.to(wide).t().contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(taps[0])
        d_initial = None if initial_state is None else torch.empty_like(initial_state)
        for row in range(x.shape[0]):
            padded = _padded(x, initial_state, row, kernel)
            d_pre = dy[row].to(wide)
            if ctx.silu:
                pre = _convolve(padded, taps, bias, visible, row)
                gate = torch.sigmoid(pre)
                d_pre = d_pre * gate.addcmul(pre * gate, 1 - gate)
            d_padded = torch.zeros_like(padded)
            for j in range(kernel):
                seen = d_pre
                back = kernel - 1 - j
                if visible is not None and back:
                    seen = d_pre * visible[row, :, back : back + 1]
                d_padded[j : j + seq].addcmul_(seen, taps[j])
                d_taps[j] += (seen * padded[j : j + seq]).sum(0)
            d_bias += d_pre.sum(0)
            dx[row] = d_padded[kernel - 1 :]
            if d_initial is not None:
                d_initial[row] = d_padded[: kernel - 1].t()
        return (
            dx,
            d_taps.t().to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            d_initial,
            None,
            None,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _visible(segment_ids: Tensor | None, kernel: int) -> Tensor | None:
    """(batch, seq, kernel): does token t see the input `back` tokens before it?"""
    if segment_ids is None or not segment_ids.numel():
        return None
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    inside = (index - segment_starts(segment_ids)).masked_fill(segment_runs(segment_ids) == 0, kernel)
    return inside.unsqueeze(-1) >= torch.arange(kernel, device=segment_ids.device)


def _padded(x: Tensor, initial_state: Tensor | None, row: int, kernel: int) -> Tensor:
    """(kernel - 1 + seq, channels): the state, then the row's inputs."""
    _, seq, channels = x.shape
    padded = torch.empty(kernel - 1 + seq, channels, dtype=_wide(x), device=x.device)
    padded[: kernel - 1] = 0 if initial_state is None else initial_state[row].t()
    padded[kernel - 1 :] = x[row]
    return padded


def _convolve(padded: Tensor, taps: Tensor, bias: Tensor | None, visible: Tensor | None, row: int) -> Tensor:
    kernel = taps.shape[0]
    seq = padded.shape[0] - kernel + 1
    out = padded[kernel - 1 :] * taps[-1]
    for j in range(kernel - 1):
        back = kernel - 1 - j
        seen = padded[j : j + seq]
        if visible is not None:
            seen = seen * visible[row, :, back : back + 1]
        out.addcmul_(seen, taps[j])
    if bias is not None:
        out += bias.to(out.dtype)
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    where = "causal_conv1d"
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"{where}: x must be floating point (batch, seq, channels), got {x.dtype} {tuple(x.shape)}"
        )
    batch, seq, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"{where}: weight must be (channels, kernel) with {channels} channels, "
            f"got {tuple(weight.shape)}; squeeze a Conv1d weight of (channels, 1, kernel)"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{where}: bias must be (channels,) = ({channels},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be None or 'silu', got {activation!r}")
    state_shape = (batch, channels, weight.shape[1] - 1)
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(
            f"{where}: initial_state must be (batch, channels, kernel - 1) = {state_shape}, "
            f"got {tuple(initial_state.shape)}"
        )
    check_segment_ids(segment_ids, batch, seq, where)

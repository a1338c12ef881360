"""The convolution in Triton, with the backward written by hand: one kernel forward, two backward.

A token sees an earlier one if no border of segments lies between them; what lies before the row is the state, which the
first segment sees. Tiles are tokens by channels; sums are float32.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk.kernels.common.first_order import first_order

BACKEND = "triton"  # as `mohawk doctor` names it
TOKENS, CHANNELS = 32, 32  # of a tile; with twice as many its registers spill
LAUNCH = {"TOKENS": TOKENS, "CHANNELS": CHANNELS, "num_warps": 4, "num_stages": 1}


class Row(NamedTuple):
    """A tensor (batch, tokens, channels): its pointer, None if there is none, and strides."""

    pointer: Any
    batch: Any
    token: Any
    channel: Any


@triton.jit
def _load(row, batch, token, channel, seq, channels):
    """(TOKENS, CHANNELS) of a row in float32, zeros where there are no such tokens."""
    inside = (token >= 0) & (token < seq)
    at = row.pointer + batch.to(tl.int64) * row.batch
    at += token.to(tl.int64)[:, None] * row.token + channel.to(tl.int64)[None, :] * row.channel
    return tl.load(at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _joined(segments, batch, token, seq):
    """(TOKENS,) whether a token is of one segment with the one before it, or with the state before the row."""
    inside = (token > 0) & (token < seq)
    at = segments.pointer + batch.to(tl.int64) * segments.batch + token.to(tl.int64) * segments.token
    here = tl.load(at, mask=inside, other=0)
    return here == tl.load(at - segments.token, mask=inside, other=0)


@triton.jit
def _seen(x, state, batch, token, back: tl.constexpr, channel, seq, channels, KERNEL: tl.constexpr):
    """What lies `back` tokens before each, in the row or in the state, as if all were one segment."""
    value = _load(x, batch, token - back, channel, seq, channels)
    if state.pointer is not None:
        if back > 0:
            # A token beyond the row's end sees none of it, as its place in the state would be beyond that's.
            value += _load(state, batch, token - back + KERNEL - 1, channel, KERNEL - 1, channels)
    return value


@triton.jit
def _before_activation(
    x, weight, bias, state, segments, batch, token, channel, seq, channels, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    visible = token >= 0
    for back in tl.static_range(KERNEL):
        if back > 0:
            if segments.pointer is not None:
                visible = visible & _joined(segments, batch, token - back + 1, seq)
        tap = tl.load(weight + channel * KERNEL + KERNEL - 1 - back, mask=channel < channels, other=0.0)
        value = _seen(x, state, batch, token, back, channel, seq, channels, KERNEL)
        total += tl.where(visible[:, None], value * tap.to(tl.float32)[None, :], 0.0)
    return total


@triton.jit
def _place(blocks, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """(batch row, tokens, channels) of this program."""
    program = tl.program_id(0)
    token = program % blocks * TOKENS + tl.arange(0, TOKENS)
    return program // blocks, token, tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit(do_not_specialize=["seq", "blocks"])
def forward_kernel(
    x, weight, bias, state, segments, y, seq, channels, blocks, SILU: tl.constexpr, KERNEL: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y: (batch, seq, channels), contiguous. weight: (channels, KERNEL), contiguous."""
    batch, token, channel = _place(blocks, TOKENS, CHANNELS)
    value = _before_activation(
        x, weight, bias, state, segments, batch, token, channel, seq, channels, TOKENS, CHANNELS, KERNEL
    )
    if SILU:
        value *= tl.sigmoid(value)
    at = y + (batch.to(tl.int64) * seq + token)[:, None] * channels + channel[None, :]
    tl.store(at, value, mask=(token < seq)[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=["seq", "blocks"])
def weights_kernel(
    x, weight, bias, state, segments, dy, before, d_weight, d_bias, seq, channels, blocks, SILU: tl.constexpr,
    KERNEL: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, float32 and like y in `forward_kernel`, if there is one; and what each block
    of tokens adds to those of the weight, (batch x blocks, KERNEL, channels), and of the bias, (batch x blocks,
    channels)."""
    batch, token, channel = _place(blocks, TOKENS, CHANNELS)
    there = channel < channels
    gradient = _load(dy, batch, token, channel, seq, channels)
    if SILU:
        value = _before_activation(
            x, weight, bias, state, segments, batch, token, channel, seq, channels, TOKENS, CHANNELS, KERNEL
        )
        share = tl.sigmoid(value)
        gradient *= share * (1 + value * (1 - share))
        at = before + (batch.to(tl.int64) * seq + token)[:, None] * channels + channel[None, :]
        tl.store(at, gradient, mask=(token < seq)[:, None] & there[None, :])
    program = tl.program_id(0).to(tl.int64)
    if d_bias is not None:
        tl.store(d_bias + program * channels + channel, tl.sum(gradient, 0), mask=there)
    visible = token >= 0
    for back in tl.static_range(KERNEL):
        if back > 0:
            if segments.pointer is not None:
                visible = visible & _joined(segments, batch, token - back + 1, seq)
        value = _seen(x, state, batch, token, back, channel, seq, channels, KERNEL)
        total = tl.sum(tl.where(visible[:, None], value * gradient, 0.0), 0)
        tl.store(d_weight + (program * KERNEL + KERNEL - 1 - back) * channels + channel, total, mask=there)


@triton.jit(do_not_specialize=["seq", "blocks"])
def inputs_kernel(
    before, weight, segments, dx, d_state, seq, channels, blocks, KERNEL: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of x, like y in `forward_kernel`, and of the state, (batch, channels, KERNEL - 1), whose tokens are
    those before the row's first."""
    batch, token, channel = _place(blocks, TOKENS, CHANNELS)
    if d_state is not None:
        token -= KERNEL - 1
    there = channel < channels
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    visible = token < seq
    for back in tl.static_range(KERNEL):
        if back > 0:
            if segments.pointer is not None:
                visible = visible & _joined(segments, batch, token + back, seq)
        tap = tl.load(weight + channel * KERNEL + KERNEL - 1 - back, mask=there, other=0.0).to(tl.float32)
        gradient = _load(before, batch, token + back, channel, seq, channels)
        total += tl.where(visible[:, None], gradient * tap[None, :], 0.0)
    at = dx + (batch.to(tl.int64) * seq + token)[:, None] * channels + channel[None, :]
    tl.store(at, total, mask=((token >= 0) & (token < seq))[:, None] & there[None, :])
    if d_state is not None:
        place = (batch.to(tl.int64) * channels + channel)[None, :] * (KERNEL - 1) + token[:, None] + KERNEL - 1
        tl.store(d_state + place, total, mask=(token < 0)[:, None] & there[None, :])


def _row(value: Tensor | None) -> Row:
    """(batch, tokens[, channels]) as kernels take it."""
    if value is None:
        return Row(None, 0, 0, 0)
    return Row(value, value.stride(0), value.stride(1), 0 if value.dim() == 2 else value.stride(2))


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segment_ids: Tensor | None):
    """What forward_kernel and weights_kernel begin with. A state of no tokens is none."""
    if initial_state is not None and not initial_state.numel():
        initial_state = None
    state = None if initial_state is None else initial_state.transpose(1, 2)
    bias = None if bias is None else bias.contiguous()
    return _row(x), weight.contiguous(), bias, _row(state), _row(segment_ids)


class _TritonConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, segment_ids, silu):
        ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
        ctx.silu = silu
        batch, seq, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        blocks = triton.cdiv(seq, TOKENS)
        forward_kernel[(batch * blocks, triton.cdiv(channels, CHANNELS))](
            *_shared(x, weight, bias, initial_state, segment_ids), y, seq, channels, blocks, SILU=silu,
            KERNEL=weight.shape[1], **LAUNCH,
        )  # fmt: skip
        return y

    @staticmethod
    @first_order("causal_conv1d has no second derivative")
    def backward(ctx, dy):
        x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
        batch, seq, channels = x.shape
        kernel, blocks, wide = weight.shape[1], triton.cdiv(seq, TOKENS), triton.cdiv(channels, CHANNELS)
        with _on(x.device):
            shared = _shared(x, weight, bias, initial_state, segment_ids)
            before = torch.empty(x.shape, dtype=torch.float32, device=x.device) if ctx.silu else dy
            d_weight = torch.empty(batch * blocks, kernel, channels, dtype=torch.float32, device=x.device)
            d_bias = None if bias is None else torch.empty_like(d_weight[:, 0], memory_format=torch.contiguous_format)
            weights_kernel[(batch * blocks, wide)](
                *shared, _row(dy), before if ctx.silu else None, d_weight, d_bias, seq, channels, blocks,
                SILU=ctx.silu, KERNEL=kernel, **LAUNCH,
            )  # fmt: skip
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            d_initial = d_state = None
            if initial_state is not None:
                d_initial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
                d_state = d_initial if d_initial.numel() else None
            blocks = triton.cdiv(seq + (0 if d_state is None else kernel - 1), TOKENS)
            inputs_kernel[(batch * blocks, wide)](
                _row(before), shared[1], shared[4], dx, d_state, seq, channels, blocks, KERNEL=kernel, **LAUNCH
            )
        return (
            dx,
            d_weight.sum(0, dtype=torch.float64).t().to(weight.dtype),
            None if bias is None or d_bias is None else d_bias.sum(0, dtype=torch.float64).to(bias.dtype),
            d_initial,
            None,
            None,
        )


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y. Shapes as in `mohawk.kernels.causal_conv1d.interface.causal_conv1d`, of at least one token; no float64."""
    with _on(x.device):
        return _TritonConv.apply(x, weight, bias, initial_state, segment_ids, activation == "silu")

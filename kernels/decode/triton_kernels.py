"""Decoding steps in Triton, each one launch: convolution of the newest inputs, scan or gated delta rule, norm and gate.

A program takes one batch row and one group: the heads that share B and C (or q and k) and whose channels the norm is
over, so that nobody else reads the part of the window that it moves. It goes through those heads one after the other,
each with the whole of its state, (ROWS, COLUMNS), in registers. Sums are float32; what is convolved, and Mamba-2's y,
are rounded to the inputs' dtype as over a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mohawk.kernels.decode.reference import NORM_EPS

KEY_EPS = tl.constexpr(NORM_EPS)


class Rows(NamedTuple):
    """A tensor (batch, ...) whose rows are contiguous: its pointer and the stride between rows."""

    pointer: Any
    stride: Any


class Window(NamedTuple):
    """(batch, channels, kernel): its pointer and strides."""

    pointer: Any
    batch: Any
    channel: Any
    tap: Any


@triton.jit
def _convolved(
    window, inputs, weight, bias, row, first, count, live, SILU: tl.constexpr, KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """(WIDTH,) what is convolved of `count` channels from `first` on, float32, zeros beyond. Moves them in the window
    where `live`."""
    offset = tl.arange(0, WIDTH)
    inside = offset < count
    channel = (first + offset).to(tl.int64)
    at = window.pointer + row * window.batch + channel * window.channel
    total = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    newest = tl.load(inputs.pointer + row * inputs.stride + channel, mask=inside, other=0.0)
    for tap in tl.static_range(KERNEL):
        if tap + 1 < KERNEL:
            value = tl.load(at + (tap + 1) * window.tap, mask=inside, other=0.0)
        else:
            value = newest.to(window.pointer.dtype.element_ty)
        by = tl.load(weight + channel * KERNEL + tap, mask=inside, other=0.0).to(tl.float32)
        total += value.to(newest.dtype).to(tl.float32) * by
    tl.debug_barrier()  # several threads may have read what one of them moves now
    for tap in tl.static_range(KERNEL):
        if tap + 1 < KERNEL:
            value = tl.load(at + (tap + 1) * window.tap, mask=inside, other=0.0)
        else:
            value = newest.to(window.pointer.dtype.element_ty)
        tl.store(at + tap * window.tap, value, mask=inside & live)
    if SILU:
        total *= tl.sigmoid(total)
    return tl.where(inside, total.to(newest.dtype).to(tl.float32), 0.0)


@triton.jit
def _softplus(value):
    """As torch has it: the value itself above 20. log1p(e) is log(u) e / (u - 1), u = 1 + e: digits stay."""
    small = tl.exp(tl.minimum(value, 20.0))
    sum = 1.0 + small
    gained = sum - 1.0
    exact = tl.where(gained == 0.0, small, tl.log(sum) * (small / tl.where(gained == 0.0, 1.0, gained)))
    return tl.where(value > 20.0, value, exact)


@triton.jit
def ssd_kernel(
    window, inputs, gate, decay, weight, bias, A_log, dt_bias, D, gate_bias, norm_weight, real, state, between, out,
    eps, heads, groups, rows: tl.constexpr, columns: tl.constexpr,
    SILU: tl.constexpr, KERNEL: tl.constexpr, PER_GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """state: (batch, heads, rows, columns), rows being x's; between: (batch, heads * rows) float32, for what is not yet
    divided by the norm, None where a group is one head; out: (batch, heads * rows), contiguous as state is."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    live = True
    if real is not None:
        live = tl.load(real + row)
    inner = heads * rows
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    B = _convolved(window, inputs, weight, bias, row, inner + group * columns, columns, live, SILU, KERNEL, COLUMNS)
    C = _convolved(
        window, inputs, weight, bias, row, inner + (groups + group) * columns, columns, live, SILU, KERNEL, COLUMNS
    )
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    squares = 0.0
    for number in range(PER_GROUP):
        head = group * PER_GROUP + number
        x = _convolved(window, inputs, weight, bias, row, head * rows, rows, live, SILU, KERNEL, ROWS)
        raw = tl.load(decay.pointer + row * decay.stride + head).to(tl.float32)
        scaled = x
        if A_log is not None:
            if dt_bias is not None:
                raw += tl.load(dt_bias + head).to(tl.float32)
            dt = _softplus(raw)
            keep = tl.exp(-dt * tl.exp(tl.load(A_log + head).to(tl.float32)))
            scaled = x * dt
        else:
            keep = tl.exp(-_softplus(raw))
        at = state + (row * heads + head) * (rows * columns) + (i[:, None] * columns + j[None, :])
        before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        after = keep * before + scaled[:, None] * B[None, :]
        tl.store(at, after, mask=inside & live)
        y = tl.sum(after * C[None, :], 1)
        if D is not None:
            y += x * tl.load(D + head).to(tl.float32)
        y = y.to(out.dtype.element_ty).to(tl.float32)
        channel = head * rows + i
        z = tl.load(gate.pointer + row * gate.stride + channel, mask=i < rows, other=0.0).to(tl.float32)
        if gate_bias is not None:
            z += tl.load(gate_bias + channel, mask=i < rows, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
        if norm_weight is not None:
            squares += tl.sum(tl.where(i < rows, y * y, 0.0), 0)
            if PER_GROUP == 1:
                y *= tl.rsqrt(squares / rows + eps)
                y *= tl.load(norm_weight + channel, mask=i < rows, other=0.0).to(tl.float32)
            else:
                tl.store(between + row * inner + channel, y, mask=i < rows)
        if (norm_weight is None) or (PER_GROUP == 1):
            tl.store(out + row * inner + channel, tl.where(live, y, 0.0), mask=i < rows)
    if norm_weight is not None:
        if PER_GROUP > 1:
            tl.debug_barrier()
            scale = tl.rsqrt(squares / (PER_GROUP * rows) + eps)
            for number in range(PER_GROUP):
                channel = (group * PER_GROUP + number) * rows + i
                y = tl.load(between + row * inner + channel, mask=i < rows, other=0.0) * scale
                y *= tl.load(norm_weight + channel, mask=i < rows, other=0.0).to(tl.float32)
                tl.store(out + row * inner + channel, tl.where(live, y, 0.0), mask=i < rows)


@triton.jit
def delta_kernel(
    window, inputs, gate, beta, decay, weight, bias, A_log, dt_bias, norm_weight, real, state, out, eps, scale, heads,
    groups, rows: tl.constexpr, columns: tl.constexpr,
    BY_CHANNEL: tl.constexpr, SIGMOID: tl.constexpr, KERNEL: tl.constexpr, PER_GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """state: (batch, heads, rows, columns), rows being keys' and columns values'; scale: what normalised queries are
    multiplied by; out: (batch, heads * columns), contiguous as state is."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    live = True
    if real is not None:
        live = tl.load(real + row)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    q = _convolved(window, inputs, weight, bias, row, group * rows, rows, live, True, KERNEL, ROWS)
    k = _convolved(window, inputs, weight, bias, row, (groups + group) * rows, rows, live, True, KERNEL, ROWS)
    q *= tl.rsqrt(tl.sum(q * q, 0) + KEY_EPS) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + KEY_EPS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    for number in range(PER_GROUP):
        head = group * PER_GROUP + number
        v = _convolved(
            window, inputs, weight, bias, row, 2 * groups * rows + head * columns, columns, live, True, KERNEL, COLUMNS
        )
        at = state + (row * heads + head) * (rows * columns) + (i[:, None] * columns + j[None, :])
        before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if BY_CHANNEL:
            from_here = decay.pointer + row * decay.stride + head * rows + i
            before *= tl.exp(tl.load(from_here, mask=i < rows, other=0.0).to(tl.float32))[:, None]
        else:
            raw = tl.load(decay.pointer + row * decay.stride + head).to(tl.float32)
            if A_log is not None:
                if dt_bias is not None:
                    raw += tl.load(dt_bias + head).to(tl.float32)
                raw = -tl.exp(tl.load(A_log + head).to(tl.float32)) * _softplus(raw)
            before *= tl.exp(raw)
        share = tl.sigmoid(tl.load(beta.pointer + row * beta.stride + head).to(tl.float32))
        change = share * (v - tl.sum(before * k[:, None], 0))
        after = before + k[:, None] * change[None, :]
        tl.store(at, after, mask=inside & live)
        y = tl.sum(after * q[:, None], 0)
        y *= tl.rsqrt(tl.sum(tl.where(j < columns, y * y, 0.0), 0) / columns + eps)
        y *= tl.load(norm_weight + j, mask=j < columns, other=0.0).to(tl.float32)
        channel = head * columns + j
        z = tl.load(gate.pointer + row * gate.stride + channel, mask=j < columns, other=0.0).to(tl.float32)
        opened = tl.sigmoid(z)
        if not SIGMOID:
            opened *= z
        tl.store(out + row * heads * columns + channel, tl.where(live, y * opened, 0.0), mask=j < columns)

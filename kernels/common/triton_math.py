"""Functions of float32 numbers in Triton kernels: as precise as the losses need them near 0, and short."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def exp(x):
    """exp(x), 0 where it is no normal number: two instructions, where tl.exp also sees to those below."""
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """exp(x) - 1 to float32's relative precision, for x in -80..80."""
    series = x + x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, series, exp(x) - 1)


@triton.jit
def log1p(x, y):
    """log(y) to float32's relative precision for a normal number y = 1 + x, of which x has the digits near 1."""
    # y is f + 1 times a power of 2, f from sqrt(1/2) - 1 to sqrt(2) - 1; where that is 2^0, f is x. The polynomial was
    # fitted to log(1 + f) / f, with errors below 3e-8.
    bits = y.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    f = tl.where(power == 0, x, (bits - (power << 23)).to(tl.float32, bitcast=True) - 1)
    series = -0.14368940889835358 + f * 0.08724135160446167
    series = 0.14952591061592102 + f * series
    series = -0.16562139987945557 + f * series
    series = 0.1995677798986435 + f * series
    series = -0.250020831823349 + f * series
    series = 0.3333418667316437 + f * series
    series = -0.49999988079071045 + f * series
    return power.to(tl.float32) * LN2 + (f + f * f * series)


@triton.jit
def expm1_less(x):
    """exp(x) - 1 - x to float32's relative precision, for x in -0.35..0.35."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))

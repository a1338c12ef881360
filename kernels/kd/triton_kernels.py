"""The Triton kernels of the distillation losses: a program, or several, for each row, which sweeps the vocabulary in
blocks.

`statistics_kernel` and `merge_kernel` find the log-normalisers of both sides in one online sweep, `sums_kernel` the row
sums that the gradients of JSD, skewed KL, total variation, MSE of probabilities and cosine need, `gradient_kernel`
writes the gradient (in place if asked) and sums the value on the way. In reads or writes of one (rows, vocab) array
that is 2 + 3 = 5 for forward and reverse KL and 2 + 2 + 3 = 7 for the others; the hard-label cross-entropy rides along.
Without a gradient it is 4 (and 2 for mse): the statistics would have the value of forward and reverse KL too, but only
to the reference's precision, ten to a hundred times less than that of a second sweep where student and teacher are
close. All arithmetic is float32.

Each thread keeps sums of its own, which meet when the row is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mohawk.kernels.common.triton_math import exp, expm1, expm1_less, log1p
from mohawk.kernels.common.triton_rows import columns_of, load_block, load_row, rounds, start_of
from mohawk.kernels.kd import divergences

NOT_THERE = tl.constexpr(divergences.NOT_THERE)


@triton.jit
def _scaled(x, scale):
    """scale: None for 1."""
    return x if scale is None else x * scale


@triton.jit
def _finite(maximum):
    """-inf stays out of inf - inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _grow(x, maximum, total):
    """One block of an online logsumexp."""
    new = tl.maximum(maximum, tl.max(x, 1))
    safe = _finite(new)
    return new, total * exp(maximum - safe) + tl.sum(exp(x - safe[:, None]), 1)


@triton.jit
def _close(maximum, total):
    """The threads' logsumexps as one."""
    top = tl.max(maximum, 0)
    return top, tl.sum(total * exp(maximum - _finite(top)), 0)


@triton.jit
def _moved_ratio(ratio, total, old_a, old_b, am, bm):
    """sum exp(a - old_a) * ((a - old_a) - (b - old_b)), with total = sum exp(a - old_a), of other maxima. Where nothing
    is left of it, neither is what was infinite in it."""
    left = exp(old_a - am)
    return tl.where(left == 0.0, 0.0, (ratio + total * ((old_a - am) - (old_b - bm))) * left)


@triton.jit
def _grow_kl(a, b, a_max, a_sum, b_max, b_sum, ratio):
    """One block of both logsumexps and of sum exp(a - a_max) * ((a - a_max) - (b - b_max))."""
    old_a, old_b, old_sum = a_max, b_max, a_sum
    a_max, a_sum = _grow(a, a_max, a_sum)
    b_max, b_sum = _grow(b, b_max, b_sum)
    am, bm = _finite(a_max), _finite(b_max)
    ratio = _moved_ratio(ratio, old_sum, old_a, old_b, am, bm)
    x = a - am[:, None]
    weight = exp(x)
    term = tl.where(weight == 0.0, 0.0, weight * (x - (b - bm[:, None])))
    return a_max, a_sum, b_max, b_sum, ratio + tl.sum(term, 1)


@triton.jit
def _moved_apart(apart, total, old_a, old_b, am, bm):
    """sum exp(a - old_a) - exp(b - old_b), with total = sum exp(a - old_a), of other maxima."""
    left_a, left_b = exp(old_a - am), exp(old_b - bm)
    d = (old_a - am) - (old_b - bm)
    return apart * left_b + total * tl.where(tl.abs(d) < 1 / 256, left_b * (d + d * d * 0.5), left_a - left_b)


@triton.jit
def _grow_apart(a, b, a_max, a_sum, b_max, b_sum, apart):
    """One block of both logsumexps and of the difference of their sums, sum exp(a - a_max) - exp(b - b_max), which is
    taken entry by entry: of the sums themselves it would have the rounding."""
    old_a, old_b, old_sum = a_max, b_max, a_sum
    a_max, a_sum = _grow(a, a_max, a_sum)
    b_max, b_sum = _grow(b, b_max, b_sum)
    am, bm = _finite(a_max), _finite(b_max)
    apart = _moved_apart(apart, old_sum, old_a, old_b, am, bm)
    weight = exp(b - bm[:, None])
    # A group that one side masks has nothing close, whatever is left of the digits of b in a - b.
    gap = tl.where(tl.abs(am - bm) > 64.0, float("inf"), am - bm)
    d = (a - b) - gap[:, None]
    term = tl.where(tl.abs(d) < 1 / 256, weight * (d + d * d * 0.5), exp(a - am[:, None]) - weight)
    return a_max, a_sum, b_max, b_sum, apart + tl.sum(term, 1)


@triton.jit
def _log_ratio(a, b, apart):
    """log(a / b) for apart = a - b, precise where they are close."""
    x = apart / b
    return tl.where(tl.abs(x) < 0.35, log1p(x, 1 + x), tl.log(a) - tl.log(b))


# How many rows count is another number in each step, not worth a variant of a kernel; nor are lengths and places.
@triton.jit(do_not_specialize=["n", "phase", "turn", "z_stride", "t_stride", "vocab"])
def statistics_kernel(
    z_ptr, t_ptr, rows_ptr, parts_ptr, z_stride, t_stride, vocab, n, phase, turn, z_scale, t_scale, taid,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr, TAID: tl.constexpr, HAS_ROWS: tl.constexpr,
    Z_ALIGNED: tl.constexpr, T_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """parts (7, splits, n), for `merge_kernel`: maximum and sum of the student's exponentials, of the teacher's, of the
    untempered student's; for reverse KL sum exp(u - z_max) * ((u - z_max) - (v - t_max)), for forward KL and tvd the
    first sum less the second, without their rounding. For cosine the sums are the squared norms, and the last is the
    product."""
    row, first = load_row(rows_ptr, phase, turn, HAS_ROWS, GROUP)
    z_row, t_row = start_of(z_ptr, row, z_stride, first, Z_ALIGNED), start_of(t_ptr, row, t_stride, first, T_ALIGNED)
    nothing, zeros = tl.full((BLOCK // GROUP,), float("-inf"), tl.float32), tl.zeros((BLOCK // GROUP,), tl.float32)
    z_max, z_sum, t_max, t_sum, one_max, one_sum, more = nothing, zeros, nothing, zeros, nothing, zeros, zeros
    for EDGES in tl.static_range(2):
        begin, end, step = rounds(first, vocab, EDGES, BLOCK)
        for k in range(begin, end):
            columns = columns_of(k * step, BLOCK, GROUP)
            z = load_block(z_row, columns, first, vocab, EDGES)
            if CE and TEMPERED:
                one_max, one_sum = _grow(z, one_max, one_sum)
            if DIVERGENCE == "none":
                z_max, z_sum = _grow(_scaled(z, z_scale), z_max, z_sum)
            else:
                t = load_block(t_row, columns, first, vocab, EDGES)
                if DIVERGENCE == "cosine":
                    out = tl.minimum(z, t) < NOT_THERE
                    z, t = tl.where(out, 0.0, z), tl.where(out, 0.0, t)
                    z_sum += tl.sum(z * z, 1)
                    t_sum += tl.sum(t * t, 1)
                    more += tl.sum(z * t, 1)
                elif DIVERGENCE == "mse":
                    if CE:
                        z_max, z_sum = _grow(z, z_max, z_sum)
                else:
                    u, v = _scaled(z, z_scale), _scaled(t, t_scale)
                    if TAID:
                        v = (1 - taid) * u + taid * v
                    if DIVERGENCE == "reverse_kl":
                        z_max, z_sum, t_max, t_sum, more = _grow_kl(u, v, z_max, z_sum, t_max, t_sum, more)
                    elif DIVERGENCE == "forward_kl" or DIVERGENCE == "tvd":
                        z_max, z_sum, t_max, t_sum, more = _grow_apart(u, v, z_max, z_sum, t_max, t_sum, more)
                    else:
                        z_max, z_sum = _grow(u, z_max, z_sum)
                        t_max, t_sum = _grow(v, t_max, t_sum)
    parts_ptr += tl.program_id(1) * n + tl.program_id(0)
    size = (tl.num_programs(1) * n).to(tl.int64)
    z_max, z_sum, t_max, t_sum, more = _closed(z_max, z_sum, t_max, t_sum, more, DIVERGENCE)
    tl.store(parts_ptr, z_max)
    tl.store(parts_ptr + size, z_sum)
    tl.store(parts_ptr + 2 * size, t_max)
    tl.store(parts_ptr + 3 * size, t_sum)
    tl.store(parts_ptr + 6 * size, more)
    if CE and TEMPERED:
        one_max, one_sum = _close(one_max, one_sum)
        tl.store(parts_ptr + 4 * size, one_max)
        tl.store(parts_ptr + 5 * size, one_sum)


@triton.jit
def _closed(z_max, z_sum, t_max, t_sum, more, DIVERGENCE: tl.constexpr):
    """What threads, or programs, have of a row's statistics, as one."""
    if DIVERGENCE == "cosine":
        return tl.max(z_max, 0), tl.sum(z_sum, 0), tl.max(t_max, 0), tl.sum(t_sum, 0), tl.sum(more, 0)
    else:
        z_top, z_total = _close(z_max, z_sum)
        t_top, t_total = _close(t_max, t_sum)
        if DIVERGENCE == "reverse_kl":
            more = _moved_ratio(more, z_sum, z_max, t_max, _finite(z_top), _finite(t_top))
        elif DIVERGENCE == "forward_kl" or DIVERGENCE == "tvd":
            more = _moved_apart(more, z_sum, z_max, t_max, _finite(z_top), _finite(t_top))
        return z_top, z_total, t_top, t_total, tl.sum(more, 0)


@triton.jit(do_not_specialize=["n", "splits"])
def merge_kernel(
    z_ptr, rows_ptr, labels_ptr, parts_ptr, out_ptr, z_stride, n, splits,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr, HAS_ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out (6, n): lse of the student, of the teacher, of the untempered student; reverse KL; the
    label's logit (0 if it is another rank's); the first lse less the second, without their rounding. For cosine the
    first two are the squared norms, and the fourth is the product."""
    pid = tl.program_id(0)
    split, size = tl.arange(0, SPLITS), (splits * n).to(tl.int64)
    there = split < splits
    at = parts_ptr + split * n + pid
    nothing = float("-inf")
    z_max, z_sum = tl.load(at, mask=there, other=nothing), tl.load(at + size, mask=there, other=0.0)
    t_max, t_sum = tl.load(at + 2 * size, mask=there, other=nothing), tl.load(at + 3 * size, mask=there, other=0.0)
    more = tl.load(at + 6 * size, mask=there, other=0.0)
    z_max, z_sum, t_max, t_sum, more = _closed(z_max, z_sum, t_max, t_sum, more, DIVERGENCE)
    if DIVERGENCE == "cosine":
        tl.store(out_ptr + pid, z_sum)
        tl.store(out_ptr + n + pid, t_sum)
        tl.store(out_ptr + 3 * n + pid, more)
    else:
        tl.store(out_ptr + pid, z_max + tl.log(z_sum))
        tl.store(out_ptr + n + pid, t_max + tl.log(t_sum))
    if CE and TEMPERED:
        top, total = tl.load(at + 4 * size, mask=there, other=nothing), tl.load(at + 5 * size, mask=there, other=0.0)
        top, total = _close(top, total)
        tl.store(out_ptr + 2 * n + pid, top + tl.log(total))
    if DIVERGENCE != "none" and DIVERGENCE != "cosine" and DIVERGENCE != "mse":
        # The logs as one, since their difference is small where the two sides are close. What is left of their rounding
        # goes with the projection of the gradient, which forward KL has not, and is second order in values but tvd's.
        apart = more
        if DIVERGENCE != "forward_kl" and DIVERGENCE != "tvd":
            apart = z_sum - t_sum
        logs = _log_ratio(z_sum, t_sum, apart)
        tl.store(out_ptr + 5 * n + pid, (z_max - t_max) + logs)
        if DIVERGENCE == "reverse_kl":
            # E[(u - z_max) - (v - t_max)] less that: small numbers only.
            tl.store(out_ptr + 3 * n + pid, more / z_sum - logs)
    if CE:
        row = tl.program_id(0).to(tl.int64)
        if HAS_ROWS:
            row = tl.load(rows_ptr + row).to(tl.int64)
        label = tl.load(labels_ptr + pid)
        logit = tl.load(z_ptr + row * z_stride + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(tl.float32)
        tl.store(out_ptr + 4 * n + pid, logit)


@triton.jit
def _logs(z, t, z_scale, t_scale, taid, z_lse, t_lse, shift, TAID: tl.constexpr):
    """p, q and r = log q - log p, with some r where both are 0. r is made of the scores, whose difference is exact
    where they are close, and the difference `shift` of the normalisers."""
    u, v = _scaled(z, z_scale), _scaled(t, t_scale)
    if TAID:
        v = (1 - taid) * u + taid * v
    p, q = exp(v - t_lse), exp(u - z_lse)
    return p, q, tl.where(u == v, 0.0, u - v) - shift


@triton.jit
def _clamp(r):
    return tl.minimum(tl.maximum(r, -80.0), 80.0)


@triton.jit
def _mixture(r, lam):
    """log(m / b) and m / b - 1 over m / b of m = (1 - lam) a + lam b for r = log(a / b), as in gradients.py."""
    r = _clamp(r)
    x = (1 - lam) * expm1(r)
    ratio = (1 - lam) * exp(r) + lam
    return log1p(x, ratio), x / ratio


@triton.jit
def _jsd_series(x, w):
    """A term of JSD over a x^2, for x = log(b / a) near 0. It is V(x) = -(1 - w) K - w exp(x) (K - x) of the cumulants'
    generating function K(x) = log(1 - w + w exp(x)), so V' = w exp(x) (x - K), which is integrated power by power."""
    c, s, a1 = w * (1 - w), 1 - 2 * w, 1 - w
    a2, a3, a4, a5 = -c / 2, -c * s / 6, -c * (1 - 6 * c) / 24, -c * s * (1 - 12 * c) / 120  # of x - K
    b3, b4 = a1 / 2 + a2 + a3, a1 / 6 + a2 / 2 + a3 + a4  # of exp(x) (x - K)
    b5 = a1 / 24 + a2 / 6 + a3 / 2 + a4 + a5
    b6 = a1 / 120 + a2 / 24 + a3 / 6 + a4 / 2 + a5 - c * (1 - 30 * c + 120 * c * c) / 720
    return w * a1 / 2 + x * (
        w * (a1 + a2) / 3 + x * (w * b3 / 4 + x * (w * b4 / 5 + x * (w * b5 / 6 + x * (w * b6 / 7))))
    )


@triton.jit
def _terms(p, q, r, beta, lam, vocab_all, DIVERGENCE: tl.constexpr):
    """(value, slope) per entry: D = sum value, dD/du = q * (slope - sum q slope), but for forward KL, whose slope is
    the gradient itself. In the KLs no value is negative: where p and q are close, a log(a / b) + b - a is a times
    `expm1_less` of log(b / a)."""
    if DIVERGENCE == "forward_kl":
        rest = expm1_less(r)
        near = tl.abs(r) < 0.35
        slope = tl.where(near, p * (r + rest), q - p)
        value = tl.where(near, p * rest, slope - tl.where(p == 0.0, 0.0, p * r))
    elif DIVERGENCE == "reverse_kl":
        slope = tl.where(q == 0.0, 0.0, r)
        value = tl.where(tl.abs(r) < 0.35, q * expm1_less(-r), q * slope + (p - q))
    elif DIVERGENCE == "jsd":
        # The smaller weight goes into the logarithm, as in gradients.jsd: m / a = 1 - w + w exp(x) for x = log(b / a).
        small = beta < 0.5
        r = _clamp(r)
        w, x = tl.where(small, beta, 1 - beta), tl.where(small, -r, r)
        log_m = log1p(w * expm1(x), w * exp(x) + (1 - w))  # log(m / a)
        slope = (beta - 1) * tl.where(small, log_m, log_m - r)
        near = tl.where(small, q, p) * (x * x * _jsd_series(x, w))
        value = tl.where(tl.abs(x) < 0.25, near, q * slope - beta * p * tl.where(small, log_m + r, log_m))
    elif DIVERGENCE == "skew_kl":
        log_m, x = _mixture(r, lam)  # log(m / p), 1 - p / m
        value = tl.where(tl.abs(log_m) < 0.35, p * expm1_less(log_m), (1 - lam) * (q - p) - p * log_m)
        slope = (1 - lam) * x
    elif DIVERGENCE == "skew_reverse_kl":
        log_m, x = _mixture(-r, lam)  # log(m / q), 1 - q / m
        value = tl.where(tl.abs(log_m) < 0.35, q * expm1_less(log_m), (1 - lam) * (p - q) - q * log_m)
        slope = lam * x - log_m
    elif DIVERGENCE == "probability_mse":
        difference = tl.where(tl.abs(r) < 0.35, p * (r + expm1_less(r)), q - p)
        slope = difference * (2 / vocab_all)
        value = difference * difference / vocab_all
    else:
        tl.static_assert(DIVERGENCE == "tvd")
        difference = tl.where(tl.abs(r) < 0.35, p * (r + expm1_less(r)), q - p)
        value = tl.abs(difference) * 0.5
        slope = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
    return value, slope


@triton.jit
def _raw(z, t, z_norm, t_norm, vocab_all, DIVERGENCE: tl.constexpr):
    """(value, difference, z) per entry for the divergences of raw logits."""
    out = tl.minimum(z, t) < NOT_THERE
    z, t = tl.where(out, 0.0, z), tl.where(out, 0.0, t)
    if DIVERGENCE == "cosine":
        z, t = z / z_norm, t / t_norm
        difference = z - t
        value = difference * difference * 0.5
    else:
        difference = z - t
        value = difference * difference / vocab_all
    return value, difference, z


@triton.jit(do_not_specialize=["n", "phase", "turn", "z_stride", "t_stride", "vocab", "vocab_all"])
def sums_kernel(
    z_ptr, t_ptr, rows_ptr, stats_ptr, out_ptr,
    z_stride, t_stride, vocab, vocab_all, n, phase, turn, z_scale, t_scale, taid, beta, lam,
    DIVERGENCE: tl.constexpr, TAID: tl.constexpr, HAS_ROWS: tl.constexpr,
    Z_ALIGNED: tl.constexpr, T_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (6, splits, n): the value and sum q * slope; for probability_mse also sum d, d * p, p * p and q * p of d =
    q - p, by which `_recentred` takes the rounding of the normalisers out."""
    row, first = load_row(rows_ptr, phase, turn, HAS_ROWS, GROUP)
    z_row, t_row = start_of(z_ptr, row, z_stride, first, Z_ALIGNED), start_of(t_ptr, row, t_stride, first, T_ALIGNED)
    pid = tl.program_id(0)
    z_lse, t_lse, shift = tl.load(stats_ptr + pid), tl.load(stats_ptr + n + pid), tl.load(stats_ptr + 5 * n + pid)
    zeros = tl.zeros((BLOCK // GROUP,), tl.float32)
    total, projected, gap, d_p, p_p, q_p = zeros, zeros, zeros, zeros, zeros, zeros
    for EDGES in tl.static_range(2):
        begin, end, step = rounds(first, vocab, EDGES, BLOCK)
        for k in range(begin, end):
            columns = columns_of(k * step, BLOCK, GROUP)
            z = load_block(z_row, columns, first, vocab, EDGES)
            t = load_block(t_row, columns, first, vocab, EDGES)
            if DIVERGENCE == "mse" or DIVERGENCE == "cosine":
                value, _, _ = _raw(z, t, z_lse, t_lse, vocab_all, DIVERGENCE)
            else:
                p, q, r = _logs(z, t, z_scale, t_scale, taid, z_lse, t_lse, shift, TAID)
                value, slope = _terms(p, q, r, beta, lam, vocab_all, DIVERGENCE)
                projected += tl.sum(q * slope, 1)
                if DIVERGENCE == "probability_mse":
                    difference = slope * (vocab_all / 2)
                    gap += tl.sum(difference, 1)
                    d_p += tl.sum(difference * p, 1)
                    p_p += tl.sum(p * p, 1)
                    q_p += tl.sum(q * p, 1)
            total += tl.sum(value, 1)
    out_ptr += tl.program_id(1) * n + pid
    size = (tl.num_programs(1) * n).to(tl.int64)
    tl.store(out_ptr, tl.sum(total, 0))
    # A NaN on the teacher's side alone, which a limit on r hides, is one in the gradient too.
    tl.store(out_ptr + size, tl.sum(projected, 0) + 0.0 * tl.sum(total, 0))
    if DIVERGENCE == "probability_mse":
        tl.store(out_ptr + 2 * size, tl.sum(gap, 0))
        tl.store(out_ptr + 3 * size, tl.sum(d_p, 0))
        tl.store(out_ptr + 4 * size, tl.sum(p_p, 0))
        tl.store(out_ptr + 5 * size, tl.sum(q_p, 0))


@triton.jit(do_not_specialize=["n", "phase", "turn", "z_stride", "t_stride", "grad_stride", "vocab", "vocab_all"])
def gradient_kernel(
    z_ptr, t_ptr, grad_ptr, rows_ptr, labels_ptr, stats_ptr, sums_ptr, kd_row_ptr, ce_row_ptr, value_ptr,
    z_stride, t_stride, grad_stride, vocab, vocab_all, n, phase, turn, z_scale, t_scale, taid, beta, lam,
    DIVERGENCE: tl.constexpr, IN_SWEEP: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr,
    TAID: tl.constexpr, HAS_ROWS: tl.constexpr, Z_ALIGNED: tl.constexpr, T_ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad = kd_row * dD/du + ce_row * (softmax(z) - onehot), and with `IN_SWEEP` the value of D, (splits, n). For
    `none` the gradient is kd_row * exp(u - lse)."""
    row, first = load_row(rows_ptr, phase, turn, HAS_ROWS, GROUP)
    z_row, t_row = start_of(z_ptr, row, z_stride, first, Z_ALIGNED), start_of(t_ptr, row, t_stride, first, T_ALIGNED)
    grad_row = start_of(grad_ptr, row, grad_stride, first, GRAD_ALIGNED)
    pid = tl.program_id(0)
    z_lse, t_lse, shift = tl.load(stats_ptr + pid), tl.load(stats_ptr + n + pid), tl.load(stats_ptr + 5 * n + pid)
    projected = tl.load(sums_ptr + pid)
    kd_row = tl.load(kd_row_ptr + pid)
    gap = 0.0
    if DIVERGENCE == "probability_mse":
        gap = tl.load(stats_ptr + 3 * n + pid)
    if CE:
        ce_row = tl.load(ce_row_ptr + pid)
        label = tl.load(labels_ptr + pid)
        label = tl.where(label < 0, -1, label + first)
        one_lse = z_lse
        if TEMPERED:
            one_lse = tl.load(stats_ptr + 2 * n + pid)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    for EDGES in tl.static_range(2):
        begin, end, step = rounds(first, vocab, EDGES, BLOCK)
        for k in range(begin, end):
            columns = columns_of(k * step, BLOCK, GROUP)
            z = load_block(z_row, columns, first, vocab, EDGES)
            if DIVERGENCE == "none":
                grad = kd_row * exp(_scaled(z, z_scale) - z_lse)
            else:
                t = load_block(t_row, columns, first, vocab, EDGES)
                if DIVERGENCE == "mse" or DIVERGENCE == "cosine":
                    value, difference, unit = _raw(z, t, z_lse, t_lse, vocab_all, DIVERGENCE)
                    if DIVERGENCE == "cosine":
                        grad = kd_row * (difference - projected * unit) / z_lse
                    else:
                        grad = kd_row * difference * (2 / vocab_all)
                else:
                    p, q, r = _logs(z, t, z_scale, t_scale, taid, z_lse, t_lse, shift, TAID)
                    value, slope = _terms(p, q, r, beta, lam, vocab_all, DIVERGENCE)
                    if DIVERGENCE == "probability_mse":
                        slope -= p * (gap * (2 / vocab_all))
                    if DIVERGENCE == "forward_kl":
                        grad = kd_row * slope
                    else:
                        grad = kd_row * (q * (slope - projected))
                if IN_SWEEP:
                    total += tl.sum(value, 1)
            if CE:
                onehot = tl.where(columns == label, 1.0, 0.0)
                grad += ce_row * (exp(z - one_lse) - onehot)
            if EDGES:
                tl.store(grad_row + columns, grad, mask=(columns >= first) & (columns < first + vocab))
            else:
                tl.store(grad_row + columns, grad)
    tl.store(value_ptr + tl.program_id(1) * n + pid, tl.sum(total, 0))


@triton.jit(do_not_specialize=["size"])
def times_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor, if that is not 1: then nothing is read but the factor."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < size)
            tl.store(x_ptr + at, x * factor, mask=at < size)

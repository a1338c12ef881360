"""The Triton kernels of the distillation losses: one program for each row, which sweeps the vocabulary in blocks.

`statistics_kernel` finds the log-normalisers of both sides in one online sweep, `sums_kernel` the row sums that the
gradients of JSD, skewed KL, total variation, MSE of probabilities and cosine need, `gradient_kernel` writes the
gradient (in place if asked) and sums the value on the way. In reads or writes of one (rows, vocab) array that is
2 + 3 = 5 for forward and reverse KL and 2 + 2 + 3 = 7 for the others; the hard-label cross-entropy rides along. Without
a gradient it is 4 (and 2 for mse): the statistics would have the value of forward and reverse KL too, but only to the
reference's precision, ten to a hundred times less than that of a second sweep where student and teacher are close. All
arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expm1(x):
    """exp(x) - 1 to float32's relative precision, for x in -80..80."""
    series = 1 + x / 7
    series = 1 + x / 6 * series
    series = 1 + x / 5 * series
    series = 1 + x / 4 * series
    series = 1 + x / 3 * series
    series = 1 + x / 2 * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) to float32's relative precision."""
    s = x / (2 + x)
    ss = s * s
    series = 2 * s * (1 + ss * (1 / 3 + ss * (1 / 5 + ss * (1 / 7 + ss / 9))))
    return tl.where(tl.abs(x) < 0.35, series, tl.log(1 + x))


@triton.jit
def _expm1_less(x):
    """exp(x) - 1 - x to float32's relative precision, for x in -0.35..0.35."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))


@triton.jit
def _load(ptr, base, columns, vocab, fill):
    return tl.load(ptr + base + columns, mask=columns < vocab, other=fill).to(tl.float32)


@triton.jit
def _row(rows_ptr, HAS_ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row).to(tl.int64)
    return row


@triton.jit
def _grow(x, maximum, total):
    """One block of an online logsumexp; -inf stays out of inf - inf."""
    new = tl.maximum(maximum, tl.max(x, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(maximum - safe) + tl.sum(tl.exp(x - safe), 0)
    return new, total


@triton.jit
def _grow_kl(a, b, a_max, a_sum, b_max, b_sum, ratio):
    """One block of both logsumexps and of sum exp(a - a_max) * ((a - a_max) - (b - b_max))."""
    old_a, old_b, old_sum = a_max, b_max, a_sum
    # Where nothing is left of the earlier blocks, neither is what was infinite in them.
    a_max, a_sum = _grow(a, a_max, a_sum)
    b_max, b_sum = _grow(b, b_max, b_sum)
    am, bm = tl.where(a_max == float("-inf"), 0.0, a_max), tl.where(b_max == float("-inf"), 0.0, b_max)
    weight = tl.exp(a - am)
    term = tl.where(weight == 0.0, 0.0, weight * ((a - am) - (b - bm)))
    left = tl.exp(old_a - am)
    moved = ratio + old_sum * ((old_a - am) - (old_b - bm))
    ratio = tl.where(left == 0.0, 0.0, moved * left) + tl.sum(term, 0)
    return a_max, a_sum, b_max, b_sum, ratio


@triton.jit
def _grow_apart(a, b, a_max, a_sum, b_max, b_sum, apart):
    """One block of both logsumexps and of the difference of their sums, sum exp(a - a_max) - exp(b - b_max), which is
    taken entry by entry: of the sums themselves it would have the rounding."""
    old_a, old_b, old_sum = a_max, b_max, a_sum
    a_max, a_sum = _grow(a, a_max, a_sum)
    b_max, b_sum = _grow(b, b_max, b_sum)
    am, bm = tl.where(a_max == float("-inf"), 0.0, a_max), tl.where(b_max == float("-inf"), 0.0, b_max)
    weight = tl.exp(b - bm)
    d = (a - b) - (am - bm)
    term = tl.where(tl.abs(d) < 1 / 256, weight * (d + d * d * 0.5), tl.exp(a - am) - weight)
    left_a, left_b = tl.exp(old_a - am), tl.exp(old_b - bm)
    d = (old_a - am) - (old_b - bm)
    moved = tl.where(tl.abs(d) < 1 / 256, left_b * (d + d * d * 0.5), left_a - left_b)
    return a_max, a_sum, b_max, b_sum, apart * left_b + old_sum * moved + tl.sum(term, 0)


@triton.jit
def _log_ratio(a, b, apart):
    """log(a / b) for apart = a - b, precise where they are close."""
    x = apart / b
    return tl.where(tl.abs(x) < 0.35, _log1p(x), tl.log(a) - tl.log(b))


# How many rows count is another number in each step, not worth a variant of a kernel.
@triton.jit(do_not_specialize=["n"])
def statistics_kernel(
    z_ptr, t_ptr, rows_ptr, labels_ptr, out_ptr, z_stride, t_stride, vocab, n, z_scale, t_scale, taid,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr, TAID: tl.constexpr,
    HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (6, n): lse of the student, of the teacher, of the untempered student; reverse KL; the
    label's logit (0 if it is another rank's); the first lse less the second, without their rounding. For cosine the
    first two are the squared norms, and the fourth is the product."""
    row = _row(rows_ptr, HAS_ROWS)
    pid = tl.program_id(0)
    z_base, t_base = row * z_stride, row * t_stride
    z_max, z_sum = float("-inf"), 0.0
    t_max, t_sum = float("-inf"), 0.0
    one_max, one_sum = float("-inf"), 0.0
    # sum of exp(u - z_max) * ((u - z_max) - (v - t_max)), for the reverse KL; for cosine, of z * t
    ratio = 0.0
    apart = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(z_ptr, z_base, columns, vocab, float("-inf"))
        if CE and TEMPERED:
            one_max, one_sum = _grow(z, one_max, one_sum)
        if DIVERGENCE == "none":
            z_max, z_sum = _grow(z * z_scale, z_max, z_sum)
        else:
            t = _load(t_ptr, t_base, columns, vocab, float("-inf"))
            if DIVERGENCE == "cosine":
                out = (z == float("-inf")) | (t == float("-inf"))
                z, t = tl.where(out, 0.0, z), tl.where(out, 0.0, t)
                z_sum += tl.sum(z * z, 0)
                t_sum += tl.sum(t * t, 0)
                ratio += tl.sum(z * t, 0)
            elif DIVERGENCE == "mse":
                if CE:
                    z_max, z_sum = _grow(z, z_max, z_sum)
            else:
                u, v = z * z_scale, t * t_scale
                if TAID:
                    v = (1 - taid) * u + taid * v
                if DIVERGENCE == "reverse_kl":
                    z_max, z_sum, t_max, t_sum, ratio = _grow_kl(u, v, z_max, z_sum, t_max, t_sum, ratio)
                elif DIVERGENCE == "forward_kl" or DIVERGENCE == "tvd":
                    z_max, z_sum, t_max, t_sum, apart = _grow_apart(u, v, z_max, z_sum, t_max, t_sum, apart)
                else:
                    z_max, z_sum = _grow(u, z_max, z_sum)
                    t_max, t_sum = _grow(v, t_max, t_sum)
    if DIVERGENCE == "cosine":
        tl.store(out_ptr + pid, z_sum)
        tl.store(out_ptr + n + pid, t_sum)
        tl.store(out_ptr + 3 * n + pid, ratio)
    else:
        tl.store(out_ptr + pid, z_max + tl.log(z_sum))
        tl.store(out_ptr + n + pid, t_max + tl.log(t_sum))
    if CE and TEMPERED:
        tl.store(out_ptr + 2 * n + pid, one_max + tl.log(one_sum))
    if DIVERGENCE != "none" and DIVERGENCE != "cosine" and DIVERGENCE != "mse":
        # The logs as one, since their difference is small where the two sides are close. What is left of their rounding
        # goes with the projection of the gradient, which forward KL has not, and is second order in values but tvd's.
        if DIVERGENCE != "forward_kl" and DIVERGENCE != "tvd":
            apart = z_sum - t_sum
        logs = _log_ratio(z_sum, t_sum, apart)
        tl.store(out_ptr + 5 * n + pid, (z_max - t_max) + logs)
        if DIVERGENCE == "reverse_kl":
            # E[(u - z_max) - (v - t_max)] less that: small numbers only.
            tl.store(out_ptr + 3 * n + pid, ratio / z_sum - logs)
    if CE:
        label = tl.load(labels_ptr + pid)
        logit = tl.load(z_ptr + z_base + tl.maximum(label, 0), mask=label >= 0, other=0.0).to(tl.float32)
        tl.store(out_ptr + 4 * n + pid, logit)


@triton.jit
def _logs(z, t, z_scale, t_scale, taid, z_lse, t_lse, shift, TAID: tl.constexpr):
    """p, q and r = log q - log p, with some r where both are 0. r is made of the scores, whose difference is exact
    where they are close, and the difference `shift` of the normalisers."""
    u, v = z * z_scale, t * t_scale
    if TAID:
        v = (1 - taid) * u + taid * v
    p, q = tl.exp(v - t_lse), tl.exp(u - z_lse)
    return p, q, tl.where(u == v, 0.0, u - v) - shift


@triton.jit
def _clamp(r):
    # minimum and maximum would drop a NaN, which must stay visible
    r = tl.where(r > 80.0, 80.0, r)
    return tl.where(r < -80.0, -80.0, r)


@triton.jit
def _mixture(r, lam):
    """log(m / b) and m / b - 1 over m / b of m = (1 - lam) a + lam b for r = log(a / b), as in gradients.py."""
    r = _clamp(r)
    x = (1 - lam) * _expm1(r)
    ratio = (1 - lam) * tl.exp(r) + lam
    return tl.where(x < -0.5, tl.log(ratio), _log1p(x)), x / ratio


@triton.jit
def _terms(p, q, r, beta, lam, vocab_all, DIVERGENCE: tl.constexpr):
    """(value, slope) per entry: D = sum value, dD/du = q * (slope - sum q slope), but for forward KL, whose slope is
    the gradient itself. In the KLs no value is negative: where p and q are close, a log(a / b) + b - a is a times
    `_expm1_less` of log(b / a)."""
    if DIVERGENCE == "forward_kl":
        rest = _expm1_less(r)
        near = tl.abs(r) < 0.35
        slope = tl.where(near, p * (r + rest), q - p)
        value = tl.where(near, p * rest, slope - tl.where(p == 0.0, 0.0, p * r))
    elif DIVERGENCE == "reverse_kl":
        slope = tl.where(q == 0.0, 0.0, r)
        value = tl.where(tl.abs(r) < 0.35, q * _expm1_less(-r), q * slope + (p - q))
    elif DIVERGENCE == "jsd":
        # The smaller weight goes into the logarithm, as in gradients.jsd.
        small = beta < 0.5
        r = _clamp(r)
        weight = tl.where(small, beta, 1 - beta)
        towards = tl.where(small, -r, r)
        x = _log1p(weight * _expm1(towards))
        m = tl.where(small, r + x, x)  # log m - log p
        slope = (1 - beta) * tl.where(small, -x, r - x)
        near = (1 - weight) * tl.where(small, q, p) * _expm1_less(x)
        near += weight * tl.where(small, p, q) * _expm1_less(x - towards)
        value = tl.where(tl.abs(r) < 0.35, near, q * slope - beta * p * m)
    elif DIVERGENCE == "skew_kl":
        log_m, x = _mixture(r, lam)  # log(m / p), 1 - p / m
        value = tl.where(tl.abs(log_m) < 0.35, p * _expm1_less(log_m), (1 - lam) * (q - p) - p * log_m)
        slope = (1 - lam) * x
    elif DIVERGENCE == "skew_reverse_kl":
        log_m, x = _mixture(-r, lam)  # log(m / q), 1 - q / m
        value = tl.where(tl.abs(log_m) < 0.35, q * _expm1_less(log_m), (1 - lam) * (p - q) - q * log_m)
        slope = lam * x - log_m
    elif DIVERGENCE == "probability_mse":
        difference = tl.where(tl.abs(r) < 0.35, p * (r + _expm1_less(r)), q - p)
        slope = difference * (2 / vocab_all)
        value = difference * difference / vocab_all
    else:
        tl.static_assert(DIVERGENCE == "tvd")
        difference = tl.where(tl.abs(r) < 0.35, p * (r + _expm1_less(r)), q - p)
        value = tl.abs(difference) * 0.5
        slope = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
    return value, slope


@triton.jit
def _raw(z, t, z_norm, t_norm, vocab_all, DIVERGENCE: tl.constexpr):
    """(value, difference, z) per entry for the divergences of raw logits."""
    out = (z == float("-inf")) | (t == float("-inf"))
    z, t = tl.where(out, 0.0, z), tl.where(out, 0.0, t)
    if DIVERGENCE == "cosine":
        z, t = z / z_norm, t / t_norm
        difference = z - t
        value = difference * difference * 0.5
    else:
        difference = z - t
        value = difference * difference / vocab_all
    return value, difference, z


@triton.jit(do_not_specialize=["n"])
def sums_kernel(
    z_ptr, t_ptr, rows_ptr, stats_ptr, out_ptr,
    z_stride, t_stride, vocab, vocab_all, n, z_scale, t_scale, taid, beta, lam,
    DIVERGENCE: tl.constexpr, TAID: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (6, n): the value and sum q * slope; for probability_mse also sum d, d * p, p * p and q * p of d = q - p, by
    which `_recentred` takes the rounding of the normalisers out."""
    row = _row(rows_ptr, HAS_ROWS)
    pid = tl.program_id(0)
    z_lse, t_lse, shift = tl.load(stats_ptr + pid), tl.load(stats_ptr + n + pid), tl.load(stats_ptr + 5 * n + pid)
    total, projected = 0.0, 0.0
    gap, d_p, p_p, q_p = 0.0, 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(z_ptr, row * z_stride, columns, vocab, float("-inf"))
        t = _load(t_ptr, row * t_stride, columns, vocab, float("-inf"))
        if DIVERGENCE == "mse" or DIVERGENCE == "cosine":
            value, _, _ = _raw(z, t, z_lse, t_lse, vocab_all, DIVERGENCE)
        else:
            p, q, r = _logs(z, t, z_scale, t_scale, taid, z_lse, t_lse, shift, TAID)
            value, slope = _terms(p, q, r, beta, lam, vocab_all, DIVERGENCE)
            projected += tl.sum(q * slope, 0)
            if DIVERGENCE == "probability_mse":
                difference = slope * (vocab_all / 2)
                gap += tl.sum(difference, 0)
                d_p += tl.sum(difference * p, 0)
                p_p += tl.sum(p * p, 0)
                q_p += tl.sum(q * p, 0)
        total += tl.sum(value, 0)
    tl.store(out_ptr + pid, total)
    tl.store(out_ptr + n + pid, projected)
    if DIVERGENCE == "probability_mse":
        tl.store(out_ptr + 2 * n + pid, gap)
        tl.store(out_ptr + 3 * n + pid, d_p)
        tl.store(out_ptr + 4 * n + pid, p_p)
        tl.store(out_ptr + 5 * n + pid, q_p)


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    z_ptr, t_ptr, grad_ptr, rows_ptr, labels_ptr, stats_ptr, sums_ptr, kd_row_ptr, ce_row_ptr, value_ptr,
    z_stride, t_stride, grad_stride, vocab, vocab_all, n, z_scale, t_scale, taid, beta, lam,
    DIVERGENCE: tl.constexpr, IN_SWEEP: tl.constexpr, CE: tl.constexpr, TEMPERED: tl.constexpr,
    TAID: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = kd_row * dD/du + ce_row * (softmax(z) - onehot), and with `IN_SWEEP` the value of D. For `none` the
    gradient is kd_row * exp(u - lse)."""
    row = _row(rows_ptr, HAS_ROWS)
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
        one_lse = z_lse
        if TEMPERED:
            one_lse = tl.load(stats_ptr + 2 * n + pid)
    total = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(z_ptr, row * z_stride, columns, vocab, float("-inf"))
        if DIVERGENCE == "none":
            grad = kd_row * tl.exp(z * z_scale - z_lse)
        else:
            t = _load(t_ptr, row * t_stride, columns, vocab, float("-inf"))
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
                total += tl.sum(value, 0)
        if CE:
            onehot = tl.where(columns == label, 1.0, 0.0)
            grad += ce_row * (tl.exp(z - one_lse) - onehot)
        tl.store(grad_ptr + row * grad_stride + columns, grad, mask=columns < vocab)
    tl.store(value_ptr + pid, total)

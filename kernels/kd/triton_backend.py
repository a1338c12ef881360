"""The distillation losses in Triton: one program per row, sweeping the vocabulary in blocks.

`_statistics` finds the log-normalisers of both sides in one online sweep, `_sums` the row sums that the
gradients of JSD, skewed KL, total variation, MSE of probabilities and cosine need, `_gradient` writes the gradient
(in place if asked) and sums the value on the way. In reads or writes of one (rows, vocab) array that is 2 + 3 = 5 for
forward and reverse KL and 2 + 2 + 3 = 7 for the others; the hard-label cross-entropy rides along. Without a gradient it
is 4 (and 2 for mse): the statistics would have the value of forward and reverse KL too, but only to the reference's
precision, ten to a hundred times less than that of a second sweep where student and teacher are close. All
arithmetic is float32.

Matrix products stay with the vendor's library: from hidden states the chunked backend's loop runs with
`tile`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk.kernels.kd import chunked as kd_chunked
from mohawk.kernels.kd import tile as kd_tile
from mohawk.kernels.kd.options import KDTask, Options, RowLosses
from mohawk.kernels.kd.scores import Scores
from mohawk.kernels.kd.teachers import TeacherSamples, TeacherTopK
from mohawk.kernels.kd.vocabulary import VocabularySlice, exchange, whole_kl

BACKEND = "triton"  # as `mohawk doctor` names it

# 4096 wide with 8 warps is 16 elements of each array per thread: enough loads in flight.
BLOCK = 4096
WARPS = 8
# Left to itself, ptxas saves registers to fit more programs, and keeps one or two numbers of a thread in memory for
# it: in which kernels differs from one triton to the next, whatever the block (of 2048 and 4096 with 4, 8 and 16 warps
# each spills somewhere by 3.6 or 3.9). With leave to take 128, which two programs on a multiprocessor have at these
# warps, nothing spills on any of the architectures that kd_triton_report compiles for, by triton 3.6, 3.8 or 3.9.
REGISTERS = 128
# Those that `_terms` and `_raw` know. Where the gradient needs no sum over the vocabulary beside the statistics, the
# value is summed up while the gradient is written; with the others `_sums` comes first.
IN_SWEEP = ("forward_kl", "reverse_kl", "mse", "cosine")
SUMS_FIRST = ("jsd", "skew_kl", "skew_reverse_kl", "tvd", "probability_mse")
IN_TRITON = (*IN_SWEEP, *SUMS_FIRST)


def launch(nvidia: bool) -> dict[str, int | bool]:
    """Options of a launch; AMD's compiler knows no limit of registers. Products are fused with sums where they can be,
    which triton does by itself only up to 3.9."""
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    return options | {"maxnreg": REGISTERS} if nvidia else options


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
def _statistics(
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
def _sums(
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
def _gradient(
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


@dataclass
class _Sweeps:
    """The kernels on one set of rows: student z and teacher t (None: no teacher) of
    `options.vocabulary.local` columns, each a row's beside the next in memory, `rows` of them or all, with the factors
    that make them tempered scores."""

    z: Tensor
    t: Tensor | None
    rows: Tensor | None
    labels: Tensor | None
    scale: Tensor
    options: Options
    z_scale: float
    t_scale: float = 1.0
    taid: float | None = None

    def __post_init__(self):
        self.kind = "none" if self.t is None else self.options.settings.divergence
        self.ce = self.options.need_ce
        # The untempered log-normaliser is kept apart where the first two statistics are something else.
        self.tempered = self.z_scale != 1.0 or self.kind == "cosine" or self.t is None
        self.n, vocabulary = len(self.scale), self.options.vocabulary
        self.columns = self.scale
        if self.labels is not None and self.ce:
            columns, ours = vocabulary.locate(self.labels)
            self.columns = (columns if ours is None else torch.where(ours, columns, -1)).contiguous()
        self.teacher = self.z if self.t is None else self.t
        self.strides = (self.z.stride(0), self.teacher.stride(0))
        self.numbers = (self.z_scale, self.t_scale, 0.0 if self.taid is None else self.taid)
        self.flags = {
            "DIVERGENCE": self.kind,
            "TAID": self.taid is not None,
            "HAS_ROWS": self.rows is not None,
            "BLOCK": min(BLOCK, max(16, triton.next_power_of_2(vocabulary.local))),
            **launch(nvidia=torch.version.hip is None),
        }
        self.row_index = self.scale if self.rows is None else self.rows

    def statistics(self, own: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `_statistics` makes, over all ranks, in one collective. Along goes the sum over the ranks of `own`
        (rows, k)."""
        vocabulary, stats = self.options.vocabulary, self.scale.new_zeros(6, self.n)
        needed = self.kind != "mse" or self.ce
        if self.n and needed:
            _statistics[(self.n,)](
                self.z, self.teacher, self.row_index, self.columns, stats, *self.strides, vocabulary.local,
                self.n, *self.numbers, CE=self.ce, TEMPERED=self.tempered, **self.flags,
            )  # fmt: skip
        if vocabulary.group is None or not needed:
            return stats, own
        everyone = vocabulary.every(stats[:4].T if own is None else torch.cat([stats[:4].T, own], -1))
        z, t, raw, ratio = everyone[..., :4].unbind(-1)
        stats[2] = torch.logsumexp(raw, 0)
        if self.kind == "cosine":
            stats[0], stats[1], stats[3] = z.sum(0), t.sum(0), ratio.sum(0)
        else:
            stats[0], stats[1] = torch.logsumexp(z, 0), torch.logsumexp(t, 0)
            stats[5] = stats[0] - stats[1]
            if self.kind == "reverse_kl":
                stats[3] = whole_kl(z, t, ratio)
        return stats, None if own is None else everyone[..., 4:].sum(0)

    def cross_entropy(self, stats: Tensor) -> Tensor:
        if not self.ce:
            return self.scale.new_zeros(self.n)
        normaliser = stats[2] if self.tempered else stats[0]
        return torch.where(self.columns >= 0, normaliser - stats[4], 0.0)

    def sums(self, stats: Tensor) -> Tensor:
        out, o = stats.new_zeros(6, self.n), self.options
        if self.n:
            _sums[(self.n,)](
                self.z, self.teacher, self.row_index, stats, out, *self.strides, o.vocabulary.local,
                o.vocabulary.size, self.n, *self.numbers, o.settings.beta, o.settings.lam, **self.flags,
            )  # fmt: skip
        return out

    def gradient(
        self, stats: Tensor, projected: Tensor, kd_row: Tensor, grad: Tensor, in_sweep: bool = False
    ) -> Tensor:
        """Into `grad`; returns the value if `in_sweep`."""
        value, o = stats.new_zeros(self.n), self.options
        if self.n:
            _gradient[(self.n,)](
                self.z, self.teacher, grad, self.row_index, self.columns, stats, projected, kd_row,
                self.scale * o.settings.ce_weight, value, *self.strides, grad.stride(0), o.vocabulary.local,
                o.vocabulary.size, self.n, *self.numbers, o.settings.beta, o.settings.lam,
                IN_SWEEP=in_sweep, CE=self.ce, TEMPERED=self.tempered, **self.flags,
            )  # fmt: skip
        return value


def _recentred(sums: Tensor, vocabulary: VocabularySlice) -> tuple[Tensor, Tensor, Tensor]:
    """value, sum q * slope and sum d of probability_mse, where both sides sum to one and so sum d to 0.

    What is left of it is a relative error of p that all entries share, the rounding of the log-normalisers: with it
    taken out, d is as precise as p itself while the two sides come together.
    """
    projected, gap, q_p = vocabulary.total(sums[[1, 2, 5]])
    value = sums[0] + (gap.square() * sums[4] - 2 * gap * sums[3]) / vocabulary.size
    return value, projected - 2 * gap * q_p / vocabulary.size, gap


def _dense(sweeps: _Sweeps, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """This rank's part of kd (with T^2) and ce of each row; `grad` may be the student's own memory."""
    kind, options = sweeps.kind, sweeps.options
    vocabulary, temperature = options.vocabulary, options.settings.temperature
    if grad is not None and kind != "none" and options.settings.kd_weight == 0.0:  # wanted for its value alone
        kd, _ = _dense(sweeps, None)
        return kd, _dense(replace(sweeps, t=None), grad)[1]
    stats, _ = sweeps.statistics()
    ce = sweeps.cross_entropy(stats)
    value, nothing = stats.new_zeros(sweeps.n), 0.0
    projected, norms = stats[3].contiguous(), None
    if kind == "cosine":
        norms = stats[:2].sqrt()
        stats[:2] = norms.clamp_min(1e-8)
        # Vectors of norm 0: as in gradients.cosine.
        nothing = vocabulary.once((1 - (norms / stats[:2]).square()).sum(0) / 2)
        projected = 1 - projected / (stats[0] * stats[1])
    # Cosine alone could do without its sums, as it does where a sweep less is a collective less; with them its
    # gradient is as precise as its value while the two sides come together.
    first = kind in SUMS_FIRST or kind == "cosine" and vocabulary.group is None
    if kind != "none" and (first or grad is None):
        sums = sweeps.sums(stats)
        value = sums[0] + nothing
        if kind == "probability_mse":
            value, projected, stats[3] = _recentred(sums, vocabulary)
        elif grad is not None:
            projected = value if kind == "cosine" else vocabulary.total(sums[1])
    if grad is not None:
        kd_row = sweeps.scale * (options.settings.kd_weight * temperature if kind != "none" else 0.0)
        if kind == "cosine":
            kd_row = torch.where(norms[0] > 1e-8, kd_row, 0.0)
        in_sweep = not first and kind != "none"
        swept = sweeps.gradient(stats, projected, kd_row, grad, in_sweep)
        value = swept + nothing if in_sweep else value
    return value * temperature**2, ce


def _topk(sweeps: _Sweeps, task: KDTask, span: tuple[int, int], want_grad: bool):
    """Buckets: the ids taken out of the sweeps by -inf, their k columns in torch."""
    ids, lp, tail = kd_tile.take_topk(task, span, sweeps.z.dtype)
    o, z, scale = sweeps.options, sweeps.z, sweeps.scale
    vocabulary, inverse = o.vocabulary, sweeps.z_scale
    labels = sweeps.labels if sweeps.ce else None
    at_label = None if labels is None else vocabulary.gather(z, labels[:, None]).squeeze(1)
    own = vocabulary.gather(z, ids)
    # Not into z, which is the caller's own where no gradient is wanted.
    sweeps = replace(sweeps, z=vocabulary.scatter(z, ids, float("-inf")))
    stats, chosen = sweeps.statistics(own)
    assert chosen is not None
    buckets = torch.cat([chosen * inverse, stats[:1].T], -1)
    scores = torch.cat([lp, tail[:, None]], -1)
    want = want_grad and o.settings.kd_weight != 0.0
    value, bucket_grad = kd_tile.distribution(scores, buckets, None, o, want)
    ce = stats.new_zeros(len(z))
    if labels is not None and at_label is not None:
        stats[2] = torch.logaddexp(stats[2], torch.logsumexp(chosen, -1))
        _, ours = vocabulary.locate(labels)
        ce = stats[2] - at_label if ours is None else torch.where(ours, stats[2] - at_label, 0.0)
    if want_grad:
        stats[0].clamp_(min=torch.finfo(stats.dtype).min)  # nothing left: -inf - -inf
        factor = scale * (o.settings.kd_weight * o.settings.temperature)
        rest_row = factor * bucket_grad[:, -1] if want else torch.zeros_like(scale)
        sweeps.gradient(stats, stats[3], rest_row, z)
        at_ids = torch.zeros_like(chosen)
        if bucket_grad is not None:
            at_ids += factor[:, None] * bucket_grad[:, :-1]
        if sweeps.ce:
            at_ids += (scale * o.settings.ce_weight)[:, None] * torch.exp(chosen - stats[2][:, None])
        vocabulary.scatter_add(z, ids, at_ids)
    return vocabulary.once(value) * o.settings.temperature**2, ce


def _samples(sweeps: _Sweeps, task: KDTask, span: tuple[int, int], want_grad: bool):
    ids, weights = kd_tile.take_samples(task, span, sweeps.z.dtype)
    o, z = sweeps.options, sweeps.z
    stats, _ = sweeps.statistics()
    _, ours = o.vocabulary.locate(ids)
    log_q = o.vocabulary.gather(z, ids) * sweeps.z_scale - stats[0][:, None]
    counted = weights if ours is None else weights * ours
    value = -(weights * log_q.masked_fill(counted == 0, 0.0)).sum(-1)
    ce = sweeps.cross_entropy(stats)
    if want_grad:
        factor = sweeps.scale * (o.settings.kd_weight * o.settings.temperature)
        sweeps.gradient(stats, stats[3], factor * weights.sum(-1), z)
        o.vocabulary.scatter_add(z, ids, -factor[:, None] * weights)
    return value * o.settings.temperature**2, ce


# Of sources that are not dense; torch's tile takes the others.
SWEPT = {TeacherTopK: _topk, TeacherSamples: _samples}


def from_logits(logits: Tensor, task: KDTask, grad: Tensor | None) -> RowLosses:
    """As chunked.from_logits. Teachers that are logits are read where they are, without a copy of anything."""
    teacher, options = task.teacher, task.options
    parts, step = teacher.parts(), teacher.step
    target = parts[0].stored() if parts and teacher.shares() is None else None
    if target is None or options.on_logits and parts[0] is not teacher:
        return kd_chunked.from_logits(logits, task, grad, tile=tile)
    inverse = 1.0 / options.settings.temperature if options.need_kd else 1.0
    taid = step if 0.0 < step < 1.0 else None
    target = target if step else logits
    logits, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, target))
    target = target if options.need_kd else None
    sweeps = _Sweeps(logits, target, task.rows, task.labels, task.scale, options, inverse, inverse, taid)
    return kd_chunked.summed(*_dense(sweeps, grad), options)


def _target(scores: Scores, span: tuple[int, int], student: Tensor) -> Tensor:
    """The teacher's scores. Where ranks share the vocabulary, a mixture takes a collective of its own: the sweeps
    that find all else read it whole."""
    vocabulary, parts, norms = scores.options.vocabulary, scores.unnormalised(*span, student), None
    if vocabulary.group is not None and scores.shares is not None:
        parts = list(parts)
        norms = exchange(vocabulary, None, None, parts).teachers
    return scores.combined(parts, norms, student)


def tile(z: Tensor, task: KDTask, scores: Scores, span: tuple[int, int], want_grad: bool) -> tuple[Tensor, Tensor]:
    """As tile.torch_tile: kd and ce of the rows of z, which becomes the gradient."""
    options = task.options
    if z.stride(-1) != 1 and z.shape[-1] > 1:
        whole = z.contiguous()
        rows = tile(whole, task, scores, span, want_grad)
        if want_grad:
            z.copy_(whole)
        return rows
    if options.need_kd and not scores.parts and type(task.teacher) not in SWEPT:
        return kd_tile.torch_tile(z, task, scores, span, want_grad)
    inverse = 1.0 / options.settings.temperature if options.need_kd else 1.0
    part = slice(*span)
    labels = None if task.labels is None else task.labels[part]
    sweeps = _Sweeps(z, None, None, labels, task.scale[part], options, inverse)
    if options.need_kd and not scores.parts:
        return SWEPT[type(task.teacher)](sweeps, task, span, want_grad)
    if options.need_kd:
        student = z if inverse == 1.0 else z * inverse
        target = _target(scores, span, student)
        sweeps = replace(sweeps, t=target if target.stride(-1) == 1 else target.contiguous())
    return _dense(sweeps, z if want_grad else None)

"""The distillation losses on GPUs, by the kernels of triton_kernels.py.

Matrix products stay with the vendor's library: from hidden states the chunked backend's loop runs with `tile`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from mohawk.kernels.common.triton_rows import lattice
from mohawk.kernels.kd import chunked as kd_chunked
from mohawk.kernels.kd import tile as kd_tile
from mohawk.kernels.kd.options import KDTask, Options, RowLosses
from mohawk.kernels.kd.teachers import TeacherSamples, TeacherTopK
from mohawk.kernels.kd.tile import Scores
from mohawk.kernels.kd.triton_kernels import (
    gradient_kernel,
    merge_kernel,
    statistics_kernel,
    sums_kernel,
    times_kernel,
)
from mohawk.kernels.kd.vocabulary import VocabularySlice, exchange, whole_kl

BACKEND = "triton"  # as `mohawk doctor` names it

# 4096 wide with 8 warps is 16 elements of each array per thread: enough loads in flight.
BLOCK = 4096
WARPS = 8
# Programs that a multiprocessor has at once, at most, with these; where rows are fewer, several programs share one.
PROGRAMS = 4
# Left to itself, ptxas saves registers to fit more programs, and keeps one or two numbers of a thread in memory for
# it: in which kernels differs from one triton to the next, whatever the block (of 2048 and 4096 with 4, 8 and 16 warps
# each spills somewhere by 3.6 or 3.9). With leave to take 128, which two programs on a multiprocessor have at these
# warps, nothing spills on any of the architectures that triton_report.py compiles for, by triton 3.6, 3.8 or 3.9.
REGISTERS = 128
# Those that the kernels have terms for. Where the gradient needs no sum over the vocabulary beside the statistics, the
# value is summed up while the gradient is written; with the others `sums_kernel` comes first.
IN_SWEEP = ("forward_kl", "reverse_kl", "mse", "cosine")
SUMS_FIRST = ("jsd", "skew_kl", "skew_reverse_kl", "tvd", "probability_mse")
IN_TRITON = (*IN_SWEEP, *SUMS_FIRST)


def launch(nvidia: bool) -> dict[str, int | bool]:
    """Options of a launch; AMD's compiler knows no limit of registers. Products are fused with sums where they can be,
    which triton does by itself only up to 3.9."""
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    return options | {"maxnreg": REGISTERS} if nvidia else options


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits(rows: int, blocks: int, device: torch.device) -> int:
    """How many programs share a row, so that a few rows occupy all of a GPU."""
    processors = _processors(device)
    if rows >= 2 * processors:
        return 1
    return max(1, min(blocks, triton.cdiv(PROGRAMS * processors, max(1, rows))))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous, times a number on its device, in place. No memory is read or written where that is 1, as the
    gradient of a loss mostly is; to ask on the host would be to wait for the GPU."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        times_kernel[(PROGRAMS * _processors(x.device),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return x


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
        scales = (None if one == 1.0 else one for one in (self.z_scale, self.t_scale))
        self.numbers = (*scales, 0.0 if self.taid is None else self.taid)
        block = min(BLOCK, max(16, triton.next_power_of_2(vocabulary.local)))
        self.splits = splits(self.n, triton.cdiv(vocabulary.local, block), self.z.device)
        self.place, aligned, group = lattice(self.z, self.teacher)
        self.flags = {
            "DIVERGENCE": self.kind,
            "HAS_ROWS": self.rows is not None,
            **launch(nvidia=torch.version.hip is None),
        }
        self.sweep = {
            "TAID": self.taid is not None,
            "Z_ALIGNED": aligned[0],
            "T_ALIGNED": aligned[1],
            "BLOCK": block,
            "GROUP": group,
            **self.flags,
        }
        self.row_index = self.scale if self.rows is None else self.rows

    def statistics(self, own: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `merge_kernel` makes, over all ranks, in one collective. Along goes the sum over the ranks of `own`
        (rows, k)."""
        vocabulary, stats = self.options.vocabulary, self.scale.new_zeros(6, self.n)
        needed = self.kind != "mse" or self.ce
        if self.n and needed:
            parts = self.scale.new_empty(7, self.splits, self.n)
            ce = {"CE": self.ce, "TEMPERED": self.tempered}
            statistics_kernel[(self.n, self.splits)](
                self.z, self.teacher, self.row_index, parts, *self.strides, vocabulary.local, self.n, *self.place,
                *self.numbers, **ce, **self.sweep,
            )  # fmt: skip
            merge_kernel[(self.n,)](
                self.z, self.row_index, self.columns, parts, stats, self.strides[0], self.n, self.splits,
                SPLITS=triton.next_power_of_2(self.splits), **ce, **self.flags | {"num_warps": 1},
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
        out, o = stats.new_zeros(6, self.splits, self.n), self.options
        if self.n:
            sums_kernel[(self.n, self.splits)](
                self.z, self.teacher, self.row_index, stats, out, *self.strides, o.vocabulary.local,
                o.vocabulary.size, self.n, *self.place, *self.numbers, o.settings.beta, o.settings.lam, **self.sweep,
            )  # fmt: skip
        return out.sum(1)

    def gradient(
        self, stats: Tensor, projected: Tensor, kd_row: Tensor, grad: Tensor, in_sweep: bool = False
    ) -> Tensor:
        """Into `grad`; returns the value if `in_sweep`."""
        value, o = stats.new_zeros(self.splits, self.n), self.options
        if self.n:
            place, (z, t, to), group = lattice(self.z, self.teacher, grad)
            aligned = {"Z_ALIGNED": z, "T_ALIGNED": t, "GRAD_ALIGNED": to, "GROUP": group}
            gradient_kernel[(self.n, self.splits)](
                self.z, self.teacher, grad, self.row_index, self.columns, stats, projected, kd_row,
                self.scale * o.settings.ce_weight, value, *self.strides, grad.stride(0), o.vocabulary.local,
                o.vocabulary.size, self.n, *place, *self.numbers, o.settings.beta, o.settings.lam,
                IN_SWEEP=in_sweep, CE=self.ce, TEMPERED=self.tempered, **self.sweep | aligned,
            )  # fmt: skip
        return value.sum(0)


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


def tile(
    z: Tensor, task: KDTask, scores: Scores, span: tuple[int, int], want_grad: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As tile.torch_tile: kd and ce of the rows of z, which becomes the gradient, or that goes `into` another array."""
    options = task.options
    if z.stride(-1) != 1 and z.shape[-1] > 1:
        whole = z.contiguous()
        rows = tile(whole, task, scores, span, want_grad, into)
        if want_grad and into is None:
            z.copy_(whole)
        return rows
    if options.need_kd and not scores.parts and type(task.teacher) not in SWEPT:
        return kd_tile.torch_tile(z, task, scores, span, want_grad, into)
    inverse = 1.0 / options.settings.temperature if options.need_kd else 1.0
    part = slice(*span)
    labels = None if task.labels is None else task.labels[part]
    sweeps = _Sweeps(z, None, None, labels, task.scale[part], options, inverse)
    if options.need_kd and not scores.parts:
        rows = SWEPT[type(task.teacher)](sweeps, task, span, want_grad)
        if want_grad and into is not None:  # its columns apart are added to the gradient in float32
            into.copy_(z)
        return rows
    if options.need_kd:
        student = z if inverse == 1.0 else z * inverse
        target = _target(scores, span, student)
        sweeps = replace(sweeps, t=target if target.stride(-1) == 1 else target.contiguous())
    return _dense(sweeps, None if not want_grad else z if into is None else into)

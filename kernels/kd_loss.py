"""`kd_loss` and `linear_kd_loss`: knowledge distillation with everything a vocabulary brings along.

`kd_weight * T^2 * D(teacher, student) + ce_weight * CE`, from logits or from hidden states and head weights.
The gradient is made in the forward (kd_chunked.py, kd_triton.py) unless `reduction` is "none".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mohawk.kernels import kd_checks, kd_chunked, kd_reference
from mohawk.kernels.kd_chunked import Options
from mohawk.kernels.kd_teachers import (
    TAIDSchedule,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
)

__all__ = [
    "KDParts",
    "TAIDSchedule",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherSamples",
    "TeacherTAID",
    "TeacherTopK",
    "kd_loss",
    "linear_kd_loss",
]


class KDParts(NamedTuple):
    """The two terms, reduced like the loss, detached, before `kd_weight` and `ce_weight`: `kd` has its
    T^2."""

    kd: Tensor
    ce: Tensor


def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | Teacher,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lam: float = 0.1,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDParts]:
    """Distillation loss from the student's logits: `kd_weight * T^2 * D + ce_weight * CE`.

    Args:
        student_logits: (..., vocab), any float dtype; the loss is computed in float32 (float64 from float64).
        teacher: logits (..., vocab), or a teacher source (kd_teachers.py). Gets no gradient.
        labels: (...), int64: row i's target, already aligned (nothing is shifted here). Rows of
            `ignore_index` are skipped by both terms. None: every row counts, and `ce_weight` must be 0.
        divergence: forward_kl, reverse_kl, jsd (with `beta`: beta KL(p, m) + (1 - beta) KL(q, m) for m = beta
            p + (1 - beta) q, as in GKD; 0 is forward and 1 is reverse KL), skew_kl and skew_reverse_kl (with
            `lam`: KL(p, lam p + (1 - lam) q) and KL(q, (1 - lam) p + lam q), as in DistiLLM), tvd; or,
            between raw logits, mse (mean over the vocabulary) and cosine (1 - cosine similarity), which know
            no temperature.
        temperature: T, dividing both sides' logits; the divergence is multiplied by T^2 (Hinton et al. 2015).
            The cross-entropy is at temperature 1.
        token_weights: (...), multiplies the loss of each row; the mean still divides by the number of real
            rows.
        vocab_size: only the first so many entries are real, on either side.
        reduction: mean over the real rows, sum, or none: (...), 0 in ignored rows.
        normalizer: divides instead of the count of real rows (say the count over all accumulation steps and
            ranks).
        return_parts: also return `KDParts(kd, ce)`.
        inplace: write the gradient into `student_logits`, which are lost: no second array of their size is
            made.
        backend: auto, reference, chunked or triton. auto takes triton on a GPU where it is installed.

    Returns:
        The loss, float32 (float64 from float64). With no real row it is 0, and so are the gradients.

    Raises:
        ValueError: anything wrong with shapes, dtypes, devices, options, labels or ids, before any work.
    """
    kd_checks._float("student_logits", student_logits)
    lead = student_logits.shape[:-1]
    vocab = kd_checks.vocab_of("student", student_logits.shape[-1], vocab_size, "logits have")
    job = _prepare(locals(), student_logits, lead, vocab)
    if inplace and (
        not student_logits.is_contiguous() or job.reduction == "none" or job.backend == "reference"
    ):
        raise ValueError(
            "inplace needs contiguous student_logits, reduction 'mean' or 'sum', and no reference backend"
        )
    flat = student_logits.reshape(-1, student_logits.shape[-1])

    if job.backend == "reference":
        student = flat if job.rows is None else flat[job.rows]
        return job.reference(student.to(job.dtype)[:, :vocab], lead)

    def compute(tensors: tuple[Tensor, ...], scale: Tensor, needs: tuple[bool, ...]):
        (logits,) = tensors
        grad = None
        if needs[0]:
            grad = logits if inplace else job.zeros_like(logits)
        rows = kd_chunked.from_logits(logits, job.teacher, job.labels, job.rows, scale, job.options, grad)
        if grad is logits and job.rows is not None:
            ignored = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            ignored[job.rows] = False
            grad[ignored] = 0
        if grad is not None and vocab < grad.shape[1]:
            grad[:, vocab:] = 0
        return rows, (grad,)

    return job.run(compute, (flat,), lead)


def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor | Teacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lam: float = 0.1,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDParts]:
    """`kd_loss` from hidden states and the head: neither model's logits are ever whole.

    Logits are float32 whatever the dtype of hidden states and head, also under autocast, which changes
    nothing here; ignored rows are left out of the matrix products; gradients of the head add up in float32; a
    head or hidden states that need no gradient get none made. The student's and the teacher's hidden sizes
    may differ, and either head may be tied to anything.

    Args:
        student_hidden: (..., hidden), final hidden states after the last norm.
        student_head: (vocab, hidden), nn.Linear's layout, in the dtype of the hidden states (free under
            autocast).
        teacher: usually `TeacherHidden`; also logits (..., vocab) or any other source.
        student_bias: (vocab).
        logit_scale, logit_softcap: logits are `logit_scale * (hidden @ head.T + bias)`, then `logit_softcap *
            tanh(logits / logit_softcap)`.
        Others: see `kd_loss`.

    Returns:
        As `kd_loss`.
    """
    kd_checks.check_head("student", student_hidden, student_head, student_bias, logit_scale, logit_softcap)
    lead = student_hidden.shape[:-1]
    vocab = kd_checks.vocab_of("student", student_head.shape[0], vocab_size, "head has")
    job = _prepare(locals(), student_hidden, lead, vocab)
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])

    if job.backend == "reference":
        with torch.autocast(flat.device.type, enabled=False):
            student = flat if job.rows is None else flat[job.rows]
            logits = kd_reference.head_logits(
                student, student_head, student_bias, logit_scale, logit_softcap, job.dtype
            )
            return job.reference(logits[:, :vocab], lead)

    def compute(tensors: tuple[Tensor, ...], scale: Tensor, needs: tuple[bool, ...]):
        hidden, head = tensors[:2]
        bias = tensors[2] if len(tensors) > 2 else None
        accumulate = {"device": head.device, "dtype": scale.dtype}
        grads = [
            job.zeros_like(hidden) if needs[0] else None,
            torch.zeros(head.shape, **accumulate) if needs[1] else None,
            torch.zeros(bias.shape, **accumulate) if bias is not None and needs[2] else None,
        ]
        rows = kd_chunked.from_hidden(
            hidden,
            head,
            bias,
            logit_scale,
            logit_softcap,
            job.teacher,
            job.labels,
            job.rows,
            scale,
            job.options,
            *grads,
        )
        for k in (1, 2):
            if grads[k] is not None:
                grads[k] = grads[k].to(job.held_dtype(tensors[k]))
        return rows, tuple(grads[: len(tensors)])

    tensors = (flat, student_head) if student_bias is None else (flat, student_head, student_bias)
    return job.run(compute, tensors, lead)


Compute = Callable[
    [tuple[Tensor, ...], Tensor, tuple[bool, ...]], tuple[kd_chunked.Rows, tuple[Tensor | None, ...]]
]


@dataclass
class _Job:
    """One checked call: flat teacher, the rows that count, and what to do with their losses."""

    teacher: Teacher
    labels: Tensor | None  # of the rows that count
    rows: Tensor | None  # their indices; None: all
    scale: Tensor  # of each of these rows in the reduced loss
    options: Options
    dtype: torch.dtype
    backend: str
    reduction: str
    return_parts: bool
    count: int

    @staticmethod
    def held_dtype(x: Tensor) -> torch.dtype:
        # A float16 gradient is multiplied by the loss scale in the backward; before that it would underflow.
        return torch.float32 if x.dtype == torch.float16 else x.dtype

    def zeros_like(self, x: Tensor) -> Tensor:
        """Room for the gradient of x, zero where no row will be written."""
        make = torch.empty if self.rows is None and self.count else torch.zeros
        return make(x.shape, dtype=self.held_dtype(x), device=x.device)

    def finish(self, loss: Tensor, kd: Tensor, ce: Tensor, lead: torch.Size):
        """What the caller gets, from per-row terms of the rows that count and the loss (rows, or reduced)."""

        def spread(rows: Tensor) -> Tensor:
            if self.rows is not None:
                rows = rows.new_zeros(self.count).index_copy(0, self.rows, rows)
            return rows.reshape(lead)

        if self.reduction == "none":
            loss = spread(loss)
        if not self.return_parts:
            return loss
        kd, ce = (kd.detach() * self.scale, ce.detach() * self.scale)
        if self.reduction == "none":
            return loss, KDParts(spread(kd), spread(ce))
        return loss, KDParts(_sum(kd), _sum(ce))

    def weighted(self, kd: Tensor, ce: Tensor) -> Tensor:
        total = kd * self.options.kd_weight if self.options.kd_weight else torch.zeros_like(kd)
        if self.options.ce_weight:
            total = total + ce * self.options.ce_weight
        return total * self.scale

    def reference(self, student: Tensor, lead: torch.Size):
        o = self.options
        with torch.autocast(student.device.type, enabled=False):
            teacher = self.teacher if self.rows is None else _take_rows(self.teacher, self.rows)
            kd, ce = kd_reference.row_losses(
                student,
                teacher,
                self.labels,
                divergence=o.divergence,
                temperature=o.temperature,
                beta=o.beta,
                lam=o.lam,
            )
            rows = self.weighted(kd, ce)
            loss = rows if self.reduction == "none" else rows.sum()
            return self.finish(loss, kd, ce, lead)

    def run(self, compute: Compute, tensors: tuple[Tensor, ...], lead: torch.Size):
        loss, kd, ce = _Loss.apply(self, compute, *tensors)
        return self.finish(loss, kd, ce, lead)


def _sum(rows: Tensor) -> Tensor:
    """Sum in float64: a mean of millions of rows is not where precision should go."""
    return rows.sum(dtype=torch.float64).to(rows.dtype) if rows.device.type != "mps" else rows.sum()


def _keep_graph() -> bool:
    """Whether the backward running now may run again (retain_graph)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class _Loss(torch.autograd.Function):
    """The chunked and triton backends: gradients are made with the loss and handed out in the backward."""

    @staticmethod
    def forward(ctx, job: _Job, compute: Compute, *tensors: Tensor):
        needs = ctx.needs_input_grad[2:]
        with torch.autocast(tensors[0].device.type, enabled=False):
            if job.reduction == "none":
                ctx.save_for_backward(*tensors)
                rows, _ = compute(tensors, job.scale, (False,) * len(tensors))
                loss = job.weighted(rows.kd, rows.ce)
            else:
                rows, ctx.grads = compute(tensors, job.scale, needs)
                loss = _sum(job.weighted(rows.kd, rows.ce))
        ctx.job, ctx.compute = job, compute
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.mark_non_differentiable(rows.kd, rows.ce)
        return loss, rows.kd, rows.ce

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        with torch.no_grad(), torch.autocast(grad_loss.device.type, enabled=False):
            grads = _Loss.gradients(ctx, grad_loss)
            grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        if torch.is_grad_enabled():  # create_graph: a second derivative must not come out as zero in silence
            probe = torch.zeros((), requires_grad=True)
            grads = [g if g is None else _NoSecondDerivative.apply(g, probe) for g in grads]
        return None, None, *grads

    @staticmethod
    def gradients(ctx, grad_loss: Tensor):
        if ctx.job.reduction == "none":
            # Each row has its own factor, so the gradients are only made now.
            return ctx.compute(ctx.saved_tensors, ctx.job.scale * grad_loss, ctx.needs_input_grad[2:])[1]
        if ctx.grads is None:
            raise RuntimeError(
                "the gradient of kd_loss was already handed out; use backward(retain_graph=True)"
            )
        keep, grads = _keep_graph(), ctx.grads
        if not keep:
            ctx.grads = None  # so that autograd can take the memory over instead of copying it
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            return [g if g is None else g * grad_loss if keep else g.mul_(grad_loss) for g in grads]
        return [g.clone() if keep and g is not None else g for g in grads]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, probe: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("kd_loss has no second derivative; use backend='reference' for it")


def _map_teacher(teacher: Teacher, f: Callable[[Tensor, int], Tensor]) -> Teacher:
    """The teacher with its per-row tensors replaced; f gets the number of trailing dimensions to keep."""
    if isinstance(teacher, TeacherTAID):
        return replace(teacher, teacher=_map_teacher(teacher.teacher, f))
    if isinstance(teacher, TeacherMixture):
        return replace(teacher, teachers=[_map_teacher(one, f) for one in teacher.teachers])
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(f(teacher.logits, 1))
    if isinstance(teacher, TeacherHidden):
        bias = None if teacher.bias is None else teacher.bias.detach()
        return replace(teacher, hidden=f(teacher.hidden, 1), head=teacher.head.detach(), bias=bias)
    if isinstance(teacher, TeacherTopK):
        tail = None if teacher.tail_logprob is None else f(teacher.tail_logprob, 0)
        return TeacherTopK(f(teacher.ids, 1), f(teacher.logprobs, 1), tail)
    return TeacherSamples(f(teacher.ids, 1), f(teacher.weights, 1))


def _take_rows(teacher: Teacher, rows: Tensor) -> Teacher:
    return _map_teacher(teacher, lambda x, trailing: x[rows])


def _prepare(given: dict, student: Tensor, lead: torch.Size, vocab: int) -> _Job:
    """Check a call and pack its rows. `given` holds the public function's arguments by name."""
    names = (
        "divergence",
        "temperature",
        "kd_weight",
        "ce_weight",
        "beta",
        "lam",
        "reduction",
        "backend",
        "labels",
    )
    kd_checks.check_options(*(given[name] for name in names), given["normalizer"])
    teacher, labels, weights = given["teacher"], given["labels"], given["token_weights"]
    if isinstance(teacher, Tensor):
        teacher = TeacherLogits(teacher)
    divergence, device = given["divergence"], student.device
    kd_checks.check_teacher(teacher, lead, device, vocab, given["vocab_size"], divergence)
    kd_checks.check_rows(labels, weights, lead, device, vocab, given["ignore_index"])

    teacher = _map_teacher(
        teacher, lambda x, trailing: x.detach().reshape(-1, *x.shape[x.dim() - trailing :])
    )
    count = lead.numel()
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    rows, real = None, count
    if labels is not None:
        labels = labels.reshape(-1)
        kept = (labels != given["ignore_index"]).nonzero().squeeze(1)
        real = len(kept)
        if real < count:
            rows, labels = kept, labels[kept]
    scale = torch.ones(real, dtype=dtype, device=device)
    if weights is not None:
        scale = weights.detach().reshape(-1).to(dtype)
        scale = scale.clone() if rows is None else scale[rows]
    if given["reduction"] == "mean" and real:
        normalizer = real if given["normalizer"] is None else given["normalizer"]
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.detach().reshape(()).to(device=device, dtype=dtype)
        scale /= normalizer
    options = Options(
        divergence=divergence,
        temperature=1.0 if divergence in kd_reference.LOGIT_DIVERGENCES else float(given["temperature"]),
        kd_weight=float(given["kd_weight"]),
        ce_weight=float(given["ce_weight"]),
        beta=float(given["beta"]),
        lam=float(given["lam"]),
        vocab_size=vocab,
        need_kd=bool(given["kd_weight"]) or given["return_parts"],
        need_ce=labels is not None and (bool(given["ce_weight"]) or given["return_parts"]),
    )
    backend = given["backend"]
    if backend == "auto":
        backend = "chunked"
    if backend == "triton":
        raise ValueError("backend 'triton' is not available here; use 'chunked'")
    return _Job(
        teacher,
        labels,
        rows,
        scale,
        options,
        dtype,
        backend,
        given["reduction"],
        given["return_parts"],
        count,
    )

"""One call of the loss from its arguments to its gradient: check, pack the rows that count, pick the backend,
and make the gradient with the loss."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mohawk.kernels.common import first_order
from mohawk.kernels.common.tensors import TRANSFORMED, transformed
from mohawk.kernels.kd import checks as kd_checks
from mohawk.kernels.kd import chunked as kd_chunked
from mohawk.kernels.kd import gradients as kd_gradients
from mohawk.kernels.kd import products as kd_products
from mohawk.kernels.kd import reference as kd_reference
from mohawk.kernels.kd.divergences import DIVERGENCES, plain
from mohawk.kernels.kd.options import KDTask, Options, RowLosses, Settings, StudentHead
from mohawk.kernels.kd.teachers import SOURCES, TeacherSource
from mohawk.kernels.kd.tile import BY_HAND
from mohawk.kernels.kd.vocabulary import VocabularySlice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_SECOND_DERIVATIVE = "kd_loss has no second derivative; use backend='reference' for it"


class KDParts(NamedTuple):
    """The two terms, reduced like the loss, detached, before `kd_weight` and `ce_weight`: `kd` has its
    T^2."""

    kd: Tensor
    ce: Tensor


def distil(
    student: tuple[Tensor, ...],
    teacher: TeacherSource,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    group: ProcessGroup | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, kd and ce of a student, (logits,) or (hidden, head[, bias]); arguments as in `kd_loss`."""
    call = prepare(student, teacher, labels, token_weights, normalizer, group, settings)
    if call.backend == "reference":
        return call.reference(student)
    grad_enabled = torch.is_grad_enabled()
    anchors = first_order.anchors(student)
    return _Loss.apply(call, grad_enabled, anchors, *student, *anchors)


@dataclass
class Call(KDTask):
    """A task, and what to do with the losses of its rows."""

    lead: torch.Size
    backend: str
    inplace: bool

    @property
    def settings(self) -> Settings:
        return self.options.settings

    def reduce(self, kd: Tensor, ce: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, kd and ce, (...) or scalars, from those of the rows that count."""
        s = self.settings
        total = kd * s.kd_weight if s.kd_weight or not s.ce_weight else torch.zeros_like(kd)
        if s.ce_weight:
            total = total + ce * s.ce_weight
        terms = [total * self.scale, kd.detach() * self.scale, ce.detach() * self.scale]
        reduced = [s.reduction != "none"] * 3
        if s.return_parts == "rows":
            terms[1:], reduced[1:] = (kd.detach(), ce.detach()), (False, False)
        pairs = zip(terms, reduced, strict=True)
        loss, kd, ce = (self._reduced(x) if one else self._in_place(x) for x, one in pairs)
        return loss, kd, ce

    def _reduced(self, x: Tensor) -> Tensor:
        # In float64: a mean over millions of rows is not where precision should go.
        return x.sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64).to(x.dtype)

    def _in_place(self, x: Tensor) -> Tensor:
        """(...) values of all rows: those of the rows that count in their places, 0 in the others."""
        if self.rows is not None:
            x = x.new_zeros(self.lead.numel()).index_copy(0, self.rows, x)
        return x.reshape(self.lead)

    def reference(self, student: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        s, dtype = self.settings, self.scale.dtype
        flat = student[0].reshape(-1, student[0].shape[-1])
        teacher = self.teacher
        if self.rows is not None:
            flat, teacher = flat[self.rows], teacher.map_rows(lambda x, trailing: x[self.rows])
        with torch.autocast(flat.device.type, enabled=False):
            if s.linear:
                bias = student[2] if len(student) > 2 else None
                low = kd_products.operand_dtype(s.autocast, flat, s.rounds)
                flat, head = (kd_products.rounded(x, low) for x in (flat, student[1]))
                as_product = (flat, head) if low is None else (x.to(low) for x in (flat, head))
                low = torch.bfloat16 if s.rounds and kd_products.is_rounded(*as_product) else None
                flat = kd_products.head_logits(flat, head, bias, s.logit_scale, s.logit_softcap, dtype, low)
            kd, ce = kd_reference.row_losses(
                flat.to(dtype)[:, : self.options.vocabulary.local],
                teacher,
                self.labels,
                divergence=s.divergence,
                temperature=s.temperature,
                beta=s.beta,
                lam=s.lam,
            )
            return self.reduce(kd, ce)

    def forward(
        self, student: tuple[Tensor, ...], scale: Tensor, needs: tuple[bool, ...]
    ) -> tuple[RowLosses, list[Tensor | None]]:
        """kd and ce of the rows that count, and the gradients of sum(scale * (kd_weight * kd + ce_weight *
        ce))."""
        # Triton launches on the current device, wherever the tensors are.
        current = torch.cuda.device(scale.device) if scale.is_cuda else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(scale.device.type, enabled=False), current:
            return (self._linear if self.settings.linear else self._logits)(student, scale, needs)

    def _empty_or_zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        make = torch.empty if self.rows is None and len(self.scale) else torch.zeros
        return make(shape, dtype=dtype, device=self.scale.device)

    def _logits(
        self, student: tuple[Tensor, ...], scale: Tensor, needs: tuple[bool, ...]
    ) -> tuple[kd_chunked.RowLosses, list[Tensor | None]]:
        logits = student[0].reshape(-1, student[0].shape[-1])
        grad, vocab = None, self.options.vocabulary.local
        if needs[0] and self.inplace:
            grad = logits
        elif needs[0]:
            grad = self._empty_or_zeros(logits.shape, _held(logits.dtype))
        task = replace(self, scale=scale)
        if self.backend == "triton":
            from mohawk.kernels.kd import triton_backend

            rows = triton_backend.from_logits(logits, task, grad)
        else:
            rows = kd_chunked.from_logits(logits, task, grad)
        if grad is None:
            return rows, [None]
        if grad is logits and self.rows is not None:
            ignored = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            grad[ignored.index_fill_(0, self.rows, False)] = 0
        grad[:, vocab:] = 0
        return rows, [grad.view(student[0].shape)]

    def _linear(
        self, student: tuple[Tensor, ...], scale: Tensor, needs: tuple[bool, ...]
    ) -> tuple[kd_chunked.RowLosses, list[Tensor | None]]:
        s, vocabulary = self.settings, self.options.vocabulary
        hidden = student[0].reshape(-1, student[0].shape[-1])
        bias = student[2] if len(student) > 2 else None
        low = kd_products.operand_dtype(s.autocast, hidden, s.rounds)
        weight = student[1] if low is None else student[1].to(low)
        head = StudentHead(weight, bias, s.logit_scale, s.logit_softcap, student[1].dtype, s.rounds)
        grads: list[Tensor | None] = [None] * len(student)
        if needs[0]:
            summed = vocabulary.group is not None  # over ranks, and then rounded
            grads[0] = self._empty_or_zeros(hidden.shape, scale.dtype if summed else _held(hidden.dtype))
        if bias is not None and needs[2]:
            grads[2] = torch.zeros(bias.shape, dtype=scale.dtype, device=bias.device)
        bias_grad = grads[2] if bias is not None else None
        tile = None
        if self.backend == "triton":
            from mohawk.kernels.kd import triton_backend

            tile = triton_backend.tile
        task = replace(self, scale=scale)
        hidden = hidden if low is None else hidden.to(low)
        rows, grads[1] = kd_chunked.from_hidden(hidden, head, task, grads[0], bias_grad, needs[1], tile)
        grads = [g if g is None else g.to(_held(x.dtype)) for g, x in zip(grads, student, strict=True)]
        if grads[0] is not None:
            grads[0] = grads[0].view(student[0].shape)
        return rows, grads


def _held(dtype: torch.dtype) -> torch.dtype:
    """A gradient's dtype until the backward: before it is multiplied by the loss scale, float16 would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Loss(torch.autograd.Function):
    """The gradients are made with the loss and handed out in the backward."""

    @staticmethod
    def forward(ctx, call: Call, grad_enabled: bool, anchors: list[Tensor], *tensors: Tensor):
        student = tensors[: len(tensors) - len(anchors)]
        # needs_input_grad knows nothing of no_grad.
        needs = tuple(grad_enabled and need for need in ctx.needs_input_grad[3 : 3 + len(student)])
        ctx.call, ctx.needs, ctx.anchors, ctx.backend = None, needs, anchors, call.backend
        if call.settings.reduction == "none":
            ctx.save_for_backward(*student)
            ctx.call, needs = call, (False,) * len(student)  # in 'mean' and 'sum' the teacher is not needed any more
        rows, ctx.grads = call.forward(student, call.scale, needs)
        ctx.dtypes = [x.dtype for x in student]
        loss, kd, ce = call.reduce(rows.kd, rows.ce)
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    @first_order.first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx, grad_loss: Tensor, *_):
        grads = _Loss.gradients(ctx, grad_loss)
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, None, None, *grads, *[None] * len(ctx.anchors)

    @staticmethod
    def gradients(ctx, grad_loss: Tensor) -> list[Tensor | None]:
        call = ctx.call
        if call is not None:
            # Each row has its own factor, so the gradients are only made now.
            factor = grad_loss.reshape(-1)
            factor = factor if call.rows is None else factor[call.rows]
            return call.forward(ctx.saved_tensors, call.scale * factor, ctx.needs)[1]
        if ctx.grads is None:
            raise RuntimeError("the gradient of kd_loss was already handed out; use backward(retain_graph=True)")
        # Handed out for good, autograd takes the memory over instead of copying it.
        keep, grads = torch._C._autograd._get_current_graph_task_keep_graph(), ctx.grads  # pyrefly: ignore[implicit-import]
        if not keep:
            ctx.grads = None
        if ctx.backend == "triton" and grad_loss.device.type != "cpu" and not keep:
            from mohawk.kernels.kd import triton_backend

            return [g if g is None else triton_backend.times(g, grad_loss) for g in grads]
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            return [g if g is None else g * grad_loss if keep else g.mul_(grad_loss) for g in grads]
        return [g.clone() if keep and g is not None else g for g in grads]


def _backend(asked: str, x: Tensor, divergence: str) -> str:
    """auto: triton where it runs, knows the divergence and computes in the asked precision, else chunked."""
    if asked not in ("auto", "triton"):
        return asked
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and asked == "triton"
    reason = None
    if x.dtype == torch.float64:
        reason = "it computes in float32 and the student is float64"
    elif not x.is_cuda and not interpreted:
        reason = f"the student is on {x.device}; it needs a CUDA or ROCm device"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (run pip install '.[triton]' in mohawk's checkout)"
    else:
        from mohawk.kernels.kd import triton_backend

        if divergence not in triton_backend.IN_TRITON:
            reason = f"it has no terms for {divergence}"
    if reason is None:
        return "triton"
    if asked == "triton":
        raise ValueError(f"backend 'triton' can't be used: {reason}; use 'auto' or 'chunked'")
    return "chunked"


def _untransformed(name: str, x: Any) -> Any:
    if transformed(x):
        raise ValueError(f"{name} {TRANSFORMED}")
    return x


def prepare(
    student: tuple[Tensor, ...],
    teacher: TeacherSource,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    group: ProcessGroup | None,
    settings: Settings,
) -> Call:
    """Check everything, flatten the leading dimensions, and find the rows that count."""
    s = settings
    kd_checks.check_settings(s, labels is not None, normalizer)
    entry = DIVERGENCES[s.divergence]
    kd_checks.check_student(student, s)
    lead, device = student[0].shape[:-1], student[0].device
    entries = student[1].shape[0] if s.linear else student[0].shape[-1]
    of_teacher = teacher.entries() if isinstance(teacher, TeacherSource) else []
    vocabulary = VocabularySlice(entries, s.vocab_size, group, lead.numel(), device, of_teacher)
    if s.backend != "reference":
        for name, x in (("labels", labels), ("token_weights", token_weights), ("normalizer", normalizer)):
            _untransformed(name, x)
    kd_checks.check_rows(labels, token_weights, lead, device, vocabulary.size, s.ignore_index)
    kept = None if labels is None else labels != s.ignore_index
    if not isinstance(teacher, TeacherSource):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}; it must be a logits tensor or one of {', '.join(SOURCES)}"
        )
    teacher.check(kd_checks.Against(lead, device, vocabulary, s, kept))
    backend = _backend(s.backend, student[0], s.divergence)
    if backend != "reference":
        for x in student:
            _untransformed("the student", x)
        teacher.map_rows(lambda x, trailing: _untransformed("the teacher", x))
    if backend == "reference" and group is not None:
        raise ValueError("backend 'reference' has no group; use 'chunked', or gather the vocabulary first")
    if group is not None and entry.on_logits and s.divergence not in kd_gradients.LOGITS:
        raise ValueError(f"divergence {s.divergence!r} has no gradient for a split vocabulary; gather it first")
    if group is not None and entry.whole:
        raise ValueError(f"divergence {s.divergence!r} has no parts that ranks could have; gather the vocabulary first")
    if group is not None and not teacher.parts() and type(teacher) not in BY_HAND:
        raise ValueError(f"{type(teacher).__name__} has no way for a split vocabulary; gather it first")
    if s.inplace:
        if s.reduction == "none" or backend == "reference" or not student[0].is_contiguous():
            needs = "contiguous student_logits, reduction 'mean' or 'sum', and not the reference backend"
            raise ValueError(f"inplace needs {needs}")
        if student[0].dtype == torch.float16:
            raise ValueError("inplace would hold the gradient in float16 before the loss scale; use another dtype")

    low = kd_products.operand_dtype(s.autocast, student[0], s.rounds)
    teacher = teacher if low is None else teacher.rounded(low)
    teacher = teacher.with_rounded_logits() if s.rounds else teacher
    teacher = teacher.map_rows(lambda x, trailing: x.reshape(-1, *x.shape[x.dim() - trailing :]))
    count = real = lead.numel()
    rows = None
    if labels is not None and kept is not None:
        labels = labels.reshape(-1)
        chosen = kept.reshape(-1).nonzero().squeeze(1)
        real = len(chosen)
        if real < count:
            rows, labels = chosen, labels[chosen]
    scale = torch.ones(real, dtype=torch.float64 if student[0].dtype == torch.float64 else torch.float32, device=device)
    if token_weights is not None:
        weights = token_weights.detach().reshape(-1)
        scale *= weights if rows is None else weights[rows]
    if s.reduction == "mean" and real:
        scale /= real if normalizer is None else kd_checks.positive(normalizer)
    settings = s._replace(
        divergence=plain(s.divergence, s.beta, s.lam),
        temperature=1.0 if entry.on_logits else float(s.temperature),
        kd_weight=float(s.kd_weight),
        ce_weight=float(s.ce_weight),
        beta=float(s.beta),
        lam=float(s.lam),
    )
    options = Options(
        settings,
        vocabulary,
        need_kd=s.kd_weight != 0 or bool(s.return_parts),
        need_ce=labels is not None and (s.ce_weight != 0 or bool(s.return_parts)),
    )
    return Call(options, teacher, labels, rows, scale, lead=lead, backend=backend, inplace=s.inplace)

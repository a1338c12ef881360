"""A student's head in parts on several processes, each with rows of its own, used as it lies: rows go to all processes,
each of which has its slice of the vocabulary, in place of the head to all of them.

That moves rows x hidden numbers there and back instead of vocabulary x hidden, and no process holds a whole head or its
gradient; it pays where the processes have fewer rows together than the vocabulary has words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.kernels.common.sharded import gathered, in_parts, own_part
from mohawk.kernels.kd import call as kd_call
from mohawk.kernels.kd import checks as kd_checks
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.gradients import LOGITS
from mohawk.kernels.kd.options import Settings
from mohawk.kernels.kd.teachers import TeacherHidden, TeacherSource
from mohawk.kernels.kd.tile import BY_HAND


@dataclass
class Everyone:
    """The rows of all processes of a group: how many each has."""

    group: Any
    rank: int
    counts: list[int]

    def rows(self, x: Tensor) -> Tensor:
        """(rows of all, ...) of every process's (rows, ...), in the order of their ranks."""
        padded = x.new_zeros((max(self.counts), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def own(self, x: Tensor) -> Tensor:
        start = sum(self.counts[: self.rank])
        return x[start : start + self.counts[self.rank]]


def everyone(student: tuple[Tensor, ...], teacher: TeacherSource, settings: Settings) -> Everyone | None:
    """The group whose processes have a student's head in parts, where it is to be used in parts; None where it is to be
    gathered. All its processes must ask, and hear the same."""
    hidden, head = student[0], student[1]
    mesh: Any = getattr(head, "device_mesh", None)
    placement: Any = getattr(head, "placements", (None,))[0]
    if mesh is None or mesh.ndim != 1 or hidden.dim() == 0 or head.dim() != 2 or settings.backend == "reference":
        return None
    words, processes = head.shape[0], mesh.size()
    each = -(-words // processes)  # as torch deals them
    if not placement.is_shard(0) or (processes - 1) * each >= words:
        return None
    divergence = DIVERGENCES.get(settings.divergence)
    if divergence is None or divergence.whole or divergence.on_logits and settings.divergence not in LOGITS:
        return None
    dense = teacher.parts()
    fits = all(isinstance(one, TeacherHidden) and one.entries() == [words] for one in dense)
    if not fits or not dense and type(teacher) not in BY_HAND:
        return None
    group = mesh.get_group()
    own = torch.tensor([hidden[..., 0].numel()], device=hidden.device)
    counts = [torch.empty_like(own) for _ in range(processes)]
    dist.all_gather(counts, own, group=group)
    rows = [int(count) for count in counts]
    return Everyone(group, mesh.get_local_rank(), rows) if sum(rows) < words else None


def distil(
    student: tuple[Tensor, ...],
    teacher: TeacherSource,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    them: Everyone,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, kd and ce of this process's rows, as `mohawk.kernels.kd.call.distil` has them. The gradients of head and
    bias are means over the processes, as FSDP gives every parameter's."""
    hidden, head, *bias = student
    local = (hidden, *(own_part(x) for x in (head, *bias)))
    kd_checks.check_settings(settings, labels is not None, normalizer)
    kd_checks.check_student(local, settings)
    start = them.rank * -(-len(head) // len(them.counts))
    slices = _slices(teacher, slice(start, start + len(local[1])))

    def flat(x: Tensor, trailing: int = 0) -> Tensor:
        return x.reshape(-1, *x.shape[x.dim() - trailing :])

    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.ones(them.counts[them.rank], dtype=wide, device=hidden.device)
    if labels is not None:
        scale = scale * (flat(labels) != settings.ignore_index)
    real = scale.sum().clamp(min=1)
    if token_weights is not None:
        kd_checks.check_rows(labels, token_weights, hidden.shape[:-1], hidden.device, len(head), settings.ignore_index)
        scale = scale * flat(token_weights.detach())
    if settings.reduction == "mean":
        scale = scale / (real if normalizer is None else kd_checks.positive(normalizer))
    with torch.no_grad():
        shared = slices.map_rows(lambda x, trailing: them.rows(flat(x, trailing).contiguous()))
        every_label = None if labels is None else them.rows(flat(labels))
    summed = settings._replace(reduction="sum", return_parts="rows")

    def work(tensors: Sequence[Tensor], weights: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, list[Any]]:
        """kd and ce of all rows, and the gradients of the sum of their losses times the weights (rows of all)."""
        rows = them.rows(flat(tensors[0].detach(), 1))
        given = [x.detach().requires_grad_(need) for x, need in zip((rows, *tensors[1:]), needs, strict=True)]
        with torch.enable_grad():
            loss, kd, ce = kd_call.distil(tuple(given), shared, every_label, weights, None, them.group, summed)
        grads = torch.autograd.grad(loss, [x for x in given if x.requires_grad]) if any(needs) else ()
        left = iter(grads)
        return kd, ce, [next(left) if need else None for need in needs]

    if torch.is_grad_enabled():
        local = (hidden, *(_mean_of_parts(x) for x in (head, *bias)))
    loss, kd, ce = _Shared.apply(work, them, scale, settings, *local)
    return loss, kd, ce


def _slices(teacher: TeacherSource, words: slice) -> TeacherSource:
    """The source with this process's words of each head."""
    if not isinstance(teacher, TeacherHidden):
        return teacher._inside(lambda one: _slices(one, words))

    def part(x: Any) -> Tensor:
        mine = own_part(x)
        aligned = in_parts(x) and x.placements[0].is_shard(0) and len(mine) == words.stop - words.start
        return mine.detach() if aligned else gathered(x).detach()[words]

    return replace(teacher, head=part(teacher.head), bias=None if teacher.bias is None else part(teacher.bias))


def _mean_of_parts(x: Any) -> Tensor:
    """This process's part of a DTensor, whose gradient is divided by the number of processes."""
    if not in_parts(x):
        return x
    part = x.to_local()
    if part.requires_grad:
        part.register_hook(lambda gradient: gradient / x.device_mesh.size())
    return part


class _Shared(torch.autograd.Function):
    """With mean and sum the gradients are made with the loss, as if every process asked for those of its own loss once;
    where the factors in front of the losses differ, or each row has its own, they are made anew."""

    @staticmethod
    def forward(ctx, work: Callable[..., Any], them: Everyone, scale: Tensor, settings: Settings, *tensors: Tensor):
        none = settings.reduction == "none"
        ctx.work, ctx.them, ctx.scale, ctx.none, ctx.grads = work, them, scale, none, None
        ctx.save_for_backward(*tensors)
        ctx.needs = ctx.needs_input_grad[4:]
        needs = (False,) * len(tensors) if none else ctx.needs
        kd, ce, grads = work(tensors, them.rows(scale), needs)
        ctx.grads = None if none else grads
        kd, ce = them.own(kd), them.own(ce)
        own = settings.kd_weight * kd + settings.ce_weight * ce if settings.ce_weight else settings.kd_weight * kd
        terms = [own * scale, kd * scale, ce * scale]
        lead = tensors[0].shape[:-1]
        made = [x.reshape(lead) if none else x.sum(dtype=torch.float64).to(x.dtype) for x in terms]
        if settings.return_parts == "rows":
            made[1:] = kd.reshape(lead), ce.reshape(lead)
        ctx.mark_non_differentiable(*made[1:])
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):  # pyrefly: ignore[bad-override]
        them, tensors = ctx.them, ctx.saved_tensors
        factors = them.rows(grad_loss.reshape(-1).expand(len(ctx.scale)).to(ctx.scale.dtype).contiguous())
        grads, ctx.grads = ctx.grads, None
        if grads is not None and len(factors) and bool((factors == factors[0]).all()):
            grads = [g if g is None else g * factors[0].to(g.dtype) for g in grads]
        else:
            grads = ctx.work(tensors, them.rows(ctx.scale) * factors, ctx.needs)[2]
        if grads[0] is not None:
            grads[0] = them.own(grads[0]).reshape(tensors[0].shape)
        return None, None, None, None, *grads

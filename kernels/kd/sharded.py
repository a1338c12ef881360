"""Tensors in parts on several processes (torch's DTensor), as FSDP2 and tensor-parallel heads hold them, brought to
what the loss takes: whole heads, or slices of the vocabulary with their process group."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohawk.kernels.kd.teachers import Teacher, TeacherHidden, TeacherLogits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def in_parts(x: object) -> bool:
    """Whether it is a DTensor, told without importing what knows them."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def brought_together(
    student: tuple[Tensor, ...], teacher: Teacher, group: ProcessGroup | None, linear: bool
) -> tuple[tuple[Tensor, ...], Teacher, ProcessGroup | None]:
    """A student, (logits,) or (hidden, head[, bias]), its teacher and the group of a call, without DTensors but for
    those that no call can take.

    Heads are gathered; with a group, which says that the vocabulary is split, their own slices are taken. Logits whose
    vocabulary is split become slices and their group; of logits whose rows are split each process has its own.
    """
    if linear:
        hidden, *head = student
        student = (hidden, *(_gathered(x, group) for x in head))
        return student, _with_whole_heads(teacher, group), group
    logits, group = _slices(student[0], group)
    return (logits,), _sliced(teacher, group), group


def local_rows(x: Tensor | None) -> Tensor | None:
    """This process's part of labels or weights."""
    value: Any = x
    return value.to_local() if in_parts(x) else x


def _gathered(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A head's tensor whole, whose gradient is the mean over the processes, as FSDP gives every other parameter's: each
    has rows of its own. (Where all have the same rows, as with tensor parallelism, that mean is the gradient.)"""
    if not in_parts(x):
        return x
    part: DTensor = x  # pyrefly: ignore[bad-assignment]
    if group is not None:
        return part.to_local()
    from torch.distributed.tensor import Partial

    mesh = part.device_mesh
    whole = part.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _with_whole_heads(teacher: Teacher, group: ProcessGroup | None) -> Teacher:
    """A source with every head of it gathered; it gets no gradient."""
    with torch.no_grad():
        if isinstance(teacher, TeacherHidden):
            bias = None if teacher.bias is None else _gathered(teacher.bias, group)
            return replace(teacher, head=_gathered(teacher.head, group), bias=bias)
        return _inside(teacher, lambda one: _with_whole_heads(one, group))


def _slices(logits: Tensor, group: ProcessGroup | None) -> tuple[Tensor, ProcessGroup | None]:
    """This process's part of logits, and the group among which their vocabulary is split, if it is."""
    if not in_parts(logits):
        return logits, group
    from torch.distributed.tensor import Partial, Replicate

    part: Any = logits
    if any(isinstance(placement, Partial) for placement in part.placements):
        part = part.redistribute(placements=[Replicate() if p.is_partial() else p for p in part.placements])
    last = part.dim() - 1
    for dimension, placement in enumerate(part.placements):
        if placement.is_shard() and placement.dim in (last, -1):
            group = part.device_mesh.get_group(dimension)
    return part.to_local(), group


def _sliced(teacher: Teacher, group: ProcessGroup | None) -> Teacher:
    """A source of logits as the student's are: of this process's slice where there is a group, whole where there is
    none."""
    with torch.no_grad():
        if isinstance(teacher, TeacherLogits) and in_parts(teacher.logits):
            logits, split = _slices(teacher.logits, None)
            if split is not None and group is None:
                given: Any = teacher.logits
                logits = given.full_tensor()
            return replace(teacher, logits=logits)
        if isinstance(teacher, TeacherHidden):
            return _with_whole_heads(teacher, group)
        return _inside(teacher, lambda one: _sliced(one, group))


def _inside(teacher: Teacher, change: Any) -> Teacher:
    """A source with the sources in it changed."""
    made: dict[str, Any] = {}
    for field in fields(teacher):
        value = getattr(teacher, field.name)
        if isinstance(value, Teacher):
            made[field.name] = change(value)
        elif isinstance(value, (list, tuple)) and any(isinstance(one, Teacher) for one in value):
            made[field.name] = [change(one) if isinstance(one, Teacher) else one for one in value]
    return replace(teacher, **made) if made else teacher

"""Tensors in parts on several processes (torch's DTensor), as FSDP2 and tensor-parallel layers hold them, brought to
what a kernel takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


T = TypeVar("T")


def in_parts(x: object) -> bool:
    """Whether it is a DTensor, told without importing what knows them."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def own_part(x: T) -> T:
    """This process's part of a tensor that may be a DTensor; anything else as it is."""
    value: Any = x
    return value.to_local() if in_parts(x) else x


def gathered(x: Tensor) -> Tensor:
    """A tensor whole, whose gradient is the mean over the processes, as FSDP gives every parameter's: each has rows of
    its own. (Where all have the same rows, as with tensor parallelism, that mean is the gradient.)"""
    if not in_parts(x):
        return x
    from torch.distributed.tensor import Partial

    part: Any = x
    mesh = part.device_mesh
    whole = part.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def slices(x: Tensor) -> tuple[Tensor, ProcessGroup | None]:
    """This process's part of a tensor, and the group among which its last dimension is split, if it is."""
    if not in_parts(x):
        return x, None
    from torch.distributed.tensor import Replicate

    part: Any = x
    if any(placement.is_partial() for placement in part.placements):
        part = part.redistribute(placements=[Replicate() if p.is_partial() else p for p in part.placements])
    split = [i for i, p in enumerate(part.placements) if p.is_shard() and p.dim in (part.dim() - 1, -1)]
    return part.to_local(), part.device_mesh.get_group(split[0]) if split else None

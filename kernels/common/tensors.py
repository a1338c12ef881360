"""What no kernel can take, said in one line before any work."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from mohawk.kernels.common.sharded import in_parts

IN_PARTS = (
    "is a DTensor (FSDP2 or tensor parallel); pass this process's part of activations, x.to_local(), and weights "
    "whole, after module.unshard() or as x.full_tensor(grad_placements=[Partial('avg')]): the gradient of "
    "x.full_tensor() alone is that of one process"
)
TRANSFORMED = (
    "is inside a transform of torch.func (grad, vmap, jvp); use torch.autograd, or backend='reference', whose gradient "
    "torch.func.grad finds"
)


def unusable(x: object) -> str | None:
    """Why a kernel cannot take this for a tensor with values, to follow its name; None where it can."""
    if not isinstance(x, Tensor):
        return f"is a {type(x).__name__}; it must be a tensor"
    if in_parts(x):
        return IN_PARTS
    if x.is_meta or x.layout != torch.strided:
        what = "on the meta device" if x.is_meta else f"{x.layout}"
        return f"is {what}; it must be a dense tensor with values"
    if not torch.compiler.is_compiling() and type(x).__name__ == "FakeTensor":
        return "is a FakeTensor; it must be a dense tensor with values, outside FakeTensorMode or under torch.compile"
    return None


def transformed(x: object) -> bool:
    """Whether a transform of torch.func is being applied, under which gradients made by hand are wrong."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_tensors(where: str, **tensors: object) -> None:
    """Raises ValueError, from `where`, for what is no tensor with values; None is left out."""
    for name, x in tensors.items():
        if x is not None and (reason := unusable(x)) is not None:
            raise ValueError(f"{where}: {name} {reason}")


def check_given(where: str, **tensors: object) -> None:
    """As `check_tensors`, for what has to be given."""
    for name, x in tensors.items():
        if x is None:
            raise ValueError(f"{where}: {name} is None; it must be a tensor")
    check_tensors(where, **tensors)


def check_floating(where: str, lead: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError, from `where`, for what is not floating point, or on another device than `lead`; None is left
    out."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{where}: {name} must be floating point, got {x.dtype}")
        if x is not None and x.device != device:
            raise ValueError(f"{where}: {name} is on {x.device}, {lead} on {device}; move them to one device")


def check_untransformed(where: str, *tensors: object) -> None:
    """Raises ValueError, from `where`, inside a transform of torch.func."""
    if any(transformed(x) for x in tensors):
        raise ValueError(f"{where}: a tensor {TRANSFORMED}")


def whole_number(value: object) -> int | None:
    """An int from anything that is one, numpy's too; None from anything else."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None

"""Weights that are not finite: refused where they are loaded and where they would be written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mohawk.core.processes import from_all
from mohawk.errors import UserError
from mohawk.models.sharding import is_sharded, local


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, and how many of its values are such; None: all are finite.

    Integers and packed weights are finite, and what lies on no device (meta) is not looked at.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or hasattr(tensor, "__tensor_flatten__"):
            continue
        values = tensor.detach()
        values = values.float() if values.dtype.itemsize == 1 else values  # float8 knows no isfinite
        if torch.isfinite(values.sum()):  # nothing takes an infinity or a NaN out of a sum again
            continue
        if wrong := int((~torch.isfinite(values)).sum()):
            return f"{name} ({wrong:,} of {values.numel():,} values)"
    return None


def refuse_nonfinite(model: nn.Module, what: str, do: str) -> None:
    """UserError that names the first parameter of `model` that is not finite; what: whose it is, do: the way out. Of a
    sharded model all processes look at their parts."""
    found = first_nonfinite((name, local(parameter)) for name, parameter in model.named_parameters())
    if is_sharded(model):
        found = next((one for one in from_all(found) if one is not None), None)
    if found is not None:
        raise UserError(f"{what} has weights that are not finite, first {found}; {do}")

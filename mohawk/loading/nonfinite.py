"""Weights that are not finite: refused where they are loaded and where they would be written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mohawk.core.processes import from_all
from mohawk.errors import UserError
from mohawk.models.sharding import is_sharded, local, parts_in


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, and how many of its values are such; None: all are finite.

    Integers and packed weights are finite, and what lies on no device (meta) is not looked at.
    """
    for name, tensor in tensors:
        if wrong := _nonfinite(tensor):
            return _told(name, wrong, tensor.numel())
    return None


def _nonfinite(tensor: Tensor) -> int:
    """How many values are not finite."""
    if tensor.is_meta or not tensor.is_floating_point() or hasattr(tensor, "__tensor_flatten__"):
        return 0
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values  # float8 knows no isfinite
    if torch.isfinite(values.sum()):  # nothing takes an infinity or a NaN out of a sum again
        return 0
    return int((~torch.isfinite(values)).sum())


def _told(name: str, wrong: int, size: int) -> str:
    return f"{name} ({wrong:,} of {size:,} values)"


def refuse_nonfinite(model: nn.Module, what: str, do: str) -> None:
    """UserError that names the first parameter of `model` that is not finite; what: whose it is, do: the way out. Of a
    sharded model all processes look at their parts."""
    first = first_nonfinite_of_all if is_sharded(model) else first_nonfinite
    if (found := first(model.named_parameters())) is not None:
        raise UserError(f"{what} has weights that are not finite, first {found}; {do}")


def first_nonfinite_of_all(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """`first_nonfinite` of what all processes have, who must all ask: of a tensor in parts the values of all of them
    count."""
    named = dict(tensors)
    own = next((i, name) for i, name in enumerate([*named, None]) if name is None or _nonfinite(local(named[name])))
    _, name = min(from_all(own), key=lambda found: (found[1] is None, found[0]))
    if name is None:
        return None
    tensor = named.get(name)
    counted = from_all(None if tensor is None else (_nonfinite(local(tensor)), tensor.numel(), parts_in(tensor)))
    held = [one for one in counted if one is not None]
    _, size, parts = held[0]
    wrong = sum(count for count, _, _ in held) * parts // len(held)  # each part is on as many processes
    return _told(name, wrong, size)

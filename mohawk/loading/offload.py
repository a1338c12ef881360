"""Parameters that accelerate keeps in memory or on the disk until they are needed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mohawk.errors import UserError


def loaded(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter; where accelerate keeps it in memory or on the disk, on the device that it computes on."""
    tensor = getattr(module, name, None)
    if tensor is None or tensor.device.type != "meta":
        return tensor
    hook: Any = getattr(module, "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    if kept is None:
        raise UserError(f"{type(module).__name__}.{name} has no values; load the model with its weights")
    return kept[name].to(hook.execution_device)

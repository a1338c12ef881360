"""What can be wrong with a call of a decoding step, said in one line before any work."""

from typing import NoReturn

import torch
from torch import Tensor

from mohawk.kernels.common.tensors import check_floating, check_given, check_tensors


def fits_ssd(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    per_head: tuple[Tensor | None, ...],
    per_channel: tuple[Tensor | None, ...],
) -> bool:
    """Whether arguments fit, in a few microseconds. per_head: (h), per_channel: (h * p)."""
    batch, heads, head_dim, state_size = state.shape
    channels, inner = inputs.shape[1], heads * head_dim
    groups, rest = divmod(channels - inner, 2 * state_size)
    return (
        rest == 0
        and groups > 0
        and heads % groups == 0
        and inputs.shape[0] == batch
        and window.shape == (batch, channels, weight.shape[-1])
        and _fit_by_channel(weight, bias, channels)
        and gate.shape == (batch, inner)
        and decay.shape == (batch, heads)
        and all(x is None or x.shape == (heads,) for x in per_head)
        and all(x is None or x.shape == (inner,) for x in per_channel)
    )


def fits_delta(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    beta: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    per_head: tuple[Tensor | None, ...],
    norm_weight: Tensor,
) -> bool:
    """Whether arguments fit, in a few microseconds. per_head: (h)."""
    batch, heads, key_dim, value_dim = state.shape
    channels, inner = inputs.shape[1], heads * value_dim
    groups, rest = divmod(channels - inner, 2 * key_dim)
    scalar = decay.shape == (batch, heads)
    return (
        rest == 0
        and groups > 0
        and heads % groups == 0
        and inputs.shape[0] == batch
        and window.shape == (batch, channels, weight.shape[-1])
        and _fit_by_channel(weight, bias, channels)
        and gate.shape == (batch, inner)
        and beta.shape == (batch, heads)
        and (scalar or (decay.shape == (batch, heads, key_dim) and per_head == (None, None)))
        and all(x is None or x.shape == (heads,) for x in per_head)
        and norm_weight.shape == (value_dim,)
    )


def fits_rows(real: object, state: Tensor) -> bool:
    """Whether `real` is None or says of each row of the batch whether there is a token."""
    if real is None:
        return True
    if not isinstance(real, Tensor) or real.device != state.device:
        return False
    return real.dtype == torch.bool and real.shape == state.shape[:1]


def _fit_by_channel(weight: Tensor, bias: Tensor | None, channels: int) -> bool:
    return weight.dim() == 2 and weight.shape[0] == channels and (bias is None or bias.shape == (channels,))


def explain(where: str, tensors: dict[str, Tensor | None], given: tuple[str, ...], shapes: dict[str, str]) -> NoReturn:
    """Raises ValueError for what does not fit, of which those `given` have to be there. shapes: what each has to be."""
    check_given(where, **{name: tensors[name] for name in given})
    check_tensors(where, **tensors)
    state, real = tensors["state"], tensors["real"]
    assert state is not None
    if real is not None and real.device != state.device:
        raise ValueError(f"{where}: real is on {real.device}, state on {state.device}; move them to one device")
    check_floating(where, "state", state.device, **{name: x for name, x in tensors.items() if name != "real"})
    if real is not None and real.dtype != torch.bool:
        raise ValueError(f"{where}: real must be bool, False at padding, got {real.dtype}")
    there = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    got = ", ".join(f"{name} {shape}" for name, shape in there.items())
    needed = ", ".join(f"{name} {shapes[name]}" for name in there)
    raise ValueError(f"{where}: shapes do not fit together; needed {needed}; got {got}")


def usual(kinds: set[tuple[torch.dtype, torch.device]], device: torch.device) -> bool:
    """Whether dtypes are floating point and devices are one."""
    return all(dtype.is_floating_point and where == device for dtype, where in kinds)

"""What turns a causal language model's final hidden states into logits, and a forward pass that stops before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mohawk.errors import UserError
from mohawk.kernels.kd_teachers import TeacherHidden
from mohawk.teachers import check_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose head was compared with their logits


@dataclass(frozen=True)
class Head:
    """A model's output embedding: hidden states (..., hidden) to logits (..., vocab).

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), without the parts that are None. The tensors
    are the model's own, with their gradients.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of any Hugging Face causal language model. Raises UserError if it has none."""
        output = model.get_output_embeddings()
        if output is None:
            raise UserError(f"{type(model).__name__} has no output embedding to compare logits of")
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies, Granite divides
        scale /= getattr(config, "logits_scaling", None) or 1.0
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(loaded(output, "weight"), loaded(output, "bias"), float(scale), softcap)

    def detached(self) -> Head:
        """The head without gradients, its tensors not copied."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def frozen(self) -> Head:
        """The head in float32 without gradients."""
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().float(), bias=bias)

    def to(self, device: torch.device) -> Head:
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., vocab) of hidden states (..., hidden) of any dtype."""
        bias = None if self.bias is None else self.bias.float()
        logits = nn.functional.linear(hidden.float(), self.weight.float(), bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def teacher(self, hidden: Tensor) -> TeacherHidden:
        """A loss's teacher with these final hidden states (..., hidden), in the dtype of their products."""
        return TeacherHidden(
            in_autocast(hidden), in_autocast(self.weight), in_autocast(self.bias), self.scale, self.softcap
        )

    def student(self, hidden: Tensor) -> dict[str, Any]:
        """The arguments of `linear_kd_loss` that say what the student's logits are."""
        return {
            "student_hidden": in_autocast(hidden),
            "student_head": in_autocast(self.weight),
            "student_bias": in_autocast(self.bias),
            "logit_scale": self.scale,
            "logit_softcap": self.softcap,
        }


def loaded(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter; where accelerate keeps it in memory or on the disk, on the device that it computes on."""
    tensor = getattr(module, name, None)
    if tensor is None or tensor.device.type != "meta":
        return tensor
    hook = getattr(module, "_hf_hook", None)
    kept = getattr(hook, "weights_map", None)
    if kept is None:
        raise UserError(f"{type(module).__name__}.{name} has no values; load the model with its weights")
    return kept[name].to(hook.execution_device)


def final_hidden_states(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], forward: Callable[..., Any] | None = None
) -> Tensor:
    """What a model gives its output embedding, (batch, sequence, hidden), with gradients, without all its logits.

    inputs: of the model's forward. forward: what to call instead of the model, such as the model as DDP wraps it.

    The logits of the last position alone are computed. On a model's first pass they check `Head.of`; raises UserError
    where the model does more to its logits than a Head says.
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, -1:],)

    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{type(model).__name__} has no output embedding to compare logits of")
    hook = output.register_forward_pre_hook(keep)
    try:
        last = (forward or model)(**inputs, use_cache=False).logits[:, -1]
    finally:
        hook.remove()
    (hidden,) = seen
    if model not in _checked:
        check_decoder(model, "model")
    if model not in _checked and last.numel():
        with torch.no_grad():
            last = last.float()
            error = (Head.of(model).logits(hidden[:, -1]) - last).norm() / last.norm()
        # half-precision rounding stays far below 5 %, a missing scale or softcap that matters far above
        if error > 0.05:  # and not for NaN: a broken student has a perplexity too, NaN
            raise UserError(
                f"{type(model).__name__} does more to its logits than scale and softcap them, which is not supported"
            )
        _checked.add(model)
    return hidden


def in_autocast(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the dtype that autocast would multiply it in."""
    if tensor is None:
        return None
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor

"""What turns a causal language model's final hidden states into logits, and a forward pass that stops before it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mohawk.errors import UserError, machines_own
from mohawk.kernels.kd_teachers import TeacherHidden
from mohawk.teachers import GIVE, check_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# model types whose recurrences take no mask in transformers
READS_PADDING = ("rwkv", "xlstm", "recurrent_gemma")
AT_ONCE = ("cpu",)  # devices that nobody waits for
PROBED = 32  # tokens of a text that show whether a model is causal
_causal: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that were found to be
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose head was compared with their logits


@dataclass(frozen=True)
class Head:
    """A model's output embedding: hidden states (..., hidden) to logits (..., vocab).

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), without the parts that are None. The tensors
    are the model's own, with their gradients; where peft adapts the head, what its module computes with, in which the
    adapter has its gradients.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of any Hugging Face causal language model, also behind peft.

        Raises UserError if it has none, or one whose logits are not hidden states times a weight.
        """
        output = model.get_output_embeddings()
        if output is None:
            raise UserError(f"{type(model).__name__} has no output embedding to compare logits of")
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies, Granite divides
        scale /= getattr(config, "logits_scaling", None) or 1.0
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(*output_weight(output), float(scale), softcap)

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
        return TeacherHidden(self._wide(hidden), in_autocast(self.weight), in_autocast(self.bias), *self._bounds)

    def student(self, hidden: Tensor) -> dict[str, Any]:
        """The arguments of `linear_kd_loss` that say what the student's logits are."""
        scale, softcap = self._bounds
        return {
            "student_hidden": self._wide(hidden),
            "student_head": in_autocast(self.weight),
            "student_bias": in_autocast(self.bias),
            "logit_scale": scale,
            "logit_softcap": softcap,
        }

    @property
    def _bounds(self) -> tuple[float, float | None]:
        return self.scale, self.softcap

    def _wide(self, hidden: Tensor) -> Tensor:
        """Hidden states in the dtype of the products: autocast's, or the head's where that is wider than theirs (an
        adapter's float32 beside a bfloat16 model)."""
        if torch.is_autocast_enabled(hidden.device.type):
            return in_autocast(hidden)
        return hidden.to(torch.promote_types(hidden.dtype, self.weight.dtype))


def output_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (vocab, hidden) and bias (vocab) that an output embedding computes with, differentiable in its own
    parameters and in those of the adapter that peft put around it: LoRA (W + s B A), DoRA, a copy of the whole module,
    trained tokens.

    Raises UserError for any other adapter, for dropout on the adapter's input while it trains, for packed weights.
    """
    off = getattr(module, "disable_adapters", False)
    if hasattr(module, "modules_to_save"):  # peft's ModulesToSaveWrapper
        active = [] if off else [name for name in module.active_adapters if name in module.modules_to_save]
        return output_weight(module.modules_to_save[active[0]] if active else module.original_module)
    if hasattr(module, "token_adapter"):  # TrainableTokensWrapper
        tokens = module.token_adapter
        weight, bias = output_weight(tokens.base_layer)
        merged = off or tokens.disable_adapters or tokens.merged or not tokens.active_adapters
        return (weight if merged else tokens.get_merged_weights(tokens.active_adapters)), bias
    if not hasattr(module, "base_layer"):
        return _plain_weight(module)
    weight, bias = output_weight(module.base_layer)
    if off or getattr(module, "merged", False):
        return weight, bias
    # AdaLoRA's factors bear LoRA's names, but are parameters with a third one between them
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict) or hasattr(module, "parameter_name"):
        raise UserError(_adapted(f"{type(module).__module__}.{type(module).__name__}, which is not supported here"))
    for name in module.active_adapters:
        if name in module.lora_A:
            with torch.autocast(weight.device.type, enabled=False):
                weight, bias = _with_lora(module, name, output_weight(module.base_layer)[0], weight, bias)
    return weight, bias


def _with_lora(
    module: nn.Module, name: str, base: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """weight and bias plus what an adapter adds to the module's output, which has `base` without any."""
    down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
    dropout = module.lora_dropout[name]
    if module.training and getattr(dropout, "p", 0):
        raise UserError(
            _adapted(
                f"LoRA with a dropout of {dropout.p:g}, so that its logits are not hidden states times a weight",
                "set lora_dropout to 0, or ",
            )
        )
    dtype = torch.promote_types(up.weight.dtype, torch.float32)
    delta = scaling * (up.weight.to(dtype) @ down.weight.to(dtype))
    if up.bias is not None:
        shift = scaling * up.bias.to(dtype)
        bias = shift if bias is None else bias + shift
    if name in module.lora_magnitude_vector:  # DoRA, arXiv 2402.09353; its norm is a constant (section 4.3)
        norm = torch.linalg.vector_norm(base + delta, dim=1).detach()
        scale = (module.lora_magnitude_vector[name].weight / norm).unsqueeze(1)
        return weight + (scale - 1) * base + scale * delta, bias
    if name in getattr(module, "lora_variant", ()):
        raise UserError(_adapted(f"{type(module.lora_variant[name]).__name__}, which is not supported here"))
    return weight + delta, bias


def _adapted(how: str, instead: str = "") -> str:
    return f"the output embedding is adapted by {how}; {instead}leave the output embedding out of the adapter's targets"


def _plain_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = loaded(module, "weight"), loaded(module, "bias")
    if type(weight).dequantize is not Tensor.dequantize:  # torchao's, which says what it stands for
        weight = weight.dequantize()
    if not weight.is_floating_point() or weight.dim() != 2:
        raise UserError(
            f"the output embedding, a {type(module).__name__}, holds packed weights ({weight.dtype}); load the model "
            "with its output embedding unquantised (llm_int8_skip_modules=['lm_head'])"
        )
    return weight, bias


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many entries a model's logits have."""
    output = _within_peft(model.get_output_embeddings())
    return getattr(output, "out_features", None) or len(output.weight)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many ids a model can read."""
    embedding = _within_peft(model.get_input_embeddings())
    return getattr(embedding, "num_embeddings", None) or len(embedding.weight)


def _within_peft(module: nn.Module) -> nn.Module:
    for name in ("original_module", "base_layer"):  # peft's, a wrapper around an adapter around the module
        module = getattr(module, name, module)
    return module


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

    The logits of the last position alone are computed. On a model's first pass they check `Head.of`, and what
    `check_decoder` could not find out before it; raises UserError where the model does more to its logits than a Head
    says, or is not causal, or where a row has padding in front and the model has no mask for it.
    """
    _check_padding(model, inputs.get("attention_mask"))
    if model not in _checked:
        check_decoder(model, "model")
        _check_causal_on(model, inputs, forward or model)
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


def readable_ids(model: PreTrainedModel, ids: Tensor, who: str) -> tuple[Tensor, Callable[[], None]]:
    """Ids (b, n) that a model's embedding has rows for, and what raises UserError where some of those given had none.

    On the CPU that is raised here. Elsewhere it would mean to wait for the device, and reading beyond an embedding's
    end breaks a GPU for the whole process: ids are clamped, and the caller asks where the device is waited for anyway.
    """
    rows = embedding_rows(model)
    wrong = (ids < 0) | (ids >= rows)

    def check() -> None:
        if bool(wrong.any()):
            got, name = int(ids[wrong][0]), type(_base(model)).__name__
            raise UserError(
                f"{who}: input_ids: got {got}; the embedding of {name} has {rows} rows, for ids from 0 to "
                f"{rows - 1}; give text of a tokenizer that this model reads"
            )

    if ids.device.type in AT_ONCE:
        check()
        return ids, lambda: None
    return ids.clamp(0, rows - 1), check


def _check_padding(model: PreTrainedModel, mask: Tensor | None) -> None:
    """UserError where padding in front of a row's tokens would become part of what the model remembers of them."""
    if mask is None or mask.dim() != 2 or model.config.get_text_config().model_type not in READS_PADDING:
        return
    if bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        raise UserError(
            f"{type(model).__name__} reads padding as it reads tokens, whatever attention_mask says, and a row has "
            "padding in front of a token; pad on the right (padding_side='right')"
        )


def check_causal(model: nn.Module, who: str) -> None:
    """UserError where a model's states at some tokens change with later ones, whatever its configuration says.

    It reads a few ids of its vocabulary, once. Nothing is found out, and nothing said, of a model that cannot be run as
    it is: weights without values or shared out among processes, kernels of another device than it is on now.
    who: what the message calls it.
    """
    model = _base(getattr(model, "_orig_mod", model))  # of torch.compile, which has nothing to gain here
    if model in _causal or model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        return
    if any(p.is_meta or not p.numel() or hasattr(p, "full_tensor") for p in model.parameters()):
        return
    tokens, rows = PROBED // 2, embedding_rows(model)
    # evenly spread over the vocabulary, from behind its first ids, which are special ones in most
    text = (torch.arange(tokens) * max(1, rows // tokens) + rows // (2 * tokens)) % rows
    text = text.to(next(model.parameters()).device)
    try:
        ahead = _looks_ahead(model, text, model)
    except Exception as error:  # whatever the model lacks: the first pass is on a real batch, where it counts
        if machines_own(error) is not None:
            raise
        log.debug("%s: %s cannot be run yet: %s", who, type(model).__name__, error)
        return
    if ahead:
        raise UserError(f"{who}: {_told_ahead(model)}")
    _causal.add(model)


def _check_causal_on(model: PreTrainedModel, inputs: Mapping[str, Tensor], forward: Callable[..., Any]) -> None:
    """As `check_causal`, where that found nothing out, with the first real tokens of a batch's first row, alone: what a
    model does at padding is nobody's concern."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if _base(model) in _causal or model.get_output_embeddings() is None:
        return
    if ids is None or not len(ids) or ids.shape[1] < 2:
        return
    real = ids[0][mask[0].bool()] if mask is not None and mask.dim() == 2 else ids[0]
    if _looks_ahead(model, (real if len(real) > 1 else ids[0])[:PROBED], forward):
        raise UserError(f"model: {_told_ahead(model)}")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # within peft's


def _told_ahead(model: nn.Module) -> str:
    return f"got {type(model).__name__}: it is not causal: its states at a token change with later tokens; {GIVE}"


@torch.no_grad()
def _looks_ahead(model: PreTrainedModel, text: Tensor, forward: Callable[..., Any]) -> bool:
    """Whether the states at the first half of a text, (n) ids, change with the second."""
    half = len(text) // 2
    other = text.clone()
    other[half:] = text[: len(text) - half].flip(0)  # tokens that the model surely takes
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0][:, :half])
        return (args[0][:, -1:],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    training = [module for module in model.modules() if module.training]
    devices = [text.device] if text.device.type == "cuda" else []
    try:
        for module in training:  # dropout would change all states
            module.training = False
        for tokens in (text, other):
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                forward(input_ids=tokens[None], use_cache=False)
    finally:
        hook.remove()
        for module in training:
            module.training = True
    before, after = seen
    # where shapes agree, rounding differs in mixtures of experts alone, by far less than the root of its unit
    return bool((after - before).norm() > torch.finfo(before.dtype).eps ** 0.5 * before.norm())


def in_autocast(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the dtype that autocast would multiply it in."""
    if tensor is None:
        return None
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor

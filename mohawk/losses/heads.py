"""What turns a causal language model's final hidden states into logits, and a forward pass that stops before it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from mohawk.errors import UserError
from mohawk.kernels.common.sharded import gathered
from mohawk.kernels.kd.teachers import TeacherHidden
from mohawk.loading.causal import check_causal_on, embedding_rows, plain_model, within_peft
from mohawk.loading.configs import check_decoder
from mohawk.loading.offload import loaded
from mohawk.models.families import logit_factors
from mohawk.models.sharding import is_sharded, stay_whole, whole

if TYPE_CHECKING:
    from mohawk.loading.causal import CausalLM

log = logging.getLogger(__name__)

# model types whose recurrences take no mask in transformers
READS_PADDING = ("rwkv", "xlstm", "recurrent_gemma")
AT_ONCE = ("cpu",)  # devices that nobody waits for
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
    def of(cls, model: CausalLM) -> Head:
        """The head of any Hugging Face causal language model, also behind peft.

        Raises UserError if it has none, or one whose logits are not hidden states times a weight.
        """
        output = model.get_output_embeddings()
        if output is None:
            raise UserError(f"{type(model).__name__} has no output embedding to compare logits of")
        config = plain_model(model).config.get_text_config()
        multiplied, divided = logit_factors(config)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(*output_weight(output), multiplied / divided, softcap)

    def detached(self) -> Head:
        """The head without gradients, its tensors not copied."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def frozen(self) -> Head:
        """The head in float32 without gradients, whole; all processes must ask for a sharded one."""
        bias = None if self.bias is None else whole(self.bias).float()
        return replace(self, weight=whole(self.weight).float(), bias=bias)

    def to(self, device: torch.device) -> Head:
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., vocab) of hidden states (..., hidden) of any dtype."""
        bias = None if self.bias is None else gathered(self.bias).float()
        logits = nn.functional.linear(hidden.float(), gathered(self.weight).float(), bias)
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
    wrapper: Any = module  # one of peft's, perhaps
    off = getattr(module, "disable_adapters", False)
    if hasattr(module, "modules_to_save"):  # peft's ModulesToSaveWrapper
        active = [] if off else [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        return output_weight(wrapper.modules_to_save[active[0]] if active else wrapper.original_module)
    if hasattr(module, "token_adapter"):  # TrainableTokensWrapper
        tokens = wrapper.token_adapter
        weight, bias = output_weight(tokens.base_layer)
        merged = off or tokens.disable_adapters or tokens.merged or not tokens.active_adapters
        return (weight if merged else tokens.get_merged_weights(tokens.active_adapters)), bias
    if not hasattr(module, "base_layer"):
        return _plain_weight(module)
    weight, bias = output_weight(wrapper.base_layer)
    if off or getattr(module, "merged", False):
        return weight, bias
    # AdaLoRA's factors bear LoRA's names, but are parameters with a third one between them
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict) or hasattr(module, "parameter_name"):
        raise UserError(_adapted(f"{type(module).__module__}.{type(module).__name__}, which is not supported here"))
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            with torch.autocast(weight.device.type, enabled=False):
                weight, bias = _with_lora(module, name, output_weight(wrapper.base_layer)[0], weight, bias)
    return weight, bias


def _with_lora(
    module: Any, name: str, base: Tensor, weight: Tensor, bias: Tensor | None
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
    assert weight is not None
    if type(weight).dequantize is not Tensor.dequantize:  # torchao's, which says what it stands for
        weight = weight.dequantize()
    if not weight.is_floating_point() or weight.dim() != 2:
        raise UserError(
            f"the output embedding, a {type(module).__name__}, holds packed weights ({weight.dtype}); load the model "
            "with its output embedding unquantised (llm_int8_skip_modules=['lm_head'])"
        )
    return weight, bias


def vocabulary_rows(model: CausalLM) -> int:
    """How many entries a model's logits have."""
    output = within_peft(model.get_output_embeddings())
    return getattr(output, "out_features", None) or len(output.weight)


def final_hidden_states(
    model: CausalLM,
    inputs: Mapping[str, Tensor],
    forward: Callable[..., Any] | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """What a model gives its output embedding, (batch, sequence, hidden), with gradients, without all its logits.

    inputs: of the model's forward. forward: what to call instead of the model, such as the model as DDP wraps it.
    causal: false for an encoder's, or a decoder's beside an encoder, whose kind was checked by `mohawk.losses.tasks`.

    The logits of the last position alone are computed. On a model's first pass they check `Head.of`, and what
    `check_decoder` could not find out before it; raises UserError where the model does more to its logits than a Head
    says, is not causal or has states of tokens of its own, or where a row has padding in front and the model has no
    mask for it.
    """
    _check_padding(model, inputs.get("attention_mask"))
    if causal and model not in _checked:
        check_decoder(model, "model")
        check_causal_on(model, inputs, forward or model)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, -1:],)

    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{type(model).__name__} has no output embedding to compare logits of")
    # FSDP gathers a model's own matrices again for a backward pass that begins at its output; ours begins before it
    stay_whole([model], True)
    hook = output.register_forward_pre_hook(keep)
    try:
        last = (forward or model)(**inputs, **({"use_cache": False} if causal else {})).logits[:, -1]
    finally:
        hook.remove()
    if not seen:
        raise UserError(f"{type(model).__name__} makes its logits without its output embedding, which is not supported")
    (hidden,) = seen
    if causal and (tokens := inputs["input_ids"].shape[1]) != hidden.shape[1]:
        raise UserError(
            f"{type(model).__name__} has {hidden.shape[1]} states for {tokens} tokens, as with prompt tuning, which "
            "puts tokens of its own in front; train an adapter that leaves the text as it is, such as LoRA, IA3 or "
            "prefix tuning"
        )
    if model not in _checked and last.numel():
        with torch.no_grad():
            last = last.float()
            ours = with_head(model, hidden[:, -1], lambda states: Head.of(model).logits(states))
            error = (ours - last).norm() / last.norm()
        # half-precision rounding stays far below 5 %, a missing scale or softcap that matters far above
        if error > 0.05:  # and not for NaN: a broken student has a perplexity too, NaN
            raise UserError(
                f"{type(model).__name__} does more to its logits than scale and softcap them, which is not supported"
            )
        _checked.add(model)
    if is_sharded(model) and not torch.is_grad_enabled():  # no backward pass comes, which would put it into parts again
        any_model: Any = model
        any_model.reshard()
    return hidden


def in_zero(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has a module's parameters in parts."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def as_forward(module: nn.Module, call: Callable[..., Any], work: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """work(*given) as the forward pass of a module in ZeRO-3, which `call` calls: its parameters are whole in that, and
    again where the backward pass comes back to it."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def forward(*args: Any, **_: Any) -> Tensor:
        restore()
        return work(*args)

    module.__dict__["forward"] = forward
    try:
        return call(*given)
    finally:
        restore()


def with_head(model: CausalLM, hidden: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """work(hidden), which reads the head, also where ZeRO-3 has that in parts; all processes must come here."""
    output = model.get_output_embeddings()
    return as_forward(output, output, work, hidden) if output is not None and in_zero(output) else work(hidden)


def readable_ids(model: CausalLM, ids: Tensor, who: str) -> tuple[Tensor, Callable[[], None]]:
    """Ids (b, n) that a model's embedding has rows for, and what raises UserError where some of those given had none.

    On the CPU that is raised here. Elsewhere it would mean to wait for the device, and reading beyond an embedding's
    end breaks a GPU for the whole process: ids are clamped, and the caller asks where the device is waited for anyway.
    """
    rows = embedding_rows(model)
    wrong = (ids < 0) | (ids >= rows)

    def check() -> None:
        if bool(wrong.any()):
            got, name = int(ids[wrong][0]), type(plain_model(model)).__name__
            raise UserError(
                f"{who}: input_ids: got {got}; the embedding of {name} has {rows} rows, for ids from 0 to "
                f"{rows - 1}; give text of a tokenizer that this model reads"
            )

    if ids.device.type in AT_ONCE:
        check()
        return ids, lambda: None
    return ids.clamp(0, rows - 1), check


def _check_padding(model: CausalLM, mask: Tensor | None) -> None:
    """UserError where padding in front of a row's tokens would become part of what the model remembers of them."""
    if mask is None or mask.dim() != 2 or plain_model(model).config.get_text_config().model_type not in READS_PADDING:
        return
    if bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        raise UserError(
            f"{type(model).__name__} reads padding as it reads tokens, whatever attention_mask says, and a row has "
            "padding in front of a token; pad on the right (padding_side='right')"
        )


@overload
def in_autocast(tensor: Tensor) -> Tensor: ...
@overload
def in_autocast(tensor: Tensor | None) -> Tensor | None: ...
def in_autocast(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the dtype that autocast would multiply it in."""
    if tensor is None:
        return None
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor

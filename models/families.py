"""Which decoder families can be converted, and where in each the parts are that a conversion touches.

All families share transformers' skeleton: `model.embed_tokens`, `model.layers[i].self_attn` and an MLP, a final norm,
`lm_head`. An entry of `FAMILIES` says what differs from Llama. What transformers' own code takes care of needs no
entry: rotary embeddings (partial, longrope, none), sliding windows, scales of embeddings and of what layers add to the
residual stream, activations, the MLP's shape; nor do numbers of a configuration that scale or bound logits.
"""

import inspect
from collections.abc import MutableSequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family differs from Llama. Names are those of attributes in transformers.

    Args:
        models: which checkpoints these are, for a reader.
        fused_qkv: the projection that makes q, k and v at once, rows in that order; None: q_proj, k_proj, v_proj.
        output: attention's output projection.
        query_norm, key_norm: norms within attention, before the rotary embedding; those a configuration switches off
            are absent from the module.
        input_norm: the norm in front of attention; None where attention reads the residual stream as it is.
        output_norm: the norm of attention's output, before it is added to the residual stream.
        mlp_norms: the norms around the MLP.
        parallel: attention and MLP read the same norm and are added up.
        norm_offset: norms multiply by this plus their weight.
        mlp: the MLP.
        mlp_inputs, mlp_output: the MLP's projections; an input with twice the rows makes gate and values at once.
        experts: MLPs, all or some of them, are mixtures of experts; they stay as they are, and are not cut.
        embedding_scale: whether the model multiplies its embedding by sqrt(hidden_size).
        final_norm: the norm behind the last layer.
        head_bias: whether lm_head has a bias.
    """

    models: str
    fused_qkv: str | None = None
    output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    input_norm: str | None = "input_layernorm"
    output_norm: str | None = None
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    parallel: bool = False
    norm_offset: float = 0.0
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"
    experts: bool = False
    embedding_scale: bool = False
    final_norm: str = "norm"
    head_bias: bool = False


_OLMO2 = Family(
    models="OLMo 2",
    query_norm="q_norm",
    key_norm="k_norm",
    input_norm=None,
    output_norm="post_attention_layernorm",
    mlp_norms=("post_feedforward_layernorm",),
)

# model_type -> what is particular about it
FAMILIES: dict[str, Family] = {
    "llama": Family(models="Llama, SmolLM, SmolLM2, TinyLlama, Yi"),
    "mistral": Family(models="Mistral, with or without a sliding window"),
    "ministral": Family(models="Ministral 8B, of full and windowed attention"),
    "ministral3": Family(models="the text decoders of Ministral 3"),
    "mixtral": Family(models="Mixtral", experts=True),
    "qwen2": Family(models="Qwen2, Qwen2.5"),
    "qwen3": Family(models="Qwen3", query_norm="q_norm", key_norm="k_norm"),
    "qwen3_moe": Family(models="Qwen3 with experts", query_norm="q_norm", key_norm="k_norm", experts=True),
    "granite": Family(models="Granite 3"),
    "granitemoe": Family(models="Granite 3 with experts", mlp="block_sparse_moe", experts=True),
    "seed_oss": Family(models="Seed-OSS"),
    "arcee": Family(models="AFM", mlp_inputs=("up_proj",)),
    "smollm3": Family(models="SmolLM3"),
    "gemma": Family(models="Gemma 1, CodeGemma", norm_offset=1.0, embedding_scale=True),
    "gemma2": Family(
        models="Gemma 2",
        output_norm="post_attention_layernorm",
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        embedding_scale=True,
    ),
    "gemma3_text": Family(
        models="Gemma 3 270M and 1B, the text decoders of larger ones",
        query_norm="q_norm",
        key_norm="k_norm",
        output_norm="post_attention_layernorm",
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        embedding_scale=True,
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, models="OLMo 3"),
    "phi": Family(
        models="Phi-1, Phi-1.5, Phi-2",
        output="dense",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        mlp_norms=(),
        parallel=True,
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        final_norm="final_layernorm",
        head_bias=True,
    ),
    "phi3": Family(models="Phi-3, Phi-3.5, Phi-4, their minis", fused_qkv="qkv_proj", mlp_inputs=("gate_up_proj",)),
    "cohere": Family(
        models="Command R and R+, Aya 23 and Expanse",
        query_norm="q_norm",
        key_norm="k_norm",
        mlp_norms=(),
        parallel=True,
    ),
    "cohere2": Family(models="Command R7B, Command A, Tiny Aya", mlp_norms=(), parallel=True),
}


# What models are whose configurations do not say that text is not theirs to write, or not from left to right.
_AHEAD = "it is not causal: each token sees those behind it too"
_DRAFTS = "it drafts for another model, whose keys and values it reads"
_NO_TEXT = "it is no model that writes text (transformers has no causal language model of this type)"
OTHERS = {
    "trocr": "it is the decoder of an encoder of images, and reads that one's states",
    "git": "it is made to describe images",
    "moshi": "it is made for speech",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "xlnet": _AHEAD,
    "cpmant": _AHEAD,
}


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder's attention: h query heads over kv heads of width head_dim."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Projection:
    """A linear map, or rows of one: weight (rows, inputs), bias (rows,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionParts:
    """An attention layer in one form for all families; tensors are the module's own, not copies.

    q: (h * head_dim, D), k and v: (kv heads * head_dim, D), o: (D, h * head_dim). query_norm, key_norm: modules or
    None, which multiply by norm_offset plus their weight. scale: of q k^T before the softmax.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    norm_offset: float
    scale: float


def check_supported(config, verb: str = "converted to a hybrid") -> None:
    """Raises ValueError, naming what is supported and what is missing, unless the model can be converted, or cut.

    Reads the configuration alone, so that a model is refused before its weights are loaded. verb: what the message
    says cannot be done.
    """
    other = other_than_decoder(config)
    missing = None if other else _missing(config)
    if other or missing:
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        reason = f"{other}; only decoders, which write text from left to right, can be" if other else missing
        kind, reason = getattr(config, "model_type", None), reason if other else f"missing: {missing}"
        raise ValueError(f"model_type {kind!r} cannot be {verb}; {reason}; supported: {known}")


def check_causal_lm(model: "PreTrainedModel", verb: str) -> None:
    """Raises ValueError, saying what the model is, unless it is a decoder with its output embedding, by configuration
    and class. verb: what the message says cannot be done."""
    other = other_than_decoder(model.config)
    if other in (None, _NO_TEXT):  # of a type that is somebody's own the head tells
        no_head = model.get_output_embeddings() is None  # a body alone, or one that classifies
        other = "it has no output embedding, and so predicts no token" if no_head else None
    if other is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be {verb}: {other}; give a decoder with its head (a class that ends in "
            "ForCausalLM)"
        )


def other_than_decoder(config) -> str | None:
    """What a model is that does not write text from left to right; None where it does, as far as transformers knows.

    Reads the configuration alone. A model that reads more than text has a decoder in it, and passes.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder and a decoder, and the decoder alone is no language model"
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or bool(getattr(config, "auto_map", None))
    kind = getattr(config, "model_type", None)
    if kind in FAMILIES:
        return None
    if kind in OTHERS:
        return OTHERS[kind]
    if (text := getattr(config, "text_config", None)) is not None:
        return None if causal or other_than_decoder(text) is None else _NO_TEXT
    if getattr(config, "add_cross_attention", False) or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "it is a decoder whose layers read an encoder's states, and alone no language model"
    looks_back = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # XLM has a word of its own
    if (type(config) in MODEL_FOR_MASKED_LM_MAPPING or kind == "bert-generation") and not looks_back:
        return "it is an encoder, in which each token sees those behind it too"
    if not causal:
        return _NO_TEXT
    if (reads := _reads(config)) != "input_ids":
        return f"it is made for {reads}, not for text"
    return None


def looks_ahead(config) -> bool:
    """Whether a configuration, or that of the text decoder in it, lets each token see later ones."""
    return any(
        getattr(part, "use_bidirectional_attention", False) in (True, "all")
        or getattr(part, "is_causal", True) is False
        for part in (config, getattr(config, "text_config", None))
    )


def _reads(config) -> str:
    """What the whole model of a type takes first: input_ids, or input_features (speech), pixel_values, ..."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    # pyrefly: ignore[missing-attribute]  # a class; those with several are told apart by more than their type
    return MODEL_MAPPING[type(config)].main_input_name if type(config) in MODEL_MAPPING else "input_ids"


def _missing(config) -> str | None:
    """What stands in the way of a decoder's conversion, or None."""
    if getattr(config, "is_heterogeneous", False):
        return "the same sizes in every layer; per_layer_config gives some of this model's layers others"
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "kv_lora_rank", None):
        return "keys and values of its own for each head; this model has latent attention"
    if (text := getattr(config, "text_config", None)) is not None:
        inside = _missing(text)
        what = "a plain language model; this one reads more than text"
        if inside is None:
            return f"{what}, give its text decoder ({text.model_type}) alone; docs/families.md says how to take it out"
        return f"{what}, and its text decoder ({text.model_type}) alone lacks {inside}"
    if kinds - {"full_attention", "sliding_attention"}:
        odd = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        return f"full or sliding softmax attention in every layer; it has layers of {odd}"
    if looks_ahead(config):
        return "causal attention; a state-space layer cannot look ahead"
    if getattr(config, "model_type", None) not in FAMILIES:
        return _unlike_llama(config) or (
            "an entry in FAMILIES (models/families.py) that says how its attention, norms and head are named; "
            "docs/families.md says how to add one and what shows whether that is enough"
        )
    return None


def _unlike_llama(config) -> str | None:
    """What a decoder lacks of the skeleton that all entries of FAMILIES share; None where an entry may be enough.

    The model is built without weights: configurations do not say what their layers are made of.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "a causal language model of its own in transformers"
    code = "; an entry in FAMILIES cannot say so, that takes code"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a configuration that fits no model says nothing about its family
        return None
    layers = getattr(getattr(model, "model", None), "layers", None)
    mlps = {family.mlp for family in FAMILIES.values()}
    if layers is None or not hasattr(model.model, "embed_tokens") or not hasattr(model, "lm_head"):
        return f"the skeleton of Llama: model.embed_tokens, model.layers, lm_head{code}"
    for i, layer in enumerate(layers):
        names = [name for name, child in layer.named_children() if next(child.parameters(), None) is not None]
        if "self_attn" not in names:
            return f"attention called self_attn in every layer, as Llama has (not in layer {i}){code}"
        if mlps.isdisjoint(names):
            return f"an MLP called {' or '.join(sorted(mlps))} in every layer (not in layer {i}){code}"
        if other := [name for name in names if "norm" not in name and name not in {"self_attn", *mlps}]:
            return f"layers of attention, an MLP and norms alone; layer {i} has {', '.join(other)} too{code}"
        if own := [name for name, _ in layer.self_attn.named_parameters(recurse=False)]:
            return f"attention that is projections and norms alone; this one has {', '.join(own)} too{code}"
    lacking = _unlike_llamas_layers(layers[0], config.hidden_size)
    return lacking and f"{lacking}{code}"


class _StandsIn(nn.Module):
    """Takes the place of a layer's norm or attention, and notes what attention is called with."""

    given: tuple[Tensor | None, dict] | None = None

    def __init__(self, attention: bool):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        self.given = hidden_states, kwargs
        return (hidden_states, None) if self.attention else hidden_states.clone()


def _unlike_llamas_layers(layer: Any, hidden_size: int) -> str | None:
    """What a layer lacks of what Llama's does around its attention. It needs no weights, and is left changed."""
    keywords = "layers that hand keywords on to their attention; in these, a mixer would not hear of padding"
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(layer.forward).parameters.values()):
        return keywords
    input_norm = getattr(layer, "input_layernorm", None)
    if input_norm is not None and getattr(input_norm, "weight", None) is None:
        return "norms with weights; its input_layernorm has none"
    for name in [name for name, _ in layer.named_children() if "norm" in name]:
        setattr(layer, name, _StandsIn(attention=False))
    layer.self_attn = attention = _StandsIn(attention=True)
    hidden = torch.empty(1, 2, hidden_size, device="meta")
    with suppress(Exception):  # what comes after attention may not run without weights, and is not asked about here
        layer(hidden, padding_mask=hidden, position_embeddings=(hidden, hidden))
    if attention.given is None:
        return None
    read, given = attention.given
    if "padding_mask" not in given:
        return keywords
    if input_norm is None and read is not hidden:
        return "a norm in front of attention called input_layernorm, as Llama has, or none there"
    return None


def family_of(config) -> Family:
    """The entry of a decoder's configuration, or of the decoder that a hybrid's configuration holds."""
    config = getattr(config, "base_config", None) or config
    return FAMILIES[config.model_type]


def needed_attention(config) -> str | None:
    """The attention implementation to load a model with; None where transformers' own choice is right.

    Bounded scores (Gemma 2's attn_logit_softcapping) need "eager": torch's sdpa has no bound, and as the default of
    some versions of transformers it leaves the model's out in silence.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None


def leaves_out_softcap(config) -> bool:
    """Whether a configuration bounds its attention's scores and its attention implementation does not."""
    return needed_attention(config) is not None and config._attn_implementation in (None, "sdpa")


def logit_factors(config) -> tuple[float, float]:
    """What a model multiplies its head's output by, and what it divides it by: Cohere's logit_scale and Granite's
    logits_scaling; 1 in most models."""
    return getattr(config, "logit_scale", None) or 1.0, getattr(config, "logits_scaling", None) or 1.0


def decoder_shape(config) -> DecoderShape:
    heads = config.num_attention_heads
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def decoder_layers(model: Any) -> MutableSequence[Any]:
    """The decoder layers of a causal LM (teacher or student), each of its family's own class."""
    return model.model.layers


def mixer_input_norm(layer: Any) -> nn.Module:
    """The norm in front of a layer's attention or mixer; the identity where a family has none."""
    # every family that has such a norm calls it so, and tests/models/ holds each entry of FAMILIES to that
    return getattr(layer, "input_layernorm", None) or nn.Identity()


def final_norm_name(model: Any) -> str:
    """Name in `model.model` of the norm behind the last layer."""
    return family_of(model.config).final_norm


def attention_parts(attention: Any) -> AttentionParts:
    """A family's attention module taken apart; of a fused projection the rows of q, k and v."""
    family, shape = family_of(attention.config), decoder_shape(attention.config)
    if family.fused_qkv is None:
        q, k, v = (_projection(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
    else:
        fused = _projection(getattr(attention, family.fused_qkv))
        rows = [shape.num_heads * shape.head_dim] + [shape.num_kv_heads * shape.head_dim] * 2
        weights = fused.weight.split(rows)
        biases = [None] * 3 if fused.bias is None else fused.bias.split(rows)
        q, k, v = (Projection(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    norms = (None if name is None else getattr(attention, name, None) for name in (family.query_norm, family.key_norm))
    output = _projection(getattr(attention, family.output))
    return AttentionParts(q, k, v, output, *norms, norm_offset=family.norm_offset, scale=attention.scaling)


def _projection(linear: Any) -> Projection:
    return Projection(linear.weight, getattr(linear, "bias", None))

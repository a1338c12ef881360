"""Which decoder families can be converted, and where in each the parts are that a conversion touches.

All families below share transformers' Llama-shaped naming (`model.layers[i].self_attn.{q,k,v,o}_proj`,
`input_layernorm`, gated MLP, RMSNorm before each block); what differs is read from the configuration.
"""

from dataclasses import dataclass

from torch import nn

# model_type -> what is particular about it
FAMILIES: dict[str, str] = {
    "llama": "Llama, SmolLM, SmolLM2, TinyLlama, Yi and others that use LlamaForCausalLM",
    "mistral": "Mistral, with or without a sliding window",
    "qwen2": "Qwen2, Qwen2.5 (biases on q, k, v)",
}


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder's attention: h query heads over kv heads of width head_dim."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def check_supported(config) -> None:
    """Raises ValueError, naming what is supported, unless the configuration's family can be converted."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        known = "; ".join(f"{name} ({note})" for name, note in FAMILIES.items())
        raise ValueError(f"model_type {kind!r} cannot be converted to a hybrid yet; supported: {known}")


def decoder_shape(config) -> DecoderShape:
    heads = config.num_attention_heads
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM (teacher or student)."""
    return model.model.layers


def mixer_input_norm(layer: nn.Module) -> nn.Module:
    """The norm in front of a layer's attention or mixer."""
    return layer.input_layernorm

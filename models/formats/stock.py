"""What transformers' own decoders with mixers (Bamba, Granite 4, Qwen3.5) call their parts and sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from mohawk.models.families import decoder_shape
from mohawk.models.hybrid_config import HybridConfig

PLACES = ("self_attn", "attn", "mamba", "linear_attn")  # Granite's layers have two of them, one of which is None
# Our mixer of the same kind -> the attributes of theirs: the convolution's channels and taps, sizes whose product is
# the recurrent state's, and what else tells the kind apart.
MAMBA2 = (("conv_dim", "conv_kernel_size"), ("num_heads", "head_dim", "ssm_state_size"), ())
GATED_DELTA = (("conv_dim", "conv_kernel_size"), ("num_v_heads", "head_v_dim", "head_k_dim"), ("in_proj_qkv",))
ATTRIBUTES = {"mamba2": MAMBA2, "gated_delta": GATED_DELTA}


class StockMixer(NamedTuple):
    """A mixer of transformers' own: the name of ours of its kind, and what it keeps of one sequence."""

    kind: str
    conv_elements: int  # in the model's dtype
    state_elements: int  # in float32


def mixer_in(layer: nn.Module) -> Any:
    """A decoder layer's attention or mixer; the layer itself where it has none by a name known here."""
    return next((found for name in PLACES if (found := getattr(layer, name, None)) is not None), layer)


def stock_mixer(mixer: nn.Module) -> StockMixer | None:
    """What a module is if it is a mixer of transformers' own; None for any other."""
    for kind, (conv, state, more) in ATTRIBUTES.items():
        if all(hasattr(mixer, name) for name in (*conv, *state, *more)):
            conv_elements, state_elements = (
                math.prod(getattr(mixer, name) for name in names) for names in (conv, state)
            )
            return StockMixer(kind, conv_elements, state_elements)
    return None


def layer_words(config: PreTrainedConfig) -> list[str]:
    """A word for each layer, "linear_attention" for one with a mixer, as Bamba's configuration too has it."""
    return list(getattr(config, "layers_block_type", None) or config.layer_types)


def decoder_fields(config: HybridConfig) -> dict[str, Any]:
    """What the stock configurations call alike: sizes, norms, positions and special tokens of a student."""
    base, shape = config.base_config, decoder_shape(config.base_config)
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        hidden_act=base.hidden_act,
        initializer_range=base.initializer_range,
        rms_norm_eps=base.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=base.max_position_embeddings,
        attention_dropout=base.attention_dropout,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        attn_implementation=config._attn_implementation,
    )


def norm_groups(config: PreTrainedConfig) -> int:
    """How many groups a mixer's output is normalised in; 1 where a class has no such groups."""
    return getattr(config, "mamba_n_groups", 1)

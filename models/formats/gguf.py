"""A hybrid student as a GGUF file, which llama.cpp and what is built on it run.

llama.cpp has our layers under two names. `granitehybrid` is what its own converter makes of a Bamba: Llama's attention
and Mamba-2 layers, those twice as wide as the model and without biases on their projections, so narrower mixers get
heads of zeros. `qwen35` is Qwen3.5: `gated_delta` layers and Qwen3's attention with the gate that qwen3_5.py gives it;
weights of norms are stored as they are there, not as w - 1. Names, shapes and fields were read in llama.cpp's
src/models/granite-hybrid.cpp, qwen35.cpp and conversion/ (as llama-cpp-python 0.3.36 ships them).

What it wants otherwise than transformers: -exp(A_log) instead of A_log; in `granitehybrid` rotary positions that turn
neighbouring rows of q and k rather than halves; in `qwen35` value heads that share a key head not side by side but one
round after the other.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mohawk.models.families import decoder_shape
from mohawk.models.formats.bamba import mamba2_fields, mamba2_weights, padded_expand, why_not_mamba2
from mohawk.models.formats.gguf_vocabulary import vocabulary
from mohawk.models.formats.qwen3_5 import gated_weights, regular_interval, why_not_qwen3_5
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig

# of matrices; llama.cpp wants all else in float32: norms, biases, convolutions, decays
OUTTYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2}  # name -> general.file_type
BLOCKED = ("q8_0", "q4_0")  # in which BLOCK weights of a row share a scale
BLOCK = 32
SMALL = ("ssm_alpha.", "ssm_beta.")  # of each head one row, which says how long its state lasts: few, and left whole
ROPES = {"granitehybrid": ("default", "linear", "llama3", "yarn"), "qwen35": ("default", "linear", "yarn")}
YARN = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
BETAS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SHARED = {  # names within a layer
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GRANITE_HYBRID = {
    "post_attention_layernorm": "ffn_norm",
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
}
QWEN35 = {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}


def architecture(config: HybridConfig) -> str:
    """llama.cpp's name for what a student of this configuration is."""
    return "qwen35" if config.mixer == "gated_delta" else "granitehybrid"


def why_not_gguf(config: HybridConfig) -> str | None:
    """Why llama.cpp cannot run a student of this configuration, in one line, or None when it can."""
    if config.is_pure_ssm:
        return "no attention layer is left, without which llama.cpp's hybrids end in a failed assertion"
    if config.mixer == "gated_delta":
        return why_not_qwen3_5(config) or _why_not_delta(config) or _why_not_rope(config)
    return why_not_mamba2(config, "llama.cpp's Bamba", True) or _why_not_mixers(config) or _why_not_rope(config)


def _why_not_delta(config: HybridConfig) -> str | None:
    keys, values = config.mixer_state_size, config.mixer_head_dim
    if keys != values:
        return f"its mixers have keys of {keys} and values of {values}, llama.cpp's have both of one width"
    return None


def _why_not_mixers(config: HybridConfig) -> str | None:
    if config.mixer_bias:
        base = config.base_config
        kept = getattr(base, "attention_out_bias", getattr(base, "attention_bias", False))
        told = (
            "its teacher's attention has one on its output, which they keep"
            if kept
            else "the default gate, open, is one; a student made with gate: output (and init: attention) has none"
        )
        return f"its mixers' projections have biases, which llama.cpp's Mamba-2 layers have no place for: {told}"
    if (expand := padded_expand(config)) != 2:
        return f"its mixers are {expand} times as wide as the model, llama.cpp's Mamba-2 layers twice"
    return None


def _why_not_rope(config: HybridConfig) -> str | None:
    rope, allowed = config.base_config.rope_parameters, ROPES[architecture(config)]
    kind = rope["rope_type"]
    if kind not in allowed:
        return f"its rotary positions are scaled by {kind}, llama.cpp's {architecture(config)} knows {_listed(allowed)}"
    given = {name for name, value in rope.items() if value is not None}
    if kind == "yarn" and (beyond := sorted(given - YARN - BETAS.keys())):
        return f"its yarn positions have {_listed(beyond)}, which llama.cpp takes for something else or not at all"
    return None


def gguf_fields(config: HybridConfig) -> dict[str, Any]:
    """What a file says of the model besides its weights and vocabulary: keys as in the file."""
    base, shape, name = config.base_config, decoder_shape(config.base_config), architecture(config)
    attends = [kind != SSM_LAYER for kind in config.layer_types]
    fields: dict[str, Any] = {
        "block_count": shape.num_layers,
        "context_length": base.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": base.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": shape.num_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(base.rms_norm_eps),
        "ssm.conv_kernel": config.mixer_conv_kernel,
        "ssm.state_size": config.mixer_state_size,
        "rope.dimension_count": _rotary_size(config),
        **_rope_fields(config),
    }
    if name == "granitehybrid":
        padded = mamba2_fields(config, True, {})
        fields |= {
            # a layer without such heads is a Mamba-2
            "attention.head_count_kv": [shape.num_kv_heads if here else 0 for here in attends],
            "ssm.inner_size": padded["mamba_n_heads"] * padded["mamba_d_head"],
            "ssm.group_count": padded["mamba_n_groups"],
            "ssm.time_step_rank": padded["mamba_n_heads"],
            "rope.scaling.finetuned": True,  # here this means: rotate at all
        }
    else:
        fields |= {
            "attention.head_count_kv": shape.num_kv_heads,
            # releases that do not know it take an interval of 4, and stop at the first weight that does not fit
            "attention.recurrent_layers": [not here for here in attends],
            "ssm.inner_size": config.mixer_num_heads * config.mixer_head_dim,
            "ssm.group_count": config.mixer_num_groups,
            "ssm.time_step_rank": config.mixer_num_heads,
            # pairs turned by the three axes of an image, in rounds; in text all three are a token's position
            "rope.dimension_sections": [(_rotary_size(config) // 2 + 2 - axis) // 3 for axis in range(3)] + [0],
        }
        if (interval := regular_interval(config.layer_types)) is not None:
            fields["full_attention_interval"] = interval
    return {f"{name}.{key}": value for key, value in fields.items()}


def gguf_weights(hybrid: HybridForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """A student's weights under llama.cpp's names and in its layout, float32, each made when it is asked for."""
    config = hybrid.config
    if architecture(config) == "granitehybrid":
        weights = ((key, _granite_hybrid(key, value, config)) for key, value in mamba2_weights(hybrid, pad_expand=True))
        names = SHARED | GRANITE_HYBRID
    else:
        gated = gated_weights(hybrid.state_dict().items(), config)
        weights = ((key, _qwen35(key, value, config)) for key, value in gated)
        names = SHARED | QWEN35
    for key, value in weights:
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            yield _name(key, names), value
    rope = config.base_config.rope_parameters
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequencies(config, "default") / _frequencies(config, "llama3")


@torch.no_grad()
def write_gguf(
    hybrid: HybridForCausalLM,
    path: str | Path,
    outtype: str = "f32",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a student as a GGUF file, one tensor after the other: no second copy of the model is made.

    Args:
        hybrid: with `mamba2` mixers, or `gated_delta` ones of a Qwen3 teacher.
        path: of the file. What fails half-way leaves a part of it.
        outtype: of matrices, all else being float32: f32; bf16; q8_0 or q4_0, 8 or 4 bits and a float16 scale for
            every 32 weights of a row (rows that 32 does not divide, and rows of single heads, stay in float32).
        tokenizer: a fast one, written so that llama.cpp takes text; without one it takes token ids alone.
        about: other keys, such as general.name.

    Raises:
        ValueError: what llama.cpp cannot run (`why_not_gguf`), a tokenizer that it does not have, or another outtype.
    """
    import gguf
    import numpy as np

    if outtype not in OUTTYPES:
        raise ValueError(f"outtype: got {outtype!r}; allowed: {', '.join(OUTTYPES)}")
    if reason := why_not_gguf(hybrid.config):
        raise ValueError(f"this student cannot be a GGUF file: {reason}")
    fields = {"general.type": "model", **(about or {}), "general.file_type": OUTTYPES[outtype]}
    if outtype in BLOCKED:
        fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    fields |= gguf_fields(hybrid.config) | vocabulary(tokenizer, hybrid.config.vocab_size)

    writer = gguf.GGUFWriter(None, architecture(hybrid.config))
    for key, value in fields.items():
        _add(writer, key, value)
    for name, value in gguf_weights(hybrid):
        kind = gguf.GGMLQuantizationType[stored_as(name, value.shape, outtype).upper()]
        shape = gguf.quant_shape_to_byte_shape(value.shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    try:
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in gguf_weights(hybrid):
            kind = gguf.GGMLQuantizationType[stored_as(name, value.shape, outtype).upper()]
            writer.write_tensor_data(gguf.quantize(value.contiguous().cpu().numpy(), kind))
    finally:
        writer.close()


def stored_as(name: str, shape: tuple[int, ...], outtype: str) -> str:
    """The type of a tensor in a file of that outtype."""
    matrix = name.endswith(".weight") and len(shape) == 2 and "norm" not in name and "conv1d" not in name
    whole = outtype in BLOCKED and (shape[-1] % BLOCK or any(small in name for small in SMALL))
    return outtype if matrix and not whole else "f32"


def _name(key: str, names: Mapping[str, str]) -> str:
    """llama.cpp's name for one of ours. KeyError for one that has none: nothing is left out in silence."""
    stem, dot, suffix = key.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, dot, suffix = key, "", ""
    if stem in WHOLE:
        return WHOLE[stem] + dot + suffix
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{int(layer)}.{names[part]}{dot}{suffix}"


def _granite_hybrid(key: str, value: Tensor, config: HybridConfig) -> Tensor:
    value = value.float()
    if key.endswith(".A_log"):
        return -value.exp()[:, None]
    if key.endswith(".mamba.D"):
        return value[:, None]
    if key.endswith(".conv1d.weight"):
        return value[:, 0]
    if key.endswith(".mamba.norm.weight"):
        return value.view(mamba2_fields(config, True, {})["mamba_n_groups"], -1)
    if ".q_proj." in key or ".k_proj." in key:
        heads = value.unflatten(0, (-1, decoder_shape(config.base_config).head_dim))
        turned, rest = heads.tensor_split([_rotary_size(config)], 1)
        turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([turned, rest], 1).flatten(0, 1)
    return value


def _qwen35(key: str, value: Tensor, config: HybridConfig) -> Tensor:
    value = value.float()
    part = key.partition(".linear_attn.")[2]
    if part == "conv1d.weight":
        value = value[:, 0]
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        keys, values = value.tensor_split([2 * config.mixer_num_groups * config.mixer_state_size])
        return torch.cat([keys, _in_rounds(values, config)])
    if part == "out_proj.weight":
        return _in_rounds(value.mT, config).mT
    if part == "A_log":
        value = -value.exp()
    return _in_rounds(value, config) if part and part != "norm.weight" else value


def _in_rounds(value: Tensor, config: HybridConfig) -> Tensor:
    """Rows by value heads, side by side for each key head, as rounds: the first of each key head, then the second."""
    shared = config.mixer_num_heads // config.mixer_num_groups
    return value.unflatten(0, (config.mixer_num_groups, shared, -1)).transpose(0, 1).flatten(0, 2)


def _rotary_size(config: HybridConfig) -> int:
    """How many dimensions of a head are turned."""
    head_dim = decoder_shape(config.base_config).head_dim
    return int(head_dim * config.base_config.rope_parameters.get("partial_rotary_factor", 1.0))


def _rope_fields(config: HybridConfig) -> dict[str, Any]:
    rope = config.base_config.rope_parameters
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        betas = {theirs: rope[ours] for ours, theirs in BETAS.items() if rope.get(ours) is not None}
        fields |= {f"rope.scaling.{name}": float(value) for name, value in betas.items()}
    return fields


def _frequencies(config: HybridConfig, kind: str) -> Tensor:
    """The rotary positions' frequencies under that kind of scaling, float32."""
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config.base_config, torch.device("cpu"))[0]
    size = _rotary_size(config)
    return config.base_config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)


def _add(writer: Any, key: str, value: Any) -> None:
    """A field of the type that llama.cpp reads it in."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _listed(names) -> str:
    return ", ".join(names)

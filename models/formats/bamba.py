"""A hybrid student as transformers' own `BambaForCausalLM`, which runs where this package is not installed, and back.

Bamba is a Llama-shaped decoder some of whose layers are Mamba-2: a `mamba2` hybrid of such a teacher is the same
function under other names (all of them in `_RENAMED`). What Bamba has no place for is refused with the reason.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig
from transformers.models.bamba import modeling_bamba

from mohawk.models.casting import cast
from mohawk.models.families import decoder_shape
from mohawk.models.from_teacher import saveable
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig

# our name -> Bamba's; the mixer and the attention that stays keep the names of their own parts
_RENAMED = {
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    ".mlp.": ".feed_forward.",
    "model.norm.": "model.final_layernorm.",
}
# families whose blocks are Bamba's, weight for weight or (phi3) once its fused projections are cut
EXPRESSIBLE = ("llama", "mistral", "ministral", "qwen2", "seed_oss", "phi3")
# why the others' are not
FOREIGN = {
    "phi": "Phi's blocks run attention and MLP side by side on one LayerNorm, Bamba's one after the other on RMSNorms",
    "cohere": "Cohere's blocks run attention and MLP side by side on one LayerNorm; its logits are scaled",
    "cohere2": "Cohere 2's blocks run attention and MLP side by side on one LayerNorm; its logits are scaled",
    "gemma": "Gemma's embedding is scaled and its norms multiply by 1 plus their weight, which Bamba's do not",
    "gemma2": "Gemma 2 has softcaps and norms after its attention and MLP, which Bamba has no place for",
    "gemma3_text": "Gemma 3 normalises q and k, and what its attention and MLP put out, which Bamba has no place for",
    "olmo2": "OLMo 2 normalises q and k, and after its blocks rather than before them, which Bamba has no place for",
    "olmo3": "OLMo 3 normalises q and k, and after its blocks rather than before them, which Bamba has no place for",
    "granite": "Granite scales its embedding, what its blocks add to the residual stream, and its logits; Bamba does "
    "not",
    "granitemoe": "Granite's MLPs are mixtures of experts, and its embedding, blocks and logits are scaled",
    "arcee": "AFM's MLP has no gate, Bamba's has one",
    "ministral3": "Ministral 3 makes queries larger the later they stand, which Bamba does not",
    "mixtral": "Mixtral's MLPs are mixtures of experts, Bamba's are not",
    "qwen3_moe": "Qwen3 normalises q and k, and its MLPs are mixtures of experts, which Bamba has no place for",
    "qwen3": "Qwen3 normalises q and k (q_norm, k_norm), which Bamba's attention does not",
    "smollm3": "SmolLM3 leaves some layers without rotary positions, Bamba rotates in all or in none",
}


def why_not_bamba(config: HybridConfig, *, pad_expand: bool = False) -> str | None:
    """Why a student of this configuration cannot be a Bamba, in one line, or None when it can."""
    base = config.base_config
    shape = decoder_shape(base)
    if config.mixer != "mamba2":
        if config.mixer != "discrete_mamba2":
            return f"its mixers are {config.mixer}, Bamba's are Mamba-2's"
        return (
            f"its mixers are {config.mixer}: Bamba's scale their input by dt, have SiLU after the convolution and a "
            "norm before the output projection, which these do not"
        )
    if base.model_type not in EXPRESSIBLE:
        return FOREIGN.get(base.model_type, f"no mapping from {base.model_type} blocks to Bamba's is known")
    if base.hidden_act != "silu":
        return f"its activation is {base.hidden_act}: in Bamba the MLP's is the mixer's too, and that is silu"
    rope = getattr(base, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return (
            "its longrope positions change once a text outgrows the first training's, and keys cached until then are "
            "made anew; Bamba would keep them"
        )
    window = getattr(base, "sliding_window", None)
    if "sliding_attention" in config.layer_types and window < base.max_position_embeddings:
        left = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
        return f"the attention in layers {_listed(left)} sees a sliding window of {window} tokens, Bamba's sees all"
    if config.output_norm_eps != base.rms_norm_eps:
        return (
            f"its mixers' output norms have epsilon {config.output_norm_eps:g}, its other norms {base.rms_norm_eps:g}; "
            "Bamba has one for all"
        )
    if config.is_pure_ssm:
        return "no attention layer is left: transformers sizes Bamba's cache and mask from one, and generate fails"
    inner = config.mixer_num_heads * config.mixer_head_dim
    size = f"{config.mixer_num_heads} heads x {config.mixer_head_dim} = {inner}"
    if pad_expand and _padded_heads(config) is None:
        return (
            f"its mixers' {size} channels cannot be padded with whole heads to a multiple of the hidden size "
            f"{shape.hidden_size}"
        )
    if inner % shape.hidden_size and not pad_expand:
        return (
            f"its mixers are {size} channels wide, no multiple of the hidden size {shape.hidden_size} (mamba_expand is "
            "an integer)" + ("; --pad-expand adds heads of zeros" if _padded_heads(config) is not None else "")
        )
    if config.mixer_num_groups > 1 and not norms_groups_apart():
        from transformers import __version__

        return (
            f"the installed transformers {__version__} normalises all {config.mixer_num_groups} groups of a mixer "
            "together, 5.23 and later each alone, as the student does; upgrade transformers"
        )
    return None


def norms_groups_apart() -> bool:
    """Whether the installed transformers' Bamba normalises each group of its mixer's output by itself."""
    return "group_size" in inspect.signature(modeling_bamba.BambaRMSNormGated).parameters


def has_conv_input_bias(hybrid: HybridForCausalLM) -> bool:
    """Whether in_proj adds a bias to what enters a convolution (x, B, C) in some layer."""
    return any(bool(bias[rows].any()) for _, bias, rows in _conv_input_biases(hybrid))


@torch.no_grad()
def fold_conv_input_bias(hybrid: HybridForCausalLM) -> None:
    """Moves in_proj's biases on x, B and C into the convolution's bias, in place.

    Nearly the same function: in the first conv_kernel - 1 tokens of a text the convolution also saw zeros instead of
    the bias, and a little of that stays in states, keys and values.
    """
    for mixer, bias, rows in _conv_input_biases(hybrid):
        mixer.conv1d.bias += bias[rows] * mixer.conv1d.weight[:, 0].sum(-1)
        bias[rows] = 0.0


def _conv_input_biases(hybrid: HybridForCausalLM):
    for i in hybrid.config.ssm_layers:
        mixer = hybrid.model.layers[i].self_attn
        if mixer.in_proj.bias is not None:
            yield mixer, mixer.in_proj.bias, mixer.slices()["xBC"]


@torch.no_grad()
def to_bamba(hybrid: HybridForCausalLM, *, pad_expand: bool = False) -> BambaForCausalLM:
    """The student as a stock Bamba: the same logits for every text, the weights copied.

    Args:
        hybrid: with `mamba2` mixers; left as it was.
        pad_expand: add heads of zeros to the mixers, up to mamba_expand 2 or the next integer above it: the same
            function, as llama.cpp (which wants 2) can load it.

    Returns:
        BambaForCausalLM, on the student's device and in its dtype.

    Raises:
        ValueError: what Bamba cannot express, with the reason (`why_not_bamba`), biases on what enters a convolution
            among it: transformers' Bamba lets them through the padding of a batch.
    """
    if reason := why_not_bamba(hybrid.config, pad_expand=pad_expand):
        raise ValueError(f"this student cannot be a BambaForCausalLM: {reason}")
    if has_conv_input_bias(hybrid):
        raise ValueError(
            "this student cannot be a BambaForCausalLM: its in_proj has biases on x, B and C, which transformers' "
            "Bamba lets through the padding of a batch into the convolution; fold_conv_input_bias moves them behind it"
        )
    config = hybrid.config
    heads = _padded_heads(config) if pad_expand else config.mixer_num_heads
    assert heads is not None  # else why_not_bamba has said so
    state = _bamba_state(hybrid, heads)
    bamba_config = _bamba_config(config, heads, state)
    if bamba_config.attention_bias:  # one switch for all four projections; Qwen2 has no bias on o_proj
        zeros = hybrid.lm_head.weight.new_zeros(config.hidden_size)
        for i in bamba_config.attn_layer_indices or ():
            state.setdefault(f"model.layers.{i}.self_attn.o_proj.bias", zeros)
    model = BambaForCausalLM(bamba_config)
    cast(model, hybrid.dtype)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = saveable(hybrid.generation_config)
    # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
    return model.to(hybrid.device).train(hybrid.training)


@torch.no_grad()
def from_bamba(model: BambaForCausalLM) -> HybridForCausalLM:
    """A Bamba as a hybrid of a Llama-shaped decoder: `to_bamba` undone (heads of zeros stay), weights copied.

    Raises:
        ValueError: a Bamba that is no such hybrid: partial rotary positions (as in the released Bamba-9B), an
            activation other than silu, a limit on dt.
    """
    own: Any = model.config
    rope = dict(own.rope_parameters)
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            f"from_bamba: rotary positions turn {partial:g} of each head, a Llama-shaped decoder turns all"
        )
    if own.hidden_act != "silu":
        raise ValueError(f"from_bamba: hidden_act must be 'silu', got {own.hidden_act!r}")
    if tuple(own.time_step_limit) != (0.0, float("inf")):
        raise ValueError(f"from_bamba: time_step_limit must be (0, inf), got {tuple(own.time_step_limit)}")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "tie_word_embeddings", "attention_bias", "attention_dropout", "mlp_bias", "pad_token_id", "bos_token_id",
        "eos_token_id",
    )  # fmt: skip
    base = LlamaConfig(
        **{name: getattr(own, name) for name in names}, rope_parameters=rope, head_dim=decoder_shape(own).head_dim
    )
    config = HybridConfig(
        base_config=base,
        layer_types=list(own.layers_block_type),
        mixer="mamba2",
        mixer_num_heads=own.mamba_n_heads,
        mixer_head_dim=own.mamba_d_head,
        mixer_state_size=own.mamba_d_state,
        mixer_num_groups=own.mamba_n_groups,
        mixer_conv_kernel=own.mamba_d_conv,
        mixer_bias=own.mamba_proj_bias,
    )
    config._attn_implementation = own._attn_implementation
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in _RENAMED.items():
            key = key.replace(theirs, ours)
        state[key.replace(".mamba.", ".self_attn.")] = value
    if not own.mamba_conv_bias:
        for i in config.ssm_layers:
            weight = state[f"model.layers.{i}.self_attn.conv1d.weight"]
            state[f"model.layers.{i}.self_attn.conv1d.bias"] = weight.new_zeros(len(weight))
    hybrid = HybridForCausalLM(config)
    cast(hybrid, model.dtype)
    hybrid.load_state_dict(state)
    hybrid.tie_weights()
    hybrid.generation_config = saveable(model.generation_config)
    # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
    return hybrid.to(model.device).train(model.training)


def _bamba_config(config: HybridConfig, heads: int, state: dict[str, Tensor]) -> BambaConfig:
    base, shape = config.base_config, decoder_shape(config.base_config)
    rope = dict(base.rope_parameters)
    rope.setdefault("partial_rotary_factor", 1.0)  # Bamba's own default is 0.5
    other: dict[str, Any] = (
        {} if shape.head_dim * shape.num_heads == shape.hidden_size else {"head_dim": shape.head_dim}
    )
    return BambaConfig(
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
        attention_bias=any(key.endswith("self_attn.q_proj.bias") for key in state),
        mlp_bias=any(".feed_forward." in key and key.endswith(".bias") for key in state),
        rope_parameters=rope,
        attn_layer_indices=[i for i, kind in enumerate(config.layer_types) if kind != SSM_LAYER],
        mamba_n_heads=heads,
        mamba_d_head=config.mixer_head_dim,
        mamba_n_groups=config.mixer_num_groups * heads // config.mixer_num_heads,
        mamba_d_state=config.mixer_state_size,
        mamba_d_conv=config.mixer_conv_kernel,
        mamba_expand=heads * config.mixer_head_dim // shape.hidden_size,
        mamba_conv_bias=True,
        mamba_proj_bias=config.mixer_bias,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        attn_implementation=config._attn_implementation,  # pyrefly: ignore[unexpected-keyword]  # the base class takes it
        **other,
    )


def _bamba_state(hybrid: HybridForCausalLM, heads: int) -> dict[str, Tensor]:
    """The student's weights under Bamba's names, mixers padded to so many heads, fused projections cut."""
    config, shape = hybrid.config, decoder_shape(hybrid.config.base_config)
    kv = shape.num_kv_heads * shape.head_dim
    mixers = tuple(f"model.layers.{i}.self_attn." for i in config.ssm_layers)
    state = {}
    for key, value in hybrid.state_dict().items():
        for ours, theirs in _RENAMED.items():
            key = key.replace(ours, theirs)
        if key.startswith(mixers):
            part = key.split(".self_attn.")[1]
            state[key.replace(".self_attn.", ".mamba.")] = _pad_heads(part, value, config, heads)
        elif ".qkv_proj." in key:
            for name, rows in zip("qkv", value.split([shape.num_heads * shape.head_dim, kv, kv]), strict=True):
                state[key.replace("qkv_proj", f"{name}_proj")] = rows
        elif ".gate_up_proj." in key:
            for name, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                state[key.replace("gate_up_proj", f"{name}_proj")] = rows
        else:
            state[key] = value
    return state


def padded_expand(config: HybridConfig) -> int:
    """mamba_expand of the student once `pad_expand` has added its heads."""
    heads = _padded_heads(config)
    assert heads is not None  # asked of students that are padded
    return heads * config.mixer_head_dim // config.base_config.hidden_size


def _padded_heads(config: HybridConfig) -> int | None:
    """Heads that fill mamba_expand 2 (or the next integer above what there is), None where whole heads cannot."""
    hidden, inner = config.base_config.hidden_size, config.mixer_num_heads * config.mixer_head_dim
    heads, rest = divmod(max(2, -(-inner // hidden)) * hidden, config.mixer_head_dim)
    per_group = config.mixer_num_heads // config.mixer_num_groups
    return None if rest or heads % per_group else heads


def _pad_heads(part: str, value: Tensor, config: HybridConfig, heads: int) -> Tensor:
    """One of a mixer's parameters with heads of zeros added, which read nothing and put out nothing.

    The output norm works group by group, so the new heads come with groups of their own.
    """
    if heads == config.mixer_num_heads:
        return value
    h, p, g, N = config.mixer_num_heads, config.mixer_head_dim, config.mixer_num_groups, config.mixer_state_size
    inner, group, head = (h * p, heads * p), (g * N, g * heads // h * N), (h, heads)
    parts = {
        "in_proj.weight": [inner, inner, group, group, head],  # rows of z, x, B, C, dt
        "in_proj.bias": [inner, inner, group, group, head],
        "conv1d.weight": [inner, group, group],
        "conv1d.bias": [inner, group, group],
        "norm.weight": [inner],
        "A_log": [head],
        "D": [head],
        "dt_bias": [head],
    }
    if part == "out_proj.weight":
        return F.pad(value, (0, inner[1] - inner[0]))
    if part == "out_proj.bias":
        return value
    sizes = parts[part]
    below = (0, 0) * (value.dim() - 1)
    pieces = value.split([old for old, _ in sizes])
    return torch.cat([F.pad(v, (*below, 0, new - old)) for v, (old, new) in zip(pieces, sizes, strict=True)])


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")

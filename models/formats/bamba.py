"""A hybrid student as transformers' own `BambaForCausalLM`, which runs where this package is not installed, and back.

Bamba is a Llama-shaped decoder some of whose layers are Mamba-2: a `mamba2` hybrid of such a teacher is the same
function under other names (all of them in `_RENAMED`). What Bamba has no place for is refused with the reason.
Granite 4 (granite.py) has the same layers, and shares what is said here about them.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig
from transformers.models.bamba import modeling_bamba

from mohawk.models.casting import cast
from mohawk.models.families import decoder_shape
from mohawk.models.formats.stock import decoder_fields
from mohawk.models.generation_settings import saveable
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
    "phi": "Phi's blocks run attention and MLP side by side on one LayerNorm, {name}'s one after the other on RMSNorms",
    "cohere": "Cohere's blocks run attention and MLP side by side on one LayerNorm; its logits are scaled",
    "cohere2": "Cohere 2's blocks run attention and MLP side by side on one LayerNorm; its logits are scaled",
    "gemma": "Gemma's embedding is scaled and its norms multiply by 1 plus their weight, which {name}'s do not",
    "gemma2": "Gemma 2 has softcaps and norms after its attention and MLP, which {name} has no place for",
    "gemma3_text": "Gemma 3 normalises q and k, and what its attention and MLP put out, which {name} has no place for",
    "olmo2": "OLMo 2 normalises q and k, and after its blocks rather than before them, which {name} has no place for",
    "olmo3": "OLMo 3 normalises q and k, and after its blocks rather than before them, which {name} has no place for",
    "granite": "Granite scales its embedding, what its blocks add to the residual stream, and its logits; {name}'s "
    "scales are all 1 here",
    "granitemoe": "Granite's MLPs are mixtures of experts, and its embedding, blocks and logits are scaled",
    "arcee": "AFM's MLP has no gate, {name}'s has one",
    "ministral3": "Ministral 3 makes queries larger the later they stand, which {name} does not",
    "mixtral": "Mixtral's MLPs are mixtures of experts, {name}'s are not",
    "qwen3_moe": "Qwen3 normalises q and k, and its MLPs are mixtures of experts, which {name} has no place for",
    "qwen3": "Qwen3 normalises q and k (q_norm, k_norm), which {name}'s attention does not",
    "smollm3": "SmolLM3 leaves some layers without rotary positions, {name} rotates in all or in none",
}


def why_not_bamba(config: HybridConfig, *, pad_expand: bool = False) -> str | None:
    """Why a student of this configuration cannot be a Bamba, in one line, or None when it can."""
    reason = why_not_mamba2(config, "Bamba", pad_expand) or why_not_pure(config, "Bamba")
    return reason or why_not_groups(config, norms_groups_apart())


def why_not_mamba2(config: HybridConfig, name: str, pad_expand: bool) -> str | None:
    """Why a student cannot be a stock decoder of Llama-shaped blocks and Mamba-2 layers.

    name: of that decoder, as the line calls it.
    """
    base = config.base_config
    shape = decoder_shape(base)
    if config.mixer != "mamba2":
        if config.mixer != "discrete_mamba2":
            return f"its mixers are {config.mixer_words}, {name}'s are Mamba-2's"
        return (
            f"its mixers are {config.mixer}: {name}'s scale their input by dt, have SiLU after the convolution and a "
            "norm before the output projection, which these do not"
        )
    if base.model_type not in EXPRESSIBLE:
        unknown = f"no mapping from {base.model_type} blocks to {name}'s is known"
        return FOREIGN.get(base.model_type, unknown).format(name=name)
    if reason := why_not_layers(config, name):
        return reason
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
    return None


def why_not_layers(config: HybridConfig, name: str) -> str | None:
    """What the stock decoder of that name cannot do of a student's activation, positions, windows and norms."""
    base = config.base_config
    if base.hidden_act != "silu":
        return f"its activation is {base.hidden_act}: in {name} the MLP's is the mixer's too, and that is silu"
    rope = getattr(base, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return (
            "its longrope positions change once a text outgrows the first training's, and keys cached until then are "
            f"made anew; {name} would keep them"
        )
    window = getattr(base, "sliding_window", None)
    if "sliding_attention" in config.layer_types and window < base.max_position_embeddings:
        left = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
        return f"the attention in layers {_listed(left)} sees a sliding window of {window} tokens, {name}'s sees all"
    if config.output_norm_eps != base.rms_norm_eps:
        return (
            f"its mixers' output norms have epsilon {config.output_norm_eps:g}, its other norms {base.rms_norm_eps:g}; "
            f"{name} has one for all"
        )
    return None


def why_not_pure(config: HybridConfig, name: str) -> str | None:
    """The line for a student without attention, which transformers' decoder of that name needs; None for others."""
    if not config.is_pure_ssm:
        return None
    return f"no attention layer is left: transformers sizes {name}'s cache and mask from one, and generate fails"


def why_not_groups(config: HybridConfig, apart: bool) -> str | None:
    """The line for a transformers whose mixers do not norm their groups apart, where a student's have several."""
    from transformers import __version__

    if apart or config.mixer_num_groups == 1:
        return None
    return (
        f"the installed transformers {__version__} normalises all {config.mixer_num_groups} groups of a mixer "
        "together, 5.23 and later each alone, as the student does; upgrade transformers"
    )


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


def conv_input_bias(hybrid: HybridForCausalLM, name: str) -> str | None:
    """The line for a student with such biases, which the decoder of that name cannot have; None for others."""
    if not has_conv_input_bias(hybrid):
        return None
    return (
        f"its in_proj has biases on x, B and C, which transformers' {name} lets through the padding of a batch into "
        "the convolution; fold_conv_input_bias moves them behind it"
    )


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
    if reason := why_not_bamba(hybrid.config, pad_expand=pad_expand) or conv_input_bias(hybrid, "Bamba"):
        raise ValueError(f"this student cannot be a BambaForCausalLM: {reason}")
    state = mamba2_state(hybrid, pad_expand=pad_expand)
    return filled(BambaForCausalLM(_bamba_config(hybrid.config, pad_expand, state)), _renamed(state), hybrid)


def bamba_config(config: HybridConfig, *, pad_expand: bool = False) -> BambaConfig:
    """The configuration of `to_bamba` of a student of this one, which has to be expressible (`why_not_bamba`)."""
    with torch.device("meta"):
        state = mamba2_state(HybridForCausalLM(copy.deepcopy(config)), pad_expand=pad_expand)
    return _bamba_config(config, pad_expand, state)


def filled(model: Any, state: dict[str, Tensor], hybrid: HybridForCausalLM) -> Any:
    """A stock model with these weights, and the rest as a student has it: dtype, device, mode, generation settings."""
    cast(model, hybrid.dtype)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = saveable(hybrid.generation_config)
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


def _bamba_config(config: HybridConfig, pad_expand: bool, state: dict[str, Tensor]) -> BambaConfig:
    rope = dict(config.base_config.rope_parameters)
    rope.setdefault("partial_rotary_factor", 1.0)  # Bamba's own default is 0.5
    return BambaConfig(
        **mamba2_fields(config, pad_expand, state),
        mlp_bias=any(".mlp." in key and key.endswith(".bias") for key in state),
        rope_parameters=rope,
        attn_layer_indices=[i for i, kind in enumerate(config.layer_types) if kind != SSM_LAYER],
    )


def mamba2_fields(config: HybridConfig, pad_expand: bool, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fields that Bamba's and Granite's configurations have in common. state: of `mamba2_state`, if only its names."""
    shape, heads = decoder_shape(config.base_config), _heads(config, pad_expand)
    other = {} if shape.head_dim * shape.num_heads == shape.hidden_size else {"head_dim": shape.head_dim}
    return dict(
        **decoder_fields(config),
        attention_bias=any(key.endswith("self_attn.q_proj.bias") for key in state),
        mamba_n_heads=heads,
        mamba_d_head=config.mixer_head_dim,
        mamba_n_groups=config.mixer_num_groups * heads // config.mixer_num_heads,
        mamba_d_state=config.mixer_state_size,
        mamba_d_conv=config.mixer_conv_kernel,
        mamba_expand=heads * config.mixer_head_dim // shape.hidden_size,
        mamba_conv_bias=True,
        mamba_proj_bias=config.mixer_bias,
        **other,
    )


def mamba2_state(hybrid: HybridForCausalLM, *, pad_expand: bool) -> dict[str, Tensor]:
    """`mamba2_weights`, all at once."""
    return dict(mamba2_weights(hybrid, pad_expand=pad_expand))


def mamba2_weights(hybrid: HybridForCausalLM, *, pad_expand: bool) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under our names, but mixers under `mamba`, padded if asked, and fused projections cut.

    What is padded is made when it is asked for: whoever writes it tensor by tensor holds no second model.
    """
    config, shape = hybrid.config, decoder_shape(hybrid.config.base_config)
    heads, kv = _heads(config, pad_expand), shape.num_kv_heads * shape.head_dim
    mixers = tuple(f"model.layers.{i}.self_attn." for i in config.ssm_layers)
    state = hybrid.state_dict()
    for key, value in state.items():
        if key.startswith(mixers):
            part = key.split(".self_attn.")[1]
            yield key.replace(".self_attn.", ".mamba."), _pad_heads(part, value, config, heads)
        elif ".qkv_proj." in key:
            for name, rows in zip("qkv", value.split([shape.num_heads * shape.head_dim, kv, kv]), strict=True):
                yield key.replace("qkv_proj", f"{name}_proj"), rows
        elif ".gate_up_proj." in key:
            for name, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                yield key.replace("gate_up_proj", f"{name}_proj"), rows
        else:
            yield key, value
        # one switch for the biases of all four projections; Qwen2 has none on o_proj
        if key.endswith("self_attn.q_proj.bias") and (o_proj := key.replace("q_proj", "o_proj")) not in state:
            yield o_proj, value.new_zeros(shape.hidden_size)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Bamba's names instead of ours."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in _RENAMED.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def _heads(config: HybridConfig, pad_expand: bool) -> int:
    heads = _padded_heads(config) if pad_expand else config.mixer_num_heads
    assert heads is not None  # else why_not_mamba2 has said so
    return heads


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

"""A hybrid student of a Qwen3 teacher as transformers' own `Qwen3_5ForCausalLM`: Gated DeltaNet and Qwen3's attention.

Qwen3.5's DeltaNet layers are a `gated_delta` mixer's, number for number. Its attention is Qwen3's with two additions
that can be undone: a gate on what each head puts out, whose rows are 0 here, so that it is sigmoid(0) = 1/2 everywhere
and o_proj twice as large; and norm weights that are stored as w - 1.

In bfloat16 w - 1 is rounded where w is below 1/2, by percents where w is small. A channel of a norm that linear maps
read can be larger by a power of two, and their columns smaller by it, which is exact: so all those get weights of which
w - 1 is exact too. What is left (q_norm, k_norm, the last norm of a tied model) is kept in float32.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from mohawk.models.families import decoder_shape
from mohawk.models.formats.bamba import filled, why_not_layers, why_not_pure
from mohawk.models.formats.stock import decoder_fields
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig

ATTENTION_WEIGHTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
DELTA = tuple(f"self_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))
MLP = ("mlp.gate_proj", "mlp.up_proj")


def why_not_qwen3_5(config: HybridConfig) -> str | None:
    """Why a student of this configuration cannot be a Qwen3.5, in one line, or None when it can."""
    base = config.base_config
    if config.mixer != "gated_delta":
        return f"its mixers are {config.mixer_words}, Qwen3.5's are gated_delta"
    if base.model_type != "qwen3":
        return f"its attention is {base.model_type}'s; Qwen3.5's normalises q and k as Qwen3's does, and only Qwen3's"
    if getattr(base, "attention_bias", False) or config.mixer_bias:
        return "its attention or mixers have biases on their projections, Qwen3.5's mixers have none"
    return why_not_layers(config, "Qwen3.5") or why_not_pure(config, "Qwen3.5")


def regular_interval(layer_types: list[str]) -> int | None:
    """N where attention is at the layers i with (i + 1) % N == 0 and at no others; None where there is no such N."""
    attends = [i + 1 for i, kind in enumerate(layer_types) if kind != SSM_LAYER]
    regular = attends and attends == list(range(attends[0], len(layer_types) + 1, attends[0]))
    return attends[0] if regular else None


@torch.no_grad()
def to_qwen3_5(hybrid: HybridForCausalLM) -> Qwen3_5ForCausalLM:
    """The student as a stock Qwen3.5, text alone: the same logits for every text.

    Args:
        hybrid: a student of a Qwen3 teacher with `gated_delta` mixers; left as it was.

    Returns:
        Qwen3_5ForCausalLM, on the student's device and in its dtype, but for norms of `wide_norms`: they are float32.

    Raises:
        ValueError: what Qwen3.5 cannot express, with the reason (`why_not_qwen3_5`).
    """
    if reason := why_not_qwen3_5(hybrid.config):
        raise ValueError(f"this student cannot be a Qwen3_5ForCausalLM: {reason}")
    state, wide = dict(hybrid.state_dict()), []
    for norm, weight, factors in _norms(hybrid):
        state[norm] = weight
        wide += [norm] * (weight.dtype != hybrid.dtype)
        for key, factor in factors.items():
            state[key] = state[key] * factor
    stock = Qwen3_5ForCausalLM(qwen3_5_config(hybrid.config))
    model = filled(stock, dict(gated_weights(state.items(), hybrid.config)), hybrid)
    for norm in wide:
        # what `filled` has rounded to the model's dtype
        model.get_submodule(norm.removesuffix(".weight")).weight = torch.nn.Parameter(state[norm].clone())
    return model


def wide_norms(hybrid: HybridForCausalLM) -> dict[str, float]:
    """Norms that `to_qwen3_5` keeps in float32, each with the largest share of a weight that the student's dtype would
    lose of it; empty for a float32 student."""
    found = {}
    for norm, weight, _ in _norms(hybrid):
        if weight.dtype != hybrid.dtype:
            whole = weight.double() + 1
            lost = (weight.to(hybrid.dtype).double() + 1 - whole).abs() / whole.abs()
            found[norm] = float(lost[whole != 0].max())
    return found


def qwen3_5_config(config: HybridConfig) -> Qwen3_5TextConfig:
    """The configuration of `to_qwen3_5` of a student of this one, which has to be expressible (`why_not_qwen3_5`)."""
    base, shape = config.base_config, decoder_shape(config.base_config)
    kinds = [SSM_LAYER if i in config.ssm_layers else "full_attention" for i in range(shape.num_layers)]
    interval = regular_interval(kinds)
    # runtimes that compute the layers' kinds from it find them as they are, others find none and stop
    other: dict[str, Any] = {} if interval is None else {"full_attention_interval": interval}
    return Qwen3_5TextConfig(
        **decoder_fields(config),
        head_dim=shape.head_dim,
        rope_parameters={**base.rope_parameters, "partial_rotary_factor": 1.0},  # Qwen3.5's own default is 0.25
        layer_types=kinds,
        linear_num_value_heads=config.mixer_num_heads,
        linear_value_head_dim=config.mixer_head_dim,
        linear_num_key_heads=config.mixer_num_groups,
        linear_key_head_dim=config.mixer_state_size,
        linear_conv_kernel_dim=config.mixer_conv_kernel,
        **other,
    )


def gated_weights(weights: Iterable[tuple[str, Tensor]], config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights by Qwen3.5's names, attention with a gate that is 1/2 and an o_proj of twice the size."""
    head_dim = decoder_shape(config.base_config).head_dim
    mixers = tuple(f"model.layers.{i}.self_attn." for i in config.ssm_layers)
    for key, value in weights:
        if key.startswith(mixers):
            key = key.replace(".self_attn.", ".linear_attn.")
        elif key.endswith(".q_proj.weight"):  # each head's rows of q, then those of its gate
            rows = value.unflatten(0, (-1, head_dim))
            value = torch.cat([rows, torch.zeros_like(rows)], 1).flatten(0, 1)
        elif key.endswith(".o_proj.weight"):
            value = 2 * value
        yield key, value


def _norms(hybrid: HybridForCausalLM) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """For each norm that is stored as w - 1: its name, that, and what the columns of which weights are multiplied by.

    In the student's dtype, or in float32 where that would round it.
    """
    state, config = hybrid.state_dict(), hybrid.config
    for key in [key for key in state if key.endswith("norm.weight") and not _of_mixer(key, config)]:
        weight, readers = state[key].double(), _readers(key, config)
        moved = _rounded(weight, hybrid.dtype) & (weight != 0)
        share, exponent = torch.frexp(weight)  # w = share 2^exponent, |share| in [1/2, 1)
        power = torch.ldexp(share.sign(), exponent)
        for columns in (state[name] for name in readers if moved.any()):
            by = power.to(columns.dtype)
            moved &= (columns * by / by == columns).all(0)  # no overflow, no underflow
        if not readers or not moved.any():
            factors = {}
        else:
            factor = torch.where(moved, power, 1.0)
            weight = weight / factor
            factors = {name: factor.to(state[name].dtype) for name in readers}
        narrow = hybrid.dtype.itemsize >= 4 or not _rounded(weight, hybrid.dtype).any()
        yield key, (weight - 1).to(hybrid.dtype if narrow else torch.float32), factors


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether w - 1 is not exact in a dtype, entry by entry."""
    return (weight - 1).to(dtype).double() + 1 != weight


def _of_mixer(key: str, config: HybridConfig) -> bool:
    return any(key.startswith(f"model.layers.{i}.self_attn.") for i in config.ssm_layers)


def _readers(norm: str, config: HybridConfig) -> list[str]:
    """Names of the weights that read what a norm puts out, if they are all that does."""
    if norm == "model.norm.weight":
        return [] if config.tie_word_embeddings else ["lm_head.weight"]
    layer, name = norm.removeprefix("model.layers.").split(".", 1)
    mixes = DELTA if int(layer) in config.ssm_layers else ATTENTION_WEIGHTS
    parts = {"input_layernorm.weight": mixes, "post_attention_layernorm.weight": MLP}
    return [f"model.layers.{layer}.{part}.weight" for part in parts.get(name, ())]

"""A hybrid student as transformers' own `GraniteMoeHybridForCausalLM` (Granite 4), which vLLM and SGLang serve.

Without experts its blocks are Bamba's (bamba.py) with the MLP's two input projections in one, and with multipliers that
can all be 1. So it takes the students that Bamba takes, but for those with biases in their MLPs.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from transformers.models.granitemoehybrid import modeling_granitemoehybrid

from mohawk.models.families import decoder_shape
from mohawk.models.formats.bamba import (
    conv_input_bias,
    filled,
    mamba2_fields,
    mamba2_state,
    why_not_groups,
    why_not_mamba2,
    why_not_pure,
)
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig


def why_not_granite(config: HybridConfig, *, pad_expand: bool = False) -> str | None:
    """Why a student of this configuration cannot be a Granite 4, in one line, or None when it can."""
    if config.mixer == "mamba2" and getattr(config.base_config, "mlp_bias", False):
        return "its MLPs have biases (mlp_bias), which Granite's have no place for and Bamba's do"
    reason = why_not_mamba2(config, "Granite", pad_expand) or why_not_pure(config, "Granite")
    return reason or why_not_groups(config, norms_groups_apart())


def norms_groups_apart() -> bool:
    """Whether the installed transformers' Granite 4 normalises each group of its mixer's output by itself."""
    return "group_size" in inspect.signature(modeling_granitemoehybrid.GraniteMoeHybridRMSNormGated).parameters


@torch.no_grad()
def to_granite(hybrid: HybridForCausalLM, *, pad_expand: bool = False) -> GraniteMoeHybridForCausalLM:
    """The student as a stock Granite 4 without experts: the same logits for every text, the weights copied.

    Args:
        hybrid: with `mamba2` mixers; left as it was.
        pad_expand: add heads of zeros to the mixers, up to mamba_expand 2 or the next integer above it: the same
            function, for mixers whose channels are no multiple of the hidden size.

    Returns:
        GraniteMoeHybridForCausalLM, on the student's device and in its dtype.

    Raises:
        ValueError: what Granite 4 cannot express, with the reason (`why_not_granite`), biases on what enters a
            convolution among it, as in `to_bamba`.
    """
    if reason := why_not_granite(hybrid.config, pad_expand=pad_expand) or conv_input_bias(hybrid, "Granite"):
        raise ValueError(f"this student cannot be a GraniteMoeHybridForCausalLM: {reason}")
    state = mamba2_state(hybrid, pad_expand=pad_expand)
    model = GraniteMoeHybridForCausalLM(_config(hybrid.config, pad_expand, state))
    return filled(model, _renamed(state), hybrid)


def granite_config(config: HybridConfig, *, pad_expand: bool = False) -> GraniteMoeHybridConfig:
    """The configuration of `to_granite` of a student of this one, which has to be expressible (`why_not_granite`)."""
    with torch.device("meta"):
        state = mamba2_state(HybridForCausalLM(copy.deepcopy(config)), pad_expand=pad_expand)
    return _config(config, pad_expand, state)


def _config(config: HybridConfig, pad_expand: bool, state: dict[str, Tensor]) -> GraniteMoeHybridConfig:
    base = config.base_config
    fields: dict[str, Any] = mamba2_fields(config, pad_expand, state)
    return GraniteMoeHybridConfig(
        **fields,
        shared_intermediate_size=base.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=[
            "linear_attention" if i in config.ssm_layers else "full_attention" for i in range(len(config.layer_types))
        ],
        position_embedding_type="rope",
        rope_parameters=dict(base.rope_parameters),
        attention_multiplier=decoder_shape(base).head_dim ** -0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by Granite's names; ours differ in the MLP alone."""
    renamed = {}
    for key, value in state.items():
        if key.endswith(".mlp.gate_proj.weight"):
            up = state[key.replace("gate_proj", "up_proj")]
            renamed[key.replace("mlp.gate_proj", "shared_mlp.input_linear")] = torch.cat([value, up])
        elif not key.endswith(".mlp.up_proj.weight"):
            renamed[key.replace("mlp.down_proj", "shared_mlp.output_linear")] = value
    return renamed

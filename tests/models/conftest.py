"""Tiny random checkpoints of every supported family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk.models.families import FAMILIES as KNOWN

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# one parameter a family, or two where a configuration decides what its code does: (model_type, configuration)
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "ministral": (
        "ministral", {"head_dim": 12, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    # queries grow behind 16 tokens
    "ministral3": (
        "ministral3",
        {"head_dim": 16,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 32.0,
                             "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                             "original_max_position_embeddings": 16}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    # layer 0 has an MLP of its own size
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "granite": (
        "granite",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
         "attention_multiplier": 0.2, "logits_scaling": 3.0, "tie_word_embeddings": True},
    ),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
         "attention_multiplier": 0.2, "logits_scaling": 3.0, "tie_word_embeddings": True},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 12}),
    "arcee": ("arcee", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "gemma": ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    # layers 0 and 2 have the window; the caps are low enough to matter
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
         "final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    ),
    # layer 2 alone is full attention, and has rotary positions of its own
    "gemma3": (
        "gemma3_text",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 6,
         "sliding_window_pattern": 3, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 6}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi_normed": (
        "phi",
        {"qk_layernorm": True, "num_attention_heads": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
    "phi3": ("phi3", {"sliding_window": 6}),
    # the long factors take over behind 64 tokens
    "phi4_mini": (
        "phi3",
        {"tie_word_embeddings": True, "num_attention_heads": 2, "original_max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                             "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                             "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                             "original_max_position_embeddings": 64}},
    ),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.3}),
    # layers 0 and 2 have a window and rotary positions, the others neither
    "cohere2": ("cohere2", {"sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.3}),
}  # fmt: skip
# those that can be cut: no mixtures of experts
CUTTABLE = [name for name, (kind, _) in FAMILIES.items() if not KNOWN[kind].experts]


def tiny_teacher(family: str = "llama", **overrides):
    """A random float32 checkpoint whose biases and norms are not at their trivial defaults."""
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**COMMON, **options, **overrides})
    # sdpa, the default of older transformers, leaves Gemma 2's softcap out
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 2:
                parameter.mul_(4)  # logits that differ
    return model


@pytest.fixture(params=FAMILIES)
def teacher(request):
    return tiny_teacher(request.param)

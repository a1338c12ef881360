"""Tiny random checkpoints of every supported family."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama_biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
}


def tiny_teacher(family: str = "llama", **overrides):
    """A random float32 checkpoint whose biases and norms are not at their trivial defaults."""
    torch.manual_seed(0)
    model_class, config_class, options = FAMILIES[family]
    model = model_class(config_class(**{**COMMON, **options, **overrides})).eval()
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

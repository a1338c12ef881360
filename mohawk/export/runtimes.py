"""What is known about running an exported student elsewhere, and whether it was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


VLLM = "0.23"  # the last vLLM with a Bamba
GROUPS_APART = "5.23"  # the first transformers whose Bamba normalises each group by itself (5.17 to 5.22 were read)


@dataclass(frozen=True)
class Note:
    """checked: whether this very export was run there, by the export doctor."""

    runtime: str
    checked: bool
    text: str


def notes(config: PretrainedConfig) -> list[Note]:
    """Per runtime, of an exported configuration (Bamba's, or the hybrid's own)."""
    if config.model_type != "bamba":
        return [
            Note("transformers", True, "with trust_remote_code=True: the model's code lies beside its weights"),
            Note("llama.cpp, vLLM, SGLang, MLX", False, "have no class for it; llama.cpp has one for --to bamba"),
        ]
    stock = (
        "stock class, nothing else to install; pass position_ids when you call the model with a cache yourself, and "
        "pad on the left: its own code lets padding that comes after a token into the state"
    )
    if config.mamba_n_groups > 1:
        stock += f". Needs {GROUPS_APART} or later: earlier ones normalise a mixer's groups together, without a word"
    return [
        Note("transformers", True, stock),
        Note("llama.cpp", False, _llama_cpp(config)),
        Note("vLLM", False, _vllm(config)),
        Note("SGLang", False, "has never had Bamba (read up to 0.5.23)"),
        Note("MLX", False, "has never had Bamba (mlx-lm, read up to 0.32; its granitemoehybrid is another layout)"),
    ]


def _vllm(config: PretrainedConfig) -> str:
    text = f"removed Bamba after {VLLM}: today's releases do not serve this folder"
    lost = [name for name, there in (("attention", config.attention_bias), ("MLP", config.mlp_bias)) if there]
    if lost:
        return f"{text}; {VLLM} leaves out biases in {' and '.join(lost)} without a word: do not use it either"
    if getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads):
        return f"{text}; {VLLM} takes heads of hidden_size / num_attention_heads, not of {config.head_dim}"
    return text


def _llama_cpp(config: PretrainedConfig) -> str:
    missing = []
    if config.mamba_expand != 2:
        missing.append(f"mamba_expand 2 (here {config.mamba_expand}; export with --pad-expand)")
    if config.mamba_proj_bias:
        missing.append("projections without biases (a student made with gate: output or random has none)")
    if missing:
        return "its converter knows Bamba, but its Mamba-2 layers want " + " and ".join(missing)
    return (
        "`convert_hf_to_gguf.py DIR` knows Bamba; a SmolLM2 hybrid exported like this one gave the same tokens there "
        "(benchmarks/llama_cpp.py)"
    )

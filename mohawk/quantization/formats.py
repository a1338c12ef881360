"""The formats that weights are quantised to, and which weights stay as they are.

Matrices are rounded: of attention, MLPs and mixers. Embeddings, the head, norms, convolutions, decays and biases stay,
and so do mixers' small projections (Gated DeltaNet's b and a, Kimi Delta's low ranks), which decide how long a state
lasts and are a few in a thousand of all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32  # weights of a row that share a scale, in int4
SMALL = 4  # a mixer's projection to or from fewer than 1 / SMALL of the model's width is small


@dataclass(frozen=True)
class Format:
    """config: torchao's configuration; None: a GGUF file's. outtype: of that file."""

    config: Callable[[], Any] | None = None
    outtype: str | None = None


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    # packed two to a byte only for GPUs, by a package of its own: here a byte each, and the same values
    # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def _fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


FORMATS = {
    "int8": Format(_int8),  # a scale for each row
    "int4": Format(_int4),
    "fp8": Format(_fp8),  # e4m3, a scale for each matrix
    "gguf-bf16": Format(outtype="bf16"),
    "gguf-q8_0": Format(outtype="q8_0"),
    "gguf-q4_0": Format(outtype="q4_0"),
}
REFUSED = {
    "bnb": "bitsandbytes computes on GPUs alone and quantises a model as it is loaded: there is no other file; give "
    "transformers a BitsAndBytesConfig when you load the student",
    "awq": "needs a calibration that is not built in; llm-compressor does that to an exported student",
    "gptq": "needs a calibration that is not built in; llm-compressor does that to an exported student",
    "nf4": "is bitsandbytes': give transformers a BitsAndBytesConfig when you load the student",
    "gguf": "llama.cpp's own llama-quantize makes its other types from `mohawk export --to gguf`",
}


def check_format(name: str) -> Format:
    """The format of this name. Raises UserError, saying why, for one that is not there."""
    if name in FORMATS:
        return FORMATS[name]
    why = next((f": {why}" for start, why in REFUSED.items() if name.startswith(start)), "")
    raise UserError(f"--to: got {name!r}; allowed: {', '.join(FORMATS)}{why}")


def torchao_config(name: str, kept: list[str]) -> Any:
    """transformers' configuration of a format, for `from_pretrained`. kept: names of modules that stay."""
    from transformers import TorchAoConfig

    config = FORMATS[name].config
    assert config is not None  # a GGUF file is not torchao's
    return TorchAoConfig(config(), modules_to_not_convert=kept)


def kept_modules(model: PreTrainedModel, name: str) -> list[str]:
    """Names of the linear modules that a format leaves as they are: the head, mixers' small projections, and rows that
    its groups do not divide."""
    small = small_projections(model)
    head = model.get_output_embeddings()
    return [
        called
        for called, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is head or called in small or (name == "int4" and module.in_features % GROUP))
    ]


def small_projections(model: nn.Module) -> set[str]:
    """Names of mixers' projections to or from few channels."""
    from mohawk.models.state_mixer import StateMixer

    return {
        f"{place}.{called}"
        for place, mixer in model.named_modules()
        if isinstance(mixer, StateMixer)
        for called, module in mixer.named_modules()
        if isinstance(module, nn.Linear) and SMALL * min(module.weight.shape) <= mixer.hidden_size
    }


@torch.no_grad()
def round_as_gguf(model: PreTrainedModel, outtype: str) -> None:
    """Give a hybrid the weights that a GGUF file of that type has, in place: what llama.cpp multiplies by, but for its
    own rounding of activations."""
    import gguf

    from mohawk.models.formats.gguf import stored_as

    names = {"in_proj_a.weight": "ssm_alpha.weight", "in_proj_b.weight": "ssm_beta.weight"}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        called = name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2]
        kind = stored_as(names.get(called, name), tuple(parameter.shape), outtype)
        if kind != "f32":
            quantised = gguf.GGMLQuantizationType[kind.upper()]
            rows = gguf.quantize(parameter.detach().float().cpu().contiguous().numpy(), quantised)
            parameter.copy_(torch.from_numpy(gguf.dequantize(rows, quantised)))


def quantised_share(model: nn.Module) -> float:
    """The share of a model's parameters that torchao quantised."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[type(parameter.data) is not Tensor] += parameter.numel()
    return sizes[True] / sum(sizes.values())

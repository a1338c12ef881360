"""Cheap students: a low-rank adapter (LoRA, arXiv 2106.09685) is trained, through peft, and the model stays frozen.

The adapter can be merged into a plain model of the same class. Of a student loaded in 4 bits (QLoRA, arXiv 2305.14314)
the adapter alone is in full precision. Needs peft, and for 4 bits bitsandbytes.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mohawk.core.extras import need
from mohawk.models.decoders import decoder
from mohawk.models.sharding import fill, is_sharded, local, reshard, whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for a model's only adapter
TIED = "so that what an adapter adds to one would, merged, change the other"


def _peft():
    try:
        import peft
    except ImportError:
        need("lora", "an adapter (LoRA)")
        raise
    return peft


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear maps in a causal LM's decoder layers: of attention, mixers and MLPs, e.g. q_proj."""
    kinds = (nn.Linear, Conv1D)  # bitsandbytes' layers are kinds of nn.Linear
    return sorted({name.rpartition(".")[2] for name, module in _inner(model) if isinstance(module, kinds)})


def _inner(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return decoder(model)[1].named_modules()


def add_adapter(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    bits: int | None = None,
) -> PeftModel:
    """Freezes the model and puts a trainable adapter beside each chosen linear map: W x + (alpha / rank) B A x.

    B is 0 at the start, so the model computes what it did. A and B are float32, also in a model of 16 or 4 bits.

    Args:
        model: a causal LM of transformers or a hybrid; it is changed in place.
        rank: rows of A, 1 or more. alpha: 2 * rank if None. dropout: on the adapter's input, from 0 to below 1.
        targets: names of linear maps (the last part, "q_proj", or more, "self_attn.q_proj"); None: all in the decoder
            layers.
        bits: 4: first puts the decoder layers' linear maps into 4 bits, where bitsandbytes runs (QLoRA); None: as the
            model is, which transformers may have loaded in 4 bits already.

    Returns:
        peft's PeftModelForCausalLM around the model. Its parameters that require a gradient are the adapter's;
        `generate`, `config` and the like reach through to the model.

    Raises:
        ValueError: peft is missing, the model has an adapter, or an option does not fit; one line.
    """
    peft = _peft()
    names = check_adapter(model, rank, alpha, dropout, targets, bits)
    if bits == 4 and not is_quantised(model):
        quantise(model)
    if is_quantised(model):
        keep_unpacked(model)
        # norms and the like to float32; checkpointing is the trainer's to decide
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # pyrefly: ignore[bad-argument-type]  # any number will do
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in _inner(model)),
    )
    with _whole_shapes(model):
        return peft.get_peft_model(model, config)


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """Within, weights in parts have the whole's shape, and no values: peft would take a part's shape for a layer's."""
    held: list[tuple[nn.Module, nn.Parameter]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_sharded(weight):
            held.append((module, weight))
            shape = local(weight).detach().new_empty(()).expand(weight.shape)
            module._parameters["weight"] = nn.Parameter(shape, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for module, weight in held:
            shaped = module._parameters["weight"]
            assert shaped is not None
            weight.requires_grad_(shaped.requires_grad)
            module._parameters["weight"] = weight


def check_adapter(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    bits: int | None = None,
    *,
    device: str | torch.device | None = None,
) -> list[str]:
    """What `add_adapter` refuses, as ValueError, found without the model's weights; the names of its targets.

    model: may be on the meta device. device: where it will be, to know whether 4 bits run there; None: where it is.
    """
    peft = _peft()
    if isinstance(model, peft.PeftModel):
        raise ValueError("LoRA: the model has an adapter already; merge it first, or go on with it")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA: rank must be a whole number from 1 up, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA: dropout must be from 0 to below 1, got {dropout}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"LoRA: alpha must be above 0, got {alpha}")
    if bits not in (None, 4):
        raise ValueError(f"LoRA: bits must be 4 or None, got {bits!r}")
    names = linear_names(model) if targets is None else _checked_targets(model, targets)
    if reaches_head(model, names) and _is_tied(model):
        raise ValueError(
            f"LoRA: the output embedding is the input embedding too, {TIED}; leave the output embedding out of targets"
        )
    if bits == 4 and not is_quantised(model):
        four_bit_config(device=next(model.parameters()).device if device is None else device)
    return names


def _checked_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    have = linear_names(model)
    paths = [f".{name}" for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for target in [targets] if isinstance(targets, str) or not targets else targets:
        if isinstance(targets, str) or not isinstance(target, str) or not any(p.endswith(f".{target}") for p in paths):
            raise ValueError(f"LoRA: targets must be a list of names of linear maps, got {target!r}; there are {have}")
    return list(targets)


def reaches_head(model: Any, targets: Sequence[str]) -> bool:
    """Whether targets of an adapter are, or have among them, a model's output embedding."""
    head = model.get_output_embeddings()
    paths = [f".{name}" for name, module in model.named_modules() if module is head]
    return any(path.endswith(f".{target}") for path in paths for target in targets)


def _is_tied(model: Any) -> bool:
    """Whether the output embedding's weight is the input embedding's, also within an adapter."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "base_layer", module).weight for module in both if module is not None]
    return len(weights) == 2 and weights[0] is weights[1]


def save_adapter(model: Any, folder: str | os.PathLike) -> None:
    """Writes the adapter alone, as safetensors; `peft.PeftModel.from_pretrained(base, folder)` reads it."""
    # "auto" would ask the model hub whether the vocabulary was changed; embeddings are never the adapter's
    model.save_pretrained(folder, save_embedding_layers=False)


def merge_adapter(model: nn.Module) -> PreTrainedModel:
    """Adds the adapter's products into the weights it stands beside.

    Args:
        model: what `add_adapter` made, or peft loaded; it is used up. A model in 4 bits comes back in full: its
            weights are decoded (to the dtype of its other parameters) before the adapter is added, since a sum
            rounded to 4 bits again would lose most of it.

    Returns:
        The model without peft, of the class it had, all parameters trainable. It computes what it did with the
        adapter, up to rounding to the weights' dtype.

    Raises:
        ValueError: the model has no adapter, or one of an embedding that is the other one too.
    """
    peft = _peft()
    if not isinstance(model, peft.PeftModel):
        raise ValueError(f"LoRA: {type(model).__name__} has no adapter to merge; give what add_adapter returned")
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(module, "lora_A") for module in both) and _is_tied(model):
        raise ValueError(
            f"LoRA: the adapter is of an embedding that is input and output embedding at once, {TIED}; untie them "
            "before the adapter is added (model.lm_head.weight = a copy, config.tie_word_embeddings = False)"
        )
    if is_quantised(model):
        state = {name: x.clone() for name, x in peft.get_peft_model_state_dict(model).items()}
        config = model.peft_config[ADAPTER]
        plain = model.unload()
        keep_unpacked(plain)
        model = peft.get_peft_model(_decoded(plain), config)
        peft.set_peft_model_state_dict(model, state)
    adapted: Any = model
    if is_sharded(model.get_base_model()):
        reshard(model)
        modules: list[Any] = list(model.modules())
        for layer in (module for module in modules if ADAPTER in getattr(module, "lora_A", ())):
            weight: Tensor = layer.base_layer.weight
            fill(weight, whole(weight) + layer.get_delta_weight(ADAPTER).to(weight.dtype))
        return adapted.unload().requires_grad_(True)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing a model's 4-bit weights anew for inference on CPUs with bfloat16 units.

    Packed weights have no gradient and cannot be decoded, their products are in bfloat16, other than in training, and
    not all shapes can be packed (0.50: rows in 32s, columns in 64s). `add_adapter` calls this; call it after loading
    where the model is evaluated before. Elsewhere it changes nothing.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # pyrefly: ignore[bad-argument-type]  # a plain attribute of bitsandbytes' layers
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what is packed


def is_quantised(model: nn.Module) -> bool:
    """Whether the model has quantised weights, by `quantise` or as transformers loaded it."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_quantized", False))


@torch.no_grad()
def quantise(model: Any) -> nn.Module:
    """Puts the linear maps of the decoder layers into 4 bits (NF4), in place; embeddings, norms and head stay.

    For a model that is in memory already; one on disk is loaded with `four_bit_config`, as transformers does it.
    Products are in the model's dtype. Raises ValueError where bitsandbytes does not run.
    """
    layers = decoder(model)[1]
    device, dtype = next(layers.parameters()).device, model.dtype
    four_bit_config(dtype, device)  # refuses
    from bitsandbytes.nn import Linear4bit

    for parent in list(layers.modules()):
        for name, linear in parent.named_children():
            if type(linear) is nn.Linear:
                packed = Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                packed.load_state_dict(linear.state_dict())
                packed.bias = linear.bias
                setattr(parent, name, packed.to(device).requires_grad_(False))
    model.is_loaded_in_4bit = True  # what peft goes by
    keep_unpacked(model)
    return model


@torch.no_grad()
def _decoded(model: Any) -> nn.Module:
    """The model with plain linear maps in place of those in 4 bits."""
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
        vars(model).pop("is_loaded_in_4bit", None)  # which transformers leaves
        return model
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.modules()):
        for name, packed in parent.named_children():
            if isinstance(packed, Linear4bit):
                weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
                linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
                linear.weight, linear.bias = nn.Parameter(weight), packed.bias
                setattr(parent, name, linear)
    del model.is_loaded_in_4bit
    return model


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"):
    """What `from_pretrained(..., quantization_config=)` needs to load a model in 4 bits (NF4, scales quantised too).

    Args:
        compute_dtype: the products' dtype. device: where the model will be.

    Raises:
        ValueError: bitsandbytes is missing or does not run on the device; one line.
    """
    from transformers import BitsAndBytesConfig

    if (problem := _why_no_four_bits(str(device))) is not None:
        raise ValueError(f"4 bits on {device}: {problem}; leave the student unquantised, a LoRA alone trains it too")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@functools.lru_cache
def _why_no_four_bits(device: str) -> str | None:
    """None where a small layer of 4 bits runs, forward and backward; else what is wrong."""
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of fast paths that are missing
            from bitsandbytes.nn import Linear4bit

            layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
            x = torch.ones(1, 64, device=device, requires_grad=True)
            layer(x).sum().backward()
            assert x.grad is not None
    except ImportError as error:
        return f"needs the package bitsandbytes ({str(error).splitlines()[0]})"
    except Exception as error:  # whatever a backend that is not there raises
        return f"bitsandbytes does not run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return None if bool(torch.isfinite(x.grad).all()) else "bitsandbytes gives a gradient that is not finite"

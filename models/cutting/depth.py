"""Some of the layers of any causal LM or encoder, whatever its family: found by structure, and checked by running them.

A family may make a layer's nature depend on its index (windows, experts, positions, scales). What a configuration lists
layer by layer is cut here; for the rest every layer of the smaller model is compared with the one it came from.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from mohawk.models.decoders import decoder
from mohawk.models.generation_settings import saveable

Model = TypeVar("Model", bound=PreTrainedModel)

# what configurations say of single layers, in lists as long as there are layers
LAYER_LISTS = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")
TOKENS = 8  # that the comparison runs


@torch.no_grad()
def keep_any_layers(model: Model, layers: Sequence[int]) -> Model:
    """A model of the same class with these of its layers, ascending; the model is left as it was.

    Raises:
        ValueError: no transformers model, adapters or packed weights in it, or a family whose layers would be
            other layers at their new places.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"layers: got a {kind}, allowed: a transformers model; merge its adapters first")
    if packed := [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]:
        raise ValueError(f"layers: {packed[0]} of this {kind} is packed; dequantise the model first")
    _, stack = decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    for name in LAYER_LISTS:
        entries = getattr(text, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == len(stack):
            try:
                setattr(text, name, [entries[i] for i in layers])
            except AttributeError as error:  # made of other entries
                raise ValueError(f"layers: {name} of {type(text).__name__} cannot be set") from error
    try:
        loaded = type(config).from_dict(config.to_dict())
        with no_init_weights():
            smaller = type(model)(config)
    except ValueError as error:
        raise ValueError(f"layers: no {kind} of {len(layers)} layers can be made: {error}") from error
    for name in LAYER_LISTS:  # some configurations make them from a pattern when they are loaded
        if getattr(loaded.get_text_config(), name, None) != getattr(text, name, None):
            raise ValueError(f"layers: {type(text).__name__} cannot hold the {name} of the layers that stay")
    place, state = {old: new for new, old in enumerate(layers)}, {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{prefix}."):
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if int(index) not in place:
                continue
            name = f"{prefix}.{place[int(index)]}.{rest}"
        state[name] = value.clone()
    shapes = {name: value.shape for name, value in smaller.state_dict().items()}
    if odd := sorted({name for name, value in state.items() if shapes.pop(name, None) != value.shape} | shapes.keys()):
        raise ValueError(f"layers: {kind} has other parameters in layers at other places: {', '.join(odd[:3])}")
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    if getattr(model, "generation_config", None) is not None:  # of what writes text
        smaller.generation_config = saveable(model.generation_config)
    smaller = smaller.to(model.device)
    _check_layers(model, smaller, layers)
    return smaller.train(model.training)


@torch.no_grad()
def _check_layers(model: PreTrainedModel, smaller: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raises ValueError unless each layer does what it did at its old place."""
    kind = type(model).__name__
    old, new = ([stack[i] for i in kept] for stack, kept in (
        (decoder(model)[1], layers), (decoder(smaller)[1], range(len(layers))),
    ))  # fmt: skip
    for i, before, after in zip(layers, old, new, strict=True):
        for (name, one), (_, other) in zip(before.named_modules(), after.named_modules(), strict=True):
            mine, own = _settings(one), _settings(other)
            if changed := [key for key in mine if mine[key] != own.get(key)]:
                raise ValueError(
                    f"layers: in {kind} {'.'.join(filter(None, (name, changed[0])))} depends on a layer's place: "
                    f"{mine[changed[0]]} in layer {i}, {own.get(changed[0])} where it would be"
                )
    if model.device.type == "meta":  # a plan's: nothing can be run, and the real model will be
        return
    noted: list[tuple] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, kwargs, out: noted.append((args, kwargs, out)), with_kwargs=True)
        for layer in new
    ]
    modes = [layer.training for layer in old]
    smaller.eval()
    try:
        more = {"use_cache": False} if hasattr(smaller, "generate") else {}  # which encoders do not know
        smaller(input_ids=torch.arange(TOKENS, device=model.device)[None] % model.config.vocab_size, **more)
        for i, before, (args, kwargs, out) in zip(layers, old, noted, strict=True):
            before.eval()
            expected, got = _first(before(*args, **kwargs)), _first(out)
            if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                raise ValueError(f"layers: in {kind} layer {i} is another function at another place")
    finally:
        for hook in hooks:
            hook.remove()
        for before, mode in zip(old, modes, strict=True):
            before.train(mode)


def _settings(module: nn.Module) -> dict:
    """A module's plain attributes, but for its place."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
        and not key.startswith("_")
        and key not in ("training", "layer_idx", "layer_id", "layer_number")
    }


def _first(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out

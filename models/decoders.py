"""Where a causal LM keeps its decoder layers, found by structure: for what needs no entry in families.FAMILIES.

`model.model.layers`, `transformer.h`, `gpt_neox.layers`, `model.decoder.layers`; behind peft's wrappers too.
"""

from typing import Any

from torch import Tensor, nn


def decoder(model: nn.Module, part: str = "decoder") -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a causal LM: (the module whose output is the last hidden state, its layers in order). Of a model
    that is an encoder alone, that; of an encoder and a decoder, the `part` of that name.

    It is the outermost module that holds a ModuleList of `num_hidden_layers` modules (a configuration of several
    models: those of its text decoder).

    Raises:
        ValueError: the model has no configuration that counts its layers, or no such list.
    """
    config: Any = getattr(model, "config", None)
    of: Any = model
    if getattr(config, "is_encoder_decoder", False):
        of = of.get_base_model() if hasattr(of, "get_base_model") else of  # behind peft
        inside = of.get_encoder() if part == "encoder" else of.get_decoder()
        found = _layers(inside, None)
    else:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = getattr(config, "num_hidden_layers", None)
        if count is None:
            raise ValueError(
                f"{type(model).__name__}: no configuration with num_hidden_layers; give a transformers model"
            )
        found = _layers(model, count)
    if found is None:
        raise ValueError(f"{type(model).__name__}: found no list of its {part} layers in it")
    return found


def layers_config(model: nn.Module) -> Any:
    """The configuration of what `decoder` finds: its own, or where it has none its model's."""
    body: Any = decoder(model)[0]
    own: Any = getattr(body, "config", None)
    if own is None:
        own = getattr(model, "config", None)
    return own.get_text_config() if hasattr(own, "get_text_config") else own


def _layers(model: nn.Module, count: int | None) -> tuple[nn.Module, nn.ModuleList] | None:
    """The outermost list of modules, of so many, and what holds it."""
    level = [model]
    while level:  # level by level: experts within a layer are lists of modules as well
        for module in level:
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) and count in (None, len(child)):
                    return module, child
        level = [child for module in level for child in module.children()]
    return None


def check_layers(where: str, layers, count: int, lowest: int = 0) -> None:
    """Raises ValueError unless all `layers` are whole numbers from `lowest` to below `count`."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not lowest <= layer < count:
            raise ValueError(f"{where}: got layer {layer!r}, allowed are {lowest} to {count - 1}")


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states a decoder layer or a mixer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def check_checkpointing(where: str, layers) -> None:
    """Raises ValueError if gradient checkpointing would cut what is kept of a layer's inside off its graph."""
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        options = getattr(function, "keywords", None) or {}
        if getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise ValueError(
                f"{where}: gradient checkpointing with use_reentrant=True has no graph of it; set use_reentrant=False"
            )

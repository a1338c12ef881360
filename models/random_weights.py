"""Models of random weights, drawn as their classes draw them, a module at a time: whole is one module, never the model.

Every module has a seed of its own and is drawn on the CPU, so that the weights are the same in any number of processes,
in parts or whole, and on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mohawk.models.sharding import fill, materialise

Model = TypeVar("Model", bound=PreTrainedModel)
DRAWN = "_is_hf_initialized"  # of a module that transformers is not to draw again


@torch.no_grad()
def random_model(
    kind: type[Model],
    config: PreTrainedConfig,
    seed: int,
    device: torch.device,
    spread: Callable[[nn.Module], None] | None = None,
) -> Model:
    """A float32 model in training mode whose weights depend on the seed alone; torch's random state stays as it was.

    Args:
        kind, config: the model is `kind(config)`, with weights from that class's `_init_weights`, and from its
            constructor the vectors that this leaves as they are.
        device: of the model. On the meta device nothing is drawn.
        spread: brings the model into its parts, `mohawk.models.sharding.shard` for one; None: it is whole.

    Raises:
        ValueError: a matrix that `_init_weights` leaves as it is.
    """
    if device.type == "meta":
        with torch.device("meta"):
            return kind(config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        first = int(torch.randint(2**62, ()))
        with _matrices_on_meta():
            twin, model = kind(config), kind(config)
        if spread is not None:
            spread(model)
        materialise(model, device)
        own = dict(model.named_parameters())
        for name, values in _drawn(twin, own, first):
            fill(own[name], values)
    return model


@contextmanager
def _matrices_on_meta() -> Iterator[None]:
    """Within, models are made without memory for their matrices."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.dim() > 1 and not param.is_meta:  # one that is may be tied to another
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = registered
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _drawn(twin: PreTrainedModel, wanted: Container[str], first: int) -> Iterator[tuple[str, Tensor]]:
    """The wanted parameters by their names, each module's until those of the next are asked for.

    twin: without its matrices; in the end it has no parameter's values. first: seed of the first module.
    """
    vectors = {name: parameter for name, parameter in twin.named_parameters() if not parameter.is_meta}
    modules = dict(twin.named_modules())
    for module in modules.values():
        module.__dict__[DRAWN] = True
        for key, parameter in module.named_parameters(recurse=False):
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for i, (at, module) in enumerate(modules.items()):
        empty = {key: (f"{at}.{key}" if at else key, p) for key, p in module.named_parameters(recurse=False)}
        empty = {key: (name, p) for key, (name, p) in empty.items() if name in wanted}
        if not empty:
            continue
        for key, (name, p) in empty.items():
            values = vectors[name] if name in vectors else torch.full_like(p, torch.nan, device="cpu")
            module._parameters[key] = nn.Parameter(values, requires_grad=False)
        torch.manual_seed(first + i)
        # those around it too, which may set what is inside them; on the meta device that comes to nothing
        while True:
            modules[at].__dict__[DRAWN] = False
            if not at:
                break
            at = at.rpartition(".")[0]
        twin.initialize_weights()
        if isinstance(module, Conv1D) and module.weight.isnan().any():  # of GPT 1, which leaves it to the constructor
            module.load_state_dict(Conv1D(module.nf, module.nx).state_dict())
        drawn = dict(module.named_parameters(recurse=False))
        for key, (name, p) in empty.items():
            if drawn[key].isnan().any():
                raise ValueError(f"{type(twin).__name__} does not say how {name} of a new model is drawn")
            yield name, drawn[key]
            module._parameters[key] = p

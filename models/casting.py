"""A model in another dtype, but for what its class keeps in float32."""

import torch
from torch import nn


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns a model's parameters to `dtype`, in place; its buffers stay as they are.

    `model.to(dtype)` would turn the frequencies of rotary embeddings too, which transformers makes in float32 whatever
    a model's dtype: in bfloat16 they are up to 0.4 % off, which a thousand tokens on is radians.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    exact_scales(model)


def exact_scales(model: nn.Module) -> None:
    """Makes factors of embeddings float32 that were rounded when the model was loaded (Gemma 3's sqrt(hidden_size)).

    They are buffers that are not saved: rounded, they would be others once the model is saved in float32 and loaded.
    """
    for module in model.modules():
        if isinstance(scale := getattr(module, "scalar_embed_scale", None), float):
            held = module.get_buffer("embed_scale")
            module.register_buffer("embed_scale", torch.full_like(held, scale, dtype=torch.float32), persistent=False)

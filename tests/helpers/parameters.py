"""How many parameters the model of a configuration has."""

import copy

import torch
from transformers import AutoModelForCausalLM


def config_parameters(config) -> tuple[int, int]:
    """(all parameters, those outside the embedding and the head) of the model a configuration makes.

    Made on the meta device: no memory. A tied head counts once.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    ends = {id(p): p for module in (model.model.embed_tokens, model.lm_head) for p in module.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(parameter.numel() for parameter in ends.values())

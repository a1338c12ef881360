"""Which parameters AdamW pulls towards zero."""

from collections.abc import Iterable
from typing import Any

from torch import nn

NO_DECAY = ("bias", "A_log", "D", "dt_bias", "z_bias", "norm.weight", "layernorm.weight")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices only, none on norms, biases and a scan's own vectors."""
    decayed, plain = [], []
    for name, parameter in named:
        (plain if parameter.dim() < 2 or name.endswith(NO_DECAY) else decayed).append(parameter)
    groups = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

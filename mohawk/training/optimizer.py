"""What of an objective trains, and its AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mohawk.models.sharding import is_sharded


def adamw(groups: list[dict[str, Any]], phase: Any) -> torch.optim.AdamW:
    """AdamW of an objective's parameter groups, with a phase's `learning_rate`, `betas` and `weight_decay`; each
    group's `initial_lr` is what a schedule multiplies."""
    apart = sharded_apart(groups)
    optimizer = torch.optim.AdamW(
        apart,
        lr=phase.learning_rate,
        betas=tuple(phase.betas),
        weight_decay=phase.weight_decay,
        fused=apart[0]["params"][0].device.type in ("cpu", "cuda"),
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def sharded_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with sharded and whole parameters in groups of their own: no fused step takes both."""
    made = [
        {**group, "params": [p for p in group["params"] if is_sharded(p) is sharded]}
        for group in groups
        for sharded in (False, True)
    ]
    return [group for group in made if group["params"]]


def trainable(objective: nn.Module, groups: list[dict[str, Any]]) -> dict[str, nn.Parameter]:
    """The parameters in the optimizer's groups by their name in the objective."""
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    named = {name: p for name, p in objective.named_parameters() if id(p) in wanted}
    if not wanted or len(named) != len(wanted):
        raise ValueError(
            f"parameter_groups: {len(wanted)} parameters, {len(named)} of them in the objective; all must be"
            " (or a checkpoint could not name them), and there must be some"
        )
    return named

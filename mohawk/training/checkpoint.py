"""What a checkpoint of a phase holds: what trains, the optimizer's moments, random states, and counts.

Its folder's name says after which step, `mohawk.core.folders` that it is whole. Checkpoints of version 0.1.0 are read
too; they hold a schedule and a trainer's state besides, which nothing needs.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mohawk.core.processes import rank, several
from mohawk.errors import UserError
from mohawk.training.objective import Objective

log = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
PHASE_STATE = "phase_state.json"
OBJECTIVE_STATE = "objective.safetensors"
# What fixes the order of the data. Version 0.1.0 kept the factors of a step's rows.
ORDER_KEYS = ("order_seed", "examples", "rows")
FACTORS = ("batch_size", "gradient_accumulation", "world_size")
# What the recipe says of a group of the optimizer's, and may have changed since.
SETTINGS = ("initial_lr", "lr", "betas", "eps", "weight_decay")


def write_parameters(folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """What trains, by name, and the optimizer's moments of it."""
    save_file({name: p.detach().cpu().contiguous() for name, p in trainable.items()}, folder / WEIGHTS)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def read_parameters(checkpoint: Path, trainable: Mapping[str, nn.Parameter]) -> None:
    """Take back what trains. Raises UserError where the checkpoint is of other parameters."""
    weights = load_file(checkpoint / WEIGHTS)
    here = {name: tuple(p.shape) for name, p in trainable.items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if here != there:
        names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise UserError(
            f"{checkpoint}: holds other parameters than this recipe trains ({len(names)} differ, first"
            f" {names[0]}); choose another output, or delete {checkpoint.parent}"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])


def read_moments(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Take back the optimizer's moments, with the settings of the recipe as it is now.

    They are the same unless the user changed them, as one does when told to lower the learning rate.
    """
    settings = [{key: group[key] for key in SETTINGS} for group in optimizer.param_groups]
    state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)  # moves the moments to the parameters' device
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)


def write_counts(folder: Path, counts: Mapping[str, Any], objective: Objective) -> None:
    """The phase's counts, and what the objective keeps beside its parameters."""
    state = dict(counts)
    tensors, values = objective.training_state()
    if tensors or values:
        state["objective"] = values
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / OBJECTIVE_STATE)
    (folder / PHASE_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_counts(checkpoint: Path, objective: Objective) -> dict[str, Any]:
    """What `write_counts` was given; the objective takes back its own. Raises UserError, as `counts_of` does."""
    counts = counts_of(checkpoint)
    if "objective" in counts:
        objective.load_training_state(load_file(checkpoint / OBJECTIVE_STATE), counts["objective"])
    return counts


def counts_of(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's counts, and plain values of its objective. Raises UserError where they are of another shape."""
    path = checkpoint / PHASE_STATE
    state: dict[str, Any] = {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in state:
            state["rows"] = math.prod(state.pop(key) for key in FACTORS)
        counts = [state[key] for key in (*ORDER_KEYS, "skipped_steps", "nonfinite_in_a_row")]
        whole = all(type(count) is int for count in counts) and isinstance(state.get("objective") or {}, dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is not what a checkpoint holds; delete {checkpoint} to go on from the one before")
    return state


def is_finished(checkpoint: Path) -> bool:
    """Whether the objective had ended its phase when this was saved."""
    return bool((counts_of(checkpoint).get("objective") or {}).get("finished"))


def write_random_states(folder: Path, device: torch.device) -> None:
    """The random states of this process; all processes write into the same folder."""
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    torch.save(states, folder / _random_file())


def read_random_states(checkpoint: Path, device: torch.device) -> None:
    """Where this process's draws go on; a line where it had none, as when there were fewer processes."""
    path = checkpoint / _random_file()
    if not path.is_file():
        log.info("%s has no random states of process %d: it draws anew", checkpoint, rank())
        return
    core: Any = getattr(np, "_core", None) or np.core
    allowed: list[Any] = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        states = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        # version 0.1.0 kept every GPU's where there were several processes
        cuda: Tensor | list[Tensor] = states["cuda"]
        torch.cuda.set_rng_state(cuda if isinstance(cuda, Tensor) else cuda[device.index or 0], device)


def _random_file() -> str:
    return f"rng_state_{rank()}.pth" if several() else "rng_state.pth"

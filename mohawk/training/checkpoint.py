"""What a checkpoint of a phase holds: what trains, the optimizer's moments, random states, and counts.

Its folder's name says after which step, `mohawk.core.folders` that it is whole. Where models are sharded each process
writes what it has, by torch's distributed checkpoint as safetensors; any number of processes reads either kind.
Checkpoints of version 0.1.0 are read too; they hold a schedule and a trainer's state besides, which nothing needs.
"""

from __future__ import annotations

import json
import logging
import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mohawk.core.processes import from_all, rank, several
from mohawk.errors import UserError
from mohawk.models.sharding import fill, is_sharded
from mohawk.training.objective import Objective

log = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
PHASE_STATE = "phase_state.json"
OBJECTIVE_STATE = "objective.safetensors"
# What fixes the order of the data. Version 0.1.0 kept the factors of a step's rows.
ORDER_KEYS = ("order_seed", "examples", "rows")
FACTORS = ("batch_size", "gradient_accumulation", "world_size")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
STEPS = "steps"  # how many of them each parameter has taken, in the order of their names


def write_parameters(folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Writes what trains, by name, and the optimizer's moments of it, of models that are not sharded."""
    save_file({name: p.detach().cpu().contiguous() for name, p in trainable.items()}, folder / WEIGHTS)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def write_shards(
    folder: Path,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    names: Iterable[str],
) -> None:
    """Writes what trains in parts, its moments, and what the objective keeps in parts: each process its part. names: of
    what trains on any process. Raises OSError on all of them where one could not write."""
    own = {name: float(optimizer.state.get(p, {}).get("step", 0.0)) for name, p in trainable.items()}
    steps = {name: step for part in from_all(own) for name, step in part.items()}
    tensors: dict[str, Tensor] = {STEPS: torch.tensor([steps[name] for name in sorted(names)])}
    tensors |= {f"objective.{name}": tensor for name, tensor in objective.training_state()[0].items()}
    for name, parameter in trainable.items():
        state = optimizer.state.get(parameter, {})
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        cause = next((found for found, _ in error.failures.values() if isinstance(found, OSError)), None)
        raise cause or OSError(str(error).splitlines()[0]) from error


def read_parameters(
    checkpoint: Path, trainable: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Take back what trains. shapes: of what trains on any process. Raises UserError where the checkpoint is of other
    parameters."""
    here = dict(shapes)
    there = {name[len("weight.") :]: size for name, size in _sizes(checkpoint).items() if name.startswith("weight.")}
    if here != there:
        names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise UserError(
            f"{checkpoint}: holds other parameters than this recipe trains ({len(names)} differ, first"
            f" {names[0]}); choose another output, or delete {checkpoint.parent}"
        )
    if _in_shards(checkpoint):
        _load(checkpoint, {f"weight.{name}": p.detach() for name, p in trainable.items()})
        return
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        for name, parameter in trainable.items():
            fill(parameter, file.get_tensor(name))


def read_moments(
    checkpoint: Path,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    order: Sequence[str],
) -> None:
    """Take back the optimizer's moments, with the settings of the recipe as it is now.

    Those are the same unless the user changed them, as one does when told to lower the learning rate. order: the names
    of what trains on any process, as the objective's groups have them.
    """
    if not _in_shards(checkpoint):
        saved = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)["state"]
        for number, name in enumerate(order):
            if number in saved and name in trainable:
                state = _empty_state(trainable[name], [moment for moment in MOMENTS if moment in saved[number]])
                for key, tensor in state.items():
                    fill(tensor, torch.as_tensor(saved[number][key]))
                optimizer.state[trainable[name]] = state
        return
    sizes, steps = _sizes(checkpoint), torch.zeros(len(order))
    tensors = {STEPS: steps}
    for name, parameter in trainable.items():
        if moments := [moment for moment in MOMENTS if f"{moment}.{name}" in sizes]:
            optimizer.state[parameter] = state = _empty_state(parameter, moments)
            tensors |= {f"{moment}.{name}": state[moment] for moment in moments}
    _load(checkpoint, tensors)
    for name, step in zip(sorted(order), steps.tolist(), strict=True):
        if name in trainable and trainable[name] in optimizer.state:
            optimizer.state[trainable[name]]["step"].fill_(step)


def _empty_state(parameter: nn.Parameter, moments: Sequence[str]) -> dict[str, Tensor]:
    """What a fused AdamW keeps of a parameter, without values."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {moment: torch.zeros_like(parameter.detach()) for moment in moments}


def _in_shards(checkpoint: Path) -> bool:
    return not (checkpoint / WEIGHTS).is_file()


def _sizes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, whole."""
    if _in_shards(checkpoint):
        found = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        return {f"weight.{name}": tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, or this process's parts of them, from what any number of processes wrote."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process, which is no mistake
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=not several())


def write_counts(folder: Path, counts: Mapping[str, Any], objective: Objective) -> None:
    """The phase's counts, and what the objective keeps beside its parameters."""
    state = dict(counts)
    tensors, values = objective.training_state()
    if tensors or values:
        state["objective"] = values
        if not any(map(is_sharded, tensors.values())):
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / OBJECTIVE_STATE)
    (folder / PHASE_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_counts(checkpoint: Path, objective: Objective) -> dict[str, Any]:
    """What `write_counts` was given; the objective takes back its own. Raises UserError, as `counts_of` does."""
    counts = counts_of(checkpoint)
    if "objective" not in counts:
        return counts
    if (checkpoint / OBJECTIVE_STATE).is_file():
        tensors = load_file(checkpoint / OBJECTIVE_STATE)
    else:  # in the shards
        tensors = {name: torch.zeros_like(tensor) for name, tensor in objective.training_state()[0].items()}
        _load(checkpoint, {f"objective.{name}": tensor for name, tensor in tensors.items()})
    objective.load_training_state(tensors, counts["objective"])
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

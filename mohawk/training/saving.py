"""A phase's checkpoints: complete or invisible, so many kept, and which one is gone on from.

What one holds is in checkpoint.py.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mohawk.core.folders import about_of, newest_complete, rotate, step_of, write_whole
from mohawk.core.processes import agree, hashed_together, is_first, several, together, wait_for_all
from mohawk.errors import UserError, naming
from mohawk.loading.nonfinite import first_nonfinite_of_all
from mohawk.models.sharding import is_sharded, reshard
from mohawk.training.batches import steps_of
from mohawk.training.checkpoint import (
    ORDER_KEYS,
    counts_of,
    is_finished,
    read_counts,
    read_moments,
    read_parameters,
    read_random_states,
    write_counts,
    write_parameters,
    write_random_states,
    write_shards,
)
from mohawk.training.objective import Objective

logger = logging.getLogger(__name__)


@dataclass
class Checkpoints:
    """Those of one phase. All processes call its methods together, but for `newest`.

    Args:
        folder: of the phase.
        objective, optimizer: what is saved, with what of it trains by its name in the objective, `trainable`.
        order: the names of what trains on any process, as the objective's groups have them. shapes: of it, by name.
        staged: whether each process trains layers of its own.
        device: whose random state is saved.
        origin: see `PhaseTrainer`.
        keep: how many whole ones.
        told, advice: the phase as messages name it, and what to do where its weights are not finite.
    """

    folder: Path
    objective: Objective
    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    order: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    staged: bool
    device: torch.device
    origin: Mapping[str, Any]
    keep: int
    told: str
    advice: str

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def newest(self) -> Path | None:
        """Where the phase goes on. Raises UserError where that is of another run, or goes on from other weights."""
        checkpoint = newest_complete(self.folder)
        if checkpoint is None:
            return None
        about, what = about_of(checkpoint), {"run": "is of another run", "from": "goes on from other weights"}
        for name, value in self.origin.items():
            if name == "bound":  # compared with what the run reads before it trains (mohawk.runs.binding)
                continue
            if about.get(name, value) != value:
                raise UserError(
                    f"{checkpoint}: {what.get(name, f'has another {name}')} than this phase now begins with; delete "
                    f"{self.folder} to train the phase from its beginning, or put back what it was"
                )
        return checkpoint

    def save(self, step: int, counts: Mapping[str, Any]) -> None:
        """Write what the phase needs to go on after a step, complete or invisible; frozen weights are not rewritten.

        Raises:
            UserError: it cannot be written, or what it would hold is not finite.
        """
        path = self.path(step)
        reshard(self.objective)
        self._refuse_nonfinite(step)
        sums: dict[str, str] = {}
        try:
            with naming(path), contextlib.ExitStack() as stack:
                folder = agree(together(lambda: self._begin(path, counts, sums, stack) if is_first() else None))
                together(lambda: self._write(folder))
                if several():
                    sums |= hashed_together(folder)
                together(stack.close)  # the first process makes it visible
        except OSError as error:
            # what is free changes from moment to moment, and one mistake is said once
            raise UserError(agree(self._unwritten(path, error) if is_first() else None)) from error
        logger.info("%s: saved %s", counts["name"], path)
        if is_first():
            rotate(self.folder, path, keep=self.keep)
        wait_for_all()

    def load(self, checkpoint: Path, now: Mapping[str, Any]) -> dict[str, Any]:
        """Restore what trains. Gives the counts that were saved; a line where the data go on in another order than
        with those of `now`."""
        read_parameters(checkpoint, self.trainable, self.shapes)
        then = read_counts(checkpoint, self.objective)
        names = {"rows": "rows a step"}
        changed = [f"{names.get(key, key)} {then[key]} -> {now[key]}" for key in ORDER_KEYS if then[key] != now[key]]
        if changed:
            logger.warning(
                "%s: since %s changed: %s; the data go on in another order than before",
                now["name"],
                checkpoint.name,
                ", ".join(changed),
            )
        return then

    def load_moments(self, checkpoint: Path) -> None:
        read_moments(checkpoint, self.trainable, self.optimizer, self.order)

    def load_random_states(self, checkpoint: Path) -> None:
        read_random_states(checkpoint, self.device)

    def _begin(self, path: Path, counts: Mapping[str, Any], sums: dict[str, str], stack: contextlib.ExitStack) -> Path:
        """A folder for all to write to, which takes its place when the stack closes."""
        folder = stack.enter_context(write_whole(path, replace=True, about=self.origin, sums=sums))
        write_counts(folder, counts, self.objective)
        return folder

    def _write(self, folder: Path) -> None:
        """What this process has to write: several machines must share the folder."""
        if self.staged or any(map(is_sharded, self.trainable.values())):
            write_shards(folder, self.trainable, self.optimizer, self.objective, self.shapes)
        elif is_first():
            write_parameters(folder, self.trainable, self.optimizer)
        write_random_states(folder, self.device)

    def _refuse_nonfinite(self, step: int) -> None:
        """Weights that are not finite never take the place of earlier ones. Raises UserError."""
        state = self.optimizer.state
        moments = (
            (f"{key} of {name}", value)
            for name, p in self.trainable.items()
            for key, value in state.get(p, {}).items()
            if isinstance(value, torch.Tensor)
        )
        found = first_nonfinite_of_all(itertools.chain(self.trainable.items(), moments))
        if found is not None:
            raise UserError(
                f"{self.told}: after step {step} {found} is not finite, so no checkpoint is written;"
                f" {self._whole_one()}. {self.advice} and run again"
            )

    def _unwritten(self, path: Path, error: OSError) -> str:
        return (
            f"{path}: the checkpoint could not be written ({error.strerror or error};"
            f" {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free there); {self._whole_one()}."
            " Free disk space or make the folder writable, then run the same command"
        )

    def _whole_one(self) -> str:
        kept = newest_complete(self.folder)
        return f"{kept.name} is complete" if kept else "there is no earlier one"


def is_over(folder: str | os.PathLike, phase: Any) -> bool:
    """Whether a phase with this folder of checkpoints has no step to come: the newest whole one is of the last step, or
    of one after which the objective had ended it."""
    if (checkpoint := newest_complete(folder)) is None:
        return False
    examples = 0 if getattr(phase, "epochs", None) is None else counts_of(checkpoint)["examples"]
    last = steps_of(phase, examples)
    return step_of(checkpoint) >= last or is_finished(checkpoint)

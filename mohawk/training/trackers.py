"""Experiment trackers: what `report_to` names. They are transformers' callbacks, which a phase calls itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from mohawk.core.processes import is_first
from mohawk.errors import UserError


def trackers(names: Sequence[str]) -> list[TrainerCallback]:
    """A new callback for each name. Raises UserError for one that is not known or not installed."""
    try:
        return [kind() for kind in get_reporting_integration_callbacks(list(names))]
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"report_to: {str(error).splitlines()[0]}") from error


class Trackers:
    """What the named trackers are told of one phase: a record's numbers, without its nesting.

    settings: of the phase, by the names that `transformers.TrainingArguments` has for them.
    """

    def __init__(self, names: Sequence[str], folder: str | os.PathLike, settings: Mapping[str, Any]):
        self.callbacks = trackers(names)
        if self.callbacks:
            self.args = TrainingArguments(output_dir=str(folder), report_to="none", **settings)
            self.state = TrainerState(is_local_process_zero=is_first(), is_world_process_zero=is_first())
            self.control = TrainerControl()

    def start(self, objective: nn.Module, step: int, steps: int) -> None:
        for callback in self.callbacks:
            self.state.global_step, self.state.max_steps = step, steps
            callback.on_init_end(self.args, self.state, self.control, model=objective)
            callback.on_train_begin(self.args, self.state, self.control, model=objective)

    def log(self, record: Mapping[str, Any]) -> None:
        numbers = dict(record)
        for group in ("parts", "measured"):
            numbers.update({f"{group}/{name}": value for name, value in (numbers.pop(group, None) or {}).items()})
        numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        for callback in self.callbacks:
            self.state.global_step = record["step"]
            callback.on_log(self.args, self.state, self.control, logs=numbers)

    def end(self) -> None:
        for callback in self.callbacks:
            callback.on_train_end(self.args, self.state, self.control)

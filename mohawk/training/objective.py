"""What a phase optimises: a student and its losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mohawk.data.next_tokens import IGNORED, next_labels
from mohawk.training.pipeline import PipelineStage

StudentT = TypeVar("StudentT", bound=nn.Module)


class Objective(nn.Module, Generic[StudentT]):
    """A student, and losses that pull it somewhere. `PhaseTrainer` calls the methods in the order that they have here.

    `student` is the module that trains; whatever else the objective holds stays in eval mode. `shares` is true where a
    micro-batch's losses are its shares of the step's already; else they are weighed by its share of the step's `count`.
    `finished`, once true, ends the phase before its last step. `stage`: which of several processes' layers this one has
    the losses of; None: all.
    """

    student: StudentT
    shares: bool = False
    finished: bool = False
    stage: PipelineStage | None = None

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups, holding exactly the parameters that train."""
        raise NotImplementedError

    def apart(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Where each loss trains parameters that no other one reaches, by its name what it trains, of all processes
        with stages; else nothing. A loss that is not finite then holds up what it trains alone, and each
        gradient is clipped by itself, with n of them to max_grad_norm / sqrt(n): together they are at most as long as
        one that is clipped whole, and none shortens another."""
        return {}

    def has(self, loss: str) -> bool:
        """Whether this process computes a loss of `apart`."""
        return True

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What a step, counted from 0, trains on instead of a micro-batch. Called for all of a step's micro-batches
        before the first one's losses."""
        return batch

    def count(self, batch: dict[str, Tensor]) -> int:
        """How many things the losses of a micro-batch are means over: its positions that predict a token, all of them
        without labels."""
        if "labels" in batch:
            return int((next_labels(batch) != IGNORED).sum())
        return next(iter(batch.values())).numel()

    def begin_step(self, step: int, steps: int) -> None:
        """Called before the first losses of a step; it is counted from 0, and there are `steps` of them."""

    def losses(self, **batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, scalar loss) one after the other. Each is back-propagated before the next one is asked for, so an
        objective that goes layer by layer keeps one layer's graph alive. Their sum is the step's loss."""
        raise NotImplementedError

    def end_step(self, loss: float) -> None:
        """After the optimizer's step, with the step's loss. A step that changed nothing has no end."""

    def measured(self) -> dict[str, Any]:
        """Numbers by name since this was asked last; a logged record has their means over all processes."""
        return {}

    def training_state(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Tensors by name, and plain values, that a checkpoint keeps beside the parameters."""
        return {}, {}

    def load_training_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `training_state` gave. Not called for a checkpoint that holds none."""

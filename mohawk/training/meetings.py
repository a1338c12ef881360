"""Meetings of processes that have layers of their own (pipeline.py): no step of one depends on how another's went, so
that they tell each other only now and then, and none waits for those behind it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mohawk.core.processes import from_all, is_first
from mohawk.training.pipeline import PipelineStage

# Seconds between meetings, at least; and how many times as long as the last one took, since in a meeting the first
# stages wait for the last one.
APART, TIMES = 10.0, 20.0


@dataclass
class Taken:
    """What is known of a step that was taken: its learning rate, the losses, and the norm of the gradient of each, or
    of all together under ""."""

    step: int
    learning_rate: float
    losses: dict[str, float]
    norms: dict[str, float]

    def bad(self, of: str = "") -> list[str]:
        """What is not finite of a loss that trains parameters of its own; else of all."""
        found = [name for name, value in self.losses.items() if of in ("", name) and not math.isfinite(value)]
        for name, norm in self.norms.items():
            if of in ("", name) and not math.isfinite(norm):
                found.append(f"the gradient of {name}" if name else "the gradient")
        return found


class Meetings:
    """When the processes of all pipelines meet, by the clock of the first one or because one has to, and what they then
    know of their steps."""

    def __init__(self, stage: PipelineStage):
        self.stage = stage
        self._at, self._took = time.monotonic(), 0.0  # the last one, and how long it was

    def next(self, asks: bool) -> bool:
        """Whether all meet after the step that comes. asks: whether this process has to, of which only the first
        stage's word counts. All must ask before each step, and hear the same."""
        passed = time.monotonic() - self._at
        return self.stage.told(asks or is_first() and passed >= max(APART, TIMES * self._took))

    def hold(self, taken: Sequence[Taken], stop: bool, due: bool) -> tuple[list[Taken], bool, bool]:
        """The steps since the last meeting with the losses and norms of all layers, of the first pipeline's rows; and
        whether any process asks to stop, and to save. All must come here."""
        self.stage.flush()
        begin = time.monotonic()
        found = from_all((self.stage.replica, taken, stop, due))
        self._at = time.monotonic()
        self._took = self._at - begin
        stages = [one for replica, one, *_ in found if replica == 0]
        whole = [
            Taken(
                own.step,
                own.learning_rate,
                {name: value for one in stages for name, value in one[i].losses.items()},
                {name: value for one in stages for name, value in one[i].norms.items()},
            )
            for i, own in enumerate(taken)
        ]
        return whole, any(stop for *_, stop, _ in found), any(due for *_, due in found)

"""When a stage of training has done its work before its tokens are used up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Advance:
    """Measures the student every so many steps and says when to go on to the next stage.

    Args:
        validate: gives (the student's loss, the teacher's) on held-out text, nats per token.
        every: steps between measurements.
        patience, improvement: end when the student's loss has not fallen by the share `improvement` of the best so far
            in `patience` measurements; None: never for that reason.
        gap: end when the student's loss is within so many nats of the teacher's; None: never for that reason.
        best, since, history: what was measured so far.
    """

    validate: Callable[[], tuple[float, float]]
    every: int
    patience: int | None = None
    improvement: float = 0.001
    gap: float | None = None
    best: float | None = None
    since: int = 0  # measurements since the best
    history: list[list[float]] = field(default_factory=list)  # [step, student, teacher]

    def after(self, step: int) -> bool:
        """Whether to end after this step, counted from 1."""
        if step % self.every:
            return False
        student, teacher = self.validate()
        self.history.append([step, student, teacher])
        log.info("step %d: held-out loss %.4f, teacher %.4f", step, student, teacher)
        if self.best is None or student < self.best * (1 - self.improvement):
            self.best, self.since = student, 0
        else:
            self.since += 1
        if self.gap is not None and student - teacher <= self.gap:
            log.info("step %d: within %.3g nats of the teacher; going on to what follows", step, self.gap)
            return True
        if self.patience is not None and self.since >= self.patience:
            log.info("step %d: no better for %d measurements; going on to what follows", step, self.since)
            return True
        return False

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since, "history": self.history}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.since, self.history = state["best"], state["since"], state["history"]

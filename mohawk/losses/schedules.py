"""Numbers that change while a student trains: temperatures and loss weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ramp:
    """From `start` to `end` over the first `until` (a share, above 0, up to 1) of the steps, `end` from there on.

    shape: linear; cosine (half a wave, slow at both ends); or steps (the `start` first, the `end` from `until` on).
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "steps"] = "linear"
    until: float = 1.0

    def at(self, progress: float) -> float:
        """The value when a share `progress` (0 to 1) of the steps is done."""
        share = min(progress / self.until, 1.0)
        if self.shape == "steps":
            share = float(share >= 1.0)
        elif self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def at(value: float | Ramp, progress: float) -> float:
    """A constant's or a ramp's value when a share `progress` of the steps is done."""
    return value.at(progress) if isinstance(value, Ramp) else value


def temperature_for(teacher_parameters: int, student_parameters: int) -> float:
    """The rule of thumb log2(size of the teacher / size of the student) + 1, at least 1."""
    return max(1.0, math.log2(teacher_parameters / student_parameters) + 1)


def weights_for(alpha: float, kd_weight: float | Ramp, ce_weight: float | Ramp) -> tuple[float, float]:
    """kd_weight and ce_weight that alpha means. Raises ValueError where it is no share or those are given too."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}; allowed: 0 to 1, the weight of the labels' cross entropy")
    if kd_weight != 1.0 or ce_weight != 0.0:
        raise ValueError(
            f"alpha: got {alpha:g} beside kd_weight or ce_weight, which say the same; give alpha={alpha:g} alone where "
            f"it weighs the labels' cross entropy (kd_weight={1 - alpha:g}, ce_weight={alpha:g}), or "
            f"kd_weight={alpha:g}, ce_weight={1 - alpha:g} where it weighs the divergence, as in some code"
        )
    return 1 - alpha, alpha


def task_weights(task_weight: Mapping[str, float] | None) -> tuple[float, float, float]:
    """Weights of plain text, labels and rationales, the tasks 0, 1 and 2 of a batch: those given by name, others 1.
    Raises ValueError for other names and for what is no weight."""
    names = ("text", "label", "rationale")
    if task_weight is None:
        return 1.0, 1.0, 1.0
    if not isinstance(task_weight, Mapping):
        raise ValueError(
            f"task_weight: got {task_weight!r}; give a dict of {', '.join(names)}, or alpha= where it weighs the "
            "labels' cross entropy beside the divergence"
        )
    for name, weight in task_weight.items():
        if name not in names:
            raise ValueError(
                f"task_weight: got {name!r}; allowed: {', '.join(names)}; the divergence and the cross entropy have "
                "kd_weight and ce_weight"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"task_weight[{name!r}]: got {weight!r}; allowed: a finite number, 0 or above")
    text, label, rationale = (float(task_weight.get(name, 1.0)) for name in names)
    return text, label, rationale

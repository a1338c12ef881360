"""What is measured beside a distillation's loss: means over tokens, and how far teacher and student agree."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.core.processes import several
from mohawk.data.next_tokens import IGNORED
from mohawk.kernels.kd.interface import TeacherHidden
from mohawk.losses.heads import Head

SAMPLED_ROWS = 256  # of a batch, on which agreement and the teacher's entropy are measured


class Means:
    """Means over what was added since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, name: str, mean: Tensor, count: Tensor) -> None:
        """Add a mean of `count` values. Both stay tensors: nothing waits for the device here."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + mean.detach() * count
        entry[1] = entry[1] + count

    def take(self) -> dict[str, float]:
        """The means by name, without those of nothing, over what all processes added: all of them must ask. What is
        added from here on counts for the next ones."""
        sums = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        if several():
            found: list[dict[str, tuple[float, float]]] = [{}] * dist.get_world_size()
            dist.all_gather_object(found, sums)
            names = dict.fromkeys(name for one in found for name in one)
            added = {name: [one[name] for one in found if name in one] for name in names}
            sums = {name: (sum(t for t, _ in of), sum(c for _, c in of)) for name, of in added.items()}
        return {name: total / count for name, (total, count) in sums.items() if count}


@torch.no_grad()
def agreement(
    source: TeacherHidden, hidden: Tensor, head: Head, labels: Tensor, vocab: int | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """On the first rows that have a label: the share of them whose top token is the same, the teacher's entropy in
    nats, and how many they are; None without any. hidden, labels: the student's rows; vocab: how many entries both
    sides have, None for all."""
    rows = (labels.flatten() != IGNORED).nonzero().squeeze(1)[:SAMPLED_ROWS]
    if not len(rows):
        return None
    of_teacher = Head(source.head, source.bias, source.logit_scale, source.logit_softcap)
    teacher = of_teacher.logits(source.hidden.flatten(0, 1)[rows])[:, :vocab]
    student = head.logits(hidden.flatten(0, 1)[rows])[:, :vocab]
    same = (teacher.argmax(-1) == student.argmax(-1)).float().mean()
    logprobs = teacher.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1).mean()
    return same, entropy, torch.tensor(float(len(rows)))

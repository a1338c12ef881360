"""A model's layers dealt to processes: a pipeline that flows forward alone, since no layer's loss reaches another one.

Hidden states go from stage to stage as they are made, and nothing comes back, so no stage waits for a later one. Only
where processes meet (`PhaseTrainer`) do the first stages wait until the last ones have caught up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.core.processes import count, own_group, rank

AHEAD = 4  # tensors that a stage has handed on and the next one has not taken yet, at most
REPLACED = 4  # what a layer that is replaced costs beside one that is not: the student's pass, and twice that back


@dataclass
class PipelineStage:
    """Which layers' stage a process has, in which of several pipelines.

    index: of the stage, of `stages`. replica: of the pipeline, of `replicas`, which deal a step's rows among
    themselves. group: the processes that have this stage, one of each pipeline.
    """

    index: int
    stages: int
    replica: int
    replicas: int
    group: Any
    _sent: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def receive(self, like: Tensor) -> Tensor:
        """A tensor of the stage before, of the shape and dtype that this one has; the first stage's is this one."""
        if self.index == 0:
            return like
        taken = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(taken, rank() - 1)
        return taken

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor on to the next stage, without waiting until it takes it."""
        if self.index == self.stages - 1:
            return
        while len(self._sent) >= AHEAD:
            self._sent.popleft()[0].wait()
        tensor = tensor.contiguous()
        self._sent.append((dist.isend(tensor, rank() + 1), tensor))  # which must live until it is there

    def told(self, asks: bool) -> bool:
        """Whether the first stage of any pipeline asks for something; every process must ask once a step."""
        said = torch.tensor([float(asks)])
        if self.index == 0:
            dist.all_reduce(said, group=self.group)
        else:
            dist.recv(said, rank() - 1)
        self.send(said)
        return bool(said)

    def flush(self) -> None:
        """Until all that was handed on is taken."""
        while self._sent:
            self._sent.popleft()[0].wait()


def make_stage(stages: int) -> PipelineStage:
    """This process's stage; all processes must ask, and be a multiple of `stages`. Neighbours have ranks that follow
    each other, so that hidden states stay within a machine where they can."""
    group = own_group([range(index, count(), stages) for index in range(stages)])
    replica, index = divmod(rank(), stages)
    return PipelineStage(index, stages, replica, count() // stages, group)


def deal(replaced: Sequence[int], stages: int) -> list[range]:
    """The layers of each stage, one after another up to the last one that is replaced, as even as they can be; at least
    one of each stage is replaced. Raises ValueError where there are fewer of these than stages."""
    last, wanted = replaced[-1] + 1, set(replaced)
    if stages > len(wanted):
        raise ValueError(f"{len(wanted)} layers are replaced, too few for {stages} stages")
    sums = [0]
    for i in range(last):
        sums.append(sums[-1] + (REPLACED if i in wanted else 1))
    before = [sum(i < end for i in wanted) for end in range(last + 1)]  # how many are replaced
    # for each end, what the costliest stage costs at least, and where the last stage then begins
    best = [(float(sums[end]) if before[end] else float("inf"), 0) for end in range(last + 1)]
    begins = []
    for _ in range(stages - 1):
        best = [
            min(
                (
                    (max(best[begin][0], sums[end] - sums[begin]), begin)
                    for begin in range(end)
                    if before[begin] < before[end]
                ),
                default=(float("inf"), 0),
            )
            for end in range(last + 1)
        ]
        begins.append([begin for _, begin in best])
    cuts = [last]
    for places in reversed(begins):
        cuts.append(places[cuts[-1]])
    cuts = [0, *reversed(cuts)]
    return [range(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False)]

"""What the processes that torchrun or accelerate started tell each other; in one process, nothing happens."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def several() -> bool:
    """Whether this is one of several processes of one run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(value: Any) -> Any:
    """What rank 0 says, on every rank."""
    if not several():
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if several():
        dist.barrier()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `tensor`, in place."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def share_parameters(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give every process rank 0's values, as DistributedDataParallel does when it is made."""
    if several():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes.

    A parameter that one process's batch did not reach counts as zero there; one that none reached stays
    without a gradient, as it would in one process.
    """
    if not several():
        return
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    pending = []
    for parameter, count in zip(parameters, total(reached).tolist(), strict=True):
        if count:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()

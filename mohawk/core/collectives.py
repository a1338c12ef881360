"""Tensors and numbers of all processes put together; in one process they are what they are."""

import statistics
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from mohawk.core.processes import count, several

SMALL = 2**16  # numbers of a gradient that is sent together with others: norms, biases, decays, adapters


def total(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every process's `tensor`, in place; group: of some of them."""
    if several():
        dist.all_reduce(tensor, group=group)
    return tensor


def means(values: Mapping[str, float]) -> dict[str, float]:
    """Each name's mean over the processes that have it; all of them must ask."""
    if not several():
        return dict(values)
    found: list[Mapping[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(values))
    names = dict.fromkeys(name for one in found for name in one)
    return {name: statistics.fmean(one[name] for one in found if name in one) for name in names}


def shared_from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values, in place, on every process; all of them give a tensor of that shape and dtype."""
    if several():
        dist.broadcast(tensor, src=0)
    return tensor


def rows_of_all(tensor: torch.Tensor) -> torch.Tensor:
    """Every process's rows one below the other, in the order of their ranks; all have equally many."""
    if not several():
        return tensor
    found = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)


def share_parameters(parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Give every process the first one's values, as DistributedDataParallel does when it is made; parts of a sharded
    parameter are nobody else's. group: of some processes."""
    if several():
        for parameter in parameters:
            if not _in_parts(parameter):
                dist.broadcast(parameter.data, group=group, group_src=0)


def sum_gradients(parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Add up the gradients of all processes, or of those of a group; small ones in one message.

    A parameter that one process's batch did not reach counts as zero there; one that none reached stays
    without a gradient, as it would in one process. Sharded parameters have the sum already.
    """
    parameters = [parameter for parameter in parameters if not _in_parts(parameter)]
    if not several() or not parameters:
        return
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    pending = []
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter, processes in zip(parameters, total(reached, group).tolist(), strict=True):
        if processes:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient = gradient.contiguous()
            if gradient.numel() <= SMALL:
                small.setdefault(gradient.dtype, []).append(gradient)
            else:
                pending.append(dist.all_reduce(gradient, group=group, async_op=True))
    for gradients in small.values():
        sums = total(torch.cat([gradient.flatten() for gradient in gradients]), group)
        for gradient, summed in zip(gradients, sums.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
    for work in pending:
        work.wait()


def _in_parts(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)

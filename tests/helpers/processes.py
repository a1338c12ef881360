"""Several processes of one program over gloo, forked from the test's own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mohawk.core.processes import joined, leave
from tests.helpers.tiny_phase import fork, free_port, wait


def in_processes(folder: Path, count: int, body: Callable[[int], Any], timeout: float = 150.0) -> list[Any]:
    """What `body(rank)` gives in each of `count` processes of one group; kept in `folder` on the way."""
    port = str(free_port())

    def work(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        with joined("cpu"):
            found = body(rank)
            torch.save(found, folder / f"{port}-{rank}.pt")
            leave()

    folder.mkdir(parents=True, exist_ok=True)
    codes = [wait(pid, timeout) for pid in [fork(lambda rank=rank: work(rank)) for rank in range(count)]]
    assert codes == [0] * count, codes
    return [torch.load(folder / f"{port}-{rank}.pt", weights_only=False) for rank in range(count)]

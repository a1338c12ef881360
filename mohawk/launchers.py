"""Who started this process: torchrun, accelerate launch, or MPI's launcher, which says otherwise what torchrun says."""

from __future__ import annotations

import os
from pathlib import Path

from mohawk.errors import UserError

# torchrun's names of how many processes there are, which one this is, and both on this machine; then MPI's
TORCHRUNS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OF_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # of MPICH and of Intel
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
PORT = "29500"  # where the first process is found: torchrun's and accelerate's own


def hear_mpi() -> None:
    """Tell torch what mpirun tells, where that has started several processes, as accelerate launch does on CPUs.
    Raises UserError where nothing says on which of several machines the first process is."""
    if "LOCAL_RANK" in os.environ:
        return
    told = next((names for names in OF_MPI if all(name in os.environ for name in names)), None)
    if told is None or int(os.environ[told[0]]) < 2:
        return
    size, _, _, here = (os.environ[name] for name in told)
    if "MASTER_ADDR" not in os.environ and here != size:
        raise UserError(
            f"MASTER_ADDR: is not set, and mpirun has started {here} of {size} processes on this machine; set it to "
            "the first machine's address on all of them"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", PORT)
    os.environ.update({name: os.environ[theirs] for name, theirs in zip(TORCHRUNS, told, strict=True)})


def under_accelerate() -> bool:
    """Whether accelerate launch, which hands no signal on, waits for this one process (as it starts it on a CPU)."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no Linux, and no way to be told of its end
        return False
    names = {Path(word).name for word in words}
    return "accelerate-launch" in names or "accelerate.commands.launch" in names or {"accelerate", "launch"} <= names


def wanted_several() -> bool:
    """Whether accelerate launch, told to use CPUs, was told of several processes and has started one."""
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return on_cpus and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ

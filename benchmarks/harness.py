"""One case of a benchmark, and how it is checked and timed, in a process of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
SHORT = 0.2  # seconds: calls that take less are timed several at once


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of one table.

    `make()` returns (check, work): `check()` gives an error against the reference, `work()` is what is timed,
    or None where the table is about errors alone (then check gives a dict of columns). `floor` is the line of
    the same table that ratios refer to, `formula` says what the floor counts, `needs` the package a peer's
    case imports. `against` is the line whose time and memory are divided by this one's. Cases with a place
    `at` on the horizontal axis are drawn as curves over it, one for each name up to its comma.
    """

    table: str
    name: str
    make: Callable[[], tuple[Callable, Callable | None]]
    needs: str | None = None
    floor: str | None = None
    formula: str = ""
    tolerance: float = 0.1
    against: str | None = None
    at: float | None = None

    @property
    def key(self) -> str:
        return f"{self.table}/{self.name}"


class PeakMemory:
    """Peak memory above that at the start, in MiB: torch's own count on CUDA, else resident pages as Linux counts
    them."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    @staticmethod
    def status(name: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return self
        # Pages that the check left with the C library would hide as many of the work's own.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        self.start = self.status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.cuda:
            import torch

            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self.start
            return
        self.mib = self.status("VmHWM") - self.start


def measure(case: Case, device: str, repeats: int) -> dict:
    """Check, warm up, measure memory once, then time: CPU seconds over all threads on CPU, seconds
    until the device is done on CUDA."""
    import torch

    check, work = case.make()
    result = {"error": check()}
    if work is None:
        return {"columns": result["error"]}
    if not result["error"] <= case.tolerance:
        return {"wrong": result["error"]}
    started = time.perf_counter()
    with PeakMemory(device) as peak:
        work()
    first = time.perf_counter() - started
    result["mib"] = peak.mib

    def seconds(calls: int) -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls

    once = seconds(1)[0] if first < SHORT or device == "cuda" else first  # the first may have compiled
    calls = max(1, min(100, int(SHORT / once)))
    wall, cpu = zip(*(seconds(calls) for _ in range(repeats)), strict=True)
    return result | {"wall": wall, "cpu": cpu}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    cpu = platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("triton", "transformers")},
        "python": platform.python_version(),
    }

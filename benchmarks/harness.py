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
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
SHORT = 0.2  # seconds: calls that take less are timed several at once
FLUSH = 256 << 20  # bytes written before each timing on a GPU: more than its caches hold
MOST = 100  # timings of one process


class Step(NamedTuple):
    """What is differentiated: `forward()` gives what `backward(...)` takes. Both are timed, together and apart."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of one table.

    `make()` returns (check, work): `check(whole)` gives an error against the reference, of a small problem or, if it is
    to be whole, of the one that is timed as far as a reference can be had there; `work` is what is timed, a function
    or a `Step`, or None where the table is about errors alone (then check gives a dict of columns). `floor` is the
    line of the same table that ratios refer to, `formula` says what the floor counts, `flops` and `bytes` are what it
    comes to: operations, and bytes read and written, that one call cannot do without. `needs` is the package a peer's
    case imports. `against` is the line whose time and memory are divided by this one's. Cases with a place `at` on the
    horizontal axis, which counts `axis`, are drawn as curves over it, one for each name up to its comma.
    """

    table: str
    name: str
    make: Callable[[], tuple[Callable, Callable | Step | None]]
    needs: str | None = None
    floor: str | None = None
    formula: str = ""
    tolerance: float = 0.1
    against: str | None = None
    at: float | None = None
    axis: str = "tokens"
    flops: float | None = None
    bytes: float | None = None

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


def measure(case: Case, device: str, repeats: int, whole: bool = False) -> dict:
    """Check, warm up, measure memory once, then time: CPU seconds over all threads on CPU, seconds on the device by its
    own events on CUDA, where every timing begins with cold caches. A `Step` is timed as a whole and in its parts.
    whole: what is checked is of the size that is timed."""
    check, work = case.make()
    result = {"error": check(whole)}
    if work is None:
        return {"columns": result["error"]}
    if not result["error"] <= case.tolerance:
        return {"wrong": result["error"]}
    started = time.perf_counter()
    with PeakMemory(device) as peak:
        _parts(work, lambda: None)
    first = time.perf_counter() - started
    result["mib"] = peak.mib
    timed = _on_cuda if device == "cuda" else _on_cpu
    found = timed(work, first, repeats)
    return result | found


def _parts(work: Callable | Step, mark: Callable[[], None]) -> None:
    """One call, with a mark at its beginning, at the end of its forward if it is a step, and at its end."""
    mark()
    if isinstance(work, Step):
        found = work.forward()
        mark()
        work.backward(found)
    else:
        work()
    mark()


def _named(times: list[list[float]]) -> dict[str, list[float]]:
    """Of the seconds between the marks of each timing, those of the whole, and of its parts where it has two."""
    found = {"both": [sum(parts) for parts in times]}
    if len(times[0]) == 2:
        found |= {"forward": [parts[0] for parts in times], "backward": [parts[1] for parts in times]}
    return found


def _on_cpu(work: Callable | Step, first: float, repeats: int) -> dict:
    """Seconds of CPU time and of the clock; of what is short the means of many calls."""

    def seconds(calls: int) -> tuple[list[float], float]:
        sums: list[float] = []
        wall = time.perf_counter()
        for _ in range(calls):
            stamps: list[float] = []
            _parts(work, lambda stamps=stamps: stamps.append(time.process_time()))
            parts = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        return [total / calls for total in sums], (time.perf_counter() - wall) / calls

    once = seconds(1)[1] if first < SHORT else first  # the first may have compiled
    calls = max(1, min(MOST, int(SHORT / once)))
    times, walls = zip(*(seconds(calls) for _ in range(repeats)), strict=True)
    return {"times": _named(list(times)), "wall": list(walls)}


def _on_cuda(work: Callable | Step, first: float, repeats: int) -> dict:
    """Seconds between events on the device."""
    import torch

    flushed = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def seconds() -> list[float]:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        flushed.zero_()
        _parts(work, mark)
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:], strict=False)]

    once = sum(seconds())  # the first may have compiled
    calls = max(repeats, min(MOST, int(SHORT * repeats / max(once, 1e-6))))
    found = _named([seconds() for _ in range(calls)])
    return {"times": found, "wall": found["both"]}


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
        **{name: version_of(name) for name in ("triton", "transformers", "liger_kernel")},
        "python": platform.python_version(),
    }

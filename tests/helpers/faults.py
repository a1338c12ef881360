"""The command line in a child process whose file calls fail as they are told to."""

import ctypes
import errno
import functools
import hashlib
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mohawk.cli import main
from mohawk.core.folders import checkpoints
from tests.helpers.tiny_phase import fork, wait

# Python's own file calls, with their paths: whatever library makes them
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
# of what is measured by the clock only that it is there is compared
BY_THE_CLOCK = ("metrics.jsonl", "log.txt", "results.json", "report.md", "report.html", "summary.json", "again.json",
                "README.md")  # fmt: skip


class Faults:
    """Counts the file calls of paths under `root`; the `at`-th one raises OSError(`number`) instead."""

    def __init__(self, root: Path, at: int | None, number: int):
        self.root, self.at, self.number, self.calls = str(root), at, number, []

    def call(self, name: str, *paths) -> None:
        paths = [os.fspath(path) for path in paths if not isinstance(path, int) and path is not None]
        paths = [os.fsdecode(path) for path in paths]
        if any(path.startswith(self.root) for path in paths):
            self.calls.append(f"{name} {' '.join(path.removeprefix(self.root) for path in paths)}")
            if len(self.calls) == self.at:
                raise OSError(self.number, os.strerror(self.number), *paths[:1])

    def install(self) -> None:
        """In this process, for good."""
        import safetensors.torch

        def audit(event, args):
            if event in EVENTS and (event != "open" or not isinstance(args[0], int)):
                self.call(event, *(args[:2] if event in ("os.rename", "os.link") else args[:1]))

        sys.addaudithook(audit)
        of = {"fsync": os.fsync, "serialize": safetensors.torch.serialize_file, "save": torch.save}

        def fsync(handle):
            try:
                self.call("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
            except OSError as error:
                raise OSError(error.errno, error.strerror) from None  # a flush knows no name
            of["fsync"](handle)

        def serialize(tensors, path, **options):
            try:
                self.call("safetensors", path)
            except OSError as error:
                from safetensors import SafetensorError

                said = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(said) from None
            return of["serialize"](tensors, path, **options)

        def save(value, path, *args, **options):
            try:
                self.call("torch.save", path)
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534") from None
            return of["save"](value, path, *args, **options)

        os.fsync, safetensors.torch.serialize_file, torch.save = fsync, serialize, save


class Allocations(TorchDispatchMode):
    """Counts the operations that make a tensor, in forward and backward passes; the `at`-th one finds too little memory
    for it, and says so in the words of one of the allocators that torch asks."""

    WORDS = (
        lambda: torch.empty(1 << 50),  # the real one, of the CPU
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total")),
        lambda: _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        lambda: _raise(MemoryError()),
    )

    def __init__(self, at: int | None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        if returned and not any(value.alias_info for value in returned):  # those are views, or in place
            self.count += 1
            if self.count == self.at:
                self.WORDS[self.at % len(self.WORDS)]()
        return func(*args, **(kwargs or {}))


class LibraryCalls:
    """Counts the calls of a command into the libraries below it: of functions in C, and of those in Python that
    another package calls. At the `at`-th one `strike` happens in its place."""

    NAMES = ("numpy", "safetensors", "tokenizers", "pyarrow", "datasets", "transformers", "matplotlib", "PIL", "gguf")

    def __init__(self, at: int, strike: Callable[[], None]):
        self.at, self.strike, self.count = at, strike, 0

    def __call__(self, frame, event, arg):
        if event == "c_call":
            of = getattr(arg, "__module__", None) or type(getattr(arg, "__self__", None)).__module__
            called = of.partition(".")[0] in self.NAMES
        else:
            package = _package(frame.f_code.co_filename)
            called = event == "call" and package in self.NAMES and frame.f_code.co_name not in ("<module>", "__del__")
            called = called and (frame.f_back is None or _package(frame.f_back.f_code.co_filename) != package)
        if called:
            self.count += 1
            if self.count == self.at:
                sys.setprofile(None)
                self.strike()


@functools.cache
def _package(file: str) -> str:
    """The installed package that a file of code is of; empty for anything else."""
    return file.partition("/site-packages/")[2].partition("/")[0]


def _raise(error: BaseException):
    raise error


class Libc:
    """Counts the calls of libc that touch a path under `root`, and makes the `at`-th one fail, in a process that
    tests/helpers/libc_faults.c was preloaded into; at: None does nothing."""

    def __init__(self, root: Path, at: int | None, number: int):
        self.root, self.at, self.number, self.preloaded = str(root), at, number, ctypes.CDLL(None)
        self.count, self.struck = 0, ""

    def __enter__(self):
        if self.at is not None:
            self.preloaded.libc_faults_begin(self.root.encode(), ctypes.c_long(self.at), self.number)
        return self

    def __exit__(self, *raised):
        if self.at is not None:
            self.preloaded.libc_faults_end()
            self.preloaded.libc_faults_count.restype = ctypes.c_long
            self.preloaded.libc_faults_struck.restype = ctypes.c_char_p
            self.count = self.preloaded.libc_faults_count()
            self.struck = self.preloaded.libc_faults_struck().decode()


class Seen(NamedTuple):
    """What a command did: its file calls, how many tensors it made, how often it called a library and libc (where
    asked), and which call of libc failed."""

    calls: list[str]
    allocations: int
    libraries: int = 0
    libc: int = 0
    struck: str = ""


def command(
    argv,
    root: Path,
    *,
    at: int | None = None,
    number: int = errno.ENOSPC,
    largest: int | None = None,
    memory_at: int | None = None,
    library_at: int | None = None,
    strike: Callable[[], None] = lambda: _raise(MemoryError()),
    libc_at: int | None = None,
):
    """(exit code, what it printed, what it did) of one command line.

    A fault comes at the `at`-th call of a path under `root`, at every write beyond `largest` bytes of a file, at the
    `memory_at`-th tensor that is made, as `strike` makes it at the `library_at`-th call into a library, or at the
    `libc_at`-th call of libc for a path under `root`.
    """
    called = root.with_name("called")
    reading, writing = os.pipe()  # not a file: it would have to keep to `largest` too
    said = []

    def body():
        os.dup2(writing, 1), os.dup2(writing, 2)
        os.close(reading), os.close(writing)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        faults = Faults(root, at, number)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        faults.install()
        libraries = LibraryCalls(library_at or 0, strike)
        with Allocations(memory_at) as allocations:
            sys.setprofile(None if library_at is None else libraries)
            with Libc(root, libc_at, number) as libc:
                code = main([str(word) for word in argv])
            sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        done = [faults.calls, allocations.count, libraries.count, libc.count, libc.struck]
        called.write_text(json.dumps(done))
        return code

    called.unlink(missing_ok=True)
    child = fork(body)
    os.close(writing)
    reader = threading.Thread(target=lambda: said.append(os.fdopen(reading, "rb").read()))
    reader.start()
    code = wait(child, timeout=600.0 if os.environ.get("MOHAWK_FAULTS") == "all" else 60.0)  # a long run has patience
    reader.join(10.0)
    seen = Seen(*json.loads(called.read_text())) if called.exists() else Seen([], 0)
    return code, b"".join(said).decode("utf-8", "replace"), seen


def contents(folder: Path) -> dict[str, str]:
    """Every file under `folder` by its name, with a hash of what must not depend on the clock.

    Checkpoints but the newest are left out: one that could not be deleted is in the way of nothing.
    """
    found = {}
    old = {path for phase in folder.rglob("phases/*") for path in checkpoints(phase)[1:]}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name == ".lock" or old & set(path.parents):
            continue
        summed = path.name[1:].removesuffix(".sha256").removesuffix(".crc32")  # of what these sums are
        if path.suffix == ".png" or not {path.name, summed}.isdisjoint((*BY_THE_CLOCK, "run.json")):
            found[name] = "there"
        elif path.name == "MANIFEST.json" and "plots" not in name:
            files = json.loads(path.read_text())["files"]
            found[name] = str({k: v["sha256"] for k, v in sorted(files.items()) if k not in BY_THE_CLOCK})
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found

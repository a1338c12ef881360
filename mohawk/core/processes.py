"""What the processes that torchrun, accelerate or mpirun started tell each other; in one process, nothing happens.

A run in several processes is one program: all compute what training needs, the first (rank 0) alone writes, prints,
measures, and decides what depends on files.
"""

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mohawk.core.stopping import stop_with_parent
from mohawk.core.sums import hashed
from mohawk.errors import SaidElsewhere, UserError, as_os_error
from mohawk.launchers import hear_mpi, under_accelerate, wanted_several

T = TypeVar("T")
PATIENCE = "MOHAWK_TIMEOUT_MINUTES"  # environment variable: how long a process may be silent where others wait for it
MINUTES = 30.0  # where it is not set
HEARING = timedelta(seconds=5)  # for a mistake that all find to be found by all
ARRIVING = timedelta(seconds=60)  # for processes that are still being started, before a mistake ends the first
LAST = 2.0  # seconds by which those of the first machine outlive others, whose torchrun asks a store there
BEAT = 2.0  # seconds between signs of life of the first process, while the others wait for its work

ALONE = (
    "accelerate launch has started one process, whatever num_processes says, as it does on CPUs without mpirun "
    "(mpirun_hostfile); to have several, use torchrun"
)
log = logging.getLogger(__name__)

_store: dist.Store | None = None  # where a process leaves word while others are in the middle of something
_works = 0  # how many times the others have waited for the first
_wish: "Wish | None" = None
_heard = False  # that the first process ends with the mistake that this one ends with


def launched() -> bool:
    """Whether torchrun, accelerate launch or mpirun started this as one of several processes."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return dist.get_rank() == 0 if several() else not launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Within the block the processes of a launcher are one program, of which the first alone prints.

    A UserError of the first one is a SaidElsewhere on the others, which may have found the same mistake themselves.

    device: a recipe's, which makes them a process group, each with a GPU of its own unless it is cpu; None: not yet.
    """
    hear_mpi()
    if not launched():
        _hear_accelerate()
        if under_accelerate():
            stop_with_parent()
            if wanted_several():
                log.warning(ALONE)
        yield
        return
    _start(device)
    if is_first():
        try:
            _hear_accelerate()
            yield
        except UserError as error:
            _tell(error)
            raise
        return
    with _quiet():
        try:
            _hear_accelerate()
            yield
        except _FailedElsewhere as error:
            raise SaidElsewhere(str(error)) from error
        except UserError as error:
            if _first_said(error):
                raise SaidElsewhere(str(error)) from error
            raise


def _hear_accelerate() -> None:
    """Take accelerate launch's wish to shard models for a recipe's; it is not accelerate that fulfils it, which is to
    hear of nothing. Raises UserError for what has no counterpart here."""
    global _wish

    def asked(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("true", "1")

    if asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate is set to DEEPSPEED, which the commands do not use; `sharding.kind: full` in the recipe does "
            "what ZeRO-3 does: start them with torchrun, or with accelerate's fsdp_version: 2"
        )
    if not asked("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate is set to FSDP 1, which the commands do not use; set fsdp_version: 2")
    for name, instead in (("FSDP_OFFLOAD_PARAMS", "more processes"), ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "fewer "
                          "rows: batch_size")):  # fmt: skip
        if asked(name):
            raise UserError(f"accelerate is set to {name.lower()}, which the commands do not know; use {instead}")
    _wish = Wish(activation_checkpointing=asked("FSDP_ACTIVATION_CHECKPOINTING"))
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        del os.environ[name]
    del os.environ["ACCELERATE_USE_FSDP"]


@dataclass(frozen=True)
class Wish:
    """What accelerate launch was told of sharding."""

    activation_checkpointing: bool


def wish() -> Wish | None:
    """What accelerate launch was told of sharding; None: nothing."""
    return _wish


def patience() -> timedelta:
    """How long a process may be silent where others wait for it, before they end the run. Raises UserError."""
    given = os.environ.get(PATIENCE, "").strip() or str(MINUTES)
    try:
        minutes = float(given)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 60 * 24 * 365:
        raise UserError(f"{PATIENCE}: got {given!r}; allowed: minutes, more than 0 and at most a year")
    return timedelta(minutes=minutes)


def own_group(members: Sequence[Sequence[int]]) -> Any:
    """The one of these groups of ranks that this process is in, each is in one of; all must ask. A silent member is
    waited for as long as all processes are (`patience`), and not for torch's own time."""
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in members], timeout=patience())[0]


def leave() -> None:
    """Close the process group; called when the program ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _start(device: str | None) -> None:
    global _store
    if dist.is_initialized():  # by a program that calls us
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is torchrun, or accelerate with it
        stop_with_parent()
    if _store is None:
        _store = next(dist.rendezvous("env://", timeout=patience()))[0]
        _store.set(f"here {os.environ['RANK']}", "")
    if device is None:
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"device: {local + 1} processes or more on a machine of {count} GPUs; start one for each GPU"
            )
        torch.cuda.set_device(local)
    # what is told, and waited for, goes over gloo: NCCL would keep the GPUs busy with it
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience())


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block only errors are printed."""
    from transformers.utils import logging as theirs

    ours = logging.getLogger("mohawk")
    level, verbosity, bars = ours.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    ours.setLevel(logging.ERROR)
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(level)
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _tell(error: UserError) -> None:
    """The first process's mistake, for the others; waits until they have heard it. Until then none of those that have
    ends either: a launcher ends all with the first that does."""
    if _store is None:
        return
    others = range(1, int(os.environ["WORLD_SIZE"]))
    try:
        _store.set("error", str(error))
        if _all_set([f"here {rank}" for rank in others], ARRIVING):
            _all_set([f"heard {rank}" for rank in others], HEARING)
        _store.set("over", "")
    except dist.DistError:  # the store is gone, and who had it
        return
    time.sleep(_outliving())


def _all_set(keys: Sequence[str], limit: timedelta) -> bool:
    """Whether all the keys are set within so long. Not by `wait`, which prints what it waited for in vain."""
    assert _store is not None
    end = time.monotonic() + limit.total_seconds()
    while not _store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _outliving() -> float:
    """Seconds that the first process waits before it ends with a mistake that all have heard."""
    return LAST if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else 0.1  # of torchrun: how many machines


def _first_said(error: UserError) -> bool:
    """Whether the first process ends with the same mistake. Once it was told that all know, it is gone."""
    global _heard
    if _heard or _store is None or not (_found("here 0", ARRIVING) and _found("error", HEARING)):
        return isinstance(error, SaidElsewhere)
    _heard = _store.get("error").decode() == str(error)
    _store.set(f"heard {os.environ['RANK']}", "")
    if _heard and _found("over", ARRIVING + HEARING) and os.environ.get("GROUP_RANK", "0") == "0":
        time.sleep(_outliving() + 0.4)  # the first, which is on this machine, is to speak before it is ended
    return _heard


def _found(key: str, limit: timedelta) -> bool:
    """Whether a key is set in the store, now or within so long."""
    assert _store is not None
    try:
        _store.wait([key], limit)
    except dist.DistError:  # not in time, or the first process is gone
        return False
    return True


def on_first(work: Callable[[], T]) -> T | None:
    """Rank 0 does `work` while the others wait; gives what it gives there, None elsewhere. Errors end all."""
    return _on_first(work, shared=False)


def from_first(work: Callable[[], T]) -> T:
    """What rank 0's `work` gives, on every rank (pickled); it is done there alone. Errors end all."""
    return _on_first(work, shared=True)


def first_before_others(work: Callable[[], T]) -> T:
    """All do `work`, rank 0 before the others, which then find in caches what it wrote."""
    done = on_first(work)
    return cast(T, done) if is_first() else work()


def _on_first(work: Callable[[], Any], shared: bool) -> Any:
    if not several():
        return work()
    global _works
    _works += 1
    done = f"done {_works}"
    if not is_first():
        _await_first(done)
        kind, value = agree(None)
        if kind == "mistake":
            raise SaidElsewhere(value)
        if kind == "error":
            raise SystemExit(value)
        return value
    try:
        with _beating():
            value = work()
    except UserError as error:
        _done(done)
        agree(("mistake", str(error)))
        raise
    except BaseException as error:  # a bug, or a signal: nobody is to wait for what will not come
        _done(done)
        agree(("error", 130 if isinstance(error, KeyboardInterrupt) else 1))
        raise
    _done(done)
    agree(("done", value if shared else None))
    return value


def _done(key: str) -> None:
    if _store is not None:
        _store.set(key, "")


@contextmanager
def _beating() -> Iterator[None]:
    """While the first process works for all, it shows that it is alive: the work may take hours."""
    if _store is None:
        yield
        return
    # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
    own, over = _store.clone(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            own.add("beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _await_first(key: str) -> None:
    """Until the first process has left word under `key`; a UserError when it shows no sign of life for too long."""
    global _store
    if _store is None:
        return
    store, over, heard, failed = _store, threading.Event(), [time.monotonic()], []

    def listen() -> None:
        beats, pause = None, 0.01
        try:
            # pyrefly: ignore[missing-attribute]  # torch's stubs lack it
            own = store.clone()
            while not own.check([key]):
                if (now := own.add("beats", 0)) != beats:
                    beats, heard[0] = now, time.monotonic()
                time.sleep(pause := min(1.5 * pause, 0.5))
        except dist.DistError as error:  # the first process is gone
            failed.append(error)
        over.set()

    # in a thread of its own: where process 0 keeps the store itself, a question to it may never return
    threading.Thread(target=listen, daemon=True).start()
    limit = patience().total_seconds()
    while not over.wait(1.0):
        if time.monotonic() - heard[0] > limit:
            _store = None  # no more questions, which the same silence might answer
            raise UserError(
                f"process 0 has shown no sign of life for {limit / 60:g} minutes ({PATIENCE}); see what it does, then "
                "run the same command again"
            )
    if failed:
        raise failed[0]


def several() -> bool:
    """Whether this is one of several processes of one run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if several() else 1


def rank() -> int:
    """Which process of this run this is, from 0."""
    return dist.get_rank() if several() else 0


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


def from_all(value: T) -> list[T]:
    """What every process gives, in the order of their ranks; all of them must ask."""
    if not several():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class _FailedElsewhere(OSError):
    """What another process could not do, and says."""


def together(work: Callable[[], T]) -> T:
    """All do `work`, which may be another thing on each; where it ends with an OSError on one, or with what means one
    (`mohawk.errors.as_os_error`), it does on all."""
    done, failed = None, None
    try:
        done = work()
    except Exception as error:
        failed = error if isinstance(error, OSError) else as_os_error(error)
        if failed is None:
            raise
    said = None if failed is None else (failed.errno, failed.strerror or str(failed), failed.filename)
    said = next((one for one in from_all(said) if one is not None), None)
    if said is not None:
        number, text, name = said
        raise failed or (_FailedElsewhere(text) if number is None else _FailedElsewhere(number, text, name))
    return cast(T, done)


def hashed_together(folder: Path) -> dict[str, str]:
    """sha256, hex, of every file in a folder, by its path there; several processes hash some each. Raises OSError."""
    paths = agree(sorted(path for path in folder.rglob("*") if path.is_file()) if is_first() else None)
    own = together(
        lambda: {str(path.relative_to(folder).as_posix()): hashed(path) for path in paths[rank() :: count()]}
    )
    return {name: digest for part in from_all(own) for name, digest in part.items()}

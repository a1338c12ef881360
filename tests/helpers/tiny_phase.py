"""A phase small enough to run hundreds of times in the training engine's tests: no Hugging Face model."""

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types

import pytest
import torch
from torch import nn
from tqdm import tqdm

from mohawk.training.objective import Objective
from mohawk.training.trainer import PhaseTrainer

LENGTH = 12


class TinyObjective(Objective):
    """Three small students; each is to give what its frozen linear teacher gives for the same input."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.teacher = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).requires_grad_(False)
        self.embed = nn.Embedding(50, 8).requires_grad_(False)

    def losses(self, input_ids, labels):
        hidden = self.embed(input_ids)[:, :-1]
        real = (labels[:, 1:] != -100).unsqueeze(-1)
        for i, (student, teacher) in enumerate(zip(self.student, self.teacher, strict=True)):
            target = teacher(hidden)
            error = ((student(hidden) - target) * real).square().sum() / real.sum()
            yield f"layer_{i}", error / len(self.student)
            hidden = target

    def parameter_groups(self, learning_rate, weight_decay):
        matrices = [p for p in self.student.parameters() if p.dim() > 1]
        vectors = [p for p in self.student.parameters() if p.dim() == 1]
        return [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        ]


class Rows:
    """30 rows of ids, each with its own share of real labels; counts how often it was read."""

    def __init__(self, padding: bool = True):
        generator = torch.Generator().manual_seed(1)
        self.rows = []
        for i in range(30):
            ids = torch.randint(0, 50, (LENGTH,), generator=generator)
            labels = ids.clone()
            if padding:
                labels[LENGTH - i % 9 :] = -100
            self.rows.append({"input_ids": ids, "labels": labels})
        self.reads = 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        return self.rows[index]


def collate(examples):
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def tiny_phase(steps: int = 20, **settings):
    """A phase's recipe of `steps` steps."""
    phase = dict(
        batch_size=4,
        sequence_length=LENGTH,
        gradient_accumulation=1,
        learning_rate=1e-2,
        betas=[0.9, 0.95],
        weight_decay=0.1,
        max_grad_norm=1.0,
        warmup=0.1,
        decay=0.2,
        save_every=1000,
        log_every=1,
    )
    phase.update(settings)
    per_step = phase["batch_size"] * phase["sequence_length"] * phase["gradient_accumulation"]
    phase.setdefault("tokens", per_step * steps)
    return types.SimpleNamespace(**phase)


def tiny_trainer(run_dir, objective=None, phase=None, rows=None, **settings) -> PhaseTrainer:
    settings = {"precision": "float32", "device": "cpu", "seed": 0, "name": "mixing", **settings}
    settings.setdefault("section", f"phases.{settings['name']}")
    return PhaseTrainer(
        objective or TinyObjective(),
        phase=phase or tiny_phase(),
        run_dir=run_dir,
        train_dataset=Rows() if rows is None else rows,
        collate=collate,
        **settings,
    )


@pytest.fixture
def cheap_training():
    """One thread, and a short way for Trainer's gc.collect(): it walks all that transformers imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def weights(objective) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in objective.student.parameters()])


def fork(body) -> int:
    """Run `body()` in a child forked from this process, which has torch imported; returns the child's pid.

    The child exits with 0, or with what the body returned, or with 70 and a traceback on stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        gc.freeze()  # what collecting the parent's objects would wait for, threads say, did not come along
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # OpenMP's threads did not come along,
        os.environ["OMP_NUM_THREADS"] = "1"  # and accelerate would ask for several again
        tqdm.set_lock(threading.RLock())  # tqdm's own thread may have held it, and it did not come along either
        # What accelerate knows of processes is of the parent.
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        code = body() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout: float = 150.0) -> int:
    """The exit code of a child, -N if signal N ended it. timeout: seconds, of a machine that has other work too: a
    process of several that is ended here makes the others say that one has ended."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGABRT)  # faulthandler, which pytest enables, then says where it was
            time.sleep(1.0)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"child {pid} was still running after {timeout} s")
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

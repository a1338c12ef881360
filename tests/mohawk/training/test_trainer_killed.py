"""A phase killed at any moment and started again ends with the weights of one that was not, bit for bit."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter

import pytest
import torch

from mohawk.core.folders import Interrupted, is_complete, why_incomplete
from mohawk.errors import UserError
from tests.helpers.tiny_phase import (
    TinyObjective,
    cheap_training,  # noqa: F401
    fork,
    tiny_phase,
    tiny_trainer,
    wait,
    weights,
)

pytestmark = pytest.mark.usefixtures("cheap_training")

STEPS = 8
INTERRUPTED = 3


def start(run_dir, *, save_every=1, die_at=None, precision="float32", pause=0.0, count_to=None):
    """Fork a child that runs or resumes the phase; it dies at the `die_at`-th time that it touches a file."""
    seen = []

    def watch(event, args):
        # Every way in which Python touches files; the run's own only.
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            path = os.fspath(args[0]) if not isinstance(args[0], int) else ""
            if str(run_dir) in str(path):
                seen.append(event)
                if len(seen) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    class Paused(TinyObjective):
        def losses(self, **batch):
            time.sleep(pause)
            yield from super().losses(**batch)

    def body():
        sys.addaudithook(watch)
        objective = Paused()
        phase = tiny_phase(STEPS, save_every=save_every, gradient_accumulation=2)
        try:
            tiny_trainer(run_dir, objective, phase, precision=precision).train_phase()
        except Interrupted as stopped:
            if not is_complete(stopped.path):
                raise AssertionError(f"{stopped.path}: {why_incomplete(stopped.path)}") from stopped
            return INTERRUPTED
        torch.save(weights(objective), run_dir.with_suffix(".pt"))
        if count_to:
            count_to.write_text(str(len(seen)))

    return fork(body)


def result(run_dir):
    return torch.load(run_dir.with_suffix(".pt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a run that nothing interrupts, and how often it touched files."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert wait(start(folder / "run", count_to=folder / "touches")) == 0
    return result(folder / "run"), int((folder / "touches").read_text())


def check(run_dir, expected):
    assert torch.equal(result(run_dir), expected)
    assert not (expected == weights(TinyObjective())).all()
    steps = Counter(json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    assert steps == Counter(range(1, STEPS + 1))
    left = sorted(path.name for path in (run_dir / "phases" / "mixing").iterdir())
    assert left == [".lock", f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_at_random(tmp_path, uninterrupted, seed, precision):
    expected, _ = uninterrupted
    if precision == "bfloat16":
        assert wait(start(tmp_path / "uninterrupted", precision=precision)) == 0
        expected = result(tmp_path / "uninterrupted")
    draw, run, killed = random.Random(seed), tmp_path / "run", Counter()
    for _ in range(200):
        pid = start(run, precision=precision, pause=0.02)
        time.sleep(draw.uniform(0.0, 0.3))  # a whole run takes longer
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it had finished
        code = wait(pid)
        killed[code] += 1
        if code == 0:
            break
        # 70: a SIGINT before the handlers stood is a KeyboardInterrupt, as in any program.
        assert code in (INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM, 70)
    assert code == 0 and sum(killed.values()) > 1, killed
    check(run, expected)


@pytest.mark.parametrize("part", range(3))
def test_killed_at_every_stage_of_a_save(tmp_path, uninterrupted, part):
    """Die while writing, hashing, renaming or deleting: one run and resumption for each such moment.

    All saves but the first touch the same files; moments are taken from the third.
    """
    expected, touches = uninterrupted
    save = touches // STEPS
    for at in range(2 * save + part * 2, 3 * save + part * 2, 6):
        run = tmp_path / str(at)
        assert wait(start(run, die_at=at)) == -signal.SIGKILL
        assert wait(start(run)) == 0
        check(run, expected)


def test_interrupted_between_saves_resumes_at_that_step(tmp_path, uninterrupted):
    expected, _ = uninterrupted
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    pid = start(run, save_every=1000, pause=0.05)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == INTERRUPTED
    (checkpoint,) = (run / "phases" / "mixing").glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.split("-")[1]) < STEPS
    assert wait(start(run)) == 0
    check(run, expected)


FILES = ("trainable.safetensors", "optimizer.pt", "rng_state.pth", "phase_state.json")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_newest_checkpoint_costs_only_itself(tmp_path, uninterrupted, damage):
    expected, _ = uninterrupted
    phase = tiny_phase(STEPS, save_every=3, gradient_accumulation=2, keep_checkpoints=2)
    tiny_trainer(tmp_path / "whole", phase=phase).train_phase()
    for name in FILES:
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        file = run / "phases" / "mixing" / f"checkpoint-{STEPS}" / name
        if damage == "flip":
            content = bytearray(file.read_bytes())
            content[-len(content) // 3] ^= 0x10
            file.write_bytes(content)
        elif damage == "truncate":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()
        again = TinyObjective()
        tiny_trainer(run, again, phase).train_phase()
        assert torch.equal(weights(again), expected) and is_complete(file.parent)


def test_second_run_of_the_same_command_is_refused(tmp_path):
    run = tmp_path / "run"
    pid = start(run, pause=0.1)
    wait_for((run / "metrics.jsonl").exists)
    with pytest.raises(UserError, match="another process is at work here"):
        tiny_trainer(run, phase=tiny_phase(STEPS)).train_phase()
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    tiny_trainer(run, phase=tiny_phase(STEPS)).train_phase()


def wait_for(condition, timeout=30.0):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.002)

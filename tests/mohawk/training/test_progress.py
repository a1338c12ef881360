import fcntl
import io
import json
import logging
import math
import os
import pty
import re
import select
import struct
import termios

import pytest

from mohawk.core.terminal import log_to_stderr
from mohawk.training import progress
from mohawk.training.progress import Metrics, Progress, Window, drop_after, log_to, record_text
from tests.helpers.tiny_phase import cheap_training, tiny_phase, tiny_trainer  # noqa: F401


def play(bar, steps, *, first=0, total=None, record=None, clock=None, seconds=0.0):
    """Call it as a phase does for steps first+1..steps."""
    bar.start(first, total or steps)
    for step in range(first + 1, steps + 1):
        bar.show(step - 1)
        if clock:
            clock[0] += seconds
        logs = {"phase": "hidden", "step": step, "loss": 1 / step, "tokens_per_s": 1234.5, "skipped_steps": 0}
        bar.log(logs | (record or {}))
    bar.show(steps, last=True)
    bar.close()


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_every_fifteen_seconds(clock):
    out = io.StringIO()
    play(Progress("hidden", out), 1000, total=10_000, clock=clock, seconds=0.1)
    lines = out.getvalue().splitlines()
    assert len(lines) == 7  # 100 s, and one at the end
    assert lines[0] == "hidden  step 150/10000 (2 %)  loss 0.006667, 1,234 tokens/s, 16:25 left"


def test_plain_lines_every_twentieth(clock):
    out = io.StringIO()
    play(Progress("hidden", out), 100, clock=clock, seconds=1.0)
    steps = [int(step) for step in re.findall(r"step (\d+)/100 ", out.getvalue())]
    assert steps == list(range(5, 101, 5))
    assert out.getvalue().endswith("step 100/100 (100 %)  loss 0.01, 1,234 tokens/s, 00:00 left\n")


def test_slow_steps_have_a_line_each(clock):
    out = io.StringIO()
    play(Progress("hidden", out), 4, total=1000, clock=clock, seconds=20.0)
    assert [int(step) for step in re.findall(r"step (\d+)/", out.getvalue())] == [1, 2, 3, 4]


def test_fast_phase_says_little():
    out = io.StringIO()
    play(Progress("hidden", out), 1000)
    assert out.getvalue().count("\n") == 1


def test_time_left_after_resuming_counts_only_this_run(clock):
    out = io.StringIO()
    play(Progress("hidden", out), 110, first=100, total=200, clock=clock, seconds=10.0)
    assert "step 110/200 (55 %)" in out.getvalue().splitlines()[-1]
    assert out.getvalue().splitlines()[-1].endswith("15:00 left")


def test_terminal_has_one_bar():
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with os.fdopen(inner, "w") as terminal:
        bar = Progress("end_to_end", terminal)
        play(bar, 30, first=10, total=30, record={"skipped_steps": 2})
        written = ""
        while select.select([outer], [], [], 0.05)[0]:
            written += os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert written.count("\n") == 1 and bar.bar is None
    last = written.rstrip().split("\r")[-1]
    assert "end_to_end 100%|" in last and "30/30 [00:0" in last
    assert "loss 0.03333, 1,234 tokens/s, 2 skipped]" in last and "left" in last


def test_other_processes_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "is_first", lambda: False)
    out, metrics = io.StringIO(), Metrics(tmp_path, "hidden")
    play(Progress("hidden", out), 1)
    metrics.start(0)
    metrics.log({"phase": "hidden", "step": 1})
    assert out.getvalue() == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "record, text",
    [
        ({"loss": 2.3184, "tokens_per_s": 434.4, "skipped_steps": 0}, "loss 2.318, 434 tokens/s"),
        ({"loss": 1.0, "tokens_per_s": 12345.0, "skipped_steps": 3}, "loss 1, 12,345 tokens/s, 3 skipped"),
        ({"loss": float("nan"), "tokens_per_s": 1.0}, "loss nan, 1 tokens/s"),
        ({}, ""),
    ],
)
def test_describe(record, text):
    assert record_text(record) == text


def test_values_that_are_not_finite_are_null(tmp_path):
    record = {
        "phase": "a",
        "step": 1,
        "loss": math.nan,
        "grad_norm": math.inf,
        "parts": {"x": -math.inf, "y": 1.0},
    }
    Metrics(tmp_path, "a").log(record)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "phase": "a",
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "parts": {"x": None, "y": 1.0},
    }


def test_lines_beyond_the_restored_step_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"phase": "mixing", "step": step} for step in range(1, 6)]
    lines += [{"phase": "hidden", "step": step} for step in range(1, 6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "hidden", "st')
    drop_after(file, "hidden", 3)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == lines[:8]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    before = file.stat().st_ino
    drop_after(file, "hidden", 3)
    assert file.stat().st_ino == before  # nothing to drop, nothing rewritten
    drop_after(file, "hidden", 0)
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines[:5]
    drop_after(tmp_path / "none.jsonl", "hidden", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_window_means_leave_skipped_steps_out():
    window = Window()
    window.add(1, {"a": 1.0, "b": 2.0}, 0.5, skipped=False)
    window.add(2, {"a": math.nan, "b": 2.0}, math.nan, skipped=True)
    window.add(3, {"a": 3.0, "b": 4.0}, 0.7, skipped=False)
    record = window.drain(tokens_per_step=100)
    assert record["loss"] == 5.0 and record["parts"] == {"a": 2.0, "b": 3.0}
    assert record["grad_norm"] == 0.7 and record["skipped_at"] == [2]
    window.add(4, {"a": math.nan}, math.nan, skipped=True)
    record = window.drain(tokens_per_step=100)
    assert math.isnan(record["loss"]) and record["skipped_at"] == [4]


def test_log_file_has_what_happened(tmp_path, cheap_training):  # noqa: F811
    package = logging.getLogger("mohawk")
    level, handlers = package.level, list(package.handlers)
    with log_to(tmp_path):
        tiny_trainer(tmp_path, phase=tiny_phase(steps=4, save_every=2)).train_phase()
    assert (package.level, package.handlers) == (level, handlers)
    text = (tmp_path / "log.txt").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO mixing: from the beginning, 4 steps of 48 tokens", text)
    assert "mixing: saved" in text and "checkpoint-2" in text and "mixing: done after 4 steps" in text


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log_to_stderr()
    log, done = logging.getLogger("mohawk.training"), []
    with log_to(tmp_path):
        for i in range(3):
            log.info("step %d", i)
            done.append(i)
    said = capsys.readouterr().err
    assert said == f"{tmp_path}/log.txt cannot be written (No space left on device): lines of it are missing\n"
    assert done == [0, 1, 2]


def test_bar_is_closed_when_the_phase_fails(tmp_path, cheap_training):  # noqa: F811
    trainer = tiny_trainer(tmp_path)
    trainer.objective.losses = lambda **batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train_phase()
    assert trainer.progress.bar is None

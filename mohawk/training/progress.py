"""What a phase says while it runs: one bar, metrics.jsonl, log.txt."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback

from mohawk.core.lines import append_line
from mohawk.core.processes import is_first
from mohawk.core.run_folder import LOG, METRICS
from mohawk.training.metrics import drop_after

# Without a terminal (a CI log, a file): a plain line this often, in seconds or in shares of the phase.
PLAIN_SECONDS = 15.0
PLAIN_SHARE = 0.05


class Progress(TrainerCallback):
    """One bar for the phase `name` on `stream` (stderr), or plain lines where that is not a terminal."""

    def __init__(self, name: str, stream: TextIO | None = None):
        self.name = name
        self.stream = stream
        self.bar = None
        self.record: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        stream = self.stream or sys.stderr
        self.plain = not stream.isatty()
        self.out = stream
        self.started = self.said_at = time.monotonic()
        self.first_step = self.said_step = state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            file=stream,
            dynamic_ncols=True,
            disable=self.plain,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs:
            self.record = logs
            self.bar.set_postfix_str(describe(logs), refresh=False)

    # A step is logged after it ended, so it is shown when the next one begins: with its own loss.
    def on_step_begin(self, args, state, control, **kwargs):
        self._show(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._show(state, last=True)
        self.close()

    def close(self) -> None:
        """Leave the bar where it is; safe to call twice and when training never began."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _show(self, state, last: bool = False) -> None:
        if self.bar is not None and not self.plain:
            self.bar.update(state.global_step - self.bar.n)
        if self.bar is None or not self.plain or state.global_step <= self.said_step:
            return
        now = time.monotonic()
        due = now - self.said_at >= PLAIN_SECONDS or (
            # A fast phase passes many twentieths a second; nobody reads more than one line a second.
            state.global_step - self.said_step >= PLAIN_SHARE * state.max_steps and now - self.said_at >= 1.0
        )
        if not (due or last):
            return
        done = state.global_step - self.first_step
        left = (now - self.started) / done * (state.max_steps - state.global_step)
        self.said_at, self.said_step = now, state.global_step
        print(
            f"{self.name}  step {state.global_step}/{state.max_steps}"
            f" ({100 * state.global_step / state.max_steps:.0f} %)  {describe(self.record)},"
            f" {tqdm.format_interval(left)} left",
            file=self.out,
            flush=True,
        )


class Metrics(TrainerCallback):
    """Append every logged record of the phase `name` to `run_dir`/metrics.jsonl, from rank 0."""

    def __init__(self, run_dir: str | os.PathLike, name: str):
        self.path = Path(run_dir) / METRICS
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            drop_after(self.path, self.name, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append_line(self.path, json.dumps(_finite(logs), allow_nan=False))


class Window:
    """The steps since the last logged record: means of their losses, speed, the last gradient norm."""

    def __init__(self):
        self.steps: list[tuple[int, dict[str, float], bool]] = []
        self.grad_norm = 0.0
        self.start()

    def start(self) -> None:
        self.since = time.monotonic()

    def add(self, step: int, parts: dict[str, float], grad_norm: float, skipped: bool) -> None:
        self.steps.append((step, parts, skipped))
        self.grad_norm = grad_norm

    def drain(self, tokens_per_step: int) -> dict[str, Any]:
        """The record's part that is measured, over the steps that trained; over all, if none did."""
        now = time.monotonic()
        taken = [parts for _, parts, skipped in self.steps if not skipped]
        taken = taken or [parts for _, parts, _ in self.steps]
        means = {name: sum(p.get(name, 0.0) for p in taken) / len(taken) for p in taken for name in p}
        record: dict[str, Any] = {
            "loss": sum(means.values()),
            "grad_norm": self.grad_norm,
            "tokens_per_s": round(tokens_per_step * len(self.steps) / max(now - self.since, 1e-9), 1),
            "parts": means,
        }
        if skipped_at := [step for step, _, skipped in self.steps if skipped]:
            record["skipped_at"] = skipped_at
        self.steps, self.since = [], now
        return record


def describe(record: dict[str, Any]) -> str:
    """`loss 2.318, 434 tokens/s` and, when there were any, the skipped steps."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4g}")
    measured = record.get("measured") or {}
    parts += [f"{name} {measured[name]:.3g}" for name in ("kd", "ce") if name in measured]
    if "agreement" in measured:
        parts.append(f"{measured['agreement']:.0%} agree")
    if record.get("tokens_per_s") is not None:
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    if record.get("skipped_steps"):
        parts.append(f"{record['skipped_steps']} skipped")
    return ", ".join(parts)


@contextmanager
def log_to(run_dir: str | os.PathLike) -> Iterator[None]:
    """Within the block, what the package logs at INFO and above is appended to `run_dir`/log.txt, by rank 0."""
    if not is_first():
        yield
        return
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run_dir / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.setLevel(logging.INFO)
    package = logging.getLogger("mohawk")
    level = package.level
    package.addHandler(handler)
    if not package.isEnabledFor(logging.INFO):
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

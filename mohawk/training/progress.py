"""What a phase says while it runs: one bar, metrics.jsonl, log.txt."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mohawk.core.lines import append_line
from mohawk.core.processes import is_first
from mohawk.core.run_folder import LOG, METRICS_FILE
from mohawk.core.terminal import FORMAT, PLAIN_SECONDS, say
from mohawk.training.metrics import drop_after

# Without a terminal (a CI log, a file) a line comes after this share of the phase too, if that is sooner.
PLAIN_SHARE = 0.05


class Progress:
    """One bar for the phase `name` on `stream` (stderr), or plain lines where that is not a terminal.

    The first process alone shows it.
    """

    def __init__(self, name: str, stream: TextIO | None = None):
        self.name = name
        self.stream = stream
        self.bar: tqdm | None = None
        self.record: Mapping[str, Any] = {}

    def start(self, step: int, steps: int) -> None:
        """Begin to show progress: `step` of `steps` steps are taken."""
        if not is_first():
            return
        self.out = self.stream or sys.stderr
        self.plain = not self.out.isatty()
        self.started = self.said_at = time.monotonic()
        self.steps, self.first_step, self.said_step = steps, step, step
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc=self.name,
            unit="step",
            file=self.out,
            dynamic_ncols=True,
            disable=self.plain,
            bar_format=FORMAT,
        )

    def log(self, record: Mapping[str, Any]) -> None:
        if self.bar is not None:
            self.record = record
            self.bar.set_postfix_str(record_text(record), refresh=False)

    def show(self, step: int, last: bool = False) -> None:
        """Show that `step` steps are taken; called once the last of them was logged, so that its own loss is shown."""
        if self.bar is not None and not self.plain:
            self.bar.update(step - self.bar.n)
        if self.bar is None or not self.plain or step <= self.said_step:
            return
        now = time.monotonic()
        due = now - self.said_at >= PLAIN_SECONDS or (
            # A fast phase passes many twentieths a second; nobody reads more than one line a second.
            step - self.said_step >= PLAIN_SHARE * self.steps and now - self.said_at >= 1.0
        )
        if not (due or last):
            return
        left = (now - self.started) / (step - self.first_step) * (self.steps - step)
        self.said_at, self.said_step = now, step
        say(
            f"{self.name}  step {step}/{self.steps} ({100 * step / self.steps:.0f} %)  {record_text(self.record)},"
            f" {tqdm.format_interval(left)} left",
            self.out,
        )

    def close(self) -> None:
        """Leave the bar where it is; safe to call twice and when training never began."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Metrics:
    """The records of the phase `name` in `run_dir`/metrics.jsonl, which the first process writes."""

    def __init__(self, run_dir: str | os.PathLike, name: str):
        self.path = Path(run_dir) / METRICS_FILE
        self.name = name

    def start(self, step: int) -> None:
        """Forget what was logged beyond the step that training goes on from."""
        if is_first():
            drop_after(self.path, self.name, step)

    def log(self, record: Mapping[str, Any]) -> None:
        if is_first():
            append_line(self.path, json.dumps(_finite(record), allow_nan=False))


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

    def drain(self, tokens_per_step: int, now: float | None = None) -> dict[str, Any]:
        """The record's part that is measured, over the steps that trained; over all, if none did.

        now: when the last of them ended, by time.monotonic().
        """
        now = time.monotonic() if now is None else now
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


def record_text(record: Mapping[str, Any]) -> str:
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
    handler = _LogFile(run_dir / LOG, encoding="utf-8")
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
        with suppress(OSError):
            handler.close()


class _LogFile(logging.FileHandler):
    """Where it cannot be written, that is said once and the run goes on: nothing depends on it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, MemoryError)):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            reason = getattr(error, "strerror", None) or type(error).__name__
            logging.getLogger(__name__).warning(
                "%s cannot be written (%s): lines of it are missing", self.baseFilename, reason
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Which of several teachers' rationales a student should read: a bandit on what they do for its validation loss.

RationaleRouter(teachers)                      the bandit: choose(), update(teacher, gain)
RoutedRationales(datasets, router, ...)        while training: the next steps read the chosen teacher's rows
measure_gains(student, tokenizer, records, ..) before training: short trials, all from the same student
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.core import folders
from mohawk.core.json_files import parse_json
from mohawk.core.processes import several
from mohawk.core.terminal import SHOWN
from mohawk.data.packing import collate
from mohawk.data.source_files import check_written
from mohawk.errors import UserError
from mohawk.losses.rationales import RationaleDistiller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

log = logging.getLogger(__name__)

ALGORITHMS = ("ucb1", "exp3")


class RationaleRouter:
    """A multi-armed bandit: the arms are teachers, a round trains on one's rationales, its reward is the gain.

    Args:
        teachers: names, at least one, each once.
        algorithm: ucb1 (Auer, Cesa-Bianchi, Fischer 2002, Finite-time analysis of the multiarmed bandit problem): each
            arm once, then the one with the largest mean + sqrt(2 ln t / n). exp3 (Auer, Cesa-Bianchi, Freund, Schapire
            2002, The nonstochastic multiarmed bandit problem): drawn with p = (1 - gamma) w / sum w + gamma / K, where
            w is multiplied by exp(gamma r / (K p)); it does not take gains to stay as they are, which they don't while
            a student learns.
        gamma: of exp3, above 0, up to 1.
        seed: of exp3's draws.

    Both want rewards from 0 to 1. Gains have no such scale, so they are put between the smallest and the largest gain
    seen so far; 1/2 while there is no difference.

    Raises:
        UserError: no teacher, one twice, or a setting out of its range.
    """

    def __init__(self, teachers: Sequence[str], *, algorithm: str = "ucb1", gamma: float = 0.1, seed: int = 0):
        self.teachers = list(teachers)
        if not self.teachers or len(set(self.teachers)) < len(self.teachers):
            raise UserError(f"router: got teachers {self.teachers}; needs at least one, and each once")
        if algorithm not in ALGORITHMS:
            raise UserError(f"router.algorithm: got {algorithm!r}; allowed: {', '.join(ALGORITHMS)}")
        if not 0 < gamma <= 1:
            raise UserError(f"router.gamma: got {gamma}; allowed: above 0, up to 1")
        self.algorithm, self.gamma, self.seed = algorithm, gamma, seed
        self.history: list[tuple[str, float]] = []  # (teacher, gain) of each round
        self._log_weights = dict.fromkeys(self.teachers, 0.0)

    def choose(self) -> str:
        """The teacher of the next round: the same until `update`, and in every process with the same history."""
        if self.algorithm == "exp3":
            weights = list(self.probabilities().values())
            return random.Random(f"{self.seed} {len(self.history)}").choices(self.teachers, weights)[0]
        counts = {name: sum(teacher == name for teacher, _ in self.history) for name in self.teachers}
        if untried := [name for name in self.teachers if not counts[name]]:
            return untried[0]
        gains = self.gains()
        bonus = {name: math.sqrt(2 * math.log(len(self.history)) / counts[name]) for name in self.teachers}
        return max(self.teachers, key=lambda name: self._scaled(gains[name]) + bonus[name])

    def update(self, teacher: str, gain: float) -> None:
        """A round's outcome: how much the validation loss fell, in nats. Raises UserError for an unknown teacher.

        A gain that is not finite (training broke down) counts as the smallest seen, or 0 where there is none.
        """
        if teacher not in self.teachers:
            raise UserError(f"router: got teacher {teacher!r}; allowed: {', '.join(self.teachers)}")
        if not math.isfinite(gain):
            gain = min((gain for _, gain in self.history), default=0.0)
        p = self.probabilities()[teacher]
        self.history.append((teacher, float(gain)))
        self._log_weights[teacher] += self.gamma * self._scaled(gain) / (len(self.teachers) * p)

    def probabilities(self) -> dict[str, float]:
        """What exp3 draws each teacher with."""
        top = max(self._log_weights.values())
        weights = {name: math.exp(value - top) for name, value in self._log_weights.items()}
        total, share = sum(weights.values()), self.gamma / len(weights)
        return {name: (1 - self.gamma) * weight / total + share for name, weight in weights.items()}

    def gains(self) -> dict[str, float]:
        """The mean gain of each teacher that was tried, in nats a round."""
        tried = {name: [gain for teacher, gain in self.history if teacher == name] for name in self.teachers}
        return {name: sum(gains) / len(gains) for name, gains in tried.items() if gains}

    def state(self) -> dict[str, Any]:
        """Plain values that say everything; `load` takes them."""
        settings = {"teachers": self.teachers, "algorithm": self.algorithm, "gamma": self.gamma, "seed": self.seed}
        return {**settings, "history": [list(entry) for entry in self.history], "gains": self.gains()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises UserError where it is of another router."""
        now = self.state()
        if changed := [key for key in ("teachers", "algorithm", "gamma", "seed") if state.get(key) != now[key]]:
            differences = "; ".join(f"{key}: {state.get(key)!r} then, {now[key]!r} now" for key in changed)
            raise UserError(f"router: the state is of another one ({differences})")
        self.history, self._log_weights = [], dict.fromkeys(self.teachers, 0.0)
        for teacher, gain in state["history"]:
            self.update(teacher, gain)

    def _scaled(self, gain: float) -> float:
        low, high = min(gain for _, gain in self.history), max(gain for _, gain in self.history)
        return (gain - low) / (high - low) if high > low else 0.5


class RoutedRationales:
    """While a student trains: `batch = routed(batch, step)` gives the rows of the teacher that the router chose.

    Args:
        datasets: of each teacher's rationales, by name, with the same columns and row lengths.
        router: over these names.
        validate: gives the student's validation loss, the same on every process.
        every: steps of a round; `end_step(step)`, called after each step, counted from 0, ends it.
        seed: of the rows' order: each step draws anew, the same after a resume, others on each process.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        router: RationaleRouter,
        *,
        validate: Callable[[], float],
        every: int,
        seed: int = 0,
    ):
        if every < 1:
            raise UserError(f"router.every: got {every}; allowed: 1 or more steps")
        if set(datasets) != set(router.teachers):
            raise UserError(f"router: has {', '.join(router.teachers)}, the datasets are of {', '.join(datasets)}")
        self.datasets, self.router, self.validate = dict(datasets), router, validate
        self.every, self.seed = every, seed
        self.before: float | None = None  # the validation loss when the round began
        self._step, self._micro_batch = -1, 0

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Rows of the round's teacher, as many as the batch has."""
        if self.before is None:
            self.before = self.validate()
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        dataset = self.datasets[self.router.choose()]
        rank = dist.get_rank() if several() else 0
        draw = np.random.default_rng([self.seed, step, self._micro_batch, rank])
        like = batch["input_ids"]
        rows = collate([dataset[int(i)] for i in draw.integers(len(dataset), size=len(like))])
        return {name: tensor.to(like.device) for name, tensor in rows.items()}

    def end_step(self, step: int) -> None:
        """After the step: at the end of a round the router hears of the gain."""
        if (step + 1) % self.every or self.before is None:
            return
        teacher, after = self.router.choose(), self.validate()
        self.router.update(teacher, self.before - after)
        log.info(
            "step %d: %s took the validation loss from %.4f to %.4f", step + 1, teacher, self.before, after, extra=SHOWN
        )
        self.before = after

    def state(self) -> dict[str, Any]:
        return {"router": self.router.state(), "before": self.before}

    def load(self, state: Mapping[str, Any]) -> None:
        self.router.load(state["router"])
        self.before = state["before"]


def measure_gains(
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    validation: Sequence[Mapping[str, Any]],
    router: RationaleRouter,
    *,
    rounds: int,
    steps: int = 20,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    rationale_weight: float = 1.0,
    seed: int = 0,
    keep: str | Path | None = None,
) -> RationaleRouter:
    """Rounds of short training on the chosen teacher's records, each from the same student; the router hears the gains.

    Starting over makes a teacher's rounds comparable, as ucb1 has it. A round takes `steps` steps of AdamW on
    `batch_size` of the teacher's records, at random; its gain is by how much the label loss on `validation` fell, nats
    per token. The student is left as it was.

    Args:
        records: of each of the router's teachers, {prompt, label, rationale} as `read_rationales` gives them.
        validation: {prompt, label}, which no round trains on.
        keep: a JSON file that has the router's state after each round, and that a stopped measurement goes on from.

    Raises:
        UserError: a teacher without records, or `keep` is of another measurement.
    """
    if missing := [name for name in router.teachers if not records.get(name)]:
        raise UserError(f"router: no rationales of {', '.join(missing)}")
    if not validation:
        raise UserError("router: the validation data are empty; give prompts with their labels")
    distiller = RationaleDistiller(student, tokenizer, rationale_weight=rationale_weight)
    data = json.dumps([[r["prompt"], r["label"], r.get("rationale")] for r in (*chain(*records.values()), *validation)])
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    settings |= {"rationale_weight": rationale_weight, "data_sha256": hashlib.sha256(data.encode()).hexdigest()}
    if keep is not None and Path(keep).exists():
        router.load(read_gains(keep, settings))
        log.info("%s: going on after %d of %d rounds", keep, len(router.history), rounds, extra=SHOWN)
    start = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    training = [module for module in student.modules() if module.training]
    before = label_loss(distiller, validation, batch_size)
    for turn in range(len(router.history), rounds):
        teacher = router.choose()
        _train(distiller, records[teacher], steps, batch_size, learning_rate, f"{seed} {turn}")
        after = label_loss(distiller, validation, batch_size)
        student.load_state_dict(start)
        router.update(teacher, before - after)
        log.info(
            "round %d of %d: %s, validation loss %.4f to %.4f", turn + 1, rounds, teacher, before, after, extra=SHOWN
        )
        if keep is not None:
            save_text(Path(keep), json.dumps({**router.state(), "settings": settings}, indent=1) + "\n")
    for module in training:
        module.training = True
    return router


def _train(
    distiller: RationaleDistiller,
    records: Sequence[Mapping[str, Any]],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: str,
) -> None:
    """Some steps of AdamW on records drawn at random, with a random state of their own."""
    student, draw = distiller.student.train(), random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=learning_rate)
    with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
        torch.manual_seed(draw.getrandbits(63))  # of dropout
        for _ in range(steps):
            chosen = draw.choices(records, k=batch_size)
            prompts, labels = ([record[key] for record in chosen] for key in ("prompt", "label"))
            distiller.compute_loss(prompts, labels, [record.get("rationale") for record in chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def label_loss(distiller: RationaleDistiller, records: Sequence[Mapping[str, Any]], batch_size: int = 8) -> float:
    """The label task's cross-entropy on records {prompt, label}, nats per token; the student is left in eval mode."""
    distiller.student.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        texts = [[record[key] for record in batch] for key in ("prompt", "label")] + [[None] * len(batch)]
        count, _ = distiller.count_tokens(*texts)
        total += distiller.compute_loss(*texts).item() * count
        tokens += count
    return total / tokens


def read_gains(path: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file of `measure_gains` holds, or one written by hand: an object whose `gains` has a number by teacher.

    settings: what it must have been measured with. Raises UserError.
    """
    check_written([Path(path)])
    try:
        state = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    gains = state.get("gains") if isinstance(state, dict) else None
    numbers = isinstance(gains, dict) and all(
        type(gain) in (int, float) and abs(gain) < 1e300 for gain in gains.values()
    )
    if not numbers or not gains and settings is None:
        raise UserError(f'{path}: needs {{"gains": {{"TEACHER": NUMBER, ...}}}}, as measuring writes it')
    if settings is not None and state.get("settings") != settings:
        raise UserError(f"{path}: was measured with other settings or data; move it away to measure anew")
    return state


def save_text(path: Path, text: str) -> None:
    """A file that has all of `text`, or is as it was; `why_altered` knows it again. Raises UserError where it cannot be
    written."""
    try:
        with folders.write_file(path) as beside:
            beside.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error

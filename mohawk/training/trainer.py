"""One phase of training: a loop over an `Objective` (objective.py).

Gradients are averaged over real tokens, over micro-batches and processes alike; a step whose loss or gradient is not
finite changes nothing (of that loss, where losses train parameters of their own); checkpoints are complete or invisible
(mohawk.core.folders); a signal saves and raises `Interrupted`; a resumed run continues bit for bit on the CPU.

After each step the processes tell each other how it went; where each has layers of its own, now and then (meetings.py).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed

from mohawk.core.collectives import means, share_parameters, sum_gradients, total
from mohawk.core.folders import Interrupted, locked, remove_partial, step_of
from mohawk.core.precision import autocast_dtype, pick_device
from mohawk.core.processes import agree, count, from_first, is_first, rank, several
from mohawk.core.run_folder import phase_folder
from mohawk.core.stopping import SAME_SIGNAL, SAME_SIGNAL_DISTRIBUTED, StopRequest
from mohawk.errors import UserError
from mohawk.models.sharding import clip, is_sharded, reshard, total_norms
from mohawk.training.batches import Batches, WithNothing, check_dealt, rows_per_step, steps_of
from mohawk.training.checkpoint import is_finished
from mohawk.training.meetings import Meetings, Taken
from mohawk.training.objective import Objective
from mohawk.training.optimizer import adamw, trainable
from mohawk.training.progress import Metrics, Progress, Window
from mohawk.training.saving import Checkpoints
from mohawk.training.schedule import learning_rate_factor
from mohawk.training.trackers import Trackers

logger = logging.getLogger(__name__)

# So many steps in a row, or in the phase, whose loss or gradient is not finite end the run with a UserError.
MAX_NONFINITE = 3
MAX_NONFINITE_TOTAL = 10

Tensors = dict[str, Any]  # tensors by name, or groups of them


class PhaseTrainer:
    """Train `objective` as the recipe's phase `phase` says; `train_phase()` runs or resumes it.

    Args:
        objective: what trains, and its losses.
        name: of the phase: `run_dir/phases/<name>/` holds its checkpoints.
        phase: `tokens`, `batch_size`, `sequence_length`, `learning_rate`, `betas`, `weight_decay`,
            `max_grad_norm`, `warmup`, `decay` (fractions of the steps), `gradient_accumulation`,
            `save_every`, `log_every` (steps); instead of tokens `epochs`, how often each example is read: the last step
            has the rows that are left; `keep_checkpoints` (the newest ones; 1) and `save_minutes` (of the clock)
            are optional. With 2 kept a damaged newest one costs the steps of one interval.
        run_dir: of the run; metrics.jsonl is appended to there.
        train_dataset: maps an index to an example; read in an order that depends on seed and name only, anew
            in each pass.
        collate: list of examples -> batch, a dict of (batch, seq) tensors; with `labels`, unshifted, whose
            real tokens are what gradients are averaged over.
        precision: `float32`, `bfloat16` (autocast), or `auto` (bfloat16 where the device is fast at it).
        device: `auto`, `cpu` or `cuda`.
        origin: what the phase's checkpoints belong to: `run`, its id, and `from`, the sum of the weights that they go
            on from. One that says otherwise is refused.
        report_to: experiment trackers of transformers' (`tensorboard`, `wandb`, ...) that get each record too.
        section: where the phase's settings stand in its recipe, for messages; default its name.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        name: str,
        phase: Any,
        run_dir: str | os.PathLike,
        train_dataset: Any,
        collate: Callable[[list], Tensors],
        precision: str = "auto",
        device: str = "auto",
        seed: int = 0,
        origin: Mapping[str, Any] | None = None,
        report_to: Sequence[str] = (),
        section: str | None = None,
    ):
        self.device = pick_device(device)
        self.autocast_dtype = autocast_dtype(precision, self.device)
        if len(train_dataset) == 0:
            raise UserError(f"{section or name}: the training data hold no example; check data.train")
        self.name = name
        self.section = section or name
        self.phase = phase
        self.folder = phase_folder(Path(run_dir), name)
        self.train_dataset, self.collate = train_dataset, collate
        self.seed = seed
        # Each phase reads the data in its own order.
        self.order_seed = (seed << 32) + zlib.crc32(name.encode())

        self.rows = rows_per_step(phase)
        stage = self.stage = objective.stage
        self.team = None if stage is None else stage.group  # of processes that add their gradients; None: all
        self.dealt = count() if stage is None else stage.replicas  # to how many a step's rows are dealt
        check_dealt(phase, name, stages=1 if stage is None else stage.stages)
        self.tokens_per_step = self.rows * phase.sequence_length
        epochs = getattr(phase, "epochs", None)
        self.in_all = None if epochs is None else epochs * len(train_dataset)  # rows of all steps
        self.steps = steps_of(phase, len(train_dataset))
        self.step = 0  # how many are taken
        self.objective = objective.to(self.device)
        reshard(objective)  # what trains are the parts
        groups = objective.parameter_groups(phase.learning_rate, phase.weight_decay)
        everything = self.trainable = trainable(objective, groups)
        names = {id(parameter): name for name, parameter in everything.items()}
        order = [names[id(parameter)] for group in groups for parameter in group["params"]]
        self.apart = objective.apart() or {"": list(everything.values())}  # what is clipped together
        self.most = (phase.max_grad_norm or math.inf) / math.sqrt(len(self.apart))
        if stage is not None:
            self.apart = {name: share for name, share in self.apart.items() if objective.has(name)}
            own = {id(parameter) for share in self.apart.values() for parameter in share}
            groups = [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]
            self.trainable = {name: p for name, p in everything.items() if id(p) in own}
        self.sharded = any(map(is_sharded, self.trainable.values()))
        self.optimizer = adamw(groups, phase)
        self._advice = f"Lower {self.section}.learning_rate (now {phase.learning_rate:g})"
        self.checkpoints = Checkpoints(
            self.folder, self.objective, self.trainable, self.optimizer,
            order=order, shapes={name: tuple(p.shape) for name, p in everything.items()}, device=self.device,
            staged=stage is not None,
            origin=dict(origin or {}), keep=getattr(phase, "keep_checkpoints", 1), told=self._told, advice=self._advice,
        )  # fmt: skip

        settings = {
            "max_steps": self.steps, "per_device_train_batch_size": phase.batch_size,
            "gradient_accumulation_steps": self._sampler().per_step, "learning_rate": phase.learning_rate,
            "weight_decay": phase.weight_decay, "max_grad_norm": phase.max_grad_norm, "seed": seed,
            "use_cpu": self.device.type == "cpu",
        }  # fmt: skip
        self.trackers = Trackers(report_to, self.folder, settings)
        self.progress = Progress(name)
        self.metrics = Metrics(run_dir, name)
        self.skipped_steps = 0
        self.nonfinite_in_a_row = 0
        self._failure: str | None = None
        same = SAME_SIGNAL_DISTRIBUTED if several() else SAME_SIGNAL
        self._request = StopRequest(same, says=is_first())
        self._stop = self._due = False  # all processes agreed to stop; to save
        self._saved_at = time.monotonic()
        self._parts: dict[str, Tensor] = {}  # of the running step, by name
        self._taken: list[Taken] = []  # steps since processes met
        self._meetings = None if stage is None else Meetings(stage)
        self._window = Window()

    # ---- The phase as a whole ----

    def train_phase(self) -> None:
        """Run the phase to its end, from its newest complete checkpoint if there is one.

        Raises:
            Interrupted: a signal (mohawk.core.stopping) came; the checkpoint is written. A second signal does what it
                does without us: stop at once.
            UserError: too many steps were not finite, weights are not, the disk is full, a checkpoint is of another
                model or run, or another process trains this phase.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.progress.close)
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
                remove_partial(self.folder)
            checkpoint = from_first(self.checkpoints.newest)
            stack.enter_context(self._request.caught())
            start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
            logger.info(
                "%s: %s, %d steps of %d tokens, %s trainable parameters, %s on %s",
                self.name,
                start,
                self.steps,
                self.tokens_per_step,
                f"{sum(map(math.prod, self.checkpoints.shapes.values())):,}",
                "bfloat16 autocast" if self.autocast_dtype else "float32",
                self.device,
            )
            set_seed(self.seed)  # whatever was drawn until now; a checkpoint brings its own state
            if checkpoint:
                self._load_checkpoint(checkpoint)
                if is_finished(checkpoint):
                    return
                self.checkpoints.load_moments(checkpoint)
            self._begin()
            if checkpoint:
                self.checkpoints.load_random_states(checkpoint)
            self._loop()
        if self._failure is not None:
            raise UserError(self._failure)
        # A signal that came after the last step stops the run too; that step's checkpoint is written.
        if self._stop or agree(self._request.number is not None):
            saved = Interrupted(self.step, self.checkpoints.path(self.step))
            logger.info("%s: %s", self.name, saved)
            raise saved
        logger.info("%s: done after %d steps", self.name, self.step)

    def _begin(self) -> None:
        self.objective.eval()  # a teacher in training mode would drop out
        self.objective.student.train()
        share_parameters(list(self.trainable.values()), self.team)
        self._saved_at = time.monotonic()
        self._window.start()
        self.progress.start(self.step, self.steps)
        self.metrics.start(self.step)
        self.trackers.start(self.objective, self.step, self.steps)

    def _loop(self) -> None:
        """All steps that are left; ends early where the objective is finished, a signal came, or nothing is finite."""
        sampler = self._sampler()
        batches = self._batches(sampler)
        while self.step < self.steps:
            meets = self._meets()
            self._take_step(batches, sampler.per_step)
            if not meets:
                continue
            self._meet()
            if self._failure is not None:
                break  # without a checkpoint: better to go on from before the trouble
            over = self._stop or self.objective.finished
            if over or self._due or self.step % self.phase.save_every == 0 or self.step == self.steps:
                self._save_checkpoint()
            if over:
                break
        self.progress.show(self.step, last=True)
        self.trackers.end()

    # ---- Data ----

    def _sampler(self) -> Batches:
        """The batches of all steps that are left; the rows of the steps before are not read."""
        return Batches(
            len(self.train_dataset), rows=self.rows, batch_size=self.phase.batch_size, steps=self.steps,
            done=self.step, seed=self.order_seed, processes=self.dealt,
            rank=rank() if self.stage is None else self.stage.replica, in_all=self.in_all,
        )  # fmt: skip

    def _batches(self, sampler: Batches) -> Iterator[Tensors]:
        loader = DataLoader(
            self.train_dataset if self.in_all is None else WithNothing(self.train_dataset),
            batch_sampler=sampler,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one when it is made
        )
        return iter(loader)

    def _micro_batches(self, batches: Iterator[Tensors], per_step: int) -> tuple[list[tuple[Tensors, float]], float]:
        """The micro-batches of one step with what each counts, and what all count over all processes."""
        read: Any = itertools.islice(batches, per_step)
        taken: list[Any] = [send_to_device(batch, self.device) for batch in read]
        with self._autocast():
            taken = [self.objective.prepare(batch, self.step) for batch in taken]
        taken = [send_to_device(batch, self.device) for batch in taken]
        counts = [float(self.objective.count(batch)) for batch in taken]
        whole = sum(counts)
        if several():
            whole = float(total(torch.tensor(whole, dtype=torch.float64, device=self.device), self.team))
        return list(zip(taken, counts, strict=True)), whole

    # ---- One step ----

    def _take_step(self, batches: Iterator[Tensors], per_step: int) -> None:
        taken, whole = self._micro_batches(batches, per_step)
        self.progress.show(self.step)  # the step before, which has been logged since
        self.objective.begin_step(self.step, self.steps)
        in_parts = any(map(is_sharded, self.objective.modules()))
        while taken:
            batch, counted = taken.pop(0)
            # The step's loss is the mean over all that it counts, not a sum of micro-batch means: each micro-batch
            # has its share of that, and the processes' gradients are summed.
            if self.objective.shares:
                share = 1.0
            else:
                share = counted / whole if whole else 1 / (per_step * self.dealt)
            if share or in_parts:  # where models are sharded all come to each layer, whatever their rows hold
                self._back_propagate(batch, share)
            elif several():
                self._name_losses(batch)
        self._finish_gradients()
        for group in self.optimizer.param_groups:
            factor = learning_rate_factor(self.step, self.steps, self.phase.warmup, self.phase.decay)
            group["lr"] = group["initial_lr"] * factor
        self._taken[-1].learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.objective.zero_grad(set_to_none=True)
        self.step += 1
        if self._request.number is not None and not several():
            self._stop = True  # even when it came after the gradients were final

    def _back_propagate(self, batch: Tensors, share: float) -> None:
        """Every loss of a micro-batch, one after the other."""
        losses = iter(self.objective.losses(**batch))
        while True:
            # Left for the backward pass, which runs in the dtypes of its forward.
            with self._autocast():
                item = next(losses, None)
            if item is None:
                break
            name, loss = item
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * share
            loss.backward()
            self._parts[name] = self._parts.get(name, 0.0) + loss.detach().float()
            del item, loss

    @torch.no_grad()
    def _name_losses(self, batch: Tensors) -> None:
        """Zeros for the losses of rows that count nothing, for processes to add up the same ones."""
        with self._autocast():
            for name, loss in self.objective.losses(**batch):
                self._parts.setdefault(name, torch.zeros((), device=loss.device))

    def _finish_gradients(self) -> None:
        """Sum over the processes, refuse what is not finite, clip: the gradients are then the step's."""
        sum_gradients(list(self.trainable.values()), self.team)
        norms = total_norms(
            [[p.grad for p in share if p.grad is not None] for share in self.apart.values()], self.device
        )
        # what this process knows, and all are to do
        flags = torch.tensor([float(self._asks_to_stop()), float(self._is_save_due())], device=self.device)
        scalars = total(torch.cat([torch.stack(list(self._parts.values())), flags]), self.team)
        # One transfer from the device for all that this step must know.
        values = torch.cat([scalars, norms.float()]).tolist()
        parts = dict(zip(self._parts, values, strict=False))
        interrupted, due = values[len(parts) : len(parts) + 2]
        self._parts = {}
        if self.stage is None:
            self._stop, self._due = self._stop or interrupted > 0, due > 0

        taken = Taken(self.step + 1, 0.0, parts, dict(zip(self.apart, values[len(parts) + 2 :], strict=True)))
        for (name, share), norm in zip(self.apart.items(), norms, strict=True):
            if taken.bad(name):
                # The optimizer passes over a parameter without gradient: neither weights nor its state change.
                for parameter in share:
                    parameter.grad = None
            elif self.phase.max_grad_norm:
                clip(share, self.most, norm)
        self._taken.append(taken)

    def _meets(self) -> bool:
        """Whether processes meet after the step that comes; all of them hear the same."""
        if self._meetings is None:
            return True
        step = self.step + 1
        asks = step % self.phase.save_every == 0 or step == self.steps or self._asks_to_stop() or self._is_save_due()
        return self._meetings.next(asks)

    def _meet(self) -> None:
        """What all processes make of the steps since they met."""
        taken, self._taken = self._taken, []
        if self._meetings is not None:
            taken, self._stop, self._due = self._meetings.hold(taken, self._asks_to_stop(), self._is_save_due())
        now, since = time.monotonic(), self._window.since
        for i, one in enumerate(taken, 1):
            bad = one.bad()
            norms = list(one.norms.values())
            norm = norms[0] if len(norms) == 1 else math.sqrt(sum(value * value for value in norms))
            self._window.add(one.step, one.losses, norm, skipped=bool(bad))
            if bad:
                self._count_nonfinite(one.step, bad)
            else:
                self.nonfinite_in_a_row = 0
                self.objective.end_step(sum(one.losses.values()))
            if self._failure is not None or one.step % self.phase.log_every == 0:
                self._log(one, since + (now - since) * i / len(taken))
            if self._failure is not None:
                break

    def _asks_to_stop(self) -> bool:
        return self._request.number is not None

    def _is_save_due(self) -> bool:
        """Whether the first process's clock asks for a checkpoint."""
        minutes = getattr(self.phase, "save_minutes", None)
        return minutes is not None and is_first() and time.monotonic() - self._saved_at >= 60 * minutes

    @property
    def _told(self) -> str:
        """The phase as messages name it: where it stands in the recipe, and its name where that does not say it."""
        return self.section if self.section.split(".")[-1] == self.name else f"{self.section} ({self.name})"

    def _count_nonfinite(self, step: int, bad: list[str]) -> None:
        self.skipped_steps += 1
        self.nonfinite_in_a_row += 1
        of = "" if "" in self.apart else " of what these losses train"
        logger.warning("%s: step %d changed nothing%s: not finite: %s", self.name, step, of, ", ".join(bad))
        if self.nonfinite_in_a_row >= MAX_NONFINITE or self.skipped_steps >= MAX_NONFINITE_TOTAL:
            count = (
                f"{self.nonfinite_in_a_row} steps in a row"
                if self.nonfinite_in_a_row >= MAX_NONFINITE
                else f"{self.skipped_steps} steps"
            )
            self._failure = (
                f"{self._told}: {count}, the last one step {step}, had a loss or gradient that is not"
                f" finite ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}); none reached the weights."
                f" {self._advice}, lengthen its warmup, or set precision: float32"
            )

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _log(self, taken: Taken, now: float) -> None:
        """One record of metrics.jsonl, and what else shows it."""
        record = {
            "phase": self.name,
            "step": taken.step,
            "steps": self.steps,
            "tokens": self._tokens_after(taken.step),
            "learning_rate": taken.learning_rate,
            "skipped_steps": self.skipped_steps,
            **self._window.drain(self.tokens_per_step, now),
        }
        if measured := means(self.objective.measured()):
            record["measured"] = measured
        self.trackers.log(record)
        self.metrics.log(record)
        self.progress.log(record)

    def _tokens_after(self, step: int) -> int:
        """How many tokens the first steps had."""
        rows = step * self.rows
        return (rows if self.in_all is None else min(rows, self.in_all)) * self.phase.sequence_length

    # ---- Checkpoints ----

    def _save_checkpoint(self) -> None:
        self.checkpoints.save(self.step, self._counts())
        self._saved_at = time.monotonic()

    def _load_checkpoint(self, checkpoint: Path) -> None:
        """Restore what trains and the phase's counts."""
        counts = self.checkpoints.load(checkpoint, self._counts())
        self.step = step_of(checkpoint)
        self.skipped_steps, self.nonfinite_in_a_row = counts["skipped_steps"], counts["nonfinite_in_a_row"]

    def _counts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "order_seed": self.order_seed,
            "examples": len(self.train_dataset),
            "rows": self.rows,
            "skipped_steps": self.skipped_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

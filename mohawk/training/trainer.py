"""One phase of training: a loop over an `Objective` (objective.py).

Gradients are averaged over real tokens, over micro-batches and processes alike; a step whose loss or gradient is not
finite changes nothing; checkpoints are complete or invisible (mohawk.core.folders); a signal saves and raises
`Interrupted`; a resumed run continues bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import set_seed

from mohawk.core.folders import (
    Interrupted,
    about_of,
    locked,
    newest_complete,
    remove_partial,
    rotate,
    step_of,
    write_whole,
)
from mohawk.core.precision import autocast_dtype, pick_device
from mohawk.core.processes import (
    agree,
    count,
    from_first,
    gathered,
    hashed_together,
    is_first,
    means,
    rank,
    several,
    share_parameters,
    sum_gradients,
    together,
    total,
    wait_for_all,
)
from mohawk.core.run_folder import phase_folder
from mohawk.core.stopping import SAME_SIGNAL, SAME_SIGNAL_DISTRIBUTED, StopRequest
from mohawk.errors import UserError, naming
from mohawk.loading.nonfinite import first_nonfinite
from mohawk.models.sharding import clip, is_sharded, local, reshard, total_norm
from mohawk.training.batches import Batches
from mohawk.training.checkpoint import (
    ORDER_KEYS,
    is_finished,
    read_counts,
    read_moments,
    read_parameters,
    read_random_states,
    write_counts,
    write_parameters,
    write_random_states,
    write_shards,
)
from mohawk.training.objective import Objective
from mohawk.training.progress import Metrics, Progress, Window
from mohawk.training.schedule import learning_rate_factor
from mohawk.training.trackers import Trackers

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors by name, or groups of them


class PhaseTrainer:
    """Train `objective` as the recipe's phase `phase` says; `train_phase()` runs or resumes it.

    Args:
        objective: what trains, and its losses.
        name: of the phase: `run_dir/phases/<name>/` holds its checkpoints.
        phase: `tokens`, `batch_size`, `sequence_length`, `learning_rate`, `betas`, `weight_decay`,
            `max_grad_norm`, `warmup`, `decay` (fractions of the steps), `gradient_accumulation`,
            `save_every`, `log_every` (steps); `eps`, `keep_checkpoints` and `save_minutes` (of the clock) are optional.
        run_dir: of the run; metrics.jsonl is appended to there.
        train_dataset: maps an index to an example; read in an order that depends on seed and name only, anew
            in each pass.
        collate: list of examples -> batch, a dict of (batch, seq) tensors; with `labels`, unshifted, whose
            real tokens are what gradients are averaged over.
        precision: `float32`, `bfloat16` (autocast), or `auto` (bfloat16 where the device is fast at it).
        device: `auto`, `cpu` or `cuda`.
        max_nonfinite: this many steps in a row (or `max_nonfinite_total` in the phase) with a loss or
            gradient that is not finite end the run with a UserError.
        keep_checkpoints: how many complete checkpoints to keep; default the phase's `keep_checkpoints`, else 1. With 2
            a damaged newest one costs the steps of one interval.
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
        collate: Callable[[list], Batch],
        precision: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_nonfinite: int = 3,
        max_nonfinite_total: int = 10,
        keep_checkpoints: int | None = None,
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
        self.max_nonfinite = max_nonfinite
        self.max_nonfinite_total = max_nonfinite_total
        self.keep_checkpoints = keep_checkpoints or getattr(phase, "keep_checkpoints", 1)
        self.origin = dict(origin or {})

        self.rows = rows_per_step(phase)
        check_dealt(phase, name)
        self.tokens_per_step = self.rows * phase.sequence_length
        self.steps = math.ceil(phase.tokens / self.tokens_per_step)
        self.step = 0  # how many are taken
        self.objective = objective.to(self.device)
        reshard(objective)  # what trains are the parts
        groups = objective.parameter_groups(phase.learning_rate, phase.weight_decay)
        self.trainable = _trainable(objective, groups)
        self.sharded = any(map(is_sharded, self.trainable.values()))
        names = {id(parameter): name for name, parameter in self.trainable.items()}
        self.order = [names[id(parameter)] for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(
            _apart(groups),
            lr=phase.learning_rate,
            betas=tuple(phase.betas),
            eps=getattr(phase, "eps", 1e-8),
            weight_decay=phase.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]

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
        self._step_loss: float | None = None  # of the step that just ended, None if it changed nothing
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
            checkpoint = from_first(self._newest_checkpoint)
            stack.enter_context(self._request.caught())
            start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
            logger.info(
                "%s: %s, %d steps of %d tokens, %s trainable parameters, %s on %s",
                self.name,
                start,
                self.steps,
                self.tokens_per_step,
                f"{sum(p.numel() for p in self.trainable.values()):,}",
                "bfloat16 autocast" if self.autocast_dtype else "float32",
                self.device,
            )
            set_seed(self.seed)  # whatever was drawn until now; a checkpoint brings its own state
            if checkpoint:
                self._load_checkpoint(checkpoint)
                if is_finished(checkpoint):
                    return
                self._load_moments(checkpoint)
            self._begin()
            if checkpoint:
                read_random_states(checkpoint, self.device)
            self._loop()
        if self._failure is not None:
            raise UserError(self._failure)
        # A signal that came after the last step stops the run too; that step's checkpoint is written.
        if self._stop or agree(self._request.number is not None):
            saved = Interrupted(self.step, self._checkpoint_path())
            logger.info("%s: %s", self.name, saved)
            raise saved
        logger.info("%s: done after %d steps", self.name, self.step)

    def _newest_checkpoint(self) -> Path | None:
        """Where the phase goes on. Raises UserError where that is of another run, or goes on from other weights."""
        checkpoint = newest_complete(self.folder)
        if checkpoint is None:
            return None
        about, what = about_of(checkpoint), {"run": "is of another run", "from": "goes on from other weights"}
        for name, value in self.origin.items():
            if name == "bound":  # compared with what the run reads before it trains (mohawk.runs.binding)
                continue
            if about.get(name, value) != value:
                raise UserError(
                    f"{checkpoint}: {what.get(name, f'has another {name}')} than this phase now begins with; delete "
                    f"{self.folder} to train the phase from its beginning, or put back what it was"
                )
        return checkpoint

    def _begin(self) -> None:
        self.objective.eval()  # a teacher in training mode would drop out
        self.objective.student.train()
        share_parameters(list(self.trainable.values()))
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
            self._take_step(batches, sampler.per_step)
            if self._failure is not None:
                self._log()
                break  # without a checkpoint: better to go on from before the trouble
            if self.step % self.phase.log_every == 0:
                self._log()
            over = self._stop or self.objective.finished
            if over or self._due or self.step % self.phase.save_every == 0 or self.step == self.steps:
                self._save_checkpoint()
            if over:
                break
        self.progress.show(self.step, last=True)
        self.trackers.end()

    # ---- Data ----

    def _sampler(self) -> Batches:
        """Of all steps that are left; the rows of the steps before are not read."""
        return Batches(
            len(self.train_dataset), rows=self.rows, batch_size=self.phase.batch_size, steps=self.steps,
            done=self.step, seed=self.order_seed, rank=rank(), processes=count(),
        )  # fmt: skip

    def _batches(self, sampler: Batches) -> Iterator[Batch]:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one when it is made
        )
        return iter(loader)

    def _micro_batches(self, batches: Iterator[Batch], per_step: int) -> tuple[list[tuple[Batch, float]], float]:
        """The micro-batches of one step with what each counts, and what all count over all processes."""
        read: Any = itertools.islice(batches, per_step)
        taken: list[Any] = [send_to_device(batch, self.device) for batch in read]
        with self._autocast():
            taken = [self.objective.prepare(batch, self.step) for batch in taken]
        taken = [send_to_device(batch, self.device) for batch in taken]
        counts = [float(self.objective.count(batch)) for batch in taken]
        whole = sum(counts)
        if several():
            whole = float(total(torch.tensor(whole, dtype=torch.float64, device=self.device)))
        return list(zip(taken, counts, strict=True)), whole

    # ---- One step ----

    def _take_step(self, batches: Iterator[Batch], per_step: int) -> None:
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
                share = counted / whole if whole else 1 / (per_step * count())
            if share or in_parts:  # where models are sharded all come to each layer, whatever their rows hold
                self._back_propagate(batch, share)
            elif several():
                self._name_losses(batch)
        self._finish_gradients()
        for group in self.optimizer.param_groups:
            factor = learning_rate_factor(self.step, self.steps, self.phase.warmup, self.phase.decay)
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        self.objective.zero_grad(set_to_none=True)
        self.step += 1
        if self._step_loss is not None:
            self.objective.end_step(self._step_loss)
        if self._request.number is not None and not several():
            self._stop = True  # even when it came after the gradients were final

    def _back_propagate(self, batch: Batch, share: float) -> None:
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
    def _name_losses(self, batch: Batch) -> None:
        """Zeros for the losses of rows that count nothing, for processes to add up the same ones."""
        with self._autocast():
            for name, loss in self.objective.losses(**batch):
                self._parts.setdefault(name, torch.zeros((), device=loss.device))

    def _finish_gradients(self) -> None:
        """Sum over the processes, refuse what is not finite, clip: the gradients are then the step's."""
        parameters = list(self.trainable.values())
        sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(gradients).to(self.device)
        # what this process knows, and all are to do
        flags = [float(self._request.number is not None), float(self._is_save_due())]
        flags = torch.tensor(flags, device=self.device)
        scalars = total(torch.cat([torch.stack(list(self._parts.values())), flags]))
        # One transfer from the device for all that this step must know.
        *values, interrupted, due, norm_value = torch.cat([scalars, norm.float().reshape(1)]).tolist()
        parts = dict(zip(self._parts, values, strict=True))
        self._parts = {}
        self._stop, self._due = self._stop or interrupted > 0, due > 0

        self._step_loss = sum(parts.values())
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        if not math.isfinite(norm_value):
            bad.append("the gradient")
        if bad:
            # The optimizer passes over a parameter without gradient: neither weights nor its state change.
            for parameter in parameters:
                parameter.grad = None
            self._step_loss = None
            self._count_nonfinite(bad)
        else:
            self.nonfinite_in_a_row = 0
            if self.phase.max_grad_norm:
                clip(parameters, self.phase.max_grad_norm, norm)
        self._window.add(self.step + 1, parts, norm_value, skipped=bool(bad))

    def _is_save_due(self) -> bool:
        """Whether the first process's clock asks for a checkpoint."""
        minutes = getattr(self.phase, "save_minutes", None)
        return minutes is not None and is_first() and time.monotonic() - self._saved_at >= 60 * minutes

    @property
    def _told(self) -> str:
        """The phase as messages name it: where it stands in the recipe, and its name where that does not say it."""
        return self.section if self.section.split(".")[-1] == self.name else f"{self.section} ({self.name})"

    def _count_nonfinite(self, bad: list[str]) -> None:
        step = self.step + 1
        self.skipped_steps += 1
        self.nonfinite_in_a_row += 1
        logger.warning("%s: step %d changed nothing: not finite: %s", self.name, step, ", ".join(bad))
        if self.nonfinite_in_a_row >= self.max_nonfinite or self.skipped_steps >= self.max_nonfinite_total:
            count = (
                f"{self.nonfinite_in_a_row} steps in a row"
                if self.nonfinite_in_a_row >= self.max_nonfinite
                else f"{self.skipped_steps} steps"
            )
            self._failure = (
                f"{self._told}: {count}, the last one step {step}, had a loss or gradient that is not"
                f" finite ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}); none reached the weights."
                f" Lower {self.section}.learning_rate (now {self.phase.learning_rate:g}), lengthen its"
                " warmup, or set precision: float32"
            )

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _log(self) -> None:
        """One record of metrics.jsonl, and what else shows it."""
        record = {
            "phase": self.name,
            "step": self.step,
            "steps": self.steps,
            "tokens": self.step * self.tokens_per_step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.skipped_steps,
            **self._window.drain(self.tokens_per_step),
        }
        if measured := means(self.objective.measured()):
            record["measured"] = measured
        self.trackers.log(record)
        self.metrics.log(record)
        self.progress.log(record)

    # ---- Checkpoints ----

    def _checkpoint_path(self) -> Path:
        return self.folder / f"checkpoint-{self.step}"

    def _save_checkpoint(self) -> None:
        """Write what the phase needs to go on, complete or invisible; frozen weights are not rewritten."""
        path = self._checkpoint_path()
        reshard(self.objective)
        self._refuse_nonfinite()
        sums: dict[str, str] = {}
        try:
            with naming(path), contextlib.ExitStack() as stack:
                folder = agree(together(lambda: self._begin_checkpoint(path, sums, stack) if is_first() else None))
                together(lambda: self._write_checkpoint(folder))
                if several():
                    sums |= hashed_together(folder)
                together(stack.close)  # the first process makes it visible
        except OSError as error:
            kept = newest_complete(self.folder)
            raise UserError(
                f"{path}: the checkpoint could not be written ({error.strerror or error};"
                f" {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free there);"
                f" {f'{kept.name} is complete' if kept else 'there is no earlier one'}."
                " Free disk space or make the folder writable, then run the same command"
            ) from error
        self._saved_at = time.monotonic()
        logger.info("%s: saved %s", self.name, path)
        if is_first():
            rotate(self.folder, path, keep=self.keep_checkpoints)
        wait_for_all()

    def _refuse_nonfinite(self) -> None:
        """Weights that are not finite never take the place of earlier ones. Raises UserError."""
        state = self.optimizer.state
        moments = (
            (f"{key} of {name}", local(value))
            for name, p in self.trainable.items()
            for key, value in state.get(p, {}).items()
            if isinstance(value, torch.Tensor)
        )
        own = first_nonfinite(itertools.chain(((name, local(p)) for name, p in self.trainable.items()), moments))
        found = next((one for one in gathered(own) if one is not None), None)
        if found is not None:
            kept = newest_complete(self.folder)
            raise UserError(
                f"{self._told}: after step {self.step} {found} is not finite, so no checkpoint is"
                f" written; {f'{kept.name} is complete' if kept else 'there is no earlier one'}. Lower"
                f" {self.section}.learning_rate (now {self.phase.learning_rate:g}) and run again"
            )

    def _begin_checkpoint(self, path: Path, sums: dict[str, str], stack: contextlib.ExitStack) -> Path:
        """A folder for all to write to, which takes its place when the stack closes."""
        folder = stack.enter_context(write_whole(path, replace=True, about=self.origin, sums=sums))
        write_counts(folder, self._counts(), self.objective)
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        """What this process has to write: several machines must share the folder."""
        if self.sharded:
            write_shards(folder, self.trainable, self.optimizer, self.objective)
        elif is_first():
            write_parameters(folder, self.trainable, self.optimizer)
        write_random_states(folder, self.device)

    def _load_checkpoint(self, checkpoint: Path) -> None:
        """Restore what trains and the phase's counts."""
        read_parameters(checkpoint, self.trainable)
        self.step = step_of(checkpoint)
        then, now = read_counts(checkpoint, self.objective), self._counts()
        self.skipped_steps, self.nonfinite_in_a_row = then["skipped_steps"], then["nonfinite_in_a_row"]
        names = {"rows": "rows a step"}
        changed = [f"{names.get(key, key)} {then[key]} -> {now[key]}" for key in ORDER_KEYS if then[key] != now[key]]
        if changed:
            logger.warning(
                "%s: since %s changed: %s; the data go on in another order than before",
                self.name,
                checkpoint.name,
                ", ".join(changed),
            )

    def _load_moments(self, checkpoint: Path) -> None:
        read_moments(checkpoint, self.trainable, self.optimizer, self.order)

    def _counts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "order_seed": self.order_seed,
            "examples": len(self.train_dataset),
            "rows": self.rows,
            "skipped_steps": self.skipped_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }


def rows_per_step(phase: Any) -> int:
    """How many rows a step has, over all processes."""
    return phase.batch_size * phase.gradient_accumulation


def check_dealt(phase: Any, name: str) -> None:
    """UserError where the processes cannot have equal parts of a step."""
    if (rows := rows_per_step(phase)) % count():
        raise UserError(
            f"{name}: a step has {rows} rows (batch_size x gradient_accumulation, over all processes), which cannot be "
            f"dealt evenly to {count()} processes; start another number of them, or change one of the two"
        )


def is_over(folder: str | os.PathLike, phase: Any) -> bool:
    """Whether a phase with this folder of checkpoints has no step to come: the newest whole one is of the last step, or
    of one after which the objective had ended it."""
    if (checkpoint := newest_complete(folder)) is None:
        return False
    last = math.ceil(phase.tokens / (rows_per_step(phase) * phase.sequence_length))
    return step_of(checkpoint) >= last or is_finished(checkpoint)


def _apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with sharded and whole parameters in groups of their own: no fused step takes both."""
    made = [
        {**group, "params": [p for p in group["params"] if is_sharded(p) is sharded]}
        for group in groups
        for sharded in (False, True)
    ]
    return [group for group in made if group["params"]]


def _trainable(objective: nn.Module, groups: list[dict[str, Any]]) -> dict[str, nn.Parameter]:
    """The parameters in the optimizer's groups by their name in the objective."""
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    named = {name: p for name, p in objective.named_parameters() if id(p) in wanted}
    if not wanted or len(named) != len(wanted):
        raise ValueError(
            f"parameter_groups: {len(wanted)} parameters, {len(named)} of them in the objective; all must be"
            " (or a checkpoint could not name them), and there must be some"
        )
    return named

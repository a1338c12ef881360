"""One phase of training: a `transformers.Trainer` over an `Objective` (objective.py) instead of a model.

What differs from a plain Trainer, and why, is said at each method. In short: gradients are averaged over real
tokens, over micro-batches and processes alike; a step whose loss or gradient is not finite changes nothing;
checkpoints are complete or invisible (mohawk.core.folders); a signal saves and raises `Interrupted`; a resumed
run continues bit for bit on the CPU.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

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
from mohawk.core.precision import autocast_dtype
from mohawk.core.processes import (
    agree,
    from_first,
    is_first,
    means,
    several,
    share_parameters,
    sum_gradients,
    total,
    wait_for_all,
)
from mohawk.core.run_folder import phase_folder
from mohawk.core.stopping import SAME_SIGNAL, SAME_SIGNAL_DISTRIBUTED, StopRequest
from mohawk.data.next_tokens import IGNORED, next_labels
from mohawk.errors import UserError, naming
from mohawk.loading.nonfinite import first_nonfinite
from mohawk.training.batches import Batches
from mohawk.training.progress import Metrics, Progress, Window
from mohawk.training.trackers import trackers

logger = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
PHASE_STATE = "phase_state.json"
OBJECTIVE_STATE = "objective.safetensors"
# What fixes the order of the data, and what of an optimizer group the recipe says.
ORDER_KEYS = ("order_seed", "examples", "batch_size", "gradient_accumulation", "world_size")
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")


class PhaseTrainer(Trainer):
    """Train `objective` as the recipe's phase `phase` says; `train_phase()` runs or resumes it.

    Args:
        objective: see this module's docstring.
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
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        name: str,
        phase: Any,
        run_dir: str | os.PathLike,
        train_dataset: Any,
        collate: Callable[[list], dict[str, torch.Tensor]],
        precision: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_nonfinite: int = 3,
        max_nonfinite_total: int = 10,
        keep_checkpoints: int | None = None,
        origin: Mapping[str, Any] | None = None,
        report_to: Sequence[str] = (),
    ):
        if device not in ("auto", "cpu") and not torch.cuda.is_available():
            raise UserError(f"device: got {device}, but torch sees no CUDA device here; use auto or cpu")
        if len(train_dataset) == 0:
            raise UserError(f"phases.{name}: the training data hold no example; check data.train")
        self.name = name
        self.phase = phase
        self.folder = phase_folder(Path(run_dir), name)
        self.max_nonfinite = max_nonfinite
        self.max_nonfinite_total = max_nonfinite_total
        self.keep_checkpoints = keep_checkpoints or getattr(phase, "keep_checkpoints", 1)
        self.origin = dict(origin or {})
        # Each phase reads the data in its own order.
        self.order_seed = (seed << 32) + zlib.crc32(name.encode())

        args = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=1,  # set below, when the number of processes is known
            per_device_train_batch_size=phase.batch_size,
            gradient_accumulation_steps=phase.gradient_accumulation,
            learning_rate=phase.learning_rate,
            weight_decay=phase.weight_decay,
            max_grad_norm=0.0,  # clipped here, after the processes agreed on the gradient
            lr_scheduler_type="warmup_stable_decay",
            save_strategy="steps",
            save_steps=phase.save_every,
            logging_strategy="steps",
            logging_steps=phase.log_every,
            logging_nan_inf_filter=False,  # it would log a NaN as the mean of the losses before
            seed=seed,
            use_cpu=device == "cpu",
            remove_unused_columns=False,
            dataloader_num_workers=0,
            report_to="none",
            disable_tqdm=True,
        )
        args._n_gpu = min(1, args.n_gpu)  # more would mean nn.DataParallel; use torchrun for several GPUs
        self.tokens_per_step = tokens_per_step(phase, args.world_size)
        args.max_steps = steps = math.ceil(phase.tokens / self.tokens_per_step)
        args.warmup_steps = round(phase.warmup * steps)
        args.lr_scheduler_kwargs = {
            "num_decay_steps": min(round(phase.decay * steps), steps - args.warmup_steps),
            "decay_type": "linear",
        }
        super().__init__(
            model=objective,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            callbacks=[_PhaseCallback(self), Metrics(run_dir, name), *trackers(report_to)],
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "accelerate is set to FSDP or DeepSpeed, which the phases do not support; launch with"
                " torchrun or accelerate launch --multi_gpu"
            )
        self.progress = Progress(name)
        self.add_callback(self.progress)
        self.autocast_dtype = autocast_dtype(precision, self.args.device)
        # Several backward passes a step do not go through DistributedDataParallel.forward: the objective is
        # marked as prepared (evaluation mode wraps nothing), and `_finish_gradients` sums over the processes.
        self.accelerator.prepare_model(objective, evaluation_mode=True)

        groups = objective.parameter_groups(phase.learning_rate, phase.weight_decay)
        self.trainable = _trainable(objective, groups)
        self.skipped_steps = 0
        self.nonfinite_in_a_row = 0
        self._failure: str | None = None
        same = SAME_SIGNAL_DISTRIBUTED if several() else SAME_SIGNAL
        self._request = StopRequest(same, says=self.is_world_process_zero())
        self._stop = self._due = False  # all processes agreed to stop; to save
        self._saved_at = time.monotonic()
        self._parts: dict[str, torch.Tensor] = {}  # of the running step, by name
        self._step_loss: float | None = None  # of the step that just ended, None if it changed nothing
        self._window = Window()

    # ---- The phase as a whole ----

    def train_phase(self) -> None:
        """Run the phase to its end, from its newest complete checkpoint if there is one.

        Raises:
            Interrupted: a signal (mohawk.core.stopping) came; the checkpoint is written. A second signal does what it
            does
                without us: stop at once.
            UserError: too many steps were not finite, weights are not, the disk is full, a checkpoint is of another
                model or run, or another process trains this phase.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.progress.close)
            if self.is_world_process_zero():
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
                self.args.max_steps,
                self.tokens_per_step,
                f"{sum(p.numel() for p in self.trainable.values()):,}",
                "bfloat16 autocast" if self.autocast_dtype else "float32",
                self.args.device,
            )
            set_seed(self.args.seed)  # whatever was drawn until now; a checkpoint brings its own state
            if checkpoint and _finished(checkpoint):
                self._load_from_checkpoint(checkpoint)
                return
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self._failure is not None:
            raise UserError(self._failure)
        # A signal that came after the last step stops the run too; that step's checkpoint is written.
        if self._stop or agree(self._request.number is not None):
            saved = Interrupted(self.state.global_step, self._checkpoint_path())
            logger.info("%s: %s", self.name, saved)
            raise saved
        logger.info("%s: done after %d steps", self.name, self.state.global_step)

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

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """One pass of `max_steps` steps: the sampler, not Trainer, starts again when they are used up.

        Trainer skips the batches before the resumed step in the sampler, so they are not read again.
        """
        sampler = Batches(
            len(self.train_dataset),
            batch_size=self.phase.batch_size,
            batches=self.args.max_steps * self.args.gradient_accumulation_steps,
            seed=self.order_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one when it is made
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device) -> tuple[list, float]:
        """The micro-batches of one step, and how many real tokens they hold over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        with self._autocast():
            batches = [self.model.prepare(self._prepare_inputs(b), self.state.global_step) for b in batches]
        tokens = float(sum(map(_real_tokens, batches)))
        if several():
            tokens = total(torch.tensor(tokens, device=device)).item()
        self._micro_batches = len(batches) * self.args.world_size
        return batches, tokens

    # ---- One step ----

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Back-propagate every loss of the micro-batch; after the step's last, make the gradients final."""
        # The step's loss is the mean over its real tokens, not a sum of micro-batch means: each micro-batch
        # counts by its share of them, and the processes' gradients are summed.
        if self.model.shares:
            share = 1.0
        else:
            share = _real_tokens(inputs) / num_items_in_batch if num_items_in_batch else 1 / self._micro_batches
        inputs = self._prepare_inputs(inputs)
        step_loss = torch.zeros((), device=self.args.device)
        losses = iter(self.model.losses(**inputs) if share else ())
        while True:
            # accelerate wraps `forward` alone, so autocast is entered here, and left for the backward pass,
            # which runs in the dtypes of its forward.
            with self._autocast():
                item = next(losses, None)
            if item is None:
                break
            name, loss = item
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * share
            loss.backward()
            loss = loss.detach().float()
            step_loss += loss
            self._parts[name] = self._parts.get(name, 0.0) + loss
            del item
        if self.accelerator.sync_gradients:
            self._finish_gradients()
        # Trainer logs the mean over the processes of what each returns; ours are shares of one loss.
        return step_loss * self.args.world_size

    def _finish_gradients(self) -> None:
        """Sum over the processes, refuse what is not finite, clip: the gradients are then the step's."""
        parameters = list(self.trainable.values())
        sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).to(self.args.device)
        # what this process knows, and all are to do
        flags = [float(self._request.number is not None), float(self._is_save_due())]
        flags = torch.tensor(flags, device=self.args.device)
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
                nn.utils.clip_grads_with_norm_(parameters, self.phase.max_grad_norm, norm)
        self._window.add(self.state.global_step + 1, parts, norm_value, skipped=bool(bad))

    def _is_save_due(self) -> bool:
        """Whether the first process's clock asks for a checkpoint."""
        minutes = getattr(self.phase, "save_minutes", None)
        return minutes is not None and is_first() and time.monotonic() - self._saved_at >= 60 * minutes

    def _count_nonfinite(self, bad: list[str]) -> None:
        step = self.state.global_step + 1
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
                f"phases.{self.name}: {count}, the last one step {step}, had a loss or gradient that is not"
                f" finite ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}); none reached the weights."
                f" Lower phases.{self.name}.learning_rate (now {self.phase.learning_rate:g}), lengthen its"
                " warmup, or set precision: float32"
            )

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        """The norm before clipping, which `_finish_gradients` has: Trainer would compute it once more."""
        return self._window.grad_norm

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast_dtype)

    # ---- Optimizer and log ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over the objective's groups. (The schedule is Trainer's: warmup-stable-decay, linear.)"""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameter_groups(self.phase.learning_rate, self.phase.weight_decay),
                lr=self.phase.learning_rate,
                betas=tuple(self.phase.betas),
                eps=getattr(self.phase, "eps", 1e-8),
                weight_decay=self.phase.weight_decay,
                fused=self.args.device.type in ("cpu", "cuda"),
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the callbacks one record of metrics.jsonl; Trainer's own summary at the end is left out.

        Nothing is added to `state.log_history`, which every checkpoint would carry in full.
        """
        if "loss" not in logs:
            return
        record = {
            "phase": self.name,
            "step": self.state.global_step,
            "steps": self.state.max_steps,
            "tokens": self.state.global_step * self.tokens_per_step,
            "learning_rate": logs["learning_rate"],
            "skipped_steps": self.skipped_steps,
            **self._window.drain(self.tokens_per_step),
        }
        if measured := means(self.model.measured()):
            record["measured"] = measured
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, record)

    # ---- Checkpoints ----

    def _checkpoint_path(self) -> Path:
        return self.folder / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model, trial=None) -> None:
        """Write what the phase needs to go on, complete or invisible; frozen weights are not rewritten."""
        path = self._checkpoint_path()
        try:
            with naming(path), contextlib.ExitStack() as stack:
                folder = None
                if self.is_world_process_zero():
                    self._refuse_nonfinite()
                    folder = stack.enter_context(write_whole(path, replace=True, about=self.origin))
                    self._write_checkpoint(folder)
                folder = agree(folder)
                self._save_rng_state(str(folder))  # a file each: several machines must share the folder
                wait_for_all()
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
        if self.is_world_process_zero():
            rotate(self.folder, path, keep=self.keep_checkpoints)
        wait_for_all()

    def _refuse_nonfinite(self) -> None:
        """Weights that are not finite never take the place of earlier ones. Raises UserError."""
        state = self.optimizer.state
        moments = (
            (f"{key} of {name}", value)
            for name, p in self.trainable.items()
            for key, value in state.get(p, {}).items()
            if isinstance(value, torch.Tensor)
        )
        found = first_nonfinite(itertools.chain(self.trainable.items(), moments))
        if found is not None:
            kept = newest_complete(self.folder)
            raise UserError(
                f"phases.{self.name}: after step {self.state.global_step} {found} is not finite, so no checkpoint is"
                f" written; {f'{kept.name} is complete' if kept else 'there is no earlier one'}. Lower"
                f" phases.{self.name}.learning_rate (now {self.phase.learning_rate:g}) and run again"
            )

    def _write_checkpoint(self, folder: Path) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in self.trainable.items()}
        save_file(weights, folder / WEIGHTS)
        self._save_optimizer_and_scheduler(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        state = self._phase_state()
        tensors, values = self.model.training_state()
        if tensors or values:
            state["objective"] = values
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / OBJECTIVE_STATE)
        (folder / PHASE_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Restore the trainable parameters and the phase's counts."""
        checkpoint = Path(resume_from_checkpoint)
        weights = load_file(checkpoint / WEIGHTS)
        here = {name: tuple(p.shape) for name, p in self.trainable.items()}
        there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if here != there:
            names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise UserError(
                f"{checkpoint}: holds other parameters than this recipe trains ({len(names)} differ, first"
                f" {names[0]}); choose another output, or delete {checkpoint.parent}"
            )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])
        then, now = _phase_state_of(checkpoint), self._phase_state()
        self.skipped_steps, self.nonfinite_in_a_row = then["skipped_steps"], then["nonfinite_in_a_row"]
        if "objective" in then:
            self.model.load_training_state(load_file(checkpoint / OBJECTIVE_STATE), then["objective"])
        changed = [f"{key} {then[key]} -> {now[key]}" for key in ORDER_KEYS if then[key] != now[key]]
        if changed:
            logger.warning(
                "%s: since %s changed: %s; the data go on in another order than before",
                self.name,
                checkpoint.name,
                ", ".join(changed),
            )

    def _phase_state(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "order_seed": self.order_seed,
            "examples": len(self.train_dataset),
            "batch_size": self.phase.batch_size,
            "gradient_accumulation": self.phase.gradient_accumulation,
            "world_size": self.args.world_size,
            "skipped_steps": self.skipped_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Restore the moments and the place in the schedule, with the settings of the recipe as it is now.

        They are the same unless the user changed them, as one does when told to lower the learning rate.
        """
        if checkpoint is None:
            return
        fresh = [{key: group[key] for key in SETTINGS} for group in self.optimizer.param_groups]
        # transformers 5.17 asks for the device cpu:0 here when there are several processes; torch has none.
        for name, part in ((OPTIMIZER_NAME, self.optimizer), (SCHEDULER_NAME, self.lr_scheduler)):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            part.load_state_dict(state)  # moves the moments to the parameters' device
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in fresh]
        for group, settings, factor in zip(
            self.optimizer.param_groups, fresh, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group.update(settings, lr=settings["initial_lr"] * factor(self.lr_scheduler.last_epoch))
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class _PhaseCallback(TrainerCallback):
    """What the phase does at Trainer's own moments."""

    def __init__(self, trainer: PhaseTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # On resuming, Trainer takes these from the checkpoint; the recipe may have changed since.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        objective = self.trainer.model
        objective.eval()  # a teacher in training mode would drop out
        objective.student.train()
        share_parameters(list(self.trainer.trainable.values()))
        self.trainer._saved_at = time.monotonic()
        self.trainer._window.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.model.begin_step(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer._step_loss is not None:
            trainer.model.end_step(trainer._step_loss)
        if trainer.model.finished:
            control.should_save = control.should_training_stop = True
        if trainer._request.number is not None and not several():
            trainer._stop = True  # even when it came after the gradients were final
        if trainer._due:
            control.should_save = True
        if trainer._stop:
            control.should_save = control.should_training_stop = True
        if trainer._failure is not None:
            control.should_log = control.should_training_stop = True
            control.should_save = False  # better to go on from before the trouble


def _real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """How many positions of the batch predict a token: labels after the shift; all, without labels."""
    if "labels" in batch:
        return int((next_labels(batch) != IGNORED).sum())
    return next(iter(batch.values())).numel()


def tokens_per_step(phase: Any, processes: int) -> int:
    return phase.batch_size * phase.sequence_length * phase.gradient_accumulation * processes


def is_over(folder: str | os.PathLike, phase: Any, processes: int = 1) -> bool:
    """Whether a phase with this folder of checkpoints, in so many processes, has no step to come: the newest whole one
    is of the last step, or of one after which the objective had ended it."""
    if (checkpoint := newest_complete(folder)) is None:
        return False
    last = math.ceil(phase.tokens / tokens_per_step(phase, processes))
    return step_of(checkpoint) >= last or _finished(checkpoint)


def _finished(checkpoint: Path) -> bool:
    """Whether the objective had ended its phase when this was saved."""
    return bool((_phase_state_of(checkpoint).get("objective") or {}).get("finished"))


def _phase_state_of(checkpoint: Path) -> dict[str, Any]:
    """What `PhaseTrainer._phase_state` gave. Raises UserError where it is of another shape."""
    path = checkpoint / PHASE_STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        counts = [state[key] for key in (*ORDER_KEYS, "skipped_steps", "nonfinite_in_a_row")]
        whole = all(type(count) is int for count in counts) and isinstance(state.get("objective") or {}, dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: is not what a checkpoint holds; delete {checkpoint} to go on from the one before")
    return state


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

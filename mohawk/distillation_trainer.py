"""transformers' Trainer with a distillation loss, for people who have a Trainer script already."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mohawk.distillation import KnowledgeDistiller
from mohawk.matchings import IGNORED
from mohawk.processes import means, several, sum_gradients

TENSORS, VALUES = "distillation.safetensors", "distillation.json"  # of the distiller, in a checkpoint


class DistillationTrainer(Trainer):
    """Trainer whose loss is `KnowledgeDistiller`'s.

    Args:
        teacher: a causal language model, or a teacher of mohawk/teacher_models.py.
        distillation: the other arguments of `KnowledgeDistiller`: divergence, temperature, kd_weight, ce_weight,
            matchings, ...
        All others: Trainer's. The data's `labels` are unshifted, -100 where nothing is learned.

    What is measured beside the loss (kd, ce, agreement, teacher_entropy, temperature) is logged with it. Parameters of
    matchings train with the model's; they, TAID and moving averages are kept in checkpoints, beside the model.
    """

    def __init__(self, *args: Any, teacher: Any, distillation: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(teacher, nn.Module):
            teacher = teacher.to(self.args.device)
        self.distiller = KnowledgeDistiller(teacher, self.model, **(distillation or {}))
        self.distiller.matched.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # the count of real tokens over micro-batches is ours to divide by
        self.add_callback(_Steps(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        training = model.training
        batch = self.distiller.prepare(dict(inputs), self.state.global_step) if training else inputs
        if training and self.distiller.on_policy is not None and num_items_in_batch is not None:
            # the student's samples have other tokens than Trainer counted: micro-batches count alike
            labels = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
            num_items_in_batch = labels * self.args.gradient_accumulation_steps
        self.distiller.measuring = training
        loss = self.distiller.loss(batch, num_items_in_batch, forward=model)
        if not return_outputs:
            return loss
        with torch.no_grad():
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}) if self.compute_metrics else {}
        return loss, {"loss": loss, **outputs}

    def create_optimizer(self, model=None):
        created = self.optimizer is None
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        parameters = list(self.distiller.matched.parameters())
        if created and parameters:
            optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **{k: v for k, v in means(self.distiller.measured()).items() if math.isfinite(v)}}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if folder.is_dir():  # and not already rotated away
                state, values = self.distiller.training_state()
                state |= {f"matched.{name}": tensor for name, tensor in self.distiller.matched.state_dict().items()}
                save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / TENSORS)
                (folder / VALUES).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        state = load_file(Path(resume_from_checkpoint) / TENSORS)
        matched = {name.removeprefix("matched."): t for name, t in state.items() if name.startswith("matched.")}
        self.distiller.matched.load_state_dict(matched)
        values = json.loads((Path(resume_from_checkpoint) / VALUES).read_text(encoding="utf-8"))
        self.distiller.load_training_state(state, values)


class _Steps(TrainerCallback):
    """Schedules and moving teachers follow the trainer's steps."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.distiller.begin_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # matchings' parameters are not in the model that DDP wraps, whose gradients it averages
        parameters = list(self.trainer.distiller.matched.parameters())
        if parameters and several():
            sum_gradients(parameters)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= args.world_size

    def on_step_end(self, args, state, control, **kwargs):
        distiller = self.trainer.distiller
        for parameter in distiller.matched.parameters():  # Trainer clears the model's
            parameter.grad = None
        distiller.end_step(float(distiller.step_loss))
        if distiller.finished:
            control.should_training_stop = True

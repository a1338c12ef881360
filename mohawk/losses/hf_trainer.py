"""transformers' Trainer with a distillation loss, for people who have a Trainer script already."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mohawk.core.collectives import means, sum_gradients, total
from mohawk.core.processes import several
from mohawk.losses.distiller import KnowledgeDistiller

if TYPE_CHECKING:
    from mohawk.loading.causal import CausalLM

TENSORS, VALUES = "distillation.safetensors", "distillation.json"  # of the distiller, in a checkpoint


class DistillationTrainer(Trainer):
    """Trainer whose loss is `KnowledgeDistiller`'s.

    Args:
        teacher: a causal language model, or a teacher of `mohawk.teacher_models`.
        distillation: the other arguments of `KnowledgeDistiller`: divergence, temperature, kd_weight, ce_weight,
            matchings, ...
        All others: Trainer's. The data's `labels` are unshifted, -100 where nothing is learned; padding is where an
        `attention_mask` is 0, on any side.

    A step's loss is one over all its micro-batches and, with `average_tokens_across_devices`, processes: how they are
    split does not change it.

    What is measured beside the loss (kd, ce, agreement, teacher_entropy, temperature) is logged with it. Parameters of
    matchings train with the model's; under FSDP2 and DeepSpeed they have an optimizer of their own, which `optim` names
    as well. They, TAID and moving averages are kept in checkpoints, beside the model.
    """

    def __init__(self, *args: Any, teacher: Any, distillation: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if isinstance(teacher, nn.Module):
            teacher = teacher.to(self.args.device)
        student = cast("CausalLM", self.model)  # or the distiller refuses it
        self.distiller = KnowledgeDistiller(teacher, student, **(distillation or {}))
        self.distiller.matched.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # the counts over micro-batches are ours to divide by
        self._training = False  # within training_step
        # of matchings, where FSDP2's or DeepSpeed's has the model's parameters alone
        self.apart: torch.optim.Optimizer | None = None
        self.add_callback(_Steps(self))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, as the distiller has them: what is in all of them is known before the first
        one's loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        with self.compute_loss_context_manager():
            batches = [self.distiller.prepare(dict(self._prepare_inputs(batch)), step) for batch in batches]
        # a count that no loss uses; it tells Trainer that the losses are shares of a step's
        return batches, torch.ones((), device=device)

    def training_step(self, *args: Any, **kwargs: Any):
        self._training = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._training = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.distiller.measuring = model.training
        if self._training and self.distiller.counted(self.state.global_step):
            loss = self.distiller.share(inputs, forward=model)
        else:  # evaluation, or a loop of someone's own around this
            loss = self.distiller.loss(inputs, num_items_in_batch if self._training else None, forward=model)
        if not return_outputs:
            return loss
        with torch.no_grad():
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}) if self.compute_metrics else {}
        return loss, {"loss": loss, **outputs}

    def create_optimizer(self, model=None):
        created = self.optimizer is None
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        parameters = list(self.distiller.matched.parameters())
        if not parameters:
            return optimizer
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if self.apart is None:
                self.apart = self._optimizer_apart()
        elif not any(parameters[0] is p for group in optimizer.param_groups for p in group["params"]):
            if not created and self.lr_scheduler is not None:
                raise ValueError(
                    "optimizers: the optimizer that was given lacks the parameters of matchings, and its scheduler has "
                    "no rate for them; give them to it, or give no scheduler"
                )
            optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
        return optimizer

    def _optimizer_apart(self) -> torch.optim.Optimizer:
        """One of the kind that `optim` asks for, of the matchings' parameters alone."""
        if self.args.fp16:
            raise ValueError(
                "matchings that train parameters have no loss scale of fp16 under FSDP2 or DeepSpeed; use bf16"
            )
        kept = self.optimizer, self.model
        self.optimizer, self.model = None, self.distiller.matched
        try:
            return super().create_optimizer()
        finally:
            self.optimizer, self.model = kept

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
                moments = {} if self.apart is None else self.apart.state_dict()["state"]
                found = {f"apart.{i}.{name}": one for i, of in moments.items() for name, one in of.items()}
                state |= {key: one for key, one in found.items() if isinstance(one, torch.Tensor)}
                values["apart"] = {key: one for key, one in found.items() if isinstance(one, int | float)}
                save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / TENSORS)
                (folder / VALUES).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint, *args: Any, **kwargs: Any) -> None:
        """Whatever loads the model: DeepSpeed does it itself."""
        super()._load_optimizer_and_scheduler(checkpoint, *args, **kwargs)
        if checkpoint is None:
            return
        state = load_file(Path(checkpoint) / TENSORS)
        values = json.loads((Path(checkpoint) / VALUES).read_text(encoding="utf-8"))
        matched = {name.removeprefix("matched."): t for name, t in state.items() if name.startswith("matched.")}
        self.distiller.matched.load_state_dict(matched)
        if self.apart is not None:
            kept: dict[int, dict[str, Any]] = {}
            for key, one in {**state, **values.get("apart", {})}.items():
                if key.startswith("apart."):
                    _, i, name = key.split(".", 2)
                    kept.setdefault(int(i), {})[name] = one
            self.apart.load_state_dict({**self.apart.state_dict(), "state": kept})
        self.distiller.load_training_state(state, values)


class _Steps(TrainerCallback):
    """Schedules and moving teachers follow the trainer's steps."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        distiller, together = self.trainer.distiller, args.average_tokens_across_devices
        distiller.averaged = args.world_size if together else 1
        distiller.begin_step(state.global_step, state.max_steps, together)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # matchings' parameters are not in the model that is wrapped, whose gradients are averaged
        parameters = list(self.trainer.distiller.matched.parameters())
        if parameters and several():
            sum_gradients(parameters)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= args.world_size
        apart, main = self.trainer.apart, self.trainer.optimizer
        if apart is not None and main is not None:
            for group in apart.param_groups:
                group["lr"] = main.param_groups[0]["lr"]
            apart.step()

    def on_step_end(self, args, state, control, **kwargs):
        distiller = self.trainer.distiller
        for parameter in distiller.matched.parameters():  # Trainer clears the model's
            parameter.grad = None
        # the same on every process, which schedules go by
        loss = torch.as_tensor(distiller.step_loss, dtype=torch.float32, device=args.device).clone()
        distiller.end_step(float(total(loss) / args.world_size))
        if distiller.finished:
            control.should_training_stop = True

"""Distillation as a Lightning module.

    pip install lightning
    python examples/lightning_module.py

The student is compared from its hidden states, so no logits are ever whole, neither its own nor the teacher's.
"""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mohawk import Head, linear_kd_loss, next_labels


class Distillation(L.LightningModule):
    """Trains `student` with `linear_kd_loss` against `teacher`; `loss` are its options.

    Batches are `input_ids`, `labels` and perhaps `attention_mask`, all (rows, tokens), int64; a label of -100 and
    padding count for nothing.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, learning_rate: float = 1e-2, **loss):
        super().__init__()
        self.student, self.learning_rate, self.loss = student, learning_rate, loss
        # In a list, so that it is no submodule: it is neither trained nor part of every checkpoint.
        self.frozen = [teacher.eval().requires_grad_(False)]

    def on_fit_start(self) -> None:
        self.frozen[0].to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # Lightning runs this inside the forward pass of DDP's or FSDP's wrapper, so the head's weight may be used here.
        mask = {"mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        loss = self.distillation_loss(batch["input_ids"], batch["labels"], **mask)
        self.log("loss", loss)
        return loss

    def distillation_loss(self, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        (teacher,) = self.frozen
        with torch.no_grad():
            target = Head.of(teacher).teacher(teacher.base_model(ids, mask).last_hidden_state)
        # A Head's weight is what the module computes with, a LoRA on it included.
        student = Head.of(self.student).student(self.student.base_model(ids, mask).last_hidden_state)
        # Position i predicts token i + 1, where both are real.
        labels = next_labels({"labels": labels} | ({} if mask is None else {"attention_mask": mask}))
        return linear_kd_loss(**student, teacher=target, labels=labels, **self.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=self.learning_rate)


class Losses(L.Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def tiny_llama(hidden_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def fit(module: Distillation, rows: list[dict[str, Tensor]], steps: int) -> list[float]:
    """Loss of each step."""
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",  # the tiny model's; "auto" elsewhere
        max_steps=steps,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return losses.values


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 16))]
    module = Distillation(tiny_llama(32), tiny_llama(64), temperature=2.0, kd_weight=0.9, ce_weight=0.1)
    losses = fit(module, rows, steps)
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

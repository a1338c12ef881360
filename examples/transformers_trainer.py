"""Distillation in transformers' Trainer: a subclass with another `compute_loss`.

    python examples/transformers_trainer.py

Student and teacher are called as Trainer calls a model, so several processes (torchrun, accelerate launch) just work.
"""

import tempfile

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from mohawk import kd_loss
from mohawk.next_tokens import IGNORED, next_labels, positions


class DistillingTrainer(Trainer):
    """Trainer whose loss is `kd_loss` against `teacher`, with `loss` as its options.

    `loss={"kd_weight": 0.0, "ce_weight": 1.0}` is the loss Trainer has by itself.
    """

    def __init__(self, *args, teacher: PreTrainedModel, loss: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
        self.loss = loss or {}

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        # Trainer counts all labels here, so those that nothing predicts go first: each row's first real token.
        return super().get_batch_samples(map(predicted_only, epoch_iterator), *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Position i predicts token i + 1, where both are real. Padding the labels, where slicing the logits would copy
        # them.
        labels = next_labels(inputs)
        inputs.pop("labels")  # so that the model does not compute its own loss as well
        if inputs.get("attention_mask") is not None and "position_ids" not in inputs:
            inputs["position_ids"] = positions(inputs["attention_mask"])  # from each row's first real token
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        # Trainer counts the labels of all accumulation steps, and of all processes, whose gradients are then
        # averaged. Without a count (None) the loss is the mean over this batch.
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = kd_loss(outputs.logits, target, labels, normalizer=num_items_in_batch, **self.loss)
        return (loss, outputs) if return_outputs else loss


def predicted_only(batch):
    """The batch with a label where a token in front predicts it, and -100 elsewhere."""
    return {**batch, "labels": F.pad(next_labels(batch)[:, :-1], (1, 0), value=IGNORED)}


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


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 16))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillingTrainer(
            model=tiny_llama(32),
            teacher=tiny_llama(64),
            loss={"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1},
            train_dataset=rows,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

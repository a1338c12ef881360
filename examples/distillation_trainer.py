"""Distillation in transformers' Trainer, hidden states matched as well.

python examples/distillation_trainer.py
torchrun --nproc-per-node 2 examples/distillation_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from mohawk import DistillationTrainer, HiddenMatch, layer_map, match_hidden


def tiny_llama(hidden_size: int, layers: int) -> LlamaForCausalLM:
    shape = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden_size, num_hidden_layers=layers, **shape))


def trainer(teacher, student, rows, args: TrainingArguments) -> DistillationTrainer:
    layers = [model.config.num_hidden_layers for model in (student, teacher)]
    widths = [model.config.hidden_size for model in (student, teacher)]
    match = HiddenMatch(layer_map("uniform", *layers), *widths)
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation={"temperature": 2.0, "ce_weight": 0.1, "matchings": {"hidden": match_hidden(match, weight=0.1)}},
        args=args,
        train_dataset=rows,
    )


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 16))]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trained = trainer(tiny_llama(64, 4), tiny_llama(32, 2), rows, args)
        trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

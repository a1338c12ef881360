"""TRL's DistillationTrainer with its loss replaced: generation, arguments and sharding stay TRL's.

    pip install trl
    python examples/trl_distillation.py

Its loss is the generalised Jensen-Shannon divergence of the tempered distributions, from hidden states and heads,
divided by the number of completion tokens. It is not multiplied by the squared temperature, as `linear_kd_loss` does,
hence the `kd_weight`.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from mohawk import Head, linear_kd_loss


class FusedDistillationTrainer(DistillationTrainer):
    """For text models whose logits are their hidden states times a weight, scaled or softcapped or not, also where LoRA
    adapts it. The logged entropy is left out: the loss has no use for it."""

    def _compute_loss(self, student, inputs, num_items_in_batch):
        # TRL calls this inside the forward pass of DDP's or FSDP's wrapper, so that the head's weight may be used.
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        real = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        labels = inputs["completion_ids"].masked_fill(real == 0, -100)
        # The hidden states that predict the completion's tokens, one for each: already aligned with the labels.
        hidden = self._get_last_hidden_state(student, ids, mask, labels.size(1))
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        with torch.no_grad():
            target = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, ids, mask, labels.size(1)
            )
        loss = linear_kd_loss(
            **Head.of(student).student(hidden),
            teacher=Head.of(teacher).teacher(target),
            labels=labels,
            divergence="jsd",  # here also any other of linear_kd_loss, and ce_weight
            beta=self.beta,
            temperature=self.temperature,
            kd_weight=1 / self.temperature**2,
            normalizer=num_items_in_batch,
        )
        return loss, torch.full_like(loss.detach(), torch.nan), (real != 0).sum()


def tiny_llama(hidden_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


WORDS = ["<pad>", "<eos>", *"one two three four five six seven eight nine ten what comes after ?".split()]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def tiny_trainer(
    folder: str,
    kind: type[DistillationTrainer] = FusedDistillationTrainer,
    learning_rate: float = 1e-2,
    **arguments,
) -> DistillationTrainer:
    numbers = WORDS[2:12]
    prompts = [f"what comes after {' '.join(numbers[i : i + 1 + i % 3])} ?" for i in range(8)]
    torch.manual_seed(0)
    return kind(
        model=tiny_llama(32),
        teacher_model=tiny_llama(64),
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=DistillationConfig(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=learning_rate,
            max_completion_length=8,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            **arguments,
        ),
    )


def main(steps: int = 3) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(folder, max_steps=steps, beta=0.5, temperature=1.5)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

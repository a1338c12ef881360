"""TRL's GKDTrainer with its loss replaced: on-policy generation, collator and arguments stay TRL's.

    pip install trl
    python examples/trl_gkd.py

GKDTrainer's loss is the generalised Jensen-Shannon divergence over the vocabulary, at temperature 1 (its `temperature`
is for sampling only), summed over completion tokens and divided by their number. `divergence="jsd"` with the same
`beta` is that, without the arrays of the logits' size that TRL makes on the way.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from mohawk import kd_loss, next_labels


class FusedGKDTrainer(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        outputs = model(**tokens)
        self.teacher_model.eval()
        with torch.no_grad():
            target = self.teacher_model(**tokens).logits
        # Position i predicts token i + 1, where both are real. Padding the labels, where slicing the logits would copy
        # them.
        labels = next_labels(inputs)
        loss = kd_loss(
            outputs.logits,
            target,
            labels,
            divergence="jsd",  # here also any other of kd_loss, and ce_weight
            beta=self.beta,
            normalizer=num_items_in_batch,  # GKDTrainer divides by it as it is; None: the mean over this batch
        )
        return (loss, outputs) if return_outputs else loss


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
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=template
    )


def tiny_dataset() -> Dataset:
    numbers = WORDS[2:12]
    asked = [f"what comes after {' '.join(numbers[i : i + 1 + i % 3])} ?" for i in range(8)]
    told = [" ".join([*numbers[i + 1 : i + 5], "<eos>"]) for i in range(8)]
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in zip(asked, told, strict=True)
        ]
    )


def tiny_trainer(
    folder: str, kind: type[GKDTrainer] = FusedGKDTrainer, learning_rate: float = 1e-2, **arguments
) -> GKDTrainer:
    torch.manual_seed(0)
    return kind(
        model=tiny_llama(32),
        teacher_model=tiny_llama(64),
        processing_class=tiny_tokenizer(),
        train_dataset=tiny_dataset(),
        args=GKDConfig(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=learning_rate,
            max_length=32,
            max_new_tokens=8,
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
        trainer = tiny_trainer(folder, max_steps=steps, lmbda=0.5, beta=0.5)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

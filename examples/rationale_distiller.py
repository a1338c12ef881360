"""Distilling step by step (arXiv 2305.02301): the student learns labels and, as a second task, why.

python examples/rationale_distiller.py
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mohawk import RationaleDistiller

PROMPTS = ["what is two and two ?", "what is one and two ?"]
LABELS = ["four", "three"]
RATIONALES = ["two more than two is four", "two more than one is three"]


def distil(student, tokenizer, steps: int, learning_rate: float = 1e-2) -> list[float]:
    distiller = RationaleDistiller(student, tokenizer, rationale_weight=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = distiller.compute_loss(PROMPTS, LABELS, RATIONALES)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    words = sorted({word for text in PROMPTS + LABELS + RATIONALES for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "[", "]", "label", "rationale", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    shape = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), hidden_size=32, **shape))
    losses = distil(student, tokenizer, steps)
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

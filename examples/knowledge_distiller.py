"""Distillation in a loop of your own: the loss of a batch from two models and its tokens.

python examples/knowledge_distiller.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mohawk import KnowledgeDistiller


def tiny_llama(hidden_size: int) -> LlamaForCausalLM:
    shape = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden_size, initializer_range=0.2, **shape))


def distil(teacher, student, batches, learning_rate: float = 1e-2) -> list[float]:
    distiller = KnowledgeDistiller(teacher, student, temperature=2.0, kd_weight=0.9, ce_weight=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    losses = []
    for input_ids, attention_mask in batches:
        loss = distiller.compute_loss(input_ids, attention_mask=attention_mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 16))
    losses = distil(tiny_llama(64), tiny_llama(32), [(ids, torch.ones_like(ids))] * steps)
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

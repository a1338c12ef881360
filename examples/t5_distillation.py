"""An encoder and a decoder, T5: what the decoder writes, and hidden states of both.

python examples/t5_distillation.py
"""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from mohawk import HiddenMatch, KnowledgeDistiller, match_hidden


def tiny_t5(layers: int) -> T5ForConditionalGeneration:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": layers, "num_decoder_layers": layers}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, **shape)
    )


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    match = [HiddenMatch([(0, 1), (1, 3)], 32, 32) for _ in range(2)]
    student = tiny_t5(2)
    distiller = KnowledgeDistiller(
        tiny_t5(4), student, task="seq2seq_lm", ce_weight=0.5,
        matchings={"encoder": match_hidden(match[0], 0.1, part="encoder"), "decoder": match_hidden(match[1], 0.1)},
    )  # fmt: skip
    source, labels = torch.randint(1, 64, (4, 12)), torch.randint(1, 64, (4, 6))
    labels[0, 4:] = -100  # a shorter answer
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = distiller.compute_loss(source, labels, torch.ones_like(source))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

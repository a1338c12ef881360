"""Encoders: DistilBERT's three losses on masked words, then a head that tells classes, from a BERT to a smaller one.

python examples/encoder_distillation.py
"""

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from mohawk import HiddenMatch, KnowledgeDistiller, match_hidden

MASK = 4  # the id of the mask token


def tiny_bert(kind, layers: int, **more):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": layers}
    return kind(
        BertConfig(
            vocab_size=64,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **shape,
            **more,
        )
    )


def trained(distiller, inputs, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(distiller.student.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = distiller.compute_loss(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    ids = torch.randint(5, 64, (4, 16))
    masked = torch.rand(ids.shape) < 0.3
    masked[:, 0] = True
    inputs = {"input_ids": ids.masked_fill(masked, MASK), "labels": ids.masked_fill(~masked, -100)}
    words = KnowledgeDistiller(
        tiny_bert(BertForMaskedLM, 4), tiny_bert(BertForMaskedLM, 2),
        task="masked_lm", temperature=2.0, kd_weight=5.0, ce_weight=2.0, kd_on="all",
        matchings={"hidden": match_hidden(HiddenMatch([(1, 3)], 32, 32, loss="cosine"))},
    )  # fmt: skip
    losses = trained(words, inputs, steps)

    classes = {"num_labels": 3}
    told = KnowledgeDistiller(
        tiny_bert(BertForSequenceClassification, 4, **classes),
        tiny_bert(BertForSequenceClassification, 2, **classes),
        task="classification", temperature=2.0, ce_weight=0.5,
    )  # fmt: skip
    losses += trained(told, {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}, steps)
    print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()

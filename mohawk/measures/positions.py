"""Perplexity by position in a long text: does a student that was trained on short rows go on as well in long ones?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohawk.losses.heads import Head
from mohawk.measures.compare import ROWS, exp, packed_hidden_states

if TYPE_CHECKING:
    from mohawk.loading.causal import CausalLM

FIRST = 128  # tokens in the first bin; each further one ends at twice where the one before it does


@torch.no_grad()
def nll_by_position(model: CausalLM, rows: Tensor) -> Tensor:
    """Mean -log p of the token at each position but the first, float64 (n - 1,), nats; rows: token ids (rows, n), each
    one text from its position 0 on. A row at a time, a few hundred rows of logits at a time."""
    head = Head.of(model).frozen()
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    for row in rows:
        batch = {"input_ids": row[None], "position_ids": torch.arange(len(row))[None]}
        hidden, targets = packed_hidden_states(model, batch, device=model.device)[0, :-1], row[1:].to(model.device)
        for start in range(0, len(targets), ROWS):
            part = slice(start, start + ROWS)
            logprobs = head.logits(hidden[part]).log_softmax(-1)
            total[part] -= logprobs.gather(1, targets[part, None])[:, 0].double().cpu()
    return total / len(rows)


def by_position(models: Mapping[str, CausalLM], rows: Tensor) -> list[dict[str, Any]]:
    """Perplexities of teacher and student in bins of positions: [{"first", "last", "tokens", "teacher", "student",
    "ratio"}], positions from 1, both ends within. rows: as of `nll_by_position`."""
    found = {who: nll_by_position(model, rows) for who, model in models.items()}
    bins, start, length = [], 1, rows.shape[1]
    while start < length:
        end = min(length, max(FIRST, 2 * start))
        mean = {who: float(nll[start - 1 : end - 1].mean()) for who, nll in found.items()}
        told = {"first": start, "last": end - 1, "tokens": len(rows) * (end - start)}
        told |= {who: exp(value) for who, value in mean.items()}
        bins.append(told | {"ratio": exp(mean["student"] - mean["teacher"])})
        start = end
    return bins

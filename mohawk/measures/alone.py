"""How well a student predicts a text by itself, where no teacher can be compared with it token by token: there is none,
or its tokens are others.

Bits per byte compare models whatever their tokens are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohawk.core.processes import from_all
from mohawk.data.next_tokens import IGNORED, next_labels
from mohawk.data.tokenizers.token_bytes import TokenBytes
from mohawk.errors import UserError
from mohawk.losses.aligned import AlignedTeacher, likelihoods
from mohawk.losses.heads import Head
from mohawk.losses.teachers import ModelTeacher
from mohawk.measures.compare import ROWS, dealt_batches, evaluating, exp, packed_hidden_states
from mohawk.models.sharding import reshard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM


@dataclass(frozen=True)
class TextRows:
    """An evaluation text, of which each process has its share of the batches.

    batches: as `collate` gives them. tokens: how many are predicted, on all processes together. sizes: int64 (ids), how
    many bytes each token is; None where the tokenizer does not say. teacher_bits_per_byte: of an aligned teacher.
    """

    batches: list[dict[str, Tensor]]
    tokens: int
    sizes: Tensor | None = None
    teacher_bits_per_byte: float | None = None


@dataclass(frozen=True)
class Alone:
    """A student's figures on a text.

    tokens: how many were predicted. bits_per_byte: None where bytes are not known. student_accuracy: the share of
    tokens that were the most probable, whose mean probability is student_confidence. teacher_bits_per_byte: of a
    teacher with another tokenizer, on what both tokenizations have in common.
    """

    tokens: int
    student_perplexity: float
    bits_per_byte: float | None
    student_accuracy: float
    student_confidence: float
    teacher_bits_per_byte: float | None = None


def text_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    teacher: CausalLM | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    autocast: torch.dtype | None = None,
) -> TextRows:
    """A packed dataset's rows, and what an aligned teacher's bits per byte are on them; all processes do so.

    Raises UserError when the dataset predicts no token.
    """
    batches = list(dealt_batches(dataset, batch_size))
    tokens = sum(from_all(sum(int((next_labels(batch) != IGNORED).sum()) for batch in batches)))
    if not tokens:
        raise UserError("evaluation: the text predicts no token; give at least two tokens of it")
    try:
        known = TokenBytes(tokenizer, "student")
        sizes = torch.tensor([0 if i in known.special else len(text) for i, text in enumerate(known.of)])
    except UserError:  # whose tokens are no bytes of the text
        sizes = None
    if teacher is None or teacher_tokenizer is None or sizes is None:
        return TextRows(batches, tokens, sizes)
    aligned = AlignedTeacher(ModelTeacher(teacher), teacher_tokenizer, tokenizer)
    nats, count = 0.0, 0
    for batch in batches:
        here = {name: column.to(teacher.device) for name, column in batch.items()}
        with torch.no_grad(), torch.autocast(teacher.device.type, dtype=autocast, enabled=autocast is not None):
            ((answer),) = aligned(here)
            found, ids = likelihoods(answer.source)
        nats -= float(found.double().sum())
        count += int(sizes[ids.cpu()].sum())
    reshard(teacher)
    nats, count = (sum(values) for values in zip(*from_all((nats, count)), strict=True))
    return TextRows(batches, tokens, sizes, nats / math.log(2) / count if count else None)


@torch.no_grad()
def alone(student: CausalLM, rows: TextRows, *, autocast: torch.dtype | None = None) -> Alone:
    """A student's figures on a text, by all processes together."""
    device = student.device
    reshard(student)
    head, sums = Head.of(student).frozen(), torch.zeros(4, dtype=torch.float64)
    with evaluating(student):
        for batch in rows.batches:
            hidden = packed_hidden_states(student, batch, device=device, autocast=autocast)
            labels = next_labels(batch)
            predicting = labels != IGNORED
            states, targets = hidden[predicting.to(device)], labels[predicting].to(device)
            for start in range(0, len(targets), ROWS):
                part = slice(start, start + ROWS)
                logprobs = head.logits(states[part]).log_softmax(-1)
                top, first = logprobs.max(-1)
                figures = (-logprobs.gather(1, targets[part, None])[:, 0], first == targets[part], top.exp())
                sums[:3] += torch.stack([column.double().sum() for column in figures]).cpu()
            if rows.sizes is not None:
                sums[3] += rows.sizes[labels[predicting]].sum()
    reshard(student)
    nats, right, confidence, count = _added(from_all(sums.tolist()))
    return Alone(
        tokens=rows.tokens,
        student_perplexity=exp(nats / rows.tokens),
        bits_per_byte=nats / math.log(2) / count if count else None,
        student_accuracy=right / rows.tokens,
        student_confidence=confidence / rows.tokens,
        teacher_bits_per_byte=rows.teacher_bits_per_byte,
    )


def _added(each: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*each, strict=True)]

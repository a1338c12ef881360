"""Key-value recall: can a model say a value again that its context gave for a key?

What a state of fixed size does worst. Text in which everything must be looked up in the context, after the multi-query
associative recall of Zoology (arXiv 2312.04927), in words of English so that trained models know what to do: a list of
`key: value` lines, then the same lines in another order, whose values the model is to give.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED
from mohawk.errors import UserError
from mohawk.losses.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS = 16  # in a list
WORDS = (
    "apple arm army baby bag ball bank bear bed bell bird boat body bone book box boy bread bridge brother bus camp "
    "car card cat chair church city class clock cloud coat corn cow cup desk doctor dog door ear egg engine eye face "
    "farm father field film finger fire fish floor flower food foot forest game garden girl glass gold grass gun hair "
    "hand hat heart hill horse hotel house ice iron island judge key king kitchen lake lamp leg letter lion map milk "
    "moon mother mountain mouth music neck nose ocean oil paper park phone picture plant queen rain ring river road "
    "rock roof room rose salt school sea shirt shoe shop silver skin sky snow song star stone street sugar sun table "
    "tea town train tree valley village wall war watch water wind window wine winter wood"
).split()


@dataclass(frozen=True)
class Recall:
    """accuracy: share of values of which every token is the most probable one, given those before it.
    loss: mean -log p of the values' tokens, nats. values: how many were asked for."""

    accuracy: float
    loss: float
    values: int


def recall_batches(
    tokenizer: PreTrainedTokenizerBase, tokens: int, *, batch_size: int = 8, seed: int = 0
) -> list[dict[str, Tensor]]:
    """About `tokens` tokens of lists with their repetitions (at least one), one a row.

    Batches as `mohawk.data.packing.collate` makes them, rows padded on the right, but with labels at the tokens of the
    values to be recalled alone, and `values` (b, n): which of the row's values a token is of, -1 elsewhere. Raises
    UserError for a tokenizer that does not say where its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("recall: this tokenizer gives no offsets; it needs a fast one (a tokenizer.json)")
    shuffler, rows = random.Random(seed), []
    while sum(len(ids) for ids, _ in rows) < tokens:
        rows.append(_row(tokenizer, shuffler))
    return [_collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _row(tokenizer: PreTrainedTokenizerBase, shuffler: random.Random) -> tuple[list[int], list[int]]:
    """(token ids, for each the index of the repeated value it belongs to or -1)."""
    words = shuffler.sample(WORDS, 2 * PAIRS)
    pairs = list(zip(words[:PAIRS], words[PAIRS:], strict=True))
    text = "".join(f"{key}: {value}\n" for key, value in pairs)
    spans = []
    for key, value in shuffler.sample(pairs, PAIRS):
        text += f"{key}: "
        spans.append((len(text), len(text) + len(value), len(spans)))
        text += f"{value}\n"
    return as_row(tokenizer, text, spans)


def as_row(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int, int]]
) -> tuple[list[int], list[int]]:
    """(token ids of a text, for each the index of the value it belongs to or -1). spans: of each value its first
    character, the one past its last, and its index; in the text's order."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    values, at = [], 0
    for first, last in encoded["offset_mapping"]:
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        begin, end, index = spans[at] if at < len(spans) else (last, last, -1)
        values.append(index if first < end and last > begin else -1)
    return list(encoded["input_ids"]), values


def _collate(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    # any id fills a row, since padding is masked everywhere
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch |= {
        name: torch.full(shape, fill) for name, fill in (("segment_ids", -1), ("labels", IGNORED), ("values", -1))
    }
    for row, (ids, values) in enumerate(rows):
        n = len(ids)
        batch["input_ids"][row, :n], batch["values"][row, :n] = torch.tensor(ids), torch.tensor(values)
        batch["segment_ids"][row, :n] = 0
        batch["position_ids"][row, :n] = torch.arange(n)
        batch["position_ids"][row, n:] = torch.arange(shape[1] - n)
    asked = batch["values"] >= 0
    batch["labels"][asked] = batch["input_ids"][asked]
    return batch


@torch.no_grad()
def recall_of(hidden: Iterable[Tensor], batches: Iterable[dict[str, Tensor]], head: Head) -> Recall:
    """What final hidden states (b, n, D), a tensor a batch, recall of `recall_batches`."""
    right, loss, tokens = [], 0.0, 0
    for states, batch in zip(hidden, batches, strict=True):
        values = batch["values"][:, 1:].to(states.device)
        labels = batch["labels"][:, 1:].to(states.device)
        asked = values >= 0
        logprobs = head.logits(states[:, :-1][asked]).log_softmax(-1)
        targets = labels[asked]
        loss -= logprobs.gather(1, targets[:, None]).double().sum().item()
        tokens += len(targets)
        # one number for each value of each row, then whether all of its tokens were right
        row = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
        _, which = (row * PAIRS + values)[asked].unique(return_inverse=True)
        wrong = torch.zeros(int(which.max()) + 1, device=values.device)
        right.append(wrong.index_add(0, which, (logprobs.argmax(-1) != targets).float()) == 0)
    found = torch.cat(right)
    return Recall(accuracy=found.double().mean().item(), loss=loss / tokens, values=len(found))

"""Retrieval over lengths and depths: can a model say what stood anywhere in a long text?

Each text hides a few sentences, `The code of <two words> is <word>.`, at each of some depths, and asks for all of them
at its end, in another order. In `needle` texts they stand among sentences about nothing (as in the passkey test of
Mohtashami and Jaggi, arXiv 2305.16300), in `pairs` texts among more sentences of their own kind, which a state of fixed
size must all keep apart. An answer is right where each of its tokens is the most probable one, given those before it.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mohawk.losses.heads import Head
from mohawk.measures.compare import packed_hidden_states
from mohawk.measures.recall import WORDS, as_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

KINDS = {"needle": "among sentences about nothing", "pairs": "among others of their kind"}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the text before the questions
HIDDEN = 4  # sentences at each depth
SHORTEST = 512  # tokens
FILLER = (
    "The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ",
)  # fmt: skip

Row = tuple[list[int], list[int]]  # token ids, for each the index of the answer it is of or -1


def lengths_to(longest: int) -> list[int]:
    """SHORTEST, twice that, and so on, up to the longest."""
    return [SHORTEST * 2**i for i in range(max(0, (longest // SHORTEST).bit_length()))]


def haystacks(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, rows: int, seed: int = 0) -> list[Row]:
    """Texts of at most `length` tokens; the answer i of each was hidden at depth i // HIDDEN of DEPTHS. Empty where the
    tokenizer makes so many tokens of a sentence that a text does not hold them all."""
    shuffler, made = random.Random(f"{kind} {length} {seed}"), []
    for _ in range(rows):
        if (row := _haystack(tokenizer, kind, length, shuffler)) is None:
            return []
        made.append(row)
    return made


def _haystack(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, shuffler: random.Random) -> Row | None:
    def sentence(key: tuple[str, str], value: str) -> str:
        return f"The code of {key[0]} {key[1]} is {value}. "

    keys = shuffler.sample([(a, b) for a in WORDS for b in WORDS if a != b], len(WORDS) * 20)
    hidden = [(key, shuffler.choice(WORDS)) for key in keys[: HIDDEN * len(DEPTHS)]]
    others = [sentence(key, shuffler.choice(WORDS)) for key in keys[len(hidden) :]] if kind == "pairs" else FILLER
    order = shuffler.sample(range(len(hidden)), len(hidden))

    def text_of(fillers: int) -> tuple[str, list[tuple[int, int, int]]]:
        lines = [others[i % len(others)] for i in range(fillers)]
        groups = [hidden[d * HIDDEN : (d + 1) * HIDDEN] for d in range(len(DEPTHS))]
        for depth, group in sorted(zip(DEPTHS, groups, strict=True), reverse=True):
            at = round(depth * fillers)
            lines[at:at] = [sentence(key, value) for key, value in group]
        text, spans = "".join(lines) + "\n", []
        for i in order:
            (first, second), value = hidden[i]
            text += f"The code of {first} {second} is "
            spans.append((len(text), len(text) + len(value), i))
            text += f"{value}. "
        return text, spans

    low, high = -1, length  # as many sentences as fit
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(tokenizer(text_of(middle)[0])["input_ids"]) <= length
        low, high = (middle, high) if fits else (low, middle)
    return None if low < 0 else as_row(tokenizer, *text_of(low))


@torch.no_grad()
def found_by(model: CausalLM, rows: Sequence[Row]) -> list[list[bool]]:
    """Of each row, which answers a model gives. One row at a time, logits of the answers' tokens alone."""
    head, found = Head.of(model).frozen(), []
    for ids, answers in rows:
        row = torch.tensor([ids])
        batch = {"input_ids": row, "position_ids": torch.arange(len(ids))[None]}
        hidden = packed_hidden_states(model, batch, device=model.device)[0, :-1]
        of = torch.tensor(answers[1:])
        asked = of >= 0
        top = head.logits(hidden[asked.to(hidden.device)]).argmax(-1).cpu()
        right = torch.ones(HIDDEN * len(DEPTHS), dtype=torch.bool)
        right[of[asked][top != row[0, 1:][asked]]] = False
        found.append(right.tolist())
    return found


def retrieval(
    models: Mapping[str, CausalLM], tokenizers: Mapping[str, PreTrainedTokenizerBase], lengths: Sequence[int]
) -> dict[str, Any]:
    """Teacher and student on the same texts: {kind: {"lengths", "depths", "asked", "teacher", "student", "difference",
    "difference_error"}}.

    teacher, student: the share of answers that are right, for each length a list over depths. asked: for each length,
    how many of each depth. difference: student less teacher over all answers, with the standard error of paired
    differences. A kind that no length holds is left out.
    """
    made = {}
    for kind in KINDS:
        told: dict[str, Any] = {"lengths": [], "depths": list(DEPTHS), "asked": [], "teacher": [], "student": []}
        differences: list[int] = []
        for length in lengths:
            count = max(2, max(lengths) // length)
            rows = {who: haystacks(tokenizers[who], kind, length, count) for who in models}
            if not all(rows.values()):
                continue
            right = {who: found_by(models[who], rows[who]) for who in models}
            told["lengths"].append(length)
            told["asked"].append(count * HIDDEN)
            for who in models:
                by_depth = [[row[d * HIDDEN : (d + 1) * HIDDEN] for row in right[who]] for d in range(len(DEPTHS))]
                told[who].append([statistics.fmean(sum(rows, [])) for rows in by_depth])
            pairs = zip(sum(right["teacher"], []), sum(right["student"], []), strict=True)
            differences += [student - teacher for teacher, student in pairs]
        if differences:
            told["difference"] = statistics.fmean(differences)
            told["difference_error"] = statistics.stdev(differences) / math.sqrt(len(differences))
            made[kind] = told
    return made

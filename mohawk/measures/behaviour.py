"""What whole models do beyond the likelihood of short texts: what they find again in long ones, how they go on in them,
what they write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mohawk.loading.causal import context_length
from mohawk.measures.compare import evaluating
from mohawk.measures.positions import by_position
from mohawk.measures.retrieval import lengths_to, retrieval
from mohawk.measures.written import written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

PROMPTS = 8
PROMPT = 32  # tokens


def behaviour(
    models: Mapping[str, CausalLM],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    texts: Mapping[str, Tensor],
    *,
    longest: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Of `teacher` and `student`: `retrieval`, `positions` by the text's name, `written`, as the modules of these names
    give them.

    texts: rows of token ids (rows, n) by the text's name; none where the models' tokenizers are not the same. longest:
    the longest text, which no model goes beyond that has fewer positions.
    """
    longest = min(longest, *(_positions(model, longest) for model in models.values()))
    with evaluating(models["teacher"]), evaluating(models["student"]):
        found: dict[str, Any] = {"retrieval": {}, "positions": {}, "written": {}}
        if all(getattr(tokenizer, "is_fast", False) for tokenizer in tokenizers.values()):
            found["retrieval"] = retrieval(models, tokenizers, lengths_to(longest))
        for name, rows in texts.items():
            found["positions"][name] = by_position(models, rows[:, :longest])
        if texts:
            prompts = prompts_of(list(texts.values())[-1][:, :longest])
            found["written"] = written(models, tokenizers["teacher"], prompts, new_tokens)
    return found


def prompts_of(rows: Tensor) -> Tensor:
    """Up to PROMPTS pieces of rows of tokens, evenly spread over them, each of PROMPT tokens or all of a row."""
    length = min(PROMPT, rows.shape[1])
    pieces = rows[:, : rows.shape[1] // length * length].reshape(-1, length)
    return pieces[:: -(-len(pieces) // PROMPTS)]


def _positions(model: CausalLM, otherwise: int) -> int:
    """How many tokens a model's positions are for."""
    return context_length(model) or otherwise

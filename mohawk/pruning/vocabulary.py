"""A vocabulary trimmed to a corpus: fewer rows in embedding and head, and a tokenizer that knows the new ids.

For tokenizers whose model is byte pair encoding, which every supported family's is. A corpus is cut into the very
tokens it was before: BPE applies the earliest merge it can, again and again, and all merges that made a kept token
stay, with the tokens in between. Other text is cut into smaller pieces, down to bytes or characters, which all stay.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from mohawk.models.cutting.cuts import Cut, check_indices, cut
from mohawk.models.families import check_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 256  # texts tokenised at once
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A model and tokenizer of fewer tokens. tokens[i] is the id that token i had before."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: list[int]


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    *,
    ids: Sequence[int] | None = None,
) -> TrimmedVocabulary:
    """Keep the tokens that texts are made of, or given ones, and drop the others' rows.

    Kept besides: added and special tokens, those that the model's configuration and generation settings name, bytes
    (byte-level or fallback; without either all single characters), and the tokens out of which kept ones are merged.

    Args:
        model: a causal LM of a supported family or a hybrid; left as it was.
        tokenizer: its own, a fast one with a BPE model; left as it was.
        texts: read once. ids: token ids instead, or besides.

    Raises:
        ValueError: neither texts nor ids, ids out of range, or a tokenizer that cannot be trimmed, and why.
    """
    tokens = tokens_to_keep(model, tokenizer, texts, ids=ids)
    return TrimmedVocabulary(cut(model, Cut(tokens=tokens)), trim_tokenizer(tokenizer, tokens), tokens)


def tokens_to_keep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    *,
    ids: Sequence[int] | None = None,
) -> list[int]:
    """The ids, ascending, that `trim_vocabulary` keeps; arguments and errors are its own."""
    reasons = reasons_to_keep(model, tokenizer, texts, ids=ids)
    return sorted(token for tokens in reasons.values() for token in tokens)


def reasons_to_keep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    *,
    ids: Sequence[int] | None = None,
) -> dict[str, list[int]]:
    """`tokens_to_keep`, each id once, by the first reason there is: in the words in which a reader is told."""
    check_causal_lm(model, "cut")
    if texts is None and ids is None:
        raise ValueError("trim_vocabulary: give texts, ids or both")
    state = _state(tokenizer)
    vocabulary = state["model"]["vocab"]
    rows = model.config.vocab_size
    highest = max([*vocabulary.values(), *(token["id"] for token in state["added_tokens"])])
    if highest >= rows:
        raise ValueError(
            f"trim_vocabulary: the tokenizer has ids up to {highest}, the model's embedding {rows} rows; give the "
            "model's own tokenizer"
        )
    wanted = set() if ids is None else set(check_indices("ids", sorted(set(ids)), rows))
    for batch in _batches(texts or ()):
        wanted.update(token for row in tokenizer(batch)["input_ids"] for token in row)
    special = {token["id"] for token in state["added_tokens"]} | {i for i in _special_ids(model) if 0 <= i < rows}
    if (unknown := state["model"].get("unk_token")) in vocabulary:
        special.add(vocabulary[unknown])
    reasons = {"asked for": wanted, "special or added": special, "bytes or characters": _alphabet(state)}
    kept = set().union(*reasons.values())
    reasons["parts that longer ones are merged from"] = _ingredients(state["model"], kept)
    found, told = set(), {}
    for reason, tokens in reasons.items():
        told[reason] = sorted(tokens - found)
        found |= tokens
    return told


def told_reasons(reasons: Mapping[str, Sequence[int]]) -> str:
    """How many are kept and why: `11,093 tokens: 8,000 asked for, 17 special or added, ...`."""
    parts = ", ".join(f"{len(tokens):,} {reason}" for reason, tokens in reasons.items() if tokens)
    return f"{sum(map(len, reasons.values())):,} tokens: {parts}"


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with these tokens only, numbered in ascending order of their ids.

    Raises:
        ValueError: as `trim_vocabulary`, or when an added token would go.
    """
    state = _state(tokenizer)
    new_id = {old: new for new, old in enumerate(sorted(tokens))}
    kept = {token: new_id[old] for token, old in state["model"]["vocab"].items() if old in new_id}
    state["model"]["vocab"] = kept
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if {*pair, "".join(pair)} <= kept.keys()
    ]  # in their order, which is their rank
    for token in state["added_tokens"]:
        if token["id"] not in new_id:
            raise ValueError(f"tokens: the added token {token['content']!r} ({token['id']}) would go; keep it")
        token["id"] = new_id[token["id"]]
    _renumber(state["post_processor"], new_id)
    if isinstance(state.get("padding"), dict) and state["padding"]["pad_id"] in new_id:
        state["padding"]["pad_id"] = new_id[state["padding"]["pad_id"]]
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return trimmed


def check_trimmable(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError, with the reason, where `trim_vocabulary` refuses a tokenizer."""
    _state(tokenizer)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json would hold, merges as pairs. ValueError: nothing that can be trimmed."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"trim_vocabulary: {type(tokenizer).__name__} has no tokenizer.json behind it; allowed: fast tokenizers"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"trim_vocabulary: got a tokenizer with a {model['type']} model; allowed: BPE")
    if odd := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]:
        raise ValueError(f"trim_vocabulary: got a BPE tokenizer with {odd[0]} {model[odd[0]]!r}; allowed: one without")
    _processors(state["post_processor"])
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    return state


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _special_ids(model: PreTrainedModel) -> set[int]:
    found = set()
    for settings in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def _alphabet(state: dict[str, Any]) -> set[int]:
    """Ids of the pieces that any text falls into at last: bytes as characters or as <0x..>, or characters."""
    vocabulary = state["model"]["vocab"]
    if state["model"].get("byte_fallback") and vocabulary.keys() >= _BYTES:
        # the mark of a space too: decoders put the space back before they join bytes
        return {vocabulary[token] for token in {*_BYTES, "▁"} & vocabulary.keys()}
    return {i for token, i in vocabulary.items() if len(token) == 1}  # of byte-level tokens these are the 256 bytes


def _ingredients(model: dict[str, Any], kept: set[int]) -> set[int]:
    """Ids of the tokens that BPE goes through to make the kept ones."""
    vocabulary = model["vocab"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    found: set[str] = set()
    for token in [token for token, i in vocabulary.items() if i in kept]:
        pieces, passed = list(token), set(token)
        while len(pieces) > 1:
            pairs = zip(pieces, pieces[1:], strict=False)
            best, at = min((rank.get(pair, len(rank)), at) for at, pair in enumerate(pairs))
            if best == len(rank):
                break  # not made by merges: a special token, or one that BPE takes whole (ignore_merges)
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            passed.add(pieces[at])
        if len(pieces) == 1:
            found |= passed
    return {vocabulary[token] for token in found if token in vocabulary}


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor's parts. ValueError: one that may hold ids nobody here knows of."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [part for one in processor["processors"] for part in _processors(one)]
    if processor["type"] not in ("TemplateProcessing", "RobertaProcessing", "BertProcessing", "ByteLevel"):
        raise ValueError(
            f"trim_vocabulary: got a tokenizer with a {processor['type']} post-processor; allowed: TemplateProcessing, "
            "RobertaProcessing, BertProcessing, ByteLevel, or a Sequence of them"
        )
    return [processor]


def _renumber(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    for part in _processors(processor):
        for special in (part.get("special_tokens") or {}).values():
            special["ids"] = [new_id[i] for i in special["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name][1] = new_id[part[name][1]]

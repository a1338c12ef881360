"""Whether two models read the same ids as the same text.

Distillation hands one model's ids to another. Vocabularies of one size, or the larger of two, say nothing about what
the ids mean: tokenizers are compared token by token, by what special ones are for, and by how they cut text.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.data.text import tokenizer_key
from mohawk.errors import UserError
from mohawk.loading.configs import load_config, locate, said_of
from mohawk.loading.models import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any of them beside a model is a tokenizer of its own.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
ROLES = ("eos", "bos", "unk", "pad")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of tokens that were added, special ones among them
ADVICE = "ids would mean other words to it; give a model of the same tokenizer"
# What normalisers, pre-tokenizers and merges treat differently: cases, accents composed and not, scripts with and
# without spaces, digits, white space, code, emoji of several code points, full-width and zero-width characters.
SAMPLE = (
    "The quick brown fox jumps over the lazy dog; it's 3.14159 or 1,000,000 -- isn't it?",
    "  Two  spaces,\ttabs\n\n    def f(x): return x**2  # comment\r\n",
    "Ünïcödé, naïve café, cafe\u0301, Straße, İstanbul, ﬁn, ½, №, …",
    "Быстрая лиса перепрыгнула через ленивую собаку. Ταχεία αλώπηξ.",
    "敏捷的棕色狐狸跳过懒狗。すばしこい茶色の狐。 날쌘 갈색 여우가 뛰어넘는다.",
    "قفز الثعلب البني السريع فوق الكلب الكسول. השועל החום המהיר קפץ.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। สุนัขจิ้งจอกสีน้ำตาล",
    "👩‍👩‍👧 🇪🇺 ＡＢＣ１２３ zero\u200bwidth non\u00a0breaking 2024-05-17T09:41:00Z https://example.org/a_b?c=%20",
    "IT'S, WE'LL; don’t! ``quoted'' text ... --- C++ #a $5 10% snake_case getHTTPResponse iPhone 7\n",
    "1 12 123 1234 12345 123456789012 3.0 0x1F 4GB\n\n\n\ta.\n/b //c\n\n  d;\n    e()  \n" + "verylong" * 16,
)
CHANGED, NEIGHBOURS = 2000, 16  # merges that two tokenizers rank otherwise, and others beside each, that are tried


def teacher_tokenizer(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    who: str = "teacher",
    option: str = "teacher.tokenizer",
    **where: Any,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, or the one named instead, which has to read the model's ids as its own does.

    who, option: what messages call the model, and what names a tokenizer. where: gguf_file, revision,
    trust_remote_code, as of `load_config`.

    Raises:
        UserError: as `load_config` and `load_tokenizer`; the tokenizer has ids that the model has no embedding of, or
            is another one than the model's own.
    """
    rows = load_config(model, who=who, **where).get_text_config().vocab_size
    found = load_tokenizer(model, tokenizer=tokenizer, who=who, option=option, **where)
    if tokenizer is not None and (own := own_tokenizer(model, who=who, **where)) is not None:
        check_same(own, found, f"{option}: {tokenizer}", f"{model}'s own", roles=False)
    if tokenizer is None:
        check_embedding_rows(found, rows, f"{said_of(who)}{model}")
    else:
        check_embedding_rows(found, rows, f"{option}: {tokenizer}", "it")
    return found


def own_tokenizer(model: str | Path, *, who: str = "teacher", **where: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None for a model without one."""
    name, gguf_file = locate(model, where.get("gguf_file"), who)
    if gguf_file is None:
        folder = Path(name)
        there = any((folder / file).is_file() for file in FILES) if folder.is_dir() else _on_hub(name, where)
        if not there:
            return None
    return load_tokenizer(model, who=who, **where)


def _on_hub(name: str, where: dict[str, Any]) -> bool:
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, revision=where.get("revision"), **quiet) is not None for file in FILES)


def check_embedding_rows(tokenizer: PreTrainedTokenizerBase, rows: int, who: str, whose: str = "its tokenizer") -> None:
    """UserError where a tokenizer has ids that an embedding of so many rows does not."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if highest >= rows:
        raise UserError(
            f"{who}: {whose} has ids up to {highest} ({token!r}), the model's embedding only {rows} rows, 0 to "
            f"{rows - 1}; give a model and a tokenizer that belong together, or one whose embedding was enlarged"
        )


def check_same(
    teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, who: str, than: str = "the teacher's", *,
    roles: bool = True,
) -> None:  # fmt: skip
    """UserError, with the first difference, unless both tokenizers read the ids that both have as the same text.

    Ids that only one of them has make no difference, nor do rows of embeddings beyond both. Added tokens are compared
    by how they are looked for in a text too. who: whose `other` is, as messages begin. than: whose `teacher` is. roles:
    also compare which id is eos, bos, unk and pad; one that either does not have is no difference, but for eos, which
    ends documents.
    """
    wrong = _difference(teacher, other) if tokenizer_key(teacher) != tokenizer_key(other) else None
    if wrong is None:
        wrong = _other_flags(teacher, other)
    if wrong is None and roles:
        wrong = _other_role(teacher, other)
    if wrong is not None:
        raise UserError(f"{who}: its tokenizer is another one than {than}: {wrong}")


def _difference(teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first id that is another token, or the first text that is cut otherwise."""
    theirs, ours = ({i: token for token, i in t.get_vocab().items()} for t in (teacher, other))
    both = sorted(theirs.keys() & ours.keys())
    if not both:
        return f"they have no id in common; {ADVICE}"
    for i in both:
        if theirs[i] != ours[i]:
            return f"id {i} is {theirs[i]!r} there and {ours[i]!r} here; {ADVICE}"
    texts = list(SAMPLE)
    if getattr(teacher, "is_fast", False) and getattr(other, "is_fast", False):
        # each token's own text goes through all the merges that make it; a hundred thousand take seconds
        texts += teacher.backend_tokenizer.decode_batch([[i] for i in both], skip_special_tokens=False)
        there, here = (json.loads(t.backend_tokenizer.to_str())["model"] for t in (teacher, other))
        if (odd := _other_score(there, here)) is not None:
            return odd
        texts += teacher.backend_tokenizer.decode_batch(list(_around_changed_merges(there, here)))
    cut = [
        t(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for t in (teacher, other)
    ]
    for text, there, here in zip(texts, *cut, strict=True):
        if there != here:
            at = next((k for k, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(there), len(here)) if at is None else at
            names = [t.convert_ids_to_tokens(ids[at : at + 3]) for t, ids in ((teacher, there), (other, here))]
            cut_so = f"{text[:40]!r} is cut into ... {names[0]} there and {names[1]} here"
            return f"all tokens are alike, but {cut_so}; {ADVICE}"
    return None


def _other_score(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first token of two Unigram models whose scores, by which text is cut, are others."""
    if not there["type"] == here["type"] == "Unigram":
        return None
    ours = dict(here["vocab"])
    for token, score in there["vocab"]:
        if abs(ours.get(token, score) - score) > 1e-3:
            return (
                f"all tokens are alike, but {token!r} has the score {score:g} there and {ours[token]:g} here, so that "
                f"text is cut otherwise; {ADVICE}"
            )
    return None


def _around_changed_merges(there: dict[str, Any], here: dict[str, Any]) -> Iterator[list[int]]:
    """Ids of tokens, side by side, that two BPE models may merge otherwise: those of merges that one has alone, or
    ranks otherwise, by themselves, twice, and with tokens that other merges put beside them."""
    if not there["type"] == here["type"] == "BPE":
        return
    ids = there["vocab"]
    shared = ids.keys() & here["vocab"].keys()
    lists = []
    for model in (there, here):
        pairs = (tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
        lists.append([pair for pair in pairs if {*pair, "".join(pair)} <= shared])
    if lists[0] == lists[1]:
        return
    beside: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for merges in lists:
        for left, right in merges:
            for known, token, neighbour in ((beside[0], right, left), (beside[1], left, right)):
                found = known.setdefault(token, [])
                if len(found) < NEIGHBOURS and neighbour not in found:
                    found.append(neighbour)
    for left, right in sorted(_changed(*lists))[:CHANGED]:
        a, b = ids[left], ids[right]
        yield from ([a, b], [a, b, a, b])
        yield from ([ids[x], a, b] for x in beside[0].get(left, []))
        yield from ([a, b, ids[x]] for x in beside[1].get(right, []))


def _changed(there: list[Any], here: list[Any]) -> Collection[Any]:
    """What one list has alone, and what has to move for the others to be in one order."""
    place = {entry: i for i, entry in enumerate(here)}
    both = [entry for entry in there if entry in place]
    # the longest part that is in both orders: of its possible ends by length the earliest, and what came before each
    ends: list[int] = []
    last: list[int] = []
    before: list[int | None] = []
    for i, entry in enumerate(both):
        at = bisect_left(ends, place[entry])
        ends[at : at + 1], last[at : at + 1] = [place[entry]], [i]
        before.append(last[at - 1] if at else None)
    kept, i = set(), last[-1] if last else None
    while i is not None:
        kept.add(both[i])
        i = before[i]
    return (set(there) | set(here)) - kept


def _other_flags(teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first added token that both have, but look for in a text otherwise."""
    theirs, ours = (getattr(t, "added_tokens_decoder", {}) for t in (teacher, other))
    for i in sorted(theirs.keys() & ours.keys()):
        there, here, token = theirs[i], ours[i], theirs[i].content
        flag = next((flag for flag in FLAGS if getattr(there, flag) != getattr(here, flag)), None)
        if flag is None or flag == "normalized" and _found_alike(teacher, other, token):
            continue
        return (
            f"id {i}, {token!r}, has {flag} {getattr(there, flag)} there and {getattr(here, flag)} here, so that text "
            f"around it is cut otherwise; {ADVICE}"
        )
    return None


def _found_alike(teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether both tokenizers cut a text with a token in it alike, as normalisers may have it: one that does nothing to
    it makes no difference between a token that is looked for before it and one after."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token)  # NFKC brings it back
    texts = [f"a{t}b {t} c" for t in (token, token.upper(), token.lower(), wide)] + [token]
    there, here = (t(texts, add_special_tokens=False, verbose=False)["input_ids"] for t in (teacher, other))
    return there == here


def _other_role(teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    for role in ROLES:
        there, here = (getattr(t, f"{role}_token_id") for t in (teacher, other))
        if there != here and (role == "eos" or None not in (there, here)):
            names = [
                "none" if i is None else f"{i} ({t.convert_ids_to_tokens(i)!r})"
                for t, i in ((teacher, there), (other, here))
            ]
            return (
                f"{role} is {names[0]} there and {names[1]} here; if that is meant, name one tokenizer for both in "
                "teacher.tokenizer"
            )
    return None

"""Which bytes of a text each token stands for, and where two tokenizations of one text meet.

Three ways are known in which a vocabulary writes bytes down: byte-level BPE (each byte is a printable character), byte
fallback (`<0x0A>` for what has no token) and Metaspace (`▁` for a space; a text may get one in front). A tokenizer is
taken where the bytes of its tokens give a text back.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mohawk.data.tokenizers.same_tokenizer import SAMPLE
from mohawk.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WHOLE_TEXTS = "give a model whose tokenizer gives a text back as it was"

# A span: tokens [a, b) of one tokenization and [c, d) of the other are the same bytes.
Span = tuple[int, int, int, int]


class TokenBytes:
    """A tokenizer's tokens as bytes.

    Attributes:
        of: by id, the bytes that the token is in a text; of an added token those of its content.
        special: ids that stand for no text: bos, eos and the like.
        prefix: ids that the tokenizer puts in front of a text by itself.
        adds_space: whether it puts a space in front of a text that has none. adds_another: of one that has one, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, who: str):
        """Raises UserError where the bytes of tokens do not give back texts, which no alignment can then go by.

        who: whose tokenizer it is, as messages begin.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{who}: its tokenizer, {type(tokenizer).__name__}, does not say how it cuts text; {WHOLE_TEXTS}"
            )
        self.tokenizer = tokenizer
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        kinds = set(_kinds([parts.get("pre_tokenizer"), parts.get("decoder")]))
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()}
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
        self.of = [b""] * (max(vocabulary) + 1)
        for i, token in vocabulary.items():
            if i in added:
                self.of[i] = added[i].content.encode("utf-8", "surrogatepass")
            else:
                self.of[i] = _bytes_of(token, "ByteLevel" in kinds)
        self.prefix = _in_front(tokenizer)
        self.adds_space = self.written("a") == b" a"
        self.adds_another = self.written(" a") == b"  a"
        for text in SAMPLE:
            text = unicodedata.normalize("NFC", text)
            if (found := self.written(text)) not in (text.encode(), b" " + text.encode()):
                back = found.decode("utf-8", "replace").removeprefix(" " * (found[:1] == b" " and text[:1] != " "))
                at = max(0, len(os.path.commonprefix([text, back])) - 10)  # what is alike in front says nothing
                there, here = (shortened(repr(whole[at : at + 40]), 60) for whole in (text, back))
                raise UserError(
                    f"{who}: its tokenizer gives {there} back as {here}, so that its tokens cannot be aligned with "
                    f"another's by bytes; {WHOLE_TEXTS}"
                )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        if self.adds_another and text.startswith(" "):
            text = text[1:]  # which comes back as the space in front
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def written(self, text: str) -> bytes:
        """The bytes of a text's tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return b"".join(self.of[i] for i in ids)

    def pieces(self, ids: Sequence[int], text: bytes | None = None) -> list[bytes]:
        """The bytes of tokens. A space that the tokenizer put in front of `text`, which does not begin with one, is
        none of the first token's."""
        found = [self.of[i] for i in ids]
        if self.adds_space and found and found[0].startswith(b" ") and (text is None or not text.startswith(b" ")):
            found[0] = found[0][1:]
        return found


def _kinds(value: Any) -> Iterator[str]:
    """The types of all parts of a tokenizer's description."""
    if isinstance(value, dict):
        yield str(value.get("type"))
        yield from (kind for entry in value.values() for kind in _kinds(entry))
    elif isinstance(value, list):
        yield from (kind for entry in value for kind in _kinds(entry))


def _characters() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (Radford et al., 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


CHARACTERS = _characters()


def _bytes_of(token: str, byte_level: bool) -> bytes:
    if byte_level:
        known = [CHARACTERS.get(c) for c in token]
        return bytes(b for b in known if b is not None) if None not in known else token.encode()
    if (found := FALLBACK.fullmatch(token)) is not None:
        return bytes([int(found[1], 16)])
    return token.replace(SPACE, " ").encode("utf-8", "surrogatepass")


def _in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts in front of a text by itself."""
    with_special, plain = (
        tokenizer("a", add_special_tokens=special, return_attention_mask=False)["input_ids"]
        for special in (True, False)
    )
    for k in range(len(with_special) - len(plain) + 1):
        if with_special[k : k + len(plain)] == plain:
            return with_special[:k]
    return []


def shared_tokens(first: TokenBytes, second: TokenBytes, roles: dict[int, int]) -> list[tuple[int, int]]:
    """Pairs of ids, one of each tokenizer, that stand for the same bytes, ascending in the first; special tokens by
    `roles`. An id is in one pair at most."""

    def by_bytes(tokens: TokenBytes) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        names = tokens.tokenizer.convert_ids_to_tokens(list(range(len(tokens.of))))
        for i, text in enumerate(tokens.of):
            # a byte of its own may also be a token's whole text, by which texts are then cut
            if text and i not in tokens.special and (text not in found or FALLBACK.fullmatch(names[found[text]] or "")):
                found[text] = i
        return found

    ours, theirs = by_bytes(first), by_bytes(second)
    pairs = {ours[text]: theirs[text] for text in ours.keys() & theirs.keys()}
    taken = set(pairs.values())
    for i, j in roles.items():
        if j not in taken:
            pairs[i] = j
            taken.add(j)
    return sorted(pairs.items())


def special_roles(first: TokenBytes, second: TokenBytes) -> dict[int, int]:
    """The second tokenizer's id for each special token of the first: of the same role (bos, eos, pad), else of the same
    name."""
    names = {second.tokenizer.convert_ids_to_tokens(i): i for i in sorted(second.special)}
    found = {
        i: names[name] for i in sorted(first.special) if (name := first.tokenizer.convert_ids_to_tokens(i)) in names
    }
    for role in ("pad", "bos", "eos"):  # the last one counts where an id has several
        here, there = (getattr(tokens.tokenizer, f"{role}_token_id") for tokens in (first, second))
        if here is not None and there is not None:
            found[here] = there
    return found


def met_spans(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Span]:
    """Spans between where tokens of both sides end: (a, b, c, d), tokens [a, b) of ours and [c, d) of theirs.

    ours, theirs: the bytes of the tokens of a text. Where the two are not the same bytes, only what they have in common
    in front and behind is cut; a token without bytes belongs to what is in front of it, and to no span at the start.
    """
    left, right = b"".join(ours), b"".join(theirs)
    here, there = (np.cumsum([0, *map(len, side)]) for side in (ours, theirs))
    if left == right:
        return _between(here, there, 0, len(left))
    front = _in_common(left, right)
    behind = min(_in_common(left[::-1], right[::-1]), min(len(left), len(right)) - front)
    return _between(here, there, 0, front) + _between(here - here[-1], there - there[-1], -behind, 0)


def _between(ours: np.ndarray, theirs: np.ndarray, low: int, high: int) -> list[Span]:
    """Spans between the ends that both have from `low` to `high`. ours, theirs: 0 or less, then where tokens end."""
    cuts = np.intersect1d(ours, theirs)
    cuts = cuts[(cuts >= low) & (cuts <= high)]
    own, other = ([int(i) - 1 for i in np.atleast_1d(np.searchsorted(side, cuts, "right"))] for side in (ours, theirs))
    spans = zip(own, own[1:], other, other[1:], strict=False)
    return [(a, b, c, d) for a, b, c, d in spans if a < b and c < d]


def _in_common(left: bytes, right: bytes) -> int:
    """How many bytes two texts begin with alike."""
    most = min(len(left), len(right))
    differ = np.frombuffer(left[:most], np.uint8) != np.frombuffer(right[:most], np.uint8)
    return int(differ.argmax()) if differ.any() else most

"""What of an endpoint's requests and answers is secret, and text with it masked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MASK = "***"  # in the place of the key, and of what else looks like a secret, wherever text is kept or shown
LONG_KEY = 8  # one as long stands for itself wherever it is found; a shorter one only where it is a word of its own
# Of a field's name, the parts that say it holds a secret, and those that say a token or a key is of another kind.
SECRETS = frozenset(
    "token key keys apikey secret secrets password passwd passphrase pwd auth oauth authorization credential "
    "credentials bearer cookie cookies jwt".split()
)
NO_SECRETS = frozenset(
    "max min eos bos pad stop start end first last special ignore skip add cache sort primary logit logprob logprobs "
    "bias id ids type budget limit count return".split()
)
SPELLED = re.compile(r"(key|token|secret|password|passwd)$")  # apikey, authtoken
BEARER = re.compile(r"\b(bearer|basic)\s+\S+", re.I)


def any_of(secrets: set[str]) -> re.Pattern[str]:
    """Finds each of them, escaped in any way too, as in an address or in JSON; short ones where no letter or digit is
    beside, but for those of an escape before it (\\n, %3D)."""

    def found(text: str) -> str:
        if len(text) >= LONG_KEY:
            return _escaped_or_not(text)
        begin = r"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt])|(?<=%[0-9A-Fa-f]{2}))"
        return rf"{begin}{_escaped_or_not(text)}(?![A-Za-z0-9])"

    return re.compile("|".join(map(found, sorted(secrets, key=len, reverse=True))) or "(?!)")


def _escaped_or_not(text: str) -> str:
    """A pattern of the text, each character of it as it is or escaped: who quotes an address may leave some as they
    are, and JSON may escape any."""
    pattern = ""
    for character in text:
        escapes = [json.dumps(character)[1:-1], "".join(f"%{byte:02x}" for byte in character.encode())]
        units = character.encode("utf-16-be").hex()
        escapes.append("".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)))
        escapes += [f"\\{character}"] * (character in '"/\\')
        pattern += f"(?:{'|'.join(f'(?i:{re.escape(escape)})' for escape in escapes if escape != character)}"
        pattern += f"|{re.escape(character)})"
    return pattern


def without_secrets(value: Any) -> Any:
    """JSON with *** in the place of what stands under a secret's name, is a header's pair of one, or follows Bearer."""
    if isinstance(value, str):
        return BEARER.sub(rf"\1 {MASK}", value)
    if isinstance(value, list):
        head = value[0] if len(value) == 2 and isinstance(value[0], str) else ""
        if re.search("[-_]", head) and names_secret(head):  # a header
            return [value[0], MASK]
        return [without_secrets(entry) for entry in value]
    if isinstance(value, dict):
        pair = isinstance(name := value.get("name"), str) and names_secret(name)
        hidden = {k for k in value if names_secret(k) or pair and k == "value"}
        return {k: MASK if k in hidden and _hides(v) else without_secrets(v) for k, v in value.items()}
    return value


def secrets_in(value: Any) -> Iterator[str]:
    """The texts that `without_secrets` hides, wherever they stand under a secret's name."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _texts(v) if names_secret(k) else secrets_in(v)
    elif isinstance(value, list):
        for entry in value:
            yield from secrets_in(entry)


def names_secret(name: str) -> bool:
    """Whether a field of this name holds a secret: x-api-key, hfToken; not max_tokens (a count), eos_token."""
    parts = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    found = {part for part in parts if part in SECRETS or SPELLED.search(part)}
    return bool(found) and not (found <= {"token", "key", "keys"} and NO_SECRETS.intersection(parts))


def _hides(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value not in ("", [], {})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)

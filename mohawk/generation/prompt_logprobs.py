"""What an OpenAI-compatible endpoint says of a text that it is given: the likeliest tokens at each place of it.

Two ways are known to servers of /completions, both with a prompt of token ids. `prompt_logprobs` (vLLM) answers with
ids. `echo` with `logprobs` (vLLM, llama-cpp-python's server, early OpenAI models) answers with texts of tokens, or with
`token_id:...` where a server knows `return_tokens_as_token_ids`. The likeliest tokens of generated text alone
(llama.cpp's own server), or the likelihood of the text's own tokens alone (TGI), are not enough.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mohawk.data.records import Prompt
from mohawk.errors import UserError, shortened
from mohawk.generation.decoding import Decoding, Response
from mohawk.generation.endpoint import EndpointTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMS = ("prompt_logprobs", "echo")
OFFER = (
    "a server must answer /completions of token ids with prompt_logprobs (vLLM), or with echo and logprobs "
    "(llama-cpp-python's server)"
)
Likeliest = Mapping[int, float]  # log-probabilities by id


@dataclass(frozen=True)
class Scored(Response):
    """likeliest: what was expected in the place of each token but the first: the ids known, with log-probabilities."""

    likeliest: Sequence[Likeliest] = field(default=())


class PromptScorer(EndpointTeacher):
    """Asks for the `k` likeliest tokens at each place of given ids; `EndpointTeacher`'s arguments, and its tries again,
    limits and masking of keys. tokenizer: the model's. form: the way that the server knows, once `probe` found it."""

    form: str | None = None

    def __init__(self, url: str, model: str, tokenizer: PreTrainedTokenizerBase, k: int, **options: Any):
        super().__init__(url, model, Decoding(max_new_tokens=1), **options)
        self.tokenizer, self.k = tokenizer, k
        self._ids: dict[str, int] | None = None  # of texts that are one token's alone

    def probe(self, ids: Sequence[int]) -> None:
        """Find the way that the server knows, with a few ids; one that names fewer tokens than were asked for is told.
        Raises UserError where it knows none."""
        said = ""
        for form in FORMS:
            self.form = form
            found = self.ask(asked(ids, "the first row"), 0)
            if isinstance(found, Scored) and found.error is None:
                named = min(map(len, found.likeliest), default=self.k)
                if named < min(self.k, len(self.tokenizer)):
                    log.warning(
                        "endpoint: names %d tokens where the likeliest %d were asked for; all others count as equally "
                        "likely there: ask for so many with --k, or have the server give more", named, self.k,
                    )  # fmt: skip
                return
            said = said or found.error
        raise UserError(f"endpoint: {self.url} does not say how likely a prompt's tokens are ({said}); {OFFER}")

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": prompt.content, "max_tokens": 1, "temperature": 0.0}
        if self.form == "prompt_logprobs":
            body |= {"prompt_logprobs": self.k}
        else:
            body |= {"echo": True, "logprobs": self.k, "return_tokens_as_token_ids": True}
        return {name: value for name, value in {**body, **self.request}.items() if value is not None}

    def read(self, answer: Any, prompt: Prompt) -> Response:
        """The likeliest tokens in an answer; an error where the server left them out. Raises ValueError for an answer
        that is not what the API promises."""
        ids: Any = prompt.content
        try:
            choice = answer["choices"][0]
            found = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
            logprobs = choice.get("logprobs") or {}
            tops, own, texts = (logprobs.get(key) for key in ("top_logprobs", "token_logprobs", "tokens"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"no answer of the API: {shortened(self.masked(json.dumps(answer)), 120)}") from None
        if self.form == "prompt_logprobs":
            if found is None:
                return Response("", error="no prompt_logprobs in the answer")
            return Scored("", likeliest=self._places(found, ids, lambda key: int(key)))
        if tops is None or own is None or texts is None:
            return Response("", error="no top_logprobs of the echoed prompt in the answer")
        for given in (tops, own, texts):
            if not isinstance(given, list):
                raise ValueError(f"log-probabilities of a prompt: got {type(given).__name__}; allowed: a list")
        if min(len(tops), len(own), len(texts)) < len(ids):
            return Response("", error="the prompt is not echoed")
        known = self._known()
        echoed = [(_token_id(text, known), i) for text, i in zip(texts, ids, strict=False) if isinstance(text, str)]
        same = [there == i for there, i in echoed if there is not None]
        if 2 * sum(same) < len(same):  # single ones differ where a server strips a space
            raise ValueError("the prompt is echoed as other tokens; is this the model's tokenizer?")
        places = self._places(tops[: len(ids)], ids, lambda key: _token_id(key, known))
        for place, value, token in zip(places, own[1:], ids[1:], strict=False):
            place.setdefault(token, _number(value))  # which some servers leave out where it is unlikely
        return Scored("", likeliest=places)

    def _places(self, found: Any, ids: Sequence[int], id_of: Any) -> list[dict[int, float]]:
        if not isinstance(found, list) or len(found) != len(ids):
            raise ValueError(
                f"log-probabilities of {len(found) if isinstance(found, list) else 0} tokens for {len(ids)}"
            )
        places = []
        for entry in found[1:]:
            if not isinstance(entry, dict):
                raise ValueError(f"log-probabilities of a token: got {type(entry).__name__}; allowed: a mapping")
            place: dict[int, float] = {}
            for key, value in entry.items():
                try:
                    token = id_of(key)
                    if token is not None and token < 0:
                        raise ValueError
                except ValueError:
                    raise ValueError(f"a token's id: got {key[:40]!r}") from None
                if token is not None:
                    place[token] = _number(value.get("logprob") if isinstance(value, dict) else value)
            places.append(place)
        if self.form == "prompt_logprobs" and any(
            token not in place for place, token in zip(places, ids[1:], strict=True)
        ):
            raise ValueError("the log-probabilities are not of the ids that were sent; is this the model's tokenizer?")
        return places

    def _known(self) -> dict[str, int]:
        if self._ids is None:
            vocabulary = sorted(self.tokenizer.get_vocab().values())
            texts = self.tokenizer.backend_tokenizer.decode_batch([[i] for i in vocabulary], skip_special_tokens=False)
            self._ids, twice = {}, set()
            for i, text in zip(vocabulary, texts, strict=True):
                if text in self._ids or "\ufffd" in text:  # bytes of a character have no text of their own
                    twice.add(text)
                self._ids[text] = i
            for text in twice:
                del self._ids[text]
        return self._ids


def asked(ids: Sequence[int], where: str) -> Prompt:
    """Some ids as a request."""
    content: Any = [int(i) for i in ids]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Prompt(digest[:16], digest, content, where)


def _token_id(key: str, known: Mapping[str, int]) -> int | None:
    return int(key.removeprefix("token_id:")) if key.startswith("token_id:") else known.get(key)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or value != value or value > 0.01:  # NaN is not itself
        raise ValueError(f"a log-probability: got {json.dumps(value)[:40]}; allowed: a number up to 0")
    return float(value) if value > -1e300 else -math.inf

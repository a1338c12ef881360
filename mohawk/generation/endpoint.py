"""A teacher behind an OpenAI-compatible endpoint: several requests at once, answers in the prompts' order.

Only the standard library: one POST per answer, no streaming. What is worth another try is tried again with growing
pauses (a server's Retry-After holds all requests); what a user has to set right stops the run with one line.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any

from mohawk.core.json_files import parse_json
from mohawk.data.messages import Messages, as_messages
from mohawk.data.records import Prompt
from mohawk.errors import UserError, printable, shortened
from mohawk.generation.conversations import conversation
from mohawk.generation.deadline import DeadlineHttp, DeadlineHttps, DeadlineRequest, NoRedirect
from mohawk.generation.decoding import Decoding, Response, check_turns
from mohawk.generation.masking import LONG_KEY, MASK, any_of, secrets_in, without_secrets

log = logging.getLogger(__name__)

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # busy, overloaded or restarting
REFUSED = (400, 413, 422)  # of this prompt: too long, a content filter
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before the second try, and at most between tries
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more has no capacity for this run
ANSWER_TIME = 5  # times `timeout`: how long one answer may take in all, for a server that sends a byte now and then
LARGEST_ANSWER = 64 << 20  # bytes; log-probabilities take some 200 a token
SHORTEST_KEY = 4  # characters: a shorter one stands in any text by chance, and could not be masked
LARGEST_ERROR = 1 << 20  # bytes of an error's body that are read
ODD = 8  # prompts one after another that get no proper answer: then it is the server, and the run stops
AHEAD = 4  # requests under way and waiting to be written, per worker


class Stopped(Exception):
    """The run ended while a request waited for its next try."""


class EndpointTeacher:
    """Asks `url` for answers of `model`.

    url: the API's base, such as http://localhost:8000/v1. chat: /chat/completions, and a text is a user's message;
    otherwise /completions. turns: as of `LocalTeacher`; all needs chat. key_env: the environment variable with the key;
    where it is not set none is sent. request: further fields of every request (None removes one). concurrency: requests
    at once. timeout: seconds that a server may be silent; one answer may take five times as long in all. retries:
    further tries of one request. Raises UserError for a url or a key that cannot be.

    An answer that is not what the API promises is an error of that answer alone. The key stands nowhere in what comes
    out of here, even where a server echoes it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding,
        *,
        chat: bool = False,
        turns: str = "last",
        key_env: str | None = None,
        request: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
    ):
        if decoding.method == "beam":
            raise UserError("endpoint: the API has no beam search; use greedy decoding or sampling")
        base, path = base_url(url), "chat/completions" if chat else "completions"
        self.address = f"{base}/{path}"
        check_turns(turns, decoding)
        self.model, self.decoding, self.chat, self.turns = model, decoding, chat, turns
        self.request = dict(request or {})
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.headers = {"Content-Type": "application/json", "User-Agent": "mohawk"}
        self.key = key = os.environ.get(key_env or "OPENAI_API_KEY", "").strip()
        name = key_env or "OPENAI_API_KEY"
        if not (key.isascii() and key.isprintable()):  # an HTTP header takes nothing else
            raise UserError(f"endpoint: the key in {name} holds a character that no key has")
        if 0 < len(key) < SHORTEST_KEY:
            raise UserError(
                f"endpoint: the key in {name} has fewer than {SHORTEST_KEY} characters, which could not be told from "
                f"the words of an answer to mask it there; unset {name} if the server needs none, or give a longer one"
            )
        if key.isalpha() and len(key) < LONG_KEY:  # EMPTY, ollama: what people give a server that takes any
            log.warning(
                "endpoint: the key in %s is a word of %d letters: where an answer has this word, %s is kept in its "
                "place; unset %s if the server needs no key", name, len(key), MASK, name,
            )  # fmt: skip
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif key_env is not None:
            raise UserError(f"endpoint: the environment variable {key_env} is not set; export {key_env}=... first")
        known = {key, *(text for text in secrets_in(self.request) if not text.isalpha() and " " not in text)}
        self.secrets = any_of({text for text in known if len(text) >= SHORTEST_KEY})
        self.base, self.url = self.masked(base), self.masked(self.address)  # to keep and to show
        # a redirect would carry the key to wherever the server says, and no proxy knows this machine by that name
        here = urllib.parse.urlsplit(base).hostname in ("localhost", "127.0.0.1", "::1")
        direct = [urllib.request.ProxyHandler({})] if here else []
        self.opener = urllib.request.build_opener(NoRedirect, DeadlineHttp, DeadlineHttps, *direct)
        self.hold_until, self.odd_in_a_row = 0.0, 0
        self.said_at = -math.inf
        self.stop = threading.Event()

    def identity(self) -> dict[str, Any]:
        """What tells this teacher from others; not the address, so that a server may move."""
        about = {"name": self.model, "revision": None, "hash": None, "chat": self.chat, "request": self.request}
        about |= {"turns": self.turns} if self.turns != "last" else {}
        return self.masked(without_secrets(about))

    def masked(self, value: Any) -> Any:
        """A text, or texts in lists and dicts, names too, with *** for the key and the request's secrets."""
        if isinstance(value, str):
            return self.secrets.sub(MASK, value)
        if isinstance(value, list):
            return [self.masked(entry) for entry in value]
        if isinstance(value, dict):
            return {self.masked(k): self.masked(v) for k, v in value.items()}
        return value

    def responses(
        self, prompts: Sequence[Prompt], first: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[Response]], None, None]:
        """(i, answers) of prompts[i] for i = first, first + 1, ... before `stop`, `samples` answers each."""
        n = self.decoding.samples
        rows = ((i, s) for i in range(first, len(prompts) if stop is None else stop) for s in range(n))
        pending: deque[Future[Response]] = deque()
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.stop.clear()
        for _ in range(self.concurrency):
            # threads of our own: an executor's would be waited for when Ctrl-C ends the program
            threading.Thread(target=self._work, args=(waiting,), daemon=True).start()
        try:
            prompt, done = first, []
            while True:
                while len(pending) < AHEAD * self.concurrency and (row := next(rows, None)) is not None:
                    pending.append(Future())
                    waiting.put((pending[-1], prompts[row[0]], row[1]))
                if not pending:
                    return
                done.append(pending.popleft().result())
                if len(done) == n:
                    yield prompt, done
                    prompt, done = prompt + 1, []
        finally:
            self.stop.set()
            for _ in range(self.concurrency):
                waiting.put(None)

    def _work(self, waiting: queue.SimpleQueue) -> None:
        while (task := waiting.get()) is not None and not self.stop.is_set():
            future, prompt, sample = task
            try:
                future.set_result(self._answer(prompt, sample))
            except Stopped:
                return
            except BaseException as error:  # raised again where the answer is waited for, which asks for no other then
                future.set_exception(error)
                return

    def _answer(self, prompt: Prompt, sample: int) -> Response:
        """One answer, or the last one of a conversation that was gone through."""
        if self.turns == "last":
            return self.ask(prompt, sample)
        talk = conversation(prompt)
        asked = next(talk)
        while True:
            try:
                asked = talk.send(self.ask(asked, sample))
            except StopIteration as end:
                return end.value

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """The request of one answer."""
        decoding = self.decoding
        body: dict[str, Any] = {"model": self.model, "max_tokens": decoding.max_new_tokens}
        if self.chat:
            body |= {"messages": as_api(as_messages(prompt.content)), "logprobs": True}
            body |= {} if prompt.tools is None else {"tools": prompt.tools}
        elif isinstance(prompt.content, str):
            body |= {"prompt": prompt.content, "logprobs": 0}
        else:
            raise UserError(f"{prompt.where}: a chat's messages, which /completions does not take; use --chat")
        body["temperature"] = decoding.temperature if decoding.method == "sample" else 0.0
        if decoding.method == "sample":
            body |= {"top_p": decoding.top_p, "seed": decoding.seed_of(prompt, sample)}
        return {k: v for k, v in {**body, **self.request}.items() if v is not None}

    def read(self, answer: Any, prompt: Prompt) -> Response:
        """A Response from an answer's JSON. Raises ValueError where it is none."""
        return read_answer(self.masked(answer), self.chat)

    def ask(self, prompt: Prompt, sample: int) -> Response:
        """One answer, after as many tries as it takes. Raises UserError when there is no use in going on."""
        data = json.dumps(self.body(prompt, sample)).encode()
        problem, odd = "", False
        for attempt in range(self.retries + 1):
            if attempt:
                # half of it random: requests that failed together do not come back together
                pause = min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                self._wait(time.monotonic() + pause)
            self._wait(self.hold_until)
            try:
                answer = self._post(data)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} ({printable(said_in(error, self.masked))})"
                if error.code in REFUSED:
                    return Response("", None, "error", error=f"refused by the endpoint: {problem}")
                if error.code not in AGAIN:
                    to_do = printable(shortened(self.masked(advice(error)), 400))
                    raise UserError(f"endpoint: {self.url} answers {problem}; {to_do}") from None
                if (after := retry_after(error.headers.get("Retry-After"))) is not None:
                    if after > LONGEST_RETRY_AFTER:
                        raise UserError(
                            f"endpoint: {self.url} answers {problem} and asks to wait {after:.0f} s; run the same "
                            "command then, it goes on"
                        ) from None
                    self.hold_until = max(self.hold_until, time.monotonic() + after)
                odd = False
            except (OSError, http.client.HTTPException, ValueError) as error:
                # URLError and time-outs are OSErrors; ValueError: an answer that is not what the API promises
                reason = getattr(error, "reason", None) or error
                timed_out = isinstance(reason, TimeoutError)
                said = str(reason) if str(reason) != "timed out" else ""
                problem = said if said or not timed_out else f"no answer within {self.timeout:g} s"
                problem = printable(shortened(self.masked(problem or type(error).__name__), 300))
                odd = isinstance(error, ValueError)
            else:
                try:
                    response = self.read(answer, prompt)
                    self.odd_in_a_row = 0
                    return response
                except ValueError as error:
                    problem, odd = printable(str(error)), True
            if attempt < self.retries:
                self._say(f"{problem}; trying again")
        self.odd_in_a_row += odd
        if odd and self.odd_in_a_row < ODD:  # the server is there and answers, only not this prompt as it should
            return Response("", None, "error", error=f"not an answer of the API, {self.retries + 1} times: {problem}")
        raise UserError(
            f"endpoint: {self.url} failed {self.retries + 1} times, at last with: {problem}; see whether it is up "
            "and run the same command, it goes on"
        )

    def _post(self, data: bytes) -> Any:
        request = DeadlineRequest(self.address, data, self.headers, method="POST")
        request.deadline = time.monotonic() + ANSWER_TIME * self.timeout
        with self.opener.open(request, timeout=self.timeout) as answer:
            text = answer.read(LARGEST_ANSWER + 1)
        if len(text) > LARGEST_ANSWER:
            raise ValueError(f"more than {LARGEST_ANSWER >> 20} MiB")
        try:
            return parse_json(text)
        except ValueError as error:
            start = self.masked(text.decode("utf-8", "replace"))[:80]  # a key across a cut would not be known
            raise ValueError(f"no JSON ({error}) but {start!r}") from None

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self.said_at >= 5.0:  # one line for all the requests that fail together
            self.said_at = now
            log.warning("endpoint: %s", text)

    def _wait(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            if self.stop.wait(left):
                raise Stopped


def as_api(messages: Messages) -> Messages:
    """Messages as the API takes them: arguments of calls as JSON text, thoughts left out."""
    made = []
    for message in messages:
        message = {key: value for key, value in message.items() if key not in ("reasoning_content", "weight")}
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            texts = [{**of, "arguments": json.dumps(of["arguments"], ensure_ascii=False)} for of in functions]
            message["tool_calls"] = [
                {**call, "function": text} for call, text in zip(message["tool_calls"], texts, strict=True)
            ]
        made.append(message)
    return made


def base_url(url: str) -> str:
    """The API's base from what people write: with or without /v1, or a whole endpoint. Raises UserError."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        whole = parts.port is None or parts.port > 0
    except ValueError:  # brackets of half an IPv6 address, or a port that is none: it may be a password
        raise UserError(
            "endpoint: the address has a host or a port that cannot be; give the API's base, such as "
            "http://localhost:8000/v1"
        ) from None
    if not whole or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"endpoint: got {url!r}; give the API's base, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("endpoint: the address carries a name, password or query; the key comes from the environment")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat") or "/v1"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def read_answer(answer: Any, chat: bool) -> Response:
    """A Response from the JSON of (chat) completions.

    Raises ValueError where it is none, or a field is not of its type: what is kept of an answer is trained on, and read
    again when a stopped run goes on.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        finish = choice.get("finish_reason")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        logprobs = choice.get("logprobs") or {}
        each = logprobs.get("content" if chat else "token_logprobs") or []
        each = [entry.get("logprob") for entry in each] if chat else list(each)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"an answer without text: {json.dumps(answer)[:120]}") from None
    if not (tokens is None or type(tokens) is int and 0 <= tokens < 2**31):
        raise ValueError(f"usage.completion_tokens: got {json.dumps(tokens)[:80]}; allowed: a whole number, or null")
    if not (finish is None or isinstance(finish, str) and len(finish) <= 100):
        raise ValueError(f"finish_reason: got {json.dumps(finish)[:80]}; allowed: a word, or null")
    if odd := [value for value in each if not (value is None or type(value) in (int, float) and abs(value) < 1e300)]:
        raise ValueError(f"logprobs: got {json.dumps(odd[0])[:80]}; allowed: numbers, or null")
    if not isinstance(text, str):
        # a refusal, a tool call, or an answer that was all thought
        said = "no text" if text is None else f"{type(text).__name__} instead of a text"
        return Response("", tokens, finish, error=f"{said} in the answer (finish_reason {finish})")
    total = sum(each) if each and None not in each else None
    # no probability is above 1, but for a rounding
    return Response(text, tokens, finish, total if total is not None and -1e30 < total < 0.01 else None)


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def said_in(error: urllib.error.HTTPError, masked: Callable[[str], str]) -> str:
    """The message in an error's body, on one line; masked as a whole, then cut."""
    try:
        data = error.read(LARGEST_ERROR + 1)
    except (OSError, http.client.HTTPException):
        data = b""
    text = data.decode("utf-8", "replace").strip() if len(data) <= LARGEST_ERROR else ""
    try:
        found = parse_json(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = found.get("message", text) if isinstance(found, dict) else str(found)
    except ValueError:
        text = "" if text.startswith("<") else text  # a proxy's page
    said = " ".join(str(text).split()) or str(error.reason or "no reason given")
    return masked(said)[:200]


def advice(error: urllib.error.HTTPError) -> str:
    """What to do about an answer that another try would not change."""
    if error.code in (401, 403):
        return "set the environment variable with the key, or name it with --key-env"
    if error.code in (301, 302, 303, 307, 308):
        return f"it redirects to {error.headers.get('Location')}; give that address if you trust it"
    if error.code == 404:
        return "check the address and --model; without --chat the endpoint must have /completions"
    return "check the request"

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any

from mohawk.decoding import Decoding, Response, as_messages
from mohawk.errors import UserError
from mohawk.parsing import parse_json
from mohawk.records import Prompt

log = logging.getLogger(__name__)

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # busy, overloaded or restarting
REFUSED = (400, 413, 422)  # of this prompt: too long, a content filter
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before the second try, and at most between tries
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more has no capacity for this run
AHEAD = 4  # requests under way and waiting to be written, per worker


class Stopped(Exception):
    """The run ended while a request waited for its next try."""


class EndpointTeacher:
    """Asks `url` for answers of `model`.

    url: the API's base, such as http://localhost:8000/v1. chat: /chat/completions, and a text is a user's message;
    otherwise /completions. key_env: the environment variable with the key; where it is not set none is sent. request:
    further fields of every request (None removes one). concurrency: requests at once. timeout: seconds that a server
    may be silent. retries: further tries of one request. Raises UserError for a url or a key that cannot be.
    """

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding,
        *,
        chat: bool = False,
        key_env: str | None = None,
        request: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
    ):
        if decoding.method == "beam":
            raise UserError("endpoint: the API has no beam search; use greedy decoding or sampling")
        self.base = base_url(url)
        self.url = f"{self.base}/{'chat/completions' if chat else 'completions'}"
        self.model, self.decoding, self.chat = model, decoding, chat
        self.request = dict(request or {})
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.headers = {"Content-Type": "application/json", "User-Agent": "mohawk"}
        if key := os.environ.get(key_env or "OPENAI_API_KEY", "").strip():
            self.headers["Authorization"] = f"Bearer {key}"
        elif key_env is not None:
            raise UserError(f"endpoint: the environment variable {key_env} is not set; export {key_env}=... first")
        # a redirect would carry the key to wherever the server says, and no proxy knows this machine by that name
        here = urllib.parse.urlsplit(self.base).hostname in ("localhost", "127.0.0.1", "::1")
        self.opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if here else []))
        self.hold_until = 0.0
        self.said_at = -math.inf
        self.stop = threading.Event()

    def identity(self) -> dict[str, Any]:
        """What tells this teacher from others; not the address, so that a server may move."""
        return {"name": self.model, "revision": None, "hash": None, "chat": self.chat, "request": self.request}

    def responses(self, prompts: Sequence[Prompt], first: int = 0) -> Iterator[tuple[int, list[Response]]]:
        """(i, answers) of prompts[i] for i = first, first + 1, ..., `samples` answers each."""
        n = self.decoding.samples
        rows = ((i, s) for i in range(first, len(prompts)) for s in range(n))
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
                future.set_result(self.ask(prompt, sample))
            except Stopped:
                return
            except BaseException as error:  # raised again where the answer is waited for
                future.set_exception(error)

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """The request of one answer."""
        decoding = self.decoding
        body: dict[str, Any] = {"model": self.model, "max_tokens": decoding.max_new_tokens}
        if self.chat:
            body |= {"messages": as_messages(prompt.content), "logprobs": True}
        elif isinstance(prompt.content, str):
            body |= {"prompt": prompt.content, "logprobs": 0}
        else:
            raise UserError(f"{prompt.where}: a chat's messages, which /completions does not take; use --chat")
        body["temperature"] = decoding.temperature if decoding.method == "sample" else 0.0
        if decoding.method == "sample":
            body |= {"top_p": decoding.top_p, "seed": decoding.seed_of(prompt, sample)}
        return {k: v for k, v in {**body, **self.request}.items() if v is not None}

    def ask(self, prompt: Prompt, sample: int) -> Response:
        """One answer, after as many tries as it takes. Raises UserError when there is no use in going on."""
        data = json.dumps(self.body(prompt, sample)).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                # half of it random: requests that failed together do not come back together
                pause = min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                self._wait(time.monotonic() + pause)
            self._wait(self.hold_until)
            try:
                answer = self._post(data)
                return read_answer(answer, self.chat)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} ({said_in(error)})"
                if error.code in REFUSED:
                    return Response("", None, "error", error=f"refused by the endpoint: {problem}")
                if error.code not in AGAIN:
                    raise UserError(f"endpoint: {self.url} answers {problem}; {advice(error)}") from None
                if (after := retry_after(error.headers.get("Retry-After"))) is not None:
                    if after > LONGEST_RETRY_AFTER:
                        raise UserError(
                            f"endpoint: {self.url} answers {problem} and asks to wait {after:.0f} s; run the same "
                            "command then, it goes on"
                        ) from None
                    self.hold_until = max(self.hold_until, time.monotonic() + after)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # URLError and time-outs are OSErrors; ValueError: an answer that is not what the API promises
                reason = getattr(error, "reason", None) or error
                timed_out = isinstance(reason, TimeoutError)
                problem = f"no answer within {self.timeout:g} s" if timed_out else f"{reason or type(error).__name__}"
            self._say(f"{problem}; trying again")
        raise UserError(
            f"endpoint: {self.url} failed {self.retries + 1} times, at last with: {problem}; see whether it is up "
            "and run the same command, it goes on"
        )

    def _post(self, data: bytes) -> Any:
        request = urllib.request.Request(self.url, data, self.headers, method="POST")
        with self.opener.open(request, timeout=self.timeout) as answer:
            text = answer.read()
        try:
            return parse_json(text)
        except ValueError:
            raise ValueError(f"no JSON but {text[:80]!r}") from None

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self.said_at >= 5.0:  # one line for all the requests that fail together
            self.said_at = now
            log.warning("endpoint: %s", text)

    def _wait(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            if self.stop.wait(left):
                raise Stopped


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


def base_url(url: str) -> str:
    """The API's base from what people write: with or without /v1, or a whole endpoint. Raises UserError."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"endpoint: got {url!r}; give the API's base, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("endpoint: the address carries a name, password or query; the key comes from the environment")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat") or "/v1"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def read_answer(answer: Any, chat: bool) -> Response:
    """A Response from the JSON of (chat) completions. Raises ValueError where it is none."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        finish = choice.get("finish_reason")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"an answer without text: {json.dumps(answer)[:120]}") from None
    if not isinstance(text, str):
        # a refusal, a tool call, or an answer that was all thought
        return Response("", tokens, finish, error=f"no text in the answer (finish_reason {finish})")
    logprobs = choice.get("logprobs") or {}
    each = [t.get("logprob") for t in logprobs.get("content") or ()] if chat else logprobs.get("token_logprobs") or ()
    known = bool(each) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in each)
    return Response(text, tokens, finish, sum(each) if known else None)


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
    except ValueError:
        return None


def said_in(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, on one line."""
    try:
        text = error.read(4096).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = parse_json(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = found.get("message", text) if isinstance(found, dict) else str(found)
    except ValueError:
        text = "" if text.startswith("<") else text  # a proxy's page
    return " ".join(str(text).split())[:200] or error.reason or "no reason given"


def advice(error: urllib.error.HTTPError) -> str:
    """What to do about an answer that another try would not change."""
    if error.code in (401, 403):
        return "set the environment variable with the key, or name it with --key-env"
    if error.code in (301, 302, 303, 307, 308):
        return f"it redirects to {error.headers.get('Location')}; give that address if you trust it"
    if error.code == 404:
        return "check the address and --model; without --chat the endpoint must have /completions"
    return "check the request"

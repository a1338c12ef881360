"""Conversations that a teacher goes through: it answers each user's turn, with its own earlier answers before it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mohawk.data.messages import Messages, as_messages
from mohawk.data.records import Prompt, content_hash
from mohawk.errors import UserError

if TYPE_CHECKING:
    from mohawk.generation.decoding import Response

TURNS = ("last", "all")  # which of a chat's turns a teacher answers: its end, or each of its user's


def check_conversations(prompts: Sequence[Prompt]) -> None:
    """UserError for a chat in which nobody asks, or tools answer: to calls that this teacher need not make."""
    for prompt in prompts:
        roles = [message["role"] for message in as_messages(prompt.content)]
        if "user" not in roles:
            raise UserError(f"{prompt.where}: no turn is a user's, so there is nothing to answer; leave it out")
        if "tool" in roles:
            raise UserError(
                f"{prompt.where}: results of tools, which another teacher may not ask for; leave the chat out, or "
                "answer its last turn alone"
            )


def conversation(prompt: Prompt) -> Generator[Prompt, Response, Response]:
    """Yields what the teacher is asked next, takes its answer, and returns the last one, with what was said before it.

    The chat's own answers are left out. An answer that was cut ends the conversation, as does one that did not come,
    which is left out with its question unless it is the first. tokens and log-probabilities are sums over all answers.
    """
    said: Messages = []
    answers: list[Response] = []
    before: Messages = []  # of the last answer
    for message in as_messages(prompt.content):
        if message["role"] == "assistant":
            continue
        said.append(message)
        if message["role"] != "user":
            continue
        digest = prompt.sha256 if not answers else content_hash(said)
        answer = yield replace(prompt, content=list(said), sha256=digest)
        if answer.error is not None:
            if not answers:
                return replace(answer, messages=list(said))
            break
        answers.append(answer)
        before = list(said)
        if answer.finish_reason == "length":
            break
        said.append({"role": "assistant", "content": answer.text})
    counts = [answer.tokens for answer in answers]
    return replace(
        answers[-1], messages=before, tokens=None if None in counts else sum(c or 0 for c in counts),
        logprob=_sum([answer.logprob for answer in answers]),
        sampling_logprob=_sum([answer.sampling_logprob for answer in answers]),
    )  # fmt: skip


def _sum(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value or 0.0 for value in values)

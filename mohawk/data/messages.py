"""Chats as logs have them, in one form: OpenAI's and Anthropic's messages, ShareGPT's conversations, parts of content.

    chat_of(row, field)       a row -> (messages, tools), or None where it has no chat
    as_messages(content)      a text -> a chat of one user's message

A message in that form has a `role`, a text in `content`, and where it has them `reasoning_content` (text), `tool_calls`
([{"type": "function", "function": {"name": ..., "arguments": {...}}}]), and what else it came with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mohawk.core.json_files import parse_json

Messages = list[dict[str, Any]]

OTHER_FIELDS = ("messages", "conversations", "chat_messages")  # the latter two of ShareGPT and claude.ai's exports
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # who a turn of ShareGPT is from that holds the JSON of a call
KNOWN = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("text", "input_text", "output_text")  # types of parts that hold a text
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def chat_of(row: Mapping[str, Any], field: str = "messages") -> tuple[Messages, list[dict[str, Any]] | None] | None:
    """The messages and tools of a row, in the form above; None where the row has no chat.

    field: of the messages; where the row has none, `messages`, `conversations` or
    `chat_messages`. A row's `system` comes first,
    and its `tools` are functions, in OpenAI's form, Anthropic's or bare, as a list or as JSON text. Raises ValueError,
    in a few words, for what is none of these.
    """
    name = next((name for name in (field, *OTHER_FIELDS) if row.get(name) is not None), None)
    if name is None:
        return None
    try:
        messages = canonical(row[name])
    except ValueError as error:
        raise ValueError(f"field {name!r} is no chat: {error}") from None
    if system := _text_of(row.get("system"), "field 'system'"):
        first = messages[0]
        if first["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif first["content"] != system:
            raise ValueError(f"a system prompt in field 'system' and another one in {name!r}; leave out one")
    return messages, tools_of(row.get("tools"))


def as_messages(content: str | Messages) -> Messages:
    """A chat of one user's message from a text; a chat as it is."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def canonical(messages: Any) -> Messages:
    """Messages in the form above. Raises ValueError, in a few words, for what is no chat."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"got {type(messages).__name__ if not isinstance(messages, list) else 'an empty list'}")
    made: Messages = []
    names: dict[str, str] = {}  # of the calls so far, by their id
    for i, message in enumerate(messages):
        made += _canonical(i, message, names)
    return made


def tools_of(given: Any) -> list[dict[str, Any]] | None:
    """A row's tools in OpenAI's form; None where it has none. Raises ValueError, in a few words."""
    if isinstance(given, str) and given.strip():
        try:
            given = parse_json(given)
        except ValueError as error:
            raise ValueError(f"field 'tools' is no JSON ({error})") from None
    if given is None or given in ("", []) or isinstance(given, str):
        return None
    if not isinstance(given, list):
        raise ValueError(f"field 'tools' holds {type(given).__name__}, not a list of functions")
    found = []
    for i, tool in enumerate(given):
        function = tool.get("function") or tool if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"field 'tools': tool {i} has no name")
        function = {key: value for key, value in function.items() if key not in ("type", "cache_control")}
        if "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
        found.append({"type": "function", "function": function})
    return found


def _canonical(i: int, message: Any, names: dict[str, str]) -> Messages:
    """One message as one or more: an Anthropic user's results of tools are messages of their own."""
    said = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    key = next((key for key in ("role", "from", "sender") if isinstance(said.get(key), str)), None)
    if key is None or not said[key].strip():
        raise ValueError(f"message {i} is no object with a role")
    given = said.pop(key)
    low = given.lower()  # some logs have User and Assistant
    role = ROLES.get(low, low if low in KNOWN else given)
    if key != "role" and role not in KNOWN:
        raise ValueError(f"message {i} is from {given!r}; allowed: {', '.join(dict.fromkeys((*KNOWN, *ROLES)))}")
    where = f"message {i} ({role})"
    thoughts = next((found for found in [said.pop(name, None) for name in THOUGHTS] if found), None)
    if thoughts is not None and not isinstance(thoughts, str):
        raise ValueError(f"{where} has {type(thoughts).__name__} for its reasoning, not text")
    calls = said.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise ValueError(f"{where} has {type(calls).__name__} in `tool_calls`, not a list")
    if "function_call" in said:  # as OpenAI had it at first
        calls = [*calls, said.pop("function_call")]
    content = next((said.pop(name) for name in ("content", "value", "text") if name in said), None)
    if key != "role":  # what else a turn of such a log has is about it, not part of it
        said = {}
    results: Messages = []
    if low in CALLS:
        try:
            made = parse_json(content) if isinstance(content, str) else content
        except ValueError as error:
            raise ValueError(f"{where} is no JSON of a call ({error})") from None
        calls, content = [*calls, *(made if isinstance(made, list) else [made])], ""
    if isinstance(content, list):
        parts = _parts(content, where, names)
        calls, results = [*calls, *parts.calls], parts.results
        if parts.thoughts:
            thoughts = "\n\n".join(([thoughts] if thoughts else []) + parts.thoughts)
        if not parts.texts and not parts.calls and results:
            return results
        content = "".join(parts.texts)
    if content is None and role == "assistant" and (calls or thoughts):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where} has no text in `content`")
    made = {"role": role, "content": content, **said}
    if thoughts and thoughts.strip():
        made["reasoning_content"] = thoughts
    if calls:
        made["tool_calls"] = [_call(call, where, names) for call in calls]
    if (answered := made.get("tool_call_id")) is not None and not isinstance(answered, (str, int)):
        raise ValueError(f"{where} has {type(answered).__name__} for its tool_call_id, not text or a number")
    if role == "tool" and "name" not in made and answered in names:
        made["name"] = names[answered]
    return [*results, made]


class _Parts:
    """What a list of parts holds."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: Messages = []


def _parts(content: list[Any], where: str, names: dict[str, str]) -> _Parts:
    found = _Parts()
    for k, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(kind, str):
            raise ValueError(f"{where}: part {k} has {type(kind).__name__} for its type, not text")
        holds = {"refusal": "refusal", "thinking": "thinking"}.get(kind, "text")
        text = part if isinstance(part, str) else part.get(holds) if isinstance(part, dict) else None
        if kind == "redacted_thinking":  # which nobody can read
            continue
        if kind == "tool_use":
            found.calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
        elif kind == "tool_result":
            if found.texts:
                raise ValueError(f"{where}: part {k} is a tool's result behind a text; results come first")
            result = {"role": "tool", "content": _text_of(part.get("content"), f"{where}: part {k}")}
            if isinstance(identity := part.get("tool_use_id"), str):
                result |= {"tool_call_id": identity, **({"name": names[identity]} if identity in names else {})}
            found.results.append(result)
        elif kind not in (*TEXTS, "refusal", "thinking", "reasoning"):
            raise ValueError(
                f"{where}: part {k} is of type {kind!r}; allowed: text, thinking, tool_use and tool_result"
            )
        elif not isinstance(text, str):
            raise ValueError(f"{where}: part {k} ({kind}) has no text")
        elif kind in ("thinking", "reasoning"):
            found.thoughts.append(text)
        elif found.calls and text.strip():
            raise ValueError(f"{where}: part {k} is a text behind a call; templates write calls last")
        else:
            found.texts.append(text)
    return found


def _text_of(content: Any, where: str) -> str:
    """The text of a system prompt or of a tool's result: a text, or parts that are texts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"{where} holds {type(content).__name__}, not text")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where} holds a part of type {kind!r}; only texts are understood")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        raise ValueError(f"{where} has a call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"{where} calls {name} with arguments that are no JSON ({error})") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where} calls {name} with {json.dumps(arguments)[:40]}, not an object of arguments")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(identity := call.get("id"), str):
        names[identity] = name
        made["id"] = identity
    return made

"""Chats as a model reads them, and of them what it writes itself: each answer to its end-of-turn token, no header.

    chat_template(tokenizer)             what its template does, found out once
    ChatTemplate.prompt(messages)        a chat up to where an answer begins
    ChatTemplate.examples(messages)      a chat's texts, in pieces that are learned or not

What is learned of an answer is what a template has behind the prompt that asks for it, so far as the model writes it:
the chat is rendered once up to each answer and once with it. A chat is one text as long as each answer stands in the
later prompts as it was written. Where the template writes history otherwise (Qwen3 and DeepSeek leave out what earlier
answers thought), the answers from there on have a text of their own, with the history as the model sees it then.
`{% generation %}` changes nothing of this: some templates have their headers inside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mohawk.data.messages import THOUGHTS, Messages
from mohawk.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS = ("all", "last")  # which of a chat's answers are learned
ASK, ANSWER, SYSTEM, CALLED = "QuestionProbe", "AnswerProbe", "SystemProbe", "ArgumentProbe"
OPENS_THOUGHT = re.compile(r"\s*<[^<>]*think[^<>]*>\s*", re.IGNORECASE)  # with which some prompts end
THOUGHT = re.compile(r"(?:\s*<think>)?(?P<thought>.*?)</think>\s*(?P<rest>.*)", re.DOTALL)
SHORT_ID = re.compile("[a-zA-Z0-9]{9}")  # what Mistral's templates take for the id of a call


@dataclass(frozen=True)
class Example:
    """A text of a chat.

    pieces: [(text, whether it is learned)], the last one learned. turn: the place of the last answer in it, counted
    from the end of the messages: -1 is the last one. ends: whether an EOS follows, as the template marks no end.
    """

    pieces: list[tuple[str, bool]]
    turn: int
    ends: bool


def chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> ChatTemplate:
    """The tokenizer's template. Raises UserError, with where a chat stands, when it has none, or one that does not
    write a question and its answer."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a chat, but this tokenizer has no chat template; use one of an instruction-tuned model"
        )
    try:
        return _found_out(tokenizer, json.dumps(tokenizer.chat_template))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('chat template: ')}") from error


@functools.lru_cache(maxsize=8)
def _found_out(tokenizer: PreTrainedTokenizerBase, _template: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end what a model says: the tokenizer's eos, and the token that its chat template ends answers with."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        try:
            end = chat_template(tokenizer, "chat template").end
        except UserError:  # one that no chat can be read with; who has chats is told
            return ends
        ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end.strip() else []
        ends += [i for i in ids if len(ids) == 1 and i not in ends]
    return ends


class ChatTemplate:
    """What a tokenizer's chat template does, by what it makes of a question and an answer.

    Attributes:
        header: what stands in front of an answer though the template asks for none (it has no generation prompt).
        opener: what the generation prompt opens and answers do not repeat, such as "<think>\\n"; "" for none.
        ending: what a template has behind its last answer. end: of that, what ends an answer wherever it stands: to its
            first special token, or the text that all answers end with.

    Raises UserError for a template that refuses a question and an answer, or changes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else json.dumps(template)
        asked = [{"role": "user", "content": ASK}]
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        where = "chat template"
        before, plain = self._render(asked, None, where, ask=True), self._render(asked, None, where)
        whole = self._render(answered, None, where)
        longer = self._render([*answered, *asked], None, where)
        if whole.count(ANSWER) != 1 or ASK not in before:
            raise UserError(f"{where}: this tokenizer's chat template does not write question and answer once each")
        at = whole.index(ANSWER)
        self.opener = self.header = ""
        if not whole.startswith(before):
            shared = os.path.commonprefix([before, whole])
            self.opener = before[len(shared) :]
            if not OPENS_THOUGHT.fullmatch(self.opener):
                raise UserError(
                    f"{where}: this tokenizer's chat template asks for an answer with {self.opener!r}, which no answer "
                    "has before it, so that what of a chat is answers cannot be told; give a template that does"
                )
        elif before == plain:
            self.header = whole[len(before) : at].rstrip(" ")  # a space there belongs to the answer
        self.ending = whole[at + len(ANSWER) :]
        followed = longer.partition(ANSWER)[2]
        shared = os.path.commonprefix([self.ending, followed])
        self.end = _to_special(tokenizer, self.ending) or shared
        self.has_system = self._says(SYSTEM, [{"role": "system", "content": SYSTEM}, *asked])
        self.has_developer = "developer" in self.source
        fields = (name for name in THOUGHTS if re.search(rf"[.'\"]{name}\b", self.source))
        self.thoughts = next(fields, THOUGHTS[0])

    def prompt(self, messages: Messages, where: str, tools: list[dict[str, Any]] | None = None) -> str:
        """A chat up to where the next answer begins. Raises UserError where the template refuses it."""
        return self._render(self._prepared(messages), tools, where, ask=True) + self.header

    def examples(
        self,
        messages: Messages,
        where: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        turns: str = "all",
        cut: bool = False,
        generated: bool = False,
    ) -> list[Example]:
        """The texts of a chat and what of them is learned; none where no answer is.

        An answer with a `weight` of 0 is not learned, nor is one before the first question, nor an empty one; what
        follows the last learned one is left out.

        Args:
            messages: of `mohawk.data.messages.canonical`. turns: one of TURNS. cut: the last answer has no end to
                learn. generated: the last answer is what a model wrote behind the prompt, thoughts that this opens
                included.

        Raises:
            UserError: the template refuses the chat, or leaves out part of it, or changes an answer.
        """
        messages = self._prepared(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        first = next((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
        last = answers[-1] if answers else -1
        learned = [i for i in answers if i > first and _counts(messages[i], where)]
        learned = [i for i in learned if _says_something(messages[i]) or generated and i == last]
        if turns == "last":
            learned = [i for i in learned if i == last]
        found: list[Example] = []
        before = text = ""  # the prompt of the last answer, and the whole last example
        for i in learned:
            before, answer, end = self._answer(messages, i, tools, where, generated and i == last)
            end = "" if cut and i == last else end
            if found and before.startswith(text):
                pieces = [*found.pop().pieces, (before[len(text) :], False), (answer + end, True)]
            else:
                pieces = [(before, False), (answer + end, True)]
            text = before + answer + end
            found.append(Example(pieces, i - len(messages), not end.strip() and not (cut and i == last)))
        if learned:
            self._check_context(messages[: learned[-1]], tools, before, where)
        return found

    def _answer(
        self, messages: Messages, i: int, tools: list[dict[str, Any]] | None, where: str, generated: bool
    ) -> tuple[str, str, str]:
        """(the prompt of an answer, the answer, its end)."""
        message = messages[i]
        asked = self._render(messages[:i], tools, where, ask=True) + self.header
        content, thought = message["content"], message.get("reasoning_content", "")
        whole = self._render(messages[: i + 1], tools, where)
        opened = asked
        if self.opener:
            assert asked.endswith(self.opener) or not asked.strip()
            asked = asked.removesuffix(self.opener)
        if not whole.startswith(asked):
            raise UserError(
                f"{where}: the chat template writes message {i} (assistant) otherwise than it asks for it, so that its "
                "tokens cannot be told from others; give another template, or leave the chat out"
            )
        if self.opener and generated and not content.lstrip().startswith(self.opener.strip()):
            return opened, content, self.end  # as it was written, thoughts first
        rest = content
        if not thought and "</think>" in content and (parts := THOUGHT.fullmatch(content)) is not None:
            thought, rest = parts["thought"], parts["rest"]
        said = thought.strip()
        if not said and "enable_thinking" in self.source:
            # an answer without thoughts is one to a prompt that asks for none
            without = self._render(messages[:i], tools, where, ask=True, enable_thinking=False)
            asked = without if whole.startswith(without) and len(without) > len(asked) else asked
        written, end = self._parted(whole[len(asked) :], i, where)
        # how often its words stand there without it: an answer or a call may repeat a short thought
        plain = {name: value for name, value in message.items() if name not in THOUGHTS} | {"content": rest}
        bare = [*messages[:i], plain] if rest.strip() or "tool_calls" in message else messages[:i]
        others = self._render(bare, tools, where).count(said) if said else 0
        if said and whole.count(said) <= others:
            # in the answer's text, where the template knows no field for it; before it, where it leaves it out even so
            inside = {**plain, "content": f"<think>\n{said}\n</think>\n\n{rest}"}
            again = self._render([*messages[:i], inside], tools, where)
            if again.startswith(asked) and again.count(said) > others:
                written, end = self._parted(again[len(asked) :], i, where)
            else:
                written = f"<think>\n{said}\n</think>\n\n{written.lstrip()}"
            if self.opener and written.startswith(self.opener):
                asked, written = opened, written[len(self.opener) :]
        if rest.strip() not in written:
            raise UserError(f"{where}: the chat template leaves out or changes the answer in message {i}")
        calls = message.get("tool_calls", ())
        for k, call in enumerate(calls):
            less = {key: value for key, value in message.items() if key != "tool_calls"}
            if fewer := [*calls[:k], *calls[k + 1 :]]:
                less["tool_calls"] = fewer
            # the answer's text may hold the name too: a call that is written makes a difference
            if (name := call["function"]["name"]) not in written or self._is(whole, [*messages[:i], less], tools):
                raise UserError(
                    f"{where}: the chat template leaves out the call of {name!r} in message {i}; give one that "
                    "writes calls of tools, or leave the chat out"
                )
            arguments = call["function"]["arguments"]
            for key in arguments if isinstance(arguments, dict) else json.loads(arguments):
                if key not in written and json.dumps(key, ensure_ascii=False)[1:-1] not in written:
                    raise UserError(
                        f"{where}: the chat template leaves out the argument {key!r} of the call of {name!r} in "
                        f"message {i}; give one that writes it, or leave the chat out"
                    )
        return asked, written, end

    def _parted(self, turn: str, i: int, where: str) -> tuple[str, str]:
        """(answer, end) of a turn as a template writes it last."""
        if turn.endswith(self.ending):
            return turn[: len(turn) - len(self.ending)], self.end
        # calls of tools may end otherwise
        kept = turn.rstrip()
        ending = next((token for token in _special(self.tokenizer) if kept.endswith(token)), None)
        if ending is None:
            raise UserError(f"{where}: the chat template ends message {i} otherwise than other answers; leave it out")
        return kept.removesuffix(ending), ending

    def _prepared(self, messages: Messages) -> Messages:
        """The messages with the system prompt where the template has a place for it."""
        count = 0
        while count < len(messages) and messages[count]["role"] in ("system", "developer"):
            count += 1
        leading, rest = messages[:count], messages[count:]
        rest = [self._as_known(message) for message in rest]
        if count > 1 or leading and (leading[0]["role"] == "developer" and not self.has_developer):
            role = leading[0]["role"] if self.has_developer and count == 1 else "system"
            leading = [{**leading[0], "role": role, "content": "\n\n".join(m["content"] for m in leading)}]
        if leading and not self.has_system and leading[0]["role"] == "system":
            if not rest or rest[0]["role"] != "user":
                return [*leading, *rest]  # of which the template will say that it cannot have it
            text = "\n\n".join(part for part in (leading[0]["content"], rest[0]["content"]) if part)
            return [{**rest[0], "content": text}, *rest[1:]]
        return [*leading, *rest]

    def _as_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with the role, the field of thoughts and the form of arguments that the template knows."""
        if message["role"] == "developer" and not self.has_developer:
            message = {**message, "role": "system"}
        if "reasoning_content" in message and self.thoughts != "reasoning_content":
            message = {**message, self.thoughts: message["reasoning_content"]}
        if "tool_calls" in message and self.takes_text:
            message = {**message, "tool_calls": [_in_text(call) for call in message["tool_calls"]]}
        return message

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the template wants a call's arguments as JSON text (DeepSeek-V3's): it joins them with other text, or
        writes a mapping as Python does."""
        function = {"name": "probe", "arguments": {"of": CALLED}}
        call = {"type": "function", "id": "abcdefgh1", "function": function}
        found = []
        for made in (call, _in_text(call)):
            asked = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "", "tool_calls": [made]}]
            try:
                found.append(self._render(asked, None, "chat template"))
            except UserError:
                found.append("")
        return (CALLED not in found[0] or f"'{CALLED}'" in found[0]) and f'"{CALLED}"' in found[1]

    def _check_context(self, messages: Messages, tools: list[dict[str, Any]] | None, text: str, where: str) -> None:
        """UserError where a prompt lacks what was said in it."""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                continue
            said = message["content"].strip()
            if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                raise UserError(
                    f"{where}: the chat template leaves out message {i} ({message['role']}: {shortened(said, 40)!r}); "
                    "give one that writes it, or leave the chat out"
                )
        for tool in tools or ():
            if (name := tool["function"]["name"]) not in text:
                raise UserError(
                    f"{where}: the chat template leaves out the tool {name!r}; give one that writes tools, or leave "
                    "out the field `tools`"
                )

    def _is(self, text: str, messages: Messages, tools: list[dict[str, Any]] | None) -> bool:
        """Whether a template makes this text of messages, which it may also refuse."""
        try:
            return text == self._render(messages, tools, "chat template")
        except UserError:
            return False

    def _says(self, text: str, messages: Messages) -> bool:
        try:
            return text in self._render(messages, None, "chat template")
        except UserError:
            return False

    def _render(
        self, messages: Messages, tools: list[dict[str, Any]] | None, where: str, *, ask: bool = False, **options: Any
    ) -> str:
        try:
            return render(self.tokenizer, messages, where, tools=tools, add_generation_prompt=ask, **options)
        except UserError:
            short = _short_ids(messages)
            if short == messages:
                raise
            try:  # with ids as Mistral's templates want them
                return render(self.tokenizer, short, where, tools=tools, add_generation_prompt=ask, **options)
            except UserError:
                pass
            raise


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, **options: Any) -> str:
    """The chat template's text. Raises UserError, with where the chat stands, when the template refuses it."""
    import jinja2

    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{where}: the chat template refuses these messages: {said}") from error


def _counts(message: dict[str, Any], where: str) -> bool:
    """Whether an answer is learned: OpenAI's files say it by a `weight` of 0 or 1."""
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise UserError(f"{where}: an answer has the weight {shortened(repr(weight), 40)}; allowed: 0 and 1")
    return bool(weight)


def _says_something(message: dict[str, Any]) -> bool:
    return any(message.get(name) for name in ("tool_calls", "reasoning_content")) or bool(message["content"].strip())


def _in_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as JSON text."""
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that were added to a vocabulary, the longest first."""
    tokens = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})}
    return sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))


def _to_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text up to the end of its first special token; "" where it has none."""
    pattern = "|".join(map(re.escape, _special(tokenizer)))
    found = re.search(pattern, text) if pattern else None
    return "" if found is None else text[: found.end()]


def _short_ids(messages: Messages) -> Messages:
    """The messages with ids of calls of nine letters and digits."""

    def short(identity: Any) -> Any:
        if not isinstance(identity, str) or SHORT_ID.fullmatch(identity):
            return identity
        return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    made = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**call, **({"id": short(call["id"])} if "id" in call else {})} for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])
        made.append(message)
    return made

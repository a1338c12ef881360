"""Chats as the models read them: messages, and the text that a tokenizer's template makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from mohawk.data.records import Prompt
from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """A prompt through the chat template, up to where the answer begins. Raises UserError where it refuses."""
    return render(tokenizer, as_messages(prompt.content), prompt.where, add_generation_prompt=True)


def as_messages(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat of one user's message from a text; a chat as it is."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
    """The chat template's text. Raises UserError, with where the chat stands, when the template refuses it."""
    import jinja2

    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses these messages: {str(error).splitlines()[0]}") from error

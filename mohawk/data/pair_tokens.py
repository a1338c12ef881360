"""Prompts and responses to token ids on disk: read, chats put through their template, cached by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mohawk.core.places import cache_dir, home
from mohawk.core.user_cache import META, SUMS, kept_whole, whole_folder
from mohawk.data.chat import chat_template
from mohawk.data.messages import as_messages, chat_of
from mohawk.data.records import content_hash, read_records
from mohawk.data.source_files import Source, as_source, source_content
from mohawk.data.text import tokenizer_key
from mohawk.errors import UserError, is_refusal, naming, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHUNK = 1000  # examples tokenised at once
LAYOUT = 5  # of the cached folders; raise it when their contents change
HEAVIEST = 1e30  # of an example's own weights, which are float32 in a row


@dataclass(frozen=True)
class Pairs:
    """Examples, tokenised. Arrays of one entry per example but for the first two, which hold all tokens in a row.

    tokens: uint32. learn: bool, whether a token is to be learned. spans: int64 (examples, 2), first token and one past
    the last. responses: int64, where the (last) response begins in `tokens`. prompts, answers: uint64, hashes of what
    was asked and answered. logprobs, sampling_logprobs: float64, as generate-data writes them, nan where not known.
    lengths: int64, generated tokens. teachers: int64, or None. unknown: where the first example without a logprob or
    sampling_logprob stands, by name. bos_token_id: the tokenizer's, or None. weights: float64, of the examples' own, or
    None. tasks: int64, of step-by-step distillation (mohawk/losses/rationales.py), or None. Without chats the prompts
    count for them.
    """

    tokens: np.ndarray
    learn: np.ndarray
    spans: np.ndarray
    responses: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    lengths: np.ndarray
    teachers: np.ndarray | None
    unknown: dict[str, str]
    bos_token_id: int | None
    weights: np.ndarray | None = None
    tasks: np.ndarray | None = None
    chats: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, which: np.ndarray) -> Pairs:
        """The examples of an index or mask; the tokens are shared."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **{k: v[which] for k, v in arrays.items() if k not in ("tokens", "learn")})


def read_pairs(
    sources: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_field: str = "prompt",
    response_field: str = "response",
    messages_field: str = "messages",
    chat: bool = False,
    turns: str = "all",
    teacher_field: str | None = None,
    teachers: Sequence[str] = (),
    weight_field: str | None = None,
    cache: Path | str | None = None,
) -> Pairs:
    """Prompts and responses, tokenised, or from the cache where the same text met the same tokenizer before.

    A row has a chat in `messages_field` (or `conversations`, ShareGPT's), as `mohawk.data.messages` reads it, with what
    the assistant then says in `response_field`, if it is not in there; or a text in `prompt_field` and one in
    `response_field`. Chats go through the tokenizer's chat template with the row's `tools`; learned is what the
    assistant writes, calls of tools and the end of its turn included (`mohawk.data.chat`); with `chat` a text prompt is
    a user's message. Rows whose chat has no answer are counted, logged and left out. Otherwise the tokens are those of
    the prompt, as the model sees it when it answers, then the response's and the EOS. A response that was cut
    (finish_reason "length") gets no end to learn.

    turns: which answers of a chat are learned, all or the last.
    teacher_field: who answers the row, an index or one of `teachers`. weight_field: a number from 0 to 1e30 that
    multiplies the loss of the row's tokens; a row without it counts 1, and one row at least has it. cache: a folder;
    None is the user's. Raises UserError with file and line.
    """
    sources = [as_source(source) for source in sources]
    options: dict[str, Any] = {
        "prompt_field": prompt_field,
        "response_field": response_field,
        "messages_field": messages_field,
    }
    options |= {
        "chat": chat,
        "turns": turns,
        "teacher_field": teacher_field,
        "teachers": list(teachers),
        "weight_field": weight_field,
    }
    contents = [(asdict(source), source_content(source)) for source in sources]
    settings = {"layout": LAYOUT, **options, "sources": contents}
    settings |= {"tokenizer": tokenizer_key(tokenizer), "template": str(tokenizer.chat_template)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    folder = (home(cache) if cache is not None else cache_dir()) / "pairs" / key
    about = {"key": key}  # so that another folder under this name is not taken for it
    if not kept_whole(folder, about) or not _readable(folder):
        with whole_folder(folder, about) as partial:
            _save(_tokenize(sources, tokenizer, **options), partial)
    return _load(folder)


def check_pair(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    row: dict[str, Any],
    *,
    prompt_field: str,
    response_field: str,
    messages_field: str,
    chat: bool,
    turns: str,
    teacher_field: str | None,
    teachers: Sequence[str],
    weight_field: str | None,
    weighting: str | None,
) -> None:
    """UserError where a row has not what `read_pairs` asks of each, or a weighting of it (mohawk/data/pairs.py)."""
    _examples(tokenizer, where, row, prompt_field, response_field, messages_field, chat, turns)
    if teacher_field is not None:
        _teacher(row, where, teacher_field, teachers)
    if weight_field is not None:
        _weight(row, where, weight_field)
    needed = {"probability": ("logprob",), "importance": ("logprob", "sampling_logprob")}.get(weighting or "", ())
    for name in needed:
        if _finite(row.get(name)) is None:
            raise UserError(no_score(where, name, weighting))


def _readable(folder: Path) -> bool:
    """Whether a cached folder's arrays can be opened, as those of one without sums may not; such a one is removed."""
    try:
        pairs = _load(folder)
        if len(pairs.tokens) == len(pairs.learn) == int(pairs.spans[-1, 1]):
            return True
        problem = "its arrays have other lengths than its spans say"
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        if is_refusal(error):
            raise
        problem = str(error)
    log.warning("%s is damaged (%s); making it again", folder, problem)
    shutil.rmtree(folder)
    return False


def _tokenize(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    response_field: str,
    messages_field: str,
    chat: bool,
    turns: str,
    teacher_field: str | None,
    teachers: Sequence[str],
    weight_field: str | None,
) -> Pairs:
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    responses: list[int] = []
    meta: list[tuple[int | float, ...]] = []
    unknown: dict[str, str] = {}
    weights: list[float] = []
    weighed, first = False, ("", [])  # whether any row has a weight; the first row's place and fields
    total, rows, left_out, unanswered = 0, 0, 0, ""
    for chunk in _chunks((where, row) for source in sources for where, row in read_records(source)):
        examples = []
        for where, row in chunk:
            rows += 1
            found = _examples(tokenizer, where, row, prompt_field, response_field, messages_field, chat, turns)
            if not found:
                unanswered = unanswered or where
                left_out += 1
                continue
            numbers = []
            for name in ("logprob", "sampling_logprob"):
                value = _finite(row.get(name))
                if value is None:
                    unknown.setdefault(name, where)
                numbers.append(np.nan if value is None else value)
            length = row.get("tokens")
            length = length if type(length) is int and 0 < length < 2**31 and len(found) == 1 else -1
            teacher = _teacher(row, where, teacher_field, teachers) if teacher_field is not None else -1
            weighed = weighed or weight_field in row
            first = first if first[0] else (where, list(row))
            weight = _weight(row, where, weight_field) if weight_field is not None else 1.0
            whole = _key(found[-1].asked)
            for example in found:
                examples.append((example.pieces, example.ends, example.special))
                # an answer that was cut is not the one that ended there
                answer: Any = [example.answer, row.get("finish_reason") == "length"]
                meta.append((_key(example.asked), _key(answer), *numbers, length, teacher, whole))
                weights.append(weight)
        for ids, learned, begin in _encode(tokenizer, examples):
            flags = np.zeros(len(ids), dtype=bool)
            for start, stop in learned:
                flags[start:stop] = True
            tokens.append(np.array(ids, dtype=np.uint32))
            learn.append(flags)
            responses.append(total + begin)
            total += len(ids)
    names = ", ".join(source.source for source in sources)
    if left_out:
        said = f"{left_out} of {rows} chats in {names} have no answer to learn, the first: {unanswered}"
        if not tokens:
            raise UserError(f"data: {said}; `mohawk generate-data` has a teacher answer them")
        log.warning("%s; they are left out", said)
    if not tokens:
        raise UserError(f"data: {names} holds no examples")
    if weight_field is not None and not weighed:
        raise no_weights(*first, weight_field)
    sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(sizes)
    prompts, answers, logprobs, sampling, lengths, who, chats = zip(*meta, strict=True)
    lengths = np.array(lengths, dtype=np.int64)
    return Pairs(
        tokens=np.concatenate(tokens),
        learn=np.concatenate(learn),
        spans=np.stack([ends - sizes, ends], 1),
        responses=np.array(responses, dtype=np.int64),
        prompts=np.array(prompts, dtype=np.uint64),
        answers=np.array(answers, dtype=np.uint64),
        logprobs=np.array(logprobs),
        sampling_logprobs=np.array(sampling),
        lengths=np.where(lengths > 0, lengths, ends - np.array(responses)),
        teachers=None if teacher_field is None else np.array(who, dtype=np.int64),
        unknown=unknown,
        bos_token_id=tokenizer.bos_token_id,
        weights=None if weight_field is None else np.array(weights),
        chats=np.array(chats, dtype=np.uint64),
    )


def _save(pairs: Pairs, folder: Path) -> None:
    meta = {"unknown": pairs.unknown, "bos_token_id": pairs.bos_token_id, SUMS: True}
    with naming(folder):
        for field in dataclasses.fields(Pairs):
            if isinstance(value := getattr(pairs, field.name), np.ndarray):
                np.save(folder / f"{field.name}.npy", value)
        (folder / META).write_text(json.dumps(meta) + "\n")


def _load(folder: Path) -> Pairs:
    arrays: dict[str, Any] = {
        path.stem: np.load(path, mmap_mode="r" if path.stem in ("tokens", "learn") else None)
        for path in folder.glob("*.npy")
    }
    arrays.setdefault("teachers", None)
    meta = json.loads((folder / META).read_text())
    meta.pop(SUMS, None)  # of the folder, not of the pairs
    return Pairs(**arrays, **meta)


@dataclass(frozen=True)
class _Example:
    """What is asked and answered; the texts, each learned or not; whether an EOS follows them, and whether the
    tokenizer adds its own special tokens."""

    asked: Any
    answer: Any
    pieces: list[tuple[str, bool]]
    ends: bool
    special: bool


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    row: dict[str, Any],
    prompt_field: str,
    response_field: str,
    messages_field: str,
    chat: bool,
    turns: str,
) -> list[_Example]:
    """The examples of a row: one of a prompt and a response, as many of a chat as its template makes."""
    response = row.get(response_field)
    if response is not None and not isinstance(response, str):
        raise UserError(f"{where}: field {response_field!r} holds {type(response).__name__}, not text")
    cut, tools = row.get("finish_reason") == "length", None
    try:
        found = chat_of(row, messages_field)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if found is not None:
        messages, tools = found
    else:
        prompt = row.get(prompt_field)
        if not isinstance(prompt, str) or response is None:
            missing = prompt_field if not isinstance(prompt, str) else response_field
            raise UserError(
                f"{where}: has no text in {missing!r} and no chat in {messages_field!r}; its fields: "
                f"{', '.join(map(str, row))}"
            )
        if not chat:
            return [_Example(prompt, response, [(prompt, False), (response, True)], not cut, True)]
        messages = as_messages(prompt)
    generated = messages[-1]["role"] != "assistant" and response is not None
    if generated:
        messages = [*messages, {"role": "assistant", "content": response}]
    template = chat_template(tokenizer, where)
    made = []
    for example in template.examples(
        messages, where, tools=tools, turns=turns, cut=cut, generated=generated and "finish_reason" in row
    ):
        place = example.turn + len(messages)  # counted from the end: a system prompt may have gone into another message
        asked, answer = messages[:place], messages[place]
        said = answer["content"] if "tool_calls" not in answer else answer
        asked = asked if tools is None else {"messages": asked, "tools": tools}
        made.append(_Example(asked, said, example.pieces, example.ends, False))
    return made


def _key(content: Any) -> int:
    """A hash of 64 bits."""
    return int(content_hash(content)[:16], 16)


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: list[tuple[list[tuple[str, bool]], bool, bool]]
) -> list[tuple[list[int], list[tuple[int, int]], int]]:
    """(token ids, learned ranges, where the last learned one begins) of each example.

    Each piece is tokenised as the continuation of those before it (alone, some tokenizers put a space first), unless
    that would change their tokens: a model that answers has the prompt's tokens as they are.
    """
    eos = tokenizer.eos_token_id
    texts: dict[bool, list[str]] = {True: [], False: []}
    for pieces, _, special in examples:
        text = ""
        for piece, _ in pieces:
            text += piece
            texts[special].append(text)
    ids = {
        special: iter(
            tokenizer(batch, add_special_tokens=special, return_attention_mask=False)["input_ids"] if batch else ()
        )
        for special, batch in texts.items()
    }
    done = []
    for pieces, end, special in examples:
        tokens: list[int] = []
        learned: list[tuple[int, int]] = []
        for k, (piece, learn) in enumerate(pieces):
            longer = list(next(ids[special]))
            if special and longer and longer[-1] == eos:  # which some tokenizers add
                longer.pop()
            begin = len(tokens)
            if longer[:begin] == tokens:
                tokens = longer
            else:
                tokens = tokens + tokenizer(piece, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            if end and k == len(pieces) - 1 and eos is not None:
                tokens = [*tokens, eos]
            if learn:
                learned.append((begin, len(tokens)))
        done.append((tokens, learned, learned[-1][0]))
    return done


def _teacher(row: dict[str, Any], where: str, field: str, teachers: Sequence[str]) -> int:
    value = row.get(field)
    if isinstance(value, str) and value in teachers:
        return list(teachers).index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (len(teachers) or 2**31):
        return value
    allowed = f"{', '.join(teachers)}, or 0 to {len(teachers) - 1}" if teachers else "an index from 0"
    raise UserError(f"{where}: field {field!r} is {value!r}; allowed: {allowed}")


def no_weights(where: str, fields: Iterable[Any], weight_field: str) -> UserError:
    """The error about pairs of which none has a weight; the first row is at `where` and has these fields."""
    return UserError(
        f"{where}: weight_field: neither this row nor any other has a field {weight_field!r}; its fields: "
        f"{', '.join(map(str, fields))}"
    )


def _weight(row: dict[str, Any], where: str, field: str) -> float:
    value = row.get(field, 1.0)
    weight = _finite(value)
    if weight is None or not 0 <= weight <= HEAVIEST:
        raise UserError(
            f"{where}: field {field!r} is {shortened(repr(value), 60)}; allowed: a number from 0 to {HEAVIEST:g}"
        )
    return weight


def _finite(value: Any) -> float | None:
    """A number in a row, None where it is none: Python reads NaN, infinity and whole numbers of any size in JSON."""
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def no_score(where: str, name: str, weighting: str | None) -> str:
    """What is wrong with a row that a weighting needs a log-probability of."""
    return f"{where}: has no {name}, which weighting {weighting!r} needs as a finite number; use uniform or counts"


def _chunks(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk

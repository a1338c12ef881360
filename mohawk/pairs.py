"""Prompts and responses to packed rows: whole examples, nothing learned of a prompt, responses weighted.

    read_pairs(sources, tokenizer)     JSON lines (or Parquet, or a hub dataset) -> Pairs, token ids in memory
    split_pairs(pairs, share)          -> (training Pairs, held-out Pairs), by prompt
    PairsDataset(pairs, length)        a torch map-style dataset of rows, for mohawk.data.collate

Several responses of one prompt are weighted by `weighting`. With p(y|x) the teacher's probability of a response,
sequence distillation (Kim & Rush 2016) minimises -E_{y ~ p} log q(y|x): the forward KL of whole responses but for a
constant.

- uniform: each of N responses counts 1/N. Unbiased when they were sampled from the teacher at temperature 1 without
  top-p: how often one comes up is its probability already, and weighing it by p once more would aim at p^2.
- counts: the same loss, with responses that are equal made one example of weight count/N: less to compute.
- probability: the softmax of log p over the distinct responses (Kim & Rush's n-best approximation). For beams and other
  lists of which each is there once; of samples it is biased towards the likeliest. length_normalized takes log p per
  token: no longer the teacher's distribution, but one in which long responses are not crowded out.
- importance: the softmax of log p - log s, where s is the distribution that was sampled from (tempered, nucleus):
  undoes the tempering, with a bias of order 1/N; what lies outside the nucleus stays unseen.

(The reverse KL, E_{y ~ q} log(q/p), needs the student's own samples: on-policy training.) Weights are scaled so that
every prompt counts the same, however many responses it has, and the mean over learned tokens is 1: a mixture with other
data keeps its proportions. Answers that filters rejected are missing from p: it is then the teacher's distribution
given that the filters pass.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mohawk.decoding import as_messages, render
from mohawk.errors import UserError
from mohawk.records import content_hash, read_records, why_no_chat
from mohawk.text import as_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WEIGHTINGS = ("uniform", "counts", "probability", "importance")
TOO_LONG = ("truncate", "drop")
CHUNK = 1000  # examples tokenised at once


@dataclass(frozen=True)
class Pairs:
    """Examples, tokenised. Arrays of one entry per example but for the first two, which hold all tokens in a row.

    tokens: uint32. learn: bool, whether a token is to be learned. spans: int64 (examples, 2), first token and one past
    the last. responses: int64, where the (last) response begins in `tokens`. prompts, answers: uint64, hashes of what
    was asked and answered. logprobs, sampling_logprobs: float64, as generate-data writes them, nan where not known.
    lengths: int64, generated tokens. teachers: int64, or None. unknown: where the first example without a logprob or
    sampling_logprob stands, by name. bos_token_id: the tokenizer's, or None. weights: float64, of the examples' own, or
    None.
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

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, which: np.ndarray) -> Pairs:
        """The examples of an index or mask; the tokens are shared."""
        names = ("spans", "responses", "prompts", "answers", "logprobs", "sampling_logprobs", "lengths", "teachers")
        names += ("weights",)
        picked = {name: getattr(self, name)[which] for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, **picked)


def read_pairs(
    sources: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_field: str = "prompt",
    response_field: str = "response",
    messages_field: str = "messages",
    chat: bool = False,
    teacher_field: str | None = None,
    teachers: Sequence[str] = (),
    weight_field: str | None = None,
) -> Pairs:
    """Read and tokenise prompts and responses.

    A row has a chat in `messages_field`, whose last turn is the assistant's or in `response_field`; or a text in
    `prompt_field` and one in `response_field`. Chats go through the tokenizer's chat template, and each assistant's
    turn is learned where the template leaves earlier turns as they were (else the last one); with `chat` a text prompt
    is a user's message. Otherwise the tokens are those of the prompt, as the model sees it when it answers, then the
    response's and the EOS. A response that was cut (finish_reason "length") gets no end to learn.

    teacher_field: who answers the row, an index or one of `teachers`. weight_field: a number of at least 0 that
    multiplies the loss of the row's tokens; a row without it counts 1. Raises UserError with file and line.
    """
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    responses: list[int] = []
    meta: list[tuple[int, int, float, float, int, int]] = []
    unknown: dict[str, str] = {}
    weights: list[float] = []
    total = 0
    for chunk in _chunks((where, row) for source in map(as_source, sources) for where, row in read_records(source)):
        examples = []
        for where, row in chunk:
            asked, response, pieces, end, special = _pieces(
                tokenizer, where, row, prompt_field, response_field, messages_field, chat
            )
            examples.append((pieces, end, special))
            numbers = []
            for name in ("logprob", "sampling_logprob"):
                value = row.get(name)
                if not isinstance(value, (int, float)):
                    unknown.setdefault(name, where)
                    value = np.nan
                numbers.append(float(value))
            length = row.get("tokens")
            teacher = _teacher(row, where, teacher_field, teachers) if teacher_field is not None else -1
            keys = (int(content_hash(asked)[:16], 16), int(content_hash(response)[:16], 16))
            meta.append((*keys, *numbers, length if isinstance(length, int) else -1, teacher))
            weights.append(_weight(row, where, weight_field) if weight_field is not None else 1.0)
        for ids, learned, begin in _encode(tokenizer, examples):
            flags = np.zeros(len(ids), dtype=bool)
            for start, stop in learned:
                flags[start:stop] = True
            tokens.append(np.array(ids, dtype=np.uint32))
            learn.append(flags)
            responses.append(total + begin)
            total += len(ids)
    if not tokens:
        raise UserError(f"data: {', '.join(as_source(s).source for s in sources)} holds no examples")
    sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(sizes)
    prompts, answers, logprobs, sampling, lengths, who = zip(*meta, strict=True)
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
    )


def split_pairs(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """Split into (training, held-out) examples; about `share` of the prompts, with all their responses, are held out.

    Which ones depends on the prompts' text alone. Raises UserError when share is not in [0, 1) or leaves either side
    without a prompt.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.validation_share: got {share}; allowed: 0 up to, but not including, 1")
    unique = np.unique(pairs.prompts)  # hashes: their order is as good as random
    count = round(share * len(unique))
    if share > 0 and not 0 < count < len(unique):
        raise UserError(
            f"data.validation_share: {share} of {len(unique)} prompts holds out {count}; give more, or set 0"
        )
    held = np.isin(pairs.prompts, unique[:count])
    return pairs.take(~held), pairs.take(held)


def response_weights(pairs: Pairs, weighting: str | None, *, length_normalized: bool = False) -> np.ndarray:
    """float64 weight of each example; those of a prompt sum to 1. None: 1 each. What is merged into another has 0.

    Raises UserError for an unknown weighting, and where an example lacks the log-probability that it needs.
    """
    if weighting is None:
        return np.ones(len(pairs))
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: got {weighting!r}; allowed: {', '.join(WEIGHTINGS)}, or none at all")
    _, group = np.unique(pairs.prompts, return_inverse=True)
    if weighting == "uniform":
        return 1.0 / np.bincount(group)[group]
    _, first, distinct = np.unique(
        np.stack([group.astype(np.uint64), pairs.answers], 1), axis=0, return_index=True, return_inverse=True
    )
    distinct = distinct.reshape(-1)  # numpy 2.0 kept a second axis
    if weighting == "counts":
        weights = np.zeros(len(pairs))
        weights[first] = np.bincount(distinct) / np.bincount(group)[group[first]]
        return weights
    scores = pairs.logprobs
    needed = ("logprob",)
    if weighting == "importance":
        scores, needed = scores - pairs.sampling_logprobs, ("logprob", "sampling_logprob")
    elif length_normalized:
        scores = scores / np.maximum(pairs.lengths, 1)
    if np.isnan(scores).any():
        name = next(name for name in needed if name in pairs.unknown)
        raise UserError(
            f"{pairs.unknown[name]}: has no {name}, which weighting {weighting!r} needs; use uniform or counts"
        )
    counted = np.ones(len(pairs), dtype=bool)
    if weighting == "probability":
        counted[:] = False
        counted[first] = True
    highest = np.full(group.max() + 1, -np.inf)
    np.maximum.at(highest, group, scores)
    weights = np.exp(scores - highest[group]) * counted
    return weights / np.bincount(group, weights=weights)[group]


class PairsDataset(torch.utils.data.Dataset):
    """Rows of `sequence_length` tokens, each of whole examples (best fit, longest first), in the seed's order.

    Each row is a dict of tensors (sequence_length): `input_ids`, `position_ids`, `segment_ids`, `labels` (int64, as
    PackedDataset's; labels are -100 on prompts too) and `weights` (float32, an example's weight on its tokens, 0 on
    padding); and, where the pairs have teachers, `teacher` () int64: a row's examples share theirs.

    weighting, length_normalized: see above; None counts each response alike. The examples' own weights multiply these.
    too_long: what becomes of an example beyond sequence_length: truncate cuts the prompt's left (not its BOS), drop
    leaves it out, as does truncate where the response alone is too long. `truncated` and `dropped` count them. tokens:
    the budget, in row lengths; None is one epoch; in each epoch the examples are put together anew. Raises UserError
    when nothing is left.
    """

    def __init__(
        self,
        pairs: Pairs,
        sequence_length: int,
        *,
        weighting: str | None = None,
        length_normalized: bool = False,
        too_long: str = "truncate",
        tokens: float | None = None,
        seed: int = 0,
        pad_token_id: int = 0,
    ):
        if sequence_length < 2:
            raise UserError(f"sequence_length: got {sequence_length}; predicting a token needs at least 2")
        if too_long not in TOO_LONG:
            raise UserError(f"too_long: got {too_long!r}; allowed: {', '.join(TOO_LONG)}")
        self.sequence_length, self.seed, self.pad_token_id = sequence_length, seed, pad_token_id
        pairs, self.truncated, self.dropped = _fitting(pairs, sequence_length, too_long)
        self.pairs = pairs
        self.weights = response_weights(pairs, weighting, length_normalized=length_normalized)
        learned = _learned(pairs, sequence_length)
        if weighting is not None:
            self.weights *= learned.sum(where=self.weights > 0) / (self.weights * learned).sum()
        if pairs.weights is not None:
            self.weights = self.weights * pairs.weights
        self._used = np.flatnonzero(self.weights > 0)
        if not len(self._used):
            raise UserError(f"data: none of {len(pairs)} examples has a weight above 0")
        sizes = np.minimum(np.diff(pairs.spans, axis=1)[:, 0], sequence_length)[self._used]
        who = np.zeros(len(sizes), np.int64) if pairs.teachers is None else pairs.teachers[self._used]
        self._sizes, self._who = sizes, who
        # the places in the rows depend on lengths alone; an epoch decides which example of a length takes which place
        order = np.lexsort((-sizes, who))
        bins = _best_fit(sizes[order], who[order], sequence_length)
        self._places = np.argsort(bins, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(bins))])
        self.rows_per_epoch = len(self._starts) - 1
        self.rows = self.rows_per_epoch if tokens is None else max(1, -(-int(tokens) // sequence_length))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if self.truncated or self.dropped:
            log.warning(
                "%d of %d examples are longer than %d tokens: %d lost the left of their prompt, %d were left out",
                self.truncated + self.dropped, len(pairs) + self.dropped, sequence_length, self.truncated, self.dropped,
            )  # fmt: skip

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one epoch: the examples in the order of the places, and the order of the rows."""
        if epoch not in self._epochs:
            generator = np.random.default_rng([self.seed, epoch])
            shuffled = generator.permutation(len(self._used))
            order = shuffled[np.lexsort((-self._sizes[shuffled], self._who[shuffled]))]
            if len(self._epochs) > 7:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = (self._used[order], generator.permutation(self.rows_per_epoch))
        return self._epochs[epoch]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(self.rows)[index]  # IndexError past the end, negative from the end
        epoch, row = divmod(index, self.rows_per_epoch)
        examples, rows = self._epoch(epoch)
        row = rows[row]
        n = self.sequence_length
        input_ids = np.full(n, self.pad_token_id, dtype=np.int64)
        position_ids = np.arange(n, dtype=np.int64)
        segment_ids = np.full(n, -1, dtype=np.int64)
        labels = np.full(n, -100, dtype=np.int64)
        weights = np.zeros(n, dtype=np.float32)
        filled = 0
        chosen = examples[self._places[self._starts[row] : self._starts[row + 1]]]
        for segment, example in enumerate(chosen):
            first, last = self.pairs.spans[example]
            start = max(first, last - n)
            ids = self.pairs.tokens[start:last].astype(np.int64)
            # nothing is predicted before the first token
            learn = self.pairs.learn[start:last] & (np.arange(len(ids)) > 0)
            if first < start < self.pairs.responses[example] and self.pairs.tokens[first] == self.pairs.bos_token_id:
                ids[0] = self.pairs.bos_token_id
            here = slice(filled, filled + len(ids))
            input_ids[here] = ids
            position_ids[here] = np.arange(len(ids))
            segment_ids[here] = segment
            labels[here] = np.where(learn, ids, -100)
            weights[here] = self.weights[example]
            filled += len(ids)
        position_ids[filled:] = np.arange(n - filled)
        columns = {"input_ids": input_ids, "position_ids": position_ids, "segment_ids": segment_ids, "labels": labels}
        columns = {name: torch.from_numpy(values) for name, values in {**columns, "weights": weights}.items()}
        if self.pairs.teachers is not None:
            columns["teacher"] = torch.tensor(int(self.pairs.teachers[chosen[0]]))
        return columns


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    row: dict[str, Any],
    prompt_field: str,
    response_field: str,
    messages_field: str,
    chat: bool,
) -> tuple[Any, str, list[tuple[str, bool]], bool, bool]:
    """(what was asked, the response, [(text, learned)], whether an EOS follows, whether the tokenizer adds its own)."""
    response = row.get(response_field)
    if response is not None and not isinstance(response, str):
        raise UserError(f"{where}: field {response_field!r} holds {type(response).__name__}, not text")
    cut = row.get("finish_reason") == "length"
    messages = row.get(messages_field)
    if messages is None:
        prompt = row.get(prompt_field)
        if not isinstance(prompt, str) or response is None:
            missing = prompt_field if not isinstance(prompt, str) else response_field
            raise UserError(
                f"{where}: has no text in {missing!r} and no chat in {messages_field!r}; its fields: "
                f"{', '.join(map(str, row))}"
            )
        if not chat:
            return prompt, response, [(prompt, False), (response, True)], not cut, True
        messages = as_messages(prompt)
    elif (wrong := why_no_chat(messages)) is not None:
        raise UserError(f"{where}: field {messages_field!r} is no chat: {wrong}")
    if messages[-1]["role"] != "assistant":
        if response is None:
            raise UserError(f"{where}: the chat ends with {messages[-1]['role']}, and there is no {response_field!r}")
        messages = [*messages, {"role": "assistant", "content": response}]
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a chat, but this tokenizer has no chat template; use one of an instruction-tuned model"
        )
    asked, response = messages[:-1], messages[-1]["content"]
    pieces, end = _chat_pieces(tokenizer, messages, where, cut)
    return asked, response, pieces, end, False


def _chat_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, cut: bool
) -> tuple[list[tuple[str, bool]], bool]:
    whole = render(tokenizer, messages, where)
    pieces, at = [], 0
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        raise UserError(f"{where}: the chat begins with its only answer; it needs a turn before it")
    for i in turns:
        before = render(tokenizer, messages[:i], where, add_generation_prompt=True)
        last = i == turns[-1]
        with_turn = whole if last else render(tokenizer, messages[: i + 1], where)
        kept = len(before) >= at and with_turn.startswith(before) and whole.startswith(with_turn)
        if last and (cut or not kept):
            # as the model saw it when it answered; a template that writes past turns otherwise ends with the EOS
            if not before.startswith(whole[:at]):
                pieces, at = [], 0
            return [*pieces, (before[at:], False), (messages[i]["content"], True)], not cut
        if kept:
            pieces += [(whole[at : len(before)], False), (whole[len(before) : len(with_turn)], True)]
            at = len(with_turn)
    return pieces, False


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


def _weight(row: dict[str, Any], where: str, field: str) -> float:
    value = row.get(field, 1.0)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise UserError(f"{where}: field {field!r} is {value!r}; allowed: a number of at least 0")
    return float(value)


def _chunks(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _fitting(pairs: Pairs, n: int, too_long: str) -> tuple[Pairs, int, int]:
    """(the examples that have a place in rows of n tokens, how many lose some of their prompt, how many are out)."""
    sizes = pairs.spans[:, 1] - pairs.spans[:, 0]
    long = sizes > n
    # one token of the prompt stays, to predict the response's first from
    room = (pairs.spans[:, 1] - pairs.responses < n) if too_long == "truncate" else ~long
    kept = (~long | room) & (_learned(pairs, n) > 0)
    if not kept.any():
        raise UserError(
            f"data: none of {len(pairs)} examples fits into {n} tokens with something to learn; raise sequence_length"
        )
    return pairs.take(kept), int((long & kept).sum()), int((~kept).sum())


def _learned(pairs: Pairs, n: int) -> np.ndarray:
    """int64, how many tokens each example teaches in a row of n."""
    if not len(pairs):
        return np.zeros(0, np.int64)
    sums = np.concatenate([[0], np.cumsum(pairs.learn)])
    starts = np.maximum(pairs.spans[:, 0], pairs.spans[:, 1] - n)
    return sums[pairs.spans[:, 1]] - sums[np.minimum(starts + 1, pairs.spans[:, 1])]


def _best_fit(sizes: np.ndarray, who: np.ndarray, n: int) -> np.ndarray:
    """The row of each example: the fullest one of its teacher that has room (sizes fall within each teacher)."""
    bins = np.empty(len(sizes), dtype=np.int64)
    count, previous = 0, None
    for i, (size, teacher) in enumerate(zip(sizes.tolist(), who.tolist(), strict=True)):
        if teacher != previous:
            # rows by the room they have left; bit r of `rooms` says whether there is one with r
            by_room: list[list[int]] = [[] for _ in range(n + 1)]
            rooms, previous = 0, teacher
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room = count, n
            count += 1
        bins[i] = row
        if room > size:
            by_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return bins

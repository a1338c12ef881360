"""A student's rows as a teacher with another tokenizer reads them, and the spans of tokens that are the same bytes.

A row's text is cut anew by the teacher's own tokenizer, document by document. Prompts and responses that were read with
both tokenizers (`Examples`) are the teacher's own rendering of them, its chat template included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mohawk.data.next_tokens import IGNORED
from mohawk.data.text import tokenizer_key
from mohawk.data.tokenizers.token_bytes import Span, TokenBytes, met_spans, shared_tokens, special_roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.data.pair_tokens import Pairs

SHORT = 8  # rows of a teacher's are padded to a multiple of so many tokens


@dataclass(frozen=True)
class Spans:
    """Where two tokenizations of a batch meet: (spans) each but for the pairs of ends.

    rows: int64 (s), the row of the batch. student, teacher: int64 (s, 2), tokens [first, last) of the row, whose first
    one is predicted from another of its document on both sides; all of the student's have labels.
    """

    rows: Tensor
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Reading:
    """A text of a teacher's. ids: its tokens. turns: for each answer in it, its place among those of the student's
    text, counted from the end (-1 is the last one), and its tokens."""

    ids: list[int]
    turns: list[tuple[int, range]]


class Examples:
    """Prompts and responses as both tokenizers have them, found by the student's ids.

    Both have the same answers in the same order, but not in the same texts: a template that writes history otherwise
    makes several texts of a chat (mohawk/data/chat.py). So answers are what is matched, chat by chat.

    sequence_length: of the student's rows, in which a longer example loses the left of its prompt.
    """

    def __init__(self, ours: Pairs, theirs: Pairs, sequence_length: int):
        self.theirs, self.length = theirs, sequence_length
        self.places: dict[bytes, int] = {}
        for i, (first, last) in enumerate(ours.spans.tolist()):
            self.places[self._key(ours.tokens[first:last].astype(np.int64))] = i
        self.turns = _matched(ours, theirs)

    def _key(self, ids: np.ndarray) -> bytes:
        if len(ids) >= self.length:  # the first token of a row may be the BOS in another's place
            ids = ids[len(ids) - self.length + 1 :]
        return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).digest()

    def find(self, ids: np.ndarray) -> list[Reading] | None:
        """The teacher's texts of a document of the student's, each to its last answer that is in there; None for
        another text than these examples."""
        if (i := self.places.get(self._key(ids))) is None:
            return None
        turns = self.turns[i]
        found = []
        for text, group in groupby(enumerate(turns, -len(turns)), key=lambda entry: entry[1][0]):
            spans = [(place, other) for place, (_, other) in group]
            first = int(self.theirs.spans[text, 0])
            found.append(Reading(self.theirs.tokens[first : first + spans[-1][1].stop].tolist(), spans))
        return found


def _matched(ours: Pairs, theirs: Pairs) -> list[list[tuple[int, range]]]:
    """For each example of ours, of each of its answers the example of theirs that has it, and where in that."""
    answers = [_answers(pairs) for pairs in (ours, theirs)]
    chats = [_by_value(pairs.prompts if pairs.chats is None else pairs.chats) for pairs in (ours, theirs)]
    there: dict[int, list[tuple[int, range]]] = {}
    for chat, examples in chats[0].items():
        others = [(k, span) for k in chats[1].get(chat, ()) for span in answers[1][k]]
        if len(others) != sum(len(answers[0][i]) for i in examples):  # answers side by side that one template parts
            others = []
        for i in examples:
            there[i], others = others[: len(answers[0][i])], others[len(answers[0][i]) :]
    return [there[i] for i in range(len(ours))]


def _by_value(of: np.ndarray) -> dict[int, list[int]]:
    """The places of each value, ascending."""
    found: dict[int, list[int]] = {}
    for i, value in enumerate(of.tolist()):
        found.setdefault(value, []).append(i)
    return found


def _answers(pairs: Pairs) -> list[list[range]]:
    """Of each example the tokens of its answers, counted from its first one."""
    return [_ranges(np.asarray(pairs.learn[first:last])) for first, last in pairs.spans.tolist()]


class TokenAligner:
    """Turns a student's batches into a teacher's, and says where both cut the text alike.

    Attributes:
        same: whether both tokenizers are one and the same.
        shared: (student's id, teacher's id) of tokens that stand for the same bytes, ascending in the student's.
        examples: prompts and responses that are rendered by each side's own template.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        examples: Sequence[Examples] = (),
        longest: int | None = None,
    ):
        """longest: tokens that the teacher can read in a row; what is beyond is left out.

        Raises UserError where one of the tokenizers does not give back text as it was.
        """
        self.student, self.teacher = TokenBytes(student, "student"), TokenBytes(teacher, "teacher")
        self.same = tokenizer_key(student) == tokenizer_key(teacher)
        self.roles = special_roles(self.student, self.teacher)
        self.shared = shared_tokens(self.student, self.teacher, self.roles)
        self.examples, self.longest = list(examples), longest

    def batch(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Spans]:
        """The teacher's columns `input_ids`, `position_ids` and `segment_ids` (b, m) of a student's batch, and the
        spans.

        batch: `input_ids` and `labels` (b, n), unshifted; `segment_ids` of packed rows, or `attention_mask`.
        """
        device = batch["input_ids"].device
        plain = {name: batch[name].cpu() for name in ("input_ids", "labels", "segment_ids") if name in batch}
        mask = batch.get("attention_mask")
        if "segment_ids" not in plain:
            real = torch.ones_like(plain["input_ids"]) if mask is None or mask.dim() != 2 else mask.cpu()
            plain["segment_ids"] = torch.where(real.bool(), 0, -1)
        made = [
            self.row(*(plain[name][i].numpy() for name in ("input_ids", "labels", "segment_ids")))
            for i in range(len(plain["input_ids"]))
        ]
        width = max(1, -(-max((len(ids) for ids, _, _ in made), default=0) // SHORT) * SHORT)
        found = np.array([(i, *span) for i, (_, _, spans) in enumerate(made) for span in spans], dtype=np.int64)
        spans = torch.from_numpy(found.reshape(-1, 5)).to(device)
        rows = [self.columns(ids, segments, width) for ids, segments, _ in made]
        columns = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        return columns, Spans(spans[:, 0], spans[:, 1:3], spans[:, 3:5])

    def columns(self, ids: Sequence[int], segments: Sequence[int], width: int) -> dict[str, Tensor]:
        """A teacher's row, filled up to `width` tokens."""
        fill = width - len(ids)
        starts = np.flatnonzero(np.diff(np.asarray(segments, dtype=np.int64), prepend=-2))
        positions = np.arange(len(ids)) - np.repeat(starts, np.diff([*starts, len(ids)]))
        pad = self.teacher.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([*ids, *[0 if pad is None else pad] * fill], dtype=torch.int64),
            "position_ids": torch.from_numpy(np.concatenate([positions, np.arange(fill)])).to(torch.int64),
            "segment_ids": torch.tensor([*segments, *[-1] * fill], dtype=torch.int64),
        }

    def row(self, ids: np.ndarray, labels: np.ndarray, segments: np.ndarray) -> tuple[list[int], list[int], list[Span]]:
        """The teacher's ids of a row, the text that each is of, counted from 0, and the spans.

        ids, labels, segments: int64 (n), the student's; segments are -1 at padding.
        """
        made: list[int] = []
        of: list[int] = []
        spans: list[Span] = []
        cuts: list[int] = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1)).tolist()
        for start, stop in zip(cuts, [*cuts[1:], len(ids)], strict=True):
            if segments[start] < 0:
                continue
            learned = labels[start:stop] != IGNORED
            learned_before = np.concatenate([[0], np.cumsum(learned)])
            for theirs, found in self._document(ids[start:stop], learned):
                room = len(theirs) if self.longest is None else max(0, self.longest - len(made))
                for a, b, c, d in found:
                    # the first token of a document is predicted from nothing, and a span is learned whole or not at all
                    if a > 0 and c > 0 and d <= room and learned_before[b] - learned_before[a] == b - a:
                        spans.append((start + a, start + b, len(made) + c, len(made) + d))
                theirs = theirs[:room]
                of += [of[-1] + 1 if of else 0] * len(theirs)
                made += theirs
        return made, of, spans

    def _document(self, ids: np.ndarray, learned: np.ndarray) -> list[tuple[list[int], list[Span]]]:
        """The teacher's texts of a document of the student's, one but for chats, and where both meet."""
        for examples in self.examples:
            if (found := examples.find(ids)) is not None:
                own, made = _ranges(learned), []  # of an example that was cut on the left the last ones
                for reading in found:
                    turns = [(own[place], other) for place, other in reading.turns if place >= -len(own)]
                    spans = [
                        span for mine, other in turns for span in self._turn(ids.tolist(), mine, reading.ids, other)
                    ]
                    if turns:
                        made.append((reading.ids, spans))
                return made
        return [self._cut_anew(ids.tolist())]

    def _cut_anew(self, ids: list[int]) -> tuple[list[int], list[Span]]:
        """A document that is cut by the teacher's tokenizer: text between special tokens, and those by their roles."""
        student, teacher = self.student, self.teacher
        made: list[int] = []
        spans: list[Span] = []
        at = 0
        begins = student.prefix == ids[: len(student.prefix)]
        if begins:  # also where the student's tokenizer puts nothing in front, so that nothing says where texts begin
            made, at = list(teacher.prefix), len(student.prefix)
        while at < len(ids):
            if ids[at] in student.special:
                if (role := self.roles.get(ids[at])) is not None:
                    spans.append((at, at + 1, len(made), len(made) + 1))
                    made.append(role)
                at += 1
                continue
            stop = next((i for i in range(at, len(ids)) if ids[i] in student.special), len(ids))
            pieces = student.pieces(ids[at:stop], b"" if begins and at and at == len(student.prefix) else b" ")
            first, last = _whole_characters(pieces)
            pieces = pieces[first:last]
            text = b"".join(pieces).decode("utf-8", "replace")
            theirs = teacher.encode(text)
            others = teacher.pieces(theirs, text.encode())
            found = met_spans(pieces, others)
            spans += [(at + first + a, at + first + b, len(made) + c, len(made) + d) for a, b, c, d in found]
            made += theirs
            at = stop
        return made, spans

    def _turn(self, ours: list[int], mine: range, theirs: list[int], other: range) -> list[Span]:
        """Spans of what both sides learn of one turn: text by its bytes, special tokens by their roles."""
        parts = [
            [(special, list(group)) for special, group in groupby(span, key=lambda i, ids=ids, of=of: ids[i] in of)]
            for span, ids, of in ((mine, ours, self.student.special), (other, theirs, self.teacher.special))
        ]
        spans: list[Span] = []
        for (special, here), (there_special, there) in zip(*parts, strict=False):
            if special != there_special:
                break
            if special:
                for i, j in zip_longest(here, there, fillvalue=-1):
                    if i < 0 or j < 0 or self.roles.get(ours[i]) != theirs[j]:
                        return spans
                    spans.append((i, i + 1, j, j + 1))
                continue
            pieces = [
                tokens.pieces([ids[i] for i in part], b" ")
                for tokens, ids, part in ((self.student, ours, here), (self.teacher, theirs, there))
            ]
            if b"".join(pieces[0]).lstrip(b" ") == b"".join(pieces[1]).lstrip(b" "):
                pieces = [_without_space_in_front(side) for side in pieces]
            spans += [
                (here[0] + a, here[0] + b, there[0] + c, there[0] + d) for a, b, c, d in met_spans(pieces[0], pieces[1])
            ]
        return spans


def _without_space_in_front(pieces: list[bytes]) -> list[bytes]:
    """Tokens without the spaces that a template or a tokenizer put before them."""
    made, inside = [], False
    for piece in pieces:
        piece = piece if inside else piece.lstrip(b" ")
        inside = inside or bool(piece)
        made.append(piece)
    return made


def _ranges(flags: np.ndarray) -> list[range]:
    """Where flags are true, one behind the other."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags.astype(bool), [False]]).astype(np.int8)))
    return [range(a, b) for a, b in edges.reshape(-1, 2).tolist()]


def _whole_characters(pieces: Sequence[bytes]) -> tuple[int, int]:
    """Which tokens [first, last) of a text that may begin or end within a character do neither."""
    first, last = 0, len(pieces)
    while first < last and 0x80 <= (pieces[first] or b"\0")[0] < 0xC0:
        first += 1
    while first < last and _is_cut(b"".join(pieces[max(first, last - 4) : last])):
        last -= 1
    return first, last


def _is_cut(text: bytes) -> bool:
    """Whether a text ends within a character."""
    for back in range(1, min(4, len(text)) + 1):  # where the last character may begin
        lead = text[-back]
        if lead >= 0xC0:
            return (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) > back
        if lead < 0x80:
            return False
    return False


class TeacherRows:
    """A dataset's rows as the teacher reads them, of one length, by index: what `mohawk cache` asks it about.

    length: of the rows; None: that of the longest. rows: of the first so many alone is that looked for.
    """

    def __init__(self, dataset: Any, aligner: TokenAligner, length: int | None = None, rows: int | None = None):
        self.dataset, self.aligner, self.seed = dataset, aligner, getattr(dataset, "seed", None)
        if length is None:
            longest = max(len(self._made(i)[0]) for i in range(len(dataset) if rows is None else rows))
            length = max(2, -(-longest // SHORT) * SHORT)
        self.length = length

    def __len__(self) -> int:
        return len(self.dataset)

    def _made(self, index: int) -> tuple[list[int], list[int], list[Span]]:
        row = self.dataset[index]
        return self.aligner.row(*(row[name].numpy() for name in ("input_ids", "labels", "segment_ids")))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, segments, _ = self._made(range(len(self))[index])
        return self.aligner.columns(ids[: self.length], segments[: self.length], self.length)


class AlignedRows(torch.utils.data.Dataset):
    """A student's rows with the columns of a cache of the teacher's rows (`CachedRows` of `TeacherRows`)."""

    def __init__(self, dataset: Any, cached: Any):
        self.dataset, self.cached = dataset, cached

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        answers = {name: column for name, column in self.cached[index].items() if name.startswith("teacher_")}
        return {**self.dataset[index], **answers}

"""`mohawk cache --endpoint`: the top k of a teacher behind a server, which says them of the text that it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from mohawk.errors import UserError
from mohawk.generation.prompt_logprobs import Likeliest, PromptScorer, Scored, asked
from mohawk.kernels.kd.teachers import TeacherTopK
from mohawk.losses.shared_vocabulary import shared_part
from mohawk.teacher_cache.answers import top_k_columns
from mohawk.teacher_cache.layout import Layout
from mohawk.teacher_cache.writer import keep_answers

if TYPE_CHECKING:
    from mohawk.teacher_cache.reader import TeacherCache

PROBED = 4  # tokens of the first row that a server is tried with


@dataclasses.dataclass(frozen=True)
class EndpointAnswers:
    """What is kept of an endpoint's answers, as `mohawk.teacher_cache.answers.Answers` is of a model's."""

    scorer: PromptScorer
    dataset: Any
    layout: Layout

    def columns(self, batch: Mapping[str, Tensor], indices: range) -> Iterator[dict[str, np.ndarray]]:
        """The columns of each row, rows `indices` of the data: each document of a row is asked about by itself."""
        rows = [self.dataset[i] for i in indices]
        spans = [_documents(row) for row in rows]
        prompts = [
            asked(row["input_ids"][start:stop].tolist(), f"row {i}")
            for i, row, own in zip(indices, rows, spans, strict=True)
            for start, stop in own
        ]
        answers = self.scorer.responses(prompts)
        for index, own in zip(indices, spans, strict=True):
            found: list[Likeliest] = [{}] * self.layout.sequence_length
            for start, _ in own:
                _, (answer,) = next(answers)
                if not isinstance(answer, Scored):
                    raise UserError(
                        f"endpoint: {self.scorer.url}: row {index}: {answer.error}; see what the server allows and "
                        "run the same command, it goes on"
                    )
                found[start : start + len(answer.likeliest)] = answer.likeliest
            yield self._columns(found, index)
        next(answers, None)  # which ends it

    def _columns(self, found: Sequence[Likeliest], index: int) -> dict[str, np.ndarray]:
        k, entries = self.layout.k, self.layout.vocab_size
        ids = torch.arange(entries, entries + k).repeat(len(found), 1)  # of none, until the server names one
        logprobs = torch.full(ids.shape, float("-inf"))
        for t, place in enumerate(found):
            named = sorted(place.items(), key=lambda entry: -entry[1])[:k]
            if named and max(i for i, _ in named) >= entries:
                raise UserError(
                    f"endpoint: {self.scorer.url}: row {index}: names a token beyond the {entries} that there are"
                )
            ids[t, : len(named)] = torch.tensor([i for i, _ in named], dtype=torch.int64)
            logprobs[t, : len(named)] = torch.tensor([value for _, value in named])
        mass = logprobs.logsumexp(-1)
        if float(mass.max()) > 0.1:
            raise UserError(f"endpoint: {self.scorer.url}: row {index}: its log-probabilities add up to more than 1")
        # what is left of 1; where nothing is known it is all
        tail = torch.log((-torch.expm1(mass.clamp(max=0.0))).clamp_min(1e-7))
        whole = cast(TeacherTopK, shared_part(TeacherTopK(ids, logprobs, tail), entries))
        logprobs, order = torch.sort(whole.logprobs, dim=-1, descending=True, stable=True)
        assert whole.tail_logprob is not None
        return top_k_columns(self.layout, logprobs, whole.ids.gather(-1, order), whole.tail_logprob)

    def ended(self) -> None:
        """There is no other process to tell."""


def _documents(row: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Where the documents of a row of two tokens or more begin and end."""
    segments = row["segment_ids"].tolist() if "segment_ids" in row else [0] * len(row["input_ids"])
    cuts = [i for i in range(len(segments)) if i == 0 or segments[i] != segments[i - 1]]
    spans = zip(cuts, [*cuts[1:], len(segments)], strict=True)
    return [(start, stop) for start, stop in spans if segments[start] >= 0 and stop - start > 1]


def cache_endpoint(
    folder: str | Path,
    scorer: PromptScorer,
    dataset: Any,
    *,
    vocab_size: int,
    tokenizer_hash: str,
    rows: int | None = None,
) -> TeacherCache:
    """A cache of the top k that an endpoint gives for a dataset's rows, or go on with that, or find it done.

    vocab_size: the teacher's. tokenizer_hash: of the tokenizer that made the rows. Raises UserError as `write_cache`,
    and where the server cannot answer.
    """
    first = dataset[0]
    start, stop = (_documents(first) or [(0, len(first["input_ids"]))])[0]
    scorer.probe(first["input_ids"][start : min(stop, start + PROBED)].tolist())
    layout = Layout("top-k", len(first["input_ids"]), vocab_size, min(scorer.k, vocab_size))
    teacher = {"name": scorer.model, "sha256": None, "autocast": None, "endpoint": scorer.identity()}
    return keep_answers(
        folder, EndpointAnswers(scorer, dataset, layout), dataset, teacher=teacher, temperature=1.0, rows=rows,
        tokenizer_hash=tokenizer_hash, batch_size=scorer.concurrency,
    )  # fmt: skip

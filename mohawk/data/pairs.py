"""Prompts and responses to packed rows: whole examples, nothing learned of a prompt, responses weighted.

    read_pairs(sources, tokenizer)     JSON lines (or Parquet, or a hub dataset) -> Pairs (pair_tokens.py)
    split_pairs(pairs, share)          -> (training Pairs, held-out Pairs), by prompt
    PairsDataset(pairs, length)        a torch map-style dataset of rows, for mohawk.data.packing.collate

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

import logging
from typing import Any

import numpy as np
import torch

from mohawk.data.next_tokens import IGNORED
from mohawk.data.pair_tokens import Pairs, no_score, read_pairs
from mohawk.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["Pairs", "PairsDataset", "read_pairs", "response_weights", "split_pairs"]

WEIGHTINGS = ("uniform", "counts", "probability", "importance")
TOO_LONG = ("truncate", "drop")


def split_pairs(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """Split into (training, held-out) examples; about `share` of the prompts, with all their responses, are held out.
    All examples of a chat are on one side.

    Which ones depends on the prompts' text alone. Raises UserError when share is not in [0, 1) or leaves either side
    without a prompt.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.validation_share: got {share}; allowed: 0 up to, but not including, 1")
    chats = pairs.prompts if pairs.chats is None else pairs.chats
    unique = np.unique(chats)  # hashes: their order is as good as random
    count = round(share * len(unique))
    if share > 0 and not 0 < count < len(unique):
        raise UserError(
            f"data.validation_share: {share} of {len(unique)} prompts holds out {count}; give more, or set 0"
        )
    held = np.isin(chats, unique[:count])
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
        raise UserError(no_score(pairs.unknown[name], name, weighting))
    counted = np.ones(len(pairs), dtype=bool)
    if weighting == "probability":
        counted[:] = False
        counted[first] = True
    highest = np.full(group.max() + 1, -np.inf)
    np.maximum.at(highest, group, scores)
    weights = np.exp(scores - highest[group]) * counted
    return weights / np.bincount(group, weights=weights)[group]


def check_pairs(
    pairs: Pairs, sequence_length: int, *, weighting: str | None, length_normalized: bool, too_long: str
) -> None:
    """UserError where a `PairsDataset` of these would refuse them; without putting its rows together."""
    fitting, *_ = _fitting(pairs, sequence_length, too_long)
    weights = response_weights(fitting, weighting, length_normalized=length_normalized)
    if not (weights * (1.0 if fitting.weights is None else fitting.weights) > 0).any():
        raise UserError(f"data: none of {len(fitting)} examples has a weight above 0")


class PairsDataset(torch.utils.data.Dataset):
    """Rows of `sequence_length` tokens, each of whole examples (best fit, longest first), in the seed's order.

    Each row is a dict of tensors (sequence_length): `input_ids`, `position_ids`, `segment_ids`, `labels` (int64, as
    PackedDataset's; labels are -100 on prompts too) and `weights` (float32, an example's weight on its tokens, 0 on
    padding); where the pairs have tasks, `task` (int64, an example's on its tokens, 0 on padding); and, where they have
    teachers, `teacher` () int64: a row's examples share theirs.

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
        """What one epoch reads: the examples in the order of the places, and the order of the rows."""
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
        labels = np.full(n, IGNORED, dtype=np.int64)
        weights, tasks = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.int64)
        filled = 0
        chosen = examples[self._places[self._starts[row] : self._starts[row + 1]]]
        for segment, example in enumerate(chosen):
            first, last = self.pairs.spans[example].tolist()
            start = max(first, last - n)
            ids = self.pairs.tokens[start:last].astype(np.int64)
            # nothing is predicted before the first token
            learn = self.pairs.learn[start:last] & (np.arange(len(ids)) > 0)
            if first < start < self.pairs.responses[example] and self.pairs.tokens[first] == self.pairs.bos_token_id:
                # pyrefly: ignore[unsupported-operation]  # which is not None here: it equals a token
                ids[0] = self.pairs.bos_token_id
            here = slice(filled, filled + len(ids))
            input_ids[here] = ids
            position_ids[here] = np.arange(len(ids))
            segment_ids[here] = segment
            labels[here] = np.where(learn, ids, IGNORED)
            weights[here] = self.weights[example]
            if self.pairs.tasks is not None:
                tasks[here] = self.pairs.tasks[example]
            filled += len(ids)
        position_ids[filled:] = np.arange(n - filled)
        columns = {"input_ids": input_ids, "position_ids": position_ids, "segment_ids": segment_ids, "labels": labels}
        columns |= {"weights": weights, **({} if self.pairs.tasks is None else {"task": tasks})}
        columns = {name: torch.from_numpy(values) for name, values in columns.items()}
        if self.pairs.teachers is not None:
            columns["teacher"] = torch.tensor(int(self.pairs.teachers[chosen[0]]))
        return columns


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
    ends = pairs.spans[:, 1]
    starts = np.maximum(pairs.spans[:, 0], ends - n) + 1  # the first token of a segment is never learned
    # sums of flags between each start and end; the flag behind them all is for the last end
    between = np.stack([np.minimum(starts, ends), ends], 1).reshape(-1)
    sums = np.add.reduceat(np.append(pairs.learn, False), between, dtype=np.int64)[::2]
    return np.where(starts < ends, sums, 0)


def _best_fit(sizes: np.ndarray, who: np.ndarray, n: int) -> np.ndarray:
    """The row of each example: the fullest one of its teacher that has room (sizes fall within each teacher)."""
    bins = np.empty(len(sizes), dtype=np.int64)
    count, previous, rooms = 0, None, 0
    by_room: list[list[int]] = []
    for i, (size, teacher) in enumerate(zip(sizes.tolist(), who.tolist(), strict=True)):
        if teacher != previous:
            # rows by the room they have left; bit r of `rooms` says whether there is one with r
            by_room = [[] for _ in range(n + 1)]
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

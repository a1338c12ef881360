"""A teacher's scores, tile by tile, for the chunked and the Triton backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mohawk.kernels.kd.options import KDTask, take
from mohawk.kernels.kd.vocabulary import Known


class Scores:
    """A teacher's tempered scores (unnormalised log-probabilities), tile by tile."""

    def __init__(self, task: KDTask):
        teacher = task.teacher
        self.parts, self.shares, self.step = teacher.parts(), teacher.shares(), teacher.step
        self.rows, self.options, self.dtype = task.rows, task.options, task.scale.dtype
        self.in_tiles = [one for one in self.parts if one.in_tile]
        self.tiles: list[Tensor] = []
        self.start = 0

    def load(self, start: int, stop: int, tiles: list[Tensor]) -> None:
        """Makes the scores that come from a matrix product, for all rows start..stop at once, in `tiles`."""
        self.start, self.tiles = start, [tile[: stop - start] for tile in tiles]
        for one, tile in zip(self.in_tiles, self.tiles, strict=True):
            one.fill(lambda x: take(x, self.rows, start, stop), tile)

    def _part(self, k: int, start: int, stop: int) -> Tensor:
        """Scores of one dense teacher for rows start..stop; not to be overwritten where they are the teacher's own."""
        one, temperature = self.parts[k], self.options.settings.temperature
        ours, stored = True, one.stored()
        if one.in_tile:
            at = sum(other.in_tile for other in self.parts[:k])
            scores = self.tiles[at][start - self.start : stop - self.start]
            one.finish(scores)
        elif stored is not None:
            scores = take(stored, self.rows, start, stop)[:, : self.options.vocabulary.local]
            ours = self.rows is not None or scores.dtype != self.dtype
            scores = scores.to(self.dtype)
        else:
            part = one.map_rows(lambda x, trailing: take(x, self.rows, start, stop))
            scores = part.scores(self.dtype)[:, : self.options.vocabulary.local]
        if temperature == 1.0:
            return scores
        return scores.div_(temperature) if ours else scores / temperature

    def _towards(self, scores: Tensor, student: Tensor) -> Tensor:
        """TAID's target: the student's scores moved towards the teacher's by the share t."""
        t = self.step
        if t == 1.0:
            return scores
        # Not torch.lerp: -inf on both sides would be NaN.
        return (student * (1 - t)).add_(scores, alpha=t) if t else student

    def unnormalised(self, start: int, stop: int, student: Tensor) -> Iterator[Tensor]:
        """The scores of rows start..stop whose log-normalisers have to be known: one for each teacher of a mixture,
        else the teacher's own. `student` holds the student's tempered logits. Not to be overwritten."""
        if self.shares is not None:
            return (self._part(k, start, stop) for k in range(len(self.parts)))
        return iter([self._towards(self._part(0, start, stop), student)])

    def combined(self, parts: Iterable[Tensor], norms: Sequence[Tensor] | None, student: Tensor) -> Tensor:
        """The teacher's scores, not to be overwritten, from its parts and, where ranks share the vocabulary, the
        log-normalisers of these."""
        parts = iter(parts)
        if self.shares is None:
            return next(parts)
        weighted = (
            log_softmax(next(parts), norms[k] if norms else None).add_(math.log(weight))
            for k, weight in enumerate(self.shares)
        )
        return self._towards(functools.reduce(torch.logaddexp, weighted), student)

    def norm(self, combined: Tensor, known: Known) -> Tensor:
        """The log-normalisers of the combined scores where ranks share the vocabulary."""
        if self.shares is None:
            return known.teachers[0]
        if self.step == 1.0:
            return torch.zeros_like(known.teachers[0])
        return torch.logsumexp(self.options.vocabulary.every(torch.logsumexp(combined, -1)), 0)


def log_softmax(scores: Tensor, norm: Tensor | None = None) -> Tensor:
    """A new tensor: log-probabilities over the whole vocabulary, whose log-normalisers are given where this is only
    a slice of it."""
    return torch.log_softmax(scores, -1) if norm is None else scores - norm.unsqueeze(-1)

"""A teacher whose batches of prompts are dealt to several processes; the first one alone writes what all answer.

Batches are cut from the whole list of prompts, so that answers are those of one process, whatever their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch

from mohawk.core.processes import agree, count, from_all, is_first, rank
from mohawk.data.records import Prompt
from mohawk.errors import SaidElsewhere, UserError
from mohawk.generation.decoding import LocalTeacher, Response
from mohawk.models.sharding import called_apart, is_sharded

Answered = tuple[int, list[Response]]


class DealtTeacher:
    """What `generate_data` asks on the first process, while the others `serve`."""

    def __init__(self, teacher: LocalTeacher):
        self.teacher, self.decoding, self.chat = teacher, teacher.decoding, teacher.chat
        self._identity = teacher.identity()  # which all processes must ask of a model in parts
        self.busy = False  # in the middle of a round, which the others are in too

    def identity(self) -> dict[str, Any]:
        """What tells the teacher from others."""
        return self._identity

    def responses(
        self, prompts: Sequence[Prompt], first: int = 0, stop: int | None = None
    ) -> Generator[Answered, None, None]:
        """As `LocalTeacher.responses`; on the first process."""
        stop = len(prompts) if stop is None else stop
        each = self.teacher.prompts_apart()
        begin = first - first % each
        while begin < stop:
            agree((begin, first, stop))
            yield from self._round(prompts, begin, first, stop)
            begin += each * count()

    def serve(self, prompts: Sequence[Prompt]) -> None:
        """Answer this process's share, on all but the first, until it says that it is done. Raises what it says that
        ends all."""
        assert not is_first()
        while (asked := agree(None)) is not None:
            if isinstance(asked, BaseException):
                raise asked
            self._round(prompts, *asked)

    def done(self, failed: BaseException | None = None) -> None:
        """Let the others go, which end with an error where the first one has `failed`; amid a round they hear of that
        by its end."""
        if self.busy:
            return
        if isinstance(failed, UserError):
            agree(SaidElsewhere(str(failed)))
        elif failed is not None:
            agree(SystemExit(130 if isinstance(failed, KeyboardInterrupt) else 1))
        else:
            agree(None)

    def _round(self, prompts: Sequence[Prompt], begin: int, first: int, stop: int) -> list[Answered]:
        """The answers of as many batches as there are processes, in the prompts' order, on all of them."""
        self.busy = True
        each = self.teacher.prompts_apart()
        own = begin + rank() * each
        model = self.teacher.model
        with called_apart(model, self._idle) if is_sharded(model) else contextlib.nullcontext():
            until = min(stop, own + each)
            answers = list(self.teacher.responses(prompts, max(first, own), until)) if own < until else []
        found = [one for part in from_all(answers) for one in part]
        self.busy = False
        return found

    @torch.no_grad()
    def _idle(self) -> None:
        """One pass, of which nothing is kept, where others are not done."""
        model: Any = self.teacher.model
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)

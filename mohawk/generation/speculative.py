"""Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a student drafts tokens,
its teacher reads them in one pass and keeps those that it would have written itself.

What comes out is distributed as the teacher's own sampling; greedy, it is the teacher's own text, but where two tokens
are as likely as float rounding lets the teacher tell, which is another in a pass over several tokens than in a step.

Keys and values are cut back to the tokens that were kept. A state cannot be: the draft's states are copied before each
token, and one of these copies is gone on with. A model with states as the teacher has them copied once a round, and
reads the tokens that were kept again.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mohawk.errors import UserError
from mohawk.losses.heads import vocabulary_rows
from mohawk.models.call import CACHE

if TYPE_CHECKING:
    from mohawk.loading.causal import CausalLM


class Reader(Protocol):
    """A model that goes through a text and back: `Track`."""

    tokens: list[int]
    vocab: int  # ids that it knows

    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        """Go on with these tokens: the logits after the last `keep` of them, float64 (keep, vocab)."""
        ...

    def remember(self) -> None:
        """Keep the state that there is now, for `back_to`."""
        ...

    def back_to(self, length: int) -> int:
        """Forget all but the first tokens; how many of these had to be read again for it."""
        ...


class Track:
    """A model, its cache, and the tokens that are in it. Raises UserError for a model whose cache is not
    transformers' DynamicCache."""

    def __init__(self, model: CausalLM, who: str = "model"):
        self.model, self.who, self.vocab = model, who, vocabulary_rows(model)
        self.tokens: list[int] = []
        self.cache: Any = None
        self.kept: dict[int, tuple[list[Any], dict[str, int]]] = {}
        self.copied = 0  # bytes
        self.few = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        start = len(self.tokens)
        positions = torch.arange(start, start + len(ids), device=self.model.device)[None]
        row = torch.tensor([list(ids)], device=self.model.device)
        options = {"logits_to_keep": keep} if self.few else {}
        output = self.model(input_ids=row, position_ids=positions, use_cache=True, **{CACHE: self.cache}, **options)
        if not isinstance(cache := output.get(CACHE), DynamicCache):
            raise UserError(f"{self.who}: {type(self.model).__name__} keeps no cache that could be gone back in")
        self.cache = cache
        self.tokens += ids
        return output.logits[0, -keep:].double()

    def remember(self) -> None:
        self.kept[len(self.tokens)] = [_copied(layer) for layer in self.cache.layers], _counts(self.cache)
        size = sum(value.numel() * value.element_size() for layer in self.kept[len(self.tokens)][0]
                   if not isinstance(layer, int) for value in _tensors(layer))  # fmt: skip
        self.copied = max(self.copied, size)

    def back_to(self, length: int) -> int:
        again: list[int] = []
        if length < len(self.tokens):
            if all(type(layer) is DynamicLayer for layer in self.cache.layers):
                for layer in self.cache.layers:
                    _cut(layer, length)
                del self.tokens[length:]
            else:
                start = max((place for place in self.kept if place <= length), default=0)
                if start:
                    self._restore(*self.kept[start])
                else:
                    self.cache = None
                again = self.tokens[start:length]
                del self.tokens[start:]
        self.kept.clear()
        if again:
            self.read(again, 1)
        return len(again)

    def _restore(self, layers: Sequence[Any], counts: dict[str, int]) -> None:
        for layer, state in zip(self.cache.layers, layers, strict=True):
            if isinstance(state, int):
                _cut(layer, state)
            else:
                vars(layer).update(state)
        vars(self.cache).update(counts)


def _copied(layer: Any) -> Any:
    """What brings a cache's layer back: of keys and values alone, which only grow, their length."""
    if type(layer) is DynamicLayer:
        return layer.get_seq_length()
    return {name: _clone(value) for name, value in vars(layer).items()}


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _clone(entry) for name, entry in value.items()}
    return [_clone(entry) for entry in value] if isinstance(value, list) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for entry in inside for tensor in _tensors(entry)]


def _counts(cache: Any) -> dict[str, int]:
    """What a cache counts itself, as one of states alone does."""
    return {name: value for name, value in vars(cache).items() if type(value) is int}


def _cut(layer: Any, length: int) -> None:
    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


@dataclass
class Told:
    """What decoding with a draft came to. seconds: by `draft`, `teacher` (reading prompt and drafts) and `back`."""

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    read_again: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "teacher": 0.0, "back": 0.0})


def speculate(
    teacher: Reader,
    draft: Reader,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    drafted: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    write: Callable[[list[int]], None] = lambda tokens: None,
) -> Told:
    """A continuation of a prompt by the teacher, up to and with the first of the tokens that end a text.

    teacher, draft: new ones. drafted: tokens that are drafted in a round. temperature: 0 is greedy; top_p: as in
    `mohawk.generation.decoding.choose_tokens`. generator: of a CPU. write: called with each round's tokens.
    """
    told, text = Told(), list(prompt)

    def timed(name: str, work: Callable[..., Any], *given: Any) -> Any:
        begin = time.perf_counter()
        made = work(*given)
        told.seconds[name] += time.perf_counter() - begin
        return made

    if len(text) > 1:
        timed("teacher", teacher.read, text[:-1], 1)
        timed("draft", draft.read, _known(text[:-1], draft), 1)
    while len(told.tokens) < max_new_tokens:
        count = min(drafted, max_new_tokens - len(told.tokens) - 1)
        proposed, q = timed("draft", propose, draft, teacher.vocab, text, count, temperature, top_p, generator)
        if teacher.tokens:
            timed("back", teacher.remember)
        read = text[len(teacher.tokens) :] + proposed
        logits = timed("teacher", teacher.read, read, count + 1)
        p = distributions(logits, temperature, top_p).cpu()
        made = judge(p, q, proposed, generator)
        told.rounds += 1
        told.drafted += count
        told.accepted += len(made) - 1
        end = next((i for i, token in enumerate(made) if token in ends), None)
        made = made if end is None else made[: end + 1]
        text += made
        told.tokens += made
        write(made)
        if end is not None:
            break
        # what was not kept, and the last token, which nobody has read
        told.read_again += timed("back", teacher.back_to, len(text) - 1)
        told.read_again += timed("back", draft.back_to, min(len(draft.tokens), len(text) - 1))
    return told


def step_seconds(model: Track, steps: int) -> float:
    """The median of a few steps, one token each, behind what a model has read; afterwards it has read them too."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        model.read(model.tokens[-1:], 1).cpu()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def propose(
    draft: Reader,
    vocab: int,
    text: list[int],
    count: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> tuple[list[int], list[Tensor]]:
    """So many tokens after a text, of which the draft may have read all but the last ones; and the distribution (vocab)
    that each was drawn from: ids from 0 to `vocab` - 1, which are all that the teacher knows."""
    proposed: list[int] = []
    q: list[Tensor] = []
    for _ in range(count):
        unread = (text + proposed)[len(draft.tokens) :]
        logits = draft.read(_known(unread, draft), 1)[:, :vocab]
        draft.remember()
        q.append(distributions(logits, temperature, top_p)[0].cpu())
        proposed.append(int(torch.multinomial(q[-1], 1, generator=generator)))
    return proposed, q


def distributions(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Float64 (rows, vocab): what tokens are drawn from. Greedy, all of it is at the largest logit."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # as many of the likeliest as reach top_p: those before which it is not reached
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def judge(p: Tensor, q: Sequence[Tensor], proposed: Sequence[int], generator: torch.Generator | None) -> list[int]:
    """The tokens of a round: of those proposed as many as pass, and one more.

    p: (n + 1, vocab) the teacher's distributions after 0, ..., n of the proposed tokens. q: what each was drawn from,
    over no more ids. A token x passes with probability min(1, p(x) / q(x)); behind the first that does not, one is
    drawn from what p has more than q.
    """
    for i, token in enumerate(proposed):
        here, drawn = p[i], torch.cat([q[i], q[i].new_zeros(p.shape[1] - len(q[i]))])
        if float(torch.rand((), generator=generator, dtype=torch.float64)) < float(here[token] / drawn[token]):
            continue
        more = (here - drawn).clamp(min=0.0)
        more = more if more.any() else here  # where both are the same but for rounding
        return [*proposed[:i], int(torch.multinomial(more, 1, generator=generator))]
    return [*proposed, int(torch.multinomial(p[len(proposed)], 1, generator=generator))]


def _known(ids: Sequence[int], model: Reader) -> list[int]:
    """Ids with 0 for those that a draft has no embedding of: what it then proposes is as good a proposal."""
    return [token if token < model.vocab else 0 for token in ids]

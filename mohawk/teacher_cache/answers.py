"""What is kept of a teacher's answer, made from a batch: hidden states, or the top k or random samples of their logits.

Logits are float32 and never of more than a few hundred positions, made as `linear_kd_loss` makes them. Every row is
answered by itself and its random numbers come from (seed, row), so nothing depends on how rows are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from mohawk.core.collectives import rows_of_all
from mohawk.core.processes import agree, count, rank
from mohawk.errors import UserError
from mohawk.kernels.kd.products import finish_logits, logits_product
from mohawk.loading.configs import check_decoder
from mohawk.losses.heads import Head, final_hidden_states
from mohawk.models.sharding import is_sharded, reshard, whole
from mohawk.teacher_cache.layout import ANSWER_KINDS, DTYPES, Layout, encode_logprobs, pack_ascending, pack_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE_BYTES = 96 << 20  # of float32 logits at once


@dataclass(frozen=True)
class Answers:
    """What is kept of a teacher: its records' layout, and how hidden states become their columns."""

    teacher: PreTrainedModel
    head: Head
    layout: Layout
    temperature: float
    seed: int
    autocast: torch.dtype | None

    def columns(self, batch: Mapping[str, Tensor], indices: range) -> Iterator[dict[str, np.ndarray]]:
        """The columns of each row of a batch with `input_ids` and `position_ids` (b, n), rows `indices` of the data."""
        hidden = self._hidden(batch)
        for index, states in zip(indices, hidden, strict=True):
            if self.layout.kind == "hidden":
                if not bool(torch.isfinite(states).all()):
                    raise _not_finite(index)
                states = states.cpu()
                raw = states.view(torch.uint16) if states.dtype == torch.bfloat16 else states
                yield {"hidden": raw.numpy()}
                continue
            count = -(-4 * len(states) * len(self.head.weight) // TILE_BYTES)  # of nearly equal tiles
            ends = [len(states) * i // count for i in range(count + 1)]
            spans = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False) if end > start]
            if self.layout.kind == "top-k":
                parts = [self._top_k(states[span]) for span in spans]
            else:
                uniform = np.random.default_rng([self.seed, index]).random((len(states), self.layout.k))
                parts = [self._samples(states[span], uniform[span]) for span in spans]
            finite = [part for part in parts if part is not None]
            if len(finite) < len(parts):
                raise _not_finite(index)
            yield {name: np.concatenate([part[name] for part in finite]) for name in finite[0]}

    @torch.no_grad()
    def _hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the teacher gives its head, (b, n, hidden_size), without computing all logits."""
        rows = len(cast(Tensor, self.teacher.get_input_embeddings().weight))
        if (largest := int(batch["input_ids"].max())) >= rows:
            raise UserError(
                f"data: holds token {largest}, but the teacher has only {rows}; use the teacher's tokenizer"
            )
        if not is_sharded(self.teacher):
            return self._run(batch)
        agree(batch)  # to those who `follow`
        return self._run_dealt(batch)

    @torch.no_grad()
    def follow(self) -> None:
        """What the other processes of a teacher in parts do while the first one asks for answers, until it has `ended`
        that."""
        while (batch := agree(None)) is not None:
            self._run_dealt(batch)

    def ended(self) -> None:
        """The first process asks no more."""
        if is_sharded(self.teacher):
            agree(None)

    def _run_dealt(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`_run`, each process some of the rows."""
        rows = len(batch["input_ids"])
        each = -(-rows // count())
        own = [min(i, rows - 1) for i in range(rank() * each, (rank() + 1) * each)]
        return rows_of_all(self._run({name: column[own] for name, column in batch.items()}))[:rows]

    def _run(self, batch: Mapping[str, Tensor]) -> Tensor:
        embedding = cast(Tensor, self.teacher.get_input_embeddings().weight)
        # Where accelerate keeps the embedding elsewhere, the head lies where it computes.
        device = (self.head.weight if embedding.device.type == "meta" else embedding).device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden = final_hidden_states(self.teacher, inputs)
        return hidden.to(device=self.head.weight.device, dtype=self.head.weight.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits (rows, V) of hidden states (rows, hidden_size)."""
        logits = hidden.new_empty((len(hidden), self.layout.vocab_size), dtype=torch.float32)
        logits_product(hidden, self.head.weight[: self.layout.vocab_size], logits)
        finish_logits(logits, self.head.bias, self.head.scale, self.head.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def _top_k(self, hidden: Tensor) -> dict[str, np.ndarray] | None:
        """The records' columns of some positions; None where the logits are not finite."""
        logits = self._logits(hidden)
        values, ids = torch.topk(logits, self.layout.k, dim=-1)
        # The rest is added up by itself: 1 - sum would be noise where the k hold nearly all.
        rest = torch.logsumexp(logits.scatter_(-1, ids, float("-inf")), -1)
        norm = torch.logaddexp(torch.logsumexp(values, -1), rest)
        if not bool(torch.isfinite(norm).all()):
            return None
        return top_k_columns(self.layout, values - norm[:, None], ids, rest - norm)

    def _samples(self, hidden: Tensor, uniform: np.ndarray) -> dict[str, np.ndarray] | None:
        """The records of ids drawn by inversion of the cumulative distribution, a uniform number a draw; None where
        logits are not finite."""
        cumulative = torch.softmax(self._logits(hidden), -1).cumsum(-1, dtype=torch.float64)
        if not bool(torch.isfinite(cumulative[:, -1]).all()):
            return None
        u = torch.from_numpy(uniform).to(cumulative.device).clamp_(max=1 - 2.0**-40) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, u, right=True)
        return {"ids": pack_ids(np.sort(ids.cpu().numpy(), -1), self.layout.id_bits)}


class Kept(Protocol):
    """What answers are made by, batch after batch: a model's `Answers`, or another's."""

    @property
    def layout(self) -> Layout: ...
    def columns(self, batch: Mapping[str, Tensor], indices: range) -> Iterator[dict[str, np.ndarray]]: ...
    def ended(self) -> None: ...


def top_k_columns(layout: Layout, logprobs: Tensor, ids: Tensor, tail: Tensor) -> dict[str, np.ndarray]:
    """The records' columns of a top k: log-probabilities (rows, k), most probable first, their ids, and the log mass of
    the rest (rows)."""
    return {
        **pack_ascending(encode_logprobs(logprobs).cpu().numpy(), layout.low_bits),
        "tail": encode_logprobs(tail).cpu().numpy(),
        "ids": pack_ids(ids.cpu().numpy(), layout.id_bits),
    }


def make_answers(
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    kind: str,
    k: int,
    draws: int,
    temperature: float,
    seed: int,
    vocab_size: int | None,
    autocast: torch.dtype | None,
) -> Answers:
    """The arguments of `write_cache`, checked. Raises UserError."""
    if kind not in ANSWER_KINDS:
        raise UserError(f"kind: got {kind!r}; allowed: {', '.join(ANSWER_KINDS)}")
    if not len(dataset):
        raise UserError("data: has no rows to cache; give text")
    check_decoder(teacher, "teacher")
    reshard(teacher)
    head = Head.of(teacher)
    head = replace(head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))
    dtype = autocast or head.weight.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES or not head.weight.dtype.is_floating_point:
        raise UserError(f"teacher: its head is {head.weight.dtype}; allowed: {', '.join(DTYPES)}")
    vocab = len(head.weight) if vocab_size is None else vocab_size
    check_range("vocab_size", vocab, 1, len(head.weight))
    if not 1e-3 <= temperature <= 1e3:
        raise UserError(f"temperature: got {temperature}; allowed: 0.001 to 1000")
    check_range("seed", seed, 0)
    numbers = {"top-k": k, "samples": draws, "hidden": 0}[kind]
    if kind == "top-k":
        check_range("k", k, 1, vocab)
    elif kind == "samples":
        check_range("draws", draws, 1)
    size: dict[str, Any] = {"hidden_size": head.weight.shape[1], "dtype": name} if kind == "hidden" else {}
    if kind == "hidden":
        vocab = len(head.weight)  # the head is kept whole; the loss takes its vocab_size
    layout = Layout(kind, len(dataset[0]["input_ids"]), vocab, numbers, **size)
    head = Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.scale, head.softcap)
    return Answers(teacher, head, layout, temperature, seed, autocast)


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or high is not None and value > high:
        allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
        raise UserError(f"{name}: got {value!r}; allowed: {allowed}")


def _not_finite(row: int) -> UserError:
    return UserError(
        f"teacher: gives NaN or infinity in row {row} of the data; use another dtype (float16 overflows in some "
        "models), or another teacher"
    )

"""A teacher and a student with mixers, of which each decoder layer is taken from one or the other.

A layer is taken whole: attention or mixer with its norms and MLP. So a kept layer is the teacher's exactly, and a
replaced one has whatever phases 1 and 2 trained in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.models.families import decoder_layers
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.teacher_forcing import StandIn, layer_calls


def keep_attention(
    student: HybridForCausalLM, teacher: PreTrainedModel, ssm_layers: Collection[int]
) -> HybridForCausalLM:
    """Gives the student the teacher's own layers, all but `ssm_layers`, in place.

    Args:
        student: has a mixer in each of `ssm_layers`, and otherwise the teacher's weights (phases 1 and 2 train nothing
            outside the layers they replace).
        teacher: of the student's dtype and device; its layers are shared from now on, not copied.
        ssm_layers: layers that stay as they are in the student; none is allowed.

    Returns:
        The student, with `config.layer_types` and `config.mixer` to match.

    Raises:
        ValueError: the student has no mixer in one of `ssm_layers`, or the dtypes differ.
    """
    if missing := sorted(set(ssm_layers) - set(student.config.ssm_layers)):
        raise ValueError(f"ssm_layers: the student has no mixer in {missing}, only in {student.config.ssm_layers}")
    if student.dtype != teacher.dtype:
        raise ValueError(f"the student is {student.dtype} and the teacher {teacher.dtype}; convert one of them")
    for i, layer in enumerate(decoder_layers(teacher)):
        if i not in ssm_layers:
            decoder_layers(student)[i] = layer
    student.config.keep_mixers(ssm_layers)
    return student


class LayerSwap:
    """Runs a fixed text through any choice of layers, from stored hidden states where it can.

    The states in front of every layer are kept for one choice, the base. Another choice is run from the first layer in
    which it differs, so that trying one more layer on top of the base costs half the model on average.

    Args:
        teacher, student: as in `keep_attention`; both are left as they are.
        batches: packed batches (see `mohawk.data.packing`), run one after the other.
        autocast: dtype of the matrix products, or None for the weights' own.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: PreTrainedModel,
        student: HybridForCausalLM,
        batches: Sequence[dict[str, Tensor]],
        *,
        autocast: torch.dtype | None = None,
    ):
        if student.dtype != teacher.dtype:
            raise ValueError(f"the student is {student.dtype} and the teacher {teacher.dtype}; convert one of them")
        self.teacher, self.autocast = teacher.eval(), autocast
        self.attention, self.mixers = list(decoder_layers(teacher)), list(decoder_layers(student.eval()))
        self.batches = [{name: value.to(teacher.device) for name, value in batch.items()} for batch in batches]
        self.base: frozenset[int] = frozenset()
        self._wanted = self.base
        self._calls, self._states = [], []
        with self._autocast():
            for batch in self.batches:
                hidden, calls = layer_calls(teacher, batch["input_ids"], batch["position_ids"])
                self._calls.append(calls)
                self._states.append([hidden])
        self._store(0)

    def rebase(self, ssm_layers: Collection[int]) -> None:
        """Keep the states of this choice from now on; they are computed when they are first needed."""
        self._wanted = frozenset(ssm_layers)

    @torch.no_grad()
    def final_hidden(self, ssm_layers: Collection[int]) -> Iterator[Tensor]:
        """For each batch the (b, n, D) input of the head when the student's layers are `ssm_layers`."""
        if self._wanted != self.base:
            start = self._first_difference(self._wanted)
            self.base = self._wanted
            self._store(start)
        start = self._first_difference(ssm_layers)
        with self._autocast():
            for index, states in enumerate(self._states):
                hidden = states[start]
                for i in range(start, len(self.attention)):
                    hidden = self._layer(index, i, i in ssm_layers, hidden)
                yield self._normalised(index, hidden)

    def _first_difference(self, ssm_layers: Collection[int]) -> int:
        return min(self.base ^ frozenset(ssm_layers), default=len(self.attention))

    @torch.no_grad()
    def _store(self, start: int) -> None:
        with self._autocast():
            for index, states in enumerate(self._states):
                del states[start + 1 :]
                for i in range(start, len(self.attention)):
                    states.append(self._layer(index, i, i in self.base, states[-1]))

    def _layer(self, index: int, i: int, from_student: bool, hidden: Tensor) -> Tensor:
        call = self._calls[index][i]
        if from_student:
            kwargs = {**call.kwargs, "segment_ids": self.batches[index]["segment_ids"]}
            return self.mixers[i](hidden, *call.args, **kwargs)
        return self.attention[i](hidden, *call.args, **call.kwargs)

    def _normalised(self, index: int, hidden: Tensor) -> Tensor:
        """What the decoder does behind its layers, by its own forward around a layer that gives `hidden`."""
        body: Any = self.teacher.model
        batch = self.batches[index]
        layers, body.layers = body.layers, nn.ModuleList([_Given(self.attention[0], hidden)])
        try:
            return body(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        finally:
            body.layers = layers

    def _autocast(self):
        return torch.autocast(self.teacher.device.type, dtype=self.autocast, enabled=self.autocast is not None)


class _Given(StandIn):
    """A decoder layer whose output is known."""

    def __init__(self, layer: nn.Module, hidden: Tensor):
        super().__init__(layer)
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return self.hidden

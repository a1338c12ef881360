"""What models are distilled for: which columns they read, which positions are compared, and where logits come from.

`KnowledgeDistiller` computes every loss from hidden states (rows, positions, H), a `Head` that makes logits of them,
and labels (rows, positions). A causal model's positions predict the token behind them; those of an encoder, and of a
decoder beside one, have labels of their own; a text's class is one position, whose logits stand for hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk.data.next_tokens import IGNORED, next_column, next_labels, positions
from mohawk.errors import UserError
from mohawk.loading.causal import plain_model
from mohawk.loading.configs import check_decoder
from mohawk.loading.tasks import check_task
from mohawk.losses.heads import Head, final_hidden_states, vocabulary_rows

if TYPE_CHECKING:
    from mohawk.loading.causal import CausalLM

PARTS = ("decoder", "encoder")  # of a model whose hidden states are matched; an encoder alone is the former


class Task:
    """A causal language model: each position predicts the token behind it."""

    name = "causal_lm"
    inputs: tuple[str, ...] = ("input_ids", "position_ids", "attention_mask")
    told: tuple[str, ...] = ()  # further columns, for models whose forward names them
    shifts = True  # labels are those of the position behind

    def check(self, model: Any, who: str) -> None:
        """UserError unless a model is for this."""
        check_decoder(model, who)

    def check_together(self, teacher: Any, student: Any) -> None:
        """UserError unless a teacher's answers are about what the student's are."""

    def prepared(self, batch: Mapping[str, Tensor], student: Any) -> Mapping[str, Tensor]:
        """A batch with the columns that are made of others."""
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2 and "position_ids" not in batch:
            return {**batch, "position_ids": positions(mask)}
        return batch

    def inputs_of(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch's columns that a model's forward takes."""
        names = [name for name in self.inputs if name in batch]
        if told := [name for name in self.told if name in batch]:
            known = inspect.signature(plain_model(model).forward).parameters
            names += [name for name in told if name in known]
        return {name: batch[name] for name in names}

    def states(
        self, model: CausalLM, inputs: Mapping[str, Tensor], forward: Callable[..., Any] | None = None
    ) -> Tensor:
        """What goes into a model's head, (rows, positions, H), with gradients."""
        return final_hidden_states(model, inputs, forward)

    def head(self, model: CausalLM) -> Head:
        """What makes logits of that."""
        return Head.of(model)

    def words(self, model: CausalLM) -> int:
        """How many entries the logits have."""
        return vocabulary_rows(model)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(rows, positions) int64, -100 where nothing is predicted."""
        return next_labels(batch)

    def aligned(self, column: Tensor, fill: float) -> Tensor:
        """A column that is there for each label, at the positions that predict it."""
        return next_column(column, fill)

    def places(self, batch: Mapping[str, Tensor], part: str) -> Tensor | None:
        """(rows, n) bool: positions of a part's hidden states that are compared; None: all, alike in all rows."""
        return self.labels(batch) != IGNORED


class _Aligned(Task):
    """Labels are those of their own positions."""

    shifts = False

    def check(self, model: Any, who: str) -> None:
        check_task(plain_model(model), who, self.name)

    def prepared(self, batch: Mapping[str, Tensor], student: Any) -> Mapping[str, Tensor]:
        return batch

    def states(
        self, model: CausalLM, inputs: Mapping[str, Tensor], forward: Callable[..., Any] | None = None
    ) -> Tensor:
        return final_hidden_states(model, inputs, forward, causal=False)

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["labels"]

    def aligned(self, column: Tensor, fill: float) -> Tensor:
        return column

    def places(self, batch: Mapping[str, Tensor], part: str) -> Tensor | None:
        return _real(batch)


class MaskedLM(_Aligned):
    """An encoder that fills in masked words: labels (b, n) where a word was masked, of its own position."""

    name = "masked_lm"
    inputs = ("input_ids", "attention_mask", "position_ids")
    told = ("token_type_ids",)


class Classification(_Aligned):
    """A model that tells a text's class: labels (b,), logits (b, classes)."""

    name = "classification"
    inputs = ("input_ids", "attention_mask", "position_ids")
    told = ("token_type_ids",)

    def check_together(self, teacher: Any, student: Any) -> None:
        theirs, own = (plain_model(model).config.num_labels for model in (teacher, student))
        if theirs != own:
            raise UserError(f"student: it tells {own} classes, the teacher {theirs}; give it the teacher's num_labels")

    def states(
        self, model: CausalLM, inputs: Mapping[str, Tensor], forward: Callable[..., Any] | None = None
    ) -> Tensor:
        return (forward or model)(**inputs).logits.unsqueeze(1)

    def head(self, model: CausalLM) -> Head:
        # the logits are what is compared, so that what makes them of themselves is the identity
        like = next(p for p in plain_model(model).parameters() if p.is_floating_point())
        return Head(torch.eye(self.words(model), dtype=like.dtype, device=like.device))

    def words(self, model: CausalLM) -> int:
        config: Any = plain_model(model).config
        return config.num_labels

    def labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["labels"].unsqueeze(1)

    def aligned(self, column: Tensor, fill: float) -> Tensor:
        return column.unsqueeze(1)


class Seq2SeqLM(_Aligned):
    """An encoder and a decoder: labels (b, m) of the decoder's positions, which reads them one token later."""

    name = "seq2seq_lm"
    inputs = ("input_ids", "attention_mask", "input_features", "input_values", "decoder_input_ids")
    inputs += ("decoder_attention_mask",)

    def prepared(self, batch: Mapping[str, Tensor], student: Any) -> Mapping[str, Tensor]:
        if "decoder_input_ids" in batch:
            return batch
        config = plain_model(student).config
        start, pad = config.decoder_start_token_id, config.pad_token_id
        if start is None:
            raise UserError(
                "labels: the student's configuration has no decoder_start_token_id, so what its decoder reads cannot "
                "be made of them; set it, or give decoder_input_ids"
            )
        read = F.pad(batch["labels"][:, :-1], (1, 0), value=start)
        return {**batch, "decoder_input_ids": read.masked_fill(read == IGNORED, start if pad is None else pad)}

    def places(self, batch: Mapping[str, Tensor], part: str) -> Tensor | None:
        if part == "decoder":
            return batch["labels"] != IGNORED
        return _real(batch) if "input_ids" in batch else None  # frames of speech fill their rows


def _real(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


CAUSAL_LM = Task()
BY_NAME: dict[str, Task] = {task.name: task for task in (CAUSAL_LM, MaskedLM(), Classification(), Seq2SeqLM())}


def task_of(name: str) -> Task:
    """A task by its name. Raises ValueError."""
    if name not in BY_NAME:
        raise ValueError(f"task: got {name!r}; allowed: {', '.join(BY_NAME)}")
    return BY_NAME[name]

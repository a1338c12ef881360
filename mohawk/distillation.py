"""Standard distillation: a student learns from what a teacher says of each next token, and from its layers.

`KnowledgeDistiller` is the loss, for plain training loops (`compute_loss`) and for our own trainer, whose objective it
is (mohawk/trainer.py says what that asks for).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.advance import Advance
from mohawk.heads import Head, final_hidden_states
from mohawk.kernels.kd_loss import TAIDSchedule, TeacherHidden, TeacherTAID, linear_kd_loss
from mohawk.label_probability import label_probability
from mohawk.matchings import IGNORED, Matching, next_column
from mohawk.on_policy import OnPolicy
from mohawk.processes import several, total
from mohawk.schedules import Ramp, at, temperature_for
from mohawk.shared_vocabulary import shared_part
from mohawk.teacher_models import Answer, AverageTeacher, ModelTeacher, model_inputs
from mohawk.teachers import check_decoder, parameter_count
from mohawk.weight_decay import parameter_groups

if TYPE_CHECKING:
    from mohawk.rationale_router import RoutedRationales

SAMPLED_ROWS = 256  # of a batch, on which agreement and the teacher's entropy are measured


class KnowledgeDistiller(nn.Module):
    """`kd_weight * T^2 * D(teacher, student) + ce_weight * CE + sum_i w_i * matching_i`, a mean over real tokens.

    Args:
        teacher: a causal language model (made eval and frozen), a teacher of mohawk/teacher_models.py, or None where
            `kd_weight` is 0 and nothing is matched.
        student: a causal language model of any architecture. Vocabularies may differ in size where the ids they have in
            common mean the same: only those are compared.
        divergence, beta, lam: as of `mohawk.kd_loss`.
        temperature: T; a `Ramp`; or "auto": log2(teacher's parameters / student's) + 1.
        kd_weight, ce_weight: numbers or Ramps. The cross entropy is at temperature 1.
        confidence: multiply a token's divergence by the teacher's probability of its label, so that it counts for
            little where the teacher is wrong.
        taid: TAID's moving target (arXiv 2501.16937), advanced by each step's loss.
        matchings: losses between layers, by name.
        on_policy: called as on_policy(batch, step) -> batch; see mohawk/on_policy.py.
        router: called as router(batch, step) -> batch, and router.end_step(step); see mohawk/rationale_router.py.
        advance: says after which step to end early; see mohawk/advance.py.

    Outside our trainer, ramps move with `begin_step(step, steps)`, TAID and averaged teachers with `end_step(loss)`.
    """

    def __init__(
        self,
        teacher: nn.Module | Callable[..., list[Answer]] | None,
        student: nn.Module,
        *,
        divergence: str = "forward_kl",
        temperature: float | Ramp | str = 1.0,
        kd_weight: float | Ramp = 1.0,
        ce_weight: float | Ramp = 0.0,
        beta: float = 0.5,
        lam: float = 0.1,
        confidence: bool = False,
        taid: TAIDSchedule | None = None,
        matchings: Mapping[str, Matching] | None = None,
        on_policy: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None,
        router: RoutedRationales | None = None,
        advance: Advance | None = None,
    ):
        super().__init__()
        if teacher is None and (kd_weight != 0 or matchings):
            raise ValueError("teacher: got None, which needs kd_weight 0 and no matchings")
        if isinstance(teacher, nn.Module):
            if teacher is student:
                raise ValueError("teacher: got the student itself; use mohawk.teacher_models.AverageTeacher")
            teacher = ModelTeacher(teacher)
        check_decoder(student, "student")
        self.student = student
        self.__dict__["teacher"] = teacher  # neither trained nor saved, so kept out of the module tree
        if temperature == "auto":
            if not isinstance(teacher, ModelTeacher):
                raise ValueError("temperature: auto needs one teacher model, whose size is known; give a number")
            temperature = temperature_for(parameter_count(teacher.model), parameter_count(student))
        self.temperature, self.kd_weight, self.ce_weight = temperature, kd_weight, ce_weight
        self.divergence, self.beta, self.lam = divergence, beta, lam
        self.confidence, self.taid, self.on_policy, self.advance = confidence, taid, on_policy, advance
        self.router = router
        if isinstance(on_policy, OnPolicy) and (known := getattr(teacher, "vocab_size", None)) is not None:
            on_policy.limit_to(known)  # the teacher reads what is sampled
        self.finished, self.measuring = False, True
        self.__dict__["matchings"] = dict(matchings or {})
        # their parameters are trained and saved with a run's checkpoints, and are no part of the student
        self.matched = nn.ModuleDict({name: m.module for name, m in self.matchings.items() if m.module is not None})
        self.step, self.steps = 0, 1
        self.step_loss: Tensor | float = 0.0  # sum of the losses since the step began
        self._counted, self._counts = -1, [0, 0]  # labels and rows of that step, as `prepare` saw them
        self._sums: dict[str, list[Any]] = {}

    # ---- in a plain training loop ----

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a scalar with the student's gradients.

        Args:
            input_ids: (batch, n) int64. labels: (batch, n), not shifted, -100 where nothing is predicted; None: every
                real token. attention_mask: (batch, n), 0 at padding, on either side.
            normalizer: divides the sum over tokens instead of their count (gradient accumulation).
        """
        labels = input_ids if labels is None else labels
        batch = {"input_ids": input_ids, "labels": labels}
        if attention_mask is not None:
            real = attention_mask.bool()
            batch["attention_mask"] = attention_mask
            # no padding is predicted, and nothing is predicted from it
            batch["labels"] = labels.masked_fill(~real | ~F.pad(real[:, :-1], (1, 0), value=True), IGNORED)
            batch["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.loss(batch, normalizer)

    # ---- as an objective of our trainer ----

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What a step trains on instead of a batch, before its tokens are counted: a routed teacher's rationales, or
        the student's own samples."""
        for replace in (self.router, self.on_policy):
            batch = batch if replace is None else replace(batch, step)
        counts = [_labels(batch), len(batch["input_ids"])]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if step == self._counted else counts
        self._counted = step
        return batch

    def losses(self, **batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The loss of a packed batch, one scalar: its terms share one graph."""
        yield "loss", self.loss(batch)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train: the student's that require gradients, and the matchings'."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups."""
        return parameter_groups(self.trained(), learning_rate, weight_decay)

    def begin_step(self, step: int, steps: int) -> None:
        """Before the first micro-batch of a step, counted from 0, of so many."""
        self.step, self.steps = step, steps
        self.step_loss = 0.0
        if self._counted == step and several():
            device = next(self.student.parameters()).device
            self._counts = total(torch.tensor(self._counts, dtype=torch.float64, device=device)).tolist()

    def end_step(self, loss: float) -> None:
        """After the optimizer's step, with the step's loss."""
        if self.taid is not None:
            self.taid.update(loss)
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.update()
        if self.router is not None:
            self.router.end_step(self.step)
        if self.advance is not None:
            self.finished = self.advance.after(self.step + 1)

    def measured(self) -> dict[str, float]:
        """Means since the last call of what was measured beside the loss, and where schedules are."""
        sums = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        values = {name: total / count for name, (total, count) in sums.items() if count}
        self._sums = {}
        values["temperature"] = self._now(self.temperature)
        if self.taid is not None:
            values["taid_t"] = self.taid.t
        return values

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs beside parameters: tensors, and plain values."""
        tensors = self.teacher.state() if isinstance(self.teacher, AverageTeacher) else {}
        taid = self.taid and {key: getattr(self.taid, key) for key in ("t", "momentum", "last_loss")}
        parts = {"advance": self.advance, "router": self.router}
        states = {name: part.state() for name, part in parts.items() if part is not None}
        return tensors, {"taid": taid, **states, "finished": self.finished}

    def load_training_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.load(tensors)
        for key, value in (values.get("taid") or {}).items():
            setattr(self.taid, key, value)
        for name, part in {"advance": self.advance, "router": self.router}.items():
            if part is not None and values.get(name):
                part.load(values[name])
        self.finished = values.get("finished", False)

    # ---- the loss ----

    def _now(self, value: float | Ramp) -> float:
        return at(value, self.step / max(1, self.steps - 1))

    def loss(
        self,
        batch: Mapping[str, Tensor],
        normalizer: float | Tensor | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The loss of a batch of columns, a scalar.

        batch: `input_ids` and `labels` (b, n), unshifted, -100 where nothing is predicted; `position_ids` and
        `segment_ids` of packed rows, or `attention_mask`; `weights` (b, n) of each token's loss; what a teacher asks
        for (mohawk/teacher_models.py). normalizer: divides instead of the count of labels. forward: called instead of
        the student, such as the student as DDP wraps it.
        """
        matchings = self.matchings
        with ExitStack() as stack:
            seen = [stack.enter_context(m.student(self.student)) for m in matchings.values()]
            hidden = final_hidden_states(self.student, model_inputs(batch), forward)
        answers = [None] if self.teacher is None else self.teacher(batch, [m.teacher for m in matchings.values()])
        labels = next_column(batch["labels"], IGNORED)
        count = (labels != IGNORED).sum()
        divisor = count.clamp(min=1) if normalizer is None else normalizer
        weights = next_column(batch["weights"], 0.0) if "weights" in batch else None
        head = Head.of(self.student)
        loss = 0.0
        for answer in answers:
            rows = slice(None) if answer is None or answer.rows is None else answer.rows
            part = None if weights is None else weights[rows]
            loss = loss + self._logit_loss(answer, hidden[rows], head, labels[rows], part, divisor)
        for i, (name, matching) in enumerate(matchings.items()):
            matched = matching.loss(seen[i], answers[0].seen[i], batch)
            self._measure(name, matched, count)
            loss = loss + self._now(matching.weight) * matched * self._share(matching, batch, count, divisor)
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def _share(self, matching: Matching, batch: Mapping[str, Tensor], count: Tensor, divisor) -> Tensor | float:
        """What a matching's mean counts, so that a step is the same however it is split into micro-batches.

        Who calls weighs this batch by its labels; a mean over labels is then right, and a mean over rows is made to be.
        """
        labels, rows = self._counts
        if not matching.by_row or self._counted != self.step or not labels:
            return count / divisor
        return len(batch["input_ids"]) / rows * (labels / divisor)

    def _logit_loss(
        self, answer: Answer | None, hidden: Tensor, head: Head, labels: Tensor, weights: Tensor | None, divisor
    ) -> Tensor:
        """kd_weight * T^2 * D + ce_weight * CE over the rows of one answer, divided by `divisor`."""
        kd_weight, ce_weight = self._now(self.kd_weight), self._now(self.ce_weight)
        student = head.student(hidden)
        vocab = self._vocab_size(head)
        if answer is not None and vocab is not None:
            answer = dataclasses.replace(answer, source=shared_part(answer.source, vocab))
        source = None if answer is None else answer.source
        if source is None:
            kd_weight = 0.0
        elif self.taid is not None:
            source = TeacherTAID(source, self.taid.t)
        options = {
            "divergence": self.divergence,
            "temperature": self._now(self.temperature),
            "beta": self.beta,
            "lam": self.lam,
            "normalizer": divisor,
        }
        count = (labels != IGNORED).sum()
        scale = divisor / count.clamp(min=1)  # measured is the mean over these rows

        def cross_entropy() -> Tensor:
            # over the student's whole vocabulary, whatever the teacher's is; the source is not read
            own = TeacherHidden(student["student_hidden"].detach(), student["student_head"].detach())
            ce = linear_kd_loss(
                **student, teacher=own, labels=labels, token_weights=weights, kd_weight=0.0,
                ce_weight=ce_weight or 1.0, **options,
            )  # fmt: skip
            self._measure("ce", ce.detach() / (ce_weight or 1.0) * scale, count)
            return ce if ce_weight else ce * 0.0

        if kd_weight == 0:
            return cross_entropy()
        self._compare(answer.source, hidden, head, labels)
        if not self.confidence and vocab is None:
            loss, parts = linear_kd_loss(
                **student, teacher=source, labels=labels, token_weights=weights, kd_weight=kd_weight,
                ce_weight=ce_weight, return_parts=True, **options,
            )  # fmt: skip
            self._measure("kd", parts.kd * scale, count)
            self._measure("ce", parts.ce * scale, count)
            return loss
        kd_weights = weights
        if self.confidence:
            sure = label_probability(answer.source, labels, vocab or len(head.weight))
            kd_weights = sure if weights is None else sure * weights
        # labels say which rows count; those that the teacher does not know still do
        known = labels if vocab is None else labels.clamp(max=vocab - 1)
        kd = linear_kd_loss(
            **student, teacher=source, labels=known, token_weights=kd_weights, kd_weight=kd_weight, ce_weight=0.0,
            vocab_size=vocab, **options,
        )  # fmt: skip
        self._measure("kd", kd.detach() / kd_weight * scale, count)
        return kd + cross_entropy() if ce_weight else kd

    def _vocab_size(self, head: Head) -> int | None:
        """The entries that both sides have, where the vocabularies differ in size."""
        theirs = getattr(self.teacher, "vocab_size", None)
        return None if theirs is None or theirs == len(head.weight) else min(theirs, len(head.weight))

    # ---- what is measured beside the loss ----

    def _measure(self, name: str, mean: Tensor, count: Tensor) -> None:
        if not self.measuring:
            return
        entry = self._sums.setdefault(name, [0.0, 0.0])  # tensors: nothing waits for the device here
        entry[0] = entry[0] + mean.detach() * count
        entry[1] = entry[1] + count

    @torch.no_grad()
    def _compare(self, source, hidden: Tensor, head: Head, labels: Tensor) -> None:
        """Agreement of first choices and the teacher's entropy (nats), on some of the rows."""
        if not isinstance(source, TeacherHidden):
            return
        rows = (labels.flatten() != IGNORED).nonzero().squeeze(1)[:SAMPLED_ROWS]
        if not len(rows):
            return
        vocab = self._vocab_size(head)
        of_teacher = Head(source.head, source.bias, source.logit_scale, source.logit_softcap)
        teacher = of_teacher.logits(source.hidden.flatten(0, 1)[rows])[:, :vocab]
        student = head.logits(hidden.flatten(0, 1)[rows])[:, :vocab]
        same = (teacher.argmax(-1) == student.argmax(-1)).float().mean()
        logprobs = teacher.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1).mean()
        count = torch.tensor(float(len(rows)))
        self._measure("agreement", same, count)
        self._measure("teacher_entropy", entropy, count)


def _labels(batch: Mapping[str, Tensor]) -> int:
    """How many labels a batch predicts."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())

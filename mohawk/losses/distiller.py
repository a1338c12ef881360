"""Standard distillation: a student learns from what a teacher says of each next token, and from its layers.

`KnowledgeDistiller` is the loss, for plain training loops (`compute_loss`) and for our own trainer, whose objective it
is (mohawk/training/trainer.py says what that asks for).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from mohawk.core.collectives import total
from mohawk.core.processes import several
from mohawk.data.next_tokens import IGNORED, next_column
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.interface import TAIDSchedule, TeacherHidden, TeacherSamples, TeacherTAID, linear_kd_loss
from mohawk.loading.causal import plain_model
from mohawk.loading.models import parameter_count
from mohawk.losses.aligned import AlignedAnswer, AlignedTeacher, aligned_loss
from mohawk.losses.heads import Head, as_forward, in_zero, with_head
from mohawk.losses.label_probability import CONFIDENCES, Confidence, label_probability, teacher_certainty
from mohawk.losses.layers.matching import PLACES, Matching
from mohawk.losses.measured import Means, agreement
from mohawk.losses.on_policy import OnPolicy, replaced_rows
from mohawk.losses.policy_gradient import PolicyGradient, check_policy_gradient, policy_term
from mohawk.losses.schedules import Ramp, at, task_weights, temperature_for, weights_for
from mohawk.losses.shared_vocabulary import shared_part, told_of_cut
from mohawk.losses.tasks import CAUSAL_LM, PARTS, task_of
from mohawk.losses.teachers import (
    Answer,
    AverageTeacher,
    CachedTeacher,
    Ensemble,
    ModelTeacher,
    is_around,
    readable_inputs,
    taken,
    teacher_in_parts,
)
from mohawk.training.advance import Advance
from mohawk.training.objective import Objective
from mohawk.training.weight_decay import parameter_groups

if TYPE_CHECKING:
    from mohawk.kernels.kd.teachers import TeacherSource
    from mohawk.loading.causal import CausalLM
    from mohawk.loading.tasks import TaskName
    from mohawk.losses.rationale_router import RoutedRationales

log = logging.getLogger(__name__)

TASKS = 3  # of tokens: plain text, labels and rationales (mohawk/losses/rationales.py), each of one mean of its own


@dataclass(frozen=True)
class OwnLoss:
    """`kd_weight * T^2 * D + ce_weight * CE` of one source's rows, a term of its own: the mean over their tokens.

    divergence, beta, lam: of D, where they are not the other rows': DistiLLM-2 (arXiv 2503.07067) is skew_kl on the
    teacher's answers beside skew_reverse_kl on the student's own.
    """

    kd_weight: float | Ramp = 0.0
    ce_weight: float | Ramp = 0.0
    divergence: str | None = None
    beta: float | None = None
    lam: float | None = None


class KnowledgeDistiller(Objective["CausalLM"]):
    """`kd_weight * T^2 * D(teacher, student) + ce_weight * CE + sum_i w_i * matching_i`, a mean over real tokens.

    A token is learned where it has a label and both it and the one in front of it are real, of one document
    (`next_labels`). Means are of a step: over all its micro-batches and processes, however it is split.

    Args:
        teacher: a causal language model (frozen but for what it shares with the student), a teacher of
            `mohawk.teacher_models`, or None where `kd_weight` is 0 and nothing is matched. The model that peft's
            adapter is around, or the adapted model itself, is asked with the adapter switched off.
            A teacher with another tokenizer is `mohawk.teacher_models.AlignedTeacher`.
        student: a causal language model of any architecture. Vocabularies may differ in size where the ids they have in
            common mean the same: only those are compared.
        divergence, beta, lam: as of `kd_loss`.
        temperature: T; a `Ramp`; or "auto": log2(teacher's parameters / student's) + 1.
        kd_weight, ce_weight: numbers or Ramps. The cross entropy is at temperature 1.
        alpha: instead of both, a number from 0 to 1: ce_weight is alpha, kd_weight is 1 - alpha. Code that multiplies
            the divergence by its alpha, as Hinton et al. (arXiv 1503.02531) weight soft targets, means 1 - alpha here.
        task_weight: what the means of tasks are multiplied by, {"text": ..., "label": ..., "rationale": ...}, each 1
            where it is left out: tasks 0, 1 and 2 of a batch's column `task`.
        confidence: True multiplies a token's divergence by the teacher's probability of its label, so that it counts
            for little where the teacher is wrong. "label" and "entropy" also give the cross entropy what the divergence
            loses: a token's loss is `c * kd_weight * T^2 * D + (ce_weight + (1 - c) * kd_weight) * CE`, where c is that
            probability, or 1 - H / log(vocabulary) with H the teacher's entropy in nats (at temperature 1; of a cached
            top k at the cache's, the rest of the mass spread evenly).
        taid: TAID's moving target (arXiv 2501.16937), advanced by each step's loss.
        matchings: losses between layers, by name: `match_hidden`, `match_attention`, or a `Matching` of your own.
        own_losses: an `OwnLoss` by a row's `source`: that source's rows have these weights instead, are never replaced
            by the student's samples, and their mean is added to that of the others (MiniLLM's pretraining loss is
            `OwnLoss(ce_weight=1)` of plain text beside on-policy prompts, arXiv 2306.08543).
        on_policy: `OnPolicy`, or what else is called as on_policy(batch, step) -> batch.
        policy_gradient: of reverse KL on the student's own samples, MiniLLM's gradient of whole sequences:
            "normalized", as in the paper, or "sum" (`mohawk.losses.policy_gradient`). None: each token's divergence by
            itself, which ignores what a token does to those behind it. It needs an `OnPolicy` of share 1 that samples
            from the student's whole distribution at temperature 1; the paper's samples that the teacher has a part in,
            and their importance weights, are not here. Rows with own_losses have none. The loss's value stays reverse
            KL.
        router: `RoutedRationales`: which teacher's rationales a step reads.
        advance: `Advance`: after which step to end early, in our trainer and in `DistillationTrainer`.
        task: what teacher and student are for; each has labels and columns of its own, see `compute_loss`. "causal_lm":
            as above. "masked_lm": encoders that fill in masked words (BERT, RoBERTa, DistilBERT, ModernBERT).
            "classification": models that tell a text's class, of equally many classes. "seq2seq_lm": an encoder and a
            decoder (T5, Whisper). Hidden states are matched at all real tokens (of the decoder: at those with a label).
        masking: of masked_lm: called as masking(batch, step) before a step's losses, such as `mohawk.Masking`, which
            draws masks; None: the batch has them.
        kd_on: of masked_lm: "labels": the divergence is of the masked words, as the cross entropy; "all": of all real
            tokens, as in DistilBERT (arXiv 1910.01108).

    Outside our trainer, ramps move with `begin_step(step, steps)`, TAID and averaged teachers with `end_step(loss)`.
    """

    teacher: Callable[..., list[Answer]] | None
    matchings: dict[str, Matching]
    shares = True  # what `losses` yields is a micro-batch's share of its step's loss

    def __init__(
        self,
        teacher: CausalLM | Callable[..., list[Answer]] | None,
        student: CausalLM,
        *,
        divergence: str = "forward_kl",
        temperature: float | Ramp | Literal["auto"] = 1.0,
        kd_weight: float | Ramp = 1.0,
        ce_weight: float | Ramp = 0.0,
        alpha: float | None = None,
        task_weight: Mapping[str, float] | None = None,
        beta: float = 0.5,
        lam: float = 0.1,
        confidence: Confidence = False,
        taid: TAIDSchedule | None = None,
        matchings: Mapping[str, Matching] | None = None,
        own_losses: Mapping[int, OwnLoss] | None = None,
        on_policy: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None,
        policy_gradient: PolicyGradient | None = None,
        router: RoutedRationales | None = None,
        advance: Advance | None = None,
        task: TaskName = "causal_lm",
        masking: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None,
        kd_on: Literal["labels", "all"] = "labels",
    ):
        super().__init__()
        self.task = task_of(task)
        self._check_task(masking, kd_on, {
            "on_policy": on_policy, "policy_gradient": policy_gradient, "router": router, "own_losses": own_losses,
            "task_weight": task_weight,
        })  # fmt: skip
        if alpha is not None:
            kd_weight, ce_weight = weights_for(alpha, kd_weight, ce_weight)
        if confidence not in CONFIDENCES:
            raise ValueError(f"confidence: got {confidence!r}; allowed: {', '.join(map(repr, CONFIDENCES))}")
        self.own_losses = dict(own_losses or {})
        divergences = [kd_weight, *(own.kd_weight for own in self.own_losses.values())]
        if teacher is None and (any(weight != 0 for weight in divergences) or matchings):
            raise ValueError("teacher: got None, which needs kd_weight 0 and no matchings")
        if not isinstance(matchings or {}, Mapping):
            raise ValueError(f'matchings: got {type(matchings).__name__}; give a dict: {{"hidden": match_hidden(...)}}')
        if isinstance(teacher, nn.Module):
            model = cast("CausalLM", teacher)  # which ModelTeacher finds out
            teacher = ModelTeacher(plain_model(student) if is_around(student, model) else model, task=self.task)
        if isinstance(teacher, AlignedTeacher):
            _check_aligned(teacher, divergence, temperature, taid, confidence, matchings, policy_gradient)
        asked = teacher.teacher if isinstance(teacher, AlignedTeacher) else teacher
        for model in asked.teachers if isinstance(asked, Ensemble) else [asked]:
            if isinstance(model, ModelTeacher):
                if model.task.name != task:
                    raise ValueError(f"teacher: got a {type(model).__name__} of task {model.task.name}; give it {task}")
                model.beside(student)
        self.task.check(student, "student")
        for model in teacher.teachers if isinstance(teacher, Ensemble) else [teacher]:
            if isinstance(model, ModelTeacher):
                self.task.check_together(model.model, student)
        self.student = student
        self.__dict__["teacher"] = teacher  # neither trained nor saved, so kept out of the module tree
        if temperature == "auto":
            if not isinstance(asked, ModelTeacher):
                raise ValueError("temperature: auto needs one teacher model, whose size is known; give a number")
            temperature = temperature_for(parameter_count(asked.model), parameter_count(student))
        self.temperature, self.kd_weight, self.ce_weight = temperature, kd_weight, ce_weight
        self.divergence, self.beta, self.lam = divergence, beta, lam
        self.task_weight = task_weights(task_weight)
        exclusive = {"taid": taid is not None, "confidence": bool(confidence)}
        check_policy_gradient(policy_gradient, divergence, temperature, exclusive)
        if policy_gradient is not None and not (isinstance(on_policy, OnPolicy) and on_policy.unbiased):
            raise ValueError(
                "policy_gradient: is of the student's own samples; give on_policy=OnPolicy(..., share=1) with "
                "temperature 1, top_p 1 and top_k 0"
            )
        self.policy_gradient: PolicyGradient | None = policy_gradient
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
        self.averaged = 1  # over how many processes gradients are averaged, not summed
        self._counted, self._counts = -1, torch.zeros(())  # of which step, and what `prepare` counted of it
        self._means = Means()
        self._told = False  # what a smaller vocabulary does to the teacher's answers

    def _check_task(self, masking: Any, kd_on: str, of_text: Mapping[str, Any]) -> None:
        name = self.task.name
        if kd_on not in ("labels", "all"):
            raise ValueError(f"kd_on: got {kd_on!r}; allowed: labels, all")
        if name != "masked_lm" and (kd_on != "labels" or masking is not None):
            given = "masking" if masking is not None else f"kd_on: got {kd_on!r}"
            raise ValueError(f"{given}: is of task masked_lm, but the task is {name}; leave it out")
        if self.task is not CAUSAL_LM and (given := [key for key, value in of_text.items() if value]):
            raise ValueError(f"{given[0]}: is of causal language models, but the task is {name}; leave it out")
        self.masking, self.kd_on = masking, kd_on

    # ---- in a plain training loop ----

    def compute_loss(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        *,
        teacher_rationale: None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """The loss of a batch, a scalar with the student's gradients.

        Args:
            input_ids: (batch, n) int64. labels: (batch, n), not shifted, -100 where nothing is predicted; None: every
                real token. attention_mask: (batch, n), 0 at padding, on either side.
            normalizer: divides the sum over tokens instead of their count (gradient accumulation: see `kd_loss`).
            teacher_rationale: None; `RationaleDistiller.compute_loss` takes rationales.
            inputs: of other tasks, what their models read besides: `token_type_ids`, `position_ids`; of seq2seq_lm
                `input_features` in place of input_ids (Whisper), `decoder_input_ids` (default: the labels, one behind).

        Labels of other tasks are of their own positions, -100 where there is none: (batch, n) of masked words, (batch,)
        classes, (batch, m) of what a decoder writes.

        Raises ValueError for a teacher_rationale, an input that no model of the task reads, or missing labels.
        """
        if teacher_rationale is not None:
            raise ValueError(
                "teacher_rationale: a rationale is a task of its own, with a prompt of its own; use "
                "RationaleDistiller(student, tokenizer).compute_loss(prompts, labels, teacher_rationale=...)"
            )
        known = {*self.task.inputs, *self.task.told}
        if unknown := sorted(inputs.keys() - known):
            raise ValueError(f"{unknown[0]}: no input of task {self.task.name}; allowed: {', '.join(sorted(known))}")
        if input_ids is None and (self.task.name != "seq2seq_lm" or not inputs):
            raise ValueError(f"input_ids: got None, which task {self.task.name} cannot do without")
        if labels is None and self.task is not CAUSAL_LM:
            raise ValueError(f"labels: got None, which task {self.task.name} cannot do without")
        given = {"input_ids": input_ids, "labels": input_ids if labels is None else labels, **inputs}
        given["attention_mask"] = attention_mask
        return self.loss({name: column for name, column in given.items() if column is not None}, normalizer)

    def forward(self, batch: Mapping[str, Tensor], normalizer: float | Tensor | None = None) -> Tensor:
        """`loss`, for what wraps a module and what it trains, the matchings' parameters among it: DDP, or
        `accelerator.prepare(distiller, optimizer)`."""
        return self.loss(batch, normalizer)

    @property
    def _no_split_modules(self) -> Any:
        """The student's; what wraps the distiller asks for it, as for the next three."""
        return getattr(self.student, "_no_split_modules", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.student.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.student.get_output_embeddings()

    def tie_weights(self) -> None:
        tie: Any = getattr(self.student, "tie_weights", None)
        if tie is not None:
            tie()

    # ---- as an objective of our trainer ----

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What a step trains on instead of a micro-batch: a routed teacher's rationales, or the student's own samples.

        All micro-batches of a step come here before the first one's loss: what is in them is counted.
        """
        batch = batch if self.router is None else self.router(batch, step)
        batch = batch if self.masking is None else self.masking(batch, step)
        if self.on_policy is not None:
            kept = None if not self.own_losses else self._rows_of(self.own_losses, batch)
            batch = replaced_rows(self.on_policy, batch, step, kept)
        counts = self._count(batch)
        self._counts = self._counts + counts if step == self._counted else counts
        self._counted = step
        return batch

    def losses(self, **batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A micro-batch's share of its step's loss, one scalar: its terms share one graph."""
        yield "loss", self.share(batch)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train: the student's that require gradients, and the matchings'."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups."""
        return parameter_groups(self.trained(), learning_rate, weight_decay)

    def begin_step(self, step: int, steps: int, together: bool = True) -> None:
        """Call it before the first micro-batch's loss of a step.

        Args:
            step: the step's index, from 0.
            steps: how many the training has.
            together: whether the micro-batches of all processes have one mean; else each process has its own.
        """
        self.step, self.steps = step, steps
        self.step_loss = 0.0
        if self._counted == step and together and several():
            self._counts = total(self._counts)
        if self.taid is not None and self.taid.steps is None:
            self.taid.steps = steps

    def end_step(self, loss: float) -> None:
        """After the optimizer's step, with the step's loss."""
        if self.taid is not None:
            self.taid.update(loss, self.step)
        if isinstance(self.teacher, AverageTeacher):
            self.teacher.update()
        if self.router is not None:
            self.router.end_step(self.step)
        if self.advance is not None:
            self.finished = self.advance.after(self.step + 1)

    def measured(self) -> dict[str, float]:
        """Means since the last call of what was measured beside the loss, and where schedules are."""
        values = {**self._means.take(), "temperature": self._now(self.temperature)}
        if self.taid is not None:
            values["taid_t"] = self.taid.t
        return values

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs beside parameters: tensors, and plain values."""
        tensors = self.teacher.state() if isinstance(self.teacher, AverageTeacher) else {}
        taid = self.taid and {key: getattr(self.taid, key) for key in ("t", "momentum", "last_loss", "step")}
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

    def count(self, batch: dict[str, Tensor]) -> int:
        """How many labels a micro-batch has."""
        return int((self.task.labels(batch) != IGNORED).sum())

    # ---- the loss ----

    def _now(self, value: float | Ramp) -> float:
        return at(value, self.step / max(1, self.steps - 1))

    def loss(
        self,
        batch: Mapping[str, Tensor],
        normalizer: float | Tensor | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The loss of a batch of columns by itself, a scalar.

        batch: `input_ids` and `labels` (b, n), unshifted, -100 where nothing is predicted; `position_ids` and
        `segment_ids` of packed rows, or `attention_mask`; `weights` (b, n) of each token's loss; `task` (b, n), 1 at
        labels and 2 at rationales of step-by-step distillation and 0 elsewhere, each a mean over its own tokens;
        `source` (b), what `own_losses` go by; what a teacher asks for. normalizer: divides
        instead of the count of labels; what tasks count beside each other stays. forward: called instead of the
        student, such as the student as DDP wraps it.
        """
        counts = self._count(batch)
        if normalizer is not None:
            scale = normalizer / counts[1 : 1 + TASKS].sum().clamp(min=1)
            counts[: 1 + TASKS] *= scale
            if self.task is not CAUSAL_LM:
                counts[-len(PARTS) :] *= scale
        return self._loss(batch, counts, forward)

    def share(self, batch: Mapping[str, Tensor], forward: Callable[..., Any] | None = None) -> Tensor:
        """A micro-batch's share of the loss of the step that `prepare` saw and `begin_step` began: with those of the
        others it makes the step's loss, and over processes too. Arguments as in `loss`."""
        if not self.counted(self.step):
            raise RuntimeError(f"step {self.step}: its micro-batches were not prepared before their losses")
        return self._loss(batch, self._counts / self.averaged, forward)

    def counted(self, step: int) -> bool:
        """Whether a step was prepared and is the one that began last."""
        return self._counted == self.step == step

    def _rows_of(self, sources: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """(b) bool: the rows of some sources."""
        if "source" not in batch:
            raise ValueError("own_losses go by a column `source`, which the batch does not have")
        return torch.isin(batch["source"], torch.tensor(list(sources), device=batch["source"].device))

    def _count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Floats: rows; then tokens of each task, of the main loss and of each of the own losses; of what is no causal
        model, positions of each of PARTS."""
        real = self.task.labels(batch) != IGNORED
        task = next_column(batch["task"], 0) if "task" in batch else torch.zeros_like(real, dtype=torch.long)
        tokens = torch.stack([(real & (task == k)).sum(-1) for k in range(TASKS)], -1)
        own = [tokens[self._rows_of([source], batch)].sum(0) for source in self.own_losses]
        main = tokens.sum(0) - sum(own)
        counts = torch.cat([tokens.new_tensor([len(tokens)]), main, *own])
        if self.task is not CAUSAL_LM:  # and the positions that matchings compare
            counts = torch.cat([counts, torch.stack([self._places(batch, part) for part in PARTS])])
        return counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)

    def _loss(self, batch: Mapping[str, Tensor], counts: Tensor, forward: Callable[..., Any] | None) -> Tensor:
        """The sum over a batch's tokens, each divided by what `counts` has of its kind."""
        if forward is not None and in_zero(self.student):
            return as_forward(self.student, forward, lambda: self._loss(batch, counts, None))
        batch, matchings = self.task.prepared(batch, self.student), self.matchings
        inputs, check_ids = readable_inputs(self.task, self.student, batch, "student")
        with ExitStack() as stack:
            seen = [stack.enter_context(m.student(self.student)) for m in matchings.values()]
            hidden = self.task.states(self.student, inputs, forward)
        whole = None
        if matchings:
            assert self.teacher is not None  # refused at the start
            (whole,) = self.teacher(batch, [m.teacher for m in matchings.values()])
        once = None if whole is None else [whole]
        if once is None and self.own_losses and teacher_in_parts(self.teacher):  # whatever losses a process's rows have
            assert self.teacher is not None
            once = list(self.teacher(batch))
        labels = self.task.labels(batch)
        weights = self.task.aligned(batch["weights"], 0.0) if "weights" in batch else None
        task = next_column(batch["task"], 0) if "task" in batch else None

        def of_logits(hidden: Tensor) -> Tensor:
            loss, head = hidden.new_zeros(()), self.task.head(self.student)
            for source, rows, own, tokens in self._parts(batch, once, counts):
                check_ids()
                rows = slice(None) if rows is None else rows
                part = None if weights is None else weights[rows]
                if task is not None or self.task_weight[0] != 1:
                    # so that the one mean over all tokens is the sum of several, each over a task's own
                    factors = tokens.sum() / _some(tokens) * tokens.new_tensor(self.task_weight)
                    of = torch.zeros_like(labels[rows]) if task is None else task[rows]
                    part = factors.to(torch.float32)[of] * (1.0 if part is None else part)
                divisor = _some(tokens.sum())
                if self.kd_on == "all" and source is not None:
                    real = self.task.places(batch, "decoder")
                    assert real is not None  # of words
                    every = torch.where(labels == IGNORED, batch["input_ids"], labels).masked_fill(~real, IGNORED)
                    only = replace(own, ce_weight=0.0)
                    loss = loss + self._logit_loss(source, hidden, head, every, None, _some(counts[-len(PARTS)]), only)
                    source, own = None, replace(own, kd_weight=0.0)
                loss = loss + self._logit_loss(source, hidden[rows], head, labels[rows], part, divisor, own)
                if (
                    self.policy_gradient is not None
                    and source is not None
                    and all(own is not one for one in self.own_losses.values())
                ):
                    later = self._policy_term(source, hidden[rows], head, labels[rows])
                    later = later if part is None else later * part
                    loss = loss + self._now(own.kd_weight) * later.sum() / divisor.to(later.dtype)
            return loss

        loss = with_head(self.student, hidden, of_logits)
        count, rows = (labels != IGNORED).sum(), len(labels)
        for i, (name, matching) in enumerate(matchings.items()):
            assert whole is not None  # asked above
            by_row, found, every = matching.by_row, count, counts[1:].sum()
            compared: Mapping[str, Any] = batch
            if self.task is not CAUSAL_LM:
                where = PARTS.index(matching.part)
                every, found = counts[where - len(PARTS)], self._places(batch, matching.part)
                compared = {**batch, PLACES: self.task.places(batch, matching.part)}
            matched = matching.loss(seen[i], whole.seen[i], compared)
            self._measure(name, matched, torch.tensor(float(rows)) if by_row else found)
            share = rows / counts[0] if by_row else found / _some(every)
            loss = loss + self._now(matching.weight) * matched * share.to(matched.dtype)
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def _places(self, batch: Mapping[str, Tensor], part: str) -> Tensor:
        """How many positions matchings of a part compare: of those of which every row has equally many, the rows."""
        places = self.task.places(batch, part)
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device) if places is None else places.sum()

    def _parts(
        self, batch: Mapping[str, Tensor], once: Sequence[Answer] | None, counts: Tensor
    ) -> Iterator[tuple[TeacherSource | None, Tensor | None, OwnLoss, Tensor]]:
        """The rows of a batch by the loss they have: (what the teacher says of them, their indices or None for all, the
        loss, (TASKS) how many tokens of each task the step has of that loss). Where nothing is compared the teacher is
        not asked.

        once: the teacher's answers on all rows, where it was asked already.
        """
        main = OwnLoss(self.kd_weight, self.ce_weight)
        for i, (of, loss) in enumerate([(None, main), *self.own_losses.items()]):
            rows = None
            if self.own_losses:
                mine = ~self._rows_of(self.own_losses, batch) if of is None else self._rows_of([of], batch)
                rows = mine.nonzero().squeeze(1)
                if not len(rows):
                    continue
            tokens = counts[1 + i * TASKS : 1 + (i + 1) * TASKS]
            if self.teacher is None or self._now(loss.kd_weight) == 0:
                yield None, rows, loss, tokens
            elif once is not None:
                for answer in once:
                    if answer.rows is None or rows is None:
                        source = answer.source if rows is None else taken(answer.source, rows)
                        yield source, answer.rows if rows is None else rows, loss, tokens
                    elif len(both := torch.isin(answer.rows, rows).nonzero().squeeze(1)):
                        yield taken(answer.source, both), answer.rows[both], loss, tokens
            else:
                asked = batch if rows is None else {name: column[rows] for name, column in batch.items()}
                for answer in self.teacher(asked):
                    found = answer.rows if rows is None else rows if answer.rows is None else rows[answer.rows]
                    yield answer.source, found, loss, tokens

    def _logit_loss(
        self,
        source: TeacherSource | None,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        weights: Tensor | None,
        divisor: Tensor,
        own: OwnLoss,
    ) -> Tensor:
        """kd_weight * T^2 * D + ce_weight * CE over some rows, divided by `divisor`."""
        kd_weight, ce_weight = self._now(own.kd_weight), self._now(own.ce_weight)
        student, vocab = head.student(hidden), self._vocab_size(head)
        aligned = source if isinstance(source, AlignedAnswer) else None
        if source is not None and vocab is not None and aligned is None:
            if not self._told and vocab == len(head.weight):
                self._told = True
                if (line := told_of_cut(source, vocab, labels != IGNORED)) is not None:
                    log.warning("%s", line)
            source = shared_part(source, vocab)
        options: dict[str, Any] = {
            "divergence": self.divergence if own.divergence is None else own.divergence,
            "temperature": self._now(self.temperature),
            "beta": self.beta if own.beta is None else own.beta,
            "lam": self.lam if own.lam is None else own.lam,
            "normalizer": divisor,
        }
        count = (labels != IGNORED).sum()

        def measured(name: str, rows: Tensor) -> None:  # means of these rows, without the weights of tokens
            self._measure(name, rows.sum() / count.clamp(min=1), count)

        def cross_entropy(by: Tensor | None = weights, ce_weight: float = ce_weight) -> Tensor:
            # over the student's whole vocabulary, whatever the teacher's is; the loss wants some teacher, and these ids
            # cost nothing
            ids = labels.clamp(min=0).unsqueeze(-1)
            nobody = TeacherSamples(ids, torch.ones(ids.shape, device=ids.device))
            plain: dict[str, Any] = {**options, "divergence": "forward_kl", "temperature": 1.0}
            ce, parts = linear_kd_loss(
                **student, teacher=nobody, labels=labels, token_weights=by, kd_weight=0.0, ce_weight=ce_weight,
                return_parts="rows", **plain,
            )  # fmt: skip
            measured("ce", parts.ce)
            return ce

        if source is None:
            return cross_entropy()
        if aligned is not None:
            assert isinstance(self.teacher, AlignedTeacher)
            settings = {name: value for name, value in options.items() if name != "normalizer"}
            found = aligned_loss(aligned, self.teacher, hidden, head, weights, **settings)
            self._measure("kd", found.nats / count.clamp(min=1), count)
            self._measure("aligned_tokens", found.tokens / count.clamp(min=1), count)
            kd = kd_weight * found.loss / divisor.to(found.loss.dtype)
            return kd + cross_entropy() if ce_weight else kd
        if self.measuring and isinstance(source, TeacherHidden):
            if found := agreement(source, hidden, head, labels, self._vocab_size(head)):
                same, entropy, rows = found
                self._measure("agreement", same, rows)
                self._measure("teacher_entropy", entropy, rows)
        # pyrefly: ignore[bad-argument-type]  # of what it can't be of, it says so itself
        target = source if self.taid is None else TeacherTAID(source, self.taid.t)
        if not self.confidence and vocab is None:
            loss, parts = linear_kd_loss(
                **student, teacher=target, labels=labels, token_weights=weights, kd_weight=kd_weight,
                ce_weight=ce_weight, return_parts="rows", **options,
            )  # fmt: skip
            measured("kd", parts.kd)
            measured("ce", parts.ce)
            return loss
        kd_weights, moved = weights, None
        if self.confidence:
            sure_of = teacher_certainty if self.confidence == "entropy" else label_probability
            sure = sure_of(source, labels, vocab or len(head.weight))
            kd_weights = sure if weights is None else sure * weights
            if self.confidence is not True:
                moved = ce_weight + (1 - sure) * kd_weight
                moved = moved if weights is None else moved * weights
        # labels say which rows count; those that the teacher does not know still do
        known = labels if vocab is None else labels.clamp(max=vocab - 1)
        kd, parts = linear_kd_loss(
            **student, teacher=target, labels=known, token_weights=kd_weights, kd_weight=kd_weight, ce_weight=0.0,
            vocab_size=vocab, return_parts="rows", **options,
        )  # fmt: skip
        measured("kd", parts.kd)
        if moved is not None:
            return kd + cross_entropy(moved, 1.0)
        return kd + cross_entropy() if ce_weight else kd

    def _policy_term(self, source: TeacherSource, hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
        """(b, n): what `policy_gradient` adds to each row's divergence."""
        assert self.policy_gradient is not None
        vocab = self._vocab_size(head)
        labels = labels if vocab is None else labels.clamp(max=vocab - 1)
        ids = labels.clamp(min=0).unsqueeze(-1)
        nobody = TeacherSamples(ids, torch.ones(ids.shape, device=ids.device))
        options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "vocab_size": vocab, "reduction": "none"}
        rows = linear_kd_loss(**head.student(hidden), teacher=nobody, labels=labels, **options)
        theirs = label_probability(source, labels, vocab or len(head.weight))
        log_p = theirs.clamp_min(torch.finfo(theirs.dtype).tiny).log()
        return policy_term(rows, log_p, labels, self.policy_gradient)

    def _vocab_size(self, head: Head) -> int | None:
        """The entries that both sides have, where the vocabularies differ in size."""
        theirs = getattr(self.teacher, "vocab_size", None)
        return None if theirs is None or theirs == len(head.weight) else min(theirs, len(head.weight))

    def _measure(self, name: str, mean: Tensor, count: Tensor) -> None:
        if self.measuring:
            self._means.add(name, mean, count)


def _check_aligned(
    teacher: AlignedTeacher,
    divergence: str,
    temperature: float | Ramp | Literal["auto"],
    taid: TAIDSchedule | None,
    confidence: Confidence,
    matchings: Mapping[str, Matching] | None,
    policy_gradient: PolicyGradient | None,
) -> None:
    """ValueError for what needs a teacher that reads the student's own tokens."""
    given = {
        "taid": taid is not None, "confidence": confidence, "matchings": bool(matchings),
        "policy_gradient": policy_gradient is not None,
    }  # fmt: skip
    if wrong := [name for name, asked in given.items() if asked]:
        raise ValueError(f"{wrong[0]}: needs a teacher that reads the student's own tokens; leave it out with align")
    if DIVERGENCES[divergence].on_logits if divergence in DIVERGENCES else False:
        raise ValueError(
            f"divergence: {divergence} compares logits, which two vocabularies do not share; use forward_kl"
        )
    cache = teacher.teacher.cache if isinstance(teacher.teacher, CachedTeacher) else None
    if cache is not None and cache.layout.kind == "top-k" and teacher.align == "spans" and temperature != 1:
        raise ValueError(
            "temperature: likelihoods of spans are at 1, but this top k was cut at another; cache at 1, or cache "
            "hidden states"
        )


def _some(count: Tensor) -> Tensor:
    """A count to divide by; 1 where there is nothing to divide."""
    return torch.where(count > 0, count, 1.0)

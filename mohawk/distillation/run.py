"""Standard distillation, run: teachers and a student -> stages of training -> evaluation -> a student."""

from __future__ import annotations

import functools
import gc
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mohawk.core.extras import need
from mohawk.core.folders import is_complete, write_whole
from mohawk.core.processes import first_before_others, from_first, is_first, joined, on_first
from mohawk.core.run_folder import phase_folder
from mohawk.data.text import tokenizer_key
from mohawk.distillation.build import (
    check_caches,
    checked_cache,
    load,
    loss_label,
    matchings_for,
    mistakes,
    of_the_student,
    own_losses,
    schedule_of,
    shaped,
)
from mohawk.distillation.plan import print_plan
from mohawk.distillation.recipe import DistillData, DistillRecipe, DistillStudent, Stage
from mohawk.distillation.sources import Sources, check_rows, held_out_rows, load_sources, rows_by_source, training_rows
from mohawk.errors import UserError
from mohawk.kernels.kd.teachers import TAIDSchedule
from mohawk.loading.model_hash import teacher_hash
from mohawk.loading.models import load_teacher
from mohawk.loading.nonfinite import refuse_nonfinite
from mohawk.losses.distiller import KnowledgeDistiller, OwnLoss
from mohawk.losses.on_policy import OnPolicy
from mohawk.losses.rationale_router import RationaleRouter, RoutedRationales
from mohawk.losses.teachers import AverageTeacher, CachedTeacher, Ensemble, ModelTeacher
from mohawk.measures.compare import Comparison, TeacherStates, compare, teacher_states
from mohawk.runs.inputs import check_inputs
from mohawk.runs.report import finish
from mohawk.runs.run import Run, check_folder, claimed, refuse_tokens
from mohawk.teacher_cache.reader import CachedRows, TeacherCache
from mohawk.training.advance import Advance
from mohawk.training.progress import log_to

log = logging.getLogger(__name__)


def distill(recipe: DistillRecipe, *, dry_run: bool = False) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `DistillRecipe.load` or `DistillRecipe.from_dict`.
        dry_run: print the plan and return; configurations, tokenizers and the first rows of texts are read.

    Raises:
        UserError: a model cannot be loaded, the recipe does not fit the models, the data hold no text, or the output
            folder holds another run.
        Interrupted: a signal stopped the run after it saved.
    """
    if recipe.has_adapter():
        need("lora", "student.lora")
    with joined(recipe.device):
        console = Console(quiet=not is_first())
        first_before_others(lambda: print_plan(recipe, console))
        read = first_before_others(
            lambda: check_inputs(recipe, planning=dry_run, further=functools.partial(check_caches, recipe.stages))
        )
        run = Path(recipe.output)
        if dry_run:
            console.print(read, highlight=False)
            on_first(lambda: check_folder(run, recipe))
            return
        with claimed(run, recipe), log_to(run):
            Distillation(recipe, run, console).run()


class Distillation(Run):
    """One distillation: the stages of its recipe, one after another."""

    recipe: DistillRecipe
    sources: Sources
    stage_sources: dict[int, Sources]  # of stages with data of their own, by the id of that part of the recipe
    _teacher_hash: str | None = None  # of the teacher's weights, once a cache is compared with it

    def run(self) -> None:
        start = time.monotonic()
        stages = self.recipe.stages
        finished = max((i for i, s in enumerate(stages) if self._is_complete(s.name)), default=-1)
        student = self._untrained()
        self._evaluate("before", student)
        names, reached = [stage.name for stage in stages], True  # whether `student` is what the next stage begins with
        for i, stage in enumerate(stages):
            before = names[i - 1] if i else None
            lost = self._lost(stage.name) if i <= finished else []
            if i <= finished and not lost:
                student, reached = self._load(stage.name), True
            elif i > finished or self._is_made_again(stage.name, stage, names, lost, reached):
                if i > finished:
                    self._forget(stage.name)
                student = self._train(i, stage, student, before)
                self._write_student(stage.name, student, before)
            elif self._student(stage.name) not in lost:  # only what is kept of it beside
                student, reached = self._load(stage.name), True
            else:
                reached = False
                continue
            self._evaluate(stage.name, student)
        on_first(lambda: self._finish(student))
        log.info("run finished in %.0f s", time.monotonic() - start)

    def _finish(self, student: nn.Module) -> None:
        """The final student, which is that of the last stage, and the report."""
        stages = self.recipe.stages
        if not self._is_final(stages[-1].name):
            self._write_final(student, stages[-1].name)
        names = {"before": "before training", **{stage.name: f"after {stage.name}" for stage in stages}}
        labels = {stage.name: loss_label(stage) for stage in stages}
        finish(
            self.folder, self.recipe, student.eval(), self.teacher, self.tokenizer, self.console,
            stages=names, labels=labels,
        )  # fmt: skip

    def _lost(self, step: str) -> list[Path]:
        """A stage's adapter that is kept, and what it is of, beside the student."""
        (stage,) = [stage for stage in self.recipe.stages if stage.name == step]
        lora, lost = (stage.student or self.recipe.student).lora, super()._lost(step)
        if lora is not None and lora.keep:
            kept = [phase_folder(self.folder, step) / name for name in ("base", "adapter")]
            lost += from_first(lambda: [folder for folder in kept if not is_complete(folder)])
        return lost

    # ---- models ----

    def _load_teacher(self) -> nn.Module:
        return load(self.recipe.teacher, self.device)

    def _untrained(self) -> nn.Module:
        base, about = self.teacher, self.recipe.teacher
        if self.recipe.student.model is None and (about.quantize or about.device_map):
            # rounded or spread weights can be asked, but not trained
            base = load(about.model_copy(update={"quantize": None, "device_map": None}), self.device)
        return self._made(self.recipe.student, base)

    def _made(self, given: DistillStudent, base: nn.Module) -> nn.Module:
        """A student as asked, from the named model or from `base`; the same one whenever it is made again."""
        if given.model is not None:
            with of_the_student():
                base = load_teacher(
                    given.model, gguf_file=given.gguf_file, revision=given.revision,
                    trust_remote_code=given.trust_remote_code, device=self.device,
                )  # fmt: skip
        return shaped(given, base, self.recipe.seed).float().to(self.device).requires_grad_(True)

    def _load(self, stage: str) -> nn.Module:
        """A finished stage's student."""
        return load_teacher(self._student(stage), device=self.device).requires_grad_(True)

    def _teacher_of(self, i: int, stage: Stage, student: nn.Module, own: Iterable[OwnLoss] = ()) -> Any:
        """Who answers in a stage, as `KnowledgeDistiller` asks; None where nobody is asked."""
        if stage.cache is not None:
            return CachedTeacher(self._cache(stage))
        if stage.learn_from == "previous":
            return ModelTeacher(load_teacher(self._student(self.recipe.stages[i - 1].name), device=self.device))
        if stage.learn_from in ("average", "start"):
            return AverageTeacher(student, stage.average_decay if stage.learn_from == "average" else 1.0)
        if all(weight == 0 for weight in (stage.kd_weight, *(loss.kd_weight for loss in own))):
            if not (stage.hidden or stage.attention):
                return None
        given = [self.recipe.teacher, *self.recipe.teachers]
        models = [self.teacher, *(load(teacher, self.device) for teacher in self.recipe.teachers)]
        teachers = [ModelTeacher(model, g.micro_batch) for model, g in zip(models, given, strict=True)]
        if len(teachers) == 1:
            return teachers[0]
        return Ensemble(teachers, self.recipe.combine, [g.weight for g in given])

    def _cache(self, stage: Stage) -> TeacherCache:
        cache = checked_cache(stage)
        about, whole = self.recipe.teacher, None
        if not (about.quantize or about.device_map):  # whose weights are others
            self._teacher_hash = self._teacher_hash or teacher_hash(self.teacher)
            whole = self._teacher_hash
        cache.check(tokenizer_hash=tokenizer_key(self.tokenizer), teacher_hash=whole)
        return cache

    # ---- training ----

    def _train(self, i: int, stage: Stage, student: nn.Module, before: str | None) -> nn.Module:
        """The student after a stage; before: the stage before it, if any."""
        if stage.student is not None:
            student = self._made(stage.student, student)
        data = self._stage_data(stage)
        rows = self._rows(stage, self._pad())
        wanted = stage.steps() * stage.batch_size * stage.gradient_accumulation
        if len(rows) < wanted:
            self.console.print(f"{stage.name}: reads its {len(rows):,} rows of text {wanted / len(rows):.1f} times")
        torch.manual_seed(self.recipe.seed)  # of adapters and projections, the same whenever the stage begins
        lora = (stage.student or self.recipe.student).lora
        if lora is not None:
            from mohawk.loading.lora import add_adapter, merge_adapter

            if lora.keep:
                on_first(functools.partial(self._write_base, stage.name, student))
            with mistakes("student.lora"):
                student = add_adapter(student, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.bits)
        router = None
        if stage.routing is not None:
            sources = self.sources if stage.data is None else self.stage_sources[id(stage.data)]
            own = rows_by_source(data, sources, stage.sequence_length, self.recipe.seed, self._pad())
            bandit = RationaleRouter(list(own), algorithm=stage.routing.algorithm, seed=self.recipe.seed)
            router = RoutedRationales(
                own, bandit, validate=lambda: self._validate(student)[0], every=stage.routing.every,
                seed=self.recipe.seed,
            )  # fmt: skip
        with mistakes(f"stages.{i} ({stage.name})"):
            objective = self._objective(i, stage, student, router, own_losses(data))
        if stage.cache is not None:
            rows = CachedRows(rows, objective.teacher.cache)
        trainer = self._trainer(
            stage.name, stage, objective, rows, report_to=self.recipe.report_to,
            origin=from_first(lambda: self._origin(before)),
        )  # fmt: skip
        self._fit(trainer, student)
        del trainer, objective
        gc.collect()  # the optimizer's state, before the evaluation that follows
        if lora is not None:
            if lora.keep:
                on_first(functools.partial(self._write_adapter, stage.name, student))
            student = merge_adapter(student)
        return student.requires_grad_(True)

    def _write_base(self, stage: str, student: nn.Module) -> None:
        """What an adapter that is kept is of."""
        with write_whole(phase_folder(self.folder, stage) / "base", replace=True) as folder:
            student.save_pretrained(folder)

    def _write_adapter(self, stage: str, student: nn.Module) -> None:
        from mohawk.loading.lora import save_adapter

        for about in student.peft_config.values():
            about.base_model_name_or_path = str(phase_folder(self.folder, stage) / "base")
        target = phase_folder(self.folder, stage) / "adapter"
        refuse_nonfinite(student, f"{target}: this adapter", "it is not written; lower the learning rate")
        with write_whole(target, replace=True) as folder:
            save_adapter(student, folder)

    def _objective(
        self,
        i: int,
        stage: Stage,
        student: nn.Module,
        router: RoutedRationales | None,
        own: dict[int, OwnLoss],
    ) -> KnowledgeDistiller:
        teacher = self._teacher_of(i, stage, student, own.values())
        model = teacher.teachers[0].model if isinstance(teacher, Ensemble) else getattr(teacher, "model", None)
        advance, on_policy, taid = stage.advance, stage.on_policy, stage.taid
        return KnowledgeDistiller(
            teacher,
            student,
            divergence=stage.divergence,
            temperature=schedule_of(stage.temperature),
            kd_weight=schedule_of(stage.kd_weight) if teacher is not None else 0.0,
            ce_weight=schedule_of(stage.ce_weight),
            beta=stage.beta,
            lam=stage.lam,
            confidence=stage.confidence,
            taid=taid and TAIDSchedule(taid.start, taid.alpha, taid.decay, taid.end),
            matchings=matchings_for(stage, student, model),
            own_losses=own,
            on_policy=on_policy
            and OnPolicy(
                student,
                self.tokenizer,
                share=on_policy.share,
                max_new_tokens=on_policy.max_new_tokens,
                temperature=on_policy.temperature,
                top_p=on_policy.top_p,
                prompt_tokens=on_policy.prompt_tokens,
                seed=self.recipe.seed,
            ),  # fmt: skip
            router=router,
            advance=advance
            and Advance(
                lambda: self._validate(student), advance.every, advance.patience, advance.improvement, advance.gap
            ),
        )

    def _validate(self, student: nn.Module) -> tuple[float, float]:
        """(student's, teacher's) loss on held-out text, nats per token; the same on all processes."""
        found = self._on_held_out(student)
        return math.log(found.student_perplexity), math.log(found.teacher_perplexity)

    def _on_held_out(self, student: nn.Module) -> Comparison:
        """Measured by rank 0 for all."""

        def measure() -> Comparison:
            name = "held_out" if "held_out" in self.texts else next(iter(self.texts))
            return compare(student, self.texts[name], autocast=self.autocast)

        return from_first(measure)

    # ---- data ----

    def _load_data(self):
        """All that any stage reads, before a model is loaded."""
        self.sources = self._checked(self.recipe.data, [stage for stage in self.recipe.stages if stage.data is None])
        self.stage_sources = {
            id(stage.data): self._checked(self._stage_data(stage), [stage])
            for stage in self.recipe.stages
            if stage.data is not None
        }
        text = self.sources.text
        documents = () if text is None else (text.held_out, text.evaluation)
        pairs = any(len(pairs) for pairs in self.sources.held_out_pairs.values())
        if not pairs and not any(kept is not None and kept.tokens for kept in documents):
            raise UserError("data: nothing to evaluate on; raise data.validation_share, or give data.evaluation")
        for stage in self.recipe.stages:
            if stage.cache is not None:  # whether it is of this text is known before any weights are loaded
                CachedRows(self._rows(stage, pad=0), checked_cache(stage))
        return text

    def _rows(self, stage: Stage, pad: int) -> Any:
        """The dataset that a stage trains on; pad: fills up rows."""
        sources = self.sources if stage.data is None else self.stage_sources[id(stage.data)]
        wanted = stage.steps() * stage.batch_size * stage.gradient_accumulation
        data = self._stage_data(stage)
        return training_rows(data, sources, stage.sequence_length, wanted, self.recipe.seed, pad)

    def _stage_data(self, stage: Stage) -> DistillData:
        """What a stage trains on; its own documents are held out as the recipe's are, so that none is trained on."""
        data = self.recipe.data
        if stage.data is None:
            return data
        kept = {"validation_share": data.validation_share, "cache": stage.data.cache or data.cache}
        return stage.data.model_copy(update=kept)

    def _checked(self, data: DistillData, stages: list[Stage]) -> Sources:
        """The tokenised data, with what these stages ask of them."""
        sources = load_sources(data, self._teacher_names(), self.tokenizer)
        for length in sorted({stage.sequence_length for stage in stages}):
            check_rows(data, sources, length)
        return sources

    def _teacher_names(self) -> list[str]:
        return [teacher.name or str(i) for i, teacher in enumerate([self.recipe.teacher, *self.recipe.teachers])]

    def _evaluation_texts(self) -> dict[str, TeacherStates]:
        texts = super()._evaluation_texts() if self.data is not None else {}
        asked = self.recipe.evaluation
        rows = held_out_rows(self.recipe.data, self.sources, asked.sequence_length, asked.tokens, self._pad())
        if rows is not None:
            texts["held_out_pairs"] = teacher_states(
                self.teacher, rows, batch_size=asked.batch_size, autocast=self.autocast
            )
        return texts

    def _check_tokens(self) -> None:
        if self.data is not None:
            super()._check_tokens()
        vocabulary = self.teacher.config.get_text_config().vocab_size
        for kept in (self.sources.pairs, self.sources.held_out_pairs):
            for i, pairs in kept.items():
                refuse_tokens(pairs.tokens, self.recipe.data.train[i].source, vocabulary)

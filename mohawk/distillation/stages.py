"""One stage of a distillation: who answers, what is compared, and the training."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mohawk.core.folders import write_whole
from mohawk.core.processes import on_first
from mohawk.core.run_folder import ADAPTER, BASE, phase_folder, phase_student
from mohawk.data.aligned_rows import AlignedRows, TeacherRows
from mohawk.data.chat import ends_of_turn
from mohawk.data.text import tokenizer_key
from mohawk.distillation.build import (
    checked_cache,
    load,
    matchings_for,
    mistakes,
    own_losses,
    schedule_of,
    shaped,
    shaped_in_parts,
)
from mohawk.distillation.contradictions import MATCHED
from mohawk.distillation.encoders import masking_of
from mohawk.distillation.recipe import DistillStudent, Lora, Stage
from mohawk.distillation.sources import StageData, examples_of, rows_by_source
from mohawk.kernels.kd.teachers import TAIDSchedule
from mohawk.loading.lora import add_adapter, merge_adapter, save_adapter
from mohawk.loading.model_hash import teacher_hash
from mohawk.loading.models import load_teacher
from mohawk.loading.nonfinite import refuse_nonfinite
from mohawk.loading.tasks import task_in
from mohawk.losses.aligned import AlignedTeacher
from mohawk.losses.distiller import KnowledgeDistiller, OwnLoss
from mohawk.losses.on_policy import OnPolicy
from mohawk.losses.rationale_router import RationaleRouter, RoutedRationales
from mohawk.losses.teachers import AverageTeacher, CachedTeacher, Ensemble, ModelTeacher
from mohawk.measures.compare import Comparison, compare
from mohawk.models.casting import cast
from mohawk.models.sharding import copied, is_sharded
from mohawk.runs.context import RunContext, measured
from mohawk.runs.steps import Step, train, write_plain
from mohawk.teacher_cache.reader import CachedRows, TeacherCache
from mohawk.training.advance import Advance

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mohawk.loading.causal import CausalLM


class StageTrainer:
    """Trains a run's stages. What is asked of the teacher's weights is kept, as hashing them takes a while."""

    def __init__(self, run: RunContext[StageData]):
        self.run = run
        self.task: Any = task_in(run.recipe)
        self._teacher_hash: str | None = None  # once a cache is compared with it

    def train(self, i: int, stage: Stage, student: PreTrainedModel, before: str | None) -> PreTrainedModel:
        """The student after a stage. i: its place in the recipe. before: the step before it, if any."""
        run, recipe = self.run, self.run.recipe
        section = recipe.section_of(stage, i)
        if stage.student is not None:
            student = made(run, stage.student, student, f"{section}.student")
        rows = run.data.rows(stage, run.pad)
        wanted = stage.asked_rows()
        if wanted is not None and len(rows) < wanted:
            run.console.print(f"{stage.name}: reads its {len(rows):,} rows of text {wanted / len(rows):.1f} times")
        torch.manual_seed(recipe.seed)  # of adapters and projections, the same whenever the stage begins
        lora, trained = lora_of(recipe, stage), None
        if lora is not None:
            if lora.keep:
                write_plain(student, phase_folder(run.folder, stage.name) / BASE)
            with mistakes(f"{section}.student.lora" if stage.student else "student.lora"):
                trained = add_adapter(student, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.bits)
        with mistakes(f"{section} ({stage.name})"):
            objective = self._objective(i, stage, student if trained is None else trained)
        if stage.cache is not None:
            teacher = objective.teacher
            if isinstance(teacher, AlignedTeacher):
                assert isinstance(teacher.teacher, CachedTeacher)
                cache = teacher.teacher.cache
                theirs = TeacherRows(rows, teacher.aligner, cache.layout.sequence_length)
                rows = AlignedRows(rows, CachedRows(theirs, cache))
            else:
                assert isinstance(teacher, CachedTeacher)
                rows = CachedRows(rows, teacher.cache)
        if stage.epochs is not None:
            run.console.print(f"{stage.name}: {told_epochs(stage.epochs, len(rows), stage.rows)}", highlight=False)
        train(run, stage.name, stage, objective, rows, before, section=section, report_to=recipe.report_to)
        if lora is not None and trained is not None:
            if lora.keep:
                on_first(functools.partial(self._write_adapter, stage.name, trained))
            student = merge_adapter(trained)
        return student.requires_grad_(True)

    def _objective(self, i: int, stage: Stage, student: CausalLM) -> KnowledgeDistiller:
        own = own_losses(self.run.data.asked(stage))
        masking = masking_of(self.run.recipe, self.run.tokenizer) if self.task == "masked_lm" else None
        router = self._router(stage, student)
        teacher = self._teacher(i, stage, student, own.values())
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
            taid=None if taid is None else TAIDSchedule(taid.start, taid.alpha, taid.decay, taid.end),
            matchings=matchings_for(stage, student, model),
            own_losses=own,
            on_policy=None
            if on_policy is None
            else OnPolicy(
                student,
                self.run.tokenizer,
                share=on_policy.share,
                max_new_tokens=on_policy.max_new_tokens,
                temperature=on_policy.temperature,
                top_p=on_policy.top_p,
                prompt_tokens=on_policy.prompt_tokens,
                eos_token_id=ends_of_turn(self.run.tokenizer) or None,
                seed=self.run.recipe.seed,
                gather=stage.name in self.run.gathers,
            ),
            policy_gradient=stage.policy_gradient,
            router=router,
            task=self.task,
            masking=masking,
            kd_on=stage.kd_on,
            advance=None
            if advance is None
            else Advance(
                lambda: self._validate(student), advance.every, advance.patience, advance.improvement, advance.gap
            ),
        )

    def _router(self, stage: Stage, student: CausalLM) -> RoutedRationales | None:
        if stage.routing is None:
            return None
        run, seed = self.run, self.run.recipe.seed
        own = rows_by_source(run.data.asked(stage), run.data.of(stage), stage.sequence_length, seed, run.pad)
        bandit = RationaleRouter(list(own), algorithm=stage.routing.algorithm, seed=seed)
        return RoutedRationales(
            own, bandit, validate=lambda: self._validate(student)[0], every=stage.routing.every, seed=seed
        )

    def _teacher(self, i: int, stage: Stage, student: CausalLM, own: Iterable[OwnLoss]) -> Any:
        """Who answers in a stage, as `KnowledgeDistiller` asks; None where nobody is asked."""
        run, recipe = self.run, self.run.recipe
        if stage.cache is not None:
            return self._aligned(stage, CachedTeacher(self._cache(stage)))
        if stage.learn_from == "previous":
            previous = phase_student(run.folder, recipe.stages[i - 1].name)
            found = load_teacher(previous, device=run.device, spread=run.spread_teacher, task=self.task)
            return ModelTeacher(found, task=self.task)
        if stage.learn_from in ("average", "start"):
            decay = stage.average_decay if stage.learn_from == "average" else 1.0
            return AverageTeacher(student, decay, copy_of=functools.partial(_copy, run), task=self.task)
        if all(weight == 0 for weight in (stage.kd_weight, *(loss.kd_weight for loss in own))):
            if all(getattr(stage, key) is None for key in MATCHED):
                return None
        if recipe.teacher is None:
            return None
        given = [recipe.teacher, *recipe.teachers]
        further = [
            load(one, run.device, f"teachers.{k}", spread=run.spread_teacher, task=self.task)
            for k, one in enumerate(recipe.teachers)
        ]
        models = [run.teacher, *further]
        teachers = [ModelTeacher(model, g.micro_batch, self.task) for model, g in zip(models, given, strict=True)]
        if len(teachers) == 1:
            return self._aligned(stage, teachers[0])
        return Ensemble(teachers, recipe.combine, [g.weight for g in given])

    def _aligned(self, stage: Stage, teacher: ModelTeacher | CachedTeacher) -> Any:
        """The teacher as it is, or with its own tokens aligned with the student's."""
        run, own = self.run, self.run.teacher_tokenizer
        if own is None:
            return teacher
        examples = examples_of(run.data.asked(stage), run.tokenizer, own, stage.sequence_length)
        return AlignedTeacher(teacher, own, run.tokenizer, align=run.recipe.align, examples=examples)

    def _cache(self, stage: Stage) -> TeacherCache:
        run = self.run
        cache = checked_cache(stage, None if run.teacher_tokenizer is None else run.recipe.align)
        about, whole = run.recipe.teacher, None
        if about is not None and not (about.quantize or about.device_map):  # whose weights are others
            self._teacher_hash = self._teacher_hash or teacher_hash(run.teacher)
            whole = self._teacher_hash
        cache.check(tokenizer_hash=tokenizer_key(run.teacher_tokenizer or run.tokenizer), teacher_hash=whole)
        return cache

    def _validate(self, student: CausalLM) -> tuple[float, float]:
        """(student's, teacher's) loss on held-out text, nats per token, the latter NaN where the teacher reads no such
        tokens; the same on all processes."""
        found = measured(self.run, student, _held_out(self.run))
        theirs = math.log(found.teacher_perplexity) if isinstance(found, Comparison) else math.nan
        return math.log(found.student_perplexity), theirs

    def _write_adapter(self, stage: str, student: PeftModel) -> None:
        folder = phase_folder(self.run.folder, stage)
        for about in student.peft_config.values():
            about.base_model_name_or_path = str(folder / BASE)
        target = folder / ADAPTER
        refuse_nonfinite(student, f"{target}: this adapter", "it is not written; lower the learning rate")
        with write_whole(target, replace=True) as partial:
            save_adapter(student, partial)


def told_epochs(epochs: int, examples: int, per_step: int) -> str:
    """What so many epochs are in steps."""
    steps, left = divmod(epochs * examples, per_step)
    told = f"{epochs} epoch{'s' * (epochs != 1)} of {examples:,} rows: {steps + (left > 0):,} steps of {per_step} rows"
    return f"{told}, the last one of {left}" if left else told


def stage_step(trainer: StageTrainer, i: int, stage: Stage) -> Step:
    """A stage as a run takes it."""
    lora = lora_of(trainer.run.recipe, stage)
    kept = (BASE, ADAPTER) if lora is not None and lora.keep else ()
    folder = phase_folder(trainer.run.folder, stage.name)
    return Step(stage.name, functools.partial(trainer.train, i, stage), stage, [folder / name for name in kept])


def lora_of(recipe: Any, stage: Stage) -> Lora | None:
    """The adapter that a stage trains."""
    return (stage.student or recipe.student).lora


def made(run: RunContext, given: DistillStudent, base: PreTrainedModel, where: str = "student") -> PreTrainedModel:
    """A student as asked, from the named model or from `base`; the same one whenever it is made again."""
    parts = run.parts
    if given.model is not None:
        spread = None if parts is None else parts.student
        task = task_in(run.recipe)
        classes = run.teacher.config if task == "classification" else None
        torch.manual_seed(run.recipe.seed)  # of a new head for classes, the same whenever it is made
        base = load_teacher(
            given.model, **given.where, device=run.device, spread=spread, who=f"{where}.model", task=task,
            classes=classes,
        )  # fmt: skip
    if parts is not None:
        if given.model is not None and given.layers is None and not given.scratch and given.hybrid is None:
            return base.requires_grad_(True)
        return shaped_in_parts(given, base, run.recipe.seed, parts.student, where).requires_grad_(True)
    student = shaped(given, base, run.recipe.seed, where, task_in(run.recipe))
    cast(student, torch.float32)
    # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
    return student.to(run.device).requires_grad_(True)


def _copy(run: RunContext, student: CausalLM) -> CausalLM:
    """A copy of a student that its average starts from."""
    if run.parts is None:
        return copy.deepcopy(student)
    if not is_sharded(student):
        raise ValueError("learn_from: an average of adapters cannot be held in parts; set sharding.kind: none")
    plain: Any = student
    with torch.device("meta"):
        shape = type(plain)(copy.deepcopy(plain.config))
    copied(student, shape, run.parts.teacher)
    return shape


def on_held_out(run: RunContext, student: CausalLM) -> Comparison:
    """A student beside the teacher on held-out text, by all processes together."""
    return compare(student, _held_out(run), autocast=run.autocast)


def _held_out(run: RunContext) -> Any:
    return run.texts["held_out" if "held_out" in run.texts else next(iter(run.texts))]

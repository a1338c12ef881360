"""`mohawk prune`: scores -> cut -> healing by distillation, in rounds; optionally a hybrid made of the result."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from mohawk.conversion.footprint import Hardware
from mohawk.conversion.run import train_phase
from mohawk.core.folders import is_complete
from mohawk.core.json_files import read_json, write_json
from mohawk.core.precision import pick_device
from mohawk.core.processes import first_before_others, from_first, on_first
from mohawk.core.run_folder import (
    CUT,
    RECIPE,
    SEARCH,
    STUDENT,
    VOCABULARY,
    evaluation_file,
    phase_student,
    round_folder,
)
from mohawk.data.source_files import as_source, local_files
from mohawk.data.token_counts import most_frequent, token_counts
from mohawk.distillation.build import check_caches, load, loss_label, mistakes
from mohawk.distillation.run import read_data
from mohawk.distillation.sources import StageData, training_rows
from mohawk.distillation.stages import StageTrainer
from mohawk.errors import UserError
from mohawk.loading.configs import building, load_config
from mohawk.loading.models import load_teacher, load_tokenizer
from mohawk.models.casting import cast
from mohawk.models.cutting.cuts import Cut, cut
from mohawk.models.cutting.sizes import Sizes, sizes_of
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import copy_of
from mohawk.pruning.plan import Plan, convert_options, make_plan, print_plan
from mohawk.pruning.recipe import PruneRecipe, PruneStep
from mohawk.pruning.rounds import Rounds, given_scores
from mohawk.pruning.search import search_table
from mohawk.pruning.sizes import empty_model, parameters_of, sizes_header, sizes_row
from mohawk.pruning.vocabulary import check_trimmable, reasons_to_keep, tokens_to_keep, told_reasons, trim_tokenizer
from mohawk.runs.context import RunContext, open_run
from mohawk.runs.kept import CutMade, KeptVocabulary, Search
from mohawk.runs.report import finish
from mohawk.runs.sharding import Parts, parts_of
from mohawk.runs.start import start
from mohawk.runs.steps import Step, is_final, long_rows, take_steps, whole_models, write_final
from mohawk.runs.tables import Table

if TYPE_CHECKING:
    from mohawk.loading.parts import Spread

log = logging.getLogger(__name__)


def prune(recipe: PruneRecipe, *, dry_run: bool = False, hardware: Hardware | None = None) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `PruneRecipe.load` or `PruneRecipe.from_dict`.
        dry_run: print the plan and return; the teacher's configuration and tokenizer and texts' first rows are read.
        hardware: what a dry run's plan is for; default: what there is.

    Raises:
        UserError: the teacher cannot be loaded or cut, the target does not fit it, the data hold no text, or the output
            folder holds another run.
        Interrupted: a signal stopped the run after it saved.
    """

    def plan(console: Console) -> Plan:
        about = recipe.teacher
        config = first_before_others(lambda: load_config(about.model, **about.where))
        with mistakes("teacher"):
            sizes_of(config)
        with building(config, about.model):
            empty_model(config)
        planned = _plan(recipe, config, Path(recipe.output), hardware)
        print_plan(planned, recipe, console)
        on_first(lambda: _check_files(recipe, dry_run))
        return planned

    def work(folder: Path, console: Console, planned: Plan) -> None:
        run = opened(recipe, folder, console, parts=parts_of(recipe, planned.sharded))
        again = {need.name for need in planned.needs if need.strategy.recompute}
        gathers = from_first(lambda: {need.name for need in planned.needs if need.gathers})
        kinds = {"heal": recipe.heal, "correct": recipe.correct}
        for step in recipe.steps():
            stage = kinds.get(step.kind)
            name = step.name if stage is None else stage.name
            run.recompute |= {step.name} if name in again else set()
            run.gathers |= {step.name} if name in gathers else set()
        Pruning(run, planned).run_steps()

    start(
        recipe,
        dry_run=dry_run,
        plan=plan,
        further=functools.partial(_check_further, recipe),
        work=work,
    )


def opened(
    recipe: PruneRecipe, folder: Path, console: Console, *, trains: bool = True, parts: Parts | None = None
) -> RunContext[StageData]:
    """A pruning's folder with its teacher, corrected where that is over, and data; see `open_run`."""

    def load_it(device: torch.device, spread: Spread | None) -> PreTrainedModel:
        corrected = corrected_teacher(recipe, folder)
        if corrected is not None:
            return load_teacher(corrected, dtype=recipe.teacher.dtype, device=device, spread=spread)
        return load(recipe.teacher, device, spread=spread)

    read = functools.partial(read_data, recipe)
    return open_run(recipe, folder, console, read=read, load=load_it, trains=trains, parts=parts)


def corrected_teacher(recipe: PruneRecipe, folder: Path) -> Path | None:
    """Where the teacher lies once it was corrected and measured, when nothing is left to compare with the one as it
    was; None before. All processes must ask."""
    if recipe.correct is None:
        return None
    corrected, measured = phase_student(folder, recipe.correct.name), evaluation_file(folder, recipe.correct.name)
    return corrected if from_first(lambda: measured.is_file() and is_complete(corrected)) else None


def _check_files(recipe: PruneRecipe, dry_run: bool) -> None:
    """UserError where scores cannot be read or, in a dry run, which reads no text, local text is not there."""
    if recipe.calibration.scores is not None:
        given_scores(recipe.calibration.scores)
    if dry_run:
        for source in (*recipe.data.train, *recipe.data.evaluation):
            local_files(as_source(source))


def _check_further(recipe: PruneRecipe, tokenizer: Any) -> None:
    """UserError where the tokenizer cannot lose tokens though it is to, or a stage's cache does not fit."""
    if recipe.prune.vocabulary is not None:
        try:
            check_trimmable(tokenizer)
        except ValueError as error:
            raise UserError(f"prune.vocabulary: {error}") from error
    check_caches(recipe, tokenizer)


def _plan(recipe: PruneRecipe, config: Any, run: Path, hardware: Hardware | None) -> Plan:
    """The plan, with a stopped run's candidates; one of several processes measures a latency, for all."""
    device = pick_device(recipe.device)

    def make() -> Plan:
        return make_plan(recipe, config, device, _saved_candidates(run, recipe), hardware)

    plan = on_first(make)
    found = from_first(lambda: plan.rounds[0].candidates if plan is not None and plan.rounds else [])
    return make_plan(recipe, config, device, found, hardware) if plan is None else plan


def _saved_candidates(run: Path, recipe: PruneRecipe) -> list[Sizes]:
    """What a stopped run of this very recipe found for its first round; another's are none of it."""
    saved = read_json(round_folder(run, 1) / SEARCH, Search)
    if saved is None:
        return []
    try:
        old = PruneRecipe.load(run / RECIPE)
    except UserError:  # another program's, or another kind of run's; `claimed` says so
        return []
    decide = ("teacher", "prune", "search", "convert", "save_dtype")
    if any(getattr(old, name) != getattr(recipe, name) for name in decide):
        return []
    return [Sizes(**row["sizes"]) for row in saved["candidates"]]


class Pruning:
    """One pruning. A healing is a stage of a distillation."""

    def __init__(self, run: RunContext[StageData], plan: Plan):
        self.run, self.plan = run, plan
        self.rounds, self.trainer = Rounds(run, plan), StageTrainer(run)

    def run_steps(self) -> None:
        """All that is not finished, the final student and the report."""
        run, begin = self.run, time.monotonic()
        if run.recipe.prune.vocabulary is not None:  # said before hours of training
            on_first(self._check_vocabulary)
        steps = run.recipe.steps()
        student = take_steps(run, [self._step(step) for step in steps], None)
        student = run.teacher if student is None else student
        last = steps[-1].name if steps else None
        if not from_first(lambda: self._is_final(last)):
            self._write_final(student, last)
        del student
        corrected = corrected_teacher(run.recipe, run.folder)
        on_first(lambda: self._finish(corrected))
        log.info("run finished in %.0f s", time.monotonic() - begin)

    def _finish(self, corrected: Path | None) -> None:
        """Measures the final student and writes the report."""
        run, steps, final = self.run, self.run.recipe.steps(), self.run.folder / STUDENT
        if run.parts is None:
            models = load_teacher(final, dtype="auto", device=run.device, who="student"), run.teacher
        else:
            shape = empty_model(load_config(final, who="student"))
            cast(shape, getattr(torch, run.recipe.save_dtype))
            models = whole_models(run, shape, corrected=corrected) or (shape, run.teacher)
        student, teacher = models
        finish(
            run.folder, run.recipe, student.eval(), teacher, run.tokenizer, run.console,
            stages={step.name: step.told for step in steps}, labels=self._labels(steps),
            own_tables=self._tables(student), student_tokenizer=load_tokenizer(final, who="student"),
            whole=student.device.type != "meta",
            texts=None if run.recipe.prune.vocabulary is not None else long_rows(run),  # its tokens have other numbers
        )  # fmt: skip

    def _step(self, step: PruneStep) -> Step:
        """A step of the recipe as a run takes it."""
        run, recipe = self.run, self.run.recipe
        if step.kind == "correct":

            def correct(student: PreTrainedModel | None, before: str | None) -> PreTrainedModel:
                if run.parts is not None:
                    teacher = copy_of(run.teacher, run.parts.student, torch.float32)
                else:
                    teacher = copy.deepcopy(run.teacher)
                    cast(teacher, torch.float32)
                return self.trainer.train(0, recipe.correct, teacher.requires_grad_(True), before)

            return Step(step.name, correct, recipe.correct, needed=True, then=self._replace_teacher)
        if step.kind == "cut":

            def cut_it(student: PreTrainedModel | None, before: str | None) -> PreTrainedModel:
                on_first(lambda: self.rounds.forget_scores(step.round, before))
                return self.rounds.cut(step.round, run.teacher if student is None else student)

            return Step(step.name, cut_it)
        if step.kind == "convert":

            def convert(student: PreTrainedModel | None, before: str | None) -> PreTrainedModel:
                options = convert_options(recipe)
                assert options is not None  # or there was no such step
                torch.manual_seed(recipe.seed)
                base = run.teacher if student is None else student
                hybrid = hybrid_from_teacher(base, dtype=torch.float32, spread=run.spread_student, **options)
                return hybrid.requires_grad_(True)

            return Step(step.name, convert)
        if step.kind == "heal":
            stage = recipe.heal.model_copy(update={"name": step.name})
            return Step(step.name, functools.partial(self.trainer.train, 0, stage), stage)
        return Step(step.name, functools.partial(self._match, step.name), getattr(recipe.convert, step.name))

    def _replace_teacher(self, corrected: PreTrainedModel) -> None:
        """Makes the teacher as fine-tuned on the text the one that all is cut from and compared with from here on."""
        run = self.run
        if run.parts is None:
            cast(corrected, run.teacher.dtype)
        else:
            corrected = copy_of(corrected, run.parts.teacher, run.teacher.dtype)
        run.teacher = corrected.eval().requires_grad_(False)
        run.ask_teacher()

    def _match(self, name: str, student: HybridForCausalLM, before: str | None) -> HybridForCausalLM:
        """Phase 1 or 2 of a conversion, against the pruned model."""
        run, recipe, parent = self.run, self.run.recipe, self.run.teacher
        phase = getattr(recipe.convert, name)
        if self.plan.rounds:
            folder = phase_student(run.folder, f"prune_{len(self.plan.rounds)}")
            if not from_first(lambda: is_complete(folder)):
                raise UserError(f"{folder} is missing or damaged; to make it again, delete {folder.parent.parent}")
            parent = load_teacher(folder, device=run.device, spread=run.spread_teacher, who="student")
        wanted = phase.steps() * phase.rows
        rows = training_rows(recipe.data, run.data.sources, phase.sequence_length, wanted, recipe.seed, run.pad)
        train_phase(run, name, phase, student, parent, rows, before, f"convert.{name}")
        return student

    # ---- the end ----

    def _is_final(self, last: str | None) -> bool:
        trimmed = self.run.recipe.prune.vocabulary is not None
        if trimmed and read_json(self.run.folder / VOCABULARY, KeptVocabulary) is None:
            return False
        # the last step's are in another dtype, or have more tokens
        return is_final(self.run, last, same_weights=False)

    def _write_final(self, student: PreTrainedModel, last: str | None) -> None:
        run, tokenizer = self.run, self.run.tokenizer
        dtype, spread = getattr(torch, run.recipe.save_dtype), run.spread_teacher
        if run.recipe.prune.vocabulary is not None:
            with mistakes("prune.vocabulary"):
                tokens = tokens_to_keep(student, tokenizer, ids=self._tokens_wanted)
                tokenizer = trim_tokenizer(tokenizer, tokens)
                student = cut(student, Cut(tokens=tokens), dtype=dtype, spread=spread)
            covered: dict[str, Any] = {"before": self.plan.own.vocabulary, "after": len(tokens)}
            covered["why"] = {reason: len(tokens) for reason, tokens in self._reasons_to_keep.items()}
            for name in ("held_out", "evaluation"):
                counts = self._token_counts(name)
                if counts.any():
                    covered[name] = float(counts[tokens].sum() / counts.sum())
            on_first(lambda: write_json(run.folder / VOCABULARY, covered))
        elif spread is not None and student.dtype != dtype:
            student = copy_of(student, spread, dtype)
        elif spread is None:
            student = copy.deepcopy(student) if student is run.teacher else student
            cast(student, dtype)
        write_final(run, student, last, tokenizer)

    def _check_vocabulary(self) -> None:
        """One line that says what will be kept and why, or the reason why nothing can be left out."""
        with mistakes("prune.vocabulary"):
            reasons = self._reasons_to_keep
            trim_tokenizer(self.run.tokenizer, sorted(token for tokens in reasons.values() for token in tokens))
        told = f"of {self.plan.own.vocabulary:,}, {told_reasons(reasons)}"
        self.run.console.print(f"vocabulary: kept in the end are, {told}", highlight=False, soft_wrap=True)

    @functools.cached_property
    def _reasons_to_keep(self) -> dict[str, list[int]]:
        return reasons_to_keep(self.run.teacher, self.run.tokenizer, ids=self._tokens_wanted)

    @functools.cached_property
    def _tokens_wanted(self) -> list[int]:
        return most_frequent(self._token_counts("train"), self.run.recipe.prune.vocabulary)

    def _token_counts(self, part: str) -> np.ndarray:
        """How often each token stands in the train, held_out or evaluation part of the data, (vocabulary,)."""
        pairs = {"train": self.run.data.sources.pairs, "held_out": self.run.data.sources.held_out_pairs}.get(part, {})
        return token_counts(getattr(self.run.data.sources.text, part, None), pairs.values(), self.plan.own.vocabulary)

    def _labels(self, steps: Sequence[PruneStep]) -> dict[str, str]:
        labels = {}
        for step in steps:
            if step.kind in ("correct", "heal"):
                labels[step.name] = loss_label(getattr(self.run.recipe, step.kind))
            elif step.kind == "mixing":
                labels[step.name] = f"{self.run.recipe.convert.mixing.metric} distance of the matrices"
            elif step.kind == "hidden":
                labels[step.name] = "L2 distance per token"
        return labels

    def _tables(self, student: PreTrainedModel) -> list[Table]:
        """What was cut, what was searched, and which tokens are left."""
        rows = [["teacher", *sizes_row(self.plan.own), *(f"{n:,}" for n in parameters_of(self.run.teacher))]]
        searches = []
        for number in range(1, len(self.plan.rounds) + 1):
            rows.append([f"after cut {number}", *self._after_cut(number)])
            if (state := read_json(self.rounds.folder(number) / SEARCH, Search)) and "picked" in state:
                searches.append(search_table(state))
        counts = [f"{n:,}" for n in parameters_of(student)]
        if counts != rows[-1][-2:]:  # made a hybrid, or less of a vocabulary
            rows.append(["student", *sizes_row(sizes_of(student.config), self.plan.own), *counts])
        header = ["", *sizes_header(self.plan.own), "parameters", "outside embedding and head"]
        made: list[Table] = [("Sizes", header, rows), *searches]
        covered = read_json(self.run.folder / VOCABULARY, KeptVocabulary)
        if covered is not None and self.run.recipe.prune.vocabulary:
            lines = [["tokens", f"{covered['after']:,} of {covered['before']:,}"]]
            lines += [[reason, f"{count:,}"] for reason, count in covered.get("why", {}).items()]
            lines += [
                [f"of {name.replace('_', '-')} text's tokens", f"{covered[name]:.2%}"]
                for name in ("held_out", "evaluation") if name in covered
            ]  # fmt: skip
            made.append(("Vocabulary kept", ["", "kept"], lines))
        return made

    def _after_cut(self, number: int) -> list[str]:
        """The cells of a round's cut in the table of sizes; question marks where all that it left is lost."""
        found, student = read_json(self.rounds.folder(number) / CUT, CutMade), f"prune_{number}"
        if found is not None:
            after, counts = Sizes(**found["after"]), (found["parameters"], found["outside_embedding_and_head"])
        elif is_complete(folder := phase_student(self.run.folder, student)):
            config = load_config(folder)
            after, counts = sizes_of(config), parameters_of(empty_model(config))
        else:
            return ["?"] * (len(sizes_header(self.plan.own)) + 2)
        return [*sizes_row(after, self.plan.own), *(f"{n:,}" for n in counts)]

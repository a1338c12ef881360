"""`mohawk prune`: scores -> cut -> healing by distillation, in rounds; optionally a hybrid made of the result."""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from mohawk.conversion.plan import objective_for
from mohawk.conversion.readout import solve_output_projections
from mohawk.core.folders import is_complete, weights_sum
from mohawk.core.json_files import read_json, write_json
from mohawk.core.places import home
from mohawk.core.precision import pick_device
from mohawk.core.processes import first_before_others, from_first, is_first, joined, on_first
from mohawk.core.run_folder import RECIPE, STUDENT, evaluation_file, phase_folder, plot_file
from mohawk.data.packing import collate
from mohawk.data.text import as_source, local_files
from mohawk.data.token_counts import most_frequent, token_counts
from mohawk.distillation.build import check_caches, loss_label, mistakes
from mohawk.distillation.run import Distillation
from mohawk.distillation.sources import training_rows
from mohawk.errors import UserError
from mohawk.loading.models import building, load_config, load_teacher, load_tokenizer
from mohawk.models.cutting.cuts import Cut, cut
from mohawk.models.cutting.sizes import Sizes, attention_layers, sizes_of, ssm_layers
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.pruning.baselines import magnitude_importance, random_importance
from mohawk.pruning.importance import Importance, check_scores, choose, chosen_layers, measure_importance
from mohawk.pruning.layer_drops import measure_layer_drops
from mohawk.pruning.layers import chosen_with_mix, layer_kinds, mix_of
from mohawk.pruning.plan import Plan, Round, convert_options, costs_of, found_for, make_plan, print_plan
from mohawk.pruning.recipe import PruneRecipe, Step, Target
from mohawk.pruning.search import search, search_table, within
from mohawk.pruning.sizes import between, empty_model, parameters_of, present, sizes_header, sizes_row, target_sizes
from mohawk.pruning.vocabulary import check_trimmable, reasons_to_keep, told_reasons, trim_tokenizer, trim_vocabulary
from mohawk.runs.inputs import check_inputs
from mohawk.runs.kept import CutMade, Drops, Search, Vocabulary
from mohawk.runs.plots import plot_candidates
from mohawk.runs.report import Table, finish
from mohawk.runs.run import check_folder, claimed
from mohawk.training.progress import log_to

log = logging.getLogger(__name__)


def prune(recipe: PruneRecipe, *, dry_run: bool = False) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `PruneRecipe.load` or `PruneRecipe.from_dict`.
        dry_run: print the plan and return; the teacher's configuration and tokenizer and texts' first rows are read.

    Raises:
        UserError: the teacher cannot be loaded or cut, the target does not fit it, the data hold no text, or the output
            folder holds another run.
        Interrupted: a signal stopped the run after it saved.
    """
    with joined(recipe.device):
        console = Console(quiet=not is_first())
        teacher, run = recipe.teacher, Path(recipe.output)
        config = first_before_others(
            lambda: load_config(
                teacher.model, gguf_file=teacher.gguf_file, revision=teacher.revision,
                trust_remote_code=teacher.trust_remote_code,
            )
        )  # fmt: skip
        with building(config, teacher.model):
            empty_model(config)
        plan = _plan(recipe, config, run)
        print_plan(plan, recipe, console)
        read = first_before_others(
            lambda: check_inputs(recipe, planning=dry_run, further=functools.partial(_check_further, recipe))
        )
        if recipe.calibration.scores is not None:
            on_first(lambda: given_scores(recipe.calibration.scores))
        if dry_run:
            console.print(read, highlight=False)
            on_first(lambda: check_folder(run, recipe))
            on_first(lambda: _check_text(recipe))
            return
        with claimed(run, recipe), log_to(run):
            Pruning(recipe, run, console, plan).run()


def _check_further(recipe: PruneRecipe, tokenizer: Any) -> None:
    """UserError where the tokenizer cannot lose tokens though it is to, or a stage's cache does not fit."""
    if recipe.prune.vocabulary is not None:
        try:
            check_trimmable(tokenizer)
        except ValueError as error:
            raise UserError(f"prune.vocabulary: {error}") from error
    check_caches([stage for stage in (recipe.correct, recipe.heal) if stage is not None], tokenizer)


def _plan(recipe: PruneRecipe, config: Any, run: Path) -> Plan:
    """The plan, with a stopped run's candidates; one of several processes measures a latency, for all."""
    device = pick_device(recipe.device)

    def make() -> Plan:
        return make_plan(recipe, config, device, _saved_candidates(run, recipe))

    plan = on_first(make)
    found = from_first(lambda: plan.rounds[0].candidates if plan.rounds else [])
    return make_plan(recipe, config, device, found) if plan is None else plan


def _check_text(recipe: PruneRecipe) -> None:
    """UserError where local text is not there."""
    for source in (*recipe.data.train, *recipe.data.evaluation):
        local_files(as_source(source))


def _saved_candidates(run: Path, recipe: PruneRecipe) -> list[Sizes]:
    """What a stopped run of this very recipe found for its first round; another's are none of it."""
    saved = read_json(run / "rounds" / "1" / "search.json", Search)
    try:
        old = PruneRecipe.load(run / RECIPE) if saved else None
    except UserError:  # another program's, or another kind of run's; `claimed` says so
        return []
    decide = ("teacher", "prune", "search", "convert", "save_dtype")
    if old is None or any(getattr(old, name) != getattr(recipe, name) for name in decide):
        return []
    return [Sizes(**row["sizes"]) for row in saved["candidates"]]


def given_scores(path: str) -> Importance:
    """Scores of a file that a recipe names. Raises UserError."""
    try:
        return Importance.load(home(path))
    except Exception as error:  # safetensors' own error for a damaged file, ValueError for another one
        found = str(error).splitlines()[0]
        raise UserError(
            f"calibration.scores: {path} cannot be read ({found}); give scores of an earlier run"
        ) from error


def cut_in_float32(base: nn.Module, what: Cut) -> nn.Module:
    """A trainable cut; weights that it rescales or folds into others are rounded to float32, whatever the model has.

    The float32 copy of another dtype's model is gone when this returns.
    """
    whole = base if base.dtype == torch.float32 else copy.deepcopy(base).float()
    return cut(whole, what).requires_grad_(True)


class Pruning(Distillation):
    """One pruning: its steps, one after another. A healing is a stage of a distillation."""

    recipe: PruneRecipe

    def __init__(self, recipe: PruneRecipe, run: Path, console: Console, plan: Plan):
        self.plan = plan
        super().__init__(recipe, run, console)

    def run(self) -> None:
        start = time.monotonic()
        if self.recipe.prune.vocabulary is not None:  # said before hours of training
            on_first(self._check_vocabulary)
        steps = self.recipe.steps()
        finished = max((i for i, s in enumerate(steps) if self._is_complete(s.name)), default=-1)
        student: nn.Module | None = None
        for i, step in enumerate(steps):
            whole = self._is_complete(step.name)
            if i > finished or step.kind == "correct" and not whole:
                self._forget(step.name)
                before = steps[i - 1].name if i else None
                student = self._take(step, student, before)
                self._write_student(step.name, student, before)
            elif whole:
                student = self._load(step.name)
            else:
                rest = " ".join(str(phase_folder(self.folder, later.name)) for later in steps[i:])
                log.warning(
                    "%s is missing or damaged; going on without it. To have it again, and make what comes after it "
                    "anew, run: rm -r %s, then the same command", self._student(step.name), rest,
                )  # fmt: skip
                continue
            self._evaluate(step.name, student)
            if step.kind == "correct":
                self._correct_teacher(student)
                student = None
            gc.collect()
        student = self.teacher if student is None else student
        last = steps[-1].name if steps else None
        if not from_first(lambda: self._is_final(last)):
            on_first(functools.partial(self._write_final, student, last))
        del student
        on_first(self._finish)
        log.info("run finished in %.0f s", time.monotonic() - start)

    def _finish(self) -> None:
        """The report."""
        steps, final = self.recipe.steps(), self.folder / STUDENT
        student = load_teacher(final, dtype="auto", device=self.device)
        finish(
            self.folder, self.recipe, student.eval(), self.teacher, self.tokenizer, self.console,
            stages={step.name: step.told for step in steps}, labels=self._labels(steps),
            own_tables=self._tables(student), student_tokenizer=load_tokenizer(final),
        )  # fmt: skip

    def _take(self, step: Step, student: nn.Module | None, before: str | None) -> nn.Module:
        """The student after a step; student: before it, None: the teacher is. before: the step before it, if any."""
        if step.kind == "correct":
            teacher = copy.deepcopy(self.teacher).float().requires_grad_(True)
            return self._train(0, self.recipe.correct, teacher, before)
        if step.kind == "cut":
            on_first(lambda: self._forget_scores(step.round, before))
            return self._cut(step.round, self.teacher if student is None else student)
        if step.kind == "convert":
            torch.manual_seed(self.recipe.seed)
            hybrid = hybrid_from_teacher(self.teacher if student is None else student, **convert_options(self.recipe))
            return hybrid.float().requires_grad_(True)
        if step.kind == "heal":
            return self._train(0, self.recipe.heal.model_copy(update={"name": step.name}), student, before)
        return self._match(step.name, student, before)

    def _forget_scores(self, number: int, before: str | None) -> None:
        """What was measured of another model than a round now begins with goes. before: the step that left it."""
        folder, left = self._round(number), None if before is None else weights_sum(self._student(before))
        kept = folder / "begins_with.json"
        if kept.is_file():
            if (read_json(kept) or {"weights": "not known"}).get("weights") == left:
                return
            log.warning("round %d begins with another model than before: its scores are measured again", number)
            shutil.rmtree(folder)
        write_json(kept, {"weights": left})

    # ---- the teacher ----

    def _load_teacher(self) -> nn.Module:
        corrected = self.recipe.correct and self._student(self.recipe.correct.name)
        measured = corrected and evaluation_file(self.folder, self.recipe.correct.name).is_file()
        if from_first(
            lambda: bool(measured and is_complete(corrected))
        ):  # nothing is left to compare with the one as it was
            return load_teacher(corrected, dtype=self._teacher_dtype(), device=self.device)
        return super()._load_teacher()

    def _correct_teacher(self, corrected: nn.Module) -> None:
        """From here on all is compared with, and cut from, the teacher as fine-tuned on the text."""
        self.teacher = corrected.to(self.teacher.dtype).eval().requires_grad_(False)
        self.texts = on_first(self._evaluation_texts) or {}

    def _teacher_dtype(self) -> str:
        return self.recipe.teacher.dtype

    # ---- the cut ----

    def _round(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)

    def _cut(self, number: int, base: nn.Module) -> nn.Module:
        """A round's cut of the teacher, or of the student so far."""
        round_, folder = self.plan.rounds[number - 1], self._round(number)
        scores = self._scores(number, base)
        layers = self._layer_scores(number, base, round_)
        sizes = self._sizes(number, base, scores, layers)
        sizes = present(base.config, sizes)
        if self._mix(number) is not None:
            sizes, layers = self._mixed(number, base, scores, layers, sizes)
        with mistakes(round_.where):
            what = choose(scores, sizes, layers=layers)
            smaller = cut_in_float32(base, what)
        kept = list(what.layers) if what.layers is not None else list(range(sizes.layers))
        total, inside = parameters_of(smaller)
        found = {"before": asdict(sizes_of(base.config)), "after": asdict(sizes_of(smaller.config)), "layers": kept,
                 "parameters": total, "outside_embedding_and_head": inside}  # fmt: skip
        on_first(lambda: write_json(folder / "cut.json", found))
        log.info("round %d: %s", number, json.dumps(found))
        self._check_budget(number, smaller)
        return smaller

    def _mix(self, number: int) -> Counter[str] | None:
        """How many layers of each kind there were in what round 1 priced; None: a round with a target of its own, or
        all layers are alike."""
        if self.recipe.prune.targets or len(self.plan.rounds) == 1 or self.plan.rounds[0].budget is None:
            return None
        state = from_first(lambda: read_json(self._round(1) / "search.json", Search))
        mix = mix_of(self.plan.config, state["candidates"][state["picked"]]["layers"])
        return mix if len(set(layer_kinds(self.plan.config))) > 1 else None

    def _mixed(
        self, number: int, base: nn.Module, scores: Importance, layers: Any, sizes: Sizes
    ) -> tuple[Sizes, list[int]]:
        """A round's sizes and layers on the way to what round 1 priced: never more in the end than its budget."""
        kept = chosen_with_mix(scores, sizes.layers, layers, layer_kinds(base.config), self._mix(number))
        if number == len(self.plan.rounds):
            budget = self.plan.rounds[0].budget
            sizes = within(costs_of(self.recipe, base.config, budget.kind, self.device), budget, sizes, kept)
        return sizes, kept

    def _check_budget(self, number: int, smaller: nn.Module) -> None:
        """One line where the last cut exceeds its budget."""
        last = self.plan.rounds[-1]
        budget = last.budget if self.recipe.prune.targets else self.plan.rounds[0].budget
        if number < len(self.plan.rounds) or budget is None or budget.kind == "latency":  # a timing is told by search
            return
        cost = costs_of(self.recipe, smaller.config, budget.kind, self.device).of(smaller.config)
        if budget.exceeded(cost):
            self.console.print(
                f"[bold]{last.where}[/bold]: the model has {budget.told(cost)}, more than the budget of "
                f"{budget.told(budget.value)}", highlight=False,
            )  # fmt: skip

    def _scores(self, number: int, base: nn.Module) -> Importance:
        return from_first(lambda: self._kept_scores(number, base))

    def _kept_scores(self, number: int, base: nn.Module) -> Importance:
        path = self._round(number) / "importance.safetensors"
        if path.is_file():
            try:
                return Importance.load(path)
            except Exception as error:  # safetensors' own error for a damaged file, ValueError for another one
                log.warning("%s cannot be read (%s): measuring again", path, error)
        scores = self._measured_scores(number, base)
        scores.save(path)
        return scores

    def _measured_scores(self, number: int, base: nn.Module) -> Importance:
        strategy = self.recipe.prune.strategy
        if strategy == "magnitude":
            return magnitude_importance(base)
        if strategy == "random":
            return random_importance(base.config, self.recipe.seed + number)
        asked = self.recipe.calibration
        if number == 1 and asked.scores is not None:
            scores = given_scores(asked.scores)
            with mistakes("calibration.scores"):
                check_scores(scores, base.config)
            self.console.print(f"round 1: importance as in {asked.scores}")
            return scores
        self.console.print(f"round {number}: importance on {asked.tokens:,} tokens")
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return measure_importance(base, self._calibration(asked.tokens))

    def _calibration(self, tokens: int) -> Any:
        """Batches of training text, a fixed choice."""
        asked = self.recipe.calibration
        wanted = -(-tokens // asked.sequence_length)
        rows = training_rows(
            self.recipe.data, self.sources, asked.sequence_length, wanted, self.recipe.seed, self._pad()
        )
        count = min(wanted, len(rows))
        for start in range(0, count, asked.batch_size):
            yield collate([rows[i] for i in range(start, min(start + asked.batch_size, count))])

    def _layer_scores(self, number: int, base: nn.Module, round_: Round) -> Any:
        """What `choose` calls layers: a word, indices, or scores of its own."""
        return from_first(lambda: self._kept_layer_scores(number, base, round_))

    def _kept_layer_scores(self, number: int, base: nn.Module, round_: Round) -> Any:
        given, by = round_.target.layers, self.recipe.prune.layers_by
        if given is not None and not isinstance(given, int):
            return given
        fixed = round_.sizes is not None and round_.sizes.layers == sizes_of(base.config).layers
        if by in ("block_importance", "contiguous") or fixed:
            return "block" if by == "contiguous" else "score"
        path = self._round(number) / "layers.json"
        if (found := read_json(path, Drops)) is None:
            tokens = self.recipe.calibration.layer_tokens
            self.console.print(f"round {number}: each layer left out in turn, on {tokens:,} tokens")
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                drops = measure_layer_drops(base, self._calibration(tokens))
            found = {"kl": drops.kl.tolist(), "perplexity": drops.perplexity.tolist(), "whole": drops.whole}
            write_json(path, found)
        return torch.tensor(found[by], dtype=torch.float64)

    def _sizes(self, number: int, base: nn.Module, scores: Importance, layers: Any) -> Sizes:
        """What a round cuts to: planned, searched, or on the way to what the first round's search picked."""
        round_ = self.plan.rounds[number - 1]
        if round_.budget is None and round_.sizes is not None:
            return round_.sizes
        if round_.budget is None and round_.target.sizes():
            with mistakes(round_.where):
                return target_sizes(base.config, self._still_there(number, base))
        searched = number if round_.budget is not None else 1
        state = from_first(lambda: read_json(self._round(searched) / "search.json", Search))
        if state is None or "picked" not in state:
            picked = self._search(number, base, scores, layers)
        else:
            picked = Sizes(**state["candidates"][state["picked"]]["sizes"])
        return between(self.plan.config, picked, round_.share)

    def _still_there(self, number: int, base: nn.Module) -> Target:
        """A round's target without sizes of a kind of layer of which the rounds before have left none."""
        target = self.plan.rounds[number - 1].target
        gone = [name for name in target.sizes() if name.startswith("state_")] if not ssm_layers(base.config) else []
        if not attention_layers(base.config):
            gone += [name for name in target.sizes() if name in ("heads", "kv_heads")]
        if gone and number > 1:
            log.warning("round %d: no layer is left that has %s; nothing is cut of it", number, ", ".join(gone))
            return target.model_copy(update=dict.fromkeys(gone))
        return target

    # ---- the search ----

    def _search(self, number: int, base: nn.Module, scores: Importance, layers: Any) -> Sizes:
        round_, folder = self.plan.rounds[number - 1], self._round(number)

        def kept(count: int) -> Sequence[int]:
            return chosen_layers(scores, count, layers)

        costs, found = round_.costs, round_.candidates
        # the plan knew neither which of unlike layers stay nor what a later round begins with
        alike = len(set(layer_kinds(self.plan.config))) == 1
        planned = number == 1 and (alike or round_.budget.kind == "latency")
        if not planned:
            costs = costs_of(self.recipe, base.config, round_.budget.kind, self.device)
            if not from_first((folder / "search.json").is_file):  # whose candidates are kept
                found = from_first(lambda: found_for(self.recipe, costs, round_.budget, round_.where, kept))
        light = self._light_healing(folder) if self.recipe.search.tokens else None
        picked = search(
            found, costs, round_.budget, kept=kept, heal=light, measure=self._on_held_out, folder=folder,
            make=lambda sizes: cut_in_float32(base, choose(scores, sizes, layers=layers)),
            console=self.console,
        )  # fmt: skip
        plot = plot_file(self.folder, f"search_{number}")
        on_first(lambda: plot_candidates(read_json(folder / "search.json", Search), plot))
        return picked

    def _light_healing(self, folder: Path) -> Callable[[int, nn.Module], None]:
        asked = {"tokens": self.recipe.search.tokens, "advance": None}

        def heal(number: int, student: nn.Module) -> None:
            name, own = f"candidate_{number + 1}", self.folder
            self.folder = folder  # of checkpoints and metrics, which are none of the run's
            try:
                self._train(0, self.recipe.heal.model_copy(update={**asked, "name": name}), student, None)
            finally:
                self.folder = own
            weights = phase_folder(folder, name)
            on_first(lambda: shutil.rmtree(weights, ignore_errors=True))  # its figures are kept, its weights are not

        return heal

    # ---- the hybrid ----

    def _match(self, name: str, student: nn.Module, before: str | None) -> nn.Module:
        """Phase 1 or 2 of a conversion, against the pruned model."""
        phase, parent = getattr(self.recipe.convert, name), self.teacher
        if self.plan.rounds:
            folder = self._student(f"prune_{len(self.plan.rounds)}")
            if not from_first(lambda: is_complete(folder)):
                raise UserError(f"{folder} is missing or damaged; to make it again, delete {folder.parent.parent}")
            parent = load_teacher(folder, device=self.device)
        wanted = phase.steps() * phase.batch_size * phase.gradient_accumulation
        rows = training_rows(
            self.recipe.data, self.sources, phase.sequence_length, wanted, self.recipe.seed, self._pad()
        )
        origin = from_first(lambda: self._origin(before))
        trainer = self._trainer(name, phase, objective_for(name, phase, student, parent), rows, origin=origin)
        if name == "hidden" and phase.solve_tokens and not self._has_checkpoint(trainer):
            count = min(len(rows), -(-phase.solve_tokens // phase.sequence_length))
            batches = (
                collate([rows[i] for i in range(start, min(start + phase.batch_size, count))])
                for start in range(0, count, phase.batch_size)
            )
            solve_output_projections(student, parent, batches, autocast=self.autocast)
        self._fit(trainer, student)
        del trainer
        return student.requires_grad_(True)

    # ---- the end ----

    def _is_final(self, last: str | None) -> bool:
        trimmed = self.recipe.prune.vocabulary is not None
        if trimmed and read_json(self.folder / "vocabulary.json", Vocabulary) is None:
            return False
        return super()._is_final(last)

    def _same_weights(self, final: Path, last: str | None) -> bool:
        return True  # the last step's in another dtype, or without some tokens

    def _write_final(self, student: nn.Module, last: str | None) -> None:
        student = copy.deepcopy(student) if student is self.teacher else student
        student, tokenizer = student.to(getattr(torch, self.recipe.save_dtype)), self.tokenizer
        if self.recipe.prune.vocabulary is not None:
            with mistakes("prune.vocabulary"):
                trimmed = trim_vocabulary(student, tokenizer, ids=self._tokens_wanted)
            student, tokenizer = trimmed.model, trimmed.tokenizer
            covered = {"before": self.plan.own.vocabulary, "after": len(trimmed.tokens)}
            covered["why"] = {reason: len(tokens) for reason, tokens in self._reasons_to_keep.items()}
            for name in ("held_out", "evaluation"):
                counts = self._token_counts(name)
                if counts.any():
                    covered[name] = float(counts[trimmed.tokens].sum() / counts.sum())
            write_json(self.folder / "vocabulary.json", covered)
        self._save(self.folder / STUDENT, student, self._origin(last), tokenizer)

    def _check_vocabulary(self) -> None:
        """One line that says what will be kept and why, or the reason why nothing can be left out."""
        with mistakes("prune.vocabulary"):
            reasons = self._reasons_to_keep
            trim_tokenizer(self.tokenizer, sorted(token for tokens in reasons.values() for token in tokens))
        told = f"of {self.plan.own.vocabulary:,}, {told_reasons(reasons)}"
        self.console.print(f"vocabulary: kept in the end are, {told}", highlight=False, soft_wrap=True)

    @functools.cached_property
    def _reasons_to_keep(self) -> dict[str, list[int]]:
        return reasons_to_keep(self.teacher, self.tokenizer, ids=self._tokens_wanted)

    @functools.cached_property
    def _tokens_wanted(self) -> list[int]:
        return most_frequent(self._token_counts("train"), self.recipe.prune.vocabulary)

    def _token_counts(self, part: str) -> np.ndarray:
        """Of the train, held_out or evaluation part of the data, (vocabulary,)."""
        pairs = {"train": self.sources.pairs, "held_out": self.sources.held_out_pairs}.get(part, {})
        return token_counts(getattr(self.data, part, None), pairs.values(), self.plan.own.vocabulary)

    def _labels(self, steps: Sequence[Step]) -> dict[str, str]:
        labels = {}
        for step in steps:
            if step.kind in ("correct", "heal"):
                labels[step.name] = loss_label(getattr(self.recipe, step.kind))
            elif step.kind == "mixing":
                labels[step.name] = f"{self.recipe.convert.mixing.metric} distance of the matrices"
            elif step.kind == "hidden":
                labels[step.name] = "L2 distance per token"
        return labels

    def _tables(self, student: nn.Module) -> list[Table]:
        """What was cut, what was searched, and which tokens are left."""
        rows = [["teacher", *sizes_row(self.plan.own), *(f"{n:,}" for n in parameters_of(self.teacher))]]
        searches = []
        for number in range(1, len(self.plan.rounds) + 1):
            if (found := read_json(self._round(number) / "cut.json", CutMade)) is not None:
                counts = (found["parameters"], found["outside_embedding_and_head"])
                rows.append(
                    [
                        f"after cut {number}",
                        *sizes_row(Sizes(**found["after"]), self.plan.own),
                        *(f"{n:,}" for n in counts),
                    ]
                )
            if (state := read_json(self._round(number) / "search.json", Search)) and "picked" in state:
                searches.append(search_table(state))
        counts = [f"{n:,}" for n in parameters_of(student)]
        if counts != rows[-1][-2:]:  # made a hybrid, or less of a vocabulary
            rows.append(["student", *sizes_row(sizes_of(student.config), self.plan.own), *counts])
        header = ["", *sizes_header(self.plan.own), "parameters", "outside embedding and head"]
        made: list[Table] = [("Sizes", header, rows), *searches]
        covered = read_json(self.folder / "vocabulary.json", Vocabulary)
        if covered is not None and self.recipe.prune.vocabulary:
            lines = [["tokens", f"{covered['after']:,} of {covered['before']:,}"]]
            lines += [[reason, f"{count:,}"] for reason, count in covered["why"].items()]
            lines += [
                [f"of {name.replace('_', '-')} text's tokens", f"{covered[name]:.2%}"]
                for name in ("held_out", "evaluation") if name in covered
            ]  # fmt: skip
            made.append(("Vocabulary kept", ["", "kept"], lines))
        return made

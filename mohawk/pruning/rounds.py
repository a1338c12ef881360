"""The rounds of a pruning: what each cuts, by scores of the model that it begins with, and by what search."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel

from mohawk.core.folders import weights_sum
from mohawk.core.json_files import read_json, write_json
from mohawk.core.places import home
from mohawk.core.processes import from_first, on_first
from mohawk.core.run_folder import (
    BEGINS_WITH,
    CUT,
    IMPORTANCE,
    LAYERS,
    PHASES,
    ROUNDS,
    SEARCH,
    phase_folder,
    phase_student,
    plot_file,
    round_folder,
)
from mohawk.distillation.build import mistakes
from mohawk.distillation.sources import StageData, training_rows
from mohawk.distillation.stages import StageTrainer, on_held_out
from mohawk.errors import UserError, is_refusal
from mohawk.measures.compare import dealt_batches
from mohawk.models.cutting.cuts import Cut, cut
from mohawk.models.cutting.sizes import Sizes, attention_layers, sizes_of, ssm_layers
from mohawk.pruning.baselines import magnitude_importance, random_importance
from mohawk.pruning.importance import Importance, check_scores, choose, chosen_layers, measure_importance
from mohawk.pruning.layer_drops import measure_layer_drops
from mohawk.pruning.layers import chosen_with_mix, layer_kinds, mix_of
from mohawk.pruning.plan import Plan, Round, costs_of, found_for
from mohawk.pruning.plots import plot_candidates
from mohawk.pruning.recipe import TargetSection
from mohawk.pruning.search import Budget, search, within
from mohawk.pruning.sizes import between, parameters_of, present, target_sizes
from mohawk.runs.context import RunContext
from mohawk.runs.kept import Drops, Search

log = logging.getLogger(__name__)


def given_scores(path: str) -> Importance:
    """Scores of a file that a recipe names. Raises UserError."""
    try:
        return Importance.load(home(path))
    except Exception as error:  # safetensors' own error for a damaged file, ValueError for another one
        if is_refusal(error):
            raise
        found = str(error).splitlines()[0]
        raise UserError(
            f"calibration.scores: {path} cannot be read ({found}); give scores of an earlier run"
        ) from error


class Rounds:
    """The cuts of a run, as its plan has them. What each measured is kept in rounds/<number>/."""

    def __init__(self, run: RunContext[StageData], plan: Plan):
        self.run, self.plan = run, plan

    def folder(self, number: int) -> Path:
        return round_folder(self.run.folder, number)

    def forget_scores(self, number: int, before: str | None) -> None:
        """What was measured of another model than a round now begins with goes. before: the step that left it."""
        folder, left = (
            self.folder(number),
            None if before is None else weights_sum(phase_student(self.run.folder, before)),
        )
        kept = folder / BEGINS_WITH
        if kept.is_file():
            if (read_json(kept) or {"weights": "not known"}).get("weights") == left:
                return
            log.warning("round %d begins with another model than before: its scores are measured again", number)
            shutil.rmtree(folder)
        write_json(kept, {"weights": left})

    def cut(self, number: int, base: PreTrainedModel) -> PreTrainedModel:
        """A round's cut of the teacher, or of the student so far."""
        round_, folder = self.plan.rounds[number - 1], self.folder(number)
        scores = self._scores(number, base)
        layers = self._layer_scores(number, base, round_)
        sizes = self._sizes(number, base, scores, layers)
        sizes = present(base.config, sizes)
        if (mix := self._mix(number)) is not None:
            sizes, layers = self._mixed(number, base, scores, layers, sizes, mix)
        with mistakes(round_.where):
            what = choose(scores, sizes, layers=layers)
            smaller = self._trainable(base, what)
        kept = list(what.layers) if what.layers is not None else list(range(sizes.layers))
        total, inside = parameters_of(smaller)
        found = {"before": asdict(sizes_of(base.config)), "after": asdict(sizes_of(smaller.config)), "layers": kept,
                 "parameters": total, "outside_embedding_and_head": inside}  # fmt: skip
        on_first(lambda: write_json(folder / CUT, found))
        log.info("round %d: %s", number, json.dumps(found))
        self._check_budget(number, smaller)
        return smaller

    def _trainable(self, base: PreTrainedModel, what: Cut) -> PreTrainedModel:
        """A cut in float32, whatever the model has, also where it rescales weights or folds them into others."""
        return cut(base, what, dtype=torch.float32, spread=self.run.spread_student).requires_grad_(True)

    def _mix(self, number: int) -> Counter[str] | None:
        """How many layers of each kind there were in what round 1 priced; None: a round with a target of its own, or
        all layers are alike."""
        if self.run.recipe.prune.targets or len(self.plan.rounds) == 1 or self.plan.rounds[0].budget is None:
            return None
        if len(set(layer_kinds(self.plan.config))) == 1:
            return None
        return mix_of(self.plan.config, self._picked(1)["layers"])

    def _picked(self, number: int) -> dict[str, Any]:
        """The candidate that a round's search picked. Raises UserError where what it left is lost."""
        state = self._search_so_far(number)
        if state is None or "picked" not in state:
            run = self.run.folder
            raise UserError(
                f"{self.folder(number) / SEARCH} is missing or damaged, and every round cuts towards what round "
                f"{number} picked; put it back, or delete {run / PHASES} and {run / ROUNDS} to begin again"
            )
        return state["candidates"][state["picked"]]

    def _search_so_far(self, number: int) -> dict[str, Any] | None:
        return from_first(lambda: read_json(self.folder(number) / SEARCH, Search))

    def _mixed(
        self, number: int, base: PreTrainedModel, scores: Importance, layers: Any, sizes: Sizes, mix: Counter[str]
    ) -> tuple[Sizes, list[int]]:
        """A round's sizes and layers on the way to what round 1 priced: never more in the end than its budget."""
        kept = chosen_with_mix(scores, sizes.layers, layers, layer_kinds(base.config), mix)
        if number == len(self.plan.rounds):
            budget = self.plan.rounds[0].budget
            assert budget is not None  # or there was no mix
            sizes = within(costs_of(self.run.recipe, base.config, budget, self.run.device), budget, sizes, kept)
        return sizes, kept

    def _check_budget(self, number: int, smaller: PreTrainedModel) -> None:
        """One line where the last cut exceeds its budget."""
        last = self.plan.rounds[-1]
        budget = last.budget if self.run.recipe.prune.targets else self.plan.rounds[0].budget
        if number < len(self.plan.rounds) or budget is None or budget.kind == "latency":  # a timing is told by search
            return
        cost = costs_of(self.run.recipe, smaller.config, budget, self.run.device).of(smaller.config)
        if budget.exceeded(cost):
            self.run.console.print(
                f"[bold]{last.where}[/bold]: the model has {budget.told(cost)}, more than the budget of "
                f"{budget.told(budget.value)}", highlight=False,
            )  # fmt: skip

    def _scores(self, number: int, base: PreTrainedModel) -> Importance:
        """A round's scores, which all processes measure together unless an earlier run kept them."""
        path = self.folder(number) / IMPORTANCE
        scores = from_first(lambda: self._kept_scores(path))
        if scores is None:
            scores = self._measured_scores(number, base)
            on_first(lambda: scores.save(path))
        return scores

    def _kept_scores(self, path: Path) -> Importance | None:
        if path.is_file():
            try:
                return Importance.load(path)
            except Exception as error:  # safetensors' own error for a damaged file, ValueError for another one
                if is_refusal(error):
                    raise
                log.warning("%s cannot be read (%s): measuring again", path, error)
        return None

    def _measured_scores(self, number: int, base: PreTrainedModel) -> Importance:
        strategy = self.run.recipe.prune.strategy
        if strategy == "magnitude":
            return magnitude_importance(base)
        if strategy == "random":
            return random_importance(base.config, self.run.recipe.seed + number)
        asked = self.run.recipe.calibration
        if number == 1 and asked.scores is not None:
            given = asked.scores
            scores = from_first(lambda: given_scores(given))
            with mistakes("calibration.scores"):
                check_scores(scores, base.config)
            self.run.console.print(f"round 1: importance as in {asked.scores}")
            return scores
        self.run.console.print(f"round {number}: importance on {asked.tokens:,} tokens")
        with torch.autocast(self.run.device.type, dtype=self.run.autocast, enabled=self.run.autocast is not None):
            return measure_importance(base, self._calibration(asked.tokens), dealt=True)

    def _calibration(self, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches of training text, of a fixed choice."""
        asked = self.run.recipe.calibration
        wanted = -(-tokens // asked.sequence_length)
        rows = training_rows(
            self.run.recipe.data,
            self.run.data.sources,
            asked.sequence_length,
            wanted,
            self.run.recipe.seed,
            self.run.pad,
        )
        return dealt_batches(Subset(rows, range(min(wanted, len(rows)))), asked.batch_size)

    def _layer_scores(self, number: int, base: PreTrainedModel, round_: Round) -> Any:
        """What `choose` calls layers: a word, indices, or scores of its own."""
        given, by = round_.target.layers, self.run.recipe.prune.layers_by
        if given is not None and not isinstance(given, int):
            return given
        fixed = round_.sizes is not None and round_.sizes.layers == sizes_of(base.config).layers
        if by in ("block_importance", "contiguous") or fixed:
            return "block" if by == "contiguous" else "score"
        path = self.folder(number) / LAYERS
        if (found := from_first(lambda: read_json(path, Drops))) is None:
            tokens = self.run.recipe.calibration.layer_tokens
            self.run.console.print(f"round {number}: each layer left out in turn, on {tokens:,} tokens")
            with torch.autocast(self.run.device.type, dtype=self.run.autocast, enabled=self.run.autocast is not None):
                drops = measure_layer_drops(base, self._calibration(tokens), dealt=True)
            found = {"kl": drops.kl.tolist(), "perplexity": drops.perplexity.tolist(), "whole": drops.whole}
            on_first(lambda: write_json(path, found))
        return torch.tensor(found[by], dtype=torch.float64)

    def _sizes(self, number: int, base: PreTrainedModel, scores: Importance, layers: Any) -> Sizes:
        """What a round cuts to: planned, searched, or on the way to what the first round's search picked."""
        round_ = self.plan.rounds[number - 1]
        if round_.budget is None and round_.sizes is not None:
            return round_.sizes
        if round_.budget is None and round_.target.sizes():
            with mistakes(round_.where):
                return target_sizes(base.config, self._still_there(number, base))
        if round_.budget is None:
            picked = Sizes(**self._picked(1)["sizes"])
        elif (state := self._search_so_far(number)) is not None and "picked" in state:
            picked = Sizes(**state["candidates"][state["picked"]]["sizes"])
        else:
            picked = self._search(number, base, scores, layers, round_.budget)
        return between(self.plan.config, picked, round_.share)

    def _still_there(self, number: int, base: PreTrainedModel) -> TargetSection:
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

    def _search(self, number: int, base: PreTrainedModel, scores: Importance, layers: Any, budget: Budget) -> Sizes:
        round_, folder = self.plan.rounds[number - 1], self.folder(number)

        def kept(count: int) -> Sequence[int]:
            return chosen_layers(scores, count, layers)

        found = round_.candidates
        # the plan knew neither which of unlike layers stay nor what a later round begins with
        alike = len(set(layer_kinds(self.plan.config))) == 1
        planned = number == 1 and (alike or budget.kind == "latency")
        costs = round_.costs if planned else None
        if costs is None:
            costs = costs_of(self.run.recipe, base.config, budget, self.run.device)
            if not from_first((folder / SEARCH).is_file):  # whose candidates are kept
                found = from_first(lambda: found_for(self.run.recipe, costs, budget, round_.where, kept))
        light = self._light_healing(number) if self.run.recipe.search.tokens else None
        picked = search(
            found, costs, budget, kept=kept, heal=light, measure=partial(on_held_out, self.run), folder=folder,
            make=lambda sizes: self._trainable(base, choose(scores, sizes, layers=layers)),
            console=self.run.console,
        )  # fmt: skip
        costs.let_go()
        plot = plot_file(self.run.folder, f"search_{number}")
        state = self._search_so_far(number)
        assert state is not None  # the search has written it
        on_first(lambda: plot_candidates(state, plot))
        return picked

    def _light_healing(self, number: int) -> Callable[[int, PreTrainedModel], None]:
        folder = self.folder(number)
        asked = {"tokens": self.run.recipe.search.tokens, "epochs": None, "advance": None}

        # checkpoints and metrics are none of the run's
        trainer = StageTrainer(replace(self.run, folder=folder, recompute=set()))
        again = f"{self.run.recipe.heal.name}_{number}" in self.run.recompute

        def heal(candidate: int, student: PreTrainedModel) -> None:
            name = f"candidate_{candidate + 1}"
            trainer.run.recompute |= {name} if again else set()
            trainer.train(0, self.run.recipe.heal.model_copy(update={**asked, "name": name}), student, None)
            weights = phase_folder(folder, name)
            on_first(lambda: shutil.rmtree(weights, ignore_errors=True))  # its figures are kept, its weights are not

        return heal

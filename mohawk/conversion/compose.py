"""`mohawk compose`: from runs with mixers in all layers to a new run with some of them, as far as phase 3.

A budget says how many attention layers may stay, `mohawk select` which. The new run's recipe is the old one's but for
its layers, and its phases 1 and 2 are done, so that `mohawk convert` goes on with phase 3.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mohawk.conversion.mixed import TrainedRun, mixed_config, mixed_student, mixers_from, starting_gate
from mohawk.conversion.patterns import interval_cost, regular_layers
from mohawk.conversion.probe import short_fingerprint
from mohawk.conversion.recipe import EndToEndPhase, Recipe
from mohawk.conversion.select import RANKINGS
from mohawk.core.folders import MANIFEST, checkpoints, drop_file, is_complete, write_whole
from mohawk.core.json_files import read_json, write_json
from mohawk.core.places import home
from mohawk.core.run_folder import (
    COMPOSED,
    METRICS_FILE,
    RECIPE,
    RESULTS,
    SELECTION,
    STUDENT,
    evaluation_files,
    phase_folder,
)
from mohawk.errors import UserError
from mohawk.loading.describe import size_text, state_sizes
from mohawk.loading.models import load_teacher
from mohawk.loading.nonfinite import refuse_nonfinite
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.runs.binding import record_of
from mohawk.runs.claim import claimed
from mohawk.runs.kept import Composed, Selection
from mohawk.training.metrics import copy_without

SETTABLE = ("phases.end_to_end", "evaluation", "precision", "device")
UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ALLOWED = "a number of attention layers (8), a share of the layers (25%), or state bytes at a context (40MB@4096)"


@dataclass(frozen=True)
class AttentionBudget:
    """How much attention stays at most: `layers`, a `share` of all, or `state_bytes` of a sequence after `context`."""

    text: str
    layers: int | None = None
    share: float | None = None
    state_bytes: float | None = None
    context: int | None = None

    @classmethod
    def parse(cls, text: str) -> AttentionBudget:
        """8, 25% or 40MB@4096 (B, kB, MB, GB and KiB, MiB, GiB). Raises UserError."""
        text = text.strip()
        if re.fullmatch(r"\d+", text):
            return cls(text, layers=int(text))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
            if float(match[1]) > 100:
                raise UserError(f"--budget: got {text}; a share of the layers is at most 100%")
            return cls(text, share=float(match[1]) / 100)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?i?B)@(\d+)", text):
            if match[2] in UNITS and int(match[3]) > 0:
                return cls(text, state_bytes=float(match[1]) * UNITS[match[2]], context=int(match[3]))
        raise UserError(f"--budget: got {text!r}; allowed: {ALLOWED}")

    def choose(self, order: Sequence[int], config: HybridConfig) -> list[int]:
        """The layers to replace: the fewest from the front of `order` that the budget allows, sorted.

        Args:
            order: all layers that have a mixer, the cheapest to replace first.
            config: of a student that has these mixers; its shapes and dtype decide the states' bytes.

        Raises:
            UserError: even with all of `order` replaced it is not met.
        """
        total = config.num_hidden_layers
        if self.layers is not None and self.layers > total:
            raise UserError(f"--budget: got {self.text} attention layers, but the model has {total} layers")
        if self.state_bytes is None:
            most = self.layers if self.layers is not None else math.floor(self.share * total + 1e-9)
            replaced = total - most
            if replaced > len(order):
                raise UserError(
                    f"--budget: {self.text} leaves {most} attention layers, but the run has mixers for {len(order)} "
                    f"of {total} layers only; allow at least {total - len(order)}"
                )
            return sorted(order[:replaced])
        assert self.context is not None  # comes with the bytes
        sizes = [sum(state_bytes(config, order[:i], self.context)) for i in range(len(order) + 1)]
        for i, size in enumerate(sizes):
            if size <= self.state_bytes:
                return sorted(order[:i])
        least = min(range(len(sizes)), key=sizes.__getitem__)
        raise UserError(
            f"--budget: {self.text} is too little: with {total - least} attention layers a state still takes "
            f"{size_text(sizes[least])} ({sizes[least]:,} bytes) after {self.context} tokens, in {config.dtype}"
        )


def state_bytes(config: HybridConfig, ssm_layers: Sequence[int], context: int) -> list[int]:
    """For each layer the bytes of one sequence's keys and values, or of its conv and recurrent state, after `context`
    tokens: what `mohawk inspect` says of a student of these layers in the dtype it is saved in."""
    config = copy.deepcopy(config)
    config.keep_mixers(ssm_layers)
    with torch.device("meta"):
        empty = HybridForCausalLM(config)
    return state_sizes(empty, context)


def compose(
    run: str | Path,
    *,
    mixers_of: Sequence[tuple[str | Path, Sequence[int]]] = (),
    budget: str | None = None,
    attention: Sequence[int] | None = None,
    interval: int | None = None,
    by: str = "kl",
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Write a new run's folder whose student has attention where a ranking says, ready for phase 3.

    Args:
        run: folder of a run whose phases 1 and 2 are done, with mixers in all layers or at least in those to replace.
        mixers_of: further runs of the same teacher, as far, each with the layers whose mixers come from it in place of
            `run`'s; with none, each layer comes from the run whose mixer alone leaves the least KL, as `mohawk select`
            has measured it in each of them.
        budget: see `AttentionBudget`; needs the ranking that `mohawk select` makes.
        attention: or else the attention layers themselves; none of them: mixers wherever there is one.
        interval: or else N, for attention at the layers i with (i + 1) % N == 0.
        by: which ranking, of `mohawk.conversion.select.RANKINGS`.
        output: the new folder; default: beside `run`, its name with the number of attention layers.
        overrides: `a.b=c` settings of the new recipe's phase 3, evaluation, precision and device.

    Returns:
        The new folder. Phases 1 and 2 count as done there.

    Raises:
        UserError: a budget that is none or cannot be met, no such ranking yet, a folder that is in use, or one whose
            phase 3 went on from mixers that the run has since trained again.
    """
    console = console or Console()
    asked = None if budget is None else AttentionBudget.parse(budget)
    if asked is not None and mixers_of:
        raise UserError(
            "--budget goes by a ranking, and mixers of several runs have none together; first: mohawk compose RUN "
            "--mixers-of OTHER --attention, then mohawk select and mohawk compose --budget on the run that this makes"
        )
    first = TrainedRun.open(run)
    folder, recipe, source = first.folder, first.recipe, first.student
    mixers = mixers_from(first, [(TrainedRun.open(other), layers) for other, layers in mixers_of])
    config = mixed_config(first, mixers)
    total = config.num_hidden_layers
    ranking: dict[str, Any] | None = None
    if asked is not None:
        ranking = _ranking(folder, source, by)
        layers = asked.choose(ranking["order"], config)
    elif interval is not None:
        layers = regular_layers(interval, config)
    else:
        layers = _all_but(attention or (), config)
    kept = [i for i in range(total) if i not in layers]
    if not layers:
        raise UserError(f"{run}: with attention in all of {total} layers nothing would be converted; allow fewer")
    output = folder.resolve().with_name(f"{folder.resolve().name}-{len(kept)}-attention") if output is None else output
    mixers = {i: mixers[i] for i in layers}
    config = mixed_config(first, mixers)
    new = _recipe(recipe, config, starting_gate(mixers), home(output), overrides)
    others = _others(first, mixers)
    if new.output.resolve() in {each.folder.resolve() for each in (first, *mixers.values())}:
        raise UserError(f"--output: {output} is the run itself; choose another folder")
    with claimed(new.output, new):
        target = new.output / source.relative_to(folder)
        if changed := _outdated(new.output, target, source, others):
            line = f"{new.output}: {changed} has trained its mixers again since; its student is made anew of them"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            _forget_mixers(new.output, target)
        if not is_complete(target) or read_json(new.output / COMPOSED, Composed) is None:
            about = {"run": str(folder.resolve()), "student": short_fingerprint(source), "attention": kept}
            about |= {"others": others} if others else {}
            about |= {"budget": budget, "by": by} if budget is not None else {}
            about |= {"interval": interval} if interval is not None else {}
            write_json(new.output / COMPOSED, about)
            metrics = folder / METRICS_FILE  # of phases 1 and 2, whose mixers these are
            if metrics.is_file() and not others:
                copy_without(metrics, new.output / METRICS_FILE, "end_to_end")
            asked_of = recipe.teacher
            teacher = load_teacher(asked_of.model, dtype=asked_of.dtype, **asked_of.where)
            made = mixed_student(first, mixers, teacher)
            refuse_nonfinite(made, f"{target}: this student", "it is not written")
            with write_whole(target, replace=True, about=record_of(new.output)) as partial:
                made.save_pretrained(partial)
    context = (asked.context if asked else None) or 4096
    size = sum(state_bytes(config, layers, context))
    at = f"{size_text(size)} of state after {context:,} tokens"
    console.print(f"{len(kept)} attention layers ({', '.join(map(str, kept)) or 'none'}), {at}", highlight=False)
    point = None if interval is None or others else interval_cost(folder, source, interval)
    if ranking is not None:
        point = ranking["path"][len(layers)]
    if point is not None:
        console.print(
            f"measured with these: KL {point['kl']:.4f}, {point['recall']['accuracy']:.1%} of values recalled",
            highlight=False,
        )
    if recipe.phases.end_to_end is None and (last := new.phases.end_to_end) is not None:
        console.print(f"phase 3: not in the run's recipe; now {last.tokens:,} tokens", highlight=False)
    console.print(f"to go on: mohawk convert {new.output / RECIPE}", highlight=False, soft_wrap=True, markup=False)
    return new.output


def _others(first: TrainedRun, mixers: dict[int, TrainedRun]) -> list[dict[str, Any]]:
    """What composed.json says of the further runs: each with its student and the layers that came from it."""
    found: dict[str, dict[str, Any]] = {}
    for i, run in mixers.items():
        if run.folder != first.folder:
            name = str(run.folder.resolve())
            found.setdefault(name, {"run": name, "student": short_fingerprint(run.student), "layers": []})
            found[name]["layers"].append(i)
    return list(found.values())


def _outdated(composed: Path, target: Path, source: Path, others: list[dict[str, Any]]) -> str | None:
    """Of whose mixers an earlier call made this folder's student that has others now; None where it is up to date.

    Raises:
        UserError: it did, and phase 3 went on from there; the folder's student is none that was composed; or it has
            layers of other runs.
    """
    about, last = read_json(composed / COMPOSED, Composed), phase_folder(composed, "end_to_end")
    if about is None:
        if target.exists() and not (composed / COMPOSED).exists():
            raise UserError(f"--output: {composed} trains mixers of its own; choose another folder")
        return None
    then = about.get("others", [])
    if [(each["run"], each["layers"]) for each in then] != [(each["run"], each["layers"]) for each in others]:
        raise UserError(f"--output: {composed} has its layers' mixers from other runs; choose another folder")
    now = {about["run"]: short_fingerprint(source)} | {each["run"]: each["student"] for each in others}
    made_of = {about["run"]: about["student"]} | {each["run"]: each["student"] for each in then}
    changed = next((run for run in now if now[run] != made_of[run]), None)
    if changed is not None and ((composed / STUDENT).exists() or (last / STUDENT).exists() or checkpoints(last)):
        raise UserError(
            f"--output: {composed} has begun phase 3 with mixers that {changed} has trained again since; choose "
            "another folder, or delete it to start over"
        )
    return changed


def _forget_mixers(composed: Path, target: Path) -> None:
    """Make the student of earlier mixers incomplete, and what was measured of it unmeasured."""
    (target / MANIFEST).unlink(missing_ok=True)  # first: a kill from here on leaves a folder that is composed again
    for path in (*evaluation_files(composed), composed / RESULTS):
        drop_file(path)


def _ranking(folder: Path, source: Path, by: str) -> dict[str, Any]:
    """The ranking `by` in the run's selection. Raises UserError that names the command that makes it."""
    if by not in RANKINGS:
        raise UserError(f"--by: got {by!r}; allowed: {', '.join(RANKINGS)}")
    found = read_json(folder / SELECTION, Selection) or {"rankings": {}, "settings": {}}
    command = f"mohawk select {folder}" + f" --by {by}" * (by != "kl")
    if by not in found["rankings"]:
        raise UserError(f"{folder} has no ranking of its layers by {by} yet; run: {command}")
    if found["settings"].get("student") != short_fingerprint(source):
        raise UserError(
            f"{folder / SELECTION} ranks the layers of a student that was trained again since; run: {command}"
        )
    return found["rankings"][by]


def _all_but(attention: Sequence[int], config: HybridConfig) -> list[int]:
    total, trained = config.num_hidden_layers, config.ssm_layers
    if wrong := sorted(i for i in set(attention) if not 0 <= i < total):
        raise UserError(f"--attention: got {wrong}; the model's layers are numbered 0 to {total - 1}")
    if missing := [i for i in range(total) if i not in trained and i not in attention]:
        raise UserError(f"--attention: layers {missing} have no mixer in this run; they must stay attention")
    return [i for i in trained if i not in attention]


def _recipe(recipe: Recipe, config: HybridConfig, gate: str | None, output: Path, overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        if not override.strip().startswith(SETTABLE):
            raise UserError(
                f"--set: got {override!r}; here only {', '.join(SETTABLE)} can be set: the rest is the run's"
            )
    data = recipe.model_dump(mode="json")
    data["student"] |= {"ssm_layers": config.ssm_layers, "gate": gate}
    several = isinstance(recipe.student.mixer, dict) or not isinstance(config.mixer, str)
    data["student"]["mixer"] = {i: config.mixer_of(i) for i in config.ssm_layers} if several else config.mixer
    data["output"] = str(output)
    if data["phases"]["end_to_end"] is None:
        data["phases"]["end_to_end"] = EndToEndPhase().model_dump(mode="json")
    return Recipe.from_dict(data, overrides)

"""What a pruning will do, worked out from the recipe and the teacher's configuration alone: no weights are read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from mohawk.conversion.footprint import Hardware, Strategy, footprint, operations
from mohawk.conversion.plan import GIB, objective_for, planned_for, print_hardware
from mohawk.conversion.recipe import student_mistakes
from mohawk.distillation.build import matchings_for, mistakes
from mohawk.distillation.footprint import Need, fit
from mohawk.distillation.plan import bytes_of, need_of
from mohawk.models.cutting.cuts import resolve_layers
from mohawk.models.cutting.sizes import Sizes, sized_config, sizes_of
from mohawk.models.from_teacher import choose_layers
from mohawk.pruning.layers import layer_kinds
from mohawk.pruning.recipe import PruneRecipe, TargetSection
from mohawk.pruning.search import Budget, Costs, candidates
from mohawk.pruning.sizes import (
    between,
    empty_model,
    parameters_by_kind,
    parameters_of,
    sizes_header,
    sizes_row,
    spread,
    target_sizes,
)
from mohawk.schema.base import Phase

log = logging.getLogger(__name__)

TIMING = 0.1  # how far from a latency a candidate may be: timings vary by almost as much


@dataclass
class Round:
    """One round of cutting: the sizes it leads to, or, until a search has picked them, the candidates.

    where: the target's place in the recipe. share: fraction of the way from teacher to target after this
    round. start: configuration of the model being cut (the teacher's until a search has chosen one). ends: the possible
    resulting configurations.
    """

    target: TargetSection
    where: str
    share: float = 1.0
    sizes: Sizes | None = None
    candidates: list[Sizes] = field(default_factory=list)
    budget: Budget | None = None
    costs: Costs | None = None
    start: Any = None
    ends: list[Any] = field(default_factory=list)


@dataclass
class Plan:
    """A pruning, before it runs.

    config: the teacher's. needs: what each kind of stage needs of a process, healings as the largest of them does.
    hardware: what the plan is for. sharded: whether models are in parts there.
    """

    config: Any
    own: Sizes
    rounds: list[Round]
    hardware: Hardware
    needs: list[Need] = field(default_factory=list)
    sharded: bool = False


def convert_options(recipe: PruneRecipe) -> dict[str, Any] | None:
    """Arguments of `hybrid_from_teacher`; None where nothing is converted."""
    if (asked := recipe.convert) is None:
        return None
    names = ("ssm_layers", "mixer", "init", "gate", "state_size", "conv_kernel")
    return {name: getattr(asked, name) for name in names}


def budget_of(target: TargetSection, config: Any, tolerance: float) -> Budget:
    """A target's budget in absolute terms, several as one; a share is of the teacher, whose configuration is given."""

    def one(name: str) -> Budget:
        value = getattr(target, name)
        if name == "latency":
            return Budget(name, value, max(tolerance, TIMING))
        if name == "parameters" and value < 1:
            return Budget("nonembedding", value * parameters_of(empty_model(config))[1], tolerance)
        return Budget(name, value, tolerance)

    return Budget.together([one(name) for name in target.budgets()], tolerance)


def costs_of(recipe: PruneRecipe, config: Any, budget: Budget, device: Any = "cpu") -> Costs:
    """What models cost that are cut from one of this configuration, converted and in the dtype that is saved."""
    return Costs(
        config, budget, context=recipe.prune.context, dtype=recipe.save_dtype, convert=convert_options(recipe),
        device=device,
    )  # fmt: skip


def found_for(recipe: PruneRecipe, costs: Costs, budget: Budget, where: str, kept: Any = None) -> list[Sizes]:
    """The candidates for a budget as the recipe's search asks. Raises UserError."""
    asked = recipe.search
    at = {"nonembedding": f"{where}.parameters", "several": where}.get(budget.kind, f"{where}.{budget.kind}")
    with mistakes(at):
        found = candidates(costs, budget, depths=asked.depths, steps=asked.steps, widths=asked.widths, kept=kept)
    costs.let_go()
    return found


def make_plan(
    recipe: PruneRecipe,
    config: Any,
    device: Any = "cpu",
    saved: Sequence[Sizes] = (),
    hardware: Hardware | None = None,
) -> Plan:
    """Resolves sizes and candidates, and how models are held.

    saved: candidates that a stopped run found for its first round; without them a latency budget is measured here.
    hardware: what the plan is for; default: the processes and devices that there are.

    Raises:
        UserError: the teacher cannot be cut, or the recipe does not fit it.
    """
    with mistakes("teacher"):
        own = sizes_of(config)
    hardware, bits16 = planned_for(recipe, hardware)
    vocabulary = recipe.prune.vocabulary
    if isinstance(vocabulary, int) and vocabulary > own.vocabulary:
        with mistakes("prune.vocabulary"):
            raise ValueError(f"got {vocabulary}; allowed: corpus, or up to {own.vocabulary}, the model's own")
    targets = recipe.rounds()
    split = not recipe.prune.targets
    rounds: list[Round] = []
    now, final = config, None  # the configuration that a round starts from, while it is known
    before: tuple[str, Budget] | None = None  # the budget of a round before, where its sizes are not known
    for i, target in enumerate(targets):
        where = "prune" if split else f"prune.targets.{i}"
        round_ = Round(target, where, (i + 1) / len(targets) if split else 1.0, start=now or config)
        if split and i:
            round_.sizes = final and between(config, final, round_.share)
        elif target.sizes() and i and now is None:  # of what a search before it picks, whatever that will be
            with mistakes(where):
                round_.ends = [_after_search(target, start) for start in rounds[-1].ends]
        elif target.sizes():
            with mistakes(where):
                final = target_sizes(now or config, target)
            if final == sizes_of(now or config):
                with mistakes(where):
                    raise ValueError("the model has these sizes already; allowed: at least one below them")
            round_.sizes = between(config, final, round_.share) if split else final
        else:
            round_.budget = budget_of(target, config, recipe.search.tolerance)
            if before and round_.budget.covers(before[1]):
                with mistakes(f"{where}.{target.budgets()[0]}"):
                    told = before[1].told(before[1].value)
                    raise ValueError(
                        f"the model already has at most {told} by {before[0]}; allowed: a budget below that"
                    )
            before = (where, round_.budget)
            round_.costs = costs_of(recipe, round_.start, round_.budget, device)
            # of a later round only whether it can be reached at all is known before
            known = list(saved) if i == 0 else []
            round_.candidates = known or found_for(recipe, round_.costs, round_.budget, where)
            final = None
        if not round_.ends:
            found = [round_.sizes] if round_.sizes is not None else round_.candidates or rounds[0].candidates
            round_.ends = [_config_of(target, round_.start, sizes) for sizes in found]
        rounds.append(round_)
        if split:
            continue
        now = None if round_.sizes is None else round_.ends[0]
    plan = Plan(config, own, rounds, hardware)
    _check_rounds(plan)
    _check_stages(recipe, plan)
    plan.needs = list(_needs(recipe, plan, bits16))
    plan.sharded = fit(plan.needs, recipe, plan.hardware)
    return plan


def _needs(recipe: PruneRecipe, plan: Plan, bits16: bool) -> Iterator[Need]:
    """What training needs of a process; each kind of stage for the largest model that it may train."""
    teacher, hardware = (empty_model(plan.config), bytes_of(recipe.teacher)), plan.hardware
    if recipe.correct is not None:
        yield need_of(recipe, recipe.correct, teacher[0], [teacher], None, hardware, bits16)
    ends = plan.rounds[-1].ends if plan.rounds else [plan.config]
    pruned = max(map(empty_model, ends), key=lambda model: parameters_of(model)[0])
    options, hybrid = convert_options(recipe), None
    if options is not None:
        hybrid = empty_model(pruned.config, options)
        for name in ("mixing", "hidden"):
            if (phase := getattr(recipe.convert, name)) is not None:
                yield _need_of_phase(name, phase, hybrid, pruned, teacher, hardware, bits16)
    if recipe.heal is not None and any(step.kind == "heal" for step in recipe.steps()):
        healed = [hybrid or pruned]
        if len(plan.rounds) > 1:
            healed += map(empty_model, plan.rounds[0].ends)
        largest = max(healed, key=lambda model: parameters_of(model)[0])
        yield need_of(recipe, recipe.heal, largest, [teacher], None, hardware, bits16)


def _need_of_phase(
    name: str,
    phase: Any,
    hybrid: Any,
    parent: PreTrainedModel,
    teacher: tuple[PreTrainedModel, int],
    hardware: Hardware,
    bits16: bool,
) -> Need:
    """What phase 1 or 2 of a conversion needs of a process; the pruned model is in float32 there, and the teacher is
    held too."""
    objective = objective_for(name, phase, hybrid, parent)
    trained = sum(parameter.numel() for _, parameter in objective.trained())

    def held_as(strategy: Strategy) -> dict[str, int]:
        found = footprint(
            name, phase, hybrid, parent, trained, teacher_bytes=4, itemsize=2 if bits16 else 4, strategy=strategy,
            processes=hardware.processes, triton=hardware.triton,
        )  # fmt: skip
        pruned = found.pop("teacher")
        whole = teacher[1] * parameters_of(teacher[0])[0] // strategy.parts
        return {"teacher": whole, "pruned model": pruned, **found}

    def works_as(strategy: Strategy) -> float:
        return operations(name, phase, hybrid, parent, strategy.recompute)

    return Need(name, int(phase.tokens), held_as, works_as)


def _check_rounds(plan: Plan) -> None:
    """A line of the log for rounds that have nothing to cut, as when there are more of them than layers that go."""
    sizes = [plan.own, *(round_.sizes for round_ in plan.rounds)]
    idle = [i for i in range(1, len(sizes)) if sizes[i] is not None and sizes[i] == sizes[i - 1]]
    if idle:
        log.warning("prune: nothing is cut in round %s; fewer rounds lead to the same sizes", ", ".join(map(str, idle)))


def _after_search(target: TargetSection, start: Any) -> Any:
    """After a round with sizes of its own, of a model that a search before it may pick."""
    try:
        return _config_of(target, start, target_sizes(start, target))
    except ValueError as error:
        raise ValueError(f"{error}; so for one of the models that the search before it may pick") from error


def _config_of(target: TargetSection, start: Any, sizes: Sizes) -> Any:
    """After a round, with the layers that it will keep where they are given; else as many, spread evenly."""
    layers, count = target.layers, sizes_of(start).layers
    named = layers is not None and not isinstance(layers, int)
    return sized_config(start, sizes, resolve_layers(layers, count) if named else spread(count, sizes.layers))


def _check_stages(recipe: PruneRecipe, plan: Plan) -> None:
    """What healing and conversion ask of the models."""
    teacher = empty_model(plan.config)
    for config in plan.rounds[-1].ends if plan.rounds else [copy.deepcopy(plan.config)]:
        with student_mistakes(("convert",)):
            if recipe.convert is not None:
                choose_layers(recipe.convert.ssm_layers, config.num_hidden_layers)
            student = empty_model(config, convert_options(recipe))
        if recipe.heal is not None:
            with mistakes("heal"):
                matchings_for(recipe.heal, student, teacher if recipe.heal.learn_from == "teacher" else student)


def print_plan(plan: Plan, recipe: PruneRecipe, console: Console) -> None:
    """The plan as a person reads it: sizes before and after every round, parameters by kind, stages."""
    total, inside = parameters_of(empty_model(plan.config))
    console.print(
        f"[bold]Teacher[/bold] {recipe.teacher.model}: {total / 1e6:.1f}M parameters, {inside / 1e6:.1f}M of them "
        "outside embedding and head"
    )
    prune = recipe.prune
    if plan.rounds:
        strategies = {
            "importance": f"activations on {recipe.calibration.tokens:,} tokens",
            "magnitude": "norms of weights",
            "random": "chance",
        }
        console.print(f"Units stay by {strategies[prune.strategy]}, layers by {prune.layers_by.replace('_', ' ')}.")
    rows: list[tuple[str, Sizes, Any, bool]] = [("teacher", plan.own, plan.config, False)]
    options = convert_options(recipe)
    for i, round_ in enumerate(plan.rounds, 1):
        last = i == len(plan.rounds)
        found = round_.candidates or ([round_.sizes] if round_.sizes else [])
        for number, sizes in enumerate(found, 1):
            name = f"after round {i}" if not round_.candidates else f"round {i}, candidate {number}"
            config = _config_of(round_.target, round_.start, sizes)
            rows.append((name, sizes, config, False))
            if last and options is not None:
                rows.append((f"{name}, converted", sizes, config, True))
    if not plan.rounds and options is not None:
        rows.append(("converted", plan.own, plan.config, True))
    models = [empty_model(config, options if converted else None) for _, _, config, converted in rows]
    kinds = list(dict.fromkeys(kind for model in models for kind in parameters_by_kind(model)))
    sizes_table, counts_table = Table("", *sizes_header(plan.own)), Table("", *kinds, "all", "share")
    for (name, sizes, _, converted), model in zip(rows, models, strict=True):
        if not converted:
            sizes_table.add_row(name, *sizes_row(sizes, plan.own))
        by_kind, (count, less) = parameters_by_kind(model), parameters_of(model)
        counts = [f"{by_kind.get(kind, 0) / 1e6:.2f}M" for kind in kinds]
        counts_table.add_row(name, *counts, f"{count:,}", f"{less / inside:.1%}")
    console.print(sizes_table)
    console.print(counts_table)
    console.print("Parameters by kind; the share is of the teacher's outside embedding and head.")
    for i, round_ in enumerate(plan.rounds, 1):
        if round_.target.sizes() and round_.sizes is None:
            asked = ", ".join(f"{name} {getattr(round_.target, name)}" for name in round_.target.sizes())
            console.print(f"Round {i}: {asked} of what was picked before it.", highlight=False)
        if round_.budget is not None:
            light = f" after {recipe.search.tokens:,} tokens of healing each" if recipe.search.tokens else " as cut"
            which = f"candidate of least KL on held-out text{light}"
            if len(round_.candidates) == 1 and len(set(layer_kinds(round_.start))) == 1:
                which = "only candidate"
            console.print(
                f"Round {i}: the {which}, within "
                f"{round_.budget.told(round_.budget.value)}; {_costs_told(round_)}.", highlight=False,
            )  # fmt: skip
    if (split := len(plan.rounds)) > 1 and not prune.targets and plan.rounds[0].candidates:
        console.print(f"The sizes picked are reached in {split} rounds of cutting and healing.", highlight=False)
    fewer = [r for r in plan.rounds if any(s.layers < sizes_of(r.start).layers for s in [r.sizes, *r.candidates] if s)]
    if any(r.target.layers is None or isinstance(r.target.layers, int) for r in fewer):
        console.print("Which layers stay is known after calibration; of unlike layers the table has an even spread.")
    if prune.vocabulary is not None:
        kept = "of the training text" if prune.vocabulary == "corpus" else f"{prune.vocabulary:,} most frequent"
        console.print(
            f"In the end the vocabulary of {plan.own.vocabulary:,} is trimmed to the tokens {kept}, and besides "
            "them those that must stay (bytes or characters, special tokens, the parts of longer ones)."
        )
        if any(round_.budget is not None and round_.budget.kind != "nonembedding" for round_ in plan.rounds):
            console.print("The budget is met before that, with the whole vocabulary: the result is smaller yet.")
    _print_stages(recipe, plan, console)


def _costs_told(round_: Round) -> str:
    """What the model that is cut and the candidates cost, where it was counted now and not in a run before."""
    assert round_.costs is not None and round_.budget is not None  # asked of rounds with a budget
    own = sizes_of(round_.start)
    found = [round_.costs.known(sizes, spread(own.layers, sizes.layers)) for sizes in (own, *round_.candidates)]
    told = [round_.budget.number(cost) for cost in found if cost is not None]
    return (
        f"the model before it and the candidates: {', '.join(told)}" if len(told) == len(found) else "as found before"
    )


def _print_stages(recipe: PruneRecipe, plan: Plan, console: Console) -> None:
    table = Table("stage", "tokens", "steps", "learning rate", "memory (estimate)")
    stages: list[tuple[str, Phase]] = [("correct", recipe.correct)] if recipe.correct else []
    if recipe.convert is not None:
        stages += [(name, phase) for name in ("mixing", "hidden") if (phase := getattr(recipe.convert, name))]
    times = sum(step.kind == "heal" for step in recipe.steps())
    if recipe.heal is not None and times:  # a smaller vocabulary alone needs none
        stages.append((f"heal, {times} times" if times > 1 else "heal", recipe.heal))
    for (name, stage), need in zip(stages, plan.needs, strict=True):
        memory = f"{need.memory / GIB:.1f} GiB"
        table.add_row(name, *stage.told(), f"{stage.learning_rate:g}", memory)
    if stages:
        console.print(table)
        print_hardware(plan.needs, plan.hardware, stages, console)

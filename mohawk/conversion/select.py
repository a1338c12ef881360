"""`mohawk select`: which of a run's trained mixers can take their attention's place at the least cost.

Phases 1 and 2 train every layer's mixer on the teacher's own hidden states, so they may convert all layers once; this
ranks the layers afterwards, by measurement, and `mohawk compose` keeps as many attention layers as a budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mohawk.conversion.plots import plot_selection
from mohawk.conversion.probe import Probe
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import locked, why_incomplete
from mohawk.core.json_files import read_json, write_json
from mohawk.core.places import home
from mohawk.core.run_folder import RECIPE, SELECTION, has_recipe, phase_student
from mohawk.errors import UserError
from mohawk.runs.kept import Selection
from mohawk.schema.kinds import refuse_altered

PLOT = "plots/selection.png"
# What each ranking is by; `recall` is the loss on the values to be recalled, nats per token, as KL is.
RECALL_WEIGHT = 0.1
RECALLS_LITTLE = 0.1  # of its values: a teacher below this share gives nothing to rank layers by
RANKINGS = {
    "kl": "starting from attention everywhere, each step replaces the layer that leaves the least KL from the teacher",
    "recall": "as kl, but the least loss on the values of key-value recall",
    "both": f"as kl, but the least sum of KL and {RECALL_WEIGHT} x the loss on the values of key-value recall",
    "alone": "by the KL that each layer's replacement alone leaves",
}

Cost = Callable[[frozenset[int]], float]


def greedy(
    layers: Iterable[int],
    cost: Cost,
    *,
    lazy: bool = False,
    each_round: Callable[[frozenset[int]], None] = lambda chosen: None,
) -> list[int]:
    """The order in which to replace `layers`: always the one next that leaves the least cost.

    Args:
        cost: of a set of replaced layers, from the empty one on.
        lazy: measure a layer again only while the rise it had when last measured could make it the next (Minoux, 1978):
            the same order wherever a layer's rise never shrinks as others are replaced, and otherwise an approximation,
            at a fraction of the n (n + 1) / 2 costs.
        each_round: called before each search with the layers replaced so far.
    """

    def known(chosen: frozenset[int]) -> float:
        value = cost(chosen)
        return math.inf if math.isnan(value) else value

    chosen: frozenset[int] = frozenset()
    so_far = known(chosen)
    rises = dict.fromkeys(layers, -math.inf)
    order: list[int] = []
    while rises:
        each_round(chosen)
        best, least = -1, math.inf
        for layer in sorted(rises, key=rises.__getitem__) if lazy else list(rises):
            if lazy and best >= 0 and so_far + rises[layer] >= least:
                break
            found = known(chosen | {layer})
            rises[layer] = found - so_far if found < math.inf else math.inf
            if found < least or best < 0:
                best, least = layer, found
        del rises[best]
        chosen |= {best}
        so_far = least
        order.append(best)
    return order


def trained_student(run: str | Path) -> tuple[Recipe, Path]:
    """A run's recipe and the folder of its student as the last of phases 1 and 2 left it.

    Raises:
        UserError: no run, or these phases are not finished.
    """
    folder = home(run)
    if not has_recipe(folder):
        raise UserError(f"{run} is not a run's folder: it holds no recipe.yaml")
    refuse_altered(folder / RECIPE)
    recipe = Recipe.load(folder / RECIPE)
    phases = [name for name, _ in recipe.phases.active() if name != "end_to_end"]
    if not phases:
        raise UserError(f"{run}: its recipe has neither phase 1 nor phase 2, so its mixers are not trained one by one")
    student = phase_student(folder, phases[-1])
    if problem := why_incomplete(student, remembered=True):
        raise UserError(f"{student}: {problem}; to finish the phase: mohawk convert {folder / 'recipe.yaml'}")
    return recipe, student


def select(
    run: str | Path, *, by: str = "kl", tokens: int = 2048, lazy: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Rank the layers of a run: writes RUN/selection.json and RUN/plots/selection.png, and prints a table.

    Args:
        run: folder of a run whose phases 1 and 2 are done, with `student.ssm_layers: all` or at least more layers than
            are to be replaced; a layer without a mixer stays attention.
        by: one of RANKINGS.
        tokens: of held-out text for the KL, and about as many of lists for recall.
        lazy: see `greedy`.

    Returns:
        What was written: `layers` with what each one costs alone, and for each ranking asked for so far (of this
        student, with these tokens) the `order` in which layers are replaced and the `path` of what that costs. A
        stopped call goes on from what was measured.

    Raises:
        UserError: the run is not that far, or what `mohawk.conversion.run.opened` refuses.
    """
    console = console or Console()
    if by not in RANKINGS:
        raise UserError(f"--by: got {by!r}; allowed: {', '.join(RANKINGS)}")
    folder = home(run)
    _, student = trained_student(folder)
    with locked(folder):
        probe = Probe(folder, student, tokens, console)
        layers, most = probe.layers, len(probe.layers) * (len(probe.layers) + 1) // 2
        teacher = probe.recall(())
        console.print(
            f"{len(layers)} layers with mixers; KL on {probe.tokens:,} tokens of text, recall of {teacher['values']} "
            f"values, of which the teacher recalls {teacher['accuracy']:.1%}",
            highlight=False,
            soft_wrap=True,
        )
        if by in ("recall", "both") and teacher["accuracy"] < RECALLS_LITTLE:
            console.print(
                "the teacher itself recalls next to nothing, so there is little to lose: rank by kl", highlight=False
            )
        total = {"alone": 4 * len(layers), "both": 2 * most}.get(by, most + 2 * len(layers))
        with probe.progress(f"by {by}", total, at_most=lazy):
            alone = [{"layer": i, "kl": probe.kl({i}), "recall": probe.recall({i})} for i in layers]
            costs = {
                "kl": probe.kl,
                "recall": lambda chosen: probe.recall(chosen)["loss"],
                "both": lambda chosen: probe.kl(chosen) + RECALL_WEIGHT * probe.recall(chosen)["loss"],
            }
            if by == "alone":
                order = [row["layer"] for row in sorted(alone, key=lambda row: row["kl"])]
            else:
                order = greedy(layers, costs[by], lazy=lazy, each_round=probe.rebase)
            path = []
            for i in range(len(order) + 1):
                probe.rebase(order[:i])
                path.append({"kl": probe.kl(order[:i]), "recall": probe.recall(order[:i])})
        found: dict[str, Any] = read_json(folder / SELECTION, Selection) or {}
        if found.get("settings") != probe.settings:
            found = {"settings": probe.settings, "rankings": {}}
        found |= {"num_layers": probe.num_layers, "layers": alone}
        found["rankings"][by] = {"order": order, "lazy": lazy and by != "alone", "path": path}
        write_json(folder / SELECTION, found)
    plot_selection(found, folder / PLOT)
    print_selection(found, by, console)
    console.print(f"written to {folder / SELECTION}", highlight=False, soft_wrap=True, markup=False)
    return found


def print_selection(found: dict[str, Any], by: str, console: Console) -> None:
    """One ranking as a table, the cheapest layer first."""
    ranking, alone = found["rankings"][by], {row["layer"]: row for row in found["layers"]}
    table = Table(title=f"by {by}: {RANKINGS[by]}", title_justify="left")
    for column in ("layer", "KL alone", "recalled alone", "attention left", "KL so far", "recalled so far"):
        table.add_column(column, justify="right")
    for i, point in enumerate(ranking["path"]):
        layer = ranking["order"][i - 1] if i else None
        single = (
            ("", "") if layer is None else (f"{alone[layer]['kl']:.4f}", f"{alone[layer]['recall']['accuracy']:.1%}")
        )
        table.add_row(
            "" if layer is None else str(layer), *single, str(found["num_layers"] - i),
            f"{point['kl']:.4f}", f"{point['recall']['accuracy']:.1%}",
        )  # fmt: skip
    console.print(table)

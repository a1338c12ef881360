"""The recipe of a run's folder, whatever kind of run it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.recipe import Recipe
from mohawk.recipe_text import RecipeText

if TYPE_CHECKING:
    from mohawk.recipe import RecipeFile

PHASES = ("mixing", "hidden", "end_to_end")
COMMANDS = {"prune": "mohawk prune", "stages": "mohawk distill"}  # a key that only recipes of one kind have


def kind_of_recipe(folder: str | Path) -> str | None:
    """prune, stages, or None for a conversion."""
    try:
        text = (Path(folder) / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # `Recipe.load` says what is wrong with it
    data = RecipeText.read(text, "recipe.yaml").data
    return next((key for key in COMMANDS if key in data), None)


def load_run_recipe(folder: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read and check a run's recipe.yaml with `a.b=c` overrides on top. Raises UserError, a line per mistake."""
    kind, path = kind_of_recipe(folder), Path(folder) / "recipe.yaml"
    if kind == "prune":
        from mohawk.prune_recipe import PruneRecipe

        return PruneRecipe.load(path, overrides)
    if kind == "stages":
        from mohawk.distill_recipe import DistillRecipe

        return DistillRecipe.load(path, overrides)
    return Recipe.load(path, overrides)


def run_command(folder: str | Path) -> str:
    """The command that goes on with the run."""
    return COMMANDS.get(kind_of_recipe(folder) or "", "mohawk convert")


def phase_names(folder: str | Path) -> tuple[str, ...]:
    """Names of the run's phases in order: each has a folder of that name, with its student once it is done."""
    kind = kind_of_recipe(folder)
    if kind is None:
        return PHASES
    recipe = load_run_recipe(folder)
    steps = recipe.steps() if kind == "prune" else recipe.stages
    return tuple(step.name for step in steps)

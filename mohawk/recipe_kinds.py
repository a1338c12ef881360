"""What kind of recipe a file is, and what a run's folder can be asked by its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mohawk.errors import UserError
from mohawk.recipe import Recipe, RecipeFile
from mohawk.recipe_text import RecipeText

RECIPE = "recipe.yaml"  # in a run's folder
COMMANDS = {"prune": "mohawk prune", "stages": "mohawk distill"}  # a key that only recipes of one kind have


def kind_of(path: str | Path) -> type[RecipeFile]:
    """The class that reads a recipe: a conversion's, a distillation's or a pruning's. Raises UserError."""
    key = _key(path)
    if key == "prune":
        from mohawk.prune_recipe import PruneRecipe

        return PruneRecipe
    if key == "stages":
        from mohawk.distill_recipe import DistillRecipe

        return DistillRecipe
    return Recipe


def load_run_recipe(folder: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """A run's recipe with `a.b=c` overrides on top. Raises UserError, a line per mistake."""
    path = Path(folder) / RECIPE
    return kind_of(path).load(path, overrides)


def run_command(folder: str | Path) -> str:
    """The command that goes on with a run."""
    return COMMANDS.get(_key(Path(folder) / RECIPE) or "", "mohawk convert")


def phase_names(folder: str | Path) -> tuple[str, ...]:
    """Names of a run's phases in order: each has a folder of that name, with its student once it is done."""
    recipe = load_run_recipe(folder)
    if isinstance(recipe, Recipe):
        return tuple(type(recipe.phases).model_fields)
    steps = recipe.steps() if hasattr(recipe, "steps") else recipe.stages
    return tuple(step.name for step in steps)


def _key(path: str | Path) -> str | None:
    """prune, stages, or None for a conversion."""
    try:
        data = RecipeText.read(Path(path).read_text(encoding="utf-8"), str(path)).data
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error
    return next((key for key in COMMANDS if key in data), None)

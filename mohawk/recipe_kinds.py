"""What kind of recipe a file is, and what a run's folder can be asked by its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mohawk.errors import UserError
from mohawk.recipe import Recipe, RecipeFile, Student
from mohawk.recipe_text import RecipeText

RECIPE = "recipe.yaml"  # in a run's folder
COMMANDS = {"prune": "mohawk prune", "stages": "mohawk distill"}  # a key that only recipes of one kind have
CONVERT = "mohawk convert"
MIXER = Student.model_fields.keys()  # of a conversion's student; no key of a distillation's is called so


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


def command_for(schema: type[RecipeFile], data: Mapping[str, Any]) -> str | None:
    """The command that a recipe's data are for, where it is not the one of `schema`; None where it may be."""
    kinds = {**COMMANDS, "phases": CONVERT}
    if any(key in data and key in schema.model_fields for key in kinds):
        return None
    if (key := next((key for key in kinds if key in data), None)) is not None:
        return kinds[key]
    student = data.get("student")
    if schema is not Recipe and isinstance(student, dict) and student.keys() & MIXER:
        return CONVERT
    return None


def load_run_recipe(folder: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """A run's recipe with `a.b=c` overrides on top. Raises UserError, a line per mistake."""
    path = Path(folder) / RECIPE
    return kind_of(path).load(path, overrides)


def run_command(folder: str | Path) -> str:
    """The command that goes on with a run."""
    return COMMANDS.get(_key(Path(folder) / RECIPE) or "", CONVERT)


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

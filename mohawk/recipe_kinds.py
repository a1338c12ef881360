"""Whose recipe a file is."""

from __future__ import annotations

from pathlib import Path

from mohawk.errors import UserError
from mohawk.recipe import Recipe, RecipeFile
from mohawk.recipe_text import RecipeText


def kind_of(path: str | Path) -> type[RecipeFile]:
    """The class that reads a recipe: of `mohawk distill` where it has stages, else of `mohawk convert`.

    Raises UserError where the file cannot be read.
    """
    path = Path(path)
    try:
        keys = RecipeText.read(path.read_text(encoding="utf-8"), str(path)).data
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error
    if "stages" in keys:
        from mohawk.distill_recipe import DistillRecipe

        return DistillRecipe
    return Recipe

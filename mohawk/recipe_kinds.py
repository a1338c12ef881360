"""What kind of recipe a file is, and what a run's folder can be asked by its recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mohawk.checkpoints import why_altered
from mohawk.errors import UserError
from mohawk.recipe import Recipe, RecipeFile, Student, read_recipe, shipped, shipped_names
from mohawk.run_folder import RECIPE

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
    """A run's recipe with `a.b=c` overrides on top. Raises UserError, a line per mistake, or where the file is not what
    the run wrote."""
    path = Path(folder) / RECIPE
    refuse_altered(path)
    return kind_of(path).load(path, overrides)


def refuse_altered(path: Path) -> None:
    """UserError where a run's recipe.yaml is damaged or was edited."""
    if (problem := why_altered(path)) is not None:
        raise UserError(
            f"{path} {problem}: {run_command(path.parent)} with the recipe that the run was made of writes it anew; "
            "with this one takes it as edited on purpose"
        )


def trims_vocabulary(recipe: RecipeFile) -> bool:
    """Whether the run's student has fewer tokens than its teacher, and numbers of its own for them."""
    return getattr(getattr(recipe, "prune", None), "vocabulary", None) is not None


def run_command(folder: str | Path) -> str:
    """The command that goes on with a run."""
    try:
        return _command(Path(folder) / RECIPE)
    except UserError:  # a damaged recipe does not say
        return "the run's command"


def print_shipped() -> None:
    """The recipes that come with the package, a line each: name, command, and what its first comment says."""
    rows = []
    for name in shipped_names():
        path = shipped(name)
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append((name, _command(path).removeprefix("mohawk "), first.removeprefix("# ")))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, command, text in rows:
        print(f"{name:{widths[0]}}  {command:{widths[1]}}  {text}")


def copy_shipped(name: str, output: str | Path | None = None) -> None:
    """Copy a recipe that comes with the package to a new file, by default NAME.yaml here.

    Raises:
        UserError: there is no such recipe, the file exists, or it cannot be written.
    """
    source, target = shipped(name), Path(output or f"{name}.yaml")
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError as error:
        raise UserError(f"{target} exists and is left as it is; give --output another name, or remove it") from error
    except OSError as error:
        raise UserError(f"--output: {target} cannot be written ({error.strerror})") from error
    print(f"written to {target}; to see what it would do: {_command(source)} {shlex.quote(str(target))} --dry-run")


def _command(path: Path) -> str:
    return COMMANDS.get(_key(path) or "", CONVERT)


def phase_names(folder: str | Path) -> tuple[str, ...]:
    """Names of a run's phases in order: each has a folder of that name, with its student once it is done."""
    recipe = load_run_recipe(folder)
    if isinstance(recipe, Recipe):
        return tuple(type(recipe.phases).model_fields)
    steps = recipe.steps() if hasattr(recipe, "steps") else recipe.stages
    return tuple(step.name for step in steps)


def _key(path: str | Path) -> str | None:
    """prune, stages, or None for a conversion."""
    data = read_recipe(Path(path)).data
    return next((key for key in COMMANDS if key in data), None)

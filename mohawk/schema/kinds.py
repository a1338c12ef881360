"""What kind of recipe a file is, and what a run's folder can be asked by its recipe."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mohawk.core.folders import why_altered
from mohawk.core.run_folder import RECIPE
from mohawk.errors import UserError
from mohawk.schema.files import read_recipe, shipped, shipped_names

if TYPE_CHECKING:
    from mohawk.schema.base import RecipeFile


class Kind(NamedTuple):
    """A kind of recipe: the command it is for, and the class that reads it."""

    command: str
    module: str
    name: str

    def schema(self) -> type[RecipeFile]:
        return getattr(importlib.import_module(self.module), self.name)


# By a key that only recipes of this kind have; one with none of them is a conversion's. The classes are named, not
# imported, since each belongs to the command that runs it.
CONVERSION = "phases"
RECIPE_KINDS = {
    "prune": Kind("mohawk prune", "mohawk.pruning.recipe", "PruneRecipe"),
    "stages": Kind("mohawk distill", "mohawk.distillation.recipe", "DistillRecipe"),
    CONVERSION: Kind("mohawk convert", "mohawk.conversion.recipe", "Recipe"),
}


def kind_of(path: str | Path) -> type[RecipeFile]:
    """The class that reads a recipe: a conversion's, a distillation's or a pruning's. Raises UserError."""
    return _kind(path).schema()


def command_for(schema: type[RecipeFile], data: Mapping[str, Any]) -> str | None:
    """The command that a recipe's data are for, where it is not the one of `schema`; None where it may be."""
    if any(key in data and key in schema.model_fields for key in RECIPE_KINDS):
        return None
    if (key := next((key for key in RECIPE_KINDS if key in data), None)) is not None:
        return RECIPE_KINDS[key].command
    student = data.get("student")
    if CONVERSION not in schema.model_fields and isinstance(student, dict):
        # no key of a distillation's student is one of a conversion's
        section: Any = RECIPE_KINDS[CONVERSION].schema().model_fields["student"].annotation
        if student.keys() & section.model_fields.keys():
            return RECIPE_KINDS[CONVERSION].command
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
    return _kind(path).command


def phase_names(folder: str | Path) -> tuple[str, ...]:
    """Names of a run's phases in order: each has a folder of that name, with its student once it is done."""
    return load_run_recipe(folder).phase_names()


def _kind(path: str | Path) -> Kind:
    data = read_recipe(Path(path)).data
    return RECIPE_KINDS[next((key for key in RECIPE_KINDS if key in data), CONVERSION)]

"""Recipe files: reading one, and those that come with the package."""

from __future__ import annotations

from pathlib import Path

from mohawk.errors import UserError
from mohawk.schema.yaml_text import RecipeText

LARGEST = 1 << 20  # characters of a recipe


def read_recipe(path: Path) -> RecipeText:
    """A recipe's YAML text, its values not checked yet. Raises UserError."""
    try:
        with path.open(encoding="utf-8") as file:  # of a file that is none, such as weights, no more than tells
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"cannot read the recipe {path}: has more than {LARGEST:,} characters, which no recipe has")
        return RecipeText.read(text, str(path))
    except FileNotFoundError as error:
        name = path.name.removesuffix(".yaml")
        copies = (
            f"`mohawk recipes {name}` copies the one" if name in shipped_names() else "`mohawk recipes` lists those"
        )
        raise UserError(f"there is no recipe {path}; {copies} that came with mohawk") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error


def shipped(name: str) -> Path:
    """The path of a recipe that comes with the package, such as `demo`. Raises UserError."""
    folder = _shipped_folder()
    path = folder / f"{name}.yaml"
    if path.parent != folder or not path.is_file():
        raise UserError(f"no recipe named {name!r} comes with mohawk; allowed: {', '.join(shipped_names())}")
    return path


def shipped_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def _shipped_folder() -> Path:
    import mohawk

    folders = [Path(root) / "recipes" for root in mohawk.__path__]  # in the package, or a source checkout beside it
    return next(folder for folder in folders if (folder / "demo.yaml").is_file())

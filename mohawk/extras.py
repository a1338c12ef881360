"""Which packages come with which extra of the installation, and the one line that names those that are missing."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from importlib.util import find_spec

from mohawk.errors import UserError

# What of each extra of pyproject.toml is imported here, by its name there; some of "convert" comes with the others.
EXTRAS = {
    "convert": (
        "accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "numpy", "safetensors", "tokenizers", "tqdm",
        "transformers",
    ),
    "eval": ("lm_eval",),
    "lora": ("peft",),
    "triton": ("triton",),
}  # fmt: skip
WITH = {"eval": "convert", "lora": "convert"}  # extras that contain another one
BASE = ("torch", "pydantic", "rich", "ruamel")  # what every installation has


def need(extra: str, what: str) -> None:
    """UserError with all packages of an extra that are not installed; `what` needs them, such as "`mohawk demo`"."""
    if set(missing := _missing(extra)) - {"gguf"}:  # which only models in that format need, and ask for themselves
        raise UserError(_line(what, missing, extra))


def explain(error: ImportError, what: str) -> str | None:
    """The line for an import that failed in `what`: all that its extra would bring, not this package alone.

    None where neither a package of an extra is missing nor one that such a package imports: then it is a mistake of our
    own, or of code that the user brought.
    """
    name = (error.name or "").partition(".")[0]
    if name in BASE and not _installed(name):
        return _line(what, [name], None)
    importers = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    involved = {name, *(importer.partition(".")[0] for importer in importers)}
    for extra in reversed(EXTRAS):  # "convert" last: packages of the others import its own
        if involved.isdisjoint(EXTRAS[extra]):
            continue
        missing = set(_missing(extra))
        if isinstance(error, ModuleNotFoundError) and name and not _installed(name):
            missing.add(name)
        if missing:
            return _line(what, sorted(missing), extra)
    return None


def _missing(extra: str) -> list[str]:
    return sorted(name for name in EXTRAS[extra] + EXTRAS.get(WITH.get(extra), ()) if not _installed(name))


def _installed(name: str) -> bool:
    # A folder of that name in the working directory is found too, as a package that comes from nowhere.
    return getattr(find_spec(name), "origin", None) is not None


def _line(what: str, missing: Iterable[str], extra: str | None) -> str:
    asked = "." if extra is None else f"'.[{extra}]'"
    return (
        f"{what} needs packages that are not installed ({', '.join(missing)}): run pip install {asked} in mohawk's "
        "checkout"
    )

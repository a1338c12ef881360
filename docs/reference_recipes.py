"""The reference of recipes, from their schema."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

RECIPES_HEAD = """\
# Recipes

<!-- Written by docs/generate.py from the schema; edit the fields' descriptions there. -->

A recipe is one YAML file that decides everything about a run. It is checked before anything is loaded: unknown fields,
wrong types, values out of range and contradictions are all reported at once, each with its line.

- Every field can be set on the command line: `--set phases.hidden.tokens=2e6`, `--set data.train.0.source=books.txt`.
- `teacher: path` is short for `teacher: {model: path}`; a text in `data.train` may be a path alone.
- It is YAML 1.2: `1e-4` is a number and `no` is a text. Whole numbers may be written `2e6`.
- Paths may begin with `~`, the home folder.
- "as there" means: the defaults of the table that the link leads to.

`mohawk recipes` lists the recipes that come along:

"""
TITLES = {"RampSection": "A number that changes over a stage"}  # of sections that stand in many places


def recipes() -> str:
    """The reference of all recipe fields."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.pruning.recipe import PruneRecipe
    from mohawk.schema.base import Phase
    from mohawk.schema.files import shipped, shipped_names
    from mohawk.schema.kinds import kind_of

    kinds = {
        Recipe: ("A conversion", "conversion", "mohawk convert"),
        DistillRecipe: ("A distillation", "distillation", "mohawk distill"),
        PruneRecipe: ("A pruning", "pruning", "mohawk prune"),
    }
    lines = [RECIPES_HEAD + "| recipe | command | what it is |", "|---|---|---|"]
    for name in shipped_names():
        first = shipped(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"| `{name}` | `{kinds[kind_of(shipped(name))][2]}` | {first} |")
    seen: dict[type, str] = {Phase: "What all phases and stages share"}
    lines += ["", f"## {seen[Phase]}"]
    sections(Phase, "", "", seen, lines)
    for schema, (title, kind, command) in kinds.items():
        lines += ["", f"## {title}", "", f"Run by `{command}`."]
        sections(schema, "", kind, seen, lines)
    return "\n".join(lines) + "\n"


def sections(schema: type, at: str, kind: str, seen: dict[type, str], lines: list[str]) -> None:
    """A section's table, then those of the sections inside it that were not written yet."""
    inside = []
    base = schema.__mro__[1]
    if base in seen:
        lines += ["", f"All fields of [{seen[base]}](#{slug(seen[base])}), and:"]
    lines += ["", "| field | what | allowed | default |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        if base in seen and same_field(field, base.model_fields.get(name)):
            continue
        sub = next((part for part in parts(field.annotation) if is_section(part)), None)
        path = f"{at}.{name}" if at else name
        allowed = allowed_words(field)
        if sub is not None:
            if sub not in seen:
                seen[sub] = TITLES.get(sub.__name__, f"`{path}` of a {kind}")
                inside.append((sub, path))
            # a union's other members, such as the number that a ramp may replace
            others = [allowed_of(part) for part in typing.get_args(field.annotation) if part_of_union(part)]
            link = f"[{seen[sub]}](#{slug(seen[sub])})"
            many = typing.get_origin(next(iter(plain(field.annotation)))) is list
            allowed = ", or ".join([*others, f"a list of {link}" if many else link])
        cells = (f"`{name}`", field.description or "", allowed, default_of(field, sub))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for sub, path in inside:
        lines += ["", f"### {seen[sub]}"]
        sections(sub, path, kind, seen, lines)


def same_field(one: Any, other: Any) -> bool:
    keys = ("annotation", "default", "description", "metadata")
    return other is not None and all(getattr(one, key) == getattr(other, key) for key in keys)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str):
            yield from parts(part)


def plain(annotation: Any) -> list[Any]:
    """Members of a union, None left out."""
    if typing.get_origin(annotation) is Annotated:
        return plain(typing.get_args(annotation)[0])
    members = typing.get_args(annotation) if "Union" in str(typing.get_origin(annotation)) else (annotation,)
    return [member for member in members if member is not type(None)]


def is_section(annotation: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel)


def part_of_union(part: Any) -> bool:
    return part is not type(None) and not isinstance(part, str) and not any(is_section(each) for each in parts(part))


def allowed_words(field: Any) -> str:
    """What a field admits, in the words of its error message."""
    annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return allowed_of(annotation)


def allowed_of(annotation: Any) -> str:
    """A validator's own words where it refuses what is none of them, else the type's and the bounds'."""
    from mohawk.schema.check import _allowed

    null = any(part is type(None) for part in typing.get_args(annotation)[:2] + typing.get_args(annotation)[-1:])
    for part in parts(annotation):
        for extra in getattr(part, "__metadata__", ()):
            try:
                getattr(extra, "func", lambda value: value)(object())
            except ValueError as error:
                return str(error) + ", or null" * null
            except TypeError:
                continue
    words = re.sub(r", at most (1e\+?18|10{6,}(\.0)?|1048576|16777216)\b", "", _allowed(annotation))  # against slips
    return words.replace("4294967296", "2^32").replace("text, not empty", "text").replace(" or null", ", or null")


def default_of(field: Any, sub: Any) -> str:
    from pydantic_core import PydanticUndefined

    value = field.default
    if value is PydanticUndefined:
        return "required"
    if is_section(type(value)):
        return "as there"
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    if isinstance(value, int) and value >= 1_000_000:
        return f"`{value:,}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

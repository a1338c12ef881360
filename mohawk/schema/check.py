"""Check a recipe's data against its schema; word each mistake as one line: where, got, allowed, advice."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from mohawk.schema.yaml_text import Path as Where
from mohawk.schema.yaml_text import RecipeText, prefix, report, show

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Checked = TypeVar("Checked", bound=BaseModel)


def check(
    schema: type[Checked],
    read: RecipeText,
    overrides: Sequence[str],
    contradictions: Callable[[Checked], Iterable[tuple[list[Where], str]]],
) -> Checked:
    """The checked model, or a UserError with all mistakes: in text, overrides, values and between values.

    contradictions: yields (paths of the values involved, what is wrong with them together).
    """
    data = read.data = _expanded(schema, read.data)
    for override in overrides:
        read.set(override)
        data = read.data = _expanded(schema, read.data)  # for the next one to reach into
    mistakes = list(read.mistakes)
    for at, text in _texts(data):
        if "\0" in text:
            mistakes.append(f"{prefix(read.place(at), at)}: holds a NUL character, which no name has; leave it out")
    wrong: list[Where] = []
    model = None
    # What is wrong is reported, then replaced by its default, so that contradictions elsewhere show up too. Where that
    # leaves a section without a key it needs, the next time round replaces the section.
    for attempt in range(3):
        try:
            model = schema.model_validate(data)
            break
        except ValidationError as error:
            found = _mistakes(error, data)
        if attempt == 0:
            mistakes += [f"{prefix(read.place(at), at)}: {_explain(schema, details, at)}" for at, details in found]
        bad = list(dict.fromkeys(_without_entries(at) for at, _ in found))
        wrong += bad
        for at in bad:
            _mend(schema, data, at)
    if model is None:
        raise report(mistakes, read.name)
    for involved, message in contradictions(model):
        if not any(at[: len(bad)] == bad for at in involved for bad in wrong):
            mistakes.append(f"{read.place(involved[0])}: {message}")
    if mistakes:
        raise report(mistakes, read.name)
    return model


def _texts(value: Any, at: Where = ()) -> Iterator[tuple[Where, str]]:
    """All texts among the values, and where they stand."""
    if isinstance(value, str):
        yield at, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _texts(entry, (*at, key))


def _expanded(schema: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its shorthands written out: a bare text in the place of a section that has a `shorthand`."""

    def written_out(section: type[BaseModel], value: Any) -> Any:
        if isinstance(value, str) and (short := getattr(section, "shorthand", None)):
            return {short: value}
        return _expanded(section, value) if isinstance(value, dict) else value

    data = dict(data)
    for key in data.keys() & schema.model_fields.keys():
        parts = list(_parts(schema.model_fields[key].annotation))
        section, value = next(filter(_is_section, parts), None), data[key]
        if section is None:
            continue
        if not any(typing.get_origin(part) is list for part in parts):
            data[key] = written_out(section, value)
        elif isinstance(value, list):
            data[key] = [written_out(section, entry) for entry in value]
    return data


def _explain(schema: type[BaseModel], details: ErrorDetails, at: Where) -> str:
    """One mistake that pydantic found, as: got, allowed, what to do."""
    kind, got, field = details["type"], details["input"], _field(schema, at)
    if kind == "extra_forbidden":
        known = list(_section(schema, at[:-1]).model_fields)
        near = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.5)
        return "unknown key; " + (f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}")
    if kind == "missing":
        return f"missing; give {field[1]}" if field else "missing"
    allowed = details["ctx"]["error"] if kind == "value_error" else _allowed(field[0] if field else None)
    line = f"got {show(got)}; allowed: {allowed}"
    if kind == "string_type" and got is not None and not isinstance(got, (dict, list)):
        line += "; put it in quotes"
    return line + (f" ({field[1]})" if field and field[1] else "")


def _section(schema: type[BaseModel], at: Where) -> type[BaseModel]:
    """The model class that stands at a path; list indices are skipped."""
    model = schema
    for key in at:
        if isinstance(key, str):
            model = next(t for t in _parts(model.model_fields[key].annotation) if _is_section(t))
    return model


def _field(schema: type[BaseModel], at: Where) -> tuple[Any, str] | None:
    """(annotation with its bounds, description) of the value at a path; for a list's entry, the entry's."""
    names = [key for key in at if isinstance(key, str)]
    if not names or names[-1] not in (fields := _section(schema, tuple(names[:-1])).model_fields):
        return None
    info = fields[names[-1]]
    # pyrefly: ignore[not-a-type]  # made at run time
    annotation: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    if isinstance(at[-1], int):
        annotation = next(t for t in _parts(annotation) if typing.get_origin(t) in (list, tuple))
        annotation = typing.get_args(annotation)[0]
    return annotation, info.description or ""


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything it is made of."""
    yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str):
            yield from _parts(part)


def _is_section(annotation: Any) -> bool:
    # Python 3.10 takes list[int] for a type.
    return typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _allowed(annotation: Any) -> str:
    """What an annotation admits, in words: "a whole number, at least 1"."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds: list[str] = []
        for extra in parts[1:]:
            for constraint in getattr(extra, "metadata", [extra]):
                for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
                    if (bound := getattr(constraint, name, None)) is not None:
                        bounds.append(f"{words} {bound}")
                if getattr(constraint, "min_length", 0):
                    bounds.append("not empty")
                if (most := getattr(constraint, "max_length", None)) is not None:
                    bounds.append(f"at most {most} characters")
        return ", ".join([_allowed(parts[0]), *bounds])
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(part) for part in parts)
    if origin is list:
        return f"a list, each {_allowed(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_allowed(parts[0])}"
    if _is_section(annotation):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(annotation, "null")


def _mistakes(error: ValidationError, data: Any) -> list[tuple[Where, ErrorDetails]]:
    """Where each mistake is, and what pydantic says of it."""
    found = [(_location(details, data), details) for details in error.errors(include_url=False)]
    # A mapping fails a union's other members too: what is wrong inside it says more.
    within = {at[:end] for at, _ in found for end in range(len(at))}
    return [(at, details) for at, details in found if at not in within]


def _location(details: ErrorDetails, data: Any) -> Where:
    """Where pydantic found a mistake, without the names of union members and functions that it puts in between."""
    at: list[str | int] = []
    loc = details["loc"]
    for i, key in enumerate(loc):
        if isinstance(data, dict) and (key in data or i == len(loc) - 1 and details["type"] == "missing"):
            at.append(key)
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            at.append(key)
            data = data[key]
    return tuple(at)


def _without_entries(at: Where) -> Where:
    """The path of the whole list, for a path into one."""
    first = next((i for i, key in enumerate(at) if isinstance(key, int)), len(at))
    return at[:first]


def _mend(schema: type[BaseModel], data: dict[str, Any], at: Where) -> None:
    """Replace a wrong value by its default, or by a stand-in where the schema has none."""
    parent: Any = data
    for key in at[:-1]:
        if not isinstance(parent.get(key), dict):
            return  # was itself wrong, and is mended already
        parent = parent[key]
    info = _section(schema, at[:-1]).model_fields.get(str(at[-1])) if at else None
    stand_in = _stand_in(info.annotation) if info is not None and info.is_required() else None
    if stand_in is not None:
        parent[at[-1]] = stand_in
    elif at and at[-1] in parent:
        parent.pop(at[-1])
    elif len(at) > 1:
        _mend(schema, data, at[:-1])  # the key is missing: what it is missing from goes


def _stand_in(annotation: Any) -> Any:
    """A text, a list of one entry, or a section of such values, for what has to be given; None for anything else."""
    for part in _parts(annotation):
        if part is str:
            return "?"
        if typing.get_origin(part) is list:
            entry = _stand_in(typing.get_args(part)[0])
            return None if entry is None else [entry]
        if _is_section(part):
            fields = {name: info for name, info in part.model_fields.items() if info.is_required()}
            made = {name: _stand_in(info.annotation) for name, info in fields.items()}
            return None if None in made.values() else made
    return None

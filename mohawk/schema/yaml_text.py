"""A recipe's text: YAML to plain data with line numbers, `--set a.b=c` on top of it, and back to YAML.

YAML 1.2, so 1e-4 is a number and `no` is text. Every mistake in the text is collected with its line, not only
the first: repeated keys do not hide what else is wrong.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from mohawk.errors import UserError, shortened

LONGEST = 1 << 18  # characters: the reader, in Python, takes seconds for so many
VALUES = 100_000  # in a recipe, with those that aliases stand for
DEEPEST = 50  # mappings and lists inside one another

Path = tuple[str | int, ...]  # of a value in the recipe: ("phases", "hidden", "tokens")

_MERGE = "tag:yaml.org,2002:merge"


class RecipeText:
    """Plain data, where each of its values was given, and the mistakes found while reading it.

    data: dicts, lists and scalars.
    places: value path -> "recipe.yaml:12" or "--set".
    mistakes: one line each.
    """

    def __init__(self, data: dict[str, Any], name: str = "recipe") -> None:
        self.data = data
        self.name = name
        self.places: dict[Path, str] = {}
        self.mistakes: list[str] = []

    @classmethod
    def read(cls, text: str, name: str) -> RecipeText:
        """Parse YAML text; `name` stands before line numbers in messages. UserError if it is no YAML."""
        result = cls({}, name)
        node = _compose(text, name)
        if isinstance(node, MappingNode):
            result.data = result._plain(node, ())
        elif node is not None:
            raise UserError(f"{name}:1: the recipe is {_kind(node)}; it must be a mapping: `teacher: ...`")
        return result

    def place(self, path: Path) -> str:
        """Where the value at `path` was given, or else the nearest enclosing one."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def set(self, override: str) -> None:
        """Apply one `a.b=c`, with c read as YAML. Collects its mistakes; unknown keys are the schema's."""
        name, equals, text = override.partition("=")
        name = name.strip()
        where = f"--set {name}"
        keys = name.split(".")
        if not equals or not all(keys):
            self.mistakes.append(f"--set {override}: not of the form key.key=value")
            return
        scratch = RecipeText({}, where)
        try:
            node = _compose(text, where)
            if isinstance(node, CollectionNode) and not node.flow_style:
                value = text  # `a: b` and `- a` are meant as text here; [..] and {..} are collections
            else:
                value = None if node is None else scratch._plain(node, tuple(keys))
        except UserError:
            self.mistakes.append(f"{where}: cannot read the value {text!r} as YAML; put it in quotes")
            return
        if scratch.mistakes:
            self.mistakes += scratch.mistakes
            return
        *parents, last = keys
        at: Any = self.data
        path: Path = ()
        for key in parents:
            at, path = self._enter(at, path, key, where)
            if at is None:
                return
        step = self._step(at, path, last, where)
        if step is None:
            return
        at[step] = value
        path = (*path, step)
        self.places = {p: w for p, w in self.places.items() if p[: len(path)] != path}
        self.places[path] = where

    def _enter(self, at: Any, path: Path, key: str, where: str) -> tuple[Any, Path]:
        """One level down to a mapping or list, made where there is none. (None, path) after a mistake."""
        step = self._step(at, path, key, where)
        if step is None:
            return None, path
        child = at.get(step) if isinstance(at, dict) else at[step]
        path = (*path, step)
        if child is None:
            child = {}
        elif not isinstance(child, (dict, list)):
            self.mistakes.append(f"{where}: {dotted(path)} is {show(child)}, which has no keys")
            return None, path
        at[step] = child
        self.places.setdefault(path, where)
        return child, path

    def _step(self, at: Any, path: Path, key: str, where: str) -> str | int | None:
        if not isinstance(at, list):
            return key
        if key.isdigit() and int(key) < len(at):
            return int(key)
        entries = f"0 to {len(at) - 1}" if at else "none yet"
        self.mistakes.append(f"{where}: got {key!r}, but {dotted(path)} is a list; its entries: {entries}")
        return None

    def _plain(self, node: Node, path: Path, above: tuple[int, ...] = ()) -> Any:
        line = node.start_mark.line + 1
        self.places.setdefault(path, f"{self.name}:{line}" if not self.name.startswith("--") else self.name)
        here = self.places[path]
        if id(node) in above:
            self.mistakes.append(f"{prefix(here, path)}: an alias refers to what it stands in")
            return None
        above = (*above, id(node))
        if isinstance(node, SequenceNode):
            return [self._plain(child, (*path, i), above) for i, child in enumerate(node.value)]
        if isinstance(node, MappingNode):
            return self._mapping(node, path, above)
        try:
            # A constructor is made for each scalar since the parser is done with its own by now.
            return YAML(typ="safe", pure=True).constructor.construct_object(node)
        except (ConstructorError, ValueError, OverflowError):
            self.mistakes.append(f"{prefix(here, path)}: cannot read {node.value!r} as {node.tag}")
            return None

    def _mapping(self, node: MappingNode, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = f"{self.name}:{key_node.start_mark.line + 1}"
            if key_node.tag == _MERGE:
                many = isinstance(value_node, SequenceNode)
                for source in value_node.value if many else [value_node]:
                    value = self._plain(source, (*path, "<<"), above)
                    merged = {**(value if isinstance(value, dict) else {"<<": value}), **merged}
                continue
            if not isinstance(key_node, ScalarNode):
                self.mistakes.append(f"{here}: {dotted(path)}: a key must be a word, not {_kind(key_node)}")
                continue
            key = str(key_node.value)
            if key in result:
                first = self.places[(*path, key)].rpartition(":")[2]
                self.mistakes.append(
                    f"{here}: {dotted((*path, key))}: given twice, first in line {first}; remove one of them"
                )
                continue
            self.places[(*path, key)] = here
            result[key] = self._plain(value_node, (*path, key), above)
        return {**merged, **result}


def write(data: dict[str, Any]) -> str:
    """Plain data as YAML text that `RecipeText.read` reads back to the same data."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 10_000  # never fold a long text
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(_laid_out(data), stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`; ruamel.yaml leaves the value out."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _laid_out(value: Any) -> Any:
    """Mappings over several lines, lists of scalars on one."""
    if isinstance(value, dict):
        # A key that is a number, of a layer for one, is one without quotes too: it is read as text in any case.
        numbers = {key: int(key) for key in value if re.fullmatch("0|[1-9][0-9]{0,8}", str(key))}
        return {numbers.get(key, _laid_out(key)): _laid_out(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        result = CommentedSeq(_laid_out(entry) for entry in value)
        if not any(isinstance(entry, (dict, list, tuple)) for entry in value):
            result.fa.set_flow_style()
        return result
    if isinstance(value, PurePath):
        return str(value)
    return _quoted_if_needed(value) if isinstance(value, str) else value


def _quoted_if_needed(text: str) -> str:
    """In double quotes where ruamel.yaml would write what it does not read back as the same text.

    Those are some characters that are not printable, and a first sign that opens something else: it writes `[?a]` and
    reads a mapping.
    """
    return DoubleQuotedScalarString(text) if not text.isprintable() or text[:1] in set("?:-") else text


def prefix(place: str, path: Path) -> str:
    """Where a mistake is: its place in the file and its path, or `--set path` alone."""
    return place if place == f"--set {dotted(path)}" else f"{place}: {dotted(path)}"


def quoted(text: str) -> str:
    """YAML that is read back as this string, whatever it looks like: for values of overrides."""
    return "'" + text.replace("'", "''") + "'"


def dotted(path: Path) -> str:
    """("data", "train", 0) as data.train.0."""
    return ".".join(map(str, path)) or "the recipe"


def field_path(name: str) -> Path:
    """data.train.0 as ("data", "train", 0)."""
    return tuple(int(key) if key.isdigit() else key for key in name.split("."))


def show(value: Any) -> str:
    """A value as the user would recognise it, with its kind where that may be the mistake."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value if len(value) < 60 else value[:57] + '...'!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(str, value)) + "]"
        return f"the list {text}" if len(text) < 60 else f"a list of {len(value)}"
    try:
        return shortened(str(value), 60)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _compose(text: str, name: str) -> Node | None:
    if len(text) > LONGEST:
        raise UserError(f"{name}: has {len(text):,} characters; allowed: {LONGEST:,}")
    try:
        if re.search(rf"(?:[\[{{]\s*){{{DEEPEST + 1}}}", text):  # which the parser would think about for long
            raise RecursionError
        node = YAML(typ="safe", pure=True).compose(text)
        if node is not None:
            _check_size(node, name)
        return node
    except RecursionError:
        raise UserError(f"{name}: not readable as YAML: nested more than {DEEPEST} deep") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "not YAML"
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not readable as YAML: {what}") from error
    except YAMLError as error:
        raise UserError(f"{name}: not readable as YAML: {str(error).splitlines()[0]}") from error


def _check_size(node: Node, name: str) -> None:
    """UserError where aliases make a text larger than anyone means, or deeper than can be read."""
    known: dict[int, tuple[int, int]] = {}

    def measure(node: Node) -> tuple[int, int]:
        """(how many values, how many levels) stand at a node, what it names by aliases written out."""
        if id(node) not in known:
            known[id(node)] = 1, 1  # of an alias to what it stands in, which is said elsewhere
            parts = node.value if isinstance(node, CollectionNode) else ()
            children = (part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,)))
            values, levels = zip((0, 0), *map(measure, children), strict=True)
            if max(levels) >= DEEPEST:
                raise RecursionError
            known[id(node)] = 1 + sum(values), 1 + max(levels)
        return known[id(node)]

    if (values := measure(node)[0]) > VALUES:
        raise UserError(f"{name}: has {values:,} values, what aliases stand for written out; allowed: {VALUES:,}")


def _kind(node: Node) -> str:
    kinds: dict[type[Node], str] = {SequenceNode: "a list", MappingNode: "a mapping"}
    return kinds.get(type(node), "a single value")


def report(mistakes: Sequence[str], name: str) -> UserError:
    """All the mistakes as one exception, a line each without repetition, in the order of the file's lines."""
    line = re.compile(re.escape(name) + r":(\d+)")

    def order(mistake: str) -> int:
        found = line.match(mistake)
        return int(found[1]) if found else 0 if mistake.startswith(f"{name}:") else sys.maxsize

    return UserError("\n".join(sorted(dict.fromkeys(mistakes), key=order)))

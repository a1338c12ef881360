"""Who may import whom: arrows between the folders of the package run one way, downwards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {"mohawk": ROOT / "mohawk", "mohawk.kernels": ROOT / "kernels", "mohawk.models": ROOT / "models"}

# From the bottom. A folder imports from itself and from lower lines; within a line nobody imports anybody.
LEVELS = [
    {"errors", "kernels"},
    {"launchers"},
    {"core", "models"},
    {"schema"},
    {"loading"},
    {"data"},
    {"training"},
    {"losses"},
    {"teacher_cache", "generation", "measures"},
    {"runs"},
    {"conversion"},
    {"distillation"},
    {"pruning"},
    {"evaluation", "export", "inspection"},
    {"demo", "quantization", "phases", "teacher_models", "next_tokens"},  # the latter: earlier names of public modules
    {"cli"},
    {"__main__"},
]
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for package, folder in PACKAGE.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module of ours, line) of each import, in functions too; those for type checkers alone make no arrow."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("mohawk."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mohawk":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module, node.lineno)
        yield from imports(node)


ARROWS = {
    name: [(to, line) for to, line in imports(ast.parse(path.read_text(encoding="utf-8"))) if to != "mohawk"]
    for name, path in MODULES.items()
    if name != "mohawk"
}


def folder(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_has_its_level():
    assert {folder(name) for name in ARROWS} == set(LEVEL)


def test_arrows_run_downwards():
    wrong = [
        f"{name}, line {line}: imports {to}"
        for name, found in ARROWS.items()
        for to, line in found
        if folder(to) != folder(name) and LEVEL[folder(to)] >= LEVEL[folder(name)]
    ]
    assert wrong == []


@pytest.mark.parametrize("where", ["mohawk.kernels", "mohawk.models", "mohawk"])
def test_no_circles(where):
    """Not among modules of one folder either, not even through imports inside functions."""
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for to, _ in ARROWS.get(name, ()):
            if to != name and not to.startswith(f"{name}."):
                walk(to, (*path, name))
        done.add(name)

    for name in ARROWS:
        if name.startswith(where):
            walk(name, ())


def test_operations_of_the_kernels_know_what_is_common_alone():
    for name, found in ARROWS.items():
        if name.startswith("mohawk.kernels."):
            operation = name.split(".")[2]
            for to, line in found:
                allowed = ("mohawk.kernels.common.", f"mohawk.kernels.{operation}.")
                assert to.startswith(allowed), f"{name}, line {line}: imports {to}"


def test_no_folder_is_a_crowd():
    """At most a dozen and a half modules beside each other."""
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(path.relative_to(ROOT)): n for path, n in folders.items() if n > 18} == {}

"""The hybrid's own code beside its weights, so that `trust_remote_code=True` loads it where this package is not.

transformers copies a checkpoint's modules into one flat folder of its own and imports them from there. So the modules
that `models/hybrid.py` imports, and those that they import, are copied side by side, with imports of one another made
relative. Nothing is listed by hand: what the class imports when it is loaded is what travels.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import mohawk

if TYPE_CHECKING:
    from torch import nn

LICENCE = "Apache-2.0"  # of our code, as in pyproject.toml
ENTRY = "mohawk.models.hybrid"
PREFIX = "mohawk_"  # of the copies, to be told from the checkpoint's other files
_IMPORT = re.compile(r"^from (mohawk\.(?:kernels|models)\.[\w.]+) import", re.MULTILINE)
# the installed package's class must stay the one that transformers' Auto classes know, should both be loaded
_REGISTER = re.compile(r"^Auto\w+\.register\(.*\)\n", re.MULTILINE)


def add_code(folder: Path, model: nn.Module) -> None:
    """Where the saved model is a hybrid, its code beside its weights, and config.json naming it.

    With it, who loads the folder and has not imported mohawk is asked for `trust_remote_code=True`; without it
    transformers advises to upgrade transformers.
    """
    from mohawk.models.hybrid import HybridForCausalLM

    if not isinstance(model, HybridForCausalLM):
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = write_remote_code(folder)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_remote_code(folder: Path) -> dict[str, str]:
    """Copy the class and what it needs into `folder`; returns the `auto_map` of config.json."""
    for module, source in _needed().items():
        name = f"{module.removeprefix('mohawk.').replace('.', '/')}.py"
        copied = f"# {name} of mohawk {mohawk.__version__}\n# SPDX-License-Identifier: {LICENCE}\n"
        (folder / f"{_flat(module)}.py").write_text(copied + flattened(source), encoding="utf-8")
    entry = _flat(ENTRY)
    return {"AutoConfig": f"{entry}.HybridConfig", "AutoModelForCausalLM": f"{entry}.HybridForCausalLM"}


@functools.cache  # a run writes the same modules beside each of its students
def flattened(source: str) -> str:
    """A module's text as a member of the flat folder.

    Imports inside functions are of packages that may be missing (GPU kernels, the rest of mohawk); transformers refuses
    to load code whose imports it cannot resolve, but for those in a `try`.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    inner = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and _package(node) not in sys.stdlib_module_names
    ]
    for node in sorted(inner, key=lambda node: -node.lineno):
        body, indent = lines[node.lineno - 1 : node.end_lineno], " " * node.col_offset
        wrapped = [
            f"{indent}try:",
            *("    " + line for line in body),
            f"{indent}except ImportError:",
            f"{indent}    raise",
        ]
        lines[node.lineno - 1 : node.end_lineno] = wrapped
    return _REGISTER.sub("", _IMPORT.sub(lambda found: f"from .{_flat(found[1])} import", "\n".join(lines) + "\n"))


def _flat(module: str) -> str:
    """A module's name in the flat folder: mohawk.models.hybrid is mohawk_hybrid, mohawk.kernels.a.b mohawk_a_b."""
    return PREFIX + "_".join(module.split(".")[2:])


def _needed() -> dict[str, str]:
    """Module name -> source of the entry and of all that is imported from kernels/ and models/ on loading it."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, f"{module} is not there"
        found[module] = Path(spec.origin).read_text(encoding="utf-8")
        waiting += _IMPORT.findall(found[module])
    assert len(set(map(_flat, found))) == len(found), "two modules of one name in a flat folder"
    return found


def _package(node: ast.Import | ast.ImportFrom) -> str:
    name = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
    return name.split(".")[0]

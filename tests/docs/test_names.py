"""Docstrings, comments and pages name files, modules and functions that there are, by the names that they have."""

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = [*sorted(path for folder in ("kernels", "models", "mohawk") for path in (ROOT / folder).rglob("*.py"))]
OTHERS = [path for folder in ("benchmarks", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
FILES = [path.relative_to(ROOT).as_posix() for path in (*PACKAGE, *OTHERS)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

FOREIGN = {"convert_hf_to_gguf.py", "my_kernels.py", "setup.py"}  # other people's files, which our pages speak of
# What torch, transformers, mamba-ssm, lm-evaluation-harness and the system call things, and our code does not.
THEIRS = {
    "BambaMixer", "KimiLinearDeltaAttention", "LinearAttentionLayer", "Qwen3_5GatedDeltaNet", "TransformersKwargs",
    "custom_dataset", "kill", "mamba_chunk_scan_combined", "once_differentiable", "sha256sum",
}  # fmt: skip


def docstrings(source: str) -> dict[int, str]:
    """Line of each docstring -> what it says."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return {node.body[0].lineno: said for node in nodes if (said := ast.get_docstring(node, clean=False))}


def tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def said(path: Path) -> str:
    """The docstrings and comments of a module; the whole of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    comments = [token.string for token in tokens(text) if token.type == tokenize.COMMENT]
    return "\n".join([*docstrings(text).values(), *comments])


def written(path: Path) -> set[str]:
    """All words of a module's code, those inside of its strings too; not of its docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    lines = docstrings(text)
    kept = [each.string for each in tokens(text) if each.type != tokenize.COMMENT and each.start[0] not in lines]
    return set(re.findall(r"\w+", " ".join(kept)))


SAID = {path.relative_to(ROOT).as_posix(): said(path) for path in (*PACKAGE, *PAGES)}


def test_python_files_that_are_named_are_there():
    """From the root of the repository, from the page, or by the end of their path."""
    wrong = []
    for where, text in SAID.items():
        for name in set(re.findall(r"(?<![\w/.*-])[\w./-]+\.py\b", text)) - FOREIGN:
            there = name in FILES or any(file.endswith(f"/{name}") for file in FILES)
            if not there and not (ROOT / where).parent.joinpath(name).is_file():
                wrong.append(f"{where}: {name}")
    assert wrong == []


def test_dotted_names_of_the_package_are_there():
    """`mohawk.folder.module`, and what is in it."""
    wrong = []
    for where, text in SAID.items():
        for name in set(re.findall(r"(?<![\w/.])mohawk(?:\.[A-Za-z_]\w*)+", re.sub(r"\.(py|md)\b", "", text))):
            if name != "mohawk.kernels.a.b" and not found(name):  # that one is any
                wrong.append(f"{where}: {name}")
    assert wrong == []


def found(name: str) -> bool:
    package, _, last = name.rpartition(".")
    try:
        return bool(importlib.import_module(name))
    except ImportError:
        return bool(package) and hasattr(importlib.import_module(package), last)


def test_modules_that_moved_are_where_the_changes_say():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text, re.M)
    assert len(moved) > 120
    for old, new in moved:
        importlib.import_module(new)
        assert not (ROOT / old.replace(".", "/")).with_suffix(".py").is_file(), old  # a folder at most


def test_names_behind_a_module_are_in_it():
    """Of `some_module.name`, where `name` is one of ours: some_module is what the module is called."""
    stems: dict[str, set[str]] = {}
    for path in PACKAGE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                stems.setdefault(node.name, set()).add(path.stem)
    wrong = [
        f"{where}: {module}.{name} is in {', '.join(stems[name])}"
        for where, text in SAID.items()
        for module, name in re.findall(r"(?<![\w/.])([a-z]+_\w+)\.([A-Za-z_]\w*)", text)
        if name in stems and module not in stems[name]
    ]
    assert wrong == []


def test_words_in_backticks_are_in_the_code():
    """A docstring's `name` is a word of the code, or its thing went and the sentence stayed."""
    words = set().union(*(written(path) for path in PACKAGE)) | THEIRS
    wrong = [
        f"{where}: {name}"
        for where, text in SAID.items()
        if where.endswith(".py")
        for name in set(re.findall(r"`([A-Za-z_]\w*)`", text)) - words
    ]
    assert wrong == [], "what other people call so goes into THEIRS"

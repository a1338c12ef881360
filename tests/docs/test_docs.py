"""README and docs/: commands parse, snippets compile and run, recipes are valid, links lead somewhere, generated parts
are up to date, and the site builds."""

import argparse
import ast
import builtins
import collections.abc
import contextlib
import importlib
import json
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from mohawk.cli import main, parser
from mohawk.models.families import FAMILIES
from mohawk.schema.kinds import kind_of

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
REFERENCE = {of: runpy.run_path(str(DOCS / f"reference_{of}.py")) for of in ("recipes", "python")}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Fence(NamedTuple):
    """A block of code. runs: whether the page says that it runs as it stands."""

    language: str
    text: str
    runs: bool


def fences(page: Path) -> list[Fence]:
    found = re.findall(r"(<!-- runs -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Fence(language, text, bool(runs)) for runs, language, text in found]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every command line in a page's consoles; what other lines hold is output."""
    lines = [line for fence in fences(page) if fence.language == "console" for line in fence.text.splitlines()]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


def grammars() -> dict[str, argparse.ArgumentParser]:
    top = parser()
    return next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices


@each_page
def test_commands_are_valid(page, tmp_path):
    """Each is one of the programs known here, with arguments that it takes."""
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        while "=" in words[0]:  # environment variables in front
            words = words[1:]
        program = words[0]
        if "mohawk" in words[:6] and program in ("mohawk", "python", "torchrun"):
            options = parser().parse_args(words[words.index("mohawk") + 1 :])
            recipe = getattr(options, "recipe", None)
            if recipe is not None and (ROOT / recipe).is_file():
                kind_of(ROOT / recipe).load(ROOT / recipe, options.set)
        elif program == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif program == "python":
            text = (ROOT / words[1]).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in text, f"{words[1]} has no {option}"
        elif program == "pip":
            check_pip(words)
        else:
            others = ("git", "pre-commit", "vllm", "llama-server", "transformers")
            assert program in others, f"{page.name}: what is {program}?"


def check_pip(words: list[str]) -> None:
    """It installs from the checkout, extras that there are; the registry's `mohawk` is only ever uninstalled."""
    if words[1] == "uninstall":
        assert words[2:] == ["mohawk"]
        return
    assert words[1] == "install" and "mohawk" not in words and "mohawk-distill" not in words
    asked = [word for word in words if word.startswith(".")]
    assert asked, words
    for word in asked:
        assert set(re.findall(r"[a-z]+", word)) <= set(extras()), word


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@each_page
def test_commands_named_in_sentences_are_there(page):
    for command, rest in re.findall(r"`mohawk ([a-z-]+)([^`]*)`", prose(page)):
        known = {option for action in grammars()[command]._actions for option in action.option_strings}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"mohawk {command}{rest}"


def test_commands_that_take_no_time_are_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = [words[1:] for page in PAGES for words in commands(page) if words[:2] == ["mohawk", "recipes"]]
    assert ["recipes"] in ran and ["recipes", "llama-hybrid"] in ran
    for words in ran:
        assert main(words) == 0
    assert (tmp_path / "llama-hybrid.yaml").is_file() and "llama-hybrid" in capsys.readouterr().out


# --- snippets ---------------------------------------------------------------------------------------------------------


@each_page
def test_python_snippets(page):
    """Each compiles and what it imports is there; those that say so run."""
    if page == DOCS / "python.md":
        return  # signatures, out of the sources themselves
    for fence in fences(page):
        if fence.language != "python":
            continue
        tree = ast.parse(fence.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if fence.runs:
            torch.manual_seed(0)
            exec(compile(tree, str(page), "exec"), {"__name__": "snippet"})


def test_some_snippets_run():
    pages = {page.name for page in PAGES for fence in fences(page) if fence.runs}
    assert pages >= {"README.md", "losses.md", "kernels.md"}


@each_page
def test_yaml_snippets_are_recipes(page, tmp_path):
    """As they stand, or, of a part of one, with a teacher, a student and text put to it."""
    for fence in fences(page):
        if fence.language in ("yaml", "yml"):
            text = fence.text
            given = set(re.findall(r"^(\w+):", text, re.M))
            if "dataset_path" in given:  # a task of lm-eval's
                continue
            text += "teacher: x\n" * ("teacher" not in given) + "data: {train: [x.txt]}\n" * ("data" not in given)
            if "stages" in given and "student" not in given:
                text += "student: {layers: every_second}\n"
            path = tmp_path / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
            kind_of(path).load(path)


# --- what a reader needs ----------------------------------------------------------------------------------------------


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    targets = [words[1] for words in commands(ROOT / "README.md") if words[0] == "make"]
    assert {"demo", "test"} <= set(targets), "the README's first screen has the two commands"
    assert text.index("make demo") < text.index("make test") < len(text) / 2
    assert any(words[0] == "mohawk" for words in commands(ROOT / "README.md"))


def test_every_page_is_reached_from_the_readme_or_the_index():
    linked = {path for start in (ROOT / "README.md", DOCS / "index.md") for path, _ in links(start)}
    assert set(DOCS.glob("*.md")) <= linked | {DOCS / "index.md"}


def test_nobody_is_told_to_install_the_other_mohawk():
    """The registry's `mohawk` is another project: it is only named to say so."""
    for page in PAGES:
        for sentence in re.split(r"(?<=[.:])\s", re.sub(r"\s+", " ", prose(page))):
            if re.search(r"pip install ['\"]?mohawk", sentence):
                assert re.search(r"[Dd]o not run|HTTP authentication", sentence), f"{page.name}: {sentence}"


def test_every_extra_and_family_has_its_row():
    named = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "install.md").read_text(), re.M)
    assert sorted(named) == sorted(extras())
    named = re.findall(r"^\| [^|]+ \| `(\w+)` \|", (DOCS / "families.md").read_text(), re.M)
    assert sorted(set(named) - {"model_type"}) == sorted(FAMILIES)
    shown = [fence.text.strip() for fence in fences(DOCS / "families.md") if fence.language == "text"]
    source = (ROOT / "models" / "families.py").read_text()
    assert shown and all(text in source for text in shown)


# --- links ------------------------------------------------------------------------------------------------------------


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link to something in this repository."""
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"\[`([^`\n]*)`\]", r"[\1]", prose(page)))
    found = []
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    return {REFERENCE["recipes"]["slug"](heading.strip()) for heading in re.findall(r"^#+ (.*)$", prose(page), re.M)}


@each_page
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {path.name} has no heading #{anchor}"


# --- generated parts --------------------------------------------------------------------------------------------------


def test_generated_parts_are_up_to_date():
    for path, text in GENERATE["generated"]().items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/generate.py"


def test_references_are_whole():
    """Every field, option and public name has its place; a description ends up beside its own field."""
    import mohawk
    import mohawk.teacher_models
    from mohawk.distillation.recipe import DistillRecipe

    recipes = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for field in ("ssm_layers", "solve_tokens", "own_loss", "average_decay", "layers_by", "tolerance", "report_to"):
        assert f"\n| `{field}` | " in recipes, field
    about = DistillRecipe.model_fields["combine"].description
    assert f"| `combine` | {about} | probabilities, logits, row | `probabilities` |" in recipes
    commands_page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name, sub in grammars().items():
        text = commands_page.split(f"\n## mohawk {name}\n")[1].split("\n## ")[0]
        for action in sub._actions:
            if not isinstance(action, argparse._HelpAction):
                shown = action.option_strings[-1] if action.option_strings else action.metavar
                assert re.search(rf"^\| `{re.escape(shown)}[ `]", text, re.M), f"mohawk {name}: {shown}"
    headings = set(re.findall(r"^### (\S+)$", (DOCS / "python.md").read_text(encoding="utf-8"), re.M))
    assert headings >= {*mohawk.__all__, *mohawk.teacher_models.__all__}


def test_words_in_public_signatures_are_explained():
    """Each is public itself, in the table at the end of the page, or a word of Python, torch or transformers."""
    page = DOCS / "python.md"
    signatures = [fence.text for fence in fences(page) if fence.language == "python"]
    said = set(re.findall(r"^### (\S+)$", page.read_text(encoding="utf-8"), re.M))
    said |= {word for words in REFERENCE["python"]["TYPES"] for word in words.split(", ")}
    theirs = (builtins, collections.abc, contextlib, pathlib, torch, torch.distributed, torch.nn, transformers, typing)
    used = {word for text in signatures for word in re.findall(r"(?<![\w\"])[A-Z]\w+", text)}
    assert sorted(word for word in used - said if not any(hasattr(module, word) for module in theirs)) == []
    assert {word for words in REFERENCE["python"]["TYPES"] for word in words.split(", ")} <= used


def test_examples_import_public_names():
    """They are copied, so what they import keeps its place."""
    import mohawk

    stable = {"mohawk", "mohawk.models.hybrid", "mohawk.next_tokens", "mohawk.phases", "mohawk.teacher_models"}
    for path in (ROOT / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mohawk":
                assert node.module in stable, f"{path.name}: {ast.unparse(node)}"
                assert node.module != "mohawk" or {alias.name for alias in node.names} <= set(mohawk.__all__)
    head = (DOCS / "python.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert set(re.findall(r"`(mohawk\.[\w.]+)`", head)) == stable - {"mohawk"}


def test_docstrings_become_lists():
    """Continued lines, a word with a colon inside a description, a code example."""
    text = (
        "It adds.\n\nArgs:\n    a, b: one\n        and two. None: neither.\n    *rest: more * `x*y`\n\nReturns:\n    c."
    )
    assert REFERENCE["python"]["markdown"](text) == [
        "It adds.", "", "**Args**", "", "- `a, b`: one", "  and two. None: neither.", "- `*rest`: more \\* `x*y`", "",
        "**Returns**", "", "c.", "",
    ]  # fmt: skip


def test_tables_are_those_of_the_results(tmp_path):
    """A table changes with its file, wherever it is shown, and its images are found from there."""
    (tmp_path / "docs").mkdir()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    shutil.copy(DOCS / "benchmark_tables.py", tmp_path / "docs")
    page, readme = tmp_path / "docs" / "page.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text("# Title\n<!-- benchmark: speed -->\nold\n<!-- end -->\nlast\n")
    (tmp_path / "docs" / "other.md").write_text("no mark\n")
    (results / "speed.md").write_text("| 1 |\n\n![speed](speed.png)\n")
    found = runpy.run_path(str(tmp_path / "docs" / "benchmark_tables.py"))["with_tables"]()
    text = "# Title\n<!-- benchmark: speed -->\n| 1 |\n\n![speed]({}speed.png)\n<!-- end -->\nlast\n"
    assert found == {readme: text.format("benchmarks/results/"), page: text.format("../benchmarks/results/")}


@pytest.mark.parametrize("name", ["kd_loss-cpu", "kd_accuracy-cpu", "mixing_distance-cpu", "ssd-cpu", "delta_rule-cpu"])
def test_tables_of_kernels_are_those_of_their_figures(name):
    from benchmarks.pages import table_lines

    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith("\n".join(table_lines(rows, "cpu")).strip())


def test_tables_of_the_demo_are_those_of_its_figures():
    from benchmarks.models.demo import markdown

    results = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    text = (RESULTS / "demo.md").read_text(encoding="utf-8")
    assert text.startswith("\n".join(markdown(results)))


def test_a_benchmark_writes_its_page(tmp_path, monkeypatch, capsys):
    from benchmarks import pages

    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    shutil.copy(DOCS / "benchmark_tables.py", tmp_path / "docs")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "benchmarks" / "results")
    pages.RESULTS.mkdir(parents=True)
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- benchmark: new -->\n<!-- end -->\n")
    (tmp_path / "README.md").write_text("none\n")
    pages.put_in_docs("new", ["| 2 |", "", "![new](benchmarks/results/new.png)"])
    assert (pages.RESULTS / "new.md").read_text() == "| 2 |\n\n![new](new.png)\n"
    assert page.read_text() == (
        "<!-- benchmark: new -->\n| 2 |\n\n![new](../benchmarks/results/new.png)\n<!-- end -->\n"
    )
    assert capsys.readouterr().out == "docs/page.md: new written\n"


# --- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "html"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    index = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert (tmp_path / "html" / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html"' in index, "in the list of pages"
    contributing = (tmp_path / "html" / "contributing.html").read_text(encoding="utf-8")
    assert "What a change needs" in contributing, "the page of the repository's root"
    assert 'href="how-it-works.html#words-used-here"' in contributing

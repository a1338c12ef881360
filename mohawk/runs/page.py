"""The report as one page of HTML that needs nothing beside it: a verdict, tables, plots, for one run or several.

jinja2, which torch brings along, fills the template in and escapes every value: a page shows what models wrote, and
that may be anything.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawk.core.json_files import read_json, write_text
from mohawk.core.places import home
from mohawk.core.run_folder import PAGE, RECIPE, RESULTS, has_recipe
from mohawk.errors import UserError
from mohawk.runs.beside import side_by_side, tradeoffs
from mohawk.runs.kept import Results
from mohawk.runs.markdown import caption, machine_lines, notes
from mohawk.runs.tables import Table, tables
from mohawk.runs.verdict import verdict


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, what is in its results.json, and its recipe's text."""

    folder: Path
    results: Mapping[str, Any]
    recipe: str


TEMPLATE = Path(__file__).with_name("page.html")


def report_runs(runs: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write the page of finished runs, and say where: by default RUN/report.html of one, ./report.html of several.

    Raises UserError for a folder that is no run's, a run that is not finished, one that is named twice.
    """
    folders = [home(run).resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(f"{runs[i]} is named twice; give each run once")
    found = [finished(folder, str(run)) for folder, run in zip(folders, runs, strict=True)]
    target = home(output) if output is not None else folders[0] / PAGE if len(folders) == 1 else Path(PAGE)
    if target.is_dir():
        raise UserError(f"--output: {target} is a folder; give the name of a file, such as {target / PAGE}")
    write_page(found, target)
    return target


def finished(folder: Path, name: str) -> Finished:
    """A run by its folder. name: as the user gave it. Raises UserError where it is none, or not finished."""
    if not has_recipe(folder):
        raise UserError(f"{name} is not a run's folder: it holds no {RECIPE}")
    results = read_json(folder / RESULTS, Results)
    if results is None:
        raise UserError(f"{name} has no whole {RESULTS} yet: give the command that made the run once more, to its end")
    return Finished(folder, results, (folder / RECIPE).read_text(encoding="utf-8"))


def write_page(runs: Sequence[Finished], target: Path) -> None:
    """The page of one run or several, by one rename."""
    write_text(target, to_html(runs))


def to_html(runs: Sequence[Finished]) -> str:
    """As `write_page`."""
    from jinja2 import Environment, StrictUndefined

    names = _names([run.folder for run in runs])
    several = {name: run.results for name, run in zip(names, runs, strict=True)} if len(runs) > 1 else {}
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text("utf-8"))
    return template.render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        runs=[_shown(name, run) for name, run in zip(names, runs, strict=True)],
        beside=[_table(table) for table in side_by_side(several)] if several else [],
        tradeoffs=[{"source": _data("svg+xml", svg), "caption": text} for text, svg in tradeoffs(several)],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; whole paths where these are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.resolve()) for folder in folders]


def _shown(name: str, run: Finished) -> dict[str, Any]:
    """One run, as the template takes it."""
    results = run.results
    return {
        "name": name,
        "architecture": results["architecture"],
        "teacher": results["teacher"],
        "verdict": verdict(results),
        "tables": [_table(table) for table in tables(results)],
        "notes": notes(results),
        "images": [_image(run.folder, plot) for plot in results["plots"] if (run.folder / plot).is_file()],
        "said": results["continuations"],
        "machine": machine_lines(results["machine"]),
        "recipe": run.recipe.strip(),
    }


def _table(table: Table) -> dict[str, Any]:
    return dict(zip(("title", "header", "rows"), table, strict=True))


def _image(folder: Path, plot: str) -> dict[str, str]:
    return {"source": _data("png", (folder / plot).read_bytes()), "caption": caption(plot)}


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

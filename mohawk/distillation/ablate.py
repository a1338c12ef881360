"""`mohawk ablate`: the same recipe with some of its values varied, one run each, compared in one table."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mohawk.core.json_files import read_json, write_json, write_text
from mohawk.core.run_folder import RESULTS, plot_file
from mohawk.distillation.plots import plot_variants
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.runs.kept import Compares
from mohawk.runs.plots import TEXTS
from mohawk.runs.tables import print_tables
from mohawk.schema.base import RecipeFile
from mohawk.schema.kinds import kind_of
from mohawk.schema.yaml_text import dotted, quoted

log = logging.getLogger(__name__)

FOUND = "ablation.json"


def ablate(
    path: str | Path, over: Sequence[str], overrides: Sequence[str] = (), output: str | Path | None = None
) -> list[dict[str, Any]]:
    """Run a recipe once for each combination of values and print, write and draw the comparison.

    Runs lie in OUTPUT/<what was varied>, stop and resume like any run, and are not repeated when they are done.

    Args:
        path: of a recipe for `mohawk distill` or `mohawk convert`.
        over: `key=value,value,...`, each varied against all others. A key without dots is one of the stages' (or
            phases'), in all of them that have it, else the one place in the recipe that has it.
        overrides: `key=value`, the same in every run.
        output: default: runs/<name of the recipe file>-ablation.

    Returns:
        A row per variant: its name, values, and what its student is on each text.

    Raises:
        UserError: a mistake in the recipe, in a key or in a value, before anything is run.
    """
    path, console = Path(path), Console()
    kind = kind_of(path)
    output = Path(output) if output is not None else Path("runs") / f"{path.stem}-ablation"
    steps = "stages" if kind is DistillRecipe else "phases"
    if any(override.partition("=")[0].strip() == "output" for override in overrides):
        raise UserError("--set output: each run has a folder of its own under --output; give that")
    variants = variants_of(kind.load(path, overrides), over, steps)
    recipes = {
        name: kind.load(path, [*overrides, *changes, f"output={quoted(str(output / slug(name)))}"])
        for name, changes in variants.items()
    }
    return compare_runs(recipes, _runner(kind), output, console, title=path.stem)


def _runner(kind: type[RecipeFile]) -> Callable[[Any], None]:
    """What runs a kind of recipe."""
    if kind is DistillRecipe:
        from mohawk.distillation.run import distill

        return distill
    from mohawk.conversion.run import convert

    return convert


def variants_of(recipe: RecipeFile, over: Sequence[str], steps: str) -> dict[str, list[str]]:
    """Name -> overrides, for every combination of the values asked for. Raises UserError."""
    axes = []
    for asked in over:
        key, equals, text = asked.partition("=")
        values = _values(key, text) if equals and key.strip() else []
        if not values:
            raise UserError(f"--over {asked}: not of the form key=value,value,...")
        places = _places(recipe, key.strip(), steps)
        axes.append([(f"{key.strip()}={value}", [f"{place}={value}" for place in places]) for value in values])
    if not axes:
        raise UserError("--over: nothing to vary; give --over key=value,value,...")
    found = {}
    for combination in itertools.product(*axes):
        name = ", ".join(name for name, _ in combination)
        if name in found:
            raise UserError(f"--over: {name} is there twice; give each value once")
        found[name] = [change for _, changes in combination for change in changes]
    return found


def _values(key: str, text: str) -> list[str]:
    """The values between commas, where brackets and braces hold theirs together."""
    values, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append(text[start:i])
            start = i + 1
    values = [value.strip() for value in [*values, text[start:]]]
    return values if all(values) else []


def _places(recipe: RecipeFile, key: str, steps: str) -> list[str]:
    """The places in a recipe that have a short name, as dotted paths."""
    if key == "output":
        raise UserError("--over output: each run has a folder of its own under --output; give that")
    if "." in key:
        return [key]
    found: list[tuple[str | int, ...]] = []

    def walk(value: Any, at: tuple[str | int, ...]) -> None:
        if isinstance(value, Mapping):
            found.extend((*at, name) for name in value if name == key)
            for name, part in value.items():
                walk(part, (*at, name))
        elif isinstance(value, list):
            for i, part in enumerate(value):
                walk(part, (*at, i))

    walk(recipe.model_dump(mode="json"), ())
    inside = [at for at in found if at[0] == steps and len(at) == 3]
    if not inside and len(found) != 1:
        where = "; ".join(dotted(at) for at in found) if found else f"a stage's keys, or a path such as {steps}.0.{key}"
        raise UserError(f"--over {key}: {'more than one place' if found else 'no such key'}; allowed: {where}")
    return [dotted(at) for at in inside or found]


def slug(name: str) -> str:
    """A variant's folder."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-")


def compare_runs(
    recipes: Mapping[str, RecipeFile],
    run: Callable[[RecipeFile], None],
    output: Path,
    console: Console,
    title: str,
) -> list[dict[str, Any]]:
    """Run what is not done yet, then the comparison: printed, OUTPUT/ablation.json and .md, plots/ablation.png."""
    rows: list[dict[str, Any]] = []
    begin, made = time.monotonic(), 0
    for i, (name, recipe) in enumerate(recipes.items()):
        folder = Path(recipe.output)
        found = read_json(folder / RESULTS, Compares)
        if found is None or found.get("broken"):  # by its student's decoding, as other versions may not be
            left = ""
            if made:
                minutes = (time.monotonic() - begin) / made * (len(recipes) - i) / 60
                left = f", about {minutes:.0f} min left"
            console.print(f"[bold]{i + 1} of {len(recipes)}: {name}[/bold]{left}", highlight=False)
            run(recipe)
            made += 1
        rows.append(_row(name, folder))
    tables = comparison(rows)
    if len(trained := {row["tokens"] for row in rows}) == 1:
        console.print(f"each trained on {trained.pop():,} tokens", highlight=False)
    # without what would not fit a narrow terminal and is in the files
    print_tables([(heading, header[:-2], [line[:-2] for line in lines]) for heading, header, lines in tables], console)
    write_json(output / FOUND, {"title": title, "rows": rows})
    plot = plot_variants(rows, plot_file(output, "ablation"))
    parts = [f"# {title}"]
    for heading, header, lines in tables:
        table = ["| " + " | ".join(r) + " |" for r in (header, ["---"] + ["---:"] * (len(header) - 1), *lines)]
        parts.append(f"## {heading}\n\n" + "\n".join(table))
    if plot is not None:
        parts.append("![comparison](plots/ablation.png)")
    write_text(output / "ablation.md", "\n\n".join(parts) + "\n")
    console.print(f"written to {output / 'ablation.md'}", highlight=False, soft_wrap=True, markup=False)
    return rows


def _row(name: str, folder: Path) -> dict[str, Any]:
    results = read_json(folder / RESULTS, Compares)
    assert results is not None  # the run has just written it
    last = list(results["evaluation"])[-1]
    phases = results["phases"].values()
    return {
        "name": name,
        "folder": str(folder),
        "texts": results["evaluation"][last],
        "parameters": results["parameters"]["student"],
        "tokens": sum(phase["tokens"] for phase in phases),
        "seconds": sum(phase["seconds"] for phase in phases),
    }


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The variants side by side, a table a text."""
    tables = []
    for text, about in TEXTS.items():
        shown = [row for row in rows if text in row["texts"]]
        if not shown:
            continue
        lines = []
        if any("kl" not in row["texts"][text] for row in shown):  # of no teacher, or one with other tokens
            header = ["variant", "perplexity", "bits per byte", "top token is right", "tokens", "minutes"]
            for row in shown:
                found = row["texts"][text]
                bits, right = (found.get(key) for key in ("bits_per_byte", "student_accuracy"))
                lines.append(
                    [row["name"], f"{float(found['student_perplexity']):.2f}", "-" if bits is None else f"{bits:.4f}"]
                    + ["-" if right is None else f"{right:.1%}", f"{row['tokens']:,}", f"{row['seconds'] / 60:.1f}"]
                )
            tables.append((f"On {about}", header, lines))
            continue
        for row in shown:
            found = row["texts"][text]
            lines.append(
                [
                    row["name"],
                    f"{float(found['student_perplexity']):.2f}",
                    f"{float(found['perplexity_ratio']):.3f}",
                    f"{float(found['kl']):.4f}",
                    f"{found['top1_agreement']:.1%}",
                    f"{row['tokens']:,}",
                    f"{row['seconds'] / 60:.1f}",
                ]
            )
        teacher = float(shown[0]["texts"][text]["teacher_perplexity"])
        header = ["variant", "perplexity", "ratio", "KL (nats)", "same top token", "tokens", "minutes"]
        tables.append((f"On {about} (the teacher's perplexity: {teacher:.2f})", header, lines))
    return tables

"""Which phases of a run are done, and from which checkpoint the others would go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.core.folders import MANIFEST, why_incomplete
from mohawk.core.run_folder import COMPOSED, STUDENT, phase_folder, phase_student
from mohawk.schema.kinds import phase_names

if TYPE_CHECKING:
    from rich.console import Console


def print_run(folder: Path, console: Console) -> None:
    """Which phases of a run are done, and from which checkpoint the others would go on."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.core.folders import newest_complete
    from mohawk.core.json_files import read_json
    from mohawk.runs.kept import Composed
    from mohawk.schema.kinds import load_run_recipe

    recipe = load_run_recipe(folder)
    asked = {name for name, _ in recipe.phases.active()} if isinstance(recipe, Recipe) else set(phase_names(folder))
    composed, elsewhere = read_json(folder / COMPOSED, Composed), set()
    if composed is not None:
        elsewhere = asked - {"end_to_end"}
        kept = ", ".join(map(str, composed["attention"])) or "none"
        budget = composed.get("budget")
        chosen = "" if budget is None else f", chosen for a budget of {budget} by {composed.get('by')}"
        if interval := composed.get("interval"):
            chosen = f", at an interval of {interval}"
        console.print(
            f"composed of the mixers of {composed['run']}; attention layers: {kept}{chosen}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        for other in composed.get("others", []):
            layers = ", ".join(map(str, other["layers"]))
            console.print(f"layers {layers}: of {other['run']}", highlight=False, soft_wrap=True, markup=False)
    names = phase_names(folder)
    reached = max((i for i, name in enumerate(names) if _left(folder, name)), default=-1)
    for i, name in enumerate(names):
        phase = phase_folder(folder, name)
        if composed is not None and name in elsewhere:
            state = f"done in {composed['run']}"
        elif name not in asked:
            state = "left out (null in the recipe)"
        elif _left(folder, name):
            kept = phase / STUDENT
            problem = why_incomplete(kept, remembered=True) if (kept / MANIFEST).exists() else None
            state = "done" if problem is None else f"damaged ({problem})"
        elif i < reached:
            state = "done, but its student is missing"
        elif checkpoint := newest_complete(phase) if phase.is_dir() else None:
            state = f"stopped at {checkpoint.name}"
        else:
            state = "not begun"
        console.print(f"{name}: {state}", highlight=False, soft_wrap=True, markup=False)


def _left(folder: Path, name: str) -> bool:
    """Whether a phase has left a student."""
    return (phase_student(folder, name) / "config.json").is_file()

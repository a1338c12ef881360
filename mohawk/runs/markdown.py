"""report.md: a run's tables, continuations, plots, machine and recipe, and the sentences it shares with the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohawk.loading.tasks import CAUSAL
from mohawk.measures.consistency import PATHS, broken_in
from mohawk.runs.tables import tables, who_of
from mohawk.runs.verdict import verdict

CAPTIONS = {
    "losses.png": "Loss of each phase",
    "evaluation.png": "Evaluation before phase 1 and after each phase",
    "mixing_matrices.png": "Mixing matrices of teacher and student",
    "positions.png": "Perplexity by position in long texts",
    "retrieval.png": "Retrieval: share of answers that are right, by length of the text and depth in it",
    "tasks.png": "Tasks of lm-evaluation-harness",
}
TOO_LARGE = (
    "Speed, state sizes, continuations, and whether the student answers step by step as in one pass, were not "
    "measured: student and teacher together do not fit into one process. `mohawk evaluate` measures them where they do."
)


def to_markdown(results: Mapping[str, Any], recipe: str, name: str) -> str:
    """report.md: the verdict, the tables, the continuations, the plots, the machine and the recipe."""
    parts = [f"# {name}\n\n{results['architecture']}"]
    parts += [] if results["teacher"] is None else [f"Teacher: `{results['teacher']}`"]
    parts.append("\n".join(f"- **{line.asks}**: {line.says}" for line in verdict(results)))
    for title, header, rows in tables(results):
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
        parts.append(f"## {title}\n\n" + "\n".join(lines))
    parts += notes(results)
    if said := results["continuations"]:
        quoted = [f"The prompt:\n\n{_indented(said['prompt'])}"]
        quoted += [f"The {who}:\n\n{_indented(said[who])}" for who in who_of(said)]
        parts.append("## Greedy continuations\n\n" + "\n\n".join(quoted))
    if results["plots"]:
        images = [f"![{caption(plot)}]({plot})" for plot in results["plots"]]
        parts.append("## Plots\n\n" + "\n\n".join(images))
    parts.append("## Machine\n\n" + "\n".join(f"- {line}" for line in machine_lines(results["machine"])))
    parts.append(f"## Recipe\n\n```yaml\n{recipe.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def caption(plot: str) -> str:
    """What stands below a plot of this name."""
    name = Path(plot)
    return CAPTIONS.get(name.name, name.stem.replace("_", " "))


def machine_lines(found: Mapping[str, Any]) -> list[str]:
    """Versions, the run's device, all devices, the system."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return [versions, f"run on {found['device']}", *found["devices"], found["system"]]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences below the tables: by which ways the student was seen to decode, what was not measured."""
    said, dtype = [], results.get("decoded_in") or results["dtypes"]["student"]
    if consistency := results.get("consistency"):
        said.append(_consistency_line(consistency, dtype))
    causal = results.get("task", CAUSAL) == CAUSAL  # others write no text
    return said if results["continuations"] or not causal else [*said, TOO_LARGE]


def _consistency_line(found: Mapping[str, float], dtype: str) -> str:
    if broken := broken_in(found, dtype):
        return f"The student does not answer as in one full forward: {broken}."
    ways = ", ".join(PATHS[path] for path in found if path in PATHS)
    return (
        f"The student answers as in one full forward by every way tried ({ways}): logits differ by at most "
        f"{max(found.values()):.0e} of the largest."
    )


def _indented(text: str) -> str:
    # an indented block shows any text as it is, whatever marks it contains
    return "\n".join(f"    {line}" for line in text.strip("\n").splitlines() or [""])

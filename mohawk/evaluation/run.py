"""`mohawk evaluate`: a run's student against its teacher once more, on the run's texts or on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mohawk.conversion.recipe import Recipe
from mohawk.core.json_files import write_json
from mohawk.core.places import home
from mohawk.core.run_folder import again_file, has_recipe
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.loading.describe import student_folder
from mohawk.pruning.recipe import PruneRecipe
from mohawk.schema.base import RecipeFile
from mohawk.schema.kinds import load_run_recipe, trims_vocabulary

if TYPE_CHECKING:
    from mohawk.runs.context import RunContext


def evaluate_run(run: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> dict:
    """Compare, time decoding, print both and write them to RUN/evaluation/again.json.

    overrides: of the run's recipe, such as `data.evaluation=[other.txt]` or `evaluation.tokens=1e6`; those
    that concern the student or its training change nothing. Returns what was written. Raises UserError.
    """
    folder, console = home(run), console or Console()
    if not has_recipe(folder):
        raise UserError(f"{run} is not a run's folder: it holds no recipe.yaml")
    recipe = load_run_recipe(folder, overrides)
    name = student_folder(folder)

    if trims_vocabulary(recipe):
        raise UserError(
            f"{run}: its student numbers tokens anew (prune.vocabulary), so it cannot be compared token by token; "
            "results.json has what was measured before, and --tasks compares answers"
        )

    from mohawk.data.same_tokenizer import check_same, own_tokenizer, teacher_tokenizer
    from mohawk.loading.models import load_teacher
    from mohawk.measures.compare import compare, decode_speed

    about = recipe.teacher
    if (own := own_tokenizer(name, who="student")) is not None:  # before models are loaded
        check_same(teacher_tokenizer(about.model, tokenizer=about.tokenizer, **about.where), own, name)
    context = _opened(recipe, folder, console)
    student = load_teacher(name, device=context.device, who="student")
    texts = {
        text: asdict(compare(student, states, autocast=context.autocast)) for text, states in context.texts.items()
    }
    asked = recipe.evaluation
    speeds = {
        kind: [asdict(speed) for speed in decode_speed(model, asked.contexts, asked.decode_tokens)]
        for kind, model in (("teacher", context.teacher), ("student", student))
    }
    results = {"student": name, "overrides": list(overrides), "texts": texts, "decoding": speeds}
    target = again_file(folder)
    write_json(target, results)

    table = Table("text", "tokens", "teacher", "student", "ratio", "KL", "same top token", title=name)
    for text, found in texts.items():
        table.add_row(
            text.replace("_", "-"),
            f"{found['tokens']:,}",
            f"{found['teacher_perplexity']:.2f}",
            f"{found['student_perplexity']:.2f}",
            f"{found['perplexity_ratio']:.3f}",
            f"{found['kl']:.4f}",
            f"{found['top1_agreement']:.1%}",
        )
    console.print(table)
    table = Table("decoding", "context", "tokens/s", "state bytes")
    for kind, measured in speeds.items():
        for speed in measured:
            row = f"{speed['context']:,}", f"{speed['tokens_per_s']:.1f}", f"{speed['state_bytes']:,}"
            table.add_row(kind, *row)
    console.print(table)
    console.print(f"written to {target}", highlight=False, soft_wrap=True, markup=False)
    return results


def _opened(recipe: RecipeFile, folder: Path, console: Console) -> RunContext:
    """The run's teacher and texts, as its own kind reads them."""
    if isinstance(recipe, Recipe):
        from mohawk.conversion.run import opened as converted

        return converted(recipe, folder, console, trains=False)
    if isinstance(recipe, PruneRecipe):
        from mohawk.pruning.run import opened as pruned

        return pruned(recipe, folder, console, trains=False)
    assert isinstance(recipe, DistillRecipe)
    from mohawk.distillation.run import opened as distilled

    return distilled(recipe, folder, console, trains=False)

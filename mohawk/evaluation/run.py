"""`mohawk evaluate`: a run's student against its teacher once more, on the run's texts or on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mohawk.conversion.recipe import Recipe
from mohawk.core.json_files import write_json
from mohawk.core.places import home
from mohawk.core.processes import from_first, is_first, joined, on_first
from mohawk.core.run_folder import again_file, has_recipe
from mohawk.data.tokenizers.run_tokenizers import why_uncompared
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.loading.describe import student_folder
from mohawk.loading.tasks import CAUSAL, task_in
from mohawk.pruning.recipe import PruneRecipe
from mohawk.runs.tables import agreement_tables, behaviour_tables, print_tables
from mohawk.runs.verdict import fitness
from mohawk.schema.base import RecipeFile
from mohawk.schema.kinds import load_run_recipe, trims_vocabulary

if TYPE_CHECKING:
    from mohawk.runs.context import RunContext
    from mohawk.runs.sharding import Parts


def evaluate_run(run: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> dict:
    """Compare, time decoding, print both and write them to RUN/evaluation/again.json; in all the processes that
    torchrun or accelerate started.

    overrides: of the run's recipe, such as `data.evaluation=[other.txt]` or `evaluation.tokens=1e6`; those
    that concern the student or its training change nothing. Returns what was written. Raises UserError, also, when all
    is written, for a student whose decoding is broken.
    """
    folder = home(run)
    if not has_recipe(folder):
        raise UserError(f"{run} is not a run's folder: it holds no recipe.yaml")
    recipe = load_run_recipe(folder, overrides)
    name = student_folder(folder)

    if (task := task_in(recipe)) != CAUSAL:
        raise UserError(
            f"{run}: is of task: {task}, which `mohawk evaluate` does not measure; its results.json and report.md "
            "have what was"
        )
    if trims_vocabulary(recipe):
        raise UserError(
            f"{run}: its student numbers tokens anew (prune.vocabulary), so it cannot be compared token by token; "
            "results.json has what was measured before, and --tasks compares answers"
        )

    if (why := why_uncompared(recipe)) is not None:
        raise UserError(
            f"{run}: its student cannot be compared token by token: {why}; results.json has what was measured, bits "
            "per byte among it"
        )

    with joined(recipe.device):
        return _evaluate(recipe, folder, name, overrides, console or Console(quiet=not is_first()))


def _evaluate(recipe: RecipeFile, folder: Path, name: str, overrides: Sequence[str], console: Console) -> dict:
    from mohawk.data.tokenizers.same_tokenizer import check_same, own_tokenizer, teacher_tokenizer
    from mohawk.loading.models import load_teacher
    from mohawk.measures.behaviour import behaviour
    from mohawk.measures.compare import compare, contexts_within, decode_speed
    from mohawk.measures.consistency import broken_in, inconsistencies, some_tokens
    from mohawk.runs.report import fingerprint, report_consistency
    from mohawk.runs.steps import long_rows, whole_models

    about = recipe.teacher
    if (own := own_tokenizer(name, who="student")) is not None:  # before models are loaded
        check_same(teacher_tokenizer(about.model, tokenizer=about.tokenizer, **about.where), own, name)
    context = opened(recipe, folder, console, measured_in_parts(recipe, name))
    student = load_teacher(name, device=context.device, spread=context.spread_teacher, who="student")
    texts = {
        text: asdict(compare(student, states, autocast=context.autocast)) for text, states in context.texts.items()
    }
    asked, corrected = recipe.evaluation, corrected_teacher(recipe, folder)

    def by_one() -> dict[str, Any]:
        """What one process measures of whole models."""
        models = whole_models(context, student, corrected=corrected, folder=name, dtype="float32")
        if models is None:
            console.print("decoding is not timed: student and teacher together do not fit into one process")
            return {"decoding": {}}
        both = {"teacher": models[1], "student": models[0]}
        contexts = contexts_within(list(both.values()), asked.contexts, asked.decode_tokens)
        return {
            "decoding": {
                kind: [asdict(speed) for speed in decode_speed(model, contexts, asked.decode_tokens)]
                for kind, model in both.items()
            },
            "consistency": inconsistencies(models[0].eval(), some_tokens(models[0])),
            "dtype": str(models[0].dtype).removeprefix("torch."),
            "behaviour": {} if asked.longest is None else behaviour(
                both, dict.fromkeys(both, context.tokenizer), long_rows(context), longest=asked.longest,
                new_tokens=asked.continuation_tokens,
            ),
        }  # fmt: skip

    measured = from_first(by_one)
    speeds, consistency = measured["decoding"], measured.get("consistency") or {}
    results = {"student": name, "fingerprint": fingerprint(name), "overrides": list(overrides), "texts": texts}
    results |= measured
    target = again_file(folder)
    on_first(lambda: write_json(target, results))

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
    print_tables(agreement_tables(texts) + behaviour_tables(measured.get("behaviour") or {}), console)
    table = Table("decoding", "context", "tokens/s", "state bytes")
    for kind, timed in speeds.items():
        for speed in timed:
            row = f"{speed['context']:,}", f"{speed['tokens_per_s']:.1f}", f"{speed['state_bytes']:,}"
            table.add_row(kind, *row)
    if speeds:
        console.print(table)
    console.print(f"written to {target}", highlight=False, soft_wrap=True, markup=False)
    if consistency:
        dtype = measured["dtype"]
        line = fitness(consistency, dtype)
        console.print(f"{line.asks}: {line.says}", highlight=False, soft_wrap=True, markup=False)
        on_first(lambda: report_consistency(folder, name, consistency, dtype))
        if broken := broken_in(consistency, dtype):
            raise UserError(
                f"{name}: the student does not answer as its own full forward does: {broken}; `mohawk doctor` says "
                "whether the installed versions are ones that mohawk was tested with"
            )
    return results


def measured_in_parts(recipe: RecipeFile, student: str) -> Parts | None:
    """How a run's teacher and student are spread while they are measured. Raises UserError."""
    from mohawk.distillation.plan import bytes_of
    from mohawk.loading.configs import load_config
    from mohawk.loading.models import model_shape, parameter_count
    from mohawk.runs.sharding import parts_to_ask

    def needed() -> int:
        about = recipe.teacher
        teacher = model_shape(load_config(about.model, **about.where), about.trust_remote_code)
        own = model_shape(load_config(student, who="student"), who="student")
        return parameter_count(teacher) * bytes_of(about) + 4 * parameter_count(own)

    return parts_to_ask(recipe, needed)


def corrected_teacher(recipe: RecipeFile, folder: Path) -> Path | None:
    """Where a pruning's teacher lies that was corrected; None: it is the recipe's own."""
    if not isinstance(recipe, PruneRecipe):
        return None
    from mohawk.pruning.run import corrected_teacher as of_pruning

    return of_pruning(recipe, folder)


def opened(recipe: RecipeFile, folder: Path, console: Console, parts: Parts | None) -> RunContext:
    """The run's teacher and texts, as its own kind reads them."""
    if isinstance(recipe, Recipe):
        from mohawk.conversion.run import opened as converted

        return converted(recipe, folder, console, trains=False, parts=parts)
    if isinstance(recipe, PruneRecipe):
        from mohawk.pruning.run import opened as pruned

        return pruned(recipe, folder, console, trains=False, parts=parts)
    assert isinstance(recipe, DistillRecipe)
    from mohawk.distillation.run import opened as distilled

    return distilled(recipe, folder, console, trains=False, parts=parts)

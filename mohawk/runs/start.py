"""How every kind of run begins: its plan, what can be checked before weights are loaded, its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets  # noqa: F401  # texts are read with it later: what it lacks is said before anything else
from rich.console import Console

from mohawk.core.processes import first_before_others, is_first, joined, on_first
from mohawk.runs.claim import check_folder, claimed
from mohawk.runs.inputs import check_inputs
from mohawk.runs.sharding import check_sharding
from mohawk.training.progress import log_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.schema.base import RecipeFile


def start(
    recipe: RecipeFile,
    *,
    dry_run: bool,
    plan: Callable[[Console], Any],
    work: Callable[[Path, Console, Any], None],
    further: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> None:
    """Print the plan, check what the recipe names and, unless this is a dry run, do the work in the run's folder.

    In all the processes that torchrun or accelerate started. plan: prints it; what it gives is handed on to `work`.
    further: see `check_inputs`. Raises UserError.
    """
    with joined(recipe.device):
        console, run = Console(quiet=not is_first()), Path(recipe.output)
        check_sharding(recipe)
        planned = plan(console)
        read = first_before_others(lambda: check_inputs(recipe, planning=dry_run, further=further))
        if dry_run:
            console.print(read, highlight=False)
            on_first(lambda: check_folder(run, recipe))
            return
        with claimed(run, recipe), log_to(run):
            work(run, console, planned)

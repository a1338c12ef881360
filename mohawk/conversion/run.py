"""A recipe, run: checkpoint -> student -> phase 1 -> phase 2 -> phase 3 -> evaluation -> a student that generates."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from mohawk.conversion.plan import make_plan, objective_for, print_plan, student_options
from mohawk.conversion.readout import solve_output_projections
from mohawk.conversion.recipe import Recipe
from mohawk.core.processes import first_before_others, from_first, is_first, joined, on_first
from mohawk.core.run_folder import COMPOSED
from mohawk.data.packing import PackedDataset, collate
from mohawk.errors import UserError
from mohawk.loading.models import load_config, load_teacher
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.runs.inputs import check_inputs
from mohawk.runs.matrices import draw_matrices, save_matrices
from mohawk.runs.report import AFTER, finish, loss_labels
from mohawk.runs.run import Run, check_folder, claimed
from mohawk.training.progress import log_to

log = logging.getLogger(__name__)


def convert(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Run a recipe to its end, or go on with it; in all the processes that torchrun or accelerate started.

    Args:
        recipe: checked by `Recipe.load` or `Recipe.from_dict`.
        dry_run: print the plan and return; the teacher's configuration and tokenizer and texts' first rows are read.

    Raises:
        UserError: the teacher cannot be loaded or converted, the data hold no text, or the output folder holds the
            run of another recipe.
        Interrupted: a signal stopped the run after it saved.
    """
    with joined(recipe.device):
        console = Console(quiet=not is_first())
        config = first_before_others(
            lambda: load_config(
                recipe.teacher.model, gguf_file=recipe.teacher.gguf_file, revision=recipe.teacher.revision,
                trust_remote_code=recipe.teacher.trust_remote_code,
            )
        )  # fmt: skip
        plan = make_plan(recipe, config)
        read = first_before_others(lambda: check_inputs(recipe, planning=dry_run))
        print_plan(plan, recipe, console)
        run = Path(recipe.output)
        if dry_run:
            console.print(read, highlight=False)
            on_first(lambda: check_folder(run, recipe))
            return
        with claimed(run, recipe), log_to(run):
            Conversion(recipe, run, console).run()


class Conversion(Run):
    """One conversion: the phases of its recipe, one after another."""

    def run(self) -> None:
        start = time.monotonic()
        phases = list(self.recipe.phases.active())
        finished = max((i for i, (name, _) in enumerate(phases) if self._is_complete(name)), default=-1)
        if finished < 0 and (self.folder / COMPOSED).is_file():
            raise UserError(f"{self.folder}: the composed student is missing or damaged; run mohawk compose again")
        student = untrained_student(self.recipe, self.teacher)
        self._evaluate("before", student)
        names, reached = [name for name, _ in phases], True  # whether `student` is what the next phase begins with
        for i, (name, phase) in enumerate(phases):
            before = names[i - 1] if i else None
            lost = self._lost(name) if i <= finished else []
            if i <= finished and not lost:
                student, reached = load_teacher(self._student(name), device=self.device).requires_grad_(True), True
            elif i <= finished and (self.folder / COMPOSED).is_file():  # another run trained it
                continue
            elif i > finished or self._is_made_again(name, phase, names, lost, reached):
                if i > finished:
                    self._forget(name)  # what was measured of a student that was deleted or damaged since
                self._train(name, phase, student, before)
                self._write_student(name, student, before)
            else:
                reached = False
                continue
            self._evaluate(name, student)
        on_first(lambda: self._finish(student, phases[-1][0] if phases else None))
        log.info("run finished in %.0f s", time.monotonic() - start)

    def _finish(self, student: HybridForCausalLM, last: str | None) -> None:
        """The final student, which is that of the last phase, and the report."""
        if not self._is_final(last):
            self._write_final(student, last)
        draw_matrices(self.folder)
        finish(
            self.folder, self.recipe, student.eval(), self.teacher, self.tokenizer, self.console,
            stages=AFTER, labels=loss_labels(self.recipe),
        )  # fmt: skip

    def _train(self, name: str, phase, student: HybridForCausalLM, before: str | None) -> None:
        dataset = self._rows(name, phase)
        objective = objective_for(name, phase, student, self.teacher)
        trainer = self._trainer(name, phase, objective, dataset, origin=from_first(lambda: self._origin(before)))
        if name == "hidden" and phase.solve_tokens and not self._has_checkpoint(trainer):
            self._solve(phase, student, dataset)
        self._fit(trainer, student)
        student.requires_grad_(True)
        del trainer, objective
        gc.collect()  # the optimizer's state, before the evaluation that follows

    def _evaluated(self, stage: str, student: nn.Module) -> None:
        if stage in ("before", "mixing"):
            save_matrices(self.folder, stage, student, self.teacher, self.sample())

    def _solve(self, phase, student: HybridForCausalLM, dataset: PackedDataset) -> None:
        """Least squares for every out_proj, from the first rows of the phase's text."""
        rows = min(len(dataset), -(-phase.solve_tokens // phase.sequence_length))
        log.info("hidden: solving output projections on %d tokens", rows * phase.sequence_length)
        batches = (
            collate([dataset[i] for i in range(start, min(start + phase.batch_size, rows))])
            for start in range(0, rows, phase.batch_size)
        )
        solve_output_projections(student, self.teacher, batches, autocast=self.autocast)


def untrained_student(recipe: Recipe, teacher: nn.Module) -> HybridForCausalLM:
    """The student before phase 1; the same one whenever it is made again."""
    torch.manual_seed(recipe.seed)
    student = hybrid_from_teacher(teacher, **student_options(recipe.student))
    return student.float()  # trained in float32 whatever the teacher's dtype; autocast chooses the products'

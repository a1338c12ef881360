"""What every run has: a folder that is one recipe's, a teacher, text, and what is measured of a student on it.

Everything a run makes lies in its folder, each part whole or absent, so the same command goes on where a stopped run
was: a finished phase is its `student/` folder, an unfinished one has checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from mohawk.core.folders import (
    about_of,
    drop_file,
    is_complete,
    locked,
    newest_complete,
    weights_sum,
    why_altered,
    write_whole,
)
from mohawk.core.json_files import read_json, write_json, write_text
from mohawk.core.precision import autocast_dtype, pick_device
from mohawk.core.processes import count, first_before_others, from_first, on_first
from mohawk.core.run_folder import RECIPE, RESULTS, RUN_FILE, STUDENT, evaluation_file, phase_folder, phase_student
from mohawk.data.packing import Data, PackedDataset, collate, load_data
from mohawk.data.same_tokenizer import teacher_tokenizer
from mohawk.errors import UserError
from mohawk.loading.models import load_teacher
from mohawk.loading.nonfinite import refuse_nonfinite
from mohawk.loading.remote_code import add_code
from mohawk.measures.compare import TeacherStates, compare, teacher_states
from mohawk.runs.binding import bind, bound, of_this_run, record_of, write_bound
from mohawk.runs.kept import Compared
from mohawk.training.trainer import PhaseTrainer, is_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# What may change when a stopped run goes on: what does not decide what the steps so far meant,
CHANGEABLE = (
    "device",
    ".save_every",
    ".save_minutes",
    ".keep_checkpoints",
    ".log_every",
    ".decode_tokens",
    ".contexts",
    ".prompt",
    ".continuation_tokens",
)
UNTIL_FINISHED = (".learning_rate", ".max_grad_norm")  # and in a phase that still has steps to come, or has to begin
PLACES = ("output", "data.cache")  # a moved run is the same run


@contextmanager
def claimed(run: Path, recipe: Any) -> Iterator[None]:
    """Within the block the folder is this recipe's and this process's, or this program's in several processes.

    recipe: of any kind: it has `load`, `to_yaml`, `model_dump` and `output`.

    Raises:
        UserError: the folder is another recipe's, another program's, in use, or cannot be written.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_claimed(run, recipe)))
        yield


@contextmanager
def _claimed(run: Path, recipe: Any) -> Iterator[None]:
    written = run / RECIPE
    with ExitStack() as stack:
        try:
            changed = _changes(run, recipe)
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run))
            write_bound(run, recipe)  # first: of the two it is the one to go by
            write_text(written, recipe.to_yaml())
        except OSError as error:
            raise UserError(f"output: {run} cannot be written ({error.strerror}); choose another output") from error
        if changed:
            log.info("resuming; changed since the last start: %s", ", ".join(changed))
        yield


def check_folder(run: Path, recipe: Any) -> None:
    """UserError where `claimed` would refuse the folder; nothing is written."""
    there = next(place for place in (run, *run.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"output: {run} cannot be written, as {there} is no folder to write into; choose another output"
        )
    _changes(run, recipe)


def _changes(run: Path, recipe: Any) -> list[str]:
    """Dotted names of the fields that differ from the recipe already in `run`.

    Raises UserError if the folder holds something else, another kind of run, or a run that cannot be resumed with these
    differences.
    """
    if not any((run / name).is_file() for name in (RECIPE, RUN_FILE)):
        if run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"output: {run} exists and is not a run of mohawk; choose another output")
        return []
    changed = _changed(_written(run, type(recipe)), recipe)
    if fixed := [name for name in changed if not _changeable(run, recipe, name)]:
        raise UserError(
            f"output: {run} holds a run that was started with another {', '.join(fixed)}; choose another output, or "
            "delete the folder to start over"
        )
    return changed


def _written(run: Path, kind: type) -> Any:
    """The recipe of the run that is there: run.json's, which no one edits; of an earlier version's run, recipe.yaml."""
    path, known = run / RECIPE, bound(run)
    if known is not None and path.is_file() and (problem := why_altered(path)) is not None:
        log.warning("%s %s; going by %s", path, problem, RUN_FILE)
    try:
        return kind.load(path) if known is None else kind.from_dict(known["recipe"])
    except UserError as error:
        line = str(error).splitlines()[0]
        if known is None and path.is_file() and not path.read_bytes().strip():
            raise UserError(f"output: {path} is empty; put the run's recipe there, or choose another output") from error
        raise UserError(f"output: {run} holds a run of another kind ({line}); choose another output") from error


def _changeable(run: Path, recipe: Any, name: str) -> bool:
    """Whether a field of a run's recipe, by its dotted name, may differ from what it was."""
    if name.endswith(UNTIL_FINISHED):
        kind, which, *_ = name.split(".")
        if kind == "phases":
            steps = dict(recipe.phases.active())
        elif kind == "stages":
            steps = {stage.name: stage for stage in recipe.stages}
            which = recipe.stages[int(which)].name  # as its folder is called
        else:
            return False
        order = list(steps)
        folder = phase_folder(run, which)
        # with a later one's student this one is not trained again, wherever its own has gone
        trained = any(phase_student(run, step).exists() for step in order[order.index(which) :])
        return not trained and not is_over(folder, steps[which], count())
    return name in PLACES or name.endswith(CHANGEABLE)


def _changed(old: Any, new: Any) -> list[str]:
    """Dotted names of the fields that differ: `stages.0.tokens`, or `number of stages` where that differs."""

    def walk(before: Any, after: Any, at: str) -> Iterator[str]:
        inside = f"{at}." if at else ""
        if isinstance(before, dict) and isinstance(after, dict):
            for key in before.keys() | after.keys():
                yield from walk(before.get(key), after.get(key), f"{inside}{key}")
        elif _mappings(before) and _mappings(after) and len(before) == len(after):
            for i, pair in enumerate(zip(before, after, strict=True)):
                yield from walk(*pair, f"{inside}{i}")
        elif before != after:
            lists = _mappings(before) and _mappings(after)
            yield f"number of {at}" if lists else at

    return sorted(walk(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def _mappings(value: Any) -> bool:
    """Whether it is a list of sections, as stages are, rather than one of numbers or words."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


class Run:
    """The state of one run: its folder, teacher, text, and the measurements on it.

    trains: False where a run is only measured, on another text perhaps.
    """

    def __init__(self, recipe: Any, run: Path, console: Console, *, trains: bool = True):
        self.trains = trains
        self.recipe, self.folder, self.console = recipe, run, console
        self.device = pick_device(recipe.device)
        self.autocast = autocast_dtype(recipe.precision, self.device)
        teacher = recipe.teacher
        where = {"gguf_file": teacher.gguf_file, "revision": teacher.revision}
        self.tokenizer = first_before_others(
            lambda: teacher_tokenizer(
                teacher.model, tokenizer=teacher.tokenizer, trust_remote_code=teacher.trust_remote_code, **where
            )
        )
        self.data = first_before_others(self._load_data)
        on_first(self._bind)
        self.teacher = self._load_teacher()
        self._check_tokens()
        # where everything is measured
        self.texts = on_first(self._evaluation_texts) or {}

    def _bind(self) -> None:
        """This run reads what it began with."""
        precision = str(self.autocast or "float32").removeprefix("torch.")
        bind(self.folder, self.recipe, self.tokenizer, precision, record=self.trains)

    def _load_teacher(self) -> PreTrainedModel:
        teacher = self.recipe.teacher
        return load_teacher(
            teacher.model, gguf_file=teacher.gguf_file, revision=teacher.revision, dtype=teacher.dtype,
            trust_remote_code=teacher.trust_remote_code, device=self.device,
        )  # fmt: skip

    def _load_data(self) -> Data:
        data = self.recipe.data
        return load_data(
            [source.model_dump() for source in data.train], self.tokenizer,
            evaluation=[source.model_dump() for source in data.evaluation],
            validation_share=data.validation_share, cache=data.cache,
        )  # fmt: skip

    def _evaluation_texts(self) -> dict[str, TeacherStates]:
        """The teacher's answers on held-out text of the training sources and, where given, on another source's."""
        asked = self.recipe.evaluation
        documents = {"held_out": self.data.held_out, "evaluation": self.data.evaluation}
        texts = {}
        for name, kept in documents.items():
            if kept is None or not kept.tokens:
                continue
            length = min(asked.sequence_length, kept.tokens)
            rows = PackedDataset(kept, length, tokens=min(asked.tokens, kept.tokens), seed=0, pad_token_id=self._pad())
            texts[name] = teacher_states(self.teacher, rows, batch_size=asked.batch_size, autocast=self.autocast)
        return texts

    def _evaluate(self, stage: str, student: PreTrainedModel) -> None:
        """Compares with the teacher on every text, once a stage."""
        on_first(lambda: self._measure(stage, student))

    def _measure(self, stage: str, student: PreTrainedModel) -> None:
        path = evaluation_file(self.folder, stage)
        if read_json(path, dict[str, Compared]) is not None:
            return
        results = {
            name: asdict(compare(student, states, autocast=self.autocast)) for name, states in self.texts.items()
        }
        self._evaluated(stage, student)
        write_json(path, results)
        for name, result in results.items():
            log.info("%s, %s: %s", stage, name, json.dumps(result))
            self.console.print(
                f"[bold]{stage}[/bold] on {name.replace('_', '-')} text: perplexity {result['student_perplexity']:.2f} "
                f"(teacher {result['teacher_perplexity']:.2f}, ratio {result['perplexity_ratio']:.3f}), "
                f"KL {result['kl']:.4f}, same first choice {result['top1_agreement']:.1%}"
            )

    def _evaluated(self, stage: str, student: PreTrainedModel) -> None:
        """What a kind of run keeps beside the figures of a stage, before they are written."""

    def _student(self, phase: str) -> Path:
        return phase_student(self.folder, phase)

    def _is_complete(self, phase: str) -> bool:
        """Whether a phase's student is there, and this run's; the same on all processes."""

        def complete() -> bool:
            folder = self._student(phase)
            if not is_complete(folder):
                return False
            if not of_this_run(self.folder, about_of(folder)):
                raise UserError(
                    f"{folder}: is of another run; put this one's back, or delete it to train the phase again"
                )
            return True

        return from_first(complete)

    def _lost(self, step: str) -> list[Path]:
        """What a step left that is missing or damaged."""
        return [] if self._is_complete(step) else [self._student(step)]

    def _is_made_again(
        self, step: str, settings: Any, steps: Sequence[str], lost: Sequence[Path], reached: bool
    ) -> bool:
        """Whether all that a step left is made again of its last checkpoint, without training; else one line says how
        to have it again.

        steps: all of the run. lost: what `_lost` found. reached: the student that the step begins with is there.
        """
        again = reached and from_first(lambda: is_over(phase_folder(self.folder, step), settings, count()))
        names = ", ".join(map(str, lost))
        if again:
            log.warning("%s is missing or damaged; making it again of the last checkpoint of %s", names, step)
        else:
            rest = " ".join(str(phase_folder(self.folder, name)) for name in steps[steps.index(step) :])
            log.warning(
                "%s is missing or damaged; going on without it. To have it again, and train what comes after it anew, "
                "run: rm -r %s, then the same command", names, rest,
            )  # fmt: skip
        return again

    def _origin(self, before: str | None) -> dict[str, Any]:
        """What a step's checkpoints and student are of: this run, its inputs, the weights that the step before left."""
        of = record_of(self.folder)
        left = None if before is None else weights_sum(self._student(before))
        return of if left is None else of | {"from": left}

    def _is_final(self, last: str | None) -> bool:
        """Whether the run's student is whole, and made of the one that the last step left."""
        final = self.folder / STUDENT
        if not is_complete(final):
            return False
        made_from = about_of(final).get("from")
        return made_from == self._origin(last).get("from") if about_of(final) else self._same_weights(final, last)

    def _same_weights(self, final: Path, last: str | None) -> bool:
        """Of a student of an earlier version, which does not say what it is made of."""
        return last is None or weights_sum(final) == weights_sum(self._student(last))

    def _save(self, folder: Path, student: PreTrainedModel, about: dict[str, Any], tokenizer: Any = None) -> None:
        """A student's folder. Raises UserError, and leaves what is there, where a weight is not finite."""
        refuse_nonfinite(student, f"{folder}: this student", "it is not written; lower the learning rate")
        if folder == self.folder / STUDENT:
            drop_file(self.folder / RESULTS)  # speeds and continuations of an earlier one
        with write_whole(folder, replace=True, about=about) as partial:
            student.save_pretrained(partial)
            add_code(partial, student)
            if tokenizer is not None:  # a student to be used
                tokenizer.save_pretrained(partial)

    def _has_checkpoint(self, trainer: PhaseTrainer) -> bool:
        return from_first(lambda: newest_complete(trainer.folder) is not None)

    def _forget(self, stage: str) -> None:
        def forget() -> None:
            for path in (evaluation_file(self.folder, stage), self.folder / RESULTS):
                drop_file(path)

        on_first(forget)

    def _write_student(self, phase: str, student: PreTrainedModel, before: str | None) -> None:
        """After a phase: when this returns, it is there. before: the phase before it, if any."""
        on_first(lambda: self._save(self._student(phase), student, self._origin(before)))

    def _write_final(self, student: PreTrainedModel, last: str | None) -> None:
        """The run's student, made of the one that the last phase left."""
        self._save(self.folder / STUDENT, student, self._origin(last), self.tokenizer)

    def _rows(self, name: str, phase: Any) -> PackedDataset:
        """The training text in rows of a phase's length."""
        dataset = PackedDataset(self.data.train, phase.sequence_length, seed=self.recipe.seed, pad_token_id=self._pad())
        passes = phase.steps() * phase.tokens_per_step / self.data.train.tokens
        if passes > 1:
            self.console.print(f"{name}: reads its {self.data.train.tokens:,} tokens of text {passes:.1f} times")
        return dataset

    def _trainer(self, name: str, phase: Any, objective: nn.Module, dataset: Any, **options: Any) -> PhaseTrainer:
        return PhaseTrainer(
            objective, name=name, phase=phase, run_dir=self.folder, train_dataset=dataset, collate=collate,
            precision=self.recipe.precision, device=self.recipe.device, seed=self.recipe.seed, **options,
        )  # fmt: skip

    def _fit(self, trainer: PhaseTrainer, student: PreTrainedModel) -> None:
        """Train a phase to its end."""
        begin = time.monotonic()
        trainer.train_phase()
        log.info("%s: %.0f s", trainer.name, time.monotonic() - begin)
        for parameter in student.parameters():
            parameter.grad = None

    def sample(self) -> torch.Tensor:
        """(1, n) tokens of evaluation text whose mixing matrices are drawn."""
        name = "evaluation" if "evaluation" in self.texts else "held_out"
        return self.texts[name].batches[0]["input_ids"][:1, :128]

    def _pad(self) -> int:
        return pad_token(self.tokenizer, self.teacher.config.get_text_config().vocab_size)

    def _check_tokens(self) -> None:
        """A tokenizer that is not the model's shows in ids the model does not have."""
        vocabulary = self.teacher.config.get_text_config().vocab_size
        for documents in (self.data.train, self.data.held_out, self.data.evaluation):
            for text in documents.texts if documents is not None else ():
                refuse_tokens(text.tokens, text.name, vocabulary)


def refuse_tokens(tokens: np.ndarray, name: str, vocabulary: int) -> None:
    """UserError where a text has ids that the teacher does not have."""
    if (largest := int(tokens.max(initial=0))) >= vocabulary:
        raise UserError(
            f"teacher.tokenizer: it makes token {largest} of {name}, but the teacher has only {vocabulary} tokens; "
            "give the teacher's own tokenizer"
        )


def pad_token(tokenizer: Any, vocabulary: int) -> int:
    """An id to fill rows with; any will do that the model has, since padding is masked everywhere."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < vocabulary:
            return token
    return 0

"""What the steps of a run share: a folder, a teacher, data, and the teacher's answers on held-out text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset

from mohawk.core.json_files import read_json, write_json
from mohawk.core.precision import autocast_dtype, pick_device
from mohawk.core.processes import first_before_others, from_first, on_first
from mohawk.core.run_folder import evaluation_file
from mohawk.data.packing import BySource, Data, load_data
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
from mohawk.errors import UserError
from mohawk.loading.causal import position_rows
from mohawk.loading.models import load_teacher
from mohawk.loading.tasks import task_in
from mohawk.losses.tasks import task_of
from mohawk.measures.agreement import acceptance_words
from mohawk.measures.alone import Alone, TextRows, alone, text_rows
from mohawk.measures.compare import Comparison, TeacherStates, compare, teacher_states
from mohawk.runs.binding import bind
from mohawk.runs.inputs import check_lengths, refuse_too_long
from mohawk.runs.kept import Compared, Told
from mohawk.runs.sharding import Parts
from mohawk.schema.base import sections
from mohawk.training.pipeline import PipelineStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.loading.parts import Spread

log = logging.getLogger(__name__)


class RunData(Protocol):
    """What a kind of run reads."""

    def texts(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name of every text, and its token ids."""
        ...

    def held_out(self, sequence_length: int, tokens: int, pad: int) -> Mapping[str, Dataset]:
        """Rows on which every student is compared with the teacher, by the name of the text they are of."""
        ...


class TextData:
    """Texts, packed by document."""

    def __init__(self, text: Data):
        self.text = text

    def texts(self) -> Iterator[tuple[str, np.ndarray]]:
        for documents in (self.text.train, self.text.held_out, self.text.evaluation):
            for text in documents.texts if documents is not None else ():
                yield text.name, text.tokens

    def held_out(self, sequence_length: int, tokens: int, pad: int) -> dict[str, Dataset]:
        """Rows of held-out text of the training sources and, where given, of another source."""
        found: dict[str, Dataset] = {}
        for name, kept in (("held_out", self.text.held_out), ("evaluation", self.text.evaluation)):
            if kept is not None and kept.tokens:
                length = min(sequence_length, kept.tokens)
                found[name] = BySource(kept, length, tokens=min(tokens, kept.tokens), seed=0, pad_token_id=pad)
        return found


D = TypeVar("D", bound=RunData)


@dataclass
class RunContext(Generic[D]):
    """What is given to everything that a run does.

    Attributes:
        autocast: what the recipe's precision is on the device; None: float32.
        data: of the recipe, tokenised.
        tokenizer: of the text, and of the student.
        teacher: the model that students are compared with; None: none.
        teacher_tokenizer: the teacher's, where its tokens are others than the text's and are aligned with them.
        texts: the teacher's answers on held-out text, by the text's name, or that text where it cannot be asked about
            these tokens; each process has some of them.
        parts: how models are spread over the processes; None: each has them whole.
        stage: which layers this process has in phases 1 and 2, where they are dealt; None: all.
        recompute: phases in which layers keep their inputs alone for the backward pass, where the recipe leaves that
            open.
        gathers: those whose student, in parts otherwise, is whole on each process while it writes samples.
    """

    recipe: Any
    folder: Path
    console: Console
    device: torch.device
    autocast: torch.dtype | None
    tokenizer: PreTrainedTokenizerBase
    data: D
    teacher: Any
    texts: Mapping[str, Any]
    parts: Parts | None = None
    stage: PipelineStage | None = None
    recompute: set[str] = field(default_factory=set)
    gathers: set[str] = field(default_factory=set)
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def spread_teacher(self) -> Spread | None:
        """What brings a model that is only asked into its parts, for `load_teacher`."""
        return None if self.parts is None else self.parts.teacher

    @property
    def spread_student(self) -> Spread | None:
        """What brings a model that trains into its parts."""
        return None if self.parts is None else self.parts.student

    @property
    def pad(self) -> int:
        """A token to fill rows with."""
        return pad_token(self.tokenizer, vocabulary_of(self.tokenizer, self.teacher, self.teacher_tokenizer))

    def ask_teacher(self) -> None:
        """Ask it for its answers on held-out text, with which every student is compared."""
        asked = self.recipe.evaluation

        rows = self.data.held_out(asked.sequence_length, asked.tokens, self.pad)
        if self.teacher is None or self.teacher_tokenizer is not None:
            self.texts = {
                name: text_rows(
                    kept, self.tokenizer, batch_size=asked.batch_size, teacher=self.teacher,
                    teacher_tokenizer=self.teacher_tokenizer, autocast=self.autocast,
                )
                for name, kept in rows.items()
            }  # fmt: skip
            return
        self.texts = {
            name: teacher_states(
                self.teacher,
                kept,
                batch_size=asked.batch_size,
                autocast=self.autocast,
                task=task_of(task_in(self.recipe)),
            )
            for name, kept in rows.items()
        }

    def sample(self) -> torch.Tensor:
        """(1, n) tokens of evaluation text whose mixing matrices are drawn; the same on all processes."""
        name = "evaluation" if "evaluation" in self.texts else "held_out"
        return from_first(lambda: self.texts[name].batches[0]["input_ids"][:1, :128])


def open_run(
    recipe: Any,
    folder: Path,
    console: Console,
    *,
    read: Callable[[PreTrainedTokenizerBase], D],
    load: Callable[[torch.device, Spread | None], PreTrainedModel] | None = None,
    trains: bool = True,
    parts: Parts | None = None,
) -> RunContext[D]:
    """Read the data, load the teacher and ask it, in this order: what is wrong with data is found in no time.

    read: the recipe's data with the teacher's tokenizer. load: the teacher, where it is not just the recipe's. trains:
    False where a run is only measured, on another text perhaps. parts: how models are spread over the processes.
    Raises UserError.
    """
    device, about = pick_device(recipe.device), recipe.teacher
    first_before_others(lambda: check_lengths(recipe))
    autocast = autocast_dtype(recipe.precision, device)
    tokenizers = first_before_others(lambda: run_tokenizers(recipe))
    tokenizer = tokenizers.text
    data = first_before_others(lambda: read(tokenizer))
    precision = str(autocast or "float32").removeprefix("torch.")
    on_first(lambda: bind(folder, recipe, tokenizer, precision, record=trains))
    spread = None if parts is None else parts.teacher
    if about is None:
        teacher = None
    elif load is None:
        teacher = load_teacher(about.model, dtype=about.dtype, device=device, spread=spread, **about.where)
    else:
        teacher = load(device, spread)
    if teacher is not None and tokenizers.teacher is None:
        for name, tokens in data.texts():
            refuse_tokens(tokens, name, teacher.config.get_text_config().vocab_size)
        _refuse_lengths(recipe, teacher)
    run = RunContext(
        recipe, folder, console, device, autocast, tokenizer, data, teacher, {}, parts,
        teacher_tokenizer=tokenizers.teacher,
    )  # fmt: skip
    run.ask_teacher()
    return run


def _refuse_lengths(recipe: Any, teacher: PreTrainedModel) -> None:
    """As `check_lengths`, of a teacher that is loaded, whose code may have come with it."""
    rows = position_rows(teacher)
    for at, section in sections(recipe):
        if isinstance(length := getattr(section, "sequence_length", None), int):
            refuse_too_long(at, length, recipe.teacher.model, rows)


def read_text(recipe: Any, tokenizer: PreTrainedTokenizerBase) -> TextData:
    """A recipe's `data` where it is text alone."""
    data = recipe.data
    text = load_data(
        [source.model_dump() for source in data.train], tokenizer,
        evaluation=[source.model_dump() for source in data.evaluation],
        validation_share=data.validation_share, cache=data.cache,
    )  # fmt: skip
    return TextData(text)


def measure_stage(
    run: RunContext, stage: str, student: PreTrainedModel, beside: Callable[[str, PreTrainedModel], None] | None = None
) -> None:
    """Compare a student with the teacher on every text, once a stage, by all processes together.

    beside: called first with the same stage and student, for what is kept besides the figures; on all processes too.
    """
    path = evaluation_file(run.folder, stage)
    if from_first(lambda: read_json(path, dict[str, Compared] | dict[str, Told])) is not None:
        return
    results = {name: asdict(measured(run, student, rows)) for name, rows in run.texts.items()}
    if beside is not None:
        beside(stage, student)

    def tell() -> None:
        write_json(path, results)
        for name, result in results.items():
            log.info("%s, %s: %s", stage, name, json.dumps(result))
            if "kl" not in result:
                run.console.print(f"[bold]{stage}[/bold] on {name.replace('_', '-')} text: {told(result)}")
                continue
            run.console.print(
                f"[bold]{stage}[/bold] on {name.replace('_', '-')} text: perplexity {result['student_perplexity']:.2f} "
                f"(teacher {result['teacher_perplexity']:.2f}, ratio {result['perplexity_ratio']:.3f}), "
                f"KL {result['kl']:.4f}, same top token {result['top1_agreement']:.1%}" + _further(result)
            )

    on_first(tell)


def _further(result: Mapping[str, Any]) -> str:
    """What is told of a comparison besides: a draft's acceptance, or how classes are told."""
    if result["acceptance"] is not None:
        passing = f"; as the teacher's draft {result['acceptance']:.1%} of tokens pass"
        return f"{passing}, {acceptance_words(result['accepted'])} drafted"
    told = f"; right {result['student_accuracy']:.1%} (teacher {result['teacher_accuracy']:.1%})"
    for key, name in (("f1", "F1"), ("roc_auc", "ROC-AUC")):
        if (own := result[f"student_{key}"]) is not None:
            told += f", {name} {own:.3f} (teacher {result[f'teacher_{key}']:.3f})"
    return told


def measured(run: RunContext, student: Any, rows: TeacherStates | TextRows) -> Comparison | Alone:
    """A student's figures on a text: beside the teacher's where it reads the same tokens."""
    if isinstance(rows, TeacherStates):
        return compare(student, rows, autocast=run.autocast)
    return alone(student, rows, autocast=run.autocast)


def told(found: Mapping[str, Any]) -> str:
    """A line of a student's figures without a teacher's."""
    bits, theirs = found["bits_per_byte"], found["teacher_bits_per_byte"]
    line = f"perplexity {found['student_perplexity']:.2f}"
    if bits is not None:
        line += f", {bits:.4f} bits per byte" + ("" if theirs is None else f" (teacher {theirs:.4f})")
    return line + f", top token right {found['student_accuracy']:.1%}"


def vocabulary_of(tokenizer: Any, teacher: PreTrainedModel | None, teacher_tokenizer: Any) -> int:
    """How many ids there are in rows of text."""
    if teacher is None or teacher_tokenizer is not None:
        return max(tokenizer.get_vocab().values()) + 1
    return teacher.config.get_text_config().vocab_size


def refuse_tokens(tokens: np.ndarray, name: str, vocabulary: int) -> None:
    """UserError where a text has ids that the teacher does not have: a tokenizer that is not the model's shows so."""
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

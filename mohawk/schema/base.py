"""What recipes of every kind have in common: types of values, sections, and how they are read and checked."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mohawk.core.folders import sum_file, why_altered, write_file
from mohawk.core.places import home
from mohawk.core.run_folder import RECIPE, has_lost_sum, is_run
from mohawk.errors import UserError
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.mixing.metrics import METRICS, OF_MEANS
from mohawk.models.mixer_names import MIXER_NAMES
from mohawk.schema import yaml_text
from mohawk.schema.check import check
from mohawk.schema.files import read_recipe
from mohawk.schema.kinds import command_for
from mohawk.schema.yaml_text import RecipeText

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)


def _whole(value: Any) -> Any:
    if not isinstance(value, float) or not math.isfinite(value) or abs(value) >= 2**63:  # far beyond what is allowed
        return value
    return int(value) if value.is_integer() else value


def _place(value: Any) -> Any:
    """A path with `~` for the home folder."""
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ValueError("a path; ~ is the home folder")
    return home(value)


Whole = Annotated[int, BeforeValidator(_whole)]  # 2e6 is a whole number too
# The upper bounds are far above what anyone can run: a slip such as 1e30 is said at once, not after hours.
Count = Annotated[Whole, Field(ge=1, le=10**15)]
Batch = Annotated[Whole, Field(ge=1, le=2**20)]  # of sequences, or of what is held in memory at once
Length = Annotated[Whole, Field(ge=1, le=2**24)]  # of a context, in tokens
RowLength = Annotated[Whole, Field(ge=2, le=2**24)]  # one token is predicted from another
if TYPE_CHECKING:
    Divergence = MatrixMetric = HeadMetric = Mixer = str
else:
    # The names of tables that need no torch: one more there is one more here.
    Divergence = Literal[tuple(DIVERGENCES)]
    MatrixMetric = Literal[tuple(METRICS)]  # of mixing matrices
    HeadMetric = Literal[OF_MEANS]  # of means over heads
    Mixer = Literal[tuple(MIXER_NAMES)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a loss
Text = Annotated[str, Field(min_length=1)]
# The values involved, and what is wrong with them together.
Contradiction = tuple[list[yaml_text.Path], str]
Place = Annotated[Path, Field(strict=False), BeforeValidator(_place)]


class FieldError(UserError):
    """A mistake in a recipe's value that shows only beside a model. at: where the value stands in the recipe."""

    def __init__(self, at: yaml_text.Path, text: str) -> None:
        super().__init__(f"{yaml_text.dotted(at)}: {text}")
        self.at, self.text = at, text


@contextmanager
def placed(path: str | Path, overrides: Sequence[str]) -> Iterator[None]:
    """Within the block a FieldError says the file and the line too, or the override, of the recipe that was loaded."""
    try:
        yield
    except FieldError as error:
        read = read_recipe(home(path))
        for override in overrides:
            read.set(override)
        raise UserError(f"{yaml_text.prefix(read.place(error.at), error.at)}: {error.text}") from error


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no silent conversion of types, unchanged once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    shorthand: ClassVar[str | None] = None  # the field that a bare text in the section's place is


class CheckpointSection(Section):
    """What names a checkpoint, and says what of it is loaded."""

    shorthand = "model"
    model: Text | None = Field(default=None, description="folder, .gguf file or hub id")
    gguf_file: Text | None = Field(default=None, description="name of the GGUF file inside `model`, if it is one")
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the checkpoint")

    @property
    def where(self) -> dict[str, Any]:
        """What mohawk/loading/ asks for besides `model`."""
        return {"gguf_file": self.gguf_file, "revision": self.revision, "trust_remote_code": self.trust_remote_code}


class TeacherSection(CheckpointSection):
    model: Text = Field(description="folder, .gguf file or hub id of the Transformer to convert")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="dtype of the teacher's weights; auto: as saved"
    )
    tokenizer: Text | None = Field(
        default=None, description="folder or hub id of the tokenizer, if it is not with the model"
    )


class SourceSection(Section):
    shorthand = "source"
    source: Text = Field(description="path, glob or hub dataset id")
    split: Text = Field(default="train", description="split of a hub dataset")
    field: Text = Field(default="text", description="field that holds the text in JSON lines, Parquet and hub datasets")
    subset: Text | None = Field(default=None, description="configuration name of a hub dataset")
    format: Literal["text", "paragraphs", "jsonl", "parquet"] | None = Field(
        default=None, description="format of local files; null: by their extension (.txt, .jsonl, .parquet)"
    )


class DataSection(Section):
    train: list[SourceSection] = Field(min_length=1, description="text to train on")
    evaluation: list[SourceSection] = Field(default=[], description="text from another source, only evaluated on")
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.01, description="share of the training documents that is held out and never trained on"
    )
    cache: Place | None = Field(
        default=None, description="folder for tokenised text; null: mohawk in the user's cache folder"
    )


class Phase(Section):
    """One phase's budget and optimiser: AdamW with a warmup-stable-decay schedule of its own."""

    tokens: Count = Field(description="training tokens of the phase")
    batch_size: Batch = Field(default=16, description="sequences at once on a process, at most")
    sequence_length: RowLength = Field(default=2048, description="tokens in a sequence")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-4, description="learning rate after warmup")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field(default=(0.9, 0.95), description="AdamW's betas")
    weight_decay: Share = Field(default=0.1, description="AdamW's weight decay, on matrices alone")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0,
        description="norm that gradients are clipped to, in phases 1 and 2 each of n layers by itself to a sqrt(n)th "
        "of it; null: not clipped",
    )
    warmup: Share = Field(default=0.1, description="share of the steps in which the learning rate rises")
    decay: Share = Field(default=0.1, description="share of the steps in which it falls to 0 at the end")
    gradient_accumulation: Batch = Field(
        default=1, description="batches in one step, whose rows are divided among the processes"
    )
    save_every: Count = Field(default=500, description="steps between checkpoints")
    save_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=15.0, description="minutes after which a checkpoint is written in any case; null: by steps alone"
    )
    keep_checkpoints: Count = Field(default=2, description="how many checkpoints are kept, the newest ones")
    log_every: Count = Field(default=1, description="steps between lines in metrics.jsonl")

    @property
    def rows(self) -> int:
        """Sequences in one step, of all processes together."""
        return self.batch_size * self.gradient_accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.sequence_length

    def steps(self) -> int:
        """Optimiser steps of the phase; the last one may exceed the token budget."""
        return math.ceil(self.tokens / self.tokens_per_step)

    def told(self) -> tuple[str, str]:
        """Its budget and its steps, as tables have them."""
        return f"{self.tokens:,}", f"{self.steps():,}"


class Evaluation(Section):
    sequence_length: RowLength = Field(default=512, description="tokens in an evaluated window")
    batch_size: Batch = Field(default=8, description="windows evaluated at once")
    tokens: Count = Field(default=32_768, description="tokens evaluated of each text")
    contexts: Annotated[list[Length], Field(min_length=1)] = Field(
        default=[512, 4096], description="context lengths at which decoding is timed"
    )
    decode_tokens: Batch = Field(default=32, description="tokens decoded for timing")
    prompt: Text = Field(
        default="The most important thing about the state of the nation is",
        description="prompt that teacher and student continue",
    )
    continuation_tokens: Batch = Field(default=60, description="tokens of that continuation")
    longest: RowLength | None = Field(
        default=2048,
        description="tokens in the longest text for retrieval and perplexity by position; null: neither these nor what "
        "models write is measured",
    )


class Sharding(Section):
    kind: Literal["auto", "none", "full"] = Field(
        default="auto",
        description="how each of several processes holds models; none: whole; full: in parts (torch's FSDP2); auto: in "
        "parts where the plan needs more memory than a device has",
    )
    within: Annotated[Whole, Field(ge=1, le=2**20)] | None = Field(
        default=None,
        description="how many processes share one model, of which each such group has one (HSDP); best as many as a "
        "machine has GPUs. null: all processes share one model",
    )


def phase_contradictions(phase: Phase, at: yaml_text.Path, name: str, or_else: str) -> Iterator[Contradiction]:
    """What contradicts itself in one phase's budget; `name` as a reader knows it, `or_else` the last way out."""
    if phase.warmup + phase.decay > 1:
        yield (
            [(*at, "warmup"), (*at, "decay")],
            f"{name}: warmup {phase.warmup:g} and decay {phase.decay:g} are shares of the steps "
            "and together exceed 1; lower one",
        )
    if phase.tokens is not None and phase.tokens < phase.tokens_per_step:
        yield (
            [(*at, key) for key in ("tokens", "batch_size", "sequence_length", "gradient_accumulation")],
            f"{name}: {phase.tokens} tokens do not fill one step of batch_size x sequence_length "
            f"x gradient_accumulation = {phase.tokens_per_step} tokens; raise tokens, lower one of them, "
            f"or {or_else}",
        )


LAST = ("evaluation", "precision", "device", "sharding", "activation_checkpointing", "seed", "output")


class RecipeFile(Section):
    """The fields that decide every kind of run. Make one with `load` or `from_dict`, which find contradictions between
    values as well."""

    teacher: TeacherSection = Field(description="the model to learn from")
    data: DataSection = Field(description="the text to train and evaluate on")
    evaluation: Evaluation = Field(default=Evaluation(), description="what is measured before, between and after")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="precision of training; auto: bfloat16 autocast where the device is fast at it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="device to train on")
    sharding: Sharding = Field(default=Sharding(), description="how several processes hold models")
    activation_checkpointing: Literal["auto"] | bool = Field(
        default="auto",
        description="compute a layer's insides again in the backward pass instead of keeping them; auto: where the "
        "plan needs more memory than a device has otherwise",
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of data order and random weights"
    )
    output: Place = Field(
        default=Path("runs/student"), description="the run's folder; by default runs/<name of the recipe file>"
    )

    def phase_names(self) -> tuple[str, ...]:
        """Names of the phases of such a run in order, those that are skipped too."""
        raise NotImplementedError

    def trained(self) -> dict[str, tuple[str, Any]]:
        """By the name of its folder, each step of the run in order: where what it is trained by stands in the recipe,
        and those settings; an empty text and None for a step without training."""
        raise NotImplementedError

    def stage_places(self) -> dict[str, Any]:
        """By where it stands in the recipe, each stage of distillation, which may have its own student and text."""
        return {}

    def held_fast(self, run: Path) -> tuple[str, ...]:
        """Sections that must stay as they are, since what is trained by them in a run's folder is still being
        compared."""
        return ()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read and check a YAML file with `a.b=c` overrides on top. Raises UserError, a line per mistake.

        A run's own recipe.yaml means the folder that it lies in, wherever the run was moved to.
        """
        path = home(path)
        read = read_recipe(path)
        if (command := command_for(cls, read.data)) is not None:
            raise UserError(f"{path}: this is a recipe for `{command}`; run that")
        read.data.setdefault("output", f"runs/{path.stem}")
        if path.name == RECIPE and is_run(path.parent):
            read.data["output"] = str(path.parent)
            if (problem := why_altered(path)) is not None:
                log.warning("%s %s: was it edited? It is taken as it says", path, problem)
        return check(cls, read, overrides, cls.contradictions)

    @classmethod
    def from_dict(cls, data: dict[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Check plain data as `load` checks a file. Raises UserError."""
        # Through YAML text and back: a deep copy that holds only what a file could hold.
        read = RecipeText.read(yaml_text.write(data), "recipe")
        read.places.clear()  # lines of a text that the caller never saw
        return check(cls, read, overrides, cls.contradictions)

    def to_yaml(self) -> str:
        """The resolved recipe, every value written out; reading it gives an equal recipe."""
        values = self.model_dump(mode="json")
        last = {key: values.pop(key) for key in LAST}
        return yaml_text.write(values | last)  # as a person would order it

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; over a run's own, as what the run is to go by."""
        if sum_file(Path(path)).exists() or has_lost_sum(Path(path)):
            with write_file(path) as beside:
                beside.write_text(self.to_yaml(), encoding="utf-8")
        else:
            Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def contradictions(self) -> Iterator[Contradiction]:
        """(the values involved, what is wrong with them together)."""
        if self.data.validation_share == 0 and not self.data.evaluation:
            yield (
                [("data", "validation_share"), ("data", "evaluation")],
                "data.validation_share is 0 and data.evaluation is empty, so there is no text to evaluate on; "
                "give one of them",
            )
        if self.evaluation.tokens < self.evaluation.sequence_length:
            yield (
                [("evaluation", "tokens"), ("evaluation", "sequence_length")],
                f"evaluation: {self.evaluation.tokens} tokens do not fill one window of "
                f"{self.evaluation.sequence_length}; raise tokens or lower sequence_length",
            )


def sections(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, section) of a recipe's mappings, at any depth."""
    if isinstance(value, BaseModel):
        if at:
            yield at, value
        for name in type(value).model_fields:
            yield from sections(getattr(value, name), f"{at}.{name}" if at else name)
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from sections(entry, f"{at}.{i}")

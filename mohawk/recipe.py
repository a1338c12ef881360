"""The recipe: everything that decides a run, checked before anything heavy is imported or loaded.

`Recipe.load("recipe.yaml", ["phases.hidden.tokens=2e6"])` either gives a recipe in which every value has the
right type, lies in its range and contradicts no other, or raises one UserError with a line for each mistake.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mohawk import recipe_text
from mohawk.checkpoints import sum_file, why_altered, write_file
from mohawk.errors import UserError
from mohawk.recipe_check import check
from mohawk.recipe_text import RecipeText
from mohawk.run_folder import RECIPE, home, is_run

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def _layers(value: Any) -> Any:
    if value in ("every_second", "all"):
        return value
    if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
        raise ValueError("every_second, all, or a list of layer indices counted from 0")
    if len(set(value)) != len(value):
        raise ValueError("a list that names each layer once")
    return value


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
Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "probability_mse", "mse", "cosine"
]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a loss
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Path, Field(strict=False), BeforeValidator(_place)]


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no silent conversion of types, unchanged once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Teacher(Section):
    model: Text = Field(description="folder, .gguf file or hub id of the Transformer to convert")
    gguf_file: Text | None = Field(None, description="name of the GGUF file inside `model`, if it is one")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="dtype of the teacher's weights; auto: as saved"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the checkpoint")
    tokenizer: Text | None = Field(None, description="folder or hub id of the tokenizer, if it is not with the model")


class Student(Section):
    mixer: Literal["mamba2", "discrete_mamba2"] = Field(
        "mamba2", description="mamba2: Bamba's, for stock transformers; discrete_mamba2: the MOHAWK paper's"
    )
    ssm_layers: Annotated[Literal["every_second", "all"] | list[int], BeforeValidator(_layers)] = Field(
        "every_second", description="layers whose attention is replaced"
    )
    init: Literal["attention", "neutral", "random"] = Field(
        "attention",
        description="what mixers start from; attention: q, k, v and o; neutral: an identity convolution, an open gate",
    )
    gate: Literal["open", "output"] = Field(
        "open", description="what the gate starts from; open: a constant 1; output: W_O and W_V"
    )
    state_size: Annotated[Whole, Field(ge=1, le=1024)] | None = Field(
        None, description="size of the state per head; null: the teacher's head_dim"
    )
    conv_kernel: Annotated[Whole, Field(ge=1, le=16)] = Field(4, description="width of the causal convolution")


class Source(Section):
    source: Text = Field(description="path, glob or hub dataset id")
    split: Text = Field("train", description="split of a hub dataset")
    field: Text = Field("text", description="field that holds the text in JSON lines, Parquet and hub datasets")
    subset: Text | None = Field(None, description="configuration name of a hub dataset")
    format: Literal["text", "paragraphs", "jsonl", "parquet"] | None = Field(
        None, description="format of local files; null: by their extension (.txt, .jsonl, .parquet)"
    )


class Data(Section):
    train: list[Source] = Field(min_length=1, description="text to train on")
    evaluation: list[Source] = Field([], description="text from another source, only evaluated on")
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.01, description="share of the training documents that is held out and never trained on"
    )
    cache: Place | None = Field(None, description="folder for tokenised text; null: mohawk in the user's cache folder")


class Phase(Section):
    """One phase's budget and optimiser: AdamW with a warmup-stable-decay schedule of its own."""

    tokens: Count = Field(description="training tokens of the phase")
    batch_size: Batch = Field(16, description="sequences at once, before accumulation")
    sequence_length: RowLength = Field(2048, description="tokens in a sequence")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-4, description="learning rate after warmup")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field((0.9, 0.95), description="AdamW's betas")
    weight_decay: Share = Field(0.1, description="AdamW's weight decay, on matrices alone")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradients are clipped to this norm; null: not clipped"
    )
    warmup: Share = Field(0.1, description="share of the steps in which the learning rate rises")
    decay: Share = Field(0.1, description="share of the steps in which it falls to 0 at the end")
    gradient_accumulation: Batch = Field(1, description="batches in one step")
    save_every: Count = Field(500, description="steps between checkpoints")
    save_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        15.0, description="minutes after which a checkpoint is written in any case; null: by steps alone"
    )
    keep_checkpoints: Count = Field(2, description="how many checkpoints are kept, the newest ones")
    log_every: Count = Field(1, description="steps between lines in metrics.jsonl")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length * self.gradient_accumulation

    def steps(self) -> int:
        """Optimiser steps of the phase; the last one may exceed the token budget."""
        return math.ceil(self.tokens / self.tokens_per_step)


class Mixing(Phase):
    tokens: Count = Field(80_000_000, description="training tokens of the phase")
    metric: Literal["frobenius", "squared", "mse", "relative"] = Field(
        "frobenius", description="distance between the teacher's and the student's mixing matrices"
    )


class Hidden(Phase):
    tokens: Count = Field(160_000_000, description="training tokens of the phase")
    match: Literal["block_output", "mixer_output"] = Field(
        "block_output", description="which output is compared with the teacher's: the whole layer's or the mixer's"
    )
    train_mlp: bool = Field(False, description="train the MLPs of the converted layers too")
    solve_tokens: Annotated[Whole, Field(ge=0, le=10**15)] = Field(
        0, description="first solve output projections by least squares on so many tokens; 0: do not"
    )


class EndToEnd(Phase):
    tokens: Count = Field(2_760_000_000, description="training tokens of the phase")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-5, description="learning rate after warmup")
    gradient_accumulation: Batch = Field(16, description="batches in one step")
    train: Literal["all", "all_but_mlp", "mixers"] = Field("all", description="which parameters train")
    divergence: Divergence = Field(
        "forward_kl", description="divergence between the teacher's and the student's next-token distributions"
    )
    temperature: Annotated[float, Field(ge=0.001, le=100)] = Field(1.0, description="temperature of both distributions")
    kd_weight: Weight = Field(1.0, description="weight of the divergence")
    ce_weight: Weight = Field(0.0, description="weight of the cross entropy with the text")


class Phases(Section):
    """The defaults are the MOHAWK paper's. A phase set to null is skipped."""

    mixing: Mixing | None = Field(Mixing(), description="phase 1: match mixing matrices; null: skip")
    hidden: Hidden | None = Field(Hidden(), description="phase 2: match hidden states; null: skip")
    end_to_end: EndToEnd | None = Field(EndToEnd(), description="phase 3: distil the logits; null: skip")

    def active(self) -> Iterator[tuple[str, Phase]]:
        """(name, phase) of those not skipped, in order."""
        for name in type(self).model_fields:
            if (phase := getattr(self, name)) is not None:
                yield name, phase


class Evaluation(Section):
    sequence_length: RowLength = Field(512, description="tokens in an evaluated window")
    batch_size: Batch = Field(8, description="windows evaluated at once")
    tokens: Count = Field(32_768, description="tokens evaluated of each text")
    contexts: Annotated[list[Length], Field(min_length=1)] = Field(
        [512, 4096], description="context lengths at which decoding is timed"
    )
    decode_tokens: Batch = Field(32, description="tokens decoded for timing")
    prompt: Text = Field(
        "The most important thing about the state of the nation is",
        description="prompt that teacher and student continue",
    )
    continuation_tokens: Batch = Field(60, description="tokens of that continuation")


def phase_contradictions(
    phase: Phase, at: recipe_text.Path, name: str, or_else: str
) -> Iterator[tuple[list[recipe_text.Path], str]]:
    """What contradicts itself in one phase's budget; `name` as a reader knows it, `or_else` the last way out."""
    if phase.warmup + phase.decay > 1:
        yield (
            [(*at, "warmup"), (*at, "decay")],
            f"{name}: warmup {phase.warmup:g} and decay {phase.decay:g} are shares of the steps "
            "and together exceed 1; lower one",
        )
    if phase.tokens < phase.tokens_per_step:
        yield (
            [(*at, key) for key in ("tokens", "batch_size", "sequence_length", "gradient_accumulation")],
            f"{name}: {phase.tokens} tokens do not fill one step of batch_size x sequence_length "
            f"x gradient_accumulation = {phase.tokens_per_step} tokens; raise tokens, lower one of them, "
            f"or {or_else}",
        )


def read_recipe(path: Path) -> RecipeText:
    """A recipe's YAML text, its values not checked yet. Raises UserError."""
    try:
        return RecipeText.read(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        name = path.name.removesuffix(".yaml")
        copies = (
            f"`mohawk recipes {name}` copies the one" if name in shipped_names() else "`mohawk recipes` lists those"
        )
        raise UserError(f"there is no recipe {path}; {copies} that came with mohawk") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error


class RecipeFile(Section):
    """The fields that decide every kind of run. Make one with `load` or `from_dict`, which find contradictions between
    values as well."""

    teacher: Teacher = Field(description="the model to learn from")
    data: Data = Field(description="the text to train and evaluate on")
    evaluation: Evaluation = Field(Evaluation(), description="what is measured before, between and after")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of training; auto: bfloat16 autocast where the device is fast at it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to train on")
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = Field(0, description="seed of data order and random weights")
    output: Place = Field(
        Path("runs/student"), description="the run's folder; by default runs/<name of the recipe file>"
    )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read and check a YAML file with `a.b=c` overrides on top. Raises UserError, a line per mistake.

        A run's own recipe.yaml means the folder that it lies in, wherever the run was moved to.
        """
        path = home(path)
        read = read_recipe(path)
        from mohawk.recipe_kinds import command_for

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
        read = RecipeText.read(recipe_text.write(data), "recipe")
        read.places.clear()  # lines of a text that the caller never saw
        return check(cls, read, overrides, cls.contradictions)

    def to_yaml(self) -> str:
        """The resolved recipe, every value written out; reading it gives an equal recipe."""
        values = self.model_dump(mode="json")
        last = {key: values.pop(key) for key in ("evaluation", "precision", "device", "seed", "output")}
        return recipe_text.write(values | last)  # as a person would order it

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe; over a run's own, as what the run is to go by."""
        if sum_file(Path(path)).exists():
            with write_file(path) as beside:
                beside.write_text(self.to_yaml(), encoding="utf-8")
        else:
            Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def contradictions(self) -> Iterator[tuple[list[recipe_text.Path], str]]:
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


class Recipe(RecipeFile):
    """A whole conversion."""

    teacher: Teacher = Field(description="the Transformer to convert")
    student: Student = Field(Student(), description="what takes attention's place")
    phases: Phases = Field(Phases(), description="the training phases")

    def contradictions(self) -> Iterator[tuple[list[recipe_text.Path], str]]:
        yield from super().contradictions()
        teacher, phases = self.teacher, self.phases
        if teacher.gguf_file and teacher.model.lower().endswith(".gguf"):
            yield (
                [("teacher", "gguf_file"), ("teacher", "model")],
                "teacher.gguf_file and a teacher.model that is itself a .gguf file; remove gguf_file",
            )
        if self.student.gate == "output" and self.student.init != "attention":
            yield (
                [("student", "gate"), ("student", "init")],
                f"student.gate: output is made from attention weights, but student.init is {self.student.init}; "
                "use gate: open or init: attention",
            )
        for name, phase in phases.active():
            yield from phase_contradictions(phase, ("phases", name), f"phases.{name}", "set the phase to null")
        hidden, last = phases.hidden, phases.end_to_end
        if hidden and hidden.train_mlp and hidden.match == "mixer_output":
            yield (
                [("phases", "hidden", "train_mlp"), ("phases", "hidden", "match")],
                "phases.hidden: train_mlp is true, but match: mixer_output gives an MLP no gradient; "
                "use match: block_output or train_mlp: false",
            )
        if last and last.kd_weight == 0 and last.ce_weight == 0:
            yield (
                [("phases", "end_to_end", "kd_weight"), ("phases", "end_to_end", "ce_weight")],
                "phases.end_to_end: kd_weight and ce_weight are both 0, so there is nothing to learn; raise one",
            )


def shipped(name: str) -> Path:
    """The path of a recipe that comes with the package, such as `demo`. Raises UserError."""
    folder = _shipped_folder()
    path = folder / f"{name}.yaml"
    if path.parent != folder or not path.is_file():
        raise UserError(f"no recipe named {name!r} comes with mohawk; allowed: {', '.join(shipped_names())}")
    return path


def shipped_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def _shipped_folder() -> Path:
    import mohawk

    folders = [Path(root) / "recipes" for root in mohawk.__path__]  # in the package, or a source checkout beside it
    return next(folder for folder in folders if (folder / "demo.yaml").is_file())

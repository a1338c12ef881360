"""A conversion's recipe: everything that decides a run, checked before anything heavy is imported or loaded.

`Recipe.load("recipe.yaml", ["phases.hidden.tokens=2e6"])` either gives a recipe in which every value has the
right type, lies in its range and contradicts no other, or raises one UserError with a line for each mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mohawk.models.mixer_names import MIXER_NAMES, is_layer
from mohawk.schema.base import (
    Batch,
    Contradiction,
    Count,
    Divergence,
    FieldError,
    MatrixMetric,
    Mixer,
    Phase,
    RecipeFile,
    Section,
    Sharding,
    TeacherSection,
    Weight,
    Whole,
    phase_contradictions,
)
from mohawk.schema.yaml_text import Path, dotted, show

CALIBRATION_TOKENS = 8192
CALIBRATION_STEPS = 0
FROM_ATTENTION = ("attention", "calibrated")  # what starts are made of attention's weights


def _layers(value: Any) -> Any:
    if value in ("every_second", "all"):
        return value
    if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
        raise ValueError("every_second, all, or a list of layer indices counted from 0")
    if len(set(value)) != len(value):
        raise ValueError("a list that names each layer once")
    return value


def _mixers(value: Any) -> Any:
    """One mixer's name, or a mapping from layers to names; its keys are text in a recipe and become numbers."""
    names = list(MIXER_NAMES)
    if isinstance(value, dict) and value:
        for i, name in value.items():
            if not is_layer(i):
                raise ValueError(f"a mapping whose keys are layer indices counted from 0, as {show(i)} is not")
            if name not in names:
                raise ValueError(f"for layer {i} one of {', '.join(names)}, not {show(name)}")
        found = {int(i): value[i] for i in sorted(value, key=int)}
        if len(found) != len(value):
            raise ValueError("a mapping that names each layer once")
        return found
    if value not in names:
        raise ValueError(f"{', '.join(names)}, or a mapping from each replaced layer to one of them")
    return value


class Hybrid(Section):
    """Which layers become what."""

    mixer: Annotated[Mixer | dict[int, Mixer], BeforeValidator(_mixers)] = Field(
        default="mamba2", description="; ".join(f"{name}: {text}" for name, text in MIXER_NAMES.items())
    )
    ssm_layers: Annotated[Literal["every_second", "all"] | list[int], BeforeValidator(_layers)] = Field(
        default="every_second", description="layers whose attention is replaced"
    )
    init: Literal["attention", "calibrated", "neutral", "random"] = Field(
        default="attention",
        description="what mixers start from; attention: q, k, v and o; calibrated: the same, then each mixer fitted to "
        "the attention output that it replaces; neutral: an identity convolution, an open gate",
    )
    gate: Literal["open", "output"] | None = Field(
        default=None,
        description="what the gate starts from; open: a constant; output: W_O and W_V; null: output in gated_delta "
        "mixers, which have no constant, open in others",
    )
    state_size: Annotated[Whole, Field(ge=1, le=1024)] | None = Field(
        default=None, description="size of the state per head; null: the teacher's head_dim"
    )
    conv_kernel: Annotated[Whole, Field(ge=1, le=16)] = Field(default=4, description="width of the causal convolution")

    @model_validator(mode="before")
    @classmethod
    def _one_gate(cls, given: Any) -> Any:
        """Where no gate is asked for and all mixers start with the same one, that one's name."""
        if not isinstance(given, dict) or given.get("gate") is not None:
            return given
        mixers = given.get("mixer")
        deltas = {name == "gated_delta" for name in (mixers.values() if isinstance(mixers, dict) else [mixers])}
        if given.get("init", "attention") not in FROM_ATTENTION or deltas == {False}:
            return {**given, "gate": "open"}
        return {**given, "gate": "output"} if deltas == {True} else given


class Student(Hybrid):
    """A hybrid student of a distillation or pruning: without `init: calibrated`, which needs text."""

    init: Literal["attention", "neutral", "random"] = Field(
        default="attention",
        description="what mixers start from; attention: q, k, v and o; neutral: an identity convolution, an open gate",
    )


class ConvertedStudent(Hybrid):
    """A conversion's student, whose start may be fitted to training text (`init: calibrated`)."""

    calibration_tokens: Count | None = Field(
        default=None, description=f"tokens of training text that init: calibrated fits to; null: {CALIBRATION_TOKENS}"
    )
    calibration_steps: Annotated[Whole, Field(ge=0, le=10**6)] | None = Field(
        default=None,
        description="optimizer steps for each layer of init: calibrated, of a row each, between two solutions of the "
        f"output projection by least squares; 0: least squares alone; null: {CALIBRATION_STEPS}",
    )

    def calibration(self) -> tuple[int, int]:
        """(tokens, steps for each layer) of a calibrated start."""
        steps = CALIBRATION_STEPS if self.calibration_steps is None else self.calibration_steps
        return int(self.calibration_tokens or CALIBRATION_TOKENS), steps


def student_contradictions(student: Hybrid, at: Path) -> Iterator[Contradiction]:
    """What contradicts itself in a student, which stands at that place in a recipe."""
    name = dotted(at)
    if student.gate == "output" and student.init not in FROM_ATTENTION:
        yield (
            [(*at, "gate"), (*at, "init")],
            f"{name}.gate: output is made from attention weights, but {name}.init is {student.init}; use gate: open or "
            "init: attention",
        )
    if not isinstance(student.mixer, dict) or not isinstance(student.ssm_layers, list):
        return
    if strange := sorted(set(student.mixer) - set(student.ssm_layers)):
        yield (
            [(*at, "mixer", str(strange[0])), (*at, "ssm_layers")],
            f"{name}.mixer: names layers {strange}, which {name}.ssm_layers does not replace; leave them out",
        )
    if missing := sorted(set(student.ssm_layers) - set(student.mixer)):
        yield (
            [(*at, "mixer"), (*at, "ssm_layers")],
            f"{name}.mixer: says nothing of layers {missing}, which {name}.ssm_layers replaces; name a mixer for each",
        )


@contextmanager
def student_mistakes(at: Path) -> Iterator[None]:
    """Within the block, a ValueError of `hybrid_from_teacher` becomes a FieldError about the student at that place."""
    try:
        yield
    except ValueError as error:
        field, _, text = str(error).partition(": ")
        if field not in Hybrid.model_fields:
            raise FieldError(at, str(error)) from error
        raise FieldError((*at, field), text) from error


class MixingPhase(Phase):
    tokens: Count = Field(default=80_000_000, description="training tokens of the phase")
    metric: MatrixMetric = Field(
        default="frobenius", description="distance between the teacher's and the student's mixing matrices"
    )


class HiddenPhase(Phase):
    tokens: Count = Field(default=160_000_000, description="training tokens of the phase")
    match: Literal["block_output", "mixer_output"] = Field(
        default="block_output",
        description="which output is compared with the teacher's: the whole layer's or the mixer's",
    )
    train_mlp: bool = Field(default=False, description="train the MLPs of the converted layers too")
    solve_tokens: Annotated[Whole, Field(ge=0, le=10**15)] = Field(
        default=0, description="first solve output projections by least squares on so many tokens; 0: do not"
    )


class EndToEndPhase(Phase):
    tokens: Count = Field(default=2_760_000_000, description="training tokens of the phase")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-5, description="learning rate after warmup")
    gradient_accumulation: Batch = Field(
        default=16, description="batches in one step, whose rows are divided among the processes"
    )
    train: Literal["all", "all_but_mlp", "mixers"] = Field(default="all", description="which parameters train")
    divergence: Divergence = Field(
        default="forward_kl", description="divergence between the teacher's and the student's next-token distributions"
    )
    temperature: Annotated[float, Field(ge=0.001, le=100)] = Field(
        default=1.0, description="temperature of both distributions"
    )
    kd_weight: Weight = Field(default=1.0, description="weight of the divergence")
    ce_weight: Weight = Field(default=0.0, description="weight of the cross entropy with the text")


class Phases(Section):
    """The defaults are the MOHAWK paper's. A phase set to null is skipped."""

    mixing: MixingPhase | None = Field(default=MixingPhase(), description="phase 1: match mixing matrices; null: skip")
    hidden: HiddenPhase | None = Field(default=HiddenPhase(), description="phase 2: match hidden states; null: skip")
    end_to_end: EndToEndPhase | None = Field(
        default=EndToEndPhase(), description="phase 3: distil the logits; null: skip"
    )

    def active(self) -> Iterator[tuple[str, Phase]]:
        """(name, phase) of those not skipped, in order."""
        for name in type(self).model_fields:
            if (phase := getattr(self, name)) is not None:
                yield name, phase


class Dealt(Sharding):
    stages: Annotated[Whole, Field(ge=1, le=2**10)] | None = Field(
        default=None,
        description="how many processes make a pipeline in phases 1 and 2, each with some of the layers, which it "
        "trains on the hidden states that the process before it hands on; further processes make further "
        "pipelines, and a step's rows are divided among these. null: each process has all layers",
    )


class Recipe(RecipeFile):
    """A whole conversion."""

    teacher: TeacherSection = Field(description="the Transformer to convert")
    student: ConvertedStudent = Field(default=ConvertedStudent(), description="what takes attention's place")
    phases: Phases = Field(default=Phases(), description="the training phases")
    sharding: Dealt = Field(default=Dealt(), description="how several processes hold models")

    def phase_names(self) -> tuple[str, ...]:
        return tuple(Phases.model_fields)

    def trained(self) -> dict[str, tuple[str, Any]]:
        return {name: (f"phases.{name}", phase) for name, phase in self.phases.active()}

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        teacher, phases = self.teacher, self.phases
        if teacher.gguf_file and teacher.model.lower().endswith(".gguf"):
            yield (
                [("teacher", "gguf_file"), ("teacher", "model")],
                "teacher.gguf_file and a teacher.model that is itself a .gguf file; remove gguf_file",
            )
        yield from student_contradictions(self.student, ("student",))
        for name in ("calibration_tokens", "calibration_steps"):
            if getattr(self.student, name) is not None and self.student.init != "calibrated":
                yield (
                    [("student", name), ("student", "init")],
                    f"student.{name} is given, but student.init: {self.student.init} fits nothing to text; use init: "
                    "calibrated, or leave it out",
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

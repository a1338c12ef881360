"""The recipe of a pruning: what is cut, how what goes is chosen, and how the rest is healed.

Checked as a conversion's is (mohawk/conversion/recipe.py): before anything is loaded, with a line for each mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mohawk.conversion.recipe import HiddenPhase, MixingPhase, Student, student_contradictions
from mohawk.core.json_files import read_json
from mohawk.core.run_folder import SEARCH, of_rounds
from mohawk.distillation.contradictions import RESERVED, data_contradictions, stage_contradictions
from mohawk.distillation.recipe import (
    DistillData,
    DistillStudent,
    DistillTeacher,
    Positive,
    Stage,
    StageName,
    kept_layers,
)
from mohawk.schema.base import (
    Batch,
    Contradiction,
    Count,
    Length,
    RecipeFile,
    RowLength,
    Section,
    Text,
    Weight,
    Whole,
    phase_contradictions,
)

BUDGETS = ("parameters", "memory", "flops", "latency")
SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "state_heads", "state_groups", "state_size")


def _layers(value: Any) -> Any:
    if type(value) is int:
        if value < 1:
            raise ValueError("how many layers (at least 1), or which as in a distillation's student.layers")
        return value
    try:
        return kept_layers(value)
    except ValueError as error:
        raise ValueError(f"a number of layers, {error}") from error


def _parameters(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        value = float(value[:-1]) / 100
    if type(value) in (int, float) and (0 < value < 1 or value >= 1000 and float(value).is_integer()):
        return float(value)
    raise ValueError(
        "a number of all parameters (60e6), at least 1000, or a share below 1 of those outside embedding and head "
        "(0.5, 50%)"
    )


def _vocabulary(value: Any) -> Any:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if value != "corpus" and not (type(whole) is int and whole >= 1):
        raise ValueError("corpus, or a number of tokens")
    return whole


class TargetSection(Section):
    """Sizes, or a budget for which depth and width are searched; several of parameters, memory and FLOPs are met
    together."""

    layers: Annotated[int | str | list[int], BeforeValidator(_layers)] | None = Field(
        default=None,
        description="how many layers stay, by layers_by; or which: every_second, first:k, last:k, without:a-b, a list",
    )
    hidden: Count | None = Field(default=None, description="channels of the residual stream")
    ffn: Count | None = Field(default=None, description="neurons of each MLP")
    heads: Count | None = Field(
        default=None, description="query heads of each attention layer; null: as kv_heads leave them"
    )
    kv_heads: Count | None = Field(default=None, description="key-value heads of each attention layer")
    state_heads: Count | None = Field(default=None, description="heads of each mixer")
    state_groups: Count | None = Field(default=None, description="groups of B and C, or of keys, of each mixer")
    state_size: Count | None = Field(default=None, description="state dimensions of each such group")
    parameters: Annotated[float, BeforeValidator(_parameters)] | None = Field(
        default=None, description="budget: of all parameters, or below 1 a share of those outside embedding and head"
    )
    memory: Positive | None = Field(default=None, description="budget: bytes of weights and of the state at `context`")
    flops: Positive | None = Field(
        default=None, description="budget: floating-point operations of a decoded token at `context`"
    )
    latency: Positive | None = Field(
        default=None,
        description="budget: milliseconds a decoded token takes here at `context`, timed in turn with the whole model",
    )

    def sizes(self) -> list[str]:
        """Names of the sizes that are given."""
        return [name for name in SIZES if getattr(self, name) is not None]

    def budgets(self) -> list[str]:
        return [name for name in BUDGETS if getattr(self, name) is not None]


class Prune(TargetSection):
    rounds: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        default=1, description="cut and heal so many times, in equal ratios, until the target is reached"
    )
    targets: list[TargetSection] = Field(default=[], description="a target for each round, instead of the one here")
    vocabulary: Annotated[int | str, BeforeValidator(_vocabulary)] | None = Field(
        default=None,
        description="in the end keep the training text's tokens (corpus), or so many of its most frequent ones; a "
        "budget is met before that, with the whole vocabulary",
    )
    strategy: Literal["importance", "magnitude", "random"] = Field(
        default="importance",
        description="what stays: by activations on the calibration text, by norms of weights, by chance",
    )
    layers_by: Literal["block_importance", "kl", "perplexity", "contiguous"] = Field(
        default="block_importance",
        description="which layers stay; kl, perplexity: by their rise without the layer; contiguous: all but the block "
        "of least block importance",
    )
    context: Length = Field(
        default=4096, description="tokens before the one that a budget of memory, flops or latency is about"
    )


class Calibration(Section):
    tokens: Count = Field(default=262_144, description="tokens of training text that scores are measured on")
    sequence_length: RowLength = Field(default=512, description="tokens in a row")
    batch_size: Batch = Field(default=8, description="rows at once; has no other effect")
    scores: Text | None = Field(
        default=None,
        description="instead of measuring in the first round: an earlier run's rounds/1/importance.safetensors",
    )
    layer_tokens: Count = Field(
        default=16_384, description="tokens on which layers are left out in turn (layers_by: kl, perplexity)"
    )


class SearchSection(Section):
    """Candidates for a budget: depths times ways to be narrower, ranked by KL on held-out text."""

    depths: list[Count] | None = Field(default=None, description="numbers of layers to try; null: `steps` of them")
    steps: Count = Field(default=4, description="depths from all layers to as few as reach the budget at full width")
    widths: Annotated[list[Literal["all", "inner", "ffn"]], Field(min_length=1)] = Field(
        default=["all", "ffn"],
        description="what is narrower: hidden, heads and MLPs (all), heads and MLPs (inner), MLPs (ffn)",
    )
    tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.03,
        description="share of the budget that may be unused; for latency, at least 0.1 in either direction",
    )
    tokens: Annotated[Whole, Field(ge=0, le=10**15)] = Field(
        default=1_000_000, description="tokens of healing for each candidate before it is ranked; 0: ranked as cut"
    )


class Convert(Student):
    """Mixers in place of attention, after the last cut and before its healing."""

    mixing: MixingPhase | None = Field(
        default=None, description="phase 1 against the pruned model's matrices; null: skip"
    )
    hidden: HiddenPhase | None = Field(
        default=None, description="phase 2 against the pruned model's hidden states; null: skip"
    )


class Heal(Stage):
    name: StageName = Field(default="heal", description="name of its folders, in front of _1, _2, ... for the rounds")


class Correct(Stage):
    name: StageName = Field(default="correct", description="name of its folder")
    kd_weight: Weight = Field(default=0.0, description="0: the teacher learns from the text alone")
    ce_weight: Weight = Field(default=1.0, description="weight of the cross entropy with the text")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=2e-5, description="learning rate after warmup")


@dataclass(frozen=True)
class PruneStep:
    """One step of the run; its student lies in phases/<name>/student. round: counted from 1."""

    name: str
    kind: str  # correct, cut, convert, mixing, hidden, heal
    told: str  # what the student then is, for tables
    round: int = 0


class PruneRecipe(RecipeFile):
    """A whole pruning."""

    teacher: DistillTeacher = Field(description="the model to prune, and to heal from")
    data: DistillData = Field(description="the text to train and evaluate on")
    prune: Prune = Field(description="what to cut to")
    calibration: Calibration = Field(default=Calibration(), description="the text that scores are measured on")
    search: SearchSection = Field(
        default=SearchSection(), description="the search for the depth and width that meet a budget"
    )
    correct: Correct | None = Field(default=None, description="fine-tune the teacher on the text first; null: do not")
    convert: Convert | None = Field(default=None, description="make the pruned model a hybrid; null: do not")
    heal: Heal | None = Field(default=Heal(), description="the distillation after each cut; null: none")
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="dtype of the final student's weights, and of those that a memory or latency budget counts",
    )
    report_to: list[Text] = Field(
        default=[], description="experiment trackers of transformers (tensorboard, wandb, ...)"
    )

    def phase_names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps())

    def trained(self) -> dict[str, tuple[str, Any]]:
        at = {"correct": "correct", "heal": "heal", "mixing": "convert.mixing", "hidden": "convert.hidden"}
        where = {step.name: at.get(step.kind, "") for step in self.steps()}
        return {name: (field, attrgetter(field)(self) if field else None) for name, field in where.items()}

    def held_fast(self, run: Path) -> tuple[str, ...]:
        picked = ("picked" in (read_json(path) or {}) for path in of_rounds(run, SEARCH))
        return () if all(picked) else ("heal",)  # candidates healed alike are compared with each other

    # what a distillation asks of its recipe

    @property
    def teachers(self) -> list[DistillTeacher]:
        return []

    @property
    def combine(self) -> str:
        return "probabilities"

    @property
    def student(self) -> DistillStudent:
        return DistillStudent()

    @property
    def stages(self) -> list[Stage]:
        return list(self.stage_places().values())

    def stage_places(self) -> dict[str, Any]:
        given = {"correct": self.correct, "heal": self.heal}
        return {at: stage for at, stage in given.items() if stage is not None}

    def section_of(self, stage: Stage, i: int) -> str:
        return "correct" if stage is self.correct else "heal"  # of which each round has a copy

    def rounds(self) -> list[TargetSection]:
        """What each round aims at: its own target, or the one that all of them share."""
        return list(self.prune.targets) or [self.prune] * (self.prune.rounds if self.cuts() else 0)

    def steps(self) -> list[PruneStep]:
        """All that the recipe asks for, in order."""
        steps: list[PruneStep] = []
        if self.correct is not None:
            steps.append(PruneStep(self.correct.name, "correct", "teacher, corrected"))
        rounds = len(self.rounds())
        for i in range(1, rounds + 1):
            of = f" {i}" if rounds > 1 else ""
            steps.append(PruneStep(f"prune_{i}", "cut", f"after cut{of}", i))
            if i == rounds and self.convert is not None:
                steps += self._conversion(i)
            if self.heal is not None:
                steps.append(PruneStep(f"{self.heal.name}_{i}", "heal", f"after healing{of}", i))
        if not rounds and self.convert is not None:
            steps += self._conversion(0)
            if self.heal is not None:
                steps.append(PruneStep(f"{self.heal.name}_1", "heal", "after healing", 1))
        return steps

    def _conversion(self, round_: int) -> list[PruneStep]:
        steps = [PruneStep("convert", "convert", "as a hybrid", round_)]
        for name, told in (("mixing", "after phase 1, matrices"), ("hidden", "after phase 2, hidden states")):
            if getattr(self.convert, name) is not None:
                steps.append(PruneStep(name, name, told, round_))
        return steps

    def cuts(self) -> bool:
        """Whether anything but the vocabulary is cut."""
        return bool(self.prune.targets or self.prune.sizes() or self.prune.budgets())

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        yield from data_contradictions(self.data, ("data",))
        for i, source in enumerate(self.data.train):
            if source.teacher is not None:
                yield (
                    [("data", "train", i, "teacher")],
                    f"data.train.{i}.teacher: a pruning has one teacher; leave it out",
                )
        for key in ("quantize", "device_map"):
            if getattr(self.teacher, key) is not None:
                yield [("teacher", key)], f"teacher.{key}: a cut needs the weights themselves; leave it out"
        yield from self._target_contradictions()
        if self.calibration.scores is not None and self.prune.strategy != "importance":
            yield (
                [("calibration", "scores"), ("prune", "strategy")],
                f"calibration.scores beside prune.strategy {self.prune.strategy}, which needs none; leave out scores",
            )
        if self.calibration.tokens < self.calibration.sequence_length:
            yield (
                [("calibration", "tokens"), ("calibration", "sequence_length")],
                f"calibration: {self.calibration.tokens} tokens do not fill one row of "
                f"{self.calibration.sequence_length}; raise tokens or lower sequence_length",
            )
        yield from self._stages_contradictions()
        if self.convert is not None:
            yield from _convert_contradictions(self.convert)

    def _target_contradictions(self) -> Iterator[Contradiction]:
        prune = self.prune
        own = [*prune.sizes(), *prune.budgets()]
        places = [(("prune",), "prune", prune)]
        if prune.targets:
            places = [(("prune", "targets", i), f"prune.targets.{i}", t) for i, t in enumerate(prune.targets)]
            if own:
                yield (
                    [("prune", own[0]), ("prune", "targets")],
                    f"prune: {own[0]} beside targets, which has a target for each round; leave out one of them",
                )
            if prune.rounds != 1:
                yield (
                    [("prune", "rounds"), ("prune", "targets")],
                    f"prune: rounds {prune.rounds} beside targets, which are rounds themselves; leave out rounds",
                )
        for at, label, target in places:
            sizes, budgets = target.sizes(), target.budgets()
            if not sizes and not budgets and (prune.targets or prune.vocabulary is None):
                yield (
                    [(*at, name) for name in (*SIZES, *BUDGETS)],
                    f"{label}: nothing to cut to; give sizes ({', '.join(SIZES)}) or a budget ({', '.join(BUDGETS)})",
                )
            if sizes and budgets:
                yield (
                    [(*at, sizes[0]), (*at, budgets[0])],
                    f"{label}: {sizes[0]} and {budgets[0]}: a budget has its sizes searched; leave out one of them",
                )
            if len(budgets) > 1 and "latency" in budgets:
                yield (
                    [(*at, name) for name in budgets],
                    f"{label}: {' and '.join(budgets)}: a latency is timed, and never met for sure; give it alone",
                )
        if prune.rounds > 1 and prune.layers is not None and not isinstance(prune.layers, int):
            yield (
                [("prune", "layers"), ("prune", "rounds")],
                f"prune.layers: {prune.layers} names layers of one model, but rounds is {prune.rounds}; give a number "
                "of layers, or targets",
            )
        if self.heal is None:
            if len(self.rounds()) > 1:
                yield [("heal",)], "heal: null, but several rounds are nothing else than healing in between; give heal"
            if self.search.tokens and any(target.budgets() for _, _, target in places):
                yield (
                    [("heal",), ("search", "tokens")],
                    "search.tokens: candidates are healed as heal says, which is null; set search.tokens to 0",
                )

    def _stages_contradictions(self) -> Iterator[Contradiction]:
        for key in ("correct", "heal"):
            stage = getattr(self, key)
            if stage is None:
                continue
            yield from phase_contradictions(stage, (key,), key, f"set {key} to null")
            yield from stage_contradictions(self, stage, 1, (key,), key)
            for wrong in ("student",) if key == "heal" else ("student", "cache", "hidden", "attention", "taid"):
                if getattr(stage, wrong) is not None:
                    yield [(key, wrong)], f"{key}.{wrong}: there is none in a pruning's {key}; leave it out"
            if stage.learn_from == "previous":
                yield (
                    [(key, "learn_from")],
                    f"{key}.learn_from: previous; allowed in a pruning: teacher, average, start",
                )
        if self.correct is not None and self.correct.kd_weight != 0:
            yield [("correct", "kd_weight")], "correct.kd_weight: the teacher learns from the text alone; leave it out"
        if self.correct is not None and self.heal is not None:
            if self.correct.name.startswith(f"{self.heal.name}_") or self.correct.name == self.heal.name:
                yield [("correct", "name")], "correct.name: it is one of heal's; give it another"
            if self.heal.cache is not None:
                yield (
                    [("heal", "cache"), ("correct",)],
                    "heal.cache holds the answers of the teacher as it was, but correct changes it; leave out one",
                )
        taken = ("convert", "mixing", "hidden", *RESERVED)
        for key in ("correct", "heal"):
            stage = getattr(self, key)
            if stage is not None and (stage.name in taken or stage.name.startswith("prune")):
                yield [(key, "name")], f"{key}.name: {stage.name} is the name of another stage; give it another"


def _convert_contradictions(convert: Convert) -> Iterator[Contradiction]:
    yield from student_contradictions(convert, ("convert",))
    for name in ("mixing", "hidden"):
        if (phase := getattr(convert, name)) is not None:
            yield from phase_contradictions(phase, ("convert", name), f"convert.{name}", "set it to null")
    hidden = convert.hidden
    if hidden and hidden.train_mlp and hidden.match == "mixer_output":
        yield (
            [("convert", "hidden", "train_mlp"), ("convert", "hidden", "match")],
            "convert.hidden: train_mlp is true, but match: mixer_output gives an MLP no gradient; use match: "
            "block_output or train_mlp: false",
        )

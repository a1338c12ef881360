"""The recipe of a standard distillation: who teaches whom, on what, in which stages.

Checked as a conversion's is (mohawk/conversion/recipe.py): before anything is loaded, with a line for each mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BeforeValidator, Field, model_validator

from mohawk.conversion.recipe import Student
from mohawk.distillation.contradictions import recipe_contradictions
from mohawk.schema.base import (
    Batch,
    CheckpointSection,
    Contradiction,
    Count,
    DataSection,
    Divergence,
    HeadMetric,
    Phase,
    Place,
    RecipeFile,
    Section,
    Share,
    SourceSection,
    TeacherSection,
    Text,
    Weight,
)

Positive = Annotated[float, Field(gt=0, le=1e18)]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]


def kept_layers(value: Any) -> Any:
    word = isinstance(value, str) and re.fullmatch(r"every_second|(first|last):\d+|without:\d+-\d+", value)
    if not (value is None or word or isinstance(value, list) and value and all(type(i) is int for i in value)):
        raise ValueError("every_second, first:k, last:k, without:a-b, or a list of layer indices counted from 0")
    return value


def _layer_map(value: Any) -> Any:
    if value == "top_heavy":
        raise ValueError(
            "dense_top, which is what top_heavy was (9, 18, ..., 58, 59 of 60 layers for 12), or dense_bottom (0, 2, "
            "..., 20, 30, ..., 59)"
        )
    if value in ("uniform", "last", "dense_top", "dense_bottom") or (type(value) is int and value >= 1):
        return value
    pair = isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not pair or not all(type(i) is int and i >= -1 for p in value for i in p):
        raise ValueError(
            "uniform, last, dense_top, dense_bottom, a number k (every k-th layer), or pairs [[student, teacher], ...]"
        )
    return value


LayerMap = Literal["uniform", "last", "dense_top", "dense_bottom"]
Layers = Annotated[LayerMap | int | list[list[int]], BeforeValidator(_layer_map)]


class RampSection(Section):
    """A number that changes over a stage."""

    start: Weight = Field(description="value at the first step")
    end: Weight = Field(description="value at the end of the ramp, and from there on")
    shape: Literal["linear", "cosine", "steps"] = Field(default="linear", description="shape of the way between them")
    until: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the steps at which the end is reached"
    )


class DistillTeacher(TeacherSection):
    name: Text | None = Field(
        default=None, description="name that a source's teacher or teacher_field gives it; null: its place, from 0"
    )
    weight: Positive = Field(default=1.0, description="weight among several teachers")
    micro_batch: Batch | None = Field(
        default=None, description="rows it is asked for at a time; null: the student's batch"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        default=None, description="load the weights in so many bits (bitsandbytes or torchao)"
    )
    device_map: Literal["auto"] | None = Field(
        default=None, description="auto: spread over devices, memory and disk by accelerate"
    )


class Lora(Section):
    rank: Count = Field(default=16, description="rank of each adapter")
    alpha: Positive = Field(default=32.0, description="adapters are scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="dropout of the adapters' inputs")
    targets: list[Text] | None = Field(
        default=None, description="names of modules that get adapters; null: all linear layers but the head"
    )
    bits: Literal[4] | None = Field(default=None, description="4: QLoRA, the frozen weights in 4 bits (bitsandbytes)")
    keep: bool = Field(
        default=False, description="also save the adapters, with the model they fit, in phases/<stage>/adapter and base"
    )


class DistillStudent(CheckpointSection):
    model: Text | None = Field(default=None, description="folder, .gguf file or hub id; null: made from the teacher")
    layers: Annotated[str | list[int] | None, BeforeValidator(kept_layers)] = Field(
        default=None, description="layers to keep; null: all"
    )
    scratch: bool = Field(default=False, description="random weights in the student's shape")
    hybrid: Student | None = Field(
        default=None, description="mixers in the place of some layers' attention, as `convert` puts"
    )
    lora: Lora | None = Field(default=None, description="train low-rank adapters alone")


class OwnLossSection(Section):
    """The loss of one source's rows in place of the stage's, a term of its own beside it: the mean over its tokens of a
    step. They are never replaced by the student's samples."""

    kd_weight: Weight | RampSection = Field(default=0.0, description="weight of the divergence")
    ce_weight: Weight | RampSection = Field(default=1.0, description="weight of the cross entropy with the text")
    divergence: Divergence | None = Field(
        default=None, description="divergence between next-token distributions; null: the stage's"
    )
    beta: Share | None = Field(default=None, description="beta of jsd and adaptive_kl; null: the stage's")
    lam: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="skew of skew_kl and skew_reverse_kl; null: the stage's"
    )


class DistillSource(SourceSection):
    kind: Literal["text", "pairs", "rationales"] = Field(
        default="text",
        description="pairs: prompts and responses in JSON lines; rationales: prompts with labels and rationales, or "
        "with responses that hold both",
    )
    prompt_field: Text = Field(default="prompt", description="field of the prompt, in pairs")
    response_field: Text = Field(default="response", description="field of the response, in pairs")
    messages_field: Text = Field(
        default="messages",
        description="field of the messages, in pairs that are chats; without it `conversations` (ShareGPT's) counts",
    )
    chat: bool = Field(default=False, description="put prompts and responses into the tokenizer's chat template")
    turns: Literal["all", "last"] = Field(
        default="all", description="which of the assistant's answers in a chat are learned"
    )
    weight_field: Text | None = Field(
        default=None, description="field, in pairs, of a number that multiplies an example's loss"
    )
    rationale_weight: Weight = Field(default=1.0, description="weight of rationales beside labels")
    label_prefix: Text = Field(default="[label]", description="text in front of a prompt that asks for the label")
    rationale_prefix: Text = Field(
        default="[rationale]", description="text in front of a prompt that asks for the rationale"
    )
    templates: list[Text] | None = Field(
        default=None,
        description="patterns that take a response apart, such as '{rationale} The answer is {label}.'; null: a few",
    )
    teacher_field: Text | None = Field(
        default=None, description="field, in pairs, of the name of the teacher that answers an example"
    )
    teacher: Text | None = Field(
        default=None,
        description="name of the teacher that answers all of the source, with combine: row; null: as teacher_field "
        "says",
    )
    weighting: Literal["uniform", "counts", "probability", "importance"] | None = Field(
        default=None,
        description="how a prompt's responses are weighed; probability: by the teacher's; null: each counts as one",
    )
    length_normalized: bool = Field(default=False, description="weigh by the log probability per token")
    too_long: Literal["truncate", "drop"] = Field(
        default="truncate",
        description="how an example is made to fit: its prompt is cut on the left, or all of it is left out",
    )
    sampling_weight: Positive | None = Field(
        default=None, description="rows are drawn in proportion to it; null: to the source's share of the text"
    )
    loss_weight: Weight = Field(default=1.0, description="multiplies the loss of its tokens")
    own_loss: OwnLossSection | None = Field(
        default=None,
        description="a loss of this source's rows alone, added to the stage's loss, which is then of the other "
        "sources' rows: such as the cross entropy of plain text beside on-policy training on prompts; null: the "
        "stage's loss",
    )


class DistillData(DataSection):
    # pyrefly: ignore[bad-override]  # nobody puts a plain source in: a recipe is frozen
    train: list[DistillSource] = Field(min_length=1, description="text to train on")
    label_field: Text = Field(
        default="label", description="field of a text's class, its number or name, of task: classification"
    )
    pair_field: Text = Field(
        default="text_pair", description="field of the second of two texts, if there is one, of task: classification"
    )


class MaskingSection(Section):
    """Which words of a row are masked (BERT, arXiv 1810.04805)."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(default=0.15, description="share of the words that are masked")
    masked: Share = Field(default=0.8, description="share of these that become the mask token")
    random: Share = Field(default=0.1, description="share of these that become another word; the rest stays")
    dynamic: bool = Field(
        default=True, description="draw masks anew at each step (RoBERTa); false: a row always has the same ones"
    )


class Taid(Section):
    """TAID's moving target (arXiv 2501.16937)."""

    start: Share = Field(default=0.4, description="the teacher's share at the start")
    alpha: Positive = Field(default=5e-4, description="how fast that share grows")
    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="decay of the moving average of the loss's fall"
    )
    end: Share = Field(default=1.0, description="the largest share")


class HiddenMatching(Section):
    weight: Weight | RampSection = Field(default=1.0, description="weight of this loss")
    layers: Layers = Field(
        default="uniform", description="which of the student's layers learn from which of the teacher's"
    )
    embeddings: bool = Field(default=False, description="compare the embeddings too")
    loss: Literal["mse", "cosine"] = Field(default="mse", description="loss between hidden states")
    normalise: Literal["none", "layer", "unit"] = Field(
        default="none", description="how both sides are normalised, token by token"
    )
    rank: Count | None = Field(default=None, description="rank of the projection where widths differ; null: full")
    shared: bool = Field(default=False, description="one projection for all layers")


class AttentionMatching(Section):
    weight: Weight | RampSection = Field(default=1.0, description="weight of this loss")
    layers: Layers = Field(
        default="uniform", description="which of the student's layers learn from which of the teacher's"
    )
    metric: HeadMetric = Field(
        default="kl",
        description="distance between the matrices of a head; scores: mse of the scores before the softmax",
    )


class RelationMatching(Section):
    """MiniLM v2: relations between tokens, the softmax of scaled dot products of queries, keys or values."""

    weight: Weight | RampSection = Field(default=1.0, description="weight of this loss")
    layers: Layers | None = Field(
        default=None,
        description="which of the student's layers learn from which of the teacher's; null: the last one from the last",
    )
    queries: Weight = Field(default=1.0, description="weight of relations between queries")
    keys: Weight = Field(default=1.0, description="weight of relations between keys")
    values: Weight = Field(default=1.0, description="weight of relations between values")
    heads: Count | None = Field(
        default=None,
        description="relation heads that both sides' channels are cut into, such as 48; null: the greatest common "
        "divisor of their head counts",
    )


class OnPolicySection(Section):
    """GKD: batches of the student's own samples."""

    share: Share = Field(default=0.5, description="share of the steps that train on the student's samples")
    max_new_tokens: Batch = Field(default=128, description="tokens sampled after a prompt")
    temperature: Annotated[float, Field(ge=0.001, le=1000)] = Field(default=1.0, description="temperature of sampling")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from this share of the probability"
    )
    prompt_tokens: Batch = Field(default=32, description="first tokens of a plain text, which serve as its prompt")


class Routing(Section):
    """A bandit that chooses among several teachers' rationales by what they do for the student's held-out loss."""

    algorithm: Literal["ucb1", "exp3"] = Field(default="ucb1", description="algorithm of the bandit")
    every: Count = Field(default=50, description="steps on one teacher's rationales before the next choice")


class AdvanceSection(Section):
    """When a stage has done its work before its tokens are used up."""

    every: Count = Field(default=100, description="steps between measurements on held-out text")
    patience: Count | None = Field(
        default=None, description="measurements without improvement that end the stage; null: never"
    )
    improvement: Share = Field(default=0.001, description="share of the loss that counts as improvement")
    gap: Weight | None = Field(default=None, description="nats from the teacher's loss that end the stage; null: never")


class Stage(Phase):
    """A stage's budget and method."""

    name: StageName = Field(
        default="distil", description="name of the stage and its folder: small letters, digits, - and _"
    )
    learn_from: Literal["teacher", "previous", "average", "start"] = Field(
        default="teacher",
        description="teacher: the recipe's; previous: the student of the stage before; average: the student's moving "
        "average; start: the student as the stage finds it",
    )
    average_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.999, description="decay of the moving average that learn_from: average asks"
    )
    student: DistillStudent | None = Field(
        default=None,
        description="a smaller student from here on, made of the one so far or of `model`; null: the same one",
    )
    data: DistillData | None = Field(
        default=None, description="the stage's own text to train on (its `train` alone counts); null: the recipe's"
    )
    cache: Place | None = Field(
        default=None, description="folder that `mohawk cache` wrote: the teacher's answers instead of the teacher"
    )
    divergence: Divergence = Field(default="forward_kl", description="divergence between next-token distributions")
    beta: Share = Field(
        default=0.5,
        description="beta of jsd: 0 is forward, 1 reverse KL; of adaptive_kl: the mass of the teacher's head, its "
        "likeliest words",
    )
    lam: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="skew of skew_kl and skew_reverse_kl")
    temperature: Literal["auto"] | Annotated[float, Field(ge=0.001, le=1000)] | RampSection = Field(
        default=1.0, description="temperature of both distributions; auto: log2(size ratio) + 1"
    )
    kd_weight: Weight | RampSection = Field(default=1.0, description="weight of the divergence")
    ce_weight: Weight | RampSection = Field(default=0.0, description="weight of the cross entropy with the text")
    kd_on: Literal["labels", "all"] = Field(
        default="labels",
        description="of masked_lm: the divergence is of masked words, or of all real tokens (as DistilBERT's)",
    )
    confidence: bool | Literal["label", "entropy"] = Field(
        default=False,
        description="true: weigh the divergence of a token by the teacher's probability of its label; label, entropy: "
        "by that or by how low the teacher's entropy is, and the cross entropy by what it loses",
    )
    taid: Taid | None = Field(default=None, description="a target that moves from the student to the teacher")
    hidden: HiddenMatching | None = Field(default=None, description="match hidden states")
    attention: AttentionMatching | None = Field(default=None, description="match attention or mixing matrices")
    relations: RelationMatching | None = Field(
        default=None, description="match relations between queries, keys and values (MiniLM)"
    )
    on_policy: OnPolicySection | None = Field(default=None, description="train on the student's own samples")
    policy_gradient: Literal["normalized", "sum"] | None = Field(
        default=None,
        description="MiniLLM's gradient of whole sequences, of reverse_kl on samples (on_policy of share 1): what a "
        "token does to those behind it, as their mean or sum; null: each token's divergence by itself",
    )
    routing: Routing | None = Field(
        default=None, description="choose among the sources of rationales, each one teacher's, while training"
    )
    advance: AdvanceSection | None = Field(default=None, description="end early; null: when the tokens are used up")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-4, description="learning rate after warmup")
    # pyrefly: ignore[bad-override]  # a recipe is frozen, and gives one of the two
    tokens: Count | None = Field(
        default=100_000_000, description="training tokens of the stage; null: `epochs` says how long it is"
    )
    epochs: Count | None = Field(
        default=None, description="instead of tokens: how often each row is read, in an order of its own each time"
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_or_epochs(cls, given: Any) -> Any:
        """Epochs alone leave out the default of tokens."""
        if isinstance(given, dict) and given.get("epochs") is not None and "tokens" not in given:
            return {**given, "tokens": None}
        return given

    def asked_rows(self) -> int | None:
        """How many rows all steps read; None: as many as `epochs` make of the data."""
        return None if self.tokens is None else self.steps() * self.rows

    def told(self) -> tuple[str, str]:
        if self.tokens is not None:
            return super().told()
        return f"{self.epochs} epoch{'s' * (self.epochs != 1)}", "as rows make"


@runtime_checkable
class StageRecipe(Protocol):
    """What stages of distillation ask of the recipe that they are of: a distillation's own, or a pruning's."""

    @property
    def teacher(self) -> DistillTeacher | None: ...
    @property
    def teachers(self) -> list[DistillTeacher]: ...
    @property
    def combine(self) -> str: ...
    @property
    def student(self) -> DistillStudent: ...
    @property
    def data(self) -> DistillData: ...
    @property
    def stages(self) -> list[Stage]: ...
    @property
    def seed(self) -> int: ...
    def section_of(self, stage: Stage, i: int) -> str:
        """Where a stage's settings stand in the recipe; i: its place among the stages."""
        ...


class DistillRecipe(RecipeFile):
    """A whole distillation."""

    task: Literal["causal_lm", "masked_lm", "classification"] = Field(
        default="causal_lm",
        description="what the models do: write text from left to right; fill in masked words (BERT and other "
        "encoders); tell the class of a text",
    )
    masking: MaskingSection = Field(default=MaskingSection(), description="of task: masked_lm, which words are masked")
    # pyrefly: ignore[bad-override]  # a recipe is frozen
    teacher: DistillTeacher | None = Field(
        description="the model to learn from; null: none, the student learns from the text alone, or from a cache"
    )
    align: Literal["spans", "uld"] | None = Field(
        default=None,
        description="how a teacher with another tokenizer than the student's is compared; spans: the divergence of "
        "spans of tokens that are the same bytes; uld: the distance of sorted probabilities; null: it is refused",
    )
    teachers: list[DistillTeacher] = Field(default=[], description="further teachers")
    combine: Literal["probabilities", "logits", "row"] = Field(
        default="probabilities",
        description="how several teachers are combined; row: each source or example has its own (teacher, "
        "teacher_field)",
    )
    student: DistillStudent = Field(default=DistillStudent(), description="the model that learns")
    data: DistillData = Field(description="the text to train and evaluate on")
    stages: list[Stage] = Field(min_length=1, description="stages of training, one after another")
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the final student's weights, which are trained in float32"
    )
    report_to: list[Text] = Field(
        default=[], description="experiment trackers of transformers (tensorboard, wandb, ...)"
    )

    def phase_names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    def trained(self) -> dict[str, tuple[str, Any]]:
        return {stage.name: (at, stage) for at, stage in self.stage_places().items()}

    def stage_places(self) -> dict[str, Any]:
        return {self.section_of(stage, i): stage for i, stage in enumerate(self.stages)}

    def section_of(self, stage: Stage, i: int) -> str:
        return f"stages.{i}"

    def has_adapter(self) -> bool:
        """Whether any stage trains adapters (LoRA)."""
        return any((stage.student or self.student).lora for stage in self.stages)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
        yield from recipe_contradictions(self)

"""What a run's JSON files look like, for `read_json` to tell whole ones. Further keys are allowed."""

from __future__ import annotations

import typing
from typing import Any

from typing_extensions import NotRequired, TypedDict

from mohawk.models.cutting.sizes import Sizes


class OfSource(TypedDict):
    """Some of a `Comparison`, of one source's tokens."""

    tokens: int
    teacher_perplexity: float
    student_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float
    kl_error: float | None
    log_ratio_error: float | None
    teacher_accuracy: float
    student_accuracy: float


class Compared(TypedDict):
    """A `mohawk.measures.compare.Comparison`."""

    tokens: int
    teacher_perplexity: float
    student_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float
    # which earlier versions did not measure
    kl_error: NotRequired[float | None]
    log_ratio_error: NotRequired[float | None]
    worst_kl: NotRequired[float]
    top5_overlap: NotRequired[float]
    acceptance: NotRequired[float | None]
    accepted: NotRequired[list[float | None]]
    teacher_accuracy: NotRequired[float]
    student_accuracy: NotRequired[float]
    teacher_confidence: NotRequired[float]
    student_confidence: NotRequired[float]
    teacher_calibration: NotRequired[float]
    student_calibration: NotRequired[float]
    teacher_f1: NotRequired[float | None]  # of classes
    student_f1: NotRequired[float | None]
    teacher_roc_auc: NotRequired[float | None]
    student_roc_auc: NotRequired[float | None]
    sources: NotRequired[dict[str, OfSource]]


class Told(TypedDict):
    """A `mohawk.measures.alone.Alone`: of a student that no teacher can be compared with token by token."""

    tokens: int
    student_perplexity: float
    bits_per_byte: float | None
    student_accuracy: float
    student_confidence: float
    teacher_bits_per_byte: float | None


class Speed(TypedDict):
    """A `mohawk.measures.compare.DecodeSpeed`."""

    context: int
    tokens_per_s: float
    state_bytes: int


class TaskFigures(TypedDict):
    kind: str
    fewshot: int | None
    questions: int
    of: int
    metrics: dict[str, dict[str, bool | float | None]]


class Group(TypedDict):
    members: list[str]
    metrics: dict[str, dict[str, bool | float | None]]


class Tasks(TypedDict):
    """evaluation/tasks.json."""

    student: str
    fingerprint: str | None
    tasks: dict[str, TaskFigures]
    groups: dict[str, Group]


class QuantizedRow(TypedDict):
    """A student in one format, or as it is (`as it is`)."""

    bytes: int
    texts: dict[str, Compared]
    consistency: dict[str, float]
    quantised: float | None


class Quantized(TypedDict):
    """evaluation/quantized.json."""

    student: str
    fingerprint: str | None
    dtype: str
    formats: dict[str, QuantizedRow]


class Measured(TypedDict, total=False):
    """The part of results.json that is not measured again."""

    recipe: dict[str, Any]
    decoding: dict[str, list[Speed]]
    continuations: dict[str, str]
    broken: str | None
    behaviour: dict[str, Any]


class Tabled(TypedDict):
    """The part of results.json that its tables are made of."""

    evaluation: dict[str, dict[str, Compared] | dict[str, Told]]
    decoding: dict[str, list[Speed]]
    parameters: dict[str, int]
    dtypes: dict[str, str]
    phases: dict[str, dict[str, float | None]]
    stages: NotRequired[dict[str, str]]
    own_tables: NotRequired[list[list[Any]]]
    behaviour: NotRequired[dict[str, Any]]
    layers: NotRequired[list[dict[str, Any]]]
    quantized: NotRequired[Quantized]


class Results(Tabled):
    """results.json, as its report needs it."""

    architecture: str
    teacher: str | None
    continuations: dict[str, str]
    plots: list[str]
    machine: dict[str, Any]


class Compares(TypedDict):
    """The part of results.json that runs are compared by."""

    evaluation: dict[str, dict[str, Compared] | dict[str, Told]]
    parameters: dict[str, int]
    phases: dict[str, dict[str, float | None]]
    broken: NotRequired[str | None]


class Contribution(TypedDict):
    """A further run in composed.json, and which layers' mixers are its."""

    run: str
    student: str
    layers: list[int]


class Composed(TypedDict):
    """composed.json."""

    run: str
    student: str
    attention: list[int]
    others: NotRequired[list[Contribution]]
    budget: NotRequired[str | None]
    by: NotRequired[str]
    interval: NotRequired[int]


class Point(TypedDict):
    kl: float
    recall: dict[str, float]


class Ranking(TypedDict):
    order: list[int]
    path: list[Point]


class Pattern(TypedDict):
    """Attention at every so many layers, and what that costs."""

    attention: list[int]
    cost: Point


class Selection(TypedDict):
    """selection.json."""

    settings: dict[str, Any]
    rankings: dict[str, Ranking]
    patterns: NotRequired[dict[str, Pattern]]


# pyrefly: ignore[invalid-argument]  # the fields of a dataclass, whatever they are
SizesRow = TypedDict("SizesRow", typing.get_type_hints(Sizes))


class Candidate(TypedDict):
    sizes: SizesRow
    layers: NotRequired[list[int]]
    parameters: NotRequired[int]
    cost: NotRequired[float]
    kl_as_cut: NotRequired[float]
    perplexity: NotRequired[float]
    kl: NotRequired[float]


class Search(TypedDict):
    """rounds/N/search.json."""

    candidates: list[Candidate]
    budget: dict[str, Any]
    picked: NotRequired[int]


class CutMade(TypedDict):
    """rounds/N/cut.json."""

    before: SizesRow
    after: SizesRow
    layers: list[int]
    parameters: int
    outside_embedding_and_head: int


class Drops(TypedDict):
    """rounds/N/layers.json."""

    kl: list[float]
    perplexity: list[float]
    whole: float


class KeptVocabulary(TypedDict):
    """vocabulary.json."""

    before: int
    after: int
    why: NotRequired[dict[str, int]]  # which 0.1.0 did not write
    held_out: NotRequired[float]
    evaluation: NotRequired[float]


class Bound(TypedDict):
    """run.json (mohawk/runs/binding.py)."""

    id: str
    command: str
    recipe: dict[str, Any]
    inputs: dict[str, list[str]] | None
    precision: str | None
    versions: dict[str, str]
    sums: NotRequired[bool]  # every file of the run is written with its sum; an earlier version's had none

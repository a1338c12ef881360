"""Values of a distillation's recipe that are each allowed and together make no sense: (the values, what is wrong)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mohawk.conversion.recipe import student_contradictions
from mohawk.schema.base import Contradiction, phase_contradictions

if TYPE_CHECKING:
    from mohawk.distillation.recipe import (
        DistillData,
        DistillRecipe,
        DistillSource,
        DistillStudent,
        RampSection,
        Stage,
        StageRecipe,
    )
    from mohawk.schema.yaml_text import Path

MATCHED = ("hidden", "attention", "relations")  # of a stage, between layers
RESERVED = ("before", "tasks", "again")  # files in a run's folder `evaluation` that no stage is called by


def recipe_contradictions(recipe: DistillRecipe) -> Iterator[Contradiction]:
    """What contradicts itself in a whole distillation."""
    students = [recipe.student, *(stage.student for stage in recipe.stages if stage.student)]
    if not any(s.model or s.layers is not None or s.scratch or s.hybrid or s.lora for s in students):
        if all(stage.learn_from == "teacher" for stage in recipe.stages):
            yield (
                [("student", "layers")],
                "student: the teacher itself, whole, would learn from itself; name a model, the layers to keep, "
                "scratch: true, a hybrid, or stages with learn_from: average",
            )
    hybrids = [(("student",), recipe.student)]
    hybrids += [(("stages", i, "student"), stage.student) for i, stage in enumerate(recipe.stages) if stage.student]
    for at, student in hybrids:
        if student.hybrid is not None:
            yield from student_contradictions(student.hybrid, (*at, "hybrid"))
        if student.scratch and student.lora is not None:
            yield (
                [(*at, "scratch"), (*at, "lora")],
                f"{'.'.join(map(str, at))}: scratch: true with lora trains adapters on weights that stay "
                "random; leave one of the two out",
            )
    for i, stage in enumerate(recipe.stages):
        lora = (stage.student or recipe.student).lora
        if recipe.sharding.kind == "full" and lora is not None and stage.learn_from in ("average", "start"):
            yield (
                [("sharding", "kind"), ("stages", i, "learn_from")],
                f"stages.{i}.learn_from: got {stage.learn_from} with an adapter, whose average cannot be held in "
                "parts; set sharding.kind: none, or leave lora out",
            )
    if recipe.combine == "row" and recipe.teacher is not None:
        asking = [("data", recipe.data)] + [(f"stages.{i}.data", s.data) for i, s in enumerate(recipe.stages) if s.data]
        for name, data in asking:
            if not any(source.teacher_field or source.teacher for source in data.train):
                yield (
                    [("combine",)],
                    f"combine: row needs {name}.train with a teacher_field that names each example's teacher, or a "
                    "teacher for each source",
                )
    yield from _named_teachers(recipe)
    yield from data_contradictions(recipe.data, ("data",))
    yield from task_contradictions(recipe)
    yield from teacher_contradictions(recipe)
    names = [stage.name for stage in recipe.stages]
    for i, stage in enumerate(recipe.stages):
        at = ("stages", i)
        label = f"stages.{i} ({stage.name})"
        if stage.name in names[:i]:
            yield [(*at, "name")], f"{label}: another stage has this name; give each its own"
        if stage.name in RESERVED:
            yield [(*at, "name")], f"{label}: results have that name for something else; choose another"
        yield from phase_contradictions(stage, at, label, "leave the stage out")
        if stage.data is not None:
            yield from data_contradictions(stage.data, (*at, "data"))
            if stage.cache is not None:
                yield (
                    [(*at, "data"), (*at, "cache")],
                    f"{label}: a cache is of the recipe's text, not of the stage's own; leave out one of them",
                )
        yield from stage_contradictions(recipe, stage, i, at, label)


def task_contradictions(recipe: DistillRecipe) -> Iterator[Contradiction]:
    """What contradicts the task of a recipe's models."""
    task = recipe.task
    if task != "masked_lm":
        if recipe.masking != type(recipe.masking)():
            yield [("masking",), ("task",)], f"masking: is of task: masked_lm, but the task is {task}; leave it out"
        for i, stage in enumerate(recipe.stages):
            if stage.kd_on != "labels":
                yield (
                    [("stages", i, "kd_on"), ("task",)],
                    f"stages.{i} ({stage.name}): kd_on: all is of task: masked_lm, but the task is {task}; leave "
                    "it out",
                )
    elif recipe.masking.masked + recipe.masking.random > 1:
        yield (
            [("masking", "masked"), ("masking", "random")],
            f"masking: masked {recipe.masking.masked:g} and random {recipe.masking.random:g} are shares of the masked "
            "words and together exceed 1; lower one",
        )
    if task != "classification":
        for at, own in _data_of(recipe):
            for key in ("label_field", "pair_field"):
                if getattr(own, key) != type(own).model_fields[key].default:
                    name = ".".join(map(str, (*at, key)))
                    yield [(*at, key), ("task",)], f"{name}: is of task: classification, but the task is {task}"
    if task == "causal_lm":
        return
    if recipe.sharding.kind == "full":
        yield (
            [("sharding", "kind"), ("task",)],
            f"sharding.kind: full, but models of task: {task} are whole on each process; set it to none or auto",
        )
    if recipe.teacher is None:
        yield [("teacher",), ("task",)], f"teacher: null is of causal language models, but the task is {task}; name one"
    elif recipe.align is not None:
        yield [("align",), ("task",)], f"align: is of causal language models, but the task is {task}; leave it out"
    if recipe.combine == "row":
        yield [("combine",), ("task",)], f"combine: row is of prompts with responses, not of task: {task}; leave it out"
    for at, student in _students_of(recipe):
        for key in ("hybrid", "lora"):
            if getattr(student, key) is not None:
                name = ".".join(map(str, (*at, key)))
                yield [(*at, key), ("task",)], f"{name}: is of causal language models, but the task is {task}"
    for at, own in _data_of(recipe):
        for i, source in enumerate(own.train):
            name = ".".join(map(str, (*at, "train", i)))
            if (
                source.kind != "text"
                or source.own_loss is not None
                or source.sampling_weight
                or source.loss_weight != 1
            ):
                yield (
                    [(*at, "train", i), ("task",)],
                    f"{name}: kind, own_loss, sampling_weight and loss_weight are of causal language models, but the "
                    f"task is {task}; leave them out",
                )
    for i, stage in enumerate(recipe.stages):
        if stage.cache is not None:
            why = "its masks change with each step" if task == "masked_lm" else "its rows are read in another form"
            yield (
                [("stages", i, "cache"), ("task",)],
                f"stages.{i} ({stage.name}): cache: answers to text of task: {task} are not kept, since {why}; leave "
                "it out",
            )
        for key in ("on_policy", "policy_gradient", "routing"):
            if getattr(stage, key) is not None:
                yield (
                    [("stages", i, key), ("task",)],
                    f"stages.{i} ({stage.name}): {key} is of causal language models, but the task is {task}; leave it "
                    "out",
                )


def _data_of(recipe: DistillRecipe) -> Iterator[tuple[Path, DistillData]]:
    """The recipe's data and its stages' own, by where they stand."""
    yield ("data",), recipe.data
    yield from ((("stages", i, "data"), stage.data) for i, stage in enumerate(recipe.stages) if stage.data is not None)


def _students_of(recipe: DistillRecipe) -> Iterator[tuple[Path, DistillStudent]]:
    yield ("student",), recipe.student
    yield from ((("stages", i, "student"), s.student) for i, s in enumerate(recipe.stages) if s.student is not None)


def _named_teachers(recipe: DistillRecipe) -> Iterator[Contradiction]:
    """Sources that name a teacher which is not there, or which nobody asks for."""
    if recipe.teacher is None:  # which `_without_teacher` tells
        return
    given = [recipe.teacher, *recipe.teachers]
    names = [teacher.name or str(i) for i, teacher in enumerate(given)]
    for at, data in _data_of(recipe):
        for i, source in enumerate(data.train):
            name = ".".join(map(str, (*at, "train", i)))
            if source.teacher is None:
                continue
            if recipe.combine != "row":
                yield (
                    [(*at, "train", i, "teacher"), ("combine",)],
                    f"{name}.teacher: names a teacher, but combine is {recipe.combine}, so that all are asked; set "
                    "combine: row, or leave it out",
                )
            elif source.teacher not in names:
                yield (
                    [(*at, "train", i, "teacher")],
                    f"{name}.teacher: got {source.teacher!r}; the recipe's teachers: {', '.join(names)}",
                )
            elif source.teacher_field is not None:
                yield (
                    [(*at, "train", i, "teacher")],
                    f"{name}: teacher and teacher_field both name who answers; leave out one of them",
                )


def teacher_contradictions(recipe: DistillRecipe) -> Iterator[Contradiction]:
    """What a recipe asks of a teacher that it does not have, or of one whose tokens are others than the student's."""
    if recipe.teacher is None:
        yield from _without_teacher(recipe)
    if recipe.align is not None:
        yield from _aligned(recipe)


def _without_teacher(recipe: DistillRecipe) -> Iterator[Contradiction]:
    if recipe.teachers:
        yield [("teacher",), ("teachers",)], "teachers: got some, but teacher is null; name the first one in teacher"
    if recipe.align is not None:
        yield [("align",)], f"align: got {recipe.align}, but teacher is null; leave it out"
    if recipe.student.model is None:
        yield (
            [("student", "model")],
            "student.model: is needed where teacher is null, as nothing else gives the student",
        )
    if recipe.combine != "probabilities":
        yield [("combine",)], f"combine: got {recipe.combine}, but teacher is null; leave it out"
    for at, part in _data_of(recipe):
        for i, source in enumerate(part.train):
            for key in ("teacher", "teacher_field"):
                if getattr(source, key) is not None:
                    name = ".".join(map(str, (*at, "train", i)))
                    yield [(*at, "train", i)], f"{name}.{key}: names a teacher, but teacher is null; leave it out"
    for i, stage in enumerate(recipe.stages):
        at, label = ("stages", i), f"stages.{i} ({stage.name})"
        if stage.advance is not None and stage.advance.gap is not None:
            yield [(*at, "advance")], f"{label}: advance.gap is from the teacher, which is null; give patience instead"
        if stage.temperature == "auto":
            yield [(*at, "temperature")], f"{label}: temperature: auto needs a teacher, which is null; give a number"
        if stage.learn_from != "teacher" or stage.cache is not None:
            continue
        owns = [source.own_loss.kd_weight for source in (stage.data or recipe.data).train if source.own_loss]
        if any(map(_counts, (stage.kd_weight, *owns))):
            yield (
                [(*at, "kd_weight"), ("teacher",)],
                f"{label}: a kd_weight above 0 needs a teacher, and teacher is null; set kd_weight: 0 and ce_weight: "
                "1, or give a cache",
            )
        for key in MATCHED:
            if getattr(stage, key) is not None:
                yield [(*at, key)], f"{label}: {key} matches a teacher's layers, and teacher is null; leave it out"
        for key in ("taid", "confidence", "on_policy", "policy_gradient"):
            if getattr(stage, key):
                yield [(*at, key)], f"{label}: {key} asks a teacher, and teacher is null; leave it out"


def _aligned(recipe: DistillRecipe) -> Iterator[Contradiction]:
    if recipe.student.model is None:
        yield (
            [("student", "model"), ("align",)],
            "align: is between a teacher and a student with another tokenizer; name the student in student.model, or "
            "leave align out",
        )
    if recipe.teachers:
        yield (
            [("teachers",), ("align",)],
            "teachers: several cannot be aligned with the student's tokens; leave align out",
        )
    if recipe.sharding.kind == "full":
        yield (
            [("sharding", "kind"), ("align",)],
            "align: needs whole models on each process; set sharding.kind: none, or leave align out",
        )
    for i, stage in enumerate(recipe.stages):
        at, label = ("stages", i), f"stages.{i} ({stage.name})"
        if stage.advance is not None and stage.advance.gap is not None:
            yield (
                [(*at, "advance"), ("align",)],
                f"{label}: advance.gap is in nats a token, and the teacher's tokens are others; give patience instead",
            )
        if stage.learn_from != "teacher":
            continue
        owns = [source.own_loss for source in (stage.data or recipe.data).train if source.own_loss is not None]
        named = {stage.divergence, *(own.divergence for own in owns if own.divergence is not None)}
        if recipe.align == "uld" and (others := sorted(named - {"forward_kl"})):
            yield (
                [(*at, "divergence"), ("align",)],
                f"{label}: divergence: {others[0]}, but align: uld takes the distance of sorted probabilities instead; "
                "leave it out, or set align: spans",
            )
            named = set()
        asked = {
            **{key: getattr(stage, key) is not None for key in MATCHED},
            "taid": stage.taid is not None, "confidence": stage.confidence,
            "policy_gradient": stage.policy_gradient is not None,
            "divergence": bool(named & {"mse", "cosine"}),
        }  # fmt: skip
        for key in (key for key, given in asked.items() if given):
            yield (
                [(*at, key), ("align",)],
                f"{label}: {key} needs a teacher that reads the student's own tokens; leave it out, or align",
            )


def _ends(value: float | RampSection) -> tuple[float, ...]:
    """A number's values over a stage, of which the largest and the smallest are among these."""
    return (value,) if isinstance(value, (int, float)) else (value.start, value.end)


def _counts(weight: float | RampSection) -> bool:
    """Whether a weight is ever above 0."""
    return max(_ends(weight)) > 0


def data_contradictions(data: DistillData, at: Path) -> Iterator[Contradiction]:
    """What contradicts itself in the recipe's data, or a stage's own. at: where they stand in the recipe."""
    if all(source.loss_weight == 0 for source in data.train):
        yield [(*at, "train")], f"{'.'.join(map(str, at))}.train: every loss_weight is 0, so there is nothing to learn"
    named = [bool(source.teacher_field or source.teacher) for source in data.train]
    if any(named) and not all(named):
        without = named.index(False)
        name = ".".join(map(str, (*at, "train")))
        yield (
            [(*at, "train", without)],
            f"{name}.{without}: has no teacher or teacher_field, but {name}.{named.index(True)} has one: rows of both "
            "would share batches, and each needs a teacher; give both one, or neither",
        )
    if all(source.own_loss for source in data.train):
        yield (
            [(*at, "train")],
            f"{'.'.join(map(str, at))}.train: every source has an own_loss, so the stages' kd_weight and ce_weight are "
            "of nothing; leave one source without",
        )
    of = {
        "pairs": ("teacher_field", "weight_field", "weighting", "chat", "turns", "length_normalized"),
        "rationales": ("rationale_weight", "label_prefix", "rationale_prefix", "templates"),
    }
    for i, source in enumerate(data.train):
        name = ".".join(map(str, (*at, "train", i)))
        if source.own_loss is not None and source.kind == "rationales":
            yield (
                [(*at, "train", i)],
                f"{name}: own_loss is of text and pairs; rationales have rationale_weight beside their labels",
            )
        own = source.own_loss
        if own is not None and not (_counts(own.kd_weight) or _counts(own.ce_weight)):
            yield [(*at, "train", i)], f"{name}: own_loss has no weight above 0; leave the source out"
        given = [key for key in ("divergence", "beta", "lam") if own is not None and getattr(own, key) is not None]
        if own is not None and given and not _counts(own.kd_weight):
            yield (
                [(*at, "train", i, "own_loss", given[0])],
                f"{name}.own_loss: {', '.join(given)} of a divergence whose kd_weight is 0; give it a kd_weight "
                "above 0, or leave it out",
            )
        for kind, keys in of.items():
            given = [key for key in keys if key in source.model_fields_set and source.kind != kind]
            given = [key for key in given if getattr(source, key) != type(source).model_fields[key].default]
            if given:
                yield (
                    [(*at, "train", i)],
                    f"{name}: {', '.join(given)} is of kind: {kind}, but the kind is {source.kind}; set the kind, or "
                    "leave it out",
                )


def _length_contradictions(
    stage: Stage, train: Sequence[DistillSource], at: Path, label: str
) -> Iterator[Contradiction]:
    """Of `tokens` and `epochs`, one of which says how long a stage is."""
    if (stage.tokens is None) == (stage.epochs is None):
        yield (
            [(*at, "tokens"), (*at, "epochs")],
            f"{label}: {'both' if stage.tokens else 'neither'} of tokens and epochs; give one, the other is null",
        )
    if stage.epochs is None:
        return
    if len(train) > 1 and any(source.sampling_weight is not None for source in train):
        yield (
            [(*at, "epochs")],
            f"{label}: epochs read every row equally often, but sampling_weight draws sources in other proportions; "
            "give tokens, or leave the weights out",
        )
    if stage.routing is not None:
        yield [(*at, "epochs"), (*at, "routing")], f"{label}: routing chooses what is read; give tokens, not epochs"


def stage_contradictions(recipe: StageRecipe, stage: Stage, i: int, at: Path, label: str) -> Iterator[Contradiction]:
    """What contradicts itself in the recipe's i-th stage. label: its name in messages."""
    yield from _length_contradictions(stage, (stage.data or recipe.data).train, at, label)
    given = {key: part for key in MATCHED if (part := getattr(stage, key)) is not None}
    matched = next(iter(given), None)
    weights = (stage.kd_weight, stage.ce_weight, *(part.weight for part in given.values()))
    if not any(map(_counts, weights)) and not any(source.own_loss for source in (stage.data or recipe.data).train):
        yield (
            [(*at, "kd_weight"), (*at, "ce_weight")],
            f"{label}: kd_weight and ce_weight are both 0 and no layers are matched with a weight, so there is nothing "
            "to learn; raise one",
        )
    if stage.learn_from == "previous" and i == 0:
        yield [(*at, "learn_from")], f"{label}: learn_from: previous, but it is the first stage; use teacher"
    if stage.cache is not None:
        for key in (*MATCHED, "on_policy", "taid"):
            if getattr(stage, key) is not None:
                yield (
                    [(*at, key), (*at, "cache")],
                    f"{label}: {key} needs the teacher itself, but cache holds only its answers on the text; "
                    "leave out one of them",
                )
        if stage.learn_from != "teacher":
            yield (
                [(*at, "learn_from"), (*at, "cache")],
                f"{label}: a cache holds the teacher's answers, but learn_from is {stage.learn_from}; leave out one",
            )
    if stage.routing is not None:
        sources = (stage.data or recipe.data).train
        if len(sources) < 2 or any(source.kind != "rationales" for source in sources):
            yield (
                [(*at, "routing")],
                f"{label}: routing chooses among two or more sources of kind: rationales, and nothing else is read; "
                "give the stage such data",
            )
        if stage.cache is not None:
            yield [(*at, "routing"), (*at, "cache")], f"{label}: routing reads its own rows; leave out the cache"
    if recipe.combine == "row" and matched:
        yield (
            [(*at, matched)],
            f"{label}: with combine: row the teachers have no layers in common to match; leave it out",
        )
    if stage.temperature == "auto" and (stage.learn_from != "teacher" or stage.cache or recipe.teachers):
        yield (
            [(*at, "temperature")],
            f"{label}: temperature: auto compares the sizes of one teacher and the student; give a number",
        )
    if stage.temperature != "auto" and (least := min(_ends(stage.temperature))) < 0.001:
        yield [(*at, "temperature")], f"{label}: a temperature of {least:g}; use one of at least 0.001"
    if stage.taid is not None and stage.taid.start > stage.taid.end:
        yield [(*at, "taid")], f"{label}: taid starts at {stage.taid.start:g}, above its end {stage.taid.end:g}"
    if stage.advance is not None and stage.advance.patience is None and stage.advance.gap is None:
        yield [(*at, "advance")], f"{label}: advance never ends the stage; give patience, gap or both"
    if (relations := stage.relations) is not None and not (relations.queries or relations.keys or relations.values):
        names = ("queries", "keys", "values")
        yield (
            [(*at, "relations", name) for name in names],
            f"{label}: relations has weights of 0 alone ({', '.join(names)}); raise one, or leave it out",
        )
    if stage.policy_gradient is not None:
        sampling = stage.on_policy
        asked = {
            "divergence": (stage.divergence == "reverse_kl", "divergence: reverse_kl"),
            "temperature": (stage.temperature == 1, "temperature: 1"),
            "taid": (stage.taid is None, "taid: null"),
            "confidence": (not stage.confidence, "confidence: false"),
            "on_policy": (
                sampling is not None and (sampling.share, sampling.temperature, sampling.top_p) == (1, 1, 1),
                "on_policy of share, temperature and top_p 1",
            ),
        }
        if missing := {key: words for key, (fine, words) in asked.items() if not fine}:
            yield (
                [(*at, "policy_gradient"), *((*at, key) for key in missing)],
                f"{label}: policy_gradient needs {', '.join(missing.values())}: it is the gradient of reverse KL on "
                "the student's own samples; change that, or leave it out",
            )
    owns = [source.own_loss.divergence for source in (stage.data or recipe.data).train if source.own_loss]
    if stage.taid and any(name in ("mse", "cosine") for name in (stage.divergence, *owns)):
        yield [(*at, "divergence"), (*at, "taid")], f"{label}: taid is of divergences between distributions"

"""What a recipe names, looked at before any weights are: tokenizers, packages, the texts' fields, caches.

Both `--dry-run` and the beginning of a run ask here, so that nothing is found wrong after models were loaded that could
have been found before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mohawk.data.aligned_rows import TokenAligner
from mohawk.data.encoder_rows import LabelFields, labelled_row
from mohawk.data.messages import OTHER_FIELDS
from mohawk.data.pair_tokens import check_pair, no_weights
from mohawk.data.records import first_records, read_records
from mohawk.data.source_files import NotThere, as_source, check_encoding, local_files
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
from mohawk.data.tokenizers.same_tokenizer import check_embedding_rows, check_same, own_tokenizer, teacher_tokenizer
from mohawk.errors import UserError
from mohawk.loading.causal import position_rows
from mohawk.loading.configs import load_config
from mohawk.loading.models import model_shape, quantization
from mohawk.loading.tasks import CAUSAL, class_names, task_in
from mohawk.losses.rationales import TEMPLATES, check_record
from mohawk.schema.base import sections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.distillation.recipe import DistillSource
    from mohawk.schema.base import CheckpointSection, RecipeFile

log = logging.getLogger(__name__)

LOOKED_AT = 200  # rows of a text that are read
CHARACTERS = 1 << 26  # of a source's text files that are read, all of them together


def check_inputs(
    recipe: RecipeFile, *, planning: bool = False, further: Callable[[PreTrainedTokenizerBase], None] | None = None
) -> str:
    """Everything of a recipe that can be checked without weights and without reading all the text.

    Returns what was read of each text, for people to know how far this goes.

    planning: texts, and a tokenizer beside the teacher, may not be there yet, which is then a line of the log. further:
    what a kind of recipe has to check with the tokenizer besides, before texts are looked at.

    Raises:
        UserError: a tokenizer that is not the teacher's or larger than its model, a package that is missing, rows that
            are longer than a model has positions for, a text that is not there, whose rows lack a field or have
            something else in it, a cache that does not fit.
    """
    about: Any = recipe.teacher
    missing = about is not None and about.tokenizer is None and own_tokenizer(about.model, **about.where) is None
    if planning and missing:
        log.warning("teacher: %s has no tokenizer; what depends on it is not checked", about.model)
    tokenizer = None if planning and missing else _check_tokenizers(recipe)
    for name, teacher in _teachers(recipe):
        _check_packages(name, teacher)
    check_lengths(recipe)
    if tokenizer is not None and further is not None:
        further(tokenizer)
    stages = [("", recipe), *((f"{at}.", stage) for at, stage in recipe.stage_places().items())]
    names = [getattr(teacher, "name", None) or str(i) for i, (_, teacher) in enumerate(_teachers(recipe))]
    texts = {}
    for at, part in stages:
        if part.data is not None:
            texts |= {f"{at}data.train.{i}": source for i, source in enumerate(part.data.train)}
    texts |= {f"data.evaluation.{i}": source for i, source in enumerate(recipe.data.evaluation)}
    read = []
    for at, source in texts.items():
        try:
            local_files(as_source(source))
        except NotThere as error:
            if not planning:
                raise
            log.warning("%s: not checked: %s", at, error)
        else:
            read.append(f"{at}: {_check_source(source, at, tokenizer, names)}")
            _check_labels(recipe, at, source)
    text = f"Read of the text: {'; '.join(read)}. The rest is checked when a run reads it, before any weights."
    return "\n".join([text, *_unknown(recipe)])


def _unknown(recipe: RecipeFile) -> Iterator[str]:
    """A line for each model of which a plan cannot say that it is what it has to be."""
    for name, model in [*_teachers(recipe), *_students(recipe)]:
        if not model.trust_remote_code:
            continue
        config = load_config(model.model, **model.where, task=task_in(recipe))
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            yield (
                f"Not known of {name}: {model.model} is run by Python code that comes with it. That the code loads its "
                "weights, and predicts each token from those before it alone, is checked when the run loads it, before "
                "anything is trained."
            )


def _teachers(recipe: RecipeFile) -> list[tuple[str, Any]]:
    """The recipe's teachers by where they stand in it."""
    further = getattr(recipe, "teachers", [])
    first = [] if recipe.teacher is None else [("teacher", recipe.teacher)]
    return [*first, *((f"teachers.{i}", teacher) for i, teacher in enumerate(further))]


def _students(recipe: RecipeFile) -> Iterator[tuple[str, Any]]:
    """What is made of a checkpoint of its own, by where it stands in the recipe."""
    given = [("student", getattr(recipe, "student", None))]
    given += [(f"{at}.student", stage.student) for at, stage in recipe.stage_places().items()]
    return ((where, student) for where, student in given if getattr(student, "model", None) is not None)


def _check_tokenizers(recipe: RecipeFile) -> PreTrainedTokenizerBase:
    """The one that reads all text and is saved with the student: all models have to read its ids alike, but for a
    teacher whose tokens are aligned with them."""
    found = run_tokenizers(recipe)
    tokenizer: Any = found.text
    if found.teacher is not None:
        TokenAligner(tokenizer, found.teacher)  # which refuses those whose bytes are not known
    elif getattr(recipe, "align", None) is not None:
        log.warning("align: teacher and student have one tokenizer, so that their tokens are compared as they are")
    for name, teacher in _teachers(recipe)[1:]:
        where = teacher.where | {"who": name}
        own = None
        if task_in(recipe) != CAUSAL:
            own = own_tokenizer(teacher.model, **where)
        elif teacher.tokenizer is not None or own_tokenizer(teacher.model, **where) is not None:
            own = teacher_tokenizer(teacher.model, tokenizer=teacher.tokenizer, option=f"{name}.tokenizer", **where)
        _check_reads(tokenizer, own, teacher, name, task_in(recipe))
    for name, student in _students(recipe):
        own = own_tokenizer(student.model, **student.where, who=f"{name}.model")
        try:
            _check_reads(tokenizer, own, student, f"{name}.model", task_in(recipe))
        except UserError as error:
            aligns = name == "student" and hasattr(recipe, "align") and recipe.teacher is not None
            if own is None or not aligns or found.teacher is not None:
                raise
            raise UserError(f"{error}; or set align: spans, or uld, to distil between the two") from None
    return tokenizer


def _check_reads(tokenizer: Any, own: Any, given: CheckpointSection, name: str, task: str) -> None:
    """A model reads the ids of `tokenizer` as its own, if it comes with one, does, and has a row for each."""
    assert given.model is not None
    who = f"{name}: {given.model}"
    if own is not None:
        check_same(tokenizer, own, who)
        if own.chat_template and own.chat_template != tokenizer.chat_template:
            log.warning(
                "%s: its chat template is another one than the teacher's; all models read chats through the teacher's, "
                "which is saved with the student; align: spans has each read kind: pairs through its own", who,
            )  # fmt: skip
    else:
        log.warning("%s has no tokenizer to compare: it is taken to read ids as the teacher's does", who)
    rows = load_config(given.model, **given.where, who=name, task=task).get_text_config().vocab_size
    check_embedding_rows(tokenizer, rows, who, "the teacher's tokenizer")


def check_lengths(recipe: RecipeFile) -> None:
    """UserError where rows are longer than a model can read that looks positions up in a table, as far as that can be
    told without running code that comes with it."""
    rows = {at: section.sequence_length for at, section in sections(recipe) if hasattr(section, "sequence_length")}
    stages = recipe.stage_places()
    readers = [] if recipe.teacher is None else [("teacher", recipe.teacher, rows)]
    if getattr(recipe, "align", None) is not None:  # whose rows are of its own tokens, and end where it does
        readers = []
    readers += [(name, one, {at: rows[at] for at in stages}) for name, one in _teachers(recipe)[1:]]
    for name, student in _students(recipe):
        first = name.removesuffix("student").removesuffix(".")
        read = {"evaluation": rows["evaluation"]}
        for at, stage in list(stages.items())[list(stages).index(first) if first else 0 :]:
            if at != first and getattr(stage.student, "model", None) is not None:
                break  # which begins with a student of its own
            read[at] = rows[at]
        readers.append((f"{name}.model", student, read))
    too_long = []
    for name, model, read in readers:
        most = positions_of(model, name, task_in(recipe))
        too_long += [_too_long(at, rows, model.model, most) for at, rows in read.items() if most and rows > most]
    if too_long:
        raise UserError("\n".join(dict.fromkeys(too_long)))


def positions_of(model: CheckpointSection, who: str = "teacher", task: str = CAUSAL) -> int | None:
    """`position_rows` of a checkpoint by its configuration; None also where only its own code would tell."""
    assert model.model is not None
    config = load_config(model.model, **model.where, who=who, task=task)
    if getattr(config.get_text_config(), "rope_parameters", None) or getattr(config, "auto_map", None):
        return None
    return position_rows(model_shape(config, who=who, task=task))


def refuse_too_long(at: str, length: int, model: str, most: int | None) -> None:
    """UserError where rows, of the length that `at` gives, are longer than the `most` tokens that a model can read."""
    if most is not None and length > most:
        raise UserError(_too_long(at, length, model, most))


def _too_long(at: str, length: int, model: str | None, most: int) -> str:
    at = f"{at}.sequence_length".removeprefix(".")
    return f"{at}: got {length}, but {model} has positions for {most} tokens; give {most} or less"


def _check_packages(name: str, teacher: Any) -> None:
    if getattr(teacher, "quantize", None):
        quantization(teacher.quantize, name)
    if getattr(teacher, "device_map", None) and find_spec("accelerate") is None:
        raise UserError(f"{name}.device_map: auto needs the package accelerate; run: pip install accelerate")


def _check_source(source: Any, where: str, tokenizer: PreTrainedTokenizerBase | None, teachers: list[str]) -> str:
    """The first rows of a text that lies here; what lies on a hub is not asked for. Returns how many were read."""
    plain = as_source(source)
    files, form = local_files(plain)
    kind = getattr(source, "kind", "text")
    rows = list(first_records(plain, LOOKED_AT)) if files else []
    if kind == "text":
        if rows and not any(plain.field in row for _, row in rows):
            at, row = rows[0]
            fields = ", ".join(map(str, row)) or "none"
            others = f"; nor has any of the {len(rows) - 1} rows read behind it" if len(rows) > 1 else ""
            raise UserError(f"{where}: {at} has no field {plain.field!r}; its fields: {fields}{others}")
        if odd := [(at, row) for at, row in rows if not isinstance(row.get(plain.field), (str, type(None)))]:
            at, row = odd[0]
            raise UserError(f"{where}: {at}: field {plain.field!r} holds {type(row[plain.field]).__name__}, not text")
    elif kind == "pairs" and form == "parquet":
        # whose columns are those of all rows, so that they can be told even where no tokenizer is there yet
        needed = [source.prompt_field, source.messages_field]
        if not any(name in rows[0][1] for name in (*needed, *OTHER_FIELDS)):
            raise UserError(
                f"{where}: {rows[0][0]} has neither field {needed[0]!r} nor {needed[1]!r}; its fields: "
                f"{', '.join(rows[0][1])}"
            )
    if kind != "text":
        templates, learned = getattr(source, "templates", None) or TEMPLATES, kind != "rationales" or not rows
        for at, row in rows:
            if not any(value is not None for value in row.values()):
                continue  # the columns of a Parquet file without rows
            if kind == "rationales":
                learned |= check_record(row, at, templates)
            elif tokenizer is not None:
                _check_pair(source, tokenizer, at, row, teachers)
        if not learned and not any(check_record(row, at, templates) for at, row in read_records(plain)):
            raise UserError(
                f"{where}: none of the responses, from {rows[0][0]} on, matches one of the {len(templates)} templates; "
                "give templates that take them apart"
            )
    name = getattr(source, "weight_field", None)
    if name is not None and rows and not any(name in row for _, row in rows):
        if form == "parquet" or not any(name in row for _, row in read_records(plain)):  # a later row may have it
            raise no_weights(*rows[0], name)
    if not files:
        return "nothing, it is not on this machine"
    if form in ("text", "paragraphs"):
        return check_encoding(files, CHARACTERS)
    if not rows:
        return "nothing, it has no rows"
    return f"{'all' if len(rows) < LOOKED_AT and len(files) == 1 else 'the first'} {len(rows)} rows"


def _check_labels(recipe: RecipeFile, at: str, source: Any) -> None:
    """UserError where one of a source's first rows, of task: classification, has no class of the teacher's."""
    if task_in(recipe) != "classification":
        return
    about, data = recipe.teacher, recipe.data
    if local_files(as_source(source))[1] in ("text", "paragraphs"):
        raise UserError(
            f"{at}: {source.source} is plain text, but task: classification needs rows with a label; give JSON lines "
            "or Parquet"
        )
    config = load_config(about.model, **about.where, task="classification")
    fields = LabelFields(data.label_field, data.pair_field, class_names(config), config.num_labels)  # pyrefly: ignore
    for where, row in first_records(as_source(source), LOOKED_AT):
        if any(value is not None for value in row.values()):
            labelled_row(f"{at}: {where}", row, source.field, fields)


def _check_pair(source: DistillSource, tokenizer: Any, at: str, row: dict[str, Any], teachers: list[str]) -> None:
    check_pair(
        tokenizer, at, row, prompt_field=source.prompt_field, response_field=source.response_field,
        messages_field=source.messages_field, chat=source.chat, turns=source.turns, teacher_field=source.teacher_field,
        teachers=teachers, weight_field=source.weight_field, weighting=source.weighting,
    )  # fmt: skip

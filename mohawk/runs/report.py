"""The end of a run: what was measured, as results.json, as report.md with plots, as a page, and on the screen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.core.devices import machine
from mohawk.core.folders import MANIFEST, drop_file
from mohawk.core.json_files import read_json, write_json, write_text
from mohawk.core.run_folder import (
    COMPOSED,
    METRICS_FILE,
    PAGE,
    RECIPE,
    REPORT,
    RESULTS,
    SELECTION,
    STUDENT,
    evaluation_file,
    plot_file,
    plot_names,
    quantized_file,
    tasks_file,
)
from mohawk.errors import UserError
from mohawk.loading.models import parameter_count
from mohawk.loading.tasks import task_in
from mohawk.measures.consistency import broken_in
from mohawk.runs.kept import Compared, Composed, Measured, Quantized, Results, Selection, Tasks, Told
from mohawk.runs.markdown import TOO_LARGE, to_markdown
from mohawk.runs.page import Finished, write_page
from mohawk.runs.plots import plot_evaluation, plot_losses, plot_positions, plot_retrieval, plot_tasks
from mohawk.runs.tables import Table, print_tables, tables, who_of
from mohawk.runs.verdict import verdict
from mohawk.training.metrics import ends, read_metrics

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.conversion.recipe import Recipe

log = logging.getLogger(__name__)


def finish(
    folder: Path | str,
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    stages: Mapping[str, str],
    labels: Mapping[str, str],
    own_tables: Sequence[Table] = (),
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    whole: bool = True,
    texts: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Measure what is still missing, draw, write results.json, report.md and report.html, print the tables.

    folder: a run's, with evaluation/*.json and metrics.jsonl. Speed, state size and continuations are measured here,
    unless an earlier call with the same evaluation settings left them in results.json. teacher: None: the student is
    measured alone. stages: name -> what the student
    then was, in order. labels: what each one's loss is. own_tables: of a kind of run, in front of the others.
    student_tokenizer: where it is not the teacher's. whole: False where the models are in parts, too large for one
    process: what one process would measure is left out. texts: rows of token ids (rows, n) by the text's name, as
    `mohawk.measures.behaviour.behaviour` takes them. Returns the results.

    Raises UserError, once the report says so too, when the student does not answer step by step, in chunks, with
    padding or turn by turn as in one full forward: its likelihoods are those of a model that nobody can use.
    """
    from mohawk.measures.behaviour import behaviour
    from mohawk.measures.compare import contexts_within, continuation, decode_speed
    from mohawk.measures.consistency import broken_paths, inconsistencies, some_tokens

    folder = Path(folder)
    consistency = inconsistencies(student, some_tokens(student)) if whole else {}
    if whole and not consistency:
        log.warning("whether the student answers step by step as in one pass is not measured: %s of transformers does "
                    "not", type(student).__name__)  # fmt: skip
    broken = broken_paths(student, consistency) if consistency else None
    asked = recipe.evaluation
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    of = {"teacher": tokenizer, "student": student_tokenizer or tokenizer}
    earlier = read_json(folder / RESULTS, Measured) or {}
    if earlier.get("recipe", {}).get("evaluation") != asked.model_dump(mode="json") or earlier.get("broken"):
        earlier = {}
    contexts = contexts_within(list(models.values()), asked.contexts, asked.decode_tokens) if whole else []
    decoding = earlier.get("decoding") or {
        who: [asdict(s) for s in decode_speed(model, contexts, asked.decode_tokens)] for who, model in models.items()
    }
    continuations = earlier.get("continuations") or {}
    if whole and not continuations:
        continuations = {"prompt": asked.prompt} | {
            who: continuation(model, of[who], asked.prompt, asked.continuation_tokens) for who, model in models.items()
        }
    behaved = earlier.get("behaviour") or {}
    if whole and asked.longest is not None and teacher is not None and not behaved:
        behaved = behaviour(models, of, texts or {}, longest=asked.longest, new_tokens=asked.continuation_tokens)
    kind = dict[str, Compared] | dict[str, Told]
    evaluated = {stage: read_json(evaluation_file(folder, stage), kind) for stage in stages}
    evaluated = {stage: found for stage, found in evaluated.items() if found}
    plot_losses(folder / METRICS_FILE, plot_file(folder, "losses"), labels)
    plot_evaluation(evaluated, plot_file(folder, "evaluation"))
    plot_retrieval(behaved.get("retrieval", {}), plot_file(folder, "retrieval"))
    plot_positions(behaved.get("positions", {}), plot_file(folder, "positions"))
    tasks, times = kept_tasks(folder, STUDENT), phase_times(folder / METRICS_FILE)
    quantized = kept_quantized(folder)
    _plot_tasks(folder, tasks)
    results = {
        "teacher": None if recipe.teacher is None else recipe.teacher.model,
        "task": task_in(recipe),
        "architecture": architecture_line(teacher, student),
        "parameters": {who: parameter_count(model) for who, model in models.items()},
        "dtypes": {who: str(model.dtype).removeprefix("torch.") for who, model in models.items()},
        "stages": dict(stages),
        "own_tables": [list(table) for table in own_tables],
        "evaluation": evaluated,
        "decoding": decoding,
        "consistency": consistency,
        "broken": broken,
        "behaviour": behaved,
        "layers": layer_costs(folder, student.config.get_text_config()),
        "phases": {name: times[name] for name in stages if name in times},
        "continuations": continuations,
        "plots": plot_names(folder),
        "machine": machine(student.device),
        "recipe": recipe.model_dump(mode="json"),
        **({"tasks": tasks} if tasks else {}),
        **({"quantized": quantized} if quantized else {}),
    }
    _write(folder, results, recipe.to_yaml())
    print_results(results, console)
    console.print(f"report: {folder / REPORT}, page: {folder / PAGE}", highlight=False, soft_wrap=True, markup=False)
    if broken:
        raise UserError(
            f"{folder}: the student is trained and kept, but does not answer as its own full forward does: {broken}; "
            "`mohawk doctor` says whether the installed versions are ones that mohawk was tested with; with those the "
            "same command goes on"
        )
    return results


def _write(folder: Path, results: dict[str, Any], recipe: str) -> None:
    """results.json, report.md and report.html of a run's folder."""
    write_json(folder / RESULTS, results)
    write_text(folder / REPORT, to_markdown(results, recipe, folder.resolve().name))
    write_page([Finished(folder, results, recipe)], folder / PAGE)


def report_tasks(folder: Path | str) -> Path | None:
    """Put what evaluation/tasks.json says of a finished run's student into results.json, report.md and report.html.

    Returns the report, None where the run has none yet: `finish` will put them in.
    """
    folder = Path(folder)
    results, tasks = read_json(folder / RESULTS, Results), kept_tasks(folder, STUDENT)
    if results is None or tasks is None:
        return None
    _plot_tasks(folder, tasks)
    results["tasks"] = tasks
    results["plots"] = plot_names(folder)
    _write(folder, results, (folder / RECIPE).read_text(encoding="utf-8"))
    return folder / REPORT


def report_quantized(folder: Path) -> Path | None:
    """Put what evaluation/quantized.json says of a finished run's student into its report.

    Returns the report, None where the run has none yet: `finish` will put it in.
    """
    results, quantized = read_json(folder / RESULTS, Results), kept_quantized(folder)
    if results is None or quantized is None:
        return None
    results["quantized"] = quantized
    _write(folder, results, (folder / RECIPE).read_text(encoding="utf-8"))
    return folder / REPORT


def report_consistency(folder: Path, student: str, found: Mapping[str, float], dtype: str) -> None:
    """Put into a finished run's report how its student, loaded in this dtype, was seen to decode once more; nothing
    where the student measured is another one."""
    results, measured = read_json(folder / RESULTS, Results), fingerprint(student)
    if results is None or measured is None or measured != fingerprint(folder / STUDENT):
        return
    results |= {"consistency": dict(found), "decoded_in": dtype, "broken": broken_in(found, dtype)}
    _write(folder, results, (folder / RECIPE).read_text(encoding="utf-8"))


def kept_tasks(folder: Path, student: str) -> dict[str, Any] | None:
    """evaluation/tasks.json, if it is of the student that is in the run's folder `student` now."""
    found = read_json(tasks_file(folder), Tasks)
    same = found and (found["student"], found["fingerprint"]) == (student, fingerprint(folder / student))
    return found if same else None


def kept_quantized(folder: Path) -> Any | None:
    """evaluation/quantized.json, if it is of the run's final student as it is now."""
    found = read_json(quantized_file(folder), Quantized)
    return found if found and found["fingerprint"] == fingerprint(folder / STUDENT) is not None else None


def fingerprint(student: Path | str) -> str | None:
    """What changes with a student's weights: the hash of its manifest, which holds its files' hashes."""
    manifest = Path(student) / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def _plot_tasks(folder: Path, tasks: Mapping[str, Any] | None) -> None:
    target = plot_file(folder, "tasks")
    if not (tasks and plot_tasks(tasks["tasks"], target)):
        drop_file(target)  # of a student that was there before


def architecture_line(teacher: PreTrainedModel | None, student: PreTrainedModel) -> str:
    """One line: what became of the teacher's layers."""
    if teacher is None:
        return f"{type(student).__name__.removeprefix('FSDP')} with {_layers(student.config.get_text_config())}"
    told = [_layers(model.config.get_text_config()) for model in (teacher, student)]
    hybrids = any("attention" in layers for layers in told)
    names = [
        layers.replace(" layers", " attention layers") if hybrids and "attention" not in layers else layers
        for layers in told
    ]
    classes = [type(model).__name__.removeprefix("FSDP") for model in (teacher, student)]
    return f"{classes[0]} with {names[0]} -> {classes[1]} with {names[1]}"


def _layers(config: Any) -> str:
    kinds = list(getattr(config, "layer_types", None) or [])
    replaced = kinds.count("linear_attention")
    if not replaced:
        return f"{getattr(config, 'num_hidden_layers', '?')} layers"
    mixers = getattr(config, "mixer_words", "state space")
    return f"{replaced} {mixers} and {len(kinds) - replaced} attention layers"


def layer_costs(folder: Path, config: Any) -> list[dict[str, Any]]:
    """Each layer of a hybrid: its number from 0, whether attention stayed, and where `mohawk select` ranked the layers,
    of this run or of the one whose mixers these are, what replacing it alone cost: `kl`, and `recall` beside the
    teacher's, `recalled`. Empty for a student without mixers."""
    kinds = list(getattr(config, "layer_types", None) or [])
    if "linear_attention" not in kinds:
        return []
    composed = read_json(folder / COMPOSED, Composed)
    made_of = [] if composed is None else composed.get("others", [])
    source_of = {layer: (each["run"], each["student"]) for each in made_of for layer in each["layers"]}
    usual = (str(folder), None) if composed is None else (composed["run"], composed["student"])
    sources = [source_of.get(i, usual) for i in range(len(kinds))]
    costs = {source: _costs_alone(*source) for source in set(sources)}
    return [
        {"layer": i, "stayed": kind != "linear_attention"} | costs[source].get(i, {})
        for i, (kind, source) in enumerate(zip(kinds, sources, strict=True))
    ]


def _costs_alone(run: str, student: str | None) -> dict[int, dict[str, float]]:
    """What `mohawk select` found that replacing each layer of a run alone costs; nothing where it was not asked, or of
    mixers that were trained again since. student: whose mixers they are; None: the run's own."""
    found = read_json(Path(run) / SELECTION, Selection)
    if not found or not found["rankings"] or student not in (None, found["settings"].get("student")):
        return {}
    whole = next(iter(found["rankings"].values()))["path"][0]["recall"]["accuracy"]
    return {
        row["layer"]: {"kl": row["kl"], "recall": row["recall"]["accuracy"], "recalled": whole}
        for row in found.get("layers", ())
        if "recall" in row
    }


def phase_times(metrics: Path) -> dict[str, dict[str, float]]:
    """Each phase in metrics.jsonl: its steps, tokens, seconds of training, losses at both ends, steps skipped.

    The seconds are those of the steps, added up over interruptions; saving and evaluating are not in them. The losses
    are means over the first and the last tenth of what was logged.
    """
    found: dict[str, dict[str, Any]] = {}
    losses: dict[str, list[float | None]] = {}
    for record in read_metrics(metrics):
        phase = found.setdefault(record["phase"], {"tokens": 0, "seconds": 0.0})
        losses.setdefault(record["phase"], []).append(record["loss"])
        speed = record.get("tokens_per_s")
        phase["seconds"] += (record["tokens"] - phase["tokens"]) / speed if speed else 0.0
        phase |= {"steps": record["step"], "tokens": record["tokens"]}
        phase["skipped_steps"] = record.get("skipped_steps", 0)
    for name, phase in found.items():
        phase["first_tenth"], phase["last_tenth"] = ends(losses[name])
    return found


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Shows the report's verdict and tables on the screen, and both continuations side by side."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    console.print(escape(results["architecture"]), highlight=False)
    for line in verdict(results):
        style = {"good": "green", "bad": "bold red", "plain": "bold"}[line.state]
        console.print(f"[{style}]{line.asks}[/]: {escape(line.says)}", highlight=False, soft_wrap=True)
    print_tables(tables(results), console)
    said = results["continuations"]
    if not said:
        console.print(TOO_LARGE)
        return
    title = f"Greedy continuations of: {escape(said['prompt'])}"
    table = RichTable(*who_of(said), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_row(*(escape(said[who].strip()) for who in who_of(said)))
    console.print(table)

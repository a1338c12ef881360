"""`mohawk evaluate RUN --tasks`: teacher and student on tasks of EleutherAI's lm-evaluation-harness, side by side.

Both answer the same questions, so the student's loss is a paired difference, whose standard error is smaller than
those of its two parts. What a model knows and what it finds again in its context are told apart from the rest, and no
mean is taken over them: a converted student may keep its average and lose just these (Zebra-Llama: MMLU 68.1 to 58.2
at an average of 65.5 to 65.0).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import io
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mohawk.core.hub import hub_or_cache, is_unreachable
from mohawk.core.json_files import write_json
from mohawk.core.places import home
from mohawk.core.processes import from_first, is_first, joined
from mohawk.core.run_folder import has_recipe, tasks_file
from mohawk.errors import UserError
from mohawk.evaluation.run import measured_in_parts
from mohawk.loading.describe import student_folder
from mohawk.runs.report import fingerprint, kept_tasks, report_tasks
from mohawk.runs.tables import print_tables, task_tables
from mohawk.schema.kinds import load_run_recipe, trims_vocabulary

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.runs.sharding import Parts
    from mohawk.schema.base import RecipeFile

OURS = Path(__file__).parent / "tasks"
# What a task is about, where its `metadata` have no `kind` that says so: the beginnings of the harness's names.
TASK_KINDS = {
    "knowledge": ("mmlu", "global_mmlu", "triviaqa", "nq_open", "webqs", "truthfulqa", "gpqa", "openbookqa", "sciq"),
    "retrieval": ("ruler", "niah", "longbench", "fda", "swde", "squad", "scrolls", "babilong"),
    "behaviour": ("bbq", "crows_pairs", "winogender", "toxigen", "realtoxicityprompts"),
}
RESAMPLES = 1000  # for standard errors without a formula; a fork of this process each, so not the harness's 100,000


def evaluate_tasks(
    run: str | Path,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    fewshot: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Run tasks on a run's teacher and student, print both and keep them for the run's report.

    Args:
        run: a run's folder with a student.
        tasks: names of tasks, groups or tags, ours or the harness's.
        task_path: folder of further task files.
        limit: only the first so many questions of each task.
        batch_size: sequences at once; default the recipe's `evaluation.batch_size`.
        fewshot: examples before each question; default what each task says.
        overrides: of the run's recipe, such as `precision=float32` or `device=cpu`.

    Returns:
        What is now in RUN/evaluation/tasks.json: these results and, of the same student, earlier ones of other tasks.

    Raises:
        UserError: no such run, student, folder or task, or a task's data cannot be fetched.
        ModuleNotFoundError: lm_eval is not installed.
    """
    folder = home(run)
    if not has_recipe(folder):
        raise UserError(f"{run} is not a run's folder: it holds no recipe.yaml")
    recipe = load_run_recipe(folder, overrides)
    if recipe.teacher is None:
        raise UserError(
            f"{run}: has no teacher, beside whose answers a student's are set; use lm_eval on {folder}/student"
        )
    name = student_folder(folder)
    manager = task_manager(tasks, task_path)
    console = console or Console(quiet=not is_first())
    asked = {"limit": limit, "fewshot": fewshot, "batch_size": batch_size or recipe.evaluation.batch_size}
    with joined(recipe.device):
        parts = measured_in_parts(recipe, name)
        if parts is None:  # one process has all that it takes
            return from_first(lambda: _evaluate(recipe, folder, name, tasks, manager, console, None, asked))
        return _evaluate(recipe, folder, name, tasks, manager, console, parts, asked)


def _evaluate(
    recipe: RecipeFile,
    folder: Path,
    name: str,
    tasks: Sequence[str],
    manager: TaskManager,
    console: Console,
    parts: Parts | None,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """`evaluate_tasks`; of models in parts all processes answer every question."""
    from mohawk.core.precision import autocast_dtype, pick_device
    from mohawk.data.tokenizers.same_tokenizer import check_same, own_tokenizer, teacher_tokenizer
    from mohawk.loading.models import load_teacher, load_tokenizer
    from mohawk.runs.binding import check_models

    check_models(folder, recipe)
    spread = None if parts is None else parts.teacher
    device = pick_device(recipe.device)
    autocast = autocast_dtype(recipe.precision, device)
    source = recipe.teacher
    tokenizer = teacher_tokenizer(source.model, tokenizer=source.tokenizer, **source.where)
    trimmed = trims_vocabulary(recipe) or getattr(recipe, "align", None) is not None  # has its own numbers
    if not trimmed and (own := own_tokenizer(name, who="student")) is not None:
        check_same(tokenizer, own, f"{name}")
    answers = {}
    for who in ("teacher", "student"):
        if who == "teacher":
            model = load_teacher(source.model, dtype=source.dtype, device=device, spread=spread, **source.where)
        else:
            model = load_teacher(name, device=device, spread=spread, who="student")
            if trimmed:
                tokenizer = load_tokenizer(name, who="student")
        console.print(f"{who}: {', '.join(tasks)}", highlight=False, markup=False)
        answers[who] = run_tasks(model, tokenizer, tasks, manager, autocast=autocast, **asked)
        del model  # before the other one is loaded

    def keep() -> dict[str, Any]:
        return _kept(folder, name, console, paired(answers["teacher"], answers["student"]), autocast)

    return keep() if parts is None else from_first(keep)


def _kept(
    folder: Path, name: str, console: Console, found: dict[str, Any], autocast: torch.dtype | None
) -> dict[str, Any]:
    """What was found, written beside earlier results of other tasks, printed, and put into the run's report."""
    settings = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "precision": str(autocast or "as stored").removeprefix("torch."),
    }
    for result in found["tasks"].values():
        result |= settings

    student = Path(name).relative_to(folder).as_posix()
    earlier = kept_tasks(folder, student) or {"tasks": {}, "groups": {}}
    results = {"student": student, "fingerprint": fingerprint(name)}
    results |= {part: {**earlier[part], **found[part]} for part in ("tasks", "groups")}
    write_json(tasks_file(folder), results)
    print_tables(task_tables(found), console)
    reported = report_tasks(folder)
    console.print(f"written to {reported or tasks_file(folder)}", highlight=False, soft_wrap=True, markup=False)
    return results


def task_manager(tasks: Sequence[str], task_path: str | Path | None = None) -> TaskManager:
    """What finds the named tasks, groups and tags: ours, those in `task_path`, and the harness's.

    Raises:
        UserError: `task_path` is no folder, or a name is unknown (with those it may have been meant as).
        ModuleNotFoundError: lm_eval is not installed.
    """
    if not tasks:
        raise UserError("--tasks: got no name; `mohawk` is the tasks that come along")
    if task_path is not None and not home(task_path).is_dir():
        raise UserError(f"--task-path: {task_path} is not a folder; give one that holds task files (*.yaml)")
    from lm_eval.tasks import TaskManager

    paths: list[str | Path] = [str(OURS), *([] if task_path is None else [str(home(task_path).resolve())])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths)  # reads some 14,000 files
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5)
            near += sorted((other for other in known.difference(near) if name in other), key=len)
            listed = f"near it: {', '.join(near[:5])}" if near else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks: there is no task {name!r}; {listed} (one of your own needs --task-path)")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: int | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """The harness's own results of one model, with every question's (`samples`). Raises UserError."""
    from lm_eval import evaluator

    wrapped = harness_model(model, tokenizer, batch_size=batch_size, autocast=autocast)
    try:
        # it would explain its own command line's options, and ask git about a folder that may be no checkout
        with (
            _errors_only("lm_eval.api.task"),
            _replaced(evaluator, "get_git_commit_hash", lambda: None),
            hub_or_cache(),
            nullcontext() if is_first() else redirect_stderr(io.StringIO()),  # the harness's own bars
        ):
            return evaluator.simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=fewshot,
                bootstrap_iters=RESAMPLES, log_samples=True,
            )  # fmt: skip
    except Exception as error:
        raise _user_error(error, tasks) from error


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
) -> LM:
    """The harness's wrapper of a loaded model, with logits in float32 and no cache while texts are scored.

    Texts are scored in batches padded on the right, where no real token sees the padding; prompts of tasks that
    generate are padded on the left, with a mask.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    from mohawk.losses.heads import Head
    from mohawk.measures.compare import packed_hidden_states

    bars = sys.stderr.isatty() and is_first()

    class Scored(HFLM):
        def loglikelihood(self, requests, disable_tqdm: bool = False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not bars)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not bars)

        def generate_until(self, requests, disable_tqdm: bool = False):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not bars)

        def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
            """Token ids (batch, sequence) to logits (batch, sequence, vocabulary).

            HFLM's own would be bfloat16 under autocast: too coarse to tell choices apart, and often a tie.
            """
            positions = torch.arange(inps.shape[1], device=inps.device).expand_as(inps)
            batch = {"input_ids": inps, "position_ids": positions}
            with torch.no_grad():  # FSDP knows no inference mode
                # pyrefly: ignore[bad-argument-type]  # lm-eval takes others too; this one is given a model below
                hidden = packed_hidden_states(self.model, batch, device=inps.device, autocast=autocast)
                return head.logits(hidden)

    head = Head.of(model).frozen()
    with _errors_only("lm_eval.models.huggingface"):  # it would say that a model is not a model's name
        return Scored(
            # pyrefly: ignore[bad-argument-type]  # any tokenizer of transformers; lm-eval names two kinds
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
            mixed_precision_dtype=autocast,
        )  # fmt: skip


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


def paired(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Two models' harness results as one: {"tasks": {name: ...}, "groups": {name: ...}}.

    A task has its kind, its numbers of questions and, for each metric, `teacher`, `student` and `difference` (student
    less teacher) with their standard errors, None where there is none. A group's metrics are means of its tasks'.
    """
    groups = set(teacher.get("groups") or {})
    both = {"tasks": {}, "groups": {}}
    for name, theirs in teacher["results"].items():
        ours = student["results"][name]
        metrics = {}
        for label, key, error_key in _metrics(theirs):
            metric, _, filter_name = key.partition(",")
            values = {"teacher": theirs[key], "student": ours[key]}
            metrics[label] = values | {"difference": ours[key] - theirs[key]}
            for who, found in (("teacher", theirs), ("student", ours)):
                metrics[label][f"{who}_stderr"] = _finite(found.get(error_key))
            of_teacher, of_student = (
                _values(of["samples"].get(name, ()), metric, filter_name) for of in (teacher, student)
            )
            metrics[label]["difference_stderr"] = difference_error(of_teacher, of_student, values)
            higher = teacher.get("higher_is_better", {}).get(name, {}).get(metric)
            metrics[label]["higher_is_better"] = higher is not False
        if not metrics:
            continue  # a group without a mean
        if name in groups:
            members = sorted(teacher["group_subtasks"].get(name, ()))
            both["groups"][name] = {"members": members, "metrics": metrics}
        else:
            counted = teacher["n-samples"][name]
            both["tasks"][name] = {
                "kind": task_kind(name, (teacher["configs"][name].get("metadata") or {}).get("kind")),
                "version": teacher["versions"].get(name),
                "fewshot": teacher["n-shot"].get(name),
                "questions": counted["effective"],
                "of": counted["original"],
                "metrics": metrics,
            }
    return both


def task_kind(name: str, kind: str | None = None) -> str:
    """ "knowledge", "retrieval", "behaviour" or "other": what the task says it is, else by its name."""
    if kind in TASK_KINDS:
        return kind
    return next((kind for kind, beginnings in TASK_KINDS.items() if name.startswith(beginnings)), "other")


def difference_error(
    teacher: Mapping[int, float], student: Mapping[int, float], means: Mapping[str, float]
) -> float | None:
    """Standard error of the mean difference over the questions both answered.

    None where the task's figure is no mean over its questions (perplexity, F1 over all), or there are fewer than two.
    """
    if len(teacher) < 2 or teacher.keys() != student.keys():
        return None
    for who, values in (("teacher", teacher), ("student", student)):
        if not math.isclose(statistics.fmean(values.values()), means[who], rel_tol=1e-6, abs_tol=1e-9):
            return None
    return statistics.stdev(student[i] - teacher[i] for i in teacher) / math.sqrt(len(teacher))


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(label, key of the value, key of its standard error) of a task's results, "acc,none" being `acc`."""
    keys = [key for key in found if "," in key and "_stderr," not in key]
    for key in keys:
        metric, _, filter_name = key.partition(",")
        if isinstance(found[key], (int, float)):
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield label, key, f"{metric}_stderr,{filter_name}"


def _values(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> dict[int, float]:
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", "none") == filter_name and isinstance(sample.get(metric), (bool, int, float))
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None  # also "N/A"


def _user_error(error: Exception, tasks: Sequence[str]) -> Exception:
    """One line where a task cannot be asked or its data cannot be had; anything else unchanged."""
    from datasets.exceptions import DatasetNotFoundError

    # a task named twice, one that runs what a model wrote, one with pictures
    if isinstance(error, ValueError) and str(error).startswith(("Duplicate task", "Attempted to run task")):
        return UserError(f"--tasks: {str(error).splitlines()[0]}")
    if isinstance(error, DatasetNotFoundError) or is_unreachable(error):
        return UserError(
            f"--tasks: the data of {', '.join(tasks)} cannot be fetched from the hub ({str(error).splitlines()[0]}); "
            "run once where they can, or name tasks with data of their own, such as mohawk"
        )
    return error

"""The commands of evaluation."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, number, path, refuse
from mohawk.core.extras import need
from mohawk.schema.arguments import add_set


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN", help="a run's folder")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness, instead of the run's texts")
    tasks.add_argument("--tasks", metavar="NAME,...", help="tasks, groups or tags; `mohawk` needs no download")
    tasks.add_argument("--task-path", type=path, metavar="DIR", help="a folder of further task files")
    tasks.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N questions of each")
    tasks.add_argument("--batch-size", type=number(int, 1), metavar="N", help="default: the recipe's evaluation")
    tasks.add_argument("--fewshot", type=number(int, 0), metavar="N", help="examples before a question")
    add_set(parser)


def _evaluate(options: argparse.Namespace) -> None:
    asked = {name: getattr(options, name) for name in ("task_path", "limit", "batch_size", "fewshot")}
    if options.tasks is not None:
        need("eval", "`mohawk evaluate --tasks`")
        from mohawk.evaluation.harness import evaluate_tasks

        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        evaluate_tasks(options.model, names, **asked, overrides=options.set)
        return
    refuse(asked, "--tasks NAME,...; name tasks, or leave it out")
    need("convert", "`mohawk evaluate`")
    from mohawk.evaluation.run import evaluate_run

    evaluate_run(options.model, options.set)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="a finished run's folder; several: compared")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="default: report.html in the run, of several in this folder"
    )


def _report(options: argparse.Namespace) -> None:
    need("convert", "`mohawk report`")
    from mohawk.runs.page import report_runs

    print(f"written to {report_runs(options.runs, options.output)}")


COMMANDS = [
    Command("evaluate", "measure a run's student against its teacher again", _add_evaluate, _evaluate, together=True),
    Command("report", "write the report of a run, or of several beside each other, as one page", _add_report, _report),
]

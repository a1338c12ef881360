"""The commands of evaluation."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, given, number, path, refuse
from mohawk.core.extras import need
from mohawk.errors import UserError
from mohawk.generation.arguments import add_batches, add_reading, add_requests
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


def _add_compare(parser: argparse.ArgumentParser) -> None:
    what = "folder, run, .gguf file or hub id, or the address of an OpenAI-compatible API"
    for side in "AB":
        parser.add_argument(side.lower(), metavar=side, help=what)
    parser.add_argument("prompts", nargs="+", metavar="SOURCE", help="text lines, .jsonl, .parquet or a hub dataset")
    parser.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="the answers' folder; goes on if it can"
    )
    parser.add_argument("--scorer", metavar="MODULE:FUNCTION", help="(prompt, response) -> float, more is better")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message: chat template, or chat API")
    add_reading(parser)
    decoding = parser.add_argument_group("decoding (greedy without --temperature)")
    decoding.add_argument(
        "--max-new-tokens", type=number(int, 1), metavar="N", help="longest answer, in tokens; default: 256"
    )
    decoding.add_argument("--temperature", type=number(float, 0), metavar="T", help="sample at this")
    decoding.add_argument("--top-p", type=number(float, 0, 1), metavar="P", help="sample from this share; default: 1")
    decoding.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of sampling; default: 0")
    local = parser.add_argument_group("local models")
    add_batches(local)
    local.add_argument("--trust-remote-code", action="store_true", default=None, help="run the checkpoints' own code")
    remote = parser.add_argument_group("addresses")
    for side in "ab":
        remote.add_argument(f"--model-{side}", metavar="NAME", help=f"which model to ask at the address {side.upper()}")
    for side in "ab":
        remote.add_argument(
            f"--key-env-{side}", metavar="NAME", help="environment variable with its key; default: OPENAI_API_KEY"
        )
    add_requests(remote)


def _compare(options: argparse.Namespace) -> None:
    if options.top_p is not None and not options.temperature:
        raise UserError("--top-p needs --temperature above 0: greedy decoding has nothing to sample from")
    need("convert", "`mohawk compare`")
    from mohawk.evaluation.ab_test import compare_answers, is_address
    from mohawk.generation.decoding import Decoding

    local = given(options, "batch_size", "dtype", "device", "trust_remote_code")
    remote = given(options, "concurrency", "timeout", "retries", "request")
    addresses = [is_address(model) for model in (options.a, options.b)]
    if all(addresses):
        refuse(local, "local models; both are addresses: leave it out")
    if not any(addresses):
        refuse(remote, "addresses, such as http://localhost:8000/v1; leave it out")
    used = ("max_new_tokens", "top_p", "seed") + (("temperature",) if options.temperature else ())
    compare_answers(
        (options.a, options.b),
        options.prompts,
        options.output,
        decoding=Decoding(method="sample" if options.temperature else "greedy", **given(options, *used)),
        names=(options.model_a, options.model_b),
        key_envs=(options.key_env_a, options.key_env_b),
        scorer=options.scorer,
        chat=options.chat,
        reading=given(options, "field", "format", "split", "subset"),
        limit=options.limit,
        local=local,
        remote=remote,
    )


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=path, metavar="FILE", help="JSON lines: prompt, response, latency, logprob, tokens")
    parser.add_argument(
        "--baseline", type=path, metavar="RUN", help="a run, whose report's answers are compared with, or another log"
    )
    parser.add_argument("--last", type=number(int, 1), metavar="N", help="only the log's last N lines")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="counts tokens; default: the run's, else the teacher's, else words"
    )
    parser.add_argument("--teacher", metavar="MODEL", help="reads both sides' answers: their perplexity to it")
    parser.add_argument("--prometheus", type=path, metavar="FILE", help="write what was found for a textfile collector")
    limits = parser.add_argument_group("limits, beyond which the exit code is 3")
    limits.add_argument(
        "--max-psi", type=number(float, 0), default=0.25, metavar="X",
        help="population stability index, where chance gives as large a one in at most 1 of 100; default: 0.25",
    )  # fmt: skip
    limits.add_argument(
        "--max-latency", type=number(float, 0), metavar="S", help="seconds that 95 of 100 answers stay within"
    )
    limits.add_argument("--max-errors", type=number(float, 0, 1), metavar="S", help="share of requests without answer")


def _watch(options: argparse.Namespace) -> None:
    need("convert", "`mohawk watch`")
    from mohawk.evaluation.watch import Limits, watch

    watch(
        options.log,
        options.baseline,
        tokenizer=options.tokenizer,
        teacher=options.teacher,
        last=options.last,
        limits=Limits(psi=options.max_psi, latency=options.max_latency, errors=options.max_errors),
        prometheus=options.prometheus,
    )


COMMANDS = [
    Command("evaluate", "measure a run's student against its teacher again", _add_evaluate, _evaluate, together=True),
    Command("report", "write the report of a run, or of several beside each other, as one page", _add_report, _report),
    Command(
        "compare",
        "ask two models or addresses the same prompts: agreement, and which is preferred",
        _add_compare,
        _compare,
        resumes=True,
    ),
    Command("watch", "say whether a served model still answers as it did, from a log", _add_watch, _watch),
]

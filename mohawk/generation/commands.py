"""The commands of generation."""

from __future__ import annotations

import argparse

from mohawk.core.command import Command, given, number, path, refuse
from mohawk.errors import UserError
from mohawk.generation.arguments import add_batches, add_reading, add_requests


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, run, .gguf file or hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id, where the model comes without one")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=100, metavar="N", help="default: 100")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        default=1.0,
        metavar="P",
        help="sample from this share; default: 1",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), metavar="N", help="seed of sampling")
    drafting = parser.add_argument_group("speculative decoding")
    drafting.add_argument(
        "--draft", metavar="MODEL", help="a student of the model drafts its tokens: the same text in fewer passes"
    )
    drafting.add_argument(
        "--draft-tokens", type=number(int, 1), metavar="K", help="tokens drafted in a round; default: 4"
    )


def _generate(options: argparse.Namespace) -> None:
    if 0 < options.temperature < 0.001:
        raise UserError(f"--temperature: got {options.temperature}; allowed: 0, which is greedy, or at least 0.001")
    if options.top_p < 1 and options.temperature == 0:
        raise UserError("--top-p needs --temperature above 0: greedy decoding has nothing to sample from")
    if options.draft is None:
        refuse(given(options, "draft_tokens"), "--draft MODEL; give one, or leave it out")
    from mohawk.generation.generate import generate

    generate(
        options.model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        device=options.device,
        seed=options.seed,
        tokenizer=options.tokenizer,
        **given(options, "draft", "draft_tokens"),
    )


def _add_generate_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="SOURCE", help="text lines, .jsonl, .parquet or a hub dataset")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder, run, .gguf file or hub id; its name at URL"
    )
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    parser.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="the answers' folder; goes on if it can"
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message: chat template, or chat API")
    parser.add_argument(
        "--turns",
        choices=("last", "all"),
        default="last",
        help="all: answer each user's turn of a chat in sequence, in place of the answers it has; default: last",
    )
    add_reading(parser)
    decoding = parser.add_argument_group("decoding (greedy without --beams and --temperature)")
    decoding.add_argument(
        "--samples", type=number(int, 1), default=1, metavar="N", help="answers to each prompt; default: 1"
    )
    decoding.add_argument(
        "--max-new-tokens",
        type=number(int, 1),
        default=256,
        metavar="N",
        help="longest answer, in tokens; default: 256",
    )
    decoding.add_argument("--beams", type=number(int, 1), metavar="K", help="beam search, the N best of K")
    decoding.add_argument(
        "--temperature", type=number(float, 0), metavar="T", help="sample at this; 1 is the teacher's"
    )
    decoding.add_argument("--top-p", type=number(float, 0, 1), metavar="P", help="sample from this share; default: 1")
    decoding.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of sampling; default: 0")
    local = parser.add_argument_group("a local teacher")
    add_batches(local)
    local.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    local.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id, where the model comes without one")
    local.add_argument("--trust-remote-code", action="store_true", default=None, help="run the checkpoint's own code")
    remote = parser.add_argument_group("an endpoint")
    remote.add_argument("--key-env", metavar="NAME", help="environment variable with the key; default: OPENAI_API_KEY")
    add_requests(remote)
    keep = parser.add_argument_group("which answers are kept")
    keep.add_argument("--min-tokens", type=number(int, 0), metavar="N", help="shortest answer, in tokens")
    keep.add_argument("--max-tokens", type=number(int, 1), metavar="N", help="longest answer, in tokens")
    keep.add_argument(
        "--max-repetition", type=number(float, 0, 1), metavar="S", help="share of runs of words that came before"
    )
    keep.add_argument("--ngram", type=number(int, 1), default=4, metavar="N", help="words in such a run; default: 4")
    keep.add_argument(
        "--min-agreement", type=number(float, 0, 1), metavar="S", help="share of the samples with the same answer"
    )
    keep.add_argument("--answer", metavar="REGEX", help="what of the response is the answer: its last match, group 1")
    keep.add_argument("--normalizer", metavar="MODULE:FUNCTION", help="(answer) -> text that is compared, or None")
    keep.add_argument("--scorer", metavar="MODULE:FUNCTION", help="(prompt, response) -> float")
    keep.add_argument("--min-score", type=float, metavar="X", help="what the scorer has to give")


def _generate_data(options: argparse.Namespace) -> None:
    local = given(options, "batch_size", "dtype", "device", "revision", "tokenizer", "trust_remote_code")
    remote = given(options, "key_env", "concurrency", "timeout", "retries", "request")
    if options.endpoint is None:
        refuse(remote, "--endpoint URL; give one, or leave it out")
    else:
        refuse(local, "a local teacher; leave it out, or --endpoint")
    if options.beams is not None and options.temperature:
        raise UserError("--beams and --temperature: a search draws nothing; give one of the two")
    if options.top_p is not None and not options.temperature:
        raise UserError("--top-p needs --temperature above 0: greedy decoding has nothing to sample from")
    if options.turns == "all" and not options.chat:
        raise UserError("--turns all needs --chat: turns are a chat's")
    method = "beam" if options.beams is not None else "sample" if options.temperature else "greedy"

    from mohawk.generation.decoding import Decoding
    from mohawk.generation.filters import Filters
    from mohawk.generation.generate_data import generate_from

    used = ("samples", "max_new_tokens", "beams", "top_p", "seed") + (("temperature",) if options.temperature else ())
    generate_from(
        options.prompts,
        options.model,
        options.output,
        decoding=Decoding(method=method, **given(options, *used)),
        filters=Filters(**given(options, *Filters.__dataclass_fields__)),
        endpoint=options.endpoint,
        chat=options.chat,
        turns=options.turns,
        reading=given(options, "field", "format", "split", "subset"),
        limit=options.limit,
        teacher=local or remote,
    )


def _add_purify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="JSON lines: prompt with label and rationale, or with response"
    )
    parser.add_argument(
        "--by",
        choices=("vote", "route", "merge"),
        required=True,
        help="vote: the majority's label and its best rationale; route: the best teacher's; merge: a model's",
    )
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="JSON lines, with provenance")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='takes responses apart: "{rationale} So the answer is {label}."; may be repeated',
    )
    voting = parser.add_argument_group("vote")
    voting.add_argument("--scorer", metavar="MODULE:FUNCTION", help="(prompt, rationale) -> float; default: overlap")
    routing = parser.add_argument_group("route: a ranking by the student's validation gain, given or measured")
    routing.add_argument("--gains", type=path, metavar="FILE", help="JSON, as measuring leaves in OUTPUT.gains.json")
    routing.add_argument("--student", metavar="MODEL", help="folder, run or hub id: measure on it, in short trials")
    routing.add_argument("--validation", type=path, metavar="FILE", help="JSON lines: prompts and labels held out")
    routing.add_argument("--rounds", type=number(int, 1), metavar="N", help="trials of all teachers; default: 12")
    routing.add_argument("--steps", type=number(int, 1), metavar="N", help="steps of a trial; default: 20")
    routing.add_argument(
        "--learning-rate", type=number(float, 0), metavar="X", help="learning rate of a trial; default: 1e-4"
    )
    merging = parser.add_argument_group("merge")
    merging.add_argument("--model", metavar="MODEL", help="folder, run, .gguf file or hub id; its name at URL")
    merging.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    merging.add_argument("--key-env", metavar="NAME", help="environment variable with its key")
    merging.add_argument(
        "--chat", action="store_true", default=None, help="ask as a user: chat template, or the chat API"
    )
    merging.add_argument(
        "--max-new-tokens", type=number(int, 1), metavar="N", help="longest answer, in tokens; default: 256"
    )
    merging.add_argument(
        "--merge-prompt", type=path, metavar="FILE", help="what the model is asked, with {prompt} and {rationales}"
    )


def _purify(options: argparse.Namespace) -> None:
    voting = given(options, "scorer")
    trial = given(options, "steps", "learning_rate")
    routing = given(options, "gains", "student", "validation", "rounds")
    merging = given(options, "model", "endpoint", "max_new_tokens", "merge_prompt")
    opening = given(options, "key_env", "chat")
    for way, used in (("vote", voting), ("route", {**routing, **trial}), ("merge", {**merging, **opening})):
        if options.by != way:
            refuse(used, f"--by {way}; leave it out")
    if options.by == "route" and (options.gains is None) == (options.student is None):
        raise UserError("--by route needs --gains FILE, or --student MODEL and --validation FILE to measure them")
    if options.gains is not None:
        refuse({**given(options, "validation", "rounds"), **trial}, "--student MODEL; leave it out")
    if options.student is not None and options.validation is None:
        raise UserError("--student needs --validation FILE: prompts and labels that are not trained on")
    if options.by == "merge" and options.model is None:
        raise UserError("--by merge needs --model MODEL")
    if options.endpoint is None:
        refuse(given(options, "key_env"), "--endpoint URL; give one, or leave it out")
    from mohawk.generation.purify import purify_from

    if "merge_prompt" in merging:
        merging["merge_prompt_file"] = merging.pop("merge_prompt")
    if options.template:
        merging["templates"] = options.template
    purify_from(
        options.files, options.output, by=options.by, **voting, **routing, **merging, trial=trial, opening=opening
    )


COMMANDS = [
    Command("generate", "continue a prompt", _add_generate, _generate),
    Command(
        "generate-data",
        "write a teacher's answers to prompts as JSON lines to train on",
        _add_generate_data,
        _generate_data,
        resumes=True,
        together=True,
    ),
    Command(
        "purify", "make several teachers' rationales of the same prompts one each", _add_purify, _purify, resumes=True
    ),
]

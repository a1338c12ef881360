"""`mohawk generate-data`: a teacher's answers to prompts, filtered, as JSON lines with where they come from.

A folder holds `responses.jsonl`, `rejected.jsonl` (the same, with the reason), `manifest.json` (the settings) and
`summary.json`. Answers are written in the prompts' order, all of a prompt before the next one's, in whole lines; so the
files themselves say how far a stopped run came, and the same command goes on there. Lines have checksums in
`.NAME.crc32`, manifest and summary theirs in `.NAME.sha256`; prompts whose lines are damaged or lost are asked again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

from mohawk.core.folders import locked, sum_file
from mohawk.core.json_files import parse_json
from mohawk.core.lines import sum_of, write_lines
from mohawk.core.places import home
from mohawk.core.processes import first_before_others, is_first, joined, on_first, several
from mohawk.core.terminal import SHOWN, Bar
from mohawk.data.generated import FILES, MANIFEST, REJECTED, RESPONSES, SUMMARY
from mohawk.data.messages import as_messages
from mohawk.data.records import Prompt, read_prompts
from mohawk.data.source_files import Source
from mohawk.errors import UserError
from mohawk.generation.answer_files import (
    Found,
    Tally,
    append,
    claim,
    cut_to_whole,
    flush,
    open_answers,
    scan,
    seconds_spent,
    unwritable,
    write_object,
)
from mohawk.generation.conversations import check_conversations
from mohawk.generation.dealing import DealtTeacher
from mohawk.generation.decoding import Decoding, LocalTeacher, Response, local_teacher
from mohawk.generation.endpoint import EndpointTeacher
from mohawk.generation.filters import Filters, Judge, Verdict

log = logging.getLogger(__name__)

LAYOUT = 1  # of the lines; raise it when their fields change
HELD = 8  # prompts that an endpoint may refuse before it has answered any
SYNC_SECONDS = 5.0  # between flushes to the disk


class AnsweringTeacher(Protocol):
    """What answers prompts: mohawk.generation.decoding.LocalTeacher, mohawk.generation.endpoint.EndpointTeacher."""

    decoding: Decoding
    chat: bool

    def identity(self) -> dict[str, Any]:
        """What tells the teacher from others: `name`, revision, hash, and what else decides its answers."""

    def responses(
        self, prompts: Sequence[Prompt], first: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[Response]], None, None]:
        """(i, answers) of prompts[i] for i = first, first + 1, ... before `stop`, `samples` answers each."""


def generate_from(
    sources: Sequence[str],
    model: str,
    output: Path | str,
    *,
    decoding: Decoding,
    filters: Filters,
    endpoint: str | None = None,
    chat: bool = False,
    turns: str = "last",
    reading: Mapping[str, Any] | None = None,
    limit: int | None = None,
    teacher: Mapping[str, Any] | None = None,
) -> None:
    """The command line's work: prompts read, teacher opened, answers written, what came of it printed.

    turns: "all" answers each user's turn of chats in sequence, with the teacher's own answers before it.
    reading: fields of `mohawk.data.source_files.Source` for all sources. teacher: options of `local_teacher` or, with
    an endpoint, of `EndpointTeacher` (request as JSON text). Several processes deal a local teacher's batches among
    themselves; an endpoint is asked by the first one alone. Raises UserError.
    """
    options = dict(teacher or {})
    with joined("cpu" if endpoint is not None else options.get("device", "auto")):
        read = [Source(source, **(reading or {})) for source in sources]
        prompts = first_before_others(lambda: read_prompts(read, limit=limit))
        if turns == "all":
            check_conversations(prompts)
        if endpoint is not None:
            if "request" in options:
                options["request"] = json_object(options["request"])
            asked = EndpointTeacher(endpoint, model, decoding, chat=chat, turns=turns, **options)
            on_first(lambda: generate_data(prompts, asked, output, filters=filters))
        else:
            opened = local_teacher(model, decoding, chat=chat, turns=turns, **options)
            _generate_together(prompts, opened, output, filters)
        if is_first():
            from rich.console import Console

            print_summary(output, Console())


def _generate_together(prompts: Sequence[Prompt], teacher: LocalTeacher, output: Path | str, filters: Filters) -> None:
    """`generate_data` by all the processes that there are, of which the first one writes."""
    if not several():
        generate_data(prompts, teacher, output, filters=filters)
        return
    dealt = DealtTeacher(teacher)
    if not is_first():
        dealt.serve(prompts)
        return
    try:
        generate_data(prompts, dealt, output, filters=filters)
    except BaseException as error:
        dealt.done(error)
        raise
    dealt.done()


def generate_data(
    prompts: Sequence[Prompt],
    teacher: AnsweringTeacher,
    output: Path | str,
    *,
    filters: Filters | None = None,
) -> Tally:
    """Write the teacher's answers to all prompts into the folder `output`, or go on with what is there.

    Args:
        prompts: of `mohawk.data.records.read_prompts`. More of them than last time, in the same order, may be given.
        output: the teacher's identity and the settings of decoding and filters must be those of what is in there.

    Raises:
        UserError: the folder holds answers made with other settings, is in use or damaged, or the teacher cannot go on.
    """
    filters = filters or Filters()
    decoding = teacher.decoding
    judge, identity = Judge(filters), teacher.identity()
    output = home(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; give a folder")
    try:
        if (
            output.is_dir()
            and not any(path.exists() for path in (output / MANIFEST, sum_file(output / MANIFEST)))
            and any(not p.name.startswith(".") for p in output.iterdir())
        ):
            raise UserError(f"output: {output} exists and was not written by generate-data; choose another folder")
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error.strerror}); choose another folder") from error
    with locked(output), ExitStack() as stack:
        settings = {"teacher": identity, "decoding": decoding.settings(), "seed": decoding.seed}
        settings = {"layout": LAYOUT, **settings, "filters": filters.settings()}
        claim(output / MANIFEST, settings, prompts, getattr(teacher, "base", None))
        samples = decoding.samples

        def judged(i: int, responses: Sequence[Response]) -> tuple[dict[str, list[bytes]], list[str]]:
            """The lines of a prompt, by file, and the reasons of those that are rejected."""
            lines: dict[str, list[bytes]] = {name: [] for name in FILES}
            reasons = []
            for sample, (response, verdict) in enumerate(
                zip(responses, judge.verdicts(prompts[i], responses), strict=True)
            ):
                line = _line(prompts[i], sample, response, verdict, identity, teacher)
                lines[RESPONSES if verdict.reason is None else REJECTED].append(line)
                if verdict.reason is not None:
                    reasons.append(verdict.reason)
            return lines, reasons

        found = scan(output, prompts, samples, say=True)
        if found.broken():
            _ask_again(output, found, prompts, teacher, judged)
            found = scan(output, prompts, samples)
        tally = cut_to_whole(output, found)
        spent = seconds_spent(output / SUMMARY) if tally.prompts else 0.0
        opened = {name: open_answers(output / name, stack) for name in FILES}
        if tally.prompts:
            log.info("going on after %d of %d prompts", tally.prompts, len(prompts), extra=SHOWN)
        before, started = (tally.prompts, tally.tokens), time.monotonic()
        synced = started

        def summarise() -> None:
            """Sums up all that is in the folder: at the end, where the run stops early, and now and then for a kill."""
            seconds, (prompts_before, tokens_before) = time.monotonic() - started, before
            made = _summary(tally, spent, seconds, tally.prompts - prompts_before, tally.tokens - tokens_before)
            try:
                write_object(output / SUMMARY, made)
            except OSError as error:
                raise unwritable(output / SUMMARY, error) from error

        summarise()
        stack.callback(summarise)
        progress = stack.enter_context(Bar("prompts", len(prompts), tally.prompts))
        answers = stack.enter_context(closing(teacher.responses(prompts, tally.prompts)))
        for i, responses in _held_back(answers, tally):
            assert i == tally.prompts, f"answers of prompt {i}, not {tally.prompts}"
            lines, reasons = judged(i, responses)
            for name, (file, sums) in opened.items():
                if lines[name]:
                    if sums is not None:  # first, so that a kill leaves no line without one
                        append(sums, b"".join(f"{sum_of(line[:-1])}\n".encode() for line in lines[name]))
                    append(file, b"".join(lines[name]))
            tally.prompts += 1
            tally.kept += len(responses) - len(reasons)
            tally.rejected.update(reasons)
            tally.tokens += sum(response.tokens or 0 for response in responses)
            if time.monotonic() - synced > SYNC_SECONDS:
                flush(opened)
                summarise()
                synced = time.monotonic()
            progress.add(1)
            speed = (tally.tokens - before[1]) / progress.seconds
            said = f"{tally.kept} kept, {sum(tally.rejected.values())} rejected, {speed:,.0f} tokens/s"
            progress.say(f"prompts {tally.prompts}/{len(prompts)}  {said}", said)
        flush(opened)
    return tally


def _line(
    prompt: Prompt,
    sample: int,
    response: Response,
    verdict: Verdict,
    identity: Mapping[str, Any],
    teacher: AnsweringTeacher,
) -> bytes:
    decoding, line = teacher.decoding, {}
    if teacher.chat or isinstance(prompt.content, list):
        line["messages"] = as_messages(prompt.content) if response.messages is None else response.messages
        line |= {} if prompt.tools is None else {"tools": prompt.tools}
    else:
        line["prompt"] = prompt.content
    line |= {"response": response.text, "prompt_id": prompt.id, "prompt_sha256": prompt.sha256, "sample": sample}
    line |= {"teacher": identity["name"], "teacher_revision": identity.get("revision")}
    line |= {"teacher_hash": identity.get("hash"), "decoding": decoding.settings()}
    # greedy decoding and beams draw nothing
    line["seed"] = decoding.seed_of(prompt, sample) if decoding.method == "sample" else None
    line |= {"tokens": response.tokens, "finish_reason": response.finish_reason}
    line |= {"logprob": response.logprob, "sampling_logprob": response.sampling_logprob, "filters": verdict.measured}
    if verdict.reason is not None:
        line["reason"] = verdict.reason
    if response.error is not None:
        line["error"] = response.error
    return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _ask_again(
    output: Path, found: Found, prompts: Sequence[Prompt], teacher: AnsweringTeacher, judged: Callable[..., Any]
) -> None:
    """Answers to the prompts that lack some, put where they belong; the files change only when all have come."""
    made: dict[int, dict[str, list[bytes]]] = {}
    lost = set(found.lost)
    for i in found.lost:
        if i in made:
            continue
        end = next(j for j in range(i, found.done + 1) if j not in lost)  # all that lie together
        with closing(teacher.responses(prompts, i, end)) as answers:
            for j, responses in answers:
                made[j], _ = judged(j, responses)
    for name, rows in found.rows.items():
        lines = [(j, line) for j, of in made.items() for line in of[name]]
        if rows:
            with open(output / name, "rb") as file:
                for row in rows:
                    if row.i < found.done and row.i not in made:
                        file.seek(row.start)
                        lines.append((row.i, file.read(row.stop - row.start)))
        lines.sort(key=lambda line: line[0])
        try:
            write_lines(output / name, [line.decode("utf-8", "replace").removesuffix("\n") for _, line in lines])
        except OSError as error:
            raise unwritable(output / name, error) from error


def _held_back(answers: Iterator[tuple[int, list[Response]]], tally: Tally) -> Iterator[tuple[int, list[Response]]]:
    """The answers, but for refusals until one prompt was answered: a wrong request would reject every prompt."""
    # what is in the files but errors was an answer
    answered = tally.kept + sum(n for reason, n in tally.rejected.items() if reason != "error") > 0
    held = []
    for i, responses in answers:
        if not answered:
            held.append((i, responses))
            answered = not all(r.error for r in responses)
            if not answered and len(held) == HELD:
                break
            if answered:
                yield from held
            continue
        yield i, responses
    if held and not answered:
        raise UserError(
            f"teacher: none of the first {len(held)} prompts was answered; the first: {held[0][1][0].error}"
        )


def json_object(text: str) -> dict[str, Any]:
    """What --request gives. Raises UserError."""
    try:
        value = parse_json(text)
    except ValueError as error:
        # without the text, which may hold a key
        raise UserError(f"--request: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"--request: got a JSON {type(value).__name__}; give an object, fields and values")
    return value


def _summary(tally: Tally, spent: float | None, seconds: float, prompts: int, tokens: int) -> dict[str, Any]:
    total = None if spent is None else spent + seconds
    return {
        "prompts": tally.prompts,
        "kept": tally.kept,
        "rejected": dict(sorted(tally.rejected.items())),
        "tokens": tally.tokens,
        "seconds": None if total is None else round(total, 3),
        "tokens_per_s": round(tally.tokens / total, 1) if total and tally.tokens else None,
        # of this start of the command alone
        "last": {"prompts": prompts, "tokens": tokens, "seconds": round(seconds, 3)}
        | {"tokens_per_s": round(tokens / seconds, 1) if prompts else None},
    }


def print_summary(output: Path | str, console: Any) -> None:
    """What a finished folder holds, in a few lines."""
    output = home(output)
    summary = parse_json((output / SUMMARY).read_bytes())
    rejected = sum(summary["rejected"].values())
    by = ", ".join(f"{n} {reason}" for reason, n in summary["rejected"].items())
    console.print(f"{summary['prompts']} prompts, {summary['tokens']:,} tokens", highlight=False)
    console.print(f"kept {summary['kept']} in {output / RESPONSES}", highlight=False, soft_wrap=True)
    if rejected:
        console.print(f"rejected {rejected} in {output / REJECTED}: {by}", highlight=False, soft_wrap=True)
    if last := summary["last"]["tokens_per_s"]:
        console.print(f"{last:,.1f} tokens/s over {summary['last']['seconds']:.1f} s", highlight=False)

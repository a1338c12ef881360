"""`mohawk generate-data`: a teacher's answers to prompts, filtered, as JSON lines with where they come from.

A folder holds `responses.jsonl`, `rejected.jsonl` (the same, with the reason), `manifest.json` (the settings) and
`summary.json`. Answers are written in the prompts' order, all of a prompt before the next one's, in whole lines; so the
files themselves say how far a stopped run came, and the same command goes on there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mohawk
from mohawk.checkpoints import fsync, locked
from mohawk.decoding import Decoding, Response, as_messages, local_teacher
from mohawk.endpoint import EndpointTeacher, without_secrets
from mohawk.errors import UserError, naming, shortened
from mohawk.filters import Filters, Judge, Verdict
from mohawk.parsing import parse_json
from mohawk.records import Prompt, read_prompts
from mohawk.run_folder import home
from mohawk.text import Source

log = logging.getLogger(__name__)

RESPONSES, REJECTED, MANIFEST, SUMMARY = "responses.jsonl", "rejected.jsonl", "manifest.json", "summary.json"
LAYOUT = 1  # of the lines; raise it when their fields change
HELD = 8  # prompts that an endpoint may refuse before it has answered any
SYNC_SECONDS = 5.0  # between flushes to the disk
SAY_SECONDS = 15.0  # between lines where there is no terminal


class Teacher(Protocol):
    """What answers prompts: mohawk.decoding.LocalTeacher, mohawk.endpoint.EndpointTeacher."""

    decoding: Decoding
    chat: bool

    def identity(self) -> dict[str, Any]:
        """What tells the teacher from others: `name`, revision, hash, and what else decides its answers."""

    def responses(self, prompts: Sequence[Prompt], first: int = 0) -> Iterator[tuple[int, list[Response]]]:
        """(i, answers) of prompts[i] for i = first, first + 1, ..., `samples` answers each."""


@dataclass
class Tally:
    """What has been written: prompts that are done, answers kept, rejected by reason, tokens of all of them."""

    prompts: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


def generate_from(
    sources: Sequence[str],
    model: str,
    output: Path | str,
    *,
    decoding: Decoding,
    filters: Filters,
    endpoint: str | None = None,
    chat: bool = False,
    reading: Mapping[str, Any] | None = None,
    limit: int | None = None,
    teacher: Mapping[str, Any] | None = None,
) -> Tally:
    """The command line's work: prompts read, teacher opened, answers written, what came of it printed.

    reading: fields of `mohawk.text.Source` for all sources. teacher: options of `local_teacher` or, with an endpoint,
    of `EndpointTeacher` (request as JSON text). Raises UserError.
    """
    from rich.console import Console

    prompts = read_prompts([Source(source, **(reading or {})) for source in sources], limit=limit)
    options = dict(teacher or {})
    if endpoint is not None:
        if "request" in options:
            options["request"] = _json_object(options["request"])
        opened: Teacher = EndpointTeacher(endpoint, model, decoding, chat=chat, **options)
    else:
        opened = local_teacher(model, decoding, chat=chat, **options)
    tally = generate_data(prompts, opened, output, filters=filters)
    print_summary(output, Console())
    return tally


def generate_data(
    prompts: Sequence[Prompt],
    teacher: Teacher,
    output: Path | str,
    *,
    filters: Filters | None = None,
) -> Tally:
    """Write the teacher's answers to all prompts into the folder `output`, or go on with what is there.

    Args:
        prompts: of `mohawk.records.read_prompts`. More of them than last time, in the same order, may be given.
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
            and not (output / MANIFEST).exists()
            and any(not p.name.startswith(".") for p in output.iterdir())
        ):
            raise UserError(f"output: {output} exists and was not written by generate-data; choose another folder")
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error.strerror}); choose another folder") from error
    with locked(output), ExitStack() as stack:
        settings = {"teacher": identity, "decoding": decoding.settings(), "seed": decoding.seed}
        settings = {"layout": LAYOUT, **settings, "filters": filters.settings()}
        _claim(output / MANIFEST, settings, prompts, getattr(teacher, "base", None))
        tally = recover(output, prompts, decoding.samples)
        spent = _seconds_spent(output / SUMMARY) if tally.prompts else 0.0
        kept_file, rejected_file = (
            stack.enter_context(open(output / n, "ab", buffering=0)) for n in (RESPONSES, REJECTED)
        )
        if tally.prompts:
            log.info("going on after %d of %d prompts", tally.prompts, len(prompts))
        before, started = (tally.prompts, tally.tokens), time.monotonic()
        synced = started

        def summarise() -> None:
            """Of all that is in the folder; also where the run stops early, and now and then for one that is killed."""
            seconds, (prompts_before, tokens_before) = time.monotonic() - started, before
            made = _summary(tally, spent, seconds, tally.prompts - prompts_before, tally.tokens - tokens_before)
            try:
                _write(output / SUMMARY, made)
            except OSError as error:
                raise _unwritable(output / SUMMARY, error) from error

        summarise()
        stack.callback(summarise)
        progress = stack.enter_context(_Progress(len(prompts), tally))
        answers = stack.enter_context(closing(teacher.responses(prompts, tally.prompts)))
        for i, responses in _held_back(answers, tally):
            assert i == tally.prompts, f"answers of prompt {i}, not {tally.prompts}"
            kept, rejected, reasons = b"", b"", []
            for sample, (response, verdict) in enumerate(
                zip(responses, judge.verdicts(prompts[i], responses), strict=True)
            ):
                line = _line(prompts[i], sample, response, verdict, identity, teacher)
                if verdict.reason is None:
                    kept += line
                else:
                    rejected += line
                    reasons.append(verdict.reason)
            for file, lines in ((kept_file, kept), (rejected_file, rejected)):
                if lines:
                    _append(file, lines)
            tally.prompts += 1
            tally.kept += len(responses) - len(reasons)
            tally.rejected.update(reasons)
            tally.tokens += sum(response.tokens or 0 for response in responses)
            if time.monotonic() - synced > SYNC_SECONDS:
                _flush(kept_file, rejected_file)
                summarise()
                synced = time.monotonic()
            progress.show()
        _flush(kept_file, rejected_file)
    return tally


def _line(
    prompt: Prompt, sample: int, response: Response, verdict: Verdict, identity: Mapping[str, Any], teacher: Teacher
) -> bytes:
    decoding, line = teacher.decoding, {}
    if teacher.chat or isinstance(prompt.content, list):
        line["messages"] = as_messages(prompt.content)
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


def recover(output: Path, prompts: Sequence[Prompt], samples: int) -> Tally:
    """How far the files came; cuts off a line that a kill left unfinished, and a prompt's that lacks others.

    Raises UserError where lines are damaged or are not of these prompts, in their order.
    """
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    files = {name: list(_lines(output / name, index)) for name in (RESPONSES, REJECTED)}
    found = Counter(i for lines in files.values() for i, *_ in lines)
    done = 0
    while found[done] == samples:
        done += 1
    tally = Tally(prompts=done)
    for name, lines in files.items():
        end = 0
        for i, stop, reason, tokens in lines:
            if i >= done:
                break
            end = stop
            tally.tokens += tokens
            if name == RESPONSES:
                tally.kept += 1
            else:
                tally.rejected[reason] += 1
        if (output / name).exists():
            os.truncate(output / name, end)
    return tally


def _lines(path: Path, index: Mapping[str, int]) -> Iterator[tuple[int, int, str | None, int]]:
    """(prompt's index, where the line ends in the file, reason, tokens) of each whole line."""
    if not path.exists():
        return
    end, last = 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = parse_json(line)
                i, reason, tokens = index[row["prompt_id"]], row.get("reason"), row["tokens"] or 0
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: damaged, or not of these prompts; move {path.parent} away") from None
            if i < last:
                raise UserError(f"{path}:{number}: out of the prompts' order; move {path.parent} away")
            last = i
            yield i, end, reason, tokens


def _claim(path: Path, settings: dict[str, Any], prompts: Sequence[Prompt], endpoint: str | None) -> None:
    """Write the folder's manifest, or check that the one that is there says the same."""
    old = None
    if path.exists():
        try:
            old = parse_json(path.read_bytes())
            # one that an earlier version wrote may hold a secret of --request
            old_settings, count = without_secrets(old["settings"]), old["prompts"]["count"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"output: {path} cannot be read; move {path.parent} away, or choose another folder"
            ) from None
        settings = without_secrets(json.loads(json.dumps(settings)))
        if changed := _changed(old_settings, settings):
            raise UserError(
                f"output: {path.parent} holds answers made with other settings ({'; '.join(changed)}); choose another "
                "folder, or give the same settings to go on"
            )
        if count > len(prompts) or old["prompts"]["sha256"] != _digest(prompts[:count]):
            raise UserError(
                f"output: {path.parent} holds answers to other prompts ({count}, here {len(prompts)}); choose another "
                "folder, or give the same prompts (more may follow them)"
            )
    asked = {"count": len(prompts), "sha256": _digest(prompts)}
    _write(path, {"mohawk": mohawk.__version__, "settings": settings, "prompts": asked, "endpoint": endpoint})


def _changed(old: Any, new: Any, at: str = "") -> list[str]:
    """`name: then, now` of the settings that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{at}: {shortened(repr(old))} then, {shortened(repr(new))} now"]
    names = sorted(old.keys() | new.keys())
    return [c for name in names for c in _changed(old.get(name), new.get(name), f"{at}.{name}" if at else name)]


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(" ".join(prompt.id for prompt in prompts).encode()).hexdigest()


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


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        # without the text, which may hold a key
        raise UserError(f"--request: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"--request: got a JSON {type(value).__name__}; give an object, fields and values")
    return value


def _append(file: Any, lines: bytes) -> None:
    """One write, so that a kill leaves whole lines; what a full disk took of it is cut off by the next start."""
    try:
        while lines:
            lines = lines[file.write(lines) :]
    except OSError as error:
        raise _unwritable(file.name, error) from error


def _flush(*files: Any) -> None:
    for file in files:
        with naming(file.name):
            os.fsync(file.fileno())


def _unwritable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"output: {path} cannot be written ({error.strerror}); the same command goes on")


def _seconds_spent(path: Path) -> float | None:
    """What earlier starts of the command took; None where the folder does not say."""
    try:
        return float(parse_json(path.read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def _write(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(beside)
    os.replace(beside, path)


class _Progress:
    """A bar on stderr with an estimate of the time left; a plain line now and then where that is no terminal."""

    def __init__(self, prompts: int, tally: Tally):
        from tqdm import tqdm

        self.tqdm, self.tally, self.prompts = tqdm, tally, prompts
        self.plain = not sys.stderr.isatty()
        self.first, self.first_tokens = tally.prompts, tally.tokens
        self.started = self.said_at = time.monotonic()
        self.bar = tqdm(
            total=prompts,
            initial=tally.prompts,
            desc="prompts",
            disable=self.plain,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self) -> None:
        now, tally = time.monotonic(), self.tally
        speed = (tally.tokens - self.first_tokens) / max(now - self.started, 1e-9)
        said = f"{tally.kept} kept, {sum(tally.rejected.values())} rejected, {speed:,.0f} tokens/s"
        if not self.plain:
            self.bar.set_postfix_str(said, refresh=False)
            self.bar.update(tally.prompts - self.bar.n)
        elif now - self.said_at >= SAY_SECONDS:
            self.said_at = now
            left = (now - self.started) / (tally.prompts - self.first) * (self.prompts - tally.prompts)
            print(
                f"prompts {tally.prompts}/{self.prompts}  {said}, {self.tqdm.format_interval(left)} left",
                file=sys.stderr,
                flush=True,
            )

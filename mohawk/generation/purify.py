"""`mohawk purify`: several teachers' rationales of the same prompts made one each, by vote, by routing or by a merge.

The files' lines are as `mohawk.losses.rationales.read_rationales` takes them; the output's are {prompt, label,
rationale} with `purified`: how it came about (`by`), whose the text is (`teacher`, or `teachers` of a merge), and
`votes`, the teachers behind each label. `rationale_pairs` makes a student's tasks of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from mohawk.core.folders import drop_file
from mohawk.core.json_files import parse_json
from mohawk.core.lines import sum_of
from mohawk.core.places import home
from mohawk.core.terminal import SHOWN
from mohawk.data.records import Prompt, content_hash
from mohawk.errors import UserError
from mohawk.generation.decoding import Decoding, LocalTeacher, local_teacher
from mohawk.generation.endpoint import EndpointTeacher
from mohawk.generation.filters import load_function, normalize
from mohawk.losses.rationale_router import RationaleRouter, measure_gains, read_gains, save_text
from mohawk.losses.rationales import TEMPLATES, extract_rationale, read_rationales

log = logging.getLogger(__name__)

Record = Mapping[str, Any]  # of read_rationales
Complete = Callable[[list[str]], list[str]]
Scorer = Callable[[str, str], float]

MERGE = """\
Several teachers answered the question below. Write one rationale: keep what is right and what they agree on, leave out
what is wrong or said twice, and end with the sentence "So the answer is X.", where X is the answer.

Question: {prompt}

{rationales}

The one rationale:"""


def by_prompt(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each prompt; prompts and records in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["prompt"], []).append(record)
    return groups


def vote(candidates: Sequence[Record], scorer: Scorer | None = None) -> dict[str, Any]:
    """The best rationale for the label that most teachers gave, with its provenance.

    Labels are compared as `mohawk.generation.filters.normalize` writes them. Each teacher has one vote, which its
    answers share where it gave several. Of equal labels the one said first wins. Among that label's rationales the one
    that agrees
    best with the others is taken: the largest mean of `overlap`; or the one with the largest scorer(prompt, rationale).
    Of equals, again, the first. A label may have no rationale at all: then None.
    """
    answers = Counter(record["teacher"] for record in candidates)
    votes: dict[str, Fraction] = {}
    teachers: dict[str, list[str]] = {}
    for record in candidates:
        key, name = _key(record["label"]), record["teacher"]
        votes[key] = votes.get(key, Fraction(0)) + Fraction(1, answers[name])
        if name not in teachers.setdefault(key, []):
            teachers[key].append(name)
    winner = max(votes, key=votes.__getitem__)  # the first of equals
    supporters = [record for record in candidates if _key(record["label"]) == winner]
    reasoned = [record for record in supporters if record["rationale"] is not None]
    chosen = supporters[0]
    if reasoned and scorer is not None:
        chosen = max(reasoned, key=lambda record: scorer(record["prompt"], record["rationale"]))
    elif reasoned:
        words = [_words(record["rationale"]) for record in reasoned]
        agreement = [sum(overlap(a, b) for j, b in enumerate(words) if j != i) for i, a in enumerate(words)]
        chosen = reasoned[agreement.index(max(agreement))]
    return _line(chosen, chosen["label"], chosen["rationale"], by="vote", teacher=chosen["teacher"], votes=teachers)


def overlap(a: Counter[str], b: Counter[str]) -> float:
    """F1 of two texts' words, each counted as often as it occurs (ROUGE-1); 1 for equal texts."""
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


def route(candidates: Sequence[Record], ranking: Sequence[str]) -> dict[str, Any]:
    """The rationale of the first teacher in the ranking that gave one, or else a label; of its several, as by vote."""
    for reasoned in (True, False):
        for teacher in ranking:
            own = [c for c in candidates if c["teacher"] == teacher and (c["rationale"] is not None or not reasoned)]
            if own:
                line = vote(own)
                line["purified"] |= {"by": "route", "votes": vote(candidates)["purified"]["votes"]}
                return line
    raise UserError(f"gains: none of {', '.join(ranking)} answered {candidates[0]['where']}; measure its teachers too")


def merge_prompt(candidates: Sequence[Record], template: str = MERGE) -> str:
    """What a language model is asked: the template with {prompt} and {rationales}, one paragraph a teacher."""
    check_merge_template(template)
    said = []
    for number, record in enumerate(candidates, 1):
        rationale = f"{record['rationale']} " if record["rationale"] is not None else ""
        said.append(f"Teacher {number}: {rationale}So the answer is {record['label']}.")
    fields = {"{prompt}": candidates[0]["prompt"], "{rationales}": "\n\n".join(said)}
    # in one pass: a question may have braces of its own
    return re.sub(r"\{prompt\}|\{rationales\}", lambda match: fields[match[0]], template)


def check_merge_template(template: str) -> None:
    """Raises UserError unless both fields are there once."""
    for field in ("{prompt}", "{rationales}"):
        if template.count(field) != 1:
            raise UserError(f"merge prompt: has {field} {template.count(field)} times; it needs it once")


def merged(candidates: Sequence[Record], text: str, templates: Sequence[str] = TEMPLATES) -> dict[str, Any]:
    """The record of a merge from the model's text, or, where there is none, or one without rationale and label, or with
    a label that no teacher gave, the vote's, which says so in `purified`."""
    line = vote(candidates)
    found = next(filter(None, (extract_rationale(text, template) for template in templates)), None)
    votes = line["purified"]["votes"]
    if found is None or _key(found.label) not in votes:
        why = "a label of its own" if found is not None else "no template matches" if text.strip() else "no answer"
        line["purified"]["merge"] = why
        return line
    teachers = list(dict.fromkeys(record["teacher"] for record in candidates))
    return _line(candidates[0], found.label, found.rationale, by="merge", teachers=teachers, votes=votes)


def merge_all(
    groups: Sequence[Sequence[Record]],
    complete: Complete,
    journal: Path,
    *,
    identity: Mapping[str, Any],
    template: str = MERGE,
    templates: Sequence[str] = TEMPLATES,
    at_once: int = 16,
) -> list[dict[str, Any]]:
    """The merged record of each prompt's candidates; a single candidate is taken as it is.

    complete: gives a text for each of a list of prompts, `at_once` at a time. journal: a file that grows by each such
    batch, flushed to the disk; where it is there from a stopped run with the same candidates, templates and `identity`
    (what tells the model and its settings), the work goes on behind it. Raises UserError where it is of another run.
    """
    key = json.dumps([groups, template, list(templates), dict(identity)], sort_keys=True, default=str)
    header = {"merge": hashlib.sha256(key.encode()).hexdigest()}
    from tqdm import tqdm

    done = _recovered(journal, header)
    if done:
        log.info("going on after %d of %d prompts", len(done), len(groups), extra=SHOWN)
    todo = iter([candidates for candidates in groups if candidates[0]["prompt"] not in done])
    bar = tqdm(total=len(groups), initial=len(done), unit=" prompts", disable=None, leave=False)
    while batch := list(islice(todo, at_once)):
        asked = [merge_prompt(candidates, template) for candidates in batch if len(candidates) > 1]
        texts = complete(asked) if asked else []
        if len(texts) != len(asked):
            raise ValueError(f"complete: gave {len(texts)} texts for {len(asked)} prompts")
        answers = iter(texts)
        made = [merged(c, next(answers), templates) if len(c) > 1 else vote(c) for c in batch]
        _append(journal, "".join(_summed(line) for line in made))
        done |= {line["prompt"]: line for line in made}
        bar.update(len(made))
    bar.close()
    return [done[candidates[0]["prompt"]] for candidates in groups]


def purify(
    files: Sequence[str | Path],
    output: str | Path,
    *,
    by: str,
    templates: Sequence[str] = TEMPLATES,
    scorer: Scorer | None = None,
    ranking: Sequence[str] = (),
    complete: Complete | None = None,
    identity: Mapping[str, Any] | None = None,
    merge_template: str = MERGE,
) -> Counter[str]:
    """Write one record a prompt of `files` to the JSON lines `output`, which is whole or not there.

    by: vote (with `scorer`, if given), route (by `ranking`, the best teacher first) or merge (by `complete`, which
    `identity` tells apart from others). A merge that was stopped goes on where it was. Returns how many records came by
    which way, and `merge: REASON` for those of a merge that fell back on the vote. Raises UserError.
    """
    output = check_output(output)
    if by not in ("vote", "route", "merge"):
        raise UserError(f"by: got {by!r}; allowed: vote, route, merge")
    records = read_rationales(files, templates)
    groups = list(by_prompt(records).values())
    journal = output.with_name(f".{output.name}.partial")
    if by == "vote":
        lines = [vote(candidates, scorer) for candidates in groups]
    elif by == "route":
        lines = [route(candidates, ranking) for candidates in groups]
    else:
        if complete is None:
            raise UserError("by: got merge without `complete`, which writes the merged texts; give it")
        lines = merge_all(
            groups, complete, journal, identity=identity or {}, template=merge_template, templates=templates
        )
    try:
        save_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except UserError:
        drop_file(output)  # there already, perhaps, without all that belongs to it: it would be in the next call's way
        raise
    if by == "merge":
        try:
            journal.unlink(missing_ok=True)
        except OSError as error:  # all is done, and that it is in the way of nothing
            log.warning("could not delete %s: %s", journal, error.strerror)
    counts = Counter(line["purified"]["by"] for line in lines)
    return counts + Counter(f"merge: {why}" for line in lines if (why := line["purified"].get("merge")))


def purify_from(
    files: Sequence[str | Path],
    output: str | Path,
    *,
    by: str,
    templates: Sequence[str] = TEMPLATES,
    scorer: str | None = None,
    gains: str | Path | None = None,
    student: str | None = None,
    validation: str | Path | None = None,
    rounds: int = 12,
    trial: Mapping[str, Any] | None = None,
    model: str | None = None,
    endpoint: str | None = None,
    merge_prompt_file: str | Path | None = None,
    max_new_tokens: int = 256,
    opening: Mapping[str, Any] | None = None,
) -> Counter[str]:
    """The command line's work: what `by` needs is opened, the records written, and what came of it printed.

    scorer: "module:function". gains: a file that ranks the teachers; or student and validation (JSON lines of prompt
    and label), to measure them, in `rounds` rounds as `trial` has it (options of `measure_gains`), into the file
    OUTPUT.gains.json. model: what merges, here or behind `endpoint`; opening: options of `local_teacher` or
    `EndpointTeacher`. Raises UserError.
    """
    from rich.console import Console

    output = check_output(output)
    chosen: dict[str, Any] = {}
    measured: dict[str, Any] | None = None
    if by == "vote" and scorer is not None:
        chosen["scorer"] = load_function(scorer, "scorer")
    elif by == "route":
        measured = read_gains(gains) if gains is not None else None
        if measured is None:
            gains = output.with_name(f"{output.name}.gains.json")
            records = read_rationales(files, templates)
            measured = _measured(records, gains, student, validation, rounds, trial or {})
        chosen["ranking"] = sorted(measured["gains"], key=measured["gains"].__getitem__, reverse=True)
    elif by == "merge":
        assert model is not None  # the command asks for it
        template = MERGE
        if merge_prompt_file is not None:
            template = _read(merge_prompt_file)
        check_merge_template(template)
        decoding = Decoding(max_new_tokens=max_new_tokens)
        options = dict(opening or {})
        teacher: LocalTeacher | EndpointTeacher
        if endpoint is None:
            teacher = local_teacher(model, decoding, **options)
        else:
            teacher = EndpointTeacher(endpoint, model, decoding, **options)
        identity = {**teacher.identity(), "decoding": decoding.settings()}
        chosen |= {"complete": completer(teacher), "identity": identity, "merge_template": template}
    counts = purify(files, output, by=by, templates=templates, **chosen)
    console = Console()
    total = sum(count for way, count in counts.items() if ":" not in way)
    ways = ", ".join(f"{count} by {way}" for way, count in counts.items() if ":" not in way)
    console.print(f"{total} prompts in {output}: {ways}", highlight=False, soft_wrap=True)
    for way, count in counts.items():
        if ":" in way:
            console.print(f"{way} for {count} prompts: the vote was taken", highlight=False, soft_wrap=True)
    if measured is not None:
        for name in chosen["ranking"]:
            console.print(f"{measured['gains'][name]:+.5f} nats  {name}", highlight=False, soft_wrap=True)
    return counts


def completer(teacher: LocalTeacher | EndpointTeacher) -> Complete:
    """A teacher as a function of texts; a prompt it cannot answer gets an empty text."""

    def complete(prompts: list[str]) -> list[str]:
        digests = [content_hash(text) for text in prompts]
        asked = [Prompt(d[:16], d, text, "merge") for d, text in zip(digests, prompts, strict=True)]
        return [answers[0].text for _, answers in teacher.responses(asked)]

    return complete


def _measured(records, keep, student, validation, rounds, trial) -> dict[str, Any]:
    import torch

    from mohawk.data.tokenizers.same_tokenizer import teacher_tokenizer
    from mohawk.loading.describe import student_folder
    from mohawk.loading.models import load_teacher

    by_teacher: dict[str, list[Record]] = {}
    for record in records:
        by_teacher.setdefault(record["teacher"], []).append(record)
    held_out = read_rationales([validation])
    if both := {record["prompt"] for record in held_out} & {record["prompt"] for record in records}:
        raise UserError(f"validation: {len(both)} of its prompts are trained on too, such as {min(both)[:60]!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = student_folder(student)
    tokenizer = teacher_tokenizer(name, who="--student")
    model = load_teacher(name, dtype="float32", device=device, who="--student").requires_grad_(True)
    router = RationaleRouter(list(by_teacher))
    rounds = max(rounds, len(by_teacher))  # each teacher once, or there is nothing to rank
    return measure_gains(model, tokenizer, by_teacher, held_out, router, rounds=rounds, keep=keep, **trial).state()


def check_output(output: str | Path) -> Path:
    """Where the records will be written. Raises UserError where something is already, or nothing can be."""
    output = home(output)
    if os.path.lexists(output):
        raise UserError(f"output: {output} exists; move it away, or choose another file")
    if not output.parent.is_dir():
        raise UserError(f"output: {output.parent} is no folder; make it first")
    return output


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _line(record: Record, label: str, rationale: str | None, **purified: Any) -> dict[str, Any]:
    return {"prompt": record["prompt"], "label": label, "rationale": rationale, "purified": purified}


def _key(label: str) -> str:
    return normalize(label) or label.strip()


def _words(text: str) -> Counter[str]:
    return Counter(word for token in text.casefold().split() if (word := token.strip(".,;:!?\"'()[]*")))


def _summed(line: Mapping[str, Any]) -> str:
    """A line of the journal: a checksum, a space, JSON."""
    text = json.dumps(line, ensure_ascii=False)
    return f"{sum_of(text.encode('utf-8', 'replace'))} {text}\n"


def _checked(line: bytes) -> Any:
    """What `_summed` made a line of; an earlier version's line has no sum. Raises ValueError for a damaged one."""
    digest, _, text = (b"", b"", line) if line.startswith(b"{") else line.partition(b" ")
    if not line.startswith(b"{") and digest != sum_of(text).encode():
        raise ValueError("another checksum")
    return parse_json(text)


def _recovered(journal: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The journal's lines, by prompt, but for damaged ones, which are passed over; what a kill left unfinished behind
    them is cut off. A new one gets its header."""
    content = journal.read_bytes() if journal.exists() else b""
    end = content.rfind(b"\n") + 1
    first, *rest = content[:end].split(b"\n")[:-1] or [b""]
    if not end:
        journal.unlink(missing_ok=True)  # a header cut short
        _append(journal, _summed(header))
        return {}
    try:
        merge_of = _checked(first)
    except (ValueError, TypeError):
        raise UserError(
            f"{journal}: its first line is damaged, so that what was merged is not known; if files and settings are as "
            f"they were, write {json.dumps(header)} there to go on, or delete it to merge anew"
        ) from None
    if merge_of != header:
        raise UserError(f"{journal}: left by a merge of other data or settings; delete it, or choose another output")
    os.truncate(journal, end)
    done = {}
    for number, line in enumerate(rest, 2):
        try:
            record = _checked(line)
            done[record["prompt"]] = record
        except (ValueError, KeyError, TypeError):
            log.warning("%s:%d: damaged; its prompt is asked again", journal, number)
    if any(line.startswith(b"{") for line in rest):
        log.warning("%s: has lines without checksums, as an earlier version wrote them; they are not verified", journal)
    return done


def _append(journal: Path, text: str) -> None:
    try:
        with open(journal, "a", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{journal}: cannot be written ({error.strerror}); the same command goes on") from error

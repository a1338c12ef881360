"""Distilling step by step (Hsieh et al. 2023, arXiv 2305.02301): the student learns labels and the reasons for them.

A teacher's text is taken apart into rationale and label, and each example becomes two tasks of one model, told apart by
a prefix: `[label] question -> label` and `[rationale] question -> rationale`. The loss is label loss + rationale_weight
* rationale loss, each a mean over its own tokens. At inference the label task alone is asked for: it costs nothing.

    extract_rationale(text, template)      a text -> (rationale, label)
    read_rationales(files)                 JSON lines -> records of prompt, label, rationale, teacher
    rationale_pairs(records)               -> prompt/response pairs, each of one task
    read_rationale_pairs(files, tokenizer) both, tokenised for `mohawk.data.pairs.PairsDataset`
    RationaleDistiller(student, tokenizer) the loss in a plain loop
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from mohawk.data.messages import canonical, chat_of
from mohawk.data.next_tokens import IGNORED, next_labels
from mohawk.data.pairs import Pairs
from mohawk.data.records import content_hash, read_records
from mohawk.data.source_files import as_source
from mohawk.data.tokenizers.same_tokenizer import check_embedding_rows
from mohawk.errors import UserError
from mohawk.kernels.kd.interface import linear_kd_loss
from mohawk.kernels.kd.teachers import TeacherSamples
from mohawk.loading.causal import embedding_rows, plain_model
from mohawk.loading.configs import check_decoder
from mohawk.losses.heads import Head, final_hidden_states
from mohawk.losses.schedules import task_weights
from mohawk.losses.teachers import ModelTeacher, is_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

log = logging.getLogger(__name__)

LABEL, RATIONALE = "[label]", "[rationale]"
TASKS = {"label": 1, "rationale": 2}  # in the column `task` of packed rows
FIELDS = {"label": r"[^\n]+?", "rationale": r"[\s\S]+"}
# Tried in this order; the first that matches counts.
TEMPLATES = (
    "<think> {rationale} </think> {label}",
    "Rationale: {rationale} Label: {label}",
    "Label: {label} Rationale: {rationale}",
    "Answer: {label} Explanation: {rationale}",
    "{rationale} So the answer is {label}.",
    "{rationale} Therefore, the answer is {label}.",
    "{rationale} The answer is {label}.",
    "{rationale} #### {label}",
    "{rationale} Final answer: {label}",
    "{rationale} Answer: {label}",
)


# Of each example: a text, ids, or None where there is none.
Answers = Tensor | Sequence[str | Sequence[int] | Tensor | None]


class Extracted(NamedTuple):
    """What a template found, without white space around it."""

    rationale: str
    label: str


def extract_rationale(text: str, template: str) -> Extracted | None:
    """The rationale and label in a teacher's text, or None where the template does not match.

    template: text with the fields {rationale} and {label}, once each, such as "{rationale} So the answer is {label}.".
    Case does not count, and any white space stands for any other. A label ends with its line; a rationale may have many
    lines, and one at the template's beginning starts at the text's. Where the template's words occur several times the
    last match counts: a teacher that corrects itself does so at the end. A full stop at the template's end may be
    missing at the end of a line, and does not end a label inside a number ("3.5"). Raises UserError for a template with
    other fields.
    """
    match = _pattern(template).match(text)
    if match is None:
        return None
    found = Extracted(match["rationale"].strip(), match["label"].strip())
    return found if found.rationale and found.label.strip(".") else None


@functools.lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w*)\}", template)  # words, field, words, field, words
    if sorted(parts[1::2]) != ["label", "rationale"]:
        raise UserError(f"template {template!r}: needs {{rationale}} and {{label}}, once each, and no other field")
    if not parts[2].strip():
        raise UserError(f"template {template!r}: needs words between its fields, or nothing tells where one ends")
    # greedy from the text's beginning: the last match is found
    pattern = r"[\s\S]*" if parts[0].strip() else r"\s*"
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if i % 2:
            pattern += f"(?P<{part}>{FIELDS[part]})"
        elif last and part.strip() == ".":
            pattern += r"[^\S\n]*(?:\.(?=\s|\Z)|(?=\n|\Z))"
        elif words := part.split():
            begin = r"(?<!\w)" if words[0][0].isalnum() else ""
            end = r"(?!\w)" if words[-1][-1].isalnum() else ""
            pattern += r"\s*" + begin + r"\s+".join(map(re.escape, words)) + end + r"\s*"
        elif last:
            pattern += r"[^\S\n]*(?=\n|\Z)" if parts[i - 1] == "label" else r"\Z"
    return re.compile(pattern, re.IGNORECASE)


def read_rationales(files: Sequence[Any], templates: Sequence[str] = TEMPLATES) -> list[dict[str, Any]]:
    """Records of JSON lines: {prompt, label, rationale or None, teacher, where}, all texts, in the files' order.

    files: paths, or sources as in `mohawk.data.source_files.Source`.

    A line has `prompt` (or, as `generate-data` writes a chat, `messages` of one user's message) and either `label`,
    with or without `rationale`, or `response`: a teacher's text, which the first of `templates` that matches takes
    apart; or a chat of one question and its answer, whose `reasoning_content` or `<think>` is the rationale. Responses
    that none matches are counted, logged and left out. `teacher` is the line's own, or the file's name. Raises
    UserError, with file and line, for anything else and where nothing is left.
    """
    for template in templates:
        _pattern(template)
    records, matched, unmatched = [], 0, []
    sources = [as_source(file) for file in files]
    stems = [Path(source.source).name.split(".")[0] for source in sources]
    for source, stem in zip(sources, stems, strict=True):
        name = stem if stems.count(stem) == 1 else source.source
        for where, row in read_records(source):
            row = _of_chat(row, where)
            record: dict[str, Any] = {"prompt": _prompt(row, where), "teacher": str(row.get("teacher") or name)}
            if row.get("label") is not None:
                record["label"] = _text(row, "label", where)
                record["rationale"] = _text(row, "rationale", where) if row.get("rationale") is not None else None
            elif row.get("response") is not None:
                found = _taken_apart(_text(row, "response", where), templates)
                if found is None:
                    unmatched.append(where)
                    continue
                matched += 1
                record |= found._asdict()
            else:
                raise UserError(_nothing_to_learn(row, where))
            records.append({**record, "where": where})
    if unmatched:
        log.warning(
            "%d of %d responses match none of the %d templates and are left out; the first: %s",
            len(unmatched),
            len(unmatched) + matched,
            len(templates),
            unmatched[0],
        )
    if not records:
        why = f"none of {len(unmatched)} responses matches a template" if unmatched else "they hold no line"
        raise UserError(f"rationales: nothing in {', '.join(source.source for source in sources)}: {why}")
    return records


def _taken_apart(response: str, templates: Sequence[str]) -> Extracted | None:
    return next(filter(None, (extract_rationale(response, template) for template in templates)), None)


def check_record(row: Mapping[str, Any], where: str, templates: Sequence[str] = TEMPLATES) -> bool:
    """UserError where a line has not what `read_rationales` asks of each. Returns whether there is something to learn
    in it: a label, or a response that a template matches."""
    row = _of_chat(row, where)
    _prompt(row, where)
    given = next((name for name in ("label", "response") if row.get(name) is not None), None)
    if given is None:
        raise UserError(_nothing_to_learn(row, where))
    for name in (given, "rationale") if given == "label" and row.get("rationale") is not None else (given,):
        _text(row, name, where)
    return given == "label" or _taken_apart(_text(row, given, where), templates) is not None


def _of_chat(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A row; of a chat of one question and its answer the prompt, and the answer as label and rationale (its thoughts),
    or as a response."""
    if any(row.get(name) is not None for name in ("prompt", "label", "response")):
        return row
    try:
        found = chat_of(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if found is None or [message["role"] for message in found[0]] != ["user", "assistant"]:
        return row
    asked, answer = found[0]
    made = {"prompt": asked["content"]} | {k: row[k] for k in ("teacher",) if row.get(k) is not None}
    if thoughts := answer.get("reasoning_content"):
        return {**made, "label": answer["content"], "rationale": thoughts}
    return {**made, "response": answer["content"]}


def _nothing_to_learn(row: Mapping[str, Any], where: str) -> str:
    fields = ", ".join(map(str, row)) or "none"
    return f"{where}: has neither label nor response; its fields: {fields}; give one of them"


def _prompt(row: Mapping[str, Any], where: str) -> str:
    messages = row.get("messages")
    if "prompt" in row or messages is None:
        return _text(row, "prompt", where)
    try:
        messages = canonical(messages)
    except ValueError as error:
        raise UserError(f"{where}: messages: {error}") from None
    if [message["role"] for message in messages] != ["user"]:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: messages of {roles}; a rationale's prompt is one text, so give one user's message")
    return _text(messages[0], "content", where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # a label that is a number
    if not isinstance(value, str) or not value.strip():
        got = "an empty text" if isinstance(value, str) else type(value).__name__ if field in row else "no such field"
        raise UserError(f"{where}: {field}: got {got}; needs a text")
    return value


def task_prompt(prefix: str, prompt: str) -> str:
    """What the student reads before its answer: the task's prefix, the prompt, and the end of the line."""
    return f"{prefix} {prompt}\n"


def rationale_pairs(
    records: Iterable[Mapping[str, Any]],
    *,
    label_prefix: str = LABEL,
    rationale_prefix: str = RATIONALE,
    rationale_weight: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Pairs {prompt, response, task, question, weight} of records {prompt, label, rationale}: the label's, then, where
    there is one, the rationale's. `question` is the prompt without the task's prefix, `weight` 1 or rationale_weight.

    A mean over all tokens would not do: a label of two tokens vanishes in it beside a rationale of a hundred. Training
    takes each task's mean over its own tokens of a step (`KnowledgeDistiller`, by the column `task` of packed rows).
    With rationale_weight 0 there are no rationale pairs. Raises UserError for a weight below 0.
    """
    if rationale_weight < 0:
        raise UserError(f"rationale_weight: got {rationale_weight}; allowed: 0 or above")
    prefixes = {"label": label_prefix, "rationale": rationale_prefix}
    scale = {"label": 1.0, "rationale": rationale_weight}
    for record in records:
        for task, prefix in prefixes.items():
            if record.get(task) is not None and scale[task]:
                pair = {"prompt": task_prompt(prefix, record["prompt"]), "response": record[task], "task": task}
                yield {**pair, "question": record["prompt"], "weight": scale[task]}


def read_rationale_pairs(
    files: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    templates: Sequence[str] = TEMPLATES,
    label_prefix: str = LABEL,
    rationale_prefix: str = RATIONALE,
    rationale_weight: float = 1.0,
) -> Pairs:
    """The pairs of files' records, tokenised: what `mohawk.data.pairs.PairsDataset` packs, with `weighting` None.

    Both tasks of a prompt are on one side of `split_pairs`. Raises UserError as `read_rationales` does.
    """
    records = read_rationales(files, templates)
    prefixes = {"label_prefix": label_prefix, "rationale_prefix": rationale_prefix}
    pairs = list(rationale_pairs(records, **prefixes, rationale_weight=rationale_weight))
    encoded = [pair_ids(tokenizer, pair["prompt"], pair["response"]) for pair in pairs]
    before, after = (np.array([len(ids) for ids in side], dtype=np.int64) for side in zip(*encoded, strict=True))
    ends = np.cumsum(before + after)
    unknown = np.full(len(pairs), np.nan)

    def hashes(field: str) -> np.ndarray:
        return np.array([int(content_hash(pair[field])[:16], 16) for pair in pairs], dtype=np.uint64)

    return Pairs(
        tokens=np.concatenate([ids for both in encoded for ids in both]).astype(np.uint32),
        learn=np.repeat(np.tile([False, True], len(pairs)), np.stack([before, after], 1).reshape(-1)),
        spans=np.stack([ends - before - after, ends], 1),
        responses=ends - after,
        prompts=hashes("question"),
        answers=hashes("response"),
        logprobs=unknown,
        sampling_logprobs=unknown,
        lengths=after,
        teachers=None,
        unknown=dict.fromkeys(("logprob", "sampling_logprob"), records[0]["where"]),
        bos_token_id=tokenizer.bos_token_id,
        weights=np.array([float(pair["weight"]) for pair in pairs]),
        tasks=np.array([TASKS[pair["task"]] for pair in pairs], dtype=np.int64),
    )


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """A prompt's tokens, as the model sees them when it answers, and the response's with the eos, if there is one.

    The response is tokenised as the prompt's continuation (alone, some tokenizers put a space first), unless that would
    change the prompt's tokens.
    """
    eos = tokenizer.eos_token_id
    before, whole = tokenizer([prompt, prompt + response])["input_ids"]
    for ids in (before, whole):
        if ids and ids[-1] == eos:  # which some tokenizers put behind whatever they are given
            ids.pop()
    after = whole[len(before) :]
    if whole[: len(before)] != before:
        after = tokenizer(response, add_special_tokens=False)["input_ids"]
    return before, after if eos is None else [*after, eos]


class RationaleDistiller:
    """`loss = distiller.compute_loss(prompts, labels, rationales)` in a training loop of one's own.

    Args:
        student: any Hugging Face causal language model; the caller trains it.
        tokenizer: the student's, and the teacher's.
        label_prefix, rationale_prefix: what tells the model which task it has.
        rationale_weight: lambda of the paper's L_label + lambda * L_rationale.
        task_weight: instead, weights of both losses: {"label": ..., "rationale": ...}, 1 where one is left out.
        teacher: a model whose next-token distribution the label task learns as well; it is frozen here, but for what it
            shares with the student, whose adapter is switched off where the teacher is the model that it adapts.
        ce_weight, kd_weight, temperature, divergence: of the label task, `kd_weight * T^2 * D + ce_weight * CE` as in
            `kd_loss`; a rationale's loss is its cross-entropy.

    Raises:
        UserError: kd_weight above 0 without a teacher or the reverse; a rationale_weight below 0; a task_weight beside
            it or of another task.
    """

    def __init__(
        self,
        student: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label_prefix: str = LABEL,
        rationale_prefix: str = RATIONALE,
        rationale_weight: float = 1.0,
        task_weight: Mapping[str, float] | None = None,
        teacher: CausalLM | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
    ):
        if rationale_weight < 0:
            raise UserError(f"rationale_weight: got {rationale_weight}; allowed: 0 or above")
        label_weight = 1.0
        if task_weight is not None:
            try:
                _, label_weight, weight = task_weights(task_weight)
            except ValueError as error:
                raise UserError(str(error)) from None
            if "text" in task_weight:
                raise UserError("task_weight: got 'text'; allowed: label, rationale: there is no plain text here")
            if rationale_weight != 1:
                raise UserError(
                    f"rationale_weight: got {rationale_weight:g} beside task_weight, which has the rationales' weight "
                    "too; give one of them"
                )
            rationale_weight = weight
        if (teacher is None) != (kd_weight == 0):
            what = "no teacher" if teacher is None else "a teacher"
            raise UserError(f"kd_weight: got {kd_weight} and {what}; give a teacher and a weight above 0, or neither")
        check_decoder(student, "student")
        check_embedding_rows(tokenizer, embedding_rows(student), "student", "the tokenizer")
        if teacher is not None:
            check_decoder(teacher, "teacher")
            check_embedding_rows(tokenizer, embedding_rows(teacher), "teacher", "the tokenizer")
        self.student, self.tokenizer = student, tokenizer
        self.teacher = None
        if teacher is not None:
            self.teacher = ModelTeacher(plain_model(student) if is_around(student, teacher) else teacher)
            self.teacher.beside(student)
        self.prefixes = (label_prefix, rationale_prefix)
        self.label_weight, self.rationale_weight = label_weight, rationale_weight
        self.label_loss: dict[str, Any] = {"ce_weight": ce_weight, "kd_weight": kd_weight}
        self.label_loss |= {"temperature": temperature, "divergence": divergence}

    @overload
    def compute_loss(
        self,
        prompts: Sequence[str],
        labels: Answers,
        rationales: Answers | None = None,
        *,
        teacher_rationale: Answers | None = None,
        return_parts: Literal[False] = False,
        normalizers: tuple[float, float] | None = None,
    ) -> Tensor: ...
    @overload
    def compute_loss(
        self,
        prompts: Sequence[str],
        labels: Answers,
        rationales: Answers | None = None,
        *,
        teacher_rationale: Answers | None = None,
        return_parts: Literal[True],
        normalizers: tuple[float, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    @overload
    def compute_loss(
        self,
        prompts: Sequence[str],
        labels: Answers,
        rationales: Answers | None = None,
        *,
        teacher_rationale: Answers | None = None,
        return_parts: bool,
        normalizers: tuple[float, float] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...
    def compute_loss(
        self,
        prompts: Sequence[str],
        labels: Answers,
        rationales: Answers | None = None,
        *,
        teacher_rationale: Answers | None = None,
        return_parts: bool = False,
        normalizers: tuple[float, float] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """label loss + rationale_weight * rationale loss, each a mean over its answers' tokens, eos included; a scalar.

        Three texts an example; a rationale may be None. teacher_rationale: the same as rationales, by another name.
        Labels and rationales may also be the tokenizer's ids: a tensor (b, m) int64, padded with -100 or the
        tokenizer's padding, or a list of ids for each example, with or without the eos. return_parts: also
        {"label": ..., "rationale": ...}, both detached and before the weight. normalizers: divide the two sums over
        tokens instead of their counts, such as those of all micro-batches of a step (`count_tokens`).

        Raises UserError for lists of different lengths, ids that the student has not, prompts that are no texts, and
        both names of the rationales or none.
        """
        if (rationales is None) == (teacher_rationale is None):
            got = "neither" if rationales is None else "both"
            raise UserError(f"compute_loss: got {got} of rationales and teacher_rationale; give one of them")
        given = rationales if teacher_rationale is None else teacher_rationale
        assert given is not None  # one of both is
        if isinstance(prompts, (str, Tensor)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                "compute_loss: prompts: got no list of texts; give texts, such as tokenizer.batch_decode(ids, "
                "skip_special_tokens=True): each task puts a prefix in front of them"
            )
        labels, rationales = self._answers("labels", labels), self._answers("rationales", given)
        if None in labels:
            raise UserError("compute_loss: labels: one holds no token; give every example a label")
        of_labels, of_rationales = normalizers or (None, None)
        if not len(prompts) == len(labels) == len(rationales) or not len(prompts):
            counts = f"{len(prompts)} prompts, {len(labels)} labels and {len(rationales)} rationales"
            raise UserError(f"compute_loss: got {counts}; needs as many of each, and at least one")
        label = self._task_loss(self.prefixes[0], prompts, labels, self.teacher, of_labels, **self.label_loss)
        reasoned = [
            (prompt, rationale) for prompt, rationale in zip(prompts, rationales, strict=True) if rationale is not None
        ]
        rationale = label.new_zeros(())
        if reasoned and self.rationale_weight:
            asked, answers = zip(*reasoned, strict=True)
            rationale = self._task_loss(
                self.prefixes[1], asked, answers, None, of_rationales, ce_weight=1.0, kd_weight=0.0
            )
        loss = self.label_weight * label + self.rationale_weight * rationale
        return (loss, {"label": label.detach(), "rationale": rationale.detach()}) if return_parts else loss

    def _task_loss(self, prefix: str, prompts, answers, teacher, normalizer, **options: Any) -> Tensor:
        batch = self.encode([task_prompt(prefix, prompt) for prompt in prompts], answers)
        batch = {name: tensor.to(self.student.device) for name, tensor in batch.items()}
        targets = next_labels(batch)[:, :-1]
        del batch["labels"]
        options |= {"labels": targets, "normalizer": normalizer}
        head = Head.of(self.student)
        student = head.student(final_hidden_states(self.student, batch)[:, :-1])
        if teacher is None:
            # nothing to compare with: the loss wants some teacher, and these ids cost nothing
            source = TeacherSamples(
                targets.clamp(min=0)[..., None], torch.ones(*targets.shape, 1, device=targets.device)
            )
            return linear_kd_loss(**student, teacher=source, **options)
        there = {name: tensor.to(teacher.model.device) for name, tensor in batch.items()}
        hidden, _, of_teacher = teacher.asked(there)
        source = of_teacher.teacher(hidden[:, :-1])
        sizes = {len(head.weight), len(source.head)}  # rows behind the tokenizer's last token differ within a family
        return linear_kd_loss(**student, teacher=source, vocab_size=min(sizes) if len(sizes) > 1 else None, **options)

    def count_tokens(self, prompts: Sequence[str], labels: Answers, rationales: Answers) -> tuple[int, int]:
        """How many tokens the label loss and the rationale loss of some examples are the means of, eos included."""

        def tokens(prefix: str, answers: Sequence[str | list[int] | None]) -> int:
            asked = zip(prompts, answers, strict=True)
            pairs = ((task_prompt(prefix, prompt), answer) for prompt, answer in asked if answer is not None)
            return sum(len(self._pair(*pair)[1]) for pair in pairs)

        of_labels, of_rationales = self._answers("labels", labels), self._answers("rationales", rationales)
        return tokens(self.prefixes[0], of_labels), tokens(self.prefixes[1], of_rationales)

    def _answers(self, name: str, given: Answers) -> list[str | list[int] | None]:
        """Texts and ids, these without padding and eos; None where there is nothing."""
        if isinstance(given, str) or isinstance(given, Tensor) and (given.dim() != 2 or given.is_floating_point()):
            got = "one text" if isinstance(given, str) else f"a tensor {tuple(given.shape)} of {given.dtype}"
            raise UserError(f"compute_loss: {name}: got {got}; give a list of texts, or ids (b, m) int64")
        answers: list[str | list[int] | None] = []
        ends = {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id}
        rows = embedding_rows(self.student)
        for one in given:
            if one is None or isinstance(one, str):
                answers.append(one)
                continue
            ids = [int(i) for i in (one.tolist() if isinstance(one, Tensor) else one) if i != IGNORED]
            if beyond := [i for i in ids if not 0 <= i < rows]:
                raise UserError(f"compute_loss: {name}: got the id {beyond[0]}; the student has 0 to {rows - 1}")
            while ids and ids[-1] in ends:
                ids.pop()
            while ids and ids[0] == self.tokenizer.pad_token_id:
                ids.pop(0)
            answers.append(ids or None)
        return answers

    def _pair(self, prompt: str, answer: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """A prompt's ids and its answer's, with the eos."""
        if isinstance(answer, str):
            return pair_ids(self.tokenizer, prompt, answer)
        before, after = pair_ids(self.tokenizer, prompt, "")
        return before, [*answer, *after]

    def encode(self, prompts: Sequence[str], answers: Sequence[str | Sequence[int]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (b, n) int64, padded on the right; labels on answers and their eos."""
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            before, after = self._pair(prompt, answer)
            rows.append((before + after, [IGNORED] * len(before) + after))
        n = max(len(ids) for ids, _ in rows)
        batch = {name: torch.full((len(rows), n), fill) for name, fill in (("input_ids", 0), ("labels", IGNORED))}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for i, (ids, labels) in enumerate(rows):
            batch["input_ids"][i, : len(ids)], batch["labels"][i, : len(ids)] = torch.tensor(ids), torch.tensor(labels)
            batch["attention_mask"][i, : len(ids)] = 1
        return batch

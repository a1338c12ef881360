"""`mohawk compare`: two models or addresses answer the same prompts; how often they agree, and which is preferred.

The folder holds `a/` and `b/`, each as `mohawk generate-data` writes it, so that a stopped comparison goes on, and
`pairs.jsonl` and `summary.json`.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.core.json_files import parse_json, write_json, write_text
from mohawk.core.places import home
from mohawk.data.generated import REJECTED, RESPONSES
from mohawk.data.records import Prompt, read_prompts
from mohawk.data.source_files import Source
from mohawk.errors import UserError
from mohawk.generation.decoding import Decoding, Response, local_teacher
from mohawk.generation.endpoint import EndpointTeacher
from mohawk.generation.filters import Filters, Judge, normalize
from mohawk.generation.generate_data import generate_data, json_object
from mohawk.measures.paired import NORMAL, Preference, preference
from mohawk.measures.written import overlap_scores
from mohawk.runs.tables import Table, percent_text, print_tables

if TYPE_CHECKING:
    from rich.console import Console

SIDES = ("a", "b")
PAIRS, SUMMARY = "pairs.jsonl", "summary.json"


def compare_answers(
    models: Sequence[str],
    sources: Sequence[str],
    output: Path | str,
    *,
    decoding: Decoding,
    names: Sequence[str | None] = (None, None),
    key_envs: Sequence[str | None] = (None, None),
    scorer: str | None = None,
    chat: bool = False,
    reading: Mapping[str, Any] | None = None,
    limit: int | None = None,
    local: Mapping[str, Any] | None = None,
    remote: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask both sides, print agreement and preference and write them into the folder `output`.

    models: A and B, each a folder, run, .gguf file or hub id, or the address of an OpenAI-compatible API. names: what
    the model at an address is called there; key_envs: the environment variables with its key. scorer:
    "module:function", (prompt, response) -> float, more is better; what is not finite counts as no answer. reading,
    limit: of prompts, as `generate_from`. local, remote: options of `local_teacher` and `EndpointTeacher` for both
    sides. Returns the summary. Raises UserError.
    """
    folder = home(output)
    for model, side, name, key in zip(models, SIDES, names, key_envs, strict=True):
        if is_address(model) and name is None:
            raise UserError(f"{model} is an address: --model-{side} NAME says which of its models to ask")
        for option, given in (("model", name), ("key-env", key)):
            if given is not None and not is_address(model):
                raise UserError(f"--{option}-{side} is of an address, such as http://localhost:8000/v1; leave it out")
    judge = None if scorer is None else Judge(Filters(scorer=scorer, min_score=float("-inf")))
    prompts = read_prompts([Source(source, **(reading or {})) for source in sources], limit=limit)
    for model, side, name, key in zip(models, SIDES, names, key_envs, strict=True):
        if is_address(model):
            assert name is not None
            options = dict(remote or {})
            if "request" in options:
                options["request"] = json_object(options["request"])
            asked = EndpointTeacher(model, name, decoding, chat=chat, key_env=key, **options)
        else:
            asked = local_teacher(model, decoding, chat=chat, **(local or {}))
        generate_data(prompts, asked, folder / side)
        del asked
        gc.collect()  # both models need not be in memory at once
    pairs = judged(prompts, [_answers(folder / side, prompts) for side in SIDES], judge)
    told = summary(pairs) | {"a": models[0], "b": models[1], "scorer": scorer}
    write_text(folder / PAIRS, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    write_json(folder / SUMMARY, told)
    _print(told, folder, console)
    return told


def is_address(model: str) -> bool:
    """Whether a model is behind an address."""
    return model.startswith(("http://", "https://"))


def judged(
    prompts: Sequence[Prompt], answers: Sequence[Mapping[str, Response]], judge: Judge | None
) -> list[dict[str, Any]]:
    """Each prompt with both answers (None: that side failed) and their scores, where there is a judge."""
    pairs = []
    for prompt in prompts:
        pair: dict[str, Any] = {"prompt": prompt.content}
        for side, found in zip(SIDES, answers, strict=True):
            answer = found[prompt.id]
            pair[side] = None if answer.error is not None else answer.text
            if answer.error is not None:
                pair[f"error_{side}"] = answer.error
            elif judge is not None:
                pair[f"score_{side}"] = judge.verdicts(prompt, [answer])[0].measured["score"]
        pairs.append(pair)
    return pairs


def summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `compare_answers` prints: `prompts`; of each side `failed`, mean `words` and `score`; `agreement`, the
    shares of equal answers, and of equal ones once normalised, and the scores of `overlap_scores`, B against A; and
    `preference`. None where nothing can be said."""
    both = [pair for pair in pairs if pair["a"] is not None and pair["b"] is not None]
    told: dict[str, Any] = {"prompts": len(pairs), "both": len(both), "agreement": None, "preference": None}
    for side in SIDES:
        given = [pair for pair in pairs if pair[side] is not None]
        scores = [score for pair in given if (score := pair.get(f"score_{side}")) is not None]
        told[f"side_{side}"] = {
            "failed": len(pairs) - len(given),
            "words": statistics.fmean(len(pair[side].split()) for pair in given) if given else None,
            "score": statistics.fmean(scores) if scores else None,
        }
    if both:
        told["agreement"] = {
            "equal": statistics.fmean(pair["a"] == pair["b"] for pair in both),
            "equal_normalised": statistics.fmean(normalize(pair["a"]) == normalize(pair["b"]) for pair in both),
            **overlap_scores([pair["b"] for pair in both], [pair["a"] for pair in both]),
        }
    if any(f"score_{side}" in pair for pair in pairs for side in SIDES):
        told["preference"] = asdict(preference([(pair.get("score_a"), pair.get("score_b")) for pair in pairs]))
    return told


def _answers(folder: Path, prompts: Sequence[Prompt]) -> dict[str, Response]:
    """What one side said, by the prompt's id. Raises UserError where the answers are of other prompts."""
    found = {}
    for name in (RESPONSES, REJECTED):
        with open(folder / name, "rb") as file:
            for line in file:
                row = parse_json(line)
                found[row["prompt_id"]] = Response(
                    row["response"], row["tokens"], row["finish_reason"], error=row.get("error")
                )
    if missing := [prompt.where for prompt in prompts if prompt.id not in found]:
        raise UserError(f"{folder}: has no answer to {missing[0]}; choose another folder")
    return found


def _print(told: Mapping[str, Any], folder: Path, console: Console | None) -> None:
    from rich.console import Console

    console = console or Console()
    for side in SIDES:
        console.print(f"{side.upper()}: {told[side]}", highlight=False, markup=False, soft_wrap=True)
    sides = [told[f"side_{side}"] for side in SIDES]
    rows = [["failed", *(str(side["failed"]) for side in sides)]]
    for name, title in (("words", "words, mean"), ("score", "score, mean")):
        if any(side[name] is not None for side in sides):
            rows.append([title, *("-" if side[name] is None else f"{side[name]:.3g}" for side in sides)])
    made: list[Table] = [(f"{told['prompts']:,} prompts", ["", "A", "B"], rows)]
    if agreed := told["agreement"]:
        rows = [
            ["the same answer", percent_text(agreed["equal"])],
            ["the same but for case, spaces and punctuation", percent_text(agreed["equal_normalised"])],
        ]
        rows += [[name, f"{agreed[name]:.1f} of 100"] for name in ("BLEU", "chrF", "ROUGE-L") if name in agreed]
        made.append((f"Agreement, of {told['both']:,} prompts that both answered", ["", "B against A"], rows))
    if told["preference"]:
        made.append(preference_table(Preference(**told["preference"])))
    print_tables(made, console)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True, markup=False)


def preference_table(found: Preference) -> Table:
    """How often A is preferred."""
    rows = [
        ["A wins, ties, B wins", f"{found.wins:,}, {found.ties:,}, {found.losses:,}"],
        ["A's win rate, ties half", percent_text(found.rate)],
        ["95 % interval", f"{found.low:.1%} to {found.high:.1%}"],
        ["so uneven by chance", f"{found.chance:.3f}"],
    ]
    if found.difference is not None:
        error = "" if found.error is None else f" ± {NORMAL * found.error:.3g}"
        rows.append(["A's score - B's, 95 %", f"{found.difference:+.3g}{error}"])
    return "Preference", ["", ""], rows

"""`mohawk generate`: continue a prompt, printing words as they come. Hybrids and ordinary models alike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.errors import UserError
from mohawk.loading.describe import size_text, student_folder

if TYPE_CHECKING:
    from mohawk.generation.speculative import Told

log = logging.getLogger(__name__)

STEPS = 5  # of the model alone, by which the time without a draft is estimated
# settings of generate that change what a model alone would write
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "top_k", "min_p",
             "typical_p", "suppress_tokens", "bad_words_ids", "min_length", "min_new_tokens")  # fmt: skip


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    device: str = "auto",
    seed: int | None = None,
    tokenizer: str | Path | None = None,
    draft: str | Path | None = None,
    draft_tokens: int = 4,
) -> str:
    """Print the prompt and its continuation to stdout; returns the continuation.

    model: a folder, a run's folder, a `.gguf` file or a hub id; tokenizer: a folder or hub id, where the model has none
    of its own. temperature 0 is greedy, and `top_p` then has nothing to choose among. draft: a student of the model,
    which drafts `draft_tokens` at a time; what that saved and cost is printed on stderr. Raises UserError.
    """
    import torch
    from transformers import TextStreamer, set_seed

    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.data.tokenizers.same_tokenizer import teacher_tokenizer
    from mohawk.loading.causal import plain_model
    from mohawk.loading.models import load_teacher

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use cpu, or see `mohawk doctor`")
    name = student_folder(model)
    reader = teacher_tokenizer(name, tokenizer=tokenizer, who="", option="--tokenizer")
    # bfloat16 is what checkpoints are saved in and what few CPUs are fast at
    loaded = load_teacher(name, dtype="auto" if device == "cuda" else "float32", device=device, who="")
    if seed is not None:
        set_seed(seed)
    inputs = reader(prompt, return_tensors="pt").to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("--prompt: got an empty text, to which this tokenizer adds no first token; give some words")
    if draft is not None:
        ids = inputs["input_ids"][0].tolist()
        made = _drafted(loaded, draft, reader, ids, max_new_tokens, draft_tokens, temperature, top_p, device, seed)
        text = reader.decode(made, skip_special_tokens=True)
        assert isinstance(text, str)
        return text
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    with torch.inference_mode():
        ids = plain_model(loaded).generate(
            **inputs,
            **(sampling or {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(reader, skip_special_tokens=True),
            pad_token_id=reader.pad_token_id if reader.pad_token_id is not None else reader.eos_token_id,
        )
    text = reader.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)  # of one sequence
    return text


def _drafted(
    teacher: Any,
    draft: str | Path,
    reader: Any,
    prompt: list[int],
    max_new_tokens: int,
    drafted: int,
    temperature: float,
    top_p: float,
    device: str,
    seed: int | None,
) -> list[int]:
    """The continuation with a draft's help, printed as it comes, and what it saved and cost on stderr."""
    import torch
    from transformers import TextStreamer

    from mohawk.core.terminal import say
    from mohawk.data.tokenizers.same_tokenizer import check_same, own_tokenizer
    from mohawk.generation.speculative import Track, speculate, step_seconds
    from mohawk.loading.causal import plain_model, position_rows
    from mohawk.loading.models import load_teacher

    name = student_folder(draft)
    if (own := own_tokenizer(name, who="--draft")) is not None:
        check_same(reader, own, f"--draft: {draft}", "the model's")
    helper = load_teacher(name, dtype="auto" if device == "cuda" else "float32", device=device, who="--draft")
    models = [plain_model(teacher), plain_model(helper)]
    for who, model in zip(("", "--draft: "), models, strict=True):
        rows = position_rows(model)
        if rows is not None and len(prompt) + max_new_tokens > rows:
            raise UserError(
                f"{who}the model has {rows} positions, for {len(prompt)} tokens of the prompt and {max_new_tokens} "
                "more; lower --max-new-tokens"
            )
    settings = models[0].generation_config
    if odd := [f"{name} {value}" for name in PENALTIES if (value := getattr(settings, name, None)) not in (None, 1, 0)]:
        log.warning("--draft: the checkpoint's own %s: not in force, as a draft is judged by the model alone",
                    ", ".join(odd))  # fmt: skip
    ends = settings.eos_token_id
    tracks = [Track(model, who or "model") for who, model in zip(("model", "--draft"), models, strict=True)]
    streamer = TextStreamer(reader, skip_special_tokens=True)
    streamer.put(torch.tensor(prompt))
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    told = speculate(
        tracks[0], tracks[1], prompt, max_new_tokens=max_new_tokens, ends=ends if isinstance(ends, list) else [ends],
        drafted=drafted, temperature=temperature, top_p=top_p, generator=generator,
        write=lambda tokens: streamer.put(torch.tensor(tokens)),
    )  # fmt: skip
    streamer.end()
    say(saved_and_cost(told, step_seconds(tracks[0], STEPS), [track.copied for track in tracks], helper))
    return told.tokens


def saved_and_cost(told: Told, alone: float, copied: list[int], helper: Any) -> str:
    """What a draft saved and cost, in lines. alone: seconds of a step of the model; copied: bytes of a copy of the
    states, of both."""
    count, spent = len(told.tokens), told.seconds
    seconds = sum(spent.values())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in helper.parameters())
    share = told.accepted / told.drafted if told.drafted else 0.0
    return (
        f"saved: {count} tokens in {told.rounds} passes of the model, {count / told.rounds:.2f} a pass; "
        f"{told.accepted} of {told.drafted} drafted tokens passed ({share:.0%})\n"
        f"cost: {size_text(weights)} of weights, {size_text(sum(copied))} for a copy of states; "
        f"{told.read_again} tokens read again after going back\n"
        f"time: {seconds:.2f} s: the draft {spent['draft']:.2f}, the model {spent['teacher']:.2f}, going back "
        f"{spent['back']:.2f}; alone, {count} steps at {1000 * alone:.1f} ms (median of {STEPS}) would take about "
        f"{count * alone:.2f} s"
    )

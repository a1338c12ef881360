"""`mohawk generate`: continue a prompt, printing words as they come. Hybrids and ordinary models alike."""

from __future__ import annotations

from pathlib import Path

from mohawk.errors import UserError
from mohawk.loading.describe import student_folder


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
) -> str:
    """Print the prompt and its continuation to stdout; returns the continuation.

    model: a folder, a run's folder, a `.gguf` file or a hub id; tokenizer: a folder or hub id, where the model has none
    of its own. temperature 0 is greedy, and `top_p` then has nothing to choose among. Raises UserError.
    """
    import torch
    from transformers import TextStreamer, set_seed

    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.data.same_tokenizer import teacher_tokenizer
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

"""The export doctor of GGUF files: each tensor beside what was to be written, and llama.cpp where it is installed.

The first finds a damaged file, not a wrong layout: names and layouts are held to gguf's tables in
tests/mohawk/export/test_gguf.py.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mohawk.errors import UserError
from mohawk.export.parity import TEXT, Row, in_fresh_process, inputs_for, print_parity, same_tokens

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from mohawk.models.hybrid import HybridForCausalLM

log = logging.getLogger(__name__)

TITLE = "The file, read back, against the student"
RUN = "llama.cpp"  # rows of what it answered begin so
# Of the largest logit. llama.cpp sums in another order and has an exp of its own: at most 2e-5 off with tiny students,
# 3.5e-5 with SmolLM2's 30 layers and 512 tokens.
WITHIN = 2e-4


def check_gguf(
    folder: Path, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase | None, console: Console
) -> list[Row]:
    """Rows for the file in a folder, printed: its weights, and llama.cpp's answers where llama-cpp-python is installed.

    In float32 the answers have to be the student's; with other weights it is only told how far they are.
    """
    (path,) = folder.glob("*.gguf")
    rows = read_back(path, model)
    if has_llama_cpp():
        rows += answered(path, model, tokenizer, exact=not any(row.tolerance for row in rows))
    print_parity(rows, console, TITLE)
    return rows


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed, and not only a folder of its name there."""
    spec = find_spec("llama_cpp")
    return spec is not None and spec.origin is not None


def read_back(path: Path, model: HybridForCausalLM) -> list[Row]:
    """A row for each type of weights: the largest error, as a share of what rounding to the type may make at most.

    Raises UserError for a file that lacks a tensor, or has one more.
    """
    import gguf
    import numpy as np

    from mohawk.models.formats.gguf import gguf_weights

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst, count = defaultdict(float), defaultdict(int)
    for name, weight in gguf_weights(model):
        if (tensor := stored.pop(name, None)) is None:
            raise UserError(f"export: {path.name} was read back without {name}; check the disk, and export again")
        kind = tensor.tensor_type.name.lower()
        value, expected = gguf.dequantize(tensor.data, tensor.tensor_type), weight.cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.abs(value - expected.astype(np.float64)) / rounding(kind, expected)
        worst[kind] = np.maximum(worst[kind], np.where(value == expected, 0.0, share).max(initial=0.0))  # keeps a NaN
        count[kind] += 1
    if stored:
        raise UserError(f"export: {path.name} was read back with {next(iter(stored))}, which the student does not have")
    return [
        Row(f"{n} tensors in {kind}" + ("" if kind == "f32" else ", share of its rounding"), float(worst[kind]),
            float(kind != "f32"), "") for kind, n in count.items()
    ]  # fmt: skip


def rounding(kind: str, weight: np.ndarray) -> np.ndarray | float:
    """By how much storing a weight in a type may change it: half of the type's step there."""
    import numpy as np

    if kind == "q8_0":  # 127 steps to the largest of 32; the step itself is rounded to float16
        step = np.abs(weight.astype(np.float64)).reshape(-1, 32).max(1) / 127
        return np.repeat(step / 2 + 127 * np.maximum(step * 2.0**-11, 2.0**-25), 32).reshape(weight.shape)
    if kind == "q4_0":  # 16 steps of an eighth of the largest of 32, whose negative is cut by one; the step is rounded
        step = np.abs(weight.astype(np.float64)).reshape(-1, 32).max(1) / 8
        return np.repeat(step + 8 * np.maximum(step * 2.0**-11, 2.0**-25), 32).reshape(weight.shape)
    if kind == "bf16":  # 8 bits of precision, and the exponents of float32
        return np.ldexp(0.5, np.maximum(np.frexp(weight)[1], -125) - 8)
    return 0.0


def answered(
    path: Path, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase | None, *, exact: bool
) -> list[Row]:
    """llama.cpp's answers beside the student's own in float32: whole, step by step, greedily, and to text.

    exact: the file has the student's weights; where not, nothing is demanded of the answers. No rows where it does not
    load the file, which older ones may not; that is warned of.
    """
    import torch
    from safetensors.torch import load_file, save_file

    inputs = inputs_for(model.config, tokenizer)
    asked = {"long": inputs["long"][0], "steps": inputs["batch"][0], "prefill": inputs["prefill"], "new": inputs["new"]}
    with tempfile.TemporaryDirectory(prefix="mohawk-export-") as scratch:
        place = Path(scratch)
        save_file({key: value.contiguous() for key, value in asked.items()}, place / "inputs.safetensors")
        source = (Path(__file__).parent / "llama_cpp_probe.py").read_text(encoding="utf-8")
        text = TEXT if tokenizer is not None else ""
        arguments = [str(path.resolve()), "inputs.safetensors", "answers.safetensors", text]
        # a failed assertion of its would end this process
        done = in_fresh_process(source, arguments, place, {"GGML_NO_BACKTRACE": "1"})
        if done.returncode:
            log.debug("llama.cpp said:\n%s", done.stderr)
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            log.warning("the installed llama-cpp-python does not run the file, so it is not checked there: %s", last[0])
            return []
        found = load_file(place / "answers.safetensors")
    new, steps = int(asked["new"]), asked["steps"][None]
    cast("Module", model).to(torch.float32)
    with torch.inference_mode():
        # not by `generate`, which to go on for so long would pass over tokens that end a text
        tokens, chosen = steps, []
        for _ in range(new):
            chosen.append(model(input_ids=tokens, use_cache=False).logits[:, -1])
            tokens = torch.cat([tokens, chosen[-1].argmax(-1, keepdim=True)], 1)
        expected = {
            "full": model(input_ids=asked["long"][None], use_cache=False).logits[0],
            "steps": model(input_ids=steps, use_cache=False).logits[0],
            "tokens": tokens[:, steps.shape[1] :],
            "tokens_logits": torch.stack(chosen, 1),
        }
    rows = compared(expected, found, exact)
    if tokenizer is not None:
        ids = tokenizer(TEXT)["input_ids"]
        same = "all" if found["text"].tolist() == ids else "no, the text is cut into others"
        rows.append(Row(f"{RUN}: text", 0.0, 0.0, same))
    return rows


def compared(expected: dict[str, Tensor], found: dict[str, Tensor], exact: bool) -> list[Row]:
    """Rows of answers. exact: they have to be the same, up to float32 rounding."""
    tolerance = WITHIN * float(expected["full"].abs().max()) if exact else float("inf")
    rows = []
    for key, name in (("full", "full forward"), ("steps", "prefill and steps")):
        share = (expected[key].argmax(-1) == found[key].argmax(-1)).float().mean().item()
        rows.append(Row(f"{RUN}: {name}", float((expected[key] - found[key]).abs().amax()), tolerance, f"{share:.1%}"))
    same, steps = same_tokens(expected, found, "tokens", tolerance)
    if not exact and same != "all":
        same = f"the first {steps - 1}"
    difference = (expected["tokens_logits"] - found["tokens_logits"])[:, :steps].abs().amax()
    rows.append(Row(f"{RUN}: greedy tokens", float(difference), tolerance, same))
    return rows

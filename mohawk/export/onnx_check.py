"""The export doctor of ONNX graphs: onnxruntime, in a process without torch, against the student itself."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.errors import UserError
from mohawk.export.parity import Row, answers, compare_answers, in_fresh_process, inputs_for, print_parity

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TITLE = "The graphs in onnxruntime, in a fresh process without torch, against the student"


def check_onnx(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None, console: Console) -> list[Row]:
    """Rows for the graphs in a folder, printed: as of `mohawk.export.parity.check_export`, but for saving again.

    Raises:
        UserError: onnxruntime does not run the graphs, or as `in_fresh_process`.
    """
    from safetensors.torch import load_file, save_file

    inputs = inputs_for(model.config, tokenizer)
    expected = answers(model.float(), inputs)
    with tempfile.TemporaryDirectory(prefix="mohawk-export-") as scratch:
        place = Path(scratch)
        save_file({key: value.contiguous() for key, value in inputs.items()}, place / "inputs.safetensors")
        source = (Path(__file__).parent / "onnx_probe.py").read_text(encoding="utf-8")
        arguments = [str(folder.resolve()), "inputs.safetensors", "answers.safetensors"]
        done = in_fresh_process(source, arguments, place, {})
        if done.returncode:
            log.info("onnxruntime said:\n%s", done.stderr)
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"export: onnxruntime does not run the written graphs: {last[0]}")
        found = load_file(place / "answers.safetensors")
    rows = compare_answers(inputs, expected, found, without=("reloaded",))
    print_parity(rows, console, TITLE)
    return rows

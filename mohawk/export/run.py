"""`mohawk export`: a student as a folder that runs where this package is not installed, proven before it is kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from mohawk.core.folders import made_of, write_whole
from mohawk.core.places import home
from mohawk.core.run_folder import has_recipe
from mohawk.errors import UserError
from mohawk.export.targets import TARGETS, Asked, Target, runtimes
from mohawk.loading.describe import student_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.export.parity import Row
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig

log = logging.getLogger(__name__)


def export(
    source: str | Path,
    to: str = "bamba",
    output: str | Path | None = None,
    *,
    pad_expand: bool = False,
    fold_bias: bool = False,
    outtype: str | None = None,
    console: Console | None = None,
) -> Path:
    """Write a student as a stock class of transformers, with its own code or for llama.cpp, and check what was written.

    The folder appears whole, and only after a fresh process that cannot import mohawk has loaded it and answered as
    the student does (`mohawk.export.parity`); a GGUF file after every tensor was read back, and, where llama-cpp-python
    is installed, after llama.cpp has answered (`mohawk.export.gguf_check`); ONNX graphs after onnxruntime has, in a
    process that has neither mohawk nor torch (`mohawk.export.onnx_check`).

    Args:
        source: a run's folder, or a student's.
        to: one of `TARGETS` in targets.py: "bamba", "granite" or "qwen3_5", which need no code, "gguf", "onnx", which
            takes students without mixers too, or "hybrid", whose code lies beside the weights (`trust_remote_code`).
            `mohawk.export.listing` says which a student can be.
        output: the folder to write; by default `export/<to>` in the run, or `<student>-<to>` beside the student, for
            gguf with the outtype behind it.
        pad_expand: add heads of zeros up to mamba_expand 2 (llama.cpp), or where whole heads do not fill an integer.
        fold_bias: move in_proj's biases on x, B, C behind the convolution, where a student has some.
        outtype: of the matrices in a GGUF file: "f32" (the default), "bf16", "q8_0" or "q4_0".

    Returns:
        The folder.

    Raises:
        UserError: not a hybrid where it has to be one, not expressible (with the reason), a tokenizer that llama.cpp
            does not have, the output taken, or a mismatch.
    """
    from mohawk.loading.models import load_teacher

    console = console or Console()
    if to not in TARGETS:
        raise UserError(f"--to: got {to!r}; allowed: {', '.join(TARGETS)}")
    written_as = TARGETS[to]
    if not written_as.adapts and (pad_expand or fold_bias):
        of = " and ".join(f"--to {name}" for name, target in TARGETS.items() if target.adapts)
        raise UserError(f"--pad-expand and --fold-bias are of {of}; {to} needs neither")
    if outtype is not None and outtype not in written_as.outtypes:
        of = " and ".join(f"--to {name}" for name, target in TARGETS.items() if outtype in target.outtypes)
        raise UserError(f"--outtype: got {outtype!r} with --to {to}; " + (f"it is of {of}" if of else "no --to has it"))
    outtype = outtype or next(iter(written_as.outtypes), None)
    run = home(source)
    run = run if has_recipe(run) else None
    student, config = student_config(source) if written_as.plain else hybrid_config(source)
    if reason := written_as.why_not(config, pad_expand):
        raise UserError(reason)
    kind = f"{to}-{outtype}" if outtype else to
    target = home(output) if output else (run / "export" / kind if run else Path(f"{student}-{kind}"))
    if target.is_dir() and any(target.iterdir()) and not (target / "README.md").is_file():
        raise UserError(f"{target} exists and no export wrote it; choose another --output")

    tokenizer = _tokenizer(student, run)
    if tokenizer is not None and (reason := written_as.why_not_tokenizer(tokenizer, config)):
        raise UserError(reason)
    model = cast("HybridForCausalLM", load_teacher(student, dtype="auto", who=""))
    changes = written_as.prepare(model, pad_expand, fold_bias)
    asked = Asked(pad_expand, fold_bias, outtype, _about(run, student, config))
    with write_whole(target, about=made_of(student)) as folder:
        rows = _write_and_check(folder, model, tokenizer, written_as, asked, console)
        from transformers import AutoConfig

        from mohawk.export.model_card import model_card
        from mohawk.models.formats.onnx import GRAPH

        file = next((path.name for path in folder.iterdir() if path.suffix == ".gguf" or path.name == GRAPH), None)
        written = config if file else AutoConfig.from_pretrained(folder, trust_remote_code=False)
        ran = {row.check.partition(":")[0] for row in rows}
        known = runtimes(written_as, written, config, tokenizer)
        notes = [replace(note, checked=note.checked or note.runtime in ran) for note in known]
        mixers = getattr(config, "mixer_kinds", [])
        card = model_card(target.resolve().name, written, mixers, run, rows, notes, changes, file)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for change in changes:
        console.print(change, highlight=False, soft_wrap=True, markup=False)
    for note in notes:
        seen = "checked" if note.checked else "not checked"
        console.print(f"{note.runtime} ({seen}): {note.text}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True, markup=False)
    return target


def hybrid_config(source: str | Path) -> tuple[str, HybridConfig]:
    """As `student_config`, of a hybrid. Raises UserError for others too."""
    from mohawk.models.hybrid_config import HybridConfig

    student, config = student_config(source)
    if not isinstance(config, HybridConfig):
        raise UserError(
            f"{student} is a {config.model_type} model; only hybrids made by mohawk are exported so. A model of "
            "transformers runs as it is, or as `--to onnx`"
        )
    return student, config


def student_config(source: str | Path) -> tuple[str, Any]:
    """Where the student of a run's or a student's folder lies, and its configuration: a hybrid's, or that of a class of
    transformers.

    Raises:
        UserError: no such folder, or no causal language model in it.
    """
    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.loading.configs import load_config

    student = student_folder(source)
    return student, load_config(student, who="")


def has_tokenizer(student: str) -> bool:
    """Whether a tokenizer lies in a student's folder."""
    return any((Path(student) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _tokenizer(student: str, run: Path | None) -> PreTrainedTokenizerBase | None:
    """The student's, else its teacher's."""
    from mohawk.loading.models import load_tokenizer
    from mohawk.schema.kinds import load_run_recipe

    if has_tokenizer(student):
        return load_tokenizer(student, who="")
    if run is not None:
        teacher = load_run_recipe(run).teacher
        return load_tokenizer(teacher.model, tokenizer=teacher.tokenizer, **teacher.where)
    log.warning("%s holds no tokenizer, so the exported folder has none either", student)
    return None


def _about(run: Path | None, student: str, config: Any) -> dict[str, str]:
    """What a single file says of the model, as nothing lies beside it once it is copied: its name and its licence."""
    from mohawk.export.model_card import teacher_of

    _, licence = teacher_of(config, run)
    return {"general.name": (run or Path(student)).resolve().name} | ({"general.license": licence} if licence else {})


def _write_and_check(folder: Path, model, tokenizer, target: Target, asked: Asked, console: Console) -> list[Row]:
    """Fills the folder and compares; returns the rows of the parity table. Raises UserError on a mismatch."""
    from mohawk.export.parity import require_parity

    target.write(model, tokenizer, folder, asked)
    rows = target.check(folder, model, tokenizer, console)
    require_parity(rows)
    return rows

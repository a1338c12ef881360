"""`mohawk export`: a student as a folder that runs where this package is not installed, proven before it is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console

from mohawk.core.folders import write_whole
from mohawk.core.places import home
from mohawk.core.run_folder import has_recipe
from mohawk.errors import UserError
from mohawk.export.targets import TARGETS, Target
from mohawk.loading.describe import student_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    console: Console | None = None,
) -> Path:
    """Write a student as a stock class of transformers or with its own code, and check what was written.

    The folder appears whole, and only after a fresh process that cannot import mohawk has loaded it and answered as
    the student does (`mohawk.export.parity`).

    Args:
        source: a run's folder, or a student's.
        to: one of `TARGETS` in targets.py: "bamba", "granite" or "qwen3_5", which need no code, or "hybrid", whose code
            lies beside the weights (`trust_remote_code`). `mohawk.export.listing` says which a student can be.
        output: the folder to write; by default `export/<to>` in the run, or `<student>-<to>` beside the student.
        pad_expand: add heads of zeros up to mamba_expand 2 (llama.cpp), or where whole heads do not fill an integer.
        fold_bias: move in_proj's biases on x, B, C behind the convolution, where a student has some.

    Returns:
        The folder.

    Raises:
        UserError: not a hybrid, not expressible (with the reason), the output taken, or a mismatch.
    """
    from mohawk.loading.models import load_teacher

    console = console or Console()
    if to not in TARGETS:
        raise UserError(f"--to: got {to!r}; allowed: {', '.join(TARGETS)}")
    written_as = TARGETS[to]
    if not written_as.adapts and (pad_expand or fold_bias):
        of = " and ".join(f"--to {name}" for name, target in TARGETS.items() if target.adapts)
        raise UserError(f"--pad-expand and --fold-bias are of {of}; {to} needs neither")
    run = home(source)
    run = run if has_recipe(run) else None
    student, config = hybrid_config(source)
    if reason := written_as.why_not(config, pad_expand):
        raise UserError(reason)
    target = home(output) if output else (run / "export" / to if run else Path(f"{student}-{to}"))
    if target.is_dir() and any(target.iterdir()) and not (target / "README.md").is_file():
        raise UserError(f"{target} exists and no export wrote it; choose another --output")

    model = cast("HybridForCausalLM", load_teacher(student, dtype="auto", who=""))
    changes = written_as.prepare(model, pad_expand, fold_bias)
    tokenizer = _tokenizer(student, run)
    with write_whole(target) as folder:
        rows = _write_and_check(folder, model, tokenizer, written_as, pad_expand, console)
        from transformers import AutoConfig

        from mohawk.export.model_card import model_card

        written = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        runtimes = written_as.notes(written)
        card = model_card(target.resolve().name, written, run, rows, runtimes, changes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for change in changes:
        console.print(change, highlight=False, soft_wrap=True, markup=False)
    for note in runtimes:
        seen = "checked" if note.checked else "not checked"
        console.print(f"{note.runtime} ({seen}): {note.text}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True, markup=False)
    return target


def hybrid_config(source: str | Path) -> tuple[str, HybridConfig]:
    """Where the student of a run's or a student's folder lies, and its configuration.

    Raises:
        UserError: not a hybrid, or no such folder.
    """
    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.loading.configs import load_config
    from mohawk.models.hybrid_config import HybridConfig

    student = student_folder(source)
    config = load_config(student, who="")
    if not isinstance(config, HybridConfig):
        raise UserError(f"{student} is a {config.model_type} model; only hybrids made by mohawk are exported")
    return student, config


def _tokenizer(student: str, run: Path | None) -> PreTrainedTokenizerBase | None:
    """The student's, else its teacher's."""
    from mohawk.loading.models import load_tokenizer
    from mohawk.schema.kinds import load_run_recipe

    if any((Path(student) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return load_tokenizer(student, who="")
    if run is not None:
        teacher = load_run_recipe(run).teacher
        return load_tokenizer(teacher.model, tokenizer=teacher.tokenizer, **teacher.where)
    log.warning("%s holds no tokenizer, so the exported folder has none either", student)
    return None


def _write_and_check(folder: Path, model, tokenizer, target: Target, pad_expand: bool, console: Console):
    """Fills the folder and compares; returns the rows of the parity table. Raises UserError on a mismatch."""
    import torch

    from mohawk.export.parity import answers, check_export, inputs_for, print_parity, require_parity

    target.write(model, folder, pad_expand)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    inputs = inputs_for(model.config, tokenizer)
    expected = answers(model.to(torch.float32), inputs)
    rows = check_export(folder, inputs, expected, trust_remote_code=target.with_code)
    print_parity(rows, console)
    require_parity(rows)
    return rows

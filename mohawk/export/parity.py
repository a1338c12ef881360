"""The export doctor: an exported folder, loaded in a fresh process without this package, against the student itself."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.errors import MACHINE, UserError, machines_own
from mohawk.measures import consistency
from mohawk.measures.consistency import PATHS, TOKENS

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Float32 rounding, summed in another order, stays well below this share of the largest logit (SmolLM2's 30 layers:
# 3e-6); a forgotten bias, another epsilon or a shifted position is far above it.
TOLERANCE = 5e-5
LONG = 300  # tokens of the full forward: over the edge of a chunk of the scan, 64 here and 256 in Bamba
BATCH, PREFILL, NEW = TOKENS, 16, 16
PADDING = 9  # on the left of the batch's second row
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure."
)
TITLE = "The export, in a fresh process without mohawk, against the student"
VERSIONS = "`mohawk doctor` says whether the installed transformers is one that mohawk was tested with"
CHECKS = {
    "full": "full forward",
    "steps": "prefill and steps",
    "padded": "left-padded batch",
    "tokens": "greedy tokens",
    "padded_tokens": "greedy, left-padded",
    "reloaded": "saved and reloaded",
}


@dataclass(frozen=True)
class Row:
    """One comparison: largest absolute difference of logits, what is allowed, and whether the tokens are the same."""

    check: str
    difference: float
    tolerance: float
    same: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance and not self.same.startswith("no")


def inputs_for(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
    """What `parity_probe.probe` is asked: English where there is a tokenizer, random tokens where there is none."""
    import torch

    ids = torch.randint(config.vocab_size, (LONG,), generator=torch.Generator().manual_seed(0))
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        ids = ids.repeat(-(-LONG // len(ids)))[:LONG]
    mask = torch.ones(2, BATCH, dtype=torch.long)
    mask[1, :PADDING] = 0
    return {
        "long": ids[None, : config.max_position_embeddings],  # beyond, a window or a rotary scaling may begin to matter
        "batch": ids[: 2 * BATCH].view(2, BATCH).clone(),
        "mask": mask,
        "prefill": torch.tensor(PREFILL),
        "new": torch.tensor(NEW),
    }


def answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's own answers, in float32 on the CPU: what the export is held against.

    Raises UserError when the student does not agree with itself: an export that shares its fault would agree with it.
    """
    from mohawk.export.parity_probe import probe

    found = probe(model.eval(), inputs, consistency)
    if broken := consistency.broken_paths(model, _shares(found)):
        raise UserError(f"export: the student does not answer as its own full forward does: {broken}; {VERSIONS}")
    return found


def check_export(
    folder: Path, inputs: dict[str, Tensor], expected: dict[str, Tensor], *, trust_remote_code: bool = False
) -> list[Row]:
    """Load `folder` in a fresh process where `mohawk` cannot be imported, ask it the same, and compare.

    Returns a row for each of CHECKS and, the export against its own full forward, for each of the consistency PATHS
    that its class can keep. Raises UserError when the folder does not load there; else as `in_fresh_process`.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="mohawk-export-") as scratch:
        place = Path(scratch)
        save_file(inputs, place / "inputs.safetensors")
        source = (Path(__file__).parent / "parity_probe.py").read_text(encoding="utf-8")
        shutil.copy(consistency.__file__, place)
        arguments = (folder.resolve(), "inputs.safetensors", "answers.safetensors", "saved")
        trust = "trust" if trust_remote_code else "no"
        # nothing from a hub, no modules left in the user's cache, and a working directory without packages
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
        done = in_fresh_process(source, [*map(str, arguments), trust], place, offline)
        if done.returncode:
            log.info("the fresh process said:\n%s", done.stderr)
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"export: the written folder does not load where mohawk is absent: {last[0]}")
        found = load_file(place / "answers.safetensors")
    return compare_answers(inputs, expected, found)


def in_fresh_process(
    source: str, arguments: Sequence[str], place: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in the folder `place`, with more environment variables.

    Raises:
        UserError: something killed it.
        MemoryError, OSError: it ended for too little memory or a file that the machine refused, which says nothing of
            what it was asked.
    """
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    if done.returncode == -signal.SIGKILL:
        raise UserError(
            "export: the fresh process that tries what was written was killed, as the kernel does where memory runs "
            "out; nothing was kept; free memory, then run the same command"
        )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode and (last.startswith("MemoryError") or machines_own(RuntimeError(last))):
        raise MemoryError(last)
    if done.returncode and (found := re.search(r"\[Errno (\d+)\] [^:]*(?:: '(.*)')?", last)):
        if (number := int(found[1])) in MACHINE:
            raise OSError(number, os.strerror(number), found[2])
    return done


def _shares(found: dict[str, Tensor]) -> dict[str, float]:
    """Path -> how far a model is from its own full forward by it."""
    return {path: float(found[f"itself_{path}"]) for path in PATHS if f"itself_{path}" in found}


def compare_answers(
    inputs: dict[str, Tensor], expected: dict[str, Tensor], found: dict[str, Tensor], without: Sequence[str] = ()
) -> list[Row]:
    """One row for each of CHECKS but those `without`, and one of the export against itself for each of PATHS that it
    was asked."""
    tolerance = TOLERANCE * float(expected["full"].abs().max())
    real = inputs["mask"].bool()  # what a model puts out at padded positions means nothing
    rows = []
    for key, name in CHECKS.items():
        if key in without:
            continue
        if key.endswith("tokens"):
            same, steps = same_tokens(expected, found, key, tolerance)
            ours, theirs = expected[f"{key}_logits"][:, :steps], found[f"{key}_logits"][:, :steps]
        else:
            ours, theirs = expected["full" if key == "reloaded" else key], found[key]
            if key == "padded":
                ours, theirs = ours[real], theirs[real]
            same = _agreement(ours, theirs)
            if key == "reloaded" and not found["same_weights"]:
                same = "no, weights changed"
        # amax of a difference with a NaN in it is NaN, and fails, as it should
        rows.append(Row(name, float((ours - theirs).abs().amax()), tolerance, same))
    largest = float(expected["full"].abs().max())
    rows += [Row(f"itself, {PATHS[path]}", share * largest, tolerance, "") for path, share in _shares(found).items()]
    return rows


def _agreement(ours: Tensor, theirs: Tensor) -> str:
    """How often the top token is the same; information, since the logits are what is compared."""
    share = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return f"{share:.1%}"


def same_tokens(expected, found, key: str, tolerance: float) -> tuple[str, int]:
    """Whether generation agrees, and on how many steps logits can be compared.

    Where the student's own best two are closer than rounding the choice is a toss-up, and so is what follows it.
    """
    differs = (expected[key] != found[key]).any(0)
    if not differs.any():
        return "all", expected[key].shape[1]
    step = int(differs.long().argmax())
    best = expected[f"{key}_logits"][:, step].topk(2).values
    rows = expected[key][:, step] != found[key][:, step]
    if bool(((best[:, 0] - best[:, 1])[rows] <= 2 * tolerance).all()):
        return f"up to a tie at token {step}", step + 1
    return f"no, from token {step}", step + 1


def print_parity(rows: list[Row], console: Console, title: str = TITLE) -> None:
    """The parity table."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(("check", "max |difference|", "allowed", "same tokens", "")):
        table.add_column(column, justify="right" if 0 < i < 4 else "left")
    for row in rows:
        verdict = "[green]ok[/green]" if row.passed else "[red]differs[/red]"
        table.add_row(row.check, f"{row.difference:.1e}", f"{row.tolerance:.1e}", row.same, verdict)
    console.print(table)


def require_parity(rows: list[Row]) -> None:
    """Raises UserError, naming what differs, unless every row passed."""
    if failed := [row for row in rows if not row.passed]:
        details = "; ".join(
            f"{row.check}: {row.difference:.1e} over {row.tolerance:.1e} allowed"
            + (f", same tokens: {row.same}" if row.same else "")
            for row in failed
        )
        raise UserError(
            "export: the written folder does not answer as the student, or as its own full forward, does; nothing was "
            f"kept ({details}); {VERSIONS}"
        )

"""What a student can be exported as. An entry of `TARGETS` is all that another one needs: the command line, the export
and its model card read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.errors import UserError
from mohawk.export.runtimes import Note, notes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig

FOLDED = (
    "The biases of in_proj on x, B and C were moved behind the convolution (--fold-bias): nearly the trained student, "
    "which answers otherwise in the first {kept} tokens of a text and a little in what follows from them"
)
PADDED = "Mixers padded with heads of zeros to mamba_expand {expand} (--pad-expand): the same function"


@dataclass(frozen=True)
class Target:
    """One class of models that a student can be written as.

    Args:
        text: what it is, for `--to`.
        write: (model, folder, pad_expand): the student, as transformers' Auto classes load it from there.
        with_code: the model's code lies there too (`trust_remote_code`).
        why_not: (config, pad_expand) -> the whole line for a student that can't be written so; None if it can.
        adapts: whether `--pad-expand` and `--fold-bias` mean something.
        prepare: (model, pad_expand, fold_bias) -> what there is to say about the changes that it made in place.
        notes: where what was written runs, from its configuration.
    """

    text: str
    write: Callable[[HybridForCausalLM, Path, bool], None]
    with_code: bool = False
    why_not: Callable[[HybridConfig, bool], str | None] = lambda config, pad_expand: None
    adapts: bool = False
    prepare: Callable[[HybridForCausalLM, bool, bool], list[str]] = lambda model, pad_expand, fold_bias: []
    notes: Callable[[PreTrainedConfig], list[Note]] = notes


def _why_not_bamba(config: HybridConfig, pad_expand: bool) -> str | None:
    from mohawk.models.formats.bamba import why_not_bamba

    reason = why_not_bamba(config, pad_expand=pad_expand)
    return reason and f"cannot be a BambaForCausalLM: {reason}; `--to hybrid` writes the student with its own code"


def _adapt_to_bamba(model: HybridForCausalLM, pad_expand: bool, fold_bias: bool) -> list[str]:
    """Changes the student as asked, in place; returns what there is to say about it."""
    from mohawk.models.formats.bamba import fold_conv_input_bias, has_conv_input_bias, padded_expand

    changes = []
    if has_conv_input_bias(model):
        if not fold_bias:
            raise UserError(
                "cannot be a BambaForCausalLM: in_proj has biases on x, B and C, which transformers' Bamba lets "
                "through the padding of a batch into the convolution; --fold-bias moves them behind it (nearly the "
                f"same function: the first {model.config.mixer_conv_kernel - 1} tokens of a text differ), or `--to "
                "hybrid`"
            )
        fold_conv_input_bias(model)
        changes.append(FOLDED.format(kept=model.config.mixer_conv_kernel - 1))
    if pad_expand:
        changes.append(PADDED.format(expand=padded_expand(model.config)))
    return changes


def _write_bamba(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.models.formats.bamba import to_bamba

    to_bamba(model, pad_expand=pad_expand).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # the default, (0, infinity), is no number in JSON: each release writes it in another way, and other readers
    # fail on it; without it they all take the default
    config.pop("time_step_limit", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_hybrid(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.loading.remote_code import add_code

    model.save_pretrained(folder)
    add_code(folder, model)


TARGETS = {
    "bamba": Target(
        "transformers' own class (default)", _write_bamba, why_not=_why_not_bamba, adapts=True, prepare=_adapt_to_bamba
    ),
    "hybrid": Target("ours, its code beside the weights", _write_hybrid, with_code=True),
}

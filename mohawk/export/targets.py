"""What a student can be exported as. An entry of `TARGETS` is all that another one needs: the command line, the export
and its model card read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.errors import UserError
from mohawk.export.config_styles import both_ropes, float32, no_infinity, older_kinds, restyle
from mohawk.export.runtimes import Note, notes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig

FOLDED = (
    "The biases of in_proj on x, B and C were moved behind the convolution (--fold-bias): nearly the trained student, "
    "which answers otherwise in the first {kept} tokens of a text and a little in what follows from them"
)
INSTEAD = "; `--to hybrid` writes the student with its own code"
PADDED = "Mixers padded with heads of zeros to mamba_expand {expand} (--pad-expand): the same function"
WIDE = (
    "{count} norms ({first}, ...) are kept in float32, and config.json says float32: Qwen3.5 stores their weights as "
    "w - 1, and loading them in {dtype} changes a weight by up to {lost:.1%} of it"
)


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
        configuration: (config, pad_expand) -> what would be written's, for a student that can be written so.
        notes: where what was written runs, from its configuration.
    """

    text: str
    write: Callable[[HybridForCausalLM, Path, bool], None]
    with_code: bool = False
    why_not: Callable[[HybridConfig, bool], str | None] = lambda config, pad_expand: None
    adapts: bool = False
    prepare: Callable[[HybridForCausalLM, bool, bool], list[str]] = lambda model, pad_expand, fold_bias: []
    configuration: Callable[[HybridConfig, bool], PreTrainedConfig] = lambda config, pad_expand: config
    notes: Callable[[PreTrainedConfig], list[Note]] = notes


def _not_stock(class_name: str, mixer: str, reason: str | None, config: HybridConfig) -> str | None:
    """The whole line for a student that cannot be of a stock class with these mixers; for one with others it names the
    class that has them."""
    if reason is None:
        return None
    other = {"mamba2": "bamba", "gated_delta": "qwen3_5"}.get(config.mixer_words)
    takes = config.mixer != mixer and other and TARGETS[other].why_not(config, False) is None
    return f"cannot be a {class_name}: {reason}" + (f"; `--to {other}` takes it" if takes else INSTEAD)


def _why_not_bamba(config: HybridConfig, pad_expand: bool) -> str | None:
    from mohawk.models.formats.bamba import why_not_bamba

    return _not_stock("BambaForCausalLM", "mamba2", why_not_bamba(config, pad_expand=pad_expand), config)


def _why_not_granite(config: HybridConfig, pad_expand: bool) -> str | None:
    from mohawk.models.formats.granite import why_not_granite

    return _not_stock("GraniteMoeHybridForCausalLM", "mamba2", why_not_granite(config, pad_expand=pad_expand), config)


def _why_not_qwen3_5(config: HybridConfig, pad_expand: bool) -> str | None:
    from mohawk.models.formats.qwen3_5 import why_not_qwen3_5

    return _not_stock("Qwen3_5ForCausalLM", "gated_delta", why_not_qwen3_5(config), config)


def conv_input_bias(config: HybridConfig, class_name: str, name: str) -> str:
    """The whole line for a student with biases on x, B and C, which --fold-bias moves."""
    return (
        f"cannot be a {class_name}: in_proj has biases on x, B and C, which transformers' {name} lets "
        "through the padding of a batch into the convolution; --fold-bias moves them behind it (nearly the "
        f"same function: the first {config.mixer_conv_kernel - 1} tokens of a text differ), or `--to "
        "hybrid`"
    )


def _adapt(model: HybridForCausalLM, pad_expand: bool, fold_bias: bool, *, class_name: str, name: str) -> list[str]:
    """Changes the student as asked, in place; returns what there is to say about it."""
    from mohawk.models.formats.bamba import fold_conv_input_bias, has_conv_input_bias, padded_expand

    changes = []
    if has_conv_input_bias(model):
        if not fold_bias:
            raise UserError(conv_input_bias(model.config, class_name, name))
        fold_conv_input_bias(model)
        changes.append(FOLDED.format(kept=model.config.mixer_conv_kernel - 1))
    if pad_expand:
        changes.append(PADDED.format(expand=padded_expand(model.config)))
    return changes


def _tell_wide_norms(model: HybridForCausalLM, pad_expand: bool, fold_bias: bool) -> list[str]:
    from mohawk.models.formats.qwen3_5 import wide_norms

    if not (found := wide_norms(model)):
        return []
    dtype = str(model.dtype).removeprefix("torch.")
    return [WIDE.format(count=len(found), first=next(iter(found)), dtype=dtype, lost=max(found.values()))]


def _write_bamba(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.models.formats.bamba import to_bamba

    to_bamba(model, pad_expand=pad_expand).save_pretrained(folder)
    restyle(folder, no_infinity, both_ropes)


def _write_granite(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.models.formats.granite import to_granite

    to_granite(model, pad_expand=pad_expand).save_pretrained(folder)
    restyle(folder, no_infinity, both_ropes, older_kinds)


def _write_qwen3_5(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.models.formats.qwen3_5 import to_qwen3_5, wide_norms

    to_qwen3_5(model).save_pretrained(folder)
    restyle(folder, both_ropes, *([float32] if wide_norms(model) else []))


def _write_hybrid(model: HybridForCausalLM, folder: Path, pad_expand: bool) -> None:
    from mohawk.loading.remote_code import add_code

    model.save_pretrained(folder)
    add_code(folder, model)


def _bamba_config(config: HybridConfig, pad_expand: bool) -> PreTrainedConfig:
    from mohawk.models.formats.bamba import bamba_config

    return bamba_config(config, pad_expand=pad_expand)


def _granite_config(config: HybridConfig, pad_expand: bool) -> PreTrainedConfig:
    from mohawk.models.formats.granite import granite_config

    return granite_config(config, pad_expand=pad_expand)


def _qwen3_5_config(config: HybridConfig, pad_expand: bool) -> PreTrainedConfig:
    from mohawk.models.formats.qwen3_5 import qwen3_5_config

    return qwen3_5_config(config)


TARGETS = {
    "bamba": Target(
        "transformers' Bamba, which llama.cpp has too (default)",
        _write_bamba,
        why_not=_why_not_bamba,
        adapts=True,
        prepare=partial(_adapt, class_name="BambaForCausalLM", name="Bamba"),
        configuration=_bamba_config,
    ),
    "granite": Target(
        "transformers' Granite 4, which vLLM and SGLang have too",
        _write_granite,
        why_not=_why_not_granite,
        adapts=True,
        prepare=partial(_adapt, class_name="GraniteMoeHybridForCausalLM", name="Granite"),
        configuration=_granite_config,
    ),
    "qwen3_5": Target(
        "transformers' Qwen3.5, for gated_delta students of Qwen3",
        _write_qwen3_5,
        why_not=_why_not_qwen3_5,
        prepare=_tell_wide_norms,
        configuration=_qwen3_5_config,
    ),
    "hybrid": Target("ours, its code beside the weights", _write_hybrid, with_code=True),
}

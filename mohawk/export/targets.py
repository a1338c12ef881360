"""What a student can be exported as. An entry of `TARGETS` is all that another one needs: the command line, the export
and its model card read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mohawk.errors import UserError
from mohawk.export.config_styles import both_ropes, float32, no_infinity, older_kinds, restyle
from mohawk.export.runtimes import Note, bamba_notes, gguf_notes, granite_notes, onnx_notes, own_notes, qwen3_5_notes

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.export.parity import Row
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig

    Tokenizer: TypeAlias = PreTrainedTokenizerBase | None

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
class Asked:
    """What an export was asked for beside its target.

    pad_expand, fold_bias: see `export`. outtype: of the matrices in a file, one of the target's. about: what a file
    says of the model, such as general.name.
    """

    pad_expand: bool = False
    fold_bias: bool = False
    outtype: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)


def in_transformers(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer,
    console: Console,
    *,
    trust_remote_code: bool = False,
) -> list[Row]:
    """The check of folders that transformers' Auto classes load: see `mohawk.export.parity`."""
    import torch

    from mohawk.export.parity import answers, check_export, inputs_for, print_parity

    inputs = inputs_for(model.config, tokenizer)
    expected = answers(model.to(torch.float32), inputs)
    rows = check_export(folder, inputs, expected, trust_remote_code=trust_remote_code)
    print_parity(rows, console)
    return rows


@dataclass(frozen=True)
class Target:
    """One class of models, or one format, that a student can be written as.

    Args:
        text: what it is, for `--to`.
        write: (model, tokenizer, folder, asked): fills the folder.
        notes: where what was written runs, from its configuration alone; see `runtimes`.
        check: (folder, model, tokenizer, console) -> rows of the parity table, which it prints; may change the model.
        outtypes: what `--outtype` can be, the default first; empty for what has the student's own dtype.
        why_not: (config, pad_expand) -> the whole line for a student that can't be written so; None if it can.
        why_not_tokenizer: (tokenizer, config) -> the same for the tokenizer beside it.
        plain: whether a student without mixers, of a class of transformers, can be written so too.
        adapts: whether `--pad-expand` and `--fold-bias` mean something.
        prepare: (model, pad_expand, fold_bias) -> what there is to say about the changes that it made in place.
        configuration: (config, pad_expand) -> what would be written's, for a student that can be written so.
    """

    text: str
    write: Callable[[HybridForCausalLM, Tokenizer, Path, Asked], None]
    notes: Callable[[Any], list[Note]]
    check: Callable[[Path, HybridForCausalLM, Tokenizer, Console], list[Row]] = in_transformers
    outtypes: tuple[str, ...] = ()
    why_not: Callable[[HybridConfig, bool], str | None] = lambda config, pad_expand: None
    why_not_tokenizer: Callable[[PreTrainedTokenizerBase, HybridConfig], str | None] = lambda tokenizer, config: None
    plain: bool = False
    adapts: bool = False
    prepare: Callable[[HybridForCausalLM, bool, bool], list[str]] = lambda model, pad_expand, fold_bias: []
    configuration: Callable[[HybridConfig, bool], PreTrainedConfig] = lambda config, pad_expand: config


def runtimes(
    target: Target, written: PreTrainedConfig, config: HybridConfig, tokenizer: PreTrainedTokenizerBase | None
) -> list[Note]:
    """What is known of where an export runs. llama.cpp has the same layers whichever way they come to it, so what
    `--to gguf` is refused for holds for its own converter too.

    written: what was written's configuration. config, tokenizer: the student's.
    """
    from mohawk.models.formats.refusals import WHY_NOT

    notes = target.notes(written)
    if all(note.runtime != "llama.cpp" for note in notes):
        return notes
    reason = WHY_NOT["gguf"](config, False) or (tokenizer and _why_not_cut_so(tokenizer, config))
    if not reason:
        return notes
    return [Note("llama.cpp", False, reason, runs=False) if note.runtime == "llama.cpp" else note for note in notes]


def _not_stock(target: str, class_name: str, mixer: str, config: HybridConfig, pad_expand: bool) -> str | None:
    """The whole line for a student that cannot be of a stock class with these mixers; for one with others it names the
    class that has them."""
    from mohawk.models.formats.refusals import WHY_NOT

    if (reason := WHY_NOT[target](config, pad_expand)) is None:
        return None
    other = {"mamba2": "bamba", "gated_delta": "qwen3_5"}.get(config.mixer_words)
    takes = config.mixer != mixer and other and TARGETS[other].why_not(config, False) is None
    return f"cannot be a {class_name}: {reason}" + (f"; `--to {other}` takes it" if takes else INSTEAD)


def conv_input_bias_line(config: HybridConfig, class_name: str, name: str) -> str:
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
            raise UserError(conv_input_bias_line(model.config, class_name, name))
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


def _write_bamba(model: HybridForCausalLM, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.models.formats.bamba import to_bamba

    _save(to_bamba(model, pad_expand=asked.pad_expand), tokenizer, folder)
    restyle(folder, no_infinity, both_ropes)


def _write_granite(model: HybridForCausalLM, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.models.formats.granite import to_granite

    _save(to_granite(model, pad_expand=asked.pad_expand), tokenizer, folder)
    restyle(folder, no_infinity, both_ropes, older_kinds)


def _write_qwen3_5(model: HybridForCausalLM, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.models.formats.qwen3_5 import to_qwen3_5, wide_norms

    _save(to_qwen3_5(model), tokenizer, folder)
    restyle(folder, both_ropes, *([float32] if wide_norms(model) else []))


def _write_hybrid(model: HybridForCausalLM, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.loading.remote_code import add_code

    _save(model, tokenizer, folder)
    add_code(folder, model)


def _save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _why_not_gguf(config: HybridConfig, pad_expand: bool) -> str | None:
    from importlib.util import find_spec

    from mohawk.models.formats.refusals import WHY_NOT

    if find_spec("gguf") is None:
        return "--to gguf needs the package gguf: run pip install gguf"
    reason = WHY_NOT["gguf"](config, pad_expand)
    return reason and f"cannot be a GGUF file: {reason}{INSTEAD}"


def _why_not_in_gguf(tokenizer: PreTrainedTokenizerBase, config: HybridConfig) -> str | None:
    reason = _why_not_cut_so(tokenizer, config)
    return reason and f"cannot be a GGUF file: {reason}{INSTEAD}"


def _why_not_cut_so(tokenizer: PreTrainedTokenizerBase, config: HybridConfig) -> str | None:
    """Why llama.cpp cannot turn text into this tokenizer's tokens; None where it can."""
    from mohawk.models.formats.gguf_vocabulary import vocabulary

    try:
        vocabulary(tokenizer, config.vocab_size)
    except ValueError as error:
        return str(error)
    return None


def _write_gguf(model: HybridForCausalLM, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.models.formats.gguf import write_gguf

    assert asked.outtype is not None  # one of the target's
    path = folder / f"{asked.about['general.name']}-{asked.outtype}.gguf"
    write_gguf(model, path, asked.outtype, tokenizer=tokenizer, about=asked.about)


def _check_gguf(folder: Path, model: HybridForCausalLM, tokenizer: Tokenizer, console: Console) -> list[Row]:
    from mohawk.export.gguf_check import check_gguf

    return check_gguf(folder, model, tokenizer, console)


def _why_not_onnx(config: Any, pad_expand: bool) -> str | None:
    from mohawk.core.extras import need
    from mohawk.models.formats.refusals import WHY_NOT

    try:
        need("onnx", "`mohawk export --to onnx`")
    except UserError as error:
        return str(error)
    reason = WHY_NOT["onnx"](config, pad_expand)
    return reason and f"cannot be ONNX graphs: {reason}" + (INSTEAD if hasattr(config, "mixer_kinds") else "")


def _write_onnx(model: Any, tokenizer: Tokenizer, folder: Path, asked: Asked) -> None:
    from mohawk.models.formats.onnx import write_onnx

    write_onnx(model, folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_onnx(folder: Path, model: Any, tokenizer: Tokenizer, console: Console) -> list[Row]:
    from mohawk.export.onnx_check import check_onnx

    return check_onnx(folder, model, tokenizer, console)


def _tell_padding(model: HybridForCausalLM, pad_expand: bool, fold_bias: bool) -> list[str]:
    from mohawk.models.formats.bamba import padded_expand

    config = model.config
    if config.mixer != "mamba2" or config.mixer_num_heads * config.mixer_head_dim == 2 * config.hidden_size:
        return []
    return [PADDED.format(expand=padded_expand(config)).replace(" (--pad-expand)", "")]


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
        bamba_notes,
        why_not=partial(_not_stock, "bamba", "BambaForCausalLM", "mamba2"),
        adapts=True,
        prepare=partial(_adapt, class_name="BambaForCausalLM", name="Bamba"),
        configuration=_bamba_config,
    ),
    "granite": Target(
        "transformers' Granite 4, which vLLM and SGLang have too",
        _write_granite,
        granite_notes,
        why_not=partial(_not_stock, "granite", "GraniteMoeHybridForCausalLM", "mamba2"),
        adapts=True,
        prepare=partial(_adapt, class_name="GraniteMoeHybridForCausalLM", name="Granite"),
        configuration=_granite_config,
    ),
    "qwen3_5": Target(
        "transformers' Qwen3.5, for gated_delta students of Qwen3",
        _write_qwen3_5,
        qwen3_5_notes,
        why_not=partial(_not_stock, "qwen3_5", "Qwen3_5ForCausalLM", "gated_delta"),
        prepare=_tell_wide_norms,
        configuration=_qwen3_5_config,
    ),
    "gguf": Target(
        "a GGUF file, for llama.cpp",
        _write_gguf,
        gguf_notes,
        check=_check_gguf,
        outtypes=("f32", "bf16", "q8_0", "q4_0"),
        why_not=_why_not_gguf,
        why_not_tokenizer=_why_not_in_gguf,
        prepare=_tell_padding,
    ),
    "onnx": Target(
        "ONNX graphs, for onnxruntime; plain students too",
        _write_onnx,
        onnx_notes,
        check=_check_onnx,
        why_not=_why_not_onnx,
        plain=True,
    ),
    "hybrid": Target(
        "ours, its code beside the weights",
        _write_hybrid,
        own_notes,
        check=partial(in_transformers, trust_remote_code=True),
    ),
}

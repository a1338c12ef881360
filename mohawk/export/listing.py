"""`mohawk export --list`: what a student can be exported as, where that runs, and why it can't be the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mohawk.export.runtimes import Note
from mohawk.export.targets import INSTEAD, TARGETS, Target, runtimes

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from mohawk.models.hybrid_config import HybridConfig
    from mohawk.models.mixers import Mamba2Mixer


@dataclass(frozen=True)
class Choice:
    """One target for one student: the reason why not, or else what is known of the runtimes.

    remark: what has to be done or known besides.
    """

    target: str
    reason: str | None
    remark: str | None = None
    runtimes: tuple[Note, ...] = ()


def choices(student: str | Path) -> list[Choice]:
    """Every target for a run's student, or a student's folder, from its configuration; of its weights only mixers'
    biases are read.

    Raises:
        UserError: no such folder, or no causal language model in it.
    """
    from mohawk.export.run import has_tokenizer, student_config
    from mohawk.loading.models import load_tokenizer

    folder, config = student_config(student)
    tokenizer = load_tokenizer(folder, who="") if has_tokenizer(folder) else None
    return [_choice(name, target, config, folder, tokenizer) for name, target in TARGETS.items()]


def print_choices(student: str | Path, console: Console) -> None:
    """`choices` as lines."""
    for choice in choices(student):
        lines = [f"--to {choice.target}: " + (f"no; {choice.reason}" if choice.reason else "yes")]
        if choice.reason is None:
            lines[0] += f", {TARGETS[choice.target].text}"
            lines += [f"    {choice.remark}"] if choice.remark else []
            for note in choice.runtimes:
                runs = f"yes ({'each export is' if note.checked else 'not'} checked there)" if note.runs else "no"
                lines.append(f"    {note.runtime}: {runs}; {note.text}")
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _choice(
    name: str, target: Target, config: HybridConfig, folder: str, tokenizer: PreTrainedTokenizerBase | None
) -> Choice:
    def notes(pad_expand: bool) -> tuple[Note, ...]:
        return tuple(runtimes(target, target.configuration(config, pad_expand), config, tokenizer))

    if not (target.plain or hasattr(config, "mixer_kinds")):
        return Choice(name, f"it has no mixers: a {config.model_type} model, which transformers runs as it is")
    if reason := target.why_not(config, False):
        if not (target.adapts and target.why_not(config, True) is None):
            return Choice(name, reason.removesuffix(INSTEAD))
        remark = "with --pad-expand alone: its mixers' channels are no multiple of the hidden size"
        return Choice(name, None, remark, notes(True))
    remark = None
    if tokenizer is not None and (reason := target.why_not_tokenizer(tokenizer, config)):
        return Choice(name, reason.removesuffix(INSTEAD))
    if target.adapts and _biased(Path(folder), config):
        remark = "with --fold-bias alone: in_proj has biases on x, B and C, which it moves behind the convolution"
    return Choice(name, None, remark, notes(False))


def _biased(folder: Path, config: HybridConfig) -> bool:
    """Whether a student's mixers have biases in front of their convolutions."""
    import torch
    from safetensors import safe_open

    with torch.device("meta"):
        rows = cast("Mamba2Mixer", config.make_mixer(0)).slices()["xBC"]  # of all layers
    biases = {f"model.layers.{i}.self_attn.in_proj.bias" for i in config.ssm_layers}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any(bool(tensors.get_tensor(key)[rows].any()) for key in biases & set(tensors.keys())):
                return True
    return False

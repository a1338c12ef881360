"""`mohawk inspect`: a model's layers, mixers, parameters and state. Reads no weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk.core.folders import MANIFEST, is_made_of_others, refuse_damaged
from mohawk.core.places import home
from mohawk.core.run_folder import STUDENT, has_recipe, phase_student
from mohawk.errors import UserError
from mohawk.schema.kinds import load_run_recipe, phase_names, run_command

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

GROWING = ("full_attention", "sliding_attention")  # layer types that keep keys and values of the tokens in sight


@dataclass(frozen=True)
class Layer:
    """One decoder layer: a state of `fixed_bytes` and, for attention, `token_bytes` per token in sight.

    `fixed_bytes` is None for a mixer whose state is not known here.
    """

    index: int
    mixer: str
    mixer_parameters: int
    parameters: int
    fixed_bytes: int | None
    token_bytes: int
    window: int | None

    def state_bytes(self, context: int) -> int | None:
        """Bytes of one sequence's state after `context` tokens; None where it is not known."""
        if self.fixed_bytes is None:
            return None
        seen = context if self.window is None else min(context, self.window)
        return self.fixed_bytes + self.token_bytes * seen


@dataclass(frozen=True)
class Description:
    name: str
    kind: str
    dtype: str
    parameters: int
    layers: tuple[Layer, ...]


def student_folder(path: str | Path) -> str:
    """The model inside a run's folder (the final student, else the latest phase's), or the name as it is. Raises
    UserError where the student is not as the run wrote it, or not made of what the run has now."""
    folder = home(path)
    if not has_recipe(folder):
        return str(path)
    for student in _students(folder):
        if any((student / name).is_file() for name in (MANIFEST, "config.json")):
            if not (student / MANIFEST).exists():
                log.warning("%s has no %s: it is not verified", student, MANIFEST)
            again = f"`{run_command(folder)}` with the run's recipe makes it again"
            refuse_damaged(student, again)
            if student == folder / STUDENT and (problem := why_outdated(folder)) is not None:
                raise UserError(f"{student} {problem}; {again}, or name {student} to use it as it is")
            return str(student)
    raise UserError(f"{path} is a run without a student yet; `{run_command(folder)}` with its recipe goes on with it")


def why_outdated(run: Path) -> str | None:
    """What is wrong with a run's final student where its last step has left another one since, as a run that was
    stopped in between shows; None where it is of that one, or where nothing there says."""
    try:
        last = next(reversed(load_run_recipe(run).trained()), None)
    except UserError:  # a damaged recipe does not say
        return None
    if last is None or not is_made_of_others(run / STUDENT, phase_student(run, last)):
        return None
    return f"was made of another student than phases/{last} has now"


def _students(folder: Path) -> Iterator[Path]:
    """Where a run's students lie, the newest first."""
    yield folder / STUDENT
    for name in reversed(phase_names(folder)):
        yield phase_student(folder, name)


def describe(model: str | Path) -> Description:
    """Build the model without weights and count. Raises UserError where there is no such model."""
    import torch
    from transformers import AutoModelForCausalLM

    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.loading.configs import building, load_config, locate

    config = load_config(model, who="")
    name, gguf_file = locate(model, who="")
    with torch.device("meta"), building(config, name, who=""):
        empty = AutoModelForCausalLM.from_config(config)
    return Description(
        name=f"{name}/{gguf_file}" if gguf_file else name,
        kind=type(empty).__name__,
        dtype=str(_dtype(config)).removeprefix("torch."),
        parameters=sum(p.numel() for p in empty.parameters()),
        layers=describe_layers(empty),
    )


def describe_layers(model) -> tuple[Layer, ...]:
    """The decoder layers of a model, which may be on the meta device; states in its configuration's dtype."""
    import torch

    config = model.config
    blocks = next(
        (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers),
        torch.nn.ModuleList(),
    )
    return tuple(_layer(config, i, block, _dtype(config).itemsize) for i, block in enumerate(blocks))


def state_sizes(model: PreTrainedModel, context: int) -> list[int]:
    """Bytes of one sequence's state in each layer, after `context` tokens; of a model whose layers are all known."""
    sizes = []
    for layer in describe_layers(model):
        size = layer.state_bytes(context)
        assert size is not None
        sizes.append(size)
    return sizes


def _dtype(config: PretrainedConfig):
    """What the checkpoint is saved in."""
    import torch

    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _layer(config: PretrainedConfig, index: int, block, itemsize: int) -> Layer:
    from mohawk.models.families import decoder_shape
    from mohawk.models.formats.stock import mixer_in, stock_mixer

    types = getattr(config, "layer_types", None)
    kind = types[index] if types else "full_attention"
    mixer = mixer_in(block)
    counts = sum(p.numel() for p in mixer.parameters()), sum(p.numel() for p in block.parameters())
    if hasattr(mixer, "conv_size"):  # one of our mixers: a conv state in the model's dtype, a float32 state
        conv = mixer.conv_size * mixer.conv_kernel * itemsize
        state = mixer.num_heads * mixer.head_dim * mixer.state_size * 4
        return Layer(index, config.mixer_of(index), *counts, fixed_bytes=conv + state, token_bytes=0, window=None)
    if stock := stock_mixer(mixer):
        fixed = stock.conv_elements * itemsize + stock.state_elements * 4
        return Layer(index, stock.kind, *counts, fixed_bytes=fixed, token_bytes=0, window=None)
    if kind not in GROWING:
        return Layer(index, kind, *counts, fixed_bytes=None, token_bytes=0, window=None)
    shape = decoder_shape(config)
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * itemsize
    window = getattr(config, "sliding_window", None) if types is None or kind == "sliding_attention" else None
    return Layer(index, kind, *counts, fixed_bytes=0, token_bytes=token_bytes, window=window)


def print_description(described: Description, contexts: Sequence[int], console: Console) -> None:
    """A table of the layers, neighbours of one kind in one row, and the sums."""
    from rich.markup import escape
    from rich.table import Table

    heading = f"{described.kind}, {described.parameters:,} parameters, {described.dtype}"
    console.print(f"[bold]{escape(described.name)}[/bold]: {heading}", highlight=False, soft_wrap=True)
    table = Table("layers", "mixer", box=None, header_style="bold")
    table.add_column("parameters", justify="right")
    table.add_column("of the mixer", justify="right")
    for context in contexts:
        table.add_column(f"state at {context}", justify="right")
    for first, last in _runs(described.layers):
        span = described.layers[first : last + 1]
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            span[0].mixer,
            f"{sum(layer.parameters for layer in span):,}",
            f"{sum(layer.mixer_parameters for layer in span):,}",
            *(_state(span, context) for context in contexts),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{sum(layer.parameters for layer in described.layers):,}",
        f"{sum(layer.mixer_parameters for layer in described.layers):,}",
        *(_state(described.layers, context) for context in contexts),
    )
    console.print(table)


def _runs(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """(first, last) index of each stretch of layers with one mixer."""
    stretches: list[tuple[int, int]] = []
    for layer in layers:
        if stretches and layers[stretches[-1][1]].mixer == layer.mixer:
            stretches[-1] = (stretches[-1][0], layer.index)
        else:
            stretches.append((layer.index, layer.index))
    return stretches


def _state(layers: Sequence[Layer], context: int) -> str:
    sizes = [layer.state_bytes(context) for layer in layers]
    known = [size for size in sizes if size is not None]
    return size_text(sum(known)) if len(known) == len(sizes) else "not known"


def size_text(count: int) -> str:
    """Bytes in the unit that fits: 188.7 MB, 5.2 kB, 960 bytes; units are powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"

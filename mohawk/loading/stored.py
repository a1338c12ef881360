"""Tensors in a checkpoint's files, rows of which are read without the rest of them.

A row is what lies along a tensor's last dimension; of a vector, each value. What files and memory call a tensor may
differ, and a tensor in memory (a layer's experts) may be many in the files: then each has some of its rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from mohawk.models.sharding import first_row, local

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. read: what lies from one place of its first dimension on and before another one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in memory that a tensor of a file holds, in its order, by their places in memory."""

    of: str
    places: Tensor


def stored_in(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors, or else of its .bin files, by their names there; none where the folder
    holds neither, or a .bin file of an older torch, which can only be read whole."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if files := _files(folder, single, index):
            read = _of_safetensors if single == SAFE_WEIGHTS_NAME else _of_bin
            try:
                return {name: tensor for file in files for name, tensor in read(file).items()}
            except RuntimeError:  # torch's for a file that it cannot map
                return {}
    return {}


def _files(folder: Path, single: str, index: str) -> list[Path]:
    """The files that an index names, or the one that needs none; none unless all are there."""
    names = [single]
    if (folder / index).is_file():
        try:
            names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []  # transformers says what is wrong with it
    files = [folder / name for name in names]
    return files if all(file.is_file() for file in files) else []


def _of_safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    opened = safe_open(file, framework="pt")

    def stored(name: str) -> Stored:
        part = opened.get_slice(name)
        shape = tuple(part.get_shape())
        if not shape:
            return Stored(shape, opened.get_tensor(name).dtype, lambda begin, end: opened.get_tensor(name))
        return Stored(shape, part[:0].dtype, lambda begin, end: part[begin:end])

    return {name: stored(name) for name in opened.keys()}


def _of_bin(file: Path) -> dict[str, Stored]:
    # mapped: what is not looked at is not read
    tensors: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, lambda begin, end, tensor=tensor: tensor[begin:end])
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def rows_in_files(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Rows] | None:
    """By its name in the model's files, what each tensor there holds of the tensors that the model has in memory; None
    where one of them takes more than one of memory to make. The tensors may be on the meta device."""
    from transformers.modeling_utils import revert_weight_conversion

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    made = revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    found: dict[str, Rows] = {}
    for name, shape in shapes.items():
        places = torch.arange(math.prod(shape[:-1] or shape))
        if name in made and tuple(made[name].shape) == shape:
            found[name] = Rows(name, places)
            continue
        # what transformers makes of a tensor whose rows are their own places alone
        numbered = places.view(*shape[:-1], 1) if len(shape) > 1 else places
        for other, held in revert_weight_conversion(model, {name: numbered}).items():
            expected = (*held.shape[:-1], shape[-1]) if len(shape) > 1 else tuple(held.shape)
            if other not in made or tuple(made[other].shape) != expected:
                return None
            found[other] = Rows(name, held.flatten())
    return found if found.keys() == made.keys() else None


def fill_rows(tensor: Tensor, sources: Iterable[tuple[Stored, Tensor]]) -> None:
    """Fill a tensor, or what this process has of it, with rows of a file's tensors, each at its place in memory."""
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    own = local(tensor.detach()).view(-1, width)
    first = first_row(tensor) * math.prod(tensor.shape[1:-1])
    for stored, places in sources:
        held = ((places >= first) & (places < first + len(own))).nonzero().flatten()
        if not len(held):
            continue
        each = math.prod(stored.shape[1:-1])
        begin, end = int(held[0]) // each, int(held[-1]) // each + 1
        values = stored.read(begin, end).reshape(-1, width)
        to, of = places[held] - first, held - begin * each
        if len(to) == len(values) == int(to[-1] - to[0]) + 1:  # one after the other, as a rule
            own[int(to[0]) : int(to[-1]) + 1].copy_(values)
        else:
            own[to.to(own.device)] = values[of].to(own)

"""What a model is, as one hash of its configuration and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mohawk.loading.offload import loaded
from mohawk.models.sharding import reshard, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of a configuration: where a model came from and how it is run, not what it is.
UNRELATED = ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache", "dtype", "torch_dtype")


def teacher_hash(teacher: PreTrainedModel) -> str:
    """sha256 of a model's configuration and weights, wherever accelerate keeps them; tied ones count once."""
    reshard(teacher)
    digest, seen = hashlib.sha256(), set()
    config = {key: value for key, value in teacher.config.to_dict().items() if key not in UNRELATED}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for place, module in teacher.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                values = loaded(module, name)
                assert values is not None
                values = whole(values)
                digest.update(f"{place}.{name} {tuple(values.shape)} {values.dtype}".encode())
                for part in _plain(values):
                    # pyrefly: ignore[bad-argument-type]  # an array is a buffer, of which numpy's stubs know from Python 3.12 on
                    digest.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised one is made of; a plain one itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor

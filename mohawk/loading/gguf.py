"""GGUF files of which each process keeps its part; a tensor, or a layer's experts, is whole at a time.

What the file's tensors are in the model is transformers' to say, whose own reader takes all of them at once.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mohawk.models.casting import cast
from mohawk.models.sharding import fill, materialise

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def read_gguf(
    file: Path,
    model: PreTrainedModel,
    spread: Callable[[nn.Module], None],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> PreTrainedModel | None:
    """A model that was made on the meta device, in parts, with the weights of a file; None where transformers puts them
    together in a way that cannot be followed tensor by tensor.

    dtype: of its parameters; default the configuration's, or float32.
    """
    from gguf import GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader = GGUFReader(file)  # which maps the file
    parsed: dict[str, Any] = {"tensors": {}, "config": theirs.load_gguf_checkpoint(file)["config"]}
    architecture = theirs.read_field(reader, "general.architecture")[0]
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=parsed["config"])
    names = theirs.get_gguf_hf_weights_map(model, processor)
    config = model.config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # it has plain weights from here on
        delattr(config, "quantization_config")
    own: Any = getattr(config, "dtype", None)
    cast(model, dtype or (own if isinstance(own, torch.dtype) else torch.float32))
    spread(model)
    materialise(model, device)
    known = dict(model.named_parameters(remove_duplicate=False))
    filled: set[str] = set()

    def put(found: dict[str, Tensor]) -> bool:
        """Whether tensors of the model are as they should be; others are passed over, as transformers does."""
        for name in found.keys() & known.keys():
            if name in filled or known[name].shape != found[name].shape:
                return False
            fill(known[name], found[name])
            filled.add(name)
        found.clear()
        return True

    block, pieces = "", parsed["tensors"]  # of a layer's experts, which processors put together there
    for stored in reader.tensors:
        before, block = block, stored.name.split(".")[1]
        if block != before and not put(pieces):
            return None
        weights = dequantize(stored.data, stored.tensor_type)
        done = processor.process(weights=weights, name=stored.name, tensor_key_mapping=names, parsed_parameters=parsed)
        if done.name in names and not put({names[done.name]: torch.from_numpy(np.copy(done.weights))}):
            return None
    if not put(pieces) or any(name not in filled for name, _ in model.named_parameters()):
        return None
    return model

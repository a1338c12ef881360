"""Models in parts on several processes, read from a folder and written to one: no process ever has a whole one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mohawk.core.processes import first_before_others, several, together
from mohawk.models.casting import cast
from mohawk.models.families import needed_attention
from mohawk.models.sharding import materialise, reshard, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

FILE_BYTES = 5 * 10**9  # of one file of weights, at most
Spread = Callable[[nn.Module], None]  # brings a model into its parts (mohawk.models.sharding.shard)


def read_in_parts(
    name: str,
    config: PreTrainedConfig,
    spread: Spread,
    device: torch.device | str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A causal language model of which each process reads its own part from the safetensors of a folder or hub id.

    dtype: of its parameters; default the configuration's. None where the files do not hold the model's parameters by
    their names, as those of an older format or of a larger model around it: it has to be read whole.
    """
    import torch.distributed.checkpoint as dcp
    from accelerate import init_empty_weights
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json"]
        folder = Path(first_before_others(lambda: snapshot_download(name, revision=revision, allow_patterns=wanted)))
    if not any(folder.glob("*.safetensors")):
        return None
    reader = HuggingFaceStorageReader(str(folder))
    found: Any = reader.read_metadata().state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in found.items()}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=needed_attention(config), trust_remote_code=trust_remote_code
        )
    wanted = {key: tuple(tensor.shape) for key, tensor in _saved(model)}
    if any(shapes.get(key) != shape for key, shape in wanted.items()):
        log.info("%s: its files name weights otherwise than %s does; each process reads them all", name, type(model))
        return None
    own: Any = getattr(config, "dtype", None)
    cast(model, dtype or (own if isinstance(own, torch.dtype) else torch.float32))
    spread(model)
    materialise(model, device)
    dcp.load({key: tensor.detach() for key, tensor in _saved(model)}, storage_reader=reader, no_dist=not several())
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def write_in_parts(model: PreTrainedModel, folder: Path | None) -> None:
    """Write a model as `save_pretrained` does, a file's tensors at a time on the first process, which alone has the
    folder. All processes must ask. Raises OSError on all of them where the first could not write."""
    from safetensors.torch import save_file
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    reshard(model)
    files = _files(model)
    names: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        names |= dict.fromkeys(tensors, file)
        held = {}
        for key, tensor in tensors.items():
            values = whole(tensor)
            if folder is not None:
                held[key] = values.cpu().contiguous()
        together(lambda file=file, held=held: folder and save_file(held, folder / file, metadata={"format": "pt"}))
    size = sum(tensor.numel() * tensor.element_size() for tensors in files for tensor in tensors.values())

    def describe() -> None:
        if folder is None:
            return
        config = model.config
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # which torch puts in front
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": names}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    together(describe)


def _files(model: nn.Module) -> list[dict[str, Tensor]]:
    """What each file of weights holds, none more than FILE_BYTES unless a single tensor is larger."""
    files: list[dict[str, Tensor]] = [{}]
    held = 0
    for key, tensor in _saved(model):
        size = tensor.numel() * tensor.element_size()
        if files[-1] and held + size > FILE_BYTES:
            files.append({})
            held = 0
        files[-1][key] = tensor
        held += size
    return files


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What of a model lies in its files: parameters, tied ones once, and the buffers that are kept with them."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)

"""Models in parts on several processes, read from a folder and written to one: no process ever has a whole one."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mohawk.core.processes import first_before_others, several, together
from mohawk.models.casting import cast
from mohawk.models.families import needed_attention
from mohawk.models.sharding import materialise, reshard, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

FILE_BYTES = 5 * 10**9  # of one file of weights, at most
PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # of weights that are what they say
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

    dtype: of its parameters; default the configuration's, or that of the files. None where the files do not hold the
    model's parameters under their names as plain numbers: those of an older format, of a larger model around it, of
    experts that are one tensor in memory. It has to be read whole.
    """
    import torch.distributed.checkpoint as dcp
    from accelerate import init_empty_weights
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "model.safetensors", "model-*-of-*.safetensors"]
        folder = Path(first_before_others(lambda: snapshot_download(name, revision=revision, allow_patterns=wanted)))
    files = _weight_files(folder)
    if not files:
        return None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=needed_attention(config), trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # which making it empty has undone
    wanted = {key: tuple(tensor.shape) for key, tensor in _saved(model)}
    with tempfile.TemporaryDirectory() as named:  # torch's reader takes all files of a folder for the model's
        for file in files:
            (Path(named) / file.name).symlink_to(file.resolve())
        reader = HuggingFaceStorageReader(named)
        found: Any = reader.read_metadata().state_dict_metadata
        here = {key: entry for key, entry in found.items() if key in wanted}
        if {key: tuple(entry.size) for key, entry in here.items()} != wanted:
            return None
        dtypes = {entry.properties.dtype for entry in here.values()}
        if not dtypes <= PLAIN or getattr(model, "_keep_in_fp32_modules", None) and dtype is not torch.float32:
            return None
        own: Any = getattr(config, "dtype", None)
        first: Any = next(iter(here.values())).properties.dtype
        cast(model, dtype or (own if isinstance(own, torch.dtype) else first))
        spread(model)
        materialise(model, device)
        dcp.load({key: tensor.detach() for key, tensor in _saved(model)}, storage_reader=reader, no_dist=not several())
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder: those that its index names, or the one that needs none."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []  # transformers says what is wrong with it
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = [folder / name for name in names]
    return files if all(file.is_file() for file in files) else []


def _names_on_disk(model: PreTrainedModel) -> bool:
    """Whether a model's files hold its tensors under the names that they have in memory, each by itself."""
    from transformers.modeling_utils import revert_weight_conversion

    own = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in _saved(model)}
    return revert_weight_conversion(model, dict(own)).keys() == own.keys()


def write_in_parts(model: PreTrainedModel, folder: Path | None) -> None:
    """Write a model as `save_pretrained` does, a file's tensors at a time on the first process, which alone has the
    folder. All processes must ask. Raises OSError on all of them where the first could not write.

    A model whose files have other names than its tensors (experts that are one tensor in memory) is put together on the
    first process.
    """
    from safetensors.torch import save_file

    reshard(model)
    if not _names_on_disk(model):
        state = {}
        for key, tensor in _saved(model):
            values = whole(tensor)
            if folder is not None:
                state[key] = values.cpu()
        together(lambda: folder and model.save_pretrained(folder, state_dict=state, max_shard_size=FILE_BYTES))
        return
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

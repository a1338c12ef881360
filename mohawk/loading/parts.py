"""Models in parts on several processes, read from a folder and written to one: no process ever has a whole one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mohawk.core.processes import first_before_others, together
from mohawk.loading.gguf import read_gguf
from mohawk.loading.stored import Rows, Stored, fill_rows, rows_in_files, stored_in
from mohawk.models.casting import cast
from mohawk.models.families import needed_attention
from mohawk.models.sharding import materialise, reshard, whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FILE_BYTES = 5 * 10**9  # of one file of weights, at most
PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # of weights that are what they say
Spread = Callable[[nn.Module], None]  # brings a model into its parts (mohawk.models.sharding.shard)


def read_in_parts(
    name: str,
    config: PreTrainedConfig,
    spread: Spread,
    device: torch.device | str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A causal language model of which each process reads its own part from the files of a folder or hub id.

    gguf_file: its name there; a tensor of it is whole at a time, or a layer's experts. dtype: of its parameters;
    default the configuration's, or that of the files. None where the files do not hold the model's parameters as plain
    numbers, under names or in tensors that can be told from those in memory. It has to be read whole.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = _folder(name, revision, gguf_file)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=needed_attention(config), trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # which making it empty has undone
    if getattr(model, "_keep_in_fp32_modules", None) and dtype is not torch.float32:
        return None
    if gguf_file is not None:
        return read_gguf(folder / gguf_file, model, spread, device, dtype)
    held = rows_in_files(model, _saved(model))
    stored = None if held is None else _stored(model, folder, held)
    if held is None or stored is None:
        return None
    own: Any = getattr(config, "dtype", None)
    first = next(iter(stored.values())).dtype
    cast(model, dtype or (own if isinstance(own, torch.dtype) else first))
    spread(model)
    materialise(model, device)
    sources: dict[str, list[tuple[Stored, Tensor]]] = {}
    for key, rows in held.items():
        sources.setdefault(rows.of, []).append((stored[key], rows.places))
    for key, tensor in _saved(model):
        fill_rows(tensor, sources[key])
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _folder(name: str, revision: str | None, gguf_file: str | None) -> Path:
    """Where a model's files are, those of a hub id once they are in its cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    def fetched(*wanted: str) -> Path:
        asked = ["*.json", *wanted]
        return Path(first_before_others(lambda: snapshot_download(name, revision=revision, allow_patterns=asked)))

    if gguf_file is not None:
        return fetched(gguf_file)
    folder = fetched("model.safetensors", "model-*-of-*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else fetched("pytorch_model*.bin")


def _stored(model: PreTrainedModel, folder: Path, held: Mapping[str, Rows]) -> dict[str, Stored] | None:
    """The tensors of a folder's files that a model is made of, as `held` names them; None where they are not all
    there, or have other shapes, or packed numbers. The files may be a larger model's around it, or its body's alone.
    """
    found = stored_in(folder)
    names: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.replace("language_model.", "", 1),
        lambda name: f"{model.base_model_prefix}.{name}",
    ]
    shapes = dict(_saved(model))
    for named in names:
        here = {named(name): tensor for name, tensor in found.items()}
        if held.keys() <= here.keys():
            break
    else:
        return None
    for key, rows in held.items():
        row = shapes[rows.of].shape[-1:] if shapes[rows.of].dim() > 1 else ()
        if here[key].dtype not in PLAIN or here[key].shape[len(here[key].shape) - len(row) :] != row:
            return None
        if math.prod(here[key].shape) != len(rows.places) * math.prod(row):
            return None
    return {key: here[key] for key in held}


def write_in_parts(model: PreTrainedModel, folder: Path | None) -> None:
    """Write a model as `save_pretrained` does, a file's tensors at a time on the first process, which alone has the
    folder. All processes must ask. Raises OSError on all of them where the first could not write.
    """
    from safetensors.torch import save_file
    from transformers.modeling_utils import revert_weight_conversion

    reshard(model)
    # where a tensor of the files takes several of memory to make, all of them are put together on the first process
    files = [dict(_saved(model))] if rows_in_files(model, _saved(model)) is None else _files(model)
    names: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        held = {}
        for key, tensor in tensors.items():
            values = whole(tensor)
            if folder is not None:
                held[key] = values.cpu()
        # by their names in files, where a layer's experts are many
        held = {key: value.contiguous() for key, value in revert_weight_conversion(model, held).items()}
        names |= dict.fromkeys(held, file)
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

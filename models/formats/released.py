"""Released checkpoints read into our student and written back, weight for weight.

| layout | released as | blocks of | mixers |
|---|---|---|---|
| phi-mamba | goombalab/Phi-Mamba, goombalab/Hybrid-Phi-Mamba | Phi-1.5 | discrete Mamba-2; attention in the hybrid |
| llamba | cartesia-ai/Llamba-1B, -3B, -8B | Llama | discrete Mamba-2 |
| mamba-in-llama | JunxiongWang/Mamba2InLlama_*, Llama3.2-Mamba2-* | Llama, Mistral | grouped Mamba-2 and attention |

The first two carry configurations that transformers does not know, the third a second one beside transformers' own.
Only names change on the way in and out, but for MambaInLlama, whose x and B have one head for several of C's: their
rows are repeated, which changes nothing in what the model computes.

Nothing is unpickled: weights are safetensors, and an older `pytorch_model.bin` is read by `torch.load` with
`weights_only=True`, which refuses everything but tensors and plain containers.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from mohawk.models.families import decoder_shape
from mohawk.models.formats.released_configs import (
    LAYOUTS,
    MAMBA_CONFIG,
    layout_of,
    read_llamba,
    read_mamba_in_llama,
    read_phi_mamba,
    write_llamba,
    write_mamba_in_llama,
    write_phi_mamba,
)
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig


def load_released(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> HybridForCausalLM:
    """A released checkpoint as a student, in eval mode.

    Args:
        name: a folder with config.json (and MambaInLlama's mamba_config.json) and weights, or a hub id.
        revision: of the hub id.
        dtype: of the parameters; default the widest in the checkpoint, so that every weight is read exactly.

    Raises:
        ValueError: a layout that is not one of LAYOUTS, an option our mixers do not have, weights that are missing or
            too many. What the hub or the file system raises passes through.
    """
    found = released_config(name, revision=revision)
    if found is None:
        raise ValueError(f"{name} is in none of the released layouts {', '.join(LAYOUTS)}; see AutoModelForCausalLM")
    layout, config = found
    state = read_weights(name, revision=revision)
    repeats_in_conv = _repeats_in_conv(
        (_read_json(name, MAMBA_CONFIG, revision) if layout == "mamba-in-llama" else None) or {}
    )
    return from_released(state, config, layout, dtype=dtype, repeats_in_conv=repeats_in_conv)


def released_config(name: str | Path, *, revision: str | None = None) -> tuple[str, HybridConfig] | None:
    """(layout, our configuration) of a folder or hub id, or None where it is in no released layout.

    Raises ValueError for an option that our student cannot express.
    """
    config = _read_json(name, "config.json", revision)
    if config is None:
        return None
    if "MixerModel" in config and "LanguageModel" in config:
        return "phi-mamba", read_phi_mamba(config)
    if "ssm_cfg" in config and "mlp_cfg" in config:
        return "llamba", read_llamba(config)
    if (grouped := _read_json(name, MAMBA_CONFIG, revision)) is not None:
        base = AutoConfig.from_pretrained(str(name), revision=revision)
        return "mamba-in-llama", read_mamba_in_llama(base, grouped)
    return None


def from_released(
    state: dict[str, Tensor],
    config: HybridConfig,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    repeats_in_conv: bool = False,
) -> HybridForCausalLM:
    """A student from a released state dict; `config` and `layout` as from `released_config`.

    repeats_in_conv: MambaInLlama's `repeat_kv_before_conv`, whose convolution already has a channel for every head.
    Raises ValueError as `load_released`.
    """
    if any(".x_proj." in name for name in state):
        raise ValueError("these are Mamba-1 mixers (x_proj), which no mixer here computes; give a Mamba-2 checkpoint")
    rename = _to_ours(config, layout)
    state = {rename(name): tensor for name, tensor in state.items()}
    if layout == "mamba-in-llama":
        for name, tensor in state.items():
            if (parts := _grouped_parts(name, config)) is not None and not (repeats_in_conv and "conv1d" in name):
                state[name] = _repeat(tensor, parts, config)
    if dtype is None:
        dtype = _widest(tensor.dtype for tensor in state.values())
    # pyrefly: ignore[not-iterable]  # two with output_loading_info
    student, info = HybridForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    problems = [f"{kind[:-5]}: {', '.join(sorted(map(str, info[kind]))[:4])}"
                for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]  # fmt: skip
    if problems:
        raise ValueError(f"the weights do not fit the configuration of layout {layout}; {'; '.join(problems)}")
    student.generation_config = GenerationConfig.from_model_config(config)
    return student.eval()


def to_released(student: HybridForCausalLM) -> dict[str, Tensor]:
    """The student's state dict under the released names; tensors are the student's own, not copies.

    A MambaInLlama student whose convolutions treat heads that share a row differently has a channel for each, as under
    that code's `repeat_kv_before_conv`, which `save_released` then writes into the configuration.

    Raises ValueError where no released layout holds such a student, or where the rows of a MambaInLlama mixer's in_proj
    that heads share have since been trained apart.
    """
    layout = layout_of(student.config)
    ours = student.state_dict()
    keeps_conv = layout == "mamba-in-llama" and _conv_heads_differ(ours, student.config)
    if student.config.tie_word_embeddings:
        ours.pop("lm_head.weight", None)
    rename = _to_released_name(student.config, layout)
    released = {}
    for name, tensor in ours.items():
        if layout == "mamba-in-llama" and (parts := _grouped_parts(name, student.config)) is not None:
            if not (keeps_conv and "conv1d" in name):
                tensor = _unrepeat(name, tensor, parts, student.config)
        released[rename(name)] = tensor
    return released


def save_released(student: HybridForCausalLM, folder: str | Path) -> None:
    """Write the student as its released layout: model.safetensors and the configuration that layout's code reads.

    Raises ValueError as `to_released`.
    """
    folder = Path(folder)
    config, layout = student.config, layout_of(student.config)
    state = {name: tensor.contiguous() for name, tensor in to_released(student).items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    weights.touch()
    mode = weights.stat().st_mode & 0o777  # as the umask says; safetensors makes files that their owner alone can read
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(mode)
    if layout == "mamba-in-llama":
        config.base_config.save_pretrained(folder)
        repeats_in_conv = _conv_heads_differ(student.state_dict(), config)
        written = {MAMBA_CONFIG: write_mamba_in_llama(config, repeats_in_conv=repeats_in_conv)}
    else:
        written = {"config.json": write_phi_mamba(config) if layout == "phi-mamba" else write_llamba(config)}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


# --- weights ---------------------------------------------------------------------------------------------------------


def read_weights(name: str | Path, *, revision: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a folder's or hub repository's safetensors, else .bin files. Raises ValueError without any."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.bin"]))
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    if not state:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            state.update(torch.load(file, map_location="cpu", weights_only=True))
    if not state:
        raise ValueError(f"{name} holds no weights: neither *.safetensors nor pytorch_model*.bin")
    return state


def _read_json(name: str | Path, file: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository, None where it has none."""
    path = Path(name).expanduser() / file
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(str(name), file, revision=revision))
        except EntryNotFoundError as error:
            # an unreachable hub ends as one too; every repository has a config.json, so that one was not looked for
            if file == "config.json" and isinstance(error, LocalEntryNotFoundError):
                raise
            return None
    return json.loads(path.read_text()) if path.is_file() else None


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    widest, *others = dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    return widest


# --- names -----------------------------------------------------------------------------------------------------------


def _names(layout: str) -> list[tuple[str, str]]:
    """(released prefix, our prefix) outside the layers."""
    if layout == "mamba-in-llama":
        return []
    final = "model.final_layernorm." if layout == "phi-mamba" else "model.norm."
    return [("backbone.embedding.", "model.embed_tokens."), ("backbone.final_layernorm.", final)]


def _to_ours(config: HybridConfig, layout: str) -> Callable[[str], str]:
    """Released name -> ours. A mixer takes the attention's place; the released attention lies one level deeper."""

    def rename(name: str) -> str:
        for theirs, ours in _names(layout):
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        name = re.sub(r"^backbone\.layers\.", "model.layers.", name)
        return re.sub(r"^(model\.layers\.\d+\.)(mixer\.self_attn|mixer|mamba)\.", r"\1self_attn.", name)

    return rename


def _to_released_name(config: HybridConfig, layout: str) -> Callable[[str], str]:
    """Our name -> the released one."""

    def rename(name: str) -> str:
        for theirs, ours in _names(layout):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        if (match := re.match(r"model\.layers\.(\d+)\.(self_attn\.)?(.*)", name)) is None:
            return name
        layer, mixer, rest = match.groups()
        is_ssm = int(layer) in config.ssm_layers
        if layout == "mamba-in-llama":
            return name if not (mixer and is_ssm) else f"model.layers.{layer}.mamba.{rest}"
        inner = "" if not mixer else "mixer." if is_ssm else "mixer.self_attn."
        return f"backbone.layers.{layer}.{inner}{rest}"

    return rename


# --- MambaInLlama's grouped heads ------------------------------------------------------------------------------------


def _grouped_parts(name: str, config: HybridConfig) -> tuple[str, ...] | None:
    """What the rows of a mixer's tensor are, in order, or None where no row is shared by heads."""
    match = re.match(r"model\.layers\.(\d+)\.self_attn\.(in_proj|conv1d)\.", name)
    if match is None or int(match[1]) not in config.ssm_layers:
        return None
    return ("z", "x", "B", "C", "dt") if match[2] == "in_proj" else ("x", "B", "C")


def _sizes(parts: tuple[str, ...], config: HybridConfig, heads: int) -> list[int]:
    """Rows of each part with `heads` heads in x and B."""
    p, h = config.mixer_head_dim, config.mixer_num_heads
    return [h if part == "dt" else (heads if part in ("x", "B") else h) * p for part in parts]


def _repeat(tensor: Tensor, parts: tuple[str, ...], config: HybridConfig) -> Tensor:
    """The rows of x and B once for every head that shares them: after the projection, or after the convolution, is
    where the released code repeats them, and each row's result depends on that row alone."""
    kv_heads = decoder_shape(config.base_config).num_kv_heads
    times = config.mixer_num_heads // kv_heads
    pieces = tensor.split(_sizes(parts, config, kv_heads))
    return torch.cat([
        repeat(piece, "(h p) ... -> (h times p) ...", h=kv_heads, times=times) if part in ("x", "B") else piece
        for part, piece in zip(parts, pieces, strict=True)
    ])  # fmt: skip


def _unrepeat(name: str, tensor: Tensor, parts: tuple[str, ...], config: HybridConfig) -> Tensor:
    """The inverse of `_repeat`. Raises ValueError where heads that would share a row have different ones."""
    pieces = []
    for part, piece in zip(parts, tensor.split(_sizes(parts, config, config.mixer_num_heads)), strict=True):
        if part in ("x", "B"):
            groups = _by_kv_head(piece, config)
            if not (groups == groups[:, :1]).all():
                raise ValueError(
                    f"{name}: the heads that share one row of {part} in MambaInLlama's layout have been trained apart; "
                    "save_pretrained keeps such a student as it is"
                )
            piece = rearrange(groups[:, 0], "h p ... -> (h p) ...")
        pieces.append(piece)
    return torch.cat(pieces)


def _by_kv_head(rows: Tensor, config: HybridConfig) -> Tensor:
    """(kv heads, heads that share one, rows of a head, ...) of x's or B's rows."""
    kv_heads = decoder_shape(config.base_config).num_kv_heads
    return rearrange(rows, "(h shared p) ... -> h shared p ...", h=kv_heads, shared=config.mixer_num_heads // kv_heads)


def _conv_heads_differ(state: dict[str, Tensor], config: HybridConfig) -> bool:
    """Whether some convolution has channels of its own for heads that would share them in x or B."""
    for name, tensor in state.items():
        if (parts := _grouped_parts(name, config)) is not None and "conv1d" in name:
            x, B, _ = tensor.split(_sizes(parts, config, config.mixer_num_heads))
            if any(not (g == g[:, :1]).all() for g in (_by_kv_head(x, config), _by_kv_head(B, config))):
                return True
    return False


def _repeats_in_conv(config: dict[str, Any]) -> bool:
    return bool(config.get("ssm_cfg", {}).get("repeat_kv_before_conv", False))

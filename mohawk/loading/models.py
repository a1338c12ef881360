"""Teachers: any Hugging Face causal language model and its tokenizer, from a folder, hub id or GGUF file.

Heavy imports stay inside the functions, so that recipes can be validated without loading torch.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohawk.core.hub import hub_or_cache
from mohawk.core.places import home
from mohawk.errors import UserError
from mohawk.loading.causal import check_causal
from mohawk.loading.configs import (
    gguf_options,
    load_config,
    load_error,
    locate,
    looks_local,
    option_of,
    released_in,
    said_of,
)
from mohawk.loading.tasks import CAUSAL, auto_class, check_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.loading.parts import Spread

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_teacher(
    model: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    device_map: str | None = None,
    spread: Spread | None = None,
    who: str = "teacher",
    task: str = CAUSAL,
    classes: Any = None,
) -> PreTrainedModel:
    """Load a causal language model, or one for another `task`, in eval mode with frozen parameters.

    model: a folder with config.json, a `.gguf` file, a folder plus `gguf_file`, or a hub id (`revision`).
    dtype: float32, bfloat16, float16, or auto (the checkpoint's own).
    quantize: int8 or int4, the weights in so many bits (bitsandbytes, or torchao where that is not installed).
    device_map: "auto" spreads the model over devices, memory and disk (accelerate); `device` is then not used.
    spread: brings the model into its parts on several processes, of which each reads its own, all but it where the
    files allow no other way; None: the model is whole.
    who: what messages call the model, such as `student.model`; empty: they begin with its name.
    task: causal_lm, masked_lm or classification. classes: of classification, a configuration whose classes the model
    is to tell; a head that its files do not hold for them is drawn by torch's random state.
    A GGUF checkpoint is dequantized, and the returned model can be saved like any other.
    Raises UserError with one line: missing folder, not a causal language model, unreachable hub, weights
    missing.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    from mohawk.loading.nonfinite import refuse_nonfinite
    from mohawk.loading.parts import read_in_parts
    from mohawk.models.families import needed_attention
    from mohawk.models.formats.released import load_released
    from mohawk.models.sharding import is_sharded

    if spread is not None and (quantize is not None or device_map is not None):
        given = f"quantize: got {quantize}" if quantize is not None else f"device_map: got {device_map}"
        raise UserError(
            f"{said_of(who)}{given}, which no model in parts can have; leave it out, or set sharding.kind: none"
        )
    if dtype not in DTYPES:
        raise UserError(f"{option_of(who, 'dtype')}: got {dtype!r}; allowed: {', '.join(DTYPES)}")
    config = load_config(
        model, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code, who=who, task=task
    )
    if classes is not None:
        with_classes(config, classes)
    if spread is not None and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{said_of(who)}{model} has packed weights, which cannot be in parts; give plain ones, or set "
            "sharding.kind: none"
        )
    name, gguf_file = locate(model, gguf_file, who)
    if gguf_file is None:
        _refuse_larger_than_its_files(config, Path(name), who)
    kind = None if dtype == "auto" else getattr(torch, dtype)
    released = task == CAUSAL and released_in(name, gguf_file, revision, who) is not None
    try:
        with hub_or_cache(name):
            teacher = None
            if spread is not None and not released:
                gguf_options(gguf_file, who)
                teacher = read_in_parts(
                    name, config, spread, device or "cpu", gguf_file=gguf_file, revision=revision, dtype=kind,
                    trust_remote_code=trust_remote_code,
                )  # fmt: skip
            if teacher is not None:
                info = {"missing_keys": ()}
            elif released:
                teacher, info = load_released(name, revision=revision, dtype=kind), {"missing_keys": ()}
            else:
                teacher, info = auto_class(task).from_pretrained(
                    name,
                    **({} if classes is None else {"config": config}),
                    revision=revision,
                    dtype=kind or "auto",
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    attn_implementation=needed_attention(config),
                    **({} if quantize is None else {"quantization_config": quantization(quantize, who)}),
                    **({} if device_map is None else {"device_map": device_map, "offload_folder": _offload_folder()}),
                    **gguf_options(gguf_file, who),
                )
            if (Path(name) / GENERATION_CONFIG_NAME).is_file():  # transformers takes one that it cannot read for none
                teacher.generation_config = GenerationConfig.from_pretrained(name)
    except Exception as error:
        raise load_error(error, name, revision, "weights", who, gguf_file) from error
    fresh = _fresh_head(teacher, info["missing_keys"]) if classes is not None else set()
    if missing := sorted(set(info["missing_keys"]) - fresh):
        raise UserError(
            f"{said_of(who)}{name} lacks {len(missing)} weights ({', '.join(missing[:3])}), they would be random; "
            "give a complete causal language model checkpoint"
        )
    saved = [a for a in config.architectures or () if a.endswith("ForConditionalGeneration")]
    if saved and type(teacher).__name__ not in saved:
        log.warning("%s was saved as %s: its text model alone is used, and is all that students keep", name, saved[0])
    if gguf_file is not None and not is_sharded(teacher):
        teacher = without_quantization(teacher)
    if spread is not None and not is_sharded(teacher):
        what = "its files can only be read whole; each process reads all of them before it keeps its part"
        log.warning("%s%s: %s", said_of(who), name, what)
        spread(teacher)
    refuse_nonfinite(teacher, f"{said_of(who)}{name}", "give a checkpoint whose weights are whole")
    teacher.eval().requires_grad_(False)
    if quantize == "int4":
        from mohawk.loading.lora import keep_unpacked

        keep_unpacked(teacher)
    placed = device is None or device_map is not None or quantize is not None
    # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
    teacher = teacher if placed else teacher.to(device)
    if task == CAUSAL:
        check_causal(teacher, who or "model")  # before anything is trained or written with it
    else:
        check_task(teacher, who or "model", task)
    return teacher


def with_classes(config: Any, like: Any) -> None:
    """Gives a configuration the classes of another."""
    config.num_labels = like.num_labels
    config.id2label, config.label2id = dict(like.id2label), dict(like.label2id)
    config.problem_type = like.problem_type


def _fresh_head(model: Any, missing: Any) -> set[str]:
    """Of the names of weights that a checkpoint does not hold, those of what reads classes off the body."""
    body = f"{model.base_model_prefix}."
    fresh = {name for name in missing if not name.startswith(body) or ".pooler." in name}
    if fresh:
        log.warning("%s: %d weights of its head for the classes are new: %s", type(model).__name__, len(fresh),
                    ", ".join(sorted(fresh)[:3]))  # fmt: skip
    return fresh


def _refuse_larger_than_its_files(config: Any, folder: Path, who: str) -> None:
    """UserError where the embedding or one layer's MLP that a configuration asks for takes more than all the files of
    its folder even in 4 bits a weight: it would be allocated before anything is compared."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None)
    for rows in ("vocab_size", "intermediate_size"):
        count = getattr(text, rows, None)
        columns = getattr(text, "word_embed_proj_dim", width) if rows == "vocab_size" else width
        if stored and isinstance(count, int) and isinstance(columns, int) and count * columns > 2 * stored:
            raise UserError(
                f"{said_of(who)}{folder / 'config.json'}: {rows} {count} and hidden_size {width} are of larger weights "
                f"than its files hold ({stored:,} bytes); give the config.json that belongs to them"
            )


def model_shape(
    config: Any, trust_remote_code: bool = False, who: str = "teacher", task: str = CAUSAL
) -> PreTrainedModel:
    """The causal language model of a configuration, or that for another `task`, on the meta device. Raises UserError
    where there is none."""
    import torch

    from mohawk.loading.configs import building
    from mohawk.models.families import needed_attention

    with torch.device("meta"), building(config, config.name_or_path, who):
        return auto_class(task).from_config(
            config, attn_implementation=needed_attention(config), trust_remote_code=trust_remote_code
        )


def quantization(quantize: str, who: str = "teacher") -> Any:
    """transformers' configuration for weights in few bits, of whichever package is installed. Raises UserError."""
    from importlib.util import find_spec

    if quantize not in ("int8", "int4"):
        raise UserError(f"{option_of(who, 'quantize')}: got {quantize!r}; allowed: int8, int4")
    if find_spec("bitsandbytes") is not None:
        from transformers import BitsAndBytesConfig

        if quantize == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        from mohawk.loading.lora import four_bit_config

        try:
            return four_bit_config()
        except ValueError as error:
            raise UserError(f"{option_of(who, 'quantize')}: {error}") from error
    if find_spec("torchao") is not None:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if quantize == "int8" else Int4WeightOnlyConfig())
    raise UserError(
        f"{option_of(who, 'quantize')}: {quantize} needs bitsandbytes or torchao; run: pip install bitsandbytes"
    )


def _offload_folder() -> str:
    """Where accelerate puts what fits into no device's memory."""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="mohawk-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_tokenizer(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    who: str = "teacher",
    option: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, or `tokenizer` (a folder or hub id) instead. who, option: what messages call the model,
    and what names a tokenizer. Raises UserError."""
    from transformers import AutoTokenizer

    if tokenizer is not None:
        # transformers would take a tokenizer.json anywhere; only a missing folder needs our own words
        path = home(str(tokenizer))
        name = str(path) if path.exists() else str(tokenizer)
        if not path.exists() and looks_local(name):
            raise UserError(
                f"{option or option_of(who, 'tokenizer')}: {name} does not exist (looked for {path.absolute()})"
            )
        gguf_file, revision = None, None
    else:
        name, gguf_file = locate(model, gguf_file, who)
    try:
        with hub_or_cache(name):
            # pyrefly: ignore[bad-return]  # None only where a class has no tokenizer, of which it raises
            return AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **gguf_options(gguf_file, who)
            )
    except Exception as error:
        raise load_error(error, name, revision, "tokenizer", who, gguf_file) from error


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same dequantized weights whose config knows of no quantization.

    transformers refuses to save a model that came from GGUF, though its weights are plain tensors by then.
    The new model takes over the old one's tensors; only buffers are made anew.
    """
    from mohawk.models.casting import cast

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = type(model)(config)
    cast(plain, model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of a model, tied ones once; of packed 4-bit weights as many as they stand for."""
    return sum(math.prod(getattr(getattr(p, "quant_state", None), "shape", p.shape)) for p in model.parameters())

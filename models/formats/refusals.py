"""What a student can be written as besides our own class, by its configuration: for plans and exports alike."""

from collections.abc import Callable

from mohawk.models.formats.bamba import why_not_bamba
from mohawk.models.formats.gguf import why_not_gguf
from mohawk.models.formats.granite import why_not_granite
from mohawk.models.formats.onnx import why_not_onnx
from mohawk.models.formats.qwen3_5 import why_not_qwen3_5
from mohawk.models.hybrid_config import HybridConfig

# by the name of `mohawk export --to`: (config, pad_expand) -> why not, in one line; None where it can be
WHY_NOT: dict[str, Callable[[HybridConfig, bool], str | None]] = {
    "bamba": lambda config, pad_expand: why_not_bamba(config, pad_expand=pad_expand),
    "granite": lambda config, pad_expand: why_not_granite(config, pad_expand=pad_expand),
    "qwen3_5": lambda config, pad_expand: why_not_qwen3_5(config),
    "gguf": lambda config, pad_expand: why_not_gguf(config),
    "onnx": lambda config, pad_expand: why_not_onnx(config),
}

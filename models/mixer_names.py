"""The mixers that a student can have, each with what it is: read without torch, for recipes. Their classes are in
mixers.py, under the same names."""

import re
from typing import Any

MIXER_NAMES = {
    "mamba2": "Bamba's, for stock transformers",
    "discrete_mamba2": "the MOHAWK paper's",
    "gated_delta": "Qwen3.5's Gated DeltaNet",
    "kimi_delta": "Kimi Linear's Kimi Delta Attention",
}


def is_layer(key: Any) -> bool:
    """Whether a key of a mapping from layers to mixers is a layer's index: a number, or one as JSON writes it."""
    return not isinstance(key, bool) and re.fullmatch("0|[1-9][0-9]*", str(key)) is not None

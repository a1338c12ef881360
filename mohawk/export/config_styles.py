"""config.json in the styles that runtimes read it in, beside that of the transformers that wrote it.

Others read older names, and put defaults of their own where they find none: SGLang's Granite takes a rope_theta that
only stands in rope_parameters for 10,000, and its Qwen3.5 turns a quarter of each head unless partial_rotary_factor
stands outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Style = Callable[[dict[str, Any]], None]

IN_ROPE = ("rope_theta", "partial_rotary_factor")  # stand beside rope_scaling in the older style, not in it


def restyle(folder: Path, *styles: Style) -> None:
    """Changes a written config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for style in styles:
        style(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def both_ropes(config: dict[str, Any]) -> None:
    """rope_theta and rope_scaling beside rope_parameters, which transformers 5 reads."""
    rope = config["rope_parameters"]
    config |= {name: rope[name] for name in IN_ROPE if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in IN_ROPE}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling


def no_infinity(config: dict[str, Any]) -> None:
    """Takes out the limits of dt: infinity is no number in JSON, each release writes it in another way, and other
    readers fail on it; without it they all take the default, which is no limit."""
    config.pop("time_step_limit", None)


def older_kinds(config: dict[str, Any]) -> None:
    """Layers are called mamba and attention, as Granite's checkpoints call them; transformers since 5.15 reads both."""
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layer_types"] = [kinds[kind] for kind in config["layer_types"]]


def float32(config: dict[str, Any]) -> None:
    """Loaded in float32 where nobody asks for another dtype, as norms are that another one would round."""
    config["dtype"] = "float32"

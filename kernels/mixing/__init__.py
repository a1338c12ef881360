"""Mixing matrices of attention, of state-space layers and of delta rules, and their distances.

The names are imported when first used: what knows the metrics alone (metrics.py) needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mohawk.kernels.mixing.interface import head_mean_distance, mixing_distance, mixing_matrix
    from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing

_PUBLIC = {
    "AttentionMixing": "operands",
    "DeltaMixing": "operands",
    "Mixing": "operands",
    "SSDMixing": "operands",
    "head_mean_distance": "interface",
    "mixing_distance": "interface",
    "mixing_matrix": "interface",
}
__all__ = [
    "AttentionMixing",
    "DeltaMixing",
    "Mixing",
    "SSDMixing",
    "head_mean_distance",
    "mixing_distance",
    "mixing_matrix",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)

"""Mixing matrices of attention, of state-space layers and of delta rules, and their distances.

The names are imported when first used: what knows the metrics alone (metrics.py) needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mohawk.kernels.mixing.definition import AttentionMixing, DeltaMixing, Mixing, SSDMixing
    from mohawk.kernels.mixing.distance import mixing_distance
    from mohawk.kernels.mixing.matrix import mixing_matrix
    from mohawk.kernels.mixing.mean_heads import head_mean_distance

_PUBLIC = {
    "AttentionMixing": "definition",
    "DeltaMixing": "definition",
    "Mixing": "definition",
    "SSDMixing": "definition",
    "head_mean_distance": "mean_heads",
    "mixing_distance": "distance",
    "mixing_matrix": "matrix",
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

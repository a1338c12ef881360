"""Distillation losses: `kd_loss`, `linear_kd_loss`, and what they can compare a student with.

The names are imported when first used: what knows the divergences alone (divergences.py) needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mohawk.kernels.kd.interface import (
        KDParts,
        TAIDSchedule,
        TeacherHidden,
        TeacherLogits,
        TeacherMixture,
        TeacherSamples,
        TeacherTAID,
        TeacherTopK,
        kd_loss,
        linear_kd_loss,
    )

__all__ = [
    "KDParts",
    "TAIDSchedule",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherSamples",
    "TeacherTAID",
    "TeacherTopK",
    "kd_loss",
    "linear_kd_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mohawk.kernels.kd.interface"), name)

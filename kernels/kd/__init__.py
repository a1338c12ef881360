"""Distillation losses: `kd_loss`, `linear_kd_loss`, and what they can compare a student with."""

from mohawk.kernels.kd.loss import (
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

"""Mixing matrices of attention and of state-space layers, and their distances."""

from mohawk.kernels.mixing.definition import AttentionMixing, Mixing, SSDMixing
from mohawk.kernels.mixing.distance import mixing_distance
from mohawk.kernels.mixing.matrix import mixing_matrix
from mohawk.kernels.mixing.mean_heads import head_mean_distance

__all__ = ["AttentionMixing", "Mixing", "SSDMixing", "head_mean_distance", "mixing_distance", "mixing_matrix"]

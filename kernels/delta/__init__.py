"""The gated delta rule over a sequence, and a single step of it."""

from mohawk.kernels.delta.interface import gated_delta_rule, gated_delta_step

__all__ = ["gated_delta_rule", "gated_delta_step"]

"""The state-space scan of Mamba-2, and a single step of it."""

from mohawk.kernels.ssd.interface import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]

"""A short depthwise causal convolution over the sequence, and a single step of it."""

from mohawk.kernels.causal_conv1d.interface import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]

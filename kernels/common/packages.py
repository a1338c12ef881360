"""Packages of GPU kernels that are used where they are installed: whether they can be, found out once."""

import functools
import importlib
import importlib.util
import os
import warnings

import torch
from torch import Tensor


@functools.cache
def why_not(module: str) -> str | None:
    """None where `module` can be imported, else the reason in words. Imports it, the first time it is asked.

    A package that is there need not work: its compiled part may be missing, or made for another torch.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # of any kind, from someone else's build; whoever asks is told
        text = " ".join(str(error).split())
        return f"{package} is installed but cannot be imported ({type(error).__name__}: {text})"
    return None


@functools.cache
def usable(module: str) -> bool:
    """Whether `module` can be imported. Warns, once, where its package is installed for nothing."""
    reason = why_not(module)
    if reason is not None and importlib.util.find_spec(module.partition(".")[0]) is not None:
        warnings.warn(
            f"{reason}; mohawk goes on without it, which may be slower on a GPU", RuntimeWarning, stacklevel=2
        )
    return reason is None


def no_triton(x: Tensor, module: str) -> str | None:
    """Why our Triton kernels in `module` cannot take tensors like x, in words; None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not interpreted:
        return f"x is on {x.device}; it needs a CUDA or ROCm device"
    if x.dtype == torch.float64:
        return "it computes in float32 and x is float64"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or above"
    return why_not("triton") or why_not(module)

"""Which dtype a recipe's `precision` means on a device, and how much memory that has."""

import os

import torch

from mohawk.core.processes import several
from mohawk.errors import UserError

MOST = 0.7  # of a process's memory that whole models may take beside what they are asked for


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to: torch.bfloat16, or None for plain float32.

    `auto` is bfloat16 where the device multiplies in it faster than in float32.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision: got {precision}; allowed are auto, float32, bfloat16")
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` has units for bfloat16 products; elsewhere they are emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, unit)() for unit in units if hasattr(torch.cpu, unit))
    return False


def pick_device(name: str) -> torch.device:
    """The recipe's device; "auto" is CUDA where torch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got cuda, but torch sees no CUDA device here; use auto or cpu")
    if name == "cuda" and several():
        return torch.device(name, torch.cuda.current_device())  # this process's own
    return torch.device(name)


def device_bytes(device: torch.device) -> int:
    """The memory that one process has: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return 2**63
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

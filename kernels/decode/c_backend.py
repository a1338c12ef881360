"""Decoding steps as one call of C each, for float32 on a CPU with a compiler of C.

A step is a dozen small operations on little data, so what it takes in torch is mostly their number. The source is
compiled when a step is first made, for the machine it is made on; nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mohawk.kernels.decode.c_source import SOURCE

BACKEND = "c"
# Elements of all states from which torch's threads are worth more than few operations.
MOST = 1 << 19
FLAGS = ("-std=c99", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")


class _Failed(Exception):
    pass


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled steps, or why there are none. Compiles the first time it is asked."""
    if platform.system() == "Windows":
        return "it is made with a Unix compiler"
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang)"
    try:
        with tempfile.TemporaryDirectory(prefix="mohawk-decode-") as folder:
            return _declared(ctypes.CDLL(str(_built(compiler, Path(folder)))))
    except (_Failed, OSError, subprocess.SubprocessError) as error:
        return f"{compiler} made none ({' '.join(str(error).split())[-200:]})"


def _built(compiler: str, folder: Path) -> Path:
    source, target = folder / "step.c", folder / "step.so"
    source.write_text(SOURCE, encoding="utf-8")
    for machine in (("-march=native",), ()):  # not every compiler knows its machine
        command = [compiler, *FLAGS, *machine, str(source), "-o", str(target), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return target
    raise _Failed(done.stderr)


def _declared(made: ctypes.CDLL) -> ctypes.CDLL:
    made.ssd_step.argtypes = [c_void_p] * 14 + [c_long] * 10 + [c_int, c_float]
    made.delta_step.argtypes = [c_void_p] * 13 + [c_long] * 11 + [c_int, c_int, c_float]
    return made


def no_c(window: Tensor, state: Tensor, kinds: set[tuple[torch.dtype, torch.device]]) -> str | None:
    """Why tensors of these dtypes on these devices are not for C, in words; None where they are."""
    if not state.is_cpu:
        return f"state is on {state.device}; it needs a CPU"
    if len(kinds) > 1 or state.dtype != torch.float32:
        return f"it computes in float32 and tensors are {', '.join(sorted(str(dtype) for dtype, _ in kinds))}"
    _, channels, kernel = window.shape
    usual = window.stride() == (channels * kernel, 1, channels)
    if not (usual or window.mT.is_contiguous()) or not state.is_contiguous():  # one row or tap has any stride
        return "the window's memory is not (batch, kernel, channels), or the state's is not contiguous"
    if type(state) is not Tensor or type(window) is not Tensor:
        return f"state is a {type(state).__name__}; it must be a plain tensor"
    made = library()
    return made if isinstance(made, str) else None


def ssd_decode_c(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    D: Tensor | None,
    gate_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    real: Tensor | None,
) -> Tensor:
    """As `ssd_decode_reference`, for what `no_c` has nothing against."""
    batch, heads, head_dim, state_size = state.shape
    channels = inputs.shape[1]
    groups = (channels - heads * head_dim) // (2 * state_size)
    inputs, gate, decay = _rows(inputs), _rows(gate), _rows(decay)
    fixed = [_plain(x) for x in (weight, bias, A_log, dt_bias, D, gate_bias, norm_weight, real)]
    out = state.new_empty(gate.shape)
    failed = _call("ssd_step")(
        window.data_ptr(), state.data_ptr(), inputs.data_ptr(), gate.data_ptr(), decay.data_ptr(),
        *map(_at, fixed), out.data_ptr(), batch, channels, weight.shape[1], heads, head_dim, state_size, groups,
        inputs.stride(0), gate.stride(0), decay.stride(0), silu, norm_eps,
    )  # fmt: skip
    if failed:
        raise MemoryError("ssd_decode_step: no memory for what is convolved")
    return out


def delta_decode_c(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    beta: Tensor,
    decay: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    norm_eps: float,
    sigmoid: bool,
    real: Tensor | None,
) -> Tensor:
    """As `delta_decode_reference`, for what `no_c` has nothing against."""
    batch, heads, key_dim, value_dim = state.shape
    channels = inputs.shape[1]
    groups = (channels - heads * value_dim) // (2 * key_dim)
    by_channel = decay.dim() == 3
    inputs, gate, beta, decay = _rows(inputs), _rows(gate), _rows(beta), _rows(decay.flatten(1))
    fixed = [_plain(x) for x in (weight, bias, A_log, dt_bias, norm_weight, real)]
    out = state.new_empty(gate.shape)
    failed = _call("delta_step")(
        window.data_ptr(), state.data_ptr(), inputs.data_ptr(), gate.data_ptr(), beta.data_ptr(), decay.data_ptr(),
        *map(_at, fixed), out.data_ptr(), batch, channels, weight.shape[1], heads, key_dim, value_dim, groups,
        inputs.stride(0), gate.stride(0), beta.stride(0), decay.stride(0), by_channel, sigmoid, norm_eps,
    )  # fmt: skip
    if failed:
        raise MemoryError("delta_decode_step: no memory for what is convolved")
    return out


@functools.cache
def _call(name: str) -> Callable[..., int]:
    made = library()
    assert not isinstance(made, str)
    return getattr(made, name)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _plain(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

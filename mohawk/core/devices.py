"""The devices and package versions of this machine, as reports and `mohawk doctor` name them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

# Where the import name differs
MODULES = {"lm-eval": "lm_eval", "mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d", "fla-core": "fla"}
# Those that timings depend on.
PACKAGES = ("torch", "transformers", "triton", "datasets", "accelerate")


def version(package: str) -> str | None:
    """Installed version of a package, "present" where it has none, None where it is missing."""
    try:
        if importlib.util.find_spec(MODULES.get(package, package)) is None:
            return None
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def device_rows() -> list[tuple[str, str]]:
    """(device, what is to be known about it)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("cpu", f"{_cpu_model()}; {cores} of {os.cpu_count()} cores usable")]
    try:
        import torch
    except ImportError as error:
        return [*rows, ("torch", f"cannot be imported: {error_line(error)}")]

    from mohawk.core.precision import has_fast_bfloat16

    threads = f"{torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    if has_fast_bfloat16(torch.device("cpu")):
        rows.append(("cpu", f"{threads}, bfloat16 units: `precision: auto` is bfloat16"))
    else:
        rows.append(("cpu", f"{threads}, no bfloat16 units: `precision: auto` is float32"))
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        name = f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute {of.major}.{of.minor}, {kind}"
        rows.append((f"cuda:{index}", name))
    if torch.cuda.device_count() == 0:
        rows.append(("gpu", why_no_gpu()))
    return rows


def machine(device: Any) -> dict[str, Any]:
    """Versions and devices: what a reader needs to know what the timings are timings of."""
    from mohawk import __version__

    versions = {"mohawk": __version__, "python": platform.python_version()}
    versions |= {package: found for package in PACKAGES if (found := version(package))}
    devices = [f"{name}: {about}" for name, about in device_rows()]
    return {"versions": versions, "device": str(device), "devices": devices, "system": platform.platform()}


def why_no_gpu() -> str:
    """One sentence on why torch sees no GPU, with what to do where there is one."""
    import torch

    built = torch.version.cuda or torch.version.hip
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        return f"an NVIDIA driver is here, but torch {torch.__version__} is built without CUDA: reinstall torch"
    if built:
        return f"none found (torch {torch.__version__} could use one)"
    return f"none (torch {torch.__version__} is a CPU build)"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()  # not Linux
    return platform.machine()


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

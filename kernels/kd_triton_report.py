"""`python -m mohawk.kernels.kd_triton_report`: compile the Triton kernels of the distillation losses for GPUs
that need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles one divergence of each kind, from bfloat16.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mohawk.kernels import kd_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
QUICK = ("reverse_kl", "jsd", "cosine")
LOGITS = {"bf16": "*bf16", "fp32": "*fp32"}


class Usage(NamedTuple):
    """What one compiled kernel takes of a GPU; spilled counts bytes per thread (registers on AMD)."""

    target: str
    kernel: str
    divergence: str
    logits: str
    registers: int
    spilled: int
    shared: int


def _nvidia(cubin: bytes) -> tuple[int, int, int]:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {out!r}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def _amd(assembly: str) -> tuple[int, int, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    registers = field("vgpr_count")
    return registers, field("vgpr_spill_count") + field("sgpr_spill_count"), field("group_segment_fixed_size")


def compile_one(kernel: str, divergence: str, logits: str, target: str) -> Usage:
    """Compile with everything that costs registers turned on: cross-entropy, temperature, TAID, row
    indices."""
    function = getattr(kd_triton, kernel)
    constants = {
        "DIVERGENCE": divergence,
        "IN_SWEEP": divergence in ("forward_kl", "reverse_kl", "mse", "cosine"),
        "CE": True,
        "TEMPERED": True,
        "TAID": divergence not in ("mse", "cosine", "none"),
        "HAS_ROWS": True,
        "BLOCK": kd_triton.BLOCK,
    }
    types = {"rows_ptr": "*i64", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("z_ptr", "t_ptr", "grad_ptr"), LOGITS[logits])
    types |= dict.fromkeys(("vocab", "vocab_all", "n", "z_stride", "t_stride", "grad_stride"), "i32")
    types |= dict.fromkeys(("z_scale", "t_scale", "taid", "beta", "lam"), "fp32")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[name]
            continue
        signature[name] = types.get(name, "*fp32")
        if name.endswith(("_ptr", "_stride")):  # what a launch with aligned rows specialises on
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": kd_triton.WARPS})
    nvidia = target.startswith("sm")
    registers, spilled, shared = _nvidia(compiled.asm["cubin"]) if nvidia else _amd(compiled.asm["amdgcn"])
    return Usage(target, kernel.strip("_"), divergence, logits, registers, spilled, shared)


def cases(quick: bool = False) -> list[tuple[str, str, str]]:
    """(kernel, divergence, dtype of the logits) that a loss can launch."""
    names = QUICK if quick else tuple(kd_triton.DIVERGENCES)
    every = [(k, d) for d in names for k in ("_statistics", "_sums", "_gradient")]
    every += [("_statistics", "none"), ("_gradient", "none")]
    return [(k, d, x) for k, d in every for x in LOGITS if not quick or x == "bf16"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mohawk.kernels.kd_triton_report", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, blocks of {kd_triton.BLOCK}, {kd_triton.WARPS} warps")
    print(
        "| target | kernel | divergence | logits | registers | spilled | shared bytes |\n|---|---|---|---|---|---|---|"
    )
    spilled = 0
    for target in options.target or TARGETS:
        for case in cases(options.quick):
            usage = compile_one(*case, target)
            spilled += usage.spilled > 0
            print("| " + " | ".join(map(str, usage)) + " |", flush=True)
    print(f"{spilled} kernels spill" if spilled else "nothing spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compile Triton kernels for GPUs that need not be there, and read off what each takes of one."""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may have of shared memory, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


class Usage(NamedTuple):
    """Registers of a thread, the bytes it spills to memory, and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def specialized(function, types: dict, constants: dict) -> tuple[dict, dict, dict]:
    """signature, constants and attributes that a launch compiles a kernel with. types: of each argument that is none of
    the constants: of tensors and floating-point numbers Triton's type, of whole numbers one that is passed; for a named
    tuple such a tuple; None is a constant anywhere.

    Tensors are taken for aligned, as torch makes them. A whole number that is a multiple of 16 tells the compiler so,
    and 1 is a constant, unless the kernel says not to look at it.
    """
    signature, constexprs, attributes = {}, {}, {}

    def classify(kind: Any, place: tuple[int, ...], looked_at: bool):
        if isinstance(kind, tuple):
            parts = (classify(one, (*place, i), looked_at) for i, one in enumerate(kind))
            return type(kind)(*parts)
        if kind is None or looked_at and kind == 1:
            constexprs[place] = kind
            return "constexpr"
        whole = isinstance(kind, int)
        if whole and looked_at and kind % 16 == 0 or not whole and kind.startswith("*"):
            attributes[place] = [["tt.divisibility", 16]]
        return kind if not whole else "i32" if kind < 1 << 31 else "i64"

    for index, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = classify(types[name], (index,), not parameter.do_not_specialize)
    return signature, constexprs, attributes


def compile_for(target: str, function, types: dict, constants: dict, options: dict[str, int]) -> Usage:
    """Compile one kernel as a launch would, with `types` as in `specialized`."""
    signature, constexprs, attributes = specialized(function, types, constants)
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("sm"):
        registers, spilled = _nvidia(compiled.asm["cubin"])
    else:
        registers, spilled = _amd(compiled.asm["amdgcn"])
    return Usage(registers, spilled, compiled.metadata.shared)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {out!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no {name}")
        return int(found.group(1))

    return field("vgpr_count"), field("private_segment_fixed_size")


def main(
    module: str,
    doc: str,
    title: str,
    columns: tuple[str, ...],
    cases: Callable[[bool], Iterable[tuple]],
    compile_one: Callable[..., Usage],
) -> int:
    """The command line of a report: compile_one(target, *case) for every case, as a table. Returns 1 if anything
    spills or takes more shared memory than there is."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, {title}")
    names = ("target", *columns, "registers", "spilled", "shared bytes")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    spilled = large = 0
    for target in options.target or TARGETS:
        for case in cases(options.quick):
            usage = compile_one(target, *case)
            spilled += usage.spilled > 0
            large += usage.shared > SHARED[target]
            print("| " + " | ".join(map(str, (target, *case, *usage))) + " |", flush=True)
    if large:
        print(f"{large} kernels take more shared memory than there is")
    print(f"{spilled} kernels spill" if spilled else "nothing spills")
    return 1 if spilled or large else 0

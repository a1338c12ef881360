"""Compile Triton kernels for GPUs that need not be there, read off what each takes of one and what it does, and hold
that to bounds."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mohawk.kernels.common import machine_code
from mohawk.kernels.common.machine_code import Work

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may have of shared memory, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# What a multiprocessor, or a compute unit, has of it for all programs; and on NVIDIA's what a program costs beside.
SHARED_OF_ALL = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
RESERVED = 1 << 10

# How far a count may lie above its bound: the next compiler puts this or that otherwise.
MARGIN = 1.05
# Of these counts fewer is worse.
AT_LEAST = ("tensor", "resident")


class Usage(NamedTuple):
    """Registers of a thread, the bytes it spills to memory, and bytes of shared memory of a program; how many programs
    a multiprocessor holds at once; and the work, per entry of what the kernel sweeps if that is known."""

    registers: int
    spilled: int
    shared: int
    resident: int
    work: Work

    def numbers(self) -> dict[str, float]:
        own = self._asdict()
        return {**{name: number for name, number in own.items() if name != "work"}, **self.work._asdict()}


def resident(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor (AMD: a compute unit) holds at once: 65,536 registers, handed out to warps 256
    at a time, and 64 warps; on AMD four units of 512 registers a lane, handed out 8 at a time, and 8 waves."""
    registers = max(8, -(-registers // 8) * 8)
    if target.startswith("gfx"):
        by_registers = 4 * min(8, 512 // registers) // warps
        by_shared = SHARED_OF_ALL[target] // max(1, shared)
    else:
        by_registers = min(65536 // (registers * 32) // warps, 64 // warps)
        by_shared = SHARED_OF_ALL[target] // (shared + RESERVED)
    return min(32, by_registers, by_shared)


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


def compile_for(
    target: str,
    function,
    types: dict,
    constants: dict,
    options: dict[str, Any],
    entries: int | None = None,
    whole: bool = False,
) -> Usage:
    """Compile one kernel as a launch would, with `types` as in `specialized`. entries: of what a program sweeps in one
    round of its main loop, by which its work is divided. whole: no loop is the main one; see `machine_code.work`."""
    signature, constexprs, attributes = specialized(function, types, constants)
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    nvidia = target.startswith("sm")
    if nvidia:
        registers, spilled = _nvidia(compiled.asm["cubin"])
        text = machine_code.disassembled(compiled.asm["cubin"])
    else:
        registers, spilled = _amd(compiled.asm["amdgcn"])
        text = compiled.asm["amdgcn"]
    done = machine_code.work(text, nvidia, whole)
    if entries is not None:
        done = done.per(entries / (compiled.metadata.num_warps * TARGETS[target].warp_size))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Usage(registers, spilled, shared, resident(target, registers, shared, warps), done)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = machine_code.run_tool("cuobjdump", "-res-usage", file.name)
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
    spills, takes more shared memory than there is or is beyond a bound."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--bounds", type=pathlib.Path, metavar="FILE", help="hold the counts to those in a JSON file")
    record = "loosen the bounds in the file to what is counted; for new ones, delete it first"
    parser.add_argument("--record", action="store_true", help=record)
    options = parser.parse_args()
    print(f"triton {triton.__version__}, {title}")
    names = ("target", *columns, "registers", "spilled", "shared bytes", "resident", *Work._fields)
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    spilled, large, counted = 0, 0, {}
    for target in options.target or TARGETS:
        for case in cases(options.quick):
            usage = compile_one(target, *case)
            spilled += usage.spilled > 0
            large += usage.shared > SHARED[target]
            name = " | ".join(map(str, (target, *case)))
            counted[name] = usage.numbers()
            print(f"| {name} | " + " | ".join(f"{number:g}" for number in counted[name].values()) + " |", flush=True)
    beyond = _beyond(options.bounds, counted, options.record) if options.bounds else []
    for line in beyond:
        print(line)
    if large:
        print(f"{large} kernels take more shared memory than there is")
    print(f"{spilled} kernels spill" if spilled else "nothing spills")
    return 1 if spilled or large or beyond else 0


def _beyond(path: pathlib.Path, counted: dict[str, dict[str, float]], record: bool) -> list[str]:
    """A line for every count beyond its bound, or without one. A file's first entry names the versions of triton that
    its bounds are of; another compiler's counts are not held to them."""
    version = ".".join(triton.__version__.split(".")[:2])
    bounds = json.loads(path.read_text("utf-8")) if path.exists() else {}
    versions = bounds.pop("triton", [])
    if record:
        for name, numbers in counted.items():
            old = bounds.get(name, {})
            worse = {kind: (min if kind in AT_LEAST else max)(x, old.get(kind, x)) for kind, x in numbers.items()}
            bounds[name] = worse
        rows = {"triton": sorted({*versions, version}), **dict(sorted(bounds.items()))}
        lines = (f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in rows.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
        return []
    if version not in versions:
        print(f"{path} has no bounds of triton {version}: nothing is held to them")
        return []
    lines = []
    for name, numbers in counted.items():
        for kind, number in numbers.items():
            bound = bounds.get(name, {}).get(kind)
            if bound is None:
                lines.append(f"{name}: no bound of {kind}")
            elif kind in AT_LEAST and number < bound / MARGIN or kind not in AT_LEAST and number > bound * MARGIN:
                lines.append(f"{name}: {kind} {number:g}, bound {bound:g}")
    return lines

"""What a GPU executes of a compiled kernel, read off its machine code: a kernel that gets slower shows without a GPU.

A floor is a matter of counting: bytes that go through memory, instructions that each multiprocessor issues at most four
of a cycle, and exponentials and the like, of which it makes sixteen numbers a cycle.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton


class Work(NamedTuple):
    """What one thread does in one round of a kernel's main loop, or in all of a kernel that has no loop. Loops inside
    of that one count once. Where a compiler makes one round of several, as it does of short ones, all are counted: the
    bytes tell."""

    instructions: float
    special: float  # exponentials, logarithms, reciprocals, roots
    loaded: float  # bytes from global memory
    narrow: float  # those of them in loads of less than 128 bits
    stored: float  # bytes to global memory
    tensor: float  # instructions of tensor cores
    barriers: float  # waits for the other threads of the program

    def per(self, entries: float) -> Work:
        return Work(*(round(number / entries, 3) for number in self))


NVIDIA = {
    "special": r"MUFU",
    "tensor": r"[A-Z]*MMA(?!\w)",
    "barriers": r"BAR\.",
    "loaded": r"LDG(STS)?\.",
    "stored": r"STG\.",
}
AMD = {
    "special": r"v_(exp|log|rcp|rsq|sqrt)_",
    "tensor": r"v_mfma",
    "barriers": r"s_barrier",
    "loaded": r"(global|buffer|flat)_load_",
    "stored": r"(global|buffer|flat)_store_",
}
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "byte": 1}


def disassembled(cubin: bytes) -> str:
    """NVIDIA's machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run_tool("nvdisasm", "-c", file.name)


def run_tool(name: str, *arguments: str) -> str:
    """What one of the tools prints that Triton brings."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def work(text: str, nvidia: bool) -> Work:
    """The work of a kernel's first outermost loop, which is the main one as these kernels are written, from nvdisasm's
    text or LLVM's assembly."""
    instructions, labels = _parsed(text, nvidia)
    loops = []
    for end, (_, line) in enumerate(instructions):
        target = re.search(r"BRA.*(\.L_x_\d+)" if nvidia else r"s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        # A branch to itself is what fills the end of a kernel.
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end))
    outermost = [one for one in loops if not any(a <= one[0] and one[1] <= b and (a, b) != one for a, b in loops)]
    if outermost:
        start, end = min(outermost)
        instructions = instructions[start : end + 1]
    table = NVIDIA if nvidia else AMD
    counts = dict.fromkeys(Work._fields, 0)
    for name, _ in instructions:
        counts["instructions"] += 1
        for kind, pattern in table.items():
            if re.match(pattern, name):
                size = _size(name, nvidia) if kind in ("loaded", "stored") else 1
                counts[kind] += size
                counts["narrow"] += size if kind == "loaded" and size < 16 else 0
    return Work(**counts)


def _parsed(text: str, nvidia: bool) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(name, line) of each instruction, and where labels point among them."""
    instructions: list[tuple[str, str]] = []
    labels = {}
    for line in text.splitlines():
        line = line.strip()
        if label := re.match(r"(\.L_x_\d+|\.LBB\d+_\d+):", line):
            labels[label[1]] = len(instructions)
        elif nvidia and (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line)):
            if found[1] != "NOP":
                instructions.append((found[1], found[1] + found[2]))
        elif not nvidia and (found := re.match(r"([vs]_|ds_|global_|buffer_|flat_)\w+", line)):
            instructions.append((found[0], line))
    return instructions, labels


def _size(name: str, nvidia: bool) -> int:
    """Bytes that an instruction moves for a thread."""
    if nvidia:
        parts = name.split(".")
        wide = [int(part) // 8 for part in parts if part in ("64", "128", "256")]
        return wide[-1] if wide else 1 if {"U8", "S8"} & {*parts} else 2 if {"U16", "S16"} & {*parts} else 4
    return next((size for kind, size in AMD_BYTES.items() if kind in name), 2)

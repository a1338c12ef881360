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
    """What one thread does in one round of a kernel's main loop, or in all of a kernel that has no main one. Loops
    inside of that one count once. Where a compiler makes one round of several, as it does of short ones, all are
    counted: the bytes tell."""

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


class Instruction(NamedTuple):
    name: str
    target: str | None  # the label that a branch leads to
    ends: bool  # whether what stands behind it never comes next


def work(text: str, nvidia: bool, whole: bool = False) -> Work:
    """The work of a kernel's first outermost loop, which is the main one as these kernels are written, from nvdisasm's
    text or LLVM's assembly. whole: of all of the kernel, each loop once, where no loop is the main one."""
    instructions, labels = _parsed(text, nvidia)
    table = NVIDIA if nvidia else AMD
    moving = re.compile("|".join(table[kind] for kind in ("loaded", "stored", "tensor")))
    if not whole:
        for loop in _loops(instructions, labels):
            if any(moving.match(one.name) for one in loop):  # else it waits for a tensor core or a copy
                instructions = loop
                break
    counts = dict.fromkeys(Work._fields, 0)
    for name, _, _ in instructions:
        counts["instructions"] += 1
        for kind, pattern in table.items():
            if re.match(pattern, name):
                size = _size(name, nvidia) if kind in ("loaded", "stored") else 1
                counts[kind] += size
                counts["narrow"] += size if kind == "loaded" and size < 16 else 0
    return Work(**counts)


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The outermost loops, in the order of their beginnings: the instructions that lead to each other and back. They
    need not stand together, since compilers move what is seldom run behind everything else."""
    cuts = {0, *labels.values(), *(place + 1 for place, one in enumerate(instructions) if one.target or one.ends)}
    begins = sorted(cut for cut in cuts if cut < len(instructions))
    blocks = [instructions[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    number = {begin: index for index, begin in enumerate(begins)}
    after: list[set[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1]
        place = labels.get(last.target) if last.target else None
        leads = {number[place]} if place in number else set()
        after.append(leads | ({index + 1} if not last.ends and index + 1 < len(blocks) else set()))

    def reached(index: int) -> set[int]:
        found: set[int] = set()
        waiting = [index]
        while waiting:
            new = after[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = [reached(index) for index in range(len(blocks))]
    loops = {tuple(other for other in sorted(reach[index]) if index in reach[other]) for index in range(len(blocks))}
    return [[one for index in loop for one in blocks[index]] for loop in sorted(loops) if loop]


def _parsed(text: str, nvidia: bool) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and where labels point among them."""
    instructions: list[Instruction] = []
    labels = {}
    for line in text.splitlines():
        line = line.strip()
        if label := re.match(r"(\.L_x_\d+|\.LBB\d+_\d+):", line):
            labels[label[1]] = len(instructions)
        elif nvidia and (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line)):
            condition, name, operands = found.groups()
            branch = re.match(r"BRA", name) and re.search(r"^(.*)`\((\.L_x_\d+)\)", operands)
            always = bool(branch and not branch[1].strip()) or name in ("EXIT", "RET") or name.startswith("RET.")
            if name != "NOP":
                instructions.append(Instruction(name, branch[2] if branch else None, always and condition is None))
        elif not nvidia and (found := re.match(r"([vs]_|ds_|global_|buffer_|flat_)\w+", line)):
            branch = re.match(r"s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
            always = found[0] in ("s_branch", "s_endpgm")
            instructions.append(Instruction(found[0], branch[1] if branch else None, always))
    return instructions, labels


def _size(name: str, nvidia: bool) -> int:
    """Bytes that an instruction moves for a thread."""
    if nvidia:
        parts = name.split(".")
        wide = [int(part) // 8 for part in parts if part in ("64", "128", "256")]
        return wide[-1] if wide else 1 if {"U8", "S8"} & {*parts} else 2 if {"U16", "S16"} & {*parts} else 4
    return next((size for kind, size in AMD_BYTES.items() if kind in name), 2)

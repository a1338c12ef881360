"""`python -m mohawk.kernels.ssd.triton_report`: compile the Triton kernels of the state-space scan for GPUs that need
not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills or takes more shared memory than there is. `--quick` compiles the kernels of one layer's
forward and backward in float32 and bfloat16, with everything that costs registers turned on. What is counted is of one
token of one channel, each loop once: over tiles of channels and states, and in `pairs` over heads.
"""

from __future__ import annotations

from typing import Any

from mohawk.kernels.common import triton_report
from mohawk.kernels.ssd import triton_backend, triton_kernels
from mohawk.kernels.ssd.triton_kernels import Operand

MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": 0}
HEADS, GROUPS = 32, 8
KERNELS = ("states", "states back", "passing", "scan", "inputs", "pairs")


def _operand(dtype: str, heads: int, width: int = 1) -> Operand:
    return Operand(f"*{dtype}", 2048 * heads * width, heads * width, width)


def launched(kernel: str, dtype: str, width: int, packed: bool, tiles: dict) -> tuple:
    """A kernel, and what it is launched with (see `specialized`) where head_dim and state_size are `width`."""
    function = getattr(triton_kernels, f"{kernel.split()[0]}_kernel")
    x, group = _operand(dtype, HEADS, width), _operand(dtype, GROUPS, width)
    gate = _operand("fp32", HEADS)
    types: dict[str, Any] = {"x": x, "dy": x, "B": group, "C": group, "values": x, "keys": group}
    types |= {"log_decay": gate, "scale": gate}
    types |= {"segments": Operand("*i64", 2048, 1, 0) if packed else Operand(None, 0, 0, 0)}
    types |= dict.fromkeys(("states", "across", "outer", "carried", "entering", "leaving", "D"), "*fp32")
    types |= dict.fromkeys(("d_decay", "d_scale", "d_D"), "*fp32") | dict.fromkeys(("y", "dx", "dB", "dC"), f"*{dtype}")
    types |= {"seq": 2048, "heads": HEADS, "chunks": 32, "parts": GROUPS, "head_dim": width, "state_size": width}
    types |= dict.fromkeys(("per_group", "per_group_B", "per_group_C"), HEADS // GROUPS) | {"size": width * width}
    constants = {**tiles, "TO_END": kernel == "states", "REVERSE": False}
    if kernel == "passing":
        constants |= triton_backend.PASSING
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return function, {name: types[name] for name in function.arg_names if name in types}, constants


def compile_one(
    target: str, kernel: str, dtype: str, width: int, masks: str, tiles: dict | None = None
) -> triton_report.Usage:
    tiles = tiles or triton_backend.tiles(dtype == "bf16", MAJOR[target])
    if kernel == "passing":
        tiles = tiles | triton_backend.PASSING
    function, types, constants = launched(kernel, dtype, width, masks == "segments", tiles)
    options = {name: tiles[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    if kernel == "passing":
        return triton_report.compile_for(target, function, types, constants, options, constants["BLOCK"])
    entries = tiles["CHUNK"] * tiles["DIM"]
    return triton_report.compile_for(target, function, types, constants, options, entries, whole=True)


def cases(quick: bool = False) -> list[tuple[str, str, int, str]]:
    """(kernel, dtype, head_dim and state_size, masks) that a scan can launch."""
    shapes = [(64, "segments")] if quick else [(64, "segments"), (64, "none"), (80, "segments")]
    return [
        (kernel, dtype, width, masks)
        for dtype in ("bf16", "fp32")
        for width, masks in shapes
        for kernel in KERNELS
        if kernel != "passing" or (dtype == "fp32" and masks == "segments")
    ]


def main() -> int:
    columns = ("kernel", "operands", "head dim and state", "masks")
    title = "tiles as `ssd.triton_backend.tiles` chooses them"
    return triton_report.main("mohawk.kernels.ssd.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

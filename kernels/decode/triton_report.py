"""`python -m mohawk.kernels.decode.triton_report`: compile the Triton kernels of decoding steps for GPUs that need not
be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles bfloat16 inputs and the largest states alone. All have padding;
heads are alone in their group, or share it. What is counted is of one entry of a head's state.
"""

from __future__ import annotations

from typing import Any

from mohawk.kernels.common import triton_report
from mohawk.kernels.decode import triton_backend, triton_kernels
from mohawk.kernels.decode.triton_kernels import Rows, Window

HEADS, TAPS = 32, 4
STEPS = ("mamba2", "discrete mamba2", "gated delta", "kimi delta")


def compile_one(target: str, step: str, dtype: str, rows: int, columns: int, per_group: int) -> triton_report.Usage:
    delta = "delta" in step
    function = triton_kernels.delta_kernel if delta else triton_kernels.ssd_kernel
    groups = HEADS // per_group
    inner, size = HEADS * (columns if delta else rows), groups * (rows if delta else columns)
    channels = inner + 2 * size
    row = Rows(f"*{dtype}", channels)
    types: dict[str, Any] = {"window": Window(f"*{dtype}", channels * TAPS, TAPS, 1), "inputs": row}
    types |= {"gate": row._replace(stride=inner), "beta": Rows("*fp32", HEADS), "decay": Rows("*fp32", HEADS)}
    types |= dict.fromkeys(("weight", "bias", "A_log", "dt_bias", "D", "gate_bias", "norm_weight"), f"*{dtype}")
    types |= {"real": "*i1", "state": "*fp32", "between": "*fp32" if per_group > 1 else None, "out": f"*{dtype}"}
    types |= {"eps": "fp32", "scale": "fp32", "heads": HEADS, "groups": groups}
    if step == "discrete mamba2":
        types |= dict.fromkeys(("A_log", "dt_bias", "norm_weight", "between"), None)
    elif step == "kimi delta":
        types |= dict.fromkeys(("A_log", "dt_bias"), None)
    launch = triton_backend.tiles(rows, columns, target.startswith("gfx"))
    constants = {**launch, "KERNEL": TAPS, "PER_GROUP": per_group, "SILU": step == "mamba2"}
    constants |= {"rows": rows, "columns": columns, "BY_CHANNEL": step == "kimi delta", "SIGMOID": step == "kimi delta"}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {name: types[name] for name in function.arg_names if name in types and name not in constants}
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    return triton_report.compile_for(target, function, types, constants, options, rows * columns)


def cases(quick: bool = False) -> list[tuple[str, str, int, int, int]]:
    """(step, dtype of inputs, rows and columns of a head's state, heads of a group) that a step can launch."""
    dtypes = ("bf16",) if quick else ("bf16", "fp32")
    sizes = [(128, 128, 1)] if quick else [(64, 64, 1), (64, 128, 8), (128, 128, 1)]
    return [(step, dtype, *size) for step in STEPS for dtype in dtypes for size in sizes]


def main() -> int:
    columns = ("step", "inputs", "rows", "columns", "heads of a group")
    title = "tiles as `decode.triton_backend.tiles` chooses them"
    return triton_report.main("mohawk.kernels.decode.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

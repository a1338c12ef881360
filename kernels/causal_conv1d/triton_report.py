"""`python -m mohawk.kernels.causal_conv1d.triton_report`: compile the Triton kernels of the convolution for GPUs that
need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles bfloat16 alone. All have documents, a state, a bias and SiLU.
"""

from __future__ import annotations

from typing import Any

from mohawk.kernels.causal_conv1d import triton_backend
from mohawk.kernels.causal_conv1d.triton_backend import Row
from mohawk.kernels.common import triton_report

CHANNELS, TAPS = 6144, 4


def compile_one(target: str, kernel: str, dtype: str) -> triton_report.Usage:
    function = getattr(triton_backend, f"{kernel}_kernel")
    row = Row(f"*{dtype}", 2048 * CHANNELS, CHANNELS, 1)
    types: dict[str, Any] = {"x": row, "dy": row, "before": row._replace(pointer="*fp32")}
    types |= {"segments": Row("*i64", 2048, 1, 0), "state": Row(f"*{dtype}", CHANNELS * (TAPS - 1), 1, TAPS - 1)}
    types |= dict.fromkeys(("y", "dx", "d_state"), f"*{dtype}")
    types |= dict.fromkeys(("weight", "bias", "d_weight", "d_bias"), "*fp32")
    types |= {"seq": 2048, "channels": CHANNELS, "blocks": 64}
    if kernel == "weights":
        types["before"] = "*fp32"
    constants = {**triton_backend.LAUNCH, "SILU": True, "KERNEL": TAPS}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {name: types[name] for name in function.arg_names if name in types}
    options = {name: triton_backend.LAUNCH[name] for name in ("num_warps", "num_stages")}
    entries = triton_backend.TOKENS * triton_backend.CHANNELS
    return triton_report.compile_for(target, function, types, constants, options, entries)


def cases(quick: bool = False) -> list[tuple[str, str]]:
    """(kernel, dtype) that a convolution can launch."""
    dtypes = ("bf16",) if quick else ("bf16", "fp32")
    return [(kernel, dtype) for dtype in dtypes for kernel in ("forward", "weights", "inputs")]


def main() -> int:
    title = f"tiles of {triton_backend.TOKENS} tokens and {triton_backend.CHANNELS} channels, {TAPS} taps"
    module = "mohawk.kernels.causal_conv1d.triton_report"
    return triton_report.main(module, __doc__, title, ("kernel", "operands"), cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

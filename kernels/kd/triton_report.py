"""`python -m mohawk.kernels.kd.triton_report`: compile the Triton kernels of the distillation losses for GPUs
that need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles one divergence of each kind, from bfloat16.
"""

from __future__ import annotations

from mohawk.kernels.common import triton_report
from mohawk.kernels.kd import triton_backend as kd_triton

QUICK = ("reverse_kl", "jsd", "cosine")
LOGITS = {"bf16": "*bf16", "fp32": "*fp32"}


def compile_one(target: str, kernel: str, divergence: str, logits: str) -> triton_report.Usage:
    """Compile with everything that costs registers turned on: cross-entropy, temperature, TAID, row
    indices."""
    function = getattr(kd_triton, f"_{kernel}")
    constants = {
        "DIVERGENCE": divergence,
        "IN_SWEEP": divergence in kd_triton.IN_SWEEP,
        "CE": True,
        "TEMPERED": True,
        "TAID": divergence not in ("mse", "cosine", "none"),
        "HAS_ROWS": True,
        "BLOCK": kd_triton.BLOCK,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(set(function.arg_names) - set(constants), "*fp32")
    types |= {"rows_ptr": "*i64", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("z_ptr", "t_ptr", "grad_ptr"), LOGITS[logits])
    types |= dict.fromkeys(("vocab", "vocab_all", "n", "z_stride", "t_stride", "grad_stride"), "i32")
    types |= dict.fromkeys(("z_scale", "t_scale", "taid", "beta", "lam"), "fp32")
    return triton_report.compile_for(target, function, types, constants, kd_triton.launch(target.startswith("sm")))


def cases(quick: bool = False) -> list[tuple[str, str, str]]:
    """(kernel, divergence, dtype of the logits) that a loss can launch."""
    names = QUICK if quick else tuple(kd_triton.DIVERGENCES)
    every = [(k, d) for d in names for k in ("statistics", "sums", "gradient")]
    every += [("statistics", "none"), ("gradient", "none")]
    return [(k, d, x) for k, d in every for x in LOGITS if not quick or x == "bf16"]


def main() -> int:
    title = f"blocks of {kd_triton.BLOCK}, {kd_triton.WARPS} warps, up to {kd_triton.REGISTERS} registers on NVIDIA"
    columns = ("kernel", "divergence", "logits")
    return triton_report.main("mohawk.kernels.kd.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

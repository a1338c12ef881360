"""`python -m mohawk.kernels.kd.triton_report`: compile the Triton kernels of the distillation losses for GPUs
that need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles one divergence of each kind, from bfloat16. All vocabularies have
the same code. Extras are cross-entropy, a temperature, TAID and row indices. Layout "apart": the teacher's rows do not
begin where the student's do, counted from multiples of 16 bytes, and its logits are loaded one by one. "rounded": the
gradient of float32 logits is written in bfloat16.
"""

from __future__ import annotations

from mohawk.kernels.common import triton_report
from mohawk.kernels.kd import triton_backend, triton_kernels

QUICK = ("reverse_kl", "jsd", "cosine")
PLAIN = (
    ("statistics", "forward_kl"),
    ("gradient", "forward_kl"),
    ("sums", "jsd"),
    ("gradient", "jsd"),
    ("sums", "skew_kl"),
)
OTHERS = [
    ("statistics", "forward_kl", "bf16", "apart", "none"),
    ("gradient", "forward_kl", "fp32", "rounded", "none"),
]
WIDTHS = {"bf16": 2, "fp32": 4}  # bytes


def compile_one(
    target: str, kernel: str, divergence: str, logits: str, layout: str, extras: str
) -> triton_report.Usage:
    function, types, constants = launch_arguments(kernel, divergence, logits, layout, extras)
    options = triton_backend.launch(target.startswith("sm"))
    return triton_report.compile_for(target, function, types, constants, options, constants["BLOCK"])


def launch_arguments(kernel: str, divergence: str, logits: str, layout: str, extras: str) -> tuple:
    """A kernel, and what it is launched with: see `specialized`."""
    function = getattr(triton_kernels, f"{kernel}_kernel")
    constants = {
        "DIVERGENCE": divergence,
        "IN_SWEEP": divergence in triton_backend.IN_SWEEP,
        "CE": extras == "all",
        "TEMPERED": extras == "all",
        "TAID": extras == "all" and divergence not in ("mse", "cosine", "none"),
        "HAS_ROWS": extras == "all",
        "Z_ALIGNED": True,
        "T_ALIGNED": layout != "apart",
        "GRAD_ALIGNED": True,
        "BLOCK": triton_backend.BLOCK,
        "GROUP": 16 // WIDTHS["bf16" if layout == "rounded" else logits],
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(set(function.arg_names) - set(constants), "*fp32")
    types |= {"rows_ptr": "*i64", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("z_ptr", "t_ptr", "grad_ptr"), f"*{logits}")
    types |= {"grad_ptr": "*bf16"} if layout == "rounded" else {}
    types |= dict.fromkeys(("vocab", "vocab_all", "z_stride", "t_stride", "grad_stride"), 50257)
    types |= {"n": 4096, "phase": 0, "turn": 1}
    types |= dict.fromkeys(("taid", "beta", "lam"), "fp32")
    types |= dict.fromkeys(("z_scale", "t_scale"), "fp32" if extras == "all" else None)
    return function, {name: types[name] for name in function.arg_names if name in types}, constants


def cases(quick: bool = False) -> list[tuple[str, str, str, str, str]]:
    """(kernel, divergence, dtype of the logits, layout, extras) that a loss can launch."""
    if quick:
        kinds = [(k, d, "all") for d in QUICK for k in ("statistics", "sums", "gradient")]
        kinds += [(k, "none", "all") for k in ("statistics", "gradient")] + [(k, d, "none") for k, d in PLAIN]
        return [(k, d, "bf16", "alike", extras) for k, d, extras in kinds] + OTHERS
    every = [(k, d) for d in triton_backend.IN_TRITON for k in ("statistics", "sums", "gradient")]
    every += [("statistics", "none"), ("gradient", "none")]
    return [(k, d, x, "alike", extras) for k, d in every for x in WIDTHS for extras in ("all", "none")] + OTHERS


def main() -> int:
    block, warps, registers = triton_backend.BLOCK, triton_backend.WARPS, triton_backend.REGISTERS
    title = f"blocks of {block}, {warps} warps, up to {registers} registers on NVIDIA"
    columns = ("kernel", "divergence", "logits", "layout", "extras")
    return triton_report.main("mohawk.kernels.kd.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

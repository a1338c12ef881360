"""`python -m mohawk.kernels.kd.triton_report`: compile the Triton kernels of the distillation losses for GPUs
that need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills. `--quick` compiles one divergence of each kind, from bfloat16. A vocabulary that is no
multiple of 16 is compiled apart, as a launch does it: its rows are not aligned, and its logits are loaded one by one.
"""

from __future__ import annotations

from mohawk.kernels.common import triton_report
from mohawk.kernels.kd import triton_backend, triton_kernels

QUICK = ("reverse_kl", "jsd", "cosine")
LOGITS = {"bf16": "*bf16", "fp32": "*fp32"}
VOCABULARIES = (151936, 50257)


def compile_one(target: str, kernel: str, divergence: str, logits: str, vocab: int) -> triton_report.Usage:
    """Compile with everything that costs registers turned on: cross-entropy, temperature, TAID, row
    indices."""
    function, types, constants = launch_arguments(kernel, divergence, logits, vocab)
    return triton_report.compile_for(target, function, types, constants, triton_backend.launch(target.startswith("sm")))


def launch_arguments(kernel: str, divergence: str, logits: str, vocab: int) -> tuple:
    """A kernel, and what it is launched with: see `specialized`."""
    function = getattr(triton_kernels, f"{kernel}_kernel")
    constants = {
        "DIVERGENCE": divergence,
        "IN_SWEEP": divergence in triton_backend.IN_SWEEP,
        "CE": True,
        "TEMPERED": True,
        "TAID": divergence not in ("mse", "cosine", "none"),
        "HAS_ROWS": True,
        "BLOCK": triton_backend.BLOCK,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(set(function.arg_names) - set(constants), "*fp32")
    types |= {"rows_ptr": "*i64", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("z_ptr", "t_ptr", "grad_ptr"), LOGITS[logits])
    types |= dict.fromkeys(("vocab", "vocab_all", "z_stride", "t_stride", "grad_stride"), vocab) | {"n": 4096}
    types |= dict.fromkeys(("z_scale", "t_scale", "taid", "beta", "lam"), "fp32")
    return function, {name: types[name] for name in function.arg_names if name in types}, constants


def cases(quick: bool = False) -> list[tuple[str, str, str, int]]:
    """(kernel, divergence, dtype of the logits, vocabulary) that a loss can launch."""
    names = QUICK if quick else tuple(triton_backend.IN_TRITON)
    every = [(k, d) for d in names for k in ("statistics", "sums", "gradient")]
    every += [("statistics", "none"), ("gradient", "none")]
    return [(k, d, x, n) for k, d in every for x in LOGITS if not quick or x == "bf16" for n in VOCABULARIES]


def main() -> int:
    block, warps, registers = triton_backend.BLOCK, triton_backend.WARPS, triton_backend.REGISTERS
    title = f"blocks of {block}, {warps} warps, up to {registers} registers on NVIDIA"
    columns = ("kernel", "divergence", "logits", "vocabulary")
    return triton_report.main("mohawk.kernels.kd.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m mohawk.kernels.mixing.triton_report`: compile the Triton kernels of the mixing distance for GPUs that
need not be there, and print registers, spilled bytes and shared memory of each.

Exit code 1 if anything spills or takes more shared memory than there is. `--quick` compiles two pairs at two widths.
What is counted is of one entry of the matrices, as a step makes them; of delta rules each loop once.
"""

from __future__ import annotations

from typing import Any

import torch

from mohawk.kernels.common import triton_report
from mohawk.kernels.mixing import triton_backend as mixing_triton
from mohawk.kernels.mixing import triton_delta
from mohawk.kernels.mixing.triton_kernels import normaliser_kernel, pass_kernel
from mohawk.kernels.mixing.triton_tiles import Side

WIDTHS = (64, 128, 256)
MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": 0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
PAIRS = ("ssd-attention", "attention-ssd", "attention-attention", "ssd-ssd")
DELTA_PAIRS = ("delta-attention", "delta-ssd", "delta-delta")  # of triton_delta.py


def _side(kind: str, dtype: str, masked: bool, width: int, softcap: bool = False) -> Side:
    """What a side's fields are launched with, an input scale and a diagonal among them."""
    attention = kind == "attention"
    return Side(
        left=f"*{dtype}",
        right=f"*{dtype}",
        first="*i32" if masked else None,
        most="*fp32" if attention else None,
        inverse="*fp32" if attention else None,
        sums=None if attention else "*fp64",
        weight=None if attention else "*fp32",
        D=None if attention else "*fp32",
        scale="fp32" if attention else None,
        softcap="fp32" if attention and softcap else None,
        heads=32,
        left_heads=32,
        right_heads=8 if attention else 32,
        width=width,
    )


def compile_one(
    target: str, kernel: str, pair: str, masks: str, width: int, dtype: str, tiles: dict | None = None
) -> triton_report.Usage:
    """Compile with both operands of one width. masks: "segments" is documents and padding, by the metric with most
    sums; "segments, kl" the same by kl; "segments, softcap" with one on all attentions; "none" is one document."""
    if pair in DELTA_PAIRS:
        return _compile_delta(target, kernel, pair, masks, width, dtype, tiles or triton_delta.tiles(MAJOR[target]))
    if tiles is None:
        capped = "softcap" in masks and pair.startswith("attention")
        tiles = mixing_triton.tiles(pair == PAIRS[0], width, DTYPES[dtype], MAJOR[target], capped)
    if kernel == "normaliser":
        tiles = tiles | mixing_triton.NORMALISER
    masked = masks != "none"
    student, teacher = (_side(kind, dtype, masked, width, "softcap" in masks) for kind in pair.split("-"))
    constants = {name: tiles[name] for name in ("BLOCK", "STEP", "CHUNK", "PRECISION")}
    options = {name: tiles[name] for name in OPTIONS if name in tiles}
    entries = tiles["BLOCK"] * tiles["STEP"]
    types: dict[str, Any] = {"seq": 2048, "heads": 32}
    if kernel == "normaliser":
        types["side"] = teacher
        constants["WIDTH"] = width
        return triton_report.compile_for(target, normaliser_kernel, types, constants, options, entries)
    types |= {"student": student, "teacher": teacher}
    types |= dict.fromkeys(("real", "bounds"), None) if not masked else {"real": "*i8", "bounds": "*i32"}
    types |= dict.fromkeys(("squares", "sizes", "row_weights", "column_weights"), "*fp64")
    types |= dict.fromkeys(("diagonals", "gradients"), "*fp32")
    constants |= {"STUDENT_WIDTH": width, "TEACHER_WIDTH": width}
    metric = {"none": "squared", "segments": "relative", "segments, softcap": "relative", "segments, kl": "kl"}[masks]
    constants |= {"ROWS": kernel == "rows", "METRIC": metric, "GRADIENTS": True}
    return triton_report.compile_for(target, pass_kernel, types, constants, options, entries)


def _compile_delta(
    target: str, kernel: str, pair: str, masks: str, width: int, dtype: str, tiles: dict
) -> triton_report.Usage:
    teacher = pair.removeprefix("delta-")
    alone = teacher == "delta"  # taken into the student, of twice the channels
    constants = {name: tiles[name] for name in ("BLOCK", "CHUNK", "PRECISION")}
    constants["WIDTH"] = 2 * width if alone else width
    options = {name: tiles[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    types: dict[str, Any] = dict.fromkeys(("crossing", "left", "residuals", "d_walks", "d_seen"), "*fp32")
    types |= dict.fromkeys(("heads", "chunks", "start", "wave"), 32) | {"width": constants["WIDTH"]}
    types["bounds"] = None if masks == "none" else "*i32"
    entries = tiles["BLOCK"] * tiles["BLOCK"]
    if kernel == "return":
        return triton_report.compile_for(target, triton_delta.return_kernel, types, constants, options, entries, True)
    types |= dict.fromkeys(("seen", "own_tiles", "walks", "d_own"), "*fp32") | {"seq": 2048}
    types |= {"teacher": None if alone else _side(teacher, dtype, masks != "none", width)}
    types |= {"real": None if masks == "none" else "*i8"} | dict.fromkeys(("squares", "sizes"), "*fp64")
    constants |= {"SIZES": masks != "none", "TEACHER_WIDTH": 0 if alone else width}
    return triton_report.compile_for(target, triton_delta.walk_kernel, types, constants, options, entries, True)


def cases(quick: bool = False) -> list[tuple[str, str, str, int, str]]:
    """(kernel, student-teacher, masks, width, dtype) that a distance can launch."""
    every = [("normaliser", "attention-attention", "segments")]
    every += [(kernel, pair, "segments") for pair in PAIRS for kernel in ("rows", "columns")]
    every += [(kernel, "ssd-attention", "none") for kernel in ("rows", "columns")]
    every += [(kernel, "attention-attention", "segments, kl") for kernel in ("rows", "columns")]
    every += [(kernel, pair, "segments, softcap") for pair in PAIRS[:3:2] for kernel in ("rows", "columns")]
    every += [("walk", pair, masks) for pair in DELTA_PAIRS for masks in ("segments", "none")]
    every += [("return", pair, "segments") for pair in DELTA_PAIRS[1:]]
    shapes = [(width, dtype) for width in WIDTHS for dtype in DTYPES]
    if quick:
        some = (*PAIRS[::2], *DELTA_PAIRS[::2])
        every = [case for case in every if case[0] != "normaliser" and case[1] in some and case[2] == "segments"]
        narrow, wide = (128, "bf16"), (256, "fp32")
        once = [("rows", PAIRS[0], "segments", 64, dtype) for dtype in DTYPES]
        once += [("normaliser", PAIRS[2], "segments", *narrow), ("rows", PAIRS[2], "segments, softcap", 256, "bf16")]
        return once + [(*case, *narrow) for case in every] + [(*case, *wide) for case in every]
    return [(*case, width, dtype) for width, dtype in shapes for case in every]


def main() -> int:
    columns = ("kernel", "student-teacher", "masks", "head dim and state", "operands")
    title = "tiles as `mixing_triton.tiles` chooses them"
    return triton_report.main("mohawk.kernels.mixing.triton_report", __doc__, title, columns, cases, compile_one)


if __name__ == "__main__":
    raise SystemExit(main())

"""The Triton kernels of the mixing distance: under the interpreter against float64, and compiled ahead of time."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PARITY = """
import json, torch
from mohawk.kernels.mixing import AttentionMixing, SSDMixing
from mohawk.kernels.mixing_distance import mixing_distance

# torch.empty gives NaN, so that what a kernel leaves unwritten shows.
plain_empty = torch.empty
def empty(*args, **kwargs):
    out = plain_empty(*args, **kwargs)
    return out.fill_(float("nan")) if out.is_floating_point() else out

def documents(batch, seq):
    ids = torch.arange(seq).div(17, rounding_mode="floor").expand(batch, seq).clone()
    ids[-1, -11:] = -1
    return ids

results = []
cases = [
    # seq, student heads, C and B groups, teacher heads, kv heads, state, width, strength, window, packed
    (40, 2, 1, 2, 2, 1, 8, 16, 1.0, None, False),
    (1, 1, 1, 1, 1, 1, 4, 4, 1.0, None, False),
    (33, 2, 2, 1, 1, 1, 20, 40, 30.0, 20, True),
    (50, 1, 1, 1, 2, 2, 16, 5, 1e-4, 30, True),
]
for seq, heads, C_groups, B_groups, t_heads, kv_heads, state, width, strength, window, packed in cases:
    torch.manual_seed(seq)
    ids = documents(2, seq) if packed else None
    given = [
        torch.randn(2, seq, C_groups, state) * 0.5, torch.randn(2, seq, B_groups, state) * 0.5,
        -torch.rand(2, seq, heads) * strength, torch.rand(2, seq, heads), torch.randn(heads),
    ]
    if strength == 30.0:
        given[2][:, ::3] = -1e-3
    q, k = torch.randn(2, t_heads, seq, width), torch.randn(2, kv_heads, seq, width)
    metrics = ("frobenius", "relative") if packed else ("squared", "mse")
    for metric, reduction in zip(metrics, ("mean", "none")):
        def run(dtype, backend):
            tensors = [value.to(dtype).requires_grad_() for value in given]
            value = mixing_distance(
                SSDMixing(*tensors, segment_ids=ids),
                AttentionMixing(q.to(dtype), k.to(dtype), window=window, segment_ids=ids),
                metric=metric, reduction=reduction, backend=backend,
            )
            return [value, *torch.autograd.grad(value.sum(), tensors)]
        exact = run(torch.float64, "reference")
        plain = run(torch.float32, "reference")
        torch.empty = empty
        mine = run(torch.float32, "triton")
        torch.empty = plain_empty
        for index, (value, ours, truth) in enumerate(zip(plain, mine, exact, strict=True)):
            size = truth.norm().clamp(min=1e-30)
            errors = [((v.double() - truth).norm() / size).item() for v in (value, ours)]
            results.append([f"{seq} {metric} {reduction} {index}", *errors])
print(json.dumps(results))
"""


def test_interpreted_kernels_are_as_exact_as_the_definition():
    done = subprocess.run(
        [sys.executable, "-c", PARITY],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 4 * 2 * 6
    for name, reference, mine in results:
        assert mine <= max(2 * reference, 6e-7), (name, reference, mine)


COMPILE = """
import json, sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mohawk.kernels import mixing_triton as kernels

pointers = dict(
    q="*{t}", k="*{t}", C="*{t}", B="*{t}", sums="*fp64", input_scale="*fp32", D="*fp32", log_sums="*fp32",
    runs="*i32", student_runs="*i32", real="*i32", squares="*fp32", teacher_squares="*fp32", dC="*fp32", dB="*fp32",
    diagonal="*fp32", row_weights="*fp64", column_weights="*fp64", scale="fp32",
)
target = GPUTarget(*json.loads(sys.argv[1]))
results = []
for width, dtypes in ((64, ("bf16", "fp32")), (128, ("bf16",))):
    for dtype in dtypes:
        tile, warps = kernels.tile_and_warps(width, torch.bfloat16 if dtype == "bf16" else torch.float32)
        constants = dict(TILE=tile, HEAD_DIM=width, STATE=width, WINDOW=0, GRADIENTS=True)
        for kernel in (kernels.row_sums_kernel, kernels.row_pass_kernel, kernels.column_pass_kernel):
            names = kernel.arg_names
            signature = {
                name: "constexpr" if name in constants else pointers.get(name, "i32").format(t=dtype)
                for name in names
            }
            used = {name: value for name, value in constants.items() if name in names}
            attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants
                          and name not in ("scale", "seq", "heads", "q_heads", "kv_heads", "C_groups", "B_groups")}
            source = ASTSource(kernel, signature, used, attributes)
            compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})
            row = dict(kernel=kernel.__name__, width=width, dtype=dtype, shared=compiled.metadata.shared)
            row["binary"] = sorted(set(compiled.asm) & {"cubin", "hsaco"})
            if target.backend == "cuda":
                import re, subprocess, tempfile
                from triton.backends.nvidia.compiler import get_ptxas
                with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
                    ptx.write(compiled.asm["ptx"]); ptx.flush()
                    arch = re.search(r"\\.target (\\S+)", compiled.asm["ptx"]).group(1).rstrip(",")
                    said = subprocess.run([get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", ptx.name,
                                           "-o", "/dev/null"], capture_output=True, text=True).stderr
                row["spills"] = int(re.search(r"(\\d+) bytes spill stores", said).group(1))
                row["registers"] = int(re.search(r"Used (\\d+) registers", said).group(1))
            else:
                import re
                said = compiled.asm["amdgcn"]
                row["spills"] = int(re.search(r"\\.vgpr_spill_count:\\s*(\\d+)", said).group(1))
                row["registers"] = int(re.search(r"\\.vgpr_count:\\s*(\\d+)", said).group(1))
            results.append(row)
print(json.dumps(results))
"""

# What one program may have in shared memory on each, in KiB.
TARGETS = [
    (["cuda", 80, 32], 163),
    (["cuda", 90, 32], 227),
    (["cuda", 100, 32], 227),
    (["hip", "gfx942", 64], 64),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "shared"), TARGETS, ids=str)
def test_compiles_without_spills(target, shared):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(target)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 9
    for row in results:
        assert row["binary"], row
        assert row["spills"] == 0, row
        assert row["shared"] <= shared * 1024, row

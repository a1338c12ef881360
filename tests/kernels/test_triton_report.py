"""The kernels compile for GPUs that are not here, nothing spills with the shipped blocks, and no count of what an H100
would execute is beyond its bound. Bounds are the most of triton 3.6 and 3.7; after a change that costs what it is
worth, write them anew:

    python -m mohawk.kernels.kd.triton_report --quick --target sm_90 --bounds tests/kernels/bounds_kd.json --record
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BOUNDED = "sm_90"


def report(module, target):
    """The rows of a quick report for one target."""
    command = [sys.executable, "-m", f"mohawk.kernels.{module}", "--quick", "--target", target]
    bounds = Path(__file__).with_name(f"bounds_{module.split('.')[0]}.json")
    if target == BOUNDED and bounds.exists():
        command += ["--bounds", str(bounds)]
    # Its own process: in one where kernels were defined under TRITON_INTERPRET nothing can be compiled.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("nothing spills\n")
    return [line for line in done.stdout.splitlines() if line.startswith(f"| {target} |")]


SPECIALISED = """
from triton.runtime.jit import MockTensor, create_function_from_signature
from triton.compiler.compiler import make_backend
import torch
from mohawk.kernels.common import triton_report
from mohawk.kernels.kd import triton_report as kd

made = {"*bf16": MockTensor(torch.bfloat16), "*fp32": MockTensor(torch.float32), "*i64": MockTensor(torch.int64)}
for kernel in ("statistics", "sums", "gradient"):
    for extras in ("all", "none"):
        function, types, constants = kd.launch_arguments(kernel, "jsd", "bf16", "alike", extras)
        backend = make_backend(triton_report.TARGETS["sm_90"])
        bind = create_function_from_signature(function.signature, function.params, backend)
        passed = {name: 0.5 if kind == "fp32" else made.get(kind, kind) for name, kind in types.items()}
        bound, chosen, options = bind(**passed, **constants)
        _, *launch = function._pack_args(backend, options, bound, chosen, options)
        signature, constexprs, attributes = triton_report.specialized(function, types, constants)
        attributes = {place: attributes.get(place, []) for place in launch[2]}
        assert (signature, constexprs, attributes) == tuple(launch), (kernel, extras, launch)
print("the same")
"""


def test_the_report_compiles_what_a_launch_does():
    """Alignment and constants as triton takes them from the arguments of a launch."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPECIALISED], capture_output=True, text=True, env=env)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_distillation_losses_do_not_spill(target):
    assert len(report("kd.triton_report", target)) == 17


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_mixing_distance_does_not_spill(target):
    assert len(report("mixing.triton_report", target)) == 14


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_the_scan_does_not_spill(target):
    assert len(report("ssd.triton_report", target)) == 11


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_the_convolution_does_not_spill(target):
    assert len(report("causal_conv1d.triton_report", target)) == 3


COUNTED = """
import triton
import triton.language as tl
from mohawk.kernels.common import triton_report

@triton.jit
def kernel(x, y, size, MASKED: tl.constexpr):
    for start in range(0, size, 2048):
        at = start + tl.arange(0, 2048)
        if MASKED:
            tl.store(y + at, tl.exp2(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)), mask=at < size)
        else:
            tl.store(y + at, tl.exp2(tl.load(x + at).to(tl.float32)))

for target in ("sm_90", "gfx942"):
    for masked in (False, True):
        types = {"x": "*bf16", "y": "*fp32", "size": 50257}
        options = {"num_warps": 4, "num_stages": 1}
        done = triton_report.compile_for(target, kernel, types, {"MASKED": masked}, options, 2048).work
        rounds = done.special  # as many as the compiler makes one of
        assert rounds in (1, 2, 4) and (done.loaded, done.stored, done.tensor) == (2 * rounds, 4 * rounds, 0), done
        assert done.narrow == (done.loaded if masked else 0) and 1 < done.instructions / rounds < 20, done
print("counted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
def test_counts_of_a_kernel_that_can_be_counted_by_hand(tmp_path):
    """For each number two bytes are read, one exponential taken and four bytes written; without a mask 16 bytes are
    read at a time."""
    path = tmp_path / "counted.py"
    path.write_text(COUNTED)
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=600)
    assert done.stdout == "counted\n", done.stderr[-3000:]


def test_a_count_beyond_its_bound_is_told(tmp_path):
    from mohawk.kernels.common.triton_report import _beyond

    bounds = tmp_path / "bounds.json"
    assert _beyond(bounds, {"one": {"instructions": 10.0, "tensor": 2.0}}, record=True) == []
    assert _beyond(bounds, {"one": {"instructions": 10.4, "tensor": 2.0}}, record=False) == []
    slower = _beyond(bounds, {"one": {"instructions": 10.6, "tensor": 0.0}}, record=False)
    assert slower == ["one: instructions 10.6, bound 10", "one: tensor 0, bound 2"]
    assert _beyond(bounds, {"another": {"instructions": 1.0}}, record=False) == ["another: no bound of instructions"]


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_steps_do_not_spill(target):
    assert len(report("decode.triton_report", target)) == 4

"""The kernels compile for GPUs that are not here, and nothing spills with the shipped blocks."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def report(module, target):
    """The rows of a quick report for one target."""
    # Its own process: in one where kernels were defined under TRITON_INTERPRET nothing can be compiled.
    done = subprocess.run(
        [sys.executable, "-m", f"mohawk.kernels.{module}", "--quick", "--target", target],
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
    for vocab in kd.VOCABULARIES:
        function, types, constants = kd.launch_arguments(kernel, "jsd", "bf16", vocab)
        backend = make_backend(triton_report.TARGETS["sm_90"])
        bind = create_function_from_signature(function.signature, function.params, backend)
        passed = {name: 0.5 if kind == "fp32" else made.get(kind, kind) for name, kind in types.items()}
        bound, chosen, options = bind(**passed, **constants)
        _, *launch = function._pack_args(backend, options, bound, chosen, options)
        signature, constexprs, attributes = triton_report.specialized(function, types, constants)
        attributes = {place: attributes.get(place, []) for place in launch[2]}
        assert (signature, constexprs, attributes) == tuple(launch), (kernel, vocab, launch)
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
    assert len(report("kd.triton_report", target)) == 22


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

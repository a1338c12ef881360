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


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_distillation_losses_do_not_spill(target):
    assert len(report("kd.triton_report", target)) == 11


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_mixing_distance_does_not_spill(target):
    assert len(report("mixing.triton_report", target)) == 14

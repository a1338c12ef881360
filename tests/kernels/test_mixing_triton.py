"""The Triton kernels of the mixing distance in Triton's interpreter against float64, at small odd shapes, in a process
of their own: TRITON_INTERPRET is read when the kernels are defined. Compiling for real GPUs is in
test_triton_report.py."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


PARTS = ("kinds", "packed", "extremes", "half", "large")


@pytest.mark.parametrize(
    ("cases", "part"),
    [
        *(("mixing_triton_cases", part) for part in PARTS),
        *(("delta_triton_cases", part) for part in PARTS if part != "half"),
    ],
)
def test_interpreted(cases, part):
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name(f"{cases}.py")), part],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip().endswith("cases right")

"""The Triton kernels in Triton's interpreter against float64, at small odd shapes, in a process of their own:
TRITON_INTERPRET is read when the kernels are defined. Compiling for real GPUs is in
test_triton_report.py."""

import pytest

from tests.helpers.interpreted import run_cases

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ("dense", "sparse", "edges", "half", "layouts", "split", "shared"))
def test_interpreted(part):
    run_cases("kd_triton_cases", part)

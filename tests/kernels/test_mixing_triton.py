"""The Triton kernels of the mixing distance in Triton's interpreter against float64, at small odd shapes, in a process
of their own: TRITON_INTERPRET is read when the kernels are defined. Compiling for real GPUs is in
test_triton_report.py."""

import pytest

from tests.helpers.interpreted import run_cases

pytest.importorskip("triton")


PARTS = ("kinds", "packed", "extremes", "half", "large", "layouts", "softcaps")


@pytest.mark.parametrize(
    ("cases", "part"),
    [
        *(("mixing_triton_cases", part) for part in PARTS),
        *(("delta_triton_cases", part) for part in PARTS if part != "half"),
    ],
)
def test_interpreted(cases, part):
    run_cases(cases, part)

"""The kernels compile for GPUs that are not here, and nothing spills at the shipped block size."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(sys.platform != "linux", reason="triton's wheels with ptxas are for Linux")
def test_no_spills_on_any_target():
    # Its own process: in one where kernels were defined under TRITON_INTERPRET nothing can be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "mohawk.kernels.kd_triton_report", "--quick"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| sm_") or line.startswith("| gfx")]
    assert len(rows) == 4 * 11
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert sum(f"| {target} |" in row for row in rows) == 11
    assert "nothing spills" in done.stdout

"""The Triton kernels of the scan in Triton's interpreter against the recurrence in float64, at small odd shapes, in a
process of their own: TRITON_INTERPRET is read when the kernels are defined. Compiling for real GPUs is in
test_triton_report.py, running on one in test_gpu.py."""

import pytest
import torch

from mohawk import ssd
from mohawk.kernels.ssd import interface
from tests.helpers.interpreted import run_cases

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ("shapes", "extremes", "half", "layouts", "large"))
def test_interpreted(part):
    run_cases("ssd_triton_cases", part)


def test_asked_for_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, decay, B = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2), torch.zeros(1, 5, 1, 3)
    with pytest.raises(ValueError, match=r"^ssd: backend 'triton' can't be used: x is on cpu; it needs a CUDA or ROCm"):
        ssd(x, decay, B, B, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="it computes in float32 and x is float64; use 'auto' or 'chunked'"):
        ssd(x.double(), decay, B, B, backend="triton")


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("package", "ours", "dtype", "taken"),
    [
        (True, None, torch.float32, "mamba_ssm"),
        (False, None, torch.float32, "triton"),
        (False, "triton is not installed", torch.float32, "chunked"),
        (True, "x is float64", torch.float64, "chunked"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, package, ours, dtype, taken):
    ran = []
    for name in ("chunked", "triton", "mamba_ssm"):
        monkeypatch.setitem(interface.BACKENDS, name, lambda *given, name=name: (ran.append(name), None))
    monkeypatch.setattr(interface, "usable", lambda module: package)
    monkeypatch.setattr(interface, "no_triton", lambda x, module: ours)
    x, B = torch.zeros(1, 5, 2, 4, dtype=dtype).as_subclass(OnGpu), torch.zeros(1, 5, 1, 3, dtype=dtype)
    ssd(x, torch.zeros(1, 5, 2, dtype=dtype), B, B)
    assert ran == [taken]


def test_how_much_a_gpu_is_handed():
    """Launches and what torch does around them, forward and backward; the table in benchmarks/results has these."""
    from benchmarks.kernels.operators import convolution, counted, scan
    from mohawk.kernels.causal_conv1d.triton_backend import causal_conv1d_triton
    from mohawk.kernels.ssd.triton_backend import ssd_triton

    assert counted(ssd_triton, scan(1, 100, 2, everything=False)) == (3, 6)
    assert counted(ssd_triton, scan(2, 300, 4, everything=True)) == (3, 8)
    assert counted(causal_conv1d_triton, convolution(2, 300, 8, documents=True)) == (1, 6)

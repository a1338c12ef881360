"""The Triton kernels of the convolution in Triton's interpreter against torch's in float64, in a process of their own:
TRITON_INTERPRET is read when the kernels are defined. Compiling for real GPUs is in test_triton_report.py, running on
one in test_gpu.py."""

import pytest
import torch

from mohawk.kernels.causal_conv1d import interface
from tests.helpers.interpreted import run_cases

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ("shapes", "layouts"))
def test_interpreted(part):
    run_cases("conv_triton_cases", part)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("reason", "taken"), [(None, ["triton"]), ("triton is not installed", [])])
def test_on_a_gpu_without_the_package(monkeypatch, reason, taken):
    triton_backend = pytest.importorskip("mohawk.kernels.causal_conv1d.triton_backend")
    ran = []
    monkeypatch.setattr(triton_backend, "causal_conv1d_triton", lambda x, *_: (ran.append("triton"), x)[1])
    monkeypatch.setattr(interface, "package_function", lambda: None)
    monkeypatch.setattr(interface, "no_triton", lambda x, module: reason)
    interface.causal_conv1d(torch.zeros(1, 5, 8).as_subclass(OnGpu), torch.zeros(8, 4))
    assert ran == taken

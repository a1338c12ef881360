"""mamba-ssm's kernels in Triton's interpreter, and its public function, against the scan here and the recurrence in
float64: forward and backward, with states and documents. No GPU is needed, the package is; its wheel without compiled
parts installs anywhere:
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops

And what happens where the package is not to be used, or cannot be."""

import importlib.util
import sys
import warnings

import pytest
import torch

from mohawk.kernels.causal_conv1d import causal_conv1d, package_backend
from mohawk.kernels.common import packages
from mohawk.kernels.ssd import package_backend as ssd_package
from mohawk.kernels.ssd.interface import ssd
from tests.helpers.interpreted import run_cases

MISSING = [name for name in ("mamba_ssm", "triton", "einops") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("part", ("backend", "public"))
def test_mamba_ssm_and_the_scan_agree_with_the_recurrence(part):
    run_cases("mamba_ssm_cases", part)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """mamba-ssm and causal-conv1d installed, with compiled parts that cannot be loaded. Returns what was imported."""
    for name in ("mamba_ssm", "causal_conv1d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('libcudart.so.99:\\nno such file')\n")
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caches = (packages.why_not, packages.usable, package_backend.package_function)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def tensors(seq=5, groups=(1, 1), state=4, dtype=torch.float32):
    x = torch.randn(1, seq, 2, 4, dtype=dtype)
    B, C = (torch.randn(1, seq, count, state, dtype=dtype) for count in groups)
    return x, -torch.rand(1, seq, 2, dtype=dtype), B, C


def test_on_a_cpu_the_packages_are_not_even_imported(broken):
    given = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ssd(*given)
        z = causal_conv1d(torch.randn(1, 5, 8), torch.randn(8, 4))
    torch.testing.assert_close(y, ssd(*given, backend="reference"))
    assert z.shape == (1, 5, 8)
    assert packages.why_not.cache_info().misses == 0


def test_a_package_that_cannot_be_imported_is_named_once_and_done_without(broken):
    reason = (
        r"mamba_ssm is installed but cannot be imported \(ImportError: libcudart.so.99: no such file\); mohawk goes"
    )
    with pytest.warns(RuntimeWarning, match=reason):
        assert not packages.usable(ssd_package.KERNELS)
    with pytest.warns(RuntimeWarning, match="causal_conv1d is installed but cannot be imported"):
        assert package_backend.package_function() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not packages.usable(ssd_package.KERNELS)
        assert not packages.usable("no_such_package_anywhere"), "and one that is not installed is nothing to warn of"


def test_asked_for_by_name_the_reason_is_given(broken, monkeypatch):
    def message(*given):
        with pytest.raises(
            ValueError, match=r"^ssd: backend 'mamba_ssm' can't be used: .*; use 'auto' or 'chunked'$"
        ) as e:
            ssd(*given, backend="mamba_ssm")
        return str(e.value)

    assert "x is on cpu; it needs a CUDA or ROCm device" in message(*tensors())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "installed but cannot be imported (ImportError: libcudart" in message(*tensors())
    assert "x is float64" in message(*tensors(dtype=torch.float64))
    assert "x is empty, (1, 0, 2, 4)" in message(*tensors(seq=0))
    assert "B has 2 groups and C 1" in message(*tensors(groups=(2, 1)))
    assert "state_size is 300; it takes at most 256" in message(*tensors(state=300))


def test_asked_for_by_name_where_it_is_not_installed(broken, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ValueError, match="mamba_ssm is not installed; use 'auto'"):
        ssd(*tensors(), backend="mamba_ssm")

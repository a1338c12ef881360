"""flash-linear-attention's kernels in Triton's interpreter against the recurrence in float64: forward and backward,
with states and documents, one decay a head and one a channel. No GPU is needed, the package is: pip install fla-core

And what happens where the package is not to be used, or cannot be."""

import importlib.util
import sys
import warnings

import pytest
import torch

from mohawk.kernels.common import packages
from mohawk.kernels.delta.interface import gated_delta_rule
from tests.helpers.interpreted import run_cases

MISSING = [name for name in ("fla", "triton", "einops") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("part", ("heads", "channels"))
def test_the_package_agrees_with_the_recurrence(part):
    run_cases("fla_cases", part)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """flash-linear-attention installed, such that it cannot be loaded."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise ImportError('no such driver')\n")
    for module in [m for m in sys.modules if m.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    packages.why_not.cache_clear()
    packages.usable.cache_clear()
    yield
    packages.why_not.cache_clear()
    packages.usable.cache_clear()


def tensors(seq=5, key=4, dtype=torch.float32):
    q, k, v = torch.randn(3, 1, seq, 2, key, dtype=dtype)
    gates = -torch.rand(1, seq, 2, dtype=dtype)
    return {"q": q, "k": k, "v": v, "beta": -gates, "log_decay": gates}


def test_on_a_cpu_the_package_is_not_even_imported(broken):
    given = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = gated_delta_rule(**given)
    torch.testing.assert_close(y, gated_delta_rule(**given, backend="reference"))
    assert packages.why_not.cache_info().misses == 0


def test_asked_for_by_name_the_reason_is_given(broken, monkeypatch):
    def message(**given):
        match = r"^gated_delta_rule: backend 'fla' can't be used: .*; use 'auto' or 'chunked'$"
        with pytest.raises(ValueError, match=match) as caught:
            gated_delta_rule(**given, backend="fla")
        return str(caught.value)

    assert "v is on cpu; it needs a CUDA or ROCm device" in message(**tensors())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "fla is installed but cannot be imported (ImportError: no such driver)" in message(**tensors())
    assert "v is float64" in message(**tensors(dtype=torch.float64))
    assert "v is empty, (1, 0, 2, 4)" in message(**tensors(seq=0))
    assert "key_dim is 300; it takes at most 256" in message(**tensors(key=300))

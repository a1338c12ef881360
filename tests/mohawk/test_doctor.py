"""`mohawk doctor` tells the truth, also about machines that this one is not."""

import io
import sys
import types

import pytest
import torch
from rich.console import Console

from mohawk import doctor


def printed() -> str:
    console = Console(file=io.StringIO(), width=160)
    doctor.doctor(console)
    return console.file.getvalue()


def test_report_names_versions_devices_and_operations():
    text = printed()
    for words in ("Versions", torch.__version__, "Devices", "torch threads", "Operations"):
        assert words in text
    assert "fails" not in text


def test_operations_use_the_chunked_path_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {name: backend for name, backend, _ in doctor.operation_rows()}
    assert rows == {
        "kd_loss": "chunked",
        "linear_kd_loss": "chunked",
        "mixing_distance": "chunked",
        "ssd": "chunked",
        "causal_conv1d": "torch",
    }


@pytest.mark.parametrize(
    ("module", "backend"),
    [
        ("mohawk.kernels.kd_triton", "triton"),
        ("mohawk.kernels.kd_chunked", "chunked"),
        ("mohawk.kernels.kd_reference", "reference"),
        ("mohawk.kernels.ssd", "torch"),
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm"),
        ("causal_conv1d", "causal_conv1d"),
        ("causal_conv1d_elsewhere", "torch"),
    ],
)
def test_backend_is_what_ran(module, backend):
    fake = types.ModuleType(module)
    exec("def operation(): return 1", fake.__dict__)
    assert doctor.backend_used(fake.operation) == backend
    assert sys.getprofile() is None


def test_an_explicit_backend_is_seen():
    import mohawk

    x = torch.zeros(1, 4, 2, 3)
    decay = torch.zeros(1, 4, 2)
    assert doctor.backend_used(lambda: mohawk.ssd(x, decay, x, x, backend="reference")) == "reference"
    assert doctor.backend_used(lambda: mohawk.ssd(x, decay, x, x, backend="chunked")) == "chunked"


def test_a_broken_operation_is_a_finding(monkeypatch):
    def broken(device):
        raise RuntimeError("no kernel image\nmore lines")

    monkeypatch.setitem(doctor._calls, "ssd", broken)
    rows = {name: (backend, why) for name, backend, why in doctor.operation_rows()}
    assert rows["ssd"] == ("[red]fails[/red]", "RuntimeError: no kernel image")
    assert rows["kd_loss"][0] == "chunked", "the others are still tried"


def test_missing_packages_are_reported(monkeypatch):
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert doctor.version("gguf") is None
    line = next(line for line in printed().splitlines() if "gguf" in line)
    assert "missing" in line


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "is a CPU build" in doctor.why_no_gpu()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "reinstall torch" in doctor.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "could use one" in doctor.why_no_gpu()


@pytest.mark.parametrize(
    ("operation", "backend", "device", "triton", "words"),
    [
        ("kd_loss", "chunked", "cpu", None, "no GPU"),
        ("kd_loss", "chunked", "cuda", None, "pip install '.[triton]'"),
        ("kd_loss", "chunked", "cuda", "3.6.0", "no GPU kernel for this operation yet"),
        ("kd_loss", "triton", "cuda", "3.6.0", "triton 3.6.0 is installed"),
        ("ssd", "mamba_ssm", "cuda", "3.6.0", "the mamba_ssm package is installed"),
        ("ssd", "chunked", "cuda", "3.6.0", "mamba-ssm is missing"),
        ("causal_conv1d", "torch", "cuda", "3.6.0", "causal-conv1d is missing"),
    ],
)
def test_reasons(monkeypatch, operation, backend, device, triton, words):
    monkeypatch.setattr(doctor, "version", lambda name: triton if name == "triton" else None)
    assert words in doctor._why(operation, backend, torch.device(device))


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert any("cannot be imported" in what for _, what in doctor.device_rows())
    assert {backend for _, backend, _ in doctor.operation_rows()} == {"none"}

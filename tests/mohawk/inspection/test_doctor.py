"""`mohawk doctor` tells the truth, also about machines that this one is not."""

import io
import sys
import types

import pytest
import torch
from rich.console import Console

from mohawk.core import devices, versions
from mohawk.inspection import doctor
from mohawk.kernels.decode import c_backend


def printed() -> str:
    console = Console(file=io.StringIO(), width=160)
    doctor.doctor(console)
    return console.file.getvalue()


def test_report_names_versions_devices_and_operations():
    text = printed()
    for words in ("Versions", torch.__version__, "Devices", "torch threads", "Operations"):
        assert words in text
    assert "fails" not in text


def test_students_are_held_against_their_own_full_forward(monkeypatch):
    from mohawk.models.mixer_names import MIXER_NAMES
    from mohawk.models.state_mixer import StateMixer

    rows = doctor.student_rows()
    assert [name for name, _, _ in rows] == [f"{mixer}, {kind}" for mixer in MIXER_NAMES for kind in ("hybrid", "pure")]
    assert not any(broken for _, _, broken in rows) and "Students" in printed()
    with monkeypatch.context() as patch:
        patch.setattr(StateMixer, "_read_cache", lambda *_: (None, None))  # each call starts from an empty state
        assert all(broken and "prefill in chunks" in verdict for _, verdict, broken in doctor.student_rows())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert [row[0] for row in doctor.student_rows()] == ["none"]


def test_operations_use_the_chunked_path_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    steps = "in_place" if isinstance(c_backend.library(), str) else "c"
    rows = {name: backend for name, backend, _ in doctor.operation_rows()}
    assert rows == {
        "kd_loss": "chunked",
        "linear_kd_loss": "chunked",
        "mixing_distance": "chunked",
        "ssd": "chunked",
        "gated_delta_rule": "chunked",
        "causal_conv1d": "chunked",
        "ssd_decode_step": steps,
        "delta_decode_step": steps,
    }
    monkeypatch.setattr(c_backend, "library", lambda: "no compiler")
    steps = {backend: why for name, backend, why in doctor.operation_rows() if "step" in name}
    assert list(steps) == ["in_place"] and "no compiler" in steps["in_place"]


@pytest.mark.parametrize(
    ("module", "stated", "backend"),
    [
        ("mohawk.kernels.some.module", "triton", "triton"),
        ("mohawk.kernels.some.module", "chunked", "chunked"),
        ("mohawk.kernels.some.module", "reference", "reference"),
        ("mohawk.kernels.ssd.interface", None, "torch"),
        ("elsewhere", "triton", "torch"),
        ("mamba_ssm.ops.triton.ssd_combined", None, "mamba_ssm"),
        ("causal_conv1d", None, "causal_conv1d"),
        ("causal_conv1d_elsewhere", None, "torch"),
    ],
)
def test_backend_is_what_ran(module, stated, backend):
    fake = types.ModuleType(module)
    if stated:
        fake.BACKEND = stated
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
    assert devices.version("gguf") is None
    line = next(line for line in printed().splitlines() if "gguf" in line)
    assert "missing" in line


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert "is a CPU build" in devices.why_no_gpu()
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "reinstall torch" in devices.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "could use one" in devices.why_no_gpu()


@pytest.mark.parametrize(
    ("operation", "backend", "device", "triton", "words"),
    [
        ("kd_loss", "chunked", "cpu", None, "no GPU"),
        ("kd_loss", "chunked", "cuda", None, "pip install '.[triton]'"),
        ("kd_loss", "chunked", "cuda", "3.6.0", "no GPU kernel for this operation yet"),
        ("kd_loss", "triton", "cuda", "3.6.0", "triton 3.6.0 is installed"),
        ("ssd", "mamba_ssm", "cuda", "3.6.0", "the mamba_ssm package is installed"),
        ("ssd", "triton", "cuda", "3.6.0", "triton 3.6.0 is installed"),
        ("ssd", "chunked", "cuda", None, "mamba-ssm and triton are missing, whose kernels this would use; torch"),
        ("gated_delta_rule", "chunked", "cuda", "3.6.0", "fla-core is missing"),
        ("causal_conv1d", "triton", "cuda", "3.6.0", "triton 3.6.0 is installed"),
        ("causal_conv1d", "chunked", "cuda", None, "causal-conv1d and triton are missing"),
    ],
)
def test_reasons(monkeypatch, operation, backend, device, triton, words):
    monkeypatch.setattr(doctor, "version", lambda name: triton if name == "triton" else None)
    assert words in doctor._why(operation, backend, torch.device(device))


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert any("cannot be imported" in what for _, what in devices.device_rows())
    assert {backend for _, backend, _ in doctor.operation_rows()} == {"none"}


def test_versions_outside_their_range_are_named(monkeypatch):
    found = {"transformers": "5.25.0", "torch": "2.15.0+cu130", "datasets": "4.6.1", "python": "3.12.1", "trl": None}
    monkeypatch.setattr(versions, "installed", found.get)
    tested, notes = doctor.version_ranges()
    assert notes == [
        "datasets 4.6.1 is outside the range that is tested, >=5.0,<5.3; run: pip install 'datasets>=5.0,<5.3'",
        "transformers 5.25.0 is outside the range that is tested, >=5.17,<5.25; "
        "run: pip install 'transformers>=5.17,<5.25'",
    ]
    assert tested["torch"] == ">=2.11,<2.16"
    lines = printed().splitlines()
    assert all(note in lines for note in notes), "each on a line of its own"


@pytest.mark.parametrize(
    ("name", "version", "inside"),
    [
        ("torch", "2.11.0", True),
        ("torch", "2.15.9+cpu", True),
        ("torch", "2.16.0.dev20261201+cu130", False),  # a nightly of what is above
        ("torch", "2.10.1", False),
        ("python", "3.14.2", True),
        ("python", "3.15.0", False),
        ("python", "3.9.19", False),
        ("lm-eval", "0.4.13", True),
        ("lm-eval", "0.4.14", False),
        ("mamba-ssm", "2.3.2.post1", True),
        ("mamba-ssm", "2.3.1", False),
    ],
)
def test_which_versions_are_in_the_range(monkeypatch, name, version, inside):
    monkeypatch.setattr(versions, "installed", {name: version}.get)
    assert [each.name for each in versions.outside()] == [] if inside else [name]


def test_without_packaging_the_report_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "mohawk.core.versions")
    monkeypatch.delattr("mohawk.core.versions")
    for name in [name for name in sys.modules if name.partition(".")[0] == "packaging"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "packaging", None)
    assert doctor.version_ranges() == (
        {},
        ["versions are not checked, since packaging is missing; run: pip install packaging"],
    )


def test_packages_of_kernels_are_used_or_not(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert doctor.used("mamba-ssm", {}) == "not installed"
    monkeypatch.setattr(doctor, "version", lambda name: "2.3.2")
    assert doctor.used("mamba-ssm", {"ssd": "mamba_ssm"}) == "used"
    assert doctor.used("causal-conv1d", {"ssd": "mamba_ssm", "causal_conv1d": "causal_conv1d"}) == "used"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.used("mamba-ssm", {"ssd": "chunked"}) == "not used, no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert doctor.used("mamba-ssm", {"ssd": "chunked"}).startswith("not used, cannot be imported: ModuleNotFoundError")
    why = doctor._why("ssd", "chunked", torch.device("cuda"))
    assert "mamba-ssm is not used, cannot be imported" in why and why.endswith("; torch on the GPU")
    monkeypatch.undo()
    line = next(line for line in printed().splitlines() if "mamba-ssm" in line)
    assert "the scan `ssd` on NVIDIA GPUs" in line

"""`mohawk export --to onnx`: recurrences by what ONNX has, refusals before anything is written, and graphs in
onnxruntime."""

import io
import math
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from mohawk.cli import main
from mohawk.core import extras
from mohawk.export.run import export
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference
from mohawk.kernels.delta.reference import delta_reference
from mohawk.kernels.ssd.reference import ssd_reference
from mohawk.models.formats.onnx import cache_names, empty_cache, present, why_not_onnx
from mohawk.models.formats.onnx_scans import causal_conv, delta_scan, ssd_scan
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="the extra onnx is absent"
)


def randoms(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def agree(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert float((ours - theirs).abs().max()) <= 5e-6 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("n", [1, 5, 64, 130])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_scan_in_chunks_is_the_recurrence(n, scaled):
    b, h, g, p, N = 2, 4, 2, 3, 5
    r = randoms(n)
    x, B, C, D, state = r(b, n, h, p), r(b, n, g, N), r(b, n, g, N), r(h), r(b, h, p, N)
    log_decay = -3 * r(b, n, h).abs()
    log_decay[:, n // 2] = -300.0  # all that came before is gone; what comes after is not
    log_decay[0, 0, 0] = float("-inf")
    scale = r(b, n, h).abs() if scaled else None
    wide = [None if value is None else value.double() for value in (x, log_decay, B, C, scale, D, state)]
    agree(ssd_scan(x, log_decay, B, C, input_scale=scale, D=D, initial_state=state), ssd_reference(*wide, None))


@pytest.mark.parametrize("n", [1, 5, 32, 67])
@pytest.mark.parametrize("by_channel", [True, False])
def test_the_delta_rule_in_chunks_is_the_recurrence(n, by_channel):
    b, h, p, N = 2, 2, 3, 5
    r = randoms(n)
    q, k, v, state = r(b, n, h, N), r(b, n, h, N), r(b, n, h, p), r(b, h, N, p)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = r(b, n, h).sigmoid()
    log_decay = -(r(b, n, h, N) if by_channel else r(b, n, h)).abs()
    log_decay[:, n // 2] = -300.0
    wide = [value.double() for value in (q, k, v, beta, log_decay, state)]
    found = delta_scan(q, k, v, beta=beta, log_decay=log_decay, initial_state=state)
    agree(found, delta_reference(*wide, None))


def test_keys_that_are_all_the_same_do_not_blow_up():
    """The powers of a chunk's triangle are binomials to 1e8 here; the inverse has 1 and -1 alone."""
    v = randoms(0)(1, 96, 1, 3)
    k, ones, nothing = torch.full((1, 96, 1, 4), 0.5), torch.ones(1, 96, 1), torch.zeros(1, 96, 1)
    state = torch.zeros(1, 1, 4, 3)
    wanted = delta_reference(*(value.double() for value in (k, k, v, ones, nothing, state)), None)
    agree(delta_scan(k, k, v, beta=ones, log_decay=nothing, initial_state=state), wanted)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_convolution(activation):
    r = randoms(1)
    x, weight, bias, before = r(2, 7, 6), r(6, 4), r(6), r(2, 6, 3)
    wide = [value.double() for value in (x, weight, bias, before)]
    wanted = causal_conv1d_reference(*wide, activation)
    agree([causal_conv(x, weight, bias, activation, before)], [wanted])


def test_names_and_sizes_of_the_cache():
    config = hybrid_from_teacher(tiny_teacher("qwen3"), [1], "gated_delta").config
    names = cache_names(config)
    assert names[:4] == ["past_key_values.0.key", "past_key_values.0.value", "past_conv.1", "past_recurrent.1"]
    assert [present(name) for name in names[1:3]] == ["present.0.value", "present_conv.1"]
    made = empty_cache(config, 3)
    assert list(made) == names and made[names[0]].shape[2] == 0
    mixer = config.make_mixer(1)
    assert made["past_conv.1"].shape == (3, mixer.conv_size, mixer.conv_kernel)
    assert made["past_recurrent.1"].shape == (3, mixer.num_heads, mixer.state_size, mixer.head_dim)


def test_what_cannot_be_written_says_so_before_anything_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "onnx", ("torch",))
    mixture = tiny_teacher("mixtral")
    mixture.save_pretrained(tmp_path / "mixture")
    assert main(["export", str(tmp_path / "mixture"), "--to", "onnx"]) == 2
    (*_, said) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: cannot be ONNX graphs: which experts a token goes to is known only from its values")
    config = tiny_teacher("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "scaled by dynamic, which turns positions otherwise" in str(why_not_onnx(config))
    assert why_not_onnx(tiny_teacher("llama").config) is None
    monkeypatch.setitem(extras.EXTRAS, "onnx", ("onnx_that_is_not_there",))
    assert main(["export", str(tmp_path / "mixture"), "--to", "onnx"]) == 2
    (*_, said) = capsys.readouterr().err.splitlines()
    assert "needs packages that are not installed (onnx_that_is_not_there): run pip install '.[onnx]'" in said
    assert not (tmp_path / "mixture-onnx").exists()


@needs_onnx
def test_graphs_answer_as_the_student_does(tmp_path, make_llama):
    """A plain student; hybrids take longer to trace, and are the slow test."""
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "student")
    console = Console(file=io.StringIO(), width=200)
    folder = export(tmp_path / "student", "onnx", console=console)
    assert sorted(path.name for path in folder.iterdir() if "onnx" in path.name) == ["model.onnx", "model.onnx.data"]
    assert b"stack_trace" not in (folder / "model.onnx").read_bytes()
    card = (folder / "README.md").read_text()
    assert "library_name: onnx" in card and "| left-padded batch |" in card and "onnxruntime.InferenceSession" in card
    assert "step.onnx" in card and "| onnxruntime | yes |" in card


@needs_onnx
@pytest.mark.slow
def test_graphs_of_hybrids_answer_as_the_student_does(tmp_path, make_llama):
    """One layer, since each mixer takes half a minute to trace; of no attention, so nothing but the states is a
    cache."""
    student = hybrid_from_teacher(make_llama(num_hidden_layers=1), [0], "mamba2")
    student.save_pretrained(tmp_path / "student")
    console = Console(file=io.StringIO(), width=200)
    folder = export(tmp_path / "student", "onnx", console=console)
    said = console.file.getvalue()
    for check in ("full forward", "prefill and steps", "left-padded batch", "greedy tokens", "prefill in chunks"):
        assert check in said
    names = sorted(path.name for path in folder.glob("*.onnx*"))
    assert names == ["model.onnx", "model.onnx.data", "step.onnx"]  # and no second copy of the weights

    import onnx

    graph = onnx.load(folder / "step.onnx", load_external_data=False).graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL and len(t.dims) > 1]
    assert {t.name: list(t.dims) for t in inside if "weight" in t.name} == {}
    assert sum(math.prod(t.dims) for t in inside) * 4 < (folder / "model.onnx.data").stat().st_size / 20

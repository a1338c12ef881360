"""Decoding steps on states that are changed in place, against the whole sequence in float64."""

import shutil

import pytest
import torch

from mohawk.kernels.decode import c_backend, delta_decode_step, interface, ssd_decode_step
from mohawk.kernels.decode.in_place import by_tap
from tests.helpers.interpreted import run_cases
from tests.kernels.decode_cases import KERNEL, PROBLEMS, steps, whole

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
BACKENDS = ["reference", "in_place", pytest.param("c", marks=pytest.mark.skipif(not COMPILER, reason="no C compiler"))]
SHAPES = [(2, 4, 5, 7, 4), (1, 6, 33, 17, 3)]  # batch, heads, head_dim, state, groups


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", PROBLEMS)
def test_steps_are_the_sequence(form, backend, shape):
    problem = PROBLEMS[form](form, *shape)
    y, after = whole(form, *problem)
    made, window, state = steps(form, *problem, backend, torch.float32)
    torch.testing.assert_close(made.double(), y, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(state.double(), after, rtol=1e-4, atol=1e-4)
    assert torch.equal(window.double(), problem[0]["inputs"].mT[..., -KERNEL:].float().double())
    if backend != "c":
        made, _, state = steps(form, *problem, backend, torch.float64)
        torch.testing.assert_close(made, y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "in_place"])
@pytest.mark.parametrize("form", PROBLEMS)
def test_padding_changes_nothing(form, backend):
    moving, fixed, state = PROBLEMS[form](form, 2, 4, 5, 7, 2)
    real = torch.tensor([[True, True, False, True], [True, False, False, True]])
    made, window, after = steps(form, moving, fixed, state, backend, torch.float32, real=real)
    assert not made[~real].any()
    for row in (0, 1):
        alone = {name: x[row : row + 1, real[row]] for name, x in moving.items()}
        y, expected = whole(form, alone, fixed, state[row : row + 1])
        torch.testing.assert_close(made[row, real[row]].double(), y[0], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(after[row].double(), expected[0], rtol=1e-4, atol=1e-4)
        kept = real[row].sum()
        assert torch.equal(window[row, :, KERNEL - kept :].double(), alone["inputs"][0].T.float().double())


@pytest.mark.parametrize("form", PROBLEMS)
def test_half_inputs_are_rounded_where_a_sequence_rounds_them(form):
    """One rounding of what is convolved, of y and of the output, each of 2^-9: 1e-2 of what they are."""
    problem = PROBLEMS[form](form, 2, 4, 16, 8, 4)
    y, after = whole(form, *problem)
    made = {b: steps(form, *problem, b, torch.bfloat16, torch.float32) for b in ("reference", "in_place")}
    for out, _, state in made.values():
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert (out.double() - y).norm() < 2e-2 * y.norm()
        assert (state.double() - after).norm() < 1e-2 * after.norm()


@pytest.mark.skipif(not COMPILER, reason="no C compiler")
@pytest.mark.parametrize("form", ("mamba2", "kimi_delta"))
def test_extremes_in_c(form):
    """Gates and decays beyond what exp holds; a NaN stays one, in its own row."""
    moving, fixed, state = PROBLEMS[form](form, 2, 2, 8, 8, 2, tokens=3)
    moving["gate"][:] = torch.tensor([-300.0, 300.0, -89.0, 89.0]).repeat(4)
    moving["decay"][:, 1] = 200.0 if form == "mamba2" else -2000.0
    moving["inputs"][1, 2, 0] = float("nan")
    y, after = whole(form, moving, fixed, state)
    made, _, kept = steps(form, moving, fixed, state, "c", torch.float32)
    torch.testing.assert_close(made[0].double(), y[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kept[0].double(), after[0], rtol=1e-4, atol=1e-4)
    assert made[1, 2].isnan().any() and y[1, 2].isnan().any()


def arguments(dtype=torch.float32):
    moving, fixed, state = PROBLEMS["mamba2"]("mamba2", 2, 4, 5, 7, 2)
    given = {name: x[:, 0].to(dtype) for name, x in moving.items()}
    fixed = {name: x.to(dtype) for name, x in fixed.items()}
    window = by_tap(torch.zeros(2, given["inputs"].shape[1], KERNEL, dtype=dtype))
    return {"window": window, "state": state.to(dtype), **given, **fixed}


def test_what_auto_takes(monkeypatch):
    ran = []
    for name in ("ssd_decode_c", "ssd_decode_in_place", "ssd_decode_reference"):
        monkeypatch.setattr(interface, name, lambda *given, name=name: ran.append(name.removeprefix("ssd_decode_")))
    monkeypatch.setattr(c_backend, "library", lambda: "there is no C compiler (cc, gcc or clang)")
    given = arguments()
    ssd_decode_step(**given)
    ssd_decode_step(**given, real=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend 'c' can't be used: there is no C compiler .*; use 'auto'"):
        ssd_decode_step(**given, backend="c")
    monkeypatch.setattr(c_backend, "library", lambda: None)
    ssd_decode_step(**given)
    ssd_decode_step(**given, real=torch.ones(2, dtype=torch.bool))
    ssd_decode_step(**arguments(torch.float64))
    ssd_decode_step(**{**given, "window": given["window"].contiguous()})
    assert ran == ["in_place", "reference", "c", "c", "in_place", "in_place"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_kept_what_changed_says_so(backend):
    """Its gradient would be of other values."""
    given = arguments()
    for name in ("window", "state"):
        parameter = torch.ones(given[name].shape, requires_grad=True)
        product = (parameter * given[name]).sum()
        ssd_decode_step(**given, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ("mamba2", "gated_delta", "kimi_delta"))
def test_no_row(form, backend):
    """A batch that has ended altogether."""
    moving, fixed, state = PROBLEMS[form](form, 2, 4, 5, 7, 2)
    moving = {name: x[:0] for name, x in moving.items()}
    made, _, after = steps(form, moving, fixed, state[:0], backend, torch.float32)
    assert made.shape == (0, 4, 20) and after.shape == (0, *state.shape[1:])


def test_c_takes_a_window_of_one_tap_or_row():
    """Whose strides say nothing of how it lies."""
    given = arguments()
    one_tap = {**given, "window": torch.zeros(2, given["window"].shape[1], 1), "weight": given["weight"][:, :1]}
    row = {name: x[:1] if name in ("window", "state", "inputs", "gate", "decay") else x for name, x in given.items()}
    window = row["window"]
    row["window"] = window.as_strided(window.shape, (7, *window.stride()[1:]))
    for given in (one_tap, row):
        first, second = ({name: x.clone() for name, x in given.items()} for _ in range(2))
        made = ssd_decode_step(**first | {"window": given["window"]}, backend="c")
        torch.testing.assert_close(made, ssd_decode_step(**second, backend="reference"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(given["window"], second["window"], rtol=0, atol=0)


@pytest.mark.parametrize("compiler", ("no-such-compiler", "false"))
def test_a_compiler_that_is_missing_or_fails(monkeypatch, compiler):
    """Said, and torch goes on."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(c_backend.shutil, "which", lambda name: f"/bin/{name}" if name == "false" else None)
    c_backend.library.cache_clear()
    try:
        said = c_backend.library()
        assert said == "there is no C compiler (cc, gcc or clang)" or said.startswith("/bin/false made none")
        assert ssd_decode_step(**arguments()).shape == (2, 20)
    finally:
        c_backend.library.cache_clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decay": torch.zeros(2, 3)}, r"shapes do not fit together; needed .*decay \(batch, heads\).*decay \(2, 3\)"),
        ({"state": torch.zeros(2, 4, 5)}, "shapes do not fit together"),
        ({"D": 1.0}, "D is a float; it must be a tensor"),
        ({"gate": None}, "gate is None; it must be a tensor"),
        ({"gate": torch.zeros(2, 20, dtype=torch.int64)}, "gate must be floating point, got torch.int64"),
        ({"real": torch.ones(2)}, "real must be bool, False at padding, got torch.float32"),
        ({"real": torch.ones(3, dtype=torch.bool)}, r"real \(3,\)"),
        ({"real": [True, False]}, "real is a list; it must be a tensor"),
        ({"real": torch.ones(2, dtype=torch.bool, device="meta")}, "real is on the meta device"),
        ({"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
        ({"A_log": None}, "dt_bias is given without A_log"),
        ({"backend": "cuda"}, "backend must be one of auto, reference, in_place, c, triton, got 'cuda'"),
        ({"backend": "in_place", "real": torch.ones(2, dtype=torch.bool)}, "it knows no padding"),
        ({"backend": "triton"}, "state is on cpu|x is on cpu"),
    ],
)
def test_mistakes(change, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^ssd_decode_step: .*({said})"):
        ssd_decode_step(**{**arguments(), **change})


def test_mistakes_of_the_delta_step():
    moving, fixed, state = PROBLEMS["gated_delta"]("gated_delta", 2, 4, 5, 7, 2)
    given = {"window": torch.zeros(2, 48, KERNEL).double(), "state": state, **{n: x[:, 0] for n, x in moving.items()}}
    given |= fixed
    with pytest.raises(ValueError, match="delta_decode_step: gate_activation must be 'silu' or 'sigmoid', got 'tanh'"):
        delta_decode_step(**given, gate_activation="tanh")
    with pytest.raises(ValueError, match=r"delta_decode_step: shapes .* beta \(batch, heads\).* beta \(2, 3\)"):
        delta_decode_step(**{**given, "beta": torch.zeros(2, 3).double()})


def test_interpreted():
    """The Triton kernels, in a process of their own: TRITON_INTERPRET is read when they are defined."""
    pytest.importorskip("triton")
    run_cases("decode_triton_cases")

"""The short depthwise convolution, against torch's own and against itself in pieces."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from mohawk.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from mohawk.kernels.causal_conv1d.package_backend import by_package
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference


def inputs(batch=2, seq=37, channels=6, kernel=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = {
        "x": (batch, seq, channels),
        "weight": (channels, kernel),
        "bias": (channels,),
        "initial_state": (batch, channels, kernel - 1),
    }
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("seq", "kernel"), [(1, 4), (2, 4), (63, 4), (17, 1), (40, 2)])
def test_value_and_gradients_match_torch(seq, kernel, activation):
    given = inputs(seq=seq, kernel=kernel)
    y = causal_conv1d(**given, activation=activation)
    expected = causal_conv1d_reference(**given, activation=activation)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    mine = torch.autograd.grad((y * weights).sum(), list(given.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(given.values()))
    torch.testing.assert_close(mine, theirs)


def test_gradcheck_with_segments():
    given = inputs(seq=9, channels=3)
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, -1, -1, -1]])
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: causal_conv1d(
            x, w, b, initial_state=s, segment_ids=segments, activation="silu", return_final_state=True
        ),
        tuple(given.values()),
    )


def test_segments_are_documents_on_their_own():
    given = inputs(batch=1, seq=20)
    segments = torch.tensor([[7] * 5 + [3] * 2 + [9] * 12 + [-1]])
    y, final = causal_conv1d(**given, segment_ids=segments, return_final_state=True)
    pieces, state = [], given["initial_state"]
    for piece in given["x"].split([5, 2, 12, 1], dim=1):
        out, state = causal_conv1d(piece, given["weight"], given["bias"], initial_state=state, return_final_state=True)
        pieces.append(out)
        last_state, state = state, torch.zeros_like(state)
    torch.testing.assert_close(y, torch.cat(pieces, dim=1))
    torch.testing.assert_close(final, last_state)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_is_the_last_token_of_its_window(dtype, activation):
    given = {name: value.detach() for name, value in inputs(seq=1, dtype=dtype).items()}
    whole = causal_conv1d(**given, activation=activation)[:, 0]
    window = torch.cat((given["initial_state"], given["x"].transpose(1, 2)), dim=2)
    step = causal_conv1d_step(window, given["weight"], given["bias"], activation=activation)
    assert step.dtype == dtype
    torch.testing.assert_close(step, whole)


def test_a_step_says_what_does_not_fit():
    given = inputs(seq=1)
    with pytest.raises(ValueError, match=r"window must be .*got \(2, 6, 3\) and \(6, 4\)"):
        causal_conv1d_step(given["initial_state"], given["weight"])
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'gelu'"):
        causal_conv1d_step(torch.zeros(2, 6, 4), given["weight"], activation="gelu")


@pytest.mark.parametrize("cuts", [[1] * 20, [13, 7], [2, 1, 17]])
def test_prefill_in_pieces_and_steps_agree_with_the_whole(cuts):
    given = inputs(seq=20)
    whole, final = causal_conv1d(**given, return_final_state=True)
    state, pieces = given["initial_state"], []
    for piece in given["x"].split(cuts, dim=1):
        out, state = causal_conv1d(piece, given["weight"], given["bias"], initial_state=state, return_final_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is None, reason="causal-conv1d is not installed")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("context", ["none", "state", "documents"])
@pytest.mark.parametrize("kernel", [2, 4])
def test_the_package_is_called_for_the_same_result(kernel, context, activation, monkeypatch):
    """Its own definition stands in for its CUDA kernel: the same arguments, on a CPU. torch's convolution, document by
    document, is the third."""
    if importlib.util.find_spec("causal_conv1d_cuda") is None:  # the compiled part, absent from a pure wheel
        monkeypatch.setitem(sys.modules, "causal_conv1d_cuda", types.ModuleType("causal_conv1d_cuda"))
    package = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    given = inputs(channels=8, kernel=kernel)
    nothing = torch.zeros_like(given["initial_state"])
    if context != "state":
        del given["initial_state"]
    segments = None
    if context == "documents":
        segments = torch.tensor([[7] * 20 + [3] * 2 + [9] * 14 + [-1], [-1] * 5 + [2] * 31 + [0]])
    state = given.get("initial_state")
    theirs = by_package(package, given["x"], given["weight"], given["bias"], activation, state, segments)
    mine = causal_conv1d(**given, activation=activation, segment_ids=segments)
    exact = []
    for row in range(2):
        cuts = [37] if segments is None else torch.unique_consecutive(segments[row], return_counts=True)[1].tolist()
        before = (nothing if state is None else state)[row : row + 1]
        pieces = given["x"][row : row + 1].split(cuts, dim=1)
        exact.append(
            torch.cat(
                [causal_conv1d_reference(p, given["weight"], given["bias"], before, activation) for p in pieces], dim=1
            )
        )
    exact = torch.cat(exact)
    weights = torch.randn_like(exact)
    truth = torch.autograd.grad((exact * weights).sum(), list(given.values()))
    for y in (theirs, mine):
        torch.testing.assert_close(y, exact)
        torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), list(given.values())), truth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_matches_cpu():
    given = {name: value.detach().float().requires_grad_() for name, value in inputs(channels=16).items()}
    there = {name: value.detach().cuda().requires_grad_() for name, value in given.items()}
    here, y = causal_conv1d(**given, activation="silu"), causal_conv1d(**there, activation="silu")
    torch.testing.assert_close(y.cpu(), here)
    weights = torch.randn_like(here)
    mine = torch.autograd.grad((y.cpu() * weights).sum(), list(there.values()))
    torch.testing.assert_close(
        [value.cpu() for value in mine],
        list(torch.autograd.grad((here * weights).sum(), list(given.values()))),
    )


def test_bfloat16_rounds_once():
    given = {name: value.detach().bfloat16() for name, value in inputs(seq=100).items()}
    y = causal_conv1d(**given, activation="silu")
    exact = causal_conv1d_reference(**{name: value.double() for name, value in given.items()}, activation="silu")
    assert y.dtype == torch.bfloat16
    once = (exact.bfloat16().double() - exact).norm()
    assert (y.double() - exact).norm() <= 1.01 * once


def test_non_contiguous_and_empty():
    given = inputs()
    y = causal_conv1d(**given)
    turned = dict(given, x=given["x"].transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(causal_conv1d(**turned), y)
    nothing = inputs(seq=0)
    y, final = causal_conv1d(**nothing, return_final_state=True)
    assert y.shape == (2, 0, 6)
    torch.testing.assert_close(final, nothing["initial_state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 1, 4)}, "squeeze"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"activation": "gelu"}, "None or 'silu'"),
        ({"initial_state": torch.zeros(2, 6, 4)}, "kernel - 1"),
        ({"segment_ids": torch.zeros(2, 4, dtype=torch.long)}, "segment_ids must be"),
        ({"x": torch.zeros(2, 6)}, "batch, seq, channels"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        causal_conv1d(**{**inputs(), **change})
    assert "\n" not in str(caught.value)

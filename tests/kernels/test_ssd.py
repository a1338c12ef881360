"""The scan: chunked against the definition, in pieces against the whole, and at the edges."""

import pytest
import torch

from mohawk.kernels.ssd.interface import ssd, ssd_step

NAMES = ("x", "log_decay", "B", "C", "input_scale", "D", "initial_state")


def inputs(batch=2, seq=150, heads=6, head_dim=16, state=8, groups=(3, 6), strength=1.0, dtype=torch.float64):
    torch.manual_seed(seq + heads)
    values = (
        torch.randn(batch, seq, heads, head_dim),
        -torch.rand(batch, seq, heads) * strength,
        torch.randn(batch, seq, groups[0], state),
        torch.randn(batch, seq, groups[1], state),
        torch.rand(batch, seq, heads),
        torch.randn(heads),
        torch.randn(batch, heads, head_dim, state),
    )
    return {name: value.to(dtype).requires_grad_() for name, value in zip(NAMES, values, strict=True)}


def documents(batch, seq, length=40):
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(batch, seq).clone()
    ids[0] = 0
    return ids


def run(given, backend, segment_ids=None):
    """y, the final state and every gradient, under fixed random weights of both outputs."""
    y, final = ssd(**given, segment_ids=segment_ids, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
        for value in (y, final)
    )
    gradients = torch.autograd.grad(total, list(given.values()))
    return dict(zip(("y", "final", *("d" + name for name in given)), (y, final, *gradients), strict=True))


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


SHAPES = [
    # batch, seq, heads, head_dim, state, groups of B and C
    (2, 150, 6, 16, 8, (3, 6)),  # the last chunk is not full
    (1, 64, 4, 8, 8, (1, 2)),  # exactly one chunk
    (2, 1, 4, 8, 16, (4, 1)),  # one token
    (3, 63, 2, 5, 7, (2, 2)),  # odd everything
    (1, 1000, 2, 3, 33, (1, 1)),
    (1, 130, 1, 96, 2, (1, 1)),  # strongly asymmetric
    (1, 70, 3, 1, 128, (3, 3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strength", [1e-6, 1.0, 100.0])
def test_chunked_is_as_exact_as_the_definition(shape, strength):
    batch, seq, heads, head_dim, state, groups = shape
    given = inputs(batch, seq, heads, head_dim, state, groups, strength)
    segments = documents(batch, seq)
    exact = run(given, "reference", segments)
    for name, value in run(given, "chunked", segments).items():
        assert error(value, exact[name]) < 1e-11, name

    single = {name: value.detach().float().requires_grad_() for name, value in given.items()}
    exact = run({name: v.detach().double().requires_grad_() for name, v in single.items()}, "reference", segments)
    plain = run(single, "reference", segments)
    for name, value in run(single, "chunked", segments).items():
        # Three roundings are always allowed: on few numbers the reference can be exact by luck.
        assert error(value, exact[name]) <= max(2 * error(plain[name], exact[name]), 3.6e-7), name


def test_bfloat16_is_rounded_on_the_way_in_and_out_only():
    given = inputs(2, 300, 6, 64, 64, (3, 3), 1.0, torch.bfloat16)
    exact = run({name: v.detach().double().requires_grad_() for name, v in given.items()}, "reference")
    plain = run(given, "reference")
    for name, value in run(given, "chunked").items():
        assert error(value, exact[name]) <= max(2 * error(plain[name], exact[name]), 3.6e-7), name


def test_gradcheck():
    given = inputs(1, 70, 2, 3, 2, (1, 2))
    segments = documents(1, 70, 33)
    segments[0, 50:] = -1
    assert torch.autograd.gradcheck(
        lambda *values: ssd(**dict(zip(NAMES, values, strict=True)), segment_ids=segments, return_final_state=True),
        tuple(given.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_segments_are_documents_on_their_own(backend):
    given = inputs(batch=1, seq=100)
    cuts = [30, 1, 60, 9]
    segments = torch.repeat_interleave(torch.tensor([4, 0, 9, -1]), torch.tensor(cuts))[None]
    y, final = ssd(**given, segment_ids=segments, return_final_state=True, backend=backend)
    start, state = 0, given["initial_state"]
    for length in cuts:
        part = {
            name: value[:, start : start + length] if value.dim() > 1 and name != "initial_state" else value
            for name, value in given.items()
        }
        part["initial_state"] = state
        piece, last = ssd(**part, return_final_state=True, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], piece)
        start, state = start + length, torch.zeros_like(last)
    torch.testing.assert_close(final, last)


@pytest.mark.parametrize("cuts", [[100, 50], [1, 63, 64, 22], [149, 1]])
def test_prefill_in_pieces_then_steps_agree_with_the_whole(cuts):
    given = {name: value.detach() for name, value in inputs().items()}
    whole, final = ssd(**given, return_final_state=True)
    fixed = {"D": given["D"]}
    moving = {name: given[name] for name in ("x", "log_decay", "B", "C", "input_scale")}
    state, outputs = given["initial_state"], []
    for pieces in zip(*(value.split(cuts, dim=1) for value in moving.values()), strict=True):
        part = dict(zip(moving, pieces, strict=True))
        y, state = ssd(**part, **fixed, initial_state=state, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final)

    state = given["initial_state"]
    for t in range(whole.shape[1]):
        y, state = ssd_step(state, **{name: value[:, t] for name, value in moving.items()}, **fixed)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("log_decay", [-1e-6, -1.0, -12.0, -100.0, float("-inf")])
def test_eight_thousand_tokens_of_any_decay_stay_finite(log_decay):
    given = inputs(1, 8192, 2, 4, 4, (1, 1), dtype=torch.float32)
    given["log_decay"] = torch.full((1, 8192, 2), log_decay, requires_grad=True)
    for name, value in run(given, "chunked").items():
        assert value.isfinite().all(), name
    y = ssd(**given)
    # After the first token a decay of 0 leaves only the token itself.
    if log_decay == float("-inf"):
        own = (given["B"] * given["C"]).sum(-1) * given["input_scale"] + given["D"]
        torch.testing.assert_close(y, own.unsqueeze(-1) * given["x"])


def test_mixed_decays_keep_the_weak_gradients():
    given = inputs(1, 256, 2, 4, 4, (2, 2), dtype=torch.float32)
    decays = torch.full((1, 256, 2), -1e-3)
    decays[:, ::5] = -100.0  # the float32 running sum reaches -1300 inside a chunk
    given["log_decay"] = decays.requires_grad_()
    exact = run({name: v.detach().double().requires_grad_() for name, v in given.items()}, "reference")
    for name, value in run(given, "chunked").items():
        assert error(value, exact[name]) < 5e-7, name


def test_autocast_changes_nothing():
    given = inputs(dtype=torch.float32)
    y = ssd(**given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssd(**given)
        gradients = run(given, "chunked")
    assert torch.equal(y, inside)
    for name, value in run(given, "chunked").items():
        assert torch.equal(value, gradients[name]), name


def test_non_contiguous_and_absent_arguments():
    given = inputs(dtype=torch.float32)
    bare = {name: given[name] for name in ("x", "log_decay", "B", "C")}
    neutral = dict(bare, input_scale=torch.ones(2, 150, 6), D=torch.zeros(6), initial_state=torch.zeros(2, 6, 16, 8))
    torch.testing.assert_close(ssd(**bare), ssd(**neutral))
    turned = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in bare.items()}
    assert torch.equal(ssd(**bare), ssd(**turned))


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0)])
def test_empty(batch, seq):
    given = inputs(batch, seq)
    for backend in ("reference", "chunked"):
        y, final = ssd(**given, return_final_state=True, backend=backend)
        assert y.shape == (batch, seq, 6, 16)
        assert torch.equal(final, given["initial_state"])
    run(given, "chunked")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 150, 6)}, "batch, seq, heads, head_dim"),
        ({"log_decay": torch.zeros(2, 150, 5)}, "log_decay must be"),
        ({"B": torch.zeros(2, 150, 4, 8)}, "must divide the 6 heads"),
        ({"C": torch.zeros(2, 150, 3, 9)}, "one state_size"),
        ({"C": torch.zeros(2, 151, 3, 8)}, "C must be"),
        ({"input_scale": torch.zeros(2, 150)}, "input_scale must be"),
        ({"D": torch.zeros(5)}, "D must be"),
        ({"initial_state": torch.zeros(2, 6, 8, 16)}, "state must be"),
        ({"segment_ids": torch.zeros(2, 10, dtype=torch.long)}, "segment_ids must be"),
        ({"segment_ids": torch.zeros(2, 150)}, "must be integers"),
        ({"B": torch.zeros(2, 150, 3, 8, dtype=torch.long)}, "floating point"),
        ({"initial_state": torch.zeros(2, 6, 16, 8, dtype=torch.long)}, "the state must be floating point"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "mamba_ssm"}, "mamba_ssm"),  # not installed, or float64
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        ssd(**{**inputs(), **change})
    assert "\n" not in str(caught.value)


def test_gradients_of_strong_decays_are_no_rounding():
    """A decay of exp(-50) has a gradient of 1e-22, beside tokens' own of 1."""
    given = inputs(1, 140, 2, 4, 4, (2, 1))
    given["log_decay"] = torch.full_like(given["log_decay"], -50.0).requires_grad_()
    exact = run(given, "reference")
    for name, value in run(given, "chunked").items():
        assert error(value, exact[name]) < 1e-11, name

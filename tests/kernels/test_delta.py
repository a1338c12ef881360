"""The gated delta rule: chunked against the definition and transformers, in pieces against the whole, at the edges."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mohawk.kernels.delta.interface import gated_delta_rule, gated_delta_step

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
KINDS = pytest.mark.parametrize("channels", [False, True], ids=["a decay per head", "a decay per channel"])


def inputs(batch=2, seq=150, heads=3, key=16, value=8, channels=False, strength=1.0, dtype=torch.float64, alike=0.0):
    """alike: how much of each key all tokens share."""
    torch.manual_seed(seq + heads)
    k = F.normalize(torch.randn(batch, seq, heads, key) + alike * torch.randn(heads, key), dim=-1)
    values = (
        torch.randn(batch, seq, heads, key) * key**-0.5,
        k,
        torch.randn(batch, seq, heads, value),
        torch.rand(batch, seq, heads),
        -torch.rand(batch, seq, heads, *[key] * channels) * strength,
        torch.randn(batch, heads, key, value),
    )
    return {name: value.to(dtype).requires_grad_() for name, value in zip(NAMES, values, strict=True)}


def cast(given, dtype):
    return {name: value.detach().to(dtype).requires_grad_() for name, value in given.items()}


def documents(batch, seq, length=40):
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(batch, seq).clone()
    ids[0] = 0
    return ids


def outputs_and_gradients(rule, given):
    """y, the final state and every gradient, under fixed random weights of both outputs."""
    y, final = rule(**given)
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
        for value in (y, final)
    )
    gradients = torch.autograd.grad(total, list(given.values()))
    return dict(zip(("y", "final", *("d" + name for name in given)), (y, final, *gradients), strict=True))


def run(given, backend, segment_ids=None):
    return outputs_and_gradients(
        lambda **x: gated_delta_rule(**x, segment_ids=segment_ids, return_final_state=True, backend=backend), given
    )


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def qwen(q, k, v, beta, log_decay, initial_state, function="torch_chunk_gated_delta_rule"):
    """transformers' code in torch, which scales q itself."""
    qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    q = q * q.shape[-1] ** 0.5
    rule = inspect.unwrap(getattr(qwen3_5, function))
    return rule(q, k, v, log_decay, beta, initial_state=initial_state, output_final_state=True)


def kimi(q, k, v, beta, log_decay, initial_state, function="chunk_kimi_delta_attention"):
    kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q = q * q.shape[-1] ** 0.5
    rule = inspect.unwrap(getattr(kimi_linear, function))
    return rule(q, k, v, log_decay, beta, initial_state=initial_state, output_final_state=True)


SHAPES = [
    # batch, seq, heads, key_dim, value_dim
    (2, 150, 3, 16, 8),  # the last chunk is not full
    (1, 64, 2, 8, 8),  # exactly one chunk
    (2, 1, 4, 8, 16),  # one token
    (3, 63, 2, 5, 7),  # odd everything
    (1, 300, 1, 3, 33),
    (1, 130, 1, 2, 96),  # strongly asymmetric
    (1, 70, 1, 256, 1),
]


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strength", [1e-6, 1.0, 100.0])
def test_chunked_is_the_recurrence(shape, strength, channels):
    given = inputs(*shape, channels, strength)
    segments = documents(*shape[:2])
    exact = run(given, "reference", segments)
    for name, value in run(given, "chunked", segments).items():
        assert error(value, exact[name]) < 1e-11, name


@KINDS
@pytest.mark.parametrize("strength", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("alike", [0.0, 3.0], ids=["keys apart", "keys alike"])
def test_chunked_is_as_exact_as_transformers(strength, alike, channels):
    """The same expression in torch: where keys are alike, chunks round more than the recurrence does."""
    given = inputs(1, 200, 2, 64, 32, channels, strength, torch.float32, alike)
    exact = run(cast(given, torch.float64), "reference")
    theirs = outputs_and_gradients(kimi if channels else qwen, given)
    for name, value in run(given, "chunked").items():
        assert error(value, exact[name]) <= 2 * error(theirs[name], exact[name]), name


@KINDS
def test_the_numbers_of_transformers(channels):
    """To 1e-6 in float32, chunk by chunk and token by token, with a state to begin with."""
    given = inputs(2, 150, 3, 32, 24, channels, 0.5, torch.float32)
    given["q"] = (given["q"] * 3).detach().requires_grad_()
    y, final = gated_delta_rule(**given, return_final_state=True)
    rule, steps = (kimi, "recurrent_kimi_delta_attention") if channels else (qwen, "torch_recurrent_gated_delta_rule")
    for found, state in (rule(**given), rule(**given, function=steps)):
        torch.testing.assert_close(y, found, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(final, state, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_on_the_way_in_and_out_only():
    given = inputs(2, 300, 2, 64, 64, strength=0.1, dtype=torch.bfloat16)
    exact = run(cast(given, torch.float64), "reference")
    plain = run(given, "reference")
    for name, value in run(given, "chunked").items():
        assert value.dtype == (torch.float32 if name == "final" else torch.bfloat16)
        assert error(value, exact[name]) <= max(2 * error(plain[name], exact[name]), 3.6e-7), name


@KINDS
def test_gradcheck(channels):
    given = inputs(1, 70, 2, 3, 2, channels)
    segments = documents(1, 70, 33)
    segments[0, 50:] = -1
    assert torch.autograd.gradcheck(
        lambda *values: gated_delta_rule(
            **dict(zip(NAMES, values, strict=True)), segment_ids=segments, return_final_state=True
        ),
        tuple(given.values()),
        fast_mode=True,
    )


@KINDS
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -1.0, -50.0, float("-inf")])
def test_gates_that_are_open_or_shut(beta, log_decay, channels):
    given = inputs(1, 140, 2, 4, 3, channels)
    given["beta"] = torch.full_like(given["beta"], beta).requires_grad_()
    given["log_decay"] = torch.full_like(given["log_decay"], log_decay).requires_grad_()
    exact = run(given, "reference")
    for name, value in run(given, "chunked").items():
        assert value.isfinite().all(), name
        assert error(value, exact[name]) < 1e-11, name
    if log_decay == float("-inf"):  # each token alone
        own = ((given["q"] * given["k"]).sum(-1) * beta).unsqueeze(-1) * given["v"]
        torch.testing.assert_close(gated_delta_rule(**given), own)
    elif beta == 0:  # nothing is written
        _, final = gated_delta_rule(**given, return_final_state=True)
        torch.testing.assert_close(final, given["initial_state"] * given["log_decay"].sum(1).exp().view(1, 2, -1, 1))


@KINDS
def test_mixed_decays_keep_the_weak_gradients(channels):
    given = inputs(1, 256, 2, 8, 4, channels, dtype=torch.float32)
    decays = torch.full_like(given["log_decay"], -1e-3)
    decays[:, ::5] = -100.0  # the float32 running sum reaches -1300 inside a chunk
    given["log_decay"] = decays.requires_grad_()
    exact = run(cast(given, torch.float64), "reference")
    for name, value in run(given, "chunked").items():
        assert error(value, exact[name]) < 1e-6, name


@KINDS
@pytest.mark.parametrize("log_decay", [-1e-6, -1.0, -12.0, float("-inf")])
def test_eight_thousand_tokens_stay_finite(log_decay, channels):
    given = inputs(1, 8192, 1, 4, 4, channels, dtype=torch.float32)
    given["log_decay"] = torch.full_like(given["log_decay"], log_decay).requires_grad_()
    for name, value in run(given, "chunked").items():
        assert value.isfinite().all(), name


@KINDS
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_segments_are_documents_on_their_own(backend, channels):
    given = inputs(1, 100, channels=channels)
    cuts = [30, 1, 60, 9]
    segments = torch.repeat_interleave(torch.tensor([4, 0, 9, -1]), torch.tensor(cuts))[None]
    y, final = gated_delta_rule(**given, segment_ids=segments, return_final_state=True, backend=backend)
    start, state = 0, given["initial_state"]
    for length in cuts:
        part = {name: given[name][:, start : start + length] for name in NAMES[:-1]}
        piece, last = gated_delta_rule(**part, initial_state=state, return_final_state=True, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], piece)
        start, state = start + length, torch.zeros_like(last)
    torch.testing.assert_close(final, last)


@KINDS
@pytest.mark.parametrize("cuts", [[100, 50], [1, 63, 64, 22], [149, 1]])
def test_prefill_in_pieces_then_steps_agree_with_the_whole(cuts, channels):
    given = {name: value.detach() for name, value in inputs(channels=channels).items()}
    whole, final = gated_delta_rule(**given, return_final_state=True)
    moving = {name: given[name] for name in NAMES[:-1]}
    state, outputs = given["initial_state"], []
    for pieces in zip(*(value.split(cuts, dim=1) for value in moving.values()), strict=True):
        part = dict(zip(moving, pieces, strict=True))
        y, state = gated_delta_rule(**part, initial_state=state, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final)

    state = given["initial_state"]
    for t in range(whole.shape[1]):
        y, state = gated_delta_step(state, **{name: value[:, t] for name, value in moving.items()})
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, final)


def test_a_step_leaves_its_state_and_keeps_it_wide():
    given = inputs(1, 1, 2, 4, 3, dtype=torch.bfloat16)
    state = torch.randn(1, 2, 4, 3)
    before = state.clone()
    one = {name: given[name][:, 0] for name in NAMES[:-1]}
    with torch.autocast("cpu", torch.bfloat16):
        y, after = gated_delta_step(state, **one)
    assert torch.equal(state, before)
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
    exact, exact_state = gated_delta_step(state.double(), **{name: value.double() for name, value in one.items()})
    torch.testing.assert_close(after.double(), exact_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(y, exact.to(torch.bfloat16))


def test_autocast_changes_nothing():
    given = inputs(dtype=torch.float32)
    plain = run(given, "chunked")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(given, "chunked")
    for name, value in plain.items():
        assert torch.equal(value, inside[name]), name


def test_non_contiguous_and_absent_arguments():
    given = inputs(dtype=torch.float32)
    bare = {name: given[name] for name in NAMES[:-1]}
    torch.testing.assert_close(
        gated_delta_rule(**bare), gated_delta_rule(**bare, initial_state=torch.zeros(2, 3, 16, 8)), rtol=0, atol=0
    )
    turned = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in bare.items()}
    assert torch.equal(gated_delta_rule(**bare), gated_delta_rule(**turned))


def test_blocks_of_heads_and_rows_change_nothing(monkeypatch):
    from mohawk.kernels.delta import chunked

    given = inputs(3, 100, 5)
    whole = run(given, "chunked")
    for entries in (100 * 64 * 2, 1):  # two heads at a time, the last one alone; one head of one row
        monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", entries)
        for name, value in run(given, "chunked").items():
            torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0)])
def test_empty(batch, seq):
    given = inputs(batch, seq)
    for backend in ("reference", "chunked"):
        y, final = gated_delta_rule(**given, return_final_state=True, backend=backend)
        assert y.shape == (batch, seq, 3, 8)
        assert torch.equal(final, given["initial_state"])
    assert run(given, "chunked")["dinitial_state"].shape == (batch, 3, 16, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 150, 3)}, "batch, seq, heads, value_dim"),
        ({"k": torch.zeros(2, 150, 1, 16)}, "k must be .* as v has them"),
        ({"q": torch.zeros(2, 150, 3, 8)}, "one key_dim, got 8 and 16"),
        ({"beta": torch.zeros(2, 150, 3, 1)}, "beta must be"),
        ({"log_decay": torch.zeros(2, 150)}, "log_decay must be"),
        ({"log_decay": torch.zeros(2, 150, 3, 8)}, r"log_decay must be \(batch, seq, heads\) = \(2, 150, 3\) or"),
        ({"initial_state": torch.zeros(2, 3, 8, 16)}, "state must be"),
        ({"segment_ids": torch.zeros(2, 10, dtype=torch.long)}, "segment_ids must be"),
        ({"beta": torch.zeros(2, 150, 3, dtype=torch.long)}, "beta must be floating point"),
        ({"initial_state": torch.zeros(2, 3, 16, 8, dtype=torch.long)}, "the state must be floating point"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        gated_delta_rule(**{**inputs(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 1, 3, 8)}, "v must be"),
        ({"k": torch.zeros(2, 3, 8)}, "gated_delta_step: q and k must have one key_dim"),
        ({"log_decay": torch.zeros(2, 4)}, "log_decay must be"),
        ({"state": torch.zeros(2, 3, 8, 8)}, "the state must be"),
    ],
)
def test_mistakes_of_a_step_are_named(change, message):
    given = {name: value[:, 0] if name != "initial_state" else value for name, value in inputs().items()}
    given["state"] = given.pop("initial_state")
    with pytest.raises(ValueError, match=message) as caught:
        gated_delta_step(**{**given, **change})
    assert "\n" not in str(caught.value)

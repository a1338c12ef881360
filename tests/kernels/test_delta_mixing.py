"""The matrix of a gated delta rule: its definition, its closed form and the recurrence against each other, written out
strip by strip, and its distance from other matrices against autograd through whole ones."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.kernels.delta.interface import gated_delta_rule
from mohawk.kernels.mixing import chunked as mixing_chunked
from mohawk.kernels.mixing.interface import head_mean_distance, mixing_distance, mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, SSDMixing
from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.kernels.mixing.strips import Block, strips_of
from tests.helpers.mixings import cast, documents, run

METRICS = ["frobenius", "squared", "mse", "relative"]
KINDS = pytest.mark.parametrize("channels", [False, True], ids=["a decay per head", "a decay per channel"])


def random(generator, *shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def delta(batch, heads, seq, width, channels=False, strength=1.0, seed=0, alike=0.0, **options):
    """alike: how much of each key all tokens share."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, seq, heads, width, generator=g, dtype=torch.float64) for _ in range(2))
    k = F.normalize(k + alike * torch.randn(heads, width, generator=g, dtype=torch.float64), dim=-1)
    log_decay = random(g, batch, seq, heads, *[width] * channels) * -strength
    given = (q * width**-0.5, k, random(g, batch, seq, heads), log_decay)
    return DeltaMixing(*(x.requires_grad_() for x in given), **options)


def attention(batch, heads, kv_heads, seq, width, seed=1, **options):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, n, seq, width, generator=g, dtype=torch.float64) for n in (heads, kv_heads))
    return AttentionMixing(q.requires_grad_(), k.requires_grad_(), **options)


def state_space(batch, heads, seq, state, seed=2, **options):
    g = torch.Generator().manual_seed(seed)
    C, B = (random(g, batch, seq, 1, state) - 0.5 for _ in range(2))
    given = (C, B, -random(g, batch, seq, heads), random(g, batch, seq, heads), random(g, heads))
    return SSDMixing(*(x.requires_grad_() for x in given), **options)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def closed_form(mixing):
    """tril(Q K^T . decays) (I + diag(beta) tril(K K^T . decays, -1))^-1 diag(beta), the decays between two tokens as
    products of their exponentials, with a 0 at the start of a segment."""
    q, k, beta, g = (x.transpose(1, 2) for x in mixing.tensors)
    alpha = (g if g.dim() == 4 else g.unsqueeze(-1)).exp().expand(k.shape).clone()
    if mixing.segment_ids is not None:
        starts = mixing.segment_ids[:, 1:] != mixing.segment_ids[:, :-1]
        alpha = torch.cat((alpha[:, :, :1], alpha[:, :, 1:] * ~starts[:, None, :, None]), 2)
    seq = k.shape[2]
    scores, overlaps = (torch.zeros(*k.shape[:3], seq, dtype=k.dtype) for _ in range(2))
    for i in range(seq):
        between = torch.ones_like(k[:, :, 0])
        for j in range(i, -1, -1):
            scores[:, :, i, j] = (q[:, :, i] * k[:, :, j] * between).sum(-1)
            overlaps[:, :, i, j] = (k[:, :, i] * k[:, :, j] * between).sum(-1)
            between = between * alpha[:, :, j]
    lower = beta.unsqueeze(-1) * overlaps.tril(-1)
    return scores @ torch.linalg.inv(torch.eye(seq, dtype=k.dtype) + lower) * beta.unsqueeze(-2)


@KINDS
@pytest.mark.parametrize("seq", [1, 63, 70])
def test_definition_closed_form_recurrence_and_strips_are_one_matrix(seq, channels):
    for ids in (None, documents(2, seq, 25)):
        mixing = delta(2, 3, seq, 8, channels, segment_ids=ids)
        matrix = dense_matrix(mixing)
        torch.testing.assert_close(matrix, closed_form(mixing), rtol=0, atol=1e-13)
        torch.testing.assert_close(mixing_matrix(mixing), matrix.detach(), rtol=0, atol=1e-12)
        v = torch.randn(2, seq, 3, 4, dtype=torch.float64)
        for backend in ("reference", "chunked"):
            y = gated_delta_rule(
                mixing.q, mixing.k, v, beta=mixing.beta, log_decay=mixing.log_decay, segment_ids=ids, backend=backend
            )
            torch.testing.assert_close((matrix @ v.transpose(1, 2)).transpose(1, 2), y, rtol=0, atol=1e-10)


@KINDS
def test_rows_heads_and_their_mean(channels):
    mixing = delta(2, 6, 150, 5, channels, segment_ids=documents(2, 150, padding=20))
    whole = mixing_matrix(mixing)
    for rows in ((0, 1), (5, 9), (63, 65), (70, 141), (149, 150), (9, 9)):
        torch.testing.assert_close(mixing_matrix(mixing, rows=rows), whole[:, :, slice(*rows)])
    torch.testing.assert_close(mixing_matrix(mixing, heads=[4, 1]), whole[:, [4, 1]])
    mean = mixing_matrix(mixing, rows=(3, 130), heads=[0, 5], mean_heads=True)
    torch.testing.assert_close(mean, whole[:, [0, 5], 3:130].mean(1))
    assert mixing_matrix(cast(mixing, torch.bfloat16)).dtype == torch.float32


def test_a_slice_of_a_long_context_is_the_rule():
    """Rows near the end of 50,000 tokens: the whole matrix would be 20 GB."""
    mixing = delta(1, 2, 50_000, 4, strength=1e-4)
    v = torch.randn(1, 50_000, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        y = gated_delta_rule(mixing.q, mixing.k, v, beta=mixing.beta, log_decay=mixing.log_decay)
    for rows in ((0, 3), (25_001, 25_003), (49_990, 50_000)):
        matrix = mixing_matrix(mixing, rows=rows, heads=[1])
        mixed = torch.einsum("bhij,bjhp->bihp", matrix, v[:, :, 1:])
        torch.testing.assert_close(mixed, y[:, rows[0] : rows[1], 1:], rtol=0, atol=1e-10)


def pairs(seq, channels):
    ids = documents(2, seq, padding=seq // 5)
    return {
        "delta, attention": (delta(2, 6, seq, 8, channels), attention(2, 6, 2, seq, 16)),
        "packed, window, fewer teacher heads": (
            delta(2, 6, seq, 8, channels, segment_ids=ids),
            attention(2, 3, 1, seq, 16, window=17, segment_ids=ids),
        ),
        "only the student is packed": (delta(2, 2, seq, 8, channels, segment_ids=ids), attention(2, 2, 1, seq, 4)),
        "strong decays, more teacher heads": (delta(2, 3, seq, 8, channels, 100.0), attention(2, 6, 2, seq, 16)),
        "delta, ssd": (delta(2, 2, seq, 5, channels, segment_ids=ids), state_space(2, 4, seq, 8, segment_ids=ids)),
        "delta, delta": (delta(2, 2, seq, 9, channels), delta(2, 2, seq, 3, not channels, seed=5, segment_ids=ids)),
        "attention, delta": (attention(2, 4, 2, seq, 8, window=33), delta(2, 2, seq, 8, channels, segment_ids=ids)),
        "ssd, delta": (state_space(2, 2, seq, 8), delta(2, 2, seq, 4, channels)),
        "keys alike, no decay": (delta(1, 1, seq, 16, channels, 0.0, alike=5.0), attention(1, 1, 1, seq, 3)),
        "one channel": (delta(1, 2, seq, 1, channels, 1e-3), attention(1, 2, 1, seq, 3)),
    }


PAIRS = list(pairs(1, False))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few heads, so that small shapes are cut too."""
    monkeypatch.setattr(mixing_chunked, "STRIP_ENTRIES", 1 << 13)


@pytest.mark.usefixtures("small_blocks")
@KINDS
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seq", [1, 63, 150])
def test_chunked_equals_the_definition_in_float64(seq, name, channels):
    student, teacher = pairs(seq, channels)[name]
    for metric, reduction in zip(METRICS, ["mean", "sum", "none", "none"], strict=True):
        exact = run(student, teacher, metric=metric, reduction=reduction, backend="reference")
        mine = run(student, teacher, metric=metric, reduction=reduction, backend="chunked")
        for value, expected in zip(mine, exact, strict=True):
            assert value.shape == expected.shape
            assert error(value, expected) < 1e-11, metric


@pytest.mark.usefixtures("small_blocks")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seq", [1, 150])
def test_chunked_is_as_exact_as_the_definition(seq, name, dtype, channels):
    student, teacher = (cast(mixing, dtype) for mixing in pairs(seq, channels)[name])
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    plain = run(student, teacher, backend="reference")
    for index, value in enumerate(run(student, teacher, backend="chunked")):
        # Some roundings are always allowed: on few numbers the reference can be exact by luck.
        assert error(value, exact[index]) <= max(2 * error(plain[index], exact[index]), 6e-7), index


def test_the_widest_head():
    student, teacher = cast(delta(1, 1, 200, 256, strength=0.1), torch.float32), attention(1, 1, 1, 200, 8)
    teacher = cast(teacher, torch.float32)
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    plain = run(student, teacher, backend="reference")
    for index, value in enumerate(run(student, teacher)):
        assert error(value, exact[index]) <= 2 * error(plain[index], exact[index]), index


@KINDS
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -1.0, -50.0, float("-inf")])
def test_gates_that_are_open_or_shut(beta, log_decay, channels):
    student, teacher = delta(1, 2, 140, 4, channels), attention(1, 2, 1, 140, 4)
    student = dataclasses.replace(
        student,
        beta=torch.full_like(student.beta, beta).requires_grad_(),
        log_decay=torch.full_like(student.log_decay, log_decay).requires_grad_(),
    )
    exact = run(student, teacher, backend="reference")
    for value, expected in zip(run(student, teacher), exact, strict=True):
        assert value.isfinite().all()
        assert error(value, expected) < 1e-10
    if beta == 0 or log_decay == float("-inf"):
        matrix, own = mixing_matrix(student), torch.zeros(1, 2, 140, 140, dtype=torch.float64)
        own.diagonal(dim1=-2, dim2=-1).copy_(((student.q * student.k).sum(-1) * beta).transpose(1, 2))
        torch.testing.assert_close(matrix, own)


@KINDS
def test_mixed_decays_keep_the_weak_gradients(channels):
    student, teacher = delta(1, 2, 256, 8, channels), attention(1, 2, 2, 256, 8)
    decays = torch.full_like(student.log_decay, -1e-3)
    decays[:, ::7] = -100.0
    student, teacher = cast(dataclasses.replace(student, log_decay=decays), torch.float32), cast(teacher, torch.float32)
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    for value, expected in zip(run(student, teacher), exact, strict=True):
        assert error(value, expected) < 5e-7


def test_what_fades_leaves_no_denormal_numbers():
    """Products with them take a CPU tens of times as long; a walk over many chunks fades through them all."""
    student = cast(delta(1, 1, 1500, 8, strength=0.2), torch.float32)
    with torch.no_grad():
        strips = strips_of(student, Block(slice(0, 1), 0, 1, 1), torch.float32, True)
        strips.strip(1472, 1500, 0)
    (walk,) = strips.walks
    for value in (*walk, strips.seen, strips.crossing, strips.left):
        assert not ((value != 0) & (value.abs() < torch.finfo(torch.float32).tiny * 1e6)).any()
    assert walk[0].any() and not walk[-1].any(), "it fades, all of it"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    batch, seq, heads = draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.sampled_from([1, 2, 4]))
    ids = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:seq]
        row = torch.cat((row, torch.full((seq - len(row),), -1)))
        ids = row.expand(batch, seq).clone()
        ids[-1] = ids[-1].flip(0)
    strength = draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    student = delta(batch, heads, seq, draw(st.integers(1, 20)), draw(st.booleans()), strength, segment_ids=ids)
    window = draw(st.none() | st.integers(1, 80))
    teacher = attention(batch, draw(st.sampled_from([heads, 4])), 1, seq, 6, window=window, segment_ids=ids)
    metric = draw(st.sampled_from(METRICS))
    exact = run(student, teacher, metric=metric, backend="reference")
    for value, expected in zip(run(student, teacher, metric=metric, backend="chunked"), exact, strict=True):
        assert (value - expected).norm() < 1e-10 * expected.norm() + 1e-15


@KINDS
def test_gradcheck(channels):
    ids = documents(1, 70, 33, padding=5)
    student, teacher = delta(1, 2, 70, 3, channels, segment_ids=ids), attention(1, 2, 1, 70, 3, segment_ids=ids)
    for metric in METRICS:
        assert torch.autograd.gradcheck(
            lambda *tensors, metric=metric: mixing_distance(
                DeltaMixing(*tensors, segment_ids=ids), teacher, metric=metric, reduction="none"
            ),
            student.tensors,
            fast_mode=True,
        )


def test_autocast_and_layout_change_nothing():
    student = cast(delta(2, 4, 100, 8), torch.float32)
    teacher = cast(attention(2, 4, 2, 100, 8), torch.float32)
    plain = run(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(student, teacher)
    turned = dataclasses.replace(
        student,
        **{
            name: value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for name, value in vars(student).items()
            if isinstance(value, torch.Tensor)
        },
    )
    for value, other, third in zip(plain, inside, run(turned, teacher), strict=True):
        assert torch.equal(value, other)
        assert torch.equal(value, third)


def test_only_the_asked_for_gradients_are_made():
    student, teacher = delta(1, 2, 40, 4), attention(1, 2, 2, 40, 4)
    exact = run(student, teacher)
    beta = student.beta.detach().requires_grad_()
    mixing_distance(
        DeltaMixing(student.q.detach(), student.k.detach(), beta, student.log_decay.detach()), teacher
    ).backward()
    torch.testing.assert_close(beta.grad, exact[3] / 0.5)  # run weighs the value
    assert teacher.q.grad is None
    with torch.no_grad():
        assert not mixing_distance(student, teacher).requires_grad


def test_padding_contributes_nothing():
    ids = documents(2, 100, padding=37)
    ids[0, :9] = -1
    student, teacher = delta(2, 3, 100, 8, segment_ids=ids), attention(2, 3, 3, 100, 8, segment_ids=ids)
    results = run(student, teacher)
    q = student.q.detach().clone()
    q[ids < 0] = 100.0  # what stands in the padding must not matter
    q.requires_grad_()
    assert torch.equal(results[0], run(dataclasses.replace(student, q=q), teacher)[0])
    for gradient in results[1:]:
        assert gradient[ids < 0].abs().max() < 1e-15 and gradient[ids >= 0].any()


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0)])
def test_empty(batch, seq):
    student, teacher = delta(batch, 2, seq, 4), attention(batch, 2, 2, seq, 4)
    for backend in ("reference", "chunked"):
        value = mixing_distance(student, teacher, reduction="sum", backend=backend)
        assert value == 0
        (gradient,) = torch.autograd.grad(value, student.q)
        assert gradient.shape == student.q.shape
    assert mixing_matrix(student).shape == (batch, 2, seq, seq)


@KINDS
@pytest.mark.parametrize("metric", ["mse", "frobenius"])
def test_means_over_heads(metric, channels, monkeypatch):
    from mohawk.kernels.mixing import mean_heads

    student, teacher = delta(2, 6, 150, 5, channels), attention(2, 4, 2, 150, 8)
    s, a = (x.unflatten(1, (2, -1)).mean(2) for x in (dense_matrix(student), dense_matrix(teacher).detach()))
    squares = (s - a).square().sum((2, 3))
    exact = (squares / 150**2).mean() if metric == "mse" else squares.sqrt().mean()
    wanted = torch.autograd.grad(exact, student.tensors)
    for entries in (1 << 21, 6 * 150 * 7):  # strips of 64 rows; strips of 7, which chunks do not divide
        monkeypatch.setattr(mean_heads, "STRIP_ENTRIES", entries)
        value = head_mean_distance(student, teacher, metric=metric, groups=2)
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=0)
        for ours, theirs in zip(torch.autograd.grad(value, student.tensors), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))
    value = head_mean_distance(attention(2, 4, 2, 150, 8), student, metric=metric, groups=2)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-11, atol=0)


x = torch.zeros(1, 10, 4, 8)
gate = torch.zeros(1, 10, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeltaMixing(x[0], x[0], gate, gate), "q and k must be"),
        (lambda: DeltaMixing(x, x[:, :, :2], gate, gate), "both alike, got"),
        (lambda: DeltaMixing(x[..., :0], x[..., :0], gate, gate), "d is 0"),
        (lambda: DeltaMixing(x, x, gate[..., :1], gate), "beta must be"),
        (lambda: DeltaMixing(x, x, gate, gate[..., :1]), "log_decay must be"),
        (lambda: DeltaMixing(x, x, gate, x[..., :1]), "for a decay of each channel"),
        (lambda: DeltaMixing(x, x, gate.long(), gate), "beta must be floating point"),
        (lambda: DeltaMixing(x, x, gate, gate, torch.zeros(1, 9).long()), "segment_ids must be"),
        (
            lambda: mixing_distance(DeltaMixing(x, x, gate, gate), attention(1, 4, 4, 10, 3), metric="kl"),
            "a DeltaMixing",
        ),
        (
            lambda: head_mean_distance(DeltaMixing(x, x, gate, gate), attention(1, 4, 4, 10, 3), metric="scores"),
            "a DeltaMixing has no scores",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

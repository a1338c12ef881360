"""Attention that sees what comes later too: matrices and distances against softmax written out, in float64."""

import math

import pytest
import torch

from mohawk.kernels.mixing import chunked as mixing_chunked
from mohawk.kernels.mixing.interface import head_mean_distance, mixing_distance, mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from tests.helpers.mixings import cast, run

PADDED = torch.tensor([[0] * 90 + [1] * 30 + [-1] * 10, [-1] * 7 + [0] * 123])


def attention(heads, kv_heads, width, seed, seq=130, batch=2, **options):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, seq, width), (batch, kv_heads, seq, width)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return AttentionMixing(q, k, causal=False, **options)


def seen(mixing):
    """(b, 1, n, n): who sees whom: everyone of its own document, up to the window's reach on both sides."""
    n = mixing.shape[2]
    places = torch.arange(n)
    visible = torch.ones(mixing.shape[0], n, n, dtype=torch.bool)
    if mixing.window is not None:
        visible &= (places[:, None] - places).abs() < mixing.window
    if mixing.segment_ids is not None:
        visible &= mixing.segment_ids[:, :, None] == mixing.segment_ids[:, None, :]
    return visible[:, None]


def scores(mixing):
    k = mixing.k.repeat_interleave(mixing.q.shape[1] // mixing.k.shape[1], 1)
    raw = mixing.q @ k.mT * (mixing.q.shape[-1] ** -0.5 if mixing.scale is None else mixing.scale)
    return raw if mixing.softcap is None else mixing.softcap * torch.tanh(raw / mixing.softcap)


def matrix(mixing):
    return scores(mixing).masked_fill(~seen(mixing), -math.inf).softmax(-1)


def distance(student, teacher, metric):
    """(b, h) by definition."""
    heads = max(student.shape[1], teacher.shape[1])
    s, a = (matrix(x).repeat_interleave(heads // x.shape[1], 1) for x in (student, teacher))
    real = torch.ones(s.shape[0], s.shape[2], dtype=torch.bool)
    for mixing in (student, teacher):
        if mixing.segment_ids is not None:
            real &= mixing.segment_ids >= 0
    tokens = real.sum(-1, keepdim=True)
    if metric == "kl":
        rows = torch.where(a > 0, a * (a.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0.0).sum(-1)
        return (rows * real[:, None]).sum(-1) / tokens
    s, a = (x * (real[:, None, :, None] & real[:, None, None, :]) for x in (s, a))
    squares = (s - a).square().sum((-1, -2))
    own = a.square().sum((-1, -2))
    return {"frobenius": squares.sqrt(), "mse": squares / tokens**2, "relative": (squares / own).sqrt()}[metric]


PAIRS = {
    "plain": lambda: (attention(4, 2, 8, 0), attention(4, 4, 16, 1)),
    "fewer teacher heads": lambda: (attention(6, 3, 5, 0), attention(2, 1, 7, 1, scale=0.3)),
    "windows": lambda: (attention(2, 2, 8, 0, window=70), attention(2, 2, 8, 1, window=17)),
    "softcap": lambda: (attention(2, 1, 8, 0, softcap=1.5), attention(4, 2, 8, 1, softcap=2.0)),
    "padding and documents": lambda: (
        attention(4, 2, 8, 0, segment_ids=PADDED, window=40, softcap=3.0),
        attention(4, 4, 16, 1, segment_ids=PADDED, window=33),
    ),
    "one token": lambda: (attention(2, 2, 4, 0, seq=1), attention(2, 2, 4, 1, seq=1)),
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", PAIRS)
def test_distances_and_gradients(name, backend, monkeypatch):
    monkeypatch.setattr(mixing_chunked, "STRIP_ENTRIES", 1 << 13)
    student, teacher = PAIRS[name]()
    for metric in ("frobenius", "mse", "relative", "kl"):
        expected = distance(student, teacher, metric)
        if name == "one token":  # both are 1: a distance of 0, whose root has no gradient
            assert mixing_distance(student, teacher, metric=metric, backend=backend) == 0
            continue
        weights = torch.linspace(0.5, 2, expected.numel(), dtype=expected.dtype).view(expected.shape)
        wanted = [expected, *torch.autograd.grad((expected * weights).sum(), student.tensors)]
        found = run(student, teacher, metric=metric, reduction="none", backend=backend)
        for value, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", ["mse", "scores", "kl", "frobenius"])
def test_means_over_heads(metric):
    student = attention(6, 3, 8, 0, segment_ids=PADDED, softcap=3.0)
    teacher = attention(4, 2, 8, 1, segment_ids=PADDED)
    groups = 2
    real = PADDED >= 0
    tokens = real.sum(-1)[:, None]
    compared = scores if metric == "scores" else matrix
    s, a = (compared(x).unflatten(1, (groups, -1)).mean(2) for x in (student, teacher))
    if metric == "kl":
        rows = torch.where(a > 0, a * (a.clamp(min=1e-300) / s.clamp(min=1e-300)).log(), 0.0).sum(-1)
        expected = (rows * real[:, None]).sum(-1) / tokens
    else:
        both = (real[:, None, :, None] & real[:, None, None, :]) & seen(student)
        squares = ((s - a) * both).square().sum((-1, -2))
        expected = squares.sqrt() if metric == "frobenius" else squares / tokens**2
    wanted = [expected.mean(), *torch.autograd.grad(expected.mean(), student.tensors)]
    value = head_mean_distance(student, teacher, metric=metric, groups=groups)
    for mine, exact in zip((value, *torch.autograd.grad(value, student.tensors)), wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


def test_matrices_are_written_out():
    mixing = attention(4, 2, 8, 0, window=20, segment_ids=PADDED)
    torch.testing.assert_close(mixing_matrix(mixing), matrix(mixing).detach())
    torch.testing.assert_close(mixing_matrix(mixing, (60, 95), heads=[3]), matrix(mixing).detach()[:, 3:, 60:95])
    torch.testing.assert_close(mixing_matrix(mixing, mean_heads=True), matrix(mixing).detach().mean(1))


def test_half_precision_and_strides_are_as_exact_as_the_definition():
    plain = PAIRS["padding and documents"]()
    student, teacher = (cast(x, torch.bfloat16) for x in plain)
    strided = AttentionMixing(
        student.q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), student.k,
        **{name: getattr(student, name) for name in ("window", "segment_ids", "softcap", "causal")},
    )  # fmt: skip
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), metric="kl", backend="reference")
    reference = run(student, teacher, metric="kl", backend="reference")
    for given in (student, strided):
        found = run(given, teacher, metric="kl", backend="chunked")
        for mine, plain_torch, true in zip(found, reference, exact, strict=True):
            error, allowed = (mine.double() - true).norm(), (plain_torch.double() - true).norm()
            assert error <= max(2 * allowed, 3.6e-7 * true.norm())


def test_an_empty_batch():
    student, teacher = attention(2, 2, 8, 0, batch=0), attention(2, 2, 8, 1, batch=0)
    assert mixing_distance(student, teacher, metric="kl", reduction="none").shape == (0, 2)


def test_compiled():
    student, teacher = PAIRS["windows"]()

    @torch.compile(fullgraph=True, backend="eager")
    def loss(q, k):
        return mixing_distance(AttentionMixing(q, k, window=70, causal=False), teacher, metric="mse")

    value = loss(student.q, student.k)
    torch.testing.assert_close(value, distance(student, teacher, "mse").mean())
    exact = distance(student, teacher, "mse").mean()
    for mine, theirs in zip(*(torch.autograd.grad(x, student.tensors) for x in (value, exact)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_does_not_fit_together():
    both = attention(2, 2, 4, 0, seq=5)
    causal = AttentionMixing(both.q, both.k)
    mixer = SSDMixing(torch.ones(2, 5, 1, 4), torch.ones(2, 5, 1, 4), torch.zeros(2, 5, 2))
    for one, other in ((both, causal), (causal, both), (both, mixer)):
        with pytest.raises(ValueError, match="both be causal or both not"):
            mixing_distance(one, other)
    with pytest.raises(ValueError, match="causal must be True or False, got 1"):
        AttentionMixing(both.q, both.k, causal=1)
    with pytest.raises(ValueError, match="attention that is not causal"):
        mixing_distance(*(cast(x, torch.float32) for x in (both, both)), backend="triton")
    short = attention(2, 2, 4, 0, seq=5, window=2)
    with pytest.raises(ValueError, match="infinite when the teacher sees more"):
        mixing_distance(short, both, metric="kl")
    mixing_distance(both, short, metric="kl")

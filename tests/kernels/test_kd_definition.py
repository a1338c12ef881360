"""The reference backend against formulas written out by hand, and every other backend against the
reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.interface import (
    TAIDSchedule,
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)

ON_LOGITS = tuple(name for name, one in DIVERGENCES.items() if one.on_logits)
# 13 rows and 37 words: nothing divides anything. 30 of the words are real where the vocabulary is cut.
ROWS, VOCAB, REAL, HIDDEN, TEACHER_HIDDEN = 13, 37, 30, 8, 6


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def data(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(ROWS, VOCAB, generator=g)
    labels = torch.randint(0, REAL, (ROWS,), generator=g)
    labels[[3, 7]] = -100
    return {
        "z": z,
        "t": z + torch.randn(ROWS, VOCAB, generator=g) / 2,
        "labels": labels,
        "weights": torch.rand(ROWS, generator=g),
        "h": torch.randn(ROWS, HIDDEN, generator=g),
        "head": torch.randn(VOCAB, HIDDEN, generator=g) * 0.6,
        "bias": torch.randn(VOCAB, generator=g) * 0.3,
        "th": torch.randn(ROWS, TEACHER_HIDDEN, generator=g),
        "thead": torch.randn(VOCAB, TEACHER_HIDDEN, generator=g) * 0.6,
        "ids": torch.stack([torch.randperm(REAL, generator=g)[:5] for _ in range(ROWS)]),
        "drawn": torch.randint(0, 9, (ROWS, 12), generator=g),
    }


def teacher_of(kind: str, d: dict[str, torch.Tensor], dtype: torch.dtype):
    t, th, thead, bias = (d[k].to(dtype) for k in ("t", "th", "thead", "bias"))
    logprobs = torch.log_softmax(d["t"].double(), -1).gather(1, d["ids"]).to(dtype)
    return {
        "logits": lambda: t,
        "hidden": lambda: TeacherHidden(th, thead, bias, 0.8, 5.0),
        "topk": lambda: TeacherTopK(d["ids"], logprobs),
        "topk_tail": lambda: TeacherTopK(d["ids"], logprobs, torch.log1p(-logprobs.double().exp().sum(-1)).to(dtype)),
        "samples": lambda: TeacherSamples(d["drawn"], torch.full((ROWS, 12), 1 / 12, dtype=dtype)),
        "mixture": lambda: TeacherMixture([TeacherLogits(t), TeacherHidden(th, thead)], [1.0, 3.0]),
        "taid": lambda: TeacherTAID(TeacherLogits(t), 0.4),
        "taid_mixture": lambda: TeacherTAID(TeacherMixture([TeacherLogits(t), TeacherHidden(th, thead)]), 0.7),
    }[kind]()


TEACHERS = ("logits", "hidden", "topk", "topk_tail", "samples", "mixture", "taid", "taid_mixture")


def sensible(divergence: str, kind: str) -> bool:
    if kind == "samples":
        return divergence == "forward_kl"
    if kind.startswith("topk") and DIVERGENCES[divergence].no_top_k:
        return False
    return divergence not in ON_LOGITS or kind in ("logits", "hidden", "taid")


CASES = [(d, k) for d, k in itertools.product(DIVERGENCES, TEACHERS) if sensible(d, k)]


def run(d, divergence, kind, dtype, backend, linear, **options) -> list[torch.Tensor]:
    """Loss, parts and gradients for an uneven incoming gradient."""
    teacher = teacher_of(kind, d, dtype)
    if linear:
        leaves = [d[k].to(dtype).clone().requires_grad_() for k in ("h", "head", "bias")]
        loss, parts = linear_kd_loss(
            leaves[0], leaves[1], teacher, student_bias=leaves[2], logit_scale=1.3, logit_softcap=4.0,
            divergence=divergence, backend=backend, return_parts=True, **options,
        )  # fmt: skip
    else:
        leaves = [d["z"].to(dtype).clone().requires_grad_()]
        loss, parts = kd_loss(leaves[0], teacher, divergence=divergence, backend=backend, return_parts=True, **options)
    incoming = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * incoming).sum().backward()
    return [loss.detach(), *parts, *(x.grad for x in leaves)]


@pytest.mark.parametrize("linear", (False, True), ids=("logits", "linear"))
@pytest.mark.parametrize(("divergence", "kind"), CASES)
def test_chunked_is_the_reference(divergence, kind, linear):
    d = data()
    plain = {"kd_weight": 0.9}
    full = {"labels": d["labels"], "ce_weight": 0.7, "temperature": 2.5, "kd_weight": 0.9}
    for options in (
        plain,
        {**plain, "reduction": "sum", "vocab_size": REAL},
        {**full, "temperature": 1.0, "normalizer": 5},
        {**full, "token_weights": d["weights"], "vocab_size": REAL, "reduction": "none"},
        {**full, "token_weights": d["weights"], "beta": 0.2, "lam": 0.6},
    ):
        truth = run(d, divergence, kind, torch.float64, "reference", linear, **options)
        for got, expected in zip(
            run(d, divergence, kind, torch.float64, "chunked", linear, **options), truth, strict=True
        ):
            assert error(got, expected) < 1e-11
        single = run(d, divergence, kind, torch.float32, "chunked", linear, **options)
        reference = run(d, divergence, kind, torch.float32, "reference", linear, **options)
        for got, ref, expected in zip(single, reference, truth, strict=True):
            assert got.dtype == torch.float32
            assert error(got, expected) <= 2 * error(ref, expected) + 2e-6


# The definition itself, against formulas typed in here in float64.


def adaptive_kl_by_hand(p, q, mu):
    """AKL as its authors' code has it: of the words in the order of p the head are those up to which p's sum is mu at
    most, and the first in any case; each KL weighs as |p - q| of its part, which has no gradient."""
    rows = []
    for a, b in zip(p, q, strict=True):
        order = sorted(range(len(a)), key=lambda i: -a[i].item())
        head, mass = order[:1], a[order[0]].item()
        for word in order[1:]:
            mass += a[word].item()
            if mass > mu:
                break
            head.append(word)
        gap = [abs(x - y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        share = sum(gap[i] for i in head) / sum(gap)
        rows.append(share * (a * (a / b).log()).sum() + (1 - share) * (b * (b / a).log()).sum())
    return torch.stack(rows)


def by_hand(divergence, z, t, temperature, beta, lam):
    if divergence == "mse":
        return (z - t).square().mean(-1)
    if divergence == "cosine":
        return 1 - (z * t).sum(-1) / (z.norm(dim=-1) * t.norm(dim=-1))
    p, q = torch.softmax(t / temperature, -1), torch.softmax(z / temperature, -1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_kl": lambda: kl(p, lam * p + (1 - lam) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - lam) * p + lam * q),
        "adaptive_kl": lambda: adaptive_kl_by_hand(p, q, beta),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "probability_mse": lambda: (p - q).square().mean(-1),
    }[divergence]()
    return temperature**2 * value


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_formulas(divergence, backend):
    d = data(1)
    z, t = d["z"].double(), d["t"].double()
    for temperature, beta, lam in ((1.0, 0.5, 0.1), (3.0, 0.3, 0.7)):
        got = kd_loss(
            z,
            t,
            divergence=divergence,
            temperature=temperature,
            beta=beta,
            lam=lam,
            reduction="none",
            backend=backend,
        )
        torch.testing.assert_close(got, by_hand(divergence, z, t, temperature, beta, lam), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_adaptive_kl(backend):
    """Values and gradients, of heads of one word and of hundreds; a word's number does not matter, nor that others are
    as likely; at 1 it is forward KL, and of equals 0."""
    g = torch.Generator().manual_seed(0)
    for vocab, spread, mu in ((2, 1.0, 0.5), (37, 3.0, 0.5), (37, 1.0, 0.0), (37, 1.0, 0.9), (600, 0.3, 0.7)):
        z, t = (spread * torch.randn(6, vocab, generator=g, dtype=torch.float64) for _ in range(2))
        z.requires_grad_()
        truth = by_hand("adaptive_kl", z, t, 1.6, mu, 0.1)
        got = kd_loss(
            z, t, divergence="adaptive_kl", temperature=1.6, beta=mu, reduction="none", backend=backend
        )  # fmt: skip
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
        for one, other in zip(*(torch.autograd.grad(x.sum(), z) for x in (got, truth)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    options = {"divergence": "adaptive_kl", "backend": backend}
    t = torch.randint(0, 3, (20, 40), generator=g).double()
    z = torch.randn(20, 40, generator=g, dtype=torch.float64)
    order = torch.randperm(40, generator=g)
    for mu in (0.1, 0.5, 0.9):
        same = kd_loss(z[:, order], t[:, order], beta=mu, **options)
        torch.testing.assert_close(kd_loss(z, t, beta=mu, **options), same)
    torch.testing.assert_close(kd_loss(z, t, beta=1.0, **options), kd_loss(z, t, backend=backend))
    z.requires_grad_()
    loss = kd_loss(z, z.detach(), **options)
    loss.backward()
    assert loss == 0 and z.grad.abs().max() < 1e-15


def test_jsd_and_skew_ends():
    d = data(2)
    z, t = d["z"].double(), d["t"].double()
    for backend in ("reference", "chunked"):
        forward, reverse = (kd_loss(z, t, divergence=x, backend=backend) for x in ("forward_kl", "reverse_kl"))
        for got, expected in (
            (kd_loss(z, t, divergence="jsd", beta=0.0, backend=backend), forward),
            (kd_loss(z, t, divergence="jsd", beta=1.0, backend=backend), reverse),
            (kd_loss(z, t, divergence="skew_kl", lam=0.0, backend=backend), forward),
            (kd_loss(z, t, divergence="skew_reverse_kl", lam=0.0, backend=backend), reverse),
        ):
            torch.testing.assert_close(got, expected)


def test_jsd_near_its_ends():
    """A weight of 0.001 is not lost in the rounding of 1."""
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(32, 300, generator=g)
    t = z + 0.3 * torch.randn(32, 300, generator=g)
    for beta in (0.001, 0.02, 0.98, 0.999):
        got = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "chunked")):
            x = z.to(dtype).requires_grad_()
            loss = kd_loss(x, t.to(dtype), divergence="jsd", beta=beta, backend=backend, reduction="sum")
            loss.backward()
            got.append((loss.detach(), x.grad))
            z = z.detach()
        for single, truth in zip(got[1], got[0], strict=True):
            assert error(single, truth) < 4e-6, beta


def test_weights_mean_and_cross_entropy():
    d = data(3)
    z, t, labels = d["z"].double(), d["t"].double(), d["labels"]
    kl = by_hand("forward_kl", z, t, 2.0, 0.5, 0.1)
    ce = F.cross_entropy(z, labels, reduction="none", ignore_index=-100)  # untempered
    real = labels != -100
    rows = torch.where(real, 0.25 * kl + 3.0 * ce, 0.0)
    options = {"temperature": 2.0, "kd_weight": 0.25, "ce_weight": 3.0}
    torch.testing.assert_close(kd_loss(z, t, labels, **options), rows.sum() / real.sum())
    torch.testing.assert_close(kd_loss(z, t, labels, normalizer=100.0, **options), rows.sum() / 100)
    torch.testing.assert_close(kd_loss(z, t, labels, normalizer=torch.tensor(100), **options), rows.sum() / 100)
    weighted = kd_loss(z, t, labels, token_weights=d["weights"], **options)
    torch.testing.assert_close(weighted, (rows * d["weights"]).sum() / real.sum())
    loss, parts = kd_loss(z, t, labels, return_parts=True, **options)
    torch.testing.assert_close(parts.kd, kl[real].mean())
    torch.testing.assert_close(parts.ce, ce[real].mean())
    assert not parts.kd.requires_grad and not parts.ce.requires_grad
    torch.testing.assert_close(loss, 0.25 * parts.kd + 3.0 * parts.ce)


def test_padded_and_cut_vocabularies_agree():
    """A 37-row head with 7 rows of padding and a 30-row head without are the same student."""
    d = data(4)
    t, padded, head, h = d["t"][:, :REAL], torch.randn(ROWS, 41), d["head"].clone(), d["h"]
    padded[:, :REAL] = t
    heads = [head.clone().requires_grad_(), head[:REAL].clone().requires_grad_()]
    losses = [linear_kd_loss(h, x, padded, vocab_size=REAL, divergence="jsd") for x in heads]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(heads[0].grad[:REAL], heads[1].grad)
    assert heads[0].grad[REAL:].abs().max() == 0


def test_top_k_of_everything_is_dense_and_a_tail_of_nothing_is_finite():
    d = data(5)
    z = d["z"].double().requires_grad_()
    lp = torch.log_softmax(d["t"].double(), -1)
    everything = TeacherTopK(torch.arange(VOCAB).expand(ROWS, VOCAB), lp)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"):
        for backend in ("reference", "chunked"):
            dense = torch.autograd.grad(kd_loss(z, lp, divergence=divergence, backend=backend), z)[0]
            loss = kd_loss(z, everything, divergence=divergence, backend=backend)
            torch.testing.assert_close(loss, kd_loss(z, lp, divergence=divergence, backend=backend))
            torch.testing.assert_close(torch.autograd.grad(loss, z)[0], dense, rtol=1e-6, atol=1e-9)
    # Rounded to bfloat16, two ids hold more than all the mass: 1 - sum is negative and its log NaN.
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, :2] = torch.tensor([5.0, 4.3])
    top = torch.log_softmax(logits, -1)[:, :2].bfloat16()
    assert top.float().exp().sum() > 1
    student = torch.randn(1, VOCAB, requires_grad=True)
    loss = kd_loss(student, TeacherTopK(torch.tensor([[0, 1]]), top))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_samples_are_unbiased():
    """The mean gradient over many draws is the dense one, within four standard errors."""
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(1, 11, generator=g), torch.randn(1, 11, generator=g)
    p = torch.softmax(t, -1)
    draws = 20000
    ids = torch.multinomial(p.expand(draws, -1), 12, replacement=True, generator=g)
    student = z.expand(draws, -1).clone().requires_grad_()
    teacher = TeacherSamples(ids, torch.full((draws, 12), 1 / 12))
    loss = kd_loss(student, teacher, reduction="none")
    loss.sum().backward()
    exact = torch.softmax(z, -1) - p
    assert ((student.grad.mean(0) - exact).abs() < 4 * student.grad.std(0) / draws**0.5 + 1e-6).all()
    cross_entropy = -(p * torch.log_softmax(z, -1)).sum()
    assert abs(loss.mean() - cross_entropy) < 4 * loss.std() / draws**0.5


def test_taid_schedule_follows_the_authors():
    """Their code (SakanaAI/TAID, update_t): the average of relative falls, and never behind a straight line."""
    steps, alpha, beta, start, end = 100, 5e-4, 0.99, 0.4, 1.0
    losses = [10 * math.exp(-3 * i / steps) + 2 + 0.3 * math.sin(i) for i in range(steps)]
    t, momentum, expected = start, 0.0, [start]
    for i in range(1, steps):
        momentum = beta * momentum + (1 - beta) * (losses[i - 1] - losses[i]) / (losses[i - 1] + 1e-15)
        t = min(end, max(start + (end - start) * i / steps, t + alpha / (1 + math.exp(-momentum)) * (1 - t)))
        expected.append(t)
    schedule = TAIDSchedule(t=start, alpha=alpha, decay=beta, end=end, steps=steps)
    assert [schedule.update(loss) for loss in losses] == pytest.approx(expected, rel=1e-12)
    assert schedule.t == pytest.approx(0.994)
    # where the loss falls fast, t is ahead of the line
    fast = TAIDSchedule(t=0.2, alpha=0.5, decay=0.9, end=0.8, steps=1000)
    fast.update(2.0)
    momentum = 0.1 * 0.5
    assert fast.update(1.0) == pytest.approx(0.2 + 0.5 / (1 + math.exp(-momentum)) * 0.8, rel=1e-12)
    for _ in range(100):
        fast.update(1.0)
    assert fast.t == 0.8
    # a step's own index counts, as where steps are left out
    assert TAIDSchedule(last_loss=1.0, steps=10, alpha=1e-9).update(1.0, step=5) == pytest.approx(0.4 + 0.6 * 5 / 10)
    with pytest.raises(ValueError, match="give steps="):
        TAIDSchedule().update(1.0)


@pytest.mark.parametrize("ignored", (False, True))
@pytest.mark.parametrize("backend", ("reference", "chunked", "compiled"))
def test_parts_of_each_row_are_without_weights(backend, ignored):
    d = data(4)
    z, t = d["z"].double().requires_grad_(), d["t"].double()
    labels = d["labels"].clone().clamp(min=0)
    if ignored:
        labels[::3] = -100

    def call(x):
        options = {"temperature": 2.0, "kd_weight": 0.3, "ce_weight": 0.7, "normalizer": 5.0}
        backends = {"backend": "auto" if backend == "compiled" else backend}
        return kd_loss(x, t, labels, token_weights=d["weights"].double(), return_parts="rows", **options, **backends)

    loss, (kd, ce) = (torch.compile(call, backend="eager", fullgraph=True) if backend == "compiled" else call)(z)
    real = labels != -100
    kl = by_hand("forward_kl", z, t, 2.0, 0.5, 0.1) * real
    nll = -z.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * real
    torch.testing.assert_close(kd, kl.detach())
    torch.testing.assert_close(ce, nll.detach())
    expected = ((0.3 * kl + 0.7 * nll) * d["weights"]).sum() / 5
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "adaptive_kl"])  # whose share is fixed
def test_gradients_by_finite_differences(divergence):
    d = data(6)
    z, t, labels = d["z"].double().requires_grad_(), d["t"].double(), d["labels"]
    head, h = d["head"].double().requires_grad_(), d["h"].double().requires_grad_()
    if divergence == "tvd":
        assert ((torch.softmax(z, -1) - torch.softmax(t, -1)).abs() > 1e-7).all()  # away from the kinks
    options = {"divergence": divergence, "temperature": 1.7, "ce_weight": 0.3, "backend": "chunked"}
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, labels, **options), (z,))
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, labels, reduction="none", **options), (z,))
    assert torch.autograd.gradcheck(lambda x, w: linear_kd_loss(x, w, t, labels, **options), (h, head))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 70),
    divergence=st.sampled_from(tuple(DIVERGENCES)),
    temperature=st.floats(0.3, 8),
    spread=st.floats(0.01, 12),
    ce_weight=st.sampled_from((0.0, 1.0)),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_scale(rows, vocab, divergence, temperature, spread, ce_weight, ignored, seed):
    g = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(rows, vocab, generator=g, dtype=torch.float64)
    t = spread * torch.randn(rows, vocab, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    got = []
    for backend, dtype in (
        ("reference", torch.float64),
        ("chunked", torch.float64),
        ("chunked", torch.float32),
    ):
        x = z.to(dtype).clone().requires_grad_()
        loss = kd_loss(
            x,
            t.to(dtype),
            labels,
            divergence=divergence,
            temperature=temperature,
            ce_weight=ce_weight,
            backend=backend,
        )
        loss.backward()
        got.append((loss.detach(), x.grad))
    for value, truth in zip(got[1], got[0], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-10)
    for value, truth in zip(got[2], got[0], strict=True):
        assert (value - truth).abs().max() <= 1e-4 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("kind", ("logits", "hidden", "topk", "samples", "mixture"))
def test_either_term_alone(kind):
    """A weight of 0 leaves the other term, and `return_parts` still has both."""
    d = data(7)
    for kd_weight, ce_weight in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        options = {"labels": d["labels"], "kd_weight": kd_weight, "ce_weight": ce_weight, "temperature": 2.0}
        for linear in (False, True):
            truth = run(d, "forward_kl", kind, torch.float64, "reference", linear, **options)
            got = run(d, "forward_kl", kind, torch.float64, "chunked", linear, **options)
            assert truth[1] > 0 and truth[2] > 0
            for value, expected in zip(got, truth, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vocab", (33, 64, 250, 258, 1000))
@pytest.mark.parametrize("train_head", (False, True))
def test_bfloat16_rows_do_not_read_what_lies_behind_them(vocab, train_head):
    """The gradient of the logits lies in float32 rows, whose other half can be anything read as bfloat16."""
    torch.manual_seed(vocab)
    n, width = 126, 32
    hidden, head, theirs = torch.randn(n, width), torch.randn(vocab, width), torch.randn(n, width)
    labels = torch.randint(vocab, (n,))
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        x = hidden.bfloat16().to(dtype).requires_grad_()
        w = head.bfloat16().to(dtype).requires_grad_(train_head)
        teacher = TeacherHidden(theirs.bfloat16().to(dtype), head.flip(0).bfloat16().to(dtype))
        backend = "reference" if dtype == torch.float64 else "chunked"
        linear_kd_loss(x, w, teacher, labels, ce_weight=0.5, backend=backend).backward()
        gradients[dtype] = [t.grad.double() for t in (x, w) if t.requires_grad]
    for ours, true in zip(gradients[torch.bfloat16], gradients[torch.float64], strict=True):
        assert ((ours - true).norm() / true.norm()) < 0.01

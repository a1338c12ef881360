"""What nobody should be able to get wrong: ignored rows, -inf, empty input, precision, autocast, memory,
errors."""

import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mohawk.kernels.kd import chunked as kd_chunked
from mohawk.kernels.kd import products as kd_products
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.interface import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)

OF_DISTRIBUTIONS = tuple(name for name, one in DIVERGENCES.items() if not one.on_logits)
BACKENDS = ("reference", "chunked")


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def problem(n: int = 24, vocab: int = 50, hidden: int = 16, dtype=torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    h, head = torch.randn(n, hidden, generator=g), torch.randn(vocab, hidden, generator=g) / hidden**0.5
    th = h + 0.3 * torch.randn(n, hidden, generator=g)
    labels = torch.randint(0, vocab, (n,), generator=g)
    return h.to(dtype), head.to(dtype), th.to(dtype), labels


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored_and_empty_input(backend):
    h, head, th, labels = problem()
    for rows in (24, 0):
        x, w = h[:rows].clone().requires_grad_(), head.clone().requires_grad_()
        ignored = torch.full((rows,), -100)
        loss = linear_kd_loss(x, w, TeacherHidden(th[:rows], head), ignored, ce_weight=1.0, backend=backend)
        loss.backward()
        assert loss == 0 and x.grad.abs().sum() == 0 and w.grad.abs().sum() == 0
        z = (x.detach() @ head.T).requires_grad_()
        for reduction in ("mean", "sum", "none"):
            z.grad = None
            loss = kd_loss(z, th[:rows] @ head.T, ignored, ce_weight=1.0, reduction=reduction, backend=backend)
            loss.sum().backward()
            assert loss.sum() == 0 and z.grad.abs().sum() == 0
    x = torch.zeros(0, 16, requires_grad=True)
    loss = linear_kd_loss(x, head, TeacherHidden(th[:0], head), backend=backend)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 16)


def test_what_is_ignored_does_not_matter():
    """NaN in ignored rows reaches neither the loss nor a gradient, and unwritten memory would show."""
    h, head, th, labels = problem()
    labels[5:20] = -100
    expected = linear_kd_loss(h[labels >= 0], head, TeacherHidden(th[labels >= 0], head), labels[labels >= 0])
    h[5:20], th[5:20] = float("nan"), float("nan")
    x, w = h.requires_grad_(), head.requires_grad_()
    loss = linear_kd_loss(x, w, TeacherHidden(th, head), labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert x.grad[5:20].abs().sum() == 0 and x.grad.isfinite().all() and w.grad.isfinite().all()
    z = (h.detach() @ head.detach().T).requires_grad_()
    loss = kd_loss(z, th @ head.detach().T, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert z.grad[5:20].abs().sum() == 0 and z.grad.isfinite().all()


def test_ids_and_normalizer_of_nothing_do_not_matter():
    """Whatever a cache has in its padding, and a count of 0 where all labels are ignored."""
    z, t, labels = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1, -100, 3, -100])
    ids, real = torch.tensor([[1, 2], [-1, 99], [3, 4], [0, 0]]), labels >= 0
    lp = torch.log_softmax(t, -1)[:, :2].clone()
    lp[~real] = 7.0
    for teacher, kept in (
        (TeacherTopK(ids, lp), TeacherTopK(ids[real], lp[real])),
        (TeacherSamples(ids, -lp), TeacherSamples(ids[real], -lp[real])),
    ):
        for backend in BACKENDS:
            loss = kd_loss(z, teacher, labels, backend=backend)
            torch.testing.assert_close(loss, kd_loss(z[real], kept, labels[real]))
    ignored = torch.full((4,), -100)
    for normalizer in (0, torch.tensor(0)):
        assert kd_loss(z, t, ignored, normalizer=normalizer) == 0
        with pytest.raises(ValueError, match="must be above 0 where there are real rows"):
            kd_loss(z, t, labels, normalizer=normalizer)


@pytest.mark.parametrize("wrong", ("nan", "inf"))
def test_nan_and_overflow_in_a_real_row_stay_visible(wrong):
    z, t = torch.randn(4, 9), torch.randn(4, 9)
    z[1, 2] = float(wrong)
    for divergence in DIVERGENCES:
        for backend in BACKENDS:
            assert not kd_loss(z, t, divergence=divergence, backend=backend).isfinite(), divergence


def test_inputs_are_left_alone():
    """With and without a gradient, and when it is made in the backward."""
    z, t = torch.randn(4, 9), torch.randn(4, 9)
    ids, lp = torch.arange(3).expand(4, 3), torch.log_softmax(t, -1)[:, :3]
    teachers = [t, TeacherTopK(ids, lp), TeacherSamples(ids, lp.exp()), TeacherTAID(TeacherLogits(t), 0.5)]
    before = z.clone(), t.clone()
    for divergence in DIVERGENCES:
        for teacher in teachers if divergence == "forward_kl" else teachers[:1]:
            for reduction, grad in (("mean", False), ("mean", True), ("none", True)):
                x = z.requires_grad_(grad)
                loss = kd_loss(x, teacher, divergence=divergence, reduction=reduction).sum()
                if grad:
                    loss.backward()
                z = x.detach()
                assert torch.equal(z, before[0]) and torch.equal(t, before[1]), (divergence, teacher)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity(divergence):
    """On either side, as the float64 reference has it: finite gradients wherever the loss is finite."""
    g = torch.Generator().manual_seed(0)
    for student, teacher in ((True, True), (False, True), (True, False)):
        z, t = 2 * torch.randn(6, 11, generator=g), 2 * torch.randn(6, 11, generator=g)
        if student:
            z[:, 7:] = float("-inf")
        if teacher:
            t[:, 7:] = float("-inf")
        results = []
        for backend, dtype in (("reference", torch.float64), ("chunked", torch.float32)):
            x = z.to(dtype).clone().requires_grad_()
            labels = torch.arange(6)
            loss = kd_loss(x, t.to(dtype), labels, ce_weight=0.5, divergence=divergence, backend=backend)
            loss.backward()
            results.append((loss.detach(), x.grad))
        (truth, truth_grad), (loss, grad) = results
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        if truth.isfinite():
            assert error(grad, truth_grad) < 1e-6
    # Both all but one word away from the mass of the other.
    z, t = torch.full((1, 5), -300.0), torch.full((1, 5), -300.0)
    z[0, 0], t[0, 1] = 300.0, 300.0
    x = z.requires_grad_()
    loss = kd_loss(x, t, divergence=divergence)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("divergence", OF_DISTRIBUTIONS)
def test_values_of_small_divergences(divergence):
    """Relative to float64 while student and teacher come together: no worse than twice the reference's
    error."""
    g = torch.Generator().manual_seed(0)
    for distance in (1.0, 0.1, 0.01):
        z = 3 * torch.randn(64, 5000, generator=g)
        t = z + distance * torch.randn(64, 5000, generator=g)
        truth = kd_loss(z.double(), t.double(), divergence=divergence, backend="reference")
        errors = {b: error(kd_loss(z, t, divergence=divergence, backend=b), truth) for b in BACKENDS}
        assert errors["chunked"] <= max(2 * errors["reference"], 2e-6), (distance, errors)


def test_digits_of_cosine_where_vectors_all_but_agree():
    g = torch.Generator().manual_seed(0)
    for distance in (1e-3, 1e-4):  # 5e-7 and 5e-9
        z = torch.randn(8, 4000, generator=g)
        t = z + distance * torch.randn(8, 4000, generator=g)
        a, b = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (z, t))
        truth = (a - b).square().sum(-1) / 2
        for backend in BACKENDS:
            rows = kd_loss(z, t, divergence="cosine", reduction="none", backend=backend)
            assert error(rows, truth) < 0.01, (backend, distance)
    nothing = torch.zeros(1, 5)
    for z, t, value in ((nothing, nothing, 1.0), (nothing, nothing + 1, 1.0), (nothing + 1, nothing, 1.0)):
        assert all(kd_loss(z, t, divergence="cosine", backend=one) == value for one in BACKENDS)


@pytest.mark.parametrize("spread", (1.0, 4.0))
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"))
def test_digits_where_student_and_teacher_all_but_agree(divergence, spread):
    """Of each row, and of each gradient: at KLs of 5e-5 to 5e-9, in float32, and by the definition itself too."""
    g = torch.Generator().manual_seed(0)
    z = spread * torch.randn(16, 1000, generator=g)
    noise = torch.randn(16, 1000, generator=g)
    for distance, digits in ((1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)):
        found = {}
        for backend, dtype in (("float64", torch.float64), ("reference", torch.float32), ("chunked", torch.float32)):
            x = z.to(dtype).requires_grad_()
            options = {"backend": "reference" if dtype == torch.float64 else backend, "reduction": "none"}
            rows = kd_loss(x, (z + distance * noise).to(dtype), divergence=divergence, beta=0.3, **options)
            found[backend] = rows.detach(), torch.autograd.grad(rows.sum(), x)[0]
        truth, slope = found.pop("float64")
        for backend, (rows, grad) in found.items():
            assert (rows > 0).all(), backend
            assert ((rows - truth) / truth).abs().max() < digits, (backend, distance)
            reference = found["reference"]
            assert error(rows, truth) <= 2 * error(reference[0], truth) + 1e-6, (backend, distance)
            assert error(grad, slope) <= 2 * error(reference[1], slope) + 1e-6, (backend, distance)
    # q - p itself, whose rounding is that of p where the two agree
    if divergence == "forward_kl":
        p, q = (x.double().softmax(-1) for x in (z + 1e-4 * noise, z))
        torch.testing.assert_close(slope, q - p, rtol=0, atol=1e-9)


@pytest.mark.parametrize("far", (20.0, 60.0, 400.0))
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"))
def test_digits_where_one_side_has_next_to_nothing(divergence, far):
    """Probabilities down to and below the smallest float32, beside others that are alike."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 40, generator=g)
    t = z + 0.1 * torch.randn(8, 40, generator=g)
    z[:, :4] -= far
    t[:, 2:6] -= far
    found = []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("chunked", torch.float32)):
        x = z.to(dtype).requires_grad_()
        rows = kd_loss(x, t.to(dtype), divergence=divergence, beta=0.3, backend=backend, reduction="none")
        found.append((rows.detach(), torch.autograd.grad(rows.sum(), x)[0]))
    for truth, reference, got in zip(*found, strict=True):
        assert error(got, truth) <= 2 * error(reference, truth) + 1e-6


@pytest.mark.parametrize("temperature", (1.0, 0.1))
@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl"))
def test_digits_where_student_and_teacher_are_far_apart(divergence, temperature):
    """Large log-probabilities, whose rounding is not that of the larger of two probabilities."""
    g = torch.Generator().manual_seed(0)
    z, t = 5 * torch.randn(512, 1000, generator=g), 5 * torch.randn(512, 1000, generator=g)
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    found = []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("chunked", torch.float32)):
        x = z.to(dtype).requires_grad_()
        rows = kd_loss(x, t.to(dtype), backend=backend, **options)
        found.append((rows.detach(), torch.autograd.grad(rows.sum(), x)[0]))
    for truth, reference, got in zip(*found, strict=True):
        assert error(got, truth) <= 2 * error(reference, truth)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("divergence", OF_DISTRIBUTIONS)
def test_words_masked_with_a_finite_number(divergence, dtype):
    """As models suppress words. What both sides mask is nothing; what one side masks costs what the definition says,
    also beside the smallest probabilities of the other."""
    g = torch.Generator().manual_seed(0)
    options = {"divergence": divergence, "beta": 0.3}
    torch.compiler.reset()
    compiled = torch.compile(lambda x, t: kd_loss(x, t, backend="chunked", **options), backend="eager", fullgraph=True)
    for mask in (torch.finfo(dtype).min, -1e34, -200.0):
        for low in (None, 0.0, -95.0):  # None: both are masked
            for mask_student in (True, False):
                z, t = (torch.randn(8, 64, generator=g) for _ in range(2))
                masked, other = (z, t) if mask_student else (t, z)
                masked[:, 32:] = mask
                other[:, 32:] = mask if low is None else other[:, 32:] + low
                z, t = z.to(dtype), t.to(dtype)
                found = []
                for backend, precision in (
                    ("reference", torch.float64), ("reference", dtype), ("chunked", dtype), ("compiled", dtype)
                ):  # fmt: skip
                    x = z.detach().to(precision).clone().requires_grad_()
                    y = t.to(precision)
                    loss = compiled(x, y) if backend == "compiled" else kd_loss(x, y, backend=backend, **options)
                    loss.backward()
                    with torch.no_grad():
                        alone = kd_loss(x, y, backend="chunked" if backend == "compiled" else backend, **options)
                    found.append((loss.detach(), alone, x.grad))
                case = (mask, low, mask_student)
                for truth, reference, got, opaque in zip(*found, strict=True):
                    assert truth.isfinite().all(), case
                    assert error(got, truth) <= 2 * error(reference, truth) + 2e-6, case
                    assert torch.equal(opaque, got), case


@pytest.mark.parametrize("mask", (float("-inf"), torch.finfo(torch.bfloat16).min, -1e34, -1e18))
@pytest.mark.parametrize("divergence", ("mse", "cosine"))
def test_masked_words_are_not_there_between_raw_logits(divergence, mask):
    """On one side or both: what is left is compared as if these words were not, whatever number masks them."""
    g = torch.Generator().manual_seed(0)
    for masked in ((True, True), (True, False), (False, True)):
        z, t = torch.randn(4, 40, generator=g), torch.randn(4, 40, generator=g)
        for one, here in zip((z, t), masked, strict=True):
            one[:, 30:] = mask if here else one[:, 30:]
        x, y = z.double().requires_grad_(), t.double()
        left = (x[:, :30], y[:, :30])
        if divergence == "cosine":
            value = 1 - torch.stack([(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(*left, strict=True)])
        else:
            value = (left[0] - left[1]).square().sum(-1) / 40
        truth = torch.autograd.grad(value.mean(), x)[0]
        for backend in BACKENDS:
            w = z.clone().requires_grad_()
            loss = kd_loss(w, t, divergence=divergence, backend=backend)
            loss.backward()
            assert error(loss.detach(), value.mean().detach()) < 1e-6 and error(w.grad, truth) < 1e-5, (backend, masked)


@pytest.mark.parametrize("rows", (96, 300))  # the head's gradient from one product, and summed over chunks
@pytest.mark.parametrize("distance", (0.9, 0.25, 0.08, 0.025))  # KL of about 0.3, 0.03, 0.003, 0.0003
def test_bfloat16_gradients(distance, rows, monkeypatch):
    """Hidden states and heads in bfloat16: 0.5 % relative gradient error at every KL (2 to 90 % with rounded
    logits)."""
    monkeypatch.setattr(kd_chunked, "TILE_BYTES", 2 * 4 * 3000 * 50)  # 50 rows of student and teacher at once
    g = torch.Generator().manual_seed(1)
    h, head = 1.5 * torch.randn(rows, 128, generator=g), torch.randn(3000, 128, generator=g) / 128**0.5
    assert kd_chunked.keeps_gradient(rows, h.bfloat16(), head.bfloat16()) == (rows == 96)
    th = h + distance * torch.randn(rows, 128, generator=g)
    h, head, th = (x.bfloat16() for x in (h, head, th))
    results = []
    for backend, dtype in (("reference", torch.float64), ("chunked", torch.bfloat16)):
        x, w = h.to(dtype).clone().requires_grad_(), head.to(dtype).clone().requires_grad_()
        loss = linear_kd_loss(x, w, TeacherHidden(th.to(dtype), head.to(dtype)), backend=backend)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    truth, got = results
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == torch.bfloat16
    assert error(got[0], truth[0]) < 1e-4
    assert error(got[1], truth[1]) < 0.005 and error(got[2], truth[2]) < 0.005


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_logits_where_they_are_asked_for(backend):
    """On a CPU bfloat16 logits of both sides are a product's, rounded once, and the loss is exact for these; 4 %
    gradient error at a KL of about 0.3. Under autocast too; by default, and of other dtypes, nothing is rounded."""
    g = torch.Generator().manual_seed(1)
    h, head = 1.5 * torch.randn(32, 64, generator=g), torch.randn(1000, 64, generator=g) / 64**0.5
    h, head, th = (x.bfloat16() for x in (h, head, h + 0.9 * torch.randn(32, 64, generator=g)))
    bias = torch.randn(1000, generator=g).bfloat16()

    def loss_of(x, w, b, dtype=torch.bfloat16, **options):
        teacher = TeacherHidden(th.to(dtype), head.to(dtype), logit_softcap=20.0)
        teacher = TeacherTAID(TeacherMixture([teacher, teacher]), 0.9)
        return linear_kd_loss(x, w, teacher, student_bias=b, logit_scale=1.5, **options)

    def run(dtype=torch.bfloat16, **options):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (h, head, bias)]
        loss = loss_of(*leaves, dtype, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    x, w, b = (one.double().requires_grad_() for one in (h, head, bias))
    product = x @ w.T
    z = 1.5 * (product + (product.bfloat16() - product).detach() + b)
    t = 20 * torch.tanh((th.double() @ head.double().T).bfloat16().double() / 20)
    lp, lq = (0.1 * z + 0.9 * t.log_softmax(-1)).detach().log_softmax(-1), z.log_softmax(-1)
    value = (lp.exp() * (lp - lq)).sum(-1).mean()
    rounded, full, exact = run(precision="rounded"), run(), run(torch.float64)
    for got, truth in zip(rounded, (value.detach(), *torch.autograd.grad(value, (x, w, b))), strict=True):
        assert error(got, truth) < (1e-4 if got.dim() == 0 else 0.006)
    for got, near, truth in zip(rounded[1:], full[1:], exact[1:], strict=True):
        assert 2 * error(near, truth) < error(got, truth) < 0.04
    assert all(torch.equal(*both) for both in zip(full, run(precision="full"), strict=True))
    for dtype in (torch.float32, torch.float16):
        both = run(dtype), run(dtype, precision="rounded")
        assert all(torch.equal(*one) for one in zip(*both, strict=True)), dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert error(run(torch.float32, precision="rounded")[0], value) < 1e-4
    if backend == "chunked":
        compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
        assert compiled(h, head, bias, precision="rounded") == rounded[0] != full[0]
        z = (1.5 * (h.float() @ head.float().T)).requires_grad_()
        values = [kd_loss(z, TeacherHidden(th, head), precision=p) for p in ("full", "rounded")]
        assert values[0] != values[1] and error(values[1].detach(), values[0].detach().double()) < 0.01


def test_a_kept_gradient_has_every_option(monkeypatch):
    """Chunks, ignored rows, a shorter vocabulary, bias, scale and softcap, a head that is not contiguous, frozen
    hidden states, and a loss scale, where one product makes the head's gradient."""
    monkeypatch.setattr(kd_chunked, "TILE_BYTES", 2 * 4 * 280 * 7)
    h, head, th, labels = problem(40, 300, 64, torch.bfloat16)
    labels[::3] = -100
    bias = 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(1))
    options = {"ce_weight": 0.5, "vocab_size": 280, "logit_scale": 2.0, "logit_softcap": 5.0}
    labels[labels >= 280] = 0
    for frozen in (False, True):
        grads = []
        for backend, dtype in (("reference", torch.float64), ("chunked", torch.bfloat16)):
            x, w, b = (one.detach().to(dtype).clone() for one in (h, head, bias.bfloat16()))
            w = w.T.contiguous().T
            x.requires_grad_(not frozen), w.requires_grad_(), b.requires_grad_()
            teacher = TeacherHidden(th.to(dtype), head.to(dtype))
            loss = linear_kd_loss(x, w, teacher, labels, student_bias=b, backend=backend, **options)
            (3 * loss).backward()
            grads.append([b.grad, w.grad] if frozen else [b.grad, w.grad, x.grad])
        for truth, got in zip(*grads, strict=True):
            assert error(got, truth) < 0.005
        assert grads[1][1][280:].abs().sum() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_logits_by_onednn(dtype, monkeypatch):
    """Where float32 products are oneDNN's, they are as exact as torch's, in slices, infinities included."""
    h, head, _, _ = problem(33, 3001, 129, dtype)
    h[1], h[2, 3], h[3, 4] = 0.0, float("inf"), float("nan")
    results = []
    for slow in (False, True):
        monkeypatch.setattr(kd_products, "_mkl_is_slow", lambda slow=slow: slow)
        monkeypatch.setattr(kd_products, "SLICE_BYTES", 4 * 129 * 1000)
        out = torch.empty(33, 3001)
        kd_products.logits_product(h, head, out)
        results.append(out)
    truth = h.double() @ head.double().T
    ok = truth.isfinite()
    assert ok.sum() == 31 * 3001
    assert error(results[1][ok], truth[ok]) <= 2 * error(results[0][ok], truth[ok])
    torch.testing.assert_close(results[1][~ok], truth[~ok].float(), equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_products_ask_a_gpu_for_float32(dtype):
    """Shapes and dtypes of what cuBLAS is asked for, checked by torch without a GPU: a product of 16-bit operands goes
    into a float32 array."""
    with FakeTensorMode():
        hidden, head, grad = (torch.empty(s, dtype=dtype, device="cuda") for s in ((7, 16), (50, 16), (7, 50)))
        tile, total = (torch.empty(s, device="cuda") for s in ((7, 50), (50, 16)))
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(hidden, head.T, out=tile)
        kd_products.logits_product(hidden, head, tile)
        kd_products.add_head_gradient(tile, hidden, grad, total, True, dtype)


def test_a_gpus_head_gradient_is_added_to_as_it_is_written(monkeypatch):
    """By `addmm` into the float32 sum itself; torch knows no such product without a GPU, so it is stood in for."""
    hidden, grad = torch.randn(2, 7, 16).bfloat16(), torch.randn(2, 7, 50).bfloat16()
    total, wide = torch.empty(50, 16), [(x.double(), g.double()) for x, g in zip(hidden, grad, strict=True)]

    def addmm(given, a, b, *, out_dtype, out):
        assert given is total and out is total and out_dtype == torch.float32
        assert a.dtype == b.dtype == torch.bfloat16
        return out.copy_(given + a.float() @ b.float())

    monkeypatch.setattr(kd_products, "_half_on_gpu", lambda *operands: True)
    monkeypatch.setattr(kd_products, "_float32_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(kd_products.torch, "addmm", addmm)
    for i in range(2):
        kd_products.add_head_gradient(grad[i].float(), hidden[i], grad[i], total, i == 0, torch.bfloat16)
    torch.testing.assert_close(total.double(), sum(g.T @ x for x, g in wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", (0, 1, 127, 128, 129, 1000, 8191, 8192))
@pytest.mark.parametrize("step", (1, 50, 128, 883, 1104))
def test_rows_are_cut_in_what_a_product_computes_as_one(rows, step):
    """Each once, in their order, never more than there is room for; on a GPU by multiples of 128 where that can be."""
    for multiple in (1, 128):
        spans = list(kd_chunked._spans(rows, step, multiple))
        assert [row for first, last in spans for row in range(first, last)] == list(range(rows))
        sizes = [last - first for first, last in spans]
        assert all(0 < size <= step for size in sizes)
        if multiple == 128 <= step:
            assert all(size % 128 == 0 for size in sizes[:-1])
            assert not sizes or max(sizes) - min(sizes[:-1] or sizes) <= 128
        else:
            assert not sizes or max(sizes) - min(sizes) <= 1


def test_onednn_sees_few_shapes_and_its_switch(monkeypatch):
    """It keeps what it has compiled for each shape; and `enabled=False` is for us too."""
    monkeypatch.setattr(kd_products, "_mkl_is_slow", lambda: True)
    padded = {rows: len(kd_products._padded(torch.zeros(rows, 1))) for rows in range(8, 2049)}
    assert len(set(padded.values())) <= 32
    assert all(rows <= more < rows + 32 or more <= 1.125 * rows for rows, more in padded.items())
    h, head, out = torch.randn(40, 256), torch.randn(500, 256), torch.empty(40, 500)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
            kd_products.logits_product(h, head, out)
        assert ("aten::mkldnn_linear" in {event.key for event in profile.key_averages()}) == enabled


def test_float16_hidden_states():
    h, head, th, labels = problem(40, 300, 64, torch.float16)
    results = []
    for backend, dtype in (("reference", torch.float64), ("chunked", torch.float16)):
        x, w = h.to(dtype).clone().requires_grad_(), head.to(dtype).clone().requires_grad_()
        loss = linear_kd_loss(x, w, TeacherHidden(th.to(dtype), head.to(dtype)), labels, ce_weight=0.1, backend=backend)
        (loss * 1024).backward()
        results.append((loss.detach(), x.grad, w.grad))
    truth, got = results
    assert error(got[0], truth[0]) < 1e-6 and error(got[1], truth[1]) < 1e-3 and error(got[2], truth[2]) < 1e-3


@pytest.fixture
def precision():
    """Reads torch's setting for float32 products on CPU; afterwards it is as it was."""
    backends = torch.backends
    yield lambda: backends.mkldnn.matmul.fp32_precision
    backends.mkldnn.matmul.fp32_precision = backends.fp32_precision = "none"


@pytest.mark.parametrize("amx", (False, True))
@pytest.mark.parametrize("chosen", ("none", "ieee", "bf16"))
def test_products_leave_the_precision_setting_alone(amx, chosen, precision, monkeypatch):
    """While they last too, where the processor has nothing that it would switch on."""
    monkeypatch.setattr(kd_products, "_has_bf16_instructions", lambda: amx)
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    before, seen, mm = precision(), set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.add(precision()), mm(*a, **k))[1])
    monkeypatch.setattr(kd_products, "_mkl_is_slow", lambda: False)
    h, head, th, _ = problem(dtype=torch.bfloat16)
    linear_kd_loss(h, head, TeacherHidden(th, head))
    assert seen == {"bf16" if amx else chosen} and precision() == before


def test_an_inherited_precision_setting_goes_on_being_inherited(precision, monkeypatch):
    monkeypatch.setattr(kd_products, "_has_bf16_instructions", lambda: True)
    torch.backends.fp32_precision = "tf32"
    h, head, th, _ = problem(dtype=torch.bfloat16)
    linear_kd_loss(h, head, TeacherHidden(th, head))
    torch.backends.fp32_precision = "ieee"
    assert precision() == "ieee"


def test_products_in_threads_leave_the_precision_setting_alone(precision, monkeypatch):
    """Each begins while the other is inside, and the first to begin ends first."""
    monkeypatch.setattr(kd_products, "_has_bf16_instructions", lambda: True)
    monkeypatch.setattr(kd_products, "_mkl_is_slow", lambda: False)
    both, seen, mm = threading.Barrier(2, timeout=30), [], torch.mm
    over = threading.Event()
    h, head = (x.bfloat16() for x in (torch.randn(4, 8), torch.randn(5, 8)))

    def product(*a, **k):
        both.wait()
        if threading.current_thread().name == "second":
            over.wait(30)
        seen.append(precision())
        return mm(*a, **k)

    monkeypatch.setattr(torch, "mm", product)
    args = (h, head, torch.empty(4, 5))
    first, second = (
        threading.Thread(target=kd_products.logits_product, args=args, name=n) for n in ("first", "second")
    )
    first.start(), second.start(), first.join(30)
    assert precision() == "bf16"
    over.set(), second.join(30)
    assert seen == ["bf16", "bf16"] and precision() == "none"


@pytest.mark.parametrize("rows", (40, 200))  # few enough that a bfloat16 head's gradient would be kept, and more
def test_autocast_rounds_operands_alone(rows, monkeypatch):
    """Where its dtype has products of its own: float32 logits and gradients of rounded hidden states and heads, of the
    student and of every teacher inside another."""
    monkeypatch.setattr(kd_products, "_has_bf16_instructions", lambda: True)
    seen, product = set(), kd_products.logits_product
    watched = lambda h, w, out, *more: (seen.add((h.dtype, w.dtype, out.dtype)), product(h, w, out, *more))[1]  # noqa: E731
    monkeypatch.setattr(kd_products, "logits_product", watched)
    h, head, th, labels = problem(rows, 300, 64)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(2))

    def run(dtype, change, backend, autocast):
        x, w, b = (change(one).to(dtype).requires_grad_() for one in (h, head, bias))
        b = bias.to(dtype).requires_grad_()
        inner = TeacherHidden(change(th).to(dtype), change(head.flip(0)).to(dtype), bias.to(dtype))
        teacher = TeacherTAID(TeacherMixture([inner, TeacherLogits(th.to(dtype) @ head.to(dtype).T)]), 0.4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_kd_loss(x, w, teacher, labels, student_bias=b, ce_weight=1.0, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, w, b))

    truth = run(torch.float64, lambda x: x.bfloat16(), "reference", False)
    reference = run(torch.float32, lambda x: x, "reference", True)
    got = run(torch.float32, lambda x: x, "chunked", True)
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    for one, ref, exact in zip(got, reference, truth, strict=True):
        assert one.dtype == ref.dtype == torch.float32
        assert error(ref, exact) < 1e-6 and error(one, exact) <= 2 * error(ref, exact) + 1e-6
    plain = run(torch.float64, lambda x: x, "reference", True)  # float64 is none of autocast's
    for one, exact in zip(plain, run(torch.float64, lambda x: x, "reference", False), strict=True):
        assert torch.equal(one, exact)


def test_autocast_changes_nothing_where_its_products_are_no_faster(monkeypatch):
    monkeypatch.setattr(kd_products, "_has_bf16_instructions", lambda: False)
    h, head, th, labels = problem(200, 300, 64)
    x, w = h.clone().requires_grad_(), head.clone().requires_grad_()
    plain = linear_kd_loss(x, w, TeacherHidden(th, head), labels, ce_weight=1.0)
    grads = torch.autograd.grad(plain, (x, w))
    for backend in BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_kd_loss(x, w, TeacherHidden(th, head), labels, ce_weight=1.0, backend=backend)
        torch.testing.assert_close(loss, plain)
        for got, expected in zip(torch.autograd.grad(loss, (x, w)), grads, strict=True):
            torch.testing.assert_close(got, expected)
    # bfloat16 hidden states against a float32 head, as autocast makes them
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kd_loss(h.bfloat16(), w, TeacherHidden(th.bfloat16(), head), labels)
    exact = linear_kd_loss(
        h.bfloat16().double(), w.double(), TeacherHidden(th.bfloat16().double(), head.double()), labels
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_frozen_parts_and_no_grad(monkeypatch):
    h, head, th, _ = problem()
    made = []
    monkeypatch.setattr(kd_chunked.kd_products, "hidden_gradient", lambda *a: made.append("hidden"))
    monkeypatch.setattr(kd_chunked.kd_products, "add_head_gradient", lambda *a: made.append("head"))
    for x, w, expected in (
        (h.clone().requires_grad_(), head, ["hidden"]),
        (h, head.clone().requires_grad_(), ["head"]),
        (h, head, []),
    ):
        made.clear()
        linear_kd_loss(x, w, TeacherHidden(th, head))
        assert made == expected
    made.clear()
    with torch.no_grad():
        loss = linear_kd_loss(h.clone().requires_grad_(), head.clone().requires_grad_(), TeacherHidden(th, head))
    assert made == [] and not loss.requires_grad


def test_tied_head():
    """The head is also the embedding that made the hidden states."""
    _, head, th, labels = problem()
    got = []
    for backend in BACKENDS:
        table = head.clone().requires_grad_()
        loss = linear_kd_loss(torch.tanh(table[labels]), table, TeacherHidden(th, table), labels, backend=backend)
        loss.backward()
        got.append(table.grad)
    torch.testing.assert_close(got[0], got[1])


def test_backward_twice_and_second_derivatives():
    h, head, th, _ = problem()
    x = h.clone().requires_grad_()
    loss = 3 * linear_kd_loss(x, head, TeacherHidden(th, head))
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 3 * once)
    for reduction in ("mean", "none"):
        loss = linear_kd_loss(x, head, TeacherHidden(th, head), reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (loss.detach() + grad.norm()).backward()
        # Asked for by name, autograd visits only what lies between: that must not come out as zero.
        (grad,) = torch.autograd.grad(
            loss := kd_loss(x @ head.T, th @ head.T, reduction=reduction).sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.square().sum() + loss, x)


def test_the_teacher_is_let_go():
    """Between the loss and its backward only the gradients are kept."""
    h, head, th, _ = problem()
    teacher = (th @ head.T).clone()
    gone = weakref.ref(teacher)
    loss = kd_loss((h @ head.T).requires_grad_(), teacher)
    del teacher
    assert gone() is None and loss.requires_grad


@pytest.mark.parametrize("lam", (1e-8, 1e-6, 1e-3, 0.1))
@pytest.mark.parametrize("divergence", ("skew_kl", "skew_reverse_kl"))
def test_small_skews(divergence, lam):
    """Far apart, a mixture is little more than lam of one side, which must not be lost in the rounding of 1."""
    g = torch.Generator().manual_seed(0)
    z, t = 6 * torch.randn(8, 60, generator=g), 6 * torch.randn(8, 60, generator=g)
    got = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "chunked")):
        x = z.to(dtype).requires_grad_()
        loss = kd_loss(x, t.to(dtype), divergence=divergence, lam=lam, backend=backend)
        loss.backward()
        got.append((loss.detach(), x.grad))
    assert error(got[1][0], got[0][0]) < 1e-6 and error(got[1][1], got[0][1]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_kl_of_a_sure_teacher_without_a_tail(backend):
    logits = torch.zeros(3, 40)
    logits[:, :3] = torch.tensor([40.0, 38.0, 35.0])
    logprobs, ids = torch.log_softmax(logits, -1).topk(8)
    z = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = kd_loss(z, TeacherTopK(ids, logprobs), divergence="reverse_kl", backend=backend)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("divergence", OF_DISTRIBUTIONS)
def test_a_broken_teacher_shows_in_the_gradient(divergence):
    z, t = torch.randn(3, 9).requires_grad_(), torch.randn(3, 9)
    t[1, 4] = float("nan")
    kd_loss(z, t, divergence=divergence).backward()
    assert z.grad[1].isnan().all() and z.grad[[0, 2]].isfinite().all()


def test_inplace_takes_the_logits():
    g = torch.Generator().manual_seed(0)
    h, w, t = torch.randn(7, 5, generator=g), torch.randn(5, 13, generator=g), torch.randn(7, 13, generator=g)
    labels = torch.tensor([1, -100, 3, 4, -100, 5, 6])
    got = []
    for inplace in (False, True):
        x = h.clone().requires_grad_()
        logits = x @ w
        loss = kd_loss(logits, t, labels, ce_weight=0.5, vocab_size=11, inplace=inplace, divergence="jsd")
        loss.backward()
        got.append((loss.detach(), x.grad))
    torch.testing.assert_close(got[0], got[1])


def test_float16_gradients_survive_until_the_loss_scale():
    n = 4096
    z = torch.zeros(n, 3, dtype=torch.float16, requires_grad=True)
    t = torch.tensor([0.01, 0.0, -0.01]).half().expand(n, 3)
    loss = kd_loss(z, t)
    (loss * 2.0**16).backward()
    truth = (torch.softmax(z.detach().double(), -1) - torch.softmax(t.double(), -1)) / n * 2.0**16
    assert z.grad.dtype == torch.float16 and error(z.grad, truth) < 1e-3


def test_any_leading_dimensions_and_strides():
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 11, 3, 5, generator=g), torch.randn(2, 11, 3, 5, generator=g)
    labels = torch.randint(0, 11, (2, 5, 3), generator=g)
    z, t = z.transpose(1, 3), t.transpose(1, 3)
    losses = [
        kd_loss(x, t, labels, ce_weight=1.0, reduction="none", backend=backend)
        for backend in BACKENDS
        for x in (z, z.contiguous())
    ]
    assert losses[0].shape == (2, 5, 3)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])
    one = kd_loss(z[0, 0, 0], t[0, 0, 0])  # a single row without leading dimensions
    assert one.shape == ()


class Peak:
    """Resident memory above that at the start, in MiB, by polling."""

    @staticmethod
    def resident() -> float:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096 / 2**20

    def __enter__(self):
        self.start = self.most = self.resident()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, self.resident())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.mib = self.most - self.start


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows():
    vocab, hidden = 20000, 32
    head = torch.randn(vocab, hidden) / hidden**0.5
    peaks = []
    linear_kd_loss(torch.randn(64, hidden, requires_grad=True), head, TeacherHidden(torch.randn(64, hidden), head))
    for n in (700, 2800):  # two tiles of 700 rows are 107 MiB, whole logits of 2800 rows 427 MiB for both
        x, th = torch.randn(n, hidden, requires_grad=True), torch.randn(n, hidden)
        with Peak() as peak:
            linear_kd_loss(x, head, TeacherHidden(th, head)).backward()
        peaks.append(peak.mib)
    assert peaks[1] < 160, peaks


MISTAKES = {
    "divergence is 'kl'; allowed: forward_kl": lambda z, t, y: kd_loss(z, t, divergence="kl"),
    "temperature is 1e+30; it must be a number from 0.001 to 1000": lambda z, t, y: kd_loss(z, t, temperature=1e30),
    "must be above 0 where": lambda z, t, y: kd_loss(z, t, normalizer=torch.tensor(-1.0)),
    "logprobs hold a mass of": lambda z, t, y: kd_loss(z, TeacherTopK(y[:, None], 1 + t[:, :1].abs())),
    "'probability_mse' can't be taken over a top k": lambda z, t, y: kd_loss(
        z, TeacherTopK(y[:, None], -t[:, :1].abs()), divergence="probability_mse"
    ),
    "precision is 'bf16'; allowed: full, rounded": lambda z, t, y: kd_loss(z, t, precision="bf16"),
    "return_parts is 'all'; allowed: False, True, rows": lambda z, t, y: kd_loss(z, t, return_parts="all"),
    "TeacherMixture.teachers is a NoneType": lambda z, t, y: kd_loss(z, TeacherMixture(None)),
    "vocabulary is empty": lambda z, t, y: kd_loss(z[:, :0], t[:, :0]),
    "student hidden size is 0": lambda z, t, y: linear_kd_loss(z[:, :0], z[:, :0], t[:, :5]),
    "torch.sparse_coo; it must be a dense": lambda z, t, y: kd_loss(z.to_sparse(), t),
    "on the meta device": lambda z, t, y: kd_loss(z.to("meta"), t),
    "group is a str": lambda z, t, y: kd_loss(z, t, group="tp"),
    "temperature is 0": lambda z, t, y: kd_loss(z, t, temperature=0),
    "temperature is nan": lambda z, t, y: kd_loss(z, t, temperature=float("nan")),
    "temperature is '2'": lambda z, t, y: kd_loss(z, t, temperature="2"),
    "kd_weight is -1": lambda z, t, y: kd_loss(z, t, kd_weight=-1),
    "beta is 1.5": lambda z, t, y: kd_loss(z, t, divergence="jsd", beta=1.5),
    "lam is 1": lambda z, t, y: kd_loss(z, t, divergence="skew_kl", lam=1.0),
    "reduction is 'batchmean'": lambda z, t, y: kd_loss(z, t, reduction="batchmean"),
    "backend is 'cuda'": lambda z, t, y: kd_loss(z, t, backend="cuda"),
    "ce_weight is 1.0 but labels is None": lambda z, t, y: kd_loss(z, t, ce_weight=1.0),
    "normalizer is given but reduction is 'sum'": lambda z, t, y: kd_loss(z, t, reduction="sum", normalizer=3),
    "normalizer is 0": lambda z, t, y: kd_loss(z, t, normalizer=0),
    "labels contain 9; allowed: 0..8": lambda z, t, y: kd_loss(z, t, y + 5),
    "labels contain 7; allowed: 0..6": lambda z, t, y: kd_loss(z, t, y + 3, vocab_size=7),
    "labels has leading dimensions": lambda z, t, y: kd_loss(z, t, y[:3]),
    "labels must be an int64 tensor": lambda z, t, y: kd_loss(z, t, y.float()),
    "student_logits has dtype torch.int64": lambda z, t, y: kd_loss(z.long(), t),
    "teacher logits has dtype torch.int64": lambda z, t, y: kd_loss(z, t.long()),
    "teacher logits has leading dimensions": lambda z, t, y: kd_loss(z, t[:4]),
    "has 9 entries and the teacher's 8": lambda z, t, y: kd_loss(z, t[:, :8]),
    "vocab_size is 10 but the student has only 9": lambda z, t, y: kd_loss(z, t, vocab_size=10),
    "vocab_size is 0": lambda z, t, y: kd_loss(z, t, vocab_size=0),
    "token_weights has leading": lambda z, t, y: kd_loss(z, t, token_weights=torch.ones(3)),
    "teacher is a list": lambda z, t, y: kd_loss(z, [t]),
    "TeacherTopK.ids run from 0 to 12": lambda z, t, y: kd_loss(z, TeacherTopK(y[:, None] * 3, -t[:, :1].abs())),
    "TeacherTopK.ids repeats": lambda z, t, y: kd_loss(z, TeacherTopK(y[:, None].expand(5, 2), -t[:, :2].abs())),
    "TeacherTopK.ids has shape": lambda z, t, y: kd_loss(z, TeacherTopK(y[:, None], t[:, :2])),
    "only 'forward_kl' is linear in the teacher's probabilities": lambda z, t, y: kd_loss(
        z, TeacherSamples(y[:, None], t[:, :1].abs()), divergence="jsd"
    ),
    "weights has negative": lambda z, t, y: kd_loss(z, TeacherSamples(y[:, None], -t[:, :1].abs() - 1)),
    "TeacherMixture has no teachers": lambda z, t, y: kd_loss(z, TeacherMixture([])),
    "a mixture of teachers": lambda z, t, y: kd_loss(z, TeacherMixture([TeacherLogits(t)]), divergence="mse"),
    "a weight of TeacherMixture is 1e+308": lambda z, t, y: kd_loss(z, TeacherMixture([TeacherLogits(t)], [1e308])),
    "normalizer requires grad": lambda z, t, y: kd_loss(z, t, normalizer=torch.ones(1, requires_grad=True)),
    "logprobs and tail_logprob hold a mass": lambda z, t, y: kd_loss(
        z, TeacherTopK(y[:, None], torch.zeros(5, 1), torch.ones(5))
    ),
    "1 teachers and 2 weights": lambda z, t, y: kd_loss(z, TeacherMixture([TeacherLogits(t)], [1, 2])),
    "TeacherTAID.t is 2": lambda z, t, y: kd_loss(z, TeacherTAID(TeacherLogits(t), 2)),
    "takes a dense teacher": lambda z, t, y: kd_loss(z, TeacherTAID(TeacherSamples(y, t), 0.5)),
    "student hidden size is 9 but": lambda z, t, y: linear_kd_loss(z, z[:, :4], t),
    "are torch.float32 but the head is torch.bfloat16": lambda z, t, y: linear_kd_loss(z, z.bfloat16(), t),
    "student bias has 4 entries": lambda z, t, y: linear_kd_loss(z, z, t[:, :5], student_bias=torch.ones(4)),
    "logit_softcap is 0": lambda z, t, y: linear_kd_loss(z, z, t[:, :5], logit_softcap=0),
    "inplace needs": lambda z, t, y: kd_loss(z, t, inplace=True, reduction="none"),
}


def test_sharded_hidden_states_are_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden = distribute_tensor(torch.randn(3, 4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(ValueError, match="student hidden states is a DTensor"):
            linear_kd_loss(hidden, torch.randn(9, 4), torch.randn(3, 9))
    finally:
        destroy_process_group()


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_clear_line(message):
    z, t, y = torch.randn(5, 9), torch.randn(5, 9), torch.arange(5)
    with pytest.raises(ValueError) as caught:
        MISTAKES[message](z, t, y)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_import_needs_neither_triton_nor_transformers():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "from mohawk.kernels.kd.interface import kd_loss, linear_kd_loss\n"
        "import torch; print(float(kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0"

"""Adding one of each kind takes as many files as CONTRIBUTING.md says: each is added here at run time in those places
alone, and works from end to end."""

import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mohawk.kernels.kd import gradients, teachers
from mohawk.kernels.kd.divergences import DIVERGENCES, Divergence
from mohawk.kernels.kd.loss import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from mohawk.losses.label_probability import label_probability

ROWS, VOCAB, HIDDEN = 7, 11, 5


@pytest.fixture
def z():
    return torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def t():
    return torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


HELLINGER = Divergence(
    definition=lambda lp, lq, beta, lam: ((lp / 2).exp() - (lq / 2).exp()).square().sum(-1) / 2,
    text="squared Hellinger distance",
)


def hellinger(z: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 * (1 - sum sqrt(p q)), mean over rows, and its gradient in z, by hand."""
    q = torch.softmax(z.detach() / temperature, -1)
    shared = (p * q).sqrt()
    affinity = shared.sum(-1, keepdim=True)
    value = temperature**2 * (1 - affinity).mean()
    return value, temperature * (q * affinity - shared) / 2 / len(z)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_divergence_is_an_entry(backend, z, t, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    options = {"divergence": "hellinger", "temperature": 2.0, "backend": backend}
    loss = kd_loss(z, t, **options)
    loss.backward()
    value, grad = hellinger(z, torch.softmax(t / 2, -1), 2.0)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, grad, rtol=1e-10, atol=1e-14)


def test_a_divergence_meets_every_teacher(z, t, monkeypatch):
    """Both torch backends agree, and the gradients are those of a difference quotient."""
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    g = torch.Generator().manual_seed(3)
    hidden, head, own = (torch.randn(n, HIDDEN, dtype=torch.float64, generator=g) for n in (ROWS, VOCAB, VOCAB))
    source = TeacherHidden(torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=g), head, None, 0.5, 4.0)
    topk = t.log_softmax(-1).topk(3)
    sources = [
        source,
        TeacherMixture([source, TeacherLogits(t)], [1.0, 2.0]),
        TeacherTAID(TeacherLogits(t), 0.4),
        TeacherTopK(topk.indices, topk.values),
    ]
    labels = torch.randint(VOCAB, (ROWS,), generator=g)
    labels[2] = -100
    for one in sources:
        found = []
        for backend in ("reference", "chunked"):
            x, w = hidden.clone().requires_grad_(), own.clone().requires_grad_()
            options = {"divergence": "hellinger", "ce_weight": 0.5, "temperature": 1.5, "backend": backend}
            loss = linear_kd_loss(x, w, one, labels, **options)
            loss.backward()
            found.append((loss.detach(), x.grad, w.grad))
        for got, truth in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name in gradients.DISTRIBUTION | gradients.LOGITS])
def test_gradients_by_hand_are_those_of_the_definitions(name, z, t, monkeypatch):
    def both():
        z.grad = None
        loss = kd_loss(z, t, divergence=name, backend="chunked")
        loss.backward()
        return loss.detach(), z.grad

    by_hand = both()
    for table in (gradients.DISTRIBUTION, gradients.LOGITS):
        monkeypatch.delitem(table, name, raising=False)
    for got, expected in zip(both(), by_hand, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_a_divergence_without_a_gradient_by_hand_says_where_it_cannot_go(z, t, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    with pytest.raises(ValueError, match="'triton' can't be used"):
        kd_loss(z, t, divergence="hellinger", backend="triton")
    torch.compiler.reset()
    with pytest.raises(Exception, match="'hellinger' has no gradient by hand, so it can't be compiled"):
        torch.compile(lambda z: kd_loss(z, t, divergence="hellinger"), backend="eager")(z)


def test_recipes_and_texts_read_the_table_of_divergences():
    """Where it has one more before anything else is imported."""
    script = """
from mohawk.kernels.kd.divergences import DIVERGENCES, Divergence
import sys
assert "torch" not in sys.modules
DIVERGENCES["hellinger"] = Divergence(definition=lambda lp, lq, beta, lam: ..., text="squared Hellinger distance")
from pydantic import TypeAdapter, ValidationError
from mohawk.schema.base import Divergence
assert "torch" not in sys.modules
check = TypeAdapter(Divergence).validate_python
assert check("hellinger") == "hellinger" and check("jsd") == "jsd"
try:
    check("hellingre")
except ValidationError as error:
    assert "hellinger" in str(error)
else:
    raise AssertionError
from mohawk.kernels.kd.loss import kd_loss
assert "hellinger: squared Hellinger distance" in kd_loss.__doc__
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def forget_sources():
    before = dict(teachers.SOURCES)
    yield
    teachers.SOURCES.clear()
    teachers.SOURCES.update(before)


def test_a_dense_teacher_source_is_a_class(z, t, forget_sources):
    """Logits in eighths, as int8: alone, in a mixture, with TAID, cut, compiled, and for the weighing of tokens."""

    @dataclass(frozen=True, eq=False)
    class TeacherEighths(teachers.Dense):
        codes: Tensor
        step_size: float

        ROWS = {"codes": 1}

        def check(self, student) -> None:
            student.beside("TeacherEighths.codes", self.codes, trailing=1)

        def scores(self, dtype: torch.dtype) -> Tensor:
            return self.codes.to(dtype) * self.step_size

    codes = (t * 8).round().to(torch.int8)
    ours, plain = TeacherEighths(codes, 0.125), TeacherLogits(codes.double() / 8)
    labels = torch.arange(ROWS)
    labels[1] = -100

    def result(source, backend, **options):
        z.grad = None
        loss = kd_loss(z, source, labels, temperature=2.0, ce_weight=0.5, backend=backend, **options)
        loss.backward()
        return loss.detach(), z.grad

    for wrap in (
        lambda one: one,
        lambda one: TeacherTAID(one, 0.5),
        lambda one: TeacherMixture([one, TeacherLogits(t)]),
    ):
        for backend in ("reference", "chunked"):
            for divergence in ("forward_kl", "jsd"):
                got = result(wrap(ours), backend, divergence=divergence)
                expected = result(wrap(plain), "reference", divergence=divergence)
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)

    torch.compiler.reset()
    compiled = torch.compile(lambda z: kd_loss(z, ours), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), kd_loss(z, plain))

    p = torch.softmax(codes.float() / 8, -1)
    expected = p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels < 0, 0)
    torch.testing.assert_close(label_probability(ours, labels), expected)
    with pytest.raises(ValueError, match="TeacherEighths.codes has leading dimensions"):
        kd_loss(z[:3], ours)


def test_another_teacher_source_is_a_class_too(z, forget_sources):
    """One id in each row, smoothed: sum over words of -target * log q is the cross-entropy with label smoothing."""

    @dataclass(frozen=True, eq=False)
    class TeacherSmoothed(teachers.Teacher):
        ids: Tensor
        smoothing: float

        ROWS = {"ids": 0}

        def check(self, student) -> None:
            student.beside("TeacherSmoothed.ids", self.ids, trailing=0)

        def compared(self, u: Tensor, divergence) -> Tensor:
            lq = u.log_softmax(-1)
            named = lq.gather(1, self.ids[:, None]).squeeze(1)
            return -(1 - self.smoothing) * named - self.smoothing * lq.mean(-1)

    ids = torch.arange(ROWS) % VOCAB
    labels = ids.clone()
    labels[4] = -100
    expected = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(expected, z)
    for backend in ("reference", "chunked"):
        z.grad = None
        loss = kd_loss(z, TeacherSmoothed(ids, 0.1), labels, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(z.grad, grad, rtol=1e-10, atol=1e-14)
    assert math.isfinite(loss.item())
    with pytest.raises(ValueError, match="one of TeacherLogits, .*TeacherSmoothed"):
        kd_loss(z, "nothing of the kind")
    torch.compiler.reset()
    with pytest.raises(Exception, match="TeacherSmoothed has no gradient by hand, so it can't be compiled"):
        torch.compile(lambda z: kd_loss(z, TeacherSmoothed(ids, 0.1)), backend="eager")(z)
    with pytest.raises(ValueError, match="TeacherTAID takes a dense teacher or a mixture, not TeacherSmoothed"):
        kd_loss(z, TeacherTAID(TeacherSmoothed(ids, 0.1), 0.5))

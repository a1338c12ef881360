"""The distance of two mixing matrices, strip by strip, against whole matrices and torch's autograd."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.kernels.mixing import chunked as mixing_chunked
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from tests.helpers.mixings import cast, documents, run

METRICS = ["frobenius", "squared", "mse", "relative"]


def attention(batch, heads, kv_heads, seq, width, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(batch, count, seq, width, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, kv_heads)
    )
    return AttentionMixing(q, k, **options)


def state_space(batch, heads, groups, seq, state, strength=1.0, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    C, B = ((random(batch, seq, count, state) - 0.5).requires_grad_() for count in groups)
    log_decay = (random(batch, seq, heads) * -strength).requires_grad_()
    scale, D = random(batch, seq, heads).requires_grad_(), random(heads).requires_grad_()
    return SSDMixing(C, B, log_decay, scale, D, **options)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few heads, so that small shapes are cut too."""
    monkeypatch.setattr(mixing_chunked, "STRIP_ENTRIES", 1 << 13)


def pairs(seq):
    ids = documents(2, seq, padding=seq // 5)
    return {
        "ssd, attention": (state_space(2, 6, (2, 3), seq, 8), attention(2, 6, 2, seq, 16)),
        "packed, window, fewer teacher heads": (
            state_space(2, 6, (1, 6), seq, 8, segment_ids=ids),
            attention(2, 3, 1, seq, 16, window=17, segment_ids=ids),
        ),
        "only the student is packed": (
            state_space(2, 2, (2, 2), seq, 8, segment_ids=ids),
            attention(2, 2, 1, seq, 4, scale=0.7),
        ),
        "strong decays, more teacher heads": (
            state_space(2, 3, (3, 3), seq, 8, strength=100.0),
            attention(2, 6, 2, seq, 16, window=70),
        ),
        "ssd, ssd": (
            state_space(2, 6, (3, 3), seq, 8, segment_ids=ids),
            state_space(2, 2, (1, 2), seq, 5, seed=5),
        ),
        "attention, attention": (
            attention(2, 6, 3, seq, 8, segment_ids=ids),
            attention(2, 6, 2, seq, 16, seed=7, segment_ids=ids),
        ),
        "attention, ssd": (
            attention(2, 2, 2, seq, 8, window=33),
            state_space(2, 6, (3, 3), seq, 8, segment_ids=ids),
        ),
        "asymmetric": (state_space(1, 1, (1, 1), seq, 130), attention(1, 1, 1, seq, 1)),
    }


PAIRS = list(pairs(1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seq", [1, 63, 150])
def test_chunked_equals_the_definition_in_float64(seq, name, reduction):
    student, teacher = pairs(seq)[name]
    for metric in METRICS + ["kl"] * (name == "attention, attention"):
        exact = run(student, teacher, metric=metric, reduction=reduction, backend="reference")
        mine = run(student, teacher, metric=metric, reduction=reduction, backend="chunked")
        for value, expected in zip(mine, exact, strict=True):
            assert value.shape == expected.shape
            assert error(value, expected) < 1e-11, metric


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seq", [1, 63, 150])
def test_chunked_is_as_exact_as_the_definition(seq, name, dtype):
    student, teacher = (cast(mixing, dtype) for mixing in pairs(seq)[name])
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    plain = run(student, teacher, backend="reference")
    for index, value in enumerate(run(student, teacher, backend="chunked")):
        # Three roundings are always allowed: on few numbers the reference can be exact by luck.
        assert error(value, exact[index]) <= max(2 * error(plain[index], exact[index]), 3.6e-7), index


def test_sum_of_squares_keeps_float32_at_two_thousand_tokens():
    student = cast(state_space(1, 8, (8, 8), 2048, 64), torch.float32)
    teacher = cast(attention(1, 8, 8, 2048, 64), torch.float32)
    with torch.no_grad():
        mine = mixing_distance(student, teacher, reduction="none")
        exact = mixing_distance(
            cast(student, torch.float64), cast(teacher, torch.float64), reduction="none", backend="chunked"
        )
    assert ((mine - exact) / exact).abs().max() < 2e-7


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    ids = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:seq]
        row = torch.cat((row, torch.full((seq - len(row),), -1)))
        ids = row.expand(batch, seq).clone()
        ids[-1] = ids[-1].flip(0)
    groups = draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))
    strength = draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    student = state_space(batch, heads, groups, seq, draw(st.integers(1, 20)), strength, segment_ids=ids)
    teacher = attention(
        batch,
        heads,
        draw(st.sampled_from(divisors)),
        seq,
        draw(st.integers(1, 20)),
        window=draw(st.none() | st.integers(1, 80)),
        segment_ids=ids,
    )
    metric = draw(st.sampled_from(METRICS))
    exact = run(student, teacher, metric=metric, backend="reference")
    for value, expected in zip(run(student, teacher, metric=metric, backend="chunked"), exact, strict=True):
        # The reference rounds a decay's gradient below 1e-16 away, beside the diagonal's.
        assert (value - expected).norm() < 1e-10 * expected.norm() + 1e-15


def test_gradcheck():
    ids = documents(1, 70, 33, padding=5)
    student = state_space(1, 2, (1, 2), 70, 2, segment_ids=ids)
    teacher = attention(1, 2, 1, 70, 3, segment_ids=ids)
    for metric in METRICS:
        assert torch.autograd.gradcheck(
            lambda *tensors, metric=metric: mixing_distance(
                SSDMixing(*tensors, segment_ids=ids), teacher, metric=metric, reduction="none"
            ),
            student.tensors,
            fast_mode=True,
        )
    other = attention(1, 2, 2, 70, 3, seed=4, segment_ids=ids)
    for metric in [*METRICS, "kl"]:
        assert torch.autograd.gradcheck(
            lambda q, k, metric=metric: mixing_distance(
                AttentionMixing(q, k, segment_ids=ids), teacher, metric=metric, reduction="none"
            ),
            other.tensors,
            fast_mode=True,
        )


@pytest.mark.parametrize("metric", [*METRICS, "kl"])
def test_at_distance_zero_the_gradient_is_zero(metric):
    same = attention(1, 2, 1, 100, 4)
    value, *gradients = run(same, same, metric=metric)
    assert value == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_padding_contributes_nothing():
    ids = documents(2, 100, padding=37)
    ids[0, :9] = -1
    student, teacher = state_space(2, 3, (3, 1), 100, 8), attention(2, 3, 3, 100, 8)
    for owner in ("both", "teacher"):
        here = dataclasses.replace(student, segment_ids=ids if owner == "both" else None)
        there = dataclasses.replace(teacher, segment_ids=ids)
        results = run(here, there)
        q = teacher.q.detach().clone()
        q.transpose(1, 2)[ids < 0] = 100.0  # what stands in the padding must not matter
        assert torch.equal(results[0], run(here, dataclasses.replace(there, q=q))[0])
        if owner == "both":
            for name, gradient in zip(("C", "B", "log_decay", "input_scale"), results[1:], strict=False):
                # Sums that cancel leave the decays' last digit.
                assert gradient[ids < 0].abs().max() < (1e-15 if name == "log_decay" else 1e-30), name
                assert gradient[ids >= 0].any(), name


def test_a_row_of_padding_alone_is_no_nan():
    ids = torch.full((2, 50), -1)
    ids[0] = 3
    student = state_space(2, 2, (2, 2), 50, 4, segment_ids=ids)
    teacher = attention(2, 2, 2, 50, 4, segment_ids=ids)
    for metric in METRICS:
        value, *gradients = run(student, teacher, metric=metric, reduction="none")
        assert not value[1].any() and value[0].all()
        assert all(gradient.isfinite().all() for gradient in gradients)
    other = attention(2, 2, 2, 50, 4, seed=3, segment_ids=ids)
    value, *gradients = run(other, teacher, metric="kl", reduction="none")
    assert not value[1].any() and value[0].all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("log_decay", [-1e-6, -1.0, -12.0, -100.0, float("-inf")])
def test_eight_thousand_tokens_of_any_decay_stay_finite(log_decay):
    student = cast(state_space(1, 1, (1, 1), 8192, 4), torch.float32)
    decays = torch.full((1, 8192, 1), log_decay)
    student = dataclasses.replace(student, log_decay=decays.requires_grad_())
    teacher = cast(attention(1, 1, 1, 8192, 4), torch.float32)
    for value in run(student, teacher):
        assert value.isfinite().all()


def test_mixed_decays_keep_the_weak_gradients():
    student, teacher = state_space(1, 2, (2, 2), 512, 8), attention(1, 2, 2, 512, 8)
    decays = torch.full((1, 512, 2), -1e-3, dtype=torch.float64)
    decays[:, ::7] = -100.0
    student = cast(dataclasses.replace(student, log_decay=decays), torch.float32)
    teacher = cast(teacher, torch.float32)
    exact = run(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    for value, expected in zip(run(student, teacher), exact, strict=True):
        assert error(value, expected) < 5e-7


def test_autocast_and_layout_change_nothing():
    student = cast(state_space(2, 4, (2, 4), 100, 8), torch.float32)
    teacher = cast(attention(2, 4, 2, 100, 8), torch.float32)
    plain = run(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(student, teacher)
    turned = [
        dataclasses.replace(
            mixing,
            **{
                name: value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                for name, value in vars(mixing).items()
                if isinstance(value, torch.Tensor) and value.dim() > 2
            },
        )
        for mixing in (student, teacher)
    ]
    for value, other, third in zip(plain, inside, run(*turned), strict=True):
        assert torch.equal(value, other)
        assert torch.equal(value, third)


def test_only_the_asked_for_gradients_are_made():
    student = state_space(1, 2, (2, 2), 40, 4)
    C = student.C.detach().requires_grad_()
    partly = SSDMixing(C, student.B.detach(), student.log_decay.detach())
    teacher = attention(1, 2, 2, 40, 4)
    mixing_distance(partly, teacher).backward()
    assert C.grad is not None and teacher.q.grad is None
    with torch.no_grad():
        assert not mixing_distance(student, teacher).requires_grad


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0)])
def test_empty(batch, seq):
    student, teacher = state_space(batch, 2, (2, 2), seq, 4), attention(batch, 2, 2, seq, 4)
    value = mixing_distance(student, teacher, reduction="sum")
    assert value == 0
    value.backward()
    assert student.C.grad.shape == student.C.shape


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        ({"window": 10}, {}),
        ({"window": 4096}, {}),
        ({"window": 5}, {"segment_ids": torch.arange(10)[None] // 5}),
        ({"segment_ids": torch.full((1, 10), 7)}, {}),
        ({"segment_ids": torch.arange(10)[None] // 5}, {"segment_ids": 9 - torch.arange(10)[None] // 5}),
    ],
)
def test_kl_where_the_teacher_sees_no_more(of_student, of_teacher):
    student, teacher = attention(1, 4, 2, 10, 4, **of_student), attention(1, 4, 2, 10, 4, **of_teacher)
    got = [mixing_distance(student, teacher, metric="kl", backend=b) for b in ("reference", "chunked")]
    assert got[0].isfinite()
    torch.testing.assert_close(got[1], got[0])


def wrong(**change):
    student, teacher = state_space(1, 4, (2, 4), 10, 4), attention(1, 4, 2, 10, 4)
    return {"student": student, "teacher": teacher, **change}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(metric="l1"), "metric must be one of"),
        (wrong(reduction="max"), "reduction must be one of"),
        (wrong(backend="cuda"), "backend must be one of"),
        (wrong(teacher=torch.zeros(3)), "must be an AttentionMixing, an SSDMixing or a DeltaMixing, got Tensor"),
        (wrong(teacher=attention(1, 3, 3, 10, 4)), "one number of heads must divide the other, got 4"),
        (wrong(teacher=attention(1, 4, 2, 11, 4)), "agree in batch and seq"),
        (wrong(metric="kl"), "compares two attentions"),
        (wrong(backend="triton"), "triton"),  # float64, or not installed
        (wrong(metric="kl", student=attention(1, 4, 2, 10, 4, window=3)), "infinite"),
        (
            wrong(metric="kl", student=attention(1, 4, 2, 10, 4, segment_ids=torch.arange(10)[None] // 5)),
            "other segment_ids",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        mixing_distance(**arguments)
    assert "\n" not in str(caught.value)

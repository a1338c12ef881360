"""Distances of mean matrices over heads, strip by strip, against whole matrices and torch's autograd."""

import pytest
import torch

from mohawk.kernels.mixing import mean_heads as mixing_heads
from mohawk.kernels.mixing.interface import head_mean_distance
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from mohawk.kernels.mixing.reference import dense_matrix

SEQ = 131  # two strips and a bit


def attention(heads, kv_heads, width, seed, dtype=torch.float64, seq=SEQ, batch=2, **options):
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        (2 * torch.randn(batch, count, seq, width, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for count in (heads, kv_heads)
    )
    return AttentionMixing(q, k, **options)


def state_space(heads, groups, state, seed, **options):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    C, B = ((random(2, SEQ, count, state) - 0.5).requires_grad_() for count in groups)
    log_decay, scale = (-random(2, SEQ, heads)).requires_grad_(), random(2, SEQ, heads).requires_grad_()
    return SSDMixing(C, B, log_decay, scale, random(heads).requires_grad_(), **options)


def segments():
    ids = torch.arange(SEQ).div(50, rounding_mode="floor").repeat(2, 1)
    ids[0] = 0
    ids[1, -30:] = -1
    return ids


def dense(student, teacher, metric, groups):
    """The definition, from whole matrices."""
    made = [dense_scores(mixing) if metric == "scores" else dense_matrix(mixing) for mixing in (student, teacher)]
    if metric == "scores":
        seen = (made[0] > -1e20) & (made[1][:, :1] > -1e20)
        made = [x.masked_fill(~seen[:, :1], 0.0) for x in made]
    s, a = (x.unflatten(1, (groups, -1)).mean(2) for x in made)
    a = a.detach()
    ids = next((mixing.segment_ids for mixing in (student, teacher) if mixing.segment_ids is not None), None)
    real = torch.ones(s.shape[0], s.shape[2], dtype=torch.bool) if ids is None else ids >= 0
    if metric != "kl":
        difference = (s - a) * (real.unsqueeze(1) & real.unsqueeze(2)).unsqueeze(1)
        if metric != "frobenius":
            return (difference.square().sum((2, 3)) / real.sum(-1, keepdim=True) ** 2).mean()
        return difference.norm(dim=(2, 3)).mean()
    tiny = torch.finfo(s.dtype).tiny
    rows = (a * (a.clamp(min=tiny).log() - s.clamp(min=tiny).log())).sum(-1)
    return ((rows * real.unsqueeze(1)).sum(-1) / real.sum(-1, keepdim=True)).mean()


def dense_scores(mixing):
    """scale * q k^T, capped, -1e30 where a token does not see another."""
    k = mixing.k.repeat_interleave(mixing.q.shape[1] // mixing.k.shape[1], 1)
    scores = mixing.resolved_scale() * mixing.q @ k.transpose(2, 3)
    if mixing.softcap is not None:
        scores = mixing.softcap * torch.tanh(scores / mixing.softcap)
    return scores.masked_fill(dense_matrix(mixing) == 0, -1e30)


def cases():
    ids = segments()
    return {
        "other counts": (attention(6, 2, 8, 0), attention(4, 4, 16, 1), 1),
        "one head": (attention(1, 1, 8, 0), attention(3, 1, 8, 1), 1),
        "groups": (attention(6, 3, 8, 0), attention(4, 2, 8, 1), 2),
        "a group a head": (attention(2, 1, 8, 0), attention(8, 2, 8, 1), 2),
        "packed and padded": (attention(6, 2, 8, 0, segment_ids=ids), attention(4, 4, 8, 1, segment_ids=ids), 1),
        "windows": (attention(3, 3, 8, 0, window=40), attention(2, 1, 8, 1, window=17), 1),
        "softcap, scale": (attention(3, 3, 8, 0, softcap=2.0, scale=0.7), attention(2, 1, 8, 1, segment_ids=ids), 1),
        "state space": (state_space(6, (2, 3), 5, 0, segment_ids=ids), attention(4, 2, 8, 1, segment_ids=ids), 2),
        "a state-space teacher": (attention(3, 1, 8, 0), state_space(2, (1, 2), 5, 1), 1),
    }


@pytest.mark.parametrize("metric", ["mse", "frobenius", "kl", "scores"])
@pytest.mark.parametrize("name", cases())
def test_value_and_gradients_against_whole_matrices(name, metric, monkeypatch):
    student, teacher, groups = cases()[name]
    attentions = isinstance(student, AttentionMixing) and isinstance(teacher, AttentionMixing)
    if metric in ("kl", "scores") and not attentions:
        with pytest.raises(ValueError, match="no distributions|no scores"):
            head_mean_distance(student, teacher, metric=metric, groups=groups)
        return
    tensors = [x for x in student.tensors if x is not None]
    exact = dense(student, teacher, metric, groups)
    wanted = torch.autograd.grad(exact, tensors)
    for entries in (1 << 21, 6 * SEQ * 7):  # all batch rows in strips of 64; one batch row in strips of 7 or more
        monkeypatch.setattr(mixing_heads, "STRIP_ENTRIES", entries)
        value = head_mean_distance(student, teacher, metric=metric, groups=groups)
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=0)
        for ours, theirs in zip(torch.autograd.grad(3 * value, tensors), wanted, strict=True):
            torch.testing.assert_close(ours, 3 * theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("metric", ["mse", "frobenius", "kl", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_in_other_dtypes(metric, dtype):
    student, teacher = attention(6, 2, 8, 0, dtype), attention(4, 4, 16, 1, dtype)
    wide = [AttentionMixing(*(x.detach().double().requires_grad_() for x in m.tensors)) for m in (student, teacher)]
    exact = dense(*wide, metric, 1)
    exact_gradients = torch.autograd.grad(exact, wide[0].tensors)
    torchs = dense(student, teacher, metric, 1)
    torchs_gradients = torch.autograd.grad(torchs, student.tensors)
    value = head_mean_distance(student, teacher, metric=metric)
    gradients = torch.autograd.grad(value, student.tensors)
    assert value.dtype == torch.float32 and gradients[0].dtype == dtype
    assert abs(value - exact) <= 2 * abs(torchs - exact) + 1e-6 * exact
    for ours, theirs, truth in zip(gradients, torchs_gradients, exact_gradients, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_probabilities_that_underflow_have_gradients():
    """Far off, the student's probability of what the teacher sees is 0 in float32; its logarithm is not."""
    q = torch.tensor([[0.0], [1.0]]).view(1, 1, 2, 1).repeat(1, 2, 1, 1).requires_grad_()
    k = torch.tensor([[200.0], [0.0]]).view(1, 1, 2, 1).repeat(1, 2, 1, 1).requires_grad_()
    teacher = AttentionMixing(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1))
    value = head_mean_distance(AttentionMixing(q, k, scale=1.0), teacher, metric="kl")
    # row 0 agrees; row 1: half the mass where the student has exp(-200)
    torch.testing.assert_close(value, torch.tensor((-2 * 0.5 * 0.6931472 + 0.5 * 200) / 2))
    value.backward()
    torch.testing.assert_close(q.grad, torch.tensor([[0.0], [25.0]]).view(1, 1, 2, 1).repeat(1, 2, 1, 1))


def test_the_teacher_and_second_derivatives():
    student, teacher = attention(6, 2, 8, 0), attention(4, 4, 8, 1)
    value = head_mean_distance(student, teacher)
    assert torch.autograd.grad(value, teacher.tensors, allow_unused=True, retain_graph=True) == (None, None)
    (first,) = torch.autograd.grad(value, student.q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), student.q)
    assert head_mean_distance(attention(2, 2, 4, 0, seq=0), attention(3, 3, 4, 0, seq=0)) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "relative"}, "metric must be one of mse, scores, kl, frobenius"),
        ({"groups": 4}, "4 groups must divide the heads, 6 .student. and 4 .teacher."),
        ({"groups": 0}, "0 groups"),
    ],
)
def test_what_does_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        head_mean_distance(attention(6, 2, 8, 0), attention(4, 4, 8, 1), **options)
    with pytest.raises(ValueError, match="agree in batch and seq"):
        head_mean_distance(attention(6, 2, 8, 0, seq=5), attention(4, 4, 8, 1))
    with pytest.raises(ValueError, match="got Tensor"):
        head_mean_distance(attention(6, 2, 8, 0).q, attention(4, 4, 8, 1))
    with pytest.raises(ValueError, match="windows 4"):
        head_mean_distance(attention(6, 2, 8, 0, window=4), attention(4, 4, 8, 1), metric="kl")

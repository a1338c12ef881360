"""The Triton kernels on a GPU against the definition in float64, at odd shapes. `pytest -m gpu` runs these."""

import pytest
import torch

from mohawk.kernels.kd_loss import TeacherHidden, kd_loss, linear_kd_loss
from mohawk.kernels.mixing import AttentionMixing, SSDMixing
from mohawk.kernels.mixing_distance import mixing_distance
from mohawk.kernels.ssd import ssd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(*shape, dtype=torch.float32):
    """Values that dtype holds exactly, so that float64 sees the same."""
    return torch.randn(*shape).to(dtype).cuda()


def assert_close(got, exact, tolerance, names):
    for name, value, truth in zip(names, got, exact, strict=True):
        error = ((value.double() - truth).norm() / truth.norm()).item()
        assert error < tolerance, (name, error)


def value_and_gradients(function, tensors, dtype=None):
    leaves = [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# Float32 products are IEEE's; bfloat16 rounds residuals once before the second product.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(
    ("seq", "width", "state", "packed"),
    [(1, 16, 8, False), (63, 64, 20, True), (333, 40, 64, False), (333, 5, 64, True)],
)
def test_mixing_distance(dtype, tolerance, seq, width, state, packed):
    torch.manual_seed(seq)
    ids = None
    if packed:
        ids = (torch.arange(seq) // 50).expand(2, seq).clone()
        ids[-1, -seq // 9 :] = -1
        ids = ids.cuda()
    q, k = on_gpu(2, 6, seq, width, dtype=dtype), on_gpu(2, 3, seq, width, dtype=dtype)
    student = [on_gpu(2, seq, 2, state, dtype=dtype), on_gpu(2, seq, 3, state, dtype=dtype)]
    student += [-torch.rand(2, seq, 6, device="cuda"), torch.rand(2, seq, 6, device="cuda"), on_gpu(6)]

    def distance(backend):
        return lambda *tensors: mixing_distance(
            SSDMixing(*tensors, segment_ids=ids),
            AttentionMixing(q.to(wide[backend]), k.to(wide[backend]), window=100, segment_ids=ids),
            backend=backend,
        )

    wide = {"triton": dtype, "reference": torch.float64}
    got = value_and_gradients(distance("triton"), student)
    exact = value_and_gradients(distance("reference"), student, torch.float64)
    names = ("value", "C", "B", "log_decay", "input_scale", "D")
    if seq == 1:  # a lone token has no decay
        got, exact, names = ([x for i, x in enumerate(part) if i != 3] for part in (got, exact, names))
    assert_close(got, exact, tolerance, names)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("vocab", [5, 4097])
def test_losses(divergence, dtype, tolerance, vocab):
    torch.manual_seed(vocab)
    rows, hidden = 37, 48
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    labels[::5] = -100
    h, th = on_gpu(rows, hidden, dtype=dtype), on_gpu(rows, hidden, dtype=dtype)
    head, teacher_head = (on_gpu(vocab, hidden, dtype=dtype) / 4 for _ in range(2))
    z, t = (on_gpu(rows, vocab, dtype=dtype) for _ in range(2))
    options = {"divergence": divergence, "temperature": 1.7, "ce_weight": 0.5}

    def from_hidden(backend, to):
        teacher = TeacherHidden(th.to(to), teacher_head.to(to))
        return lambda h, head: linear_kd_loss(h, head, teacher, labels, backend=backend, **options)

    def from_logits(backend, to):
        return lambda z: kd_loss(z, t.to(to), labels, backend=backend, **options)

    for make, tensors, names in (
        (from_hidden, (h, head), ("value", "hidden", "head")),
        (from_logits, (z,), ("value", "logits")),
    ):
        got = value_and_gradients(make("triton", dtype), tensors)
        exact = value_and_gradients(make("reference", torch.float64), tensors, torch.float64)
        assert_close(got, exact, tolerance, names)


def test_scan():
    torch.manual_seed(0)
    x, B, C = on_gpu(2, 333, 6, 20), on_gpu(2, 333, 2, 24), on_gpu(2, 333, 2, 24)
    log_decay = -torch.rand(2, 333, 6, device="cuda")
    weights = on_gpu(2, 333, 6, 20)

    def scan(backend):
        return lambda *tensors: (ssd(*tensors, backend=backend) * weights).sum()

    tensors = (x, log_decay, B, C)
    got = value_and_gradients(scan("chunked"), tensors)
    exact = value_and_gradients(scan("reference"), tensors, torch.float64)
    assert_close(got, exact, 2e-5, ("value", "x", "log_decay", "B", "C"))

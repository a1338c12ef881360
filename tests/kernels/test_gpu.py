"""The Triton kernels on a GPU against the definition in float64, at odd shapes. `pytest -m gpu` runs these."""

import dataclasses

import pytest
import torch

from mohawk.kernels.causal_conv1d.interface import causal_conv1d
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference
from mohawk.kernels.delta.interface import gated_delta_rule
from mohawk.kernels.kd.interface import TeacherHidden, kd_loss, linear_kd_loss
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, SSDMixing
from mohawk.kernels.ssd.interface import ssd

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


def attention(seq, width, ids, **options):
    return AttentionMixing(on_gpu(2, 6, seq, width), on_gpu(2, 3, seq, width), segment_ids=ids, **options)


def state_space(seq, state, ids):
    decays = [-torch.rand(2, seq, 6, device="cuda"), torch.rand(2, seq, 6, device="cuda"), on_gpu(6)]
    return SSDMixing(on_gpu(2, seq, 2, state), on_gpu(2, seq, 3, state) / state, *decays, segment_ids=ids)


def delta(seq, width, ids, channels=False):
    q, k = (torch.nn.functional.normalize(on_gpu(2, seq, 6, width), dim=-1) for _ in range(2))
    log_decay = -torch.rand(2, seq, 6, *[width] * channels, device="cuda") / 4
    return DeltaMixing(q, k, torch.rand(2, seq, 6, device="cuda"), log_decay, segment_ids=ids)


def operands_in(mixing, dtype):
    """q and k, or C and B, rounded to dtype."""
    names = ("C", "B") if isinstance(mixing, SSDMixing) else ("q", "k")
    return dataclasses.replace(mixing, **{name: getattr(mixing, name).to(dtype) for name in names})


# Every pair by every kind of metric, documents and padding; the widest; unequal widths that are no power of 2.
DISTANCES = [
    ("ssd, attention", "frobenius", 163, 40, 64, True),
    ("ssd, ssd", "mse", 163, 64, 64, True),
    ("attention, ssd", "squared", 163, 64, 64, True),
    ("attention, attention", "relative", 163, 64, 64, True),
    ("attention, attention", "kl", 163, 64, 64, True),
    ("ssd, attention", "frobenius", 1000, 256, 200, False),
    ("ssd, attention", "frobenius", 1, 5, 128, False),
    ("delta, attention", "frobenius", 163, 40, 64, True),
    ("delta, ssd", "mse", 163, 64, 64, True),
    ("delta, delta by channel", "relative", 163, 64, 64, True),
    ("delta by channel, attention", "squared", 1000, 256, 200, False),
    ("delta, attention", "frobenius", 1, 5, 128, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pair", "metric", "seq", "width", "state", "packed"), DISTANCES)
def test_mixing_distance(dtype, pair, metric, seq, width, state, packed):
    """At most twice the error of the same in torch, whose products are float32 from bfloat16 too."""
    torch.manual_seed(seq)
    ids = None
    if packed:
        ids = (torch.arange(seq) // 50).expand(2, seq).clone()
        ids[-1, -seq // 9 :] = -1
        ids = ids.cuda()
    window = None if metric == "kl" else 100
    kinds = {
        "ssd": lambda: state_space(seq, state, ids),
        "attention": lambda: attention(seq, width, ids, window=window),
        "delta": lambda: delta(seq, width, ids),
        "delta by channel": lambda: delta(seq, width, ids, channels=True),
    }
    student, teacher = (operands_in(kinds[kind](), dtype) for kind in pair.split(", "))
    names = [name for name in vars(student) if torch.is_tensor(getattr(student, name)) and name != "segment_ids"]

    def run(backend, wide=lambda x: x):
        leaves = {name: wide(getattr(student, name)).detach().requires_grad_() for name in names}
        fixed = {k: wide(v) for k, v in vars(teacher).items() if torch.is_tensor(v) and k != "segment_ids"}
        value = mixing_distance(
            dataclasses.replace(student, **leaves),
            dataclasses.replace(teacher, **fixed),
            metric=metric,
            backend=backend,
        )
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    exact, plain = run("reference", torch.Tensor.double), run("chunked")
    for name, truth, torchs, ours in zip(("value", *names), exact, plain, run("triton"), strict=True):
        errors = [((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item() for x in (torchs, ours)]
        if seq == 1 and name == "log_decay":  # a lone token has no decay
            assert not ours.any()
        else:
            # Bfloat16 residuals are rounded once before the gradients' product.
            rounding = 2**-8 if dtype == torch.bfloat16 and name != "value" else 0
            assert errors[1] <= max(2 * errors[0], 2e-6) + rounding, (name, errors)


def test_mixing_distance_beyond_the_limit_of_a_grids_second_axis():
    student = SSDMixing(on_gpu(1100, 5, 1, 16), on_gpu(1100, 5, 1, 16), -torch.rand(1100, 5, 60, device="cuda"))
    teacher = AttentionMixing(on_gpu(1100, 60, 5, 16), on_gpu(1100, 1, 5, 16))
    ours, exact = (mixing_distance(student, teacher, backend=name) for name in ("triton", "reference"))
    assert abs(ours - exact) < 1e-5 * exact


def test_mixing_distance_takes_no_matrix():
    seq = 16384
    student = state_space(seq, 64, None)
    student.C.requires_grad_()
    teacher = attention(seq, 64, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixing_distance(student, teacher).backward()
    # One matrix of each of the 2 x 6 heads would be 12 times this.
    assert torch.cuda.max_memory_allocated() - before < 4 * seq**2


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


SCANS = [
    # seq, heads, head_dim, state, groups of B and C, documents
    (333, 6, 20, 24, (2, 3), True),
    (1000, 8, 64, 64, (8, 8), False),
    (200, 4, 128, 256, (1, 1), True),
    (1, 2, 5, 3, (1, 2), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "chunked", "auto"])
@pytest.mark.parametrize(("seq", "heads", "head_dim", "state", "groups", "packed"), SCANS)
def test_scan(dtype, backend, seq, heads, head_dim, state, groups, packed):
    """At most twice the error of the recurrence in the same dtype."""
    torch.manual_seed(seq)
    x, weights = on_gpu(2, seq, heads, head_dim, dtype=dtype), on_gpu(2, seq, heads, head_dim)
    B, C = (on_gpu(2, seq, count, state, dtype=dtype) for count in groups)
    gates = -torch.rand(2, seq, heads, device="cuda"), torch.rand(2, seq, heads, device="cuda")
    D, initial = on_gpu(heads), on_gpu(2, heads, head_dim, state)
    tensors = (x, gates[0], B, C, gates[1], D, initial)
    ids = (torch.arange(seq, device="cuda") // 70).expand(2, seq) if packed else None

    def scan(backend, wide=False):
        leaves = [(v.double() if wide else v).detach().requires_grad_() for v in tensors]
        x, decay, B, C, scale, D, initial = leaves
        options = {"input_scale": scale, "D": D, "initial_state": initial, "segment_ids": ids}
        y, final = ssd(x, decay, B, C, **options, return_final_state=True, backend=backend)
        total = (y * weights).sum() + final.sum()
        return [y.detach(), final.detach(), *torch.autograd.grad(total, leaves)]

    exact, plain, ours = scan("reference", wide=True), scan("reference"), scan(backend)
    names = ("y", "final", "x", "log_decay", "B", "C", "input_scale", "D", "initial_state")
    for name, truth, reference, value in zip(names, exact, plain, ours, strict=True):
        errors = [((v.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item() for v in (reference, value)]
        # mamba-ssm, where auto takes it, rounds what it multiplies
        limit = 2e-2 if backend == "auto" else max(2 * errors[0], 2e-6)
        assert errors[1] <= limit, (name, errors)


def test_scan_of_a_long_sequence_beyond_32_bits():
    """Places in x from 2^31 on, and states that take no more memory than x for each token."""
    seq, heads, width = 1 << 20, 33, 64
    x = torch.zeros(1, seq, heads, width, dtype=torch.bfloat16, device="cuda")
    x[:, -5:, -1] = 1
    B = torch.ones(1, seq, 1, 16, dtype=torch.bfloat16, device="cuda")
    decay = torch.zeros(1, seq, heads, device="cuda")
    y, state = ssd(x, decay, B, B, return_final_state=True, backend="triton")
    assert y[0, -6:, -1, 0].tolist() == [0, 16, 32, 48, 64, 80]
    assert (state[0, -1] == 5).all() and not state[0, :-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("seq", "channels", "packed"), [(333, 100, True), (1000, 6144, False), (2, 8, False)])
def test_convolution_with_a_state(dtype, seq, channels, packed):
    """With documents too, which no package takes beside a state. Each document alone in float64 is the truth."""
    torch.manual_seed(seq)
    given = [on_gpu(2, seq, channels), on_gpu(channels, 4), on_gpu(channels), on_gpu(2, channels, 3)]
    given = [x.to(dtype) for x in given]
    cuts = [100, 1, 2, 230] if packed else [seq]
    ids = torch.repeat_interleave(torch.arange(len(cuts)), torch.tensor(cuts)).expand(2, seq).cuda() if packed else None
    weights = on_gpu(2, seq, channels)

    def exact(x, weight, bias, state):
        pieces = []
        for piece in x.split(cuts, 1):
            pieces.append(causal_conv1d_reference(piece, weight, bias, state, "silu"))
            state = torch.zeros_like(state)
        return (torch.cat(pieces, 1) * weights).sum()

    def ours(x, weight, bias, state):
        y = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, segment_ids=ids)
        return (y * weights).sum()

    got = value_and_gradients(ours, given)
    truth = value_and_gradients(exact, given, torch.float64)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert_close(got[1:], truth[1:], tolerance, ("x", "weight", "bias", "state"))


@pytest.mark.parametrize("channels", [False, True])
def test_delta_rule(channels):
    torch.manual_seed(0)
    mixing, v, weights = delta(333, 24, None, channels), on_gpu(2, 333, 6, 20), on_gpu(2, 333, 6, 20)

    def rule(backend):
        def run(q, k, v, beta, log_decay):
            return (gated_delta_rule(q, k, v, beta=beta, log_decay=log_decay, backend=backend) * weights).sum()

        return run

    tensors = (mixing.q, mixing.k, v, mixing.beta, mixing.log_decay)
    got = value_and_gradients(rule("chunked"), tensors)
    exact = value_and_gradients(rule("reference"), tensors, torch.float64)
    assert_close(got, exact, 2e-5, ("value", "q", "k", "v", "beta", "log_decay"))

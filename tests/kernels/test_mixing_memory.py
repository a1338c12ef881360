"""Peak memory of the blockwise kernels: linear in the sequence length, and far below the eager version's."""

import inspect

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mohawk.kernels.delta.interface import gated_delta_rule
from mohawk.kernels.mixing.interface import head_mean_distance, mixing_distance, mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, SSDMixing
from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.kernels.ssd.interface import ssd


def peak_bytes(function):
    """The most that torch had allocated at once inside `function`, over what it held before: every allocation
    and release is in the profile, so caches and the C library play no part."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def state_space(seq, heads=1, state=8):
    C, B = (torch.randn(1, seq, heads, state).requires_grad_() for _ in range(2))
    return SSDMixing(C, B, (-torch.rand(1, seq, heads)).requires_grad_())


def delta(seq, heads=1, width=8, channels=False):
    q, k = torch.randn(1, seq, heads, width) / width, torch.randn(1, seq, heads, width)
    log_decay = -torch.rand(1, seq, heads, *[width] * channels) / 10
    given = (q, torch.nn.functional.normalize(k, dim=-1), torch.rand(1, seq, heads), log_decay)
    return DeltaMixing(*(x.requires_grad_() for x in given))


def delta_per_channel(seq, heads=1, width=8):
    return delta(seq, heads, width, channels=True)


def attention(seq, heads=1, width=8):
    return AttentionMixing(torch.randn(1, heads, seq, width), torch.randn(1, heads, seq, width))


def test_the_measurement_sees_temporaries():
    assert peak_bytes(lambda: torch.ones(1024, 1024).sum()) >= 4 * 2**20
    eager = peak_bytes(lambda: mixing_distance(state_space(1024), attention(1024), backend="reference").backward())
    assert eager > 5 * 4 * 1024**2


@pytest.mark.parametrize("make", [state_space, delta, delta_per_channel])
def test_distance_from_512_to_16384_tokens(make):
    peaks = {}
    for seq in (512, 2048, 8192, 16384):
        student, teacher = make(seq), attention(seq)
        peaks[seq] = peak_bytes(lambda s=student, t=teacher: mixing_distance(s, t).backward())
    matrix = 4 * 16384**2
    assert peaks[16384] < matrix / 20
    assert peaks[16384] < 2.1 * peaks[8192] < 2.1 * 4.1 * peaks[2048]
    assert peaks[2048] < 4.1 * peaks[512]


def test_twenty_times_less_than_eager():
    student, teacher = state_space(2048, 8, 64), attention(2048, 8, 64)
    eager = peak_bytes(lambda: mixing_distance(student, teacher, backend="reference").backward())
    mine = peak_bytes(lambda: mixing_distance(student, teacher, backend="chunked").backward())
    assert mine * 20 <= eager
    # Of a delta rule the least that autograd has to keep: the scores and overlaps, the decays, the inverse and the
    # matrix, attention's weights, and as many gradients on the way.
    student = delta(2048, 8, 64)
    mine = peak_bytes(lambda: mixing_distance(student, teacher).backward())
    assert mine * 20 <= 9 * 4 * 8 * 2048**2


@pytest.mark.parametrize("metric", ["mse", "kl"])
def test_means_over_heads(metric):
    """Three heads against four: linear in the length, and a fifth of one head's matrix where eager needs them all."""

    def pair(seq):
        student = attention(seq, 3)
        return AttentionMixing(student.q.requires_grad_(), student.k.requires_grad_()), attention(seq, 4)

    peaks = {}
    for seq in (512, 2048, 8192):
        student, teacher = pair(seq)
        peaks[seq] = peak_bytes(lambda s=student, t=teacher: head_mean_distance(s, t, metric=metric).backward())
    assert peaks[8192] < 4.1 * peaks[2048] < 4.1 * 4.1 * peaks[512]
    assert peaks[8192] < 4 * 8192**2 / 5
    student, teacher = pair(2048)
    eager = peak_bytes(
        lambda: (dense_matrix(student).mean(1) - dense_matrix(teacher).mean(1)).square().mean().backward()
    )
    assert 4 * peaks[2048] < eager


def test_a_matrix_costs_itself_and_some_rows():
    mixing = attention(2048)
    assert peak_bytes(lambda: mixing_matrix(mixing)) < 1.5 * 4 * 2048**2
    many = attention(1024, heads=16)
    assert peak_bytes(lambda: mixing_matrix(many, mean_heads=True)) < 2 * 4 * 1024**2


@pytest.mark.parametrize("make", [attention, state_space, delta])
def test_a_slice_costs_one_head_of_many(make):
    few, many = make(20_000, heads=2), make(20_000, heads=16)
    one = peak_bytes(lambda: mixing_matrix(few, rows=(19_990, 20_000), heads=[1]))
    chunks = 4 << 20 if make is delta else 0  # what some chunks are made of
    assert one < 4 * 20_000 * 60 + chunks, "some rows and the head's operands"
    assert peak_bytes(lambda: mixing_matrix(many, rows=(19_990, 20_000), heads=[11])) < 1.05 * one
    assert peak_bytes(lambda: mixing_matrix(many, rows=(19_990, 20_000), mean_heads=True)) < 2 * one


@pytest.mark.parametrize("heads", [1, 24])
def test_scan(heads):
    def peak(seq):
        x = torch.randn(1, seq, heads, 32).requires_grad_()
        B, C = (torch.randn(1, seq, 1, 32).requires_grad_() for _ in range(2))
        log_decay = (-torch.rand(1, seq, heads)).requires_grad_()
        return peak_bytes(lambda: ssd(x, log_decay, B, C).sum().backward())

    peaks = {seq: peak(seq) for seq in (512, 2048, 8192)}
    assert peaks[8192] < 4.1 * peaks[2048] < 4.1 * 4.1 * peaks[512]


@pytest.mark.parametrize("channels", [False, True])
def test_delta_rule(channels):
    """Linear in the length, at a third of what transformers takes for it."""
    qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    theirs = inspect.unwrap(qwen3_5.torch_chunk_gated_delta_rule)

    def peak(rule, seq, heads=4):
        mixing = delta(seq, heads, 64, channels)
        v = torch.randn(1, seq, heads, 64).requires_grad_()
        return peak_bytes(lambda: rule(mixing, v).sum().backward())

    def ours(mixing, v):
        return gated_delta_rule(mixing.q, mixing.k, v, beta=mixing.beta, log_decay=mixing.log_decay)

    peaks = {seq: peak(ours, seq) for seq in (512, 2048, 8192)}
    assert peaks[8192] < 4.1 * peaks[2048] < 4.1 * 4.1 * peaks[512]
    if not channels:
        other = peak(lambda m, v: theirs(m.q, m.k, v, m.log_decay, m.beta)[0], 2048, 16)
        assert 3 * peak(ours, 2048, 16) < other

"""Mixing matrices written out: against their definition, against the scan, in pieces; and what is refused."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mohawk.kernels.mixing.interface import mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.kernels.ssd.interface import ssd


def attention(seq=150, dtype=torch.float64, **options):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, seq, 8, dtype=dtype), torch.randn(2, 2, seq, 8, dtype=dtype)
    return AttentionMixing(q, k, **options)


def state_space(seq=150, dtype=torch.float64, **options):
    torch.manual_seed(1)
    C, B = torch.randn(2, seq, 3, 5, dtype=dtype), torch.randn(2, seq, 6, 5, dtype=dtype)
    log_decay, scale = -torch.rand(2, seq, 6, dtype=dtype), torch.rand(2, seq, 6, dtype=dtype)
    return SSDMixing(C, B, log_decay, scale, torch.randn(6, dtype=dtype), **options)


def packed(seq=150):
    ids = torch.arange(seq).div(40, rounding_mode="floor").expand(2, seq).clone()
    ids[1, -20:] = -1
    return ids


@pytest.mark.parametrize("seq", [1, 63, 150])
@pytest.mark.parametrize("dense", [mixing_matrix, dense_matrix])
def test_attention_is_what_torch_computes(seq, dense):
    mixing = attention(seq)
    v = torch.randn(2, 6, seq, 4, dtype=torch.float64)
    k = mixing.k.repeat_interleave(3, 1)
    expected = F.scaled_dot_product_attention(mixing.q, k, v, is_causal=True)
    torch.testing.assert_close(dense(mixing) @ v, expected)
    ids = packed(seq)
    allowed = (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1).tril()
    index = torch.arange(seq)
    allowed = allowed & (index.unsqueeze(1) - index < 9)
    expected = F.scaled_dot_product_attention(mixing.q, k, v, attn_mask=allowed, scale=0.3)
    torch.testing.assert_close(dense(attention(seq, scale=0.3, window=9, segment_ids=ids)) @ v, expected)


@pytest.mark.parametrize("seq", [1, 63, 150])
@pytest.mark.parametrize("dense", [mixing_matrix, dense_matrix])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_matrix_times_x_is_the_scan(seq, dense, backend):
    for ids in (None, packed(seq)):
        mixing = state_space(seq, segment_ids=ids)
        x = torch.randn(2, seq, 6, 4, dtype=torch.float64)
        y = ssd(
            x,
            mixing.log_decay,
            mixing.B,
            mixing.C,
            input_scale=mixing.input_scale,
            D=mixing.D,
            segment_ids=ids,
            backend=backend,
        )
        torch.testing.assert_close((dense(mixing) @ x.transpose(1, 2)).transpose(1, 2), y)


@pytest.mark.parametrize("make", [attention, state_space])
def test_rows_heads_and_their_mean(make):
    mixing = make(segment_ids=packed())
    whole = mixing_matrix(mixing)
    assert whole.shape == (2, 6, 150, 150)
    torch.testing.assert_close(whole, dense_matrix(mixing))
    torch.testing.assert_close(mixing_matrix(mixing, rows=(70, 141)), whole[:, :, 70:141])
    torch.testing.assert_close(mixing_matrix(mixing, heads=[4, 1]), whole[:, [4, 1]])
    torch.testing.assert_close(mixing_matrix(mixing, mean_heads=True), whole.mean(1))
    mean = mixing_matrix(mixing, rows=(3, 4), heads=[0, 5], mean_heads=True)
    torch.testing.assert_close(mean, whole[:, [0, 5], 3:4].mean(1))
    assert mixing_matrix(mixing, rows=(9, 9)).shape == (2, 6, 0, 150)


@pytest.mark.parametrize("rows", [(0, 1), (5, 9), (63, 65), (70, 141), (149, 150)])
@pytest.mark.parametrize("window", [None, 1, 9, 80])
def test_rows_of_a_window(rows, window):
    for ids in (None, packed()):
        mixing = attention(window=window, segment_ids=ids)
        expected = dense_matrix(mixing)[:, [5, 0], rows[0] : rows[1]]
        torch.testing.assert_close(mixing_matrix(mixing, rows=rows, heads=[5, 0]), expected)


def test_low_precision_inputs_give_float32():
    mixing = attention(40, torch.bfloat16)
    assert mixing_matrix(mixing).dtype == torch.float32
    rows = mixing_matrix(mixing).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_a_slice_of_a_long_context_stays_small():
    """Rows near the end of 200,000 tokens: the whole matrix would be 160 GB."""
    q = torch.randn(1, 1, 200_000, 4)
    matrix = mixing_matrix(AttentionMixing(q, q), rows=(199_990, 200_000))
    assert matrix.shape == (1, 1, 10, 200_000)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 1, 10))


def test_a_slice_of_a_long_scan_is_the_scan():
    torch.manual_seed(2)
    seq, heads = 100_000, 3
    C, B = torch.randn(1, seq, 1, 4, dtype=torch.float64), torch.randn(1, seq, heads, 4, dtype=torch.float64)
    log_decay, scale = -1e-4 * torch.rand(1, seq, heads, dtype=torch.float64), torch.rand(1, seq, heads).double()
    x = torch.randn(1, seq, heads, 1, dtype=torch.float64)
    y = ssd(x, log_decay, B, C, input_scale=scale)
    for rows in ((0, 3), (50_001, 50_003), (99_990, 100_000)):
        matrix = mixing_matrix(SSDMixing(C, B, log_decay, scale), rows=rows, heads=[2])
        mixed = torch.einsum("bhij,bjhp->bihp", matrix, x[:, :, 2:])
        torch.testing.assert_close(mixed, y[:, rows[0] : rows[1], 2:])


def test_the_kernels_need_torch_alone():
    code = """
import sys
import mohawk.kernels.causal_conv1d, mohawk.kernels.mixing.interface, mohawk.kernels.ssd.interface
print([name for name in ("transformers", "triton", "mamba_ssm", "causal_conv1d") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


q = torch.zeros(1, 4, 10, 8)
C = torch.zeros(1, 10, 2, 8)
decay = torch.zeros(1, 10, 4)
ids = torch.zeros(1, 10, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionMixing(q[0], q[0]), "batch, heads, seq, head_dim"),
        (lambda: AttentionMixing(q, q[:, :, :9]), "agree in batch, seq and head_dim"),
        (lambda: AttentionMixing(q, q[:, :3]), "3 kv heads must divide 4 heads"),
        (lambda: AttentionMixing(q, q, window=0), "window must be None or a whole number from 1 up"),
        (lambda: AttentionMixing(q, q, window=2.5), "window must be None or a whole number from 1 up"),
        (lambda: AttentionMixing(q[..., :0], q[..., :0]), "head_dim is 0"),
        (lambda: mixing_matrix(q), "takes an AttentionMixing, an SSDMixing or a DeltaMixing"),
        (lambda: mixing_matrix(SSDMixing(C, C, decay), rows=slice(0, 3)), "rows must be"),
        (lambda: mixing_matrix(SSDMixing(C, C, decay), heads=1), "heads must be a list"),
        (lambda: AttentionMixing(q.long(), q), "floating point"),
        (lambda: AttentionMixing(q, q, segment_ids=ids[:, 1:]), "segment_ids must be"),
        (lambda: AttentionMixing(q, q, segment_ids=ids.float()), "must be integers"),
        (lambda: SSDMixing(C, C, decay[0]), "log_decay must be"),
        (lambda: SSDMixing(C[:, 1:], C, decay), "C must be"),
        (lambda: SSDMixing(C, torch.zeros(1, 10, 3, 8), decay), "3 groups of B must divide the 4 heads"),
        (lambda: SSDMixing(C, C[..., 1:], decay), "one state_size"),
        (lambda: SSDMixing(C, C, decay, decay[:, 1:]), "input_scale must be"),
        (lambda: SSDMixing(C, C, decay, None, torch.zeros(3)), "D must be"),
        (lambda: SSDMixing(C, C, decay, segment_ids=ids[0]), "segment_ids must be"),
        (lambda: mixing_matrix(SSDMixing(C, C, decay), rows=(5, 11)), "rows must be"),
        (lambda: mixing_matrix(SSDMixing(C, C, decay), heads=[4]), "between 0 and 3"),
        (lambda: mixing_matrix(SSDMixing(C, C, decay), heads=[], mean_heads=True), "at least one head"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

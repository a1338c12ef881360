"""Gradients made by hand: a second derivative raises, whichever way it is asked for."""

import pytest
import torch

from mohawk.kernels.causal_conv1d import causal_conv1d
from mohawk.kernels.delta.interface import gated_delta_rule
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, SSDMixing
from mohawk.kernels.ssd.interface import ssd


def conv(x):
    return causal_conv1d(x, torch.randn(3, 4), activation="silu")


def scan(x):
    return ssd(x[..., None], -torch.rand(2, 9, 3), torch.randn(2, 9, 1, 4), torch.randn(2, 9, 1, 4))


def distance(x):
    student = SSDMixing(torch.randn(2, 9, 1, 4), torch.randn(2, 9, 1, 4), -x.exp())
    return mixing_distance(student, AttentionMixing(torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)))


def delta_rule(x):
    q, k = torch.randn(2, 2, 9, 3, 4)
    return gated_delta_rule(q, k, x[..., None], beta=torch.rand(2, 9, 3), log_decay=-torch.rand(2, 9, 3))


def delta_distance(x):
    q, k = torch.randn(2, 2, 9, 3, 4)
    teacher = AttentionMixing(torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4))
    return mixing_distance(DeltaMixing(q, k, x.sigmoid(), -torch.rand(2, 9, 3)), teacher)


@pytest.mark.parametrize("operation", (conv, scan, distance, delta_rule, delta_distance))
def test_second_derivatives(operation):
    x = torch.randn(2, 9, 3, requires_grad=True)
    for by_name in (True, False):
        value = operation(x).square().sum()
        (plain,) = torch.autograd.grad(value, x, retain_graph=True)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        torch.testing.assert_close(grad, plain)
        penalty = grad.square().sum() + value.detach()
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(penalty, x) if by_name else penalty.backward()


def test_reference_of_the_scan_is_exact_under_autocast():
    torch.manual_seed(0)
    given = torch.randn(1, 20, 2, 4), -torch.rand(1, 20, 2), torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssd(*given, backend="reference")
    torch.testing.assert_close(inside, ssd(*given, backend="reference"), rtol=0, atol=0)

"""What tests of mixing distances do with the sides that they compare."""

import dataclasses

import torch

from mohawk.kernels.mixing.interface import mixing_distance


def cast(mixing, dtype):
    """Its tensors in another dtype, with gradients of their own."""
    changed = {
        name: value.detach().to(dtype).requires_grad_()
        for name, value in vars(mixing).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(mixing, **changed)


def documents(batch, seq, length=40, padding=0):
    """(batch, seq) segment ids: the first row is one document, the last ends in padding."""
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(batch, seq).clone()
    ids[0] = 0
    if padding:
        ids[-1, -padding:] = -1
    return ids


def run(student, teacher, **options):
    """The value and the gradients of everything the student is made of."""
    value = mixing_distance(student, teacher, **options)
    weights = torch.linspace(0.5, 2, max(1, value.numel()), dtype=value.dtype).view(value.shape)
    tensors = [tensor for tensor in student.tensors if tensor is not None]
    return [value, *torch.autograd.grad((value * weights).sum(), tensors)]

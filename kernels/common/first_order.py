"""Gradients made by hand exist once: a second derivative raises, however it is asked for.

torch's `once_differentiable` raises where a whole graph is walked, but a second derivative by name
(`autograd.grad(..., inputs)`, `functional.hvp`) visits only what lies between and comes out as zero: its error hangs
on nothing. Here it hangs on the inputs that the gradient was made from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class _Anchor(torch.autograd.Function):
    """Nothing of a tensor but its place in the graph."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, *_):
        return None


def anchors(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """One empty tensor for each that needs a gradient: what stands for it in the graph without its memory."""
    wanted = (x for x in tensors if x is not None and x.requires_grad)
    return [_Anchor.apply(x) for x in wanted] if torch.is_grad_enabled() else []


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def first_order(message: str) -> Callable:
    """Decorates the backward of an autograd function: its gradients lead back to `ctx.anchors`, or if there are none
    to the saved tensors, and to a RuntimeError with this message there."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if not torch.is_grad_enabled():  # no create_graph
                return grads
            sources = getattr(ctx, "anchors", None) or [x for x in ctx.saved_tensors if x is not None]
            return tuple(_Refused.apply(message, g, *sources) if isinstance(g, Tensor) else g for g in grads)

        return once

    return decorate

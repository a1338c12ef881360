"""Kernels under torch.compile: each call is one opaque operator, so that a compiled model around it stays one graph.

The operator calls the function in eager mode, checks and choice of backend included, and its gradient calls it once
more for the function's own gradient: as with activation checkpointing nothing is kept between the two. Its arguments
can only be tensors and plain values, so a function takes a list of tensors, some of them None, words and numbers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# By this module's name: a student's folder has a copy of the code, which may be loaded beside the package.
NAMESPACE = re.sub(r"\W", "_", __name__)
# What torch excludes in the body of an operator, so that no operation there is recorded, under enable_grad neither.
_AUTOGRAD = [
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
]


class _Kernel(NamedTuple):
    function: Callable[[list[Tensor | None], str, list[float]], list[Tensor]]
    shapes: Callable[[list[Tensor | None], str], list[Tensor]]


_KERNELS: dict[str, _Kernel] = {}


def register_kernel(name: str, function: Callable, shapes: Callable) -> None:
    """function(tensors, words, numbers): what it returns, a list, differentiable. shapes(tensors, words): the same as
    empty tensors."""
    _KERNELS[name] = _Kernel(function, shapes)


def call_operator(
    name: str,
    tensors: Sequence[Tensor | None],
    words: str = "",
    numbers: Sequence[float] = (),
    *,
    reads_values: bool = False,
) -> list[Tensor]:
    """The function of that name as one operator. reads_values: it waits for a GPU to look at values, as nothing in a
    CUDA graph can."""
    there = "".join("1" if x is not None else "0" for x in tensors)
    operator = _reading if reads_values else _plain
    # An empty list would be taken for one of tensors.
    return operator([x for x in tensors if x is not None], there, name, words, list(numbers) or [0.0])


def _spread(tensors: Sequence[Tensor], there: str) -> list[Tensor | None]:
    given = iter(tensors)
    return [next(given) if one == "1" else None for one in there]


def _own(out: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Contiguous, in memory of its own, as an operator has to return it."""
    memory = {x.untyped_storage().data_ptr() for x in tensors}
    if out.untyped_storage().data_ptr() in memory:
        return out.clone(memory_format=torch.contiguous_format)
    return out.contiguous()


def _forward(tensors: list[Tensor], there: str, name: str, words: str, numbers: list[float]) -> list[Tensor]:
    with torch.no_grad():
        outputs = _KERNELS[name].function(_spread(tensors, there), words, numbers)
    return [_own(out, tensors) for out in outputs]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """As outside of any operator: what is done to a tensor that requires grad is recorded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _gradients(
    tensors: list[Tensor],
    upstream: list[Tensor],
    there: str,
    name: str,
    words: str,
    numbers: list[float],
    needs: list[bool],
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    with _recording():
        if not wanted[0].new_empty(0).requires_grad_().neg().requires_grad:
            # Never zeros for what was not recorded.
            raise RuntimeError(
                f"{name}: torch {torch.__version__} records nothing within an operator, so there is no gradient under "
                "torch.compile; call it outside"
            )
        outputs = _KERNELS[name].function(_spread(leaves, there), words, numbers)
        # An output may depend on none of these inputs, as a final state on none but those of the state.
        pairs = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
        if not pairs:
            raise RuntimeError(f"{name}: no output depends on an input that requires grad; detach the input")
        outs, grads = [list(x) for x in zip(*pairs, strict=True)]
        # Within, as a function's own backward may record too.
        made = torch.autograd.grad(outs, wanted, grads, allow_unused=True, materialize_grads=True)
    return [_own(x, [*tensors, *upstream]) for x in made]


def _make(suffix: str, tags: tuple[torch.Tag, ...]) -> Callable[..., list[Tensor]]:
    name = f"{NAMESPACE}::kernel{suffix}"
    forward = torch.library.custom_op(name, _forward, mutates_args=(), tags=tags)
    backward = torch.library.custom_op(f"{name}_gradients", _gradients, mutates_args=(), tags=tags)

    @forward.register_fake
    def _(tensors, there, name, words, numbers):
        return _KERNELS[name].shapes(_spread(tensors, there), words)

    @backward.register_fake
    def _(tensors, upstream, there, name, words, numbers, needs):
        return [x.new_empty(x.shape) for x, need in zip(tensors, needs, strict=True) if need]

    def setup_context(ctx, inputs, output):
        tensors, *ctx.plain = inputs
        ctx.save_for_backward(*tensors)

    def gradient(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError(f"{ctx.plain[1]} has no second derivative under torch.compile; call it outside")
        needs = [bool(x) for x in ctx.needs_input_grad[0]]
        made = iter(backward(list(ctx.saved_tensors), list(upstream), *ctx.plain, needs))
        return [next(made) if need else None for need in needs], None, None, None, None

    forward.register_autograd(gradient, setup_context=setup_context)
    return forward


_plain = _make("", ())
_reading = _make("_reading_values", (torch.Tag.cudagraph_unsafe,))

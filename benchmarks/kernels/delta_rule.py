"""The gated delta rule beside the torch path of transformers' Qwen3.5 mixer: forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Step
from benchmarks.own import Own
from mohawk.kernels.delta.chunked import CHUNK, CHUNKS
from mohawk.kernels.delta.interface import gated_delta_rule

SHAPE = (2, 2048, 16, 64)  # batch, seq, heads, key_dim = value_dim
QUICK = (1, 300, 2, 16)
CHECK_SEQ = 150  # the reference goes token by token
TRANSFORMERS = "transformers, Qwen3.5 in torch"
FORMULA = (
    "Floor: one product of b n x h d and h d x (19 Q + 10 d), 2 b n h d (19 Q + 10 d) flops, Q = {} the chunk: "
    "the rule's own 8 products forward and 21 backward, each with the chunk or the state."
)
# (q, k, v, beta, log_decay) -> y
Rule = Callable[..., Tensor]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v (b, n, h, d), beta, log_decay (b, n, h) in float32; and dy like v."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (torch.randn(*shape, generator=g, device=device) for _ in range(4))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta = torch.rand(*shape[:3], generator=g, device=device)
    log_decay = -torch.rand(*shape[:3], generator=g, device=device) * 0.1
    return [*(x.to(dtype) for x in (q * shape[3] ** -0.5, k, v)), beta, log_decay], dy.to(dtype)


def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, backend: str = "auto") -> Tensor:
    return gated_delta_rule(q, k, v, beta=beta, log_decay=log_decay, backend=backend)


def reference(*given: Tensor) -> Tensor:
    return ours(*given, backend="reference")


def transformers_torch() -> Rule:
    """What transformers runs where no kernel package is installed, whether or not one is. It scales q by itself."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    rule = inspect.unwrap(torch_chunk_gated_delta_rule)
    return lambda q, k, v, beta, log_decay: rule(q * q.shape[-1] ** 0.5, k, v, log_decay, beta)[0]


def flash_linear_attention() -> Rule:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, beta, log_decay: chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=1.0)[0]


def output_and_gradients(rule: Rule, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    inputs = [x.requires_grad_() for x in given]
    y = rule(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def make(rule: Rule, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    """(check, step): the largest relative error of y and the five gradients on CHECK_SEQ tokens
    and, if it is to be whole, of y at the size that is timed."""

    given, dy = problem(shape, dtype, device)

    def check(whole: bool) -> float:
        small, small_dy = problem((shape[0], CHECK_SEQ, *shape[2:]), dtype, device)
        got = output_and_gradients(rule, small, small_dy)
        exact = output_and_gradients(reference, [x.detach().double() for x in small], small_dy.double())
        if whole:
            with torch.no_grad():
                got.append(rule(*given))
                exact.append(reference(*(x.detach().double() for x in given)))
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    inputs = [x.requires_grad_() for x in given]
    return check, Step(lambda: rule(*inputs), lambda y: torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def columns(width: int, device: str) -> int:
    return 19 * CHUNKS.get(device, CHUNK) + 10 * width


def make_floor(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    batch, seq, heads, width = shape
    left = torch.randn(batch * seq, heads * width, device=device).to(dtype)
    right = torch.randn(heads * width, columns(width, device), device=device).to(dtype)
    return (lambda whole: 0.0), lambda: left @ right


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = []
    shape = QUICK if quick else SHAPE
    batch, seq, heads, width = shape
    for dtype in (torch.float32, torch.bfloat16):
        table = f"{str(dtype)[6:]}, batch {batch}, n {seq}, {heads} heads of {width}"
        floor = "floor: one product"
        options = {
            "floor": floor,
            "formula": FORMULA.format(CHUNKS.get(device, CHUNK)),
            "tolerance": 1e-3 if dtype == torch.float32 else 0.1,
        }
        options["flops"] = 2.0 * batch * seq * heads * width * columns(width, device)
        found.append(Case(table, floor, lambda dtype=dtype: make_floor(shape, dtype, device), **options))

        def build(dtype=dtype):
            return make(ours, shape, dtype, device)

        def build_other(dtype=dtype):
            return make(transformers_torch(), shape, dtype, device)

        found.append(Case(table, "mohawk", build, against=TRANSFORMERS, **options))
        for name, kind, function in own:
            if kind == "gated_delta_rule":

                def build_own(function=function, dtype=dtype):
                    return make(function, shape, dtype, device)

                found.append(Case(table, name, build_own, **options))
        found.append(Case(table, TRANSFORMERS, build_other, "transformers", **options))
        if device == "cuda":

            def build_fla(dtype=dtype):
                return make(flash_linear_attention(), shape, dtype, device)

            found.append(Case(table, "flash-linear-attention", build_fla, "fla", **options))
    return found

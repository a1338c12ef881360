"""The state-space scan beside the torch path of transformers' Bamba mixer and mamba-ssm: forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Step
from benchmarks.own import Own
from mohawk.kernels.ssd.chunked import CHUNK
from mohawk.kernels.ssd.interface import ssd

SHAPE = (2, 2048, 24, 64)  # batch, seq, heads, head_dim = state_size; one group
QUICK = (1, 300, 4, 16)
CHECK_SEQ = 150  # the reference goes token by token
TRANSFORMERS = "transformers, Bamba in torch"
FORMULA = (
    f"Floor: one product of b n x h N and h N x (6 Q + 9 N), 2 b n h N (6 Q + 9 N) flops, Q = {CHUNK} the chunk: the "
    "scan's own 4 products forward and 11 backward, each with the chunk or the state."
)
# (x, dt, A, B, C, D) -> y
Scan = Callable[..., Tensor]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """x (b, n, h, N), dt (b, n, h), A (h,), B and C (b, n, 1, N), D (h,); and dy like x."""
    batch, seq, heads, width = shape
    g = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(*shape, generator=g, device=device).to(dtype) for _ in range(2))
    B, C = (torch.randn(batch, seq, 1, width, generator=g, device=device).to(dtype) for _ in range(2))
    dt = torch.rand(batch, seq, heads, generator=g, device=device)
    A, D = -torch.rand(heads, generator=g, device=device), torch.rand(heads, generator=g, device=device)
    return [x, dt, A, B, C, D], dy


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, backend: str = "auto") -> Tensor:
    return ssd(x, dt * A, B, C, input_scale=dt, D=D, backend=backend)


def ours_chunked(*given: Tensor) -> Tensor:
    return ours(*given, backend="chunked")


def reference(*given: Tensor) -> Tensor:
    return ours(*given, backend="reference")


def transformers_torch() -> Scan:
    """What transformers runs where no kernel package is installed, whether or not one is."""
    from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan

    scan = inspect.unwrap(mamba2_chunk_scan)
    return lambda x, dt, A, B, C, D: scan(x, dt, A, B, C, chunk_size=256, D=D)


def mamba_ssm() -> Scan:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D)


def output_and_gradients(scan: Scan, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    inputs = [x.requires_grad_() for x in given]
    y = scan(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def make(scan: Scan, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    """(check, step): the largest relative error of y and the six gradients on CHECK_SEQ tokens
    and, if it is to be whole, of y at the size that is timed."""

    given, dy = problem(shape, dtype, device)

    def check(whole: bool) -> float:
        small, small_dy = problem((shape[0], CHECK_SEQ, *shape[2:]), dtype, device)
        got = output_and_gradients(scan, small, small_dy)
        exact = output_and_gradients(reference, [x.detach().double() for x in small], small_dy.double())
        if whole:
            with torch.no_grad():
                got.append(scan(*given))
                exact.append(reference(*(x.detach().double() for x in given)))
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    inputs = [x.requires_grad_() for x in given]
    return check, Step(lambda: scan(*inputs), lambda y: torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def make_floor(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    batch, seq, heads, width = shape
    left = torch.randn(batch * seq, heads * width, device=device).to(dtype)
    right = torch.randn(heads * width, 6 * CHUNK + 9 * width, device=device).to(dtype)
    return (lambda whole: 0.0), lambda: left @ right


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = []
    shape = QUICK if quick else SHAPE
    batch, seq, heads, width = shape
    others = {TRANSFORMERS: (transformers_torch, "transformers")}
    if device == "cuda":
        compiled = (lambda: torch.compile(transformers_torch(), dynamic=False), "transformers")
        others |= {"the same by torch.compile": compiled, "mamba-ssm": (mamba_ssm, "mamba_ssm")}
    mine = {"mohawk": ours} if device == "cpu" else {"mohawk": ours, "mohawk, in torch": ours_chunked}
    mine |= {name: function for name, kind, function in own if kind == "ssd"}
    for dtype in (torch.float32, torch.bfloat16):
        table = f"{str(dtype)[6:]}, batch {batch}, n {seq}, {heads} heads of {width}, state {width}"
        floor = "floor: one product"
        options = {"floor": floor, "formula": FORMULA, "tolerance": 1e-3 if dtype == torch.float32 else 0.1}
        options["flops"] = 2.0 * batch * seq * heads * width * (6 * CHUNK + 9 * width)
        found.append(Case(table, floor, lambda dtype=dtype: make_floor(shape, dtype, device), **options))
        for name, scan in mine.items():

            def build(scan=scan, dtype=dtype):
                return make(scan, shape, dtype, device)

            found.append(Case(table, name, build, against=TRANSFORMERS, **options))
        for name, (load, package) in others.items():

            def build_other(load=load, dtype=dtype):
                return make(load(), shape, dtype, device)

            found.append(Case(table, name, build_other, package, **options))
    return found

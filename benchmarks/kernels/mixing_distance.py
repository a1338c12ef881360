"""Attention against SSD without matrices, beside the eager version, over sequence lengths: value and gradients.

Eager builds both matrices, takes `torch.linalg.matrix_norm` of their difference and lets autograd do the rest,
as the method's authors do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Step
from benchmarks.own import Own
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing

HEADS = {"cpu": 8, "cuda": 32}
SEQS = {"cpu": (128, 256, 512, 1024, 2048, 4096, 8192, 16384), "cuda": (4096,)}
QUICK_SEQS = (128, 500)
WIDTHS = {"cpu": (64,), "cuda": (64, 128)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
EAGER_UP_TO = {"cpu": 4096, "cuda": 4096}  # its matrices of the next length take 17 GB
CHECK_UP_TO = 500  # the float64 reference builds whole matrices
ROWS = 256  # of the matrices that a whole check holds at a time
FORMULA = (
    "Floor: one product of n x 2 h N and 2 h N x n, 4 h N n² flops: what q kᵀ, C Bᵀ, dC and dB take on the lower "
    "triangle when each tile is made once. Inputs are in the dtype of the table, log decays and scales in float32."
)
# (q, k, C, B, log_decay, input_scale, D) -> the mean Frobenius distance
Distance = Callable[..., Tensor]


def problem(seq: int, heads: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k (1, heads, seq, width), C, B (1, seq, heads, width), log_decay, input_scale (1, seq, heads), D (heads,)."""
    g = torch.Generator(device).manual_seed(seq)
    q, k = (torch.randn(1, heads, seq, width, generator=g, device=device) for _ in range(2))
    C = torch.randn(1, seq, heads, width, generator=g, device=device)
    B = torch.randn(1, seq, heads, width, generator=g, device=device) / width
    log_decay = -torch.rand(1, seq, heads, generator=g, device=device) * 0.1
    scale = torch.rand(1, seq, heads, generator=g, device=device)
    return *(x.to(dtype) for x in (q, k, C, B)), log_decay, scale, torch.ones(heads, device=device)


def ours(q: Tensor, k: Tensor, *student: Tensor) -> Tensor:
    return mixing_distance(SSDMixing(*student), AttentionMixing(q, k))


def reference(q: Tensor, k: Tensor, *student: Tensor) -> Tensor:
    return mixing_distance(SSDMixing(*student), AttentionMixing(q, k), backend="reference")


def eager(q: Tensor, k: Tensor, C: Tensor, B: Tensor, log_decay: Tensor, input_scale: Tensor, D: Tensor) -> Tensor:
    seq = q.shape[2]
    hidden = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    attention = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    sums = log_decay.cumsum(1).transpose(1, 2)
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(hidden, float("-inf")).exp()
    ssd = C.transpose(1, 2) @ B.permute(0, 2, 3, 1) * decay * input_scale.transpose(1, 2).unsqueeze(-2)
    ssd = ssd + torch.diag_embed(D.unsqueeze(-1).expand(-1, seq))
    return torch.linalg.matrix_norm(ssd - attention).mean()


def value_and_gradients(distance: Distance, given: tuple[Tensor, ...]) -> list[Tensor]:
    student = [x.requires_grad_() for x in given[2:]]
    value = distance(*given[:2], *student)
    return [value.detach(), *torch.autograd.grad(value, student)]


def step(distance: Distance, given: tuple[Tensor, ...]) -> Step:
    student = [x.requires_grad_() for x in given[2:]]
    return Step(lambda: distance(*given[:2], *student), lambda value: torch.autograd.grad(value, student))


def strip(given: tuple[Tensor, ...], start: int) -> Tensor:
    """SSD - attention, of ROWS rows or those that are left."""
    q, k, C, B, log_decay, input_scale, D = given
    seq, sums = q.shape[2], log_decay.cumsum(1).transpose(1, 2)
    rows = slice(start, min(start + ROWS, seq))
    hidden = torch.arange(seq, device=q.device) > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    scores = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    attention = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    decay = (sums[:, :, rows, None] - sums[:, :, None, :]).masked_fill(hidden, float("-inf")).exp()
    ssd = C.transpose(1, 2)[:, :, rows] @ B.permute(0, 2, 3, 1) * decay * input_scale.transpose(1, 2)[:, :, None]
    own = D[:, None].expand(-1, ssd.shape[2])[None]
    return ssd + torch.zeros_like(ssd).diagonal_scatter(own, rows.start, -2, -1) - attention


def value_and_gradients_by_rows(given: tuple[Tensor, ...]) -> list[Tensor]:
    """The same by its definition, in float64, at any length."""
    given = tuple(x.detach().double() for x in given)
    student, starts = [x.requires_grad_() for x in given[2:]], range(0, given[0].shape[2], ROWS)
    with torch.no_grad():
        norms = sum(strip(given, start).square().sum((-2, -1)) for start in starts).sqrt()
    gradients = [torch.zeros_like(x) for x in student]
    for start in starts:  # each with a graph of its own
        part = (strip(given, start).square().sum((-2, -1)) / (2 * norms)).mean()
        for total, found in zip(gradients, torch.autograd.grad(part, student), strict=True):
            total += found
    return [norms.mean(), *gradients]


def make(distance: Distance, seq: int, heads: int, width: int, dtype: torch.dtype, device: str):
    """(check, step): the largest relative error of the value and the five gradients, at most CHECK_UP_TO tokens long
    or, if it is to be whole, of the size that is timed."""
    given = problem(seq, heads, width, dtype, device)

    def check(whole: bool) -> float:
        small = problem(min(seq, CHECK_UP_TO), heads, width, dtype, device)
        got = value_and_gradients(distance, small)
        exact = value_and_gradients(reference, tuple(x.detach().double() for x in small))
        if whole:
            got += value_and_gradients(distance, given)
            exact += value_and_gradients_by_rows(given)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    return check, step(distance, given)


def make_floor(seq: int, inner: int, dtype: torch.dtype, device: str):
    """One product of seq x inner and inner x seq."""
    rows = seq if device == "cuda" else min(seq, 1024)  # of the result at a time: the same speed, less memory
    left = torch.randn(seq, inner, device=device).to(dtype)
    right = torch.randn(inner, seq, device=device).to(dtype)

    def work() -> None:
        out = torch.empty(rows, seq, dtype=dtype, device=device)
        for start in range(0, seq, rows):
            torch.mm(left[start : start + rows], right, out=out[: len(left[start : start + rows])])

    return (lambda whole: 0.0), work


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = []
    heads, dtype = HEADS[device], DTYPES[device]
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    others = {"eager": lambda: eager}
    if device == "cuda":
        others["torch.compile"] = lambda: torch.compile(eager, dynamic=False)
    mine = {name.split(",")[0]: function for name, kind, function in own if kind == "ssd_distance"}
    for width in WIDTHS[device]:
        table = f"batch 1, {heads} heads, d = N = {width}, {str(dtype)[6:]}"
        for seq in QUICK_SEQS if quick else SEQS[device]:
            shape = (seq, heads, width, dtype, device)
            floor, beside = f"floor: one product, n {seq}", f"eager, n {seq}"
            flops = 4.0 * heads * width * seq * seq
            options = {"floor": floor, "formula": FORMULA, "tolerance": tolerance, "at": seq, "flops": flops}
            against = beside if seq <= EAGER_UP_TO[device] else None

            def build(shape=shape):
                return make(ours, *shape)

            found.append(Case(table, floor, lambda s=shape: make_floor(s[0], 2 * s[1] * s[2], *s[3:]), **options))
            found.append(Case(table, f"mohawk, n {seq}", build, against=against, **options))
            for name, function in mine.items():

                def build_own(function=function, shape=shape):
                    return make(function, *shape)

                found.append(Case(table, f"{name}, n {seq}", build_own, **options))
            for name, other in others.items() if against else ():

                def build_other(other=other, shape=shape):
                    return make(other(), *shape)

                found.append(Case(table, f"{name}, n {seq}", build_other, **options))
    return found

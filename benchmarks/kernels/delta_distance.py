"""Attention against a gated delta rule without matrices, beside the eager version, over sequence lengths: value and
gradients.

Eager builds both matrices, the delta rule's by its closed form, takes `torch.linalg.matrix_norm` of their difference
and lets autograd do the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.kernels.mixing_distance import make_floor, step, value_and_gradients
from benchmarks.own import Own
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing

HEADS = {"cpu": 8, "cuda": 32}
SEQS = {"cpu": (128, 256, 512, 1024, 2048, 4096, 8192, 16384), "cuda": (4096,)}
QUICK_SEQS = (128, 300)
WIDTH = 64
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
EAGER_UP_TO = {"cpu": 2048, "cuda": 4096}  # what it does grows with the cube of n
CHECK_UP_TO = 300  # the float64 reference goes token by token
WHOLE_UP_TO = 2048  # the closed form in float64 builds whole matrices
FORMULA = (
    "Floor: one product of n x 3.5 h d and 3.5 h d x n, 7 h d n² flops: what q kᵀ of the teacher and six products of "
    "the walks take on the lower triangle when each tile is made once. Inputs are in the dtype of the table, log "
    "decays and beta in float32."
)
# (q, k of the teacher, q, k, beta, log_decay) -> the mean Frobenius distance
Distance = Callable[..., Tensor]


def problem(seq: int, heads: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The teacher's q, k (1, heads, seq, d), the student's q, k (1, seq, heads, d), beta, log_decay (1, seq, heads)."""
    g = torch.Generator(device).manual_seed(seq)
    theirs = [torch.randn(1, heads, seq, WIDTH, generator=g, device=device) for _ in range(2)]
    q, k = (torch.randn(1, seq, heads, WIDTH, generator=g, device=device) for _ in range(2))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta = torch.rand(1, seq, heads, generator=g, device=device)
    # weak enough that at the lengths at which eager runs no entry is a denormal number, which would slow it further
    log_decay = -torch.rand(1, seq, heads, generator=g, device=device) * 0.02
    return *(x.to(dtype) for x in (*theirs, q, k)), beta, log_decay


def ours(q: Tensor, k: Tensor, *student: Tensor) -> Tensor:
    return mixing_distance(DeltaMixing(*student), AttentionMixing(q, k))


def reference(q: Tensor, k: Tensor, *student: Tensor) -> Tensor:
    return mixing_distance(DeltaMixing(*student), AttentionMixing(q, k), backend="reference")


def eager(teacher_q: Tensor, teacher_k: Tensor, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    seq = q.shape[1]
    hidden = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = teacher_q @ teacher_k.transpose(-1, -2) * teacher_q.shape[-1] ** -0.5
    attention = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    q, k, beta = q.transpose(1, 2), k.transpose(1, 2), beta.transpose(1, 2).to(q.dtype)
    sums = log_decay.cumsum(1).transpose(1, 2)
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(hidden, float("-inf")).exp().to(q.dtype)
    lower = beta.unsqueeze(-1) * (k @ k.transpose(-1, -2)) * decay
    wide = torch.promote_types(q.dtype, torch.float32)
    inverse = torch.linalg.solve_triangular(
        lower.to(wide), torch.diag_embed(beta.to(wide)), upper=False, unitriangular=True
    )
    delta = (q @ k.transpose(-1, -2) * decay) @ inverse.to(q.dtype)
    return torch.linalg.matrix_norm((delta - attention).to(wide)).mean()


def make(distance: Distance, seq: int, heads: int, dtype: torch.dtype, device: str):
    """(check, step): the largest relative error of the value and the four gradients, at most CHECK_UP_TO tokens long
    or, if it is to be whole, WHOLE_UP_TO."""
    given = problem(seq, heads, dtype, device)

    def check(whole: bool) -> float:
        small = problem(min(seq, CHECK_UP_TO), heads, dtype, device)
        got = value_and_gradients(distance, small)
        exact = value_and_gradients(reference, tuple(x.detach().double() for x in small))
        if whole:
            large = problem(min(seq, WHOLE_UP_TO), heads, dtype, device)
            got += value_and_gradients(distance, large)
            exact += value_and_gradients(eager, tuple(x.detach().double() for x in large))
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    return check, step(distance, given)


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = []
    heads, dtype = HEADS[device], DTYPES[device]
    table = f"batch 1, {heads} heads, d = {WIDTH}, {str(dtype)[6:]}"
    for seq in QUICK_SEQS if quick else SEQS[device]:
        shape = (seq, heads, dtype, device)
        floor, beside = f"floor: one product, n {seq}", f"eager, n {seq}"
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        flops = 7.0 * heads * WIDTH * seq * seq
        options = {"floor": floor, "formula": FORMULA, "tolerance": tolerance, "at": seq, "flops": flops}
        against = beside if seq <= EAGER_UP_TO[device] else None
        found.append(Case(table, floor, lambda s=seq: make_floor(s, 7 * heads * WIDTH // 2, dtype, device), **options))
        found.append(Case(table, f"mohawk, n {seq}", lambda s=shape: make(ours, *s), against=against, **options))
        for name, kind, function in own:
            if kind == "delta_distance":

                def build_own(function=function, shape=shape):
                    return make(function, *shape)

                found.append(Case(table, f"{name.split(',')[0]}, n {seq}", build_own, **options))
        if against:
            found.append(Case(table, beside, lambda s=shape: make(eager, *s), **options))
    return found

"""Distillation losses beside the floor of the matrix products alone and beside other packages.

From hidden states: 1024 tokens, hidden size 576, vocabulary 49152 (SmolLM2-135M's head) for student and teacher,
forward and backward to hidden states and head, gradients included in the memory. From logits: 1024 x 49152.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import kd_peers
from benchmarks.harness import Case
from mohawk.kernels.kd.interface import TeacherHidden, kd_loss, linear_kd_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
SHAPES = {"cpu": [(1024, 576, 49152)], "cuda": [(8192, 4096, 151936), (8192, 2048, 32000)]}
QUICK = (128, 64, 4096)
FLOOR = "floor: four matrix products"
FLOOR_ROWS = {"cpu": 256, "cuda": 2048}
FORMULA = (
    "Floor: student logits, teacher logits, gradients of hidden states and head, 8 N V H flops, in chunks of {} rows "
    "in the dtype of the table."
)
PASSES = "Traffic: 2 N V reads for the statistics, 2 N V reads and N V writes for the gradient: 5 passes (JSD 7)."


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str, distance: float = 0.5, seed: int = 0):
    """Student hidden states and head, teacher hidden states and head, labels."""
    n, hidden, vocab = shape
    g = torch.Generator(device).manual_seed(seed)
    h = torch.randn(n, hidden, generator=g, device=device)
    head = torch.randn(vocab, hidden, generator=g, device=device) * (2 / hidden**0.5)
    th = h + distance * torch.randn(n, hidden, generator=g, device=device)
    labels = torch.randint(0, vocab, (n,), generator=g, device=device)
    return *(x.to(dtype) for x in (h, head, th, head.clone())), labels


def _ours(**options) -> Loss:
    labelled = "ce_weight" in options or options.pop("labelled", False)

    def loss(hidden, head, teacher, teacher_head, labels):
        return linear_kd_loss(
            hidden, head, TeacherHidden(teacher, teacher_head), labels if labelled else None, **options
        )

    return loss


def floor_work(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """The four products alone, results thrown away chunk by chunk except for the gradients."""
    h, head, th, teacher_head, _ = problem(shape, dtype, device)

    def work() -> None:
        head_grad, hidden_grad = torch.zeros_like(head), torch.empty_like(h)
        for start in range(0, len(h), FLOOR_ROWS[device]):
            rows = slice(start, start + FLOOR_ROWS[device])
            tile = th[rows] @ teacher_head.T
            torch.mm(h[rows], head.T, out=tile)
            torch.mm(tile, head, out=hidden_grad[rows])
            head_grad.addmm_(tile.T, h[rows])

    return work


def make(loss: Loss, truth: Loss, shape, dtype: torch.dtype, device: str, ignored: float = 0.0):
    """(check, work) of a fused loss: gradient error against the float64 reference on a small problem, and one
    forward and backward at full size."""

    def check() -> float:
        small = problem((48, 64, 1000), dtype, device)
        labels = small[4]
        got, exact = [], []
        for function, to, out in ((loss, dtype, got), (truth, torch.float64, exact)):
            h, head, th, teacher_head = (x.to(to) for x in small[:4])
            h, head = h.clone().requires_grad_(), head.clone().requires_grad_()
            function(h, head, th, teacher_head, labels).backward()
            out += [h.grad.double(), head.grad.double()]
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))

    h, head, th, teacher_head, labels = problem(shape, dtype, device)
    h.requires_grad_(), head.requires_grad_()
    if ignored:
        labels[torch.rand(len(labels), generator=torch.Generator().manual_seed(1)).to(device) < ignored] = -100

    def work() -> None:
        h.grad = head.grad = None
        loss(h, head, th, teacher_head, labels).backward()

    return check, work


def make_logits(function: Callable, truth: Callable, shape, dtype: torch.dtype, device: str):
    """(check, work) of a loss from logits: function(student, teacher)."""

    def both(shape):
        g = torch.Generator(device).manual_seed(0)
        z = 2 * torch.randn(shape[0], shape[2], generator=g, device=device)
        return z.to(dtype), (z + torch.randn(z.shape, generator=g, device=device)).to(dtype)

    def check() -> float:
        z, t = both((48, 0, 1000))
        grads = []
        for f, to in ((function, dtype), (truth, torch.float64)):
            x = z.to(to).clone().requires_grad_()
            f(x, t.to(to)).backward()
            grads.append(x.grad.double())
        return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()

    z, t = both(shape)
    z.requires_grad_()

    def work() -> None:
        z.grad = None
        function(z, t).backward()

    return check, work


class _ModelOutput(torch.autograd.Function):
    """Logits as a model gives them: no leaf, so that the gradient may take their place. No copy either: the next step
    finds the last one's gradient there, which takes as long."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _eager_logits(z: Tensor, t: Tensor) -> Tensor:
    log_q, log_p = torch.log_softmax(z.float(), -1), torch.log_softmax(t.float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def copy_work(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Five passes over an array of the logits' size: each copy reads one and writes one."""
    z = torch.zeros(shape[0], shape[2], dtype=dtype, device=device)
    out, half = torch.empty_like(z), shape[0] // 2

    def work() -> None:
        out.copy_(z)
        out.copy_(z)
        out[:half].copy_(z[:half])

    return work


def _compiled(loss: Callable) -> Callable:
    """Compiled when it is first called: in the process of its case."""
    return lambda *args: _compile(loss)(*args)


@functools.cache
def _compile(loss: Callable) -> Callable:
    return torch.compile(loss, dynamic=False)


def cases(device: str, quick: bool) -> list[Case]:
    return [case for shape in ([QUICK] if quick else SHAPES[device]) for case in _cases(shape, device)]


def _cases(shape: tuple[int, int, int], device: str) -> list[Case]:
    n, hidden, vocab = shape
    found, formula = [], FORMULA.format(FLOOR_ROWS[device])
    truths = {d: _ours(backend="reference", divergence=d) for d in ("forward_kl", "reverse_kl", "jsd")} | {
        "ce": _ours(backend="reference", ce_weight=0.5)
    }

    def add(table, name, loss, truth, dtype, needs=None, ignored=0.0):
        def build(loss=loss, truth=truths[truth]):
            return make(loss, truth, shape, dtype, device, ignored)

        found.append(Case(table, name, build, needs, FLOOR, formula))

    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
        table = f"{str(dtype)[6:]}, from hidden states, {n} x {hidden} x {vocab}"

        def floor(dtype=dtype):
            return (lambda: 0.0), floor_work(shape, dtype, device)

        found.append(Case(table, FLOOR, floor, None, FLOOR, formula))
        add(table, "mohawk forward KL", _ours(), "forward_kl", dtype)
        add(table, "mohawk JSD", _ours(divergence="jsd"), "jsd", dtype)
        add(table, "mohawk reverse KL", _ours(divergence="reverse_kl"), "reverse_kl", dtype)
        add(table, "mohawk forward KL and CE", _ours(ce_weight=0.5), "ce", dtype)
        add(table, "mohawk forward KL, 80 % ignored", _ours(labelled=True), "forward_kl", dtype, None, 0.8)
        add(table, "eager forward KL", kd_peers.eager_forward_kl, "forward_kl", dtype)
        if device == "cpu":
            add(table, "eager forward KL and CE", kd_peers.eager_forward_kl_ce, "ce", dtype)
        add(table, "eager JSD", kd_peers.eager_jsd, "jsd", dtype)
        if device == "cpu":
            add(table, "eager forward KL, 80 % ignored", kd_peers.eager_forward_kl, "forward_kl", dtype, None, 0.8)
        else:
            add(table, "torch.compile forward KL", _compiled(kd_peers.eager_forward_kl), "forward_kl", dtype)
            add(table, "torch.compile JSD", _compiled(kd_peers.eager_jsd), "jsd", dtype)
        add(table, "torchtune forward KL", kd_peers.torchtune_forward_kl, "forward_kl", dtype)
        for name, peer in PEERS.items():
            add(table, name, peer[0], peer[1], dtype, peer[2])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    table = f"{str(dtype)[6:]}, from logits, {n} x {vocab}"
    floor_name, functions = "floor: 5 passes by copies", {"mohawk forward KL": kd_loss}
    functions["mohawk forward KL, in place"] = lambda z, t: kd_loss(_ModelOutput.apply(z), t, inplace=True)
    functions["eager forward KL"] = _eager_logits
    if device == "cuda":
        functions["torch.compile forward KL"] = _compiled(_eager_logits)

    def copies():
        return (lambda: 0.0), copy_work(shape, dtype, device)

    found.append(Case(table, floor_name, copies, None, floor_name, PASSES))
    for name, function in functions.items():

        def build(function=function):
            return make_logits(function, lambda z, t: kd_loss(z, t, backend="reference"), shape, dtype, device)

        found.append(Case(table, name, build, None, floor_name, PASSES))
    return found


# name: (loss, the reference it is checked against, the package it needs)
PEERS: dict[str, tuple[Loss, str, str]] = {
    "Liger forward KL, chunks of 1024": (kd_peers.liger_forward_kl_1024, "forward_kl", "liger_kernel"),
    "Liger forward KL, chunks of 256": (kd_peers.liger_forward_kl_256, "forward_kl", "liger_kernel"),
    "Liger JSD, chunks of 256": (kd_peers.liger_jsd_256, "jsd", "liger_kernel"),
    "TRL forward KL": (kd_peers.trl_forward_kl, "forward_kl", "trl"),
    "TRL forward KL, tiles of 256 x 8192": (kd_peers.trl_forward_kl_small, "forward_kl", "trl"),
    "orda forward KL": (kd_peers.orda_forward_kl, "forward_kl", "orda_kernel"),
    "TRL JSD": (kd_peers.trl_jsd, "jsd", "trl"),
    "TRL GKD JSD": (kd_peers.trl_gkd_jsd, "jsd", "trl"),
}

"""Distillation losses beside the floor of the matrix products alone and beside other packages.

From hidden states: 1024 tokens, hidden size 576, vocabulary 49152 (SmolLM2-135M's head) for student and teacher,
forward and backward to hidden states and head, gradients included in the memory. From logits: 1024 x 49152.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Step
from benchmarks.kernels import kd_peers
from benchmarks.own import Own
from mohawk.kernels.kd.interface import TeacherHidden, kd_loss, linear_kd_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
SHAPES = {"cpu": [(1024, 576, 49152)], "cuda": [(8192, 4096, 151936), (8192, 2048, 32000)]}
# From logits on a GPU: places beyond 2^31 are reached
LOGITS = {"cpu": [], "cuda": [(16384, 151936)]}
QUICK = (128, 64, 4096)
FLOOR = "floor: four matrix products"
FLOOR_ROWS = {"cpu": 256, "cuda": 2048}
CHECKED_ROWS = 64  # of the float64 reference at a time
CE_FLOOR = "floor: three matrix products"
CE_FORMULA = "Floor: student logits, gradients of hidden states and head, 6 N V H flops, in chunks of {} rows."
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


def ours(**options) -> Loss:
    labelled = options.pop("labelled", False) or "ce_weight" in options

    def loss(hidden, head, teacher, teacher_head, labels):
        return linear_kd_loss(
            hidden, head, TeacherHidden(teacher, teacher_head), labels if labelled else None, **options
        )

    return loss


def floor_work(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, with_teacher: bool = True
) -> Callable[[], None]:
    """The four products alone, or three without a teacher's logits; results thrown away chunk by chunk except for the
    gradients."""
    h, head, th, teacher_head, _ = problem(shape, dtype, device)

    def work() -> None:
        head_grad, hidden_grad = torch.zeros_like(head), torch.empty_like(h)
        for start in range(0, len(h), FLOOR_ROWS[device]):
            rows = slice(start, start + FLOOR_ROWS[device])
            tile = (th[rows] if with_teacher else h[rows]) @ (teacher_head if with_teacher else head).T
            if with_teacher:
                torch.mm(h[rows], head.T, out=tile)
            torch.mm(tile, head, out=hidden_grad[rows])
            head_grad.addmm_(tile.T, h[rows])

    return work


def gradients(loss: Loss, given: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Of hidden states and head, in float64."""
    *tensors, labels = given
    h, head, th, teacher_head = (x.to(dtype) for x in tensors)
    h, head = (x.detach().clone().requires_grad_() for x in (h, head))
    loss(h, head, th, teacher_head, labels).backward()
    return [h.grad.double(), head.grad.double()]


def gradients_by_rows(truth: Loss, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The same of a mean over rows with labels, in float64 and in some rows at a time."""
    *tensors, labels = given
    h, head, th, teacher_head = (x.double() for x in tensors)
    h, head = (x.detach().clone().requires_grad_() for x in (h, head))
    for rows in torch.arange(len(h), device=h.device).split(CHECKED_ROWS):
        share = (labels[rows] != -100).sum().double() / (labels != -100).sum()
        (truth(h[rows], head, th[rows], teacher_head, labels[rows]) * share).backward()
    return [h.grad, head.grad]


def relative(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))


def make(loss: Loss, truth: Loss, shape, dtype: torch.dtype, device: str, ignored: float = 0.0):
    """(check, step) of a fused loss: gradient error against the float64 reference, of a small problem and, if it is to
    be whole, of the one that is timed."""
    given = problem(shape, dtype, device)
    h, head, th, teacher_head, labels = given
    if ignored:
        labels[torch.rand(len(labels), generator=torch.Generator().manual_seed(1)).to(device) < ignored] = -100

    def check(whole: bool) -> float:
        small = problem((48, 64, 1000), dtype, device)
        found = relative(gradients(loss, small, dtype), gradients(truth, small, torch.float64))
        if whole:
            found = max(found, relative(gradients(loss, given, dtype), gradients_by_rows(truth, given)))
        return found

    leaves = h.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()

    def forward() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return loss(*leaves, th, teacher_head, labels)

    return check, Step(forward, torch.Tensor.backward)


def make_logits(function: Callable, truth: Callable, shape, dtype: torch.dtype, device: str):
    """(check, step) of a loss from logits: function(student, teacher)."""

    def both(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(device).manual_seed(0)
        z = 2 * torch.randn(rows, vocab, generator=g, device=device)
        return z.to(dtype), (z + torch.randn(z.shape, generator=g, device=device)).to(dtype)

    def check(whole: bool) -> float:
        found = 0.0
        for rows, vocab in ((48, 1000), shape)[: 1 + whole]:
            z, t = both(rows, vocab)
            x = z.clone().requires_grad_()
            function(x, t).backward()
            squares = torch.zeros(2, dtype=torch.float64, device=device)  # of the error and of what is right
            for part in torch.arange(rows, device=device).split(CHECKED_ROWS):
                exact = z[part].double().requires_grad_()
                (truth(exact, t[part].double()) * (len(part) / rows)).backward()
                wrong = x.grad[part].double() - exact.grad
                squares += torch.stack([wrong.square().sum(), exact.grad.square().sum()])
            found = max(found, (squares[0] / squares[1]).sqrt().item())
        return found

    z, t = both(*shape)
    z.requires_grad_()

    def forward() -> Tensor:
        z.grad = None
        return function(z, t)

    return check, Step(forward, torch.Tensor.backward)


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


def copy_work(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Five passes over an array of the logits' size: each copy reads one and writes one."""
    z = torch.zeros(shape, dtype=dtype, device=device)
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


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = [case for shape in ([QUICK] if quick else SHAPES[device]) for case in _cases(shape, device, own)]
    if not quick:
        found += [case for shape in LOGITS[device] for case in _from_logits(shape, torch.bfloat16, device, own)]
    return found


def truth_of(**options) -> Loss:
    return ours(backend="reference", labelled=True, **options)


def _cases(shape: tuple[int, int, int], device: str, own: Own) -> list[Case]:
    n, hidden, vocab = shape
    found, formula = [], FORMULA.format(FLOOR_ROWS[device])
    truths = {d: truth_of(divergence=d) for d in ("forward_kl", "reverse_kl", "jsd")} | {"ce": truth_of(ce_weight=0.5)}

    def add(table, name, loss, truth, dtype, needs=None, ignored=0.0):
        def build(loss=loss, truth=truths[truth]):
            return make(loss, truth, shape, dtype, device, ignored)

        found.append(Case(table, name, build, needs, FLOOR, formula, flops=8.0 * n * vocab * hidden))

    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
        table = f"{str(dtype)[6:]}, from hidden states, {n} x {hidden} x {vocab}"

        def floor(dtype=dtype):
            return (lambda whole: 0.0), floor_work(shape, dtype, device)

        found.append(Case(table, FLOOR, floor, None, FLOOR, formula, flops=8.0 * n * vocab * hidden))
        add(table, "mohawk forward KL", ours(), "forward_kl", dtype)
        add(table, "mohawk JSD", ours(divergence="jsd"), "jsd", dtype)
        add(table, "mohawk reverse KL", ours(divergence="reverse_kl"), "reverse_kl", dtype)
        add(table, "mohawk forward KL and CE", ours(ce_weight=0.5), "ce", dtype)
        add(table, "mohawk forward KL, 80 % ignored", ours(labelled=True), "forward_kl", dtype, None, 0.8)
        if device == "cpu" and dtype == torch.bfloat16:
            add(table, "mohawk forward KL, rounded", ours(precision="rounded"), "forward_kl", dtype)
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
        for name, kind, loss in own:
            if kind in truths:
                add(table, name, loss, kind, dtype)
        found += _cross_entropy(shape, dtype, device)
    return found + _from_logits((n, vocab), torch.float32 if device == "cpu" else torch.bfloat16, device, own)


def _cross_entropy(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Case]:
    """The labels' loss alone, beside packages that have nothing else."""
    n, hidden, vocab = shape
    table = f"{str(dtype)[6:]}, cross entropy from hidden states, {n} x {hidden} x {vocab}"
    more = {"floor": CE_FLOOR, "formula": CE_FORMULA.format(FLOOR_ROWS[device]), "flops": 6.0 * n * vocab * hidden}

    def floor():
        return (lambda whole: 0.0), floor_work(shape, dtype, device, with_teacher=False)

    def build(loss: Loss):
        return make(loss, truth_of(kd_weight=0.0, ce_weight=1.0), shape, dtype, device)

    found = [Case(table, CE_FLOOR, floor, None, **more)]
    losses = {"mohawk": (ours(kd_weight=0.0, ce_weight=1.0), None), "eager": (kd_peers.eager_ce, None)}
    losses["torch linear_cross_entropy"] = (kd_peers.torch_linear_ce, None)
    if device == "cuda":
        losses["torch.compile"] = (_compiled(kd_peers.eager_ce), None)
        losses["Liger, Triton"] = (kd_peers.liger_ce, "liger_kernel")
        losses["quack"] = (kd_peers.quack_ce, "quack")
    return found + [
        Case(table, name, functools.partial(build, loss), needs, **more) for name, (loss, needs) in losses.items()
    ]


def _from_logits(shape: tuple[int, int], dtype: torch.dtype, device: str, own: Own) -> list[Case]:
    table = f"{str(dtype)[6:]}, from logits, {shape[0]} x {shape[1]}"
    floor_name, functions = "floor: 5 passes by copies", {"mohawk forward KL": kd_loss}
    functions["mohawk forward KL, in place"] = lambda z, t: kd_loss(_ModelOutput.apply(z), t, inplace=True)
    functions["eager forward KL"] = _eager_logits
    if device == "cuda":
        functions["torch.compile forward KL"] = _compiled(_eager_logits)
        functions["Liger KL, Triton"] = kd_peers.liger_triton_kl
        functions["Liger JSD, Triton"] = kd_peers.liger_triton_jsd
        functions["mohawk JSD"] = functools.partial(kd_loss, divergence="jsd")
    functions |= {name: function for name, kind, function in own if kind == "forward_kl_from_logits"}
    moved = 5.0 * shape[0] * shape[1] * dtype.itemsize

    def copies():
        return (lambda whole: 0.0), copy_work(shape, dtype, device)

    found = [Case(table, floor_name, copies, None, floor_name, PASSES, bytes=moved)]
    for name, function in functions.items():
        truth = functools.partial(kd_loss, backend="reference", divergence="jsd" if "JSD" in name else "forward_kl")

        def build(function=function, truth=truth):
            return make_logits(function, truth, shape, dtype, device)

        needs = "liger_kernel" if name.startswith("Liger") else None
        found.append(Case(table, name, build, needs, floor_name, PASSES, bytes=moved))
    return found


# name: (loss, the reference it is checked against, the package it needs)
PEERS: dict[str, tuple[Loss, str, str]] = {
    "Liger forward KL, compiled": (kd_peers.liger_compiled_forward_kl, "forward_kl", "liger_kernel"),
    "Liger JSD, compiled": (kd_peers.liger_compiled_jsd, "jsd", "liger_kernel"),
    "Liger forward KL, chunks of 1024": (kd_peers.liger_forward_kl_1024, "forward_kl", "liger_kernel"),
    "Liger forward KL, chunks of 256": (kd_peers.liger_forward_kl_256, "forward_kl", "liger_kernel"),
    "Liger JSD, chunks of 256": (kd_peers.liger_jsd_256, "jsd", "liger_kernel"),
    "TRL forward KL": (kd_peers.trl_forward_kl, "forward_kl", "trl"),
    "TRL forward KL, tiles of 256 x 8192": (kd_peers.trl_forward_kl_small, "forward_kl", "trl"),
    "orda forward KL": (kd_peers.orda_forward_kl, "forward_kl", "orda_kernel"),
    "TRL JSD": (kd_peers.trl_jsd, "jsd", "trl"),
    "TRL GKD JSD": (kd_peers.trl_gkd_jsd, "jsd", "trl"),
}

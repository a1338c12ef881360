"""Cases for test_kd_triton.py; run with TRITON_INTERPRET=1. Unwritten memory is filled with NaN, so it would
show."""

import itertools
import sys
import tempfile

import torch

from mohawk.kernels.kd import triton_backend
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.interface import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)

torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports inductor first
torch.utils.deterministic.fill_uninitialized_memory = True
triton_backend.BLOCK = 64  # several blocks and a ragged one at small sizes
ON_LOGITS = tuple(name for name, one in DIVERGENCES.items() if one.on_logits)
KNOWN = triton_backend.IN_TRITON
ROWS, HIDDEN = 3, 8


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def problem(vocab, seed=0, rows=ROWS):
    g = torch.Generator().manual_seed(seed)
    d = {
        "h": torch.randn(rows, HIDDEN, generator=g),
        "head": torch.randn(vocab, HIDDEN, generator=g) * 0.7,
        "th": torch.randn(rows, HIDDEN, generator=g),
        "ids": torch.stack([torch.randperm(vocab, generator=g)[:3] for _ in range(rows)]),
        "labels": torch.randint(0, vocab, (rows,), generator=g),
        "weights": torch.rand(rows, generator=g) + 0.1,
    }
    d["z"] = d["h"] @ d["head"].T
    d["t"] = d["z"] + torch.randn(rows, vocab, generator=g) / 2
    d["labels"][1] = -100
    return d


def teacher(kind, d, dtype):
    t, th, head = (d[k].to(dtype) for k in ("t", "th", "head"))
    lp = torch.log_softmax(d["t"].double(), -1).gather(1, d["ids"]).to(dtype)
    return {
        "logits": lambda: t,
        "hidden": lambda: TeacherHidden(th, head, None, 0.9, 6.0),
        "taid": lambda: TeacherTAID(TeacherLogits(t), 0.4),
        "mixture": lambda: TeacherMixture([TeacherLogits(t), TeacherHidden(th, head)], [2.0, 1.0]),
        "topk": lambda: TeacherTopK(d["ids"], lp),
        "samples": lambda: TeacherSamples(d["ids"] // 2, torch.full((ROWS, 3), 1 / 3, dtype=dtype)),
    }[kind]()


def run(d, kind, dtype, backend, linear, taid=None, **options):
    target = teacher(kind, d, dtype)
    target = target if taid is None else TeacherTAID(TeacherLogits(target), taid)
    if linear:
        leaves = [d["h"].to(dtype).clone().requires_grad_(), d["head"].to(dtype).clone().requires_grad_()]
        loss = linear_kd_loss(*leaves, target, logit_softcap=7.0, backend=backend, **options)
    else:
        leaves = [d["z"].to(dtype).clone().requires_grad_()]
        loss = kd_loss(leaves[0], target, backend=backend, **options)
    (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves)]


def check(d, kind, linear, **options):
    truth = run(d, kind, torch.float64, "reference", linear, **options)
    reference = run(d, kind, torch.float32, "reference", linear, **options)
    got = run(d, kind, torch.float32, "triton", linear, **options)
    for k, (value, ref, expected) in enumerate(zip(got, reference, truth, strict=True)):
        found, allowed = error(value, expected), 2 * error(ref, expected) + 3e-6
        assert found <= allowed, (kind, linear, options, k, found, allowed)


def option_sets(d, vocab):
    labels = d["labels"]
    cut = vocab - vocab // 4
    yield {}
    yield {"labels": labels, "ce_weight": 0.5, "temperature": 1.0}
    yield {"labels": labels, "ce_weight": 0.5, "temperature": 2.5, "token_weights": d["weights"], "beta": 0.3}
    yield {"labels": labels.clamp(max=cut - 1), "temperature": 0.7, "vocab_size": cut, "reduction": "none"}


def dense():
    for vocab in (1, 63, 130):
        d = problem(vocab)
        for divergence in KNOWN:
            if vocab == 1 and divergence == "cosine":  # a direction in one dimension has no gradient
                continue
            check(d, "logits", False, divergence=divergence)
            yield 1
    for divergence, kind, linear in itertools.product(KNOWN, ("logits", "hidden", "taid", "mixture"), (False, True)):
        if kind == "mixture" and divergence in ON_LOGITS:
            continue
        # logits and linear take turns with the options, so that each pair is seen with half of them
        for options in list(option_sets(d, vocab))[linear::2]:
            check(d, kind, linear, divergence=divergence, **options)
            yield 1


def sparse():
    d = problem(130)
    for kind, linear in itertools.product(("topk", "samples"), (False, True)):
        for divergence in (
            [d for d in KNOWN if d not in ON_LOGITS and not DIVERGENCES[d].no_top_k]
            if kind == "topk"
            else ("forward_kl",)
        ):
            for options in list(option_sets(d, 130))[linear::2]:
                if "vocab_size" in options:
                    options = {**options, "vocab_size": 130}
                check(d, kind, linear, divergence=divergence, **options)
                yield 1


def edges():
    d, wide = problem(130), problem(130, rows=5)
    # the ends: forward and reverse KL by another name, and TAID from the student itself
    for linear in (False, True):
        for divergence, ends in (("jsd", "beta"), ("skew_kl", "lam"), ("skew_reverse_kl", "lam")):
            for end in (0.0, 0.001, 0.999, 1.0) if ends == "beta" else (0.0, 0.001, 0.999):
                check(d, "logits", linear, divergence=divergence, **{ends: end})
                yield 1
        for t in (0.0, 1.0):
            check(d, "logits", linear, taid=t)
            yield 1
    # nothing is written but the gradient
    for kind in ("logits", "topk", "samples"):
        for reduction, grad in (("mean", False), ("mean", True), ("none", True)):
            z = d["z"].clone().requires_grad_(grad)
            loss = kd_loss(z, teacher(kind, d, torch.float32), reduction=reduction, backend="triton").sum()
            if grad:
                loss.backward()
            assert torch.equal(z, d["z"]), (kind, reduction, grad)
            yield 1
    # the parts alone, each weight 0, no gradient wanted, in place, bfloat16
    for kd_weight, ce_weight in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        for kind in ("logits", "topk", "samples"):
            check(d, kind, False, labels=d["labels"], kd_weight=kd_weight, ce_weight=ce_weight, temperature=2.0)
            yield 1
    for divergence in KNOWN:
        with torch.no_grad():
            got, parts = kd_loss(
                d["z"],
                d["t"],
                d["labels"],
                divergence=divergence,
                backend="triton",
                return_parts=True,
                kd_weight=0.0,
            )
            expected, exact = kd_loss(
                d["z"].double(), d["t"].double(), d["labels"], divergence=divergence, backend="reference",
                return_parts=True, kd_weight=0.0,
            )  # fmt: skip
        assert got == 0 and expected == 0
        for a, b in zip(parts, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-7)
        x = d["z"].clone().requires_grad_()
        made = (x * 1.0).contiguous()
        loss = kd_loss(made, d["t"], d["labels"], divergence=divergence, backend="triton", inplace=True)
        loss.backward()
        y = d["z"].clone().requires_grad_()
        kd_loss(y, d["t"], d["labels"], divergence=divergence, backend="triton").backward()
        torch.testing.assert_close(x.grad, y.grad)
        half, t, labels = wide["z"].bfloat16().requires_grad_(), wide["t"].bfloat16(), wide["labels"]
        kd_loss(half, t, labels, divergence=divergence, backend="triton").backward()
        z = half.detach().double().requires_grad_()
        kd_loss(z, t.double(), labels, divergence=divergence, backend="reference").backward()
        assert error(half.grad, z.grad) < 0.004
        yield 1
        # -inf on either side
        for student, target in ((True, True), (False, True), (True, False)):
            z, t = d["z"].clone(), d["t"].clone()
            if student:
                z[:, 100:] = float("-inf")
            if target:
                t[:, 100:] = float("-inf")
            labels, results = d["labels"].clamp(max=99), []
            for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
                x = z.to(dtype).requires_grad_()
                loss = kd_loss(x, t.to(dtype), labels, ce_weight=0.5, divergence=divergence, backend=backend)
                loss.backward()
                results.append((loss.detach().double(), x.grad))
            torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
            if results[0][0].isfinite():
                assert error(results[1][1], results[0][1]) < 2e-6, (divergence, student, target)
            yield 1
        # masked with a finite number, on both sides or one
        for student, target, low in ((True, True, torch.finfo().min), (False, True, -1e34), (True, False, -1e34)):
            masked = {**d, "z": d["z"].clone(), "t": d["t"].clone()}
            if student:
                masked["z"][:, 100:] = low
            if target:
                masked["t"][:, 100:] = low
            check(masked, "logits", False, divergence=divergence)
            yield 1
        # values and gradients while the two come together
        for distance in (0.1, 0.01, 1e-3, 1e-4):
            near = {
                **d,
                "t": d["z"] + distance * torch.randn(d["z"].shape, generator=torch.Generator().manual_seed(1)),
            }
            check(near, "logits", False, divergence=divergence)
            yield 1
        if divergence not in ON_LOGITS and divergence != "tvd":
            rows = kd_loss(near["z"], near["t"], divergence=divergence, reduction="none", backend="triton")
            z, t = near["z"].double(), near["t"].double()
            truth = kd_loss(z, t, divergence=divergence, reduction="none", backend="reference")
            assert (rows > 0).all() and ((rows - truth) / truth).abs().max() < 2e-3, (divergence, rows, truth)
            yield 1


def half():
    """From bfloat16 hidden states and heads: the kernel rounds the gradient as it writes it, unless more is made of
    it."""
    d = problem(130)
    given = [d[name].bfloat16() for name in ("h", "head", "th")]
    for divergence, kind, more in itertools.product(
        ("forward_kl", "jsd", "cosine"), ("hidden", "topk"), ({}, {"logit_softcap": 7.0}, {"logit_scale": 0.5})
    ):
        if kind == "topk" and divergence != "forward_kl":
            continue
        grads = []
        for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
            h, head, th = (x.to(dtype) for x in given)
            leaves = [h.clone().requires_grad_(), head.clone().requires_grad_()]
            target = TeacherHidden(th, head) if kind == "hidden" else teacher("topk", d, dtype)
            loss = linear_kd_loss(*leaves, target, d["labels"], ce_weight=0.5, divergence=divergence, backend=backend,
                                  **more)  # fmt: skip
            loss.backward()
            grads.append([x.grad for x in leaves])
        for got, exact in zip(*grads, strict=True):
            assert error(got, exact) < 0.01, (divergence, kind, more, error(got, exact))
        yield 1


def strided(x, layout):
    """The same values, with other steps between them in memory."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if layout == "every second":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "slice":
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]
    assert layout == "expanded"  # one row, or word, over and over
    return x[:1].expand_as(x) if x.dim() == 1 or x.shape[1] == 3 else x[:, :1].expand_as(x)


def layouts():
    """Every operand of every source in every layout: values and gradients of the same numbers in rows."""
    for vocab in (1, 130):
        d = problem(vocab)
        for layout in ("transposed", "every second", "slice", "expanded"):
            odd = {name: strided(x, layout) for name, x in d.items()}
            # ids within a row stay different ones
            odd["ids"] = d["ids"] if layout == "expanded" else odd["ids"]
            odd["labels"] = strided(d["labels"].clamp_min(0), layout)
            if layout != "expanded":
                assert vocab == 1 or not (odd["z"].is_contiguous() or odd["t"].is_contiguous())
            same = {name: x.contiguous() for name, x in odd.items()}
            for kind in ("logits", "hidden", "taid", "mixture", "topk", "samples"):
                if vocab == 1 and kind in ("topk", "samples"):
                    continue
                for part in (None, 97) if vocab > 1 and kind not in ("topk", "samples") else (None,):
                    options = {
                        "ce_weight": 0.5,
                        "temperature": 1.5,
                        "token_weights": odd["weights"],
                        "vocab_size": part,
                    }
                    labels = odd["labels"] if part is None else strided(d["labels"].clamp(0, 96), layout)
                    exact = layout_losses(same, same, kind, labels.contiguous(), "reference", torch.float64, options)
                    found = layout_losses(odd, odd, kind, labels, "triton", torch.float32, options)
                    for got, truth in zip(found, exact, strict=True):
                        assert error(got, truth) < 3e-6, (vocab, layout, kind, part)
                    yield 1


def layout_losses(d, of_teacher, kind, labels, backend, dtype, options):
    """A loss without a gradient, one with, and that."""
    z = d["z"].to(dtype).detach()
    target = teacher(kind, of_teacher, dtype)
    with torch.no_grad():
        alone = kd_loss(z, target, labels, backend=backend, **options)
    leaf = z.requires_grad_()
    loss = kd_loss(leaf, target, labels, backend=backend, **options)
    return [alone, loss.detach(), torch.autograd.grad(loss, leaf)[0]]


def split():
    """Several programs for each row; masks that are no infinities; a factor in place."""
    one_program = triton_backend.splits
    triton_backend.splits = lambda rows, blocks, device: min(blocks, 3)
    d = problem(203)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "cosine", "probability_mse"):
        check(d, "logits", False, divergence=divergence, labels=d["labels"], ce_weight=0.5, temperature=2.5, beta=0.3)
        yield 1
    check(d, "topk", False, labels=d["labels"], ce_weight=0.5)
    triton_backend.splits = one_program
    for low in (-65504.0, -1e34):
        masked = {**d, "z": d["z"].clone()}
        masked["z"][:, 100:] = low
        check(masked, "logits", False, divergence="forward_kl")
        yield 1
    x = torch.randn(7, 91)
    for factor in (1.0, 0.5):
        assert torch.equal(triton_backend.times(x.clone(), torch.tensor(factor)), x * factor)
        yield 1


def shared_losses(d, divergence, kind, part, group, backend, dtype):
    """Whole values and gradient, and the gradient of this slice of the vocabulary."""
    target = teacher(kind, d, dtype)
    if kind in ("logits", "taid"):
        logits = TeacherLogits(d["t"].to(dtype)[:, part])
        target = logits if kind == "logits" else TeacherTAID(logits, 0.4)
    elif kind == "hidden":
        target = TeacherHidden(target.hidden, target.head[part], None, 0.9, 6.0)
    x, w = d["h"].to(dtype).clone().requires_grad_(), d["head"].to(dtype)[part].clone().requires_grad_()
    options = {"divergence": divergence, "vocab_size": 100, "ce_weight": 0.5, "temperature": 1.5}
    loss = linear_kd_loss(x, w, target, d["labels"], group=group, backend=backend, **options)
    loss.backward()
    return [loss.detach(), x.grad], w.grad


def rank_main(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    d, part = shared_problem(), (slice(0, 70), slice(70, 130))[rank]
    out = [shared_losses(d, *case, part, torch.distributed.group.WORLD, "triton", torch.float32) for case in SHARED]
    torch.save(out, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def shared_problem():
    d = problem(130)
    return d | {"labels": d["labels"].clamp(max=99), "ids": d["ids"].remainder(33) + torch.tensor([0, 33, 66])}


SHARED = [(d, k) for d in KNOWN for k in ("logits", "hidden", "taid", "topk", "samples")]
SHARED = [(d, k) for d, k in SHARED if k in ("logits", "hidden") or d == "forward_kl" or k == "topk" and d == "jsd"]


def shared():
    """The vocabulary split over two processes, the second slice cut by vocab_size."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(rank_main, (f"{folder}/store", folder), nprocs=2, start_method="fork")
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    d = shared_problem()
    for k, case in enumerate(SHARED):
        same, slices = shared_losses(d, *case, slice(0, 130), None, "reference", torch.float64)
        for rank in range(2):
            for got, expected in zip(ranks[rank][k][0], same, strict=True):
                assert error(got, expected) < 5e-6, (case, rank)
        assert error(torch.cat([ranks[0][k][1], ranks[1][k][1]]), slices) < 5e-6, case
        yield 1


if __name__ == "__main__":
    parts = (dense, sparse, edges, half, layouts, split, shared)
    print(sum({part.__name__: part for part in parts}[sys.argv[1]]()), "cases right")

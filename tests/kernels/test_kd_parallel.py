"""The loss with the vocabulary split over gloo processes, and as one operator under torch.compile."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mohawk.kernels.kd import gradients as kd_gradients
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

ROWS, HIDDEN, SLICES = 9, 6, {2: (20, 17), 3: (14, 13, 10)}
REAL = 25  # of 37: with three ranks the last has no real word at all
ON_LOGITS = tuple(name for name, one in DIVERGENCES.items() if one.on_logits)
DENSE = ("logits", "hidden", "taid")
KINDS = (*DENSE, "mixture", "topk", "samples")


def cases():
    for divergence in (name for name, one in DIVERGENCES.items() if not one.whole):
        for kind in KINDS:
            if kind == "samples" and divergence != "forward_kl":
                continue
            if divergence in ON_LOGITS and kind not in DENSE or kind == "topk" and DIVERGENCES[divergence].no_top_k:
                continue
            yield divergence, kind


def problem():
    g = torch.Generator().manual_seed(0)
    vocab = sum(SLICES[2])
    d = {
        "h": torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64),
        "head": torch.randn(vocab, HIDDEN, generator=g, dtype=torch.float64),
        "bias": torch.randn(vocab, generator=g, dtype=torch.float64),
        "th": torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64),
        "ids": torch.stack([torch.randperm(REAL, generator=g)[:4] for _ in range(ROWS)]),
        "labels": torch.randint(0, REAL, (ROWS,), generator=g),
    }
    d["labels"][2] = -100
    d["t"] = d["th"] @ d["head"].T / 2
    d["t"][0, :5] = float("-inf")
    return d


class Collectives:
    """How many there were."""

    def __enter__(self):
        self.count, self.saved = 0, (dist.all_gather, dist.all_reduce)

        def counted(f):
            def call(*a, **k):
                self.count += 1
                return f(*a, **k)

            return call

        dist.all_gather, dist.all_reduce = (counted(f) for f in self.saved)
        return self

    def __exit__(self, *_):
        dist.all_gather, dist.all_reduce = self.saved


def statistics_collectives(divergence, kind):
    """Per chunk of rows, with a gradient: see vocabulary.py."""
    if kind in ("topk", "samples"):
        return 1
    second = divergence not in ("forward_kl", "reverse_kl", *ON_LOGITS)
    return 1 + (second or divergence == "reverse_kl" and kind == "mixture")


def teacher(kind, d, part):
    if kind == "topk":
        return TeacherTopK(d["ids"], torch.log_softmax(d["t"][:, :REAL].nan_to_num(neginf=-9), -1).gather(1, d["ids"]))
    if kind == "samples":
        return TeacherSamples(d["ids"] // 2, torch.full((ROWS, 4), 0.25, dtype=torch.float64))
    logits, hidden = (
        TeacherLogits(d["t"][:, part]),
        TeacherHidden(d["th"], d["head"][part], d["bias"][part], 0.7, 5.0),
    )
    return {
        "logits": logits,
        "hidden": hidden,
        "taid": TeacherTAID(hidden, 0.3),
        "mixture": TeacherMixture([logits, hidden], [1.0, 2.0]),
    }[kind]


def losses(d, part, divergence, kind, group):
    """Values and gradients: the linear loss, and the loss from logits row by row."""
    options = {
        "divergence": divergence,
        "vocab_size": REAL,
        "ce_weight": 0.5,
        "temperature": 1.5,
        "group": group,
    }
    x, w, b = (
        d["h"].clone().requires_grad_(),
        d["head"][part].clone().requires_grad_(),
        d["bias"][part].clone(),
    )
    b.requires_grad_()
    target = teacher(kind, d, part)
    with Collectives() as seen:
        first = linear_kd_loss(x, w, target, d["labels"], student_bias=b, logit_softcap=9.0, **options)
        first.backward()
    # One to learn the slices, the values and the hidden states' gradient once each, the rest are statistics.
    assert group is None or seen.count == 3 + statistics_collectives(divergence, kind), (divergence, kind, seen.count)
    z = (d["h"] @ d["head"][part].T).requires_grad_()
    second = kd_loss(z, target, d["labels"], reduction="none", **options)
    second.sum().backward()
    return [first.detach(), second.detach(), x.grad], [w.grad, b.grad, z.grad.T]


def rank_main(rank, world, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        d, start = problem(), sum(SLICES[world][:rank])
        part = slice(start, start + SLICES[world][rank])
        got = {case: losses(d, part, *case, dist.group.WORLD) for case in cases()}
        del kd_gradients.DISTRIBUTION["jsd"]  # so that its definition is differentiated
        got["by autograd"] = losses(d, part, "jsd", "mixture", dist.group.WORLD)
        with pytest.raises(ValueError, match="'adaptive_kl' has no parts that ranks could have; gather the vocabulary"):
            losses(d, part, "adaptive_kl", "logits", dist.group.WORLD)
        # Padded differently before they were split, the slices of student and teacher are not the same words.
        z, t = torch.randn(3, 6), torch.randn(3, 8)
        with pytest.raises(ValueError, match="rank 0 of the group has 6 entries of the student's vocabulary and 8"):
            kd_loss(z, t, vocab_size=6 * world - 1, group=dist.group.WORLD)
        got["wider last"] = kd_loss(
            z, t[:, : 8 if rank == world - 1 else 6], vocab_size=6 * world - 1, group=dist.group.WORLD
        )
        torch.save(got, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", SLICES)
def test_split_over_processes(world, tmp_path):
    mp.start_processes(rank_main, (world, tmp_path / "store", tmp_path), nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(one["wider last"].isfinite() for one in ranks)
    d = problem()
    for case, alone in [*((case, case) for case in cases()), ("by autograd", ("jsd", "mixture"))]:
        same, slices = losses(d, slice(0, sum(SLICES[world])), *alone, None)
        for rank in range(world):
            for got, expected in zip(ranks[rank][case][0], same, strict=True):
                torch.testing.assert_close(
                    got, expected, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}"
                )
        for k, expected in enumerate(slices):
            got = torch.cat([ranks[rank][case][1][k] for rank in range(world)])
            torch.testing.assert_close(
                got, expected, rtol=1e-9, atol=1e-12, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}"
            )


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, 37)

    def forward(self, x, th, labels, weights, kind):
        h, head = torch.tanh(self.body(x)), self.head
        source = TeacherHidden(th, head.weight, head.bias, 0.5, 8.0)
        if kind == "linear":
            return linear_kd_loss(h, head.weight, source, labels, student_bias=head.bias, ce_weight=0.5)
        if kind == "rows":
            rows = linear_kd_loss(
                h,
                head.weight,
                source,
                labels,
                student_bias=head.bias,
                token_weights=weights,
                reduction="none",
            )
            return rows.square().sum()
        if kind == "mixture":
            mixture = TeacherMixture([source, TeacherLogits(head(th))], [1.0, 2.0])
            return kd_loss(head(h), TeacherTAID(mixture, 0.5), labels, temperature=2.0, normalizer=7)
        ids = torch.arange(4).expand(*labels.shape, 4)
        top = TeacherTopK(ids, torch.log_softmax(head(th), -1)[..., :4].detach())
        loss, parts = kd_loss(head(h), top, labels, return_parts=True, divergence="jsd", vocab_size=30)
        return loss + 0 * parts.kd


@pytest.mark.parametrize("kind", ("linear", "rows", "mixture", "topk"))
def test_compiled_whole(kind):
    torch.manual_seed(0)
    model, x, th = Tiny(), torch.randn(2, 4, HIDDEN), torch.randn(2, 4, HIDDEN)
    labels, weights = torch.randint(0, 30, (2, 4)), torch.rand(2, 4)
    labels[0, :2] = -100
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = []
    for f in (model, compiled):
        model.zero_grad()
        loss = f(x, th, labels, weights, kind)
        loss.backward()
        got.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(got[1], got[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, th, labels, weights, kind), got[0][0])
    with pytest.raises(ValueError, match="labels contain"):
        compiled(x, th, labels.clamp(min=0) + 37, weights, kind)


def test_compiled_under_autocast():
    """Autocast is traced away: that the dtypes may differ has to be remembered."""
    model, x, th = Tiny(), torch.randn(2, 4, HIDDEN), torch.randn(2, 4, HIDDEN)
    labels, weights = torch.randint(0, 30, (2, 4)), torch.rand(2, 4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kind in ("linear", "rows"):
        got = []
        for f in (model, compiled):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = f(x, th.bfloat16(), labels, weights, kind)
            loss.backward()
            got.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(got[1], got[0])


@pytest.mark.parametrize(
    "message, arguments",
    (
        ("logit_softcap is 0", {"logit_softcap": 0.0}),
        ("vocab_size is -5", {"vocab_size": -5}),
        ("inplace needs", {"inplace": True, "reduction": "none"}),
        ("2 teachers and 3 weights", {"weights": [1.0, 1.0, 1.0]}),
        ("a weight of TeacherMixture is -1", {"weights": [-1.0, -1.0]}),
    ),
)
def test_mistakes_under_compile(message, arguments):
    z, t = torch.randn(4, 9), torch.randn(4, 9)

    def call(z, t, weights=None, **options):
        source = t if weights is None else TeacherMixture([TeacherLogits(t), TeacherLogits(t)], weights)
        return (
            linear_kd_loss(z, z, t[:, :4], **options) if "logit_softcap" in options else kd_loss(z, source, **options)
        )

    torch.compiler.reset()
    with pytest.raises(ValueError, match=message):
        torch.compile(call, fullgraph=True, backend="aot_eager")(z, t, **arguments)


def test_second_derivative_under_compile():
    torch.compiler.reset()
    x, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    loss = torch.compile(lambda x: kd_loss(x, t), backend="eager")(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_operator_is_registered_soundly():
    """torch's own checks of the operator: schema, autograd registration, fake tensors, AOT dispatch."""
    from mohawk.kernels.kd import compiled

    torch.manual_seed(0)
    z, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    numbers = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.1, 1.0, 0.0], dtype=torch.float64)
    names, ints = ("jsd", "mean", "chunked"), [-100, compiled.NO_SIZE, 0, 0, 0, 0, 0]
    torch.library.opcheck(
        compiled._op, ([z], [t], None, None, None, numbers, "TeacherLogits; tensor", *names, ints, [True], "")
    )

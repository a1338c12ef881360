"""Heads and logits that are DTensors, as FSDP2 and tensor parallelism hold them: value and every gradient."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mohawk.kernels.kd import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]

ROWS, HIDDEN, VOCAB = 8, 6, 37


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    made = {
        "hidden": torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64),
        "head": torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.float64),
        "bias": torch.randn(VOCAB, generator=g, dtype=torch.float64),
        "theirs": torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64),
        "their_head": torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.float64),
    }
    labels = torch.randint(0, VOCAB, (ROWS,), generator=g)
    return {name: tensor.to(dtype) for name, tensor in made.items()} | {"labels": labels}


def teachers(given, of):
    """By name: sources with the head `of(their_head)`."""
    one = TeacherHidden(given["theirs"], of(given["their_head"]))
    return {
        "hidden": one,
        "mixture": TeacherMixture([one, TeacherHidden(0.5 * given["theirs"], of(given["their_head"]))], [0.3, 0.7]),
        "taid": TeacherTAID(one, 0.4),
    }


def mine(given, rank, processes):
    """The rows of one process; heads are everybody's."""
    per = ROWS // processes
    rows = slice(rank * per, (rank + 1) * per)
    return {name: x[rows] if name in ("hidden", "theirs", "labels") else x for name, x in given.items()}


def with_heads_in_parts(rank):
    mesh = init_device_mesh("cpu", (2,))
    given = mine(problem(), rank, 2)

    def part(x):
        return distribute_tensor(x, mesh, [Shard(0)])

    found = {}
    for name, teacher in teachers(given, part).items():
        hidden = given["hidden"].clone().requires_grad_()
        head, bias = part(given["head"]).requires_grad_(), part(given["bias"]).requires_grad_()
        loss = linear_kd_loss(hidden, head, teacher, given["labels"], student_bias=bias, ce_weight=0.5, temperature=2.0)
        loss.backward()
        assert isinstance(head.grad, DTensor) and head.grad.placements == (Shard(0),)
        found[name] = loss.detach(), hidden.grad, head.grad.full_tensor(), bias.grad.full_tensor()
    return found


def test_gathered_heads(tmp_path):
    """Two processes with half of the rows each: the mean of their losses, and of their gradients of heads, as FSDP
    averages all others', are those of all rows at once."""
    first, second = in_processes(tmp_path, 2, with_heads_in_parts)
    given = problem()
    for name, teacher in teachers(given, lambda x: x).items():
        hidden, head, bias = (given[key].clone().requires_grad_() for key in ("hidden", "head", "bias"))
        loss = linear_kd_loss(hidden, head, teacher, given["labels"], student_bias=bias, ce_weight=0.5, temperature=2.0)
        loss.backward()
        torch.testing.assert_close((first[name][0] + second[name][0]) / 2, loss.detach())
        torch.testing.assert_close(torch.cat([first[name][1], second[name][1]]) / 2, hidden.grad)
        for i, expected in ((2, head.grad), (3, bias.grad)):
            torch.testing.assert_close(first[name][i], expected)
            assert torch.equal(first[name][i], second[name][i])


def with_split_logits(rank):
    mesh = init_device_mesh("cpu", (2,))
    given, found = problem(), {}
    logits, theirs = (given[a] @ given[b].T for a, b in (("hidden", "head"), ("theirs", "their_head")))
    for name, placements in {"vocabulary": [Shard(-1)], "rows": [Shard(0)], "whole": [Replicate()]}.items():
        z = distribute_tensor(logits, mesh, placements).requires_grad_()
        labels = given["labels"]
        if name == "rows":
            labels = distribute_tensor(labels, mesh, [Shard(0)])
        teacher = TeacherLogits(distribute_tensor(theirs, mesh, placements))
        loss = kd_loss(z, teacher, labels, ce_weight=0.5, divergence="jsd", temperature=2.0)
        loss.backward()
        found[name] = loss.detach(), z.grad.full_tensor()
    return found


def test_split_logits(tmp_path):
    given = problem()
    logits, theirs = (given[a] @ given[b].T for a, b in (("hidden", "head"), ("theirs", "their_head")))
    z = logits.requires_grad_()
    expected = kd_loss(z, theirs, given["labels"], ce_weight=0.5, divergence="jsd", temperature=2.0)
    expected.backward()
    first, second = in_processes(tmp_path, 2, with_split_logits)
    for name in ("vocabulary", "whole"):
        for found in (first, second):
            torch.testing.assert_close(found[name][0], expected.detach())
            torch.testing.assert_close(found[name][1], z.grad)
    torch.testing.assert_close((first["rows"][0] + second["rows"][0]) / 2, expected.detach())
    torch.testing.assert_close(first["rows"][1] / 2, z.grad)  # each process's mean is over its own half


def with_slices(rank):
    mesh = init_device_mesh("cpu", (2,))
    given = problem()
    head = distribute_tensor(given["head"], mesh, [Shard(0)]).requires_grad_()
    teacher = TeacherHidden(given["theirs"], distribute_tensor(given["their_head"], mesh, [Shard(0)]))
    loss = linear_kd_loss(given["hidden"], head, teacher, given["labels"], ce_weight=0.5, group=mesh.get_group())
    loss.backward()
    return loss.detach(), head.grad.full_tensor()


def test_slices_with_a_group(tmp_path):
    given = problem()
    head = given["head"].requires_grad_()
    teacher = TeacherHidden(given["theirs"], given["their_head"])
    expected = linear_kd_loss(given["hidden"], head, teacher, given["labels"], ce_weight=0.5)
    expected.backward()
    for loss, gradient in in_processes(tmp_path, 2, with_slices):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, head.grad)


def under_fsdp(rank):
    """A head read outside of its module's forward pass, and what a message advises where it cannot be."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB, bias=False)

        def hidden(self, x):
            return self.body(x)

    given = mine(problem(torch.float32), rank, 2)
    mesh, found = init_device_mesh("cpu", (2,)), []
    for way in ("itself", "full_tensor", "unshard"):
        model = Model()
        with torch.no_grad():
            model.body.weight.copy_(torch.eye(HIDDEN))
            model.body.bias.zero_()
            model.head.weight.copy_(given["head"])
        for module in (model.body, model.head, model):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(model, "hidden")
        hidden = model.hidden(given["hidden"])
        if way == "unshard":
            model.head.unshard()
        weight = model.head.weight
        if way == "full_tensor":
            weight = weight.full_tensor(grad_placements=[Partial("avg")])
        linear_kd_loss(hidden, weight, TeacherHidden(given["theirs"], given["their_head"])).backward()
        found.append((model.body.weight.grad.full_tensor(), model.head.weight.grad.full_tensor()))
    return found


def test_a_head_of_fsdp_has_gradients_like_other_layers(tmp_path):
    given = problem(torch.float32)
    body, head = torch.eye(HIDDEN).requires_grad_(), given["head"].clone().requires_grad_()
    teacher = TeacherHidden(given["theirs"], given["their_head"])
    linear_kd_loss(given["hidden"] @ body.T, head, teacher).backward()
    for ways in in_processes(tmp_path, 2, under_fsdp):
        assert len(ways) == 3
        for of_body, of_head in ways:
            torch.testing.assert_close(of_body, body.grad)
            torch.testing.assert_close(of_head, head.grad)


# ---- used as they lie, or gathered ----


KINDS = ("hidden", "whole", "mixture", "taid", "top k", "samples")
CASES = {
    "mean": {"ce_weight": 0.5, "temperature": 2.0},
    "sum of weighted": {"reduction": "sum", "divergence": "jsd"},
    "each row": {"reduction": "none", "ce_weight": 0.25, "divergence": "reverse_kl"},
    "normalizer": {"normalizer": 5.0, "divergence": "skew_kl", "logit_scale": 0.7, "logit_softcap": 4.0},
    "logits": {"divergence": "mse", "vocab_size": VOCAB - 3},
    "gathered": {"divergence": "adaptive_kl"},
}


def sources(given, of, kind):
    """A teacher of some rows, whose heads are what `of` makes of them."""
    if kind in ("top k", "samples"):
        order = given["order"][..., :5]
        logprobs = (given["theirs"] @ given["their_head"].T).log_softmax(-1).gather(-1, order)
        return TeacherTopK(order, logprobs) if kind == "top k" else TeacherSamples(order, 0.3 * logprobs.exp())
    one = TeacherHidden(given["theirs"], given["their_head"] if kind == "whole" else of(given["their_head"]))
    if kind == "mixture":
        return TeacherMixture([one, TeacherHidden(0.5 * given["theirs"], of(given["their_head"]))], [0.3, 0.7])
    return TeacherTAID(one, 0.4) if kind == "taid" else one


def uneven(rank=None):
    """The problem with rows (1, 8) in which process 0 has five, some of them ignored, and weights."""
    given = problem()
    g = torch.Generator().manual_seed(1)
    given["order"] = torch.randn(ROWS, VOCAB, generator=g).argsort(-1)
    given["weights"] = torch.rand(ROWS, generator=g, dtype=torch.float64)
    given["labels"][[1, 6]] = -100
    mine = {None: slice(None), 0: slice(0, 5), 1: slice(5, None)}[rank]
    heads = ("head", "bias", "their_head")
    return {name: x if name in heads else x[mine].unsqueeze(0) for name, x in given.items()}


def loss_of(given, of, kind, case, backend="auto"):
    """What linear_kd_loss gives, and hidden states, head and bias of the student."""
    tensors = [given["hidden"].clone(), of(given["head"]), of(given["bias"])]
    hidden, head, bias = (x.requires_grad_() for x in tensors)
    weights = given["weights"] if case == "sum of weighted" else None
    options = {"student_bias": bias, "token_weights": weights, "return_parts": True, "backend": backend, **CASES[case]}
    teacher = sources(given, of, kind)
    return linear_kd_loss(hidden, head, teacher, given["labels"], **options), [hidden, head, bias]


def fits(kind, case):
    return kind not in ("top k", "samples", "mixture") or case == "mean"


def in_slices(rank):
    mesh, found, gathers = init_device_mesh("cpu", (2,)), {}, []
    full = DTensor.full_tensor

    def counted(self, **options):
        gathers.append(self)
        return full(self, **options)

    DTensor.full_tensor = counted
    for kind in KINDS:
        for case in CASES:
            if fits(kind, case):
                made = loss_of(uneven(rank), lambda x: distribute_tensor(x, mesh, [Shard(0)]), kind, case)
                (loss, parts), tensors = made
                # in front of the loss a factor that is alike on all processes, or is not
                factor = 3.0 if case != "normalizer" else 2.0 + rank
                upstream = factor * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
                loss.backward(upstream)
                assert bool(gathers) == (case == "gathered")
                gathers.clear()
                found[kind, case] = loss.detach(), parts, [full(x.grad) if x.dim() < 3 else x.grad for x in tensors]
    heads = ("head", "bias", "their_head")
    many = {name: x[:20] if name in heads else torch.cat([x] * 3) for name, x in uneven(rank).items()}
    many["labels"] = many["labels"].clamp(max=19)
    loss_of(many, lambda x: distribute_tensor(x, mesh, [Shard(0)]), "hidden", "mean")
    return found, len(gathers)


def test_heads_are_used_as_they_lie_where_rows_are_few(tmp_path):
    """Each process has the loss of its own rows by the definition, and the gradient that is made of all losses."""
    many = in_processes(tmp_path, 2, in_slices)
    assert [gathers for _, gathers in many] == [3, 3]  # 24 rows and 20 words: both heads and the bias
    for kind in KINDS:
        for case in filter(lambda case: fits(kind, case), CASES):
            expected = [None] * 3
            for rank, (found, _) in enumerate(many):
                (loss, parts), tensors = loss_of(uneven(rank), lambda x: x.clone(), kind, case, "reference")
                torch.testing.assert_close(found[kind, case][0], loss.detach())
                for mine, part in zip(found[kind, case][1], parts, strict=True):
                    torch.testing.assert_close(mine, part)
                factor = 3.0 if case != "normalizer" else 2.0 + rank
                loss.backward(factor * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
                torch.testing.assert_close(found[kind, case][2][0], tensors[0].grad)
                for i in (1, 2):
                    expected[i] = tensors[i].grad if rank == 0 else (expected[i] + tensors[i].grad) / 2
            for i in (1, 2):
                for found, _ in many:
                    torch.testing.assert_close(found[kind, case][2][i], expected[i], msg=f"{kind}, {case}, {i}")

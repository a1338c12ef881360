"""Scans, the convolution and the mixing distance inside a compiled function that is one graph: values and gradients of
the reference in float64, and what may be in a CUDA graph."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from mohawk import AttentionMixing, DeltaMixing, SSDMixing, causal_conv1d, gated_delta_rule, mixing_distance, ssd
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference
from mohawk.kernels.common import operators
from mohawk.kernels.kd import compiled

SEQ = 9
SEGMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2])


def tensors(**shapes):
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def of_ssd(segment_ids, dtype, x, decay, B, C, scale, D, state):
    options = {"input_scale": scale, "D": D, "initial_state": state, "segment_ids": segment_ids}
    backend = "reference" if dtype == torch.float64 else "auto"
    return ssd(x, -decay.abs(), B, C, **options, return_final_state=True, backend=backend)


def of_delta(segment_ids, dtype, q, k, v, beta, decay):
    backend = "reference" if dtype == torch.float64 else "auto"
    options = {"beta": beta.sigmoid(), "log_decay": -decay.abs(), "segment_ids": segment_ids}
    return gated_delta_rule(q, F.normalize(k, dim=-1), v, **options, return_final_state=True, backend=backend)


def of_convolution(segment_ids, dtype, x, weight, bias):
    if dtype != torch.float64:
        return (causal_conv1d(x, weight, bias, activation="silu", segment_ids=segment_ids),)
    rows = []
    for row, ids in zip(x, [None] * len(x) if segment_ids is None else segment_ids, strict=True):
        cuts = [SEQ] if ids is None else torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        pieces = [causal_conv1d_reference(p[None], weight, bias, None, "silu") for p in row.split(cuts)]
        rows.append(torch.cat(pieces, 1))
    return (torch.cat(rows),)


def of_mixing(segment_ids, dtype, C, B, decay, q, k):
    backend = "reference" if dtype == torch.float64 else "auto"
    teacher = AttentionMixing(q.detach(), k.detach(), window=4, softcap=7.0, scale=0.3, segment_ids=segment_ids)
    student = SSDMixing(C, B, -decay.abs(), segment_ids=segment_ids)
    return (mixing_distance(student, teacher, metric="relative", reduction="none", backend=backend),)


def of_attentions(segment_ids, dtype, q, k, other):
    backend = "reference" if dtype == torch.float64 else "auto"
    mine = AttentionMixing(q, k, segment_ids=segment_ids)
    return (mixing_distance(mine, AttentionMixing(other, k, segment_ids=segment_ids), metric="kl", backend=backend),)


def of_delta_mixing(segment_ids, dtype, q, k, beta, decay, other):
    backend = "reference" if dtype == torch.float64 else "auto"
    student = DeltaMixing(q, F.normalize(k, dim=-1), beta.sigmoid(), -decay.abs(), segment_ids=segment_ids)
    teacher = DeltaMixing(other, F.normalize(k, dim=-1), beta.sigmoid(), -decay.abs())
    return (mixing_distance(student, teacher, backend=backend),)


HEADS = {"q": (2, SEQ, 2, 4), "k": (2, SEQ, 2, 4), "beta": (2, SEQ, 2), "decay": (2, SEQ, 2)}
CASES = {
    "ssd": (
        of_ssd,
        {"x": (2, SEQ, 2, 3), "decay": (2, SEQ, 2), "B": (2, SEQ, 1, 4), "C": (2, SEQ, 2, 4), "scale": (2, SEQ, 2)}
        | {"D": (2,), "state": (2, 2, 3, 4)},
    ),
    "gated_delta_rule": (
        of_delta,
        {"q": HEADS["q"], "k": HEADS["k"], "v": (2, SEQ, 2, 3)} | dict(list(HEADS.items())[2:]),
    ),
    "causal_conv1d": (of_convolution, {"x": (2, SEQ, 6), "weight": (6, 4), "bias": (6,)}),
    "mixing": (
        of_mixing,
        {"C": (2, SEQ, 1, 4), "B": (2, SEQ, 2, 4), "decay": (2, SEQ, 2), "q": (2, 2, SEQ, 8), "k": (2, 1, SEQ, 8)},
    ),
    "kl": (of_attentions, {"q": (2, 2, SEQ, 8), "k": (2, 1, SEQ, 8), "other": (2, 2, SEQ, 8)}),
    "delta mixing": (of_delta_mixing, HEADS | {"other": HEADS["q"]}),
}


@pytest.mark.parametrize("segmented", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_one_graph(name, segmented):
    function, shapes = CASES[name]
    given, segment_ids = tensors(**shapes), SEGMENTS if segmented else None

    def run(call, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given.values()]
        outputs = call(segment_ids, dtype, *leaves)
        total = sum((out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs)
        wanted = [x for x in torch.autograd.grad(total, leaves, allow_unused=True)]
        return [*outputs, *(x for x in wanted if x is not None)]

    def surrounded(segment_ids, dtype, *leaves):
        return [2 * out for out in function(segment_ids, dtype, *[x * 1 for x in leaves])]

    torch._dynamo.reset()
    compiled = torch.compile(surrounded, fullgraph=True, backend="aot_eager")
    got, truth = run(compiled, torch.float32), run(surrounded, torch.float64)
    assert len(got) == len(truth)
    for mine, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=2e-5)


def test_operators_have_the_shapes_they_promise():
    """torch's own checks: schema, autograd registration, and fake outputs like the real ones, strides included."""
    given = tensors(**CASES["ssd"][1])
    x, decay, B, C, scale, D, state = (v.requires_grad_() for v in given.values())
    arguments = ([x, decay, B, C, scale, SEGMENTS], "11111001", "ssd", "auto", [0.0])
    torch.library.opcheck(operators._plain, arguments)
    y = operators._plain(*arguments)
    shapes = operators._KERNELS["ssd"].shapes([x, decay, B, C, scale, None, None, SEGMENTS], "auto")
    assert [(a.shape, a.dtype, a.stride()) for a in y] == [(a.shape, a.dtype, a.stride()) for a in shapes]


def test_what_waits_for_values_is_kept_out_of_cuda_graphs():
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in compiled._op._opoverload.tags
    ours = getattr(torch.ops, operators.NAMESPACE)
    assert unsafe in ours.kernel_reading_values.default.tags
    assert unsafe in ours.kernel_reading_values_gradients.default.tags
    assert unsafe not in ours.kernel.default.tags


def test_dynamic_lengths_and_no_second_derivative():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ssd(*a).sum(), fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (5, 9, 12):
        x, decay, B = torch.randn(1, seq, 2, 3), -torch.rand(1, seq, 2), torch.randn(1, seq, 1, 4)
        torch.testing.assert_close(compiled(x, decay, B, B), ssd(x, decay, B, B).sum())
    tensors = [x.requires_grad_(), decay, B, B, None, None, None, None]
    (grad,) = torch.autograd.grad(operators.call_operator("ssd", tensors, "auto")[0].sum(), x)
    assert grad.shape == x.shape
    out = operators.call_operator("ssd", tensors, "auto")[0].sum()
    with pytest.raises(RuntimeError, match="ssd has no second derivative under torch.compile"):
        torch.autograd.grad(out, x, create_graph=True)


def test_a_copy_of_the_code_has_operators_of_its_own():
    """As a student's folder has it, loaded beside the package."""
    spec = importlib.util.spec_from_file_location("folder.mohawk_common_operators", operators.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    copy.register_kernel("ssd", lambda tensors, words, numbers: [3 * tensors[0]], lambda tensors, words: [tensors[0]])
    x, decay, B = torch.randn(1, 5, 2, 3), -torch.rand(1, 5, 2), torch.randn(1, 5, 1, 4)
    assert torch.equal(copy.call_operator("ssd", [x])[0], 3 * x)
    y = operators.call_operator("ssd", [x, decay, B, B, None, None, None, None], "auto")[0]
    assert torch.equal(y, ssd(x, decay, B, B))

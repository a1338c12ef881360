"""Scans, the convolution and the mixing distance inside a compiled function that is one graph: values and gradients of
the reference in float64, and what may be in a CUDA graph."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mohawk import AttentionMixing, DeltaMixing, SSDMixing, causal_conv1d, gated_delta_rule, mixing_distance, ssd
from mohawk.kernels.causal_conv1d.package_backend import by_package
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference
from mohawk.kernels.common import operators
from mohawk.kernels.delta import interface as delta_interface
from mohawk.kernels.delta.reference import delta_reference
from mohawk.kernels.kd import compiled
from mohawk.kernels.ssd import interface as ssd_interface
from mohawk.kernels.ssd import package_backend as ssd_package
from mohawk.kernels.ssd.reference import ssd_reference

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


def check_each_output(function, given):
    """Each output alone, compiled and not: the same gradients, and not only zeros."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def gradients(call, which):
        leaves = [x.clone().requires_grad_() for x in given]
        out = call(*leaves)[which]
        total = (out * torch.linspace(1, 2, out.numel()).view(out.shape).to(out.dtype)).sum()
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for which in range(len(function(*given))):
        exact = gradients(function, which)
        assert any(x.any() for x in exact)
        torch.testing.assert_close(gradients(compiled, which), exact)


OUTPUTS = {
    "ssd": (
        lambda backend, x, decay, B, C, scale, D, state: ssd(
            x, -decay.abs(), B, C, input_scale=scale, D=D, initial_state=state, segment_ids=SEGMENTS,
            return_final_state=True, backend=backend,
        ),
        CASES["ssd"][1],
    ),
    "gated_delta_rule": (
        lambda backend, q, k, v, beta, decay, state: gated_delta_rule(
            q, F.normalize(k, dim=-1), v, beta=beta.sigmoid(), log_decay=-decay.abs(), initial_state=state,
            segment_ids=SEGMENTS, return_final_state=True, backend=backend,
        ),
        CASES["gated_delta_rule"][1] | {"state": (2, 2, 4, 3)},
    ),
    "mixing": (
        lambda backend, C, B, decay, q, k: [
            mixing_distance(SSDMixing(C, B, -decay.abs()), AttentionMixing(q, k), metric=metric, backend=backend)
            for metric in ("frobenius", "relative")
        ],
        CASES["mixing"][1],
    ),
    "kl": (
        lambda backend, q, k, other: [
            mixing_distance(AttentionMixing(q, k), AttentionMixing(other, k), metric="kl", backend=backend)
        ],
        CASES["kl"][1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("name", OUTPUTS)
def test_gradients_of_each_output(name, backend):
    function, shapes = OUTPUTS[name]
    check_each_output(lambda *given: function(backend, *given), list(tensors(**shapes).values()))


@pytest.mark.parametrize("seq", (2, SEQ))  # shorter than the kernel, so that the state is in the final one, and not
@pytest.mark.parametrize("segmented", (False, True))
def test_gradients_of_each_output_of_the_convolution(segmented, seq):
    def function(x, weight, bias, state):
        options = {"initial_state": state, "segment_ids": SEGMENTS[:, -seq:] if segmented else None}
        return causal_conv1d(x, weight, bias, activation="silu", **options, return_final_state=True)

    given = tensors(x=(2, seq, 6), weight=(6, 4), bias=(6,), state=(2, 6, 3))
    check_each_output(function, list(given.values()))


def test_gradients_around_the_kernels_of_packages(monkeypatch):
    """What is done in torch before such a kernel and after it: definitions stand in for the kernels."""

    def rule(q, k, v, decay, beta, *, scale, initial_state, output_final_state, cu_seqlens):
        return delta_reference(q, k, v, beta, decay, initial_state, None)

    fla = types.ModuleType("fla.ops.gated_delta_rule")
    monkeypatch.setattr(fla, "chunk_gated_delta_rule", rule, raising=False)
    monkeypatch.setitem(sys.modules, fla.__name__, fla)
    monkeypatch.setattr(delta_interface, "why_not", lambda module: None)
    monkeypatch.setattr(ssd_interface, "why_not", lambda module: None)
    monkeypatch.setattr(ssd_package, "_MambaScan", types.SimpleNamespace(apply=ssd_reference))
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def of_fla(q, k, v, beta, decay, state):
        options = {"beta": beta.sigmoid(), "log_decay": -decay.abs(), "initial_state": state}
        return gated_delta_rule(q, F.normalize(k, dim=-1), v, **options, return_final_state=True, backend="fla")

    check_each_output(of_fla, list(tensors(**OUTPUTS["gated_delta_rule"][1]).values()))

    def of_mamba(x, decay, B, C, state):
        return ssd(x, -decay.abs(), B, C, initial_state=state, return_final_state=True, backend="mamba_ssm")

    x, decay, B, _, _, _, state = tensors(**CASES["ssd"][1]).values()
    check_each_output(of_mamba, [x.bfloat16(), decay, B, B.flip(1), state])

    def convolution(x, weight, bias, *, seq_idx, initial_states, activation):
        assert seq_idx is None
        states = initial_states
        return causal_conv1d_reference(x.transpose(1, 2), weight, bias, states, activation).transpose(1, 2)

    def as_operator(given, activation, numbers):
        return [by_package(convolution, *given[:3], activation, given[3], None)]

    monkeypatch.setattr(operators, "_KERNELS", dict(operators._KERNELS))
    operators.register_kernel("package", as_operator, lambda given, activation: [given[0].new_empty(given[0].shape)])

    def of_package(*given):
        if torch.compiler.is_compiling():
            return operators.call_operator("package", given, "silu")
        return as_operator(given, "silu", [])

    check_each_output(of_package, list(tensors(x=(2, 5, 8), weight=(8, 4), bias=(8,), state=(2, 8, 3)).values()))


@pytest.fixture
def registered(monkeypatch):
    """Registers a function of x and w, whose outputs have their shapes, as an operator: (x, w, *others) to outputs."""
    monkeypatch.setattr(operators, "_KERNELS", dict(operators._KERNELS))

    def register(function):
        operators.register_kernel(
            "plain", lambda given, words, numbers: function(*given), lambda given, words: list(given)
        )
        return lambda *given: operators.call_operator("plain", given)

    return register


def test_what_plain_operations_do_is_differentiated(registered):
    """Views and changes in place as well; only what an output hangs on, whichever inputs need a gradient."""

    def function(x, w):
        y = x * 2
        y[:, 1:].mul_(w[:, :1])
        return [y.exp(), w.square().cumsum(1)]

    operator = registered(function)
    given = [torch.randn(2, 3), torch.randn(2, 3)]
    for needs in ((True, True), (True, False), (False, True)):
        for which in range(2):
            wanted = []
            for call in (function, operator):
                leaves = [x.clone().requires_grad_(need) for x, need in zip(given, needs, strict=True)]
                out = call(*leaves)[which]
                if not out.requires_grad:
                    wanted.append([torch.zeros(2, 3)] * sum(needs))
                    continue
                leaves = [x for x in leaves if x.requires_grad]
                made = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
                wanted.append(list(made))
            torch.testing.assert_close(wanted[1], wanted[0])
    # Nothing of it is left behind.
    with torch._C._AutoDispatchBelowAutograd():
        operators._gradients(given, given, "11", "plain", "", [0.0], [True, True])
        assert not (given[0].clone().requires_grad_() * 2).requires_grad


def test_what_has_no_gradient_raises(registered, monkeypatch):
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    operator = registered(lambda x, w: [x.detach() + w, w * 2])
    with pytest.raises(RuntimeError, match=r"^plain: no output depends on an input that requires grad; detach"):
        torch.autograd.grad(operator(x, w)[0].sum(), x)
    # A torch whose keys of autograd are others.
    operator = registered(lambda x, w: [x * w, w * 2])
    monkeypatch.setattr(operators, "_AUTOGRAD", [])
    with pytest.raises(RuntimeError, match=r"^plain: torch .* records nothing within an operator, .*; call it outside"):
        torch.autograd.grad(operator(x, w)[0].sum(), x)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_one_mixing_on_both_sides_is_the_student_by_its_place(backend):
    def function(q, k):
        mixing = AttentionMixing(q, k)
        return mixing_distance(mixing, mixing, metric="squared", backend=backend)

    torch._dynamo.reset()
    leaves = [torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(2)]
    distance = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert distance.requires_grad
    torch.testing.assert_close(torch.autograd.grad(distance, leaves), torch.autograd.grad(function(*leaves), leaves))


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

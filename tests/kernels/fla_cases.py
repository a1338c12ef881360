"""Cases for test_delta_fla.py; run with TRITON_INTERPRET=1 where flash-linear-attention is installed. The recurrence in
float64 is the truth for its kernels."""

import builtins
import contextlib
import importlib
import math
import sys
import types

import torch
import torch.nn.functional as F
from triton.runtime import autotuner


class Int(int):
    """What a loop of a kernel counts with: a block on a GPU, a plain number in the interpreter."""

    def to(self, dtype, **_):
        return self


def numbers(*bounds):
    plain = (int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds)
    return [Int(x) for x in builtins.range(*plain)]


def without_a_gpu(*modules):
    """What the package's kernels need to be interpreted: no device is asked for anything, nothing is timed for the best
    tiles (the smallest are), and what its loops count with can be cast."""
    torch.cuda.device = lambda index: contextlib.nullcontext()
    properties = types.SimpleNamespace(multi_processor_count=1, major=9, minor=0, name="interpreter")
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    def size(self, *_, config, **__):
        sizes = (v for name, v in config.kwargs.items() if isinstance(v, int) and name.startswith("B"))
        return [float(math.prod(sizes))] * 3

    autotuner.Autotuner._bench = size
    for module in modules:
        importlib.import_module(module)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = numbers


without_a_gpu("fla.ops.gated_delta_rule", "fla.ops.kda")
from mohawk.kernels.delta.interface import gated_delta_rule  # noqa: E402

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")


def problem(seq, batch=1, heads=2, key=16, value=16, channels=False, strength=1.0, state=True):
    torch.manual_seed(seq)
    values = (
        torch.randn(batch, seq, heads, key) * key**-0.5,
        F.normalize(torch.randn(batch, seq, heads, key), dim=-1),
        torch.randn(batch, seq, heads, value),
        torch.rand(batch, seq, heads),
        -torch.rand(batch, seq, heads, *[key] * channels) * strength,
        torch.randn(batch, heads, key, value),
    )
    return {name: value for name, value in zip(NAMES, values, strict=True) if state or name != "initial_state"}


def run(given, backend, dtype, ids):
    given = {name: value.to(dtype).requires_grad_() for name, value in given.items()}
    y, final = gated_delta_rule(**given, segment_ids=ids, return_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(3)
    total = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in (y, final))
    gradients = torch.autograd.grad(total, list(given.values()))
    return dict(zip(("y", "final", *given), (y, final, *gradients), strict=True))


def compare(name, given, ids=None, limit=5e-6):
    exact = run(given, "reference", torch.float64, ids)
    for part, value in run(given, "fla", torch.float32, ids).items():
        error = ((value.double() - exact[part]).norm() / exact[part].norm().clamp(min=1e-3)).item()
        assert value.shape == exact[part].shape and error < limit, (name, part, error)
    return 1


def heads():
    yield compare("two chunks, the last not full", problem(70))
    yield compare("no state", problem(33, value=32, state=False))
    ids = torch.tensor([[4] * 20 + [1] * 11 + [-1] * 4, [2] * 35])
    yield compare("documents", problem(35, batch=2), ids)
    yield compare("documents, no state", problem(35, batch=2, state=False), ids)
    given = problem(40)
    given["log_decay"] = torch.full_like(given["log_decay"], float("-inf"))
    yield compare("no memory", given)
    x = problem(20)["v"].requires_grad_()
    y = gated_delta_rule(**problem(20) | {"v": x}, backend="fla")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), x)
    except RuntimeError as error:
        assert "has no second derivative" in str(error)
        yield 1


def channels():
    yield compare("two chunks, the last not full", problem(70, channels=True))
    ids = torch.tensor([[4] * 20 + [1] * 11 + [-1] * 4, [2] * 35])
    yield compare("documents", problem(35, batch=2, channels=True), ids)


if __name__ == "__main__":
    expected = {"heads": 6, "channels": 2}
    done = sum({"heads": heads, "channels": channels}[sys.argv[1]]())
    assert done == expected[sys.argv[1]]
    print(done, "cases right")

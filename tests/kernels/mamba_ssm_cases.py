"""Cases for test_ssd_mamba.py; run with TRITON_INTERPRET=1 where mamba-ssm is installed, with its compiled parts or
without. The recurrence in float64 is the truth, for mamba-ssm's kernels and for the chunked scan."""

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import types

import torch
import triton

TENSORS = ("x", "log_decay", "B", "C", "input_scale", "D", "initial_state")
CHUNK = 16


def without_a_gpu():
    """What mamba-ssm's Triton kernels need to be interpreted: its compiled parts, which they do not use, are empty, no
    device is asked for anything, and each kernel has the one configuration with the smallest tiles."""
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    torch.cuda.device = lambda index: contextlib.nullcontext()
    properties = types.SimpleNamespace(multi_processor_count=1, major=9, minor=0, name="interpreter")
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    tuned = triton.autotune

    def size(config):
        return math.prod(value for name, value in config.kwargs.items() if name.startswith("BLOCK"))

    triton.autotune = lambda configs, key, **rest: tuned([min(configs, key=size)], key, **rest)


without_a_gpu()
combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
from mohawk.kernels.common.segments import segment_runs  # noqa: E402
from mohawk.kernels.ssd import package_backend as ssd_package  # noqa: E402
from mohawk.kernels.ssd.interface import ssd  # noqa: E402

ssd_package.CHUNK = CHUNK  # several chunks and a ragged one at small sizes


def problem(seq, batch=1, heads=2, head_dim=8, groups=1, state=16, strength=1.0, without=()):
    torch.manual_seed(seq)
    values = (
        torch.randn(batch, seq, heads, head_dim),
        -torch.rand(batch, seq, heads) * strength,
        torch.randn(batch, seq, groups, state),
        torch.randn(batch, seq, groups, state),
        torch.randn(batch, seq, heads),  # of any sign: no dt
        torch.randn(heads),
        torch.randn(batch, heads, head_dim, state),
    )
    return {name: value for name, value in zip(TENSORS, values, strict=True) if name not in without}


def documents(batch, seq, length=11):
    """(batch, seq): other borders in each row, padding at the end of the last."""
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(batch, seq).clone()
    ids[1:, :20] = 4
    ids[-1, -5:] = -1
    return ids


def run(scan, given, dtype=None):
    """y, the final state and all gradients of scan(**given) in dtype."""
    leaves = {name: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for name, v in given.items()}
    outputs = scan(**leaves)
    generator = torch.Generator().manual_seed(3)
    total = sum((out.double() * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    names = ("y", "final state", *("d" + name for name in leaves))
    return dict(zip(names, (*outputs, *gradients), strict=True))


def compare(label, got, truth, tolerance):
    for name, exact in truth.items():
        assert torch.isfinite(got[name]).all(), (label, name)
        error = ((got[name].double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        print(f"{label:50s} {name:16s} {error:.1e}")
        assert error < tolerance, (label, name, error)


def scan_by(backend, ids=None):
    return lambda **given: ssd(**given, segment_ids=ids, return_final_state=True, backend=backend)


def check(label, given, ids=None, tolerance=3e-6, dtype=None):
    if dtype is not None:
        given = {name: value.to(dtype) for name, value in given.items()}
    truth = run(scan_by("reference", ids), given, torch.float64)
    compare(f"{label}, mamba_ssm", run(scan_by("mamba_ssm", ids), given), truth, tolerance)
    compare(f"{label}, chunked", run(scan_by("chunked", ids), given), truth, tolerance)


def backend():
    """`ssd` by the package's kernels, which have decay and input scale apart."""
    check("everything, groups of heads", problem(37, heads=4, groups=2))
    yield 1
    check("documents", problem(45, batch=2), documents(2, 45))
    yield 1
    check("nothing optional, whole chunks", problem(32, without=("input_scale", "D", "initial_state")))
    yield 1
    check("one token", problem(1))
    yield 1
    odd = problem(29, heads=3, head_dim=5, groups=3, state=7, without=("initial_state",))
    check("odd sizes, a group for each head, documents without a state", odd, documents(1, 29, 8))
    yield 1
    backwards = {
        k: v.permute(*range(v.dim())[::-1]).contiguous().permute(*range(v.dim())[::-1]) for k, v in odd.items()
    }
    check("every tensor the other way round in memory", backwards, documents(1, 29, 8).mT.contiguous().mT)
    yield 1
    second = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in problem(29, heads=3, head_dim=5, state=7).items()}
    check("every second number", second)
    yield 1
    check("weak decays", problem(40, strength=1e-5))
    yield 1
    given = problem(40, strength=30.0)
    given["log_decay"][:, 7::9] = float("-inf")
    check("strong decays", given, tolerance=3e-5)
    yield 1
    # The path of all 16-bit types: the interpreter computes wrongly in bfloat16.
    check("float16", problem(37, batch=2), documents(2, 37), tolerance=2e-3, dtype=torch.float16)
    yield 1


def public():
    """The package's public function, whose dt is the input scale and, times A, the decay."""
    for label, ids in (("public", None), ("public, documents", documents(2, 37))):
        given = problem(37, batch=1 if ids is None else 2, heads=2, groups=2)
        A, dt = given.pop("log_decay")[0, 0], given.pop("input_scale").abs()
        given = {"dt": dt, "A": A, **given}
        runs = None if ids is None else segment_runs(ids).to(torch.int32)
        truth = run(functools.partial(ours, "reference", ids), given, torch.float64)
        compare(f"{label}, theirs", run(functools.partial(theirs, runs), given), truth, 3e-6)
        compare(f"{label}, chunked", run(functools.partial(ours, "chunked", ids), given), truth, 3e-6)
        yield 1


def theirs(runs, x, dt, A, B, C, D, initial_state):
    return combined.mamba_chunk_scan_combined(
        x, dt, A, B, C, CHUNK, D=D, initial_states=initial_state, seq_idx=runs, return_final_states=True
    )


def ours(backend, ids, dt, A, **given):
    return scan_by(backend, ids)(log_decay=dt * A, input_scale=dt, **given)


if __name__ == "__main__":
    parts = {"backend": backend, "public": public}
    count = sum(sum(parts[name]()) for name in sys.argv[1:])
    print(f"{count} cases right")

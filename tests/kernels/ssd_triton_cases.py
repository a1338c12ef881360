"""Cases for test_ssd_triton.py; run with TRITON_INTERPRET=1. The recurrence in float64 is the truth. Memory that nobody
wrote is filled with NaN, so it would show."""

import sys

import numpy as np
import torch
import triton.language as tl
from mixing_triton_cases import error  # and products as tensor cores make them
from triton.runtime import interpreter

from mohawk import ssd
from mohawk.kernels.ssd import triton_backend

NAMES = ("x", "log_decay", "B", "C", "input_scale", "D", "initial_state")
# Several chunks of several blocks, and ragged ones, at small sizes.
SMALL = {"CHUNK": 16, "DIM": 16, "STATE": 16}
plain_cast = interpreter.InterpreterBuilder.cast_impl


def cast(self, src, dst_type):
    """To bfloat16 rounded to nearest, as GPUs do it; the interpreter cuts digits off."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    return plain_cast(self, src, dst_type)


interpreter.InterpreterBuilder.cast_impl = cast


def problem(batch, seq, heads, head_dim, state, groups, strength=1.0, without=()):
    g = torch.Generator().manual_seed(seq + heads)
    decay = -torch.rand(batch, seq, heads, generator=g) * strength
    if strength > 1:
        decay[:, ::3] = -1e-3  # weak ones after strong ones
    values = (
        torch.randn(batch, seq, heads, head_dim, generator=g),
        decay,
        torch.randn(batch, seq, groups[0], state, generator=g),
        torch.randn(batch, seq, groups[1], state, generator=g),
        torch.randn(batch, seq, heads, generator=g),
        torch.randn(heads, generator=g),
        torch.randn(batch, heads, head_dim, state, generator=g),
    )
    return {name: value for name, value in zip(NAMES, values, strict=True) if name not in without}


def documents(batch, seq, length=11):
    """Borders in and between chunks, others in each row; padding at the end of the last."""
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(batch, seq).clone()
    ids[0, :20] = 4
    ids[-1, -5:] = -1
    return ids


def run(given, backend, ids, dtypes=None):
    """y, the final state and all gradients, with some weights of both outputs."""
    dtypes = dtypes or {}
    leaves = {name: v.detach().to(dtypes.get(name, v.dtype)).requires_grad_() for name, v in given.items()}
    outputs = ssd(**leaves, segment_ids=ids, return_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(3)
    total = sum((v.double() * torch.randn(v.shape, generator=g, dtype=torch.float64)).sum() for v in outputs)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return dict(zip(("y", "final state", *(f"d{name}" for name in leaves)), (*outputs, *gradients), strict=True))


def compare(label, given, ids=None):
    """At most twice the error of the recurrence in the same dtypes. Three roundings are always allowed: on few numbers
    that can be exact by luck."""
    exact = run(given, "reference", ids, dict.fromkeys(given, torch.float64))
    plain, ours = run(given, "reference", ids), run(given, "triton", ids)
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == truth.shape, (label, name)
        if not truth.any():  # as the gradient of a lone token's decay, without a state before it
            assert not ours[name].any(), (label, name)
            continue
        limit = max(2 * error(plain[name], truth), 3.6e-7)
        assert error(ours[name], truth) <= limit, (label, name, error(ours[name], truth), limit)
    return 1


def shapes():
    """Ragged last chunks, one token, odd sizes, groups that B and C share with others or not."""
    yield compare("blocks", problem(2, 37, 4, 20, 24, (2, 4)), documents(2, 37))
    yield compare("exactly one chunk", problem(1, 16, 2, 16, 16, (1, 1)))
    yield compare("one token", problem(2, 1, 2, 5, 3, (1, 2)))
    yield compare("odd", problem(2, 17, 3, 5, 7, (3, 1)), documents(2, 17, 5))
    yield compare("pairs of groups", problem(1, 20, 6, 3, 5, (3, 2)))
    triton_backend.PROGRAMS = 2  # heads of a group in parts: in two, and not
    yield compare("fewer parts", problem(1, 20, 4, 3, 5, (1, 1)))
    triton_backend.PROGRAMS = 1
    yield compare("one part", problem(1, 20, 4, 3, 5, (1, 1)))


def extremes():
    """Any decay, nothing optional, a state alone, segments from the first token on."""
    yield compare("weak", problem(1, 40, 2, 4, 6, (1, 1), strength=1e-6))
    yield compare("strong", problem(1, 40, 2, 4, 6, (1, 1), strength=100.0), documents(1, 40))
    given = problem(1, 40, 2, 4, 6, (1, 1), strength=30.0)
    given["log_decay"][:, 7::9] = float("-inf")
    yield compare("none is left", given)
    bare = problem(1, 33, 2, 4, 6, (2, 2), without=("input_scale", "D", "initial_state"))
    yield compare("nothing optional", bare)
    yield compare("nothing optional, documents", bare, documents(1, 33))
    yield compare("documents of one token", bare, torch.arange(33).expand(1, 33))
    lost = {name: v.detach().clone() for name, v in problem(1, 20, 1, 2, 2, (1, 1)).items()}
    lost["log_decay"][0, 5] = float("nan")
    for name, value in run(lost, "triton", None).items():
        assert name == "dD" or value.isnan().any(), (name, "a NaN in a decay is passed on")
    yield 1
    for without in ("y", "state"):
        leaves = {name: v.clone().requires_grad_() for name, v in bare.items()}
        y, state = ssd(**leaves, return_final_state=True, backend="triton")
        ours = torch.autograd.grad((state if without == "y" else y).sum(), list(leaves.values()), allow_unused=True)
        y, state = ssd(**leaves, return_final_state=True, backend="reference")
        theirs = torch.autograd.grad((state if without == "y" else y).sum(), list(leaves.values()), allow_unused=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-4, atol=1e-5)
        yield 1


def half():
    """bfloat16, float16 and mixtures as a mixer has them: gates in float32, what was convolved in bfloat16."""
    given = problem(2, 20, 2, 18, 17, (1, 2))
    for low in (torch.bfloat16, torch.float16):
        yield compare(f"all {low}", {name: v.to(low) for name, v in given.items()}, documents(2, 20, 6))
    mixed = {name: v.bfloat16() if name in ("x", "B", "C") else v for name, v in given.items()}
    yield compare("gates in float32", mixed)
    mixed["B"] = mixed["B"].float()
    yield compare("B in float32", mixed)
    mixed |= {"B": given["B"].bfloat16(), "x": given["x"]}
    yield compare("x in float32", mixed)


def layouts():
    """Every tensor with other steps in memory: values and gradients of the same numbers in rows."""
    given = problem(2, 20, 2, 6, 5, (2, 1))
    ids = documents(2, 20, 6)

    def laid(x, layout):
        if layout == "reversed":
            order = tuple(range(x.dim()))[::-1]
            return x.permute(order).contiguous().permute(order)
        if layout == "every second":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "slice":
            return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]
        return x[:1].expand_as(x)

    for layout in ("reversed", "every second", "slice", "expanded"):
        odd = {name: laid(v, layout) for name, v in given.items()}
        assert layout == "expanded" or not odd["x"].is_contiguous()
        exact = run({name: v.contiguous().double() for name, v in odd.items()}, "reference", laid(ids, layout).clone())
        leaves = {name: v.requires_grad_() if layout != "expanded" else v for name, v in odd.items()}
        if layout == "expanded":
            got = run(leaves, "triton", laid(ids, layout))
        else:
            g = torch.Generator().manual_seed(3)
            outputs = ssd(**leaves, segment_ids=laid(ids, layout), return_final_state=True, backend="triton")
            weights = [torch.randn(v.shape, generator=g, dtype=torch.float64).float() for v in outputs]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), [laid(w, layout) for w in weights])
            got = dict(zip(exact, (*outputs, *gradients), strict=True))
        for name, truth in exact.items():
            assert error(got[name], truth) < 1e-6, (layout, name)
        yield 1


def large():
    """The shipped blocks."""
    yield compare("float32", problem(1, 130, 2, 40, 33, (1, 1)), documents(1, 130, 50))
    low = {name: v.bfloat16() for name, v in problem(1, 130, 1, 70, 66, (1, 1)).items()}
    yield compare("bfloat16", low)


if __name__ == "__main__":
    shipped = triton_backend.tiles
    small = {} if sys.argv[1] == "large" else SMALL
    # The interpreter's products are of float64 in any case; in thirds only here, where there is bfloat16.
    thirds = sys.argv[1] in ("half", "large")
    triton_backend.tiles = lambda half, major: shipped(half, 9) | small | {"THIRDS": thirds}
    parts = {"shapes": shapes, "extremes": extremes, "half": half, "layouts": layouts, "large": large}
    print(sum(parts[sys.argv[1]]()), "cases right")

"""Cases for test_mixing_triton.py; run with TRITON_INTERPRET=1. Unwritten memory is filled with NaN, so it would
show."""

import dataclasses
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from mohawk.kernels.mixing import triton_backend as mixing_triton
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing

torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports inductor first
torch.utils.deterministic.fill_uninitialized_memory = True
# Several blocks of several steps, and ragged ones, at small sizes.
SMALL = {"BLOCK": 32, "STEP": 16, "num_warps": 4, "num_stages": 1, "CHUNK": 16, "PRECISION": "ieee"}


def dot(self, a, b, d, *rest):
    """As tensor cores do it: bfloat16 operands (bits to numpy), and a sum that does not depend on which operand is the
    left one, as numpy's does."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return interpreter.TensorHandle((product + d.data).astype(np.float32), d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = dot


def attention(heads, kv_heads, seq, width, seed=0, size=1.0, **options):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, count, seq, width, generator=g) * size for count in (heads, kv_heads))
    return AttentionMixing(q, k, **options)


def state_space(heads, groups, seq, state, strength=1.0, seed=1, plain=False, **options):
    g = torch.Generator().manual_seed(seed)
    C, B = (torch.randn(2, seq, count, state, generator=g) * 0.5 for count in groups)
    log_decay = -torch.rand(2, seq, heads, generator=g) * strength
    if strength > 1:
        log_decay[:, ::3] = -1e-3  # weak ones after strong ones
    scale, D = torch.rand(2, seq, heads, generator=g), torch.randn(heads, generator=g)
    return SSDMixing(C, B, log_decay, *((None, None) if plain else (scale, D)), **options)


def cast(mixing, dtype):
    changed = {k: v for k, v in vars(mixing).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return dataclasses.replace(mixing, **{k: v.to(dtype).requires_grad_() for k, v in changed.items()})


def run(student, teacher, dtype, metric, reduction, backend):
    """The value and the gradients of everything the student is made of."""
    student, teacher = cast(student, dtype), cast(teacher, dtype)
    value = mixing_distance(student, teacher, metric=metric, reduction=reduction, backend=backend)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    tensors = [tensor for tensor in student.tensors if tensor is not None]
    gradients = torch.autograd.grad((value * weights).sum(), tensors)
    return [value, *gradients]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def compare(name, student, teacher, metric="frobenius", reduction="mean", dtype=torch.float32):
    # Values that dtype holds exactly, so that float64 sees the same.
    student, teacher = cast(student, dtype), cast(teacher, dtype)
    exact = run(student, teacher, torch.float64, metric, reduction, "reference")
    plain = run(student, teacher, dtype, metric, reduction, "reference")
    ours = run(student, teacher, dtype, metric, reduction, "triton")
    assert len(exact) == len(ours)
    for index, (truth, reference, mine) in enumerate(zip(exact, plain, ours, strict=True)):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        limit = max(2 * error(reference, truth), 6e-7)
        if dtype == torch.bfloat16 and index:  # residuals are rounded once, before the gradients' product
            limit += 2**-8
        assert error(mine, truth) <= limit, (name, metric, reduction, dtype, index, error(mine, truth), limit)
    return 1


def documents(seq, length=17, padding=11):
    ids = torch.arange(seq).div(length, rounding_mode="floor").expand(2, seq).clone()
    ids[-1, seq - padding :] = -1
    return ids


def kinds():
    """Every pair of kinds, every metric, grouped heads, widths that are no power of 2."""
    seq = 50
    ssd, other = state_space(2, (1, 2), seq, 5), state_space(4, (2, 1), seq, 20, seed=3)
    heads, fewer = attention(4, 2, seq, 20), attention(2, 1, seq, 5, seed=4, scale=0.7)
    for student, teacher, metric, reduction in (
        (ssd, heads, "frobenius", "mean"),
        (ssd, fewer, "squared", "none"),
        (ssd, other, "mse", "sum"),
        (heads, fewer, "kl", "none"),
        (fewer, heads, "relative", "mean"),
        (heads, ssd, "frobenius", "none"),
    ):
        name = f"{type(student).__name__}, {type(teacher).__name__}"
        yield compare(name, student, teacher, metric, reduction)
    value = run(ssd, fewer, torch.float32, "relative", "none", "triton")[0]
    with torch.no_grad():
        alone = mixing_distance(ssd, fewer, metric="relative", reduction="none", backend="triton")
    assert torch.equal(alone, value)
    yield 1


def packed():
    """Documents, padding on one side or both, windows, where whole tiles are skipped."""
    seq = 67
    ids = documents(seq)
    both = dict(segment_ids=ids)
    ssd, packed_ssd = state_space(2, (1, 2), seq, 8), state_space(2, (2, 2), seq, 8, strength=30.0, **both)
    heads, packed_heads = attention(2, 1, seq, 16, window=40), attention(2, 2, seq, 8, seed=4, window=20, **both)
    wide = attention(2, 1, seq, 16, seed=6, **both)
    for student, teacher in (
        (packed_ssd, packed_heads),
        (packed_ssd, packed_ssd),
        (ssd, packed_heads),
        (heads, packed_ssd),
        (packed_heads, heads),
    ):
        name = f"packed {type(student).__name__}, {type(teacher).__name__}"
        yield compare(name, student, teacher, "relative", "none")
    yield compare("packed kl", wide, packed_heads, "kl", "none")
    yield compare("packed kl, teacher only", attention(2, 2, seq, 8, seed=9), packed_heads, "kl")


def strided(mixing, layout):
    """The same values (expanded: those of the first in each batch row or head) with other steps in memory."""

    def laid(x):
        if layout == "reversed":
            order = tuple(range(x.dim()))[::-1]
            return x.permute(order).contiguous().permute(order)
        if layout == "every second":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "slice":
            return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]
        return x[..., :1].expand_as(x) if x.dim() < 3 else x[:1].expand_as(x)

    tensors = {k: v for k, v in vars(mixing).items() if isinstance(v, torch.Tensor)}
    made = {k: laid(v) for k, v in tensors.items()}
    if layout == "expanded" and "segment_ids" in made:
        made["segment_ids"] = mixing.segment_ids[-1:].expand_as(mixing.segment_ids)
    return dataclasses.replace(mixing, **made)


def compare_layouts(student, teacher, metric):
    def floats(mixing):
        return {k: v for k, v in vars(mixing).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}

    def losses(student, teacher, dtype, backend):
        leaves = {k: v.to(dtype).detach().requires_grad_() for k, v in floats(student).items()}
        teacher = dataclasses.replace(teacher, **{k: v.to(dtype) for k, v in floats(teacher).items()})
        student = dataclasses.replace(student, **leaves)
        value = mixing_distance(student, teacher, metric=metric, reduction="none", backend=backend)
        return [value, *torch.autograd.grad(value.sum(), list(leaves.values()))]

    for layout in ("reversed", "every second", "slice", "expanded"):
        odd = [strided(x, layout) for x in (student, teacher)]
        assert layout == "expanded" or not odd[0].tensors[0].is_contiguous()
        same = [
            dataclasses.replace(x, **{k: v.contiguous() for k, v in vars(x).items() if isinstance(v, torch.Tensor)})
            for x in odd
        ]
        exact = losses(*same, torch.float64, "reference")
        for got, truth in zip(losses(*odd, torch.float32, "triton"), exact, strict=True):
            assert error(got, truth) < 1e-5, (layout, type(student).__name__, type(teacher).__name__, metric)
        yield 1


def layouts():
    """Every operand in every layout: values and gradients of the same numbers in rows."""
    seq = 40
    both = dict(segment_ids=documents(seq))
    ssd, heads = state_space(2, (1, 2), seq, 5, **both), attention(2, 1, seq, 8, window=9, **both)
    for student, teacher, metric in ((ssd, heads, "relative"), (heads, ssd, "squared"), (heads, heads, "kl")):
        teacher = dataclasses.replace(teacher, q=teacher.q.flip(2)) if metric == "kl" else teacher
        yield from compare_layouts(student, teacher, metric)


def compare_close(base, metric, draws=8):
    """Two nearly equal attentions: what is left of their difference is mostly rounding, large or small by chance in any
    one draw, so it is taken over several."""
    errors = []
    for seed in range(draws):
        noise = torch.randn(base.q.shape, generator=torch.Generator().manual_seed(seed))
        student, teacher = (cast(x, torch.float32) for x in (base, AttentionMixing(base.q + 1e-3 * noise, base.k)))
        exact = run(student, teacher, torch.float64, metric, "mean", "reference")
        found = (run(student, teacher, torch.float32, metric, "mean", backend) for backend in ("reference", "triton"))
        errors.append([[error(got, truth) for got, truth in zip(one, exact, strict=True)] for one in found])
    reference, mine = torch.tensor(errors).square().mean(0).sqrt()
    assert (mine <= (2 * reference).clamp(min=6e-7)).all(), (metric, mine, reference)
    return 1


def extremes():
    """One token, decays that are strong or none, saturated and equal attention."""
    for seq in (1, 33):
        yield compare("weak", state_space(2, (1, 1), seq, 4, strength=1e-6, plain=True), attention(2, 2, seq, 4))
        yield compare("strong", state_space(2, (2, 1), seq, 4, strength=100.0), attention(2, 2, seq, 4))
        yield compare("saturated", attention(2, 2, seq, 8, size=5.0), attention(2, 1, seq, 8, seed=5, size=5.0))
    base = attention(2, 2, 70, 8)
    for metric in ("frobenius", "kl"):
        yield compare_close(base, metric)
    same = run(base, base, torch.float32, "frobenius", "mean", "triton")
    assert all(not value.any() for value in same)
    yield 1


def half():
    """Bfloat16 operands, with products in it, and float16 ones, which are widened."""
    ids = documents(60)
    ssd, heads = state_space(2, (1, 2), 60, 20, segment_ids=ids), attention(2, 1, 60, 40, segment_ids=ids)
    saturated = attention(2, 2, 60, 8, seed=5, size=3.0)
    for student, teacher in ((ssd, heads), (ssd, ssd), (heads, ssd), (saturated, heads), (heads, saturated)):
        yield compare("half", student, teacher, dtype=torch.bfloat16)
    yield compare("half", heads, attention(2, 2, 60, 8, seed=8, segment_ids=ids), "kl", dtype=torch.bfloat16)
    yield compare("float16", ssd, heads, dtype=torch.float16)
    # A float32 or float16 teacher of a bfloat16 student, and all in float32: bfloat16 products under autocast.
    used, side = set(), mixing_triton.side_of
    mixing_triton.side_of = lambda mixing, dtype: (used.add(dtype), side(mixing, dtype))[1]
    for mine, theirs in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.float32,) * 2):
        student, teacher = cast(ssd, mine), cast(heads, theirs)
        low = [dataclasses.replace(x, **{k: v.bfloat16().detach() for k, v in vars(x).items() if k in "qkCB"})
               for x in (student, teacher)]  # fmt: skip
        exact = run(*low, torch.float64, "frobenius", "mean", "reference")
        with torch.autocast("cpu", torch.bfloat16):
            value = mixing_distance(student, teacher, backend="triton")
        gradients = torch.autograd.grad(value / 2, [x for x in student.tensors if x is not None])  # as `run` has it
        for got, truth in zip([value, *gradients], exact, strict=True):
            assert error(got, truth) < 2**-7, (mine, theirs)  # residuals are rounded, and bfloat16 gradients
        assert used == {torch.bfloat16}
        yield 1


def large():
    """Lengths around the borders of large blocks, the widest heads, in chunks."""
    for seq, width, state in ((1000, 32, 64), (257, 5, 256), (129, 256, 130)):
        ssd, heads = state_space(1, (1, 1), seq, state), attention(1, 1, seq, width)
        yield compare(f"{seq}", ssd, heads)
    yield compare("attention", heads, ssd)


def softcaps():
    """Of the student, of the teacher and of both, bending much or little, packed and not."""
    bent, straight = attention(2, 1, 37, 8, softcap=2.0, scale=0.7), attention(4, 2, 37, 8, seed=4, softcap=50.0)
    ids = documents(37)
    for student, teacher, metric in (
        (bent, straight, "frobenius"),
        (straight, bent, "kl"),
        (bent, attention(2, 2, 37, 8, seed=5), "relative"),
        (state_space(2, (1, 1), 37, 5), dataclasses.replace(bent, segment_ids=ids), "squared"),
        (dataclasses.replace(bent, segment_ids=ids), state_space(2, (1, 1), 37, 5), "mse"),
    ):
        yield compare("softcap", student, teacher, metric)
    yield compare("softcap, bf16", bent, straight, "frobenius", dtype=torch.bfloat16)


if __name__ == "__main__":
    blocks = {"BLOCK": 128, "STEP": 64, "CHUNK": 64} if sys.argv[1] == "large" else {}
    mixing_triton.tiles = lambda *_: SMALL | blocks
    parts = {"kinds": kinds, "packed": packed, "extremes": extremes, "half": half, "large": large, "layouts": layouts}
    parts |= {"softcaps": softcaps}
    print(sum(parts[sys.argv[1]]()), "cases right")

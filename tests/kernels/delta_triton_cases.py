"""Cases of delta rules for test_mixing_triton.py; run with TRITON_INTERPRET=1, one part at a time. Unwritten memory is
filled with NaN, so it would show."""

import sys

import torch
import torch.nn.functional as F
from mixing_triton_cases import attention, compare, compare_layouts, documents, run, state_space

from mohawk.kernels.mixing import triton_delta
from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import DeltaMixing


def delta(heads, seq, width, channels=False, strength=1.0, seed=2, alike=0.0, **options):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, seq, heads, width, generator=g) for _ in range(2))
    k = F.normalize(k + alike * torch.randn(heads, width, generator=g), dim=-1)
    log_decay = -torch.rand(2, seq, heads, *[width] * channels, generator=g) * strength
    if strength > 1:
        log_decay[:, ::3] = -1e-3  # weak ones after strong ones
    return DeltaMixing(q * width**-0.5, k, torch.rand(2, seq, heads, generator=g), log_decay, **options)


def kinds():
    """Every teacher, every metric, other head counts, widths that are no power of 2."""
    seq = 50
    for student, teacher, metric, reduction in (
        (delta(4, seq, 20), attention(4, 2, seq, 20), "frobenius", "mean"),
        (delta(2, seq, 5, channels=True), attention(4, 1, seq, 40, scale=0.7), "squared", "none"),
        (delta(4, seq, 40), attention(2, 1, seq, 5), "relative", "none"),
        (delta(2, seq, 20), state_space(4, (2, 1), seq, 20), "mse", "sum"),
        (delta(2, seq, 20, channels=True), state_space(2, (1, 2), seq, 5, plain=True), "relative", "mean"),
        (delta(2, seq, 20), delta(2, seq, 7, channels=True, seed=5), "frobenius", "mean"),
        (delta(4, seq, 7), delta(2, seq, 20, seed=5), "relative", "none"),
    ):
        yield compare(f"delta, {type(teacher).__name__}", student, teacher, metric, reduction)
    value = run(student, teacher, torch.float32, "relative", "none", "triton")[0]
    with torch.no_grad():
        alone = mixing_distance(student, teacher, metric="relative", reduction="none", backend="triton")
    assert torch.equal(alone, value)
    yield 1


def packed():
    """Documents, padding on one side or both, windows, where whole tiles are skipped; strips in several waves."""
    seq = 67
    both = dict(segment_ids=documents(seq))
    student, packed_student = delta(2, seq, 8), delta(2, seq, 8, strength=30.0, **both)
    window = attention(2, 1, seq, 16, window=20, **both)
    for mine, teacher in (
        (packed_student, window),
        (packed_student, state_space(2, (1, 2), seq, 8, **both)),
        (packed_student, delta(2, seq, 5, seed=5, **both)),
        (student, window),
        (packed_student, attention(2, 2, seq, 8, window=40)),
    ):
        for programs in (256, 4):
            triton_delta.PROGRAMS = programs
            yield compare(f"packed delta, {type(teacher).__name__}", mine, teacher, "relative", "none")


def layouts():
    """Every operand in every layout: values and gradients of the same numbers in rows."""
    both = dict(segment_ids=documents(40))
    student = delta(2, 40, 8, channels=True, **both)
    for teacher in (attention(2, 1, 40, 8, **both), delta(2, 40, 8, seed=5, **both)):
        yield from compare_layouts(student, teacher, "relative")


def extremes():
    """One token, decays that are strong or none, keys that are alike, shut and open gates, bfloat16."""
    for seq in (1, 33):
        teacher = attention(2, 2, seq, 4)
        yield compare("weak", delta(2, seq, 4, strength=1e-6), teacher)
        yield compare("strong", delta(2, seq, 4, strength=100.0, channels=True), teacher)
        yield compare("alike", delta(2, seq, 32, strength=0.0, alike=5.0), teacher)
        for beta in (0.0, 1.0):
            mixing = delta(2, seq, 4)
            yield compare("gates", DeltaMixing(mixing.q, mixing.k, mixing.beta * 0 + beta, mixing.log_decay), teacher)
    yield compare("half", delta(2, 60, 20), attention(2, 1, 60, 40), dtype=torch.bfloat16)


def large():
    """The shipped blocks, and the widest heads."""
    for seq, width, of_teacher in ((300, 32, 64), (129, 256, 5)):
        yield compare(f"{seq}", delta(1, seq, width), attention(1, 1, seq, of_teacher))
    yield compare("two", delta(1, 129, 256), delta(1, 129, 130, seed=5))


def softcaps():
    yield compare("softcap", delta(2, 40, 5), attention(2, 1, 40, 8, softcap=2.0), "frobenius")


if __name__ == "__main__":
    shipped = triton_delta.tiles(8) | {"PRECISION": "ieee"}
    small = {} if sys.argv[1] == "large" else {"BLOCK": 16, "CHUNK": 16}
    triton_delta.tiles = lambda _: shipped | small
    parts = {"kinds": kinds, "packed": packed, "extremes": extremes, "large": large, "layouts": layouts}
    parts |= {"softcaps": softcaps}
    print(sum(parts[sys.argv[1]]()), "cases right")

"""Attention against SSD without matrices: `mixing_distance` beside the eager version, over sequence lengths.

    python benchmarks/mixing_distance.py [--seq 128 256 ... ] [--heads 8] [--batch 1] [--repeats 5]

Eager builds both matrices, takes `torch.linalg.matrix_norm` of their difference and lets autograd do the
rest, as the method's authors do. Times are the least of `repeats` runs taken in turns, so that a busy
machine disturbs both alike; peak memory is what torch has allocated at once inside the call, from its own
record of allocations; errors are those of the value against float64. The product floor is the time of the
four matrix products per tile that value and gradients need (q k^T, C B^T, dC, dB; the lower triangle only),
at the speed that one large product reaches here.
"""

import argparse
import platform
import time

import torch
from torch.profiler import ProfilerActivity, profile

from mohawk.kernels.mixing import AttentionMixing, SSDMixing
from mohawk.kernels.mixing_distance import mixing_distance


def peak_bytes(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    held = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def least_seconds(functions, repeats):
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    for _ in range(repeats):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def product_speed():
    """Floating-point operations per second of one large float32 product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / least_seconds([lambda: a @ a], 20)[0]


def eager_distance(q, k, C, B, log_decay, input_scale, D):
    seq = q.shape[2]
    hidden = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    attention = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    sums = log_decay.cumsum(1).transpose(1, 2)
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(hidden, float("-inf")).exp()
    ssd = C.transpose(1, 2) @ B.permute(0, 2, 3, 1) * decay * input_scale.transpose(1, 2).unsqueeze(-2)
    ssd = ssd + torch.diag_embed(D.unsqueeze(-1).expand(-1, seq))
    return torch.linalg.matrix_norm(ssd - attention).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="head_dim and state_size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-up-to", type=int, default=2048, help="longest seq of the eager version")
    args = parser.parse_args()
    batch, heads, width = args.batch, args.heads, args.width
    speed = product_speed()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, float32 product "
        f"{speed / 1e9:.0f} GFLOP/s"
    )
    print(f"batch {batch}, {heads} heads, head_dim = state_size = {width}, float32, value and gradients")
    print("  seq |  mohawk ms   MiB   error |   eager ms   MiB   error | faster  leaner | floor ms  of floor")
    for seq in args.seq:
        generator = torch.Generator().manual_seed(seq)
        q, k = (torch.randn(batch, heads, seq, width, generator=generator) for _ in range(2))
        C = torch.randn(batch, seq, heads, width, generator=generator)
        B = torch.randn(batch, seq, heads, width, generator=generator) / width
        log_decay = -torch.rand(batch, seq, heads, generator=generator) * 0.1
        scale = torch.rand(batch, seq, heads, generator=generator)
        student = [value.requires_grad_() for value in (C, B, log_decay, scale, torch.ones(heads))]

        def mine(student=student, teacher=(q, k)):
            value = mixing_distance(SSDMixing(*student), AttentionMixing(*teacher))
            return value, torch.autograd.grad(value, student)

        def eager(student=student, teacher=(q, k)):
            value = eager_distance(*teacher, *student)
            return value, torch.autograd.grad(value, student)

        with torch.no_grad():
            wide = [value.double() for value in student]
            exact = mixing_distance(SSDMixing(*wide), AttentionMixing(q.double(), k.double())).item()
        floor = 4 * batch * heads * width * seq * (seq + 1) / speed
        own_error = abs(mine()[0].item() - exact) / exact
        if seq <= args.eager_up_to:
            own, other = least_seconds([mine, eager], args.repeats if seq > 512 else 4 * args.repeats)
            memory, memory_other = peak_bytes(mine) / 2**20, peak_bytes(eager) / 2**20
            error = abs(eager()[0].item() - exact) / exact
            beside = f"{other * 1e3:10.1f} {memory_other:6.0f} {error:7.0e} | {other / own:6.1f} "
            beside += f"{memory_other / memory:7.1f}"
        else:
            own, memory = least_seconds([mine], 1)[0], peak_bytes(mine) / 2**20
            beside = f"{'-':>10} {'-':>6} {'-':>7} | {'-':>6} {'-':>7}"
        print(
            f"{seq:5} | {own * 1e3:10.1f} {memory:5.0f} {own_error:7.0e} | {beside} | "
            f"{floor * 1e3:8.1f} {floor / own:8.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()

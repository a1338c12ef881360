"""The scan against the torch path of transformers' Bamba mixer: time and peak memory, forward and backward.

    python benchmarks/ssd.py [--seq 2048] [--batch 2] [--repeats 5]

Times are the least of `repeats` runs taken in turns, so that a busy machine disturbs both alike. Peak
memory is what torch has allocated at once inside the call, from its own record of allocations. The product
floor is the time of the scan's own matrix products at the speed that one large product reaches here.
"""

import argparse
import platform
import time

import torch
from torch.profiler import ProfilerActivity, profile

from mohawk.kernels.ssd import ssd
from mohawk.kernels.ssd_chunked import CHUNK


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


def product_speed(dtype):
    """Floating-point operations per second of one large product."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / least_seconds([lambda: a @ a], 20)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=64, help="head_dim and state_size")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from transformers import __version__ as transformers_version
    from transformers.models.bamba.modeling_bamba import mamba2_chunk_scan

    batch, seq, heads, width = args.batch, args.seq, args.heads, args.width
    print(
        f"torch {torch.__version__}, transformers {transformers_version}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"batch {batch}, seq {seq}, {heads} heads of {width}, state {width}, 1 group, forward and backward")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = {"x": (heads, width), "B": (1, width), "C": (1, width)}
        tensors = {
            name: torch.randn(batch, seq, *shape, generator=generator).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        dt = torch.rand(batch, seq, heads, generator=generator).requires_grad_()
        A, D = (-torch.rand(heads)).requires_grad_(), torch.rand(heads).requires_grad_()
        inputs = [*tensors.values(), dt, A, D]
        dy = torch.randn(batch, seq, heads, width, generator=generator)
        x, B, C = tensors.values()

        def mine(x=x, B=B, C=C, dt=dt, A=A, D=D, inputs=inputs, dy=dy):
            y = ssd(x, dt * A, B, C, input_scale=dt, D=D)
            return y, torch.autograd.grad(y, inputs, dy.to(y.dtype))

        def theirs(x=x, B=B, C=C, dt=dt, A=A, D=D, inputs=inputs, dy=dy):
            y = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D)
            return y, torch.autograd.grad(y, inputs, dy.to(y.dtype))

        (y, gradients), (y_theirs, gradients_theirs) = mine(), theirs()
        apart = max(
            ((a.double() - b.double()).norm() / b.double().norm()).item()
            for a, b in zip((y, *gradients), (y_theirs, *gradients_theirs), strict=True)
        )
        own, other = least_seconds([mine, theirs], args.repeats)
        memory, memory_other = peak_bytes(mine), peak_bytes(theirs)
        # Per token and head, forward 4 products and backward 11 (C B^T again), each with the chunk or the
        # state.
        flops = 2 * batch * seq * heads * width * (6 * CHUNK + 9 * width)
        floor = flops / product_speed(dtype)
        print(
            f"{str(dtype)[6:]:9}  mohawk {own * 1e3:6.0f} ms {memory / 2**20:6.0f} MiB   transformers "
            f"{other * 1e3:6.0f} ms {memory_other / 2**20:6.0f} MiB   {other / own:.1f} times faster, "
            f"{memory_other / memory:.1f} times leaner   product floor {floor * 1e3:.0f} ms   "
            f"largest difference {apart:.1e}"
        )


if __name__ == "__main__":
    main()

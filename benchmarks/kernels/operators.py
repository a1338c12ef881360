"""How many operators a GPU would be handed by the scan and the convolution of one layer, in torch and by our Triton
kernels, and how many a CPU or GPU by a layer's decoding step. No GPU is needed: what torch dispatches is counted,
without views and allocations, and launches of Triton kernels are counted instead of made.

    python benchmarks/kernels/operators.py [--quick]

Prints a table and, but with --quick, writes it to benchmarks/results/operators.md.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from mohawk.kernels.causal_conv1d import chunked as conv_chunked  # noqa: E402
from mohawk.kernels.causal_conv1d import triton_backend as conv_triton  # noqa: E402
from mohawk.kernels.ssd import chunked as ssd_chunked  # noqa: E402
from mohawk.kernels.ssd import triton_backend as ssd_triton  # noqa: E402

RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "operators.md"
# Nothing runs on a GPU for these.
FREE = (
    "view", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "empty", "as_strided",
    "permute", "alias", "t.", "unflatten", "diagonal.", "_reshape_alias", "split", "unbind", "_unsafe_view", "lift",
    "new_empty",
)  # fmt: skip


class Count(TorchDispatchMode):
    """Counts operators under it, and launches of Triton kernels, which it keeps from running: what they would write
    stays as it was allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: collections.Counter[str] = collections.Counter()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(FREE):
            self.operators[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.run, JITFunction.run = JITFunction.run, self._launch
        return super().__enter__()

    def __exit__(self, *error):
        JITFunction.run = self.run
        return super().__exit__(*error)

    def _launch(self, *args, **kwargs) -> None:
        self.launches += 1

    @property
    def total(self) -> int:
        return self.launches + self.operators.total()


def scan(batch: int, seq: int, heads: int, everything: bool) -> list[Any]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    given = [leaf(batch, seq, heads, 64), (-torch.rand(batch, seq, heads)).requires_grad_()]
    given += [leaf(batch, seq, 1, 64), leaf(batch, seq, 1, 64)]
    if not everything:
        return [*given, None, None, None, None]
    ids = (torch.arange(seq) // 100).expand(batch, seq)
    return [*given, leaf(batch, seq, heads), leaf(heads), leaf(batch, heads, 64, 64), ids]


def convolution(batch: int, seq: int, channels: int, documents: bool) -> list[Any]:
    ids = (torch.arange(seq) // 100).expand(batch, seq) if documents else None
    weight, bias = torch.randn(channels, 4).requires_grad_(), torch.randn(channels).requires_grad_()
    return [torch.randn(batch, seq, channels).requires_grad_(), weight, bias, None, ids, "silu"]


def counted(function: Callable, given: list[Any]) -> tuple[int, int]:
    """Operators forward and backward."""
    with Count() as forward:
        out = function(*given)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.ones_like(x) for x in outputs]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    with Count() as backward:
        torch.autograd.grad(outputs, leaves, upstream)
    return forward.total, backward.total


def table(quick: bool) -> list[str]:
    batch, seq, heads = (1, 300, 4) if quick else (4, 2048, 32)
    wide = "heads of 64, states of 64"
    documents = -(-seq // 100)
    rows = [
        (f"ssd, {batch} x {seq} tokens, {heads} {wide}", ssd_chunked.ssd_chunked, ssd_triton.ssd_triton,
         scan(batch, seq, heads, False)),
        (f"the same, {documents} documents a row, a state, D and an input scale", ssd_chunked.ssd_chunked,
         ssd_triton.ssd_triton, scan(batch, seq, heads, True)),
        (f"causal_conv1d, {2 * batch} x {seq} tokens, 256 channels", conv_chunked.causal_conv1d_chunked,
         conv_triton.causal_conv1d_triton, convolution(2 * batch, seq, 256, False)),
        (f"the same, {documents} documents a row", conv_chunked.causal_conv1d_chunked,
         conv_triton.causal_conv1d_triton, convolution(2 * batch, seq, 256, True)),
    ]  # fmt: skip
    lines = ["| | in torch: forward | backward | by Triton: forward | backward |", "|---|---|---|---|---|"]
    for name, before, after, given in rows:
        numbers = (*counted(before, given), *counted(after, given))
        lines.append(" | ".join(("| " + name, *(f"{n:,}" for n in numbers))) + " |")
    return lines


def steps() -> list[str]:
    """A decoding step of a layer with its projections, by what there is of backends, beside one of attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mohawk.kernels.decode import interface
    from mohawk.models.call import CACHE
    from mohawk.models.from_teacher import hybrid_from_teacher
    from mohawk.models.mixer_names import MIXER_NAMES

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
    hidden, chosen = torch.randn(1, 1, 64), interface._chosen

    def counted_step(student: Any, layer: int, backend: str | None) -> int:
        with torch.no_grad():
            cache = student(torch.zeros(1, 5, dtype=torch.long), use_cache=True)[CACHE]
            student(torch.zeros(1, 1, dtype=torch.long), **{CACHE: cache})  # the first step lays the window out
            positions = student.model.rotary_emb(hidden, torch.tensor([[6]]))
            interface._chosen = lambda *given: backend
            try:
                with torch.set_grad_enabled(backend is None), Count() as count:
                    student.model.layers[layer].self_attn(
                        hidden, position_embeddings=positions, attention_mask=None, **{CACHE: cache}
                    )
            finally:
                interface._chosen = chosen
        return count.total + (backend == "c")

    lines = [
        "| a decoding step of a layer | operation by operation | in place | in C | by Triton |",
        "|---|---|---|---|---|",
    ]
    for mixer in MIXER_NAMES:
        student = hybrid_from_teacher(teacher, [1], mixer).eval()
        numbers = (counted_step(student, 1, backend) for backend in (None, "in_place", "c", "triton"))
        lines.append(f"| {mixer} | " + " | ".join(map(str, numbers)) + " |")
    return [*lines, f"| attention (Llama, transformers) | {counted_step(teacher, 0, None)} | | | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes; prints only")
    quick = parser.parse_args().quick
    lines = [
        "Operators that a GPU would be handed, without views and allocations; counted on a CPU, without a GPU. "
        f"torch {torch.__version__}. `python benchmarks/kernels/operators.py`",
        "",
        *table(quick),
        "",
        *steps(),
    ]
    print("\n".join(lines))
    if not quick:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

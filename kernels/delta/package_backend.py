"""The gated delta rule by flash-linear-attention's Triton kernels, where that package is installed, on a GPU.

Called are its public functions: `chunk_gated_delta_rule` for one decay a head, `chunk_kda` for one a channel. Their
gradients exist once but do not say so, which is done here. The functions' names and arguments are those of fla-core
0.6; the test that compares both needs no GPU.
"""

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.common.segments import segment_runs

# exp of it is nothing beside 1 in float32; the sums of a chunk, which are float32 too, stay as precise as they can
STRONGEST = -30.0


def kernels(log_decay: Tensor) -> str:
    """The module to import for these decays."""
    return "fla.ops.kda" if log_decay.dim() == 4 else "fla.ops.gated_delta_rule"


def refusal(k: Tensor, v: Tensor) -> str | None:
    """Why flash-linear-attention's kernels do not take these tensors, in words; None where they do."""
    if not v.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"v is on {v.device}; it needs a CUDA or ROCm device"
    if v.dtype == torch.float64:
        return "it computes in float32 and v is float64"
    if v.numel() == 0 or k.numel() == 0:
        return f"v is empty, {tuple(v.shape)}"
    if k.shape[3] > 256:
        return f"key_dim is {k.shape[3]}; it takes at most 256"
    return None


def delta_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`, for tensors without a `refusal`. Returns y and the final state."""
    module = importlib.import_module(kernels(log_decay))
    rule = module.chunk_kda if log_decay.dim() == 4 else module.chunk_gated_delta_rule
    decay = log_decay.to(torch.float32).clamp(min=STRONGEST)
    tensors = [q.to(v.dtype), k.to(v.dtype), v, decay, beta.to(torch.float32)]
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32)
    if segment_ids is None:
        return _Once.apply(rule, None, *tensors, initial_state)
    # The package takes documents as parts of one row, each with a state of its own.
    runs = segment_runs(segment_ids)
    counts = runs[:, -1] + 1
    begins = torch.ones_like(runs, dtype=torch.bool)
    begins[:, 1:] = runs[:, 1:] != runs[:, :-1]
    borders = torch.nn.functional.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=runs.numel())
    last = counts.cumsum(0) - 1
    if initial_state is not None:
        states = initial_state.new_zeros(len(borders) - 1, *initial_state.shape[1:])
        initial_state = states.index_copy(0, last - counts + 1, initial_state)
    y, final = _Once.apply(rule, borders, *(x.flatten(0, 1).unsqueeze(0) for x in tensors), initial_state)
    return y.view(v.shape), final[last]


class _Once(torch.autograd.Function):
    """The package's own function, with a second derivative that raises."""

    @staticmethod
    def forward(ctx, rule: Callable, borders: Tensor | None, *tensors):
        given = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
        with torch.enable_grad():
            y, final = rule(*given[:5], scale=1.0, initial_state=given[5], output_final_state=True, cu_seqlens=borders)
        ctx.given, ctx.made = [x for x in given if x is not None and x.requires_grad], (y, final)
        ctx.wanted = [x is not None and x.requires_grad for x in given]
        ctx.save_for_backward(*(x for x in tensors if x is not None and x.requires_grad))
        return y.detach(), final.detach()

    @staticmethod
    @first_order("gated_delta_rule has no second derivative; use backend='reference' for it")
    def backward(ctx, *upstream):
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.made, ctx.given, upstream, retain_graph=True))
        return None, None, *(next(found) if wanted else None for wanted in ctx.wanted)

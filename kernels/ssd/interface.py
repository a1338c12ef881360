"""State-space duality (Mamba-2, arXiv 2405.21060): the scan that trains, fills a prompt and steps.

    state_t = exp(log_decay_t) * state_{t-1} + input_scale_t * x_t B_t^T        (head_dim x state_size)
    y_t     = state_t C_t + D * x_t

Mamba-2's own parametrisation is log_decay = dt * A, input_scale = dt; the discrete one of MOHAWK is
log_decay = -softplus(a), no input_scale.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mohawk.kernels.common.operators import call_operator, register_kernel
from mohawk.kernels.common.packages import no_triton, usable, why_not
from mohawk.kernels.common.tensors import check_untransformed
from mohawk.kernels.ssd.checks import check, fits_step
from mohawk.kernels.ssd.chunked import ssd_chunked
from mohawk.kernels.ssd.package_backend import KERNELS, refusal, ssd_mamba
from mohawk.kernels.ssd.reference import ssd_reference

TRITON = "mohawk.kernels.ssd.triton_backend"


def _ssd_triton(*given: Any) -> tuple[Tensor, Tensor]:
    from mohawk.kernels.ssd.triton_backend import ssd_triton

    return ssd_triton(*given)


BACKENDS = {
    "auto": None,
    "reference": ssd_reference,
    "chunked": ssd_chunked,
    "triton": _ssd_triton,
    "mamba_ssm": ssd_mamba,
}


@overload
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    input_scale: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    input_scale: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    input_scale: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    input_scale: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan over a whole sequence, differentiable in every floating-point argument.

    x: (batch, seq, heads, head_dim), float32, float64, bfloat16 or float16. log_decay: (batch, seq, heads),
    at most 0 in a stable model, -inf allowed. B and C: (batch, seq, groups, state_size); the number of
    groups divides the number of heads and need not be the same for both. input_scale: (batch, seq, heads),
    1 if not given. D: (heads,). initial_state: (batch, heads, head_dim, state_size), 0 if not given.
    segment_ids: (batch, seq) integers; the state starts anew where the id changes (the first segment goes
    on from initial_state).

    backend: "reference" is the recurrence token by token, "chunked" torch on any device, "triton" our own kernels for
    GPUs, "mamba_ssm" that package's kernels. "auto" takes the package's on CUDA where they can be imported and fit,
    else our own where triton is installed, else "chunked".

    Returns y like x, and with return_final_state also the state after the last token, (batch, heads,
    head_dim, state_size) in float32 (float64 for float64 x). The scan is float32 inside (float64 for float64 x).
    Sums of log decays are kept as in float64 by "chunked" and "triton"; mamba-ssm's kernels take them as float32 over
    256 tokens, so that where decays of -10 and below meet weak ones in a chunk, y is off by up to 3e-5 of itself.
    Raises ValueError for shapes that do not fit, RuntimeError in a second derivative, which only "reference" has.
    """
    check(x, log_decay, B, C, input_scale, D, initial_state, segment_ids)
    if backend not in BACKENDS:
        raise ValueError(f"ssd: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if torch.compiler.is_compiling():
        y, final_state = call_operator(
            "ssd", (x, log_decay, B, C, input_scale, D, initial_state, segment_ids), words=backend
        )
        return (y, final_state) if return_final_state else y
    if backend in ("mamba_ssm", "triton"):
        reason = refusal(x, B, C) or why_not(KERNELS) if backend == "mamba_ssm" else no_triton(x, TRITON)
        if reason is not None:
            raise ValueError(f"ssd: backend {backend!r} can't be used: {reason}; use 'auto' or 'chunked'")
    if backend == "auto":
        # In this order: for tensors on a CPU no package is even imported.
        backend = "chunked"
        if x.is_cuda and refusal(x, B, C) is None and usable(KERNELS):
            backend = "mamba_ssm"
        elif x.is_cuda and no_triton(x, TRITON) is None:
            backend = "triton"
    if backend != "reference":
        check_untransformed("ssd", x, log_decay, B, C, input_scale, D, initial_state)
    run = BACKENDS[backend]
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = run(x, log_decay, B, C, input_scale, D, initial_state, segment_ids)
    return (y, final_state) if return_final_state else y


def _as_operator(tensors: list[Tensor | None], backend: str, numbers: list[float]) -> list[Tensor]:
    x, log_decay, B, C, input_scale, D, initial_state, segment_ids = tensors
    assert x is not None and log_decay is not None and B is not None and C is not None
    return list(
        ssd(
            x, log_decay, B, C, input_scale=input_scale, D=D, initial_state=initial_state, segment_ids=segment_ids,
            return_final_state=True, backend=backend,
        )
    )  # fmt: skip


def _shapes(tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    x, _, B, *_ = tensors
    assert x is not None and B is not None
    state = (x.shape[0], *x.shape[2:], B.shape[3])
    return [x.new_empty(x.shape), x.new_empty(state, dtype=torch.promote_types(x.dtype, torch.float32))]


register_kernel("ssd", _as_operator, _shapes)


def ssd_step(
    state: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    input_scale: Tensor | None = None,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`: shapes are its shapes without the sequence dimension.

    state: (batch, heads, head_dim, state_size). x: (batch, heads, head_dim). log_decay, input_scale:
    (batch, heads). B and C: (batch, groups, state_size). D: (heads,). Returns (y, the new state) in x's dtype and
    the state's (at least float32), in which the step is computed; `state` is not changed.
    """
    if x.dim() != 3:
        raise ValueError(f"ssd_step: x must be (batch, heads, head_dim), got {tuple(x.shape)}")
    if not fits_step(state, x, log_decay, B, C, input_scale, D):
        lifted = None if input_scale is None else input_scale.unsqueeze(1)
        check(x[:, None], log_decay[:, None], B[:, None], C[:, None], lifted, D, state, None, "ssd_step")
    heads = x.shape[1]
    compute = torch.promote_types(state.dtype, torch.float32)
    x_in = x.to(compute)
    scaled = x_in if input_scale is None else x_in * input_scale.to(compute).unsqueeze(-1)
    B_bhN, C_bhN = (_per_head(value.to(compute), heads) for value in (B, C))
    decay = log_decay.to(compute).exp()[..., None, None]
    state = (decay * state.to(compute)).addcmul_(scaled.unsqueeze(-1), B_bhN.unsqueeze(-2))
    # A sum, not a matrix product: autocast would round the state to bfloat16.
    y = (state * C_bhN.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + x_in * D.to(compute).unsqueeze(-1)
    return y.to(x.dtype), state


def _per_head(value: Tensor, heads: int) -> Tensor:
    """(batch, groups, state_size) -> (batch, heads, state_size), without a copy where each head has its own."""
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)

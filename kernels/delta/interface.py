"""The gated delta rule: a state that forgets, and that corrects what it holds under a key rather than adding to it.

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T        (key_dim x value_dim)
    y_t = S_t^T q_t

With one log decay for each head and token it is the rule of Gated Delta Networks (arXiv 2412.06464; Qwen3-Next, Qwen3.5
and OLMo-Hybrid run it), with one for each channel Kimi Delta Attention's (Kimi Linear, arXiv 2510.26692).
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mohawk.kernels.common.operators import call_operator, register_kernel
from mohawk.kernels.common.packages import usable, why_not
from mohawk.kernels.common.tensors import check_untransformed
from mohawk.kernels.delta.checks import check, fits_step
from mohawk.kernels.delta.chunked import delta_chunked
from mohawk.kernels.delta.package_backend import delta_fla, kernels, refusal
from mohawk.kernels.delta.reference import delta_reference

BACKENDS = {"auto": None, "reference": delta_reference, "chunked": delta_chunked, "fla": delta_fla}


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The rule over a whole sequence, differentiable in every floating-point argument.

    q and k: (batch, seq, heads, key_dim), taken as they are: normalise and scale them before (Qwen3.5 divides both by
    their norms and q by sqrt(key_dim)). v: (batch, seq, heads, value_dim), float32, float64, bfloat16 or float16. Where
    value heads share keys, repeat those. beta: (batch, seq, heads), how much of what stands under the key is replaced,
    from 0 to 1 (a state can grow without bound where beta |k|^2 is above 2). log_decay: (batch, seq, heads), or
    (batch, seq, heads, key_dim) for a decay of each channel; at most 0, -inf allowed. initial_state: (batch, heads,
    key_dim, value_dim), 0 if not given. segment_ids: (batch, seq) integers; the state starts anew where the id changes
    (the first segment goes on from initial_state).

    backend: "reference" is the recurrence token by token, "chunked" torch on any device with memory linear in seq,
    "fla" flash-linear-attention's kernels, "auto" those on CUDA where they can be imported and fit, else "chunked".

    Returns y like v, and with return_final_state also the state after the last token, (batch, heads, key_dim,
    value_dim) in float32 (float64 for float64 v). The rule is float32 inside (float64 for float64 v); "fla" rounds to
    v's dtype between its kernels, and takes decays below -30 as that. Raises ValueError for shapes that do not fit,
    RuntimeError in a second derivative, which only "reference" has.
    """
    check(q, k, v, beta, log_decay, initial_state, segment_ids)
    if backend not in BACKENDS:
        raise ValueError(f"gated_delta_rule: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if torch.compiler.is_compiling():
        tensors = (q, k, v, beta, log_decay, initial_state, segment_ids)
        y, final_state = call_operator("gated_delta_rule", tensors, words=backend)
        return (y, final_state) if return_final_state else y
    if backend == "fla":
        reason = refusal(k, v) or why_not(kernels(log_decay))
        if reason is not None:
            raise ValueError(f"gated_delta_rule: backend 'fla' can't be used: {reason}; use 'auto' or 'chunked'")
    if backend == "auto":
        # In this order: for tensors on a CPU the package is not even imported.
        backend = "fla" if v.is_cuda and refusal(k, v) is None and usable(kernels(log_decay)) else "chunked"
    if backend != "reference":
        check_untransformed("gated_delta_rule", q, k, v, beta, log_decay, initial_state)
    run = BACKENDS[backend]
    with torch.autocast(v.device.type, enabled=False):
        y, final_state = run(q, k, v, beta, log_decay, initial_state, segment_ids)
    return (y, final_state) if return_final_state else y


def _as_operator(tensors: list[Tensor | None], backend: str, numbers: list[float]) -> list[Tensor]:
    q, k, v, beta, log_decay, initial_state, segment_ids = tensors
    assert q is not None and k is not None and v is not None and beta is not None and log_decay is not None
    return list(
        gated_delta_rule(
            q, k, v, beta=beta, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids,
            return_final_state=True, backend=backend,
        )
    )  # fmt: skip


def _shapes(tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    _, k, v, *_ = tensors
    assert k is not None and v is not None
    state = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return [v.new_empty(v.shape), v.new_empty(state, dtype=torch.promote_types(v.dtype, torch.float32))]


register_kernel("gated_delta_rule", _as_operator, _shapes)


def gated_delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`: shapes are its shapes without the sequence dimension.

    state: (batch, heads, key_dim, value_dim). q and k: (batch, heads, key_dim). v: (batch, heads, value_dim). beta:
    (batch, heads). log_decay: (batch, heads) or (batch, heads, key_dim). Returns (y, the new state) in v's dtype and
    the state's (at least float32), in which the step is computed; `state` is not changed.
    """
    where = "gated_delta_step"
    if v.dim() != 3:
        raise ValueError(f"{where}: v must be (batch, heads, value_dim), got {tuple(v.shape)}")
    if not fits_step(state, q, k, v, beta, log_decay):
        check(q[:, None], k[:, None], v[:, None], beta[:, None], log_decay[:, None], state, None, where)
    compute = torch.promote_types(state.dtype, torch.float32)
    k_column, q_column = k.to(compute).unsqueeze(-1), q.to(compute).unsqueeze(-1)
    decay = log_decay.to(compute).exp()
    decay = decay.unsqueeze(-1) if decay.dim() == 3 else decay[..., None, None]
    state = decay * state.to(compute)
    # Sums, not matrix products: autocast would round the state to bfloat16.
    change = beta.to(compute).unsqueeze(-1) * (v.to(compute) - (state * k_column).sum(-2))
    state = state.addcmul(k_column, change.unsqueeze(-2))
    return (state * q_column).sum(-2).to(v.dtype), state

"""A decoding step between a mixer's projections: the convolution of the newest inputs, one step of the scan or of the
gated delta rule, norm and gate. Window and state, which are a cache's, are changed in place.

Nothing here has a gradient. `causal_conv1d_step`, `ssd_step` and `gated_delta_step` are the parts that have one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mohawk.kernels.common.packages import no_triton
from mohawk.kernels.decode.c_backend import MOST, delta_decode_c, no_c, ssd_decode_c
from mohawk.kernels.decode.checks import explain, fits_delta, fits_rows, fits_ssd, usual
from mohawk.kernels.decode.in_place import delta_decode_in_place, ssd_decode_in_place
from mohawk.kernels.decode.reference import delta_decode_reference, ssd_decode_reference

TRITON = "mohawk.kernels.decode.triton_backend"
BACKENDS = ("auto", "reference", "in_place", "c", "triton")
LARGEST = 16384  # elements of a head's state that one program holds in its registers
ACTIVATIONS = (None, "silu")
GATES = ("silu", "sigmoid")
_OF_WINDOW = {"window": "(batch, channels, kernel)", "inputs": "(batch, channels)", "weight": "(channels, kernel)",
              "bias": "(channels,)", "real": "(batch,)"}  # fmt: skip
_OF_SSD = {
    **_OF_WINDOW, "state": "(batch, heads, head_dim, state_size) with channels = heads * head_dim + 2 * groups * "
    "state_size", "gate": "(batch, heads * head_dim)", "decay": "(batch, heads)", "A_log": "(heads,)",
    "dt_bias": "(heads,)", "D": "(heads,)", "gate_bias": "(heads * head_dim,)", "norm_weight": "(heads * head_dim,)",
}  # fmt: skip
_OF_DELTA = {
    **_OF_WINDOW, "state": "(batch, heads, key_dim, value_dim) with channels = heads * value_dim + 2 * groups * "
    "key_dim", "gate": "(batch, heads * value_dim)", "beta": "(batch, heads)", "A_log": "(heads,)",
    "decay": "(batch, heads), or (batch, heads, key_dim) without A_log and dt_bias", "dt_bias": "(heads,)",
    "norm_weight": "(value_dim,)",
}  # fmt: skip


def ssd_decode_step(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    decay: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    gate_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    real: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of a Mamba-2 layer between its projections, for inference; window and state are changed in place.

    window: (batch, channels, kernel), the convolution's last inputs, oldest first. state: (batch, heads, head_dim,
    state_size). inputs: (batch, channels), x (heads * head_dim), then B and C (groups * state_size each) before the
    convolution. gate: (batch, heads * head_dim). decay: (batch, heads), as projected. weight: (channels, kernel).
    bias: (channels,). activation: "silu" after the convolution, or None. real: (batch,) bool; where it is False there
    is padding, nothing changes, and the output is 0.

    With A_log (heads,), as in Mamba-2, dt = softplus(decay + dt_bias), the state decays by exp(-dt exp(A_log)) and x
    is multiplied by dt; without it, as in discrete Mamba-2, the state decays by exp(-softplus(decay)). D: (heads,).
    The output y silu(gate + gate_bias) is divided by its root mean square over each group's channels and multiplied by
    norm_weight (heads * head_dim,), where that is given.

    backend: "reference" is the definition; "in_place" torch in few operations, which knows no `real`; "c" a function of
    C for float32 on a CPU with a C compiler and a window laid out tap by tap; "triton" one kernel, for at most 16,384
    elements of a head's state. "auto" takes "triton" on CUDA and "c" on a CPU where they can be had, else "in_place",
    or "reference" where there is padding.

    Returns (batch, heads * head_dim) in the dtype of inputs. Computed in float32, or in float64 if state is; what is
    convolved and y are rounded to inputs' dtype, as over a sequence. Raises ValueError for what does not fit.
    """
    where, per_head, per_channel = "ssd_decode_step", (A_log, dt_bias, D), (gate_bias, norm_weight)
    tensors = (window, state, inputs, gate, decay, weight, bias, *per_head, *per_channel)
    fits = _whole(window, state, inputs, tensors[:6], tensors[6:]) and fits_ssd(
        window, state, inputs, gate, decay, weight, bias, per_head, per_channel
    )
    kinds = {(x.dtype, x.device) for x in tensors if x is not None} if fits else set()
    if not (fits and fits_rows(real, state) and usual(kinds, state.device)):
        names = ("window", "state", "inputs", "gate", "decay", "weight", "bias", "A_log", "dt_bias", "D", "gate_bias",
                 "norm_weight")  # fmt: skip
        named = {**dict(zip(names, tensors, strict=True)), "real": real}
        explain(where, named, names[:6], _OF_SSD)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be None or 'silu', got {activation!r}")
    if dt_bias is not None and A_log is None:
        raise ValueError(f"{where}: dt_bias is given without A_log, which it belongs to")
    given = (window, state, inputs, gate, decay, weight, bias, activation == "silu", A_log, dt_bias, D, gate_bias,
             norm_weight, norm_eps)  # fmt: skip
    backend = _chosen(where, backend, window, state, kinds, real)
    if backend == "c":
        return _written(window, state, ssd_decode_c(*given, real))
    if backend == "in_place":
        return ssd_decode_in_place(*given)
    if backend == "reference":
        return ssd_decode_reference(*given, real)
    from mohawk.kernels.decode.triton_backend import ssd_decode_triton

    return _written(window, state, ssd_decode_triton(*given, real))


def delta_decode_step(
    window: Tensor,
    state: Tensor,
    inputs: Tensor,
    gate: Tensor,
    beta: Tensor,
    decay: Tensor,
    *,
    weight: Tensor,
    norm_weight: Tensor,
    bias: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate_activation: str = "silu",
    real: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of a gated delta layer between its projections, for inference; window and state are changed in place.

    window, weight, bias, real, backend: as in `ssd_decode_step`; a SiLU follows the convolution. state: (batch, heads,
    key_dim, value_dim). inputs: (batch, channels), q and k (groups * key_dim each), then v (heads * value_dim), before
    the convolution; q and k are divided by their norms, q by sqrt(key_dim). gate: (batch, heads * value_dim). beta:
    (batch, heads), before its sigmoid. decay: with A_log and dt_bias (heads,) as projected, (batch, heads), for log
    decays -exp(A_log) softplus(decay + dt_bias); without them the log decays, (batch, heads) or (batch, heads,
    key_dim). The output is divided by its root mean square over each head's channels, multiplied by norm_weight
    (value_dim,) and by gate_activation(gate), "silu" or "sigmoid".

    Returns (batch, heads * value_dim) in the dtype of inputs. Computed in float32, or in float64 if state is. Raises
    ValueError for what does not fit.
    """
    where, per_head = "delta_decode_step", (A_log, dt_bias)
    tensors = (window, state, inputs, gate, beta, decay, weight, norm_weight, bias, *per_head)
    fits = _whole(window, state, inputs, tensors[:8], tensors[8:]) and fits_delta(
        window, state, inputs, gate, beta, decay, weight, bias, per_head, norm_weight
    )
    kinds = {(x.dtype, x.device) for x in tensors if x is not None} if fits else set()
    if not (fits and fits_rows(real, state) and usual(kinds, state.device)):
        names = ("window", "state", "inputs", "gate", "beta", "decay", "weight", "norm_weight", "bias", "A_log",
                 "dt_bias")  # fmt: skip
        named = {**dict(zip(names, tensors, strict=True)), "real": real}
        explain(where, named, names[:8], _OF_DELTA)
    if gate_activation not in GATES:
        raise ValueError(f"{where}: gate_activation must be 'silu' or 'sigmoid', got {gate_activation!r}")
    if dt_bias is not None and A_log is None:
        raise ValueError(f"{where}: dt_bias is given without A_log, which it belongs to")
    given = (window, state, inputs, gate, beta, decay, weight, bias, A_log, dt_bias, norm_weight, norm_eps,
             gate_activation == "sigmoid")  # fmt: skip
    backend = _chosen(where, backend, window, state, kinds, real)
    if backend == "c":
        return _written(window, state, delta_decode_c(*given, real))
    if backend == "in_place":
        return delta_decode_in_place(*given)
    if backend == "reference":
        return delta_decode_reference(*given, real)
    from mohawk.kernels.decode.triton_backend import delta_decode_triton

    return _written(window, state, delta_decode_triton(*given, real))


def _whole(window: Tensor, state: Tensor, inputs: Tensor, given: tuple[object, ...], optional: tuple) -> bool:
    """Whether all are tensors, and those that say the sizes have as many dimensions as they should."""
    if not all(isinstance(x, Tensor) for x in given) or not all(x is None or isinstance(x, Tensor) for x in optional):
        return False
    return window.dim() == 3 and state.dim() == 4 and inputs.dim() == 2


def _written(window: Tensor, state: Tensor, y: Tensor) -> Tensor:
    """Tells autograd of what it cannot see: a graph that kept these would have gradients of other values."""
    for changed in (window, state):
        if not changed.is_inference():
            increment_version(changed)
    return y


def _chosen(
    where: str,
    backend: str,
    window: Tensor,
    state: Tensor,
    kinds: set[tuple[torch.dtype, torch.device]],
    real: Tensor | None,
) -> str:
    """The backend that is meant. Raises ValueError where it is none, or cannot take these."""
    if backend not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if state.is_cuda and _no_triton(state) is None:
            return "triton"
        if not state.is_cuda and state.numel() <= MOST and no_c(window, state, kinds) is None:
            return "c"
        return "in_place" if real is None else "reference"
    reason = None
    if backend == "in_place" and real is not None:
        reason = "it knows no padding, and `real` is given"
    elif backend == "c":
        reason = no_c(window, state, kinds)
    elif backend == "triton":
        reason = _no_triton(state)
    if reason is not None:
        raise ValueError(f"{where}: backend {backend!r} can't be used: {reason}; use 'auto'")
    return backend


def _no_triton(state: Tensor) -> str | None:
    if (elements := state.shape[2] * state.shape[3]) > LARGEST:
        return f"a head's state has {elements:,} elements, more than {LARGEST:,}"
    return no_triton(state, TRITON)

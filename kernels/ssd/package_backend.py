"""State-space duality by mamba-ssm's Triton kernels, where that package is installed, for tensors on a GPU.

mamba-ssm's public `mamba_chunk_scan_combined` ties decay and input scale together (both are dt); here they
are two arguments. Its kernels keep them apart, so this calls the kernels that it is made of, in its order,
with the input scale as dt and the log decays summed here. Dividing x by dt instead would need no inside
knowledge, but gradients would be lost under weak decays, and values would overflow.

The kernels' names and arguments are those of mamba-ssm 2.2 to 2.3; the test that compares both needs no GPU.
"""

import os

import torch
from torch import Tensor

from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.common.segments import segment_runs

KERNELS = "mamba_ssm.ops.triton.ssd_combined"  # brings the other modules along
CHUNK = 256  # mamba-ssm's own default
# exp of it is nothing beside 1 in float32; the sums of a chunk, which are float32 too, stay as precise as they can
STRONGEST = -30.0


def refusal(x: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why mamba-ssm's kernels do not take these tensors, in words; None where they do."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {x.device}; it needs a CUDA or ROCm device"
    if x.dtype == torch.float64:
        return "it computes in float32 and x is float64"
    if x.numel() == 0:
        return f"x is empty, {tuple(x.shape)}"
    if B.shape[2] != C.shape[2]:
        return f"B has {B.shape[2]} groups and C {C.shape[2]}; it needs as many in both"
    if B.shape[3] > 256:
        return f"state_size is {B.shape[3]}; it takes at most 256"
    return None


def ssd_mamba(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`, for tensors without a `refusal`. Returns y and the final state."""
    if input_scale is None:
        input_scale = torch.ones_like(log_decay)
    runs = None if segment_ids is None else segment_runs(segment_ids).to(torch.int32)
    D = None if D is None else D.contiguous()
    return _MambaScan.apply(x, log_decay, B.to(x.dtype), C.to(x.dtype), input_scale, D, initial_state, runs)


def _chunked(value_bnh: Tensor, chunk: int) -> Tensor:
    """(b, seq, h) -> (b, h, chunks, chunk) float32, filled up with zeros."""
    batch, seq, heads = value_bnh.shape
    chunks = -(-seq // chunk)
    out = value_bnh.new_zeros(batch, heads, chunks * chunk, dtype=torch.float32)
    out[:, :, :seq] = value_bnh.transpose(1, 2)
    return out.view(batch, heads, chunks, chunk)


def _unchunked(value_bhcq: Tensor, seq: int) -> Tensor:
    return value_bhcq.flatten(2)[:, :, :seq].transpose(1, 2)


class _MambaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, B, C, input_scale, D, initial_state, runs):
        from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_state_passing

        B, C, x = B.contiguous(), C.contiguous(), x.contiguous()
        chunk = min(CHUNK, max(16, 1 << (x.shape[1] - 1).bit_length()))
        sums = _chunked(log_decay.clamp(min=STRONGEST), chunk).cumsum(-1)
        scale = _chunked(input_scale, chunk)
        flat_initial = None if initial_state is None else initial_state.to(torch.float32).flatten(2)
        states = ssd_chunk_state._chunk_state_fwd(B, x, scale, sums, seq_idx=runs, states_in_fp32=True)
        states, final = ssd_state_passing._state_passing_fwd(
            states.flatten(3),
            sums[..., -1],
            initial_states=flat_initial,
            seq_idx=runs,
            chunk_size=chunk,
            out_dtype=C.dtype,
        )
        per_state = (x.shape[3], B.shape[3])
        scores = ssd_bmm._bmm_chunk_fwd(C, B, chunk, seq_idx=runs, output_dtype=torch.float32)
        y, _ = ssd_chunk_scan._chunk_scan_fwd(
            scores, x, scale, sums, C, states.unflatten(3, per_state), D=D, seq_idx=runs
        )
        ctx.save_for_backward(x, log_decay, B, C, input_scale, D, initial_state, runs)
        ctx.chunk = chunk
        return y, final.unflatten(2, per_state)

    @staticmethod
    @first_order("ssd has no second derivative; use backend='reference' for it")
    def backward(ctx, dy, d_final):
        from mamba_ssm.ops.triton import (
            ssd_bmm,
            ssd_chunk_scan,
            ssd_chunk_state,
            ssd_combined,
            ssd_state_passing,
        )

        x, log_decay, B, C, input_scale, D, initial_state, runs = ctx.saved_tensors
        chunk, groups, seq = ctx.chunk, B.shape[2], x.shape[1]
        per_state = (x.shape[3], B.shape[3])
        dy = dy.contiguous()
        sums = _chunked(log_decay.clamp(min=STRONGEST), chunk).cumsum(-1)
        scale = _chunked(input_scale, chunk)
        flat_initial = None if initial_state is None else initial_state.to(torch.float32).flatten(2)
        scores = ssd_bmm._bmm_chunk_fwd(C, B, chunk, seq_idx=runs, output_dtype=torch.float32)
        states = ssd_chunk_state._chunk_state_fwd(B, x, scale, sums, seq_idx=runs, states_in_fp32=True)
        states, _ = ssd_state_passing._state_passing_fwd(
            states.flatten(3), sums[..., -1], initial_states=flat_initial, seq_idx=runs, chunk_size=chunk
        )
        d_states = ssd_chunk_scan._chunk_scan_bwd_dstates(C, sums, dy, seq_idx=runs, dtype=states.dtype)
        d_states, d_chunk_sums, d_initial, states = ssd_state_passing._state_passing_bwd(
            states,
            sums[..., -1],
            d_states.flatten(3),
            dfinal_states=d_final.flatten(2),
            seq_idx=runs,
            has_initial_states=initial_state is not None,
            dstates_dtype=x.dtype,
            states_dtype=x.dtype,
            chunk_size=chunk,
        )
        states, d_states = states.unflatten(3, per_state), d_states.unflatten(3, per_state)
        dx, d_scale, dD = ssd_combined._chunk_scan_chunk_state_bwd_dx(
            x, scale, sums, B, scores, dy, d_states, D=D, seq_idx=runs
        )
        dB_states, d_decay = ssd_chunk_state._chunk_state_bwd_db(
            x, scale, sums, d_states, seq_idx=runs, B=B, ngroups=groups
        )
        dC_states, d_sums = ssd_chunk_scan._chunk_scan_bwd_dC(
            states.to(x.dtype), sums, dy, seq_idx=runs, C=C, ngroups=groups
        )
        d_scores = ssd_chunk_scan._chunk_scan_bwd_dcb(x, scale, sums, dy, seq_idx=runs, ngroups=groups)
        d_scores = d_scores.to(scores.dtype)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        ssd_bmm._bmm_chunk_bwd(C, d_scores, residual=dB_states, out=dB)
        ssd_bmm._bmm_chunk_bwd(B, d_scores.transpose(-1, -2), residual=dC_states, out=dC)
        d_sums[..., -1] += d_chunk_sums
        d_decay = d_decay + d_sums.flip(-1).cumsum(-1).flip(-1)
        d_decay += ssd_chunk_scan._chunk_scan_bwd_ddAcs_stable(x, scale, sums, dy, scores)
        return (
            dx,
            _unchunked(d_decay, seq).to(log_decay.dtype),
            dB,
            dC,
            _unchunked(d_scale, seq).to(input_scale.dtype),
            dD,
            None if initial_state is None else d_initial.unflatten(2, per_state).to(initial_state.dtype),
            None,
        )

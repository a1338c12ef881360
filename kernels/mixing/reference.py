"""Mixing matrices and their distance by definition: whole matrices, torch's autograd, in up to float64."""

import torch
from torch import Tensor

from mohawk.kernels.common.segments import decays_with_resets, segment_runs
from mohawk.kernels.mixing.metrics import METRICS
from mohawk.kernels.mixing.operands import AttentionMixing, DeltaMixing, Mixing, SSDMixing

BACKEND = "reference"  # as `mohawk doctor` names it


def dense_matrix(mixing: Mixing) -> Tensor:
    """(batch, heads, seq, seq) in float64 for float64 inputs, else float32. Differentiable."""
    if isinstance(mixing, AttentionMixing):
        return _dense_attention(mixing, log=False)
    return _dense_ssd(mixing) if isinstance(mixing, SSDMixing) else _dense_delta(mixing)


def _compute_dtype(mixing: Mixing) -> torch.dtype:
    wide = any(value is not None and value.dtype == torch.float64 for value in mixing.tensors)
    return torch.float64 if wide else torch.float32


def _dense_attention(mixing: AttentionMixing, log: bool) -> Tensor:
    compute = _compute_dtype(mixing)
    _, heads, seq = mixing.shape
    k = mixing.k.to(compute).repeat_interleave(heads // mixing.k.shape[1], dim=1)
    scores = (mixing.q.to(compute) * mixing.resolved_scale()) @ k.transpose(-1, -2)
    if mixing.softcap is not None:
        scores = mixing.softcap * torch.tanh(scores / mixing.softcap)
    index = torch.arange(seq, device=scores.device)
    back = index.unsqueeze(1) - index
    hidden = back < 0 if mixing.causal else torch.zeros_like(back, dtype=torch.bool)
    if mixing.window is not None:
        hidden = hidden | (back.abs() >= mixing.window)
    if mixing.segment_ids is not None:
        runs = segment_runs(mixing.segment_ids)
        hidden = hidden | (runs.unsqueeze(2) != runs.unsqueeze(1)).unsqueeze(1)
    scores = scores.masked_fill(hidden, -1e30)  # finite, so that log-probabilities have no NaN
    return torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)


def _dense_ssd(mixing: SSDMixing) -> Tensor:
    compute = _compute_dtype(mixing)
    _, heads, seq = mixing.shape
    C, B = (value.to(compute).transpose(1, 2) for value in (mixing.C, mixing.B))
    C = C.repeat_interleave(heads // C.shape[1], dim=1)
    B = B.repeat_interleave(heads // B.shape[1], dim=1)
    sums = decays_with_resets(mixing.log_decay, mixing.segment_ids).cumsum(1).transpose(1, 2)
    visible = torch.ones(seq, seq, dtype=torch.bool, device=C.device).tril()
    decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~visible, float("-inf")).to(compute).exp()
    matrix = (C @ B.transpose(-1, -2)) * decay
    if mixing.input_scale is not None:
        matrix = matrix * mixing.input_scale.to(compute).transpose(1, 2).unsqueeze(-2)
    if mixing.D is not None:
        eye = torch.eye(seq, dtype=compute, device=C.device)
        matrix = matrix + mixing.D.to(compute)[:, None, None] * eye
    return matrix


def _dense_delta(mixing: DeltaMixing) -> Tensor:
    """Row by row: what earlier tokens have written, as the row's token leaves it, seen by its query."""
    compute = _compute_dtype(mixing)
    batch, heads, seq = mixing.shape
    decay = decays_with_resets(mixing.log_decay, mixing.segment_ids).to(compute).exp()
    decay = (decay if decay.dim() == 4 else decay.unsqueeze(-1)).transpose(1, 2)
    q, k = (value.to(compute).transpose(1, 2) for value in (mixing.q, mixing.k))
    writes = mixing.beta.to(compute).transpose(1, 2).unsqueeze(-1) * k
    written = k[:, :, :0]  # (b, h, tokens so far, d)
    rows = [q[:, :, :0] @ k.mT]
    for t in range(seq):
        written = decay[:, :, t : t + 1] * written
        written = written - (written @ k[:, :, t, :, None]) * writes[:, :, t : t + 1]
        written = torch.cat((written, writes[:, :, t : t + 1]), 2)
        row = (written @ q[:, :, t, :, None]).transpose(2, 3)
        rows.append(torch.nn.functional.pad(row, (0, seq - t - 1)))
    return torch.cat(rows, 2)


def distance_reference(student: Mixing, teacher: Mixing, metric: str) -> Tensor:
    """(batch, heads) distances, heads the larger of the two head counts."""
    heads = max(student.shape[1], teacher.shape[1])
    seq = student.shape[2]
    real = None
    for ids in (student.segment_ids, teacher.segment_ids):
        if ids is not None:
            real = (ids >= 0) if real is None else real & (ids >= 0)
    with torch.autocast(student.tensors[0].device.type, enabled=False):
        if metric == "kl":
            assert isinstance(student, AttentionMixing) and isinstance(teacher, AttentionMixing)
            log_s, log_a = (_dense_attention(mixing, log=True) for mixing in (student, teacher))
            log_s, log_a = (value.repeat_interleave(heads // value.shape[1], 1) for value in (log_s, log_a))
            rows = (log_a.exp() * (log_a - log_s)).sum(-1)
            if real is None:
                return rows.mean(-1)
            return (rows * real.unsqueeze(1)).sum(-1) / real.sum(-1).clamp(min=1).unsqueeze(1)
        s, a = (
            value.repeat_interleave(heads // value.shape[1], 1)
            for value in (dense_matrix(student), dense_matrix(teacher))
        )
        if real is not None:
            both = (real.unsqueeze(2) & real.unsqueeze(1)).unsqueeze(1)
            s, a = s * both, a * both
        tokens = max(1, seq) if real is None else real.sum(-1, keepdim=True).clamp(min=1).to(s.dtype)
        return METRICS[metric].definition(s, a, tokens)

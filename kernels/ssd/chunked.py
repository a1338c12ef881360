"""State-space duality in chunks (arXiv 2405.21060, section 6), in torch, with the backward written out.

Inside a chunk the scan is a masked matrix product; between chunks a state of head_dim x state_size is
carried. The backward keeps the inputs and the state entering each chunk and makes the rest again. Work goes
block by block (some heads of some batch rows, the whole sequence), so temporaries stay in the cache and
memory is linear in seq.

Letters after an underscore: b batch, h heads, g groups, c chunks, q tokens of a chunk, p head dim, N state
size. Everything inside is float32 or wider: bfloat16 inputs are widened, and only results are rounded back.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels.common.decays import decay_between, sums_before, sums_from
from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.common.segments import decays_with_resets, group_slice, head_blocks

BACKEND = "chunked"  # as `mohawk doctor` names it

# Tokens per chunk: 64 balances the products inside chunks (seq * chunk) with those through states (seq *
# state_size).
CHUNK = 64
# Elements of one operand (seq * head_dim for some heads) worked on at a time: a few MB per temporary.
BLOCK_ELEMENTS = 1 << 19


def ssd_chunked(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `mohawk.kernels.ssd.interface.ssd`. Returns y in x's dtype and the final state."""
    y, final_state = _ChunkedScan.apply(x, log_decay, B, C, input_scale, D, initial_state, segment_ids)
    if torch.compiler.is_compiling():
        # y is filled block by block; traced without gradients it gets the strides of a block, which later views of it
        # do not fit ("Cannot view a tensor ..."). A copy is a tensor of its own.
        y = y.clone(memory_format=torch.contiguous_format)
    return y, final_state


@dataclass(frozen=True)
class _Shape:
    """One block of the work: batch rows and heads as slices, and how the sequence is cut."""

    rows: slice
    heads: slice
    groups_B: slice
    groups_C: slice
    seq: int
    chunk: int
    chunks: int
    state_dtype: torch.dtype  # of everything inside: bfloat16 comes in and goes out only


def _blocks(x: Tensor, B: Tensor, C: Tensor) -> list[_Shape]:
    batch, seq, heads, head_dim = x.shape
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chunk = min(CHUNK, seq)
    per_head = max(1, seq * max(head_dim, B.shape[3], chunk))
    head_ranges = head_blocks(heads, (B.shape[2], C.shape[2]), max(1, BLOCK_ELEMENTS // per_head))
    width = head_ranges[0][1] - head_ranges[0][0]
    rows = max(1, BLOCK_ELEMENTS // (per_head * width))
    return [
        _Shape(
            slice(row, min(row + rows, batch)),
            slice(start, stop),
            group_slice(start, stop, heads, B.shape[2]),
            group_slice(start, stop, heads, C.shape[2]),
            seq,
            chunk,
            -(-seq // chunk),
            state_dtype,
        )
        for row in range(0, batch, rows)
        for start, stop in head_ranges
    ]


def _inside_groups(shape: _Shape, groups: int, heads: int) -> bool:
    """Whether several blocks add to one group's gradient."""
    return shape.heads.stop - shape.heads.start < heads // groups


def _empty_gradient(value: Tensor, blocks: list[_Shape], wide: torch.dtype) -> Tensor:
    """Where B's or C's gradient goes: written once by each block in its own dtype, or added up in a wider one."""
    heads = max((block.heads.stop for block in blocks), default=0)
    if blocks and not _inside_groups(blocks[0], value.shape[2], heads):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return torch.zeros(value.shape, dtype=wide, device=value.device)


def _chunked(value: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    """(b, seq, h, f) -> (b, h, c, q, f) contiguous, the last chunk filled up with zeros."""
    batch, seq, heads, width = value.shape
    padded = shape.chunks * shape.chunk
    out = torch.empty(batch, heads, padded, width, dtype=dtype, device=value.device)
    out[:, :, :seq] = value.transpose(1, 2)
    if padded > seq:
        out[:, :, seq:] = 0
    return out.view(batch, heads, shape.chunks, shape.chunk, width)


def _unchunked(value_bhcqf: Tensor, seq: int) -> Tensor:
    """(b, h, c, q, f) -> a view (b, seq, h, f)."""
    return value_bhcqf.flatten(2, 3)[:, :, :seq].transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over the last two dimensions; the leading ones are equal and contiguous."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _over_heads(value_bgcqN: Tensor, weight_bhcq: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of each group's operand times each head's weights: (b, h, c, q, N)."""
    batch, groups, chunks, chunk, width = value_bgcqN.shape
    heads = weight_bhcq.shape[1]
    weight = weight_bhcq.view(batch, groups, heads // groups, chunks, chunk, 1).to(dtype)
    return (value_bgcqN.unsqueeze(2) * weight).reshape(batch, heads, chunks, chunk, width)


def _repeated(value: Tensor, groups: int) -> Tensor:
    return value if value.shape[1] == groups else value.repeat_interleave(groups // value.shape[1], dim=1)


def _to_groups(value: Tensor, groups: int) -> Tensor:
    """Sum over the heads (or finer groups) of each group, dimension 1."""
    if value.shape[1] == groups:
        return value
    return value.unflatten(1, (groups, -1)).sum(2)


class _Operands:
    """What forward and backward both need of one block."""

    def __init__(
        self,
        shape: _Shape,
        x: Tensor,
        decays: Tensor,
        B: Tensor,
        C: Tensor,
        input_scale: Tensor | None,
    ) -> None:
        rows, heads = shape.rows, shape.heads
        value = x[rows, :, heads]
        if input_scale is not None:
            value = value.to(shape.state_dtype) * input_scale[rows, :, heads].unsqueeze(-1)
        self.x_bhcqp = _chunked(value, shape, shape.state_dtype)
        self.B_bgcqN = _chunked(B[rows, :, shape.groups_B], shape, shape.state_dtype)
        self.C_bgcqN = _chunked(C[rows, :, shape.groups_C], shape, shape.state_dtype)
        sums = _chunked(decays[rows, :, heads].unsqueeze(-1), shape, torch.float64).squeeze(-1).cumsum(-1)
        total = sums[..., -1:]
        self.from_start_bhcq = sums.exp().to(shape.state_dtype)
        self.to_end_bhcq = (total - sums).exp().to(shape.state_dtype)
        self.across_bhc = self.from_start_bhcq[..., -1]

        self.decay_bhcqq = decay_between(sums, shape.state_dtype)

        # C B^T once for each pair of groups that meet in a head.
        groups = math.lcm(self.B_bgcqN.shape[1], self.C_bgcqN.shape[1])
        self.B_pairs = _repeated(self.B_bgcqN, groups)
        self.C_pairs = _repeated(self.C_bgcqN, groups)
        scores = _product(self.C_pairs, self.B_pairs.transpose(-1, -2))
        self.groups = groups
        by_group = self.decay_bhcqq.unflatten(1, (groups, -1))
        self.mixing_bhcqq = torch.empty_like(self.decay_bhcqq, dtype=shape.state_dtype)
        torch.mul(by_group, scores.unsqueeze(2), out=self.mixing_bhcqq.unflatten(1, (groups, -1)))

    def decayed_B(self, shape: _Shape) -> Tensor:
        return _over_heads(self.B_bgcqN, self.to_end_bhcq, shape.state_dtype)

    def decayed_C(self, shape: _Shape) -> Tensor:
        return _over_heads(self.C_bgcqN, self.from_start_bhcq, shape.state_dtype)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, B, C, input_scale, D, initial_state, segment_ids):
        batch, seq, heads, head_dim = x.shape
        state_size = B.shape[3]
        state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.zeros(batch, heads, head_dim, state_size, dtype=state_dtype, device=x.device)
        if initial_state is not None:
            final.copy_(initial_state)
        entering = None
        if x.numel():
            decays = decays_with_resets(log_decay, segment_ids)
            with torch.autocast(x.device.type, enabled=False):
                blocks = _blocks(x, B, C)
                entering = torch.empty(
                    batch,
                    heads,
                    blocks[0].chunks,
                    head_dim,
                    state_size,
                    dtype=blocks[0].state_dtype,
                    device=x.device,
                )
                for block in blocks:
                    _forward_block(block, x, decays, B, C, input_scale, D, y, final, entering)
        ctx.save_for_backward(x, log_decay, B, C, input_scale, D, segment_ids, entering)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order("ssd has no second derivative; use backend='reference' for it")
    def backward(ctx, dy, d_final):
        x, log_decay, B, C, input_scale, D, segment_ids, entering = ctx.saved_tensors
        state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if dy is None:
            dy = torch.zeros_like(x)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        blocks = _blocks(x, B, C) if x.numel() else []
        d_decay = torch.zeros(log_decay.shape, dtype=log_decay.dtype, device=x.device)
        dB, dC = _empty_gradient(B, blocks, state_dtype), _empty_gradient(C, blocks, state_dtype)
        d_scale = None if input_scale is None else torch.zeros(x.shape[:3], dtype=state_dtype, device=x.device)
        d_initial = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=state_dtype, device=x.device)
        if d_final is not None:
            d_initial.copy_(d_final)
        dD = None
        if x.numel():
            decays = decays_with_resets(log_decay, segment_ids)
            with torch.autocast(x.device.type, enabled=False):
                for block in blocks:
                    _backward_block(
                        block,
                        x,
                        decays,
                        B,
                        C,
                        input_scale,
                        D,
                        entering,
                        dy,
                        d_initial,
                        dx,
                        d_decay,
                        dB,
                        dC,
                        d_scale,
                    )
        if D is not None:
            dD = torch.zeros(D.shape, dtype=torch.float64, device=x.device)
            for row in range(x.shape[0]):
                dD += (dy[row].to(state_dtype) * x[row]).sum(-1).sum(0, dtype=torch.float64)
            dD = dD.to(D.dtype)
        return (
            dx,
            d_decay,
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if d_scale is None else d_scale.to(input_scale.dtype),
            dD,
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            None,
        )


def _forward_block(
    shape: _Shape,
    x: Tensor,
    decays: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    y: Tensor,
    final: Tensor,
    entering: Tensor,
) -> None:
    """Fill this block's part of y, of the entering states and of `final`, which holds the initial state."""
    rows, heads = shape.rows, shape.heads
    ops = _Operands(shape, x, decays, B, C, input_scale)
    y_bhcqp = _product(ops.mixing_bhcqq, ops.x_bhcqp)
    added_bhcpN = _product(ops.x_bhcqp.transpose(-1, -2), ops.decayed_B(shape))

    state = final[rows, heads]
    enter_bhcpN = entering[rows, heads]
    across = ops.across_bhc[..., None, None]
    for c in range(shape.chunks):
        enter_bhcpN[:, :, c] = state
        state = torch.addcmul(added_bhcpN[:, :, c].to(shape.state_dtype), state, across[:, :, c])
    final[rows, heads] = state

    enter_flat = enter_bhcpN.flatten(0, 2)
    y_bhcqp.flatten(0, 2).baddbmm_(ops.decayed_C(shape).flatten(0, 2), enter_flat.transpose(1, 2))
    result = _unchunked(y_bhcqp, shape.seq)
    if D is None:
        y[rows, :, heads] = result
    else:
        torch.addcmul(result, x[rows, :, heads], D[heads].unsqueeze(-1), out=y[rows, :, heads])


def _backward_block(
    shape: _Shape,
    x: Tensor,
    decays: Tensor,
    B: Tensor,
    C: Tensor,
    input_scale: Tensor | None,
    D: Tensor | None,
    entering: Tensor,
    dy: Tensor,
    d_state: Tensor,
    dx: Tensor,
    d_decay: Tensor,
    dB: Tensor,
    dC: Tensor,
    d_scale: Tensor | None,
) -> None:
    """Fill this block's gradients; d_state holds the final state's and receives the initial state's."""
    rows, heads, wide = shape.rows, shape.heads, shape.state_dtype
    ops = _Operands(shape, x, decays, B, C, input_scale)
    dy_bhcqp = _chunked(dy[rows, :, heads], shape, shape.state_dtype)
    enter_bhcpN = entering[rows, heads]
    B_bhcqN, C_bhcqN = ops.decayed_B(shape), ops.decayed_C(shape)

    # Between chunks: the gradient of the state leaving each chunk, from the last chunk to the first.
    dC_bhcqN = _product(dy_bhcqp, enter_bhcpN)
    from_output_bhcpN = _product(dy_bhcqp.transpose(-1, -2), C_bhcqN)
    leaving_bhcpN = torch.empty_like(enter_bhcpN)
    carry = d_state[rows, heads]
    across = ops.across_bhc[..., None, None]
    d_across_bhc = torch.empty_like(ops.across_bhc)
    for c in range(shape.chunks - 1, -1, -1):
        leaving_bhcpN[:, :, c] = carry
        d_across_bhc[:, :, c] = (enter_bhcpN[:, :, c] * carry).sum((-1, -2))
        carry = torch.addcmul(from_output_bhcpN[:, :, c].to(wide), carry, across[:, :, c])
    d_state[rows, heads] = carry
    dB_bhcqN = _product(ops.x_bhcqp, leaving_bhcpN)

    # Inside chunks. An entry's gradient raises the sum of decays at its row and lowers it at its column. The
    # diagonal has no decay: left in, its rounding would drown the small entries that strong decays leave.
    dx_bhcqp = _product(ops.mixing_bhcqq.transpose(-1, -2), dy_bhcqp)
    d_mixing = _product(dy_bhcqp, ops.x_bhcqp.transpose(-1, -2))
    weighted = d_mixing * ops.mixing_bhcqq
    weighted.diagonal(dim1=-2, dim2=-1).zero_()
    through_mixing = weighted.sum(-1, dtype=torch.float64) - weighted.sum(-2, dtype=torch.float64)
    d_scores = ops.decay_bhcqq.mul_(d_mixing)
    d_scores = _to_groups(d_scores, ops.groups).to(shape.state_dtype)
    dC_pairs = _product(d_scores, ops.B_pairs)
    dB_pairs = _product(d_scores.transpose(-1, -2), ops.C_pairs)

    dx_bhcqp.flatten(0, 2).baddbmm_(B_bhcqN.flatten(0, 2), leaving_bhcpN.flatten(0, 2).transpose(1, 2))
    from_earlier = (C_bhcqN * dC_bhcqN).sum(-1, dtype=wide)
    to_later = (B_bhcqN * dB_bhcqN).sum(-1, dtype=wide)
    d_sums = through_mixing + from_earlier
    later = to_later.to(torch.float64)
    d_decay_bhcq = sums_from(d_sums) + sums_before(later)
    d_decay_bhcq += (d_across_bhc * ops.across_bhc).unsqueeze(-1)
    d_decay[rows, :, heads] = _unchunked(d_decay_bhcq.unsqueeze(-1), shape.seq).squeeze(-1)

    for total, pairs, by_head, weight, groups, value in (
        (dB, dB_pairs, dB_bhcqN, ops.to_end_bhcq, shape.groups_B, ops.B_bgcqN),
        (dC, dC_pairs, dC_bhcqN, ops.from_start_bhcq, shape.groups_C, ops.C_bgcqN),
    ):
        count = value.shape[1]
        if by_head.shape == pairs.shape == value.shape:
            gathered = torch.addcmul(pairs, by_head, weight.unsqueeze(-1))
        else:
            gathered = _to_groups(by_head * weight.unsqueeze(-1), count)
            gathered += _to_groups(pairs, count)
        if _inside_groups(shape, total.shape[2], x.shape[2]):
            total[rows, :, groups] += _unchunked(gathered, shape.seq)
        else:
            total[rows, :, groups] = _unchunked(gathered, shape.seq)

    d_scaled = _unchunked(dx_bhcqp, shape.seq)
    if input_scale is not None and d_scale is not None:
        d_scaled = d_scaled.to(wide)
        d_scale[rows, :, heads] = (d_scaled * x[rows, :, heads]).sum(-1)
        d_scaled = d_scaled * input_scale[rows, :, heads].unsqueeze(-1)
    if D is None:
        dx[rows, :, heads] = d_scaled
    else:
        torch.addcmul(d_scaled, dy[rows, :, heads], D[heads].unsqueeze(-1), out=dx[rows, :, heads])

"""The gated delta rule in chunks, in torch, with the backward written out.

Inside a chunk the rule is a masked matrix product (common/delta_chunks.py); between chunks a state of key_dim x
value_dim is carried. The backward keeps the inputs and the state entering each chunk and makes the rest again. Work
goes block by block (some heads of some batch rows, the whole sequence), so memory is linear in seq.

Letters after an underscore: c chunks, r heads of batch rows, g both of them in this order, t tokens of a chunk, d key
channels, p value channels. Everything inside is float32 or wider: bfloat16 inputs are widened, and only results are
rounded back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels.common.delta_chunks import DeltaChunks, chunk_length
from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.common.segments import decays_with_resets

BACKEND = "chunked"  # as `mohawk doctor` names it

# Tokens per chunk: 64 balances the products inside chunks (seq * chunk) with those through states (seq * channels).
# On a CPU 32 take a seventh less time with 64 channels and as much with 128, and an eighth more memory, for twice as
# many states; on a GPU they are twice as many steps, one after the other.
CHUNKS = {"cpu": 32}
CHUNK = 64  # elsewhere
# Elements of one operand (seq * channels for some heads) worked on at a time: a MB, of which there are dozens.
BLOCK_ELEMENTS = 1 << 18


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `mohawk.kernels.delta.interface.gated_delta_rule`. Returns y in v's dtype and the final state."""
    y, final_state = _ChunkedRule.apply(q, k, v, beta, log_decay, initial_state, segment_ids)
    if torch.compiler.is_compiling():
        y = y.clone(memory_format=torch.contiguous_format)  # as in ssd/chunked.py
    return y, final_state


@dataclass(frozen=True)
class _Block:
    rows: slice  # of the batch
    heads: slice
    dtype: torch.dtype  # of everything inside

    def of(self, value: Tensor) -> Tensor:
        return value[self.rows, :, self.heads]


def _chunk(k: Tensor) -> int:
    return chunk_length(k.shape[1], CHUNKS.get(k.device.type, CHUNK))


def _blocks(k: Tensor, v: Tensor) -> list[_Block]:
    batch, seq, heads, width = k.shape
    if not (k.numel() or v.numel()) or not seq:
        return []
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    per_head = seq * max(width, v.shape[3], _chunk(k))
    some = max(1, min(heads, BLOCK_ELEMENTS // per_head))
    rows = max(1, BLOCK_ELEMENTS // (per_head * some))
    return [
        _Block(slice(row, min(row + rows, batch)), slice(head, min(head + some, heads)), dtype)
        for row in range(0, batch, rows)
        for head in range(0, heads, some)
    ]


class _Operands:
    """What forward and backward both need of one block."""

    def __init__(self, block: _Block, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, ids) -> None:
        chunk = _chunk(k)

        def cut(value: Tensor) -> Tensor:
            return _cut(block.of(value), chunk, block.dtype)

        decays = decays_with_resets(block.of(log_decay), None if ids is None else ids[block.rows])
        sums = _cut(decays, chunk, torch.float64).cumsum(1)
        self.inside = DeltaChunks(cut(q), cut(k), cut(beta), sums if sums.dim() == 3 else sums.unsqueeze(-1))
        self.v_gtp = cut(v)
        self.across_gd1 = self.inside.across.unsqueeze(-1)
        self.chunks = -(-k.shape[1] // chunk)

    def by_chunk(self, value_g: Tensor) -> Tensor:
        return value_g.unflatten(0, (self.chunks, -1))

    def updates(self) -> Tensor:
        """(c, r, t, p) what the tokens add along their keys, as if the states entering the chunks were 0."""
        return self.by_chunk(torch.bmm(self.inside.writes, self.v_gtp))


class _ChunkedRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, initial_state, segment_ids):
        batch, _, heads, width = k.shape
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        final = torch.zeros(batch, heads, width, v.shape[3], dtype=dtype, device=v.device)
        if initial_state is not None:
            final.copy_(initial_state)
        states = []
        with torch.autocast(v.device.type, enabled=False):
            for block in _blocks(k, v):
                ops = _Operands(block, q, k, v, beta, log_decay, segment_ids)
                states.append(_forward_block(block, ops, y, final))
        ctx.save_for_backward(q, k, v, beta, log_decay, segment_ids, *states)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order("gated_delta_rule has no second derivative; use backend='reference' for it")
    def backward(ctx, dy, d_final):
        q, k, v, beta, log_decay, segment_ids, *states = ctx.saved_tensors
        gradients = [torch.empty_like(value) for value in (q, k, v, beta, log_decay)]
        shape = (k.shape[0], *k.shape[2:], v.shape[3])
        d_state = torch.zeros(shape, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
        if d_final is not None:
            d_state.copy_(d_final)
        if dy is None:
            dy = torch.zeros_like(v)
        with torch.autocast(v.device.type, enabled=False):
            for block, entering in zip(_blocks(k, v), states, strict=True):
                ops = _Operands(block, q, k, v, beta, log_decay, segment_ids)
                _backward_block(block, ops, entering, dy, d_state, gradients)
        return *gradients, None if ctx.initial_dtype is None else d_state.to(ctx.initial_dtype), None


def _forward_block(block: _Block, ops: _Operands, y: Tensor, final: Tensor) -> Tensor:
    """Fill this block's part of y and of `final`, which holds the initial state. Returns (g, d, p) the states that
    enter the chunks."""
    inside, own = ops.inside, final[block.rows, block.heads]
    updates_crtp = ops.updates()
    erases_crtd, k_crtd, across_crd1 = (ops.by_chunk(x) for x in (inside.erases, inside.k_to_end, ops.across_gd1))
    states = final.new_empty(ops.chunks + 1, *updates_crtp.shape[1:2], *own.shape[2:])
    states[0] = own.flatten(0, 1)
    for c in range(ops.chunks):
        updates_crtp[c].baddbmm_(erases_crtd[c], states[c], alpha=-1)
        torch.mul(states[c], across_crd1[c], out=states[c + 1])
        states[c + 1].baddbmm_(k_crtd[c].mT, updates_crtp[c])
    own.copy_(states[-1].view_as(own))

    enter_gdp = states[:-1].flatten(0, 1)
    y_gtp = torch.bmm(inside.scores, updates_crtp.flatten(0, 1))
    y_gtp.baddbmm_(inside.q_from_start, enter_gdp)
    _uncut(block.of(y), y_gtp)
    return enter_gdp


def _backward_block(
    block: _Block, ops: _Operands, enter_gdp: Tensor, dy: Tensor, d_state: Tensor, gradients: list[Tensor]
) -> None:
    """Fill this block's gradients; d_state holds the final state's and receives the initial state's."""
    inside, own = ops.inside, d_state[block.rows, block.heads]
    dy_gtp = _cut(block.of(dy), inside.k.shape[1], block.dtype)

    # Between chunks: the gradient of the state leaving each chunk, from the last chunk to the first.
    d_updates_crtp = ops.by_chunk(torch.bmm(inside.scores.mT, dy_gtp))
    erases_crtd, k_crtd, across_crd1 = (ops.by_chunk(x) for x in (inside.erases, inside.k_to_end, ops.across_gd1))
    d_states = enter_gdp.new_empty(ops.chunks + 1, *d_updates_crtp.shape[1:2], *own.shape[2:])
    d_states[-1] = own.flatten(0, 1)
    torch.bmm(inside.q_from_start.mT, dy_gtp, out=d_states[:-1].flatten(0, 1))
    for c in range(ops.chunks - 1, -1, -1):
        d_updates_crtp[c].baddbmm_(k_crtd[c], d_states[c + 1])
        d_states[c].addcmul_(across_crd1[c], d_states[c + 1])
        d_states[c].baddbmm_(erases_crtd[c].mT, d_updates_crtp[c], alpha=-1)
    own.copy_(d_states[0].view_as(own))

    updates_gtp = ops.updates().flatten(0, 1).baddbmm_(inside.erases, enter_gdp, alpha=-1)
    d_updates_gtp, leaving_gdp = d_updates_crtp.flatten(0, 1), d_states[1:].flatten(0, 1)
    _uncut(block.of(gradients[2]), torch.bmm(inside.writes.mT, d_updates_gtp))
    dq, dk, d_beta, d_decay = inside.gradients(
        d_scores=torch.bmm(dy_gtp, updates_gtp.mT),
        d_writes=torch.bmm(d_updates_gtp, ops.v_gtp.mT),
        d_erases=torch.bmm(d_updates_gtp, enter_gdp.mT).neg_(),
        d_q_from_start=torch.bmm(dy_gtp, enter_gdp.mT),
        d_k_to_end=torch.bmm(updates_gtp, leaving_gdp.mT),
        d_across=leaving_gdp.mul_(enter_gdp).sum(-1),  # the states' gradients have been read
    )
    for place, value in ((0, dq), (1, dk), (3, d_beta), (4, d_decay)):
        _uncut(block.of(gradients[place]), value)


def _cut(value_bnh: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(batch, seq, heads, ...) into (g, t, ...), contiguous, the last chunk filled up with zeros: tokens that neither
    decay nor write nor read."""
    batch, seq, heads, *rest = value_bnh.shape
    out = torch.empty(-(-seq // chunk), batch, heads, chunk, *rest, dtype=dtype, device=value_bnh.device)
    for part, (value, tokens) in _chunkwise(out, value_bnh):
        part[:, :, :, :tokens] = value
        part[:, :, :, tokens:] = 0
    return out.flatten(0, 2)


def _uncut(out_bnh: Tensor, value_gt: Tensor) -> None:
    """(g, t, ...) into (batch, seq, heads, ...)."""
    batch, seq, heads, *rest = out_bnh.shape
    chunk = value_gt.shape[1]
    whole = value_gt.view(-(-seq // chunk), batch, heads, chunk, *rest)
    for part, (out, tokens) in _chunkwise(whole, out_bnh):
        out.copy_(part[:, :, :, :tokens])


def _chunkwise(cut_cbht: Tensor, whole_bnh: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, int]]]:
    """The full chunks, then the one that is not, if any: of what is cut, and the same tokens of the whole, seen as
    (c, batch, heads, tokens, ...), with how many these are in a chunk."""
    chunk, seq = cut_cbht.shape[3], whole_bnh.shape[1]
    full = seq // chunk
    for first, last, tokens in ((0, full, chunk), (full, full + 1, seq % chunk)):
        if last > first and tokens:
            some = whole_bnh[:, first * chunk : first * chunk + (last - first) * tokens]
            seen = some.unflatten(1, (last - first, tokens)).transpose(0, 1).transpose(2, 3)
            yield cut_cbht[first:last], (seen, tokens)

"""The gated delta rule inside chunks of tokens, with gradients by hand: what its scan and its mixing matrices share.

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,    y_t = S_t^T q_t

with one decay for all channels of a head (Gated Delta Networks, arXiv 2412.06464) or one for each (Kimi Linear, arXiv
2510.26692). Take a chunk's tokens as rows of Q, K and V, and the state S in front of it. With `.` a product entry by
entry and decays as factors between two tokens, from the chunk's start or to its end,

    scores = tril(Q K^T . decays)             overlaps = tril(K K^T . decays)
    writes = (I + diag(beta) tril(overlaps, -1))^-1 diag(beta)       erases = writes (K . from_start)

the rule is a product of matrices (the WY form of DeltaNet, arXiv 2406.06484): the tokens add to the state, each along
its key, `U = writes V - erases S`, so that

    Y = (Q . from_start) S + scores U,    the state behind the chunk = diag(across) S + (K . to_end)^T U

All exponents are sums of log decays, at most 0 where those are. Letters: g chunks, t tokens of a chunk (a power of 2),
d channels, s operands beside each other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mohawk.kernels.common.decays import decay_between, sums_before, sums_from


def chunk_length(seq: int, most: int) -> int:
    """`most`, a power of 2, or for less the power of 2 that holds the sequence."""
    return min(most, 1 << max(0, seq - 1).bit_length())


def padded(value_bhn: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(batch, heads, seq, ...) -> (batch, heads, chunks, chunk, ...), contiguous, the last chunk filled up with zeros:
    tokens that neither decay nor write nor read."""
    batch, heads, seq, *rest = value_bhn.shape
    chunks = -(-seq // chunk)
    out = torch.empty(batch, heads, chunks * chunk, *rest, dtype=dtype, device=value_bhn.device)
    out[:, :, :seq] = value_bhn
    out[:, :, seq:] = 0
    return out.view(batch, heads, chunks, chunk, *rest)


def check_gates(where: str, k: Tensor, beta: Tensor, log_decay: Tensor) -> None:
    """Raises ValueError, from `where`, unless beta and log_decay fit k, (batch, seq, heads, d)."""
    per_head, per_channel = tuple(k.shape[:3]), tuple(k.shape)
    if tuple(beta.shape) != per_head:
        raise ValueError(f"{where}: beta must be (batch, seq, heads) = {per_head}, got {tuple(beta.shape)}")
    if tuple(log_decay.shape) not in (per_head, per_channel):
        raise ValueError(
            f"{where}: log_decay must be (batch, seq, heads) = {per_head} or, for a decay of each channel, that and "
            f"the channels of k = {per_channel}, got {tuple(log_decay.shape)}"
        )


class DeltaChunks:
    """The matrices above for many chunks at once.

    q, k: (g, t, d), beta: (g, t), all of one dtype; sums: (g, t, 1) or (g, t, d) float64 cumulative log decays from the
    start of each chunk.
    """

    def __init__(self, q: Tensor, k: Tensor, beta: Tensor, sums: Tensor) -> None:
        self.q, self.k, self.beta, self.sums = q, k, beta, sums
        self.from_start = sums.exp().to(k.dtype)
        self.to_end = (sums[:, -1:] - sums).exp().to(k.dtype)
        self.across = self.from_start[:, -1]  # (g, 1 or d)
        self.q_from_start, self.k_from_start = q * self.from_start, k * self.from_start
        self.k_to_end = k * self.to_end
        if sums.shape[-1] == 1:
            self.decay = decay_between(sums.squeeze(-1), k.dtype)
            self.scores = torch.bmm(q, k.mT).mul_(self.decay)
            self.overlaps = torch.bmm(k, k.mT).mul_(self.decay)
        else:
            self.scores, self.overlaps = _decayed_products(torch.stack((q, k), 1), k, sums).unbind(1)
        eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
        lower = beta.unsqueeze(-1) * self.overlaps  # of which the solver reads what is below the diagonal
        self.inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
        self.writes = self.inverse * beta.unsqueeze(1)
        self.erases = torch.bmm(self.writes, self.k_from_start)

    def gradients(
        self,
        d_scores: Tensor,
        d_writes: Tensor,
        d_erases: Tensor,
        d_q_from_start: Tensor,
        d_k_to_end: Tensor,
        d_across: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, beta and the log decays, (g, t, 1 or d), from the matrices' (d_across: (g, d))."""
        d_k_from_start = torch.bmm(self.writes.mT, d_erases)
        through = torch.bmm(self.inverse.mT, torch.baddbmm(d_writes, d_erases, self.k_from_start.mT))
        d_lower = torch.bmm(through, self.writes.mT).mul_(-torch.ones_like(through[0]).tril_(-1))
        d_beta = through.diagonal(dim1=1, dim2=2) + (d_lower * self.overlaps).sum(-1)
        d_overlaps = d_lower.mul_(self.beta.unsqueeze(-1))

        dq = d_q_from_start * self.from_start
        dk = (d_k_from_start * self.from_start).addcmul_(d_k_to_end, self.to_end)
        # Sums over the tokens from t on of what decays on its way to them, and over those before t of what decays on
        # its way from them: nothing cancels.
        arriving = d_q_from_start * self.q_from_start + d_k_from_start * self.k_from_start
        leaving = d_k_to_end * self.k_to_end
        crossing = d_across * self.across
        if self.sums.shape[-1] == 1:
            # An entry's gradient raises the sum of decays at its row and lowers it at its column; on the diagonal
            # there is none, and its rounding would drown the small entries that strong decays leave.
            weighted = (d_scores * self.scores).addcmul_(d_overlaps, self.overlaps)
            weighted.diagonal(dim1=1, dim2=2).zero_()
            arriving = arriving.sum(-1, dtype=torch.float64)
            arriving += weighted.sum(-1, dtype=torch.float64) - weighted.sum(-2, dtype=torch.float64)
            arriving = arriving.unsqueeze(-1)
            leaving = leaving.sum(-1, keepdim=True, dtype=torch.float64)
            crossing = crossing.sum(-1, keepdim=True)
            d_scores, d_overlaps = d_scores * self.decay, d_overlaps.mul_(self.decay)
            dq.baddbmm_(d_scores, self.k)
            dk.baddbmm_(d_scores.mT, self.q).baddbmm_(d_overlaps, self.k).baddbmm_(d_overlaps.mT, self.k)
            d_decay = 0.0
        else:
            left, d_products = torch.stack((self.q, self.k), 1), torch.stack((d_scores, d_overlaps), 1)
            d_left, d_right, d_decay = _decayed_products_gradients(d_products, left, self.k, self.sums)
            dq += d_left[:, 0]
            dk += d_left[:, 1]
            dk += d_right
        d_decay = d_decay + sums_from(arriving, 1) + sums_before(leaving, 1) + crossing.unsqueeze(1)
        return dq, dk, d_beta, d_decay


def _levels(left: Tensor, k: Tensor, sums: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """A lower triangle of t x t as squares: its lower left quarter, those of its two triangles, and so on.

    A square's rows are the later and its columns the earlier half of some tokens; a decay per channel goes along with
    both, from and to the border between them. Yields for each size (m, rows (g, s, blocks, m, d), columns (g, blocks,
    m, d), and the decays that are in them, (g, blocks, m, d) each).
    """
    chunks, seq, width = k.shape
    size = seq // 2
    while size:
        halves = (chunks, seq // (2 * size), 2, size, width)
        by_half = sums.view(halves)
        border = by_half[:, :, 0, -1:]
        to_row = (by_half[:, :, 1] - border).to(k.dtype).exp_()
        to_border = (border - by_half[:, :, 0]).to(k.dtype).exp_()
        rows = left.view(chunks, -1, *halves[1:])[:, :, :, 1] * to_row.unsqueeze(1)
        yield size, rows, k.view(halves)[:, :, 0] * to_border, to_row, to_border
        size //= 2


def _squares(products: Tensor, size: int) -> Tensor:
    """The squares of one size, (g, s, blocks, m, m), as a view of (g, s, t, t)."""
    chunks, operands, seq, _ = products.shape
    blocks = seq // (2 * size)
    tiles = products.view(chunks, operands, blocks, 2, size, blocks, 2, size)
    return tiles[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _decayed_products(left: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """(g, s, t, t) sums over channels of left_i k_j exp(sums_i - sums_j) for j <= i, else 0; left: (g, s, t, d)."""
    out = left.new_zeros(*left.shape[:3], left.shape[2])
    out.diagonal(dim1=-2, dim2=-1).copy_((left * k.unsqueeze(1)).sum(-1))
    for size, rows, columns, _, _ in _levels(left, k, sums):
        _squares(out, size).copy_(rows @ columns.unsqueeze(1).mT)
    return out


def _decayed_products_gradients(d_out: Tensor, left: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of left, k and the log decays."""
    of_own = d_out.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    d_left, dk = of_own * k.unsqueeze(1), (of_own * left).sum(1)
    d_decay = torch.zeros_like(k)
    for size, rows, columns, to_row, to_border in _levels(left, k, sums):
        d_squares = _squares(d_out, size)
        d_rows = d_squares @ columns.unsqueeze(1)
        d_columns = (d_squares.mT @ rows).sum(1)
        halves = (k.shape[0], -1, 2, size, k.shape[2])
        d_left.view(*d_left.shape[:2], *halves[1:])[:, :, :, 1] += d_rows * to_row.unsqueeze(1)
        dk.view(halves)[:, :, 0] += d_columns * to_border
        by_half = d_decay.view(halves)
        by_half[:, :, 1] += sums_from((d_rows * rows).sum(1), -2)
        by_half[:, :, 0] += sums_before(d_columns * columns, -2)
    return d_left, dk, d_decay

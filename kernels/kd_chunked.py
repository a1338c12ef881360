"""The distillation losses in torch on any device: rows in chunks, the gradient made by hand in the forward.

Two nested loops. The outer one takes as many rows as make an efficient matrix product and fills a float32
tile of logits for the student and one for each teacher that comes as hidden states. The inner one takes so
few rows that a dozen elementwise passes over them stay in the cache, and overwrites the student's tile with
its gradient. Memory is a few tiles, whatever the number of rows; the divergences are in kd_divergences.py,
the products in kd_products.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels import kd_divergences, kd_products
from mohawk.kernels.kd_teachers import (
    Teacher,
    TeacherHidden,
    TeacherMixture,
    TeacherSamples,
    TeacherTAID,
    TeacherTopK,
    dense_parts,
    mixture_weights,
    tail_of,
)

TILE_BYTES = 96 << 20  # all tiles of logits together: 256 rows of two 49152-word vocabularies in float32
CACHE_BYTES = 2 << 20  # of one array in the elementwise passes on CPU


@dataclass(frozen=True)
class Options:
    """What the loss computes; one for all backends. `temperature` is 1 for divergences of raw logits."""

    divergence: str
    temperature: float
    kd_weight: float
    ce_weight: float
    beta: float
    lam: float
    vocab_size: int
    need_kd: bool
    need_ce: bool

    @property
    def on_logits(self) -> bool:
        return self.divergence in kd_divergences.LOGITS


@dataclass
class Rows:
    """Per-row results: T^2 * divergence and cross-entropy, unweighted."""

    kd: Tensor
    ce: Tensor


def _total(x: Tensor) -> Tensor:
    return x


def _spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    """n rows in nearly equal spans of at most `step`."""
    if n == 0:
        return
    count = math.ceil(n / max(1, step))
    for k in range(count):
        yield n * k // count, n * (k + 1) // count


def _inner_rows(tile: Tensor) -> int:
    if tile.device.type != "cpu":
        return max(1, tile.shape[0])
    return max(torch.get_num_threads(), CACHE_BYTES // (tile.shape[1] * tile.element_size()))


def _take(x: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if rows is None else x.index_select(0, rows[start:stop])


class _Scores:
    """A teacher's tempered scores (unnormalised log-probabilities), tile by tile."""

    def __init__(self, teacher: Teacher, rows: Tensor | None, options: Options, dtype: torch.dtype):
        self.parts = dense_parts(teacher)
        self.teacher, self.rows, self.options, self.dtype = teacher, rows, options, dtype
        self.mixture = teacher.teacher if isinstance(teacher, TeacherTAID) else teacher
        self.hidden = [one for one in self.parts if isinstance(one, TeacherHidden)]
        self.tiles: list[Tensor] = []
        self.start = 0

    def load(self, start: int, stop: int, tiles: list[Tensor]) -> None:
        """Products of the hidden teachers for rows start..stop, into `tiles`."""
        self.start, self.tiles = start, [tile[: stop - start] for tile in tiles]
        for one, tile in zip(self.hidden, self.tiles, strict=True):
            hidden = _take(one.hidden, self.rows, start, stop)
            kd_products.logits_product(hidden, one.head[: self.options.vocab_size], tile)

    def _part(self, k: int, start: int, stop: int) -> Tensor:
        """Scores of one dense teacher for rows start..stop, ours to overwrite."""
        one, vocab, temperature = self.parts[k], self.options.vocab_size, self.options.temperature
        if not isinstance(one, TeacherHidden):
            scores = _take(one.logits, self.rows, start, stop)[:, :vocab]
            if scores.dtype != self.dtype:
                scores = scores.to(self.dtype)
            elif temperature != 1.0 or self.rows is None:
                return scores / temperature if temperature != 1.0 else scores
            return scores.div_(temperature) if temperature != 1.0 else scores
        at = sum(isinstance(other, TeacherHidden) for other in self.parts[:k])
        scores = self.tiles[at][start - self.start : stop - self.start]
        finish_logits(scores, one.bias, one.logit_scale, one.logit_softcap)
        return scores.div_(temperature) if temperature != 1.0 else scores

    def __call__(self, start: int, stop: int, student: Tensor) -> Tensor:
        """Scores of rows start..stop; `student` holds the student's tempered logits. Not to be
        overwritten."""
        if isinstance(self.mixture, TeacherMixture):
            scores = None
            for k, weight in enumerate(mixture_weights(self.mixture)):
                part = torch.log_softmax(self._part(k, start, stop), -1).add_(math.log(weight))
                scores = part if scores is None else torch.logaddexp(scores, part)
        else:
            scores = self._part(0, start, stop)
        if isinstance(self.teacher, TeacherTAID) and self.teacher.t != 1.0:
            scores = torch.lerp(student, scores, self.teacher.t)
        return scores


def finish_logits(tile: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
    """From `hidden @ head.T` to logits, in place."""
    if bias is not None:
        tile += bias[: tile.shape[1]]
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)


def _distribution(scores: Tensor, u: Tensor, lq: Tensor | None, options: Options, want_grad: bool):
    """Divergence of softmax(scores) and softmax(u) per row, with the gradient in u; lq may be given and is
    kept."""
    function = kd_divergences.DISTRIBUTION[options.divergence]
    lp = torch.log_softmax(scores, -1)
    first = lq.clone() if lq is not None else torch.log_softmax(u, -1)
    value, grad = function(lp, first, options.beta, options.lam, False, want_grad, _total)
    if bool(torch.isnan(value).any()):  # 0 * inf somewhere: -inf logits, which the guarded form handles
        lp, lq = torch.log_softmax(scores, -1), torch.log_softmax(u, -1)
        value, grad = function(lp, lq, options.beta, options.lam, True, want_grad, _total)
    return value, grad


def _topk(teacher: TeacherTopK, rows, start: int, stop: int, u: Tensor, options: Options, want_grad: bool):
    """The divergence over k + 1 buckets: the gradient in a bucket's logit is shared out within the bucket."""
    ids = _take(teacher.ids, rows, start, stop)
    lp = _take(teacher.logprobs, rows, start, stop).to(u.dtype)
    if teacher.tail_logprob is None:
        tail = tail_of(lp)
    else:
        tail = _take(teacher.tail_logprob, rows, start, stop).to(u.dtype)
    others = u.scatter(1, ids, float("-inf"))
    rest = torch.logsumexp(others, -1, keepdim=True)
    buckets = torch.cat([u.gather(1, ids), rest], -1)
    value, grad = _distribution(torch.cat([lp, tail[:, None]], -1), buckets, None, options, want_grad)
    if not want_grad:
        return value, None
    # Where nothing is left in the rest, others - rest is -inf - -inf.
    share = others.sub_(rest.clamp_min(torch.finfo(u.dtype).min)).exp_()
    share.mul_(grad[:, -1:]).scatter_(1, ids, grad[:, :-1])
    return value, share


def _samples(teacher: TeacherSamples, rows, start: int, stop: int, lq: Tensor, want_grad: bool):
    ids = _take(teacher.ids, rows, start, stop)
    weights = _take(teacher.weights, rows, start, stop).to(lq.dtype)
    value = -(weights * lq.gather(1, ids).masked_fill_(weights == 0, 0.0)).sum(-1)
    if not want_grad:
        return value, None
    grad = lq.exp().mul_(weights.sum(-1, keepdim=True))
    return value, grad.scatter_add_(1, ids, -weights)


def _tile(
    z: Tensor, teacher: Teacher, scores: _Scores, labels: Tensor | None, span, scale, options, want_grad
):
    """kd and ce of the rows of z, the student's float logits; z becomes the gradient of sum(scale * loss)."""
    start, stop = span
    temperature, rows = options.temperature, scores.rows
    u = z if temperature == 1.0 else z / temperature
    shared = options.need_ce and temperature == 1.0 or isinstance(teacher, TeacherSamples)
    lq = torch.log_softmax(u, -1) if shared else None

    kd = ce = z.new_zeros(stop - start)
    kd_grad = None
    want_kd_grad = want_grad and options.kd_weight != 0.0
    if options.need_kd:
        if isinstance(teacher, TeacherSamples):
            kd, kd_grad = _samples(teacher, rows, start, stop, lq, want_kd_grad)
        elif isinstance(teacher, TeacherTopK):
            kd, kd_grad = _topk(teacher, rows, start, stop, u, options, want_kd_grad)
        elif options.on_logits:
            function = kd_divergences.LOGITS[options.divergence]
            kd, kd_grad = function(z, scores(start, stop, u), options.vocab_size, want_kd_grad, _total)
        else:
            kd, kd_grad = _distribution(scores(start, stop, u), u, lq, options, want_kd_grad)
        kd = kd * temperature**2
    ce_grad = None
    if options.need_ce:
        log_prob = lq if lq is not None and temperature == 1.0 else torch.log_softmax(z, -1)
        at = labels[start:stop, None]
        ce = -log_prob.gather(1, at).squeeze(1)
        if want_grad and options.ce_weight != 0.0:
            ce_grad = log_prob.exp_()
            ce_grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=z.dtype))
    if want_grad:
        row = scale[start:stop, None]
        if kd_grad is not None:
            torch.mul(kd_grad, row * (options.kd_weight * temperature), out=z)
            if ce_grad is not None:
                z.addcmul_(ce_grad, row, value=options.ce_weight)
        elif ce_grad is not None:
            torch.mul(ce_grad, row * options.ce_weight, out=z)
        else:
            z.zero_()
    return kd, ce


def from_logits(
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    rows: Tensor | None,
    scale: Tensor,
    options: Options,
    grad: Tensor | None,
) -> Rows:
    """kd and ce of each chosen row of the student's logits (n, vocab).

    `rows` are the indices of the rows that count (None: all), `labels` and `scale` are given for these alone.
    `grad` (n, vocab), zero in the other rows and possibly `logits` itself, receives the gradient of
    sum(scale * (kd_weight * kd + ce_weight * ce)).
    """
    n, vocab, dtype = len(scale), options.vocab_size, scale.dtype
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    step = max(1, TILE_BYTES // (2 * vocab * dtype.itemsize))
    scores = _Scores(teacher, rows, options, dtype)
    hidden_tiles = [scale.new_empty((min(n, step), vocab)) for _ in scores.hidden] if options.need_kd else []
    for first, last in _spans(n, step):
        if options.need_kd:
            scores.load(first, last, hidden_tiles)
        if logits.device.type == "cpu":
            inner = max(torch.get_num_threads(), CACHE_BYTES // (vocab * dtype.itemsize))
        else:
            inner = last - first
        for start, stop in _spans(last - first, inner):
            start, stop = first + start, first + stop
            z = _take(logits, rows, start, stop)[:, :vocab]
            want_grad = grad is not None
            if rows is None and z.dtype == dtype and want_grad:
                z = z.clone()
            else:
                z = z.to(dtype)
            kd[start:stop], ce[start:stop] = _tile(
                z, teacher, scores, labels, (start, stop), scale, options, want_grad
            )
            if want_grad:
                if rows is None:
                    grad[start:stop, :vocab] = z
                else:
                    grad[:, :vocab].index_copy_(0, rows[start:stop], z.to(grad.dtype))
    return Rows(kd, ce)


def from_hidden(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    teacher: Teacher,
    labels: Tensor | None,
    rows: Tensor | None,
    scale: Tensor,
    options: Options,
    hidden_grad: Tensor | None,
    head_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> Rows:
    """As `from_logits`, from hidden states (n, hidden) and a head (vocab, hidden).

    `hidden_grad` (n, hidden) is in its final dtype and zero in the rows that don't count; `head_grad` and
    `bias_grad` are zero and in the dtype of `scale` (float32, or float64). Each may be None.
    """
    n, vocab, dtype = len(scale), options.vocab_size, scale.dtype
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    want_grad = not (hidden_grad is None and head_grad is None and bias_grad is None)
    scores = _Scores(teacher, rows, options, dtype)
    count = 1 + (len(scores.hidden) if options.need_kd else 0)
    step = max(1, TILE_BYTES // (count * vocab * dtype.itemsize))
    spans = list(_spans(n, step))
    most = max((last - first for first, last in spans), default=0)
    tiles = [scale.new_empty((most, vocab)) for _ in range(count)]
    head = head[:vocab]
    round_grad = hidden_grad is not None and head.dtype == hidden.dtype == torch.bfloat16
    for first, last in spans:
        z_tile = tiles[0][: last - first]
        part = _take(hidden, rows, first, last)
        kd_products.logits_product(part, head, z_tile)
        if options.need_kd:
            scores.load(first, last, tiles[1:])
        rounded = None
        if round_grad:
            # The gradient in bfloat16 takes the place of the teacher's logits, row by row, after their last
            # use.
            store = tiles[1].view(torch.bfloat16) if count == 2 else None
            rounded = (
                store[: last - first, :vocab]
                if store is not None
                else z_tile.new_empty(z_tile.shape, dtype=hidden.dtype)
            )
        for start, stop in _spans(last - first, _inner_rows(z_tile)):
            z = z_tile[start:stop]
            finish_logits(z, bias, logit_scale, logit_softcap)
            damping = None
            if want_grad and logit_softcap is not None:
                damping = 1 - (z / logit_softcap).square_()
            span = (first + start, first + stop)
            kd[span[0] : span[1]], ce[span[0] : span[1]] = _tile(
                z, teacher, scores, labels, span, scale, options, want_grad
            )
            if damping is not None:
                z *= damping
            if want_grad and logit_scale != 1.0:
                z *= logit_scale
            if rounded is not None:
                rounded[start:stop] = z
        if hidden_grad is not None:
            if rows is None:
                kd_products.hidden_gradient(z_tile, head, rounded, hidden_grad[first:last])
            else:
                packed = hidden_grad.new_empty((last - first, hidden.shape[1]))
                kd_products.hidden_gradient(z_tile, head, rounded, packed)
                hidden_grad.index_copy_(0, rows[first:last], packed)
        if head_grad is not None:
            kd_products.add_head_gradient(z_tile, part, head_grad[:vocab])
        if bias_grad is not None:
            bias_grad[:vocab] += z_tile.sum(0)
    return Rows(kd, ce)

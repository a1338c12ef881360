"""The distillation losses in torch on any device: rows in chunks, the gradient made by hand in the forward.

Two nested loops. The outer one takes as many rows as make an efficient matrix product and fills a float32
tile of logits for the student and one for each teacher that comes as hidden states. The inner one takes so
few rows that a dozen elementwise passes over them stay in the cache, and overwrites the student's tile with
its gradient. Memory is a few tiles, whatever the number of rows, and a sum in float32 of the head's gradient
or what takes its place (`keeps_gradient`); the divergences are in kd_gradients.py, the products in
kd_products.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mohawk.kernels.kd import exchange as kd_shared
from mohawk.kernels.kd import gradients as kd_gradients
from mohawk.kernels.kd import products as kd_products
from mohawk.kernels.kd.divergences import DIVERGENCES
from mohawk.kernels.kd.exchange import Known
from mohawk.kernels.kd.teachers import (
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
from mohawk.kernels.kd.vocabulary import Vocabulary

BACKEND = "chunked"  # as `mohawk doctor` names it

# All tiles of logits together: 256 rows of two 49152-word vocabularies in float32. A GPU needs more rows for each pass
# over the heads, which it could read in the time that it multiplies a few hundred rows with them; it gets them where
# Triton sweeps the tiles, since torch's elementwise passes would make several more of the size.
TILE_BYTES = 96 << 20
TRITON_TILE_BYTES = 1 << 30
# oneDNN's bfloat16 product multiplies what lies behind a row of a strided matrix, up to a whole step, by zeros: it has
# to be finite
READ_AHEAD = 64
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
    vocabulary: Vocabulary
    need_kd: bool
    need_ce: bool

    @property
    def on_logits(self) -> bool:
        return DIVERGENCES[self.divergence].on_logits


# kd and ce of a tile of the student's logits, which becomes the gradient: see torch_tile.
Tile = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Rows:
    """Per-row results: T^2 * divergence and cross-entropy, unweighted."""

    kd: Tensor
    ce: Tensor


def _spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    """n rows in nearly equal spans of at most `step`."""
    if n == 0:
        return
    count = math.ceil(n / max(1, step))
    for k in range(count):
        yield n * k // count, n * (k + 1) // count


def _outer_rows(tiles: int, tile: Tile, vocabulary: Vocabulary, dtype: torch.dtype) -> int:
    most = TILE_BYTES if tile is torch_tile else TRITON_TILE_BYTES
    return max(1, most // (max(1, tiles * vocabulary.widest) * dtype.itemsize))


def _inner_rows(tile: Tile, device: torch.device, vocabulary: Vocabulary, dtype: torch.dtype, outer: int) -> int:
    if tile is not torch_tile:
        return max(1, outer)
    if vocabulary.group is not None:
        # Fewer, larger collectives; the same number on every rank, whatever its threads and slice.
        return max(1, 8 * CACHE_BYTES // (vocabulary.widest * dtype.itemsize))
    if device.type != "cpu":
        return max(1, outer)
    return max(torch.get_num_threads(), CACHE_BYTES // (vocabulary.widest * dtype.itemsize))


def _take(x: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if rows is None else x.index_select(0, rows[start:stop])


class Scores:
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
            kd_products.logits_product(hidden, one.head[: self.options.vocabulary.local], tile)

    def _part(self, k: int, start: int, stop: int) -> Tensor:
        """Scores of one dense teacher for rows start..stop, ours to overwrite."""
        one, vocab, temperature = self.parts[k], self.options.vocabulary.local, self.options.temperature
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

    def _towards(self, scores: Tensor, student: Tensor) -> Tensor:
        """TAID's step from the student."""
        if not isinstance(self.teacher, TeacherTAID) or self.teacher.t == 1.0:
            return scores
        # Not torch.lerp: -inf on both sides would be NaN.
        t = self.teacher.t
        return (student * (1 - t)).add_(scores, alpha=t) if t else student

    def unnormalised(self, start: int, stop: int, student: Tensor) -> Iterator[Tensor]:
        """The scores of rows start..stop whose log-normalisers have to be known: one for each teacher of a mixture,
        else the teacher's own. `student` holds the student's tempered logits. Not to be overwritten."""
        if isinstance(self.mixture, TeacherMixture):
            return (self._part(k, start, stop) for k in range(len(self.parts)))
        return iter([self._towards(self._part(0, start, stop), student)])

    def combined(self, parts: Iterable[Tensor], norms: Sequence[Tensor] | None, student: Tensor) -> Tensor:
        """The teacher's scores, not to be overwritten, from its parts and, where ranks share the vocabulary, the
        log-normalisers of these."""
        parts = iter(parts)
        if not isinstance(self.mixture, TeacherMixture):
            return next(parts)
        scores = None
        for k, weight in enumerate(mixture_weights(self.mixture)):
            part = log_softmax(next(parts), norms[k] if norms else None)
            part += math.log(weight)
            scores = part if scores is None else torch.logaddexp(scores, part)
        return self._towards(scores, student)

    def norm(self, combined: Tensor, known: Known) -> Tensor:
        """The log-normalisers of the combined scores where ranks share the vocabulary."""
        if not isinstance(self.mixture, TeacherMixture):
            return known.teachers[0]
        if self.teacher is self.mixture or self.teacher.t == 1.0:
            return torch.zeros_like(known.teachers[0])
        return torch.logsumexp(self.options.vocabulary.every(torch.logsumexp(combined, -1)), 0)


def log_softmax(scores: Tensor, norm: Tensor | None = None) -> Tensor:
    """A new tensor: log-probabilities over the whole vocabulary, whose log-normalisers are given where this is only
    a slice of it."""
    return torch.log_softmax(scores, -1) if norm is None else scores - norm.unsqueeze(-1)


def finish_logits(tile: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
    """From `hidden @ head.T` to logits, in place."""
    if bias is not None:
        tile += bias[: tile.shape[1]]
    if scale != 1.0:
        tile *= scale
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)


def distribution(
    scores: Tensor,
    u: Tensor,
    lq: Tensor | None,
    options: Options,
    want_grad: bool,
    norm: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Divergence of softmax(scores) and softmax(u) per row and its gradient in u; lq may be given and is kept.

    `norm` and `known` are given where these are slices of a shared vocabulary.
    """
    function = kd_gradients.of_distributions(options.divergence)
    size = options.vocabulary.size if DIVERGENCES[options.divergence].mean else 1
    total: kd_gradients.Total = lambda x: x  # noqa: E731
    if known is not None:
        total = options.vocabulary.total if known.reverse_kl is None else lambda _: known.reverse_kl

    def evaluate(guard: bool) -> tuple[Tensor, Tensor | None]:
        lp = log_softmax(scores, norm)
        own = log_softmax(u, known and known.student) if lq is None else lq.clone()
        value, grad = function(lp, own, options.beta, options.lam, guard, want_grad, total)
        return (value, grad) if size == 1 else (value / size, None if grad is None else grad.div_(size))

    value, grad = evaluate(guard=known is not None)
    if known is None and not bool(torch.isnan(value).any()):
        return value, grad
    if known is None:  # 0 * inf somewhere: -inf logits
        value, grad = evaluate(guard=True)
    if grad is not None:  # what is still NaN came in so: the gradient says it too, where a guard or a sign would not
        grad.masked_fill_(torch.isnan(value).unsqueeze(-1), float("nan"))
    return value, grad


def take_topk(
    teacher: TeacherTopK, rows: Tensor | None, span: tuple[int, int], dtype: torch.dtype, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and log-probabilities (rows, k), and the log mass of the rest (rows)."""
    lp = _take(teacher.logprobs, rows, *span).to(dtype)
    tail = None if teacher.tail_logprob is None else _take(teacher.tail_logprob, rows, *span)
    return _take(teacher.ids, rows, *span), lp, tail_of(lp, tail, options.vocabulary.size)


def take_samples(
    teacher: TeacherSamples, rows: Tensor | None, span: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """ids and weights (rows, k)."""
    return _take(teacher.ids, rows, *span), _take(teacher.weights, rows, *span).to(dtype)


def _topk(
    teacher: TeacherTopK,
    rows: Tensor | None,
    span: tuple[int, int],
    u: Tensor,
    options: Options,
    want_grad: bool,
    known: Known | None,
) -> tuple[Tensor, Tensor | None]:
    """The divergence over k + 1 buckets: the gradient in a bucket's logit is shared out within the bucket."""
    vocabulary = options.vocabulary
    ids, lp, tail = take_topk(teacher, rows, span, u.dtype, options)
    others = vocabulary.scatter(u, ids, float("-inf"))
    rest = torch.logsumexp(others, -1, keepdim=True) if known is None else known.rest[:, None]
    chosen = vocabulary.gather(u, ids) if known is None else known.chosen
    buckets, scores = torch.cat([chosen, rest], -1), torch.cat([lp, tail[:, None]], -1)
    # Every rank has all buckets.
    value, grad = distribution(scores, buckets, None, options, want_grad)
    value = vocabulary.once(value)
    if not want_grad:
        return value, None
    # Where nothing is left in the rest, others - rest is -inf - -inf.
    share = others.sub_(rest.clamp_min(torch.finfo(u.dtype).min)).exp_().mul_(grad[:, -1:])
    return value, vocabulary.scatter(share, ids, grad[:, :-1])


def _samples(
    teacher: TeacherSamples,
    rows: Tensor | None,
    span: tuple[int, int],
    lq: Tensor,
    options: Options,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    ids, weights = take_samples(teacher, rows, span, lq.dtype)
    value = -(weights * options.vocabulary.gather(lq, ids).masked_fill_(weights == 0, 0.0)).sum(-1)
    if not want_grad:
        return value, None
    grad = lq.exp().mul_(weights.sum(-1, keepdim=True))
    return value, options.vocabulary.scatter_add(grad, ids, -weights)


def _exchange(
    z: Tensor,
    u: Tensor,
    teacher: Teacher,
    scores: Scores,
    parts: list[Tensor],
    span: tuple[int, int],
    options: Options,
    want_grad: bool,
) -> Known:
    """What `torch_tile` has to know of the other ranks' slices."""
    distributions = options.need_kd and not options.on_logits
    needs_raw = options.need_ce and options.temperature != 1.0
    ready = len(parts) == 1 and not isinstance(scores.mixture, TeacherMixture)
    return kd_shared.exchange(
        options.vocabulary,
        u if distributions or options.need_ce and not needs_raw else None,
        z if needs_raw else None,
        parts if distributions else (),
        reverse_kl=want_grad and options.divergence == "reverse_kl" and ready,
        products=kd_gradients.finite(z, *parts) if parts and options.divergence == "cosine" else None,
        ids=_take(teacher.ids, scores.rows, *span) if distributions and isinstance(teacher, TeacherTopK) else None,
    )


def torch_tile(
    z: Tensor,
    teacher: Teacher,
    scores: Scores,
    labels: Tensor | None,
    span: tuple[int, int],
    scale: Tensor,
    options: Options,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """kd and ce of the rows of z, the student's float logits; z becomes the gradient of sum(scale * loss)."""
    start, stop = span
    temperature, vocabulary = options.temperature, options.vocabulary
    u = z if temperature == 1.0 else z / temperature
    want = want_grad and options.kd_weight != 0.0
    known, parts = None, ()
    dense = options.need_kd and not isinstance(teacher, (TeacherTopK, TeacherSamples))
    if dense:
        parts = scores.unnormalised(start, stop, u)
    if vocabulary.group is not None:
        parts = list(parts)
        known = _exchange(z, u, teacher, scores, parts, span, options, want)
    shared = options.need_ce and temperature == 1.0 or isinstance(teacher, TeacherSamples)
    lq = log_softmax(u, known and known.student) if shared else None

    kd = ce = z.new_zeros(stop - start)
    kd_grad = ce_grad = None
    if options.need_kd:
        if isinstance(teacher, TeacherSamples):
            kd, kd_grad = _samples(teacher, scores.rows, span, lq, options, want)
        elif isinstance(teacher, TeacherTopK):
            kd, kd_grad = _topk(teacher, scores.rows, span, u, options, want, known)
        elif options.on_logits:
            products = None if known is None else known.products
            kd, kd_grad = kd_gradients.of_logits(options.divergence)(z, *parts, want, vocabulary, products)
        else:
            target = scores.combined(parts, known and known.teachers, u)
            norm = known and scores.norm(target, known)
            kd, kd_grad = distribution(target, u, lq, options, want, norm, known)
        kd = kd * temperature**2
    if options.need_ce:
        log_prob = lq if lq is not None and temperature == 1.0 else log_softmax(z, known and known.raw)
        target = labels[start:stop, None]
        ce = -vocabulary.gather(log_prob, target).squeeze(1)
        if want_grad and options.ce_weight != 0.0:
            minus_one = z.new_full(target.shape, -1.0)
            ce_grad = vocabulary.scatter_add(log_prob.exp_(), target, minus_one)
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
    tile: Tile | None = None,
) -> Rows:
    """kd and ce of each chosen row of the student's logits (n, vocab).

    `rows` are the indices of the rows that count (None: all), `labels` and `scale` are given for these alone.
    `grad` (n, vocab), zero in the other rows and possibly `logits` itself, receives the gradient of
    sum(scale * (kd_weight * kd + ce_weight * ce)).
    """
    tile = tile or torch_tile
    n, vocabulary, dtype = len(scale), options.vocabulary, scale.dtype
    vocab = vocabulary.local
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    scores = Scores(teacher, rows, options, dtype)
    step = _outer_rows(1 + len(scores.hidden), tile, vocabulary, dtype)
    tiles = [scale.new_empty((min(n, step), vocab)) for _ in scores.hidden] if options.need_kd else []
    for first, last in _spans(n, step):
        if options.need_kd:
            scores.load(first, last, tiles)
        for start, stop in _spans(last - first, _inner_rows(tile, logits.device, vocabulary, dtype, last - first)):
            start, stop = first + start, first + stop
            z = _take(logits, rows, start, stop)[:, :vocab]
            if rows is None and z.dtype == dtype and grad is not None:
                z = z.clone()
            z = z.to(dtype)
            kd[start:stop], ce[start:stop] = tile(
                z, teacher, scores, labels, (start, stop), scale, options, grad is not None
            )
            if grad is None:
                continue
            if rows is None:
                grad[start:stop, :vocab] = z
            else:
                grad[:, :vocab].index_copy_(0, rows[start:stop], z.to(grad.dtype))
    return summed(kd, ce, options)


def summed(kd: Tensor, ce: Tensor, options: Options) -> Rows:
    kd, ce = options.vocabulary.total(torch.stack([kd, ce]))
    return Rows(kd, ce)


def keeps_gradient(rows: int, hidden: Tensor, head: Tensor) -> bool:
    """Whether the gradients of all rows' logits are kept, in bfloat16, for one product with the head's gradient as its
    result: where they take no more memory than the float32 sum over chunks that it makes unnecessary."""
    return 0 < rows <= 2 * head.shape[1] and head.dtype == hidden.dtype == torch.bfloat16


def _empty_head_gradient(head: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Zero beyond the first `vocab` words."""
    grad = head.new_empty(head.shape, dtype=dtype)
    grad[vocab:] = 0
    return grad


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
    bias_grad: Tensor | None,
    want_head_grad: bool,
    tile: Tile | None = None,
) -> tuple[Rows, Tensor | None]:
    """As `from_logits`, from hidden states (n, hidden) and a head (vocab, hidden); with the gradient of the head.

    `hidden_grad` (n, hidden) is zero in the rows that don't count, and summed over the ranks of a shared
    vocabulary; `bias_grad` is in the dtype of `scale` (float32, or float64). Each may be None. The gradient of the
    head is in the dtype of `scale` too, or in the head's where `keeps_gradient`. Both are zero beyond the real
    vocabulary, or everywhere if no row counts.
    """
    tile = tile or torch_tile
    n, vocabulary, dtype = len(scale), options.vocabulary, scale.dtype
    vocab = vocabulary.local
    kd, ce = scale.new_empty(n), scale.new_empty(n)
    want_grad = want_head_grad or not (hidden_grad is None and bias_grad is None)
    scores = Scores(teacher, rows, options, dtype)
    count = 1 + (len(scores.hidden) if options.need_kd else 0)
    spans = list(_spans(n, _outer_rows(count, tile, vocabulary, dtype)))
    most = max((last - first for first, last in spans), default=0)
    tiles = [scale.new_empty((most, vocab)) for _ in range(count)]
    whole_head, head = head, head[:vocab]
    inner = _inner_rows(tile, head.device, vocabulary, dtype, most)
    kept = head_grad = None
    if want_head_grad and keeps_gradient(n, hidden, head):
        kept = head.new_empty((n, vocab))
    elif want_head_grad:
        head_grad = _empty_head_gradient(whole_head, vocab if n else 0, dtype)
    # Where it is not kept, cuBLAS takes it for both products, oneDNN for one.
    round_grad = head.dtype == hidden.dtype == torch.bfloat16
    round_grad = round_grad and (hidden_grad is not None or want_grad and head.is_cuda)
    for first, last in spans:
        z_tile = tiles[0][: last - first]
        part = _take(hidden, rows, first, last)
        kd_products.logits_product(part, head, z_tile)
        if options.need_kd:
            scores.load(first, last, tiles[1:])
        store, rounded = None, None if kept is None else kept[first:last]
        if rounded is None and round_grad:
            # The gradient in bfloat16 takes the place of the teacher's logits, row by row, after their last
            # use.
            if count == 2 and vocab >= READ_AHEAD:
                store = tiles[1].view(torch.bfloat16)[: last - first]
                rounded = store[:, :vocab]
            else:
                store, rounded = None, z_tile.new_empty(z_tile.shape, dtype=hidden.dtype)
        for start, stop in _spans(last - first, inner):
            z = z_tile[start:stop]
            finish_logits(z, bias, logit_scale, logit_softcap)
            damping = None
            if want_grad and logit_softcap is not None:
                damping = 1 - (z / logit_softcap).square_()
            span = (first + start, first + stop)
            kd[span[0] : span[1]], ce[span[0] : span[1]] = tile(
                z, teacher, scores, labels, span, scale, options, want_grad
            )
            if damping is not None:
                z *= damping
            if want_grad and logit_scale != 1.0:
                z *= logit_scale
            if rounded is not None:
                rounded[start:stop] = z
        if store is not None:
            store[:, vocab : vocab + READ_AHEAD] = 0
        if hidden_grad is not None:
            if rows is None:
                kd_products.hidden_gradient(z_tile, head, rounded, hidden_grad[first:last])
            else:
                packed = hidden_grad.new_empty((last - first, hidden.shape[1]))
                kd_products.hidden_gradient(z_tile, head, rounded, packed)
                hidden_grad.index_copy_(0, rows[first:last], packed)
        if head_grad is not None:
            kd_products.add_head_gradient(z_tile, part, rounded, head_grad[:vocab], first == 0)
        if bias_grad is not None:
            bias_grad[:vocab] += z_tile.sum(0)
    if kept is not None:
        del tiles, z_tile, z, damping  # before the head's gradient takes its memory
        scores.tiles = []
        head_grad = _empty_head_gradient(whole_head, vocab, head.dtype)
        kd_products.head_gradient(kept, _take(hidden, rows, 0, n), head_grad[:vocab])
    if hidden_grad is not None and vocabulary.group is not None:
        hidden_grad.copy_(vocabulary.total(hidden_grad))
    return summed(kd, ce, options), head_grad

"""A teacher with another tokenizer: what its answers on its own tokens say of the student's.

Both tokenizations of a text are cut where their bytes meet (mohawk/data/aligned_rows.py). At such a place both models
have read the same text, and what they expect next can be compared:

- `spans`: where one token follows on both sides that both vocabularies have by its bytes, the divergence over all such
  tokens, and the rest as one tail; else that between how likely the whole span is and is not, its tokens' likelihoods
  multiplied (cross-tokenizer likelihood matching, arXiv 2503.20083; merged as in TRL's GOLD). It is the divergence
  between models that are asked less, so a lower bound of it; with equal tokens it is that of equal vocabularies.
- `uld`: the L1 distance of the two sorted probabilities (universal logit distillation, arXiv 2402.12030), whatever the
  tokens are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from mohawk.data.aligned_rows import Examples, Spans, TokenAligner
from mohawk.kernels.common.first_order import first_order
from mohawk.kernels.kd.interface import kd_loss, linear_kd_loss
from mohawk.kernels.kd.teachers import TeacherHidden, TeacherLogits, TeacherSamples, TeacherTopK
from mohawk.loading.causal import plain_model, position_rows
from mohawk.losses.heads import Head
from mohawk.losses.shared_vocabulary import shared_part
from mohawk.losses.teachers import Answer, CachedTeacher, ModelTeacher, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

Align = Literal["spans", "uld"]
ALIGNS = ("spans", "uld")
TILE_BYTES = 64 << 20  # of float32 logits of one side at once
SUREST = 1e-7  # a log-likelihood of 0 counts as this much below it, the rounding of 1 in float32


@dataclass(frozen=True)
class AlignedAnswer:
    """What a teacher says of its own tokens of some rows, and where they meet the student's.

    source: (b, m, ...) of the teacher's tokens. teacher_ids, student_ids: int64 (b, m) and (b, n).
    """

    source: TeacherHidden | TeacherTopK
    teacher_ids: Tensor
    student_ids: Tensor
    spans: Spans


class AlignedTeacher:
    """A teacher whose tokenizer is not the student's, for `KnowledgeDistiller`.

    Each batch's text is cut by the teacher's own tokenizer, the teacher is asked about that, and its answers are
    compared where both tokenizations meet, by bytes. Special tokens are matched by what they are for (bos, eos, pad),
    else by name. Where one tokenizer puts a BOS in front of a text, the teacher's text has its own.

    Args:
        teacher: a causal language model, a `ModelTeacher`, or a `CachedTeacher` of a cache of the teacher's own tokens
            (`mohawk cache` of a recipe with `align`), not of samples.
        tokenizer: the teacher's. student_tokenizer: that of the batches.
        align: "spans", the divergence of spans that are the same bytes: of one token in both, over the tokens that both
            vocabularies have and the rest as a tail; of several, between the likelihoods of the whole, to the power
            1 / temperature (arXiv 2503.20083). "uld", the L1 distance of sorted probabilities (arXiv 2402.12030), in
            the divergence's place.
        examples: prompts and responses that each side's own template rendered.

    Raises:
        UserError: a tokenizer that does not give text back as it was, so that bytes cannot be aligned.
        ValueError: another teacher, or an unknown `align`.
    """

    def __init__(
        self,
        teacher: CausalLM | ModelTeacher | CachedTeacher,
        tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        align: Align = "spans",
        examples: Sequence[Examples] = (),
    ):
        if align not in ALIGNS:
            raise ValueError(f"align: got {align!r}; allowed: {', '.join(ALIGNS)}")
        if not isinstance(teacher, (ModelTeacher, CachedTeacher)):
            if not hasattr(teacher, "get_output_embeddings"):
                raise ValueError(
                    f"teacher: got {type(teacher).__name__}, whose tokens cannot be aligned; give one model, or a cache"
                )
            teacher = ModelTeacher(teacher)
        self.teacher, self.align = teacher, align
        self.shared: dict[tuple[int, int, torch.device], _Shared] = {}
        longest = position_rows(plain_model(teacher.model)) if isinstance(teacher, ModelTeacher) else None
        self.aligner = TokenAligner(student_tokenizer, tokenizer, examples=examples, longest=longest)
        if isinstance(teacher, CachedTeacher) and teacher.cache.layout.kind == "samples":
            raise ValueError("align: samples do not say how likely a text is; cache a top k, or hidden states")

    def __call__(self, batch: Mapping[str, Tensor], watches: Sequence[Watch] = ()) -> list[Any]:
        """The answers, each an `Answer` whose source is an `AlignedAnswer`."""
        if watches:
            raise ValueError("align: layers of a teacher with other tokens cannot be matched; leave out matchings")
        columns, spans = self.aligner.batch(batch)
        if isinstance(self.teacher, CachedTeacher):  # whose columns are of its own length
            answers = {name: column for name, column in batch.items() if name.startswith("teacher_")}
            width = next(iter(answers.values())).shape[1]
            columns = {name: _of_width(column, width) for name, column in columns.items()}
            (answer,) = self.teacher({**columns, **answers})
        else:
            (answer,) = self.teacher({name: columns[name] for name in ("input_ids", "position_ids")})
        source: Any = answer.source
        return [Answer(cast(Any, AlignedAnswer(source, columns["input_ids"], batch["input_ids"], spans)))]


def _of_width(column: Tensor, width: int) -> Tensor:
    more = width - column.shape[1]
    return column[:, :width] if more <= 0 else torch.nn.functional.pad(column, (0, more))


@dataclass(frozen=True)
class Compared:
    """A loss and what it was of.

    loss: a scalar, the weighted sum over what was compared. nats: the unweighted one, detached. single: how many of the
    student's tokens were compared one with one. tokens: how many were in spans at all.
    """

    loss: Tensor
    nats: Tensor
    single: Tensor
    tokens: Tensor


def aligned_loss(
    answer: AlignedAnswer, teacher: AlignedTeacher, hidden: Tensor, head: Head, weights: Tensor | None,
    *, temperature: float = 1.0, **divergence: Any,
) -> Compared:  # fmt: skip
    """The sum of what an aligned teacher and a student differ by, with the student's gradients.

    hidden: (b, n, H), the student's final hidden states. weights: (b, n), of the token that each position predicts.
    temperature, divergence: as of `kd_loss`; T^2 multiplies what softmaxes at T differ by, T what likelihoods do.
    """
    of = _Positions(answer, hidden.shape[1], answer.teacher_ids.shape[1])
    flat = hidden.flatten(0, 1)
    weighed = torch.ones(flat.shape[:1], device=hidden.device) if weights is None else weights.flatten().float()
    every = torch.arange(len(of.first), device=hidden.device)
    if teacher.align == "uld":
        rows = _sorted_distance(answer, of, flat, head, weighed, temperature)
        return Compared(*rows, of.count.new_zeros(()), of.count.sum())
    shared = _shared(teacher, answer, head)
    label, other = answer.student_ids.flatten()[of.first + 1], answer.teacher_ids.flatten()[of.other + 1]
    alone = (of.count == 1) & (of.other_count == 1) & (shared.other_of[label] == other)
    loss, nats = flat.flatten()[:0].sum().float(), flat.new_zeros((), dtype=torch.float32)
    if len(one := every[alone]):
        found = _one_token(answer, shared, of, one, flat, head, weighed, {"temperature": temperature, **divergence})
        loss, nats = loss + found[0], nats + found[1]
    if len(several := every[~alone]):
        found = _several_tokens(answer, of, several, flat, head, weighed, temperature, divergence)
        loss, nats = loss + found[0], nats + found[1]
    return Compared(loss, nats, alone.sum(), of.count.sum())


class _Positions:
    """The spans of an answer as flat positions. first, other: (s), from which the first token of each is predicted, of
    the student's and the teacher's; count, other_count: how many tokens it has."""

    def __init__(self, answer: AlignedAnswer, n: int, m: int):
        spans = answer.spans
        self.first = spans.rows * n + spans.student[:, 0] - 1
        self.other = spans.rows * m + spans.teacher[:, 0] - 1
        self.count = spans.student[:, 1] - spans.student[:, 0]
        self.other_count = spans.teacher[:, 1] - spans.teacher[:, 0]


def _all_of(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(every position of some spans, which span each is of)."""
    of = torch.repeat_interleave(torch.arange(len(first), device=first.device), count)
    begin = torch.repeat_interleave(count.cumsum(0) - count, count)
    return first[of] + torch.arange(len(of), device=first.device) - begin, of


@dataclass(frozen=True)
class _Shared:
    """Tokens that both vocabularies have. ours, theirs: int64 (k), ids; None: the first k of both, where that is all.
    k: how many. tail: both have others. other_of: int64 (student's entries), the teacher's id, -1 for none."""

    ours: Tensor | None
    theirs: Tensor | None
    k: int
    tail: bool
    other_of: Tensor


def _shared(teacher: AlignedTeacher, answer: AlignedAnswer, head: Head) -> _Shared:
    """What is shared by vocabularies of these sizes, made once."""
    source, aligner = answer.source, teacher.aligner
    others = len(source.head) if isinstance(source, TeacherHidden) else len(aligner.teacher.of)
    key = (len(head.weight), others, head.weight.device)
    if key not in teacher.shared:
        teacher.shared[key] = _shared_of(aligner, *key)
    return teacher.shared[key]


def _shared_of(aligner: TokenAligner, entries: int, others: int, device: torch.device) -> _Shared:
    if aligner.same:  # ids mean the same, and so do rows of embeddings beyond the vocabulary
        k = min(entries, others)
        of = torch.arange(entries, device=device)
        return _Shared(None, None, k, False, torch.where(of < k, of, -1))
    pairs = torch.tensor([(i, j) for i, j in aligner.shared if i < entries and j < others], device=device).reshape(
        -1, 2
    )
    ours, theirs = pairs.unbind(1)
    other_of = torch.full((entries,), -1, device=device).scatter(0, ours, theirs)
    return _Shared(ours, theirs, len(pairs), len(pairs) < min(entries, others), other_of)


def _one_token(
    answer: AlignedAnswer, shared: _Shared, of: _Positions, which: Tensor, flat: Tensor, head: Head, weights: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spans of one token in both: (weighted sum, plain sum) of the divergence over shared tokens and the rest."""
    hidden, weights = flat[of.first[which]], weights[of.first[which]]
    source, at = answer.source, of.other[which]
    if isinstance(source, TeacherTopK):
        target = _in_students_ids(_flat_rows(source, at), shared, len(head.weight))
        return _by_kernel(head.student(hidden), target, weights, options)
    theirs = _flat_rows(source, at)
    if not shared.tail:
        student = head.student(hidden)
        if shared.ours is not None:
            student["student_head"] = student["student_head"][shared.ours]
            student["student_bias"] = None if head.bias is None else student["student_bias"][shared.ours]
            bias = None if theirs.bias is None else theirs.bias[shared.theirs]
            theirs = dataclasses.replace(theirs, head=theirs.head[shared.theirs], bias=bias)
        return _by_kernel(student, theirs, weights, {**options, "vocab_size": shared.k})
    teacher_head = _head_of(theirs)
    temperature = options["temperature"]

    def differ(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = _buckets(teacher_head.logits(theirs.hidden[part]), shared.theirs, temperature)
        mine = _buckets(logits, shared.ours, temperature)
        return kd_loss(mine, TeacherLogits(target), reduction="none", **options)

    return _over_rows(differ, hidden, head, weights, max(len(head.weight), len(teacher_head.weight)))


def _by_kernel(student: dict[str, Any], target: Any, weights: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The weighted and the plain sum of a divergence that the fused loss has."""
    loss, parts = linear_kd_loss(
        **student, teacher=target, token_weights=weights, reduction="sum", return_parts="rows", **options
    )
    return loss, parts.kd.sum()


def _flat_rows(source: Any, at: Tensor) -> Any:
    """A source (b, m, ...) at some flat positions."""
    return source.map_rows(lambda x, trailing: x.flatten(0, x.dim() - trailing - 1)[at])


def _head_of(source: TeacherHidden) -> Head:
    bias = None if source.bias is None else source.bias.float()
    return Head(source.head.float(), bias, source.logit_scale, source.logit_softcap)


def _buckets(logits: Tensor, ids: Tensor | None, temperature: float) -> Tensor:
    """Logits (rows, k + 1) of some tokens, and of all others together: their softmax at T has the others' mass."""
    assert ids is not None
    others = logits.index_fill(1, ids, float("-inf"))
    rest = temperature * torch.logsumexp(others / temperature, -1, keepdim=True)
    return torch.cat([logits[:, ids], rest], -1)


def _in_students_ids(source: TeacherTopK, shared: _Shared, entries: int) -> TeacherTopK:
    """A top k of the teacher's (rows, k) as one of the student's: what the student does not have is in the tail."""
    of = torch.full((int(source.ids.max()) + 1,), -1, device=source.ids.device)
    if shared.theirs is None:
        ours = theirs = torch.arange(min(shared.k, len(of)), device=of.device)
    else:
        assert shared.ours is not None
        there = shared.theirs < len(of)
        ours, theirs = shared.ours[there], shared.theirs[there]
    found = of.scatter(0, theirs, ours)[source.ids]
    missing = found < 0
    ids = torch.where(missing, entries + source.ids, found)
    logprobs, tail = source.logprobs.float(), source.tail_logprob
    assert tail is not None  # as caches have it
    tail = tail.float()
    if shared.tail:
        tail = torch.logaddexp(tail, logprobs.masked_fill(~missing, float("-inf")).logsumexp(-1))
        logprobs = logprobs.masked_fill(missing, float("-inf"))
    return cast(TeacherTopK, shared_part(TeacherTopK(ids, logprobs, tail), entries))


@torch.no_grad()
def likelihoods(answer: AlignedAnswer) -> tuple[Tensor, Tensor]:
    """(the log-likelihoods of an answer's spans, float32 (s); the student's ids in them, int64)."""
    of = _Positions(answer, answer.student_ids.shape[1], answer.teacher_ids.shape[1])
    at, span = _all_of(of.other, of.other_count)
    found = _log_probability(_flat_rows(answer.source, at), answer.teacher_ids.flatten()[at + 1])
    return _summed(found, span, len(of.first)), answer.student_ids.flatten()[_all_of(of.first, of.count)[0] + 1]


def _several_tokens(
    answer: AlignedAnswer, of: _Positions, which: Tensor, flat: Tensor, head: Head, weights: Tensor,
    temperature: float, divergence: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Other spans: (weighted sum, plain sum) of the divergence between how likely they are and are not."""
    at, span = _all_of(of.first[which], of.count[which])
    ids = answer.student_ids.flatten()[at + 1]
    likely = _summed(-_surprise(head.student(flat[at]), ids), span, len(which))
    weight = _summed(weights[at], span, len(which)) / of.count[which]
    at, span = _all_of(of.other[which], of.other_count[which])
    with torch.no_grad():
        found = _log_probability(_flat_rows(answer.source, at), answer.teacher_ids.flatten()[at + 1])
        theirs = _summed(found, span, len(which))
    both = [_is_and_is_not(x / temperature) for x in (likely, theirs)]
    rows = temperature * kd_loss(both[0], TeacherLogits(both[1]), reduction="none", **divergence)
    return (rows * weight).sum(), rows.detach().sum()


def _surprise(student: dict[str, Any], ids: Tensor) -> Tensor:
    """(rows) float32: -log of a model's probability of each id, differentiable. student: as of `linear_kd_loss`."""
    nobody = TeacherSamples(ids[:, None], torch.ones(len(ids), 1, device=ids.device))
    options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": "none"}
    return linear_kd_loss(**student, teacher=nobody, labels=ids, **options)


def _log_probability(source: TeacherHidden | TeacherTopK, ids: Tensor) -> Tensor:
    """(rows) float32: the log of a teacher's probability of each id; of a top k as `probability` of it has it."""
    if isinstance(source, TeacherTopK):
        return source.probability(ids, None).clamp_min(torch.finfo(torch.float32).tiny).log()
    model = {"student_hidden": source.hidden, "student_head": source.head, "student_bias": source.bias}
    return -_surprise({**model, "logit_scale": source.logit_scale, "logit_softcap": source.logit_softcap}, ids)


def _summed(values: Tensor, of: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, of, values)


def _is_and_is_not(log_likelihood: Tensor) -> Tensor:
    """(spans, 2): log-probabilities that a span follows, and that something else does."""
    x = log_likelihood.clamp(max=-SUREST)
    return torch.stack([x, torch.log(-torch.expm1(x))], -1)


def _sorted_distance(
    answer: AlignedAnswer, of: _Positions, flat: Tensor, head: Head, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 times the L1 distance of sorted probabilities where spans begin: (weighted sum, plain sum).

    Of a top k the k largest are compared, and the masses of the rest.
    """
    hidden, weights = flat[of.first], weights[of.first]
    source = _flat_rows(answer.source, of.other)
    teacher_head = _head_of(source) if isinstance(source, TeacherHidden) else None

    def largest(part: slice, most: int) -> Tensor:
        if teacher_head is None:
            return source.logprobs[part].float().exp().sort(-1, descending=True).values[:, :most]
        found = torch.softmax(teacher_head.logits(source.hidden[part]) / temperature, -1)
        return torch.topk(found, min(most, found.shape[-1]), -1).values  # which come sorted

    def differ(logits: Tensor, part: slice) -> Tensor:
        mine = torch.softmax(logits / temperature, -1)
        with torch.no_grad():
            theirs = largest(part, mine.shape[-1])
        mine = torch.topk(mine, theirs.shape[-1], -1).values
        rest = (mine.sum(-1) - theirs.sum(-1)).abs()  # of the larger vocabulary, whose entries meet none
        return temperature**2 * ((mine - theirs).abs().sum(-1) + rest)

    entries = max(len(head.weight), 0 if teacher_head is None else len(teacher_head.weight))
    return _over_rows(differ, hidden, head, weights, entries)


def _over_rows(
    differ: Callable[[Tensor, slice], Tensor], hidden: Tensor, head: Head, weights: Tensor, entries: int
) -> tuple[Tensor, Tensor]:
    """The weighted and the plain sum over rows of `differ(logits of some rows, these rows)`.

    Logits are float32 and of `TILE_BYTES` at most: gradients are made with them, tile by tile.
    """
    loss, plain = _Tiles.apply(
        differ, head, max(1, TILE_BYTES // (4 * entries)), weights, hidden, head.weight, head.bias
    )
    return loss, plain


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, differ, head, tile, weights, hidden, weight, bias):
        wanted = ctx.needs_input_grad[4:]
        inputs = [weight.detach().float(), None if bias is None else bias.detach().float()]
        for x, asked in zip(inputs, wanted[1:], strict=True):
            if x is not None and asked:
                x.requires_grad_(True)
        sums = [None if x is None or not x.requires_grad else torch.zeros_like(x) for x in inputs]
        moved = torch.empty_like(hidden) if wanted[0] else None
        loss, plain = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        for part in _tiles(len(hidden), tile):
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                x = hidden[part].detach().requires_grad_(wanted[0])
                rows = differ(dataclasses.replace(head, weight=inputs[0], bias=inputs[1]).logits(x), part)
                total = (rows * weights[part]).sum()
            loss, plain = loss + total.detach(), plain + rows.detach().sum()
            asked = [y for y in (x, *inputs) if y is not None and y.requires_grad]
            if not asked:
                continue
            grads = dict(zip(map(id, asked), torch.autograd.grad(total, asked), strict=True))
            if moved is not None:
                moved[part] = grads[id(x)]
            for y, held in zip(inputs, sums, strict=True):
                if held is not None:
                    held += grads[id(y)]
        made = [None if held is None else held.to(y.dtype) for held, y in zip(sums, (weight, bias), strict=True)]
        ctx.save_for_backward(moved, *made)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    @first_order("the loss of an aligned teacher has no second derivative")
    def backward(ctx, grad, _):
        return None, None, None, None, *(None if x is None else grad.to(x.dtype) * x for x in ctx.saved_tensors)


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    return (slice(start, start + tile) for start in range(0, rows, tile))

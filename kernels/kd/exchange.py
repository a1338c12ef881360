"""What the ranks of a shared vocabulary tell each other about a chunk of rows, in one collective.

Each rank has a slice of every row. It sends a few numbers per row (log-normalisers of its slices, partial sums)
and each rank combines all of them for itself, in the same order, so that all come to the same numbers. That one
gather is enough for the value and the gradient of forward KL, reverse KL, mse, cosine, a top k (which sends the
student's k logits along: whole buckets are then everywhere, for any divergence) and samples, with or without
cross-entropy. A second collective, one float per row, is needed for

- the gradient of jsd, skew_kl, skew_reverse_kl, tvd and probability_mse of dense teachers: it holds the sum over the
  vocabulary of a function of p and q that is not linear in their logarithms, and p and q need the first one's
  normalisers;
- the gradient of reverse KL from a mixture of teachers, whose p needs the normalisers of its teachers;
- the normaliser of TAID towards a mixture, for the same reason.

Values are this rank's part of the sum over the vocabulary; they are added up once, after the last row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mohawk.kernels.kd.vocabulary import VocabularySlice


@final
@dataclass
class Known:
    """Statistics of rows over the whole vocabulary, each (rows) unless said; None where they weren't asked for,
    or where nothing is shared and they are found on the way."""

    student: Tensor | None = None  # log-normaliser of the tempered logits
    raw: Tensor | None = None  # and of the untempered
    teachers: Sequence[Tensor] = ()  # of each of the teacher's parts
    reverse_kl: Tensor | None = None
    products: Tensor | None = None  # |z|^2, |t|^2 and z t, (3, rows)
    chosen: Tensor | None = None  # tempered logits at the ids of a top k, (rows, k)
    rest: Tensor | None = None  # log mass, unnormalised, of the tempered logits at all other ids


def slice_reverse_kl(u: Tensor, v: Tensor, u_norm: Tensor, v_norm: Tensor) -> Tensor:
    """KL(softmax(u), softmax(v)) of this rank's slices (rows, local) as if each were a whole vocabulary, from their
    log-normalisers; 0 where u has no mass here."""
    u_norm, v_norm = (n.masked_fill(n == float("-inf"), 0.0).unsqueeze(-1) for n in (u_norm, v_norm))
    log_ratio = u - u_norm
    q = log_ratio.exp()
    log_ratio -= v - v_norm
    return log_ratio.masked_fill_(q == 0, 0.0).mul_(q).sum(-1)


def whole_kl(a: Tensor, b: Tensor, kl: Tensor) -> Tensor:
    """KL(softmax(u), softmax(v)) of the whole rows, (rows), from those of the slices (`slice_reverse_kl`) and their
    log-normalisers a and b, each (ranks, rows)."""
    shift = (a - torch.logsumexp(a, 0)) - (b - torch.logsumexp(b, 0))
    weight = torch.softmax(a, 0)
    kl = kl.masked_fill(b == float("-inf"), float("inf"))  # inf - inf in the Triton sweep
    return ((kl + shift).masked_fill(weight == 0, 0.0) * weight).sum(0)


def exchange(
    vocabulary: VocabularySlice,
    student: Tensor | None,
    raw: Tensor | None,
    teachers: Sequence[Tensor],
    *,
    reverse_kl: bool = False,
    products: tuple[Tensor, Tensor] | None = None,
    ids: Tensor | None = None,
) -> Known:
    """One collective for a chunk of rows.

    `student`, `raw` and each of `teachers` are this rank's scores (rows, local), to be normalised; `reverse_kl` asks
    for that of `student` from the one teacher; `products` are logits z and t without infinities; `ids` (rows, k)
    are global and ask for the tempered student's buckets.
    """
    normalised = [x for x in (student, raw, *teachers) if x is not None]
    columns = [torch.logsumexp(x, -1) for x in normalised]
    if reverse_kl:
        assert student is not None
        columns.append(slice_reverse_kl(student, teachers[0], columns[0], columns[-1]))
    if products is not None:
        z, t = products
        columns += [z.square().sum(-1), t.square().sum(-1), (z * t).sum(-1)]
    own = None
    if ids is not None:
        assert student is not None
        own = vocabulary.gather(student, ids)
        columns.append(torch.logsumexp(vocabulary.scatter(student, ids, float("-inf")), -1))
    if not columns and own is None:
        return Known()
    packed = torch.stack(columns, -1)
    everyone = vocabulary.every(packed if own is None else torch.cat([packed, own], -1))

    known, at = Known(), iter(range(len(columns)))
    slices = everyone[..., : len(columns)]
    if student is not None:
        known.student = torch.logsumexp(slices[..., next(at)], 0)
    if raw is not None:
        known.raw = torch.logsumexp(slices[..., next(at)], 0)
    first = len(normalised) - len(teachers)
    known.teachers = [torch.logsumexp(slices[..., next(at)], 0) for _ in teachers]
    if reverse_kl:
        known.reverse_kl = whole_kl(slices[..., 0], slices[..., first], slices[..., next(at)])
    if products is not None:
        known.products = torch.stack([slices[..., next(at)].sum(0) for _ in range(3)])
    if own is not None:
        known.rest = torch.logsumexp(slices[..., next(at)], 0)
        known.chosen = everyone[..., len(columns) :].sum(0)
    return known

"""What a teacher thinks of the labels: by which a distillation can weigh its tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohawk.kernels.kd.teachers import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherTopK,
    mixture_weights,
    tail_of,
)
from mohawk.losses.heads import Head

IGNORED = -100


@torch.no_grad()
def label_probability(source, labels: Tensor, vocab_size: int | None = None, rows: int = 256) -> Tensor:
    """(...,) float32: the teacher's probability of each label, 0 where it is ignored or beyond `vocab_size`.

    source: any teacher of `kd_loss` but samples. At temperature 1; of a top k at the temperature it was cut at, where
    ids outside it have the tail's mass spread evenly over the rest of `vocab_size` entries.
    """
    flat, found = labels.flatten(), torch.zeros(labels.numel(), device=labels.device)
    real = ((flat != IGNORED) & (flat < (vocab_size or math.inf))).nonzero().squeeze(1)
    for part in real.split(rows):
        found[part] = _probability(source, part, flat[part], labels.dim(), vocab_size).float()
    return found.view_as(labels)


def _probability(source, rows: Tensor, labels: Tensor, dims: int, vocab_size: int | None) -> Tensor:
    if isinstance(source, TeacherMixture):
        weights = mixture_weights(source)
        return sum(
            w * _probability(t, rows, labels, dims, vocab_size) for w, t in zip(weights, source.teachers, strict=True)
        )
    if isinstance(source, TeacherHidden):
        head = Head(source.head, source.bias, source.logit_scale, source.logit_softcap)
        logits = head.logits(source.hidden.flatten(0, dims - 1)[rows])
    elif isinstance(source, TeacherLogits):
        logits = source.logits.flatten(0, dims - 1)[rows].float()
    elif isinstance(source, TeacherTopK):
        ids, logprobs = (t.flatten(0, dims - 1)[rows] for t in (source.ids, source.logprobs))
        tail = None if source.tail_logprob is None else source.tail_logprob.flatten()[rows]
        hit = ids == labels[:, None]
        vocab = vocab_size or int(ids.max()) + 1
        rest = tail_of(logprobs.float(), tail, vocab).exp() / max(1, vocab - ids.shape[1])
        return torch.where(hit.any(-1), (logprobs.float().exp() * hit).sum(-1), rest)
    else:
        raise ValueError(f"confidence: needs a teacher's probabilities, which {type(source).__name__} does not have")
    return logits[:, :vocab_size].log_softmax(-1).gather(1, labels[:, None]).squeeze(1).exp()

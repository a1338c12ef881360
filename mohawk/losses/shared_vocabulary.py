"""What a teacher said of its whole vocabulary, for a student whose vocabulary is the beginning of it.

Dense teachers need nothing: `kd_loss(..., vocab_size=)` takes the softmax over the shared ids. A cut distribution and
samples hold ids that the student does not have; what is left of them is renormalised here, as that softmax would be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mohawk.kernels.kd.teachers import TeacherSamples, TeacherSource, TeacherTopK


def shared_part(source: TeacherSource, vocab_size: int) -> TeacherSource:
    """The teacher given that the next token is one of the first `vocab_size`.

    Exact for dense teachers, and for a top k of all that mass lies in. Of a shorter top k the ids that are left are
    exact up to how much of its rest (`tail_logprob`) lies beyond `vocab_size`, which is not known: all of it counts as
    shared, but where all shared ids were named. Where fewer than k ids are left, others take their places, the last
    ones of the vocabulary, each with an even share of the rest. Samples are those that are left, weighed up to the same
    sum: draws from the renormalised distribution; a position of which none is left weighs 0.
    """
    if isinstance(source, TeacherSamples):
        kept = source.weights.masked_fill(source.ids >= vocab_size, 0.0)
        left = kept.sum(-1, keepdim=True)
        scale = torch.where(left > 0, source.weights.sum(-1, keepdim=True) / left.clamp_min(1e-30), 0.0)
        return TeacherSamples(source.ids.masked_fill(source.ids >= vocab_size, 0), kept * scale)
    if source.parts():
        return source
    if not isinstance(source, TeacherTopK):
        raise TypeError(f"no way to cut a {type(source).__name__} down to a shared vocabulary")
    if source.ids.shape[-1] < vocab_size and not bool((source.ids >= vocab_size).any()):
        return source
    return _shared_top_k(source, vocab_size)


def told_of_cut(source: TeacherSource, vocab_size: int, rows: Tensor) -> str | None:
    """One line about what `shared_part` does to the answers of some rows, bool (...), in shares of their probability;
    None where it changes nothing, or does so exactly and leaves no row without an answer. Waits for the device."""
    if not isinstance(source, (TeacherTopK, TeacherSamples)) or not bool(rows.any()):
        return None
    beyond, known = source.ids[rows] >= vocab_size, f"the student's vocabulary ends at {vocab_size}"
    if isinstance(source, TeacherSamples):
        weights = source.weights[rows].float()
        left = weights.masked_fill(beyond, 0.0).sum(-1)
        share, without = 1 - left.sum() / weights.sum(), ((left == 0) & (weights.sum(-1) > 0)).float().mean()
        if not bool(without > 0):
            return None
        return (
            f"{known}: {_percent(share)} of the teacher's samples lie behind it and are left out, and "
            f"{_percent(without)} of the positions have none left, so that nothing is learned there"
        )
    named = source.logprobs[rows].float().exp()
    tail = source.tail_logprob
    tail = (1 - named.sum(-1)).clamp(min=0) if tail is None else tail[rows].float().exp()
    tail = tail.masked_fill((~beyond).sum(-1) >= vocab_size, 0.0)  # which all lies behind
    if not bool(tail.sum() > 0):
        return None
    share = named.masked_fill(~beyond, 0.0).sum() / named.sum()
    return (
        f"{known}: {_percent(share)} of the probability that the teacher's top {named.shape[-1]} hold lies behind it "
        f"and is left out; how much does of the {_percent(tail.mean())} that they do not hold is not known, and all of "
        "that counts as the student's; an online teacher, or a cache of hidden states, leaves nothing open"
    )


def _percent(share: Tensor) -> str:
    return f"{100 * float(share):.3g} %"


def _shared_top_k(source: TeacherTopK, vocab_size: int) -> TeacherTopK:
    """A top min(k, vocab_size) of distinct ids below `vocab_size`, those of the teacher first, and the rest's mass."""
    k = min(source.ids.shape[-1], vocab_size)
    beyond, order = torch.sort((source.ids >= vocab_size).to(torch.uint8), dim=-1, stable=True)
    ids, logprobs = (t.gather(-1, order)[..., :k] for t in (source.ids, source.logprobs.float()))
    missing = beyond[..., :k].bool()
    tail = source.tail_logprob
    if tail is None:  # the mass that all k leave over
        tail = torch.log((-torch.expm1(source.logprobs.float().logsumexp(-1).clamp(max=0.0))).clamp_min(1e-7))
    # where all shared ids are named, the rest lies beyond them
    tail = tail.float().masked_fill((source.ids < vocab_size).sum(-1) >= vocab_size, float("-inf"))
    logprobs = logprobs.masked_fill(missing, float("-inf"))
    total = torch.logaddexp(logprobs.logsumexp(-1), tail)
    tail = torch.where(total > float("-inf"), tail - total, 0.0)  # of a position that has nothing left: nothing known
    logprobs = torch.where(total[..., None] > float("-inf"), logprobs - total[..., None], float("-inf"))
    if not bool(missing.any()):
        return TeacherTopK(ids, logprobs, tail)
    count = missing.sum(-1)
    others = (vocab_size - k + count).clamp(min=1)  # ids that the teacher did not name
    share = tail - others.log()
    filled = torch.where(missing, share[..., None], logprobs)
    rest = tail + torch.log1p(-(count / others).clamp(max=1.0))
    return TeacherTopK(_filled(ids, missing, vocab_size), filled, torch.where(count > 0, rest, tail))


def _filled(ids: Tensor, missing: Tensor, vocab_size: int) -> Tensor:
    """The ids with distinct others in the places that are missing: of the last k ids those not named, from the end."""
    k = ids.shape[-1]
    last = vocab_size - k
    named = torch.zeros_like(ids)
    named.scatter_reduce_(-1, (ids - last).clamp(0, k - 1), ((ids >= last) & ~missing).long(), "amax")
    free = last + torch.sort(named.flip(-1), dim=-1, stable=True).indices.mul(-1).add(k - 1)  # not named first
    rank = (missing.cumsum(-1) - 1).clamp(min=0)
    return torch.where(missing, free.gather(-1, rank), ids)

"""`kd_loss` and `linear_kd_loss`: knowledge distillation with everything a vocabulary brings along.

`kd_weight * T^2 * D(teacher, student) + ce_weight * CE`, from logits or from hidden states and head weights.
The backends are reference.py (the definition), chunked.py and triton_backend.py; call.py carries the autograd.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from mohawk.kernels.common.sharded import gathered, in_parts, own_part, slices
from mohawk.kernels.kd import call as kd_call
from mohawk.kernels.kd import compiled, shared_head
from mohawk.kernels.kd.call import KDParts
from mohawk.kernels.kd.divergences import described
from mohawk.kernels.kd.options import Settings
from mohawk.kernels.kd.teachers import (
    TAIDSchedule,
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherSamples,
    TeacherSource,
    TeacherTAID,
    TeacherTopK,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = [
    "KDParts",
    "TAIDSchedule",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherSamples",
    "TeacherTAID",
    "TeacherTopK",
    "kd_loss",
    "linear_kd_loss",
]


class _Options(TypedDict, total=False):
    """What both functions take by keyword, beside `return_parts`, on which the type of what they return hangs."""

    divergence: str
    temperature: float
    kd_weight: float
    ce_weight: float
    beta: float
    lam: float
    token_weights: Tensor | None
    ignore_index: int
    vocab_size: int | None
    reduction: str
    normalizer: float | Tensor | None
    group: ProcessGroup | None
    backend: str
    precision: str


class _LogitsOptions(_Options, total=False):
    inplace: bool


class _LinearOptions(_Options, total=False):
    student_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_LogitsOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True, "rows"],
    **options: Unpack[_LogitsOptions],
) -> tuple[Tensor, KDParts]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: bool | Literal["rows"],
    **options: Unpack[_LogitsOptions],
) -> Tensor | tuple[Tensor, KDParts]: ...
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lam: float = 0.1,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool | Literal["rows"] = False,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    precision: str = "full",
) -> Tensor | tuple[Tensor, KDParts]:
    """Distillation loss from the student's logits: `kd_weight * T^2 * D + ce_weight * CE`.

    Args:
        student_logits: (..., vocab), any float dtype; the loss is computed in float32 (float64 from float64). Of a
            DTensor whose vocabulary is split over processes, as a tensor-parallel head gives it, each process takes its
            slice, and `group` is that of its mesh; where its rows are split each takes its own.
        teacher: logits (..., vocab) of any float dtype, or one of the sources `Teacher...`. Gets no gradient. With
            reduction none it must stay as it is until the backward.
        labels: (...), int64: row i's target, already aligned (nothing is shifted here). Rows of `ignore_index` are
            skipped by both terms. None: every row counts, and `ce_weight` must be 0. For next-token targets pad the
            labels, `F.pad(labels[:, 1:], (0, 1), value=-100)`, and keep the logits whole: `logits[:, :-1]` would
            have to be copied.
        divergence: one of those listed below. Those between raw logits know no temperature
            and leave out words whose logit on either side is -inf or below -1e15, as models suppress words.
            beta, of jsd and adaptive_kl, is from 0 to 1; lam, of the skewed ones, from 0 (no skew) to below 1.
        temperature: T, from 0.001 to 1000, dividing both sides' logits; the divergence is multiplied by T^2 (Hinton
            et al. 2015). The cross-entropy is at temperature 1.
        kd_weight, ce_weight: 0 or above.
        token_weights: (...) of a float dtype, without gradient; multiplies the loss of each row. The mean still
            divides by the number of real rows.
        vocab_size: only the first so many entries are real, on either side, which may then differ in width.
        reduction: mean over the real rows, sum, or none: (...), 0 in ignored rows.
        normalizer: with reduction mean, divides instead of the count of real rows: their count over all accumulation
            steps and processes, divided by what the trainer divides gradients by itself. Plain torch: nothing; DDP,
            FSDP and transformers' Trainer (`num_items_in_batch`): the processes; accelerate and Lightning: processes
            x accumulation steps. docs/losses.md has each.
        return_parts: also return `KDParts(kd, ce)`, reduced as the loss is; "rows": those of each row (...), 0 in
            ignored rows, without weights and without the mean.
        inplace: write the gradient into `student_logits`, which are lost: no second array of their size is
            made. For contiguous logits that share no memory with the teacher, not float16, reduction mean or sum,
            not with the reference; of no effect under torch.compile.
        group: the ranks among which the vocabulary is split: logits (student's and teacher's alike) are this
            rank's slice, slices lie in the order of ranks and may differ in size; labels, ids and
            `vocab_size` are global. Every rank gets the whole loss, and the gradient of its slice.
        backend: auto, reference, chunked or triton. auto takes triton on a GPU where it is installed; reference knows
            no group and can't be compiled.
        precision: of logits made here from hidden states, as a `TeacherHidden`'s are: full, or rounded, see
            `linear_kd_loss`.

    Returns:
        The loss, float32 (float64 from float64). With no real row it is 0, and so are the gradients.

    Raises:
        ValueError: anything wrong with shapes, dtypes, devices, options, labels or ids, before any work.
        RuntimeError: in a second derivative, which only the reference has (under torch.compile, whenever
            create_graph asks for one); in a second backward without retain_graph.
    """
    settings = Settings(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        beta=beta,
        lam=lam,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        reduction=reduction,
        return_parts=return_parts,
        backend=backend,
        precision=precision,
        inplace=inplace,
    )
    return _distil((student_logits,), teacher, labels, token_weights, normalizer, group, settings)


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True, "rows"],
    **options: Unpack[_LinearOptions],
) -> tuple[Tensor, KDParts]: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    return_parts: bool | Literal["rows"],
    **options: Unpack[_LinearOptions],
) -> Tensor | tuple[Tensor, KDParts]: ...
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Tensor | TeacherSource,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lam: float = 0.1,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_parts: bool | Literal["rows"] = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    precision: str = "full",
) -> Tensor | tuple[Tensor, KDParts]:
    """`kd_loss` from hidden states and the head: neither model's logits are ever whole.

    Logits are float32 whatever the dtype of hidden states and head. Under autocast hidden states and heads (not biases)
    are rounded to its dtype first, as nn.Linear would, on GPUs and on CPUs with AMX; logits and gradients stay as
    precise as the products of those are, and elsewhere, where these would be no faster, autocast changes nothing.
    Ignored rows are left out of the matrix products; gradients of the head add up in float32; a head or hidden states
    that need no gradient get none made. The student's and the teacher's hidden sizes may differ, and either head may be
    tied to anything.

    Args:
        student_hidden: (..., hidden), final hidden states after the last norm.
        student_head: (vocab, hidden), nn.Linear's layout, in the dtype of the hidden states (free under
            autocast). A DTensor, as FSDP2 holds it outside of its module's forward pass, is used as it lies
            where the processes have fewer rows together than it has: rows then go to all of them, and neither head is
            ever whole; else it is gathered, a teacher's too. Either way each process has the loss of its own rows, and
            the head's gradient is the mean over the processes, as FSDP gives other parameters'. With `group` its own
            slice is taken.
        teacher: usually `TeacherHidden`; also logits (..., vocab) or any other source.
        student_bias: (vocab).
        logit_scale, logit_softcap: logits are `logit_scale * (hidden @ head.T + bias)`, then `logit_softcap *
            tanh(logits / logit_softcap)`.
        group: as in `kd_loss`: heads and biases are this rank's slices, hidden states are whole on every rank
            and so is their gradient.
        precision: full, or rounded: on a CPU, bfloat16 hidden states are multiplied with bfloat16 heads as nn.Linear
            does, student's and teacher's, and logits are rounded with the product's result; under autocast to bfloat16
            hidden states and heads of any dtype are. Forward KL then takes two thirds of the CPU time (0.8 for 1.2
            seconds on an AMD EPYC) and its gradient is off by 2 % at a KL of 0.3, 6 % at 0.03, 19 % at 0.003 and 69 %
            at 0.0003, for 0.3 %. Of no effect on GPUs, whose products keep float32 logits in the same time, and for
            other dtypes.
        Others: see `kd_loss`.

    Returns, raises:
        As `kd_loss`.
    """
    settings = Settings(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        beta=beta,
        lam=lam,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        reduction=reduction,
        return_parts=return_parts,
        backend=backend,
        precision=precision,
        linear=True,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )
    student = (student_hidden, student_head) if student_bias is None else (student_hidden, student_head, student_bias)
    return _distil(student, teacher, labels, token_weights, normalizer, group, settings)


def _distil(
    student: tuple[Tensor, ...],
    teacher: Tensor | TeacherSource,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    group: ProcessGroup | None,
    settings: Settings,
) -> Tensor | tuple[Tensor, KDParts]:
    if isinstance(teacher, Tensor):
        teacher = TeacherLogits(teacher)
    if settings.linear and isinstance(student[0], Tensor):
        kind = student[0].device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            settings = settings._replace(autocast=torch.get_autocast_dtype(kind))
    if isinstance(teacher, TeacherSource) and not torch.compiler.is_compiling():
        if settings.linear:
            labels, token_weights = own_part(labels), own_part(token_weights)
            them = shared_head.everyone(student, teacher, settings) if group is None and in_parts(student[1]) else None
            if them is not None:
                given = student, teacher, labels, token_weights, normalizer
                loss, kd, ce = shared_head.distil(*given, them, settings)
                return (loss, KDParts(kd, ce)) if settings.return_parts else loss
            hidden, *head = student
            student = (hidden, *(gathered(x) if group is None else own_part(x) for x in head))
        else:
            logits, split = slices(student[0])
            student, group = (logits,), split or group
        teacher = teacher.without_parts(group)
        labels, token_weights = own_part(labels), own_part(token_weights)
    distil = compiled.distil if torch.compiler.is_compiling() else kd_call.distil
    loss, kd, ce = distil(student, teacher, labels, token_weights, normalizer, group, settings)
    return (loss, KDParts(kd.detach(), ce.detach())) if settings.return_parts else loss


if kd_loss.__doc__:  # python -OO has none
    kd_loss.__doc__ = inspect.cleandoc(kd_loss.__doc__) + "\n\nDivergences:\n" + textwrap.indent(described(), "    ")

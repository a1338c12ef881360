"""The loss under torch.compile: one opaque operator, so that a compiled model around it stays one graph.

The operator does in eager mode what an uncompiled call does, checks included. Its arguments can only be
tensors and plain values, so a teacher travels as a list of tensors, numbers, and a word for each of its fields.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohawk.kernels.kd import call as kd_call
from mohawk.kernels.kd import checks as kd_checks
from mohawk.kernels.kd import gradients as kd_gradients
from mohawk.kernels.kd.options import Settings
from mohawk.kernels.kd.teachers import SOURCES, TeacherSource
from mohawk.kernels.kd.tile import BY_HAND

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What None travels as.
NO_NUMBER = math.nan
NO_SIZE = -(1 << 62)
PARTS = (False, True, "rows")  # what `return_parts` travels as: a place in here
AUTOCAST = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)  # and what `autocast` does


def _flatten(value: Any, words: list[str], tensors: list[Tensor], numbers: list[float]) -> None:
    """A source, or a field of one: a word for each."""
    if isinstance(value, TeacherSource):
        words.append(type(value).__name__)
        for name in value.__match_args__:
            _flatten(getattr(value, name), words, tensors, numbers)
    elif isinstance(value, Tensor):
        words.append("tensor")
        tensors.append(value)
    elif value is None:
        words.append("none")
    elif isinstance(value, (list, tuple)):
        words.append(f"list {len(value)}")
        for one in value:
            _flatten(one, words, tensors, numbers)
    else:
        words.append("number")
        numbers.append(value)


def _unflatten(words: list[str], tensors: list[Tensor], numbers: list[float]) -> Any:
    """The reverse; takes its parts off the front of each list."""
    kind, *count = words.pop(0).split()
    if kind == "tensor":
        return tensors.pop(0)
    if kind == "none":
        return None
    if kind == "number":
        return numbers.pop(0)
    if kind == "list":
        return [_unflatten(words, tensors, numbers) for _ in range(int(count[0]))]
    source = SOURCES[kind]
    return source(*[_unflatten(words, tensors, numbers) for _ in source.__match_args__])


@torch.library.custom_op("mohawk::kd_loss", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: Tensor | None,
    numbers: Tensor,
    words: str,
    divergence: str,
    reduction: str,
    backend: str,
    ints: list[int],
    needs: list[bool],
    group: str,
) -> list[Tensor]:
    temperature, kd_weight, ce_weight, beta, lam, logit_scale, softcap, *of_teacher = numbers.tolist()
    ignore_index, vocab_size, return_parts, inplace, linear, autocast, precision = ints
    settings = Settings(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        beta=beta,
        lam=lam,
        ignore_index=ignore_index,
        vocab_size=None if vocab_size == NO_SIZE else vocab_size,
        reduction=reduction,
        return_parts=PARTS[return_parts],
        backend=backend,
        inplace=bool(inplace),
        linear=bool(linear),
        logit_scale=logit_scale,
        logit_softcap=None if math.isnan(softcap) else softcap,
        autocast=AUTOCAST[autocast],
        precision=kd_checks.PRECISIONS[precision],
    )
    process_group = None
    if group:
        from torch.distributed import distributed_c10d

        # A name is a NewType of str, which torch's operators know as str.
        process_group = distributed_c10d._resolve_process_group(group)  # pyrefly: ignore[bad-argument-type]
    source: TeacherSource = _unflatten(words.split("; "), list(teacher), of_teacher)
    call = kd_call.prepare(tuple(student), source, labels, token_weights, normalizer, process_group, settings)
    if call.backend == "reference":
        raise ValueError("backend 'reference' can't be compiled; use 'chunked', or call it outside torch.compile")
    # Autograd rests within an operator.
    if not kd_gradients.by_hand(divergence):
        raise ValueError(f"divergence {divergence!r} has no gradient by hand, so it can't be compiled")
    if not source.parts() and type(source) not in BY_HAND:
        raise ValueError(f"{type(source).__name__} has no gradient by hand, so it can't be compiled")
    call.inplace = False  # checked; what a compiled model's memory holds is the compiler's
    rows, grads = call.forward(tuple(student), call.scale, tuple(needs))
    loss, kd, ce = call.reduce(rows.kd, rows.ce)
    # Row by row both are parts of one tensor, and the outputs of an operator share no memory.
    return [loss, kd.clone(), ce.clone(), *(loss.new_empty(0) if g is None else g for g in grads)]


@_op.register_fake
def _(
    student, teacher, labels, token_weights, normalizer, numbers, words, divergence, reduction, backend, ints, needs,
    group,
):  # fmt: skip
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    shape = student[0].shape[:-1] if reduction == "none" else ()
    parts = student[0].shape[:-1] if PARTS[ints[2]] == "rows" else shape
    terms = [student[0].new_empty(x, dtype=dtype) for x in (shape, parts, parts)]
    held = {torch.float16: torch.float32}
    grads = [
        torch.empty(x.shape, dtype=held.get(x.dtype, x.dtype), device=x.device) if need else x.new_empty(0, dtype=dtype)
        for x, need in zip(student, needs, strict=True)
    ]
    return terms + grads


def _setup_context(ctx, inputs, output):
    student, teacher, labels, token_weights, normalizer, numbers, *plain = inputs
    ctx.plain, ctx.count, ctx.teacher_count = plain, len(student), len(teacher)
    ctx.dtypes = [x.dtype for x in student]
    if plain[2] == "none":
        ctx.save_for_backward(*student, *teacher, labels, token_weights, normalizer, numbers)
    else:
        ctx.save_for_backward(*output[3:])


def _backward(ctx, grad):
    if torch.is_grad_enabled():  # create_graph
        raise RuntimeError(kd_call.NO_SECOND_DERIVATIVE)
    words, divergence, reduction, backend, ints, needs, group = ctx.plain
    n, m = ctx.count, ctx.teacher_count
    if reduction != "none":
        made = [g * grad[0] for g in ctx.saved_tensors]
    else:
        # Row by row: the same operator with the incoming gradient as token weights.
        saved = ctx.saved_tensors
        labels, token_weights, normalizer, numbers = saved[n + m :]
        weights = grad[0] if token_weights is None else grad[0] * token_weights
        wanted = [bool(x) for x in ctx.needs_input_grad[0]]
        tensors = (list(saved[:n]), list(saved[n : n + m]), labels, weights, normalizer, numbers)
        made = _op(*tensors, words, divergence, "sum", backend, ints, wanted, group)[3:]
        needs = wanted
    student = [g.to(dtype) if need else None for g, dtype, need in zip(made, ctx.dtypes, needs, strict=True)]
    return student, [None] * m, *[None] * 11


_op.register_autograd(_backward, setup_context=_setup_context)


def distil(
    student: tuple[Tensor, ...],
    teacher: TeacherSource,
    labels: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    group: ProcessGroup | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, kd and ce, as call.distil would make them."""
    s = settings
    words: list[str] = []
    tensors: list[Tensor] = []
    of_teacher: list[float] = []
    if not isinstance(teacher, TeacherSource):
        raise ValueError(f"teacher is a {type(teacher).__name__}; it must be a logits tensor or a teacher source")
    _flatten(teacher, words, tensors, of_teacher)
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = torch.full((), normalizer, dtype=torch.float64, device=student[0].device)
    for name, tensor in (("token_weights", token_weights), ("normalizer", normalizer)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but none is computed for it; pass {name}.detach()")
    softcap = NO_NUMBER if s.logit_softcap is None else s.logit_softcap
    numbers = [s.temperature, s.kd_weight, s.ce_weight, s.beta, s.lam, s.logit_scale, softcap, *of_teacher]
    numbers = torch.stack([torch.full((), x, dtype=torch.float64) for x in numbers])
    kd_checks.one_of("precision", s.precision, kd_checks.PRECISIONS)
    flags = [PARTS.index(s.return_parts), int(s.inplace), int(s.linear), AUTOCAST.index(s.autocast)]
    flags.append(kd_checks.PRECISIONS.index(s.precision))
    ints = [s.ignore_index, NO_SIZE if s.vocab_size is None else s.vocab_size, *flags]
    needs = [torch.is_grad_enabled() and x.requires_grad and s.reduction != "none" for x in student]
    name = "" if group is None else group.group_name
    inputs = (list(student), [x.detach() for x in tensors], labels, token_weights, normalizer, numbers)
    loss, kd, ce, *_ = _op(*inputs, "; ".join(words), s.divergence, s.reduction, s.backend, ints, needs, name)
    return loss, kd, ce

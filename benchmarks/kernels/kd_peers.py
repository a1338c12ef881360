"""Distillation losses of other packages, and plain torch, as functions of the same arguments.

`loss(hidden, head, teacher_hidden, teacher_head, labels)`, mean over real tokens, at temperature 1. Each imports its
package when it is called. What a package can't do (cross-entropy in the same pass, packing of ignored rows) is left
to it: nothing is added here that its users would not have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_forward_kl(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor | None
) -> Tensor:
    """What a training loop writes: logits of both, log_softmax in float32, kl_div."""
    with torch.no_grad():
        target = F.log_softmax((teacher @ teacher_head.T).float(), -1)
    log_q = F.log_softmax((hidden @ head.T).float(), -1)
    rows = F.kl_div(log_q, target, log_target=True, reduction="none").sum(-1)
    return rows.mean() if labels is None else rows[labels != -100].sum() / (labels != -100).sum()


def eager_forward_kl_ce(hidden, head, teacher, teacher_head, labels) -> Tensor:
    with torch.no_grad():
        target = F.log_softmax((teacher @ teacher_head.T).float(), -1)
    logits = (hidden @ head.T).float()
    rows = F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="none").sum(-1)
    return rows.mean() + 0.5 * F.cross_entropy(logits, labels)


def eager_jsd(hidden, head, teacher, teacher_head, labels) -> Tensor:
    with torch.no_grad():
        lp = F.log_softmax((teacher @ teacher_head.T).float(), -1)
    lq = F.log_softmax((hidden @ head.T).float(), -1)
    lm = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0))
    kl = (F.kl_div(lm, lp, log_target=True, reduction="none") + F.kl_div(lm, lq, log_target=True, reduction="none")) / 2
    return kl.sum(-1).mean()


def torchtune_forward_kl(hidden, head, teacher, teacher_head, labels) -> Tensor:
    """torchtune's ForwardKLWithChunkedOutputLoss, eight chunks, as its source has it (the package needs torchao)."""
    with torch.no_grad():
        target = (teacher @ teacher_head.T).chunk(8)
    total = 0.0
    for student, teacher_logits in zip((hidden @ head.T).chunk(8), target, strict=True):
        p = F.softmax(teacher_logits, -1, dtype=torch.float32)
        log_q = F.log_softmax(student, -1, dtype=torch.float32)
        product = torch.masked_fill(p * log_q, torch.isinf(student), 0)
        total = total - product.sum(-1).sum()
    return total / hidden.shape[0]


def eager_ce(hidden, head, teacher, teacher_head, labels) -> Tensor:
    return F.cross_entropy((hidden @ head.T).float(), labels)


def torch_linear_ce(hidden, head, teacher, teacher_head, labels) -> Tensor:
    """torch's own fused one, from 2.13 on, in chunks of rows as it chooses them."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch has linear_cross_entropy from 2.13 on")
    return F.linear_cross_entropy(hidden, head, labels, options=torch.nn.LinearCrossEntropyOptions())


def quack_ce(hidden, head, teacher, teacher_head, labels) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, head, labels, chunk_size=8192, reduction="mean", tuned=False)


def liger_ce(hidden, head, teacher, teacher_head, labels) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(head, hidden, labels)


def _liger(beta: float, chunk_size: int, compiled: bool, hidden, head, teacher, teacher_head, labels) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.0, compiled=compiled, chunk_size=chunk_size
    )
    if labels is None:
        labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    result = loss(hidden, head, teacher, teacher_head, labels)
    return result[0] if isinstance(result, tuple) else result


def liger_forward_kl_1024(*args) -> Tensor:
    return _liger(0.0, 1024, False, *args)


def liger_forward_kl_256(*args) -> Tensor:
    return _liger(0.0, 256, False, *args)


def liger_jsd_256(*args) -> Tensor:
    return _liger(0.5, 256, False, *args)


def liger_compiled_forward_kl(*args) -> Tensor:
    """As it is shipped: its chunks compiled."""
    return _liger(0.0, 1024, True, *args)


def liger_compiled_jsd(*args) -> Tensor:
    return _liger(0.5, 1024, True, *args)


def trl_gkd_jsd(hidden, head, teacher, teacher_head, labels) -> Tensor:
    """GKDTrainer's loss, on logits."""
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer
    with torch.no_grad():
        target = teacher @ teacher_head.T
    if labels is None:
        labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)  # all count
    return GKDTrainer.generalized_jsd_loss((hidden @ head.T)[None], target[None], labels[None], beta=0.5)


def _trl(beta: float, tiles: tuple[int, int] | None, hidden, head, teacher, teacher_head, labels) -> Tensor:
    from trl.kernels import chunked_divergence

    if tiles is not None:
        chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE = tiles
    function = chunked_divergence.ChunkedDivergenceFunction
    return function.apply(hidden, head, None, teacher, teacher_head, None, beta)[0].mean()


def trl_forward_kl(*args) -> Tensor:
    return _trl(0.0, None, *args)


def trl_forward_kl_small(*args) -> Tensor:
    return _trl(0.0, (256, 8192), *args)


def trl_jsd(*args) -> Tensor:
    return _trl(0.5, None, *args)


def orda_forward_kl(hidden, head, teacher, teacher_head, labels) -> Tensor:
    import orda_kernel

    if labels is None:
        labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    source = orda_kernel.SeparateTeacher(teacher, teacher_head)
    backend = "triton" if hidden.is_cuda else "torch"
    return orda_kernel.distillation_loss(
        hidden, head, labels, source, student_ce_weight=0.0, kl_weight=1.0, backend=backend
    ).loss


def liger_triton_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Its own kernel, on log-probabilities."""
    from liger_kernel.transformers import LigerKLDIVLoss

    with torch.no_grad():
        target = F.log_softmax(teacher.float(), -1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(F.log_softmax(student.float(), -1), target)


def liger_triton_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    with torch.no_grad():
        target = F.log_softmax(teacher.float(), -1)
    return LigerJSD(beta=0.5)(F.log_softmax(student.float(), -1), target)

"""Distillation in plain PyTorch, with DistributedDataParallel and gradient accumulation.

    torchrun --nproc-per-node 2 examples/torch_ddp.py
    python examples/torch_ddp.py                          # the same in one process

The student is compared from its hidden states, so no logits are ever whole, neither its own nor the teacher's.
"""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mohawk import TeacherHidden, linear_kd_loss


class TinyLM(nn.Module):
    """Stands for any language model: what is needed are its last hidden states and its head's weight. Of a
    Hugging Face model `mohawk.Head.of(model)` has that, with a LoRA on it if there is one."""

    def __init__(self, vocab: int = 64, width: int = 32):
        super().__init__()
        self.embedding, self.body = nn.Embedding(vocab, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))


class Distillation(nn.Module):
    """Student and teacher as one module whose output is the loss: DDP and FSDP prepare a model's weights, the head's
    among them, when its `forward` is called, so that is where they must be used."""

    def __init__(self, student: nn.Module, teacher: nn.Module, **loss):
        super().__init__()
        self.student, self.teacher, self.loss = student, teacher.eval().requires_grad_(False), loss

    def forward(self, ids: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
        """The loss of `ids` and `labels`, both (rows, tokens), int64; a label of -100 counts for nothing."""
        with torch.no_grad():
            teacher = TeacherHidden(self.teacher.hidden(ids), self.teacher.head.weight)
        # Position i predicts token i + 1. Padding the labels, where slicing the hidden states would copy them.
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        hidden, head = self.student.hidden(ids), self.student.head.weight
        return linear_kd_loss(hidden, head, teacher, labels, normalizer=normalizer, **self.loss)


def train_step(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, batches: list) -> float:
    """One step over every process's micro-batches (ids, labels); returns the mean loss over all real tokens."""
    # Micro-batches and processes hold different numbers of real tokens. A mean of their means would weigh tokens
    # unequally, so all divide by one count, known before the first backward pass.
    count = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
    dist.all_reduce(count)
    normalizer = count.clamp(min=1) / dist.get_world_size()  # DDP averages the processes' gradients
    total = torch.zeros((), device=count.device)
    for i, (ids, labels) in enumerate(batches):
        # Gradients travel once a step, with the last micro-batch.
        with contextlib.nullcontext() if i == len(batches) - 1 else model.no_sync():
            loss = model(ids, labels, normalizer)
            loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def train(steps: int) -> list[float]:
    torch.manual_seed(0)  # the same models everywhere
    student, teacher = TinyLM(), TinyLM(width=48)  # hidden sizes may differ
    model = DistributedDataParallel(Distillation(student, teacher, temperature=2.0, kd_weight=0.9, ce_weight=0.1))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())  # other data everywhere
    batches = [(ids, ids) for ids in torch.randint(0, 64, (2, 4, 16))]
    return [train_step(model, optimizer, batches) for _ in range(steps)]


def main(steps: int = 5) -> list[float]:
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")  # on GPUs nccl, with models and batches moved to this process's device
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # The model must be gone before its group: DDP, taken down last, joins gloo's threads with the interpreter's lock in
    # hand, which one of them may be waiting for.
    losses = train(steps)
    if dist.get_rank() == 0:
        print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

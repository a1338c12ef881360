"""The losses inside other people's training code: the same loss and gradients as what stood there before."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from mohawk.kernels.kd_loss import TeacherHidden, kd_loss, linear_kd_loss

VOCAB, HIDDEN = 40, 16


class Tiny(torch.nn.Module):
    """A model that returns its loss, so that the head is used where DDP and FSDP expect it: in forward."""

    def __init__(self, teacher: "Tiny | None" = None):
        super().__init__()
        self.embedding, self.body = torch.nn.Embedding(VOCAB, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        self.teacher = [teacher]  # in a list: not a submodule, so neither trained nor saved

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(self.embedding(ids)))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        teacher = self.teacher[0]
        with torch.no_grad():
            target = TeacherHidden(teacher.hidden(ids[:, :-1]), teacher.head.weight)
        return linear_kd_loss(
            self.hidden(ids[:, :-1]), self.head.weight, target, labels[:, 1:], ce_weight=0.5, normalizer=normalizer
        )


def batch(seed: int, rows: int):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, 9), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.4, -100)
    return ids, labels


def models():
    torch.manual_seed(0)
    teacher = Tiny()
    return Tiny(teacher), teacher


def ddp_rank(rank: int, world: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    student, _ = models()
    wrapped = DistributedDataParallel(student)
    ids, labels = batch(rank, 2 + rank)  # ranks with different numbers of real tokens
    # DDP averages the ranks' gradients: with the mean count as normalizer that is the mean over all real tokens.
    count = (labels[:, 1:] != -100).sum().float()
    dist.all_reduce(count)
    wrapped(ids, labels, count / world).backward()
    if rank == 0:
        torch.save([p.grad for p in student.parameters()], results)
    dist.destroy_process_group()


def test_distributed_data_parallel_is_one_process(tmp_path):
    mp.start_processes(ddp_rank, (2, f"{tmp_path}/store", f"{tmp_path}/0.pt"), nprocs=2, start_method="fork")
    student, teacher = models()
    both = [batch(rank, 2 + rank) for rank in range(2)]
    ids, labels = (torch.cat([one[k] for one in both]) for k in range(2))
    # The loss as a training loop has it, over both ranks' tokens at once.
    real = labels[:, 1:] != -100
    logits, target = (m.head(m.hidden(ids[:, :-1]))[real] for m in (student, teacher))
    kl = F.kl_div(logits.log_softmax(-1), target.detach().log_softmax(-1), log_target=True, reduction="batchmean")
    (kl + 0.5 * F.cross_entropy(logits, labels[:, 1:][real])).backward()
    for got, parameter in zip(torch.load(f"{tmp_path}/0.pt"), student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_gradient_accumulation_is_one_batch():
    """Micro-batches of different numbers of real tokens, each divided by the count of all of them."""
    student, _ = models()
    ids, labels = batch(5, 6)
    count = (labels[:, 1:] != -100).sum()
    student(ids, labels, count).backward()
    whole = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        student(ids[rows], labels[rows], count).backward()
    for got, expected in zip(student.parameters(), whole, strict=True):
        torch.testing.assert_close(got.grad, expected)


def test_transformers_trainer(tmp_path):
    """A Trainer subclass: with kd_weight 0 the loss of every step is Trainer's own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class DistillingTrainer(transformers.Trainer):
        def __init__(self, *args, teacher, kd_weight=1.0, ce_weight=0.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.teacher, self.weights = teacher.eval(), {"kd_weight": kd_weight, "ce_weight": ce_weight}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                target = self.teacher(**inputs).logits
            next_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = kd_loss(outputs.logits, target, next_labels, normalizer=num_items_in_batch, **self.weights)
            return (loss, outputs) if return_outputs else loss

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*batch(1, 8), strict=True)]
    for row in rows:
        row["labels"][0] = -100  # so that Trainer's count of labels is that of shifted labels

    def train(kind, **extra):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        trainer = kind(model=model, args=arguments, train_dataset=rows, **extra)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model

    torch.manual_seed(1)
    teacher = transformers.LlamaForCausalLM(config)
    before, plain = train(transformers.Trainer)
    after, ours = train(DistillingTrainer, teacher=teacher, kd_weight=0.0, ce_weight=1.0)
    assert after == pytest.approx(before, rel=1e-4)
    for got, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    distilled, _ = train(DistillingTrainer, teacher=teacher)
    assert all(loss > 0 for loss in distilled)

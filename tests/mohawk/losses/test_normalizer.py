"""The functions of docs/losses.md for each trainer: whatever divides gradients, they are those of one batch of all rows
that count."""

import contextlib
import re
from pathlib import Path

import lightning
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mohawk import kd_loss
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401

pytestmark = pytest.mark.usefixtures("cheap_training")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "losses.md"
WIDTH, VOCAB, PROCESSES = 5, 11, 2


def of_page(name):
    """A function as the page has it."""
    found = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if f"def {name}(" in code]
    names = {"torch": torch, "kd_loss": kd_loss, "contextlib": contextlib}
    exec("\n".join(found), names)
    return names[name]


def student():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB)


def batches(rank):
    """Micro-batches of other sizes, with ignored rows, of one process."""
    g = torch.Generator().manual_seed(rank)
    made = []
    for rows in ((3, 7), (6, 2))[rank]:
        labels = torch.randint(0, VOCAB, (rows,), generator=g)
        labels[0] = -100
        made.append((torch.randn(rows, WIDTH, generator=g), torch.randn(rows, VOCAB, generator=g), labels))
    return made


def expected(ranks):
    x, teacher, labels = (torch.cat(parts) for parts in zip(*[b for rank in ranks for b in batches(rank)], strict=True))
    model = student()
    kd_loss(model(x), teacher, labels).backward()
    return [p.grad for p in model.parameters()]


def test_plain_torch():
    model = student()
    of_page("step_of_torch")(model, batches(0))
    torch.testing.assert_close([p.grad for p in model.parameters()], expected([0]))


def by_ddp(rank):
    model = DistributedDataParallel(student())
    of_page("step_of_ddp")(model, batches(rank))
    return [p.grad for p in model.parameters()]


def by_accelerate(rank):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == PROCESSES
    model = accelerator.prepare(student())
    of_page("step_of_accelerate")(accelerator, model, batches(rank))
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("body", (by_ddp, by_accelerate))
def test_processes(body, tmp_path):
    for grads in in_processes(tmp_path, PROCESSES, body):
        torch.testing.assert_close(grads, expected(range(PROCESSES)))


def test_lightning():
    """Its trainer in one process, with the count and the world of two, whose gradients DDP averages."""
    count = sum(int((labels != -100).sum()) for rank in range(PROCESSES) for *_, labels in batches(rank))
    found = []
    for rank in range(PROCESSES):

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.student = student()

            training_step = of_page("training_step")

            def on_before_optimizer_step(self, optimizer):
                found.append([p.grad.clone() for p in self.parameters()])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        rows = [(*batch, torch.tensor(count)) for batch in batches(rank)]
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, **quiet)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lightning.Trainer, "world_size", PROCESSES)
            trainer.fit(Module(), DataLoader(rows, batch_size=None))
    averaged = [sum(grads) / PROCESSES for grads in zip(*found, strict=True)]
    torch.testing.assert_close(averaged, expected(range(PROCESSES)))


def test_transformers_trainer(tmp_path):
    """Two accumulation steps with other counts of labels, and one batch of both: the same step."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for real in (6, 2):
        labels = torch.randint(0, VOCAB, (6,), generator=g)
        labels[real:] = -100
        rows.append({"input_ids": torch.randint(0, VOCAB, (6,), generator=g), "labels": labels})
        rows[-1]["teacher"] = torch.randn(6, VOCAB, generator=g)

    class Ours(Trainer):
        compute_loss = of_page("compute_loss")

    def trained(rows_of_batch, steps):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=rows_of_batch, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, remove_unused_columns=False, report_to=[], use_cpu=True,
        )  # fmt: skip
        Ours(model, arguments, train_dataset=rows).train()
        return model.state_dict()

    torch.testing.assert_close(trained(1, 2), trained(2, 1))

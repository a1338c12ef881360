"""The losses inside other people's training code: every example runs, with the loss and the gradients of what stood
there before it."""

import datetime
import importlib.util
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "torch_ddp": ("torch",),
    "transformers_trainer": ("transformers", "accelerate"),
    "trl_gkd": ("trl", "trl.experimental.gkd"),
    "trl_distillation": ("trl",),
    "lightning_module": ("lightning", "transformers"),
    "knowledge_distiller": ("transformers",),
    "rationale_distiller": ("transformers",),
    "distillation_trainer": ("transformers", "accelerate"),
    "encoder_distillation": ("transformers",),
    "t5_distillation": ("transformers",),
    "whisper_distillation": ("transformers",),
}
OTHERS = ("read_teacher_cache",)  # trains nothing: test_read_teacher_cache.py
VOCAB = 64

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers about its own names, which TRL still uses
    pytest.mark.filterwarnings("ignore:.*trl.experimental"),
]


@pytest.fixture(scope="module")
def example():
    """A function that imports an example by name, or skips the test where what it is for is not installed."""

    def load(name: str):
        for package in NEEDS[name]:
            pytest.importorskip(package)
        spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def batch(seed: int, rows: int):
    """Ids and labels (rows, 9); two in five labels are ignored, the first of every row among them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, 9), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.4, -100)
    labels[:, 0] = -100  # so that a count of labels is a count of shifted labels
    return ids, labels


def usual_loss(logits, target, labels, temperature=1.0, kd_weight=1.0, ce_weight=0.0, normalizer=None):
    """Distillation as training loops have it: temperature, F.kl_div, F.cross_entropy over shifted real tokens."""
    real = labels[:, 1:] != -100
    logits, target = logits[:, :-1][real], target[:, :-1][real].detach()
    kl = F.kl_div(F.log_softmax(logits / temperature, -1), F.softmax(target / temperature, -1), reduction="none").sum()
    ce = F.cross_entropy(logits, labels[:, 1:][real], reduction="sum")
    total = kd_weight * temperature**2 * kl + ce_weight * ce
    return total / (real.sum() if normalizer is None else normalizer)


# Adam divides by the gradient's size, so that of a gradient near zero it amplifies the rounding.
SGD = {"optim": "sgd", "learning_rate": 0.1}
OPTIONS = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.5}


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same_loss(trainer, before, inputs, count):
    """`compute_loss` of two trainers, with the same model's state and on the same batch, and its gradients."""
    ours, theirs = (
        one.compute_loss(one.model.train(), dict(inputs), num_items_in_batch=count) for one in (trainer, before)
    )
    assert theirs > 1e-3  # the models disagree
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(ours, trainer.model), gradients(theirs, before.model), rtol=1e-4, atol=1e-6)


def assert_same_training(trainer, before):
    """`train` of two trainers: the logged losses, and the weights at the end."""
    logs = []
    for one in (trainer, before):
        start = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        torch.manual_seed(0)  # of what a trainer samples
        one.train()
        assert any((p != start[name]).any() for name, p in one.model.named_parameters())
        logs.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == before.args.max_steps
    ours, theirs = (dict(one.model.named_parameters()) for one in (trainer, before))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in OTHERS))
def test_runs_as_a_script(name, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    line = capsys.readouterr().out.splitlines()[-1]
    losses = [float(word) for word in line.removeprefix("loss of each step: ").split()]
    assert len(losses) >= 3 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def ddp_batches(rank: int):
    """Micro-batches with different numbers of real tokens, on every rank different ones."""
    return [batch(10 * rank, 2 + rank), batch(10 * rank + 1, 1)]


def ddp_models(module):
    torch.manual_seed(0)
    return module.TinyLM(VOCAB), module.TinyLM(VOCAB, width=48)


def test_distributed_data_parallel_is_one_process(example, tmp_path):
    module = example("torch_ddp")

    def rank_main(rank):
        store = f"file://{tmp_path}/store"
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
        student, teacher = ddp_models(module)
        model = DistributedDataParallel(module.Distillation(student, teacher, **OPTIONS))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        losses = [module.train_step(model, optimizer, ddp_batches(rank)) for _ in range(3)]
        torch.save((losses, dict(student.named_parameters())), f"{tmp_path}/{rank}.pt")
        del model  # before its group, as the example says
        dist.destroy_process_group()

    pids = [fork(lambda rank=rank: rank_main(rank)) for rank in range(2)]
    assert [wait(pid) for pid in pids] == [0, 0]

    student, teacher = ddp_models(module)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    ids, labels = (torch.cat(parts) for parts in zip(*(b for rank in range(2) for b in ddp_batches(rank)), strict=True))
    expected = []
    for _ in range(3):
        loss = usual_loss(*(m.head(m.hidden(ids)) for m in (student, teacher)), labels, **OPTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for rank in range(2):
        losses, weights = torch.load(f"{tmp_path}/{rank}.pt")
        assert losses == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(weights, dict(student.named_parameters()))


def transformers_trainer(module, folder, kind=None, seed=0, **settings):
    """The example's trainer over 8 rows, or a `kind` of transformers' trainers with the same student."""
    import transformers

    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        **SGD,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    torch.manual_seed(seed)
    student, teacher = module.tiny_llama(32), module.tiny_llama(64)
    if kind is not transformers.Trainer:
        settings["teacher"] = teacher
    return (kind or module.DistillingTrainer)(
        model=student,
        args=transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=[{"input_ids": ids, "labels": labels} for ids, labels in zip(*batch(1, 8), strict=True)],
        **settings,
    )


ONLY_CE = {"kd_weight": 0.0, "ce_weight": 1.0}


def test_transformers_trainer_with_cross_entropy_is_trainer(example, tmp_path):
    import transformers

    module = example("transformers_trainer")
    trainer = transformers_trainer(module, tmp_path, loss=ONLY_CE)
    assert_same_training(trainer, transformers_trainer(module, tmp_path, transformers.Trainer))


def test_transformers_trainer_is_the_usual_subclass(example, tmp_path):
    module = example("transformers_trainer")

    class Usual(module.DistillingTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            with torch.no_grad():
                target = self.teacher(**inputs).logits
            return usual_loss(model(**inputs).logits, target, labels, normalizer=num_items_in_batch, **self.loss)

    ids, labels = batch(2, 3)
    for count in (None, torch.tensor(31)):
        trainer, before = (transformers_trainer(module, tmp_path, kind, loss=OPTIONS) for kind in (None, Usual))
        assert_same_loss(trainer, before, {"input_ids": ids, "labels": labels}, count)
    assert_same_training(trainer, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_trainer_on_padded_rows(side, kind, example, tmp_path):
    """A step's loss is the mean over the predicted tokens of all its rows, each by itself and without padding."""
    import transformers

    module = example("transformers_trainer")

    def model(seed):
        torch.manual_seed(seed)
        if kind == "llama":
            return module.tiny_llama(32)
        settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, **settings, **off))

    student, teacher = model(1), model(2)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCAB, (length,), generator=g) for length in (9, 5, 12, 3, 7, 7, 4, 10)]
    parts = []
    with torch.no_grad():
        for row in rows:
            p, q = (m(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
            parts.append((p.exp() * (p - q)).sum(-1) - 0.5 * q.gather(-1, row[1:, None]).squeeze(-1))
    expected = torch.cat(parts).mean().item()

    def padded(row, fill):
        rest = row.new_full((14 - len(row),), fill)
        return torch.cat([rest, row] if side == "left" else [row, rest])

    def columns(row):
        mask = padded(torch.ones_like(row), 0)
        return {"input_ids": padded(row, 0), "labels": padded(row, -100), "attention_mask": mask}

    arguments = {"max_steps": 1, "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = module.DistillingTrainer(
        model=student,
        teacher=teacher,
        loss={"ce_weight": 0.5},
        train_dataset=[columns(row) for row in rows],
        args=transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True, **arguments
        ),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_gkd_is_gkd_trainer(beta, example, tmp_path):
    module = example("trl_gkd")
    trainers = [module.tiny_trainer(tmp_path, kind, beta=beta) for kind in (module.FusedGKDTrainer, module.GKDTrainer)]
    inputs = next(iter(trainers[0].get_train_dataloader()))
    assert (inputs["labels"] == -100).any()  # questions, and padding
    for count in (None, torch.tensor(31)):
        assert_same_loss(*trainers, inputs, count)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_trl_gkd_trains_as_gkd_trainer(lmbda, example, tmp_path):
    """On the answers of the data, and on the student's own."""
    module = example("trl_gkd")
    kinds = module.FusedGKDTrainer, module.GKDTrainer
    assert_same_training(*(module.tiny_trainer(tmp_path, kind, max_steps=3, lmbda=lmbda, **SGD) for kind in kinds))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_trl_distillation_is_distillation_trainer(beta, temperature, example, tmp_path):
    module = example("trl_distillation")
    kinds = module.FusedDistillationTrainer, module.DistillationTrainer
    trainers = [module.tiny_trainer(tmp_path, kind, beta=beta, temperature=temperature) for kind in kinds]
    trainers[0].model.train()
    inputs = trainers[0]._prepare_inputs(next(iter(trainers[0].get_train_dataloader())))
    for count in (inputs["num_items_in_batch"], None):
        assert_same_loss(*trainers, {**inputs, "num_items_in_batch": count}, None)


def test_trl_distillation_trains_as_distillation_trainer(example, tmp_path):
    module = example("trl_distillation")
    kinds = module.FusedDistillationTrainer, module.DistillationTrainer
    assert_same_training(*(module.tiny_trainer(tmp_path, kind, max_steps=3, beta=0.5, **SGD) for kind in kinds))


def test_lightning_module_is_the_usual_one(example):
    module = example("lightning_module")

    class Ours(module.Distillation):
        def configure_optimizers(self):
            return torch.optim.SGD(self.student.parameters(), lr=0.1)

    class Usual(Ours):
        def distillation_loss(self, ids, labels):
            return usual_loss(self.student(ids).logits, self.frozen[0](ids).logits, labels, **self.loss)

    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*batch(3, 16), strict=True)]

    def fit(kind):
        torch.manual_seed(0)
        distillation = kind(module.tiny_llama(32), module.tiny_llama(64), **OPTIONS)
        losses = module.fit(distillation, rows, steps=4)
        assert "frozen" not in str(distillation.state_dict().keys())
        return losses, distillation.state_dict()

    (losses, weights), (expected, before) = fit(Ours), fit(Usual)
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 4
    torch.testing.assert_close(weights, before, rtol=1e-5, atol=1e-6)
    assert set(weights) == {f"student.{name}" for name in module.tiny_llama(32).state_dict()}

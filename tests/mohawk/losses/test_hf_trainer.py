"""DistillationTrainer in a Trainer script: its loss is the definition's, it logs what it measures, it resumes."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mohawk import (
    AttentionMatch,
    DistillationTrainer,
    HiddenMatch,
    OnPolicy,
    TAIDSchedule,
    hybrid_from_teacher,
    layer_map,
    match_attention,
    match_hidden,
)
from mohawk.losses.schedules import Ramp
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401

pytestmark = pytest.mark.usefixtures("cheap_training")
OPTIONS = {"temperature": 2.0, "kd_weight": 0.9, "ce_weight": 0.1}


def rows(count: int = 16):
    g = torch.Generator().manual_seed(0)
    made = []
    for ids in torch.randint(2, 250, (count, 12), generator=g):
        labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, -100)
        made.append({"input_ids": ids, "labels": labels})
    return made


def arguments(folder, **settings) -> TrainingArguments:
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **settings})


class Usual(Trainer):
    """Distillation as people write it."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        real = labels != -100
        with torch.no_grad():
            target = self.teacher(**inputs).logits[:, :-1][real]
        logits = model(**inputs).logits[:, :-1]
        kl = F.kl_div((logits[real] / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="sum")
        ce = F.cross_entropy(logits[real], labels[real], reduction="sum")
        return (0.9 * 4 * kl + 0.1 * ce) / num_items_in_batch


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_trains_as_the_usual_subclass(make_llama, tmp_path):
    teacher = make_llama(seed=1, hidden_size=48)
    ours = DistillationTrainer(
        model=make_llama(seed=2), args=arguments(tmp_path), train_dataset=rows(), teacher=teacher, distillation=OPTIONS
    )
    ours.train()
    usual = Usual(model=make_llama(seed=2), args=arguments(tmp_path), train_dataset=rows())
    usual.teacher = teacher
    usual.train()
    assert losses(ours) == pytest.approx(losses(usual), rel=1e-4)
    for mine, theirs in zip(ours.model.parameters(), usual.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert all({"kd", "ce", "agreement", "teacher_entropy", "temperature"} <= entry.keys() for entry in logged)


def test_it_resumes_with_projections_and_schedules(make_llama, tmp_path):
    def trainer(folder, **settings):
        torch.manual_seed(0)
        match = HiddenMatch(layer_map("uniform", 2, 2), 32, 48)
        options = {"temperature": Ramp(4.0, 1.0), "matchings": {"hidden": match_hidden(match)}}
        options["taid"] = TAIDSchedule(alpha=0.2)
        return DistillationTrainer(
            model=make_llama(seed=2),
            args=arguments(folder, save_strategy="steps", save_steps=2, optim="adamw_torch", **settings),
            train_dataset=rows(),
            teacher=make_llama(seed=1, hidden_size=48),
            distillation=options,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert [entry["temperature"] for entry in whole.state.log_history if "loss" in entry] == [4, 3, 2, 1]
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "whole")
    for parameter in resumed.distiller.matched.parameters():
        torch.nn.init.zeros_(parameter)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.distiller.taid == whole.distiller.taid
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6)
    saved = json.loads((tmp_path / "whole" / "checkpoint-4" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]


def test_an_optimizer_that_is_given_trains_projections_too(make_llama, tmp_path):
    def trained(with_schedule: bool):
        model, match = make_llama(seed=2), HiddenMatch(layer_map("uniform", 2, 2), 32, 48)
        before = [p.detach().clone() for p in match.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if with_schedule else None
        DistillationTrainer(
            model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows(),
            teacher=make_llama(seed=1, hidden_size=48), optimizers=(optimizer, schedule),
            distillation={**OPTIONS, "matchings": {"hidden": match_hidden(match)}},
        ).train()  # fmt: skip
        return before, list(match.parameters())

    before, after = trained(False)
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="the optimizer that was given lacks the parameters of matchings"):
        trained(True)


def test_on_policy_with_padded_batches(make_llama, tmp_path):
    """Batches as transformers' collators make them, with an attention mask: samples are learned, their mask is used."""
    data = [
        {"input_ids": [5 + i] * (n + 4), "attention_mask": [1] * (n + 4), "labels": [-100] * 4 + [5 + i] * n}
        for i, n in enumerate((3, 8, 5, 6))
    ]

    def padded(examples):
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor([e[name] + [value] * (12 - len(e[name])) for e in examples])
            for name, value in fill.items()
        }

    student, seen = make_llama(seed=2), []
    student.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    on_policy = OnPolicy(student, share=1.0, max_new_tokens=5, eos_token_id=257, pad_token_id=0)
    trainer = DistillationTrainer(
        model=student, args=arguments(tmp_path), train_dataset=data, data_collator=padded, teacher=make_llama(seed=1),
        distillation={"on_policy": on_policy},
    )  # fmt: skip
    trainer.train()
    trained = [given for given in seen if given.get("past_key_values") is None and not given.get("use_cache")]
    # before the first one, two passes of a text without a mask show whether the model is causal
    assert ["attention_mask" in given for given in trained] == [False] * 2 + [True] * 8
    trained = trained[2:]
    assert all((given["attention_mask"].sum(1) > 4).all() for given in trained)
    assert all(given["input_ids"].shape[1] <= 9 for given in trained)  # a prompt and a sample
    assert all(0 < loss < 20 for loss in losses(trainer))


def padded(side: str):
    """A collator: rows to the longest of the batch, padding on a side or, of longer rows, in the middle."""

    def collate(examples):
        n = max(len(e["input_ids"]) for e in examples)
        batch = {name: torch.full((len(examples), n), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for row, example in enumerate(examples):
            ids = torch.tensor(example["input_ids"])
            gap = n - len(ids)
            places = {"left": torch.arange(gap, n), "right": torch.arange(len(ids))}
            places["middle"] = torch.cat([torch.arange(2), torch.arange(2 + gap, n)])
            batch["input_ids"][row, places[side]] = ids
            batch["labels"][row, places[side]] = ids
            batch["attention_mask"][row, places[side]] = 1
        return batch

    return collate


def uneven(count: int = 8):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, 250, (n,), generator=g).tolist()} for n in (5, 11, 3, 16, 8, 2, 13, 7)][
        :count
    ]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "hybrid"])
def test_no_padding_is_learned_from(kind, side, make_llama, tmp_path):
    """On any side of the rows the loss and the update are those of the rows one by one, without padding. (In the middle
    it only separates: the token behind it is not predicted.)"""
    teacher, data = make_llama(seed=1, hidden_size=48), uneven()

    def new():
        if kind == "gpt2":
            torch.manual_seed(4)
            sizes = {"vocab_size": 258, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
            still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            return GPT2LMHeadModel(GPT2Config(**sizes, **still, initializer_range=0.3)).eval()
        return make_llama(seed=2) if kind == "llama" else hybrid_from_teacher(make_llama(seed=2), ssm_layers=[1])

    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_grad_norm": 0}
    trainer = DistillationTrainer(
        model=new(), args=arguments(tmp_path, **settings), train_dataset=data, teacher=teacher,
        data_collator=padded(side), distillation=OPTIONS,
    )  # fmt: skip
    trainer.train()

    student, total, count = new(), 0.0, 0
    longest = max(len(e["input_ids"]) for e in data)
    for example in data:
        ids = torch.tensor([example["input_ids"]])
        kept = torch.ones(ids.shape[1] - 1, dtype=torch.bool)
        if side == "middle" and ids.shape[1] < longest and ids.shape[1] > 2:
            kept[1] = False
        z, t = (model(input_ids=ids, use_cache=False).logits[0, :-1][kept] for model in (student, teacher))
        kl = F.kl_div((z / 2).log_softmax(-1), (t.detach() / 2).softmax(-1), reduction="sum")
        total = total + 0.9 * 4 * kl + 0.1 * F.cross_entropy(z, ids[0, 1:][kept], reduction="sum")
        count += int(kept.sum())
    (total / count).backward()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    for (name, mine), before in zip(trainer.model.named_parameters(), new().parameters(), strict=True):
        gradient = dict(student.named_parameters())[name].grad
        expected = before if gradient is None else before - 1e-2 * gradient
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("by", ["hidden", "kl", "mse", "scores", "frobenius"])
def test_accumulation_does_not_change_the_update(by, make_llama, tmp_path):
    """A step of eight rows, whole, in fours and one by one, each micro-batch as long as its longest row."""
    teacher = make_llama(seed=1, hidden_size=48)

    def trained(rows: int):
        torch.manual_seed(0)
        pairs = layer_map("uniform", 2, 2)
        if by == "hidden":
            match = match_hidden(HiddenMatch(pairs, 32, 48), weight=0.7)
        else:
            match = match_attention(AttentionMatch(pairs, loss=by), weight=0.7)
        settings = {"max_steps": 2, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        trainer = DistillationTrainer(
            model=make_llama(seed=2), args=arguments(tmp_path, max_grad_norm=0, **settings), train_dataset=uneven(),
            teacher=teacher, data_collator=padded("left"), distillation={**OPTIONS, "matchings": {"match": match}},
        )  # fmt: skip
        trainer.train()
        parameters = [*trainer.model.parameters(), *trainer.distiller.matched.parameters()]
        logged = [entry["match"] for entry in trainer.state.log_history if "match" in entry]
        return losses(trainer), logged, [p.detach().clone() for p in parameters]

    whole, matched, at_once = trained(8)
    assert len(matched) == 2
    for rows in (4, 2, 1):
        value, logged, update = trained(rows)
        assert value == pytest.approx(whole, rel=1e-5)
        assert logged == pytest.approx(matched, rel=1e-5)
        for a, b in zip(update, at_once, strict=True):
            assert (a - b).abs().max() <= 1e-6


def matched_trainer(make_llama, folder, processes: int, settings):
    """Three steps of eight rows padded on the left, with TAID and both kinds of matchings."""
    torch.manual_seed(0)
    matchings = {
        "attention": match_attention(AttentionMatch([(0, 0), (1, 1)]), weight=3.0),
        "hidden": match_hidden(HiddenMatch([(0, 0)], 32, 48)),
    }
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // processes}
    return DistillationTrainer(
        model=make_llama(seed=2), args=arguments(folder, max_grad_norm=0, **steps, **settings),
        train_dataset=uneven(), teacher=make_llama(seed=1, hidden_size=48), data_collator=padded("left"),
        distillation={**OPTIONS, "matchings": matchings, "taid": TAIDSchedule(alpha=0.3)},
    )  # fmt: skip


def outcome(trainer):
    parameters = [*trainer.distiller.student.parameters(), *trainer.distiller.matched.parameters()]
    return losses(trainer), trainer.distiller.taid.t, [p.detach() for p in parameters]


def test_two_processes_are_one(make_llama, tmp_path):
    """The same steps, the same schedule on each process."""
    settings = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}

    def body(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
        trainer = matched_trainer(make_llama, tmp_path / str(rank), 2, settings)
        trainer.train()
        assert trainer.args.world_size == 2
        return outcome(trainer)

    both = in_processes(tmp_path, 2, body)
    alone = matched_trainer(make_llama, tmp_path, 1, {})
    alone.train()
    values, t, parameters = outcome(alone)
    for theirs, their_t, found in both:
        assert theirs == pytest.approx(values, rel=1e-5) and their_t == pytest.approx(t, rel=1e-9)
        for a, b in zip(found, parameters, strict=True):
            assert (a - b).abs().max() <= 1e-6


def test_it_evaluates(make_llama, tmp_path):
    trainer = DistillationTrainer(
        model=make_llama(seed=2), args=arguments(tmp_path), eval_dataset=rows(4), teacher=make_llama(seed=1)
    )
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.compute_metrics = lambda found: {"shape": found.predictions.shape[-1]}
    assert trainer.evaluate()["eval_shape"] == 258

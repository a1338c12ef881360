"""DistillationTrainer under DeepSpeed's ZeRO-2 and ZeRO-3, in one and two processes on a CPU; skipped where it is not
installed."""

import importlib.util

import pytest
import torch
from transformers import TrainingArguments

from mohawk import DistillationTrainer, hybrid_from_teacher
from mohawk.losses.teachers import AverageTeacher
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.mohawk.losses.test_trainer_fsdp import RATE, STEPS, Rows, projected

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def zero(stage: int, own_optimizer: bool) -> dict:
    """DeepSpeed's settings. own_optimizer: whether they name the optimizer, and not the Trainer's arguments."""
    of_a_stage = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    rates = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    named = {"optimizer": {"type": "AdamW", "params": rates}} if own_optimizer else {}
    return {
        "zero_optimization": of_a_stage, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        **named, **dict.fromkeys(sizes, "auto"),
    }  # fmt: skip


def trained(folder, family, how, stage=None, processes=1, resume=None):
    """Losses, gradient norms and the weights in the end, those of matchings and of an average among them. stage: of
    ZeRO; None: without it. how: plain, average, matched, or matched by DeepSpeed's own optimizer ("theirs")."""
    options, matched = {}, how in ("matched", "theirs")
    if stage is not None:
        import deepspeed
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # of an earlier training, or models were made in parts
        if resume is None:
            if processes > 1:
                torch.distributed.destroy_process_group()
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 3]).train()  # before DeepSpeed's settings take effect on new models
    if how == "average":
        teacher = AverageTeacher(student, 0.5)
    if stage is not None:
        options = {"deepspeed": zero(stage, how == "theirs")}
    given = {"ce_weight": 0.3, **({"matchings": projected()} if matched else {})}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2 // processes, learning_rate=RATE,
        gradient_accumulation_steps=2, lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="steps" if matched else "no", save_steps=2, disable_tqdm=True, seed=0, optim="adamw_torch",
        **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, args=arguments, train_dataset=Rows(), teacher=teacher, distillation=given
    )
    assert trainer.is_deepspeed_enabled == (stage is not None)
    trainer.train(resume_from_checkpoint=resume)
    weights = {}
    for name, p in [*student.named_parameters(), *trainer.distiller.matched.named_parameters()]:
        if hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p]):
                weights[name] = p.detach().clone()
        else:
            weights[name] = p.detach().clone()
    weights |= teacher.state() if how == "average" else {}
    history = trainer.state.log_history
    return [[float(record[key]) for record in history if key in record] for key in ("loss", "grad_norm")], weights


@pytest.mark.parametrize(
    ("stage", "processes", "family", "how"),
    [
        (2, 2, "llama", "plain"),
        (2, 2, "llama_biased", "theirs"),
        (2, 2, "llama_biased", "average"),
        (3, 2, "llama", "plain"),
        (3, 2, "llama", "average"),
        (3, 2, "llama_biased", "matched"),
        (3, 1, "llama", "plain"),
    ],
)
def test_it_trains_as_one_process_does(stage, processes, family, how, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (losses, norms), weights = trained(tmp_path / "one", family, how)

    def body(rank):
        found = trained(tmp_path / "two", family, how, stage, processes)
        if how in ("matched", "theirs"):  # with projections that the second step has left
            _, again = trained(tmp_path / "two", family, how, stage, processes, str(tmp_path / "two/checkpoint-2"))
            for name, weight in found[1].items():
                torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-7)
        return found

    for (of_losses, of_norms), of_weights in in_processes(tmp_path, processes, body, timeout=400.0):
        assert of_losses == pytest.approx(losses, rel=1e-4)
        assert of_norms == pytest.approx(norms, rel=1e-4)
        for name, weight in weights.items():
            assert (of_weights[name] - weight).abs().mean() < 0.02 * RATE, name

"""DistillationTrainer under DeepSpeed's ZeRO-2 and ZeRO-3, in two processes on a CPU; skipped where it is not
installed."""

import importlib.util

import pytest
import torch
from transformers import TrainingArguments

from mohawk import DistillationTrainer, hybrid_from_teacher
from mohawk.losses.hidden_match import HiddenMatch
from mohawk.losses.matching import match_hidden
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.mohawk.losses.test_trainer_fsdp import RATE, STEPS, Rows

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def zero(stage: int) -> dict:
    of_a_stage = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {
        "zero_optimization": of_a_stage, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(sizes, "auto"),
    }  # fmt: skip


def trained(folder, family, matched, stage=None):
    """Losses, gradient norms and the weights in the end, those of matchings among them. stage: of ZeRO, in two
    processes; None: without it, in one."""
    options = {}
    if stage is not None:
        torch.distributed.destroy_process_group()
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 3]).train()  # before DeepSpeed's settings take effect on new models
    if stage is not None:
        options = {"deepspeed": zero(stage)}
    given = {"ce_weight": 0.3}
    if matched:
        given["matchings"] = {"hidden": match_hidden(HiddenMatch([(1, 1), (3, 3)], 32, 32, project=True), 0.1)}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4 if stage is None else 2,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0, optim="adamw_torch", **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, args=arguments, train_dataset=Rows(), teacher=teacher, distillation=given
    )
    assert trainer.is_deepspeed_enabled == (stage is not None)
    trainer.train()
    weights = {}
    for name, p in [*student.named_parameters(), *trainer.distiller.matched.named_parameters()]:
        if hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p]):
                weights[name] = p.detach().clone()
        else:
            weights[name] = p.detach().clone()
    history = trainer.state.log_history
    return [[float(record[key]) for record in history if key in record] for key in ("loss", "grad_norm")], weights


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("family", "matched"), [("llama", False), ("llama_biased", False), ("llama_biased", True)])
def test_it_trains_as_one_process_does(family, matched, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (losses, norms), weights = trained(tmp_path / "one", family, matched)
    both = in_processes(tmp_path, 2, lambda rank: trained(tmp_path / "two", family, matched, stage), timeout=200.0)
    for (of_losses, of_norms), of_weights in both:
        assert of_losses == pytest.approx(losses, rel=1e-4)
        assert of_norms == pytest.approx(norms, rel=1e-4)
        for name, weight in weights.items():
            assert (of_weights[name] - weight).abs().mean() < 0.02 * RATE, name

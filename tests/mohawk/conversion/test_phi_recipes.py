"""The paper's own conversions: the shipped Phi recipes plan Phi-1.5 as published, and run on a small Phi."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM, PhiConfig

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.schema.files import shipped
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

RECIPES = {"phi-mamba": list(range(24)), "hybrid-phi-mamba": [i for i in range(24) if i not in (4, 10, 16, 22)]}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_plans_phi_1_5_as_the_paper_trained_it(name, tmp_path, capsys):
    """The budgets of arXiv 2408.10189 as tokens and steps, from a configuration alone: no weights are there to read."""
    PhiConfig(architectures=["PhiForCausalLM"]).save_pretrained(tmp_path)  # the class's defaults are Phi-1.5's sizes
    assert main(["convert", str(shipped(name)), "--dry-run", "--set", f"teacher.model={tmp_path}"]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "1418.3M parameters" in printed
    assert f"{len(RECIPES[name])} of 24 layers become discrete_mamba2 (32 heads x 64, state 64)" in printed
    kept = " and the attention of layers 4, 10, 16, 22" if name.startswith("hybrid") else ""
    assert f"norms, MLPs, head{kept} are copied" in printed
    recipe = Recipe.load(shipped(name))
    for phase, tokens, per_step in (
        (recipe.phases.mixing, 80e6, 2**15),
        (recipe.phases.hidden, 160e6, 2**15),
        (recipe.phases.end_to_end, 2.76e9, 2**19),
    ):
        assert (phase.tokens, phase.tokens_per_step, phase.sequence_length) == (tokens, per_step, 2048)
        assert (phase.betas, phase.weight_decay, phase.warmup, phase.decay) == ((0.9, 0.95), 0.1, 0.1, 0.1)
        assert f"{phase.tokens:,}" in printed


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_runs_on_a_small_phi(name, tokenizer, tmp_path):
    """All that changes are sizes, text and device; the hybrid's layers are those of a model of its depth."""
    layers = 24 if name.startswith("hybrid") else 2
    teacher = tiny_teacher(
        "phi", vocab_size=258, num_hidden_layers=layers, bos_token_id=256, eos_token_id=257, hidden_size=16,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for i in range(6):
        (tmp_path / f"train_{i}.txt").write_text(f"A speech of number {i} about cats and mats.\n" * (8 + i))
    (tmp_path / "other.txt").write_text("A cat that sat on a mat met a rat.\n" * 20)
    small = [
        f"teacher.model={tmp_path / 'teacher'}", "teacher.dtype=float32", "precision=float32", "device=cpu",
        f"data.train=['{tmp_path}/train_*.txt']", f"data.evaluation=['{tmp_path}/other.txt']",
        f"data.cache={tmp_path / 'cache'}", "data.validation_share=0.1", f"output={tmp_path / 'run'}",
        "evaluation.sequence_length=32", "evaluation.tokens=128", "evaluation.contexts=[8]",
        "evaluation.decode_tokens=2", "evaluation.continuation_tokens=4", "phases.end_to_end.gradient_accumulation=2",
    ]  # fmt: skip
    for phase, rows in (("mixing", 2), ("hidden", 2), ("end_to_end", 4)):
        small += [f"phases.{phase}.{field}" for field in ("batch_size=2", "sequence_length=32", "learning_rate=2e-3")]
        small.append(f"phases.{phase}.tokens={3 * rows * 32}")
    assert main(["convert", str(shipped(name)), *(part for setting in small for part in ("--set", setting))]) == 0
    run = tmp_path / "run"
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.ssm_layers == (RECIPES[name] if layers == 24 else [0, 1])
    assert student.config.mixer == "discrete_mamba2" and student.config.base_config.model_type == "phi"
    steps = [json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == ["mixing"] * 3 + ["hidden"] * 3 + ["end_to_end"] * 3
    assert (run / "report.md").is_file()

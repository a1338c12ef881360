"""The commands with models in parts: two processes that have a half each make what one process makes."""

import json
from pathlib import Path

import pytest
import torch

from mohawk.cli import main
from mohawk.losses.on_policy import OnPolicy
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.mohawk.runs.test_distributed import LEARNING_RATE, place, same_run, two_processes, written  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

PARTS = {"sharding": {"kind": "full"}}
OWN = ("rng_state", "shard-", "trainable.safetensors", "optimizer.pt")  # of checkpoints: each process's part, or whole


def in_parts(folder: Path, command: str, recipe: Path) -> str:
    """What two processes said; both have to end well."""
    assert two_processes(folder, command, str(recipe)) == [0, 0], (folder / "0.txt").read_text()
    assert (folder / "1.txt").read_text() == ""
    return (folder / "0.txt").read_text()


def test_convert_in_parts_is_one(place, tmp_path):  # noqa: F811
    phases = {
        "mixing": {"metric": "frobenius"},
        "hidden": {"solve_tokens": 256, "match": "mixer_output"},
        "end_to_end": {"gradient_accumulation": 1},
    }
    parts = {"student": {"ssm_layers": [1]}, "phases": phases}
    assert main(["convert", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    in_parts(tmp_path / "two", "convert", recipe)
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE, OWN)


DISTILLED = {
    "logits": ({"layers": "first:1"}, [{"ce_weight": 0.3, "advance": {"every": 2, "patience": 9}, "save_every": 2}]),
    "matchings": (
        {"model": "SMALL"},
        [{"hidden": {"embeddings": True, "rank": 8}, "attention": {}, "weight_decay": 0.0}],
    ),
    "hybrid": ({"hybrid": {"ssm_layers": [1]}}, [{"confidence": True}]),
    "average": ({}, [{"ce_weight": 1.0, "learn_from": "average", "average_decay": 0.5, "save_every": 1}]),
    "previous": (
        {"layers": [0]},
        [{"name": "a"}, {"name": "b", "ce_weight": 1.0, "learn_from": "previous", "student": {"layers": [0]}}],
    ),
    "lora": ({"lora": {"rank": 2, "keep": True}}, [{"ce_weight": 1.0}]),
    "taid": ({"layers": "last:1"}, [{"taid": {}}]),
}


@pytest.mark.parametrize("kind", DISTILLED)
def test_distill_in_parts_is_one(kind, place, tokenizer, tmp_path):  # noqa: F811
    student, stages = DISTILLED[kind]
    parts = {
        "student": student,
        "stages": [{"name": "only"} | stage for stage in stages],
    }
    if student.get("model"):
        small = tiny_teacher(vocab_size=258, num_hidden_layers=2, hidden_size=24, bos_token_id=256, eos_token_id=257)
        small.save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        parts["student"] = {"model": str(tmp_path / "small")}
    assert main(["distill", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    in_parts(tmp_path / "two", "distill", recipe)
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 3e-3 * LEARNING_RATE, (*OWN, "objective.safetensors"))


def no_prompts_on_the_second(rank: int) -> None:
    if rank == 1:
        OnPolicy._prompts = lambda self, batch, step: []


def test_uneven_prompts_of_an_on_policy_stage(place, tmp_path):  # noqa: F811
    """Each process samples what its own rows ask for, which may be nothing."""
    stage = {"name": "gkd", "on_policy": {"share": 1.0, "max_new_tokens": 6, "prompt_tokens": 4}}
    recipe = written(place, tmp_path / "two", student={"layers": [0]}, stages=[stage], **PARTS)
    codes = two_processes(tmp_path / "two", "distill", str(recipe), before=no_prompts_on_the_second)
    assert codes == [0, 0], (tmp_path / "two/0.txt").read_text()
    steps = [json.loads(line) for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(record["loss"] > 0 for record in steps)

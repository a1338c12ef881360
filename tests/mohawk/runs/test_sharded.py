"""The commands with models in parts: two processes that have a half each make what one process makes."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import mohawk.distillation.plan as plan
from mohawk.cli import main
from mohawk.losses.on_policy import OnPolicy
from mohawk.runs.sharding import VIEW
from mohawk.teacher_cache.answers import Answers
from mohawk.teacher_cache.reader import TeacherCache
from mohawk.training.trainer import PhaseTrainer
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.mohawk.runs.test_distributed import (
    LEARNING_RATE,
    place,  # noqa: F401
    same_run,
    students,
    two_processes,
    written,
)

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
    student = {"ssm_layers": [1], "init": "calibrated", "calibration_tokens": 256, "calibration_steps": 4}
    parts = {"student": student, "phases": phases}
    assert main(["convert", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    in_parts(tmp_path / "two", "convert", recipe)
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE, OWN)


def test_only_logits_may_be_views_without_a_word():
    """torch's warning would be right about a layer whose output is changed in place."""
    said = "FSDP2-wrapped module ({}) returned a view tensor. An in-place op on this view (e.g., `x += y`) will"
    for modules in ("FSDPLayerNorm, FSDPLinear", "FSDPLinear", "FSDPPhiForCausalLM", "FSDPGPT2LMHeadModel"):
        assert re.match(VIEW, said.format(modules)), modules
    for modules in ("FSDPPhiDecoderLayer", "FSDPEmbedding", "FSDPLinearAttentionLayer"):
        assert not re.match(VIEW, said.format(modules)), modules


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
    "taid": ({"model": "SMALL", "layers": "last:1"}, [{"taid": {}}]),
    "scratch": ({"layers": [0], "scratch": True, "hybrid": {"ssm_layers": [0]}}, [{}]),
}


@pytest.mark.parametrize("kind", DISTILLED)
def test_distill_in_parts_is_one(kind, place, tokenizer, tmp_path):  # noqa: F811
    student, stages = DISTILLED[kind]
    parts = {
        "student": student,
        "stages": [{"name": "only"} | stage for stage in stages],
    }
    if student.get("model"):
        # its head has a bias
        small = tiny_teacher(
            "phi",
            vocab_size=258,
            num_hidden_layers=2,
            hidden_size=48,
            num_key_value_heads=4,
            bos_token_id=256,
            eos_token_id=257,
        )
        small.save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        parts["student"] = student | {"model": str(tmp_path / "small")}
    assert main(["distill", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    in_parts(tmp_path / "two", "distill", recipe)
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 3e-3 * LEARNING_RATE, (*OWN, "objective.safetensors"))


@pytest.mark.parametrize("kind", ["hidden", "top-k"])
def test_a_cache_in_parts_is_that_of_one_process(kind, place, tmp_path):  # noqa: F811
    """Each process answers some rows of a batch, one more than once where they are no multiple; then it is there."""
    stage = {"name": "a", "batch_size": 3}
    parts = {"student": {"layers": [0]}, "stages": [stage]}
    one, two = tmp_path / "one/cache-of-it", tmp_path / "two/cache-of-it"
    options = ("--kind", kind, "--tokens", "256")
    assert main(["cache", str(written(place, tmp_path / "one", **parts)), "--output", str(one), *options]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    command = ("cache", str(recipe), "--output", str(two), *options)
    for said in ("cached 8 rows", "is there already: 8 rows"):
        assert two_processes(tmp_path / "two", *command) == [0, 0], (tmp_path / "two/0.txt").read_text()
        assert (tmp_path / "two/1.txt").read_text() == ""
        assert said in " ".join((tmp_path / "two/0.txt").read_text().split())
    manifests = [json.loads((folder / "MANIFEST.json").read_text()) for folder in (one, two)]
    for key in ("layout", "teacher", "tokenizer", "data", "temperature"):
        assert manifests[0][key] == manifests[1][key], key
    caches = [TeacherCache(folder) for folder in (one, two)]
    for row in range(8):
        mine, theirs = (cache.row(row) for cache in caches)
        assert mine.keys() == theirs.keys()
        for name, column in mine.items():
            torch.testing.assert_close(theirs[name], column, rtol=1e-2 if kind == "top-k" else 1e-5, atol=1e-5)
    assert two_processes(tmp_path / "two", *command[:-1], "512") == [2, 2]  # another cache: a mistake, said once
    assert (tmp_path / "two/0.txt").read_text().count("error: ") == 1


def out_of_memory_in_a_batch(rank: int) -> None:
    if rank == 0:
        run, seen = Answers._run, []

        def fails(self, batch):
            seen.append(1)
            if len(seen) == 2:
                raise MemoryError
            return run(self, batch)

        Answers._run = fails


def test_a_cache_whose_first_process_fails_in_the_middle_of_a_batch_ends_all(place, tmp_path):  # noqa: F811
    """The others are in a layer of the teacher then, and hear of nothing else."""
    recipe = written(place, tmp_path / "two", student={"layers": [0]}, stages=[{"name": "a"}], **PARTS)
    command = ("cache", str(recipe), "--output", str(tmp_path / "two/cache-of-it"))
    assert two_processes(tmp_path / "two", *command, before=out_of_memory_in_a_batch) == [2, 2]
    said = [(tmp_path / f"two/{rank}.txt").read_text() for rank in (0, 1)]
    assert "memory" in said[0] and "another process of this run has ended" in said[1]
    assert not any("Traceback" in one for one in said)


def no_prompts_on_the_second(rank: int) -> None:
    plan.sampling_bytes = lambda *given: 2**62  # no room for a whole student
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


def as_accelerate_asks(rank: int) -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_ACTIVATION_CHECKPOINTING="true")


def parts_of_checkpoints(run: Path) -> int:
    return len([*run.glob("phases/*/checkpoint-*/shard-*")])


def test_accelerate_launch_with_an_fsdp2_config_is_the_same(place, tmp_path):  # noqa: F811
    """It asks by its environment, for activation checkpointing too."""
    phases = {"mixing": None, "hidden": {"train_mlp": True}, "end_to_end": {"gradient_accumulation": 1}}
    parts = {"student": {"ssm_layers": [1]}, "phases": phases}
    in_parts(tmp_path / "torchrun", "convert", written(place, tmp_path / "torchrun", **parts, **PARTS))
    recipe = written(place, tmp_path / "accelerate", **parts)
    codes = two_processes(tmp_path / "accelerate", "convert", str(recipe), before=as_accelerate_asks)
    assert codes == [0, 0], (tmp_path / "accelerate/0.txt").read_text()
    first, second = students(tmp_path / "torchrun/run", tmp_path / "accelerate/run")
    assert torch.equal(first, second)
    assert parts_of_checkpoints(tmp_path / "accelerate/run") == parts_of_checkpoints(tmp_path / "torchrun/run") == 4
    recipe = written(place, tmp_path / "contrary", **parts, sharding={"kind": "none"})
    assert two_processes(tmp_path / "contrary", "convert", str(recipe), before=as_accelerate_asks) == [2, 2]
    assert "sharding.kind: got none, but accelerate is set to FSDP" in (tmp_path / "contrary/0.txt").read_text()


def killed_in_step(rank: int, step: int) -> None:
    if rank == 1:
        take = PhaseTrainer._take_step

        def then_killed(self, *given):
            if self.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(self, *given)

        PhaseTrainer._take_step = then_killed


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(place, tmp_path):  # noqa: F811
    stage = {"name": "logits", "ce_weight": 0.5, "save_every": 1}
    parts = {"student": {"layers": [0]}, "stages": [stage]}
    in_parts(tmp_path / "whole", "distill", written(place, tmp_path / "whole", **parts, **PARTS))
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    begin = time.monotonic()
    codes = two_processes(tmp_path / "two", "distill", str(recipe), before=lambda rank: killed_in_step(rank, 2))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 1) and time.monotonic() - begin < 60
    said = (tmp_path / "two/0.txt").read_text()
    assert "another process of this run has ended" in said and "Traceback" not in said
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    in_parts(tmp_path / "two", "distill", recipe)
    first, second = students(tmp_path / "whole/run", tmp_path / "two/run")
    assert torch.equal(first, second)
    assert main(["distill", str(recipe), "--set", f"output={tmp_path / 'alone/run'}"]) == 0  # and in another number
    assert (students(tmp_path / "alone/run")[0] - first).abs().mean() < 1e-3 * LEARNING_RATE


def not_finite_on_the_second(rank: int) -> None:
    if rank == 1:
        finish = PhaseTrainer._finish_gradients

        def spoiled(self):
            if self.step > 0:
                gradient = next(p.grad for p in self.trainable.values() if p.grad is not None)
                getattr(gradient, "_local_tensor", gradient).fill_(float("nan"))
            return finish(self)

        PhaseTrainer._finish_gradients = spoiled


@pytest.mark.parametrize("kind", ["none", "full"])
def test_gradients_that_are_not_finite_on_one_process_end_all_and_the_run_goes_on_in_one(kind, place, tmp_path):  # noqa: F811
    stage = {"name": "logits", "ce_weight": 0.5, "save_every": 1, "tokens": 6 * 4 * 32}
    recipe = written(place, tmp_path / "two", student={"layers": [0]}, stages=[stage], sharding={"kind": kind})
    begin = time.monotonic()
    codes = two_processes(tmp_path / "two", "distill", str(recipe), before=not_finite_on_the_second)
    assert codes == [2, 2] and time.monotonic() - begin < 60
    said = (tmp_path / "two/0.txt").read_text()
    assert said.count("error: ") == 1 and "3 steps in a row, the last one step 4" in said and "Traceback" not in said
    assert (tmp_path / "two/1.txt").read_text() == ""
    assert main(["distill", str(recipe)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [bool(record.get("skipped_at")) for record in steps] == [False, True, True, False, False, False]


def test_recomputed_layers_train_to_the_same_student(place, tmp_path):  # noqa: F811
    phases = {"mixing": None, "hidden": {"train_mlp": True}, "end_to_end": {"gradient_accumulation": 1}}
    parts = {"student": {"ssm_layers": [1]}, "phases": phases}
    for name, on in (("kept", False), ("again", True)):
        recipe = written(place, tmp_path / name, **parts, activation_checkpointing=on)
        assert main(["convert", str(recipe)]) == 0
    first, second = students(tmp_path / "kept/run", tmp_path / "again/run")
    assert torch.equal(first, second)


def test_bfloat16_in_parts_is_that_of_whole_models(place, tmp_path):  # noqa: F811
    """Autocast multiplies rounded copies of whole models; gathered matrices are rounded already."""
    phases = {
        "mixing": {"metric": "frobenius"},
        "hidden": {"match": "mixer_output"},
        "end_to_end": {"gradient_accumulation": 1},
    }
    parts = {"student": {"ssm_layers": [1]}, "phases": phases, "precision": "bfloat16"}
    in_parts(tmp_path / "whole", "convert", written(place, tmp_path / "whole", **parts, sharding={"kind": "none"}))
    in_parts(tmp_path / "parts", "convert", written(place, tmp_path / "parts", **parts, **PARTS))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = students(tmp_path / "whole/run", tmp_path / "parts/run")
    assert (first - second).abs().mean() < 1e-2 * LEARNING_RATE


@pytest.mark.parametrize("kind", ["own losses", "own losses and samples", "a teacher for each row"])
def test_rows_of_several_kinds_dealt_unevenly(kind, place, tokenizer, tmp_path):  # noqa: F811
    """A process may have no row of a kind, and comes to every layer of the teachers nevertheless."""
    pairs = [{"prompt": f"Q{i} what?", "response": f" answer {i * 7}", "by": "a" if i < 34 else "b"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pairs = {"source": str(tmp_path / "pairs.jsonl"), "kind": "pairs"}
    own = {"source": str(place / "texts/*.txt"), "own_loss": {"kd_weight": 0.5, "ce_weight": 1.0}}
    stage = {"name": "only", "ce_weight": 0.2, "batch_size": 2, "tokens": 8 * 2 * 32}
    parts = {"student": {"layers": [0]}}
    if kind == "a teacher for each row":
        tiny_teacher(
            vocab_size=258, num_hidden_layers=2, num_attention_heads=2, bos_token_id=256, eos_token_id=257
        ).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        parts |= {"teacher": {"model": str(place / "teacher"), "name": "a"}, "combine": "row"}
        parts |= {"teachers": [{"model": str(tmp_path / "other"), "name": "b"}]}
        train = [pairs | {"teacher_field": "by"}]
    else:
        train = [pairs, own | {"sampling_weight": 3.0}]
    if kind == "own losses and samples":
        stage["on_policy"] = {"share": 1.0, "max_new_tokens": 4, "prompt_tokens": 4}
    parts |= {"stages": [stage], "data": {"train": train, "validation_share": 0.2, "cache": str(tmp_path / "cache")}}
    in_parts(tmp_path / "whole", "distill", written(place, tmp_path / "whole", **parts))
    in_parts(tmp_path / "parts", "distill", written(place, tmp_path / "parts", **parts, **PARTS))
    first, second = students(tmp_path / "whole/run", tmp_path / "parts/run")
    assert (first - second).abs().mean() < 1e-3 * LEARNING_RATE

"""`mohawk convert` as its user meets it: a tiny checkpoint, three phases, a student that generates."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from mohawk.cli import main
from mohawk.conversion.objectives import HiddenObjective, MixingObjective
from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import convert, untrained_student
from mohawk.core.folders import Interrupted, is_complete
from mohawk.data.packing import PackedDataset, collate, load_data
from mohawk.errors import UserError
from mohawk.evaluation.run import evaluate_run
from mohawk.generation.generate import generate
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import SSMMixer
from mohawk.runs.claim import claimed
from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

STEPS = 6
INTERRUPTED = 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents to train on and others to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        line = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (folder / f"train_{i}.txt").write_text(line * (1 + i % 4))
    (folder / "other.txt").write_text("A cat that sat on a mat met a rat.\n" * 30)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher(vocab_size=258, num_hidden_layers=3, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(checkpoint: Path, texts: Path, output: Path, **student) -> Recipe:
    phase = {
        "tokens": STEPS * 4 * 32, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "save_every": 2,
    }  # fmt: skip
    return Recipe.from_dict(
        {
            "teacher": str(checkpoint),
            "student": {"ssm_layers": [0, 2], **student},
            "data": {
                "train": [str(texts / "train_*.txt")], "evaluation": [str(texts / "other.txt")],
                "validation_share": 0.1, "cache": str(texts / "cache"),
            },
            "phases": {
                "mixing": phase,
                "hidden": {**phase, "match": "mixer_output", "solve_tokens": 1024},
                "end_to_end": {**phase, "gradient_accumulation": 2, "tokens": STEPS * 8 * 32, "train": "all_but_mlp"},
            },
            "evaluation": {
                "sequence_length": 32, "batch_size": 4, "tokens": 128,
                "longest": 64, "contexts": [8, 16], "decode_tokens": 2,
                "prompt": "A cat", "continuation_tokens": 4,
            },
            "precision": "float32", "device": "cpu", "output": str(output),
        }
    )  # fmt: skip


def distance(objective, student, teacher) -> float:
    """A phase's loss on the documents that it trains on, in rows of its length."""
    text = "".join(f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n" for i in range(30))
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    ids = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    positions = torch.arange(32).expand_as(ids)
    batch = {"input_ids": ids, "position_ids": positions, "segment_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        return sum(loss.item() for _, loss in objective(student, teacher).losses(**batch, labels=ids))


@pytest.mark.parametrize("mixer", ["mamba2", "gated_delta", "kimi_delta"])
def test_a_run_from_checkpoint_to_student(mixer, checkpoint, texts, tmp_path, capsys):
    run = tmp_path / "run"
    convert(recipe_of(checkpoint, texts, run, mixer=mixer))
    printed = capsys.readouterr().out
    assert f"2 of 3 layers become {mixer}" in printed and "perplexity" in printed

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for phase in ("mixing", "hidden", "end_to_end"):
        assert len([m for m in metrics if m["phase"] == phase]) == STEPS
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    recipe = recipe_of(checkpoint, texts, run, mixer=mixer)
    students = [untrained_student(recipe, teacher)]
    outputs = functools.partial(HiddenObjective, match="mixer_output")
    for phase, objective in (("mixing", MixingObjective), ("hidden", outputs)):
        students.append(HybridForCausalLM.from_pretrained(run / "phases" / phase / "student"))
        before, after = (distance(objective, student, teacher) for student in students[-2:])
        # least squares on so few and like sentences does not help a delta rule on another one
        assert after < before or (phase == "hidden" and mixer != "mamba2"), phase
    stages = ("before", "mixing", "hidden", "end_to_end")
    found = {s: json.loads((run / "evaluation" / f"{s}.json").read_text()) for s in stages}
    assert all(set(found[s]) == {"held_out", "evaluation"} for s in stages)
    assert found["end_to_end"]["held_out"]["kl"] < found["hidden"]["held_out"]["kl"] < found["before"]["held_out"]["kl"]
    results = json.loads((run / "results.json").read_text())
    assert results["evaluation"]["end_to_end"] == found["end_to_end"]
    for name in ("losses.png", "evaluation.png", "mixing_matrices.png"):
        assert (run / "plots" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "Greedy continuations" in (run / "report.md").read_text()

    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student) is HybridForCausalLM and student.config.ssm_layers == [0, 2]
    tokens = AutoTokenizer.from_pretrained(run / "student")("A cat", return_tensors="pt")
    assert student.generate(**tokens, max_new_tokens=5, do_sample=False).shape[1] == tokens.input_ids.shape[1] + 5

    before = (run / "student" / "model.safetensors").read_bytes()
    convert(recipe_of(checkpoint, texts, run, mixer=mixer))  # once more: nothing is left to do
    assert (run / "student" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "family", ["llama_biased", "mistral", "qwen3", "gemma2", "olmo2", "phi4_mini", "gemma3", "granite", "qwen3_moe"]
)
def test_families_and_both_mixers_run(family, tokenizer, texts, tmp_path):
    teacher = tiny_teacher(family, vocab_size=258, num_hidden_layers=2, bos_token_id=256, eos_token_id=257)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    mixer = "discrete_mamba2" if family in ("mistral", "llama_biased") else "mamba2"
    recipe = recipe_of(tmp_path / "teacher", texts, tmp_path / "run", ssm_layers=[1], mixer=mixer)
    convert(recipe)
    found = json.loads((tmp_path / "run" / "evaluation" / "end_to_end.json").read_text())
    assert found["evaluation"]["kl"] < 50
    assert is_complete(tmp_path / "run" / "student")


def test_a_model_of_another_family_is_refused_before_its_weights_load(texts, tmp_path):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)  # no weights are there to load
    with pytest.raises(UserError, match=r"'gpt2' cannot be converted.*missing: the skeleton of Llama.*supported:"):
        convert(recipe_of(tmp_path, texts, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def final(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, texts, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"

    def body():
        convert(recipe_of(checkpoint, texts, run))

    assert wait(fork(body), 120) == 0
    return final(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
@pytest.mark.parametrize("phase", ["mixing", "hidden", "end_to_end"])
def test_stopped_in_a_phase_the_same_command_gives_the_same_student(
    phase, number, checkpoint, texts, tmp_path, uninterrupted
):
    run = tmp_path / "run"

    def stop_in_phase():
        while True:
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            if any(f'"phase": "{phase}"' in line and '"step": 3' in line for line in lines):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    def stopped():
        threading.Thread(target=stop_in_phase, daemon=True).start()
        try:
            convert(recipe_of(checkpoint, texts, run))
        except Interrupted:
            return INTERRUPTED

    assert wait(fork(stopped), 120) == (INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (run / "phases" / phase / "student").exists()

    assert wait(fork(lambda: convert(recipe_of(checkpoint, texts, run))), 120) == 0
    assert final(run) == uninterrupted
    steps = [(m["phase"], m["step"]) for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps == [(p, s + 1) for p in ("mixing", "hidden", "end_to_end") for s in range(STEPS)]


def test_a_dry_run_reads_no_weights_and_writes_nothing(checkpoint, texts, tmp_path, capsys):
    bare = tmp_path / "teacher"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    convert(recipe_of(bare, texts, tmp_path / "run"), dry_run=True)
    printed = capsys.readouterr().out
    for said in ("mamba2", "full attention", "q -> C", "mixing", "hidden", "end_to_end", "GiB"):
        assert said in printed
    convert(recipe_of(bare, texts, tmp_path / "run", init="calibrated", calibration_steps=7), dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Mixers are fitted to attention's outputs on 8,192 tokens first, 7 steps a layer." in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]


def test_refusals(checkpoint, texts, tmp_path):
    with pytest.raises(UserError, match="numbered 0 to 2"):
        convert(recipe_of(checkpoint, texts, tmp_path / "a", ssm_layers=[3]), dry_run=True)
    with pytest.raises(UserError, match="state_size must be the head dim 8"):
        convert(recipe_of(checkpoint, texts, tmp_path / "a", state_size=16), dry_run=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    for dry_run in (True, False):
        with pytest.raises(UserError, match="not a run of mohawk"):
            convert(recipe_of(checkpoint, texts, tmp_path / "mine"), dry_run=dry_run)


def test_a_tokenizer_of_another_model(tokenizer, texts, tmp_path):
    tiny_teacher(vocab_size=97).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="teacher: .*: its tokenizer has ids up to 257 .*only 97 rows"):
        convert(recipe_of(tmp_path / "teacher", texts, tmp_path / "run"))


def test_a_folder_keeps_its_recipe_but_takes_another_learning_rate(checkpoint, texts, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_of(checkpoint, texts, run)
    with claimed(run, recipe):
        with pytest.raises(UserError, match="another process is at work"), claimed(run, recipe):
            pass
    data = recipe.model_dump(mode="json")
    data["phases"]["hidden"]["learning_rate"] = 1e-4
    with claimed(run, Recipe.from_dict(data)):
        assert Recipe.load(run / "recipe.yaml").phases.hidden.learning_rate == 1e-4
    moved = run.rename(tmp_path / "elsewhere")
    with claimed(moved, Recipe.from_dict({**data, "output": str(moved)})):
        pass
    data["student"]["ssm_layers"] = [1]
    data["seed"] = 3
    (moved / "phases" / "mixing" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match="another seed, student.ssm_layers"), claimed(moved, Recipe.from_dict(data)):
        pass


def test_an_output_that_cannot_be_a_folder(checkpoint, texts, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        for dry_run in (True, False):
            with pytest.raises(UserError, match="output: .* cannot be written"):
                convert(recipe_of(checkpoint, texts, output), dry_run=dry_run)


def test_going_on_with_a_finished_run(checkpoint, texts, tmp_path, capsys, caplog):
    """What is missing or damaged is made again, what was asked anew is measured anew, the rest is left alone."""
    run = tmp_path / "run"
    recipe = recipe_of(checkpoint, texts, run)
    convert(recipe)
    student = (run / "student" / "model.safetensors").read_bytes()
    evaluation = (run / "evaluation" / "end_to_end.json").read_text()

    data = recipe.model_dump(mode="json")
    data["evaluation"]["contexts"], data["evaluation"]["prompt"] = [12], "A rat"
    (run / "student" / "MANIFEST.json").unlink()
    (run / "evaluation" / "hidden.json").write_text('{"held_out": {')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "end_to_end", "st')
    capsys.readouterr()
    convert(Recipe.from_dict(data))
    results = json.loads((run / "results.json").read_text())
    assert [s["context"] for s in results["decoding"]["student"]] == [12]
    assert results["continuations"]["prompt"] == "A rat"
    assert set(results["evaluation"]) == {"before", "mixing", "hidden", "end_to_end"}
    assert is_complete(run / "student") and (run / "student" / "model.safetensors").read_bytes() == student
    assert "hidden.json is damaged" in caplog.text and "passed over 1 damaged lines" in caplog.text

    data["phases"]["end_to_end"]["learning_rate"] = 1e-5
    with pytest.raises(UserError, match="another phases.end_to_end.learning_rate"):
        convert(Recipe.from_dict(data))
    shutil.rmtree(run / "phases" / "end_to_end")
    convert(Recipe.from_dict(data))
    assert (run / "student" / "model.safetensors").read_bytes() != student
    assert (run / "evaluation" / "end_to_end.json").read_text() != evaluation
    assert is_complete(run / "student")


def test_a_student_cut_short_is_named(checkpoint, texts, tmp_path):
    run = tmp_path / "run"
    data = recipe_of(checkpoint, texts, run).model_dump(mode="json")
    data["phases"]["hidden"] = data["phases"]["end_to_end"] = None
    convert(Recipe.from_dict(data))
    weights = run / "student" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    for use in (lambda: generate(run, "A cat"), lambda: evaluate_run(run)):
        with pytest.raises(UserError, match=rf"model.safetensors has {len(whole) - 100} bytes, not {len(whole)}"):
            use()
    with pytest.raises(UserError, match="cannot load the weights from the folder"):
        generate(run / "student", "A cat")


def test_a_student_that_contradicts_itself_is_kept_and_the_run_fails(checkpoint, texts, tmp_path, monkeypatch, capsys):
    """As after a rename in transformers: each call starts from an empty state, and no figure shows it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(checkpoint, texts, tmp_path / "run").to_yaml())
    command = ["convert", str(path), "--set", "phases.mixing=null", "--set", "phases.hidden=null"]
    with monkeypatch.context() as patch:
        patch.setattr(SSMMixer, "_read_cache", lambda *_: (None, None))
        assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "prefill in chunks" in error and "mohawk doctor" in error
    assert is_complete(tmp_path / "run" / "student")
    assert "NO: decoding is broken (prefill in chunks" in (tmp_path / "run" / "report.html").read_text()
    # with working versions the same command goes on, and reports
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert max(results["consistency"].values()) < 1e-5
    assert "answers as in one full forward by every way tried" in (tmp_path / "run" / "report.md").read_text()


def test_random_mixers_are_the_same_each_time_the_run_is_started(checkpoint, texts, tmp_path):
    """The untrained student is not saved, so it must come out of the seed."""
    recipe = recipe_of(checkpoint, texts, tmp_path, init="random")
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    first = untrained_student(recipe, teacher).state_dict()
    torch.manual_seed(99)
    second = untrained_student(recipe, teacher).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_calibrated_start_is_the_least_squares_fit_to_attention(checkpoint, texts, tmp_path):
    """Without phases the start is the run's student: its output projections against numpy's own least squares."""
    recipe = recipe_of(
        checkpoint, texts, tmp_path / "run", init="calibrated", calibration_tokens=640, calibration_steps=0
    )
    recipe = Recipe.from_dict(
        recipe.model_dump(mode="json") | {"phases": {"mixing": None, "hidden": None, "end_to_end": None}}
    )
    convert(recipe)
    start = HybridForCausalLM.from_pretrained(tmp_path / "run" / "student").state_dict()
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    copied = untrained_student(recipe, teacher)
    for name, value in copied.state_dict().items():
        assert torch.equal(start[name], value) or "out_proj" in name, name

    data = load_data([{"source": str(texts / "train_*.txt")}], AutoTokenizer.from_pretrained(checkpoint),
                     evaluation=[], validation_share=0.1, cache=str(texts / "cache"))  # fmt: skip
    rows = PackedDataset(data.train, 32, seed=recipe.seed, pad_token_id=257)
    batch = collate([rows[i] for i in range(20)])  # 640 tokens
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name, i):
        def hook(module, args, kwargs, out):
            seen[name, i] = (args[0] if name == "features" else out[0]).detach()

        return hook

    for i, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_hook(keep("attention", i), with_kwargs=True)
        layer.input_layernorm.register_forward_hook(
            lambda module, args, out, i=i: seen.__setitem__(("input", i), out.detach())
        )
    with torch.no_grad():
        teacher(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        for i in (0, 2):
            mixer = copied.model.layers[i].self_attn
            handle = mixer.output.register_forward_hook(keep("features", i), with_kwargs=True)
            mixer(seen["input", i], segment_ids=batch["segment_ids"])
            handle.remove()
            real = batch["segment_ids"] >= 0
            features = seen["features", i][real].double().numpy()
            target = seen["attention", i][real].double().numpy()
            if mixer.output.bias is not None:
                features = np.concatenate([features, np.ones((len(features), 1))], 1)
            first = np.concatenate(
                [mixer.output.weight.double().numpy().T]
                + ([] if mixer.output.bias is None else [mixer.output.bias.double().numpy()[None]])
            )
            pull = np.sqrt(1e-2 * np.square(features).sum(0).mean())  # the ridge, as rows of the problem
            system = np.concatenate([features, pull * np.eye(len(first))])
            expected = np.linalg.lstsq(system, np.concatenate([target, pull * first]), rcond=None)[0]
            found = start[f"model.layers.{i}.self_attn.out_proj.weight"].double().numpy().T
            assert np.abs(found - expected[: len(found)]).max() < 1e-4 * np.abs(expected).max()


def test_a_calibrated_start_is_made_again_after_a_kill_in_phase_1(checkpoint, texts, tmp_path):
    def recipe(name):
        student = {"init": "calibrated", "mixer": "discrete_mamba2", "calibration_tokens": 320, "calibration_steps": 4}
        return recipe_of(checkpoint, texts, tmp_path / name, **student)

    def stopped():
        def stop():
            metrics = tmp_path / "killed" / "metrics.jsonl"
            while not (metrics.exists() and '"step": 3' in metrics.read_text()):
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=stop, daemon=True).start()
        convert(recipe("killed"))

    assert wait(fork(stopped), 120) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "phases" / "mixing" / "student").exists()
    for name in ("killed", "whole"):
        assert wait(fork(lambda name=name: convert(recipe(name))), 120) == 0
    assert final(tmp_path / "killed") == final(tmp_path / "whole")


@pytest.mark.parametrize("field", ["calibration_tokens", "calibration_steps"])
def test_calibration_of_another_start_is_a_mistake(field, checkpoint, texts, tmp_path):
    with pytest.raises(UserError, match=f"student.{field} is given, but student.init: attention fits nothing to text"):
        recipe_of(checkpoint, texts, tmp_path, **{field: 640})

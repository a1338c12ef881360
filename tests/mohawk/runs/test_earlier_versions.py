"""What version 0.1.0 wrote is read by this one: a stopped run, a teacher's cache, students and an export.

tests/data/0.1.0.tar.xz holds a toy Llama, text, a conversion that was stopped in its last phase (with its students and
checkpoints), an export with its own code, and a cache of the teacher's answers, all written by 0.1.0 under transformers
5.24; expected.json has logits that its students gave there, the finished one's among them. 0.1.0-stopped.tar.xz has a
distillation that 0.1.0 stopped in its second stage, and a pruning stopped in its second round, of the same Llama.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from mohawk.cli import main
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.teacher_cache.reader import TeacherCache

ARCHIVES = [Path(__file__).resolve().parents[2] / "data" / name for name in ("0.1.0.tar.xz", "0.1.0-stopped.tar.xz")]
IDS = torch.arange(12)[None] % 30


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for file in ARCHIVES:
        with tarfile.open(file) as archive:
            archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path / "cache"))
    return tmp_path


def expected(place: Path, name: str) -> list[float]:
    return json.loads((place / "expected.json").read_text())[name]


def logits(model) -> list[float]:
    with torch.no_grad():
        return model.eval()(IDS).logits[0, -1, :6].tolist()


def test_a_stopped_run_goes_on_to_the_same_student(place, capsys):
    steps = [json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert main(["convert", "run/recipe.yaml"]) == 0
    after = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in after][: len(steps)] == steps, "from where it was stopped, not from the beginning"
    assert [line["step"] for line in after if line["phase"] == "end_to_end"] == list(range(1, 13))
    student = HybridForCausalLM.from_pretrained(place / "run" / "student")
    assert logits(student) == pytest.approx(expected(place, "finished/student"), abs=1e-4)
    assert main(["inspect", "run"]) == 0 and "end_to_end: done" in capsys.readouterr().out
    assert main(["verify", "run"]) == 0


@pytest.mark.parametrize(
    ("command", "finished", "stopped", "steps"), [("distill", "one", "two", 600), ("prune", "heal_1", "heal_2", 100)]
)
def test_a_stopped_distillation_and_pruning_go_on(command, finished, stopped, steps, place):
    run = place / {"distill": "distillation", "prune": "pruning"}[command]
    whole = run / "phases" / finished / "student" / "model.safetensors"
    before, kept = (run / "metrics.jsonl").read_text().splitlines(), whole.read_bytes()
    assert main([command, f"{run.name}/recipe.yaml"]) == 0
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in after][: len(before)] == [
        (line["phase"], line["step"]) for line in map(json.loads, before)
    ]
    assert [line["step"] for line in after if line["phase"] == stopped] == list(range(1, steps + 1))
    assert whole.read_bytes() == kept
    assert main(["verify", run.name]) == 0


@pytest.mark.parametrize(("init", "code"), [("random", 2), ("neutral", 2), ("attention", 0)])
def test_a_run_stopped_in_phase_1_with_other_random_values_is_refused(init, code, place, capsys):
    """Frozen random values are in no checkpoint of phase 1, and are drawn otherwise now."""
    run = place / "run"
    for rest in (run / "phases" / "mixing" / "student", run / "phases" / "end_to_end"):
        shutil.rmtree(rest)
    for name, key in (("recipe.yaml", "init: {}"), ("run.json", '"init": "{}"')):
        text = (run / name).read_text()
        assert text.count(key.format("attention")) == 1
        (run / name).write_text(text.replace(key.format("attention"), key.format(init)))
    assert main(["convert", "run/recipe.yaml"]) == code
    assert ("stopped this run in phase 1" in capsys.readouterr().err) == bool(code)


def test_a_student_of_a_phase_is_read(place):
    student = HybridForCausalLM.from_pretrained(place / "run" / "phases" / "mixing" / "student")
    assert logits(student) == pytest.approx(expected(place, "stopped/phases/mixing/student"), abs=1e-5)


def test_an_export_is_read_without_this_package(place):
    code = (
        "import sys; sys.modules['mohawk'] = None\n"
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True).eval()\n"
        "print(model(torch.arange(12)[None] % 30).logits[0, -1, :6].tolist())"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(expected(place, "exported"), abs=1e-5)


def test_a_cache_is_read_and_learned_from(place):
    cache = TeacherCache("answers")
    assert len(cache) == 75 and cache.layout.k == 4
    assert main(["verify", "answers"]) == 0
    assert main(["distill", "distill.yaml", "--set", "stages.0.cache=answers"]) == 0

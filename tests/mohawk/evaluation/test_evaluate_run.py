"""`mohawk evaluate RUN` on a run's folder: what it compares, what it writes, what it refuses."""

import json

import pytest

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_llama, tokenizer):
    """A run's folder whose student is the teacher itself, with attention in every layer."""
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.models.hybrid_config import HybridConfig

    folder = tmp_path_factory.mktemp("evaluate")
    teacher = make_llama()
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (folder / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 60)
    student = HybridForCausalLM(HybridConfig(base_config=teacher.config))
    student.load_state_dict(teacher.state_dict())
    student.save_pretrained(folder / "run" / "student")
    Recipe.from_dict(
        {
            "teacher": str(folder / "teacher"),
            "data": {
                "train": [str(folder / "train.txt")],
                "evaluation": [str(folder / "other.txt")],
                "validation_share": 0.1,
                "cache": str(folder / "cache"),
            },
            "evaluation": {"sequence_length": 64, "tokens": 512, "contexts": [8, 16], "decode_tokens": 2},
            "precision": "float32",
            "device": "cpu",
            "output": str(folder / "run"),
        }
    ).save(folder / "run" / "recipe.yaml")
    return folder / "run"


def test_a_student_that_is_its_teacher(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    results = json.loads((run / "evaluation" / "again.json").read_text())
    assert set(results["texts"]) == {"held_out", "evaluation"}
    for found in results["texts"].values():
        assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
        assert found["kl"] == pytest.approx(0, abs=1e-6)
        assert found["top1_agreement"] == 1
        assert f"{found['student_perplexity']:.2f}" in out
    for kind in ("teacher", "student"):
        assert [speed["context"] for speed in results["decoding"][kind]] == [8, 16]
    assert results["decoding"]["teacher"][1]["state_bytes"] == 2 * results["decoding"]["teacher"][0]["state_bytes"]


def test_on_another_text(run):
    other = run.parent / "other.txt"
    assert main(["evaluate", str(run), "--set", f"data.train=[{other}]", "--set", "evaluation.tokens=64"]) == 0
    results = json.loads((run / "evaluation" / "again.json").read_text())
    assert results["overrides"] == [f"data.train=[{other}]", "evaluation.tokens=64"]
    assert all(0 < found["tokens"] <= 64 for found in results["texts"].values())


def test_what_is_no_run(run, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run's folder: it holds no recipe.yaml" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is a run without a student yet" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--set", "evaluation.tokens=x"]) == 2
    assert "evaluation.tokens" in capsys.readouterr().err

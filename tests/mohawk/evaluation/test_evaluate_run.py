"""`mohawk evaluate RUN` on a run's folder: what it compares, what it writes, what it refuses."""

import json
import shutil

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
            "evaluation": {
                "sequence_length": 64,
                "tokens": 512,
                "longest": 64,
                "contexts": [8, 16],
                "decode_tokens": 2,
            },
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
    assert max(results["consistency"].values()) < 1e-5 and results["dtype"] == "float32"
    assert results["behaviour"]["written"]["same"]["first"] == results["behaviour"]["written"]["student"]["length"]
    assert [found[0]["ratio"] for found in results["behaviour"]["positions"].values()] == pytest.approx([1, 1])
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


def test_broken_decoding_is_told_and_reported_however_good_the_likelihood(run, tmp_path, monkeypatch, capsys):
    from mohawk.core.folders import write_whole
    from mohawk.core.json_files import read_json, write_json
    from mohawk.models.hybrid import HybridForCausalLM
    from tests.mohawk.runs.test_page import made_results

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("student"))
    with write_whole(tmp_path / "run" / "student", replace=True, about={}) as partial:
        shutil.copytree(run / "student", partial, dirs_exist_ok=True)
    write_json(tmp_path / "run" / "results.json", made_results())
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "fit to use: it generates by the function that was measured" in capsys.readouterr().out
    whole = HybridForCausalLM.forward

    def forgets(self, input_ids=None, **given):
        """Each step begins anew."""
        if input_ids is not None and input_ids.shape[1] == 1:
            given = {name: None if name in ("cache", "past_key_values") else value for name, value in given.items()}
        return whole(self, input_ids=input_ids, **given)

    monkeypatch.setattr(HybridForCausalLM, "forward", forgets)
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "fit to use: NO: decoding is broken (prefill and steps" in said.out
    assert "the student does not answer as its own full forward does: prefill and steps" in said.err
    assert read_json(tmp_path / "run/evaluation/again.json")["texts"]["held_out"]["perplexity_ratio"] == pytest.approx(
        1
    )
    assert '<td class="bad">NO: decoding is broken' in (tmp_path / "run/report.html").read_text()
    assert "- **fit to use**: NO: decoding" in (tmp_path / "run/report.md").read_text()

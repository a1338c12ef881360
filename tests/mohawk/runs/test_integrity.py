"""What a run made is verified when it is used, bound to what it was made of, and made again where it is damaged."""

import itertools
import json
import logging
import os
import re
import shutil
import stat
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import convert
from mohawk.core import sums
from mohawk.core.folders import (
    MANIFEST,
    about_of,
    checkpoints,
    is_complete,
    sum_file,
    weights_sum,
    why_altered,
    why_incomplete,
    write_file,
    write_whole,
)
from mohawk.core.json_files import read_json, write_json
from mohawk.core.lines import append_line, read_lines, write_lines
from mohawk.core.run_folder import RECIPE, RUN_FILE
from mohawk.distillation.cache import cache_teacher
from mohawk.distillation.recipe import DistillRecipe
from mohawk.distillation.run import distill
from mohawk.errors import UserError
from mohawk.evaluation.run import evaluate_run
from mohawk.inspection.verify import findings
from mohawk.runs.claim import check_folder, claimed
from mohawk.runs.kept import Bound
from mohawk.training.metrics import read_metrics
from tests.helpers.figures import level
from tests.helpers.tiny_phase import TinyObjective, cheap_training, tiny_phase, tiny_trainer, weights  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

STEPS = 4


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A folder with a teacher, a text, and a finished run; tests change copies of it."""
    folder = tmp_path_factory.mktemp("made")
    tiny_teacher(vocab_size=258, num_hidden_layers=2, bos_token_id=256, eos_token_id=257).save_pretrained(
        folder / "teacher"
    )
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(f"Document {i} counts {', '.join(map(str, range(i, i + 40)))}.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert(recipe_of())
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it, and where paths are looked for: the run's are relative."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """A copy of it with an export, which takes a process of its own to be checked in."""
    folder = tmp_path_factory.mktemp("exported") / "copy"
    shutil.copytree(made, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["export", "run", "--to", "hybrid"]) == 0
    return folder


@pytest.fixture
def place_with_export(exported, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def recipe_of(output: str = "run", **changed) -> Recipe:
    """Its paths are relative: a copy of the folder is a run like the one it was copied from."""
    phase = {"tokens": STEPS * 4 * 32, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "save_every": 2}
    recipe = {
        "teacher": "./teacher", "student": {"ssm_layers": [1]},
        "data": {"train": ["texts"], "validation_share": 0.2, "cache": "cache"},
        "phases": {"mixing": phase, "hidden": None, "end_to_end": {**phase, "gradient_accumulation": 1}},
        "evaluation": {"sequence_length": 32, "batch_size": 4, "tokens": 64,
            "longest": 64, "contexts": [8], "decode_tokens": 2,
                       "prompt": "A cat", "continuation_tokens": 2},
        "precision": "float32", "device": "cpu", "output": output,
    }  # fmt: skip
    return Recipe.from_dict(recipe, [f"{key}={value}" for key, value in changed.items()])


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def said(capsys) -> str:
    return capsys.readouterr().err


# ---- use ----


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", MANIFEST])
def test_every_use_of_a_damaged_student_is_refused_in_one_line(file, place, capsys):
    flip(place / "run" / "student" / file, 5 if file == MANIFEST else None)
    prompts = place / "prompts.txt"
    prompts.write_text("A cat\n")
    uses = [
        ["generate", "run", "--prompt", "A"], ["inspect", "run"], ["evaluate", "run"], ["export", "run"],
        ["generate-data", str(prompts), "--model", "run", "--output", "answers"],
        ["inspect", "run", "--matrices", str(prompts)], ["generate", "run/student", "--prompt", "A"],
    ]  # fmt: skip
    for arguments in uses:
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        (line,) = [line for line in said(capsys).splitlines() if line.startswith("error")]
        assert f"{file} is damaged" in line, line
        assert "run/student" in line


def test_checkpoints_of_a_finished_phase_are_not_read_again(place, caplog):
    """They may be large, and nothing goes on from them."""
    newest = checkpoints(place / "run" / "phases" / "mixing")[0]
    flip(newest / "trainable.safetensors")
    before = (newest / "trainable.safetensors").read_bytes()
    convert(recipe_of())
    assert "passed over" not in caplog.text and "resuming" not in caplog.text
    assert (newest / "trainable.safetensors").read_bytes() == before


def test_a_student_is_hashed_once_and_again_when_it_changes(place, monkeypatch):
    student, hashed = place / "run" / "student", []
    monkeypatch.setattr(sums, "SETTLED_NS", -1)  # the copy is as young as this test
    real = sums.hashed
    monkeypatch.setattr(sums, "hashed", lambda path: hashed.append(path.name) or real(path))
    assert is_complete(student) and "model.safetensors" in hashed
    hashed.clear()
    assert is_complete(student) and hashed == []
    about = (student / "model.safetensors").stat()
    flip(student / "model.safetensors")
    os.utime(student / "model.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns))  # its inode's time has changed
    assert not is_complete(student)
    # what is remembered is no witness against a file: a damaged memory costs a second look
    flip(student / "model.safetensors")
    assert is_complete(student)
    memory = sums._memory(student)
    read = json.loads(memory.read_text())
    read["files"]["model.safetensors"][3] = "0" * 64
    memory.write_text(json.dumps(read))
    assert is_complete(student)
    memory.write_text("{")
    assert is_complete(student)


def test_a_file_just_written_is_not_remembered(tmp_path):
    (tmp_path / "a").write_text("one")
    sums.sha256_of([tmp_path / "a"])
    assert not sums._memory(tmp_path).exists()


def test_a_cache_that_cannot_be_written_costs_only_time(place, monkeypatch):
    monkeypatch.setattr(sums, "SETTLED_NS", -1)
    monkeypatch.setattr(sums, "_memory", lambda folder: place / "texts" / "0.txt" / "sums.json")
    assert is_complete(place / "run" / "student")


def test_a_card_that_a_person_wrote_in_is_no_damage_to_a_model(place_with_export, capsys):
    from mohawk.loading.configs import locate

    out = "run/export/hybrid"
    Path(out, "README.md").write_text("# Mine\n")
    assert locate(out) == (out, None)
    assert main(["verify", out]) == 2 and "README.md has 7 bytes" in said(capsys)


# ---- verify ----


def test_verify_names_every_kind_of_damaged_file(place, capsys):
    assert main(["verify", "run"]) == 0
    assert "each as it was written" in capsys.readouterr().out
    every = [
        "recipe.yaml", "run.json", "results.json", "report.md", "report.html", "metrics.jsonl",
        "evaluation/before.json", "evaluation/mixing.json", "matrices/before.safetensors", "plots/losses.png",
        "student/config.json", "student/model.safetensors",
        "phases/mixing/student/model.safetensors", "phases/mixing/checkpoint-4/optimizer.pt",
        "phases/end_to_end/checkpoint-2/phase_state.json",
    ]  # fmt: skip
    for name in every:
        path = place / "run" / name
        whole = path.read_bytes()
        for damage in (flip, lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.write_bytes(b"")):
            damage(path)
            capsys.readouterr()
            assert main(["verify", "run"]) == 2, name
            lines = said(capsys).splitlines()
            part = str(path) if sum_file(path).exists() or name == "metrics.jsonl" else str(path.parent)
            assert len(lines) == 2 and os.path.relpath(part, place) in lines[0], (name, lines)
            path.write_bytes(whole)
    sums = sum_file(place / "run" / "report.md")
    whole = sums.read_bytes()
    for content in (whole[:-2] + b"x\n", whole[:-1]):  # in the name behind the sum, and its last byte
        sums.write_bytes(content)
        assert main(["verify", "run"]) == 2 and "report.md: has a damaged sum beside it" in said(capsys)


@pytest.mark.parametrize("name", ["run/metrics.jsonl", "run/export/hybrid/MANIFEST.json", "run/student/config.json"])
def test_verify_names_what_is_missing(name, place_with_export, capsys):
    (place_with_export / name).unlink()
    assert main(["verify", "run"]) == 2
    assert re.search(
        rf"^error: {os.path.dirname(name)}.*({Path(name).name} is missing|is missing|has no)", said(capsys)
    )


@pytest.mark.parametrize("name", [".metrics.jsonl.crc32", ".report.md.sha256"])
def test_verify_says_of_what_it_has_no_sum(name, place, capsys):
    """Of an earlier version's run it is said; what began with sums has lost one."""
    (place / "run" / name).unlink()
    capsys.readouterr()
    of = name.removeprefix(".").rpartition(".")[0]
    assert main(["verify", "run"]) == 2 and re.search(rf"^error: run/{of}: has lost the ", said(capsys))
    told = read_json(place / "run" / "run.json", Bound)
    write_json(place / "run" / "run.json", {key: value for key, value in told.items() if key != "sums"})
    assert main(["verify", "run"]) == 0
    assert f"run/{of}: was written without sums" in capsys.readouterr().out


@pytest.mark.parametrize("name", [RECIPE, RUN_FILE, "results.json", "evaluation/mixing.json", "plots/losses.png"])
def test_a_file_whose_sum_is_deleted_is_damaged(name, place, caplog, capsys):
    """It could be anything now: it is made again, with its sum, and all is as it was."""
    path = place / "run" / name
    before = path.read_bytes()
    flip(path, before.index(b"precision") if name == RUN_FILE else None)
    sum_file(path).unlink()
    if name != RECIPE:  # which is taken as edited on purpose where it is named
        convert(recipe_of())
        assert name == "plots/losses.png" or "has lost the sum beside it" in caplog.text
        assert read_json(path) == json.loads(before) if name.startswith("eval") else why_altered(path) is None
    else:
        assert main(["evaluate", "run"]) == 2 and "recipe.yaml has lost the sum beside it" in said(capsys)
        convert(recipe_of())
    assert main(["verify", "run"]) == 0
    # as a text that lies in the folder has none
    (place / "run" / "notes.json").write_text("{}")
    assert why_altered(place / "run" / "notes.json") is None


def test_no_bit_of_a_manifest_changes_in_silence(place):
    """Whichever it is: what the folder is of stands there too, by which students of other runs are known."""
    folder = place / "run" / "phases" / "end_to_end" / "student"
    path, about = folder / MANIFEST, about_of(folder)
    whole = path.read_bytes()
    assert {"run", "from", "bound"} <= about.keys()
    meaning = json.loads(whole)
    for at in range(whole.index(b'"about"'), len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        if why_incomplete(folder) is None:
            found = json.loads(bytes(changed))
            assert {k: v for k, v in found.items() if k in ("files", "about")} == {
                k: v for k, v in meaning.items() if k != "sha256"
            }, at
        else:
            assert about_of(folder) == {} and weights_sum(folder) is None, at


def written_by_an_earlier_version(tokens: Path) -> None:
    """Tokenised text had no manifest then, and did not say that it has one."""
    (tokens / MANIFEST).unlink(missing_ok=True)
    meta = json.loads((tokens / "meta.json").read_text())
    (tokens / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "sums"}))


def test_verify_of_caches_and_of_what_is_none(place, capsys):
    assert main(["verify", "cache"]) == 0
    (tokens,) = (place / "cache" / "tokens").iterdir()
    flip(tokens / "tokens.bin")
    assert main(["verify", "cache"]) == 2 and "tokens.bin is damaged" in said(capsys)
    assert main(["verify", str(tokens)]) == 2
    (tokens / MANIFEST).unlink()
    assert main(["verify", "cache"]) == 2 and f"{tokens.name}: has lost its MANIFEST.json" in said(capsys)
    written_by_an_earlier_version(tokens)
    assert main(["verify", "cache"]) == 2
    told = capsys.readouterr()
    assert f"{tokens.name}: has no MANIFEST.json" in told.out and "nothing of cache is verified" in told.err
    assert main(["verify", "texts"]) == 2 and "nothing with sums" in said(capsys)
    assert main(["verify", "nowhere"]) == 2 and "no folder" in said(capsys)


def test_verify_of_a_teachers_cache(place, capsys):
    assert main(["cache", "run/recipe.yaml", "--output", "answers", "--k", "4"]) == 0
    assert main(["verify", "answers"]) == 0
    for name, problem in (
        ("shard-00000.bin", "shard-00000.bin is damaged"),
        ("settings.json", "settings.json is damaged"),
        (MANIFEST, "answers: is damaged (its sha256 is not what it says)"),
    ):
        path = place / "answers" / name
        whole = path.read_bytes()
        flip(path) if name != MANIFEST else path.write_bytes(whole.replace(b'"seed": 0', b'"seed": 1'))
        capsys.readouterr()
        assert main(["verify", "answers"]) == 2
        assert problem in said(capsys).splitlines()[0].replace("answers/MANIFEST.json", "answers")
        path.write_bytes(whole)
    path.unlink()
    assert main(["verify", "answers"]) == 2 and "answers: has no MANIFEST.json" in said(capsys)


def test_runs_of_earlier_versions_are_used_and_said_to_be_unverified(place, capsys, caplog):
    run = place / "run"
    for path in [*run.rglob(".*.sha256"), *run.rglob(".*.crc32"), run / "run.json"]:
        path.unlink()
    for path in [*run.glob("phases/*/*"), run / "student", *(place / "cache" / "tokens").iterdir()]:
        manifest = path / MANIFEST
        if "tokens" in path.parts:
            written_by_an_earlier_version(path)
        elif manifest.exists():
            value = json.loads(manifest.read_text())
            manifest.write_text(json.dumps({"files": value["files"]}))
    student = (run / "student" / "model.safetensors").read_bytes()
    convert(recipe_of())
    assert (run / "student" / "model.safetensors").read_bytes() == student
    assert caplog.text.count("not verified") == 2  # the token cache, and what the run was made of
    assert "nothing there says what it was made of" in caplog.text
    capsys.readouterr()
    assert main(["verify", "run"]) == 0
    assert "evaluation/before.json: was written without sums" in capsys.readouterr().out


def test_a_run_that_an_earlier_version_began_is_not_said_to_have_lost_its_sums(place, capsys):
    """It was killed before its first checkpoint, with a step logged and no run.json yet."""
    run = place / "early"
    run.mkdir()
    recipe_of("early").save(run / RECIPE)
    (run / "metrics.jsonl").write_text('{"phase": "mixing", "step": 1, "tokens": 64, "loss": 1.0}\n')
    for name, told in (("early", None), ("new", True)):
        with claimed(place / name, recipe_of(name)):
            pass
        assert read_json(place / name / RUN_FILE, Bound).get("sums") is told
        assert main(["verify", name]) == 0, said(capsys)
    assert "early/metrics.jsonl: was written without sums" in capsys.readouterr().out


# ---- made again ----


def test_a_damaged_token_cache_is_made_again(place, caplog):
    (tokens,) = (place / "cache" / "tokens").iterdir()
    whole = {path.name: path.read_bytes() for path in tokens.iterdir()}
    from mohawk.data.text import tokenize
    from mohawk.loading.models import load_tokenizer

    tokenizer = load_tokenizer("teacher")
    for name in ("tokens.bin", "offsets.npy", "digests.npy", "meta.json", MANIFEST):
        flip(tokens / name, 5 if name == MANIFEST else None)
        found = tokenize("texts", tokenizer, cache="cache")
        assert found.folder == Path("cache/tokens") / tokens.name and "making it again" in caplog.text
        assert {path.name: path.read_bytes() for path in tokens.iterdir()} == whole, name
        caplog.clear()
    (tokens / "tokens.bin").unlink()
    tokenize("texts", tokenizer, cache="cache")
    assert (tokens / "tokens.bin").read_bytes() == whole["tokens.bin"]
    # another text's folder under this name
    (place / "other.txt").write_text("Quite another text.\n" * 9)
    other = tokenize("other.txt", tokenizer, cache="cache").folder
    shutil.rmtree(tokens)
    shutil.copytree(other, tokens)
    tokenize("texts", tokenizer, cache="cache")
    assert (tokens / "tokens.bin").read_bytes() == whole["tokens.bin"]
    # one that has lost its manifest could be anything
    caplog.clear()
    (tokens / MANIFEST).unlink()
    flip(tokens / "tokens.bin", 0)
    tokenize("texts", tokenizer, cache="cache")
    assert (tokens / "tokens.bin").read_bytes() == whole["tokens.bin"] and "has lost its MANIFEST" in caplog.text
    # one of an earlier version, cut short
    written_by_an_earlier_version(tokens)
    (tokens / "tokens.bin").write_bytes(whole["tokens.bin"][:-2])
    tokenize("texts", tokenizer, cache="cache")
    assert (tokens / "tokens.bin").read_bytes() == whole["tokens.bin"]


def test_a_damaged_pair_cache_is_made_again(place, caplog):
    from mohawk.data.pair_tokens import read_pairs
    from mohawk.loading.models import load_tokenizer

    tokenizer = load_tokenizer("teacher")
    (place / "pairs.jsonl").write_text('{"prompt": "one", "response": "two"}\n{"prompt": "a", "response": "b c"}\n')
    first = read_pairs(["pairs.jsonl"], tokenizer, cache="cache").tokens.tolist()
    (folder,) = (place / "cache" / "pairs").iterdir()
    for name in ("tokens.npy", "spans.npy", "meta.json", MANIFEST):
        flip(folder / name) if name != MANIFEST else (folder / name).unlink()
        assert read_pairs(["pairs.jsonl"], tokenizer, cache="cache").tokens.tolist() == first
        assert "making it again" in caplog.text
        caplog.clear()


def test_damaged_figures_and_a_lost_recipe_are_made_again(place, caplog):
    run = place / "run"
    evaluated = (run / "evaluation" / "mixing.json").read_text()
    recipe = (run / "recipe.yaml").read_text()
    damages = {
        "evaluation/mixing.json": "[]",  # JSON, but of another shape
        "evaluation/end_to_end.json": '{"held_out": 3}',
        "results.json": '{"decoding": 7}',
        "recipe.yaml": "",
    }
    for name, text in damages.items():
        (run / name).write_text(text)
    sum_file(run / "evaluation" / "end_to_end.json").unlink()  # as an earlier version wrote it: by its shape alone
    convert(recipe_of())
    assert json.loads((run / "evaluation" / "mixing.json").read_text()) == json.loads(evaluated)
    assert json.loads((run / "evaluation" / "end_to_end.json").read_text())["held_out"]["tokens"] > 0
    assert (run / "recipe.yaml").read_text() == recipe
    assert json.loads((run / "results.json").read_text())["decoding"]["student"]
    assert main(["verify", "run"]) == 0
    for name in ("mixing.json", "end_to_end.json", "results.json"):
        assert f"{name} is damaged" in caplog.text


def test_what_is_missing_and_was_there_is_said(place, caplog):
    """And figures are measured again; losses are not."""
    run = place / "run"
    figures = json.loads((run / "results.json").read_text())["evaluation"]["mixing"]["held_out"]
    (run / "evaluation" / "mixing.json").unlink()
    (run / "metrics.jsonl").unlink()
    convert(recipe_of())
    assert "evaluation/mixing.json is missing: making again" in caplog.text
    assert f"metrics.jsonl is missing, and the {2 * STEPS} lines that were in it" in caplog.text
    again = json.loads((run / "results.json").read_text())["evaluation"]["mixing"]["held_out"]
    assert level(again) == pytest.approx(level(figures))


def test_a_damaged_recipe_is_refused_by_those_that_read_the_run(place, capsys):
    path = place / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    for arguments in (["evaluate", "run"], ["generate", "run", "--prompt", "A"], ["inspect", "run"], ["select", "run"]):
        capsys.readouterr()
        assert main(arguments) in (0, 2)
    assert main(["evaluate", "run"]) == 2 and "recipe.yaml is not as it was written" in said(capsys)
    with pytest.raises(UserError, match="another seed"):
        convert(Recipe.load(path))


def test_damaged_lines_of_metrics_are_passed_over(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_line(path, json.dumps({"phase": "a", "step": step, "tokens": 10 * step, "loss": 0.5}))
    path.write_text(path.read_text().replace('"tokens": 10,', '"tokens": 11,'))
    assert [record["step"] for record in read_metrics(path)] == [0, 2] and "1 damaged line" in caplog.text
    write_lines(path, [line for line, whole in read_lines(path) if whole])
    assert all(whole for _, whole in read_lines(path)) and len(read_metrics(path)) == 2
    # a kill between a line's checksum and the line
    (tmp_path / ".metrics.jsonl.crc32").open("a").write("00000000\n")
    assert len(read_metrics(path)) == 2
    old = tmp_path / "old.jsonl"
    old.write_text('{"phase": "a", "step": 1, "tokens": 1, "loss": 1}\n{"phase": "a", "step": "2"}\n')
    append_line(old, '{"phase": "a", "step": 3, "tokens": 1, "loss": null}')
    assert [record["step"] for record in read_metrics(old)] == [1, 3]


def test_a_file_appears_with_its_sum_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    assert why_altered(path) is None and read_json(path) == {"a": 1}
    real, calls = os.replace, []

    def killed(at):
        def replace(*paths):
            calls.append(paths)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*paths)

        return replace

    for at in (1, 2, 3):  # the sums of both, the file, its own sum
        calls.clear()
        monkeypatch.setattr(os, "replace", killed(at))
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 1 + at})
        monkeypatch.undo()
        assert why_altered(path) is None and read_json(path) in ({"a": at}, {"a": 1 + at})
        assert sorted(p.name for p in path.parent.iterdir()) == [".x.json.sha256", "x.json"]
        write_json(path, {"a": 1 + at})
    assert sorted(p.name for p in path.parent.iterdir()) == [".x.json.sha256", "x.json"]
    path.write_text('{"a": 5}')
    assert why_altered(path) == "is not as it was written" and read_json(path) is None
    write_json(path, {"a": 6})
    sum_file(path).write_text("")
    assert why_altered(path) == "has a damaged sum beside it" and read_json(path) is None
    write_json(path, {"a": 7})
    assert why_altered(path) is None and read_json(path) == {"a": 7}
    with pytest.raises(OSError, match="full"), write_file(path) as beside:
        beside.write_text("half")
        raise OSError(28, "full")
    assert sorted(p.name for p in path.parent.iterdir()) == [".x.json.sha256", "x.json"]


# ---- bound to what it was made of ----


def test_a_final_student_of_another_one_is_made_again(place):
    run = place / "run"
    old = (run / "student" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "phases" / "end_to_end")
    recipe = recipe_of(**{"phases.end_to_end.learning_rate": 1e-3})

    # stopped between the phase's student and the run's
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mohawk.conversion.run.write_final", stop)
        convert(recipe)
    assert (run / "student" / "model.safetensors").read_bytes() == old
    convert(recipe)
    new = (run / "student" / "model.safetensors").read_bytes()
    assert new == (run / "phases" / "end_to_end" / "student" / "model.safetensors").read_bytes() != old
    results = json.loads((run / "results.json").read_text())
    assert results["recipe"]["phases"]["end_to_end"]["learning_rate"] == 1e-3


def test_a_final_student_of_another_one_is_not_used_meanwhile(place, capsys):
    """As a kill leaves it between the last phase's new student and the run's."""
    phase = place / "run" / "phases" / "end_to_end" / "student"
    tensors = load_file(phase / "model.safetensors")
    about = about_of(phase)
    with write_whole(phase, about=about) as partial:
        shutil.copytree(phase, partial, dirs_exist_ok=True)
        (partial / MANIFEST).unlink()
        save_file({k: v + 1e-3 for k, v in tensors.items()}, partial / "model.safetensors", {"format": "pt"})
    prompts = place / "prompts.txt"
    prompts.write_text("A cat\n")
    uses = [
        ["generate", "run", "--prompt", "A"], ["inspect", "run"], ["evaluate", "run"], ["export", "run"],
        ["generate-data", str(prompts), "--model", "run", "--output", "answers"],
    ]  # fmt: skip
    for arguments in uses:
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        assert "run/student was made of another student than phases/end_to_end has now; `mohawk convert`" in said(
            capsys
        )
    assert main(["verify", "run"]) == 2
    assert "run/student: was made of another student" in said(capsys)
    assert main(["generate", "run/student", "--prompt", "A", "--max-new-tokens", "1"]) == 0
    convert(recipe_of())
    assert main(["generate", "run", "--prompt", "A", "--max-new-tokens", "1"]) == 0


def test_a_phase_that_was_made_of_another_student_is_refused(three, place):
    """As where one phase's folder was put back from a copy of the run that went another way."""
    run = place / "three"
    earlier, later = (run / "phases" / phase / "student" for phase in ("mixing", "hidden"))
    tensors, about = load_file(earlier / "model.safetensors"), about_of(earlier)
    with write_whole(earlier, about=about) as partial:
        shutil.copytree(earlier, partial, dirs_exist_ok=True)
        (partial / MANIFEST).unlink()
        save_file({k: v + 1e-3 for k, v in tensors.items()}, partial / "model.safetensors", {"format": "pt"})
    words = f"^three/phases/hidden/student: was made of another student than {earlier.relative_to(place)} is now; put"
    with pytest.raises(UserError, match=words):
        convert(recipe_of("three", **HIDDEN))
    shutil.rmtree(later.parent)
    shutil.rmtree(run / "phases" / "end_to_end")
    convert(recipe_of("three", **HIDDEN))
    assert about_of(later)["from"] == weights_sum(earlier)


def test_an_export_of_another_student_is_told(place_with_export, capsys):
    place = place_with_export
    assert about_of(place / "run" / "export" / "hybrid") == {"from": weights_sum("run/student")}
    assert main(["verify", "run"]) == 0
    shutil.rmtree(place / "run" / "phases" / "end_to_end")
    convert(recipe_of(**{"phases.end_to_end.learning_rate": 1e-3}))
    capsys.readouterr()
    assert main(["verify", "run"]) == 2
    assert "run/export/hybrid: was made of another student than run/student is now" in said(capsys)


def test_a_final_student_without_its_configuration_is_damaged(place, capsys):
    """And no other one is used in its place."""
    (place / "run" / "student" / "config.json").unlink()
    assert main(["generate", "run", "--prompt", "A"]) == 2
    assert "run/student: config.json is missing" in said(capsys)


def test_what_another_run_left_is_not_taken_for_this_ones(place):
    run, other = place / "run", place / "other"
    shutil.copytree(run, other)
    about = json.loads((other / "run.json").read_text())
    for path in (other / "run.json", sum_file(other / "run.json")):
        path.unlink()
    write_json(other / "run.json", about | {"id": "another"})
    recipe = recipe_of("other")
    with pytest.raises(UserError, match="other/phases/mixing/student: is of another run"):
        convert(recipe)
    shutil.rmtree(other / "student")
    for phase in ("mixing", "end_to_end"):
        shutil.rmtree(other / "phases" / phase / "student")
    with pytest.raises(UserError, match="mixing/checkpoint-4: is of another run than this phase now begins with"):
        convert(recipe)


PHASES = ("mixing", "hidden", "end_to_end")
HIDDEN = {"phases.hidden": "{tokens: 512, batch_size: 4, sequence_length: 32, learning_rate: 1e-3, save_every: 2}"}


@pytest.fixture(scope="module")
def three(made):
    """A finished run of all three phases, beside the other one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        convert(recipe_of("three", **HIDDEN))
    return made / "three"


def leave(run: Path, phase: str, state: str) -> None:
    """Make of a finished phase one that is `over` (its student is gone), `half` trained, or `missing`."""
    folder = run / "phases" / phase
    if state != "finished":
        shutil.rmtree(folder / "student")
    if state in ("half", "missing"):
        shutil.rmtree(folder / "checkpoint-4")
    if state == "missing":
        shutil.rmtree(folder)


@pytest.mark.parametrize("changed", PHASES)
def test_a_phases_rate_may_change_while_it_has_steps_to_come_and_nothing_was_made_of_it(changed, three, place):
    """In every combination of what the three phases have left."""
    run, at = place / "three", PHASES.index(changed)
    as_it_was = recipe_of("three", **HIDDEN)
    other = {field: recipe_of("three", **HIDDEN, **{f"phases.{changed}.{field}": value})
             for field, value in (("learning_rate", 0.5), ("max_grad_norm", 0.5), ("tokens", 1024))}  # fmt: skip

    def refused(recipe) -> bool:
        try:
            check_folder(run, recipe)
        except UserError as error:
            assert re.search(rf"another phases\.{changed}\.\w+;", str(error)) and "\n" not in str(error)
            return True
        return False

    states = [("finished", "half", "missing")] * 3
    states[at] += ("over",)
    for i, combination in enumerate(itertools.product(*states)):
        shutil.rmtree(run)
        shutil.copytree(three, run)
        for phase, state in zip(PHASES, combination, strict=True):
            leave(run, phase, state)
        may = combination[at] in ("half", "missing") and "finished" not in combination[at:]
        assert refused(other[["learning_rate", "max_grad_norm"][i % 2]]) == (not may), combination
        if i % 9 == 0:
            assert not refused(as_it_was) and refused(other["tokens"])  # what the steps so far meant


@pytest.mark.parametrize(
    "changed, combination",
    [
        ("mixing", ("half", "missing", "missing")),
        ("hidden", ("finished", "missing", "missing")),
        ("end_to_end", ("missing", "finished", "half")),
        ("end_to_end", ("finished", "finished", "missing")),
    ],
)
def test_with_a_changed_rate_all_is_made_of_what_came_before_it(changed, combination, three, place):
    run = place / "three"
    for phase, state in zip(PHASES, combination, strict=True):
        leave(run, phase, state)
    recipe = recipe_of("three", **HIDDEN, **{f"phases.{changed}.learning_rate": 5e-4})
    before = {phase: weights_sum(run / "phases" / phase / "student") for phase in PHASES}
    convert(recipe)
    left = {phase: weights_sum(run / "phases" / phase / "student") for phase in PHASES}
    for phase, state in zip(PHASES, combination, strict=True):
        assert state != "finished" or left[phase] == before[phase]
    assert left["end_to_end"] == weights_sum(run / "student") == about_of(run / "student")["from"]
    for earlier, later in itertools.pairwise(PHASES):
        if left[earlier] is not None:
            assert about_of(run / "phases" / later / "student")["from"] == left[earlier]
    rates = [r["learning_rate"] for r in read_metrics(run / "metrics.jsonl") if r["phase"] == changed]
    assert 0 < max(rates[-2:]) <= 5e-4  # of the two steps that are trained in any case
    found = json.loads((run / "results.json").read_text())["recipe"]["phases"][changed]["learning_rate"]
    assert found == 5e-4 == getattr(Recipe.load(run / "recipe.yaml").phases, changed).learning_rate


def test_a_phase_that_goes_on_from_another_student_than_its_checkpoints_is_refused(three, place):
    """Phase 1 again with another rate, under phase 2's checkpoints of the first."""
    run = place / "three"
    for phase, state in zip(PHASES, ("missing", "half", "missing"), strict=True):
        leave(run, phase, state)
    with pytest.raises(UserError, match="hidden/checkpoint-2: goes on from other weights than this phase now begins"):
        convert(recipe_of("three", **HIDDEN, **{"phases.mixing.learning_rate": 5e-4}))


@pytest.mark.parametrize("phases", [("mixing",), ("hidden",), ("mixing", "hidden")])
@pytest.mark.parametrize("way", ["damaged", "deleted"])
def test_an_earlier_phases_student_is_made_again_of_its_last_checkpoint(phases, way, three, place, caplog):
    run = place / "three"
    whole = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    steps = (run / "metrics.jsonl").read_text()
    for phase in phases:
        if way == "damaged":
            flip(run / "phases" / phase / "student" / "model.safetensors")
        else:
            shutil.rmtree(run / "phases" / phase / "student")
    convert(recipe_of("three", **HIDDEN))
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == whole
    assert (run / "metrics.jsonl").read_text() == steps and main(["verify", "three"]) == 0
    for phase in phases:
        words = f"{phase}/student is missing or damaged; making it again of the last checkpoint of {phase}"
        assert caplog.text.count(words) == 1


def test_an_earlier_phases_student_without_checkpoints_is_said_how_to_have_again(three, place, caplog, capsys):
    run = place / "three"
    flip(run / "phases" / "mixing" / "student" / "model.safetensors")
    assert main(["verify", "three"]) == 2
    assert "mixing/student: model.safetensors is damaged; the command that wrote it makes it again" in said(capsys)
    leave(run, "hidden", "over")  # which begins with what is damaged
    shutil.rmtree(run / "phases" / "mixing" / "checkpoint-4")
    final = (run / "student" / "model.safetensors").read_bytes()
    convert(recipe_of("three", **HIDDEN))
    assert (run / "student" / "model.safetensors").read_bytes() == final
    lines = [record.getMessage() for record in caplog.records if "missing or damaged" in record.getMessage()]
    names = [f"three/phases/{phase}" for phase in PHASES]
    assert lines == [
        f"{names[i]}/student is missing or damaged; going on without it. To have it again, and train what comes after "
        f"it anew, run: rm -r {' '.join(names[i:])}, then the same command"
        for i in (0, 1)
    ]
    for name in names:
        shutil.rmtree(name)
    convert(recipe_of("three", **HIDDEN))  # as it said
    assert (run / "student" / "model.safetensors").read_bytes() == final and main(["verify", "three"]) == 0


def test_a_checkpoint_that_goes_on_from_other_weights_is_refused(tmp_path):
    tiny_trainer(tmp_path, phase=tiny_phase(save_every=10), origin={"run": "a", "from": "x"}).train_phase()
    tiny_trainer(tmp_path, phase=tiny_phase(save_every=10), origin={"run": "a", "from": "x"}).train_phase()
    assert about_of(checkpoints(tmp_path / "phases" / "mixing")[0]) == {"run": "a", "from": "x"}
    for origin, why in (({"run": "b", "from": "x"}, "of another run"), ({"run": "a", "from": "y"}, "other weights")):
        with pytest.raises(UserError, match=why):
            tiny_trainer(tmp_path, phase=tiny_phase(save_every=10), origin=origin).train_phase()


@pytest.mark.parametrize("what", ["weights", "configuration", "tokenizer", "text"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_run_goes_on_only_with_the_inputs_it_began_with(lost, what, place, capsys):
    teacher = place / "teacher"
    if lost:  # the checkpoints and students say it too
        (place / "run" / "run.json").unlink()
    if what == "weights":
        state = load_file(teacher / "model.safetensors")
        state["model.norm.weight"] += 0.25
        save_file(state, teacher / "model.safetensors", metadata={"format": "pt"})
    elif what == "configuration":
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif what == "tokenizer":
        made = json.loads((teacher / "tokenizer.json").read_text())
        vocab = made["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (teacher / "tokenizer.json").write_text(json.dumps(made))
    else:
        (place / "texts" / "3.txt").write_text("Another document altogether, of some length.\n")
    name = "data.train.0 text" if what == "text" else f"teacher {what}"
    with pytest.raises(UserError) as caught:
        convert(recipe_of())
    message = str(caught.value)
    assert "\n" not in message and f"run: {name} (" in message and "has changed since the run began" in message
    assert "choose another output" in message
    # the student has its own tokenizer, which is compared with the teacher's before
    with pytest.raises(UserError, match="another one than the teacher's" if what == "tokenizer" else f"run: {name}"):
        evaluate_run("run")
    if what in ("weights", "configuration"):  # other uses of the teacher
        (place / "book.txt").write_text("A cat sat on a mat.\n")
        for arguments in (["compose", "run", "--attention", "0"], ["inspect", "run", "--matrices", "book.txt"]):
            assert main(arguments) == 2 and f"run: {name}" in capsys.readouterr().err
    if what == "text":  # measured on another one, as asked
        evaluate_run("run", ["data.train=[texts/4.txt, texts/5.txt]", "data.validation_share=0.5"])


def test_a_distillation_goes_on_only_with_the_cache_and_the_code_it_began_with(place):
    data = recipe_of().model_dump(mode="json")
    stage = {"tokens": 256, "batch_size": 4, "sequence_length": 32, "cache": "answers"}
    recipe = DistillRecipe.from_dict(
        {
            "teacher": {"model": "./teacher", "trust_remote_code": True}, "student": {"layers": [0]},
            "stages": [stage], "output": "distilled",
            **{key: data[key] for key in ("data", "evaluation", "precision", "device")},
        }
    )  # fmt: skip
    (place / "teacher" / "modeling.py").write_text("SCALE = 1\n")
    cache_teacher(recipe, place / "answers", k=8)
    distill(recipe)
    shutil.rmtree(place / "distilled" / "student")
    distill(recipe)
    shutil.move(place / "answers", place / "first")
    cache_teacher(recipe, place / "answers", k=4)
    with pytest.raises(UserError, match=r"distilled: stages.0.cache \(answers\) has changed since the run began"):
        distill(recipe)
    shutil.rmtree(place / "answers")
    shutil.move(place / "first", place / "answers")
    (place / "teacher" / "modeling.py").write_text("SCALE = 2\n")
    with pytest.raises(UserError, match=r"distilled: teacher code \(./teacher\) has changed since the run began"):
        distill(recipe)


def test_a_configuration_written_by_another_version_is_the_same(place, caplog):
    teacher = place / "teacher"
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"transformers_version": "5.1.0"}))
    known = json.loads((place / "run" / "run.json").read_text())
    write_json(place / "run" / "run.json", known | {"versions": known["versions"] | {"torch": "2.1.0"}})
    convert(recipe_of())
    assert "the run began with 2.1.0" in caplog.text


def test_a_lost_run_file_is_made_again_as_it_was(place, caplog):
    known = json.loads((place / "run" / "run.json").read_text())
    (place / "run" / "run.json").write_text("{")
    convert(recipe_of())
    again = json.loads((place / "run" / "run.json").read_text())
    assert again == known and again["inputs"]["teacher weights"][0] == "./teacher"
    assert caplog.text.count("run.json is lost; made again of what run/") == 1


def test_an_unfinished_run_without_its_run_file_refuses_another_teacher(place):
    shutil.rmtree("run/student")
    shutil.rmtree("run/phases/end_to_end/student")
    shutil.rmtree("run/phases/mixing/student")  # checkpoints are all that is left of the work
    (place / "run" / "run.json").unlink()
    (place / "run" / ".run.json.sha256").unlink()
    config = json.loads((place / "teacher" / "config.json").read_text())
    (place / "teacher" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    for _ in range(2):  # the refusal makes run.json again, with what the run began with
        with pytest.raises(UserError, match=r"^run: teacher configuration \(./teacher\) has changed since the run"):
            convert(recipe_of())
    (place / "teacher" / "config.json").write_text(json.dumps(config))
    convert(recipe_of())
    for folder in ("run/student", "run/phases/mixing/checkpoint-4"):
        assert about_of(folder)["bound"]["inputs"] == json.loads(Path("run/run.json").read_text())["inputs"]


@pytest.mark.parametrize("content", ["", "{", "[" * 3000])
def test_a_teachers_configuration_that_is_damaged_is_named(content, place, capsys):
    (place / "teacher" / "config.json").write_text(content)
    for arguments in (["compose", "run", "--attention", "0"], ["convert", "run/recipe.yaml"], ["evaluate", "run"]):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = said(capsys).splitlines()
        assert line.startswith("error: teacher: ") and "teacher" in line and "config" in line, line


def test_what_cannot_be_deleted_of_an_earlier_folder_is_said(tmp_path, monkeypatch, caplog):
    """The new one is there; what is left of the old one is hidden, and goes when the folder is written again."""
    for content in "ab":
        with write_whole(tmp_path / "out") as folder:
            (folder / "file").write_text(content)
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    assert (tmp_path / "out" / "file").read_text() == "b" and is_complete(tmp_path / "out")
    (left,) = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert left.name.startswith(".partial-out-") and f"could not delete {left}: " in caplog.text
    monkeypatch.undo()
    with write_whole(tmp_path / "out") as folder:
        (folder / "file").write_text("c")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_flush_of_lines_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised:
        write_lines(tmp_path / "measured.jsonl", ["1"])
    assert raised.value.filename == str(tmp_path / ".measured.jsonl.crc32")
    assert list(tmp_path.iterdir()) == []


def test_another_role_of_a_special_token_is_refused_by_its_name(place):
    path = place / "teacher" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    before = config.get("pad_token")
    assert before != "a"
    path.write_text(json.dumps(config | {"pad_token": "a"}))
    with pytest.raises(UserError) as caught:
        convert(recipe_of())
    assert f"teacher special tokens (./teacher) has changed since the run began (pad_token {before!r}, now 'a')" in str(
        caught.value
    )
    path.write_text(json.dumps(config))
    known = json.loads(Path("run/run.json").read_text())
    del known["inputs"]["teacher special tokens"]  # as an earlier version wrote it
    write_json("run/run.json", known)
    convert(recipe_of())


# ---- places ----


def test_a_moved_run_goes_on_where_it_is(place, capsys):
    moved = Path("run").rename("elsewhere")
    steps = (moved / "metrics.jsonl").read_text()
    assert main(["convert", "elsewhere/recipe.yaml"]) == 0
    assert not Path("run").exists() and (moved / "metrics.jsonl").read_text() == steps
    assert Recipe.load(moved / "recipe.yaml").output == Path("elsewhere")
    assert Recipe.load(moved / "recipe.yaml", ["output=there"]).output == Path("there")
    # a recipe that merely is called so, in a folder that is no run's
    Path("mine").mkdir()
    shutil.copy(moved / "recipe.yaml", "mine/recipe.yaml")
    assert Recipe.load("mine/recipe.yaml").output == Path("elsewhere")


def test_a_tilde_is_the_home_folder(place, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(place))
    recipe = Recipe.from_dict(
        {"teacher": "~/teacher", "data": {"train": ["~/texts"], "cache": "~/cache"}, "output": "~/run"}
    )
    assert recipe.output == place / "run" and recipe.data.cache == place / "cache"
    assert main(["verify", "~/run"]) == 0 and main(["inspect", "~/run"]) == 0
    assert main(["generate", "~/teacher", "--prompt", "A", "--max-new-tokens", "1", "--tokenizer", "~/teacher"]) == 0
    (place / "r.yaml").write_text("teacher: ~/teacher\ndata:\n  train: [~/texts]\n")
    assert main(["convert", "~/r.yaml", "--output", "~/new", "--dry-run"]) == 0
    assert not any(path.name == "~" for path in place.iterdir())
    assert main(["convert", "~/r.yaml", "--output", "~nobody-of-that-name/new", "--dry-run"]) == 2


def test_a_run_that_trained_nothing_takes_another_recipe(place, caplog):
    """One that died of a mistyped path, or behind what is measured before: the end is as if it had not been there."""
    (place / "odd.txt").write_text("Quite another text. " * 300)
    with claimed(place / "new", recipe_of("new", **{"data.train.0.source": "odd.txt"})):
        pass
    shutil.copytree(place / "run" / "evaluation", place / "new" / "evaluation")  # of the student before
    before = (place / "new" / "evaluation" / "before.json").read_bytes()
    append_line(place / "new" / "metrics.jsonl", '{"phase": "of_the_other", "step": 1, "tokens": 64, "loss": 1.0}')
    caplog.set_level(logging.INFO)
    changed = {"seed": 7, "student.init": "random"}
    check_folder(place / "new", recipe_of("new", **changed))
    convert(recipe_of("new", **changed))
    assert "beginning anew, as nothing was trained; changed since the last start: data.train.0.source" in caplog.text
    assert (place / "new" / "evaluation" / "before.json").read_bytes() != before
    assert "of_the_other" not in (place / "new" / "metrics.jsonl").read_text()  # steps that no checkpoint had
    assert read_json(place / "new" / "run.json", Bound)["inputs"]["data.train.0 text"][0] == "texts"
    convert(recipe_of("fresh", **changed))
    first, second = (place / name / "student" / "model.safetensors" for name in ("new", "fresh"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match="another seed;"):  # now there is something
        check_folder(place / "new", recipe_of("new", **changed | {"seed": 8}))


@pytest.mark.parametrize("value", ["''", '" "', "null", "7"])
def test_an_output_that_names_nothing_is_refused(value):
    with pytest.raises(UserError, match=r"output: got .*; allowed: a path"):
        Recipe.from_dict({"teacher": "t", "data": {"train": ["x.txt"]}}, [f"output={value}"])


def test_files_are_readable_as_the_umask_says(place):
    before = os.umask(0o027)
    try:
        shutil.rmtree(place / "run")
        shutil.rmtree(place / "cache")
        convert(recipe_of())
    finally:
        os.umask(before)
    made = [path for root in ("run", "cache") for path in (place / root).rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o640}, [
        (path, oct(path.stat().st_mode)) for path in made if stat.S_IMODE(path.stat().st_mode) != 0o640
    ]


# ---- not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_refused_by_name(value, place, capsys):
    state = load_file(place / "teacher" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(state, place / "teacher" / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", "teacher", "--prompt", "A"]) == 2
    (line,) = said(capsys).splitlines()[-1:]
    assert "not finite, first model.layers.1.mlp.up_proj.weight (1 of " in line


def test_a_run_that_has_made_nothing_is_bound_to_what_it_reads_next(place):
    """As its refusal asks for: a whole checkpoint in the place of one that was not finite."""
    path = place / "teacher" / "model.safetensors"
    good, state = path.read_bytes(), load_file(path)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite, first model.norm.weight"):
        convert(recipe_of("fresh"))
    path.write_bytes(good)
    convert(recipe_of("fresh"))
    ours, theirs = (json.loads((place / run / "run.json").read_text())["inputs"] for run in ("fresh", "run"))
    assert ours == theirs


def test_weights_that_are_not_finite_take_no_checkpoints_place(tmp_path):
    class Broken(TinyObjective):
        """Its weights become infinite at step 6 by something that no gradient shows."""

        def end_step(self, loss):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 6:
                with torch.no_grad():
                    self.student[1][0].weight[0, 0] = float("inf")

    with pytest.raises(UserError, match=r"student.1.0.weight \(1 of 128 values\) is not finite.*checkpoint-4 is compl"):
        tiny_trainer(tmp_path, Broken(), tiny_phase(save_every=2)).train_phase()
    assert [path.name for path in checkpoints(tmp_path / "phases" / "mixing")] == ["checkpoint-4"]


def test_a_student_that_is_not_finite_takes_no_students_place(place):
    from rich.console import Console

    from mohawk.conversion.run import opened
    from mohawk.models.hybrid import HybridForCausalLM
    from mohawk.runs.steps import write_final, write_student

    run = place / "run"
    context = opened(recipe_of(), run, Console(quiet=True))
    student = HybridForCausalLM.from_pretrained(run / "student")
    with torch.no_grad():
        student.model.norm.weight[0] = float("nan")
    whole = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    for write in (
        lambda: write_student(context, "end_to_end", student, "mixing"),
        lambda: write_final(context, student, "end_to_end"),
    ):
        with pytest.raises(UserError, match="first model.norm.weight"):
            write()
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == whole
    assert all(finding.problem is None for finding in findings(run))


def test_two_checkpoints_are_kept_and_a_damaged_newest_one_costs_one_interval(tmp_path, caplog):
    phase = tiny_phase(save_every=4, keep_checkpoints=2)
    whole = TinyObjective()
    tiny_trainer(tmp_path / "whole", whole, phase).train_phase()
    tiny_trainer(tmp_path / "run", TinyObjective(), phase).train_phase()
    folder = tmp_path / "run" / "phases" / "mixing"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-20", "checkpoint-16"]
    flip(folder / "checkpoint-20" / "trainable.safetensors")
    resumed = TinyObjective()
    with caplog.at_level(logging.INFO, "mohawk"):
        tiny_trainer(tmp_path / "run", resumed, phase).train_phase()
    assert "resuming from checkpoint-16" in caplog.text
    assert torch.equal(weights(resumed), weights(whole))
    assert Recipe.from_dict({"teacher": "t", "data": {"train": ["x.txt"]}}).phases.mixing.keep_checkpoints == 2


def test_a_steps_rows_may_be_cut_otherwise_in_a_stopped_run_but_stay_as_many(place):
    check_folder(
        place / "run", recipe_of(**{f"phases.mixing.{key}": 2 for key in ("batch_size", "gradient_accumulation")})
    )
    check_folder(
        place / "run", recipe_of(**{"phases.end_to_end.batch_size": 1, "phases.end_to_end.gradient_accumulation": 4})
    )
    for changed in ({"phases.mixing.batch_size": 2}, {"phases.mixing.gradient_accumulation": 3}):
        with pytest.raises(UserError, match=f"another {next(iter(changed))};"):
            check_folder(place / "run", recipe_of(**changed))
    with pytest.raises(UserError, match="another evaluation.batch_size;"):
        check_folder(place / "run", recipe_of(**{"evaluation.batch_size": 2}))


# ---- smaller things ----


def test_scores_of_another_model_are_forgotten_when_a_round_begins_with_one(tmp_path, caplog):
    from mohawk.pruning.rounds import Rounds

    def healed(content: bytes) -> None:
        with write_whole(tmp_path / "phases" / "heal_1" / "student", replace=True) as folder:
            (folder / "model.safetensors").write_bytes(content)

    rounds = Rounds(types.SimpleNamespace(folder=tmp_path), plan=None)
    healed(b"one")
    rounds.forget_scores(2, "heal_1")
    write_json(tmp_path / "rounds" / "2" / "search.json", {"candidates": []})
    rounds.forget_scores(2, "heal_1")  # the same: a stopped round goes on
    assert (tmp_path / "rounds" / "2" / "search.json").exists() and not caplog.records
    healed(b"two")
    rounds.forget_scores(2, "heal_1")
    assert not (tmp_path / "rounds" / "2" / "search.json").exists() and "another model" in caplog.text
    write_json(tmp_path / "rounds" / "2" / "search.json", {"candidates": []})
    (tmp_path / "rounds" / "2" / "begins_with.json").write_text("{}")  # damaged: nobody knows
    rounds.forget_scores(2, "heal_1")
    assert not (tmp_path / "rounds" / "2" / "search.json").exists()


@pytest.mark.parametrize(
    "kind, value",
    [
        ("Search", {"candidates": [{"sizes": {"layers": 2}}], "budget": {}}),
        ("Search", {"candidates": 3, "budget": {}}),
        ("Selection", {"settings": {}, "rankings": {"kl": {"order": ["1"], "path": []}}}),
        ("Composed", {"run": "r", "student": "s", "attention": "0"}),
        ("KeptVocabulary", {"before": "10", "after": 2}),
        ("Tasks", {"student": "student", "fingerprint": None, "tasks": [], "groups": {}}),
        ("Drops", {"kl": [0.1, None], "perplexity": [1.0], "whole": 1.0}),
    ],
)
def test_json_of_other_types_is_damage(kind, value, tmp_path, caplog):
    from mohawk.runs import kept

    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", getattr(kept, kind)) is None
    assert "x.json is damaged" in caplog.text


def test_inspect_says_which_phase_is_damaged(place, capsys):
    flip(place / "run" / "phases" / "mixing" / "student" / "config.json")
    assert main(["inspect", "run"]) == 0
    printed = capsys.readouterr().out
    assert "mixing: damaged (config.json is damaged)" in printed and "end_to_end: done" in printed


def test_a_student_without_a_manifest_is_used_and_said_to_be_unverified(place, capsys):
    (place / "run" / "student" / MANIFEST).unlink()
    assert main(["generate", "run", "--prompt", "A", "--max-new-tokens", "1"]) == 0
    assert said(capsys).count("it is not verified") == 1


def test_measurements_that_are_damaged_are_measured_again(tmp_path):
    from mohawk.conversion.probe import _read, damaged_measurements

    path = tmp_path / "measured.jsonl"
    write_lines(path, ['{"student": "a"}'])
    append_line(path, '["kl", [1, 2], 0.5]')
    append_line(path, '["recall", [], {"accuracy": 0.5, "loss": 1.0, "values": 3}]')
    assert damaged_measurements(path) == 0
    path.write_text(path.read_text().replace("0.5]", "0.7]"))
    assert damaged_measurements(path) == 1 and [whole for _, whole in read_lines(path)] == [True, False, True]
    for line in ('["kl", [1], "0.5"]', '["kl", 3, 0.5]', '["recall", [], {}]', "7", '["kl"'):
        assert _read(line) is None


@pytest.mark.parametrize("state", ["[]", "{", '{"skipped_steps": "many"}'])
def test_a_checkpoints_state_of_another_shape_is_refused_in_one_line(state, tmp_path):
    from mohawk.core.folders import seal

    tiny_trainer(tmp_path, phase=tiny_phase(save_every=10)).train_phase()
    newest = checkpoints(tmp_path / "phases" / "mixing")[0]
    (newest / "phase_state.json").write_text(state)
    (newest / MANIFEST).unlink()
    seal(newest)  # so that it is whole by its sums
    with pytest.raises(UserError, match="phase_state.json: is not what a checkpoint holds"):
        tiny_trainer(tmp_path, phase=tiny_phase(save_every=10)).train_phase()


def test_a_released_student_is_readable_as_the_umask_says(tmp_path):
    from mohawk.models.formats.released import save_released
    from mohawk.models.from_teacher import hybrid_from_teacher

    before = os.umask(0o027)
    try:
        save_released(hybrid_from_teacher(tiny_teacher("llama"), "all", "discrete_mamba2"), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("refused", ["x.json", ".x.json.sha256"])
def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(refused, tmp_path, monkeypatch):
    """What it says is not made again, and a run with such a run.json is not taken for one that is bound to nothing."""
    path, real = tmp_path / "x.json", Path.open
    write_json(path, {"a": 1})

    def read(self, *args, **options):
        if self.name == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", read)
    with pytest.raises(PermissionError, match=re.escape(f"/{refused}")):
        read_json(path)
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}

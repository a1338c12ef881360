"""What can be found wrong without weights is: by --dry-run, and by the run before it loads any. No teacher has any."""

import importlib.util
import json
import re
import sys

import pytest
import yaml

from mohawk.cli import main
from mohawk.loading import lora
from mohawk.runs import inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_llama, tokenizer):
    root = tmp_path_factory.mktemp("inputs")
    for name, rows in (("teacher", 258), ("wider", 300), ("tied", 258)):
        make_llama(1, vocab_size=rows, tie_word_embeddings=name == "tied").save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "model.safetensors").unlink()
    from transformers import GPT2Config, GPTJConfig

    for kind, name in ((GPT2Config, "gpt2"), (GPTJConfig, "gptj")):  # with tables of positions, one of sines
        kind(
            vocab_size=258, n_embd=8, n_layer=1, n_head=2, n_positions=24, rotary_dim=4, bos_token_id=256,
            eos_token_id=257,
        ).save_pretrained(root / name)  # fmt: skip
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("The name of all things is water. " * 40)

    def lines(name, rows):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("body.jsonl", [{"body": "some words"}] * 3)
    lines("number.jsonl", [{"text": 7}] * 3)
    good = [{"prompt": f"{i}: ", "response": f"{i + 1}", "by": ["0", "1"][i % 2]} for i in range(600)]
    lines("pairs.jsonl", good)
    lines("no_response.jsonl", [{"prompt": "a"}])
    lines("other_teacher.jsonl", [{**good[0], "by": "nobody"}])
    lines("weight.jsonl", [{**good[0], "w": -1}])
    lines("late_weight.jsonl", [*good, {**good[0], "w": 2}])
    lines("late.jsonl", [*good, {"prompt": "only"}])
    lines("late_logprob.jsonl", [*({**pair, "logprob": -1.0} for pair in good), good[0] | {"prompt": "last: "}])
    lines("long.jsonl", [{"prompt": f"{i}", "response": "b" * 100} for i in range(200)])
    lines("reasons.jsonl", [{"prompt": "why?", "because": "so"}])

    import pyarrow
    import pyarrow.parquet

    def table(name, **columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), root / name)

    table("body.parquet", body=["some words"])
    table("number.parquet", text=[1, 2], image=[b"\xff\xfe", None])
    table("pairs.parquet", prompt=["a", "b"], response=["c", None], by=["0", "nobody"])
    table("whole.parquet", prompt=["a", "b"], response=["c", "d"], by=["0", "nobody"], image=[b"\xff", b""])
    table("reasons.parquet", prompt=["why?"], label=["so"], rationale=[[1, 2]])
    table("empty.parquet", body=pyarrow.array([], pyarrow.string()))
    for name, text in (("several", "words"), ("unlike", 5)):
        (root / name).mkdir()
        lines(f"{name}/a.jsonl", [{"text": "words"}] * 300)
        lines(f"{name}/b.jsonl", [{"text": text}])
    lines("short.jsonl", [{"text": "words"}] * 3)
    (root / "text.md").write_text("some words")
    (root / "nothing.txt").touch()
    return root


def pairs(name, **more):
    return {"source": name, "kind": "pairs", **more}


# what is changed in a distillation's recipe that works, and what is said of it
CASES = {
    "teacher_field beside text": (
        {"data": {"train": [pairs("pairs.jsonl", teacher_field="by"), "text.txt"]}},
        "data.train.1: has no teacher or teacher_field, but data.train.0 has one",
    ),
    "teacher_field beside pairs of a stage": (
        {"stage": {"data": {"train": [pairs("pairs.jsonl"), pairs("pairs.jsonl", teacher_field="by")]}}},
        "stages.0.data.train.0: has no teacher or teacher_field, but stages.0.data.train.1 has one",
    ),
    "a stage's text where each row has a teacher": (
        {"data": {"train": [pairs("pairs.jsonl", teacher_field="by")]}, "combine": "row", "teachers": ["teacher"],
         "stage": {"data": {"train": ["text.txt"]}}},
        "combine: row needs stages.0.data.train with a teacher_field",
    ),
    "4 bits without bitsandbytes": (
        {"student": {"lora": {"bits": 4}}}, "student.lora: 4 bits on cpu: needs the package bitsandbytes"
    ),
    "LoRA of what is not there": ({"student": {"lora": {"targets": ["w9"]}}}, "student.lora: LoRA: targets must be"),
    "LoRA with a dropout before the head": (
        {"student": {"lora": {"targets": ["q_proj", "lm_head"], "dropout": 0.1}}},
        "student.lora: LoRA: with a dropout of 0.1 before the output embedding",
    ),
    "LoRA of a head that is the embedding too": (
        {"teacher": "tied", "student": {"layers": [0], "lora": {"targets": ["lm_head"]}}},
        "student.lora: LoRA: the output embedding is the input embedding too",
    ),
    "rows beyond a table of positions": (
        {"teacher": "gpt2", "evaluation": {"tokens": 64, "sequence_length": 24}},
        "error: stages.0.sequence_length: got 32, but .*gpt2 has positions for 24 tokens; give 24 or less",
    ),
    "evaluation beyond a table of positions": (
        {"teacher": "gptj", "evaluation": {"tokens": 64, "sequence_length": 25}, "stage": {"sequence_length": 24}},
        "error: evaluation.sequence_length: got 25, but .*gptj has positions for 24",
    ),
    "a student's positions": (
        {"student": {"model": "gpt2"}, "evaluation": {"tokens": 64, "sequence_length": 16}},
        "error: stages.0.sequence_length: got 32, but .*gpt2 has positions for 24",
    ),
    "the positions of a stage's own student": (
        {"stage": {"student": {"model": "gptj"}}, "evaluation": {"tokens": 64, "sequence_length": 24}},
        "error: stages.0.sequence_length: got 32, but .*gptj has positions for 24",
    ),
    "int8 without a package": (
        {"teacher": {"model": "teacher", "quantize": "int8"}}, "teacher.quantize: int8 needs bitsandbytes or torchao"
    ),
    "vocabularies of teachers": ({"teachers": ["wider"]}, "vocabularies of 258, 300 entries can't be combined"),
    "a field that is not there": (
        {"data": {"train": ["body.jsonl"]}}, "data.train.0: .*body.jsonl:1 has no field 'text'; its fields: body"
    ),
    "a suffix that says nothing": ({"data": {"train": ["text.md"]}}, "text.md has an unknown suffix; set format"),
    "a device": ({"data": {"train": ["/dev/null"]}}, "data: /dev/null is neither a file nor a folder"),
    "a file without a byte": ({"data": {"train": ["nothing.txt"]}}, "nothing.txt is empty; remove it or give it text"),
    "a column of Parquet": (
        {"data": {"train": ["body.parquet"]}}, "data.train.0: .*parquet row 0 has no field 'text'; its"
    ),
    "a column without rows": (
        {"data": {"train": ["empty.parquet"]}}, "data.train.0: .*parquet has no field 'text'; its fields: body$"
    ),
    "a column that is no text": (
        {"data": {"train": ["number.parquet"]}}, "data.train.0: .*parquet row 0: field 'text' holds int, not text"
    ),
    "another file's field": ({"data": {"train": ["unlike"]}}, "data.train.0: .*b.jsonl:1: field 'text' holds int"),
    "a response in Parquet": (
        {"data": {"train": [pairs("pairs.parquet")]}}, "pairs.parquet row 1: has no text in 'response'"
    ),
    "who answers in Parquet": (
        {"data": {"train": [pairs("whole.parquet", teacher_field="by")]}}, "parquet row 1: field 'by' is 'nobody'"
    ),
    "a rationale's type": (
        {"data": {"train": [{"source": "reasons.parquet", "kind": "rationales"}]}}, "row 0: rationale: got list"
    ),
    "templates that take no response apart": (
        {"data": {"train": [{"source": "pairs.jsonl", "kind": "rationales", "templates": ["{rationale} x {label}"]}]}},
        "data.train.0: none of the responses, from .*pairs.jsonl:1 on, matches one of the 1 templates",
    ),
    "teacher_field of text": (
        {"data": {"train": [{"source": "text.txt", "teacher_field": "by"}]}}, "teacher_field is of kind: pairs"
    ),
    "a field that is no text": ({"data": {"train": ["number.jsonl"]}}, "data.train.0: .*number.jsonl:1: .*holds int"),
    "evaluation": ({"data": {"evaluation": ["body.jsonl"]}}, "data.evaluation.0: .*has no field 'text'"),
    "a stage's own data": ({"stage": {"data": {"train": ["body.jsonl"]}}}, "stages.0.data.train.0: .*no field 'text'"),
    "a response": ({"data": {"train": [pairs("no_response.jsonl")]}}, "no_response.jsonl:1: has no text in 'response'"),
    "a column of pairs": (
        {"data": {"train": [pairs("body.parquet")]}}, "data.train.0: .*neither field 'prompt' nor 'messages'"
    ),
    "who answers": (
        {"data": {"train": [pairs("other_teacher.jsonl", teacher_field="by")]}}, "field 'by' is 'nobody'; allowed: 0"
    ),
    "a weight": ({"data": {"train": [pairs("weight.jsonl", weight_field="w")]}}, "weight.jsonl:1: field 'w' is -1"),
    "a weight's name": (
        {"data": {"train": [pairs("pairs.jsonl", weight_field="ww")]}},
        "pairs.jsonl:1: weight_field: .* a field 'ww'; its fields: prompt, response, by",
    ),
    "log probabilities": (
        {"data": {"train": [pairs("pairs.jsonl", weighting="probability")]}}, "pairs.jsonl:1: has no logprob"
    ),
    "a chat template": ({"data": {"train": [pairs("pairs.jsonl", chat=True)]}}, "this tokenizer has no chat template"),
    "rationales": (
        {"data": {"train": [{"source": "reasons.jsonl", "kind": "rationales"}]}}, "reasons.jsonl:1: has neither label"
    ),
}  # fmt: skip
# what only reading all of a text tells: by the run, before it loads weights
LATE = {
    "the last row of a stage's pairs": (
        {"stage": {"data": {"train": [pairs("late.jsonl")]}}}, "late.jsonl:601: has no text in 'response'"
    ),
    "the last row's log probability": (
        {"stage": {"data": {"train": [pairs("late_logprob.jsonl", weighting="probability")]}}}, ":601: has no logprob"
    ),
    "rows too short": ({"data": {"train": [pairs("long.jsonl")]}}, "none of .* examples fits into 32 tokens"),
    "nothing held out": (
        {"data": {"train": [pairs("pairs.jsonl")], "validation_share": 0, "evaluation": ["text.txt"]}}, None
    ),
}  # fmt: skip


def test_a_weight_may_come_late(folder, tmp_path, capsys):
    path = recipe(folder, tmp_path, {"data": {"train": [pairs("late_weight.jsonl", weight_field="w")]}})
    assert main(["distill", path, "--dry-run"]) == 0, capsys.readouterr().err


def placed(value, folder):
    """Files and models by their paths."""
    if isinstance(value, dict):
        return {key: placed(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [placed(part, folder) for part in value]
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value


def recipe(folder, tmp_path, changes):
    stage = {"tokens": 128, "batch_size": 2, "sequence_length": 32}
    data = {"train": ["text.txt"], "validation_share": 0.1, "cache": str(tmp_path / "cache")}
    changes = dict(changes)
    whole = {
        "teacher": "teacher", "student": {"layers": [0]}, "precision": "float32", "device": "cpu",
        "output": str(tmp_path / "run"), "data": {**data, **changes.pop("data", {})},
        "stages": [{**stage, **changes.pop("stage", {})}],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(placed({**whole, **changes}, folder)))
    return str(path)


@pytest.fixture
def without_packages(monkeypatch):
    """As where neither bitsandbytes nor torchao is installed."""
    find, absent = importlib.util.find_spec, ("bitsandbytes", "torchao")
    for name in ("bitsandbytes", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))
    lora._why_no_four_bits.cache_clear()
    yield
    lora._why_no_four_bits.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_by_a_dry_run_and_by_the_run(case, folder, tmp_path, capsys, without_packages):
    changes, words = CASES[case]
    path = recipe(folder, tmp_path, changes)
    for options in (["--dry-run"], []):
        assert main(["distill", path, *options]) == 2, case
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and re.search(words, error[-1]), error
        assert sum(line.startswith("error") for line in error) == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", LATE)
def test_all_of_the_text_is_read_before_weights(case, folder, tmp_path, capsys):
    changes, words = LATE[case]
    path = recipe(folder, tmp_path, changes)
    assert main(["distill", path, "--dry-run"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["distill", path]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    # what is fine gets as far as the weights, of which there are none
    assert re.search(words or "cannot load the weights", last), last


@pytest.mark.parametrize("command", ["convert", "prune", "cache"])
def test_other_commands_look_at_the_text_first_too(command, folder, tmp_path, capsys):
    own = {"convert": {"student": {"ssm_layers": [1]}}, "prune": {"prune": {"ffn": 24}}, "cache": {}}[command]
    data = {"teacher": "teacher", "data": {"train": ["body.jsonl"], "cache": str(tmp_path / "cache")}, **own}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(placed({**data, "output": str(tmp_path / "run")}, folder)))
    for options in [["--output", str(tmp_path / "run")]] + [["--dry-run"]] * (command != "cache"):
        assert main([command, str(path), *options]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search("error: data.train.0: .*body.jsonl:1 has no field 'text'", last), last
    assert not (tmp_path / "run").exists()


def test_a_top_k_of_more_than_there_are_is_refused_before_weights(folder, tmp_path, capsys):
    path = recipe(folder, tmp_path, {})
    assert main(["cache", path, "--output", str(tmp_path / "c"), "--k", "259"]) == 2
    assert "k: got 259; allowed: a whole number from 1 to 258" in capsys.readouterr().err


def test_a_plan_may_be_made_before_the_text_is_there(folder, tmp_path, capsys):
    path = recipe(folder, tmp_path, {"data": {"train": ["to_come.jsonl"]}})
    assert main(["distill", path, "--dry-run"]) == 0
    assert "data.train.0: not checked: " in capsys.readouterr().err
    assert main(["distill", path]) == 2
    assert "to_come.jsonl does not exist" in capsys.readouterr().err


def test_a_dry_run_reads_text_files(folder, tmp_path, monkeypatch, capsys):
    """As far as it says: a file's end may be beyond that."""
    (tmp_path / "odd").mkdir()
    for name, text in (("a.txt", b"one two " * 200), ("b.txt", b"three " * 5000 + "Gürteltier".encode("latin-1"))):
        (tmp_path / "odd" / name).write_bytes(text)
    path = recipe(folder, tmp_path, {"data": {"train": [str(tmp_path / "odd")]}})
    assert main(["distill", path, "--dry-run"]) == 2
    assert re.search(r"^error: data: .*b.txt is not UTF-8 \(invalid .*, byte 0xfc\); ", capsys.readouterr().err)
    monkeypatch.setattr(inputs, "CHARACTERS", 800)
    assert main(["distill", path, "--dry-run"]) == 0
    assert "data.train.0: the first 400 characters of each file" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["convert", "distill", "prune"])
def test_a_dry_run_says_how_much_it_read(command, folder, tmp_path, capsys):
    texts = ["several", "text.txt", "short.jsonl"]
    own = {"convert": {"student": {"ssm_layers": [1]}}, "prune": {"prune": {"ffn": 24}}, "distill": {}}[command]
    if command == "distill":
        own = {"student": {"layers": [0]}, "stages": [{"tokens": 128, "batch_size": 2, "sequence_length": 32}]}
    data = {"train": texts, "evaluation": ["an/id_of_the_hub"], "cache": str(tmp_path / "cache")}
    path = tmp_path / "recipe.yaml"
    whole = {"teacher": "teacher", "data": data, **own, "output": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(placed(whole, folder)))
    assert main([command, str(path), "--dry-run"]) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Read of the text: data.train.0: the first 201 rows; data.train.1: all; data.train.2: all 3 rows; "
        "data.evaluation.0: nothing, it is not on this machine. The rest is checked when a run reads it, before any "
        "weights."
    ) in said


@pytest.mark.parametrize("where", ["student", "teachers"])
def test_a_model_without_a_tokenizer_is_taken_on_trust_and_that_is_said(where, folder, tmp_path, make_llama, capsys):
    bare = str(tmp_path / "bare")
    make_llama(2).save_pretrained(bare)
    changes = {"student": {"student": {"model": bare}}, "teachers": {"teachers": [bare]}}[where]
    assert main(["distill", recipe(folder, tmp_path, changes), "--dry-run"]) == 0
    name = {"student": "student.model", "teachers": "teachers.0"}[where]
    said = [line for line in capsys.readouterr().err.splitlines() if "no tokenizer to compare" in line]
    assert len(said) == 1 and f"{name}: {bare} has no tokenizer to compare: it is taken to read ids as" in said[0]

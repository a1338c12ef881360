"""`mohawk demo`: which layers of which teacher it converts, and that it runs with a teacher of any depth and family."""

import json

import pytest

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.demo import fetch
from mohawk.demo import run as demo
from mohawk.errors import UserError
from mohawk.schema.files import shipped

TUNED = [3, 4, 5, 6, 7, 8, 12, 15, 22, 24, 25, 26, 27, 28, 29]  # of SmolLM2-135M, measured: see the recipe
# Little of everything; float32, as bfloat16 says nothing more here.
LITTLE = """
phases.mixing=null phases.hidden.tokens=32 phases.hidden.sequence_length=32 phases.hidden.solve_tokens=32
phases.end_to_end.tokens=32 phases.end_to_end.batch_size=1 phases.end_to_end.sequence_length=32
evaluation.tokens=32 evaluation.sequence_length=32 evaluation.contexts=[8] evaluation.decode_tokens=2
evaluation.continuation_tokens=4 precision=float32 device=cpu
"""


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Short texts in the place of those from the registry."""
    for name in ("1790-X", "an_article", "a_page", "a_book", "proceedings"):
        (tmp_path / f"{name}.txt").write_text(f"{name} has these words, and some more of them. " * 40)

    def found(name):
        return lambda: [tmp_path / f"{name}.txt"]

    monkeypatch.setattr(fetch, "state_of_the_union", found("1790-X"))
    monkeypatch.setattr(fetch, "encyclopedia", found("an_article"))
    monkeypatch.setattr(fetch, "python_reference", found("a_page"))
    monkeypatch.setattr(fetch, "literature", found("a_book"))
    monkeypatch.setattr(fetch, "proceedings", found("proceedings"))
    monkeypatch.setenv("MOHAWK_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def recipes(texts, monkeypatch):
    """The recipes that the demo would run."""
    run = []
    monkeypatch.setattr("mohawk.conversion.run.convert", run.append)
    monkeypatch.setattr(fetch, "smollm2", lambda: texts / "smollm2")
    return run


def test_the_recipes_layers_are_its_own_teachers(recipes, texts):
    own = Recipe.load(shipped("demo")).teacher.model
    (texts / "other").mkdir()
    (texts / "other" / "config.json").write_text("{}")
    demo.demo()
    demo.demo(teacher=own)
    demo.demo(teacher=str(texts / "other"))
    demo.demo(teacher="other/model", overrides=["student.ssm_layers=[1, 2]"])
    assert [r.teacher.model for r in recipes] == [str(texts / "smollm2"), own, str(texts / "other"), "other/model"]
    assert [r.student.ssm_layers for r in recipes] == [TUNED, TUNED, "every_second", [1, 2]]


def test_a_folder_that_is_not_there_is_told_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "state_of_the_union", lambda: pytest.fail("fetched"))
    with pytest.raises(UserError, match="does not exist"):
        demo.demo(teacher=str(tmp_path / "nowhere"))
    monkeypatch.setattr(fetch, "smollm2", lambda: pytest.fail("fetched"))
    (tmp_path / "file").write_text("")
    for given, words in (({"output": tmp_path / "file"}, "cannot be written"), ({"overrides": ["zz=1"]}, "zz")):
        with pytest.raises(UserError, match=words):
            demo.demo(**given)


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("qwen2", 40), ("phi", 6)])
def test_another_teacher_of_any_depth(family, layers, texts, tokenizer, capsys):
    import transformers

    kinds = {"llama": "Llama", "qwen2": "Qwen2", "phi": "Phi"}
    config = getattr(transformers, f"{kinds[family]}Config")(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=256, eos_token_id=257, pad_token_id=None,
    )  # fmt: skip
    getattr(transformers, f"{kinds[family]}ForCausalLM")(config).save_pretrained(texts / "teacher")
    tokenizer.save_pretrained(texts / "teacher")
    settings = [word for setting in LITTLE.split() for word in ("--set", setting)]
    assert main(["demo", "--teacher", str(texts / "teacher"), "--output", str(texts / "run"), *settings]) == 0
    kinds = json.loads((texts / "run" / "student" / "config.json").read_text())["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "linear_attention"] == list(range(1, layers, 2))
    assert len(kinds) == layers
    assert (texts / "run" / "report.md").is_file()

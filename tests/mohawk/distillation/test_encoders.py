"""`mohawk distill` of encoders as its user meets it: masked words and classes, from a recipe to a student."""

import json
import signal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from mohawk.cli import main
from mohawk.core.folders import Interrupted
from mohawk.data.encoder_rows import Labelled, LabelledRows
from mohawk.distillation.cache import cache_teacher
from mohawk.distillation.recipe import DistillRecipe
from mohawk.distillation.run import distill
from mohawk.errors import UserError
from mohawk.evaluation.run import evaluate_run
from mohawk.schema.files import shipped
from tests.helpers.tiny_phase import cheap_training  # noqa: F401

pytestmark = pytest.mark.usefixtures("cheap_training")

WORDS = "the a cat dog sat ran on by mat tree red blue and or is was one two three four".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32,
    "num_hidden_layers": 4, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Checkpoints and texts."""
    folder = tmp_path_factory.mktemp("encoders")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names,
    )  # fmt: skip
    torch.manual_seed(0)
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "pad_token_id": 0}
    made = {
        "masked": BertForMaskedLM(BertConfig(**SIZES, initializer_range=0.3)),
        "classes": BertForSequenceClassification(BertConfig(**SIZES, **labels, initializer_range=0.3)),
        "distilbert": DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=SIZES["vocab_size"], dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = torch.Generator().manual_seed(1)

    def text(n):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=draw))

    for i in range(20):
        (folder / f"text_{i}.txt").write_text(text(30 + 3 * i) + "\n")
    rows = [
        {"text": text(9), "text_pair": text(5) if i % 2 else None, "label": ["no", 1][i % 3 > 0]} for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_of(given, output, task, *stages, **settings) -> DistillRecipe:
    shape = {
        "tokens": 4 * 4 * 24, "batch_size": 4, "sequence_length": 24, "learning_rate": 3e-3, "save_every": 2,
        "warmup": 0.0,
    }  # fmt: skip
    text = "rows.jsonl" if task == "classification" else "text_*.txt"
    return DistillRecipe.from_dict(
        {
            "task": task, "teacher": str(given / ("classes" if task == "classification" else "masked")),
            "student": {"layers": "every_second"},
            "data": {"train": [str(given / text)], "validation_share": 0.2, "cache": str(given / "cache")},
            "stages": [{**shape, **stage} for stage in stages or [{}]],
            "evaluation": {"sequence_length": 24, "batch_size": 4, "tokens": 240},
            "precision": "float32", "device": "cpu", "output": str(output), **settings,
        }
    )  # fmt: skip


def results_of(run):
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(given):
    """The folder of a run with DistilBERT's three losses."""
    stage = {
        "temperature": 2, "kd_weight": 5, "ce_weight": 2, "kd_on": "all",
        "hidden": {"layers": [[1, 3]], "loss": "cosine"},
    }  # fmt: skip
    distill(recipe_of(given, given / "finished", "masked_lm", stage))
    return given / "finished"


def test_distilberts_triple_loss_and_every_second_layer(finished):
    student = AutoModelForMaskedLM.from_pretrained(finished / "student")
    assert type(student) is BertForMaskedLM
    assert student.config.num_hidden_layers == 2
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    measured = lines[-1]["measured"]
    assert {"kd", "ce", "hidden"} <= measured.keys()
    results = results_of(finished)
    found = results["evaluation"]["distil"]["held_out"]
    assert results["task"] == "masked_lm"
    assert found["student_perplexity"] > 1 < found["teacher_perplexity"]
    assert found["acceptance"] is None
    report = (finished / "report.md").read_text()
    assert "masked words" in report
    assert "draft" not in report
    assert (finished / "report.html").is_file()


def test_tinyberts_stages_into_another_class_and_width(given, tmp_path):
    stages = [
        {"name": "layers", "kd_weight": 0, "hidden": {"embeddings": True, "shared": True},
         "attention": {"metric": "scores"}, "relations": {"heads": 2}},
        {"name": "predictions"},
    ]  # fmt: skip
    distill(recipe_of(given, tmp_path / "run", "masked_lm", *stages, student=str(given / "distilbert")))
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student")) is DistilBertForMaskedLM


def test_classes_with_their_measures(given, tmp_path):
    recipe = recipe_of(given, tmp_path / "run", "classification", {"ce_weight": 0.5, "hidden": {}})
    distill(recipe)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")).__name__.startswith(
        "Bert"
    )
    found = results_of(tmp_path / "run")["evaluation"]["distil"]["held_out"]
    assert {"student_accuracy", "teacher_f1", "student_roc_auc"} <= found.keys()
    assert found["tokens"] == 8
    report = (tmp_path / "run" / "report.md").read_text()
    for word in ("accuracy", "F1", "ROC-AUC"):
        assert word in report
    # a student that only filled in masked words gets a head for the teacher's classes
    distill(recipe_of(given, tmp_path / "other", "classification", {}, student=str(given / "distilbert")))
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other" / "student").config
    assert config.id2label == {0: "no", 1: "yes"}


def test_evaluated_rows_of_a_file_that_is_sorted_by_class_are_of_all_classes():
    rows = Labelled([str(i) for i in range(400)], [None] * 400, np.arange(400) // 200)
    places = list(LabelledRows(rows, None, 8, count=64).places)
    assert len(places) == 64 == len(set(places))
    assert 20 < rows.labels[places].sum() < 44
    assert places == list(LabelledRows(rows, None, 8, count=64).places)
    assert [len(LabelledRows(rows, None, 8, count=count)) for count in (None, 400, 900)] == [400] * 3


def test_a_stopped_run_goes_on_bit_for_bit(given, tmp_path, monkeypatch):
    recipe = recipe_of(given, tmp_path / "whole", "masked_lm", {"ce_weight": 1.0})
    distill(recipe)
    from mohawk.losses.distiller import KnowledgeDistiller

    ended = KnowledgeDistiller.end_step

    def stop(self, loss):
        ended(self, loss)
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)

    parted = recipe_of(given, tmp_path / "parted", "masked_lm", {"ce_weight": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr(KnowledgeDistiller, "end_step", stop)
        with pytest.raises(Interrupted):
            distill(parted)
    distill(parted)
    one, other = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / run / "student").state_dict() for run in ("whole", "parted")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_dry_run_and_what_it_refuses(given, tmp_path, capsys):
    recipe = recipe_of(given, tmp_path / "run", "masked_lm")
    distill(recipe, dry_run=True)
    assert "BertForMaskedLM" in capsys.readouterr().out
    refused = [
        ({"task": "causal_lm"}, "an encoder needs task: masked_lm or classification"),
        ({"task": "classification"}, "is plain text, but task: classification needs rows with a label"),
        ({"data": {"train": [str(given / "rows.jsonl")], "validation_share": 0.2, "label_field": "y"}}, "label_field"),
    ]
    for change, line in refused:
        with pytest.raises(UserError, match=line):
            distill(DistillRecipe.from_dict({**recipe.model_dump(mode="json"), **change}), dry_run=True)
    with pytest.raises(UserError, match="caches are of causal_lm alone"):
        cache_teacher(recipe, tmp_path / "cache")
    for change, line in (
        ({"cache": "somewhere"}, "cache: answers to text of task: masked_lm are not kept"),
        ({"on_policy": {}}, "on_policy is of causal language models"),
    ):
        with pytest.raises(UserError, match=line):
            recipe_of(given, tmp_path / "run", "masked_lm", change)
    with pytest.raises(UserError, match="kd_on: all is of task: masked_lm"):
        recipe_of(given, tmp_path / "run", "classification", {"kd_on": "all"})
    with pytest.raises(UserError, match="student.lora: is of causal language models"):
        recipe_of(given, tmp_path / "run", "masked_lm", student={"lora": {}})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the cat", "label": "maybe"}\n')
    data = {"train": [str(bad)], "evaluation": [str(given / "rows.jsonl")], "validation_share": 0}
    with pytest.raises(UserError, match=r"bad.jsonl:1: field 'label': got 'maybe'; allowed: 0 to 1, or no, yes"):
        distill(recipe_of(given, tmp_path / "run", "classification", data=data), dry_run=True)


@pytest.mark.parametrize("name", ["distill-bert", "distill-minilm", "distill-bert-classes"])
def test_shipped_recipes_fit_their_teachers(name, given, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    config = BertConfig(**{**SIZES, "num_hidden_layers": 12, "hidden_size": 96, "num_attention_heads": 12})
    config.max_position_embeddings, config.id2label = 512, {0: "no", 1: "yes"}
    config.save_pretrained(teacher)
    rows = [f"data.train.0.source={given / 'rows.jsonl'}"] if name == "distill-bert-classes" else []
    distill(DistillRecipe.load(shipped(name), [f"teacher.model={teacher}", *rows]), dry_run=True)
    assert "6 layers" in capsys.readouterr().out


def test_the_command_line(finished, capsys):
    assert main(["distill", str(finished / "recipe.yaml"), "--dry-run"]) == 0
    with pytest.raises(UserError, match="is of task: masked_lm, which `mohawk evaluate` does not measure"):
        evaluate_run(finished)

"""`mohawk distill` between two tokenizers, from a cache of the teacher's tokens, and without any teacher."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mohawk.cli import main
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

LINE = "Document {i} counts {numbers}, and the administration counted the numbers.\n"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"
OTHER_TEMPLATE = "{% for m in messages %}<<{{ m.role }}>>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
OTHER_TEMPLATE += "{% if add_generation_prompt %}<<assistant>>\n{% endif %}"


def bpe(texts, size, eos, template):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text, a chat, and two models with vocabularies of their own."""
    folder = tmp_path_factory.mktemp("place")
    texts = [LINE.format(i=i, numbers=", ".join(str(i * k) for k in range(9))) * 2 for i in range(16)]
    for i, text in enumerate(texts):
        (folder / f"train_{i}.txt").write_text(text)
    chats = [
        {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]}
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizers = {"small": bpe(texts, 280, "<end>", TEMPLATE), "big": bpe(texts, 330, "</s>", OTHER_TEMPLATE)}
    for name, tokenizer in tokenizers.items():
        tiny_teacher(
            vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        ).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def written(place, path, stage=(), **fields):
    shape = {"tokens": 384, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "warmup": 0.0}
    recipe = {
        "teacher": str(place / "big"), "student": str(place / "small"),
        "data": {"train": [str(place / "train_*.txt")], "validation_share": 0.1, "cache": str(place / "cache")},
        "stages": [{**shape, "ce_weight": 1, **dict(stage)}],
        "evaluation": {
            "sequence_length": 32, "batch_size": 4, "tokens": 128, "longest": None, "contexts": [8],
            "decode_tokens": 2, "prompt": "A", "continuation_tokens": 4,
        },
        "precision": "float32", "device": "cpu", "output": str(path.parent / "run"), **fields,
    }  # fmt: skip
    path.write_text(json.dumps(recipe))
    return str(path)


def last_metrics(path):
    return json.loads((path.parent / "run" / "metrics.jsonl").read_text().splitlines()[-1])["measured"]


def test_another_tokenizer_is_refused_with_the_field_named(place, tmp_path, capsys):
    assert main(["distill", written(place, tmp_path / "r.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "its tokenizer is another one than the teacher's" in said and "set align: spans, or uld" in said


@pytest.mark.parametrize("align", ["spans", "uld"])
def test_a_teacher_with_another_tokenizer(place, tmp_path, capsys, align):
    """The student keeps its own tokenizer; the report has bits per byte of both, and no KL."""
    recipe = written(place, tmp_path / "r.yaml", align=align)
    assert main(["distill", recipe, "--dry-run"]) == 0
    assert f"aligned by bytes ({align})" in " ".join(capsys.readouterr().out.split())
    assert main(["distill", recipe]) == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    found = results["evaluation"]["distil"]["held_out"]
    assert "kl" not in found and found["bits_per_byte"] > 0 and found["teacher_bits_per_byte"] > 0
    assert {"teacher", "student"} == set(results["parameters"]) == set(results["decoding"])
    line = last_metrics(tmp_path / "r.yaml")
    assert line["kd"] > 0 and line["ce"] > 0 and 0.5 < line["aligned_tokens"] <= 1
    assert (
        AutoTokenizer.from_pretrained(run / "student").get_vocab()
        == AutoTokenizer.from_pretrained(place / "small").get_vocab()
    )
    assert "bits per byte" in (run / "report.md").read_text()
    with pytest.raises(UserError, match="cannot be compared token by token"):
        from mohawk.evaluation.run import evaluate_run

        evaluate_run(run)


@pytest.mark.parametrize("kind", ["top-k", "hidden"])
def test_a_cache_of_the_teachers_tokens_gives_the_same_loss(place, tmp_path, kind):
    """Chats too, of which each side has its own template."""
    data = {
        "train": [
            str(place / "train_*.txt"),
            {"source": str(place / "chats.jsonl"), "kind": "pairs", "sampling_weight": 1},
        ],
        "validation_share": 0.1, "cache": str(place / "cache"),
    }  # fmt: skip
    recipe = written(place, tmp_path / "r.yaml", align="spans", data=data)
    cache = ["cache", recipe, "--output", str(tmp_path / "answers"), "--kind", kind]
    assert main([*cache, *(["--k", "330"] if kind == "top-k" else [])]) == 0
    assert main(["distill", recipe]) == 0
    (tmp_path / "2").mkdir()
    other = written(
        place, tmp_path / "2" / "r.yaml", align="spans", data=data, stage={"cache": str(tmp_path / "answers")}
    )
    assert main(["distill", other]) == 0
    online, cached = (last_metrics(path) for path in (tmp_path / "r.yaml", tmp_path / "2" / "r.yaml"))
    assert cached["kd"] == pytest.approx(online["kd"], rel=1e-3)
    assert cached["ce"] == pytest.approx(online["ce"], rel=1e-3)


def test_one_tokenizer_with_two_chat_templates(place, tmp_path):
    """Each side reads chats through its own; learned is what is the same in both, with the loss of the usual kind."""
    shutil.copytree(place / "small", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "teacher")
    data = {
        "train": [{"source": str(place / "chats.jsonl"), "kind": "pairs"}], "validation_share": 0.1,
        "cache": str(place / "cache"),
    }  # fmt: skip
    recipe = written(place, tmp_path / "r.yaml", align="spans", data=data, teacher=str(tmp_path / "teacher"))
    found = run_tokenizers(DistillRecipe.load(recipe))
    assert found.text.chat_template == TEMPLATE and found.teacher.chat_template == OTHER_TEMPLATE
    assert main(["distill", recipe]) == 0
    # the same weights, which after other headers say other things
    assert 0 < last_metrics(tmp_path / "r.yaml")["kd"] < 1
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert saved.chat_template == TEMPLATE
    plain = written(place, tmp_path / "p.yaml", align="spans", teacher=str(tmp_path / "teacher"))
    assert run_tokenizers(DistillRecipe.load(plain)).teacher is None


def test_without_a_teacher(place, tmp_path, capsys):
    """Cross entropy alone, with the student's own tokenizer, and a report without a teacher's figures."""
    recipe = written(place, tmp_path / "r.yaml", teacher=None)
    assert main(["distill", recipe, "--dry-run"]) == 2
    assert "a kd_weight above 0 needs a teacher, and teacher is null" in capsys.readouterr().err
    recipe = written(place, tmp_path / "r.yaml", teacher=None, stage={"kd_weight": 0})
    assert main(["distill", recipe, "--dry-run"]) == 0
    assert "Teacher none" in capsys.readouterr().out
    assert main(["distill", recipe]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"] is None and set(results["parameters"]) == {"student"}
    found = results["evaluation"]["distil"]["held_out"]
    assert found["bits_per_byte"] > 0 and found["teacher_bits_per_byte"] is None
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Teacher:" not in report and "bits per byte" in report and "teacher's" not in report
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert main(["cache", recipe, "--output", str(tmp_path / "none")]) == 2
    assert "teacher is null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "fields", "said"),
    [
        ({"relations": {}}, {}, "relations matches a teacher's layers, and teacher is null"),
        ({"taid": {}}, {}, "taid asks a teacher, and teacher is null; leave it out"),
        ({"confidence": "entropy"}, {}, "confidence asks a teacher, and teacher is null; leave it out"),
        ({"on_policy": {}}, {}, "on_policy asks a teacher, and teacher is null; leave it out"),
        ({}, {"combine": "row"}, "combine: got row, but teacher is null; leave it out"),
        ({}, {"teacher": "big", "align": "spans", "stage": {"relations": {}}}, "relations needs a teacher that reads"),
        ({}, {"teacher": "big", "align": "uld", "stage": {"divergence": "jsd"}}, "divergence: jsd, but align: uld"),
    ],
)
def test_what_needs_a_teacher_or_its_tokens(tmp_path, stage, fields, said):
    given = {"teacher": None, "student": "small", "data": {"train": ["a.txt"]}, "output": "run", **fields}
    stage = given.pop("stage", {"kd_weight": 0, "ce_weight": 1, **stage})
    (tmp_path / "r.yaml").write_text(json.dumps({**given, "stages": [{"tokens": 384, **stage}]}))
    with pytest.raises(UserError) as error:
        DistillRecipe.load(tmp_path / "r.yaml")
    assert said in str(error.value)


def test_own_losses_of_an_aligned_teacher(tmp_path):
    """Which differ by logits, which two vocabularies do not share."""
    train = ["a.txt", {"source": "b.txt", "own_loss": {"kd_weight": 1, "divergence": "mse"}}]
    given = {"teacher": "big", "student": "small", "align": "spans", "data": {"train": train}, "output": "run"}
    (tmp_path / "r.yaml").write_text(json.dumps({**given, "stages": [{"tokens": 5e6}]}))
    with pytest.raises(UserError, match="divergence needs a teacher that reads the student's own tokens"):
        DistillRecipe.load(tmp_path / "r.yaml")

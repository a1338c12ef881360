"""`mohawk distill` as its user meets it: tiny checkpoints, stages, texts and pairs, a student for transformers."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MambaConfig, MambaForCausalLM

from mohawk.cli import main
from mohawk.core.folders import Interrupted, is_complete
from mohawk.distillation.ablate import ablate, variants_of
from mohawk.distillation.cache import cache_teacher
from mohawk.distillation.recipe import DistillRecipe
from mohawk.distillation.run import distill
from mohawk.errors import UserError
from mohawk.losses import distiller as distill_module
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.runs.claim import claimed
from mohawk.schema.files import shipped
from mohawk.training.advance import Advance
from tests.helpers.chat_templates import tokenizer_with
from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

STEPS = 4
TOKENS = STEPS * 4 * 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(20):
        line = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (folder / f"train_{i}.txt").write_text(line * (1 + i % 3))
    (folder / "other.txt").write_text("A cat that sat on a mat met a rat.\n" * 20)
    pairs = [{"prompt": f"{i}: ", "response": f"{i} {i + 1}", "by": ["big", "wide"][i % 2]} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    reasons = [{"prompt": f"{i}+1?", "response": f"One more than {i}. The answer is {i + 1}."} for i in range(40)]
    (folder / "reasons.jsonl").write_text("".join(json.dumps(reason) + "\n" for reason in reasons))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Two teachers of the same vocabulary, and one of fewer entries."""
    found = {}
    for name, settings in {"big": {}, "wide": {"hidden_size": 64}}.items():
        found[name] = tmp_path_factory.mktemp(name)
        tiny_teacher(
            vocab_size=258, num_hidden_layers=4, bos_token_id=256, eos_token_id=257, **settings
        ).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def recipe_of(checkpoints, texts, output, *stages, **settings) -> DistillRecipe:
    shape = {
        "tokens": TOKENS, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "save_every": 2, "warmup": 0.0,
    }  # fmt: skip
    data = {
        "train": [str(texts / "train_*.txt")], "evaluation": [str(texts / "other.txt")],
        "validation_share": 0.1, "cache": str(texts / "cache"), **settings.pop("data", {}),
    }  # fmt: skip
    return DistillRecipe.from_dict(
        {
            "teacher": str(checkpoints["big"]),
            "student": {"layers": "every_second"},
            "data": data,
            "stages": [{**shape, **stage} for stage in stages],
            "evaluation": {
                "sequence_length": 32, "batch_size": 4, "tokens": 128,
                "longest": 64, "contexts": [8], "decode_tokens": 2,
                "prompt": "A cat", "continuation_tokens": 4,
            },
            "precision": "float32", "device": "cpu", "output": str(output), **settings,
        }
    )  # fmt: skip


def metrics_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(run / "student").named_parameters())


def test_epochs_of_chats_end_as_a_small_student(tmp_path, texts, capsys):
    """ShareGPT's conversations, their answers alone, each row twice; the student in 16 bits; stopped and gone on."""
    tokenizer = tokenizer_with("qwen")
    tiny_teacher(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    turns = [("human", "How many?"), ("gpt", "{} or so."), ("human", "Sure?"), ("gpt", "Yes, {}.")]
    talks = [[{"from": who, "value": said.format(i)} for who, said in turns] for i in range(21)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"conversations": talk}) + "\n" for talk in talks))
    source = {"source": str(tmp_path / "log.jsonl"), "kind": "pairs"}
    stage = {"sequence_length": 256, "epochs": 2, "confidence": "entropy", "save_every": 1}
    settings = {"data": {"train": [source], "evaluation": []}, "save_dtype": "bfloat16"}

    def recipe(**more):
        made = recipe_of({"big": tmp_path / "teacher"}, texts, tmp_path / "run", {**stage, **more}, **settings)
        return made

    asked = DistillRecipe.from_dict({
        **json.loads(json.dumps(recipe(tokens=None).model_dump(mode="json"))), "student": {"layers": "first:1"},
    })  # fmt: skip
    assert DistillRecipe.from_dict(asked.model_dump(mode="json")) == asked
    distill(asked, dry_run=True)
    assert "epochs" in capsys.readouterr().out
    distill(asked)
    printed = capsys.readouterr().out
    found = re.search(r"2 epochs of (\d+) rows: (\d+) steps of 4 rows(?:, the last one of (\d))?", printed)
    rows, steps, left = (int(number or 0) for number in found.groups())
    assert steps == math.ceil(2 * rows / 4) and left == 2 * rows % 4
    records = metrics_of(tmp_path / "run")
    assert len(records) == steps and records[-1]["tokens"] == 2 * rows * 256
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", dtype="auto")
    assert student.dtype == torch.bfloat16 and student.config.num_hidden_layers == 1
    stage_student = tmp_path / "run" / "phases" / "distil" / "student"
    assert AutoModelForCausalLM.from_pretrained(stage_student, dtype="auto").dtype == torch.float32
    before = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    distill(asked)  # a finished run is left as it is
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == before
    for more, said in (
        ({"tokens": 1e4}, "both of tokens and epochs; give one, the other is null"),
        ({"tokens": None, "epochs": None}, "neither of tokens and epochs"),
    ):
        with pytest.raises(UserError, match=said):
            recipe(**more)


def test_stages_from_checkpoints_to_a_student(checkpoints, texts, tmp_path, capsys):
    """Layers first, then logits from texts, pairs and rationales, an average, and a smaller student from the last."""
    run = tmp_path / "run"
    mixed = {
        "train": [
            {"source": str(texts / "train_*.txt"), "sampling_weight": 2},
            {"source": str(texts / "pairs.jsonl"), "kind": "pairs", "sampling_weight": 1, "loss_weight": 0.5},
            {"source": str(texts / "reasons.jsonl"), "kind": "rationales", "sampling_weight": 1},
        ]
    }
    recipe = recipe_of(
        checkpoints, texts, run,
        {"name": "layers", "kd_weight": 0, "hidden": {}, "attention": {"metric": "mse", "weight": 32}},
        {
            "name": "logits", "temperature": {"start": 4, "end": 1}, "ce_weight": 0.3, "taid": {},
            "on_policy": {"max_new_tokens": 4, "prompt_tokens": 4}, "data": mixed,
        },
        {"name": "average", "learn_from": "average", "divergence": "jsd", "average_decay": 0.9, "ce_weight": 0.1},
        {"name": "smaller", "learn_from": "previous", "student": {"layers": "first:1"}, "confidence": True},
    )  # fmt: skip
    distill(recipe)
    printed = capsys.readouterr().out
    assert "4 layers" in printed and "From smaller on" in printed
    found = metrics_of(run)
    names = ("layers", "logits", "average", "smaller")
    assert [record["phase"] for record in found] == [name for name in names for _ in range(STEPS)]
    temperatures = [record["measured"]["temperature"] for record in found if record["phase"] == "logits"]
    assert temperatures == pytest.approx([4, 3, 2, 1])
    assert {"hidden", "attention"} <= found[0]["measured"].keys()
    assert found[0]["loss"] > found[3]["loss"]
    assert found[7]["measured"]["taid_t"] > 0.4
    results = json.loads((run / "results.json").read_text())
    assert list(results["evaluation"]) == ["before", *names] and list(results["phases"]) == list(names)
    report = (run / "report.md").read_text()
    assert "after smaller" in report and "LlamaForCausalLM with 1 layers" in report
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 1 and not any(
        "matched" in name for name, _ in student.named_parameters()
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert student.generate(**tokenizer("A cat", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    before = (run / "student" / "model.safetensors").read_bytes()
    distill(recipe)  # a finished run is left as it is
    assert (run / "student" / "model.safetensors").read_bytes() == before and len(metrics_of(run)) == len(found)


def killed(recipe, step: int) -> None:
    """The run, ended by SIGKILL after so many logged steps."""
    from mohawk.training.progress import Metrics

    def body():
        import os

        logged = Metrics.log

        def log(self, record):
            logged(self, record)
            path = self.path
            if len(path.read_text().splitlines()) >= step:
                os.kill(os.getpid(), signal.SIGKILL)

        Metrics.log = log
        distill(recipe)

    assert wait(fork(body)) == -signal.SIGKILL


def test_a_killed_run_ends_as_if_it_had_not_been(checkpoints, texts, tmp_path):
    """Killed in the middle of each stage: learned projections, TAID and the average are part of a checkpoint."""
    stages = [
        {"name": "wide", "hidden": {"rank": 4}, "taid": {"alpha": 0.1}},
        {"name": "average", "learn_from": "average", "average_decay": 0.8, "ce_weight": 0.5},
    ]
    settings = {"teacher": str(checkpoints["wide"]), "student": str(checkpoints["big"])}
    whole, parts = (recipe_of(checkpoints, texts, tmp_path / name, *stages, **settings) for name in ("whole", "parts"))
    distill(whole)
    for step in (3, STEPS + 3):
        killed(parts, step)
    distill(parts)
    for name, weight in weights_of(tmp_path / "whole").items():
        assert weight.equal(weights_of(tmp_path / "parts")[name]), name
    a, b = ([(r["phase"], r["step"], r["loss"]) for r in metrics_of(tmp_path / name)] for name in ("whole", "parts"))
    assert a == b


def test_a_signal_saves_and_the_run_goes_on(checkpoints, texts, tmp_path, monkeypatch):
    recipe = recipe_of(checkpoints, texts, tmp_path / "run", {})
    original = distill_module.KnowledgeDistiller.end_step

    def end_step(self, loss):
        original(self, loss)
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module.KnowledgeDistiller, "end_step", end_step)
        with pytest.raises(Interrupted):
            distill(recipe)
    distill(recipe)
    assert is_complete(tmp_path / "run" / "student") and len(metrics_of(tmp_path / "run")) == STEPS


def test_a_cached_teacher_teaches_as_the_teacher_does(checkpoints, texts, tmp_path):
    plain = recipe_of(checkpoints, texts, tmp_path / "plain", {})
    distill(plain)
    cache_teacher(plain, tmp_path / "cache", kind="hidden")
    distill(recipe_of(checkpoints, texts, tmp_path / "cached", {"cache": str(tmp_path / "cache")}))
    online, cached = weights_of(tmp_path / "plain"), weights_of(tmp_path / "cached")
    for name in online:
        torch.testing.assert_close(cached[name], online[name], rtol=0, atol=2e-6)
    wide = recipe_of(
        checkpoints, texts, tmp_path / "wide", {"cache": str(tmp_path / "cache")}, teacher=str(checkpoints["wide"])
    )
    with pytest.raises(UserError, match="cache again with this teacher"):
        distill(wide)
    with pytest.raises(UserError, match="cached with data seed 0, here it is 5"):
        distill(
            recipe_of(checkpoints, texts, tmp_path / "seed", {"cache": str(tmp_path / "cache")}, seed=5), dry_run=True
        )
    cache_teacher(plain, tmp_path / "top", kind="top-k", k=16, temperature=2.0)
    with pytest.raises(UserError, match="temperature 2"):
        distill(recipe_of(checkpoints, texts, tmp_path / "other", {"cache": str(tmp_path / "top")}))
    distill(recipe_of(checkpoints, texts, tmp_path / "top16", {"cache": str(tmp_path / "top"), "temperature": 2}))
    for i, train in enumerate(("train_1*.txt", "other.txt")):  # before any weights are loaded
        stage, other = {"cache": str(tmp_path / "cache")}, {"train": [str(texts / train)]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mohawk.distillation.build.load_teacher", lambda *_, **__: pytest.fail("weights were loaded"))
            with pytest.raises(UserError, match=r"cached from (another text|\d+ rows)"):
                distill(recipe_of(checkpoints, texts, tmp_path / f"another{i}", stage, data=other))


@pytest.mark.parametrize("combine", ["probabilities", "logits", "row"])
def test_several_teachers(checkpoints, texts, tmp_path, combine):
    data = {}
    if combine == "row":
        source = {"source": str(texts / "pairs.jsonl"), "kind": "pairs", "teacher_field": "by"}
        data = {"data": {"train": [source]}}
    teachers = [{"model": str(checkpoints["wide"]), "name": "wide", "weight": 2.0, "micro_batch": 1}]
    recipe = recipe_of(
        checkpoints, texts, tmp_path / "run", {}, teachers=teachers, combine=combine,
        teacher={"model": str(checkpoints["big"]), "name": "big"}, **data,
    )  # fmt: skip
    distill(recipe)
    assert metrics_of(tmp_path / "run")[-1]["loss"] > 0


def test_each_source_has_its_teacher_and_its_figures(checkpoints, texts, tmp_path):
    """A replay that the student as it was answers: of it alone there is nothing to learn, and nothing is forgotten."""
    old = {"source": str(texts / "train_1*.txt"), "teacher": "before"}
    given = {
        "teacher": {"name": "new", "model": str(checkpoints["big"])}, "combine": "row",
        "teachers": [{"name": "before", "model": str(checkpoints["wide"])}],
        "student": {"model": str(checkpoints["wide"])},
    }  # fmt: skip
    distill(recipe_of(checkpoints, texts, tmp_path / "replay", {}, data={"train": [old]}, **given))
    assert metrics_of(tmp_path / "replay")[0]["measured"]["kd"] == pytest.approx(0, abs=1e-6)
    data = {"train": [old, {"source": str(texts / "train_[2-9].txt"), "teacher": "new"}], "validation_share": 0.4}
    distill(recipe_of(checkpoints, texts, tmp_path / "both", {}, data=data, **given))
    assert max(step["measured"]["kd"] for step in metrics_of(tmp_path / "both")) > 0.01
    results = json.loads((tmp_path / "both" / "results.json").read_text())["evaluation"]
    first, last = ({**results[at]["held_out"]["sources"]} for at in ("before", list(results)[-1]))
    assert len(first) == 2
    rows = [line.split("|") for line in (tmp_path / "both" / "report.md").read_text().splitlines()]
    for name, its in last.items():
        (row,) = [[cell.strip() for cell in cells] for cells in rows if name in cells[1:2] or f" {name} " in cells[1:2]]
        now, then = its["student_accuracy"], first[name]["student_accuracy"]
        assert row[-4:-1] == [f"{now:.1%}", f"{then:.1%}", f"{now / then:.1%}" if then else ""]


def test_a_hybrid_and_a_student_from_scratch(checkpoints, texts, tmp_path):
    student = {"hybrid": {"ssm_layers": [0, 2]}}
    match = {"layers": [[1, 1], [3, 3]], "metric": "frobenius", "weight": 0.1}
    distill(recipe_of(checkpoints, texts, tmp_path / "hybrid", {"attention": match}, student=student))
    config = json.loads((tmp_path / "hybrid" / "student" / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"] * 2
    scratch = {"layers": [0, 3], "scratch": True}
    distill(recipe_of(checkpoints, texts, tmp_path / "new", {"kd_weight": 0, "ce_weight": 1}, student=scratch))
    found = metrics_of(tmp_path / "new")
    assert found[0]["measured"]["ce"] == pytest.approx(5.55, abs=0.3)  # log 258: it knows nothing yet


def test_any_causal_model_may_teach(checkpoints, tokenizer, texts, tmp_path):
    """Half the layers of a GPT-2, whose family nothing here knows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 24, "n_layer": 4, "n_head": 3, "n_positions": 64, "bos_token_id": 256, "eos_token_id": 257}
    GPT2LMHeadModel(GPT2Config(vocab_size=258, **shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    stage, teacher = {"hidden": {}, "attention": {}}, str(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"stages.0.sequence_length: got 65, but .*gpt2 has positions for 64 tokens"):
        distill(recipe_of(checkpoints, texts, tmp_path / "run", {"sequence_length": 65}, teacher=teacher))
    distill(recipe_of(checkpoints, texts, tmp_path / "run", stage, teacher=teacher))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.n_layer == 2


def test_adapters_alone_are_trained(checkpoints, texts, tmp_path):
    pytest.importorskip("peft")
    student = {"layers": "every_second", "lora": {"rank": 2, "keep": True}}
    run = tmp_path / "run"
    distill(recipe_of(checkpoints, texts, run, {}, student=student))
    from mohawk.models.cutting.cuts import keep_layers

    start = dict(
        keep_layers(AutoModelForCausalLM.from_pretrained(checkpoints["big"]), "every_second").named_parameters()
    )
    changed = {name for name, weight in weights_of(run).items() if not weight.equal(start[name])}
    assert changed and all("proj" in name for name in changed)
    from peft import AutoPeftModelForCausalLM

    kept = AutoPeftModelForCausalLM.from_pretrained(run / "phases" / "distil" / "adapter").eval()
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(run / "student")
    torch.testing.assert_close(kept(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["adapter/adapter_model.safetensors", "base/model.safetensors", "adapter"])
def test_a_kept_adapter_that_is_damaged_is_named_and_made_again(part, checkpoints, texts, tmp_path, capsys, caplog):
    pytest.importorskip("peft")
    run, student = tmp_path / "run", {"layers": "every_second", "lora": {"rank": 2, "keep": True, "dropout": 0.1}}
    recipe = recipe_of(checkpoints, texts, run, {}, student=student)
    distill(recipe)
    folder = run / "phases" / "distil"
    whole = {path: path.read_bytes() for path in run.rglob("*.safetensors")}

    def damage():
        if part == "adapter":
            shutil.rmtree(folder / part)
        else:
            content = bytearray((folder / part).read_bytes())
            content[-2] ^= 1
            (folder / part).write_bytes(content)

    damage()
    if part != "adapter":
        assert main(["verify", str(run)]) == 2
        assert f"{(folder / part).parent}: {Path(part).name} is damaged; the command that" in capsys.readouterr().err
    distill(recipe)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == whole
    assert caplog.text.count("is missing or damaged; making it again of the last checkpoint of distil") == 1
    assert main(["verify", str(run)]) == 0
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    damage()
    caplog.clear()
    distill(recipe)
    name = folder / Path(part).parts[0]
    assert f"{name} is missing or damaged; going on without it. To have it again" in caplog.text
    assert f"run: rm -r {folder}, then the same command" in caplog.text


def test_a_stage_ends_early_where_it_gets_no_better(checkpoints, texts, tmp_path):
    stage = {"advance": {"every": 1, "patience": 1, "improvement": 0.9}, "tokens": 10 * TOKENS}
    run = tmp_path / "run"
    distill(recipe_of(checkpoints, texts, run, stage, {"name": "next"}))
    assert [record["phase"] for record in metrics_of(run)] == ["distil"] * 2 + ["next"] * STEPS


def test_a_bandit_routes_between_teachers_rationales(checkpoints, texts, tmp_path):
    """Killed between rounds and within one: the bandit goes on as if nothing had been."""
    lines = (texts / "reasons.jsonl").read_text().splitlines()
    (texts / "nonsense.jsonl").write_text("".join(line.replace("more than", "or so") + "\n" for line in lines))
    sources = [{"source": str(texts / name), "kind": "rationales"} for name in ("reasons.jsonl", "nonsense.jsonl")]
    stage = {"kd_weight": 0, "ce_weight": 1, "routing": {"every": 2}, "tokens": 2 * TOKENS}
    whole, parts = (
        recipe_of(checkpoints, texts, tmp_path / name, stage, data={"train": sources}) for name in ("whole", "parts")
    )
    distill(whole)
    killed(parts, 5)
    distill(parts)
    for name, weight in weights_of(tmp_path / "whole").items():
        assert weight.equal(weights_of(tmp_path / "parts")[name]), name
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert all(f"{source['source']} took the validation loss" in log for source in sources)
    with pytest.raises(UserError, match="two or more sources of kind: rationales"):
        recipe_of(checkpoints, texts, tmp_path / "no", stage)


def test_when_to_advance():
    losses = iter([(3.0, 1.0), (2.0, 1.0), (1.9995, 1.0), (1.9994, 1.0), (1.05, 1.0)])
    advance = Advance(lambda: next(losses), every=2, patience=2, gap=0.1)
    assert [advance.after(step) for step in range(1, 9)] == [False] * 7 + [True]
    resumed = Advance(lambda: next(losses), every=2, patience=5, gap=0.1)
    resumed.load(advance.state())
    assert resumed.best == 2.0 and resumed.after(10)


@pytest.mark.parametrize(
    ("stages", "settings", "words"),
    [
        ([{"kd_weight": 0}], {}, "nothing to learn"),
        ([{"learn_from": "previous"}], {}, "it is the first stage"),
        ([{}, {}], {}, "another stage has this name"),
        ([{"cache": "c", "hidden": {}}], {}, "hidden needs the teacher itself"),
        ([{"temperature": {"start": 0, "end": 1}}], {}, "a temperature of 0"),
        ([{"temperature": "auto", "learn_from": "average"}], {}, "give a number"),
        ([{}], {"combine": "row"}, "teacher_field"),
        ([{}], {"data": {"train": [{"source": "a.txt", "teacher": "big"}]}}, "but combine is probabilities"),
        (
            [{}],
            {"combine": "row", "data": {"train": [{"source": "a.txt", "teacher": "small"}]}},
            "data.train.0.teacher: got 'small'; the recipe's teachers: 0",
        ),
        (
            [{}],
            {"combine": "row", "data": {"train": [{"source": "a.txt", "teacher": "0"}, "b.txt"]}},
            "data.train.1: has no teacher or teacher_field, but data.train.0 has one",
        ),
        (
            [{}],
            {
                "combine": "row",
                "data": {"train": [{"source": "a", "kind": "pairs", "teacher": "0", "teacher_field": "t"}]},
            },
            "teacher and teacher_field both name who answers",
        ),
        ([{}], {"student": {}}, "would learn from itself"),
        ([{}], {"student": {"scratch": True, "lora": {}}}, "student: scratch: true with lora trains adapters on"),
        ([{"student": {"scratch": True, "lora": {}}}], {}, "stages.0.student: scratch: true with lora"),
        ([{}], {"data": {"train": [{"source": "a.txt", "weighting": "uniform"}]}}, "weighting is of kind: pairs"),
        ([{"hidden": {"layers": "half"}}], {}, "uniform, last, dense_top, dense_bottom"),
        ([{"name": "A stage"}], {}, "small letters"),
        ([{"tokens": 10}], {}, "do not fill one step"),
        ([{"kd_weight": {"start": 0, "end": 0}}], {}, "nothing to learn"),
        ([{"taid": {"start": 0.8, "end": 0.2}}], {}, "above its end"),
        ([{"advance": {"every": 1}}], {}, "never ends the stage"),
        ([{}], {"data": {"train": [{"source": "a.txt", "loss_weight": 0}]}}, "every loss_weight is 0"),
        ([{"hidden": {"layers": "top_heavy"}}], {}, "dense_top, which is what top_heavy was"),
        ([{"divergence": "probability_mse", "attention": {"metric": "sums"}}], {}, "scores"),
        ([{}], {"data": {"train": [{"source": "a.txt", "own_loss": {}}]}}, "every source has an own_loss"),
        ([{}], {"data": {"train": ["b.txt", {"source": "a.txt", "own_loss": {"ce_weight": 0}}]}}, "no weight above 0"),
        (
            [{}],
            {"data": {"train": ["b.txt", {"source": "a.txt", "own_loss": {"divergence": "skew_kl", "lam": 0.2}}]}},
            "divergence, lam of a divergence whose kd_weight is 0",
        ),
        (
            [{"divergence": "reverse_kl", "policy_gradient": "normalized", "on_policy": {"share": 0.5}}],
            {},
            "policy_gradient needs on_policy of share, temperature and top_p 1: ",
        ),
        ([{"policy_gradient": "sum", "on_policy": {"share": 1}}], {}, "policy_gradient needs divergence: reverse_kl: "),
        (
            [{"taid": {}}],
            {"data": {"train": ["b.txt", {"source": "a.txt", "own_loss": {"kd_weight": 1, "divergence": "mse"}}]}},
            "taid is of divergences between distributions",
        ),
        (
            [{}],
            {"data": {"train": ["b.txt", {"source": "a.jsonl", "kind": "rationales", "own_loss": {}}]}},
            "own_loss is of text and pairs",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(checkpoints, texts, tmp_path, stages, settings, words):
    with pytest.raises(UserError) as caught:
        recipe_of(checkpoints, texts, tmp_path / "run", *stages, **settings)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("stage", "student", "words"),
    [
        ({}, {"layers": [0, 7]}, "student.layers"),
        ({"hidden": {"layers": [[0, 9]]}}, None, r"stages.0 \(distil\): layer map"),
        ({"attention": {"metric": "kl"}}, {"hybrid": {"ssm_layers": [0]}}, r"stages.0 \(distil\)"),
        ({}, {"hybrid": {"ssm_layers": [9]}}, "student.hybrid"),
        ({}, {"model": "./nowhere"}, "^student.model: ./nowhere does not exist"),
        ({"student": {"model": "./nowhere"}}, None, "^stages.0.student.model: ./nowhere does not exist"),
        ({"cache": "nowhere"}, None, "nowhere"),
    ],
)
def test_what_the_models_do_not_have_is_said_before_they_load(checkpoints, texts, tmp_path, stage, student, words):
    settings = {} if student is None else {"student": student}
    with pytest.raises(UserError, match=words) as caught:
        distill(recipe_of(checkpoints, texts, tmp_path / "run", stage, **settings), dry_run=True)
    assert len(str(caught.value).splitlines()) == 1


def test_it_is_said_with_the_recipes_line(checkpoints, texts, tmp_path, capsys):
    student = {"hybrid": {"ssm_layers": [0], "mixer": {0: "gated_delta"}, "gate": "open"}}
    path = tmp_path / "recipe.yaml"
    recipe_of(checkpoints, texts, tmp_path / "run", {}, student=student).save(path)
    (line,) = (i for i, text in enumerate(path.read_text().splitlines(), 1) if "gate: open" in text)
    assert main(["distill", str(path), "--dry-run"]) == 2
    assert f"{path}:{line}: student.hybrid.gate: got 'open', a constant gate" in capsys.readouterr().err
    student["hybrid"]["mixer"] = {0: "mamba2", 5: "mamba2"}
    with pytest.raises(UserError, match=r"student.hybrid.mixer: names layers \[5\], which student.hybrid.ssm_layers"):
        recipe_of(checkpoints, texts, tmp_path / "run", {}, student=student)


def test_a_source_has_a_loss_of_its_own(checkpoints, texts, tmp_path, capsys):
    """MiniLLM's two terms: reverse KL on the student's samples, and the cross entropy of plain text."""
    pairs = {"source": str(texts / "pairs.jsonl"), "kind": "pairs", "sampling_weight": 0.5}
    text = {"source": str(texts / "train_*.txt"), "sampling_weight": 0.5, "own_loss": {"ce_weight": 2.0}}
    stage = {"divergence": "reverse_kl", "on_policy": {"share": 1.0, "max_new_tokens": 8}, "log_every": 1}
    stage["policy_gradient"] = "normalized"
    recipe = recipe_of(checkpoints, texts, tmp_path / "run", stage, data={"train": [pairs, text]})
    distill(recipe, dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Beside them 2 x cross entropy of {texts / 'train_*.txt'}, per token of its own" in printed
    seen = []
    real = KnowledgeDistiller._logit_loss

    def watched(self, source, hidden, head, labels, weights, divisor, own):
        seen.append((source is None, self._now(own.ce_weight), int((labels != -100).sum())))
        return real(self, source, hidden, head, labels, weights, divisor, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnowledgeDistiller, "_logit_loss", watched)
        distill(recipe)
    of_text = [tokens for alone, weight, tokens in seen if alone and weight == 2.0]
    of_samples = [tokens for alone, weight, tokens in seen if not alone and weight == 0.0]
    assert len(of_text) + len(of_samples) == len(seen) and of_text and of_samples
    assert max(of_samples) <= 4 * 3 * 8 < min(of_text) * 4  # samples are short, the text's rows whole
    assert all(0 < m["loss"] < 40 and {"kd", "ce"} <= m["measured"].keys() for m in metrics_of(tmp_path / "run"))


TEACHERS = {
    "distill-deepseek": {"num_hidden_layers": 28, "hidden_size": 96},
    "distill-distilbert": {"num_hidden_layers": 32, "hidden_size": 80},
    "distill-tinybert": {"num_hidden_layers": 32, "hidden_size": 80},
    "distill-chat": {"num_hidden_layers": 28, "hidden_size": 64},
    "distill-gkd": {"num_hidden_layers": 24, "hidden_size": 64},
    "distill-reverse-kl": {"num_hidden_layers": 24, "hidden_size": 64},
    "mohawk-lite": {"num_hidden_layers": 16, "hidden_size": 64},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_shipped_recipes_fit_their_teachers(name, tmp_path, capsys):
    """The depths of the models they name, made narrow."""

    def save(folder, **settings):
        shape = {"vocab_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
        LlamaConfig(**shape, **settings).save_pretrained(folder)
        return folder

    overrides = [f"teacher.model={save(tmp_path / 'teacher', **TEACHERS[name])}"]
    recipe = DistillRecipe.load(shipped(name))
    if recipe.student.model is not None:
        overrides.append(f"student.model={save(tmp_path / 'student', num_hidden_layers=30, hidden_size=48)}")
    distill(DistillRecipe.load(shipped(name), overrides), dry_run=True)
    printed = capsys.readouterr().out
    assert all(stage.name[:6] in printed for stage in recipe.stages)


def test_what_changed_in_a_list_of_stages_is_named(checkpoints, texts, tmp_path):
    run = tmp_path / "run"
    with claimed(run, recipe_of(checkpoints, texts, run, {"name": "a"}, {"name": "b"})):
        pass

    def again(first=None, second=None, **settings):
        return claimed(
            run, recipe_of(checkpoints, texts, run, {"name": "a", **(first or {})}, *(second or []), **settings)
        )

    b = {"name": "b"}
    (run / "phases" / "a" / "checkpoint-1").mkdir(parents=True)
    changed = {"tokens": 2 * TOKENS, "hidden": {"weight": 2.0}, "save_every": 3}
    with pytest.raises(UserError, match=r"another stages\.0\.hidden, stages\.0\.tokens; choose"), again(changed, [b]):
        pass
    with pytest.raises(UserError, match="another number of stages; choose"), again(None, []):
        pass
    with again({"save_every": 3, "log_every": 7}, [{**b, "learning_rate": 1e-4}]):
        kept = DistillRecipe.load(run / "recipe.yaml").stages
        assert (kept[0].save_every, kept[0].log_every, kept[1].learning_rate) == (3, 7, 1e-4)
    (run / "phases" / "b" / "student").mkdir(parents=True)
    # no stage is trained again under a later one's student
    both = r"another stages\.0\.learning_rate, stages\.1\.learning_rate; choose"
    with pytest.raises(UserError, match=both), again({"learning_rate": 1e-4}, [b]):
        pass
    with pytest.raises(UserError, match=r"another stages\.1\.learning_rate; choose"), again({}, [b]):
        pass
    sources = {"train": [str(texts / "train_*.txt"), str(texts / "other.txt")]}
    with pytest.raises(UserError, match=r"another number of data\.train, stages\.1"), again({}, [b], data=sources):
        pass


def test_ablate_runs_every_variant_once(checkpoints, texts, tmp_path, capsys):
    recipe_of(checkpoints, texts, tmp_path / "unused", {"tokens": 2 * 4 * 32}).save(tmp_path / "r.yaml")
    rows = ablate(tmp_path / "r.yaml", ["temperature=1,2", "divergence=jsd"], output=tmp_path / "out")
    assert [row["name"] for row in rows] == ["temperature=1, divergence=jsd", "temperature=2, divergence=jsd"]
    assert all(row["tokens"] == 256 for row in rows)
    kls = [json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"][i]["texts"]["held_out"] for i in (0, 1)]
    assert kls[0] != kls[1]
    assert (tmp_path / "out" / "plots" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert "temperature=2" in (tmp_path / "out" / "ablation.md").read_text()
    capsys.readouterr()
    assert ablate(tmp_path / "r.yaml", ["temperature=1,2", "divergence=jsd"], output=tmp_path / "out") == rows
    assert "1 of 2" not in capsys.readouterr().out


def test_what_ablate_is_asked_for(checkpoints, texts, tmp_path):
    recipe = recipe_of(checkpoints, texts, tmp_path / "run", {}, {"name": "b"})
    assert variants_of(recipe, ["beta=0.1,0.2"], "stages")["beta=0.2"] == ["stages.0.beta=0.2", "stages.1.beta=0.2"]
    assert list(variants_of(recipe, ["stages.1.betas=[0.9, 0.95],[0.8, 0.9]"], "stages")) == [
        "stages.1.betas=[0.9, 0.95]",
        "stages.1.betas=[0.8, 0.9]",
    ]
    assert variants_of(recipe, ["seed=1,2"], "stages")["seed=1"] == ["seed=1"]
    for asked, words in (("beta", "not of the form"), ("nonsense=1", "no such key"), ("beta=1,1", "twice")):
        with pytest.raises(UserError, match=words):
            variants_of(recipe, [asked], "stages")


def test_what_a_plan_cannot_know_of_a_teacher_with_code_of_its_own_is_said(
    checkpoints, texts, tmp_path, monkeypatch, capsys
):
    """Such a teacher teaches a student of transformers' own classes; a student of its class could not be read again."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("COLUMNS", "1000")
    own = tmp_path / "own"
    shutil.copytree(checkpoints["big"], own)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config = json.loads((own / "config.json").read_text())
    changed = {"model_type": "mine", "auto_map": auto_map, "architectures": ["MineForCausalLM"]}
    (own / "config.json").write_text(json.dumps(config | changed))
    (own / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    data = recipe_of(checkpoints, texts, tmp_path / "run", {}).model_dump(mode="json")
    data["teacher"] = {"model": str(own), "trust_remote_code": True}
    with pytest.raises(UserError, match="student: MineForCausalLM is of code .*; name a student .* in student.model"):
        distill(DistillRecipe.from_dict(data), dry_run=True)
    data["student"] = {"model": str(checkpoints["wide"])}
    distill(DistillRecipe.from_dict(data), dry_run=True)
    said = capsys.readouterr().out
    assert f"Not known of teacher: {own} is run by Python code that comes with it." in said
    assert said.count("Not known of") == 1
    distill(DistillRecipe.from_dict(data))
    assert is_complete(tmp_path / "run" / "student")
    assert "Not known of" not in capsys.readouterr().out
    # what is not trusted is named by the field that would trust it
    data["teacher"], data["student"] = str(checkpoints["big"]), {"model": str(own)}
    with pytest.raises(UserError, match=r"^student.model: .* if you trust it, set student.trust_remote_code: true"):
        distill(DistillRecipe.from_dict(data), dry_run=True)
    data["student"], data["teachers"] = {"layers": "every_second"}, [{"model": str(own)}]
    with pytest.raises(UserError, match=r"^teachers.0: .* if you trust it, set teachers.0.trust_remote_code: true"):
        distill(DistillRecipe.from_dict(data), dry_run=True)


def test_a_stock_mamba_teaches_one_of_fewer_layers(tokenizer, texts, tmp_path, caplog):
    """Its class answers otherwise with padding or several tokens on a cache, which is not asked of it."""
    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=256,
                         eos_token_id=257)  # fmt: skip
    torch.manual_seed(0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    stage = {"name": "a", "tokens": TOKENS, "batch_size": 4, "sequence_length": 32}
    recipe = recipe_of({"big": tmp_path / "mamba"}, texts, tmp_path / "run", stage, student={"layers": [0]})
    distill(recipe)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["consistency"] == {} and len(results["decoding"]["student"]) > 0
    assert "is not measured: MambaForCausalLM of transformers does not" in caplog.text

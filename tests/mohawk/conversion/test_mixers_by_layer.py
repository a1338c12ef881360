"""Runs whose layers get different mixers: from the recipe's mapping through all phases, select and compose."""

import io
import json

import pytest
import torch
from rich.console import Console

from mohawk.cli import main
from mohawk.conversion.objectives import MixingObjective
from mohawk.conversion.plan import make_plan, print_plan
from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import convert
from mohawk.conversion.select import select
from mohawk.conversion.swap import keep_attention
from mohawk.core.json_files import read_json
from mohawk.errors import UserError
from mohawk.evaluation.run import evaluate_run
from mohawk.loading.describe import describe
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import MIXERS
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.models.test_mixers_by_layer import MIXED, ids, student_of

pytestmark = pytest.mark.usefixtures("cheap_training")
EVERYWHERE = {**MIXED, 2: "mamba2"}


def test_phase_1_trains_what_each_matrix_depends_on():
    teacher = tiny_teacher()
    student = hybrid_from_teacher(teacher, list(MIXED), MIXED)
    objective = MixingObjective(student, teacher)
    trained = {name.removeprefix("model.layers.") for name, _ in objective.trained()}
    for i, name in MIXED.items():
        outside = {f"{i}.self_attn.{part}" for part in MIXERS[name].outside_matrix}
        mixer = {f"{i}.self_attn.{part}" for part, _ in student.model.layers[i].self_attn.named_parameters()}
        assert {part for part in trained if part.startswith(f"{i}.self_attn.")} == mixer - outside
    x = ids(2, 12)
    inputs = dict(input_ids=x, position_ids=torch.arange(12).expand(2, 12), segment_ids=torch.zeros_like(x), labels=x)
    for _, loss in objective.losses(**inputs):
        loss.backward()
    missing = [name for name, p in objective.trained() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize("left, mixer", [((0, 1), {0: "kimi_delta", 1: "mamba2"}), ((3,), "gated_delta"), ((), "x")])
def test_attention_again(left, mixer, tmp_path):
    student, teacher = student_of(), tiny_teacher()
    kept = {i: student.model.layers[i] for i in left}
    composed = keep_attention(student, teacher, left)
    assert composed.config.ssm_layers == list(left) and (not left or composed.config.mixer == mixer)
    composed.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    for i, layer in kept.items():
        for name, value in layer.state_dict().items():
            assert torch.equal(again.model.layers[i].state_dict()[name], value)
    if not left:
        assert torch.equal(again(ids(1, 9)).logits, teacher(ids(1, 9)).logits)


@pytest.fixture
def recipe_of(tokenizer, tmp_path):
    """A function that makes a tiny run's recipe, the student's fields given."""
    teacher = tiny_teacher(vocab_size=258, bos_token_id=256, eos_token_id=257)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for i in range(20):
        text = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (tmp_path / f"train_{i}.txt").write_text(text * (1 + i % 4))
    phase = {"tokens": 256, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3}

    def make(*overrides, **student):
        return Recipe.from_dict(
            {
                "teacher": str(tmp_path / "teacher"),
                "student": {"ssm_layers": "all", "mixer": EVERYWHERE, **student},
                "data": {
                    "train": [str(tmp_path / "train_*.txt")], "validation_share": 0.1, "cache": str(tmp_path / "cache"),
                },
                "phases": {
                    "mixing": phase, "hidden": {**phase, "solve_tokens": 256, "match": "mixer_output"},
                    "end_to_end": {**phase, "gradient_accumulation": 1},
                },
                "evaluation": {
                    "sequence_length": 32, "batch_size": 4, "tokens": 128,
                    "longest": None, "contexts": [8], "decode_tokens": 2,
                    "prompt": "A cat", "continuation_tokens": 2,
                },
                "precision": "float32", "device": "cpu", "output": str(tmp_path / "run"),
            },
            overrides,
        )  # fmt: skip

    return make


def test_a_run_with_three_mixers(recipe_of, tmp_path, capsys):
    recipe = recipe_of()
    assert recipe.student.mixer == EVERYWHERE and recipe.student.gate is None
    convert(recipe)
    said = " ".join((told := capsys.readouterr().out).split())
    assert "4 of 4 layers become kimi_delta, mamba2 and gated_delta (4 heads x 8, state 8)" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    assert ["0", "kimi_delta", "q, k, v, o", "open"] in rows and ["3", "gated_delta", "q, k, v, o", "output"] in rows
    assert ["1", "mamba2", "q -> C, k -> B, v -> x, o -> out_proj", "open"] in rows
    assert "Export --to onnx, hybrid not bamba: its mixers are kimi_delta, mamba2 and gated_delta, Bamba's are" in said
    assert "4 kimi_delta, mamba2 and gated_delta and 0 attention layers" in (tmp_path / "run/report.md").read_text()
    assert read_json(tmp_path / "run/results.json")["behaviour"] == {}  # as evaluation.longest is null
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "  mixer:\n    0: kimi_delta\n    1: mamba2\n    2: mamba2\n    3: gated_delta\n" in written
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    student = HybridForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.config.mixer == EVERYWHERE
    assert [layer.mixer for layer in describe(tmp_path / "run" / "student").layers] == [EVERYWHERE[i] for i in range(4)]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--matrices", str(tmp_path / "train_0.txt"), "--tokens", "16"]) == 0
    said = capsys.readouterr().out
    assert all(f"layer {i}: {name}, " in said for i, name in EVERYWHERE.items())
    evaluate_run(tmp_path / "run")
    convert(Recipe.load(tmp_path / "run" / "recipe.yaml"))  # nothing is left to do
    with pytest.raises(UserError, match="student.mixer"):
        convert(recipe_of(mixer={**EVERYWHERE, 0: "mamba2"}))


def test_a_plan_counts_each_layers_own(recipe_of):
    """What phase 3 keeps for its backward pass, and parameters: means of students with one mixer each."""

    def planned(mixer):
        config = tiny_teacher(vocab_size=258).config
        plan = make_plan(recipe_of("activation_checkpointing=false", mixer=mixer, gate="output"), config)
        return plan.phases[-1].held["activations"], plan.phases[-1].trained

    mixed, alone = planned(EVERYWHERE), {name: planned(name) for name in EVERYWHERE.values()}
    assert len(set(alone.values())) == 3
    for found, *each in zip(mixed, *(alone[name] for name in EVERYWHERE.values()), strict=True):
        assert found == pytest.approx(sum(each) / 4, abs=4)


@pytest.mark.parametrize(
    "student, heads, can, cannot",
    [
        (
            {"mixer": "mamba2"},
            {},
            "bamba, granite, onnx, hybrid",
            {"gguf": "made with gate: output (and init: attention)"},
        ),
        ({"mixer": "mamba2", "gate": "output"}, {}, "bamba, granite, gguf, onnx, hybrid", {}),
        (
            {"mixer": "mamba2", "gate": "output"},
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24},
            "bamba with --pad-expand, granite with --pad-expand, gguf, onnx, hybrid",
            {},
        ),
        (
            {"mixer": "gated_delta"},
            {},
            "onnx, hybrid",
            {"bamba": "its mixers are gated_delta", "gguf": "is llama's; Qwen3.5"},
        ),
    ],
)
def test_a_plan_says_what_can_be_exported(recipe_of, student, heads, can, cannot, monkeypatch):
    """Before anything is trained, with the setting that decides it."""
    from mohawk.models.formats import bamba, granite

    for module in (bamba, granite):
        monkeypatch.setattr(module, "norms_groups_apart", lambda: True)
    recipe = recipe_of(ssm_layers="every_second", **student)
    console = Console(file=io.StringIO(), width=200)
    print_plan(make_plan(recipe, tiny_teacher(vocab_size=258, **heads).config), recipe, console)
    said = console.file.getvalue()
    assert f"Export --to {can}\n" in said
    told = dict(line.removeprefix("not ").split(": ", 1) for line in said.splitlines() if line.startswith("not "))
    assert told["qwen3_5"] and (student["mixer"] == "gated_delta" or set(told) == {"qwen3_5", *cannot})
    assert all(reason in told[name] for name, reason in cannot.items())


def test_select_and_compose_keep_each_layers_own(recipe_of, tmp_path):
    convert(recipe_of("phases.end_to_end=null"))
    run = tmp_path / "run"
    order = select(run, tokens=128)["rankings"]["kl"]["order"]
    left = sorted(order[:3])
    last = ("tokens=256", "batch_size=4", "sequence_length=32", "gradient_accumulation=1")
    sets = [word for one in last for word in ("--set", f"phases.end_to_end.{one}")]
    assert main(["compose", str(run), "--budget", "1", "--output", str(tmp_path / "composed"), *sets]) == 0
    composed = Recipe.load(tmp_path / "composed" / "recipe.yaml")
    assert composed.student.ssm_layers == left and composed.student.mixer == {i: EVERYWHERE[i] for i in left}
    trained = HybridForCausalLM.from_pretrained(run / "phases" / "hidden" / "student")
    start = HybridForCausalLM.from_pretrained(tmp_path / "composed" / "phases" / "hidden" / "student")
    assert [start.config.mixer_of(i) for i in left] == [EVERYWHERE[i] for i in left]
    for i in left:
        for name, value in trained.model.layers[i].state_dict().items():
            assert torch.equal(start.model.layers[i].state_dict()[name], value)
    assert main(["convert", str(tmp_path / "composed" / "recipe.yaml")]) == 0
    config = json.loads((tmp_path / "composed" / "student" / "config.json").read_text())
    kinds = {EVERYWHERE[i] for i in left}
    assert config["mixer"] == ({str(i): EVERYWHERE[i] for i in left} if len(kinds) > 1 else kinds.pop())


@pytest.mark.parametrize(
    "student, message",
    [
        (
            {"ssm_layers": [0, 1]},
            r"^recipe: student.mixer: names layers \[2, 3\], which student.ssm_layers does not replace; leave them",
        ),
        (
            {"ssm_layers": [0, 1, 2, 3], "mixer": {0: "mamba2"}},
            r"student.mixer: says nothing of layers \[1, 2, 3\], which student.ssm_layers replaces",
        ),
        ({"mixer": {0: "mamba2"}}, r"mixer: says nothing of layers \[1, 2, 3\], which are replaced"),
        ({"mixer": {**EVERYWHERE, 9: "mamba2"}}, r"mixer: names layers \[9\]"),
        ({"gate": "open"}, "gate: got 'open'"),
    ],
)
def test_what_a_plan_refuses(recipe_of, student, message):
    with pytest.raises(UserError, match=message):
        convert(recipe_of(**student), dry_run=True)


@pytest.mark.parametrize(
    "student, sets, line",
    [
        (
            "  mixer:\n    0: mamba2\n    9: mamba2\n",
            (),
            "{path}:4: student.mixer: says nothing of layers [1, 2, 3], which are replaced; name one for each of them",
        ),
        (
            "  ssm_layers: [0]\n  mixer:\n    0: mamba2\n    9: mamba2\n",
            (),
            "{path}:7: student.mixer: names layers [9], which student.ssm_layers does not replace; leave them out",
        ),
        (
            "  mixer: mamba2\n",
            ("student.ssm_layers=[7]",),
            "--set student.ssm_layers: got [7], but the",
        ),
        (
            "  mixer: gated_delta\n  gate: open\n",
            (),
            "{path}:5: student.gate: got 'open', a constant gate, which a gated_delta mixer has no bias for",
        ),
        (
            "  state_size: 3\n",
            (),
            "{path}:3: student: init 'attention' copies q and k into C and B, so state_size",
        ),
    ],
)
def test_what_does_not_fit_the_teacher_is_told_with_its_line(recipe_of, student, sets, line, tmp_path, capsys):
    recipe_of()  # and so the teacher and the texts
    recipe = tmp_path / "recipe.yaml"
    layers = "" if "ssm_layers" in student else "  ssm_layers: all\n"
    recipe.write_text(
        f"teacher: {tmp_path / 'teacher'}\ndata: {{train: ['{tmp_path}/train_*.txt'], cache: {tmp_path / 'cache'}}}\n"
        f"student:\n{student}{layers}output: {tmp_path / 'run'}\n"
    )
    words = [word for one in sets for word in ("--set", one)]
    assert main(["convert", str(recipe), "--dry-run", *words]) == 2
    told = capsys.readouterr().err.strip()
    assert line.format(path=recipe) in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "mixer, message",
    [
        ({0: "mamba3"}, "got a mapping; allowed: for layer 0 one of mamba2, .*, not the text 'mamba3'"),
        ({}, "got a mapping; allowed: mamba2, .*, or a mapping from each replaced layer to one of them"),
        ({"x": "mamba2"}, "got a mapping; allowed: a mapping whose keys are layer indices .* as the text 'x' is not"),
        ({-1: "mamba2"}, "got a mapping; allowed: a mapping whose keys are layer indices"),
        ({1: "mamba2", "01": "gated_delta"}, "got a mapping; allowed: .* layer indices .* as the text '01' is not"),
        ({"\u0662": "mamba2"}, "got a mapping; allowed: a mapping whose keys are layer indices"),
        (["mamba2"], r"got the list \[mamba2\]; allowed: mamba2"),
        ("mamba3", "got the text 'mamba3'; allowed: mamba2"),
    ],
)
def test_what_a_recipe_refuses(recipe_of, mixer, message):
    with pytest.raises(UserError, match=f"student.mixer: {message}"):
        recipe_of(mixer=mixer)


def test_a_layer_is_set_on_the_command_line(recipe_of):
    assert recipe_of("student.mixer.3=mamba2").student.mixer == {**EVERYWHERE, 3: "mamba2"}
    assert recipe_of("student.mixer={0: mamba2, 1: mamba2}").student.mixer == {0: "mamba2", 1: "mamba2"}

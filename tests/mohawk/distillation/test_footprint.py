"""The plans of distillations and prunings: bytes by what they are of, and the way that fits."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml

import mohawk.core.processes as processes
from mohawk.cli import main
from mohawk.conversion.footprint import Hardware, Strategy, footprint, kept_by, rounded_parameters
from mohawk.distillation.footprint import stage_footprint
from mohawk.distillation.plan import make_plan
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.runs import steps
from tests.models.conftest import tiny_teacher

STAGE = {"name": "a", "tokens": 4 * 64, "batch_size": 4, "sequence_length": 16}


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a teacher and text."""
    folder = tmp_path_factory.mktemp("place")
    teacher = tiny_teacher(vocab_size=258, num_hidden_layers=4, bos_token_id=256, eos_token_id=257)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "a.txt").write_text("some words\n" * 400)
    return folder


def data_of(place, **given) -> dict:
    return {
        "teacher": str(place / "teacher"), "data": {"train": [str(place / "a.txt")], "cache": str(place / "cache")},
        "device": "cpu", "precision": "float32", "output": str(place / "run"),
        "evaluation": {"sequence_length": 16, "tokens": 64, "longest": 64, "contexts": [4], "decode_tokens": 2,
                       "continuation_tokens": 2}, **given,
    }  # fmt: skip


def test_a_stage_of_logits_alone_needs_what_phase_3_does():
    """The formula that was held to measured runs (tests/mohawk/conversion/test_footprint.py)."""
    with torch.device("meta"):
        teacher = tiny_teacher()
        student = hybrid_from_teacher(teacher)
    trained = sum(p.numel() for p in student.parameters())
    for rows in (8, 64):
        phase = SimpleNamespace(batch_size=4, rows=rows, sequence_length=32)
        for strategy in (Strategy(), Strategy(2), Strategy(1, True), Strategy(2, True)):
            for itemsize in (4, 2):
                how = {"itemsize": itemsize, "strategy": strategy, "processes": 2}
                expected = footprint("end_to_end", phase, student, teacher, trained, teacher_bytes=2, **how)
                assert stage_footprint(phase, student, [(teacher, 2)], trained, **how) == expected


def planned(place, memory=2**40, **given):
    """Of a student of the teacher's own shape."""
    asked = {"student": {"scratch": True}, "stages": [STAGE | given.pop("stage", {})], **given}
    return make_plan(DistillRecipe.from_dict(data_of(place, **asked)), Hardware(2, memory))


@pytest.mark.parametrize(
    ("given", "teacher", "more"),
    [
        ({}, 1, ()),
        ({"teachers": [{"model": "TEACHER", "name": "b"}, {"model": "TEACHER", "name": "c"}]}, 3, ()),
        ({"stage": {"learn_from": "average", "ce_weight": 1.0}}, 2, ()),
        ({"stage": {"hidden": {}, "attention": {}}}, 1, ("matchings",)),
    ],
    ids=["logits", "three teachers", "average", "matchings"],
)
def test_what_stands_beside_the_student(given, teacher, more, place):
    given = copy.deepcopy(given)
    for one in given.get("teachers", ()):
        one["model"] = str(place / "teacher")
    held = planned(place, **given).needs[0].held
    weights = 4 * sum(p.numel() for p in tiny_teacher(vocab_size=258, num_hidden_layers=4).parameters())
    assert held["teacher"] == teacher * weights and all(held[name] > 0 for name in more)
    assert held["student"] == weights and held["optimizer"] == 2 * weights


def test_adapters_alone_have_moments(place):
    held = planned(place, student={"lora": {"rank": 2}}).needs[0].held
    layers = (module for name, module in tiny_teacher(vocab_size=258, num_hidden_layers=4).model.named_modules()
              if isinstance(module, torch.nn.Linear))  # fmt: skip
    assert held["optimizer"] == 8 * sum(2 * (module.in_features + module.out_features) for module in layers)


def test_what_accelerate_launch_was_told_is_planned(place, monkeypatch):
    """Its FSDP2 configuration shards where `sharding.kind: auto` alone would not."""
    for again in (False, True):
        monkeypatch.setattr(processes, "_wish", processes.Wish(activation_checkpointing=again))
        found = planned(place)
        assert found.sharded and found.needs[0].strategy == Strategy(2, again)
    watched = planned(place, stage={"hidden": {}, "attention": {}})  # which auto would not compute again
    assert watched.needs[0].strategy == Strategy(2, True) and watched.needs[0].memory > 0


def test_the_fastest_way_that_fits(place):
    whole = planned(place).needs[0]
    assert whole.strategy == Strategy() and not planned(place).sharded
    for room, strategy in ((whole.memory - 1, Strategy(1, True)), (1, Strategy(2, True))):
        found = planned(place, room)
        assert found.needs[0].strategy == strategy and found.sharded == (strategy.parts > 1)
    watched = planned(place, 1, stage={"attention": {}})  # whose layers must not run again
    assert watched.needs[0].strategy == Strategy(2)
    asked = planned(place, 1, sharding={"kind": "none"}, activation_checkpointing=False)
    assert asked.needs[0].strategy == Strategy() and not asked.sharded


def test_a_student_is_whole_while_it_samples_where_there_is_room(place):
    stage = {"stage": {"on_policy": {"share": 1.0}}, "sharding": {"kind": "full"}}
    tight = planned(place, 1, activation_checkpointing=False, **copy.deepcopy(stage)).needs[0]
    assert not tight.gathers and "samples" not in tight.held
    ample = planned(place, activation_checkpointing=False, **copy.deepcopy(stage)).needs[0]
    assert ample.gathers and ample.memory == tight.memory + ample.held["samples"]
    assert not planned(place, sharding={"kind": "full"}).needs[0].gathers


def test_an_average_of_adapters_in_parts_is_refused_by_the_plan(place):
    asked = {"student": {"lora": {"rank": 2}}, "stage": {"learn_from": "average", "ce_weight": 1.0}}
    assert not planned(place, **copy.deepcopy(asked)).sharded
    with pytest.raises(UserError, match=r"stages.0 \(a\): learn_from: average of adapters .* sharding.kind: none"):
        planned(place, 1, **asked)


def test_experts_are_in_float32_beside_products_in_16_bits():
    """Nothing of them is copied by autocast, and what a layer keeps for its backward pass is what torch saves."""
    teacher = tiny_teacher("mixtral", hidden_size=64, intermediate_size=96).train()
    tokens, widths = 2 * 32, {}
    layer = teacher.model.layers[1]
    own = {p.untyped_storage().data_ptr() for p in teacher.parameters()}

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            widths[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(2, 32, 64, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        kept = layer.mlp(hidden)
    del kept
    found = kept_by(layer, teacher.config, {2: (0, 0, 0)}, 0, tokens, 2)
    assert found == pytest.approx(sum(widths.values()), rel=0.15)
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    assert rounded_parameters(layer) == sum(p.numel() for p in layer.parameters()) - experts
    with torch.device("meta"):
        shape = tiny_teacher("mixtral")
    phase = SimpleNamespace(batch_size=4, rows=4, sequence_length=8)
    held = stage_footprint(phase, shape, [(shape, 2)], 1, itemsize=2, strategy=Strategy())
    of_experts = 4 * sum(p.numel() for p in shape.model.layers[0].mlp.experts.parameters())
    matrices = sum(p.numel() for p in shape.parameters() if p.dim() > 1) - shape.lm_head.weight.numel() - of_experts
    assert held["autocast copies"] == pytest.approx(2 * matrices, rel=0.02)  # and vectors of layers


RECIPES = {
    "distill": {"student": {"layers": "first:2"}, "stages": [STAGE]},
    "prune": {
        "prune": {"layers": 3}, "correct": {**STAGE, "name": "correct"}, "heal": {**STAGE, "name": "heal"},
        "convert": {"ssm_layers": [1], "mixing": {k: v for k, v in STAGE.items() if k != "name"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("command", RECIPES)
def test_a_plan_for_other_hardware(command, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data_of(place, **RECIPES[command])))
    options = ("--processes", "2", "--device-memory", "24GiB", "--set", "sharding.kind=full")
    assert main([command, str(path), "--dry-run", *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in 2 parts" in said and "optimizer" in said and "At 40% of 989 TFLOP/s on 2 devices" in said
    assert ("pruned model" in said) == (command == "prune")
    assert main([command, str(path), "--processes", "2"]) == 2
    assert "--processes is of --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("command", RECIPES)
def test_layers_are_computed_again_where_the_plan_does_not_fit_otherwise(command, place, tmp_path, monkeypatch):
    import mohawk.conversion.plan as plan

    asked = {}
    set_checkpointing = steps.set_checkpointing

    def noted(student, on):
        asked[len(asked)] = on
        set_checkpointing(student, on)

    monkeypatch.setattr(steps, "set_checkpointing", noted)
    monkeypatch.setattr(plan, "device_bytes", lambda device: 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data_of(place, **RECIPES[command]) | {"output": str(tmp_path / "run")}))
    assert main([command, str(path)]) == 0
    assert len(asked) == (1 if command == "distill" else 3) and all(asked.values())

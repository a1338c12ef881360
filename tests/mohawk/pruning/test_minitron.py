"""Pruning in plain Python, as a script has it."""

import runpy
import textwrap
from dataclasses import replace

import pytest
import torch

from mohawk import KnowledgeDistiller, MinitronPruner
from mohawk.models.cutting.sizes import sizes_of
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.pruning.baselines import random_importance
from mohawk.pruning.minitron import written_text
from mohawk.pruning.search import Costs
from tests.helpers.parameters import config_parameters
from tests.models.conftest import CUTTABLE, tiny_teacher

IDS = torch.randint(3, 97, (10, 24), generator=torch.Generator().manual_seed(0))


def test_as_a_script(tmp_path, monkeypatch, capsys):
    script = """
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from mohawk import KnowledgeDistiller, MinitronPruner

        torch.manual_seed(0)
        teacher = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3))
        ids = torch.randint(0, 64, (8, 16))
        target = sum(p.numel() for p in teacher.parameters()) * 0.6
        pruner = MinitronPruner(teacher=teacher, target_params=target, pruning_strategy="magnitude")
        student = pruner.prune_and_create_student()
        assert pruner.strategy == "magnitude"
        assert 0.97 * target <= sum(p.numel() for p in student.parameters()) <= target
        distiller = KnowledgeDistiller(teacher, student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            loss = distiller.compute_loss(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        student.save_pretrained("student")
        print(type(LlamaForCausalLM.from_pretrained("student")).__name__)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py")
    assert capsys.readouterr().out.strip() == "LlamaForCausalLM"


@pytest.mark.parametrize("family", CUTTABLE)
def test_every_family_meets_its_target(family):
    share = 0.4
    teacher = tiny_teacher(family)
    inside = config_parameters(teacher.config)[1]
    student = MinitronPruner(teacher, share, calibration=IDS, tolerance=0.1).prune()
    assert type(student) is type(teacher) and sizes_of(student.config).layers == 4  # width first
    total, less = config_parameters(student.config)
    assert 0.9 * share * inside <= less <= share * inside and total == sum(p.numel() for p in student.parameters())
    assert torch.isfinite(student(IDS[:2]).logits).all()


@pytest.mark.parametrize("strategy", ["importance", "magnitude", "random"])
@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_delta", {1: "mamba2", 3: "kimi_delta"}], ids=str)
def test_hybrids(mixer, strategy):
    teacher = hybrid_from_teacher(tiny_teacher(), [1, 3], mixer)
    inside = config_parameters(teacher.config)[1]
    student = MinitronPruner(teacher, 0.5, strategy, IDS, depth=3, tolerance=0.15).prune()
    assert student.config.num_hidden_layers == 3 and student.config.mixer_num_heads < teacher.config.mixer_num_heads
    assert 0.85 * 0.5 * inside <= config_parameters(student.config)[1] <= 0.5 * inside
    loss = KnowledgeDistiller(teacher, student).compute_loss(IDS)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_strategies_differ_and_repeat():
    teacher = tiny_teacher()
    cuts = [
        MinitronPruner(teacher, 0.5, s, IDS, tolerance=0.1).cut() for s in ("importance", "magnitude", "random") * 2
    ]
    assert cuts[:3] == cuts[3:] and cuts[0] != cuts[1] != cuts[2] != cuts[0]
    other = MinitronPruner(teacher, 0.5, "random", tolerance=0.1, seed=1).cut()
    assert other != cuts[2]


@pytest.mark.parametrize("layers", ["every_second", [0, 3], "first:2"])
def test_named_layers_to_a_target(layers):
    teacher = tiny_teacher()
    total = config_parameters(teacher.config)[0]
    pruner = MinitronPruner(teacher, total * 0.45, calibration=IDS, layers=layers, tolerance=0.1)
    assert pruner.cut().layers == {"every_second": [0, 2], "first:2": [0, 1]}.get(str(layers), [0, 3])
    assert 0.9 * 0.45 * total <= sum(p.numel() for p in pruner.prune().parameters()) <= 0.45 * total


def test_targets_of_several_kinds_are_met_together():
    teacher = tiny_teacher()
    own, context = sizes_of(teacher.config), 24
    whole = {kind: Costs(teacher.config, kind, context=context)(own, range(4)) for kind in ("memory", "flops")}
    limits = {"target_memory": 0.9 * whole["memory"], "target_flops": 0.6 * whole["flops"]}
    total = config_parameters(teacher.config)[0]
    pruner = MinitronPruner(
        teacher, strategy="random", depth=3, context=context, tolerance=0.1, target_params=0.9 * total, **limits
    )
    student = pruner.prune()
    cost = {kind: Costs(student.config, kind, context=context)(sizes_of(student.config), range(3)) for kind in whole}
    assert sum(p.numel() for p in student.parameters()) <= 0.9 * total and cost["memory"] <= limits["target_memory"]
    assert 0.9 * limits["target_flops"] <= cost["flops"] <= limits["target_flops"]
    for wrong, said in (
        ({"target_memory": -1}, "target_memory: got -1; allowed: a number above 0"),
        ({"target_flops": 1e6, "context": 0}, "context: got 0; allowed: a number of tokens"),
        ({"target_flops": 1e6, "sizes": own}, "give either target_params or sizes"),
    ):
        with pytest.raises(ValueError, match=said):
            MinitronPruner(teacher, **wrong)
    with pytest.raises(ValueError, match="target_memory: .*cannot be reached"):
        MinitronPruner(teacher, strategy="random", target_memory=10).prune()


def test_sizes_given_and_mistakes():
    teacher = tiny_teacher()
    sizes = replace(sizes_of(teacher.config), ffn=30, layers=3)
    assert sizes_of(MinitronPruner(teacher, sizes=sizes, calibration=IDS, layers="block").prune().config) == sizes
    total = config_parameters(teacher.config)[0]
    for options, said in (
        ({"target_params": 0.5, "strategy": "size"}, "strategy: got 'size'; allowed: importance, magnitude, random"),
        ({"target_params": 0.5, "width": "heads"}, "width: got 'heads'; allowed"),
        ({}, "either target_params or sizes"),
        ({"target_params": 0.5, "importance": random_importance(teacher.config, 0)}, "importance beside calibration"),
        (
            {
                "target_params": 0.5,
                "calibration": None,
                "strategy": "random",
                "importance": random_importance(teacher.config, 0),
            },
            "importance beside strategy 'random'",
        ),
        (
            {
                "target_params": 0.5,
                "calibration": None,
                "importance": random_importance(tiny_teacher(intermediate_size=40, num_hidden_layers=3).config, 0),
            },
            r"importance: scores of another model \(layers 3 for 4, ffn 40 for 48\); measure them of this one",
        ),
        ({"target_params": -1}, "got -1; allowed"),
        ({"target_params": "5"}, "target_params: got '5'; allowed: a number of parameters, at least 1000, or a share"),
        ({"target_params": 1.0}, "target_params: got 1.0; allowed"),
        ({"target_params": True}, "target_params: got True; allowed"),
        ({"target_params": 0.5, "strategy": "random", "pruning_strategy": "magnitude"}, "got 'magnitude' beside"),
        ({"target_params": 0.5, "depth": 0}, "depth: got 0; allowed: 1 to 4 layers, or None"),
        ({"target_params": 0.5, "depth": 2.5}, "depth: got 2.5; allowed"),
        ({"target_params": 0.5, "tolerance": 0}, "tolerance: got 0; allowed: a share above 0"),
        ({"target_params": 0.5, "depth": 3, "layers": "first:2"}, "'first:2' keeps 2, but depth is 3"),
        ({"sizes": sizes, "layers": [0]}, r"layers: \[0\] keeps 1, but sizes say 3"),
        ({"target_params": 0.5, "layers": torch.zeros(3)}, r"scores of shape \(3,\); allowed: \(4,\)"),
        ({"sizes": replace(sizes, heads=3)}, "heads: got 3 for kv_heads 2"),
    ):
        with pytest.raises(ValueError, match=said):
            MinitronPruner(teacher, **{"calibration": IDS, **options})
    for target, said in ((total, "already has"), (5000, "5,000 parameters cannot be reached.* down to 1: 5,000 par")):
        with pytest.raises(ValueError, match=said):
            MinitronPruner(teacher, target, calibration=IDS, width="ffn").prune()
    with pytest.raises(ValueError, match=r"calibration: got torch.float32 of shape \(2,\)"):
        MinitronPruner(teacher, 0.5, calibration=torch.zeros(2)).prune()


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_without_calibration_the_teacher_writes_its_own(kind, caplog):
    """As the call is written in one line; the same units each time, and nothing of the teacher's changes."""
    teacher = tiny_teacher() if kind == "llama" else hybrid_from_teacher(tiny_teacher(), [1, 2])
    teacher.train()
    teacher.generation_config.repetition_penalty = 9.0
    state = torch.get_rng_state()
    pruner = MinitronPruner(teacher, target_params=0.5, strategy="importance", tolerance=0.1)
    student = pruner.prune()
    assert caplog.text.count("64 x 128 tokens that the teacher writes itself") == 1
    assert pruner.importance.tokens == 64 * 128 and torch.isfinite(student(IDS[:2]).logits).all()
    assert torch.equal(torch.get_rng_state(), state) and teacher.training
    assert teacher.generation_config.repetition_penalty == 9.0
    text = written_text(teacher, 16, 12)
    assert torch.equal(text, written_text(teacher, 16, 12)) and not torch.equal(
        text, written_text(teacher, 16, 12, seed=1)
    )
    assert text.shape == (16, 12) and len(text[:, 1].unique()) > 4 and (text[:, 0] == teacher.config.bos_token_id).all()
    again = MinitronPruner(teacher, target_params=0.5, importance=pruner.importance, tolerance=0.1)
    assert again.cut() == pruner.cut()


def test_padded_batches_of_a_tokenizer():
    teacher = tiny_teacher()
    batch = {"input_ids": torch.cat([IDS, IDS[:, :9] * 0], 1), "attention_mask": torch.ones(10, 33, dtype=torch.int64)}
    batch["attention_mask"][:, 24:] = 0
    assert (
        MinitronPruner(teacher, 0.5, calibration=[batch]).cut() == MinitronPruner(teacher, 0.5, calibration=IDS).cut()
    )


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (IDS[:0], r"of shape \(0, 24\); allowed: int64"),
        ([], "no token"),
        (IDS + 97, "calibration: got token 19[0-9]; allowed: 0 to 96, the model's own"),
        (IDS - 99, "calibration: got token -9[0-9]; allowed"),
        ([[1, 2, 3]], "calibration: got a list in it; allowed: batches with input_ids"),
    ],
    ids=["no rows", "no batches", "beyond", "negative", "lists"],
)
def test_calibration_that_is_none(calibration, said):
    with pytest.raises(ValueError, match=said):
        MinitronPruner(tiny_teacher(), 0.5, calibration=calibration).prune()

"""Pruning in plain Python, as a script has it."""

import runpy
import textwrap
from dataclasses import replace

import pytest
import torch

from mohawk import KnowledgeDistiller, MinitronPruner
from mohawk.models.cut_sizes import parameter_count, sizes_of
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import FAMILIES, tiny_teacher

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
        student = MinitronPruner(teacher, target_params=target, strategy="importance", calibration=ids).prune()
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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_meets_its_target(family):
    share = 0.4
    teacher = tiny_teacher(family)
    inside = parameter_count(teacher.config)[1]
    student = MinitronPruner(teacher, share, calibration=IDS, tolerance=0.1).prune()
    assert type(student) is type(teacher) and sizes_of(student.config).layers == 4  # width first
    total, less = parameter_count(student.config)
    assert 0.9 * share * inside <= less <= share * inside and total == sum(p.numel() for p in student.parameters())
    assert torch.isfinite(student(IDS[:2]).logits).all()


@pytest.mark.parametrize("strategy", ["importance", "magnitude", "random"])
@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_hybrids(mixer, strategy):
    teacher = hybrid_from_teacher(tiny_teacher(), [1, 3], mixer)
    inside = parameter_count(teacher.config)[1]
    student = MinitronPruner(teacher, 0.5, strategy, IDS, depth=3, tolerance=0.15).prune()
    assert student.config.num_hidden_layers == 3 and student.config.mixer_num_heads < teacher.config.mixer_num_heads
    assert 0.85 * 0.5 * inside <= parameter_count(student.config)[1] <= 0.5 * inside
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


def test_sizes_given_and_mistakes():
    teacher = tiny_teacher()
    sizes = replace(sizes_of(teacher.config), ffn=30, layers=3)
    assert sizes_of(MinitronPruner(teacher, sizes=sizes, calibration=IDS, layers="block").prune().config) == sizes
    total = parameter_count(teacher.config)[0]
    for options, said in (
        ({"target_params": 0.5, "strategy": "size"}, "strategy: got 'size'; allowed: importance, magnitude, random"),
        ({"target_params": 0.5, "width": "heads"}, "width: got 'heads'; allowed"),
        ({}, "either target_params or sizes"),
        ({"target_params": 0.5, "calibration": None}, "needs calibration"),
        ({"target_params": -1}, "got -1; allowed"),
        ({"sizes": replace(sizes, heads=3)}, "heads: got 3 for kv_heads 2"),
    ):
        with pytest.raises(ValueError, match=said):
            MinitronPruner(teacher, **{"calibration": IDS, **options})
    for target, said in ((total, "already has"), (100, "100 parameters cannot be reached")):
        with pytest.raises(ValueError, match=said):
            MinitronPruner(teacher, target, calibration=IDS).prune()
    with pytest.raises(ValueError, match=r"calibration: got torch.float32 of shape \(2,\)"):
        MinitronPruner(teacher, 0.5, calibration=torch.zeros(2)).prune()

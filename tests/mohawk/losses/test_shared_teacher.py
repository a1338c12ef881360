"""Teacher and student that share parameters: an adapter and what it is around, modules of one in the other."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from mohawk import AttentionMatch, HiddenMatch, KnowledgeDistiller, RationaleDistiller, match_attention, match_hidden
from mohawk.losses.hf_trainer import DistillationTrainer
from mohawk.losses.teachers import Ensemble, ModelTeacher
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.mohawk.losses.test_heads import moved
from tests.mohawk.losses.test_hf_trainer import arguments, rows

peft = pytest.importorskip("peft")
IDS = torch.randint(2, 250, (3, 9), generator=torch.Generator().manual_seed(0))


def adapted(make_llama, kind="llama", **settings):
    """(a copy of the base, the base, the student around it), the adapter away from zero, in training mode."""
    base = make_llama(seed=2, attention_dropout=0.5)
    base = base if kind == "llama" else hybrid_from_teacher(base, ssm_layers=[1])
    apart = copy.deepcopy(base).eval()
    settings = {"target_modules": ["q_proj", "lm_head"], **settings}
    student = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
    return apart, base, moved(student).train()


def by_hand(teacher, student):
    """Mean KL over the tokens from the models' own logits."""
    with torch.no_grad():
        target = teacher(IDS).logits[:, :-1].log_softmax(-1)
    log_q = student(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return F.kl_div(log_q, target, log_target=True, reduction="sum") / log_q[..., 0].numel()


@pytest.mark.parametrize("given", ["base", "student", "teacher", "ensemble"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_the_teacher_is_the_base_without_the_adapter(kind, settings, given, make_llama):
    apart, base, student = adapted(make_llama, kind, **settings)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    # one part of the adapter is frozen by its owner, and stays so
    frozen = next(p for name, p in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    modes = {name: module.training for name, module in student.named_modules()}
    teacher = {
        "base": lambda: base,
        "student": lambda: student,
        "teacher": lambda: ModelTeacher(base, micro_batch=2),
        "ensemble": lambda: Ensemble([ModelTeacher(base), ModelTeacher(base)]),
    }[given]()
    distiller = KnowledgeDistiller(teacher, student)
    torch.manual_seed(0)
    loss = distiller.compute_loss(IDS)
    torch.manual_seed(0)
    truth = by_hand(apart, student)
    assert truth > 0.1
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-6)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == before
    assert {name: module.training for name, module in student.named_modules()} == modes
    trained = [p for p in student.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(truth, trained), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8
        assert b.abs().sum() > 0


BESIDE = {
    "norms": ({}, lambda name: "norm" in name, "5 parameters that train (the first: base_model.model.model.layers.0."),
    "biases": ({"bias": "all"}, lambda name: False, "parameters that train (the first: base_model.model.model.layers"),
    "adapter": ({}, lambda name: False, None),
    "copies": ({"modules_to_save": ["embed_tokens"]}, lambda name: False, None),
    "tokens": ({"trainable_token_indices": [3, 5]}, lambda name: False, None),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_trains_beside_the_adapter_is_the_teachers_too_and_said(case, make_llama, caplog):
    settings, beside, said = BESIDE[case]
    base = make_llama(seed=2, attention_bias=True)
    student = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **settings))
    for name, parameter in student.named_parameters():
        if beside(name):
            parameter.requires_grad_(True)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    with caplog.at_level(logging.WARNING):
        KnowledgeDistiller(base, student)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == before
    if said is None:
        assert not caplog.text
    else:
        assert said in caplog.text and "give the teacher a copy" in caplog.text
        caplog.clear()
        KnowledgeDistiller(copy.deepcopy(base), moved(student))  # nothing of it is shared
        assert not caplog.text


def test_layers_are_those_without_the_adapter(make_llama):
    apart, base, student = adapted(make_llama)
    student.eval()
    hidden, attention = HiddenMatch([(0, 0), (1, 1)], 32, 32), AttentionMatch([(0, 0), (1, 1)])
    matchings = {"hidden": match_hidden(hidden), "attention": match_attention(attention, weight=2.0)}
    ours, theirs = (KnowledgeDistiller(teacher, student, matchings=matchings) for teacher in (base, apart))
    loss = ours.compute_loss(IDS)
    torch.testing.assert_close(loss, theirs.compute_loss(IDS))
    assert loss > KnowledgeDistiller(apart, student).compute_loss(IDS)


def test_it_trains_in_trainer(make_llama, tmp_path):
    """Gradient checkpointing runs layers again in the backward pass, where the adapter has to be on."""
    updates = []
    for shared in (True, False):
        apart, base, student = adapted(make_llama)
        for module in student.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = DistillationTrainer(
            model=student, teacher=base if shared else apart, args=arguments(tmp_path, **settings), train_dataset=rows()
        )
        trainer.train()
        updates.append({name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad})
    assert len(updates[0]) == 6
    for name, parameter in updates[0].items():
        torch.testing.assert_close(parameter, updates[1][name], rtol=1e-4, atol=1e-6)


def test_the_students_embedding_trains_though_it_is_the_teachers(make_llama, caplog):
    teacher, student = make_llama(seed=1), make_llama(seed=2)
    student.model.embed_tokens = teacher.model.embed_tokens
    with caplog.at_level(logging.WARNING):
        distiller = KnowledgeDistiller(teacher, student)
    assert "share 1 parameters that train (the first: model.embed_tokens.weight)" in caplog.text
    own = {id(p) for p in student.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters() if id(p) not in own)
    distiller.compute_loss(IDS).backward()
    assert student.model.embed_tokens.weight.grad.abs().sum() > 0
    # frozen by its owner, it stays frozen and is nothing to warn of
    caplog.clear()
    student.model.embed_tokens.weight.requires_grad_(False)
    KnowledgeDistiller(teacher, student)
    assert not caplog.text and not student.model.embed_tokens.weight.requires_grad
    # another parameter in the same memory
    student.model.embed_tokens = torch.nn.Embedding(258, 32)
    student.model.embed_tokens.weight.data = teacher.model.embed_tokens.weight.data
    KnowledgeDistiller(teacher, student)
    assert "model.embed_tokens.weight" in caplog.text and student.model.embed_tokens.weight.requires_grad


def test_a_teacher_that_shares_nothing_is_frozen(make_llama, caplog):
    teacher, student = make_llama(seed=1).train(), make_llama(seed=2)
    KnowledgeDistiller(teacher, student)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters()) and not caplog.text


def test_adapters_shared_in_another_way_are_refused(make_llama):
    _, base, student = adapted(make_llama)
    other = make_llama(seed=5)
    other.lm_head = base.lm_head  # adapted
    with pytest.raises(ValueError, match="share adapters"):
        KnowledgeDistiller(other, student)
    plain = make_llama(seed=2)
    with pytest.raises(ValueError, match="the student itself"):
        KnowledgeDistiller(plain, plain)


def test_rationales_with_a_shared_teacher(make_llama, tokenizer):
    apart, base, student = adapted(make_llama)
    student.eval()
    texts = (["ab", "c"], ["yes", "no"], ["because", None])
    options = {"kd_weight": 1.0, "temperature": 2.0}
    shared = RationaleDistiller(student, tokenizer, teacher=base, **options).compute_loss(*texts)
    alone = RationaleDistiller(student, tokenizer, teacher=apart, **options).compute_loss(*texts)
    torch.testing.assert_close(shared, alone)
    shared.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)

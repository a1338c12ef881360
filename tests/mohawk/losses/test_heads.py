"""A head's weight is what its module computes with, peft's adapters included: beside the module, with gradients."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mohawk import KnowledgeDistiller, kd_loss
from mohawk.data.next_tokens import next_labels
from mohawk.errors import UserError
from mohawk.losses.heads import Head, final_hidden_states, vocabulary_rows
from mohawk.models.from_teacher import hybrid_from_teacher

peft = pytest.importorskip("peft")
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "elsewhere": {"target_modules": ["q_proj"]},
}
pytestmark = pytest.mark.filterwarnings("ignore::peft.PeftWarning" if hasattr(peft, "PeftWarning") else "ignore")


def moved(model, seed=0):
    """The model with its trainable parameters away from where they began."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g).to(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_head_is_its_module(kind, dtype, make_llama):
    model = make_llama(seed=2, tie_word_embeddings=kind == "tokens").to(dtype)
    model = moved(peft.get_peft_model(model, peft.LoraConfig(r=4, **ADAPTERS[kind]))).train()
    module = model.get_output_embeddings()
    hidden = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    truth = module(hidden)
    head = Head.of(model)
    given = head.student(hidden)
    ours = torch.nn.functional.linear(given["student_hidden"], given["student_head"], given["student_bias"])
    limit = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]

    def near(a, b, limit=limit):
        return bool((a.double() - b.double()).norm() <= limit * b.double().norm())

    single = max(limit, 2e-6)  # `logits` are float32
    assert near(ours, truth) and near(head.logits(hidden), truth, single)
    inputs = [hidden, *(p for p in model.parameters() if p.requires_grad)]
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((truth * upstream).sum(), inputs, allow_unused=True)
    got = torch.autograd.grad((ours * upstream).sum(), inputs, allow_unused=True)
    reached = 0
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        reached += a is not None
        assert a is None or near(a, b)
    assert reached == {"elsewhere": 1, "whole": 2, "tokens": 2, "dora": 4, "with a bias": 4}.get(kind, 3)
    assert vocabulary_rows(model) == 258
    with model.disable_adapter(), torch.no_grad():
        assert near(Head.of(model).logits(hidden), module(hidden), single)
    if kind in ("lora", "dora"):
        merged = model.merge_and_unload()
        assert near(Head.of(merged).logits(hidden), truth, single)


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_the_distillers_loss_and_gradients_are_of_the_models_logits(kind, make_llama):
    ids = torch.randint(2, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    teacher = make_llama(seed=1, hidden_size=48)
    base = make_llama(seed=2)
    base = base if kind == "llama" else hybrid_from_teacher(base, ssm_layers=[1])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    student = moved(peft.get_peft_model(base, config)).train()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    loss = KnowledgeDistiller(teacher, student, temperature=2.0, ce_weight=0.3).compute_loss(ids)
    labels = next_labels({"labels": ids})
    truth = kd_loss(
        student(input_ids=ids).logits, teacher(ids).logits, labels, temperature=2.0, ce_weight=0.3, backend="reference"
    )
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(x, list(trained.values())) for x in (loss, truth))
    for name, a, b in zip(trained, got, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8, name
    assert any("lm_head" in name for name in trained)


def test_a_teacher_with_an_adapted_head(make_llama):
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    teacher = peft.get_peft_model(make_llama(seed=1), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    teacher, student = moved(teacher), make_llama(seed=2)
    truth = kd_loss(student(ids).logits, teacher(input_ids=ids).logits, next_labels({"labels": ids}))
    torch.testing.assert_close(KnowledgeDistiller(teacher, student).compute_loss(ids), truth, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1),
            "dropout of 0.1, so that its logits are not hidden states times a weight; set lora_dropout to 0, or leave",
        ),
        (peft.VeraConfig(r=4, target_modules=["lm_head"]), "vera.*not supported here; leave"),
        (
            peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["lm_head"]),
            "adapted by peft.tuners.adalora.layer.SVDLinear, which is not supported here; leave",
        ),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3.*not supported"),
        (peft.LoHaConfig(r=4, target_modules=["lm_head"]), "loha.*not supported"),
    ],
)
def test_what_is_no_weight_is_refused(config, words, make_llama):
    student = peft.get_peft_model(make_llama(seed=2), config).train()
    with pytest.raises(UserError, match=words) as caught:
        KnowledgeDistiller(make_llama(seed=1), student).compute_loss(torch.arange(2, 12)[None])
    assert "\n" not in str(caught.value) and "leave the output embedding out" in str(caught.value)
    if config.peft_type == "LORA":  # without dropout, as in evaluation, there is one
        assert Head.of(student.eval()).weight.shape == (258, 32)


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_tokens_of_a_models_own_are_refused(kind, who, make_llama):
    prompted = peft.get_peft_model(make_llama(seed=2), PROMPTS[kind])
    models = (prompted, make_llama(seed=1)) if who == "teacher" else (make_llama(seed=1), prompted)
    with pytest.raises(UserError, match="has 13 states for 10 tokens, as with prompt tuning.*such as LoRA") as caught:
        KnowledgeDistiller(*models).compute_loss(torch.arange(2, 12)[None])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    ],
)
def test_other_adapters_of_the_layers_are_trained(config, make_llama):
    """Prefix tuning has keys and values of its own in front, but no states."""
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    student, teacher = moved(peft.get_peft_model(make_llama(seed=2), config)).train(), make_llama(seed=1)
    loss = KnowledgeDistiller(teacher, student).compute_loss(ids)
    truth = kd_loss(student(input_ids=ids).logits, teacher(ids).logits, next_labels({"labels": ids}))
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters() if p.requires_grad)


def test_packed_weights_are_refused(make_llama):
    model = make_llama()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(258, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="holds packed weights .*unquantised"):
        Head.of(model)


def test_final_hidden_states_behind_an_adapter(make_llama, tmp_path):
    model = moved(peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, target_modules=["lm_head"])))
    ids = torch.arange(2, 14)[None]
    hidden = final_hidden_states(model, {"input_ids": ids})
    torch.testing.assert_close(Head.of(model).logits(hidden), model(input_ids=ids).logits)
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, Head.of(model).logits(hidden), rtol=1e-4, atol=1e-5)


TINY = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
RECURRENT = {
    "rwkv": lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(**TINY, attention_hidden_size=32)),
    "xlstm": lambda: transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**TINY, num_heads=4)),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **{**TINY, "num_hidden_layers": 3}, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1,
            lru_width=32, attention_window_size=8, head_dim=8,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrences_without_a_mask_are_padded_on_the_right(kind, make_llama):
    """Padding in front is refused; behind, the loss is that of each row by itself."""
    torch.manual_seed(0)
    student, teacher = RECURRENT[kind]().eval(), make_llama(seed=1)
    ids = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for one, other in ((teacher, student), (student, teacher)):
        distiller = KnowledgeDistiller(one, other, ce_weight=0.5)
        with pytest.raises(UserError, match=rf"^{type(student).__name__} reads padding .*; pad on the right [^\n]*$"):
            distiller.compute_loss(ids, attention_mask=mask)
        found = distiller.compute_loss(ids, attention_mask=mask.flip(1))
        parts = []
        for row in (ids[:1], ids[1:, :5]):
            p, q = (m(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1) for m in (one, other))
            parts.append((p.exp() * (p - q)).sum(-1) - 0.5 * q.gather(-1, row[0, 1:, None]).squeeze(-1))
        torch.testing.assert_close(found, torch.cat(parts).mean(), rtol=1e-4, atol=1e-5)

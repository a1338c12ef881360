"""Losses here predict the next token of a text from those before it: what does something else is refused by name."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    WhisperConfig,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from mohawk.errors import UserError
from mohawk.loading.models import load_config, load_teacher
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.heads import final_hidden_states
from mohawk.losses.hf_trainer import DistillationTrainer
from mohawk.losses.on_policy import OnPolicy
from mohawk.losses.rationales import RationaleDistiller
from mohawk.losses.teachers import Ensemble, ModelTeacher
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.pruning.minitron import MinitronPruner

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 258}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 258, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SEVERAL = "an encoder and a decoder"
MADE = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**BERT)), "an encoder, in which each token sees those behind it too"),
    "bert_lm_head": (lambda: BertLMHeadModel(BertConfig(**BERT)), "an encoder, in which"),
    "bert_masked_decoder": (lambda: BertForMaskedLM(BertConfig(**BERT, is_decoder=True)), "fills in masked tokens"),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=258)
        ),
        SEVERAL,
    ),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART)), SEVERAL),
    "whisper": (lambda: WhisperForConditionalGeneration(WhisperConfig(**BART)), SEVERAL),
    "whisper_decoder": (lambda: WhisperForCausalLM(WhisperConfig(**BART)), "made for input_features, not for text"),
}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def other(request):
    make, what = MADE[request.param]
    torch.manual_seed(0)
    return make().eval(), what


def test_classes_refuse_what_is_no_decoder(other, make_llama, tokenizer, tmp_path):
    model, what = other
    llama = make_llama()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    refused = {
        "KnowledgeDistiller's teacher": lambda: KnowledgeDistiller(model, llama),
        "KnowledgeDistiller's student": lambda: KnowledgeDistiller(llama, model),
        "an ensemble": lambda: Ensemble([ModelTeacher(llama), ModelTeacher(model)]),
        "DistillationTrainer's teacher": lambda: DistillationTrainer(model=llama, args=arguments, teacher=model),
        "RationaleDistiller's student": lambda: RationaleDistiller(model, tokenizer),
        "RationaleDistiller's teacher": lambda: RationaleDistiller(llama, tokenizer, teacher=model, kd_weight=1.0),
        "OnPolicy": lambda: OnPolicy(model, tokenizer),
        "evaluation": lambda: final_hidden_states(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}),
    }
    for where, call in refused.items():
        if where == "evaluation" and what == SEVERAL:
            continue  # their forward itself asks for more than ids
        with pytest.raises(UserError, match=what) as caught:
            call()
        assert type(model).__name__ in str(caught.value) and "\n" not in str(caught.value), where
    for call in (
        lambda: hybrid_from_teacher(model, [0]),
        lambda: MinitronPruner(model, target_params=0.5).sizes,
    ):
        with pytest.raises(ValueError, match="model_type '(bert|t5|bart|whisper)' cannot be") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_checkpoints_are_refused_by_their_configuration(other, tmp_path):
    """Before their weights are looked at."""
    model, what = other
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for load in (load_config, load_teacher):
        with pytest.raises(UserError, match=r"^teacher: .* is a \w+ model(: it|.*ForCausalLM)") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        assert what in str(caught.value) or type(model).__name__ == "BertForMaskedLM"


def test_decoders_of_all_kinds_pass(make_llama):
    """A BERT whose layers look back, and a hybrid."""
    bert = BertLMHeadModel(BertConfig(**BERT, is_decoder=True)).eval()
    hybrid = hybrid_from_teacher(make_llama(), [1])
    ids = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    for student in (bert, hybrid):
        assert torch.isfinite(KnowledgeDistiller(make_llama(), student).compute_loss(ids))


def test_attention_that_looks_ahead_is_refused(make_llama):
    student = make_llama()
    student.config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="student: got LlamaForCausalLM: its attention is not causal"):
        KnowledgeDistiller(make_llama(), student)


AHEAD = {
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=258, d_model=32, n_layer=2, n_head=4, d_inner=48)),
    "cpmant": lambda: CpmAntForCausalLM(
        CpmAntConfig(vocab_size=258, hidden_size=32, dim_ff=48, num_hidden_layers=2, num_attention_heads=4, dim_head=8)
    ),
    "bert_generation": lambda: BertGenerationDecoder(BertGenerationConfig(**BERT)),
}


@pytest.mark.parametrize("kind", AHEAD)
def test_models_that_look_ahead_are_found_by_what_they_do(kind, make_llama):
    """Neither their names nor their configurations say so; one is in training mode, as a student is."""
    torch.manual_seed(0)
    model = AHEAD[kind]().train()
    ids = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    modes = [module.training for module in model.modules()]
    for teacher, student in ((make_llama(), model), (model, make_llama())):
        distiller = KnowledgeDistiller(teacher, student)
        with pytest.raises(
            UserError, match=rf"^model: got {type(model).__name__}: it is not causal.*\.\.\.ForCausal"
        ) as e:
            distiller.compute_loss(ids, attention_mask=(ids.cumsum(1) > ids[:, :1]).long())
        assert "\n" not in str(e.value)
        if student is model:
            assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("side", ["left", "right"])
def test_dropout_padding_and_experts_are_no_look_ahead(side, make_llama):
    torch.manual_seed(0)
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )
    )  # fmt: skip
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(4, 9)] = 0
    for student in (make_llama(attention_dropout=0.5).train(), experts.train(), experts.to(torch.bfloat16)):
        before, modes = torch.get_rng_state(), [module.training for module in student.modules()]
        final_hidden_states(student, {"input_ids": ids, "attention_mask": mask})
        assert [module.training for module in student.modules()] == modes
        torch.set_rng_state(before)
        again = final_hidden_states(student, {"input_ids": ids, "attention_mask": mask})  # checked by now
        torch.set_rng_state(before)
        torch.testing.assert_close(again, final_hidden_states(student, {"input_ids": ids, "attention_mask": mask}))

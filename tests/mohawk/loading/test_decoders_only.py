"""Losses here predict the next token of a text from those before it: what does something else is refused by name."""

import contextlib

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    Gemma4AssistantConfig,
    Gemma4TextConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    TrOCRConfig,
    TrOCRForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mohawk.errors import UserError
from mohawk.generation.decoding import Decoding, LocalTeacher
from mohawk.loading.configs import load_config
from mohawk.loading.models import load_teacher
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.heads import final_hidden_states
from mohawk.losses.hf_trainer import DistillationTrainer
from mohawk.losses.on_policy import OnPolicy
from mohawk.losses.rationales import RationaleDistiller
from mohawk.losses.teachers import AverageTeacher, Ensemble, ModelTeacher
from mohawk.models.families import other_than_decoder
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.pruning.minitron import MinitronPruner
from mohawk.teacher_cache.writer import write_cache

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 258}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 258, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 258}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}
SEVERAL = "an encoder and a decoder"
READS = "a decoder whose layers read an encoder's states"
AHEAD = "not causal: each token sees those behind it too"
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
    "bart_decoder": (lambda: BartForCausalLM(BartConfig(**BART)), READS),
    "bert_cross": (lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True)), READS),
    "gpt2_cross": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=258, add_cross_attention=True, bos_token_id=1,
                       eos_token_id=2)
        ),
        READS,
    ),
    "trocr": (
        lambda: TrOCRForCausalLM(
            TrOCRConfig(
                d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=258,
                cross_attention_hidden_size=32,
            )
        ),
        "decoder of an encoder of images",
    ),
    "git": (
        lambda: GitForCausalLM(GitConfig(**TINY, intermediate_size=48, vision_config=VISION)), "made to describe images"
    ),
    "moshi": (lambda: MoshiForCausalLM(MoshiConfig(**TINY, ffn_dim=48)), "made for speech"),
    "xlnet": (
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=258, d_model=32, n_layer=2, n_head=4, d_inner=48)), AHEAD
    ),
    "cpmant": (
        lambda: CpmAntForCausalLM(
            CpmAntConfig(
                vocab_size=258, hidden_size=32, dim_ff=48, num_hidden_layers=2, num_attention_heads=4, dim_head=8
            )
        ),
        AHEAD,
    ),
    "bert_generation": (
        lambda: BertGenerationDecoder(BertGenerationConfig(**BERT)), "an encoder, in which each token sees those behind"
    ),
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
        "LocalTeacher": lambda: LocalTeacher(model, tokenizer, Decoding()),
        "OnPolicy": lambda: OnPolicy(model, tokenizer),
        "evaluation": lambda: final_hidden_states(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}),
    }
    for where, call in refused.items():
        with pytest.raises(UserError, match=what) as caught:
            call()
        assert type(model).__name__ in str(caught.value) and "\n" not in str(caught.value), where
    for call in (
        lambda: hybrid_from_teacher(model, [0]),
        lambda: MinitronPruner(model, target_params=0.5).sizes,
    ):
        with pytest.raises(ValueError, match=rf"model_type '{model.config.model_type}' cannot be") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_decoders_without_an_output_embedding_are_refused_by_name(kind, make_llama, tokenizer, tmp_path):
    """A body alone, as AutoModel loads it, and one that classifies, before the first loss is asked for."""
    llama = make_llama()
    model = kind(llama.config)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for call in (
        lambda: KnowledgeDistiller(model, llama),
        lambda: KnowledgeDistiller(None, model, kd_weight=0.0, ce_weight=1.0),
        lambda: AverageTeacher(model, 0.9),
        lambda: DistillationTrainer(model=model, args=arguments, teacher=llama),
        lambda: RationaleDistiller(llama, tokenizer, teacher=model, kd_weight=1.0),
        lambda: LocalTeacher(model, tokenizer, Decoding()),
        lambda: OnPolicy(model, tokenizer),
        lambda: write_cache(tmp_path / "cache", model, [{"input_ids": torch.arange(4)}], k=4),
    ):
        with pytest.raises(UserError, match=rf"{kind.__name__}.* no output embedding") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_checkpoints_are_refused_by_their_configuration(other, tmp_path):
    """Before their weights are looked at."""
    model, what = other
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for load in (load_config, load_teacher):
        with pytest.raises(UserError, match=r"^teacher: .* is a [\w-]+ model(: it|.*ForCausalLM)") as caught:
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


def test_of_all_that_transformers_loads_as_a_decoder_these_are_refused():
    """By the configuration that each kind of model has by default."""
    plain = Gemma4TextConfig(num_kv_shared_layers=30, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    made = {Gemma4AssistantConfig: {"text_config": plain}}  # one that has no default
    kinds = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        # releases differ in what has defaults
        with contextlib.suppress(TypeError, StrictDataclassFieldValidationError):
            kinds[kind.model_type] = kind(**made.get(kind, {}))
    assert len(kinds) > 100
    refused = {name for name, config in kinds.items() if other_than_decoder(config)}
    encoders = {
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xmod",
    }  # fmt: skip
    with_encoders = {
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
        "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
    }  # fmt: skip
    others = {"git", "moshi", "gemma4_assistant", "gemma4_unified_assistant", "xlnet", "cpmant"}
    assert refused == (encoders | with_encoders | others) & kinds.keys()


class BothWays(LlamaForCausalLM):
    """Causal by its name and its configuration, and not by what it does."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        everything = torch.zeros(len(input_ids), 1, *[input_ids.shape[1]] * 2)
        return super().forward(input_ids=input_ids, attention_mask=everything, **kwargs)


@pytest.fixture
def both_ways(make_llama):
    causal = make_llama(3)
    model = BothWays(causal.config)
    model.load_state_dict(causal.state_dict())
    return model.train()  # as a student is


def test_models_that_look_ahead_are_found_by_what_they_do(both_ways, make_llama, tokenizer, tmp_path):
    """Before anything is trained, wherever a model is given."""
    llama, modes = make_llama(), [module.training for module in both_ways.modules()]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    before = torch.get_rng_state()
    refused = {
        "student": lambda: KnowledgeDistiller(llama, both_ways),
        "teacher": lambda: KnowledgeDistiller(both_ways, llama),
        "on_policy: the student": lambda: OnPolicy(both_ways, tokenizer),
        "model": lambda: final_hidden_states(both_ways, {"input_ids": torch.ones(1, 4, dtype=torch.long)}),
    }
    more = {
        "student": lambda: RationaleDistiller(both_ways, tokenizer),
        "teacher": lambda: DistillationTrainer(model=llama, args=arguments, teacher=both_ways),
    }
    for calls in (refused, more):
        for who, call in calls.items():
            with pytest.raises(UserError, match=rf"^{who}: got BothWays: it is not causal.*\.\.\.ForCausal") as caught:
                call()
            assert "\n" not in str(caught.value)
        assert [module.training for module in both_ways.modules()] == modes
        assert calls is more or torch.equal(torch.get_rng_state(), before)


def test_checkpoints_that_look_ahead_are_found_when_they_are_loaded(make_llama, monkeypatch, tmp_path):
    """As code that comes with a checkpoint may make a model do."""
    from transformers import AutoModelForCausalLM

    make_llama().save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def loaded(name, **options):
        made, info = load(name, **options)
        made.__class__ = BothWays
        return made, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(UserError, match="^teacher: got BothWays: it is not causal"):
        load_teacher(tmp_path)


def test_what_cannot_be_run_yet_is_found_by_its_first_pass(both_ways, make_llama):
    """A model without its weights, say, or one whose kernels want another device."""
    values, run = both_ways.state_dict(), type(both_ways).forward
    empty = BothWays(both_ways.config).to("meta")
    distillers = [KnowledgeDistiller(make_llama(), empty)]
    empty.load_state_dict(values, assign=True)
    empty.model.rotary_emb = both_ways.model.rotary_emb  # its frequencies are no part of a checkpoint

    class Elsewhere(BothWays):
        here = False

        def forward(self, *args, **kwargs):
            if not self.here:
                raise RuntimeError("no kernel for this device")
            return run(self, *args, **kwargs)

    moved = Elsewhere(both_ways.config)
    moved.load_state_dict(values)
    distillers.append(KnowledgeDistiller(make_llama(), moved))
    for distiller in distillers:
        Elsewhere.here = True
        with pytest.raises(UserError, match="^model: got (BothWays|Elsewhere): it is not causal"):
            distiller.compute_loss(torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(0)))
        Elsewhere.here = False


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

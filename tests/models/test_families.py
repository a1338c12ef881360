"""What a conversion needs of a family: its attention read correctly, every phase training the right parameters."""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mohawk.conversion.footprint import used_parameters
from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
from mohawk.conversion.plan import parameter_kind
from mohawk.conversion.readout import solve_output_projections
from mohawk.kernels.mixing.interface import mixing_distance, mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing
from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.models.cutting.cuts import Cut, cut, keep_layers
from mohawk.models.families import FAMILIES, check_supported, decoder_layers, family_of, mixer_input_norm
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.models.mixers import SSMMixer
from mohawk.models.packed import positions_of
from mohawk.models.teacher_forcing import layer_calls, record, recording_attention, softcapped_attention
from tests.models.conftest import CUTTABLE, tiny_teacher
from tests.models.conftest import FAMILIES as TESTED

OBJECTIVES = {
    "mixing": MixingObjective,
    "block_output": lambda *models: HiddenObjective(*models, train_mlp=True),
    "mixer_output": lambda *models: HiddenObjective(*models, match="mixer_output"),
    "end_to_end": lambda *models: EndToEndObjective(*models, train="mixers"),
}


def batch(rows=4, n=20):
    """Rows of two documents each; padding at the end of the first."""
    ids = torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(n) >= n // 3).long().repeat(rows, 1)
    segments[0, -4:] = -1
    labels = torch.where(segments >= 0, ids, -100)
    labels[:, n // 3] = -100
    return dict(input_ids=ids, position_ids=positions_of(segments), segment_ids=segments, labels=labels)


def test_every_family_is_tested():
    assert {kind for kind, _ in TESTED.values()} == set(FAMILIES)


def test_the_table_names_what_the_family_has(teacher):
    """An entry that names a norm or projection wrongly, or forgets a norm, does not pass."""
    family, layer = family_of(teacher.config), decoder_layers(teacher)[0]
    norms = {name.split(".")[0] for name, _ in layer.named_parameters() if "norm" in name and "self_attn" not in name}
    assert norms == {family.input_norm, family.output_norm, *family.mlp_norms} - {None}
    assert (family.input_norm is None) == isinstance(mixer_input_norm(layer), torch.nn.Identity)
    within = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters() if "norm" in name}
    assert within <= {family.query_norm, family.key_norm}
    assert hasattr(teacher.model, family.final_norm)
    assert (teacher.lm_head.bias is not None) == family.head_bias


def test_walking_the_layers_gives_the_teachers_hidden_states_and_attention(teacher):
    """Layer by layer and through the recording attention the teacher computes what it does as a whole, and what is
    recorded makes its attention matrix: scales, windows, softcaps, norms of q and k, rotary embeddings or none."""
    inputs = batch(rows=2)["input_ids"]
    positions = torch.arange(inputs.shape[1])[None]
    with torch.no_grad(), recording_attention(teacher):
        hidden, calls = layer_calls(teacher, inputs, positions)
        states, matrices = [hidden], []
        for layer, call in zip(decoder_layers(teacher), calls, strict=True):
            with record(layer.self_attn) as attention:
                states.append(layer(states[-1], *call.args, **call.kwargs))
            matrices.append(mixing_matrix(attention.mixing()))
        last = getattr(teacher.model, family_of(teacher.config).final_norm)(states.pop())
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        whole = teacher(inputs, output_hidden_states=True, output_attentions=True)
    for i, (got, expected) in enumerate(zip([*states, last], whole.hidden_states, strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda said, i=i: f"layer {i}: {said}")
    for got, expected in zip(matrices, whole.attentions, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "phase, mixer",
    [
        ("mixing", "mamba2"),
        ("mixing", "discrete_mamba2"),
        ("block_output", "mamba2"),
        ("mixer_output", "discrete_mamba2"),
        ("end_to_end", "mamba2"),
    ],
)
def test_every_phase_lowers_its_loss_and_reaches_what_it_trains(teacher, phase, mixer):
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 2], mixer)
    objective = OBJECTIVES[phase](student, teacher)
    named = dict(objective.trained())
    optimizer = torch.optim.AdamW(objective.parameter_groups(3e-3, 0.0))
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        total = 0.0
        for _, loss in objective.losses(**batch()):
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    assert losses[-1] < losses[0]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in named), name


def test_phase_names(teacher):
    """Input norms are trained with the mixer, but where the MLP reads them too only if the MLP's output is compared."""
    student = hybrid_from_teacher(teacher, [1])
    family = family_of(student.config)

    def norms(phase):
        names = (name.removeprefix("model.layers.1.") for name, _ in OBJECTIVES[phase](student, teacher).trained())
        return {name.split(".")[0] for name in names if not name.startswith(("self_attn.", f"{family.mlp}."))}

    own = set() if family.parallel else {family.input_norm} - {None}
    everything = {family.input_norm, family.output_norm, *family.mlp_norms} - {None}
    assert norms("mixing") == norms("mixer_output") == own
    assert norms("block_output") == everything
    assert norms("end_to_end") == {family.input_norm, family.output_norm} - {None}


def test_the_least_squares_start_brings_the_mixer_nearer(teacher):
    data = batch(rows=8)
    student = hybrid_from_teacher(teacher, [1, 3])
    objective = HiddenObjective(student, teacher, match="mixer_output")

    def loss():
        with torch.no_grad():
            return sum(value.item() for _, value in objective.losses(**data))

    before = loss()
    with recording_attention(teacher):
        solve_output_projections(student, teacher, [data])
    assert loss() < 0.9 * before


@pytest.mark.parametrize("family", [name for name in TESTED if name not in CUTTABLE])
def test_experts_and_routers_count_as_mlps(family):
    """In plans and reports; and a phase that leaves MLPs alone leaves them alone."""
    teacher = tiny_teacher(family)
    student = hybrid_from_teacher(teacher, [1])
    inside = {
        name for name, _ in student.named_parameters() if "experts." in name or "gate" in name or "router" in name
    }
    assert len([name for name in inside if "layers.1." in name]) == 3
    assert {parameter_kind(name, [1]) for name in inside} == {"MLPs"}
    layer, config = decoder_layers(teacher)[1], teacher.config
    sizes = {name: p.numel() for name, p in layer.named_parameters()}
    experts = sum(size for name, size in sizes.items() if "experts." in name)
    idle = 1 - config.num_experts_per_tok / config.num_local_experts
    assert used_parameters(layer, config) == pytest.approx(sum(sizes.values()) - idle * experts)
    trained = {name for name, _ in EndToEndObjective(student, teacher, train="all_but_mlp").trained()}
    assert not inside & trained and "model.layers.1.post_attention_layernorm.weight" in trained


@pytest.mark.parametrize("layers", [[0, 2], [1, 3]], ids=str)
def test_what_a_window_leaves_when_one_kind_of_attention_is_gone(layers):
    """Gemma 2 makes a mask for windowed and one for full layers, though the cache holds only one kind."""
    teacher = tiny_teacher("gemma2")
    student = hybrid_from_teacher(teacher, layers).eval()
    x = batch(rows=2)["input_ids"]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert student.generate(x, **options).tolist() == student.generate(x, use_cache=False, **options).tolist()


@pytest.mark.parametrize("layers", [[0], [1, 3], "all"], ids=str)
def test_generation_past_longropes_limit(layers):
    """Behind the limit every position is turned by other angles, so the keys cached until then are made anew."""
    rope = {**TESTED["phi4_mini"][1]["rope_parameters"], "original_max_position_embeddings": 12}
    teacher = tiny_teacher("phi4_mini", original_max_position_embeddings=12, rope_parameters=rope)
    student = hybrid_from_teacher(teacher, layers).eval()
    x = batch(rows=2)["input_ids"][:, :8]
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = student.generate(x, use_cache=False, **options)
    assert student.generate(x, **options).tolist() == expected.tolist()
    padded = torch.nn.functional.pad(x, (2, 0))
    mask = torch.nn.functional.pad(torch.ones_like(x), (2, 0))
    mask[1, 2:4] = 0
    with_cache = student.generate(padded, attention_mask=mask, **options)
    assert with_cache.tolist() == student.generate(padded, attention_mask=mask, use_cache=False, **options).tolist()


def test_nothing_replaced_is_the_teacher_past_longropes_limit():
    teacher = tiny_teacher("phi4_mini")
    student = HybridForCausalLM(HybridConfig(base_config=copy.deepcopy(teacher.config))).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.tie_weights()
    x = torch.randint(3, 97, (1, 80))  # the limit is 64
    torch.testing.assert_close(student(x).logits, teacher(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_softcapped_attention_and_its_matrix(window):
    """Against the definition: outputs, the matrix, distances between matrices and their gradients."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 300, 8) * 3, torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 8)
    mixing = AttentionMixing(q, k, window=window, softcap=2.0)
    matrix = mixing_matrix(mixing)
    torch.testing.assert_close(matrix, dense_matrix(mixing), rtol=1e-4, atol=1e-6)
    index = torch.arange(300)
    visible = (index[:, None] >= index) & ((index[:, None] - index < window) if window else True)
    scores = 2 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 8**-0.5 / 2)
    by_hand = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    torch.testing.assert_close(matrix, by_hand, rtol=1e-4, atol=1e-6)
    mask = None if window is None else visible[None, None]
    out = softcapped_attention(q, k, v, mask, 8**-0.5, 2.0)
    torch.testing.assert_close(out, by_hand @ v.repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)
    step = softcapped_attention(q[:, :, -1:], k, v, None if mask is None else mask[:, :, -1:], 8**-0.5, 2.0)
    torch.testing.assert_close(step, out[:, :, -1:])

    small = [torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(4)]
    for metric in ("frobenius", "kl"):
        grads = []
        for backend in ("reference", "chunked"):
            own = [tensor.clone().requires_grad_() for tensor in small[:2]]
            student = AttentionMixing(*own, window=window, softcap=1.5)
            teacher = AttentionMixing(*small[2:], window=window, softcap=0.7)
            distance = mixing_distance(student, teacher, metric=metric, backend=backend)
            grads.append((distance.detach(), *torch.autograd.grad(distance, own)))
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_a_softcap_is_finite_and_positive():
    q = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match="softcap must be None or a finite number above 0"):
        AttentionMixing(q, q, softcap=0.0)


def test_a_teacher_whose_attention_leaves_out_its_softcap_is_refused():
    teacher = tiny_teacher("gemma2")
    teacher.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="softcap 3.0.*leaves out; load it with attn_implementation='eager'"):
        hybrid_from_teacher(teacher)


@pytest.mark.parametrize(
    "kind, options, missing",
    [
        ("starcoder2", {}, "an entry in FAMILIES .*docs/families.md says how to add one and what shows whether"),
        ("deepseek_v3", {}, "latent attention"),
        ("llava", {}, r"give its text decoder \(llama\) alone"),
        ("gemma3", {}, r"give its text decoder \(gemma3_text\) alone; docs/families.md says how to take it out"),
        ("fuyu", {}, r"its text decoder \(persimmon\) alone lacks an entry in FAMILIES"),
        ("llama4", {}, r"its text decoder \(llama4_text\) alone lacks full .*layers of chunked_attention"),
        ("bamba", {}, "layers of linear_attention|layers of mamba|an entry in FAMILIES"),
        ("gemma2", {"use_bidirectional_attention": True}, "cannot look ahead"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "cannot look ahead"),
        ("llama", {"per_layer_config": {0: {"intermediate_size": 5}}}, "same sizes in every layer; per_layer_config"),
    ],
)
def test_refusals_say_what_is_missing(kind, options, missing):
    """One line, from the configuration alone."""
    config = AutoConfig.for_model(kind, **options)
    with pytest.raises(ValueError, match=f"model_type '{kind}' cannot be converted.*missing: .*({missing})") as caught:
        check_supported(config)
    assert "\n" not in str(caught.value) and "supported: llama (" in str(caught.value)


def test_a_text_decoder_is_taken_out_as_the_documentation_says(tmp_path, monkeypatch):
    """The lines of docs/families.md, run as they stand on a tiny model of text and images."""
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "vocab_size": 97, "intermediate_size": 48},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_index=5,
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    monkeypatch.chdir(tmp_path)
    whole.save_pretrained("images-and-text")
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "get_decoder" in block)
    exec(lines, {})
    alone = AutoModelForCausalLM.from_pretrained("text-alone").eval()
    x = batch(rows=2)["input_ids"]
    torch.testing.assert_close(alone(x).logits, whole(input_ids=x).logits, rtol=0, atol=0)
    check_supported(alone.config)


@pytest.mark.parametrize(
    "kind, options, what",
    [
        ("t5", {}, "it is an encoder and a decoder,"),
        ("whisper", {}, "it is an encoder and a decoder,"),
        ("whisper", {"is_encoder_decoder": False}, "it is made for input_features, not for text"),
        ("clip", {}, "it is no model that writes text"),
        ("bert", {}, "it is an encoder, in which each token sees those behind it too"),
        ("modernbert", {}, "it is an encoder,"),
        ("vit", {}, "it is no model that writes text"),
        ("bert", {"is_decoder": True}, "missing: the skeleton of Llama"),
        ("gpt_neox", {}, "missing: the skeleton of Llama"),  # its configuration has is_decoder = False
    ],
)
def test_what_is_no_decoder_is_called_what_it_is(kind, options, what):
    with pytest.raises(ValueError, match=f"model_type '{kind}' cannot be converted to a hybrid; {what}") as caught:
        check_supported(AutoConfig.for_model(kind, **options))
    assert "\n" not in str(caught.value) and "supported: llama (" in str(caught.value)
    assert "it is" not in str(caught.value) or "FAMILIES" not in str(caught.value)


def no_causal_lms():
    """(model, what it is) of encoders, of both, and of a decoder's body and classifier."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32}
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    yield BertForMaskedLM(BertConfig(**sizes)), "it is an encoder, in which each token sees those behind it too"
    yield T5ForConditionalGeneration(t5), "it is an encoder and a decoder"
    yield LlamaModel(LlamaConfig(**sizes)), "it has no output embedding"
    yield LlamaForSequenceClassification(LlamaConfig(**sizes)), "it has no output embedding"


def test_what_is_no_causal_lm_is_neither_cut_nor_converted():
    for model, what in no_causal_lms():
        for use in (lambda m: keep_layers(m, [0]), lambda m: cut(m, Cut(layers=[0])), hybrid_from_teacher):
            with pytest.raises(ValueError, match=rf"^[^\n]* cannot be (cut|converted to a hybrid)[:;] {what}[^\n]*$"):
                use(model)


@pytest.mark.parametrize(
    "kind, lacking",
    [
        ("gpt2", "the skeleton of Llama"),
        ("opt", "the skeleton of Llama"),
        ("falcon", "the skeleton of Llama"),
        ("gpt_oss", "this one has sinks too"),
        ("lfm2", "an MLP called block_sparse_moe or mlp in every layer"),
        ("granitemoeshared", "layer 0 has shared_mlp too"),
        ("stablelm", "layers that hand keywords on to their attention"),
        ("nemotron", "layers that hand keywords on to their attention"),
        ("apertus", "a norm in front of attention called input_layernorm"),
        ("olmo", "norms with weights; its input_layernorm has none"),
    ],
)
def test_what_no_entry_can_say_is_not_asked_as_one(kind, lacking):
    # what the configurations of two have no default for
    given = {"nemotron": {"num_key_value_heads": 8}, "granitemoeshared": {"shared_intermediate_size": 16}}
    with pytest.raises(ValueError) as caught:
        check_supported(AutoConfig.for_model(kind, **given.get(kind, {})))
    assert lacking in str(caught.value) and "an entry in FAMILIES cannot say so, that takes code" in str(caught.value)
    assert "says how to add one" not in str(caught.value)


def test_a_hybrid_is_no_teacher_to_convert():
    student = hybrid_from_teacher(tiny_teacher(), [1])
    with pytest.raises(ValueError, match="it has layers of linear_attention"):
        hybrid_from_teacher(student)
    assert isinstance(decoder_layers(student)[1].self_attn, SSMMixer)

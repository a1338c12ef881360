"""A Gated DeltaNet student of Qwen3 as a stock Qwen3.5: the same function, in every dtype."""

import pytest
import torch
from transformers import Qwen3_5ForCausalLM

from mohawk.models.casting import cast
from mohawk.models.formats.qwen3_5 import qwen3_5_config, regular_interval, to_qwen3_5, why_not_qwen3_5, wide_norms
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid_config import SSM_LAYER
from tests.models.conftest import tiny_teacher
from tests.models.test_bamba import ROPES, assert_same, probed

FULL = {"use_sliding_window": False, "sliding_window": None}


def student_of(layers=(0, 2), dtype=torch.float32, **overrides):
    """Mixers away from their starting values, and norm weights of every kind: large, small, negative and 0."""
    teacher = tiny_teacher("qwen3", **{**FULL, **overrides})
    student = hybrid_from_teacher(teacher, list(layers), "gated_delta").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for i in student.config.ssm_layers:
            for parameter in student.model.layers[i].self_attn.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in student.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.7 + 0.3 * torch.randn_like(parameter))
                parameter[:4] = torch.tensor([0.0, 0.003, -1.3, 2.5])
    cast(student, dtype)
    return student


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"layers": (0, 1, 3), "num_key_value_heads": 4},  # attention in one layer, without groups
        {"layers": (1, 3), "head_dim": 8, "num_key_value_heads": 1},  # no regular interval
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "tie_word_embeddings": True},
        {"dtype": torch.float16},
        *({"rope_parameters": rope} for rope in ROPES.values()),
    ],
)
def test_the_same_function(options):
    student = student_of(**options)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    stock = to_qwen3_5(student)
    assert type(stock) is Qwen3_5ForCausalLM and stock.dtype == student.dtype
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_same(probed(student.float()), probed(stock.float()))  # norms that stayed float32 among it


def test_attention_is_the_teachers():
    """A layer that stayed, beside transformers' Qwen3 itself."""
    teacher = tiny_teacher("qwen3", **FULL)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("norm.weight"):
                parameter.abs_().add_(0.5)
    stock = to_qwen3_5(hybrid_from_teacher(teacher, [0], "gated_delta"))
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7).expand(2, 7)
    outputs = []
    for model in (teacher, stock):
        layer, rotary = model.model.layers[1], model.model.rotary_emb
        places = positions if model is teacher else positions.expand(3, 2, 7)  # of text, height and width
        with torch.no_grad():
            found, _ = layer.self_attn(
                layer.input_layernorm(hidden), position_embeddings=rotary(hidden, places), attention_mask=None
            )
            outputs.append(found)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)


def test_projections_are_laid_out_as_qwen3_5_reads_them():
    """By hand: each head's rows of q, then as many zeros; o twice as large; and mixers copied."""
    student = student_of(tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.5)
    ours, theirs = student.state_dict(), to_qwen3_5(student).state_dict()
    q = theirs["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (4 * 2 * 16, 32)
    for head in range(4):
        rows = q[32 * head : 32 * (head + 1)]
        assert torch.equal(rows[:16], ours["model.layers.1.self_attn.q_proj.weight"][16 * head : 16 * (head + 1)])
        assert not rows[16:].any()
    o = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(theirs[o], 2 * ours[o])
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        assert (theirs[f"model.layers.1.{name}.weight"] == 0.5).all()
    for name, value in student.model.layers[0].self_attn.state_dict().items():
        assert torch.equal(theirs[f"model.layers.0.linear_attn.{name}"], value), name


def test_no_weight_is_rounded_in_bfloat16():
    """w of a norm times a column that reads it is what it was, exactly; what cannot be moved stays float32."""
    student = student_of(dtype=torch.bfloat16)
    stock = to_qwen3_5(student)
    ours, theirs = student.state_dict(), stock.state_dict()
    wide = wide_norms(student)
    assert set(wide) == {f"model.layers.{i}.self_attn.{name}.weight" for i in (1, 3) for name in ("q_norm", "k_norm")}
    assert all(0.01 < lost <= 1 for lost in wide.values())
    for name in wide:
        assert theirs[name].dtype == torch.float32
        torch.testing.assert_close(theirs[name].double() + 1, ours[name].double(), rtol=0, atol=1e-7)
    for norm, reader in [
        ("model.layers.0.input_layernorm", "model.layers.0.linear_attn.in_proj_a"),
        ("model.layers.1.input_layernorm", "model.layers.1.self_attn.v_proj"),
        ("model.layers.3.post_attention_layernorm", "model.layers.3.mlp.up_proj"),
        ("model.norm", "lm_head"),
    ]:
        assert theirs[f"{norm}.weight"].dtype == theirs[f"{reader}.weight"].dtype == torch.bfloat16
        got = (theirs[f"{norm}.weight"].double() + 1) * theirs[f"{reader}.weight"].double()
        read = reader.replace("linear_attn", "self_attn")
        assert torch.equal(got, ours[f"{norm}.weight"].double() * ours[f"{read}.weight"].double())
    assert not wide_norms(student_of())  # a float32 student has no wider dtype to ask for
    tied = wide_norms(student_of(dtype=torch.bfloat16, tie_word_embeddings=True))
    assert "model.norm.weight" in tied  # its columns are the embedding's too


def test_intervals():
    def kinds(text):
        return [SSM_LAYER if letter == "s" else "full_attention" for letter in text]

    for text, interval in [("sasa", 2), ("ssass", 3), ("sssa", 4), ("assa", None), ("sssss", None), ("saas", None),
                           ("sas", 2), ("sassa", None), ("sasasas", 2), ("sasass", None)]:  # fmt: skip
        assert regular_interval(kinds(text)) == interval, text
    assert qwen3_5_config(student_of((0, 2)).config).full_attention_interval == 2
    irregular = qwen3_5_config(student_of((1, 3)).config)
    assert not hasattr(irregular, "full_attention_interval")
    assert irregular.layer_types == ["full_attention", "linear_attention"] * 2


def test_what_qwen3_5_cannot_be_is_refused_with_the_reason():
    odd = student_of()
    odd.config.mixer_norm_eps = 1e-3
    cases = [
        (hybrid_from_teacher(tiny_teacher("qwen3", **FULL), [1]), "mixers are mamba2, Qwen3.5's are gated_delta"),
        (hybrid_from_teacher(tiny_teacher("llama"), [1], "gated_delta"), "its attention is llama's"),
        (
            hybrid_from_teacher(tiny_teacher("qwen3"), [1], "gated_delta"),
            "layers 2, 3 sees a sliding window of 5 tokens",
        ),
        (student_of(attention_bias=True), "have biases on their projections"),
        (student_of(hidden_act="gelu"), "its activation is gelu"),
        (student_of(range(4)), "no attention layer is left"),
        (odd, "output norms have epsilon 0.001"),
    ]
    for student, said in cases:
        assert said in why_not_qwen3_5(student.config)
        with pytest.raises(ValueError, match="cannot be a Qwen3_5ForCausalLM: ") as error:
            to_qwen3_5(student)
        assert "\n" not in str(error.value)

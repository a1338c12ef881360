"""A hybrid as a stock Granite 4: the same function as the student, whose parts another project wrote."""

import pytest
import torch
from transformers import GraniteMoeHybridForCausalLM

from mohawk.models.formats.granite import granite_config, norms_groups_apart, to_granite, why_not_granite
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher
from tests.models.test_bamba import MISTRAL, ROPES, assert_same, probed, student_of

pytestmark = pytest.mark.skipif(
    not norms_groups_apart(), reason="this transformers norms Granite's groups together, and to_granite says so"
)


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("llama_wide_heads", {}),  # mamba_expand 2, head_dim that is not hidden / heads
        ("mistral", MISTRAL),
        ("qwen2", {}),  # biases on q, k, v but not on o
        ("phi3", {"sliding_window": None}),  # fused projections
        ("seed_oss", {"head_dim": 16}),
        ("ministral", {"layer_types": ["full_attention"] * 4, "head_dim": 8}),
        *(("llama", {"rope_parameters": rope}) for rope in ROPES.values()),
    ],
)
def test_the_same_function(family, overrides):
    student = student_of(family, **overrides)
    granite = to_granite(student)
    assert type(granite) is GraniteMoeHybridForCausalLM
    assert_same(probed(student), probed(granite))
    written = granite.config.to_dict()
    expected = granite_config(student.config).to_dict()
    for config in (written, expected):
        config.pop("dtype"), config.pop("architectures", None)
    assert written == expected


def test_attention_is_the_teachers():
    """Of a layer that stayed, beside transformers' Llama itself."""
    teacher = tiny_teacher("llama")
    granite = to_granite(hybrid_from_teacher(teacher, [0, 2]))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        teacher.model.layers[0] = teacher.model.layers[2] = torch.nn.Identity()
        granite.model.layers[0] = granite.model.layers[2] = torch.nn.Identity()
        for model in (teacher, granite):  # Identity takes one argument
            for i in (0, 2):
                model.model.layers[i].forward = lambda hidden_states, *_, **__: hidden_states
        torch.testing.assert_close(granite(ids).logits, teacher(ids).logits, rtol=1e-5, atol=1e-5)


def test_padding_with_heads_of_zeros_changes_nothing():
    """3 heads of 24 over a hidden size of 48: expand 1.5, which is none."""
    student = student_of("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=24)
    assert "--pad-expand" in why_not_granite(student.config)
    granite = to_granite(student, pad_expand=True)
    assert (granite.config.mamba_expand, granite.config.mamba_n_heads) == (2, 4)
    assert_same(probed(student), probed(granite))


def test_nothing_is_shared_and_mode_and_dtype_are_kept():
    student = student_of().to(torch.bfloat16)
    granite = to_granite(student)
    assert granite.dtype == torch.bfloat16 and not granite.training
    with torch.no_grad():
        for parameter in granite.parameters():
            parameter.zero_()
    assert all(p.any() for name, p in student.named_parameters() if name.endswith("q_proj.weight"))
    assert granite.lm_head.weight is granite.model.embed_tokens.weight  # tied, as the teacher's


def test_what_granite_cannot_be_is_refused_with_the_reason(monkeypatch):
    cases = [
        (student_of("llama_biased"), r"its MLPs have biases \(mlp_bias\)"),
        (hybrid_from_teacher(tiny_teacher(), [1], "discrete_mamba2"), "Granite's scale their input by dt"),
        (hybrid_from_teacher(tiny_teacher(), [1], "gated_delta"), "mixers are gated_delta, Granite's are Mamba-2's"),
        (hybrid_from_teacher(tiny_teacher("qwen3"), [1]), "which Granite's attention does not"),
        (student_of("mistral", layers=[1]), "sees a sliding window of 6 tokens, Granite's sees all"),
        (student_of("phi4_mini"), "Granite would keep them"),
        (student_of(layers=range(4)), "no attention layer is left"),
    ]
    biased = student_of()
    with torch.no_grad():
        biased.model.layers[0].self_attn.in_proj.bias += 0.1
    for student, said in [*cases, (biased, "biases on x, B and C, which transformers' Granite")]:
        with pytest.raises(ValueError, match="cannot be a GraniteMoeHybridForCausalLM: .*" + said) as error:
            to_granite(student)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("mohawk.models.formats.granite.norms_groups_apart", lambda: False)
    assert "5.23 and later each alone" in why_not_granite(student_of(scramble=False).config)

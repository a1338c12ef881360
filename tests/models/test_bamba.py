"""A hybrid as a stock Bamba: the same function, there and back; and what Bamba has no place for is said."""

import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM

from mohawk.export.parity_probe import probe
from mohawk.measures import consistency
from mohawk.models.families import FAMILIES
from mohawk.models.formats.bamba import (
    EXPRESSIBLE,
    FOREIGN,
    fold_conv_input_bias,
    from_bamba,
    has_conv_input_bias,
    norms_groups_apart,
    to_bamba,
    why_not_bamba,
)
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.skipif(
    not norms_groups_apart(), reason="this transformers norms Bamba's groups together, and to_bamba says so"
)
MISTRAL = {"sliding_window": None}
ROPES = {
    "llama3": dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16),
    "yarn": dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16),
    "linear": dict(rope_type="linear", rope_theta=500.0, factor=2.0),
}  # fmt: skip


def student_of(family: str = "llama", layers=(0, 2), scramble: bool = True, **overrides):
    """A student whose mixers are away from their starting values, as training would leave them."""
    student = hybrid_from_teacher(tiny_teacher(family, **overrides), list(layers)).eval()
    if scramble:
        torch.manual_seed(1)
        with torch.no_grad():
            for i in student.config.ssm_layers:
                mixer = student.model.layers[i].self_attn
                for parameter in mixer.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                if mixer.in_proj.bias is not None:
                    mixer.in_proj.bias[mixer.slices()["xBC"]] = 0.0
    return student


def probed(model):
    """What the export doctor asks: full forward, steps, left padding, greedy tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (1, 300), generator=generator)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    batch = ids[0, :48].view(2, 24)
    inputs = {"long": ids, "batch": batch, "mask": mask, "prefill": torch.tensor(16), "new": torch.tensor(6)}
    found = probe(model, inputs, consistency)
    shares = {name: found.pop(name).item() for name in [*found] if name.startswith("itself_")}
    assert len(shares) == len(consistency.paths_of(model.config)) and max(shares.values()) < 1e-5, shares
    return found


def assert_same(ours, theirs):
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, :9] = False
    for key, value in ours.items():
        other = theirs[key]
        if key == "padded":
            value, other = value[mask], other[mask]
        if key.endswith("tokens"):
            assert torch.equal(value, other), key
        else:
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama_biased", {}),  # biases everywhere: attention_bias, mlp_bias, mamba_proj_bias
        ("llama_wide_heads", {}),  # mamba_expand 2, head_dim that is not hidden / heads
        ("mistral", MISTRAL),
        ("ministral", {"layer_types": ["full_attention"] * 4, "head_dim": 8}),
        ("qwen2", {}),  # biases on q, k, v but not on o
        ("seed_oss", {"head_dim": 16}),
        ("phi3", {"sliding_window": None}),  # fused projections
        *(("llama", {"rope_parameters": rope}) for rope in ROPES.values()),
    ],
)
def test_the_same_function(family, overrides):
    student = student_of(family, **overrides)
    bamba = to_bamba(student)
    assert type(bamba) is BambaForCausalLM
    assert_same(probed(student), probed(bamba))


def test_a_window_longer_than_any_text_is_none():
    student = student_of("mistral", sliding_window=512, max_position_embeddings=512)
    assert_same(probed(student), probed(to_bamba(student)))


@pytest.mark.parametrize(
    "family, overrides", [("llama", {}), ("llama_biased", {}), ("llama_wide_heads", {}), ("mistral", MISTRAL)]
)
def test_there_and_back_the_weights_are_the_same(family, overrides):
    student = student_of(family, **overrides)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    back = from_bamba(to_bamba(student))
    assert back.config.layer_types == ["linear_attention", "full_attention"] * 2
    after = back.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
        assert torch.equal(student.state_dict()[key], value), key
    assert_same(probed(student), probed(back))


def test_nothing_is_shared_and_mode_and_dtype_are_kept():
    student = student_of().to(torch.bfloat16)
    bamba = to_bamba(student)
    assert bamba.dtype == torch.bfloat16 and not bamba.training
    with torch.no_grad():
        for parameter in bamba.parameters():
            parameter.zero_()
    assert all(p.any() for name, p in student.named_parameters() if name.endswith("q_proj.weight"))
    assert bamba.lm_head.weight is bamba.model.embed_tokens.weight  # tied, as the teacher's


def test_padding_with_heads_of_zeros_changes_nothing():
    student = student_of()
    bamba = to_bamba(student, pad_expand=True)
    assert (bamba.config.mamba_expand, bamba.config.mamba_n_heads, bamba.config.mamba_n_groups) == (2, 8, 8)
    assert_same(probed(student), probed(bamba))
    assert_same(probed(student), probed(from_bamba(bamba)))


def test_padding_fills_an_expand_that_is_no_integer():
    """3 heads of 24 over a hidden size of 48: expand 1.5."""
    student = student_of("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=24)
    with pytest.raises(
        ValueError, match=r"3 heads x 24 = 72 channels wide, no multiple of the hidden size 48.*--pad-expand"
    ):
        to_bamba(student)
    bamba = to_bamba(student, pad_expand=True)
    assert (bamba.config.mamba_expand, bamba.config.mamba_n_heads) == (2, 4)
    assert_same(probed(student), probed(bamba))


def test_heads_that_cannot_fill_an_integer_are_refused():
    student = student_of("llama", hidden_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=24)
    for pad, said in ((False, "no multiple of the hidden size 32"), (True, "cannot be padded with whole heads")):
        with pytest.raises(ValueError, match=said):
            to_bamba(student, pad_expand=pad)


def test_grouped_mixers_and_other_sizes_survive_both_ways():
    """A Bamba of its own, with fewer groups than heads and another state size, made a hybrid and back."""
    config = BambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_expand=2, mamba_n_heads=8, mamba_d_head=8,
        mamba_n_groups=2, mamba_d_state=16, mamba_conv_bias=False, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    torch.manual_seed(0)
    stock = BambaForCausalLM(config).eval()
    hybrid = from_bamba(stock)
    assert_same(probed(stock), probed(hybrid))
    assert_same(probed(stock), probed(to_bamba(hybrid, pad_expand=True)))


def test_what_bamba_cannot_be_is_refused_with_the_reason():
    cases = [
        (hybrid_from_teacher(tiny_teacher(), [1], "discrete_mamba2"), "mixers are discrete_mamba2"),
        (student_of("mistral", layers=[1]), "attention in layers 0, 2, 3 sees a sliding window of 6 tokens"),
        (student_of(hidden_act="gelu"), "its activation is gelu"),
        (student_of("phi4_mini"), "longrope positions change"),
        (student_of(layers=range(4)), "no attention layer is left"),
    ]
    for student, said in cases:
        assert said in why_not_bamba(student.config)
        with pytest.raises(ValueError, match="cannot be a BambaForCausalLM: .*" + said):
            to_bamba(student)


@pytest.mark.parametrize("family, said", [
    ("phi", "side by side on one LayerNorm"), ("gemma2", "softcaps"), ("olmo2", "normalises q and k"),
    ("qwen3", "q_norm, k_norm"), ("smollm3", "without rotary positions"), ("granite", "its logits"),
    ("gemma", "1 plus their weight"), ("gemma3", "normalises q and k"), ("olmo3", "normalises q and k"),
    ("cohere2", "its logits are scaled"), ("arcee", "no gate"), ("ministral3", "queries larger"),
    ("cohere", "its logits are scaled"), ("granitemoe", "mixtures of experts"), ("mixtral", "mixtures of experts"),
    ("qwen3_moe", "mixtures of experts"),
])  # fmt: skip
def test_other_families_are_refused_with_the_reason(family, said):
    assert said in why_not_bamba(hybrid_from_teacher(tiny_teacher(family), [1]).config)


def test_every_family_is_expressible_or_refused_with_a_reason_of_its_own():
    assert set(FAMILIES) == set(EXPRESSIBLE) | set(FOREIGN)


def test_a_bamba_that_is_no_llama_is_refused():
    def made(**changes):
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": changes.pop("partial", 1.0)}
        return BambaForCausalLM(
            BambaConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_state=4,
                        rope_parameters=rope, **changes)
        )  # fmt: skip

    with pytest.raises(ValueError, match="rotary positions turn 0.5"):
        from_bamba(made(partial=0.5))
    with pytest.raises(ValueError, match="hidden_act must be 'silu', got 'gelu'"):
        from_bamba(made(hidden_act="gelu"))
    with pytest.raises(ValueError, match="time_step_limit"):
        from_bamba(made(time_step_limit=(0.0, 0.1)))


def test_a_bias_in_front_of_the_convolution_is_refused_and_can_be_moved_behind_it():
    """transformers' Bamba lets it through padding; behind the conv it acts on all but the first three tokens alike."""
    student = student_of()
    with torch.no_grad():
        for i in student.config.ssm_layers:
            mixer = student.model.layers[i].self_attn
            mixer.in_proj.bias[mixer.slices()["xBC"]] = torch.randn(mixer.conv_size) * 0.3
    assert has_conv_input_bias(student)
    with pytest.raises(ValueError, match="biases on x, B and C"):
        to_bamba(student)
    mixer, hidden = student.model.layers[0].self_attn, torch.randn(1, 12, 32)
    before = mixer.mixing(hidden)
    fold_conv_input_bias(student)
    after = mixer.mixing(hidden)
    for name in ("B", "C"):
        torch.testing.assert_close(getattr(after, name)[:, 3:], getattr(before, name)[:, 3:])
        assert not torch.allclose(getattr(after, name)[:, :3], getattr(before, name)[:, :3])
    assert not has_conv_input_bias(student)
    assert_same(probed(student), probed(to_bamba(student)))


def test_training_leaves_no_bias_in_front_of_the_convolution():
    student = student_of().train()
    assert student.config.mixer_bias
    student(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
    mixer = student.model.layers[2].self_attn
    rows = mixer.slices()
    grad = mixer.in_proj.bias.grad
    assert not grad[rows["xBC"]].any() and grad[rows["z"]].all() and grad[rows["decay"]].all()
    assert mixer.conv1d.bias.grad.all()
    mixer.in_proj.bias.grad = None
    mixing = mixer.mixing(torch.randn(1, 5, 32))
    (mixing.B.sum() + mixing.C.sum() + mixing.log_decay.sum()).backward()
    grad = mixer.in_proj.bias.grad
    assert not grad[rows["xBC"]].any() and grad[rows["decay"]].all()


def test_a_transformers_that_norms_groups_together_is_refused(monkeypatch):
    student = student_of(scramble=False)
    monkeypatch.setattr("mohawk.models.formats.bamba.norms_groups_apart", lambda: False)
    with pytest.raises(ValueError, match="normalises all 4 groups of a mixer together, 5.23 and later each alone"):
        to_bamba(student)

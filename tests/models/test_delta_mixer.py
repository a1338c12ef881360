"""Gated DeltaNet mixers: number for number transformers' Qwen3.5, however they are called, and students of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mohawk.kernels.mixing import mixing_matrix
from mohawk.measures.consistency import broken_paths, inconsistencies, some_tokens
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import GatedDeltaMixer
from tests.models.conftest import tiny_teacher

SIZES = [  # D, value heads, p, N, key heads, k
    (32, 4, 8, 8, 4, 4),
    (24, 6, 5, 7, 2, 3),
    (16, 2, 16, 4, 1, 2),
]


def theirs(hidden, heads, p, N, groups, k):
    """transformers' module of these sizes, away from its starting values."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=hidden, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_value_heads=heads,
        linear_num_key_heads=groups, linear_key_head_dim=N, linear_value_head_dim=p, linear_conv_kernel_dim=k,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    module = Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def conv1d(x, weight, bias, activation, **_):
    """Causal, over (b, channels, n)."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))


def pair(sizes, dtype=torch.float32):
    module = theirs(*sizes).to(dtype)
    hidden, heads, p, N, groups, k = sizes
    mixer = GatedDeltaMixer(hidden, heads, p, N, groups, k, norm_eps=1e-6).to(dtype)
    assert not any(mixer.load_state_dict(module.state_dict()))
    return mixer, module


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("n", [1, 5, 70, 130])
def test_equal_to_qwen(sizes, n, monkeypatch):
    """Value and every gradient: in float32 at most twice as far from float64 as transformers' own are."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    # the causal-conv1d package, where it is installed, runs on GPUs alone
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", conv1d)
    mixer, module = pair(sizes)
    exact, _ = pair(sizes, torch.float64)
    x = torch.randn(2, n, sizes[0])
    found = []
    for one in (mixer, module, exact):
        given = x.to(next(one.parameters()).dtype, copy=True).requires_grad_()
        y = one(given)[0] if isinstance(one, GatedDeltaMixer) else one(given)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = {name: parameter.grad.double() for name, parameter in one.named_parameters()}
        found.append({"y": y.detach().double(), "x": given.grad.double(), **gradients})
    mine, others, right = found
    for name in right:
        size, error = right[name].norm(), (mine[name] - right[name]).norm()
        assert error <= max(2 * (others[name] - right[name]).norm(), 1e-6 * size), name
        assert error <= 1e-4 * size, name


@pytest.mark.parametrize("sizes", SIZES)
def test_its_matrix_is_what_it_does_to_values(sizes):
    """In float64: the state's outputs are the matrix times the convolved values."""
    mixer, _ = pair(sizes, torch.float64)
    x = torch.randn(2, 21, sizes[0], dtype=torch.float64)
    segments = torch.tensor([[0] * 21, [0] * 9 + [1] * 12])
    matrix = mixing_matrix(mixer.mixing(x, segment_ids=segments))
    inputs, z, _ = mixer.project(x)
    convolved = mixer.conv1d(inputs, segment_ids=segments)
    v = convolved[..., mixer.slices()["v"]].unflatten(-1, (mixer.num_heads, mixer.head_dim))
    y = torch.einsum("bhts,bshp->bthp", matrix, v)
    expected = mixer.out_proj(mixer.gate(y.flatten(-2), z))
    torch.testing.assert_close(mixer(x, segment_ids=segments)[0], expected, rtol=1e-9, atol=1e-11)


def student_of(layers=(1, 3), **teacher):
    torch.manual_seed(0)
    student = hybrid_from_teacher(tiny_teacher(**teacher), list(layers), "gated_delta").eval()
    with torch.no_grad():
        for i in layers:
            for parameter in student.model.layers[i].self_attn.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize("layers", [(1, 3), (0, 1, 2, 3)])
def test_every_way_of_answering_gives_what_one_forward_gives(layers):
    student = student_of(layers)
    assert broken_paths(student, inconsistencies(student, some_tokens(student))) is None


def test_padding_takes_no_part():
    student, ids = student_of(), torch.randint(0, 90, (1, 9))
    alone = student(ids).logits
    for before, between, behind in ((3, 0, 0), (0, 0, 4), (2, 3, 1)):
        mask = torch.tensor([[0] * before + [1] * 4 + [0] * between + [1] * 5 + [0] * behind])
        row = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
        found = student(row, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    student, ids = student_of(), torch.randint(0, 90, (2, 12))
    student.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.mixer == "gated_delta"
    assert torch.equal(again(ids).logits, student(ids).logits)


def test_what_attention_gives_the_start():
    """q, k and v are attention's, repeated for every query head; the gate is made of weights, as it has no constant."""
    teacher = tiny_teacher(num_attention_heads=4, num_key_value_heads=2)
    student = hybrid_from_teacher(teacher, [1], "gated_delta")
    attention, mixer = teacher.model.layers[1].self_attn, student.model.layers[1].self_attn
    rows, p = mixer.slices(), mixer.head_dim
    assert torch.equal(mixer.in_proj_qkv.weight[rows["q"]], attention.q_proj.weight)
    for name, projection in (("k", attention.k_proj), ("v", attention.v_proj)):
        repeated = projection.weight.unflatten(0, (2, p)).repeat_interleave(2, 0).flatten(0, 1)
        assert torch.equal(mixer.in_proj_qkv.weight[rows[name]], repeated)
    assert not mixer.conv1d.weight[..., :-1].any()
    x = torch.randn(2, 30, 32) * 0.3
    q = mixer.mixing(x).q
    direct = torch.nn.functional.normalize(attention.q_proj(x).unflatten(-1, (4, p)), dim=-1) * p**-0.5
    assert (q - direct).norm() < 0.1 * direct.norm()  # the SiLU is nearly linear there


def test_biases_that_have_no_place_are_named(caplog):
    hybrid_from_teacher(tiny_teacher("llama_biased"), [1], "gated_delta")
    assert "biases of queries, keys and values are left out" in caplog.text
    caplog.clear()
    hybrid_from_teacher(tiny_teacher(), [1], "gated_delta")
    assert not caplog.records


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gate": "open"}, "gate: got 'open', a constant gate"),
        ({"init": "neutral"}, "init: got 'neutral', a constant gate"),
        ({"gate": "loud"}, "gate: got 'loud', allowed"),
    ],
)
def test_what_it_cannot_start_from(options, message):
    with pytest.raises(ValueError, match=message):
        hybrid_from_teacher(tiny_teacher(), [1], "gated_delta", **options)


def test_it_is_not_cut():
    from mohawk.models.cutting.cuts import keep_layers

    with pytest.raises(ValueError, match="gated_delta mixers cannot be cut; prune its teacher"):
        keep_layers(student_of(), [0, 1])


def test_with_an_adapter():
    peft = pytest.importorskip("peft")
    student, ids = student_of(), torch.randint(0, 90, (2, 12))
    before = student(ids).logits
    adapted = peft.get_peft_model(
        student, peft.LoraConfig(target_modules=["in_proj_qkv", "out_proj", "in_proj_z"], r=2)
    )
    torch.testing.assert_close(adapted(ids).logits, before)
    mixer = next(module for module in adapted.modules() if isinstance(module, GatedDeltaMixer))
    nn.init.normal_(mixer.in_proj_qkv.lora_B["default"].weight)
    x = torch.randn(1, 10, 32)
    merged = mixer.in_proj_qkv.get_delta_weight("default") + mixer.in_proj_qkv.weight
    found = mixer.mixing(x)
    plain = GatedDeltaMixer(32, 4, 8, 8, norm_eps=mixer.norm.eps)
    plain.load_state_dict({k.replace("base_layer.", ""): v for k, v in mixer.state_dict().items() if "lora" not in k})
    plain.in_proj_qkv.weight.data.copy_(merged)
    torch.testing.assert_close(found.q, plain.mixing(x).q)
    assert mixer.in_proj_qkv.lora_B["default"].weight.grad is None
    (found.q.sum() + found.k.sum()).backward()
    assert mixer.in_proj_qkv.lora_B["default"].weight.grad.abs().sum() > 0

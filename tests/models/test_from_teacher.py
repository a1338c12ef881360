"""Making a student: what is copied, what is refused, and that the teacher is left alone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BambaConfig, GPT2Config, GPT2LMHeadModel
from transformers.models.bamba.modeling_bamba import BambaMixer

from mohawk.kernels.mixing.interface import mixing_matrix
from mohawk.models.families import attention_parts, mixer_input_norm
from mohawk.models.from_teacher import choose_layers, hybrid_from_teacher
from mohawk.models.initialisation import CONTENT, RESTING, _silu_inverse, attention_input_size
from mohawk.models.mixers import Mamba2Mixer
from tests.models.conftest import tiny_teacher


def test_the_teacher_is_left_as_it_was_and_nothing_is_shared(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    kinds = [type(layer.self_attn) for layer in teacher.model.layers]
    student = hybrid_from_teacher(teacher, [0, 2])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert [type(layer.self_attn) for layer in teacher.model.layers] == kinds
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_everything_outside_the_replaced_attention_is_the_teachers(teacher):
    student = hybrid_from_teacher(teacher, [1])
    own = teacher.state_dict()
    for key, value in student.state_dict().items():
        if "layers.1.self_attn" not in key:
            assert torch.equal(value, own[key]), key


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_attention_weights_become_c_b_x_and_out_proj(teacher, mixer):
    """C and B are the teacher's q and k, kv heads repeated, biases included, up to one scale and one offset."""
    student = hybrid_from_teacher(teacher, [1], mixer)
    attention, ssm = teacher.model.layers[1].self_attn, student.model.layers[1].self_attn
    parts = attention_parts(attention)
    h, p = ssm.num_heads, ssm.head_dim
    kv = teacher.config.num_key_value_heads
    constant = (RESTING / p) ** 0.5
    offset, slope = _silu_inverse(constant) if mixer == "mamba2" else (constant, 1.0)
    tap = (RESTING * CONTENT * parts.scale) ** 0.5 / slope
    size = attention_input_size(teacher, 1)
    hidden = torch.randn(2, 50, teacher.config.hidden_size) * size
    q, k = (F.linear(hidden, part.weight, part.bias).unflatten(-1, (-1, p)) for part in (parts.q, parts.k))
    if parts.query_norm is not None:
        q, k = _normed(parts.query_norm, q), _normed(parts.key_norm, k)
    expected = {"C": q * tap + offset, "B": k.repeat_interleave(h // kv, 2) * tap + offset}
    if mixer == "mamba2":  # SiLU follows the conv
        expected = {name: F.silu(value) for name, value in expected.items()}
    mixing = ssm.mixing(hidden)
    for name, value in expected.items():
        if parts.query_norm is None:
            torch.testing.assert_close(getattr(mixing, name), value, rtol=1e-5, atol=1e-5)
        else:  # each token's own size is not divided by, only the one that is expected
            error = (getattr(mixing, name) - value).norm() / (value - value.mean((0, 1))).norm()
            assert error < 0.35, name
    assert torch.equal(ssm.out_proj.weight, parts.o.weight)


def _normed(norm, value):
    """A norm over each head, or over all of them as in OLMo 2."""
    return norm(value) if norm.weight.shape[-1] == value.shape[-1] else norm(value.flatten(-2)).view_as(value)


def test_without_content_the_first_matrix_averages():
    """Where q and k are 0, rows of the mixing matrix sum to RESTING once a head's averaging time is filled."""
    student = hybrid_from_teacher(tiny_teacher(), [1])
    matrix = mixing_matrix(student.model.layers[1].self_attn.mixing(torch.zeros(1, 3000, 32)))
    sums = matrix[0, :, -1].sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, RESTING), rtol=0.02, atol=0)


@pytest.mark.parametrize("groups", [1, 4])
def test_mamba2_is_the_stock_bamba_mixer(groups):
    """Same weights, same output as transformers' BambaMixer, to float32 rounding; grouped B and C included."""
    config = BambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, mamba_expand=2, mamba_n_heads=8, mamba_d_head=8,
        mamba_n_groups=groups, mamba_d_state=16, mamba_d_conv=4, mamba_proj_bias=True, attn_layer_indices=[],
    )  # fmt: skip
    torch.manual_seed(0)
    stock = BambaMixer(config, layer_idx=0).eval()
    if groups > 1 and not hasattr(stock.norm, "group_size"):
        pytest.skip("this transformers norms Bamba's groups together")
    ours = Mamba2Mixer(32, 8, 8, 16, groups, 4, bias=True, norm_eps=config.rms_norm_eps)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict(stock.state_dict())
    hidden = torch.randn(2, 37, 32)
    torch.testing.assert_close(ours(hidden)[0], stock(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["open", "output", "random"])
@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_gates(teacher, mixer, gate):
    """Only the open gate is the same for every token; the discrete mixer's is then 1."""
    student = hybrid_from_teacher(teacher, [1], mixer, gate=gate)
    ssm = student.model.layers[1].self_attn
    z = ssm.in_proj(torch.randn(1, 3, teacher.config.hidden_size))[..., ssm.slices()["z"]]
    if mixer == "discrete_mamba2":
        z = z + ssm.z_bias
    assert torch.equal(z, z[:, :1].expand_as(z)) == (gate == "open")
    if gate == "open" and mixer == "discrete_mamba2":
        torch.testing.assert_close(F.silu(z), torch.ones_like(z))


def test_mamba2_starts_where_its_norm_only_multiplies(teacher):
    """Twice the values, twice the output: the size of a head's output passes through SiLU, gate and RMSNorm, and what
    out_proj then sees is the teacher's values, averaged by the mixing matrix."""
    student = hybrid_from_teacher(teacher, [1])
    layer, attention = student.model.layers[1], teacher.model.layers[1].self_attn
    ssm, kv = layer.self_attn, teacher.config.num_key_value_heads
    hidden = torch.randn(2, 40, teacher.config.hidden_size)
    if teacher.config.model_type == "olmo2":
        hidden = hidden * attention_input_size(teacher, 1)
    hidden = mixer_input_norm(layer)(hidden) * 0.3
    seen = []
    ssm.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ssm(hidden)
    v = attention_parts(attention).v
    values = F.linear(hidden, v.weight, v.bias).unflatten(-1, (kv, -1)).repeat_interleave(ssm.num_heads // kv, 2)
    expected = torch.einsum("bhij,bjhp->bihp", mixing_matrix(ssm.mixing(hidden)), values).flatten(-2)
    assert (seen[0] - expected).norm() / expected.norm() < 0.3


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("heads", ["one", "all"])
def test_a_head_of_zeros_stays_silent(teacher, mixer, heads):
    """As pruning leaves some: its queries, keys and values are 0, so it adds nothing, and nothing becomes infinite."""
    attention = teacher.model.layers[1].self_attn
    p = attention_parts(attention)
    d = attention.head_dim
    repeat = teacher.config.num_attention_heads // teacher.config.num_key_value_heads
    own, shared = (slice(None), slice(None)) if heads == "all" else (slice(0, repeat * d), slice(0, d))
    with torch.no_grad():
        for part, rows in ((p.q, own), (p.k, shared), (p.v, shared)):
            part.weight[rows] = 0.0  # of a fused projection too: these are views of it
            if part.bias is not None:
                part.bias[rows] = 0.0
    assert attention_parts(attention).v.weight[shared].count_nonzero() == 0
    student = hybrid_from_teacher(teacher, [1], mixer)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    ssm = student.model.layers[1].self_attn
    hidden = torch.randn(2, 20, teacher.config.hidden_size)
    with torch.no_grad():
        found = ssm(hidden)[0]
        ssm.out_proj.weight[:, own] = 0.0
        without = ssm(hidden)[0]
    assert torch.isfinite(found).all() and torch.equal(found, without)


def test_layer_choice():
    assert choose_layers("every_second", 5) == [1, 3]
    assert choose_layers("all", 3) == [0, 1, 2]
    assert choose_layers([3, 0], 4) == [0, 3]
    for wrong, said in (
        ("evry_second", "allowed"),
        ([4], "0 to 3"),
        ([-1], "0 to 3"),
        ([1, 1], "twice"),
        ([], "no layer"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_layers(wrong, 4)


def test_refusals_say_what_is_supported():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(ValueError, match="gpt2.*supported: llama"):
        hybrid_from_teacher(gpt2)
    with pytest.raises(ValueError, match="state_size must be the head dim 8, got 16"):
        hybrid_from_teacher(tiny_teacher(), state_size=16)
    with pytest.raises(ValueError, match="mixer: got 'mamba3'"):
        hybrid_from_teacher(tiny_teacher(), mixer="mamba3")
    with pytest.raises(ValueError, match="gate: got 'ajar'"):
        hybrid_from_teacher(tiny_teacher(), gate="ajar")


def test_random_init_takes_any_state_size():
    student = hybrid_from_teacher(tiny_teacher(), "all", init="random", state_size=5)
    assert student.model.layers[0].self_attn.state_size == 5
    assert torch.isfinite(student(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("mixer", ("mamba2", "discrete_mamba2"))
def test_a_neutral_start_lets_the_projections_through(mixer):
    """The convolution passes on what it gets, and the gate is 1 whatever the layer reads."""
    student = hybrid_from_teacher(tiny_teacher(), [1], mixer, init="neutral")
    layer = student.model.layers[1].self_attn
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        projected = layer.in_proj(hidden)
        xBC, z = projected[..., layer.slices()["xBC"]], projected[..., layer.slices()["z"]]
        convolved = layer.conv1d(xBC)
        expected = torch.nn.functional.silu(xBC) if layer.activation == "silu" else xBC
        gate = torch.nn.functional.silu(z + getattr(layer, "z_bias", 0))
    torch.testing.assert_close(convolved, expected)
    torch.testing.assert_close(gate, torch.ones_like(gate))
    assert layer.in_proj.weight[layer.slices()["x"]].abs().min() > 0

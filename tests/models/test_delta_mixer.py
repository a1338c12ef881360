"""Mixers with the gated delta rule: number for number those of transformers' Qwen3.5 and Kimi Linear, however they are
called, and students of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from mohawk.kernels.mixing import AttentionMixing, mixing_distance, mixing_matrix
from mohawk.measures.consistency import broken_paths, inconsistencies, some_tokens
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import MIXERS, KimiDeltaMixer
from tests.models.conftest import tiny_teacher

SIZES = {
    "gated_delta": [  # D, value heads, p, N, key heads, k
        (32, 4, 8, 8, 4, 4),
        (24, 6, 5, 7, 2, 3),
        (16, 2, 16, 4, 1, 2),
    ],
    "kimi_delta": [(32, 4, 8, 8, 4, 4), (24, 6, 5, 5, 6, 3), (16, 1, 16, 16, 1, 2)],
}
CASES = [(name, sizes) for name, several in SIZES.items() for sizes in several]


def theirs(name, sizes):
    """transformers' module of these sizes, away from its starting values."""
    hidden, heads, p, N, groups, k = sizes
    torch.manual_seed(0)
    shared = dict(
        hidden_size=hidden, num_hidden_layers=1, layer_types=["linear_attention"], linear_conv_kernel_dim=k,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    if name == "gated_delta":
        from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

        config = Qwen3_5TextConfig(
            linear_num_value_heads=heads, linear_num_key_heads=groups, linear_key_head_dim=N, linear_value_head_dim=p,
            **shared,
        )  # fmt: skip
        module = Qwen3_5GatedDeltaNet(config, 0)
    else:
        from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

        config = KimiLinearConfig(linear_num_heads=heads, linear_head_dim=p, **shared)
        module = KimiLinearDeltaAttention(config, 0)
        with torch.no_grad():  # the module leaves these to the model
            module.forget_gate.A_log.copy_(torch.rand(heads).view(1, 1, heads, 1))
            module.forget_gate.dt_bias.copy_(torch.randn(heads * p))
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module, config


def conv1d(x, weight, bias, activation, **_):
    """Causal, over (b, channels, n)."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))


def conv1d_step(x, state, weight, bias, activation, **_):
    """conv1d of one token behind those in `state` (b, channels, k), which is overwritten."""
    state.copy_(torch.cat([state, x], -1)[..., -state.shape[-1] :])
    return F.silu((state * weight).sum(-1, keepdim=True) + (0 if bias is None else bias[:, None]))


@pytest.fixture(autouse=True)
def their_convolution(monkeypatch):
    """The causal-conv1d package, where it is installed, runs on GPUs alone."""
    from transformers.models.kimi_linear import modeling_kimi_linear
    from transformers.models.qwen3_5 import modeling_qwen3_5

    for modeling in (modeling_kimi_linear, modeling_qwen3_5):
        monkeypatch.setattr(modeling, "causal_conv1d_fn", conv1d)
        monkeypatch.setattr(modeling, "causal_conv1d_update", conv1d_step)


def pair(name, sizes, dtype=torch.float32):
    module = theirs(name, sizes)[0].to(dtype)
    hidden, heads, p, N, groups, k = sizes
    mixer = MIXERS[name](hidden, heads, p, N, groups, k, norm_eps=1e-6).to(dtype)
    assert not any(mixer.load_state_dict(module.state_dict()))
    return mixer, module


@pytest.mark.parametrize("name, sizes", CASES)
@pytest.mark.parametrize("n", [1, 5, 70, 130])
def test_equal_to_transformers(name, sizes, n):
    """Value and every gradient: in float32 at most twice as far from float64 as transformers' own are, or as what it
    changes when the input is rounded to float32: a token alone leaves little of a query's gradient behind its norm."""
    mixer, module = pair(name, sizes)
    exact, _ = pair(name, sizes, torch.float64)
    x = torch.randn(2, n, sizes[0])
    rounded = [x.double() * (1 + 2**-24 * torch.randn(x.shape).sign()) for _ in range(8)]

    def found(one, given):
        given = given.to(next(one.parameters()).dtype, copy=True).requires_grad_()
        one.zero_grad()
        y = one(given)
        y = y[0] if isinstance(y, tuple) else y
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = {name: parameter.grad.double() for name, parameter in one.named_parameters()}
        return {"y": y.detach().double(), "x": given.grad.double(), **gradients}

    mine, others, right = found(mixer, x), found(module, x), found(exact, x)
    moved = [found(exact, given) for given in rounded]
    for name in right:
        size, error = right[name].norm(), (mine[name] - right[name]).norm()
        by_input = torch.stack([(one[name] - right[name]).norm() for one in moved]).max()
        assert error <= max(2 * (others[name] - right[name]).norm(), 1e-6 * size, by_input), name
        assert error <= 1e-4 * size, name


@torch.no_grad()
@pytest.mark.parametrize("name, sizes", CASES)
def test_steps_and_padding_are_transformers_too(name, sizes):
    """A prompt, then token by token, each with its own cache; then rows with padding in front."""
    module, config = theirs(name, sizes)
    mixer, _ = pair(name, sizes)
    x = torch.randn(2, 9, sizes[0])
    for_theirs, for_ours = DynamicCache(config=config), DynamicCache(config=config)
    for part in (x[:, :5], *x[:, 5:].split(1, 1)):
        torch.testing.assert_close(mixer(part, cache=for_ours)[0], module(part, for_theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        for_ours.layers[0].recurrent_states[0], for_theirs.layers[0].recurrent_states[0], rtol=1e-4, atol=1e-5
    )
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    expected = module(x, attention_mask=mask)
    torch.testing.assert_close(mixer(x, padding_mask=mask)[0][mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("N, p", [(6, 6), (3, 7)])
def test_kimi_delta_attention_from_its_formulas(N, p):
    """arXiv 2510.26692, equation 1, token by token and head by head in float64; also where keys and values differ."""
    D, heads, k, n = 10, 3, 3, 8
    torch.manual_seed(0)
    mixer = KimiDeltaMixer(D, heads, p, N, conv_kernel=k, bias=True, norm_eps=1e-5).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, n, D, dtype=torch.float64)
    w = mixer.state_dict()
    rows = x[0]
    inputs = torch.cat([rows @ w[f"{part}_proj.weight"].T for part in "qkv"], 1)
    before = torch.cat([inputs.new_zeros(k - 1, inputs.shape[1]), inputs])
    convolved = sum(before[i : i + n] * w["conv1d.weight"][:, 0, i] for i in range(k))
    convolved = convolved / (1 + (-convolved).exp())
    beta = 1 / (1 + (-rows @ w["b_proj.weight"].T).exp())
    decay = rows @ w["forget_gate.f_a_proj.weight"].T @ w["forget_gate.f_b_proj.weight"].T + w["forget_gate.dt_bias"]
    decay = (-w["forget_gate.A_log"].exp().view(heads, 1) * (1 + decay.view(n, heads, N).exp()).log()).exp()
    gate = 1 / (1 + (-rows @ w["g_a_proj.weight"].T @ w["g_b_proj.weight"].T).exp())
    y = []
    for h in range(heads):
        state = x.new_zeros(N, p)
        for t in range(n):
            q, key, v = (convolved[t, start + h * m :][:m] for start, m in ((0, N), (heads * N, N), (2 * heads * N, p)))
            q, key = (one / (one @ one + 1e-6).sqrt() for one in (q, key))
            forgets = torch.eye(N, dtype=torch.float64) - beta[t, h] * torch.outer(key, key)
            state = forgets @ torch.diag(decay[t, h]) @ state + beta[t, h] * torch.outer(key, v)
            out = state.T @ q / N**0.5
            out = out / (out @ out / p + 1e-5).sqrt() * w["o_norm.weight"]
            y.append(out * gate[t, h * p :][:p])
    y = torch.stack(y).view(heads, n, p).transpose(0, 1).reshape(n, heads * p)
    expected = y @ w["o_proj.weight"].T + w["o_proj.bias"]
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=1e-9, atol=1e-11)


def test_kimi_delta_attention_has_keys_for_every_head():
    with pytest.raises(ValueError, match="num_groups: got 2 for 4 heads"):
        KimiDeltaMixer(32, 4, 8, 8, 2)


@pytest.mark.parametrize("name, sizes", CASES)
def test_its_matrix_is_what_it_does_to_values(name, sizes):
    """In float64: the state's outputs are the matrix times the convolved values."""
    mixer, _ = pair(name, sizes, torch.float64)
    x = torch.randn(2, 21, sizes[0], dtype=torch.float64)
    segments = torch.tensor([[0] * 21, [0] * 9 + [1] * 12])
    matrix = mixing_matrix(mixer.mixing(x, segment_ids=segments))
    inputs, z, _ = mixer.project(x)
    convolved = mixer.conv1d(inputs, segment_ids=segments)
    v = convolved[..., mixer.slices()["v"]].unflatten(-1, (mixer.num_heads, mixer.head_dim))
    y = torch.einsum("bhts,bshp->bthp", matrix, v)
    expected = mixer.output(mixer.gate(y.flatten(-2), z))
    torch.testing.assert_close(mixer(x, segment_ids=segments)[0], expected, rtol=1e-9, atol=1e-11)
    outside = [parameter for key, parameter in mixer.named_parameters() if key in mixer.outside_matrix]
    assert len(outside) == len(mixer.outside_matrix) - 1  # there is no bias
    distance = mixing_distance(mixer.mixing(x), AttentionMixing(x[:, None], x[:, None]))
    gradients = torch.autograd.grad(distance, list(mixer.parameters()), allow_unused=True)
    for (key, _), gradient in zip(mixer.named_parameters(), gradients, strict=True):
        assert (gradient is None) == (key in mixer.outside_matrix), key


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16_is_as_near_as_rounding_allows(name):
    mixer, module = pair(name, SIZES[name][0])
    exact, _ = pair(name, SIZES[name][0], torch.float64)
    x = torch.randn(2, 70, 32).bfloat16()
    right = exact(x.double())[0]
    theirs_16 = module.to(torch.bfloat16)(x).double()
    mine = mixer.to(torch.bfloat16)(x)[0]
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - right).norm() <= 2 * (theirs_16 - right).norm()


def student_of(mixer="gated_delta", layers=(1, 3), **teacher):
    torch.manual_seed(0)
    student = hybrid_from_teacher(tiny_teacher(**teacher), list(layers), mixer).eval()
    with torch.no_grad():
        for i in layers:
            for parameter in student.model.layers[i].self_attn.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize("layers", [(1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("mixer", SIZES)
def test_every_way_of_answering_gives_what_one_forward_gives(mixer, layers):
    student = student_of(mixer, layers)
    assert broken_paths(student, inconsistencies(student, some_tokens(student))) is None


@pytest.mark.parametrize("mixer", SIZES)
def test_beams_take_their_states_with_them(mixer):
    student, ids = student_of(mixer), torch.randint(3, 90, (2, 6))
    options = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0, num_beams=3, do_sample=False)
    found = student.generate(ids, **options)
    assert found.tolist() == student.generate(ids, use_cache=False, **options).tolist()


@pytest.mark.parametrize("mixer", SIZES)
def test_padding_takes_no_part(mixer):
    student, ids = student_of(mixer), torch.randint(0, 90, (1, 9))
    alone = student(ids).logits
    for before, between, behind in ((3, 0, 0), (0, 0, 4), (2, 3, 1)):
        mask = torch.tensor([[0] * before + [1] * 4 + [0] * between + [1] * 5 + [0] * behind])
        row = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
        found = student(row, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", SIZES)
def test_documents_of_a_packed_row_do_not_see_each_other(mixer):
    student, ids = student_of(mixer), torch.randint(0, 90, (1, 13))
    segments = torch.tensor([[0] * 5 + [1] * 8])
    apart = torch.cat([student(ids[:, :5]).logits, student(ids[:, 5:]).logits], 1)
    torch.testing.assert_close(student(ids, segment_ids=segments).logits, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", SIZES)
def test_saved_and_loaded(mixer, tmp_path):
    student, ids = student_of(mixer), torch.randint(0, 90, (2, 12))
    student.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.mixer == mixer
    assert torch.equal(again(ids).logits, student(ids).logits)


@pytest.mark.parametrize("mixer, gate", [("gated_delta", ""), ("kimi_delta", "forget_gate.")])
def test_vectors_that_a_checkpoint_lacks_start_anew(mixer, gate, tmp_path):
    student = student_of(mixer)
    left = [f"model.layers.1.self_attn.{gate}{name}" for name in ("A_log", "dt_bias")]
    student.save_pretrained(tmp_path, state_dict={k: v for k, v in student.state_dict().items() if k not in left})
    again, fresh = HybridForCausalLM.from_pretrained(tmp_path).state_dict(), MIXERS[mixer](32, 4, 8, 8).state_dict()
    for name in left:
        assert torch.equal(again[name], fresh[name.removeprefix("model.layers.1.self_attn.")])
    name = f"model.layers.3.self_attn.{gate}A_log"
    assert torch.equal(again[name], student.state_dict()[name])


@pytest.mark.parametrize("mixer", SIZES)
def test_what_attention_gives_the_start(mixer):
    """q, k and v are attention's, repeated for every query head."""
    teacher = tiny_teacher(num_attention_heads=4, num_key_value_heads=2)
    student = hybrid_from_teacher(teacher, [1], mixer)
    attention, mixer = teacher.model.layers[1].self_attn, student.model.layers[1].self_attn
    weights, p = mixer.input_weights(), mixer.head_dim
    assert torch.equal(weights["q"], attention.q_proj.weight)
    for name, projection in (("k", attention.k_proj), ("v", attention.v_proj)):
        repeated = projection.weight.unflatten(0, (2, p)).repeat_interleave(2, 0).flatten(0, 1)
        assert torch.equal(weights[name], repeated)
    assert not mixer.conv1d.weight[..., :-1].any()
    x = torch.randn(2, 30, 32) * 0.3
    q = mixer.mixing(x).q
    direct = torch.nn.functional.normalize(attention.q_proj(x).unflatten(-1, (4, p)), dim=-1) * p**-0.5
    assert (q - direct).norm() < 0.1 * direct.norm()  # the SiLU is nearly linear there


@torch.no_grad()
def test_both_start_with_one_matrix():
    """Where the small random parts of their gates are 0, decays do not differ from channel to channel."""
    matrices = []
    for name in SIZES:
        mixer = hybrid_from_teacher(tiny_teacher(), [1], name).model.layers[1].self_attn
        for key, parameter in mixer.named_parameters():
            if key in ("in_proj_a.weight", "in_proj_b.weight", "b_proj.weight", "forget_gate.f_b_proj.weight"):
                assert 0 < parameter.abs().max() < 0.02
                parameter.zero_()
        x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0)) * 0.3
        matrices.append(mixing_matrix(mixer.mixing(x)))
    torch.testing.assert_close(*matrices, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_gates_that_kimi_delta_attention_starts_with():
    """open: 1/2 for all, made up for by o_proj; output: that of Gated DeltaNet, of the best rank it has."""
    teacher, x = tiny_teacher(), torch.randn(2, 30, 32)
    mixer = {
        gate: hybrid_from_teacher(teacher, [1], "kimi_delta", gate=gate).model.layers[1].self_attn
        for gate in ("open", "output")
    }
    assert not mixer["open"].project(x)[1].any()
    full = hybrid_from_teacher(teacher, [1], "gated_delta").model.layers[1].self_attn.in_proj_z.weight
    found = mixer["output"].g_b_proj.weight @ mixer["output"].g_a_proj.weight
    left = torch.linalg.svdvals(full)[8:]  # Eckart and Young: what no matrix of rank 8 can have
    torch.testing.assert_close((found - full).norm(), left.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(mixer["open"].o_proj.weight * 0.5, mixer["output"].o_proj.weight * 0.54)


def test_a_head_wider_than_the_model_has_a_gate_too():
    teacher = tiny_teacher(hidden_size=16, head_dim=24, num_attention_heads=2, num_key_value_heads=1)
    student = hybrid_from_teacher(teacher, [1], "kimi_delta", gate="output")
    assert student(torch.randint(0, 90, (1, 5))).logits.isfinite().all()


@pytest.mark.parametrize("mixer", SIZES)
def test_biases_that_have_no_place_are_named(mixer, caplog):
    student = hybrid_from_teacher(tiny_teacher("llama_biased"), [1], mixer)
    assert f"biases of queries, keys and values are left out: {mixer} mixers have" in caplog.text
    bias = tiny_teacher("llama_biased").model.layers[1].self_attn.o_proj.bias
    assert torch.equal(student.model.layers[1].self_attn.output.bias, bias)
    caplog.clear()
    hybrid_from_teacher(tiny_teacher(), [1], mixer)
    assert not caplog.records


@pytest.mark.parametrize(
    "mixer, options, message",
    [
        ("gated_delta", {"gate": "open"}, "gate: got 'open', a constant gate"),
        ("gated_delta", {"init": "neutral"}, "init: got 'neutral', which starts from a gate of 1"),
        ("kimi_delta", {"init": "neutral"}, "init: got 'neutral', which .* a kimi_delta mixer"),
        ("kimi_delta", {"gate": "loud"}, "gate: got 'loud', allowed"),
        ("kimi_delta", {"state_size": 4}, "state_size must be the head dim 8, got 4"),
    ],
)
def test_what_it_cannot_start_from(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        hybrid_from_teacher(tiny_teacher(), [1], mixer, **options)


@pytest.mark.parametrize(
    "name, targets", [("gated_delta", ("in_proj_qkv", "in_proj_z", "out_proj")), ("kimi_delta", None)]
)
def test_with_an_adapter(name, targets):
    pytest.importorskip("peft")
    from mohawk.loading.lora import add_adapter

    student, ids = student_of(name), torch.randint(0, 90, (2, 12))
    before = student(ids).logits
    adapted = add_adapter(student, rank=2, targets=targets)
    torch.testing.assert_close(adapted(ids).logits, before)
    mixer = next(module for module in adapted.modules() if isinstance(module, MIXERS[name]))
    linear = [key for key, module in mixer.named_modules() if hasattr(module, "lora_B")]
    if targets is None:  # all of them
        assert len(linear) == 9 and "forget_gate.f_b_proj" in linear
    plain = MIXERS[name](32, 4, 8, 8, norm_eps=student.config.output_norm_eps)
    plain.load_state_dict({k.replace("base_layer.", ""): v for k, v in mixer.state_dict().items() if "lora" not in k})
    for key in linear:
        nn.init.normal_(mixer.get_submodule(key).lora_B["default"].weight, std=0.3)
        plain.get_submodule(key).weight.data += mixer.get_submodule(key).get_delta_weight("default")
    x = torch.randn(1, 10, 32)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    found, expected = mixer.mixing(x), plain.mixing(x)
    for part in ("q", "k", "beta", "log_decay"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
    sum(getattr(found, part).sum() for part in ("q", "k", "beta", "log_decay")).backward()
    for key in linear:
        gradient = mixer.get_submodule(key).lora_B["default"].weight.grad
        outside = f"{key}.weight" in mixer.outside_matrix
        assert gradient is None if outside else gradient.abs().sum() > 0, key


def token_by_token(name, weights, sizes, x):
    """A mixer's output by the papers' formulas, in float64: weights by their names, x (b, n, D)."""
    _, heads, p, N, groups, taps = sizes
    if name == "gated_delta":
        qkv, z, b, a = (x @ weights[f"in_proj_{part}.weight"].T for part in ("qkv", "z", "b", "a"))
        log_decay = (-weights["A_log"].exp() * F.softplus(a + weights["dt_bias"]))[..., None].expand(*a.shape, N)
    else:
        qkv = torch.cat([x @ weights[f"{part}_proj.weight"].T for part in "qkv"], -1)
        z, b = x @ weights["g_a_proj.weight"].T @ weights["g_b_proj.weight"].T, x @ weights["b_proj.weight"].T
        f = x @ weights["forget_gate.f_a_proj.weight"].T @ weights["forget_gate.f_b_proj.weight"].T
        f = (f + weights["forget_gate.dt_bias"]).unflatten(-1, (heads, N))
        log_decay = -weights["forget_gate.A_log"].exp().view(heads, 1) * F.softplus(f)
    before, taken = F.pad(qkv, (0, 0, taps - 1, 0)), weights["conv1d.weight"][:, 0]
    qkv = F.silu(sum(before[:, j : j + x.shape[1]] * taken[:, j] for j in range(taps)))
    q, k, v = qkv.split([groups * N, groups * N, heads * p], -1)
    q, k = (one.unflatten(-1, (groups, N)).repeat_interleave(heads // groups, 2) for one in (q, k))
    q, k = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (q, k))
    q = q * N**-0.5
    v, beta = v.unflatten(-1, (heads, p)), b.sigmoid()
    state, out = x.new_zeros(len(x), heads, N, p), []
    for t in range(x.shape[1]):
        state = state * log_decay[:, t].exp()[..., None]
        missing = v[:, t] - torch.einsum("bhnp,bhn->bhp", state, k[:, t])
        state = state + torch.einsum("bhn,bhp->bhnp", k[:, t] * beta[:, t, :, None], missing)
        out.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]))
    y, z = torch.stack(out, 1), z.unflatten(-1, (heads, p))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if name == "gated_delta":
        return (y * weights["norm.weight"] * F.silu(z)).flatten(-2) @ weights["out_proj.weight"].T
    return (y * weights["o_norm.weight"] * z.sigmoid()).flatten(-2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("decays", ["strong", "weak", "overwhelming", "mixed"])
@pytest.mark.parametrize("beta", [1e-11, 1 - 1e-11, None])
@pytest.mark.parametrize("name, sizes", [("gated_delta", (30, 6, 9, 11, 3, 4)), ("kimi_delta", (33, 5, 17, 17, 5, 2))])
def test_extreme_gates(name, sizes, beta, decays):
    """By the formulas in float64: beta next to 0 and 1, or either from token to token; log decays of a token around
    -20, -1e-8, -2000, or from next to nothing to thousands. transformers' Kimi has NaN gradients of the last."""
    mixer, _ = pair(name, sizes)
    x = torch.randn(2, 67, sizes[0])
    x[..., 0] = 1
    decay, (to_beta, to_decay) = (
        (mixer, (mixer.in_proj_b, mixer.in_proj_a))
        if name == "gated_delta"
        else (mixer.forget_gate, (mixer.b_proj, mixer.forget_gate.f_b_proj))
    )
    with torch.no_grad():
        to_beta.weight[:, 0] = 0.0 if beta is None else torch.logit(torch.tensor(beta, dtype=torch.float64)).float()
        to_beta.weight *= 20 if beta is None else 1
        if decays == "mixed":
            to_decay.weight *= 30
        else:
            bias, rate = {"strong": (3.0, 2.0), "weak": (-18.0, 0.0), "overwhelming": (40.0, 4.0)}[decays]
            decay.dt_bias.fill_(bias)
            decay.A_log.fill_(rate)
    weights = {key: value.detach().double().requires_grad_() for key, value in mixer.state_dict().items()}
    expected, found = token_by_token(name, weights, sizes, x.double()), mixer(x)[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    down = torch.randn_like(found)
    (expected * down).sum().backward()
    (found * down).sum().backward()
    # a gradient through beta next to 1 is below float32's rounding of beta itself
    largest = max(float(value.grad.norm()) for value in weights.values())
    for key, parameter in mixer.named_parameters():
        gradient = weights[key].grad
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8 * largest, key

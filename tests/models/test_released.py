"""Released checkpoint layouts: read exactly, run as an independent float64 reference does, written back bit for bit."""

import json
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig

from mohawk.models.call import CACHE
from mohawk.models.formats.released import load_released, released_config, save_released, to_released
from mohawk.models.formats.released_configs import layout_of
from mohawk.models.hybrid import HybridForCausalLM

V, D, HEADS, P, N, MLP, LAYERS = 40, 16, 4, 4, 6, 24, 3
TOKENS = torch.tensor([[3, 17, 5, 39, 0, 8, 8, 21, 30, 2, 11], [1, 0, 36, 25, 25, 9, 14, 7, 33, 19, 4]])
CORE = {"d_state": N, "n_v_heads": HEADS, "n_qk_heads": HEADS, "d_conv": 4, "conv_bias": True, "expand": 1,
        "chunk_size": 128, "activation": "identity", "bias": False}  # fmt: skip


# --- random weights in the released layouts --------------------------------------------------------------------------


def tensor(name: str, *shape: int) -> torch.Tensor:
    """Float32 values that depend on the name and the place alone, the same on every machine and torch version."""
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    noise = ((i * 2654435761 + zlib.crc32(name.encode())) * 40503 % 1000003).double() / 1000003 - 0.5
    scale, shift = 0.8, 0.0
    if "norm" in name and name.endswith("weight"):
        shift = 1.0
    elif name.endswith(".D") or "dt_bias" in name:
        shift = 0.5
    elif len(shape) == 2:
        scale = 4 / math.sqrt(shape[1])
    return (shift + scale * noise).float().reshape(shape)


def state_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: tensor(name, *shape) for name, shape in shapes.items()}


def discrete_shapes(prefix: str, d: int = D, inner: int = D, heads: int = HEADS, groups: int = HEADS) -> dict:
    conv = inner + 2 * groups * N
    return {
        prefix + "D": (heads,), prefix + "z_bias": (inner,), prefix + "in_proj.weight": (conv + inner + heads, d),
        prefix + "conv1d.weight": (conv, 1, 4), prefix + "conv1d.bias": (conv,), prefix + "out_proj.weight": (d, inner),
    }  # fmt: skip


def phi_mamba(attention: tuple[int, ...] = (), layers: int = LAYERS):
    """(configuration, state dict) as goombalab/phi-mamba saves them."""
    shapes = {"backbone.embedding.weight": (V, D)}
    config = {"LanguageModel": {"input": {"vocab_size": V - 2, "pad_vocab_size_multiple": 8}},
              "MixerModel": {"input": {"d_model": D, "n_layer": layers, "lm_head_prenorm": "layer"}}}  # fmt: skip
    for i in range(layers):
        layer, mixer = f"backbone.layers.{i}.", f"backbone.layers.{i}.mixer."
        if i in attention:
            for part in ("q_proj", "k_proj", "v_proj", "dense"):
                shapes |= {f"{mixer}self_attn.{part}.weight": (D, D), f"{mixer}self_attn.{part}.bias": (D,)}
        else:
            shapes |= discrete_shapes(mixer)
        shapes |= {layer + "mlp.fc1.weight": (4 * D, D), layer + "mlp.fc1.bias": (4 * D,),
                   layer + "mlp.fc2.weight": (D, 4 * D), layer + "mlp.fc2.bias": (D,),
                   layer + "input_layernorm.weight": (D,), layer + "input_layernorm.bias": (D,)}  # fmt: skip
        kind = "phi_attention" if i in attention else "discrete_mamba2"
        config[f"Block{i + 1}"] = {
            "n_layers": 1, "BlockType": "modules.phi_block", "block_input": {"resid_dropout": 0.0},
            "CoreType": f"modules.mixers.{kind}", "core_input": {"num_attention_heads": 2} if i in attention else CORE,
        }  # fmt: skip
    shapes |= {"backbone.final_layernorm.weight": (D,), "backbone.final_layernorm.bias": (D,),
               "lm_head.weight": (V, D), "lm_head.bias": (V,)}  # fmt: skip
    return config, state_of(shapes)


def llamba(tied: bool = False, heads: int = HEADS, groups: int = HEADS, layers: int = LAYERS):
    """(configuration, state dict) as cartesia-ai/edge saves them."""
    shapes = {"backbone.embedding.weight": (V, D)}
    for i in range(layers):
        layer = f"backbone.layers.{i}."
        shapes |= discrete_shapes(layer + "mixer.", heads=heads, groups=groups)
        shapes |= {layer + "input_layernorm.weight": (D,), layer + "post_attention_layernorm.weight": (D,)}
        shapes |= {layer + "mlp.gate_proj.weight": (MLP, D), layer + "mlp.up_proj.weight": (MLP, D),
                   layer + "mlp.down_proj.weight": (D, MLP)}  # fmt: skip
    shapes |= {"backbone.final_layernorm.weight": (D,)} | ({} if tied else {"lm_head.weight": (V, D)})
    config = {
        "model_type": "llamba", "vocab_size": V, "tie_embeddings": tied, "pad_vocab_size_multiple": 8,
        "lm_head_bias": False, "d_model": D, "n_layer": layers, "resid_dropout": 0.0, "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": MLP, "bias": False, "act_fn": "silu"},
        "ssm_cfg": {k: v for k, v in CORE.items() if k not in ("d_conv", "conv_bias")}
        | {"n_v_heads": heads, "n_qk_heads": groups},
    }  # fmt: skip
    return config, state_of(shapes)


def mamba_in_llama(attention=(1,), repeats_in_conv=False, layers: int = LAYERS, kv: int = 2, base=LlamaConfig):
    """(transformers configuration, mamba_config.json, state dict) as jxiw/MambaInLlama saves them."""
    inner, xb = HEADS * P, kv * P
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    conv = 3 * inner if repeats_in_conv else inner + 2 * xb
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (D,), layer + "post_attention_layernorm.weight": (D,),
                   layer + "mlp.gate_proj.weight": (MLP, D), layer + "mlp.up_proj.weight": (MLP, D),
                   layer + "mlp.down_proj.weight": (D, MLP)}  # fmt: skip
        if i in attention:
            widths = {"q_proj": inner, "k_proj": xb, "v_proj": xb}
            shapes |= {f"{layer}self_attn.{part}.weight": (width, D) for part, width in widths.items()}
            shapes[layer + "self_attn.o_proj.weight"] = (D, inner)
        else:
            mamba = layer + "mamba."
            shapes |= {
                mamba + "dt_bias": (HEADS,), mamba + "A_log": (HEADS,), mamba + "D": (HEADS,),
                mamba + "in_proj.weight": (2 * inner + 2 * xb + HEADS, D), mamba + "conv1d.weight": (conv, 1, 4),
                mamba + "conv1d.bias": (conv,), mamba + "norm.weight": (inner,), mamba + "out_proj.weight": (D, inner),
            }  # fmt: skip
    transformer = base(
        vocab_size=V, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=kv, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    mamba_config = {
        "d_model": D, "ssm_cfg": {"expand": 1, "ngroups": HEADS, "d_state": P}, "rms_norm_eps": 1e-5,
        "vocab_size": None, "d_inner": inner, "d_xb": xb, "intermediate_size": MLP, "hidden_act": "silu",
        "n_layer": layers, "attn_layers": list(attention),
    }  # fmt: skip
    if repeats_in_conv:
        mamba_config["ssm_cfg"]["repeat_kv_before_conv"] = True
    return transformer, mamba_config, state_of(shapes)


def saved(folder, made, weights: str = "model.safetensors"):
    """The folder as a user would download it."""
    *configs, state = made
    folder.mkdir(parents=True, exist_ok=True)
    if len(configs) == 2:
        configs[0].save_pretrained(folder)
        (folder / "mamba_config.json").write_text(json.dumps(configs[1]))
    else:
        (folder / "config.json").write_text(json.dumps(configs[0]))
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        save_file(state, folder / weights)
    return folder


LAYOUTS = {
    "phi-mamba": phi_mamba,
    "hybrid-phi-mamba": lambda: phi_mamba(attention=(1,)),
    "llamba": llamba,
    "llamba-tied": lambda: llamba(tied=True),
    "llamba-grouped": lambda: llamba(heads=8, groups=2),
    "mamba-in-llama": mamba_in_llama,
    "mamba-in-llama-pure": lambda: mamba_in_llama(attention=()),
    "mamba-in-mistral": lambda: mamba_in_llama(base=MistralConfig),
}


# --- an independent reference: materialised matrices in float64 ------------------------------------------------------


def scan_matrix(C, B, log_decay, scale, D):
    """(b, h, n, n) from the definition, entry by entry. C, B (b, n, h, N); log_decay, scale (b, n, h); D (h,)."""
    b, n, h, _ = C.shape
    matrix = torch.zeros(b, h, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            decay = log_decay[:, j + 1 : i + 1].sum(1).exp()
            matrix[:, :, i, j] = (C[:, i] * B[:, j]).sum(-1) * decay * scale[:, j]
        matrix[:, :, i, i] += D
    return matrix


def conv(x, weight, bias):
    """Depthwise causal convolution of (b, n, c): the last tap is the token's own."""
    padded = F.pad(x, (0, 0, 3, 0))
    return sum(padded[:, k : k + x.shape[1]] * weight[:, 0, k] for k in range(4)) + bias


def heads_of(x, heads, repeat=1):
    return x.unflatten(-1, (heads, -1)).repeat_interleave(repeat, -2)


def discrete(w, u, heads, groups):
    inner = w["out_proj.weight"].shape[1]
    xBC, z, a = (u @ w["in_proj.weight"].T).split([inner + 2 * groups * N, inner, heads], -1)
    x, B, C = conv(xBC, w["conv1d.weight"], w["conv1d.bias"]).split([inner, groups * N, groups * N], -1)
    B, C = (heads_of(t, groups, heads // groups) for t in (B, C))
    matrix = scan_matrix(C, B, -F.softplus(a), torch.ones_like(a), w["D"])
    y = torch.einsum("bhij,bjhp->bihp", matrix, heads_of(x, heads)).flatten(-2)
    return (y * F.silu(z + w["z_bias"])) @ w["out_proj.weight"].T


def grouped(w, u, kv, repeats_in_conv):
    inner, xb, repeat = HEADS * P, kv * P, HEADS // kv
    z, x, B, C, dt = (u @ w["in_proj.weight"].T).split([inner, xb, xb, inner, HEADS], -1)
    if repeats_in_conv:
        x, B = (heads_of(t, kv, repeat).flatten(-2) for t in (x, B))
    width = x.shape[-1]
    xBC = F.silu(conv(torch.cat([x, B, C], -1), w["conv1d.weight"], w["conv1d.bias"]))
    x, B, C = xBC.split([width, width, inner], -1)
    x, B = (heads_of(t, width // P, HEADS * P // width) for t in (x, B))
    dt = F.softplus(dt + w["dt_bias"])
    matrix = scan_matrix(heads_of(C, HEADS), B, -dt * w["A_log"].exp(), dt, w["D"])
    y = torch.einsum("bhij,bjhp->bihp", matrix, x).flatten(-2) * F.silu(z)
    y = heads_of(y, HEADS)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
    return (y * w["norm.weight"]) @ w["out_proj.weight"].T


def attention(w, u, heads, kv, rotary, out):
    """Causal softmax attention; the first `rotary` channels of a head turn with the position."""
    q, k, v = (u @ w[f"{part}_proj.weight"].T + w.get(f"{part}_proj.bias", 0) for part in "qkv")
    q, k, v = heads_of(q, heads), heads_of(k, kv, heads // kv), heads_of(v, kv, heads // kv)
    n, half = u.shape[1], rotary // 2
    angle = torch.arange(n).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(t):
        a, b, rest = t[..., :half], t[..., half:rotary], t[..., rotary:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    scores = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)
    return y @ w[f"{out}.weight"].T + w.get(f"{out}.bias", 0)


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def reference(name, made):
    """Logits (b, n, V) in float64 of a released state dict on TOKENS, by its own code's rules."""
    *configs, state = made
    state = {key: value.double() for key, value in state.items()}

    def below(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    stem = "model.layers" if "mamba-in" in name else "backbone.layers"
    embedding = state.get("backbone.embedding.weight", state.get("model.embed_tokens.weight"))
    x = embedding[TOKENS]
    for i in range(LAYERS):
        w = below(f"{stem}.{i}.")
        mixer = below(f"{stem}.{i}.mamba.") or below(f"{stem}.{i}.mixer.")
        attends = below(f"{stem}.{i}.self_attn.") or below(f"{stem}.{i}.mixer.self_attn.")
        if "phi" in name:
            u = F.layer_norm(x, (D,), w["input_layernorm.weight"], w["input_layernorm.bias"])
            # Phi turns half of each head's channels
            mixed = attention(attends, u, 2, 2, D // 4, "dense") if attends else discrete(mixer, u, HEADS, HEADS)
            inside = F.gelu(u @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"], approximate="tanh")
            x = x + mixed + inside @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
            continue
        u = rms_norm(x, w["input_layernorm.weight"])
        if attends:
            x = x + attention(attends, u, HEADS, 2, P, "o_proj")
        elif "llamba" in name:
            ssm = configs[0]["ssm_cfg"]
            x = x + discrete(mixer, u, ssm["n_v_heads"], ssm["n_qk_heads"])
        else:
            x = x + grouped(mixer, u, 2, "repeat_kv_before_conv" in configs[1]["ssm_cfg"])
        u = rms_norm(x, w["post_attention_layernorm.weight"])
        inside = F.silu(u @ w["mlp.gate_proj.weight"].T) * (u @ w["mlp.up_proj.weight"].T)
        x = x + inside @ w["mlp.down_proj.weight"].T
    final = below("backbone.final_layernorm.") or below("model.norm.")
    x = F.layer_norm(x, (D,), final["weight"], final["bias"]) if "phi" in name else rms_norm(x, final["weight"])
    return x @ state.get("lm_head.weight", embedding).T + state.get("lm_head.bias", 0)


# Logits [0, (0, 5, 10), :4] of TOKENS by the released code itself, run in float32 on the weights above: goombalab/
# phi-mamba's LMHeadModel (its attention with this width), goombalab/mohawk's LlamaBlock with DiscreteMamba2 (the code
# that trained Llamba's), jxiw/MambaInLlama's MambaDecoderLayer in transformers' Llama. The Triton kernels they call
# (chunk scan, gated norm) were replaced by their recurrences, since they need a GPU.
GOLDEN = {
    "hybrid-phi-mamba": [
        [0.17150915, -1.53389871, -2.54947042, -1.94367683],
        [2.68271947, 0.03006845, 1.30802369, -0.39919356],
        [1.45744836, -1.24541795, -0.09416291, -0.29132921],
    ],
    "llamba": [
        [2.08741045, 1.44612765, 1.71079528, 0.99432617],
        [1.14278638, 0.27461162, -0.94969118, -0.61859339],
        [1.53202415, -1.76330805, -0.52477270, -0.41958979],
    ],
    "mamba-in-llama": [
        [-2.26778483, 0.04660418, -2.86195612, 0.73478657],
        [-1.80872238, 0.37713373, -3.32533288, 0.87277818],
        [-4.11454868, 1.04453385, -2.29643345, 1.84601092],
    ],
}


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=LAYOUTS)
def released(request, tmp_path):
    made = LAYOUTS[request.param]()
    return request.param, made, saved(tmp_path / "released", made)


def test_logits_equal_the_reference(released):
    name, made, folder = released
    student = load_released(folder)
    expected = reference(name, made)
    with torch.no_grad():
        got = student(TOKENS, use_cache=False).logits.double()
        exact = student.double()(TOKENS, use_cache=False).logits
    assert expected.std() > 0.3  # logits that would show a difference
    assert (got - expected).norm() < 1e-5 * expected.norm()
    # the attention's rotary angles and the norms are float32 in transformers whatever the model is
    assert (exact - expected).norm() < 5e-6 * expected.norm()


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_the_released_codes(name, tmp_path):
    student = load_released(saved(tmp_path, LAYOUTS[name]()))
    with torch.no_grad():
        got = student(TOKENS, use_cache=False).logits[0, [0, 5, 10], :4]
    torch.testing.assert_close(got, torch.tensor(GOLDEN[name]), rtol=1e-4, atol=1e-4)


def test_cached_steps_equal_the_full_forward(released):
    _, _, folder = released
    student = load_released(folder).double()  # the output norm blows up float32's rounding where a token's y is small
    with torch.no_grad():
        full = student(TOKENS, use_cache=False).logits
        cache, parts = student.new_cache(), []
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 11)):
            positions = torch.arange(start, stop)[None]
            parts.append(student(TOKENS[:, start:stop], **{CACHE: cache}, position_ids=positions).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=2e-6)


def test_written_back_bit_for_bit(released):
    _, made, folder = released
    written, state = to_released(load_released(folder)), made[-1]
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name


def test_saved_in_its_layout_loads_again(released, tmp_path):
    name, made, folder = released
    student = load_released(folder)
    save_released(student, tmp_path / "again")
    on_disk = load_file(tmp_path / "again" / "model.safetensors")
    assert on_disk.keys() == made[-1].keys()
    layout, config = released_config(tmp_path / "again")
    assert layout == layout_of(student.config)
    assert config.layer_types == student.config.layer_types
    again = load_released(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)


def test_a_loaded_student_is_saved_and_loaded_like_any_other(tmp_path):
    student = load_released(saved(tmp_path / "released", llamba()))
    student.save_pretrained(tmp_path / "ours")
    again = HybridForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)


def test_convolution_after_repeating(tmp_path):
    """`repeat_kv_before_conv`: only the projection's rows are shared. It is written back so, with its option."""
    made = mamba_in_llama(repeats_in_conv=True)
    student = load_released(saved(tmp_path / "released", made))
    expected = reference("mamba-in-llama", made)
    with torch.no_grad():
        assert (student(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()
    written, state = to_released(student), made[-1]
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)
    save_released(student, tmp_path / "again")
    again = load_released(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)


def test_a_convolution_trained_apart_is_written_with_a_channel_a_head(tmp_path):
    """Of a checkpoint that shared its channels."""
    student = load_released(saved(tmp_path / "released", mamba_in_llama()))
    mixer = next(layer.self_attn for layer in student.model.layers if hasattr(layer.self_attn, "conv1d"))
    with torch.no_grad():
        mixer.conv1d.weight[0] += 1.0  # of the first head's x
    save_released(student, tmp_path / "again")
    again = load_released(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)


def test_bin_files_are_read_without_unpickling(tmp_path):
    config, state = llamba()
    folder = saved(tmp_path / "bin", (config, state), "pytorch_model.bin")
    assert all(torch.equal(value, state[name]) for name, value in to_released(load_released(folder)).items())

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({**state, "lm_head.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_released(folder)
    assert not (tmp_path / "ran").exists()


def test_dtypes(tmp_path):
    config, state = llamba()
    half = {name: value.bfloat16() for name, value in state.items()}
    assert load_released(saved(tmp_path / "half", (config, half))).dtype == torch.bfloat16
    mixed = half | {name: value for name, value in state.items() if name.endswith(".D")}
    student = load_released(saved(tmp_path / "mixed", (config, mixed)))
    written = to_released(student)
    assert student.dtype == torch.float32
    assert all(torch.equal(written[name], value.float()) for name, value in mixed.items())
    assert load_released(tmp_path / "mixed", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("field, value", [("activation", "silu"), ("bias", True), ("conv_bias", False)])
def test_what_our_mixer_lacks_is_refused_by_name(tmp_path, field, value):
    config, state = llamba()
    config["ssm_cfg"][field] = value
    with pytest.raises(ValueError, match=f"ssm_cfg.{field}: got {value!r}"):
        load_released(saved(tmp_path, (config, state)))


def test_refusals_of_weights(tmp_path):
    config, state = llamba()
    missing = {name: value for name, value in state.items() if name != "backbone.layers.1.mixer.D"}
    with pytest.raises(ValueError, match=r"missing.*layers.1.self_attn.D"):
        load_released(saved(tmp_path / "missing", (config, missing)))
    with pytest.raises(ValueError, match="unexpected.*other"):
        load_released(saved(tmp_path / "more", (config, {**state, "other": torch.zeros(2)})))
    transformer, mamba, grouped_state = mamba_in_llama()
    grouped_state["model.layers.0.mamba.x_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="Mamba-1"):
        load_released(saved(tmp_path / "mamba1", (transformer, mamba, grouped_state)))
    empty = saved(tmp_path / "empty", (config, state))
    (empty / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_released(empty)


def test_heads_trained_apart_cannot_be_written_as_grouped(tmp_path):
    student = load_released(saved(tmp_path, mamba_in_llama()))
    student.model.layers[0].self_attn.in_proj.weight.data[HEADS * P] += 1
    with pytest.raises(ValueError, match="trained apart"):
        to_released(student)


def test_ordinary_folders_are_no_released_layout(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    assert released_config(tmp_path) is None
    with pytest.raises(ValueError, match="none of the released layouts"):
        load_released(tmp_path)


def test_hub_files_are_asked_for_by_name(monkeypatch, tmp_path):
    """The hub itself is not reached in tests: a stand-in for its client serves a folder."""
    made = mamba_in_llama()
    folder = saved(tmp_path / "hub", made)
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        return str(folder / file)

    from mohawk.models.formats import released as module

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert module._read_json("someone/else", "config.json", "main")["hidden_size"] == D
    assert module._read_json("someone/else", "other.json", "main") is None
    assert asked == [("someone/else", "config.json", "main"), ("someone/else", "other.json", "main")]


def test_an_unreachable_hub_is_an_error_and_not_another_layout(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LocalEntryNotFoundError):
        load_released("someone/no-such-model")

"""Cuts: units that put out zero go without a trace, for every axis, family and mixer; what is left is ordinary.

What is zeroed is found here by name, apart from what the cuts know of a family.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, GenerationConfig, GPT2Config

from mohawk.models.cutting.cuts import Cut, cut, keep_layers, resolve_layers
from mohawk.models.cutting.sizes import Sizes, sized_config, sizes_of
from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.formats.bamba import fold_conv_input_bias, from_bamba, norms_groups_apart, to_bamba
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.models.state_mixer import StateMixer
from tests.helpers.parameters import config_parameters
from tests.models.conftest import CUTTABLE, FAMILIES, tiny_teacher

LAYERS, HIDDEN, FFN = 4, 32, 48
DELTAS = ("gated_delta", "kimi_delta")
HYBRIDS = [f"{name}+{mixer}" for name in CUTTABLE for mixer in ("mamba2", "discrete_mamba2")]
HYBRIDS += [f"{name}+{mixer}" for name in ("llama", "gemma2", "olmo2", "phi", "phi3", "qwen3") for mixer in DELTAS]
SSM = (1, 3)  # of the hybrids


def keep_ffn(model, neurons):
    return cut(model, Cut(ffn=neurons))


def keep_heads(model, heads):
    return cut(model, Cut(heads=heads))


def keep_hidden(model, channels):
    return cut(model, Cut(hidden=channels))


def keep_state(model, heads=None, dims=None):
    return cut(model, Cut(state_heads=heads, state_dims=dims))


def model_of(name: str, **options):
    """A tiny decoder, or a hybrid "family+mixer" of one, with nothing at a trivial default.

    The norms' epsilon is large, so that a wrong one shows.
    """
    family, _, mixer = name.partition("+")
    epsilon = "layer_norm_eps" if FAMILIES[family][0] in ("phi", "cohere", "cohere2") else "rms_norm_eps"
    teacher = tiny_teacher(family, **{epsilon: 1e-2, **options})
    if not mixer:
        return teacher
    torch.manual_seed(1)
    return stirred(hybrid_from_teacher(teacher, SSM, mixer).eval())


def grouped_hybrid(mixer: str, groups: int = 2):
    """Two groups of B and C, three heads each, or more of fewer, of sizes that equal no other."""
    base = copy.deepcopy(tiny_teacher("llama", rms_norm_eps=1e-2).config)
    config = HybridConfig(
        base_config=base, mixer=mixer, mixer_num_heads=6, mixer_head_dim=5, mixer_state_size=7,
        mixer_num_groups=groups, mixer_bias=True,
        layer_types=["full_attention", "linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    torch.manual_seed(1)
    return stirred(HybridForCausalLM(config).eval())


@torch.no_grad()
def stirred(model):
    for name, parameter in model.named_parameters():
        if "self_attn" in name and ("conv1d" in name or name.endswith((".D", "z_bias", "in_proj.bias", "norm.weight"))):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids():
    return torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def assert_same(smaller, expected):
    """To float32 rounding: a random net of four layers turns 1e-7 into some 1e-6."""
    error = (logits(smaller) - expected).norm() / expected.norm()
    assert error < 2e-5, error


def assert_ordinary(smaller, tmp_path):
    """Its configuration makes a model of just these parameters, and stock transformers loads it."""
    fresh = type(smaller)(copy.deepcopy(smaller.config))
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in smaller.named_parameters()}
    assert config_parameters(smaller.config)[0] == sum(p.numel() for p in smaller.parameters())
    smaller.save_pretrained(tmp_path)
    attention = smaller.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert type(loaded) is type(smaller)
    torch.testing.assert_close(logits(loaded), logits(smaller), rtol=0, atol=0)
    smaller.generate(ids()[:, :4], max_new_tokens=3, do_sample=False)


def gone(kept, size):
    return [i for i in range(size) if i not in kept]


def channels(heads, size):
    return [head * size + j for head in heads for j in range(size)]


@torch.no_grad()
def zero_rows(module, rows):
    module.weight[rows] = 0
    if getattr(module, "bias", None) is not None:
        module.bias[rows] = 0


@pytest.mark.parametrize("name", [*CUTTABLE, *HYBRIDS])
def test_a_cut_to_the_same_sizes_is_the_identity(name):
    model = model_of(name)
    own, ssm = sizes_of(model.config), [i for i in SSM if "+" in name]
    everything = Cut(
        layers=range(own.layers),
        hidden=range(own.hidden),
        ffn={i: range(own.ffn) for i in range(own.layers)},
        heads={i: range(own.heads) for i in range(own.layers)},
        state_heads={i: range(own.state_heads) for i in ssm},
        state_dims={i: [range(own.state_size)] * own.state_groups for i in ssm},
        tokens=range(own.vocabulary),
    )
    for what in (Cut(), everything):
        same = cut(model, what)
        assert same.config.to_dict() == model.config.to_dict()
        state = same.state_dict()
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value) and state[key].data_ptr() != value.data_ptr(), key
        torch.testing.assert_close(logits(same), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CUTTABLE, *HYBRIDS])
def test_layers_that_add_nothing(name, tmp_path):
    """Layers 0 and 2 go: what is said of single layers (windows, positions, kinds) follows those that stay."""
    model = model_of(name)
    for i in (0, 2):
        layer = model.model.layers[i]
        for module in (layer.self_attn, layer.mlp):
            for part in ("o_proj", "dense", "out_proj", "down_proj", "fc2"):
                if hasattr(module, part):
                    zero_rows(getattr(module, part), range(HIDDEN))
    expected = logits(model)
    smaller = keep_layers(model, [3, 1])
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@torch.no_grad()
def zero_neurons(model, kept):
    for i, layer in enumerate(model.model.layers):
        out = gone(kept[i], FFN)
        if hasattr(layer.mlp, "fc2"):  # gelu(0) = 0
            zero_rows(layer.mlp.fc1, out)
        elif hasattr(layer.mlp, "gate_up_proj"):
            zero_rows(layer.mlp.gate_up_proj, [FFN + j for j in out])
        else:
            # AFM's MLP has no gate, and its activation of 0 is 0
            zero_rows(layer.mlp.up_proj if i % 2 or not hasattr(layer.mlp, "gate_proj") else layer.mlp.gate_proj, out)


@pytest.mark.parametrize("name", [*CUTTABLE, "gemma2+mamba2", "phi+discrete_mamba2"])
def test_neurons_that_put_out_nothing(name, tmp_path):
    model = model_of(name)
    kept = {i: torch.randperm(FFN, generator=torch.Generator().manual_seed(i))[:17].tolist() for i in range(LAYERS)}
    zero_neurons(model, kept)
    expected = logits(model)
    smaller = keep_ffn(model, kept)
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@torch.no_grad()
def zero_heads(model, layer, heads, kv_heads):
    """What these query heads put out, and what these kv heads hold."""
    attention, config = model.model.layers[layer].self_attn, model.model.config
    d, h = attention.head_dim, config.num_attention_heads
    query, kv = channels(heads, d), channels(kv_heads, d)
    output = getattr(attention, "o_proj", None) or attention.dense
    output.weight[:, query] = 0
    if hasattr(attention, "qkv_proj"):
        zero_rows(attention.qkv_proj, query)
        zero_rows(attention.qkv_proj, [h * d + j for j in kv])
    else:
        zero_rows(attention.q_proj, query)
        zero_rows(attention.k_proj, kv)


# sizes the classes with hidden_size % num_heads == 0 have: 2 of 4 heads, or 1 of 2
@pytest.mark.parametrize("keep", ["one query head a group", "one group"])
@pytest.mark.parametrize("name", [*CUTTABLE, "olmo2+mamba2", "qwen3+discrete_mamba2", "llama+kimi_delta"])
def test_heads_that_put_out_nothing(name, keep, tmp_path):
    options = {}
    if name == "phi_normed":  # its norms of q and k are hidden // heads channels wide: both are cut
        options = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = model_of(name, **options)
    config = model.model.config
    h, g = config.num_attention_heads, config.num_key_value_heads
    group = h // g
    if keep == "one group":
        kept = {i: [i % g * group + j for j in range(group)] for i in range(LAYERS)}
    else:
        kept = {i: [group * kv + (i + kv) % group for kv in range(g)] for i in range(LAYERS)}
    for i in range(LAYERS):
        if not isinstance(model.model.layers[i].self_attn, StateMixer):
            kv = {head // group for head in kept[i]}
            zero_heads(model, i, gone(kept[i], h), gone(kv, g))
    expected = logits(model)
    if name == "phi_normed":
        with pytest.raises(
            ValueError, match=r"^hidden 32 with \d heads of 8: PhiConfig with qk_layernorm .* head dim$"
        ):
            keep_heads(model, kept)
        return
    if name == "phi4_mini" and len(kept[0]) != h:
        with pytest.raises(ValueError, match=r"^hidden 32 with 1 heads of 16: Phi3Config does not allow it: .*factor"):
            keep_heads(model, kept)
        return
    smaller = keep_heads(model, kept)
    assert smaller.model.config.num_attention_heads == len(kept[0])
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@torch.no_grad()
def zero_channels(model, kept):
    """Nothing is added to these channels of the residual stream; behind LayerNorms the others' mean is 0."""
    out = gone(kept, HIDDEN)
    writers = []
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            names = ("o_proj", "dense", "out_proj", "down_proj", "fc2")
            writers += [getattr(module, name) for name in names if hasattr(module, name)]
    layer_norm = model.model.config.model_type in ("phi", "cohere", "cohere2")
    for writer in writers:
        zero_rows(writer, out)
        if layer_norm:
            writer.weight[kept] -= writer.weight[kept].mean(0)
            if writer.bias is not None:
                writer.bias[kept] -= writer.bias[kept].mean()
    embedding = model.model.embed_tokens.weight
    embedding[:, out] = 0
    if layer_norm:
        embedding[:, kept] -= embedding[:, kept].mean(1, keepdim=True)
        for layer in model.model.layers:  # what the norm puts out there, which projections without biases cannot take
            if isinstance(layer.self_attn, DeltaMixer) and layer.input_layernorm.bias is not None:
                layer.input_layernorm.bias[out] = 0


@pytest.mark.parametrize("name", [*CUTTABLE, *HYBRIDS])
def test_channels_to_which_nothing_is_added(name, tmp_path):
    model = model_of(name)
    if name.startswith(("phi_normed", "phi4_mini")):
        with pytest.raises(ValueError, match="hidden 24 with 2 heads of 16"):
            keep_hidden(model, range(24))
        return
    kept = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(5))[:20].tolist()
    zero_channels(model, kept)
    expected = logits(model)
    smaller = keep_hidden(model, kept)
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@pytest.mark.parametrize("name", [name for name in CUTTABLE if name not in ("phi_normed", "phi4_mini")])
def test_channels_of_a_head_tied_or_not_the_other_way(name, tmp_path):
    """A tied head is multiplied with the embedding, and the norm in front of it makes up for that."""
    model = model_of(name, tie_word_embeddings=not FAMILIES[name][1].get("tie_word_embeddings", False))
    kept = list(range(3, 32, 2)) + [0]
    zero_channels(model, kept)
    expected = logits(model)
    smaller = keep_hidden(model, kept)
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@pytest.mark.parametrize("name", ["phi_normed", "phi4_mini"])
def test_channels_with_heads_where_the_class_ties_them(name, tmp_path):
    model = model_of(name)
    channels_kept, heads = list(range(1, 32, 2)), {i: [i % 2] for i in range(LAYERS)}
    zero_channels(model, channels_kept)
    for i in range(LAYERS):
        zero_heads(model, i, [1 - i % 2], [1 - i % 2])
    expected = logits(model)
    smaller = cut(model, Cut(hidden=channels_kept, heads=heads))
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


def mixers_of(model):
    return {i: model.model.layers[i].self_attn for i in model.config.ssm_layers}


@torch.no_grad()
def zero_state_heads(mixer, heads):
    """x or the values, which are all that a head's state and its D see."""
    x = channels(heads, mixer.head_dim)
    if isinstance(mixer, DeltaMixer):
        mixer.input_weights()["v"][x] = 0
        return
    zero_rows(mixer.in_proj, [mixer.slices()["x"].start + j for j in x])
    zero_rows(mixer.conv1d, x)


@torch.no_grad()
def zero_state_dims(mixer, which, dims):
    """B or C of these (group, dimension) pairs, or queries and keys."""
    if isinstance(mixer, DeltaMixer):
        for part in ("q", "k"):
            mixer.input_weights()[part][[group * mixer.state_size + j for group, j in dims]] = 0
        return
    start, offset = mixer.slices()[which].start, mixer.inner_size + (which == "C") * mixer.group_size
    rows = [group * mixer.state_size + j for group, j in dims]
    zero_rows(mixer.in_proj, [start + row for row in rows])
    zero_rows(mixer.conv1d, [offset + row for row in rows])


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_delta"])
@pytest.mark.parametrize("keep", ["groups", "heads of each group", "both"])
def test_state_heads_that_put_out_nothing(mixer, keep, tmp_path):
    """Heads within a group share the norm of the mixer's output, whose mean then runs over fewer."""
    model = grouped_hybrid(mixer)
    kept = {
        "groups": {1: [0, 1, 2], 3: [3, 4, 5]},
        "heads of each group": {1: [0, 2, 4, 5], 3: [0, 1, 3, 4]},
        "both": {1: [1, 2], 3: [3, 5]},
    }[keep]
    for i, module in mixers_of(model).items():
        zero_state_heads(module, gone(kept[i], 6))
    expected = logits(model)
    smaller = keep_state(model, kept)
    own = sizes_of(smaller.config)
    assert (own.state_heads, own.state_groups) == {"groups": (3, 1), "both": (2, 1)}.get(keep, (4, 2))
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@pytest.mark.parametrize(
    "mixer, which",
    [(mixer, which) for mixer in ("mamba2", "discrete_mamba2") for which in "BC"] + [("gated_delta", "q and k")],
)
def test_state_dimensions_that_hold_or_say_nothing(mixer, which, tmp_path):
    """Each group keeps its own; with a group cut at once, the other's entry does not matter."""
    model = grouped_hybrid(mixer)
    kept = {1: [[0, 3, 6], [1, 2, 5]], 3: [[6, 5, 4], [0, 1, 2]]}
    for i, module in mixers_of(model).items():
        zero_state_dims(module, which, [(g, j) for g in range(2) for j in gone(kept[i][g], 7)])
    expected = logits(model)
    smaller = keep_state(model, dims=kept)
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)
    heads = {1: [0, 1, 2], 3: [3, 4, 5]}
    for i, module in mixers_of(model).items():
        zero_state_heads(module, gone(heads[i], 6))
    smaller = keep_state(model, heads, {1: [[0, 3, 6], []], 3: [[], [0, 1, 2]]})
    assert_same(smaller, logits(model))


def test_heads_and_state_dimensions_of_kimi_delta_attention(tmp_path):
    """Every head has keys of its own, which go with it."""
    model = grouped_hybrid("kimi_delta", 6)
    heads, dims = {1: [0, 2, 4, 5], 3: [0, 1, 3, 4]}, {i: [[g, 6, (g + 2) % 6] for g in range(6)] for i in SSM}
    for i, module in mixers_of(model).items():
        zero_state_heads(module, gone(heads[i], 6))
        zero_state_dims(module, "q and k", [(g, j) for g in range(6) for j in gone(dims[i][g], 7)])
    expected = logits(model)
    for smaller in (keep_state(model, heads), keep_state(model, dims=dims), keep_state(model, heads, dims)):
        assert_same(smaller, expected)
    own = sizes_of(smaller.config)
    assert (own.state_heads, own.state_groups, own.state_size) == (4, 4, 3)
    forget = smaller.model.layers[1].self_attn.forget_gate
    assert torch.equal(forget.A_log[0, 0, :, 0], model.model.layers[1].self_attn.forget_gate.A_log[0, 0, heads[1], 0])
    assert_ordinary(smaller, tmp_path)
    with pytest.raises(ValueError, match="state_heads: got 4 for state_groups 2"):
        sized_config(model.config, replace(sizes_of(model.config), state_heads=4, state_groups=2))


def test_mixers_of_both_kinds_share_an_epsilon():
    """Whole layers, channels, neurons and whole heads go; fewer dimensions of states would change it for some."""
    torch.manual_seed(1)
    teacher = tiny_teacher("llama", rms_norm_eps=1e-2)
    model = stirred(hybrid_from_teacher(teacher, SSM, {1: "mamba2", 3: "gated_delta"}).eval())
    heads, kept = {1: [0, 2], 3: [1, 3]}, list(range(3, 31, 2)) + [2, 4]
    zero_channels(model, kept)
    for i, module in mixers_of(model).items():
        zero_state_heads(module, gone(heads[i], 4))
    smaller = cut(model, Cut(hidden=kept, state_heads=heads))
    assert_same(smaller, logits(model))
    dims = {i: [[0, 1, 2]] * 4 for i in SSM}
    with pytest.raises(ValueError, match="^state_size: got 3; allowed in a student of mamba2 and gated_delta .*: 8"):
        keep_state(model, dims=dims)
    one = keep_layers(model, [0, 2, 3])
    assert sizes_of(keep_state(one, dims={2: dims[3]}).config).state_size == 3


@pytest.mark.parametrize(
    "name",
    ["llama+mamba2", "qwen3+mamba2", "gemma2+discrete_mamba2", "olmo2+mamba2", "qwen3+gated_delta", "olmo2+kimi_delta"],
)
def test_every_axis_at_once(name, tmp_path):
    """One call, with the layers' own choices numbered as in the uncut model."""
    model = model_of(name)
    layers, kept_channels = [0, 1, 3], list(range(3, 31, 2)) + [2, 4]
    ffn = {i: list(range(i, 40))[:20] for i in range(LAYERS)}
    heads = {i: [i % 2, 2 + i % 2] for i in (0, 2)}
    state_heads, dims = {1: [0, 2], 3: [1, 3]}, {i: [[0, 2, 5]] * 4 for i in SSM}
    zero_channels(model, kept_channels)
    zero_neurons(model, ffn)
    zero_heads(model, 0, gone(heads[0], 4), [])
    layer = model.model.layers[2]
    for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
        zero_rows(module, range(HIDDEN))
    size = sizes_of(model.config).state_size
    for i, module in mixers_of(model).items():
        zero_state_heads(module, gone(state_heads[i], 4))
        zero_state_dims(module, "C", [(g, j) for g in range(4) for j in gone([0, 2, 5], size)])
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    what = Cut(layers=layers, hidden=kept_channels, ffn=ffn, heads=heads, state_heads=state_heads, state_dims=dims)
    smaller = cut(model, what)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sizes_of(smaller.config) == Sizes(
        layers=3, hidden=16, ffn=20, heads=2, kv_heads=2, state_heads=2, state_groups=2, state_size=3, vocabulary=97
    )
    assert_same(smaller, expected)
    assert_ordinary(smaller, tmp_path)


@pytest.mark.parametrize("name", [*CUTTABLE, "phi+discrete_mamba2", "llama+mamba2"])
def test_a_smaller_vocabulary(name, tmp_path):
    """The other rows go, those that stay are numbered anew, and so are the special tokens."""
    model = model_of(name)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 40], pad_token_id=0)
    tokens = [0, 1, 2, *range(10, 70)]
    smaller = cut(model, Cut(tokens=tokens))
    text = torch.tensor([tokens])
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(torch.arange(len(tokens))[None]).logits, model(text).logits[..., tokens], rtol=1e-5, atol=1e-5
        )
    assert (smaller.config.vocab_size, smaller.config.eos_token_id) == (63, 2)
    assert smaller.generation_config.eos_token_id == [2, 33]
    smaller.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (63, HIDDEN)
    with pytest.raises(ValueError, match=r"^tokens: eos_token_id 40 would go; keep it$"):
        cut(model, Cut(tokens=range(30)))


def test_dtype_mode_and_settings_stay():
    model = tiny_teacher("llama").to(torch.bfloat16).requires_grad_(False).train()
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2)
    smaller = keep_ffn(model, {i: range(8) for i in range(LAYERS)})
    assert smaller.dtype == torch.bfloat16 and smaller.training
    assert all(parameter.requires_grad for parameter in smaller.parameters())
    assert smaller.generation_config.temperature == 0.7
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight


def test_a_cut_goes_through_json():
    what = Cut(layers=range(3), hidden=torch.arange(4), ffn={2: (1, 2)}, state_dims={1: [[0, 2], range(2)]})
    plain = Cut(layers=[0, 1, 2], hidden=[0, 1, 2, 3], ffn={2: [1, 2]}, state_dims={1: [[0, 2], [0, 1]]})
    assert Cut.from_dict(json.loads(json.dumps(what.to_dict()))) == plain
    assert Cut().to_dict() == {}


def test_words_for_layers():
    assert resolve_layers("every_second", 5) == [0, 2, 4]
    assert resolve_layers("first:2", 5) == [0, 1]
    assert resolve_layers("last:2", 5) == [3, 4]
    assert resolve_layers("without:1-3", 5) == [0, 4]
    assert resolve_layers([4, 0], 5) == [0, 4]


BAD_LAYERS = {
    "third": r"^layers: got 'third', allowed: every_second, first:k, last:k, without:a-b, or a list of layer indices$",
    "first:x": "^layers: got 'first:x', allowed",
    "first:5": r"^layers: got 'first:5'; allowed: 1 to 4 layers$",
    "without:0-3": r"^layers: got 'without:0-3'; allowed: a block within layers 0 to 3 that leaves a layer$",
    "without:2-1": "^layers: got 'without:2-1'",
    (): r"^layers: nothing would be kept; give at least one of 0 to 3$",
    (1, 4): r"^layers: got 4, allowed: 0 to 3$",
    (1, 1): r"^layers: 1 given twice$",
}


@pytest.mark.parametrize("layers", BAD_LAYERS, ids=str)
def test_bad_layers_get_one_line(layers):
    with pytest.raises(ValueError, match=BAD_LAYERS[layers]):
        keep_layers(tiny_teacher("llama"), layers)


def every(indices, layers=range(LAYERS)):
    return {i: list(indices) for i in layers}


BAD_CUTS = {
    "ffn: no entry for layer 3, which is kept; every kept layer needs one": Cut(ffn=every([0], range(3))),
    "ffn: layers keep different numbers (1, 2); a model of this class has one size for all of its layers": Cut(
        ffn=every([0]) | {3: [0, 1]}
    ),
    "ffn of layer 2: got 48, allowed: 0 to 47": Cut(ffn=every([0]) | {2: [48]}),
    "hidden: got -1, allowed: 0 to 31": Cut(hidden=[-1, 3]),
    "heads of layer 0: kv_heads [0, 1] keep [2, 1] heads; allowed: equally many of each one that stays": Cut(
        heads=every([0, 1, 2])
    ),
    "hidden 30 with 4 heads of 8: LlamaConfig does not allow it: ValueError: The hidden size (30) is not a multiple of "
    "the number of attention heads (4).": Cut(hidden=range(30)),
}


@pytest.mark.parametrize("line", BAD_CUTS)
def test_bad_cuts_get_one_line(line):
    with pytest.raises(ValueError) as caught:
        cut(tiny_teacher("llama"), BAD_CUTS[line])
    assert str(caught.value) == line


def test_bad_state_cuts_get_one_line():
    model = grouped_hybrid("mamba2")
    with pytest.raises(ValueError, match=r"^state_heads of layer 1: state_groups \[0, 1\] keep \[1, 2\] heads; "):
        keep_state(model, {1: [0, 3, 4], 3: [0, 3, 4]})
    with pytest.raises(ValueError, match=r"^state_dims of layer 1: got 1 lists, allowed: one for each of .* 2 groups$"):
        keep_state(model, dims={1: [[0]], 3: [[0]]})
    with pytest.raises(ValueError, match=r"^state_dims of layer 1: groups keep \[1, 2\], allowed: one number for all$"):
        keep_state(model, dims={1: [[0], [0, 1]], 3: [[0], [0]]})


BAD_SIZES = {
    "heads: got 3 for kv_heads 2; allowed: multiples of 2 up to 4 (2 a group in the model)": {"heads": 3},
    "heads: got 1 for kv_heads 2, which leaves groups without a head; allowed: multiples of 2 up to 4, or fewer "
    "kv_heads": {"heads": 1},
    "heads: got 4 for kv_heads 1; allowed: multiples of 1 up to 2 (2 a group in the model)": {"kv_heads": 1},
    "hidden: got 33, allowed: 1 to 32, the model's own": {"hidden": 33},
    "layers: got 0, allowed: 1 to 4, the model's own": {"layers": 0},
    "state_size: got 4, but the model has no mixer": {"state_size": 4},
}


@pytest.mark.parametrize("line", BAD_SIZES)
def test_bad_sizes_get_one_line(line):
    config = tiny_teacher("llama").config
    own = {name: getattr(sizes_of(config), name) for name in Sizes.__dataclass_fields__}
    with pytest.raises(ValueError) as caught:
        sized_config(config, Sizes(**{**own, **BAD_SIZES[line]}))
    assert str(caught.value) == line


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CUTTABLE])
def test_mixtures_of_experts_lose_whole_layers_alone(family):
    model = tiny_teacher(family)
    kept = keep_layers(model, [0, 2])  # of qwen3_moe's, layer 0 has a plain MLP and stays the first
    assert type(kept) is type(model) and len(kept.model.layers) == 2
    line = f"^model_type '{model.config.model_type}' cannot be cut; its MLPs are mixtures of experts, .* keep_layers"
    with pytest.raises(ValueError, match=line) as caught:
        keep_heads(model, every([0, 2]))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=line):
        keep_layers(hybrid_from_teacher(model, [1]), [0, 1])


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match="from_bamba"):
        sizes_of(BambaConfig())
    with pytest.raises(ValueError, match=r"^model_type 'gpt2' cannot be cut; missing: .* supported: llama"):
        sizes_of(GPT2Config())
    model = tiny_teacher("llama")
    model.model.layers[1].mlp.up_proj.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^layer 1: mlp.up_proj.extra.weight \(torch.float32\) is no plain weight"):
        cut(model, Cut())


@pytest.mark.skipif(not norms_groups_apart(), reason="this transformers norms Bamba's groups together")
def test_a_cut_hybrid_is_a_bamba_where_its_class_has_the_sizes():
    """Sizes, positions and norms survive the way to the stock class and back."""
    model = model_of("llama+mamba2")
    fold_conv_input_bias(model)
    what = Cut(
        layers=[1, 2, 3],
        hidden=range(16),
        ffn=every(range(9)),
        state_heads={1: [0, 1], 3: [2, 3]},
        state_dims={i: [[1, 4, 6]] * 4 for i in SSM},
    )
    smaller = cut(model, what)
    bamba = to_bamba(smaller)
    assert (bamba.config.attn_layer_indices, bamba.config.mamba_n_heads, bamba.config.mamba_d_state) == ([1], 2, 3)
    torch.testing.assert_close(logits(bamba), logits(smaller), rtol=1e-4, atol=1e-4)
    again = to_bamba(cut(from_bamba(to_bamba(model)), what))
    torch.testing.assert_close(logits(again), logits(bamba), rtol=1e-4, atol=1e-4)
    grouped = keep_state(grouped_hybrid("mamba2"), {1: [0, 2, 4, 5], 3: [0, 1, 3, 4]})
    with pytest.raises(
        ValueError, match="output norms have epsilon 0.015, its other norms 0.01; Bamba has one for all"
    ):
        to_bamba(grouped)

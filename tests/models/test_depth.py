"""Some layers of models whose family nobody here knows."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoXConfig,
    OPTConfig,
)

from mohawk.models.cutting.cuts import keep_layers
from mohawk.models.cutting.depth import _check_layers
from mohawk.models.decoders import decoder
from tests.models.conftest import COMMON, tiny_teacher

TINY = {"vocab_size": 97, "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=97, n_layer=4, n_embd=32, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**TINY, intermediate_size=48),
    "opt": OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
    "gpt_neo": GPTNeoConfig(
        vocab_size=97, num_layers=4, hidden_size=32, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=5, bos_token_id=1, eos_token_id=2,
    ),
    "exaone4": AutoConfig.for_model("exaone4", **{**COMMON, "sliding_window": 6, "sliding_window_pattern": 3}),
    "qwen3_moe": AutoConfig.for_model(
        "qwen3_moe", **{**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
}  # fmt: skip
BAMBA = BambaConfig(**COMMON, mamba_n_heads=4, mamba_d_head=16, attn_layer_indices=[1])


class Alternating(GPT2Config):
    """Makes its layer types anew from a pattern when it is loaded."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer_types = ["full_attention", "sliding_attention"] * (self.n_layer // 2) + ["x"] * (self.n_layer % 2)


IDS = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))


def made(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


class Skip(torch.nn.Module):
    """Passes on hidden states as the layer in its place would."""

    def __init__(self, layer):
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name):
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states, *args, **kwargs):
        out = self.layer(hidden_states, *args, **kwargs)
        return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states


@pytest.mark.parametrize("name", OTHERS)
def test_the_layers_left_out_are_all_that_changes(name, tmp_path):
    model = made(OTHERS[name])
    model.generation_config = GenerationConfig(max_new_tokens=3)
    before = copy.deepcopy(model.state_dict())
    smaller = keep_layers(model, [0, 2, 3])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(smaller) is type(model) and smaller.config.num_hidden_layers == 3
    _, layers = decoder(model)
    layers[1] = Skip(layers[1])
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-5)
    assert not set(map(id, smaller.parameters())) & set(map(id, model.parameters()))
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(smaller), rtol=0, atol=0)
    assert loaded.generation_config.max_new_tokens == 3


def test_layers_that_are_others_elsewhere_are_refused():
    """A scale by index, a kind of layer by index, a pattern over the indices; and what shows in no attribute."""
    scaled = copy.deepcopy(OTHERS["gpt2"])
    scaled.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match=r"^layers: in GPT2LMHeadModel (attn.scaling depends on a layer's|layer 2 is)"):
        keep_layers(made(scaled), [0, 2, 3])
    mixed = copy.deepcopy(OTHERS["qwen3_moe"])
    mixed.mlp_only_layers = [1]
    with pytest.raises(ValueError, match=r"^layers: Qwen3MoeForCausalLM has other parameters in layers at other"):
        keep_layers(made(mixed), [0, 2, 3])
    with pytest.raises(ValueError, match=r"^layers: Alternating cannot hold the layer_types of the layers that stay$"):
        keep_layers(GPT2LMHeadModel(Alternating(n_layer=4, n_embd=32, n_head=4, vocab_size=97)), [0, 2, 3])
    model = made(OTHERS["gpt2"])
    smaller = keep_layers(model, [0, 2])
    with torch.no_grad():
        smaller.transformer.h[1].mlp.c_fc.weight.mul_(2)
    with pytest.raises(ValueError, match=r"^layers: in GPT2LMHeadModel layer 2 is another function at another place$"):
        _check_layers(model, smaller, [0, 2])


def test_packed_weights_and_adapters_are_refused():
    model = made(OTHERS["gpt2"])
    model.transformer.h[1].mlp.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^layers: transformer.h.1.mlp.packed of this GPT2LMHeadModel is packed; deq"):
        keep_layers(model, [0])
    with pytest.raises(ValueError, match=r"^layers: got 4, allowed: 0 to 3$"):
        keep_layers(made(OTHERS["opt"]), [4])
    with pytest.raises(ValueError, match="^a Bamba is cut as the hybrid it is: from_bamba"):
        keep_layers(BambaForCausalLM(BAMBA), [0])


def test_modes_stay():
    model = made(OTHERS["gpt_neox"]).train()
    decoder(model)[1][0].eval()
    smaller = keep_layers(model, "every_second")
    assert smaller.training and [layer.training for layer in decoder(model)[1]] == [False, True, True, True]
    assert keep_layers(tiny_teacher("llama").train(), "first:1").training

"""Random weights drawn a module at a time are those that a class draws in one pass, but for the numbers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mohawk.models.random_weights as random_weights
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.random_weights import random_model
from tests.models.conftest import COMMON, FAMILIES, tiny_teacher

CPU = torch.device("cpu")
# with experts, tied weights, buffers, biases
SOME = ("mixtral", "gemma3", "phi4_mini", "phi_normed")
# of other classes: what the root sets of its layers, what constructors alone set, and what is made of another tensor
OTHERS = {
    "gpt2": {"n_layer": 8, "n_embd": 32, "n_head": 4, "vocab_size": 97},
    "openai-gpt": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 97},
    "apertus": COMMON,
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "vocab_size": 97,
               "state_size": 8, "n_groups": 1},
    "falcon_h1": COMMON | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                           "mamba_n_groups": 1},
}  # fmt: skip


def shaped(name: str):
    if name == "hybrid":
        return hybrid_from_teacher(tiny_teacher("qwen3"), [1, 2], {1: "mamba2", 2: "kimi_delta"})
    kind, options = FAMILIES[name] if name in FAMILIES else (name, {})
    options = COMMON | options if name in FAMILIES else OTHERS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))


@pytest.mark.parametrize("name", ["hybrid", *SOME, *OTHERS])
def test_it_is_what_the_class_makes_in_one_pass(name):
    of = shaped(name)
    torch.manual_seed(3)
    once = type(of)(of.config)
    state = torch.random.get_rng_state()
    model = random_model(type(of), of.config, 0, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.state_dict().keys() == once.state_dict().keys() and model.training
    found, told = dict(model.named_parameters()), dict(once.named_parameters())
    assert found.keys() == told.keys()  # tied ones once
    for key, values in told.items():
        values, mine = values.detach(), found[key]
        assert (mine.dtype, mine.shape, mine.requires_grad) == (values.dtype, values.shape, True), key
        mine = mine.detach()
        if values.numel() > 1 and values.std() > 0 and len(values.unique()) > values.numel() / 2 and not (
            torch.equal(mine, values)  # numbers that count the channels
        ):  # fmt: skip
            wide = 6 / values.numel() ** 0.5
            assert float(mine.std() / values.std()) == pytest.approx(1, abs=wide), key
            assert float((mine.mean() - values.mean()) / values.std()) == pytest.approx(0, abs=2 * wide), key
        else:
            torch.testing.assert_close(mine, values, msg=key)
    for (key, mine), (_, buffer) in zip(model.named_buffers(), once.named_buffers(), strict=True):
        assert torch.equal(mine, buffer), key
    ids = torch.arange(8)[None]
    assert torch.isfinite(model.eval()(input_ids=ids).logits).all()


def test_every_module_and_every_seed_has_numbers_of_its_own():
    of = shaped("llama")
    made = [dict(random_model(type(of), of.config, seed, CPU).named_parameters()) for seed in (0, 0, 1)]
    for name, values in made[0].items():
        assert torch.equal(made[1][name], values)
    matrices = [p.flatten()[:64] for model in made[1:] for p in model.values() if p.dim() > 1]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices) > 20


def test_a_module_is_whole_at_a_time(monkeypatch):
    of = shaped("llama_biased")
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in of.modules())
    drawn, twins, held = random_weights._drawn, [], []

    def noted(twin, *given):
        twins.append(twin)
        return drawn(twin, *given)

    def seen(tensor, values):
        held.append(sum(p.numel() for p in twins[0].parameters() if not p.is_meta))

    monkeypatch.setattr(random_weights, "_drawn", noted)
    monkeypatch.setattr(random_weights, "materialise", lambda model, device: None)
    monkeypatch.setattr(random_weights, "fill", seen)
    model = random_model(type(of), of.config, 0, CPU)
    assert len(held) == len([*of.parameters()]) and max(held) == largest
    assert all(p.is_meta for p in model.parameters() if p.dim() > 1)  # until it has its part's memory


def test_a_matrix_that_is_never_drawn_is_named(monkeypatch):
    of = shaped("arcee")
    monkeypatch.setattr(type(of), "_init_weights", lambda self, module: None)
    with pytest.raises(ValueError, match="ArceeForCausalLM does not say how lm_head.weight of a new model is drawn"):
        random_model(type(of), of.config, 0, CPU)
    empty = random_model(type(of), of.config, 0, torch.device("meta"))
    assert all(p.is_meta for p in empty.parameters())

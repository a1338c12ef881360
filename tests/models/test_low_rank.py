"""Low-rank factors: the best ones, and models that go there and back."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mohawk.models.low_rank import LowRankLinear, factorise, low_rank_factors, merge_factors, reduce_rank
from tests.models.conftest import tiny_teacher


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_matrix_of_that_rank_is_closer(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for rank in (1, 3, 5):
        left, right = low_rank_factors(weight, rank)
        assert (left.shape, right.shape, left.dtype) == ((shape[0], rank), (rank, shape[1]), dtype)
        error = (weight.double() - left.double() @ right.double()).norm()
        best = torch.linalg.svdvals(weight.double())[rank:].norm()  # Eckart-Young
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        assert best - rounding <= error <= best + rounding
        torch.testing.assert_close(left.double().norm(dim=0), right.double().norm(dim=1), rtol=0.01, atol=1e-6)


def test_a_weight_of_low_rank_is_kept_exactly():
    model = tiny_teacher("llama_biased")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                wide = torch.randn(linear.out_features, 3)
                linear.weight.copy_(wide @ torch.randn(3, linear.in_features) / 6)
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    for change in (reduce_rank, factorise):
        torch.testing.assert_close(change(copy.deepcopy(model), 3)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_factors_train_and_merge_into_an_ordinary_checkpoint(tmp_path):
    model, ids = tiny_teacher("qwen2"), torch.arange(3, 20)[None]
    names = [name for name, _ in model.named_parameters()]
    head = model.lm_head.weight
    factorise(model, 4)
    factored = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(factored) == 4 * 7 and model.lm_head.weight is head
    model(ids, labels=ids).loss.backward()
    assert all(m.left.grad.abs().sum() > 0 and m.right.grad.abs().sum() > 0 for m in factored)
    expected = model(ids).logits
    assert merge_factors(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert torch.linalg.matrix_rank(loaded.model.layers[2].mlp.up_proj.weight.double(), rtol=1e-5) == 4


def test_projections_too_small_to_gain_stay():
    model = tiny_teacher("llama")
    factorise(model, 20)  # 20 * (32 + 16) > 32 * 16, and k_proj has rank 16
    assert isinstance(model.model.layers[0].self_attn.k_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)  # 20 * (32 + 48) > 32 * 48
    factorise(model, 19, lambda name: name.endswith("up_proj"))
    assert isinstance(model.model.layers[0].mlp.up_proj, LowRankLinear)


def test_bad_ranks_get_one_line():
    with pytest.raises(ValueError, match=r"^rank: got 0, allowed: 1 to 3 for a weight of \(3, 4\)$"):
        low_rank_factors(torch.ones(3, 4), 0)
    with pytest.raises(ValueError, match=r"^weight: got a tensor of shape \(3,\), allowed: a matrix$"):
        low_rank_factors(torch.ones(3), 1)
    with pytest.raises(ValueError, match=r"^rank: got 32, allowed: 1 to 31, below the rank of the largest projection$"):
        reduce_rank(tiny_teacher("llama"), 32)
    with pytest.raises(ValueError, match=r"^which: none of the model's 29 projections was chosen$"):
        factorise(tiny_teacher("llama"), 4, lambda name: False)

"""Padding anywhere: a row's tokens are answered, and learnt from, as if they stood next to each other."""

import itertools

import pytest
import torch

from mohawk.models.call import CACHE
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.packed import positions_in
from tests.models.conftest import tiny_teacher
from tests.models.test_hybrid import student_of

LAYERS = {"hybrid": (1, 3), "pure": "all"}
MIXERS = ("mamba2", "discrete_mamba2", "gated_delta", "kimi_delta")
# rows of a batch, 1 a token: padding on either side, between, everywhere, and none
MASKS = {
    "left": ["0000111111", "1111111111", "0000000001"],
    "right": ["1111100000", "1111111111", "1000000000"],
    "middle": ["1000011101", "1111111111", "0100000010"],
    "mixed": ["0110110010", "1111110111", "1011111111"],
}


def batch_of(rows):
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    ids = torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(mask.sum().item()))
    return ids, mask


def double(layers, mixer, **options):
    return student_of(tiny_teacher(), layers, mixer, **options).double()


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layers, mixer", [*itertools.product(LAYERS.values(), MIXERS)], ids=str)
def test_logits_and_every_gradient_are_those_of_the_tokens_alone(layers, mixer, rows):
    """In float64, where the two differ by nothing but the order of sums; no positions are given."""
    student = double(layers, mixer).train()
    ids, mask = batch_of(rows)
    weights = torch.randn(*ids.shape, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = mask.bool()
    student.zero_grad()
    padded = student(ids, attention_mask=mask).logits
    (padded * weights)[real].sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    for row, kept, weight, got in zip(ids, real, weights, padded, strict=True):
        alone = student(row[kept][None]).logits[0]
        torch.testing.assert_close(got[kept], alone, rtol=1e-9, atol=1e-9)
        (alone * weight[kept]).sum().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_puts_out_nothing_at_padding_and_takes_nothing_from_it(mixer):
    """Also where what stands there is not a number, and whatever dtype the mask has; no gradient enters or leaves."""
    layer = double("all", mixer).model.layers[0].self_attn
    _, mask = batch_of(MASKS["mixed"])
    x = torch.randn(*mask.shape, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x, padding_mask=mask.float())[0]
    assert torch.equal(out == 0, (mask == 0)[..., None].expand_as(out))
    (out * torch.randn_like(out)).sum().backward()
    assert bool((x.grad[mask == 0] == 0).all()) and bool((x.grad[mask == 1] != 0).any(-1).all())
    with torch.no_grad():
        broken = x.detach().masked_fill((mask == 0)[..., None], torch.nan)
        assert torch.equal(layer(broken, padding_mask=mask.bool())[0], out)
        assert torch.equal(layer(x, attention_mask=mask)[0], out), "a mask (b, n) is one of padding"


@pytest.mark.parametrize("layers, mixer", [*itertools.product(LAYERS.values(), MIXERS)], ids=str)
def test_turns_padded_in_any_way_on_one_cache_give_what_one_forward_gives(layers, mixer):
    """Three turns of three conversations, then single tokens, one row of which is padding."""
    student = double(layers, mixer)
    turns = [*MASKS["right"][:1], "0001", "1", *MASKS["mixed"][:1], "01", "1"]
    others = ["1" * len(turn) for turn in turns]
    thirds = [turn[::-1] for turn in turns]
    thirds[2], thirds[4] = "0", "10"
    mask = torch.tensor([[int(c) for c in "".join(row)] for row in (turns, others, thirds)])
    ids, _ = batch_of(["".join(row) for row in (turns, others, thirds)])
    cache, start, parts = student.new_cache(), 0, []
    with torch.no_grad():
        for length in map(len, turns):
            stop = start + length
            positions = positions_in(mask[:, :stop])[:, start:]
            given = {"attention_mask": mask[:, :stop], CACHE: cache}
            if start:  # in the first turn the mask alone says it
                given["position_ids"] = positions
            parts.append(student(ids[:, start:stop], **given).logits)
            start = stop
        logits = torch.cat(parts, 1)
        for row, kept, got in zip(ids, mask.bool(), logits, strict=True):
            alone = student(row[kept][None], use_cache=False).logits[0]
            torch.testing.assert_close(got[kept], alone, rtol=1e-9, atol=1e-9)


def test_positions_follow_from_the_mask_also_on_a_cache():
    student = double((1, 3), "mamba2")
    ids, mask = batch_of(MASKS["mixed"])
    with torch.no_grad():
        cache = student.new_cache()
        first = student(ids[:, :6], attention_mask=mask[:, :6], **{CACHE: cache}).logits
        second = student(ids[:, 6:], attention_mask=mask, **{CACHE: cache}).logits
        expected = student(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat([first, second], 1)[real], expected[real], rtol=1e-9, atol=1e-9)


def test_a_row_of_padding_alone_leaves_the_others_as_they_are():
    student = double("all", "mamba2").train()
    ids, mask = batch_of(["0000000000", "1111111111"])
    logits = student(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[1:], student(ids[1:]).logits, rtol=1e-9, atol=1e-9)
    logits[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_packed_rows_with_padding_between_their_documents():
    student = double((1, 3), "mamba2")
    ids, mask = batch_of(["1101101111"])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        layer = student.model.layers[1].self_attn
        x = torch.randn(1, 10, 32, dtype=torch.float64)
        got = layer(x, padding_mask=mask, segment_ids=segments)[0]
        for which in (0, 1):
            kept = (segments[0] == which) & mask[0].bool()
            torch.testing.assert_close(got[0, kept], layer(x[:, kept])[0][0], rtol=1e-9, atol=1e-9)


def test_a_matrix_over_all_positions_has_no_place_for_padding_between_tokens():
    layer = double("all", "mamba2").model.layers[0].self_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    layer.mixing(x, padding_mask=torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="padding between a row's tokens"):
        layer.mixing(x, padding_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]]))


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_float64_is_float64_in_gate_and_decay(mixer):
    """Against the formulas of the papers, written out."""
    torch.manual_seed(0)
    student = hybrid_from_teacher(tiny_teacher(), "all", mixer).double()
    layer = student.model.layers[0].self_attn
    raw = torch.linspace(-3, 3, 7, dtype=torch.float64)[None, :, None].expand(1, 7, layer.num_heads)
    log_decay, _ = layer.decay(raw)
    if mixer == "mamba2":
        dt = torch.log1p(torch.exp(raw + layer.dt_bias))
        expected = -dt * torch.exp(layer.A_log)
    else:
        expected = -torch.log1p(torch.exp(raw))
    torch.testing.assert_close(log_decay, expected, rtol=1e-14, atol=1e-15)
    y, z = torch.randn(2, 3, layer.inner_size, dtype=torch.float64).unbind(0)
    gated = layer.gate(y, z)
    if mixer == "mamba2":
        product = (y * z / (1 + torch.exp(-z))).view(3, layer.num_groups, -1)
        expected = product / (product.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
        expected = expected.flatten(1) * layer.norm.weight
    else:
        open_z = z + layer.z_bias
        expected = y * open_z / (1 + torch.exp(-open_z))
    assert gated.dtype == torch.float64
    torch.testing.assert_close(gated, expected, rtol=1e-13, atol=1e-13)

"""Importance scores: the definition, whatever the batches; the units chosen by them."""

import dataclasses

import pytest
import torch

from mohawk.data.packing import collate
from mohawk.kernels.delta.interface import gated_delta_rule
from mohawk.kernels.ssd.interface import ssd
from mohawk.models.cutting.cuts import Cut, cut, keep_layers
from mohawk.models.cutting.sizes import sizes_of
from mohawk.models.families import decoder_layers, family_of
from mohawk.models.packed import positions_of
from mohawk.pruning.baselines import magnitude_importance, random_importance
from mohawk.pruning.importance import Importance, choose, importance_sizes, measure_importance
from mohawk.pruning.layer_drops import measure_layer_drops
from mohawk.pruning.state_use import delta_state_use, state_use
from tests.models.conftest import CUTTABLE, tiny_teacher
from tests.models.test_cuts import (
    assert_same,
    grouped_hybrid,
    logits,
    mixers_of,
    model_of,
    zero_channels,
    zero_neurons,
    zero_rows,
    zero_state_dims,
    zero_state_heads,
)

N = 14


def rows(count=6, n=N):
    """Packed rows of one to three documents; the second is half padding, the third nothing but padding."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(3, 97, (n,), generator=generator)
        segments = (torch.arange(n) * (i % 3 + 1) // n).long()
        segments[{1: n // 2, 2: 0}.get(i, n) :] = -1
        labels = torch.where(segments >= 0, ids, -100)
        labels[segments.diff(prepend=segments[:1] - 1) != 0] = -100
        positions = positions_of(segments[None])[0]
        made.append(dict(input_ids=ids, position_ids=positions, segment_ids=segments, labels=labels))
    return made


def batched(found, size):
    return [collate(found[i : i + size]) for i in range(0, len(found), size)]


def scores(importance):
    return {
        f.name: v for f in dataclasses.fields(importance) if isinstance(v := getattr(importance, f.name), torch.Tensor)
    }


@pytest.mark.parametrize("name", [*CUTTABLE, "llama+mamba2", "phi+discrete_mamba2", "olmo2+mamba2", "gemma2+mamba2"])
def test_scores_do_not_depend_on_the_batches(name):
    model = model_of(name).train()
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    one, six = (measure_importance(model, batched(rows(), size)) for size in (1, 6))
    assert model.training
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert (one.rows, one.tokens) == (six.rows, six.tokens) == (5, 4 * N + N // 2)
    for axis, values in scores(one).items():
        assert values.dtype == torch.float64 and torch.isfinite(values).all(), axis
        silent = axis == "ffn" and name == "arcee"  # behind a ReLU a neuron may put out nothing
        assert bool((values > 0).all()) or (silent and bool((values >= 0).all())), axis
        torch.testing.assert_close(scores(six)[axis], values, rtol=1e-5, atol=1e-7)
    again = measure_importance(model, batched(rows(), 6))
    assert all(torch.equal(values, scores(six)[axis]) for axis, values in scores(again).items())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "olmo2"])
def test_the_definition(name):
    """Written out, one row and one document at a time without packing or padding."""
    model, found = model_of(name), rows()
    family, noted = family_of(model.config), {}

    def note(key):
        return lambda _, args, *out: noted.setdefault(key, []).append((out[0] if out else args[0]).detach())

    hooks = []
    for i, layer in enumerate(decoder_layers(model)):
        hooks.append(getattr(layer.mlp, family.mlp_output).register_forward_pre_hook(note(("ffn", i))))
        hooks.append(getattr(layer.self_attn, family.output).register_forward_pre_hook(note(("attention", i))))
        for norm in (family.input_norm, family.output_norm, *family.mlp_norms):
            if norm is not None:
                hooks.append(getattr(layer, norm).register_forward_hook(note(("norm", i, norm))))
    hooks.append(getattr(model.model, family.final_norm).register_forward_hook(note(("norm", "final"))))
    per_row, cosines, tokens = {}, torch.zeros(4, dtype=torch.float64), 0
    for row in found:
        documents = [row["input_ids"][row["segment_ids"] == s] for s in row["segment_ids"].unique() if s >= 0]
        if not documents:
            continue
        noted.clear()
        for ids in documents:
            with torch.no_grad():
                states = model.model(ids[None], output_hidden_states=True).hidden_states
                last = {}
                hook = decoder_layers(model)[3].register_forward_hook(lambda _, a, o, last=last: last.update(out=o))
                model.model(ids[None])
                hook.remove()
            for key in noted:  # the second run is dropped
                noted[key] = noted[key][:-1]
            states = [*states[:4], last["out"]]
            for i in range(4):
                cosines[i] += torch.cosine_similarity(states[i].double(), states[i + 1].double(), dim=-1).sum()
            tokens += len(ids)
        for key, parts in noted.items():
            per_row.setdefault(key, []).append(torch.cat(parts, 1)[0].double())
    for hook in hooks:
        hook.remove()

    def score(activations):
        return torch.stack([x.abs().mean(0) for x in activations]).square().sum(0).sqrt()

    got = measure_importance(model, batched(found, 4))
    h, g = model.config.num_attention_heads, model.config.num_key_value_heads
    expected_hidden = sum(score(x) for key, x in per_row.items() if key[0] == "norm")
    torch.testing.assert_close(got.hidden, expected_hidden, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.layers, 1 - cosines / tokens, rtol=1e-4, atol=1e-6)
    for i in range(4):
        torch.testing.assert_close(got.ffn[i], score(per_row["ffn", i]), rtol=1e-4, atol=0)
        outputs = per_row["attention", i]
        for units, have in ((h, got.heads), (g, got.kv_heads)):
            sizes = [x.unflatten(-1, (units, -1)).norm(dim=-1) for x in outputs]
            torch.testing.assert_close(have[i], score(sizes), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_use_of_the_state_is_what_each_dimension_adds_to_the_output(mixer):
    """A dimension's share is what the scan puts out, without D, when the others are silent."""
    model = grouped_hybrid(mixer)
    module = model.model.layers[1].self_attn
    segments = torch.stack([row["segment_ids"] for row in rows(2)])
    projected = module.in_proj(torch.randn(2, N, 32, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        got = state_use(module, projected, segments)
        parts = module.slices()
        convolved = module.conv1d(projected[..., parts["xBC"]], segment_ids=segments)
        x, B, C = (part.double() for part in module._cut(convolved))
        log_decay, scale = module.decay(projected[..., parts["decay"]])
        scale = None if scale is None else scale.double()
        for j in range(module.state_size):
            only = torch.zeros(module.state_size).double()
            only[j] = 1
            y = ssd(x, log_decay.double(), B, C * only, input_scale=scale, segment_ids=segments)
            share = y.unflatten(2, (2, 3)).square().sum((-1, -2)).sqrt()
            real = segments >= 0
            torch.testing.assert_close(got[..., j][real].double(), share[real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer, groups", [("gated_delta", 2), ("kimi_delta", 6)])
def test_use_of_a_gated_delta_rules_state(mixer, groups):
    """A dimension's share is what is read out when queries say nothing of the others, by the rule's definition."""
    model = grouped_hybrid(mixer, groups)
    module = model.model.layers[1].self_attn
    segments = torch.stack([row["segment_ids"] for row in rows(2)])
    hidden = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = delta_state_use(module, hidden, segments)
        inputs, _, raw = module.project(hidden)
        q, k, v = (part.double() for part in module._cut(module.conv1d(inputs, segment_ids=segments)))
        beta, log_decay = (gate.double() for gate in module.gates(raw, None))
        for j in range(module.state_size):
            only = torch.zeros(module.state_size).double()
            only[j] = 1
            y = gated_delta_rule(
                q * only, k, v, beta=beta, log_decay=log_decay, segment_ids=segments, backend="reference"
            )
            share = y.unflatten(2, (groups, -1)).square().sum((-1, -2)).sqrt()
            real = segments >= 0
            torch.testing.assert_close(got[..., j][real].double(), share[real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama+gated_delta", "phi+kimi_delta"])
def test_scores_of_a_gated_delta_rule(name):
    """From one pass and from weights: units of zeros score 0 and go first, on every axis of the mixer."""
    model = model_of(name)
    for i, module in mixers_of(model).items():
        zero_state_heads(module, [i - 1])
        zero_state_dims(module, "q and k", [(g, 5) for g in range(4)])
    expected = logits(model)
    importance = measure_importance(model, batched(rows(), 3))
    assert importance.state_heads[[0, 1], [0, 2]].tolist() == [0, 0]
    dims = importance.state_dims
    assert not dims[..., 5].any() and (dims[0, 1:, :5] > 0).all() and (dims[1, [0, 1, 3], :5] > 0).all()
    size = sizes_of(model.config)
    what = choose(importance, dataclasses.replace(size, state_heads=3, state_groups=3, state_size=7))
    assert {i: list(heads) for i, heads in what.state_heads.items()} == {1: [1, 2, 3], 3: [0, 1, 3]}
    assert_same(cut(model, what), expected)
    for other in (magnitude_importance(model), random_importance(model.config)):
        assert importance_sizes(other, size.vocabulary) == size
        assert cut(model, choose(other, dataclasses.replace(size, hidden=16, state_size=4))).config.hidden_size == 16


def test_saved_and_loaded(tmp_path):
    importance = measure_importance(model_of("llama+mamba2"), batched(rows(), 3))
    importance.save(tmp_path / "deep" / "importance.safetensors")
    loaded = Importance.load(tmp_path / "deep" / "importance.safetensors")
    for field in dataclasses.fields(importance):
        a, b = getattr(importance, field.name), getattr(loaded, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else (a == b and type(a) is type(b)), field.name
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        ".importance.safetensors.sha256",
        "importance.safetensors",
    ]
    tiny_teacher("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no importance scores"):
        Importance.load(tmp_path / "model.safetensors")


def test_a_text_without_tokens_is_refused():
    batch = collate([rows()[2]])
    with pytest.raises(ValueError, match="calibration text has no token"):
        measure_importance(tiny_teacher("llama"), [batch])
    with pytest.raises(ValueError, match="nothing is predicted"):
        measure_layer_drops(tiny_teacher("llama"), [batch])


def test_rows_without_segments_are_one_document_each():
    ids = torch.randint(3, 97, (3, N), generator=torch.Generator().manual_seed(1))
    plain = measure_importance(tiny_teacher("llama"), [{"input_ids": ids}])
    packed = {"input_ids": ids, "segment_ids": torch.zeros_like(ids), "position_ids": torch.arange(N).repeat(3, 1)}
    torch.testing.assert_close(scores(measure_importance(tiny_teacher("llama"), [packed])), scores(plain))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "phi+discrete_mamba2"])
def test_an_attention_mask_hides_padding(name, left):
    """As a tokenizer pads: the scores of the text alone."""
    ids = torch.randint(3, 97, (3, N), generator=torch.Generator().manual_seed(1))
    plain = measure_importance(model_of(name), [{"input_ids": ids}])
    pad, real = torch.zeros(3, 5, dtype=torch.int64), torch.ones_like(ids)
    order = (lambda a, b: (b, a)) if left else (lambda a, b: (a, b))
    batch = {"input_ids": torch.cat(order(ids, pad), 1), "attention_mask": torch.cat(order(real, pad), 1)}
    padded = measure_importance(model_of(name), [batch])
    assert (padded.rows, padded.tokens) == (plain.rows, plain.tokens) == (3, 3 * N)
    torch.testing.assert_close(scores(padded), scores(plain), rtol=1e-6, atol=1e-6)  # summed in another order


def smaller(config, **sizes):
    return dataclasses.replace(sizes_of(config), **sizes)


def test_units_of_zero_are_the_ones_that_go():
    """Scores find them, and the cut is exact."""
    model = model_of("llama_biased")
    neurons, channels = {i: list(range(i, i + 20)) for i in range(4)}, list(range(0, 32, 2))
    zero_neurons(model, neurons)
    zero_channels(model, channels)
    for i in range(4):  # values of zero: what the group's heads put out is zero
        zero_rows(model.model.layers[i].self_attn.v_proj, range(8 * (i % 2), 8 * (i % 2) + 8))
    importance = measure_importance(model, batched(rows(), 3))
    what = choose(importance, smaller(model.config, ffn=20, hidden=16, heads=2, kv_heads=1))
    assert (what.ffn, what.hidden) == (neurons, channels)
    assert what.heads == {0: [2, 3], 1: [0, 1], 2: [2, 3], 3: [0, 1]}
    assert what.layers is None and what.state_dims is None
    assert_same(cut(model, what), logits(model))


def test_choices_within_groups_and_layers():
    model = grouped_hybrid("mamba2")
    found = measure_importance(model, batched(rows(), 3))
    importance = dataclasses.replace(
        found,
        layers=torch.tensor([0.5, 0.1, 0.1, 0.9], dtype=torch.float64),
        heads=torch.tensor([[1, 2, 9, 0], [3, 3, 1, 1]]).double(),
        kv_heads=torch.tensor([[3, 9], [4, 2]]).double(),
        state_heads=torch.tensor([[1, 2, 3, 9, 8, 7], [5, 4, 6, 0, 0, 1]]).double(),
        state_groups=torch.tensor([[1, 2], [2, 1]]).double(),
    )
    config = model.config
    assert choose(importance, smaller(config, layers=3)).layers == [0, 1, 3]  # of equal ones the first
    assert choose(importance, smaller(config, layers=2), layers="block").layers == [0, 3]
    assert choose(importance, smaller(config, layers=2), layers="every_second").layers == [0, 2]
    assert choose(importance, smaller(config, layers=1), layers=-importance.layers).layers == [1]
    assert choose(importance, smaller(config, heads=2, kv_heads=1)).heads == {0: [2, 3], 2: [0, 1]}
    assert choose(importance, smaller(config, heads=2)).heads == {0: [1, 2], 2: [0, 2]}
    assert choose(importance, smaller(config, heads=1, kv_heads=1)).heads == {0: [2], 2: [0]}
    assert choose(importance, smaller(config, state_heads=2, state_groups=1)).state_heads == {1: [3, 4], 3: [0, 2]}
    everything = smaller(
        config, layers=3, hidden=16, ffn=10, heads=2, kv_heads=1, state_heads=2, state_groups=1, state_size=3
    )
    what = choose(importance, everything)
    result = cut(model, what)
    assert sizes_of(result.config) == everything
    assert torch.isfinite(logits(result)).all()
    with pytest.raises(ValueError, match=r"^heads: got 3 for kv_heads 2"):
        choose(importance, smaller(config, heads=3))
    with pytest.raises(ValueError, match=r"^layers: 'every_second' keeps 2, but sizes say 3$"):
        choose(importance, smaller(config, layers=3), layers="every_second")
    none = dataclasses.replace(
        importance, attention_layers=[], heads=importance.heads[:0], kv_heads=importance.kv_heads[:0]
    )
    with pytest.raises(ValueError, match=r"^heads: got 2, but the model has no attention layer$"):
        choose(none, smaller(config, heads=2, kv_heads=1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi+discrete_mamba2"])
def test_layer_drops_are_those_of_the_model_cut(name):
    """Against models with the layer really gone; the model is whole afterwards."""
    model, found = model_of(name), rows()
    before = logits(model)
    drops = measure_layer_drops(model, batched(found, 4))
    assert torch.equal(logits(model), before)

    def logprobs(one):
        kept, labels = [], []
        for row in found:
            for s in row["segment_ids"].unique():
                if s >= 0 and (row["segment_ids"] == s).sum() > 1:
                    ids = row["input_ids"][row["segment_ids"] == s]
                    with torch.no_grad():
                        kept.append(one(ids[None]).logits[0, :-1].double().log_softmax(-1))
                    labels.append(ids[1:])
        return torch.cat(kept), torch.cat(labels)

    whole, labels = logprobs(model)
    perplexity = lambda p: p.gather(1, labels[:, None]).mean().neg().exp()  # noqa: E731
    assert drops.whole == pytest.approx(float(perplexity(whole)), rel=1e-5)
    for i in range(4):
        less, _ = logprobs(keep_layers(model, [j for j in range(4) if j != i]))
        kl = (whole.exp() * (whole - less)).sum(-1).mean()
        torch.testing.assert_close(drops.kl[i], kl, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(drops.perplexity[i], perplexity(less) - perplexity(whole), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*CUTTABLE, "llama+mamba2", "phi3+discrete_mamba2"])
def test_baselines_have_the_shapes_of_the_scores(name):
    model = model_of(name)
    measured = measure_importance(model, batched(rows(), 6))
    for made in (random_importance(model.config, 3), magnitude_importance(model)):
        assert {axis: values.shape for axis, values in scores(made).items()} == {
            axis: values.shape for axis, values in scores(measured).items()
        }
        assert (made.attention_layers, made.ssm_layers) == (measured.attention_layers, measured.ssm_layers)
        assert all(values.dtype == torch.float64 and bool((values > 0).all()) for values in scores(made).values())
    torch.testing.assert_close(scores(random_importance(model.config, 3)), scores(random_importance(model.config, 3)))
    assert not torch.equal(random_importance(model.config, 3).hidden, random_importance(model.config, 4).hidden)


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "qwen3"])
def test_magnitude_is_the_weight_that_a_cut_removes(name):
    """The squares of all projections' weights that go with one unit, by cutting it."""
    model = model_of(name)
    made, own = magnitude_importance(model), sizes_of(model.config)

    def squares(one):
        return sum(
            m.weight.double().square().sum()
            for n, m in one.named_modules()
            if isinstance(m, torch.nn.Linear) and "layers" in n
        )

    for i in range(4):
        others = [j for j in range(4) if j != i]
        torch.testing.assert_close(squares(model) - squares(keep_layers(model, others)), made.layers[i].square())
    fewer = cut(model, Cut(ffn={i: range(1, own.ffn) for i in range(4)}))
    torch.testing.assert_close(squares(model) - squares(fewer), made.ffn[:, 0].square().sum())
    group = own.heads // own.kv_heads
    fewer = cut(model, Cut(heads={i: range(group, own.heads) for i in range(4)}))
    torch.testing.assert_close(squares(model) - squares(fewer), made.kv_heads[:, 0].square().sum())

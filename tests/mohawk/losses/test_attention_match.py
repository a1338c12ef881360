"""Attention distillation against the matrices that transformers' own eager attention returns."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mohawk.kernels.mixing.reference import dense_matrix
from mohawk.losses.layers.attention_match import AttentionMatch, collect_attention, side_by_side
from mohawk.losses.layers.matching import match_attention
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.teacher_forcing import AttentionRecord

SIZES = {
    "llama": dict(num_key_value_heads=2),
    "mistral": dict(num_key_value_heads=2, sliding_window=5),
    "qwen3": dict(num_key_value_heads=4, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": dict(num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "gpt2": dict(),
    "gpt_neox": dict(),
}


def make(kind: str, layers: int, heads: int = 4, seed: int = 0, **overrides):
    """A random model with attention far from uniform, in float64."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, num_hidden_layers=layers, num_attention_heads=heads,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **{**SIZES[kind], **overrides},
        **({} if kind == "gpt2" else dict(intermediate_size=48)),
    )  # fmt: skip
    # older transformers give Gemma 2 sdpa, which leaves its softcap out
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def rows(b=2, n=23):
    return torch.randint(3, 97, (b, n), generator=torch.Generator().manual_seed(0))


def collected(student, teacher, match, segment_ids=None, **inputs):
    with collect_attention(teacher, match.teacher_layers) as theirs, torch.no_grad():
        teacher(**inputs, use_cache=False)
    with collect_attention(student, match.student_layers) as mine:
        student(**inputs, use_cache=False)
    return match(mine, theirs, segment_ids)


def eager(model, **inputs):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return attentions


def by_hand(student, teacher, match, real, **inputs):
    """The definition, from eager attention's matrices."""
    with torch.no_grad():
        theirs = eager(teacher, **inputs)
    mine = eager(student, **inputs)
    total = 0.0
    for i, j in match.pairs:
        s, a = mine[i], theirs[j]
        if s.shape[1] != a.shape[1]:
            s, a = s.mean(1, keepdim=True), a.mean(1, keepdim=True)
        if match.loss != "kl":
            difference = (s - a) * (real.unsqueeze(1) & real.unsqueeze(2)).unsqueeze(1)
            squared = difference.square().sum((2, 3)) / real.sum(-1, keepdim=True) ** 2  # of the row's own entries
            total = total + (squared.mean() if match.loss == "mse" else difference.norm(dim=(2, 3)).mean())
        else:
            kl = (a * (a.clamp(min=1e-30).log() - s.clamp(min=1e-30).log())).sum(-1)
            total = total + ((kl * real.unsqueeze(1)).sum(-1) / real.sum(-1, keepdim=True)).mean()
    return total / len(match.pairs)


def agree(student, teacher, match, real, segment_ids, **inputs):
    ours = collected(student, teacher, match, segment_ids, **inputs)
    theirs = by_hand(student, teacher, match, real, **inputs)
    assert ours > 0
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=0)  # eager's softmax is in float32
    parameters = list(student.parameters())
    got = torch.autograd.grad(ours, parameters, allow_unused=True)
    wanted = torch.autograd.grad(theirs, parameters, allow_unused=True)
    seen = 0
    for a, b in zip(got, wanted, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
        seen += bool(b.norm() > 1e-6)
    assert seen >= 3


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("kind", SIZES)
def test_against_eager_attention(kind, loss):
    student, teacher = make(kind, 2, seed=1), make(kind, 4, seed=2)
    ids = rows()
    agree(student, teacher, AttentionMatch([(0, 0), (1, 3)], loss=loss), torch.ones(2, 23).bool(), None, input_ids=ids)


@pytest.mark.parametrize("loss", ["mse", "kl", "frobenius"])
@pytest.mark.parametrize("heads", [(4, 8), (4, 2), (8, 1)])
def test_other_head_counts(heads, loss):
    student = make("llama", 2, heads[0], num_key_value_heads=1, seed=1)
    teacher = make("gpt2", 3, heads[1], seed=2)
    match = AttentionMatch([(0, 1), (1, 2)], loss=loss)
    agree(student, teacher, match, torch.ones(2, 23).bool(), None, input_ids=rows())


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, loss):
    # eager's mask of float64 is infinite in its float32 softmax, and NaN where a padded row sees nothing
    student, teacher = make("llama", 2, seed=1).float(), make("llama", 2, 2, seed=2).float()
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(14, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for match in (AttentionMatch([(1, 1)], loss=loss), AttentionMatch([(1, 0)], loss=loss, heads="mean")):
        inputs = dict(input_ids=rows(), attention_mask=mask, position_ids=positions)
        agree(student, teacher, match, mask.bool(), mask - 1, **inputs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 8)])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_scores_before_the_softmax_are_tinyberts(side, heads):
    """scale * q k^T of each head, recomputed from the layers' own projections: MSE over a row's n x n entries, of which
    those above the diagonal count as equal."""
    student, teacher = (make("llama", 2, heads[i], num_key_value_heads=2, seed=i).double() for i in (0, 1))
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, {"left": slice(0, 9), "right": slice(14, None), "none": slice(0, 0)}[side]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(input_ids=rows(), attention_mask=mask, position_ids=positions)

    def scores(model):
        seen = []
        layer = model.model.layers[1].self_attn
        hook = layer.register_forward_pre_hook(lambda _, args, kw: seen.append((args, kw)), with_kwargs=True)
        model(**inputs, use_cache=False)
        hook.remove()
        ((args, given),) = seen
        hidden = given.get("hidden_states", args[0] if args else None)
        q, k = (p(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *given["position_embeddings"])
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / layer.head_dim**0.5

    mine, theirs = scores(student), scores(teacher).detach()
    if heads[0] != heads[1]:
        mine, theirs = mine.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
    real = mask.bool()
    kept = (real.unsqueeze(1) & real.unsqueeze(2)).unsqueeze(1) & torch.ones(23, 23).bool().tril()
    expected = (((mine - theirs) * kept).square().sum((2, 3)) / real.sum(-1, keepdim=True) ** 2).mean()
    segments = None if side == "none" else mask - 1
    ours = collected(student, teacher, AttentionMatch([(1, 1)], loss="scores"), segments, **inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    parameters = [p for name, p in student.named_parameters() if "layers.1.self_attn" in name and name[-8] in "qk"]
    parameters += [student.model.embed_tokens.weight]
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "kl", "scores", "frobenius"])
def test_padding_between_tokens_parts_no_document(loss):
    """The matching sees the rows as the models do: as if their tokens stood next to each other."""
    student, teacher = make("llama", 2, seed=1).float(), make("llama", 2, 2, seed=2).float()
    ids, mask = rows(), torch.ones(2, 23, dtype=torch.long)
    mask[1, 5:9], mask[0, :3] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    matching = match_attention(AttentionMatch([(1, 1), (0, 1)], loss=loss))

    def of(batch):
        with matching.student(student) as mine, matching.teacher(teacher) as theirs:
            for model in (student, teacher):
                model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        return matching.loss(mine, theirs, batch)

    whole = of({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    alone = [of({"input_ids": row[kept.bool()][None]}) for row, kept in zip(ids, mask, strict=True)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="window of 5, which counts the padding between"):
        side_by_side({0: AttentionRecord(torch.zeros(2, 1, 23, 4), torch.zeros(2, 1, 23, 4), window=5)}, mask)


@pytest.mark.parametrize("loss", ["mse", "kl", "frobenius"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_rows(kind, loss):
    student, teacher = make(kind, 2, seed=1), make(kind, 2, seed=2)
    segments = torch.tensor([[0] * 9 + [1] * 14, [0] * 4 + [1] * 11 + [-1] * 8])
    positions = torch.cat([torch.arange(9), torch.arange(14), torch.arange(4), torch.arange(11), torch.arange(8)])
    match = AttentionMatch([(0, 0), (1, 1)], loss=loss)
    agree(student, teacher, match, segments >= 0, segments, input_ids=rows(), position_ids=positions.view(2, 23))


def test_groups_of_heads():
    """As many groups as both have in common; where that is all heads, head by head."""
    student, teacher = make("llama", 1, 4, seed=1), make("llama", 1, 8, seed=2)
    inputs = dict(input_ids=rows())
    with torch.no_grad():
        s, a = eager(student, **inputs)[0], eager(teacher, **inputs)[0]
    wanted = (s - a.unflatten(1, (4, 2)).mean(2)).square().mean()
    loss = collected(student, teacher, AttentionMatch([(0, 0)], heads="group"), **inputs)
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=0)
    same = collected(student, make("llama", 1, 4, seed=3), AttentionMatch([(0, 0)], heads="group"), **inputs)
    each = collected(student, make("llama", 1, 4, seed=3), AttentionMatch([(0, 0)]), **inputs)
    mean = collected(student, make("llama", 1, 4, seed=3), AttentionMatch([(0, 0)], heads="mean"), **inputs)
    assert torch.equal(same, each) and mean < each


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_state_space_layers(mixer):
    """Layer 1 is a state-space layer: compared through its own matrix, by mse alone."""
    teacher = make("llama", 3, seed=2)
    student = hybrid_from_teacher(teacher, [1], mixer=mixer).double()
    ids, segments = rows(), torch.tensor([[0] * 9 + [1] * 14, [0] * 15 + [-1] * 8])
    positions = torch.cat([torch.arange(9), torch.arange(14), torch.arange(15), torch.arange(8)]).view(2, 23)
    match = AttentionMatch([(0, 0), (1, 2)])
    inputs = dict(input_ids=ids, position_ids=positions)
    with collect_attention(teacher, match.teacher_layers) as theirs, torch.no_grad():
        teacher(**inputs, use_cache=False)
    with collect_attention(student, match.student_layers) as mine:
        student(**inputs, segment_ids=segments)
    ours = match.losses(mine, theirs, segments)[1, 2]

    seen = {}
    layer = student.model.layers[1]
    hook = layer.input_layernorm.register_forward_hook(lambda module, args, output: seen.update(hidden=output))
    student(**inputs, segment_ids=segments)
    hook.remove()
    s = dense_matrix(layer.self_attn.mixing(seen["hidden"], segment_ids=segments))
    with torch.no_grad():
        a = eager(teacher, **inputs)[2]
    real = segments >= 0
    difference = (s - a) * (real.unsqueeze(1) & real.unsqueeze(2)).unsqueeze(1)
    wanted = (difference.square().sum((2, 3)) / real.sum(-1, keepdim=True) ** 2).mean()
    torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-5, atol=0)
    parameters = list(student.parameters())
    got = torch.autograd.grad(ours, parameters, allow_unused=True)
    expected = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).norm() <= 1e-4 * y.norm() + 1e-9
    scores = AttentionMatch([(1, 2)], loss="scores")
    with pytest.raises(ValueError, match="scores compares what a softmax takes; layer 1 of HybridForCausalLM"):
        scores.check(student, teacher)
    kl = AttentionMatch([(1, 2)], loss="kl")
    with pytest.raises(ValueError, match="layer 1 of HybridForCausalLM has a state-space matrix, take mse"):
        kl.check(student, teacher)
    with pytest.raises(ValueError, match="layers 1 .student. and 2 .teacher."):
        kl(mine, theirs)
    match.check(student, teacher)


def test_bfloat16_autocast_and_frozen_teacher():
    student, teacher = make("llama", 2, seed=1).float(), make("llama", 2, seed=2).bfloat16().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = collected(student, teacher, AttentionMatch([(1, 1)], loss="kl"), input_ids=rows())
    assert loss.dtype == torch.float32
    loss.backward()
    layer = student.model.layers[1]
    assert layer.self_attn.q_proj.weight.grad.abs().sum() > 0 and layer.self_attn.v_proj.weight.grad is None
    exact = collected(student.double(), teacher.double(), AttentionMatch([(1, 1)], loss="kl"), input_ids=rows())
    assert abs(loss - exact) < 0.1 * exact


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        student, teacher = make("gemma2", 2, seed=1).train(), make("gemma2", 2, seed=2)
        if checkpointing:
            student.gradient_checkpointing_enable()
        match = AttentionMatch([(0, 0), (1, 1)])
        with collect_attention(teacher, match.teacher_layers) as theirs, torch.no_grad():
            teacher(input_ids=rows())
        with collect_attention(student, match.student_layers) as mine:
            student(input_ids=rows())
            noted = mine[0].query
            match(mine, theirs).backward()
            assert mine[0].query is noted  # not noted again when the layer ran again
        gradients.append([None if p.grad is None else p.grad.clone() for p in student.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-15)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"), collect_attention(student, [0]):
        pass


def test_models_are_left_as_they_were():
    for model in (make("gemma2", 3), hybrid_from_teacher(make("gemma2", 3), [1]), make("gpt2", 3)):
        before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        logits = model(input_ids=rows()).logits
        with pytest.raises(ZeroDivisionError), collect_attention(model, [0, 1]):
            inside = model(input_ids=rows()).logits
            raise ZeroDivisionError
        assert before == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        assert not any("mixing_records" in m.__dict__ or m._forward_hooks for m in model.modules())
        torch.testing.assert_close(inside, logits)
        torch.testing.assert_close(model(input_ids=rows()).logits, logits, rtol=0, atol=0)


def test_what_cannot_be_recorded():
    common = dict(vocab_size=97, hidden_size=32, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", n_layer=2, **common))
    with pytest.raises(ValueError, match="BloomForCausalLM: it does not go through") as caught:
        AttentionMatch([(0, 0)]).check(make("llama", 1), bloom)
    assert "\n" not in str(caught.value)
    sinks = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt_oss", num_hidden_layers=2, num_key_value_heads=2, head_dim=8, intermediate_size=16,
            num_local_experts=2, num_experts_per_tok=1, **common,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="GptOssAttention: its attention has s_aux"), collect_attention(sinks, [0]):
        sinks(input_ids=rows())
    with pytest.raises(ValueError, match="layer 2, allowed are 0 to 1"):
        AttentionMatch([(0, 2)]).check(make("llama", 1), make("llama", 2))
    with pytest.raises(ValueError, match="layer -1, allowed are 0 to 0"):
        AttentionMatch([(-1, 0)]).check(make("llama", 1), make("llama", 2))


def test_options_and_records_that_do_not_fit():
    for options, words in (({"loss": "cosine"}, "mse, scores, kl, frobenius"), ({"heads": "all"}, "auto, mean, group")):
        with pytest.raises(ValueError, match=words):
            AttentionMatch([(0, 0)], **options)
    with pytest.raises(ValueError, match="no layer pairs"):
        AttentionMatch([])
    match, student, teacher = AttentionMatch([(0, 1)]), make("llama", 1), make("llama", 2)
    with collect_attention(teacher, [0, 1]) as theirs, collect_attention(student, [0]) as mine:
        with pytest.raises(ValueError, match="student's layer 0 made no attention"):
            match(mine, theirs)
        student(input_ids=rows())
        teacher(input_ids=rows(n=7))
    with pytest.raises(ValueError, match="agree in batch and seq"):
        match(mine, theirs)
    with pytest.raises(ValueError, match="nothing recorded of the teacher's layer 1; there are 0"):
        match(mine, {0: theirs[0]})
    narrow = make("mistral", 2)
    kl = AttentionMatch([(0, 1)], loss="kl")
    with pytest.raises(ValueError, match="windows 5 .student. and None"):
        collected(narrow, teacher, kl, input_ids=rows())

"""Layer maps, hidden states kept by hooks, and the loss between them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk.losses.layers.hidden_match import EMBEDDINGS, HiddenMatch, collect_hidden, layer_map
from mohawk.models.decoders import decoder
from mohawk.models.from_teacher import hybrid_from_teacher

GPTS = {
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48),
    "opt": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=48, num_local_experts=3),
}  # fmt: skip


def gpt(kind: str, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=258, bos_token_id=256, eos_token_id=257, **GPTS[kind], **overrides)
    return AutoModelForCausalLM.from_config(config).eval()


# --- layer maps ---


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),  # TinyBERT's g(m) = 3 m
        ("uniform", 5, 12, [(0, 2), (1, 4), (2, 7), (3, 9), (4, 11)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
        ("last", 3, 12, [(0, 9), (1, 10), (2, 11)]),
        ("last", 4, 2, [(2, 0), (3, 1)]),
        ("dense_top", 4, 12, [(0, 5), (1, 8), (2, 10), (3, 11)]),
        ("dense_top", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("dense_bottom", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("dense_bottom", 1, 5, [(0, 4)]),
        (4, 12, 12, [(3, 3), (7, 7), (11, 11)]),
        (2, 5, 10, [(1, 3), (3, 7)]),
        ([[0, 1], [2, 5]], 3, 6, [(0, 1), (2, 5)]),
        ([(-1, -1), (0, 3)], 3, 6, [(-1, -1), (0, 3)]),
    ],
)
def test_layer_map(kind, student, teacher, pairs):
    assert layer_map(kind, student, teacher) == pairs


def test_dense_maps_of_twelve_from_sixty():
    top = [9, 18, 26, 33, 39, 44, 49, 53, 56, 57, 58, 59]
    assert [j for _, j in layer_map("dense_top", 12, 60)] == top
    bottom = [j for _, j in layer_map("dense_bottom", 12, 60)]
    # the ones that the source names: layers 0, 1, 6, 7 and 11 of the student
    assert [bottom[i] for i in (0, 1, 6, 7, 11)] == [0, 2, 20, 30, 59]
    gaps = [b - a for a, b in zip(bottom, bottom[1:], strict=False)]
    assert set(gaps[1:6]) == {3, 4} and set(gaps[7:]) == {7, 8}  # even steps between them


@pytest.mark.parametrize("kind", ["uniform", "last", "dense_top", "dense_bottom"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 7), (6, 7), (15, 30), (16, 61), (40, 41)])
def test_layer_maps_rise_and_end_at_the_top(kind, student, teacher):
    pairs = layer_map(kind, student, teacher)
    assert [i for i, _ in pairs] == list(range(student))
    layers = [j for _, j in pairs]
    assert layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] == teacher - 1
    gaps = [b - a for a, b in zip(layers, layers[1:], strict=False)]
    if kind == "dense_top":
        assert all(a >= b - 1 for a, b in zip(gaps, gaps[1:], strict=False))  # but for rounding they shrink
    assert layer_map(kind, student, teacher, embeddings=True) == [(EMBEDDINGS, EMBEDDINGS), *pairs]


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("densetop", (4, 8), "'densetop'.*uniform, last, dense_top, dense_bottom"),
        ([], (4, 8), "got \\[\\]"),
        ([[0, 8]], (4, 8), "layer 8, allowed are -1 to 7"),
        ([[4, 0]], (4, 8), "layer 4, allowed are -1 to 3"),
        ([[0, 1, 2]], (4, 8), "pair \\[0, 1, 2\\]"),
        ([3, 4], (4, 8), "pair 3"),
        ([[True, 1]], (4, 8), "layer True"),
        ([[-1, 0]], (4, 8), "embeddings"),
        ([[1, 2], [1, 2]], (4, 8), "twice"),
        (0, (4, 8), "every 0 layers of a student of 4"),
        (5, (4, 8), "allowed are 1 to 4"),
        (True, (4, 8), "got True"),
        (None, (4, 8), "got None"),
        ("dense_top", (8, 4), "8 layers, the teacher 4"),
        ("dense_bottom", (8, 4), "8 layers, the teacher 4"),
        ("top_heavy", (4, 8), "dense_top .*dense_bottom"),
        ("uniform", (0, 4), "student_layers"),
    ],
)
def test_bad_layer_maps(kind, sizes, words):
    with pytest.raises(ValueError, match=words) as caught:
        layer_map(kind, *sizes)
    assert "\n" not in str(caught.value)


# --- hidden states ---


@pytest.mark.parametrize("kind", ["llama", "hybrid", *GPTS])
def test_collected_are_transformers_hidden_states(kind, make_llama):
    if kind in GPTS:
        model = gpt(kind)
    else:
        model = make_llama(num_hidden_layers=3)
        model = hybrid_from_teacher(model, [0, 2]) if kind == "hybrid" else model
    ids = torch.randint(0, 258, (2, 11))
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(expected) == 4
    with collect_hidden(model, [EMBEDDINGS, 0, 2]) as kept:
        model(input_ids=ids)
    assert sorted(kept) == [EMBEDDINGS, 0, 2]
    for layer, hidden in kept.items():
        assert torch.equal(hidden, expected[layer + 1])
        assert hidden.requires_grad
    before = kept[0]
    model(input_ids=ids)  # no hook is left
    assert kept[0] is before


def test_hooks_go_when_a_forward_fails(make_llama):
    model = make_llama()
    with pytest.raises(ZeroDivisionError), collect_hidden(model, [0, 1]):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.layers)
    with pytest.raises(ValueError, match="layer 2, allowed are -1 to 1"), collect_hidden(model, [2]):
        pass


def test_gradients_pass_gradient_checkpointing(make_llama):
    gradients = []
    for checkpointing in (False, True):
        model = make_llama(num_hidden_layers=3).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with collect_hidden(model, [0, 2]) as kept:
            model(input_ids=torch.arange(24).view(2, 12))
            (kept[0].square().mean() + kept[2].square().mean()).backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


def test_no_decoder_in_one_line():
    with pytest.raises(ValueError, match="Linear: no configuration"):
        decoder(torch.nn.Linear(2, 2))


# --- the loss ---


def states(layers: int, b: int, n: int, width: int, seed: int, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(b, n, width, generator=generator, dtype=dtype) for _ in range(layers + 1))
    return tuple(x.requires_grad_() for x in made)


def by_hand(match, student, teacher, mask, weights, normalizer):
    """The definition, token by token."""
    total = 0.0
    for s, t in match.pairs:
        count = 0.0
        loss = 0.0
        for b in range(mask.shape[0]):
            for i in range(mask.shape[1]):
                if not mask[b, i]:
                    continue
                x, y = student[s + 1][b, i], teacher[t + 1][b, i].detach()
                if match.projections:
                    name = "embeddings" if s < 0 else "layers" if match.shared else f"student_{s}_teacher_{t}"
                    for weight in match.projections[name].parameters():
                        x = weight @ x
                if match.normalise == "layer":
                    x, y = ((v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() for v in (x, y))
                elif match.normalise == "unit":
                    x, y = (v / v.norm() for v in (x, y))
                if match.loss == "mse":
                    token = ((x - y) ** 2).sum() / y.numel()
                else:
                    token = 1 - (x @ y) / (x.norm() * y.norm())
                loss = loss + weights[b, i] * token
                count += 1
        total = total + loss / (count if normalizer is None else normalizer)
    return total / len(match.pairs)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("normalise", ["none", "layer", "unit"])
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"shared": True}])
def test_loss_and_gradients_by_hand(loss, normalise, options):
    torch.manual_seed(0)
    pairs = layer_map("uniform", 2, 5, embeddings=True)
    match = HiddenMatch(pairs, 6, 9, loss=loss, normalise=normalise, **options).double()
    student, teacher = states(2, 2, 5, 6, 1), states(5, 2, 5, 9, 2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    weights = torch.rand(2, 5, dtype=torch.float64)
    trained = [*student[:3], *match.parameters()]
    for normalizer in (None, 17):
        ours = match(student, teacher, mask, weights, normalizer)
        theirs = by_hand(match, student, teacher, mask, weights, normalizer)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    match(student, teacher, mask, weights).backward()
    assert all(x.grad is None for x in teacher)
    assert len(list(match.parameters())) == {"rank": 6, "shared": 2}.get(next(iter(options), ""), 3)


def test_padding_can_hold_anything():
    match = HiddenMatch([(0, 0)], 4, 4)
    student, teacher = states(1, 2, 3, 4, 0, torch.float32), states(1, 2, 3, 4, 1, torch.float32)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    clean = match(student, teacher, mask)
    dirty = student[1].detach().clone()
    dirty[~mask] = float("nan")
    dirty.requires_grad_()
    loss = match({0: dirty}, teacher, mask)
    loss.backward()
    assert torch.equal(loss, clean)
    assert torch.isfinite(dirty.grad).all() and not dirty.grad[~mask].any()
    nothing = match({0: dirty}, teacher, torch.zeros(2, 3, dtype=torch.bool))
    assert nothing == 0
    nothing.backward()


def test_micro_batches_add_up():
    match = HiddenMatch([(0, 1), (1, 3)], 5, 7)
    student, teacher = states(2, 4, 6, 5, 0), states(4, 4, 6, 7, 1)
    match.double()
    mask = torch.rand(4, 6) < 0.7
    whole = match(student, teacher, mask)
    parts = (
        match([x[rows] for x in student], [x[rows] for x in teacher], mask[rows], normalizer=mask.sum())
        for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(student_dtype, teacher_dtype, autocast):
    torch.manual_seed(0)
    match = HiddenMatch([(0, 0)], 24, 33)
    exact = copy.deepcopy(match).double()
    student, teacher = states(1, 2, 7, 24, 0, student_dtype), states(1, 2, 7, 33, 1, teacher_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = match(student, teacher)
    assert loss.dtype == torch.float32
    truth = exact([x.double() for x in student], [x.double() for x in teacher])
    product = F.linear(student[1].to(torch.bfloat16), match.projections["student_0_teacher_0"].weight.bfloat16())
    torchs_own = ((product.double() - teacher[1].double()).square().mean() - truth).abs() if autocast else 0
    assert (loss - truth).abs() <= 2 * torchs_own + 1e-6
    loss.backward()
    assert student[1].grad.dtype == student_dtype and teacher[1].grad is None


def test_projection_at_the_start():
    torch.manual_seed(0)
    same = HiddenMatch([(0, 0)], 16, 16, project=True)
    hidden = states(1, 1, 4, 16, 0, torch.float32)
    assert same(hidden, hidden) == 0  # the identity
    assert not list(HiddenMatch([(0, 0)], 16, 16).parameters())
    for options in ({}, {"rank": 8}):  # channels keep their size
        for width, other in ((16, 64), (64, 16)):
            x = torch.randn(1, 512, width)
            y = HiddenMatch([(0, 0)], width, other, **options).projections["student_0_teacher_0"](x)
            assert 0.8 < y.square().mean() / x.square().mean() < 1.25


def test_options_that_do_not_fit():
    for options, words in (
        ({"loss": "kl"}, "mse, cosine"),
        ({"normalise": "batch"}, "none, layer, unit"),
        ({"project": False}, "6 wide, the teacher 9"),
        ({"rank": 7}, "from 1 to 6"),
    ):
        with pytest.raises(ValueError, match=words):
            HiddenMatch([(0, 0)], 6, 9, **options)
    with pytest.raises(ValueError, match="rank 2 of no projection"):
        HiddenMatch([(0, 0)], 6, 6, rank=2)
    with pytest.raises(ValueError, match="no layer pairs"):
        HiddenMatch([], 6, 6)
    match = HiddenMatch([(0, 3)], 6, 9)
    with pytest.raises(ValueError, match="no hidden state of the teacher's layer 3; there are -1 to 1"):
        match(states(2, 1, 4, 6, 0), states(2, 1, 4, 9, 0))
    with pytest.raises(ValueError, match="teacher's layer 3 must be .batch, sequence, 9."):
        match(states(4, 1, 4, 6, 0), states(4, 1, 4, 6, 0))
    with pytest.raises(ValueError, match="of .batch, sequence. .1, 4., got .1, 5."):
        match(states(4, 1, 4, 6, 0), states(4, 1, 5, 9, 0))


def test_it_trains_beside_the_student(make_llama):
    """As part of an objective: in its state and its optimizer, but not in the student; the teacher stays."""
    student, teacher = make_llama(1, hidden_size=24, head_dim=8), make_llama(2, num_hidden_layers=4)
    teacher.requires_grad_(False)
    objective = torch.nn.Module()
    objective.student = student
    objective.match = HiddenMatch(layer_map("uniform", 2, 4), 24, 32)
    saved = [name for name in objective.state_dict() if not name.startswith("student.")]
    assert saved == ["match.projections.student_0_teacher_1.weight", "match.projections.student_1_teacher_3.weight"]
    assert not any("projection" in name for name in student.state_dict())
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2)
    ids = torch.randint(0, 258, (4, 16))
    losses = []
    for _ in range(15):
        with collect_hidden(teacher, objective.match.teacher_layers) as theirs, torch.no_grad():
            teacher(input_ids=ids)
        with collect_hidden(student, objective.match.student_layers) as mine:
            student(input_ids=ids)
        loss = objective.match(mine, theirs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    other = HiddenMatch([(0, 0), (1, 3)], 24, 32)
    with pytest.raises(RuntimeError, match="student_0_teacher_0"):
        other.load_state_dict(objective.match.state_dict())

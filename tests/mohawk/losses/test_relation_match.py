"""Relations of queries, keys and values against the papers' formulas, written out from the models' own projections."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing
from mohawk.losses.layers.attention_match import collect_attention
from mohawk.losses.layers.matching import match_relations
from mohawk.losses.layers.relation_match import RelationMatch
from tests.kernels.test_mixing_memory import peak_bytes


def bert(layers=2, heads=4, width=24, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.6,
    )  # fmt: skip
    return BertForMaskedLM(config).eval().double()


def llama(heads=4, kv=2, width=32, seed=0, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=32, initializer_range=0.6, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


def ids(n=13):
    return torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(5))


def noted(model, layers, **inputs):
    with collect_attention(model, layers, values=True) as records:
        model(**inputs)
    return records


def relations(x, heads, visible):
    """(b, A, n, n): softmax of scaled dot products of x (b, n, width), cut into relation heads."""
    b, n, width = x.shape
    x = x.view(b, n, heads, width // heads).transpose(1, 2)
    scores = x @ x.mT / (width / heads) ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def kl(teacher, student, real):
    """1 / (A n) sum_a sum_t KL, of a row's n real tokens, and the mean over rows."""
    rows = torch.where(teacher > 0, teacher * (teacher.clamp(min=1e-300) / student.clamp(min=1e-300)).log(), 0.0).sum(
        -1
    )
    return ((rows * real[:, None]).sum((1, 2)) / (rows.shape[1] * real.sum(1))).mean()


def projections(model, layer, **inputs):
    """Queries, keys and values of a BERT's layer (b, n, width), by its own projections of what goes into it."""
    state = model(**inputs, output_hidden_states=True).hidden_states[layer]
    own = model.bert.encoder.layer[layer].attention.self
    return {"queries": own.query(state), "keys": own.key(state), "values": own.value(state)}


@pytest.mark.parametrize("heads", [None, 2, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_of_other_widths_and_head_counts(heads, padded):
    student, teacher = bert(2, 4, 24, 0), bert(3, 6, 48, 1)
    mask = torch.ones(2, 13, dtype=torch.long)
    if padded:
        mask[0, 9:] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    weights = {"queries": 1.0, "keys": 0.5, "values": 2.0}
    match = RelationMatch([(1, 2)], heads=heads, **weights)
    match.check(student, teacher)
    with torch.no_grad():
        theirs = noted(teacher, match.teacher_layers, **inputs)
    matching = match_relations(match)
    value = matching.loss(noted(student, match.student_layers, **inputs), theirs, inputs)

    visible = mask.bool()[:, None, None, :]
    s, t = projections(student, 1, **inputs), projections(teacher, 2, **inputs)
    count = heads or 2  # the greatest common divisor of 4 and 6
    exact = sum(
        weight * kl(*(relations(x[name], count, visible) for x in (t, s)), mask) for name, weight in weights.items()
    )
    torch.testing.assert_close(value, exact)
    parameters = [p for p in student.parameters() if p.requires_grad]
    mine, wanted = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (value, exact))
    seen = 0
    for a, b in zip(mine, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
            seen += bool(b.norm() > 1e-9)
    assert seen > 10


def test_decoders_look_back_alone_and_share_key_value_heads():
    student, teacher = llama(4, 2, 32, 0), llama(6, 3, 24, 1)
    match = RelationMatch([(1, 1)], queries=0, keys=0)  # MiniLM's value relation
    match.check(student, teacher)
    value = match(noted(student, [1], input_ids=ids()), noted(teacher, [1], input_ids=ids()))
    found = []
    for model in (teacher, student):
        state = model(ids(), output_hidden_states=True).hidden_states[1]
        layer = model.model.layers[1]
        x = layer.self_attn.v_proj(layer.input_layernorm(state))
        found.append(relations(x, 1, torch.ones(13, 13, dtype=torch.bool).tril()))  # gcd of 4, 2, 6 and 3
    exact = kl(*found, torch.ones(2, 13))
    torch.testing.assert_close(value, exact)
    weight = student.model.layers[1].self_attn.v_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (value, exact)))


def test_windows_of_an_encoder():
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config).eval().double()
    records = noted(model, [0, 1], input_ids=ids())
    assert [(records[i].causal, records[i].window) for i in (0, 1)] == [(False, None), (False, 4)]
    model.set_attn_implementation("eager")
    eager = model(ids(), output_attentions=True).attentions[1]
    from mohawk.kernels.mixing.interface import mixing_matrix

    torch.testing.assert_close(mixing_matrix(records[1].mixing()), eager.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the teacher sees more: layer 1 of the student looks back 4 tokens"):
        RelationMatch([(1, 0)]).check(model, model)


def test_memory_grows_with_the_length():
    def work(n):
        s, t = (torch.randn(1, 2, n, 8, requires_grad=grad) for grad in (True, False))
        given = [AttentionMixing(x, x, causal=False) for x in (s, t)]
        return peak_bytes(lambda: mixing_distance(*given, metric="kl").backward())

    short, long = work(512), work(4096)
    assert long < 8 * 1.3 * short
    assert long < 4096**2 * 4 / 2  # half of one whole matrix


def test_mistakes_are_told_in_a_line():
    for given, line in (
        ({"pairs": []}, "got no layer pairs"),
        ({"pairs": [(0, 0)], "values": -1}, "values must be a weight from 0 up, got -1"),
        ({"pairs": [(0, 0)], "queries": 0, "keys": 0, "values": 0}, "all 0"),
        ({"pairs": [(0, 0)], "heads": 0}, "heads must be None or a whole number from 1 up, got 0"),
    ):
        with pytest.raises(ValueError, match=line):
            RelationMatch(**given)
    with pytest.raises(ValueError, match="5 heads do not divide the 24 channels of the student's queries"):
        RelationMatch([(0, 0)], heads=5).check(bert(), bert())
    with pytest.raises(ValueError, match="7 heads do not divide the 16 channels of the student's keys"):
        RelationMatch([(0, 0)], heads=7, queries=0).check(llama(), llama())
    with collect_attention(student := bert(), [0]) as records:
        student(ids())
    with pytest.raises(ValueError, match=r"no queries|no values of the student were noted"):
        RelationMatch([(0, 0)])(records, records)

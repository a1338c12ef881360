"""What is no causal model: losses and gradients of `KnowledgeDistiller` against torch's own functions, in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mohawk.errors import UserError
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.layers.hidden_match import HiddenMatch
from mohawk.losses.layers.matching import match_hidden
from mohawk.losses.teachers import Ensemble, ModelTeacher

T = 2.0


def bert(kind, layers=2, width=24, seed=0, **more):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5, **more,
    )  # fmt: skip
    return kind(config).eval().double()


def t5(layers, seed=0):
    torch.manual_seed(seed)
    return (
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=layers, num_decoder_layers=layers, num_heads=4,
                decoder_start_token_id=0, pad_token_id=0,
            )
        )
        .eval()
        .double()
    )  # fmt: skip


def rows():
    """ids, attention mask and labels (5, 9) of masked words."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 50, (5, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[3, 2:] = 0, 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) > 0.4, -100)
    labels[:, 1] = ids[:, 1]
    return ids, mask, labels.masked_fill(mask == 0, -100)


def kl(student, teacher):
    """T^2 KL of tempered rows, summed."""
    p, q = (teacher / T).log_softmax(-1), (student / T).log_softmax(-1)
    return T**2 * (p.exp() * (p - q)).sum()


def agree(distiller, ours, exact):
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
    found, wanted = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (ours, exact))
    for mine, other in zip(found, wanted, strict=True):
        mine, other = (torch.zeros(()).double() if x is None else x for x in (mine, other))
        torch.testing.assert_close(mine, other.expand_as(mine), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kd_on", ["labels", "all"])
def test_masked_words(kd_on):
    teacher, student = bert(BertForMaskedLM, 3, 32, 1), bert(BertForMaskedLM)
    ids, mask, labels = rows()
    match = HiddenMatch([(-1, -1), (1, 2)], 24, 32, loss="mse").double()
    distiller = KnowledgeDistiller(
        teacher, student, task="masked_lm", temperature=T, kd_weight=0.7, ce_weight=0.3, kd_on=kd_on,
        matchings={"hidden": match_hidden(match, 0.2)},
    )  # fmt: skip
    kinds = torch.randint(0, 2, ids.shape)
    ours = distiller.compute_loss(ids, labels, mask, token_type_ids=kinds)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    own = student(**inputs, output_hidden_states=True)
    told, real = labels != -100, mask == 1
    on = told if kd_on == "labels" else real
    exact = 0.7 * kl(own.logits[on], theirs.logits[on]) / on.sum()
    exact = exact + 0.3 * F.cross_entropy(own.logits[told], labels[told])
    states = [
        (match._projection(pair)(own.hidden_states[i]) - theirs.hidden_states[j])[real].square().mean()
        for pair, i, j in (((-1, -1), 0, 0), ((1, 2), 2, 3))
    ]
    agree(distiller, ours, exact + 0.2 * sum(states) / 2)


def test_classes():
    labels = torch.tensor([0, 2, 1, 1, 0])
    teachers = [bert(BertForSequenceClassification, 3, 32, seed, num_labels=3) for seed in (1, 2)]
    student = bert(BertForSequenceClassification, num_labels=3)
    ids, mask, _ = rows()
    mixed = Ensemble([ModelTeacher(model, micro_batch=2, task="classification") for model in teachers])
    distiller = KnowledgeDistiller(
        mixed, student, task="classification", divergence="reverse_kl", kd_weight=0.7, ce_weight=0.3
    )
    ours = distiller.compute_loss(ids, labels, mask)
    with torch.no_grad():
        p = sum(model(ids, attention_mask=mask).logits.softmax(-1) for model in teachers) / 2
    logits = student(ids, attention_mask=mask).logits
    q = logits.log_softmax(-1)
    exact = 0.7 * (q.exp() * (q - p.log())).sum() / 5 + 0.3 * F.cross_entropy(logits, labels)
    agree(distiller, ours, exact)


def test_an_encoder_and_a_decoder():
    teacher, student = t5(3, 1), t5(2)
    ids, mask, _ = rows()
    labels = torch.randint(1, 50, (5, 4))
    labels[1, 2:] = -100
    match = [HiddenMatch([(0, 1), (1, 2)], 16, 16, loss="cosine") for _ in range(2)]
    distiller = KnowledgeDistiller(
        teacher, student, task="seq2seq_lm", temperature=T, kd_weight=0.7, ce_weight=0.3,
        matchings={"e": match_hidden(match[0], 0.2, part="encoder"), "d": match_hidden(match[1], 0.1)},
    )  # fmt: skip
    ours = distiller.compute_loss(ids, labels, mask)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "output_hidden_states": True}
    with torch.no_grad():
        theirs = teacher(**inputs)
    own = student(**inputs)
    told = labels != -100
    exact = 0.7 * kl(own.logits[told], theirs.logits[told]) / told.sum()
    exact = exact + 0.3 * F.cross_entropy(own.logits[told], labels[told])
    for weight, part, on in ((0.2, "encoder", mask == 1), (0.1, "decoder", told)):
        states = [getattr(x, f"{part}_hidden_states") for x in (own, theirs)]
        of_pairs = [
            (1 - F.cosine_similarity(states[0][i + 1][on], states[1][j + 1][on], dim=-1)).mean()
            for i, j in ((0, 1), (1, 2))
        ]
        exact = exact + weight * sum(of_pairs) / 2
    agree(distiller, ours, exact)


@pytest.mark.parametrize("kd_on", ["labels", "all"])
def test_a_step_does_not_depend_on_how_it_is_split(kd_on):
    teacher, student = bert(BertForMaskedLM, 3, 32, 1), bert(BertForMaskedLM)
    ids, mask, labels = rows()
    match = HiddenMatch([(1, 2)], 24, 32).double()
    distiller = KnowledgeDistiller(
        teacher, student, task="masked_lm", ce_weight=0.3, kd_on=kd_on, matchings={"hidden": match_hidden(match)}
    )
    whole = distiller.compute_loss(ids, labels, mask)
    columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    parts = [{name: x[rows] for name, x in columns.items()} for rows in (slice(0, 1), slice(1, 4), slice(4, 5))]
    parts = [distiller.prepare(part, 0) for part in parts]
    distiller.begin_step(0, 1)
    shares = [distiller.share(part) for part in parts]
    torch.testing.assert_close(sum(shares), whole)
    assert distiller.count(columns) == int((labels != -100).sum())


def test_what_is_refused():
    masked, classes, decoder = bert(BertForMaskedLM), bert(BertForSequenceClassification), t5(1)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    for model, task, line in (
        (masked, "causal_lm", "an encoder needs task: masked_lm or classification"),
        (classes, "masked_lm", "saved as ...ForMaskedLM"),
        (llama, "masked_lm", "saved as ...ForMaskedLM"),
        (masked, "classification", "saved as ...ForSequenceClassification"),
        (decoder, "masked_lm", "take seq2seq_lm"),
        (masked, "seq2seq_lm", "such as T5 or Whisper"),
        (bert(BertForSequenceClassification, num_labels=1), "classification", "tells 1 class"),
    ):
        with pytest.raises(UserError, match=line):
            KnowledgeDistiller(None, model, task=task, kd_weight=0.0, ce_weight=1.0)
    with pytest.raises(UserError, match="it tells 2 classes, the teacher 3"):
        KnowledgeDistiller(bert(BertForSequenceClassification, num_labels=3), classes, task="classification")
    plain = {"kd_weight": 0.0, "ce_weight": 1.0}
    for options, line in (
        ({"task": "ner"}, "task: got 'ner'; allowed: causal_lm, masked_lm, classification, seq2seq_lm"),
        ({"task": "masked_lm", "kd_on": "some"}, "kd_on: got 'some'; allowed: labels, all"),
        ({"task": "classification", "kd_on": "all"}, "kd_on: got 'all': is of task masked_lm"),
        ({"task": "masked_lm", "task_weight": {"text": 2.0}}, "task_weight: is of causal language models"),
    ):
        with pytest.raises(ValueError, match=line):
            KnowledgeDistiller(None, masked, **plain, **options)
    distiller = KnowledgeDistiller(None, masked, **plain, task="masked_lm")
    ids, mask, labels = rows()
    with pytest.raises(ValueError, match="input_features: no input of task masked_lm; allowed: attention_mask"):
        distiller.compute_loss(ids, labels, mask, input_features=mask)
    with pytest.raises(ValueError, match="labels: got None"):
        distiller.compute_loss(ids)
    with pytest.raises(ValueError, match="part must be decoder or encoder"):
        match_hidden(HiddenMatch([(0, 0)], 8, 8), part="both")

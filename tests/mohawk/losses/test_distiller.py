"""KnowledgeDistiller: each method's loss recomputed by hand from logits, on tiny models of several kinds."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from mohawk import (
    AttentionMatch,
    HiddenMatch,
    KnowledgeDistiller,
    OnPolicy,
    TAIDSchedule,
    layer_map,
    match_attention,
    match_hidden,
)
from mohawk.errors import UserError
from mohawk.kernels.kd.teachers import TeacherLogits, TeacherMixture, TeacherSamples, TeacherTopK
from mohawk.losses.distiller import OwnLoss
from mohawk.losses.heads import Head, final_hidden_states
from mohawk.losses.label_probability import label_probability, teacher_certainty
from mohawk.losses.measured import Means
from mohawk.losses.schedules import Ramp, at, temperature_for
from mohawk.losses.teachers import Answer, AverageTeacher, Ensemble, ModelTeacher
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.helpers.processes import in_processes

VOCAB = 258


@pytest.fixture(scope="module")
def models(make_llama):
    """Models of several kinds and widths, by name."""
    torch.manual_seed(1)
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=3, n_positions=64, initializer_range=0.3)
    llama = make_llama(seed=2, hidden_size=48, num_hidden_layers=4)
    return {
        "llama": llama,
        "small": make_llama(seed=3),
        "gpt2": GPT2LMHeadModel(gpt2).eval(),
        "hybrid": hybrid_from_teacher(make_llama(seed=4), ssm_layers=[1]),
        "fewer": make_llama(seed=5, vocab_size=250, bos_token_id=0, eos_token_id=1),
    }


@pytest.fixture
def batch():
    """Ids, labels and mask (3, 11): padded on the left, some labels ignored."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 250, (3, 11), generator=g)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, -100), mask


def logits_of(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].double()


def by_hand(student, teacher, labels, mask, temperature=1.0, kd=1.0, ce=0.0, vocab=None, weight=None):
    """T^2 KL and cross entropy, the mean over real labels, in float64."""
    labels = labels.masked_fill(mask == 0, -100)[:, 1:]
    real = labels != -100
    log_p, log_q = ((x[..., :vocab][real] / temperature).log_softmax(-1) for x in (teacher, student))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    divergence = divergence if weight is None else divergence * weight[real]
    entropy = F.cross_entropy(student[..., :vocab][real], labels[real])
    return kd * temperature**2 * divergence.sum() / real.sum() + ce * entropy


@pytest.mark.parametrize(
    ("teacher", "student"), [("llama", "small"), ("llama", "gpt2"), ("gpt2", "hybrid"), ("llama", "fewer")]
)
def test_loss_and_gradients_are_those_of_the_definition(models, batch, teacher, student):
    teacher, student, (ids, labels, mask) = models[teacher], models[student], batch
    distiller = KnowledgeDistiller(teacher, student, temperature=2.0, kd_weight=0.7, ce_weight=0.3)
    ours = distiller.compute_loss(ids, labels, mask)
    vocab = min(model.config.vocab_size for model in (teacher, student))
    with torch.no_grad():
        target = logits_of(teacher, ids, mask)
    expected = by_hand(logits_of(student, ids, mask), target, labels, mask, 2.0, 0.7, 0.3, vocab)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)
    trained = [p for p in student.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(x, trained) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.requires_grad_(True)
    measured = distiller.measured()
    assert measured["temperature"] == 2.0
    assert 0.7 * measured["kd"] + 0.3 * measured["ce"] == pytest.approx(expected.item(), rel=1e-4)
    assert 0 <= measured["agreement"] <= 1 and 0 < measured["teacher_entropy"] < math.log(vocab)


def test_alpha_is_the_weight_of_the_labels(models, batch):
    teacher, student, (ids, labels, mask) = models["llama"], models["small"], batch
    loss = KnowledgeDistiller(teacher=teacher, student=student, temperature=2.0, alpha=0.3)
    with torch.no_grad():
        logits = [logits_of(model, ids, mask) for model in (student, teacher)]
        expected = by_hand(*logits, labels, mask, 2.0, 0.7, 0.3, student.config.vocab_size)
        torch.testing.assert_close(loss.compute_loss(ids, labels, mask).double(), expected, rtol=2e-5, atol=1e-6)
    teacher.requires_grad_(True)


def test_cross_entropy_alone_is_the_models_own_loss(models, batch):
    ids, _, _ = batch
    student = models["small"]
    loss = KnowledgeDistiller(None, student, kd_weight=0, ce_weight=1.0).compute_loss(ids)
    torch.testing.assert_close(loss, student(ids, labels=ids).loss)


def test_confidence_weighs_by_the_labels_probability(models, batch):
    ids, labels, mask = batch
    teacher, student = models["llama"], models["small"]
    ours = KnowledgeDistiller(teacher, student, confidence=True, ce_weight=0.5).compute_loss(ids, labels, mask)
    target = logits_of(teacher, ids, mask)
    shifted = labels[:, 1:].clamp(min=0)
    sure = target.softmax(-1).gather(-1, shifted[..., None]).squeeze(-1)
    expected = by_hand(logits_of(student, ids, mask), target, labels, mask, ce=0.5, weight=sure)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["label", "entropy"])
@pytest.mark.parametrize("top", [None, 20])
def test_what_confidence_takes_from_the_divergence_goes_to_the_labels(models, batch, by, top):
    """Value and gradients of a dense teacher and of a cached top k, beside float64 from the definition."""
    teacher, student, (ids, labels, mask) = models["llama"], models["small"], batch
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = teacher(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    log_p = whole[:, :-1].double().log_softmax(-1)
    answers = teacher
    if top is not None:
        kept = whole.log_softmax(-1).topk(top)
        answers = lambda *_: [Answer(TeacherTopK(kept.indices, kept.values))]  # noqa: E731
    distiller = KnowledgeDistiller(answers, student, kd_weight=0.7, ce_weight=0.2, confidence=by)
    given = {"input_ids": ids, "labels": labels, "attention_mask": mask, "weights": weights}
    ours = distiller.loss(given)
    labels = labels.masked_fill(mask == 0, -100)[:, 1:]
    real, chosen = labels != -100, labels.clamp(min=0)[..., None]
    log_q = logits_of(student, ids, mask).log_softmax(-1)
    ce = -log_q.gather(-1, chosen).squeeze(-1)
    if top is None:
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        likely = log_p.gather(-1, chosen).squeeze(-1).exp()
        entropy = -(log_p.exp() * log_p).sum(-1)
    else:
        inside, mine = (x[:, :-1].double() if x.is_floating_point() else x[:, :-1] for x in (kept.values, kept.indices))
        rest = 1 - inside.exp().sum(-1)
        ours_inside = log_q.gather(-1, mine)
        rest_q = 1 - ours_inside.exp().sum(-1)
        divergence = (inside.exp() * (inside - ours_inside)).sum(-1) + rest * (rest.log() - rest_q.log())
        each = rest / (VOCAB - top)
        hit = mine == chosen
        likely = torch.where(hit.any(-1), (inside.exp() * hit).sum(-1), each)
        entropy = -(inside.exp() * inside).sum(-1) - rest * each.log()
    sure = likely if by == "label" else 1 - entropy / math.log(VOCAB)
    rows = 0.7 * sure * divergence + (0.2 + 0.7 * (1 - sure)) * ce
    expected = (rows * weights[:, 1:].double())[real].sum() / real.sum()
    torch.testing.assert_close(ours.double(), expected, rtol=5e-5, atol=1e-6)
    trained = [p for p in student.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(x, trained) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    teacher.requires_grad_(True)


def test_certainty_of_mixtures_and_of_what_is_odd():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([[1, -100, 6], [0, 2, 5]])
    logits[0, 0], logits[0, 2, :3] = 0.0, -math.inf  # all alike; words without mass
    p = logits.softmax(-1)
    expected = (1 + p.xlogy(p).sum(-1) / math.log(7)) * (labels != -100)
    found = teacher_certainty(TeacherLogits(logits.transpose(0, 1).contiguous().transpose(0, 1)), labels, 7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    both = TeacherMixture([TeacherLogits(logits), TeacherLogits(logits.flip(-1))], [1.0, 3.0])
    p = (p + 3 * p.flip(-1)) / 4
    expected = (1 + p.xlogy(p).sum(-1) / math.log(7)) * (labels != -100)
    torch.testing.assert_close(teacher_certainty(both, labels, 7).double(), expected, rtol=1e-5, atol=1e-6)
    nothing = torch.full((2, 3), -100)
    assert not teacher_certainty(TeacherLogits(logits), nothing, 7).any()
    with pytest.raises(ValueError, match="confidence: needs a teacher's probabilities, which TeacherSamples"):
        teacher_certainty(TeacherSamples(torch.zeros(2, 3, 1, dtype=torch.long), torch.ones(2, 3, 1)), labels, 7)
    with pytest.raises(ValueError, match="confidence: got 'entropies'; allowed: False, True, 'label', 'entropy'"):
        KnowledgeDistiller(None, None, kd_weight=0, confidence="entropies")


def test_label_probability_of_other_sources():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 20), torch.tensor([[3, -100, 0, 19, 7], [1, 2, 3, 4, -100]])
    p = logits.softmax(-1)
    expected = p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    torch.testing.assert_close(label_probability(TeacherLogits(logits), labels), expected)
    top, ids = p.topk(6, -1)
    found = label_probability(TeacherTopK(ids, top.log(), (1 - top.sum(-1)).log()), labels, 20)
    inside = (ids == labels[..., None]).any(-1)
    rest = (1 - top.sum(-1)) / 14
    torch.testing.assert_close(found, torch.where(inside, expected, rest) * (labels != -100))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_several_teachers(models, batch, make_llama, combine):
    ids, labels, mask = batch
    teachers = [models["llama"], models["gpt2"]]
    student = make_llama(seed=9)
    ensemble = Ensemble([ModelTeacher(t) for t in teachers], combine, [3.0, 1.0])
    ours = KnowledgeDistiller(ensemble, student, temperature=1.5).compute_loss(ids, labels, mask)
    logits = [logits_of(t, ids, mask) for t in teachers]
    if combine == "logits":
        target = 0.75 * logits[0] + 0.25 * logits[1]
    else:
        target = (0.75 * (logits[0] / 1.5).softmax(-1) + 0.25 * (logits[1] / 1.5).softmax(-1)).log() * 1.5
    expected = by_hand(logits_of(student, ids, mask), target, labels, mask, 1.5)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)


def test_each_row_has_its_own_teacher(models, batch):
    ids, _, _ = batch
    teachers, student = [models["llama"], models["gpt2"]], models["small"]
    distiller = KnowledgeDistiller(Ensemble([ModelTeacher(t) for t in teachers], "row"), student)
    ours = distiller.loss({"input_ids": ids, "labels": ids, "teacher": torch.tensor([1, 0, 1])})
    mask = torch.ones_like(ids)
    target = torch.stack([logits_of(teachers[k], ids, mask)[row] for row, k in enumerate([1, 0, 1])])
    expected = by_hand(logits_of(student, ids, mask), target, ids, mask)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(UserError, match="names teacher 2; there are 2"):
        distiller.loss({"input_ids": ids, "labels": ids, "teacher": torch.tensor([1, 0, 2])})
    with pytest.raises(UserError, match="teacher_field"):
        distiller.loss({"input_ids": ids, "labels": ids})


def test_a_teacher_in_small_batches_says_the_same(models, batch):
    ids, labels, mask = batch
    losses = [
        KnowledgeDistiller(ModelTeacher(models["llama"], rows), models["small"]).compute_loss(ids, labels, mask)
        for rows in (None, 1, 2)
    ]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_the_average_follows_the_student(make_llama, batch):
    ids, _, _ = batch
    student = make_llama(seed=7)
    teacher = AverageTeacher(student, 0.9)
    distiller = KnowledgeDistiller(teacher, student, ce_weight=1.0)
    before = student.lm_head.weight.detach().clone()
    assert distiller.compute_loss(ids).item() > 0
    with torch.no_grad():
        student.lm_head.weight += 1.0
    distiller.end_step(1.0)
    torch.testing.assert_close(teacher.model.lm_head.weight, before + 0.1)
    tensors, values = distiller.training_state()
    resumed = KnowledgeDistiller(AverageTeacher(make_llama(seed=7), 0.9), make_llama(seed=7), ce_weight=1.0)
    resumed.load_training_state(tensors, values)
    torch.testing.assert_close(resumed.teacher.model.lm_head.weight, teacher.model.lm_head.weight)
    frozen = AverageTeacher(student, 1.0)
    assert frozen.state() == {}


def test_taid_moves_with_the_loss_and_is_resumed(models, batch):
    ids, _, _ = batch
    distiller = KnowledgeDistiller(models["llama"], models["small"], taid=TAIDSchedule(t=0.4, alpha=0.1))
    student, teacher = (logits_of(models[name], ids, torch.ones_like(ids)) for name in ("small", "llama"))
    target = 0.6 * student + 0.4 * teacher
    expected = by_hand(student, target, ids, torch.ones_like(ids))
    torch.testing.assert_close(distiller.compute_loss(ids).double(), expected, rtol=2e-5, atol=1e-6)
    for step, loss in enumerate((3.0, 2.0, 1.5)):
        distiller.begin_step(step, 30)
        distiller.end_step(loss)
    # behind the first step, where nothing was known before, at least a straight line to 1 in 30 steps
    assert distiller.measured()["taid_t"] == distiller.taid.t > 0.4 + 0.6 * 2 / 30
    again = KnowledgeDistiller(models["llama"], models["small"], taid=TAIDSchedule())
    again.load_training_state(*distiller.training_state())
    assert again.taid.steps is None  # a resumed run says how many it has
    again.begin_step(3, 30)
    assert again.taid == dataclasses.replace(distiller.taid, alpha=5e-4)


def test_schedules_move_over_the_steps(models, batch):
    ids, _, _ = batch
    ramp = Ramp(5.0, 1.0)
    distiller = KnowledgeDistiller(
        models["llama"], models["small"], temperature=ramp, kd_weight=Ramp(0.0, 1.0, "cosine")
    )
    losses = []
    for step in range(5):
        distiller.begin_step(step, 5)
        losses.append(distiller.compute_loss(ids).item())
        assert distiller.measured()["temperature"] == pytest.approx(5.0 - step)
    assert losses[0] == 0.0
    plain = [
        KnowledgeDistiller(models["llama"], models["small"], temperature=5.0 - step).compute_loss(ids).item()
        for step in range(5)
    ]
    share = [(1 - math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert losses == pytest.approx([s * p for s, p in zip(share, plain, strict=True)], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (Ramp(6, 2), [6, 5, 4, 3, 2]),
        (Ramp(0, 1, "cosine"), [0, 0.1464466, 0.5, 0.8535534, 1]),
        (Ramp(1, 3, "linear", until=0.5), [1, 2, 3, 3, 3]),
        (Ramp(1, 3, "steps", until=0.5), [1, 1, 3, 3, 3]),
        (2.5, [2.5] * 5),
    ],
)
def test_ramps(ramp, values):
    assert [at(ramp, i / 4) for i in range(5)] == pytest.approx(values)


def test_the_rule_of_thumb_for_a_temperature(models):
    assert temperature_for(8_000, 1_000) == 4.0 and temperature_for(1_000, 8_000) == 1.0
    sizes = [sum(p.numel() for p in models[name].parameters()) for name in ("llama", "small")]
    distiller = KnowledgeDistiller(models["llama"], models["small"], temperature="auto")
    assert distiller.temperature == pytest.approx(math.log2(sizes[0] / sizes[1]) + 1)


def test_hidden_states_are_matched_beside_the_logits(models, batch):
    ids, labels, mask = batch
    teacher, student = models["llama"], models["small"]
    match = HiddenMatch(layer_map("uniform", 2, 4), 32, 48)
    distiller = KnowledgeDistiller(teacher, student, matchings={"hidden": match_hidden(match, 0.5)})
    loss = distiller.compute_loss(ids, labels, mask)
    plain = KnowledgeDistiller(teacher, student).compute_loss(ids, labels, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    states = [
        model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
        for model in (student, teacher)
    ]
    padded = F.pad(mask[:, :-1], (1, 0), value=1) * mask == 0
    predicts = F.pad(labels.masked_fill(padded, -100)[:, 1:], (0, 1), value=-100) != -100
    torch.testing.assert_close(loss, plain + 0.5 * match(*states, predicts))
    names = [name for name, _ in distiller.trained()]
    assert any(name.startswith("matched.hidden") for name in names)
    assert not any("matched" in name for name in student.state_dict())


@pytest.mark.parametrize("by", ["hidden", "attention", "scores", "frobenius", "mse", "task", "own"])
def test_a_step_is_the_same_however_it_is_split(models, batch, by):
    """Micro-batches with very different numbers of labels, one row with none, each cut to its longest row."""
    ids, _, _ = batch
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0] = -100
    labels[1, 2:] = -100
    mask[1, 7:], mask[0, 10:] = 0, 0
    teacher, student = models["llama"], models["small"]
    pairs, options = layer_map("uniform", 2, 4), {}
    if by in ("hidden", "attention", "scores", "frobenius", "mse"):
        attention = AttentionMatch(pairs, loss="kl" if by == "attention" else by) if by != "hidden" else None
        match = match_hidden(HiddenMatch(pairs, 32, 48)) if attention is None else match_attention(attention)
        options["matchings"] = {"match": match}
    if by == "own":
        options["own_losses"] = {1: OwnLoss(kd_weight=0.5, ce_weight=2.0)}
    distiller = KnowledgeDistiller(teacher, student, **options)
    columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if by == "task":
        columns["task"] = torch.tensor([[1] * 11, [2] * 11, [1] * 5 + [2] * 6])
    parameters = [p for p in student.parameters() if p.requires_grad]
    turns = iter(range(99))

    def step(*parts):
        turn = next(turns)
        batches = []
        for rows in parts:
            longest = int(mask[rows].sum(1).max())
            part = {name: column[rows, :longest] for name, column in columns.items()}
            batches.append(distiller.prepare(part | {"source": torch.tensor([0, 1, 0])[rows]}, turn))
        distiller.begin_step(turn, 99)
        losses = [loss for batch in batches for _, loss in distiller.losses(**batch)]
        return sum(losses).detach(), torch.autograd.grad(sum(losses), parameters, allow_unused=True)

    whole = step([0, 1, 2])
    for split in (([0], [1, 2]), ([0], [1], [2])):
        torch.testing.assert_close(step(*split), whole, rtol=1e-5, atol=2e-6)
    with pytest.raises(RuntimeError, match="not prepared"):
        distiller.begin_step(next(turns), 99)
        next(distiller.losses(**columns))


def test_tasks_and_own_losses_by_hand(models, batch):
    """Each task, and each source's own loss, a mean over its own tokens; what is measured is without weights."""
    ids, _, _ = batch
    labels = ids.clone()
    labels[0, 7:], labels[1, :3] = -100, -100
    task = torch.zeros_like(ids)
    task[0, :4], task[0, 4:] = 1, 2
    weights = torch.rand(ids.shape) + 0.5
    source = torch.tensor([0, 1, 0])
    own = {1: OwnLoss(kd_weight=0.25, ce_weight=Ramp(3.0, 1.0))}
    distiller = KnowledgeDistiller(models["llama"], models["small"], ce_weight=0.5, own_losses=own)
    ours = distiller.loss({"input_ids": ids, "labels": labels, "task": task, "weights": weights, "source": source})
    mask = torch.ones_like(ids)
    target, student = (logits_of(models[name], ids, mask) for name in ("llama", "small"))
    log_p, log_q = target.log_softmax(-1), student.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = -log_q.gather(-1, ids[:, 1:, None]).squeeze(-1)
    real, kinds, w = labels[:, 1:] != -100, task[:, 1:], weights[:, 1:].double()
    token = w * (kl + 0.5 * ce) * real
    main = real & (source != 1)[:, None]
    n_label, n_rationale = (int((main & (kinds == k)).sum()) for k in (1, 2))
    assert (n_label, n_rationale) == (3, 3) and int(main.sum()) == 16
    # the third row has no task
    expected = token[0, :3].sum() / n_label + token[0, 3:].sum() / n_rationale + token[2].sum() / real[2].sum()
    expected = expected + (w * (0.25 * kl + 3.0 * ce) * real)[1].sum() / real[1].sum()
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)
    measured = distiller.measured()
    assert measured["ce"] == pytest.approx(float(ce[real].detach().mean()), rel=1e-5)
    assert measured["kd"] == pytest.approx(float(kl[real].detach().mean()), rel=1e-5)
    with pytest.raises(ValueError, match="column `source`"):
        distiller.loss({"input_ids": ids, "labels": labels})


def test_weights_of_tasks(models, batch):
    ids, _, _ = batch
    task = torch.zeros_like(ids)
    task[0], task[1] = 1, 2
    given = {"input_ids": ids, "labels": ids, "task": task}
    each = []
    for name in ("text", "label", "rationale"):
        only = dict.fromkeys(("text", "label", "rationale"), 0.0) | {name: 1.0}
        each.append(KnowledgeDistiller(models["llama"], models["small"], task_weight=only).loss(given))
    rows = [KnowledgeDistiller(models["llama"], models["small"]).compute_loss(ids[[i]]) for i in (2, 0, 1)]
    torch.testing.assert_close(each, rows)
    weighted = KnowledgeDistiller(models["llama"], models["small"], task_weight={"label": 2, "rationale": 0.5})
    torch.testing.assert_close(weighted.loss(given), rows[0] + 2 * rows[1] + 0.5 * rows[2])
    plain = {"input_ids": ids, "labels": ids}
    halved = KnowledgeDistiller(models["llama"], models["small"], task_weight={"text": 0.5}).loss(plain)
    torch.testing.assert_close(halved, 0.5 * KnowledgeDistiller(models["llama"], models["small"]).loss(plain))
    with pytest.raises(ValueError, match="task_weight: got 'ce'; allowed: text, label, rationale; .* ce_weight"):
        KnowledgeDistiller(models["llama"], models["small"], task_weight={"ce": 0.5})
    with pytest.raises(ValueError, match=r"use RationaleDistiller\(student, tokenizer\).compute_loss"):
        weighted.compute_loss(ids, teacher_rationale=ids)


def test_distillm_2s_pair_by_hand(models, batch):
    """Skew KL on the teacher's answers beside skew reverse KL on the student's own, each with its skew."""
    ids, _, _ = batch
    own = {1: OwnLoss(kd_weight=0.5, divergence="skew_kl", lam=0.2)}
    options = {"divergence": "skew_reverse_kl", "lam": 0.1, "kd_weight": 0.5, "own_losses": own}
    student = models["small"]
    distiller = KnowledgeDistiller(models["llama"], student, **options)
    ours = distiller.loss({"input_ids": ids, "labels": ids, "source": torch.tensor([0, 1, 0])})
    mask = torch.ones_like(ids)
    p, q = (logits_of(models[name], ids, mask).softmax(-1) for name in ("llama", "small"))
    skew = (p[1] * (p[1] / (0.2 * p[1] + 0.8 * q[1])).log()).sum(-1).mean()
    p, q = p[[0, 2]], q[[0, 2]]
    reverse = (q * (q / (0.9 * p + 0.1 * q)).log()).sum(-1).mean()
    torch.testing.assert_close(ours.double(), 0.5 * (skew + reverse), rtol=2e-5, atol=1e-7)
    head = student.get_output_embeddings().weight
    for got, expected in zip(*(torch.autograd.grad(x, head) for x in (ours, 0.5 * (skew + reverse))), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-7)


def test_rows_with_an_own_loss_are_never_the_students_samples(models, batch):
    ids, _, _ = batch
    student = models["small"]
    on_policy = OnPolicy(student, share=1.0, max_new_tokens=3, prompt_tokens=2, eos_token_id=257, pad_token_id=0)
    options = {"divergence": "reverse_kl", "own_losses": {1: OwnLoss(ce_weight=1.0)}}
    distiller = KnowledgeDistiller(models["llama"], student, on_policy=on_policy, **options)
    given = {"input_ids": ids, "labels": ids, "segment_ids": torch.zeros_like(ids), "source": torch.tensor([0, 1, 0])}
    given["position_ids"] = torch.arange(11).expand(3, 11)
    made = distiller.prepare(dict(given), 0)
    assert made["input_ids"].shape == ids.shape
    for name in given:
        assert torch.equal(made[name][1], given[name][1]), name
    for row in (0, 2):
        assert torch.equal(made["input_ids"][row, :2], ids[row, :2])
        learned = made["labels"][row] != -100
        assert not learned[:2].any() and 1 <= learned.sum() and not learned[5:].any()
        # the samples' row is followed by padding, a document of its own
        used = int(learned.nonzero().max()) + 1
        assert (made["segment_ids"][row, used:] == -1).all() and made["position_ids"][row, used] == 0
    # MiniLLM's two terms: reverse KL on samples, and the text's cross entropy
    distiller.begin_step(0, 1)
    ((_, loss),) = distiller.losses(**made)
    plain = {name: column[[1]] for name, column in made.items() if name != "source"}
    samples = {name: column[[0, 2]] for name, column in made.items() if name != "source"}
    text = KnowledgeDistiller(None, student, kd_weight=0.0, ce_weight=1.0).loss(plain)
    reverse = KnowledgeDistiller(models["llama"], student, divergence="reverse_kl").loss(samples)
    torch.testing.assert_close(loss, text + reverse)
    # the teacher is asked about the samples alone, and not at all where every row is text
    asked = []
    hook = models["llama"].register_forward_pre_hook(lambda _, __, given: asked.append(given), with_kwargs=True)
    distiller.loss(made)
    distiller.loss({name: column[[1]] for name, column in made.items()})
    hook.remove()
    assert [len(given["input_ids"]) for given in asked] == [2]


def test_what_is_measured_is_a_mean_over_all_processes_tokens(tmp_path):
    """Of a process with few tokens as little as they are, and of one that had none nothing."""

    def body(rank):
        means = Means()
        means.add("ce", torch.tensor([1.0, 4.0][rank]), torch.tensor([10, 2][rank]))
        if rank:
            means.add("kd", torch.tensor(3.0), torch.tensor(5))
        return means.take(), means.take()

    expected = {"ce": (10 * 1.0 + 2 * 4.0) / 12, "kd": 3.0}
    assert in_processes(tmp_path, 2, body) == [(expected, {}), (expected, {})]


def test_nothing_is_predicted_from_padding(models, batch):
    ids, _, _ = batch
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    distiller = KnowledgeDistiller(models["llama"], models["small"], ce_weight=1.0)
    other = ids.masked_fill(mask == 0, 7)
    torch.testing.assert_close(
        distiller.compute_loss(ids, attention_mask=mask), distiller.compute_loss(other, attention_mask=mask)
    )
    alone = [distiller.compute_loss(row[None, start:]) for row, start in zip(ids, (0, 4, 0), strict=True)]
    counts = [10, 6, 10]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / 26
    torch.testing.assert_close(distiller.compute_loss(ids, attention_mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_over_the_students_whole_vocabulary(models, make_llama):
    student = make_llama(seed=8, vocab_size=300)
    ids = torch.randint(2, 250, (2, 9))
    ids[0, 3] = 290  # which the teacher does not know; only its logits are asked, of ids it has
    known = ids.clamp(max=249)
    ours = KnowledgeDistiller(models["fewer"], student, ce_weight=0.5).loss({"input_ids": known, "labels": ids})
    logits = student(known).logits[:, :-1].double()
    target = models["fewer"](known).logits[:, :-1].double().log_softmax(-1)
    kl = (target.exp() * (target - logits[..., :250].log_softmax(-1))).sum(-1).mean()
    ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(ours.double(), kl + 0.5 * ce, rtol=2e-5, atol=1e-6)


def test_weights_multiply_a_tokens_loss(models, batch):
    ids, _, _ = batch
    weights = torch.rand(ids.shape)
    ours = KnowledgeDistiller(models["llama"], models["small"]).loss(
        {"input_ids": ids, "labels": ids, "weights": weights}
    )
    mask = torch.ones_like(ids)
    target, student = (logits_of(models[name], ids, mask) for name in ("llama", "small"))
    expected = by_hand(student, target, ids, mask, weight=weights[:, 1:].double())
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-6)


def test_a_head_that_is_more_than_linear_is_refused(make_llama):
    model = make_llama()
    original = model.forward

    def odd(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = odd
    with pytest.raises(UserError, match="does more to its logits"):
        final_hidden_states(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_heads_have_scale_bias_and_softcap():
    weight, bias, hidden = torch.randn(7, 4), torch.randn(7), torch.randn(3, 4)
    logits = 5 * torch.tanh(2 * (hidden @ weight.T + bias) / 5)
    torch.testing.assert_close(Head(weight, bias, 2.0, 5.0).logits(hidden), logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"teacher": None}, "kd_weight 0"),
        ({"teacher": "average", "alpha": 1.5}, "alpha: got 1.5; allowed: 0 to 1"),
        (
            {"teacher": "average", "alpha": 0.25, "ce_weight": 0.5},
            r"kd_weight=0.75, ce_weight=0.25\), or kd_weight=0.2",
        ),
        ({"teacher": "student"}, "the student itself"),
        ({"teacher": "average", "matchings": [1]}, "matchings: got list; give a dict"),
        ({"teacher": "average", "temperature": "auto"}, None),
    ],
)
def test_what_cannot_be_is_refused(models, arguments, words):
    student = models["small"]
    teacher = {"student": student, None: None, "average": AverageTeacher(student, 0.9)}[arguments.pop("teacher")]
    if words is None:
        assert KnowledgeDistiller(teacher, student, **arguments).temperature == 1.0
        return
    with pytest.raises(ValueError, match=words):
        KnowledgeDistiller(teacher, student, **arguments)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("bad", [250, -1])
def test_ids_that_a_model_has_no_row_for_are_said(models, monkeypatch, who, bad, at_once):
    """One line instead of an IndexError, or of a GPU that is broken for the process: there, as `at_once` is not, a
    model is given what it can read, and what was wrong is said where the loss waits for the device."""
    from mohawk.losses import heads

    if not at_once:
        monkeypatch.setattr(heads, "AT_ONCE", ())
    given = (models["fewer"], models["small"]) if who == "teacher" else (models["llama"], models["fewer"])
    distiller = KnowledgeDistiller(*given)
    ids = torch.randint(2, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    good = distiller.compute_loss(ids)
    ids[1, 4] = bad
    who = "(teacher|student)" if bad < 0 else who  # neither has a row for -1
    with pytest.raises(UserError, match=rf"^{who}: input_ids: got {bad}; the embedding of LlamaForCausalLM has 2") as e:
        distiller.compute_loss(ids)
    assert "\n" not in str(e.value) and (bad < 0 or "250 rows, for ids from 0 to 249" in str(e.value))
    ids[1, 4] = 249
    assert torch.isfinite(distiller.compute_loss(ids)) and torch.isfinite(good)


def test_ids_of_rows_that_a_teacher_is_not_asked_about_are_none_of_its(models):
    """New tokens of a student, in plain text whose cross entropy alone it learns."""
    own = {1: OwnLoss(ce_weight=1.0)}
    distiller = KnowledgeDistiller(models["fewer"], models["small"], own_losses=own)
    ids = torch.randint(2, 250, (2, 11), generator=torch.Generator().manual_seed(0))
    ids[1, 5] = 255
    loss = distiller.loss({"input_ids": ids, "labels": ids, "source": torch.tensor([0, 1])})
    assert torch.isfinite(loss)
    with pytest.raises(UserError, match="^teacher: input_ids: got 255"):
        distiller.loss({"input_ids": ids, "labels": ids, "source": torch.tensor([1, 0])})


def test_ids_beyond_an_adapted_model(make_llama):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    student = peft.get_peft_model(make_llama(1), peft.LoraConfig(r=2, **options))
    ids = torch.full((1, 4), 258)
    with pytest.raises(UserError, match="^student: input_ids: got 258; the embedding of LlamaForCausalLM has 258 rows"):
        KnowledgeDistiller(make_llama(2), student).compute_loss(ids)

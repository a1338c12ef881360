"""A student whose vocabulary is the beginning of the teacher's learns from a cache what it would learn online."""

import re

import pytest
import torch

from mohawk.data.packing import PackedDataset, collate
from mohawk.kernels.kd.interface import kd_loss
from mohawk.kernels.kd.teachers import TeacherSamples, TeacherTopK
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.shared_vocabulary import shared_part, told_of_cut
from mohawk.losses.teachers import CachedTeacher
from mohawk.teacher_cache.reader import CachedRows
from mohawk.teacher_cache.writer import write_cache
from tests.helpers.tiny_teacher import LENGTH, VOCAB, documents

LARGER = 300  # the teacher's, of which the text uses the first VOCAB and the student has no more


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(1, vocab_size=LARGER)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return PackedDataset(documents(tmp_path_factory.mktemp("text")), LENGTH, seed=3)


def batch_of(dataset, cache=None):
    rows = dataset if cache is None else CachedRows(dataset, cache)
    return collate([rows[i] for i in range(len(rows))])


def renormalised(teacher, batch, temperature=1.0):
    """The teacher's log-probabilities among the shared ids, float64: softmax of all, cut, divided by what is left."""
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    p = (logits.double() / temperature).softmax(-1)[..., :VOCAB]
    return (p / p.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kind", ["top-k", "hidden"])
def test_all_of_the_teachers_mass_gives_the_online_loss(tmp_path, teacher, dataset, make_llama, kind, divergence):
    student = make_llama(2)
    cache = write_cache(tmp_path / "c", teacher, dataset, kind=kind, k=LARGER)
    assert cache.layout.vocab_size == LARGER
    batch = batch_of(dataset, cache)
    found = KnowledgeDistiller(CachedTeacher(cache), student, divergence=divergence, confidence=True)
    online = KnowledgeDistiller(teacher, student, divergence=divergence, confidence=True)
    plain = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids", "labels")}
    torch.testing.assert_close(found.loss(batch), online.loss(plain), rtol=2e-4, atol=2e-5)  # of 16 bits a value
    found.confidence = online.confidence = False
    torch.testing.assert_close(found.loss(batch), online.loss(plain), rtol=2e-4, atol=2e-5)
    if divergence == "forward_kl":  # and both are what the definition says
        p = renormalised(teacher, batch)
        with torch.no_grad():
            q = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        kl = (p.exp() * (p - q.double().log_softmax(-1))).sum(-1)
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(found.loss(batch).double(), kl[labels != -100].mean(), rtol=2e-4, atol=2e-5)


def test_what_lies_beyond_and_is_named_is_taken_out_exactly(teacher, dataset):
    """With a known rest that is all shared, a top k gives the loss over its ids and one bucket, as the definition has
    it: ids beyond the vocabulary taken out, all else scaled up to one."""
    batch = batch_of(dataset)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    logits = logits.double()
    k = 120
    beyond = logits[..., VOCAB:]
    # a teacher that names all ids beyond, whatever their rank, and its likeliest others
    best = logits[..., :VOCAB].topk(k - (LARGER - VOCAB), -1)
    logprobs = logits.log_softmax(-1)
    ids = torch.cat([torch.arange(VOCAB, LARGER).expand(beyond.shape), best.indices], -1)
    shuffled = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    ids = ids.gather(-1, shuffled)
    named = logprobs.gather(-1, ids)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    for given in (tail.float(), None):
        cut = shared_part(TeacherTopK(ids, named.float(), given), VOCAB)
        assert cut.ids.max() < VOCAB
        ordered = cut.ids.sort(-1).values
        assert (ordered[..., 1:] != ordered[..., :-1]).all()
        torch.testing.assert_close(
            cut.logprobs.exp().sum(-1) + cut.tail_logprob.exp(), torch.ones(cut.ids.shape[:-1]), rtol=1e-5, atol=1e-5
        )
        p = renormalised(teacher, batch).exp()
        held = torch.zeros_like(p).scatter(-1, cut.ids, cut.logprobs.double().exp())
        theirs = torch.zeros_like(p).scatter(-1, best.indices, p.gather(-1, best.indices))
        torch.testing.assert_close(torch.where(theirs > 0, held, 0.0), theirs, rtol=2e-5, atol=2e-7)
        rest = 1 - theirs.sum(-1, keepdim=True)
        filled = (theirs == 0) & (held > 0)
        assert (filled.sum(-1) == LARGER - VOCAB).all()
        even = (rest / (VOCAB - best.indices.shape[-1])).expand_as(held)
        torch.testing.assert_close(held[filled], even[filled], rtol=1e-3, atol=1e-8)
    # the loss over those buckets, from the definition
    student = torch.randn(*batch["input_ids"].shape, VOCAB, generator=torch.Generator().manual_seed(1)).double()
    q = student.log_softmax(-1)
    rest = held.scatter(-1, cut.ids, 0.0)
    assert not rest.any()
    left = (1 - held.sum(-1)).clamp(min=0)
    own = q.scatter(-1, cut.ids, -torch.inf).logsumexp(-1)
    kl = torch.where(held > 0, held * (held.clamp(min=1e-300).log() - q), 0.0).sum(-1) + left * (left.log() - own)
    found = kd_loss(student, cut, reduction="none", vocab_size=VOCAB)
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("k", [20, 25])
def test_a_rest_beyond_all_shared_ids_is_no_mass_of_theirs(k, divergence):
    """A top k that names the student's whole vocabulary leaves its rest to ids that the student does not have."""
    g = torch.Generator().manual_seed(0)
    logits, student = torch.randn(4, 30, generator=g).double(), torch.randn(4, 20, generator=g).double()
    logits[:, :20] += 8  # the shared ids are the likeliest, so that the first 20 are they, and the rest is below
    logprobs = logits.log_softmax(-1)
    named, ids = logprobs.topk(k)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    assert (tail.exp() > 1e-5).all()
    p, q = logits[:, :20].log_softmax(-1), student.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    kl = {
        "forward_kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "jsd": ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2,
    }[divergence]
    for given in (tail.float(), None):
        cut = shared_part(TeacherTopK(ids, named.float(), given), 20)
        found = kd_loss(student.requires_grad_(), cut, reduction="none", divergence=divergence, vocab_size=20)
        torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-5)
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_a_position_with_nothing_left_says_nothing():
    """All that was named lies beyond, and nothing else has mass: no id is preferred to another."""
    source = TeacherTopK(torch.tensor([[7, 8], [1, 9]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]]).log(),
                         torch.full((2,), -torch.inf))  # fmt: skip
    cut = shared_part(source, 5)
    assert cut.ids.tolist() == [[4, 3], [1, 4]]
    torch.testing.assert_close(cut.logprobs.exp(), torch.tensor([[0.2, 0.2], [1.0, 0.0]]))
    torch.testing.assert_close(cut.tail_logprob.exp(), torch.tensor([0.6, 0.0]))
    assert shared_part(source, 10) is source


def test_samples_that_are_left_are_draws_from_what_is_shared(tmp_path, teacher, dataset, make_llama):
    """Unbiased: the mean over the positions that have any is the cross entropy with the renormalised teacher."""
    cache = write_cache(tmp_path / "c", teacher, dataset, kind="samples", draws=4000)
    batch = batch_of(dataset, cache)
    source = TeacherSamples(batch["teacher_ids"], batch["teacher_weights"])
    assert (source.ids >= VOCAB).any()
    cut = shared_part(source, VOCAB)
    assert cut.ids.max() < VOCAB
    torch.testing.assert_close(cut.weights.sum(-1), source.weights.sum(-1))
    p = renormalised(teacher, batch).exp().float()
    drawn = torch.zeros_like(p).scatter_add(-1, cut.ids, cut.weights)
    deviation = (p * (1 - p) / 4000).sqrt()
    assert ((drawn - p).abs() <= 7 * deviation + 2e-3).all()
    nothing = shared_part(TeacherSamples(torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.5]])), 5)
    assert nothing.weights.tolist() == [[0.0, 0.0]] and nothing.ids.max() < 5
    loss = KnowledgeDistiller(CachedTeacher(cache), make_llama(2)).loss(batch)
    assert torch.isfinite(loss)


def test_what_a_short_top_k_leaves_open_is_said_once(tmp_path, teacher, dataset, make_llama, caplog):
    """How much of what it does not hold lies beyond the student's vocabulary nobody knows; how much it is, one does."""
    cache = write_cache(tmp_path / "c", teacher, dataset, kind="top-k", k=20)
    batch = batch_of(dataset, cache)
    found = KnowledgeDistiller(CachedTeacher(cache), make_llama(2))
    for _ in range(2):
        found.loss(batch)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mohawk.losses.distiller"]
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    labels[:, :-1][batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]] = -100
    p, ids = logits.double().softmax(-1)[labels != -100].topk(20)
    beyond, rest = p[ids >= VOCAB].sum() / p.sum(), (1 - p.sum(-1)).mean()
    assert 0.02 < beyond < 0.5 and 0.02 < rest < 0.9
    numbers = [float(number) / 100 for number in re.findall(r"([\d.]+) %", line)]
    assert numbers == pytest.approx([float(beyond), float(rest)], rel=5e-3)
    assert f"the student's vocabulary ends at {VOCAB}: " in line and "is not known" in line


@pytest.mark.parametrize("kind", ["top-k", "hidden", "samples"])
def test_nothing_is_said_where_nothing_is_left_open(tmp_path, teacher, dataset, make_llama, caplog, kind):
    """A top k of everything, hidden states, and draws of which each position has some left."""
    cache = write_cache(tmp_path / "c", teacher, dataset, kind=kind, k=LARGER, draws=200)
    KnowledgeDistiller(CachedTeacher(cache), make_llama(2)).loss(batch_of(dataset, cache))
    assert not [record for record in caplog.records if record.name == "mohawk.losses.distiller"]
    same = write_cache(tmp_path / "d", make_llama(3), dataset, kind="top-k", k=20)
    KnowledgeDistiller(CachedTeacher(same), make_llama(2, vocab_size=LARGER)).loss(batch_of(dataset, same))
    assert not [
        record for record in caplog.records if record.name == "mohawk.losses.distiller"
    ]  # of a larger student's nothing is cut


def test_positions_without_a_sample_left_are_said(caplog):
    ids, weights = torch.tensor([[7, 8], [1, 9], [1, 2], [9, 9]]), torch.full((4, 2), 0.5)
    rows = torch.tensor([True, True, True, False])
    line = told_of_cut(TeacherSamples(ids, weights), 5, rows)
    assert "50 % of the teacher's samples" in line and "33.3 % of the positions have none left" in line
    assert told_of_cut(TeacherSamples(ids, weights), 5, rows & (ids[:, 0] < 5)) is None

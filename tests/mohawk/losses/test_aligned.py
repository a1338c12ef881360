"""A teacher with another tokenizer: values and gradients in float64 from their definitions, and the present loss where
the tokenizers are one."""

import math
import unicodedata

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mohawk import KnowledgeDistiller
from mohawk.data.aligned_rows import TokenAligner
from mohawk.data.tokenizers.same_tokenizer import SAMPLE
from mohawk.data.tokenizers.token_bytes import TokenBytes
from mohawk.losses import aligned as aligned_module
from mohawk.losses.aligned import AlignedTeacher

TEXT = "the quick brown fox and the lazy administration, naïve café; the fox jumps over 12 dogs."
DIVERGENCES = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
}


def bpe(size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def small():
    return bpe(275)


@pytest.fixture(scope="module")
def big():
    """Its merges go on from `small`'s, but two of its ids are others."""
    return bpe(320)


@pytest.fixture
def batch(small):
    """Two rows: one of a document, one of two and of padding."""
    one = small(TEXT)["input_ids"]
    n = len(one)
    other = [*one[:20], small.eos_token_id, *one[7:15]]
    ids = torch.tensor([one, other + [0] * (n - len(other))])
    segments = torch.tensor([[0] * n, [0] * 21 + [1] * 8 + [-1] * (n - 29)])
    labels = torch.where(segments < 0, -100, ids)
    labels[0, 10:13] = -100
    labels[1, 21] = -100
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "weights": torch.rand(2, n)}


def models_of(make_llama, small, big, **settings):
    student = make_llama(1, vocab_size=len(small) + 3, tie_word_embeddings=False, **settings).train()
    return student, make_llama(2, vocab_size=len(big) + 5, hidden_size=48, tie_word_embeddings=False)


def by_definition(student, teacher, aligner, batch, kind, temperature=1.0, divergence="forward_kl"):
    """The loss in float64 and loops, from whole logits of float64 models."""
    columns, spans = aligner.batch(batch)

    def logits(model, inputs):  # a cache would make one document of a row
        return model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits

    zs = logits(student, batch | {"position_ids": positions_of(batch["segment_ids"])})
    zt = logits(teacher, columns)
    of = DIVERGENCES[divergence]
    total, count = zs.new_zeros(()), int((next_labels(batch) != -100).sum())
    shared = aligner.shared
    for r, (a, b), (c, d) in zip(spans.rows.tolist(), spans.student.tolist(), spans.teacher.tolist(), strict=True):
        weight = batch["weights"][r, a:b].double().mean() if kind == "spans" else batch["weights"][r, a].double()
        if kind == "uld":
            p, q = (
                torch.softmax(z / temperature, -1).sort(descending=True).values for z in (zt[r, c - 1], zs[r, a - 1])
            )
            q = torch.cat([q, q.new_zeros(len(p) - len(q))])
            total = total + temperature**2 * weight * (p - q).abs().sum()
            continue
        own, theirs = batch["input_ids"][r, a:b].tolist(), columns["input_ids"][r, c:d].tolist()
        if b - a == d - c == 1 and (own[0], theirs[0]) in shared:
            found = []
            for z, side in ((zt[r, c - 1], 1), (zs[r, a - 1], 0)):
                whole = torch.softmax(z / temperature, -1)
                kept = whole[[pair[side] for pair in shared]]
                found.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)]))
            total = total + weight * temperature**2 * of(*found)
        else:
            likely = [
                sum(z[r, i - 1].log_softmax(-1)[ids[r, i]] for i in range(*span))
                for z, ids, span in ((zt, columns["input_ids"], (c, d)), (zs, batch["input_ids"], (a, b)))
            ]
            p, q = (torch.stack([x, torch.log1p(-x.exp())]).exp() for x in (value / temperature for value in likely))
            total = total + weight * temperature * of(p, q)
    return total / count


def positions_of(segments):
    found = torch.zeros_like(segments)
    for r in range(len(segments)):
        for i in range(1, segments.shape[1]):
            found[r, i] = found[r, i - 1] + 1 if segments[r, i] == segments[r, i - 1] else 0
    return found


def next_labels(batch):
    from mohawk.data.next_tokens import next_labels

    return next_labels(batch)


@pytest.mark.parametrize(
    ("kind", "temperature", "divergence"),
    [
        ("spans", 1.0, "forward_kl"),
        ("spans", 2.0, "reverse_kl"),
        ("spans", 1.0, "tvd"),
        ("uld", 1.0, "forward_kl"),
        ("uld", 2.0, "forward_kl"),
    ],
)
def test_loss_and_gradient_by_definition(make_llama, small, big, batch, kind, temperature, divergence, monkeypatch):
    """In tiles of a few rows."""
    monkeypatch.setattr(aligned_module, "TILE_BYTES", 4 * 330 * 5)
    student, teacher = models_of(make_llama, small, big)
    aligned = AlignedTeacher(teacher, big, small, align=kind)
    distiller = KnowledgeDistiller(aligned, student, temperature=temperature, divergence=divergence)
    given = batch | {"position_ids": positions_of(batch["segment_ids"])}
    loss = distiller.loss(given)
    loss.backward()
    gradients = {name: p.grad.double().clone() for name, p in student.named_parameters()}
    student.zero_grad()
    double = by_definition(student.double(), teacher.double(), aligned.aligner, batch, kind, temperature, divergence)
    double.backward()
    assert loss.item() == pytest.approx(double.item(), rel=1e-5)
    for name, p in student.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=2e-5 * float(p.grad.abs().max()) + 1e-9), name


def test_spans_meet_where_bytes_do(small, big, batch):
    """All learned text is in spans, which are the same bytes on both sides and do not overlap."""
    aligner = TokenAligner(small, big)
    columns, spans = aligner.batch(batch)
    assert set(columns) == {"input_ids", "position_ids", "segment_ids"}
    lengths = set()
    for r, (a, b), (c, d) in zip(spans.rows.tolist(), spans.student.tolist(), spans.teacher.tolist(), strict=True):
        own = [aligner.student.of[i] for i in batch["input_ids"][r, a:b].tolist()]
        theirs = [aligner.teacher.of[i] for i in columns["input_ids"][r, c:d].tolist()]
        assert b"".join(own) == b"".join(theirs)
        assert len(set(batch["segment_ids"][r, a:b].tolist())) == 1
        assert len(set(columns["segment_ids"][r, c - 1 : d].tolist())) == 1
        assert bool((batch["labels"][r, a:b] != -100).all())
        lengths.add((b - a, d - c))
    assert (1, 1) in lengths and any(own > 1 for own, _ in lengths)
    covered = int((spans.student[:, 1] - spans.student[:, 0]).sum())
    assert covered > 0.8 * int((next_labels(batch) != -100).sum())


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("jsd", 2.0)])
def test_one_tokenizer_gives_the_present_loss(make_llama, small, batch, divergence, temperature):
    student, teacher = models_of(make_llama, small, small)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.3}
    given = batch | {"position_ids": positions_of(batch["segment_ids"])}
    found = []
    for asked in (teacher, AlignedTeacher(teacher, small, small)):
        distiller = KnowledgeDistiller(asked, student, **options)
        loss = distiller.loss(given)
        found.append((loss, torch.autograd.grad(loss, list(student.parameters()))))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


def test_padded_batches_and_bfloat16(make_llama, small, big):
    """Rows of a user's own loop, padded on either side, and bfloat16 models."""
    student, teacher = models_of(make_llama, small, big)
    ids = small(TEXT)["input_ids"][:24]
    plain = torch.tensor([ids])
    padded = torch.tensor([[0] * 4 + ids])
    mask = torch.tensor([[0] * 4 + [1] * len(ids)])
    distiller = KnowledgeDistiller(AlignedTeacher(teacher, big, small), student)
    alone = distiller.compute_loss(plain)
    assert distiller.compute_loss(padded, attention_mask=mask).item() == pytest.approx(alone.item(), rel=1e-5)
    rounded = KnowledgeDistiller(AlignedTeacher(teacher.bfloat16(), big, small), student.bfloat16()).compute_loss(plain)
    assert rounded.item() == pytest.approx(alone.item(), rel=0.05)


def test_spaces_of_pieces_come_back():
    """Metaspace puts a space in front of a text alone that has none; SentencePiece's normaliser in front of each."""
    found = []
    for piece in (pre_tokenizers.Metaspace(prepend_scheme="always"), None):
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        if piece is None:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = piece
        alphabet = sorted({c for text in SAMPLE for c in unicodedata.normalize("NFC", text)} | {"▁"})
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet), special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(["a b"], trainer)
        tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), "student")
        for text in ("a", " a", "  a", "   a  b"):
            assert b"".join(tokens.pieces(tokens.encode(text), text.encode())) == text.encode()
        found.append(tokens.adds_another)
    assert found == [False, True]


def test_nothing_in_common_is_no_loss(make_llama, small, big):
    student, teacher = models_of(make_llama, small, big)
    distiller = KnowledgeDistiller(AlignedTeacher(teacher, big, small), student)
    ids = torch.tensor([[small.eos_token_id]])
    loss = distiller.compute_loss(ids)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_what_is_refused(make_llama, small, big):
    student, teacher = models_of(make_llama, small, big)
    with pytest.raises(ValueError, match="align: got 'bytes'; allowed: spans, uld"):
        AlignedTeacher(teacher, big, small, align="bytes")
    aligned = AlignedTeacher(teacher, big, small)
    with pytest.raises(ValueError, match="confidence: needs a teacher that reads the student's own tokens"):
        KnowledgeDistiller(aligned, student, confidence=True)
    with pytest.raises(ValueError, match="mse compares logits"):
        KnowledgeDistiller(aligned, student, divergence="mse")
    assert math.isfinite(KnowledgeDistiller(aligned, student, temperature="auto").temperature)

"""A cached teacher gives the loss of the teacher itself, and refuses whatever is not what was cached."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mohawk.core.folders import MANIFEST
from mohawk.data.packing import PackedDataset, collate
from mohawk.errors import UserError
from mohawk.kernels.kd.interface import (
    TeacherHidden,
    TeacherLogits,
    TeacherSamples,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from mohawk.losses.heads import Head
from mohawk.teacher_cache.layout import ROUNDING
from mohawk.teacher_cache.reader import CachedRows, TeacherCache, shard_name
from mohawk.teacher_cache.writer import write_cache
from tests.helpers.tiny_teacher import LENGTH, VOCAB, documents

KINDS = ("top-k", "samples", "hidden")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """14 packed rows of 16 tokens; one is partly padding."""
    made = PackedDataset(documents(tmp_path_factory.mktemp("text")), LENGTH, seed=3)
    segments = torch.stack([made[i]["segment_ids"] for i in range(14)])
    assert (segments == -1).sum() == 2 and segments.max() >= 2
    return made


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher, dataset):
    """One of each kind, in shards of 4 rows."""
    folder = tmp_path_factory.mktemp("caches")
    for kind in KINDS:
        write_cache(folder / kind, teacher, dataset, kind=kind, k=7, rows_per_shard=4, batch_size=3, tokenizer_hash="t")
    return folder


@pytest.fixture
def cache(caches, tmp_path):
    """A copy to damage, of the top k unless asked."""

    def copy(kind: str = "top-k") -> TeacherCache:
        shutil.copytree(caches / kind, tmp_path / kind)
        return TeacherCache(tmp_path / kind)

    return copy


def online(model, batch, dtype=None):
    """The teacher's own hidden states and logits of a batch."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    hook.remove()
    return seen[0], logits.float()


def aligned(batch):
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def whole(dataset, cache=None):
    rows = dataset if cache is None else CachedRows(dataset, cache)
    return collate([rows[i] for i in range(len(rows))])


def buckets(logits, ids, temperature):
    """Log-probabilities of the ids and, in the last place, of all others, in float64."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def bound(p, q, temperature):
    """What layout.py states, per token."""
    m = torch.where(p.exp() > 0, p.abs().clamp(min=1), 0)
    mean = (p.exp() * m).sum(-1, keepdim=True)
    terms = torch.where(p.exp() > 0, p.exp() * (m + mean) * (p - q).abs(), 0)
    return temperature**2 * ROUNDING * terms.sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 7, 64, VOCAB])
def test_the_loss_of_a_cached_top_k_is_the_online_one_within_the_bound(
    tmp_path, teacher, dataset, make_llama, k, temperature
):
    cache = write_cache(tmp_path / "c", teacher, dataset, k=k, temperature=temperature)
    batch = whole(dataset, cache)
    student = online(make_llama(2), batch)[1]
    logits = online(teacher, batch)[1]
    ids = logits.topk(k, dim=-1).indices
    p, q = buckets(logits, ids, temperature), buckets(student, ids, temperature)
    if k == VOCAB:  # no bucket is left: the dense KL
        assert (batch["teacher_tail"] == -torch.inf).all()
        dense = kd_loss(student.double(), TeacherLogits(logits.double()), temperature=temperature, reduction="none")
        p, q = p[..., :-1], q[..., :-1]
        torch.testing.assert_close(dense, temperature**2 * (p.exp() * (p - q)).sum(-1))
    exact = temperature**2 * (p.exp() * torch.where(p > -torch.inf, p - q, 0)).sum(-1)
    found = kd_loss(student.double(), cache.teacher(batch), temperature=temperature, reduction="none")
    limit = bound(p, q, temperature)
    error = (found - exact).abs()
    assert (error <= 1.001 * limit + 1e-6).all()  # 1e-6: of the float32 in which the teacher's logits are made
    assert error.max() > 0
    # And in the mean far below the worst case, which the roundings of all ids would have to conspire for.
    assert abs(found.mean() - exact.mean()) < 0.2 * limit.mean() + 1e-6


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hidden_states_are_the_teachers_bit_for_bit_and_so_is_the_loss(tmp_path, dataset, make_llama, dtype):
    teacher = make_llama(1, tie_word_embeddings=False)
    if dtype is not None:
        teacher = teacher.to(dtype)
    cache = write_cache(tmp_path / "c", teacher, dataset, kind="hidden", batch_size=14)
    teacher_hidden, _ = online(teacher, whole(dataset))
    batch = whole(dataset, TeacherCache(tmp_path / "c"))
    assert batch["teacher_hidden"].dtype == (dtype or torch.float32)
    assert torch.equal(batch["teacher_hidden"], teacher_hidden)
    head = Head.of(teacher).detached()
    assert torch.equal(cache.head().weight, head.weight) and cache.head().weight.dtype == head.weight.dtype
    student = make_llama(2)
    hidden, _ = online(student, batch)
    weight = student.lm_head.weight.detach()
    for divergence in ("forward_kl", "jsd", "mse"):
        losses = [
            linear_kd_loss(hidden, weight, source, aligned(batch), divergence=divergence, temperature=3.0)
            for source in (cache.teacher(batch), TeacherHidden(teacher_hidden, head.weight))
        ]
        assert torch.equal(*losses)


def test_under_autocast_hidden_states_are_kept_in_its_dtype(tmp_path, teacher, dataset):
    cache = write_cache(tmp_path / "c", teacher, dataset, kind="hidden", batch_size=14, autocast=torch.bfloat16)
    hidden, _ = online(teacher, whole(dataset), torch.bfloat16)
    found = whole(dataset, cache)["teacher_hidden"]
    assert found.dtype == cache.head().weight.dtype == torch.bfloat16
    assert torch.equal(found, hidden.to(torch.bfloat16))


def test_bias_scale_and_softcap_of_the_head_are_kept(tmp_path, dataset):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

    tiny = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    models = [
        PhiForCausalLM(PhiConfig(**tiny)),
        CohereForCausalLM(CohereConfig(**tiny, logit_scale=0.3, pad_token_id=0)),
        Gemma2ForCausalLM(Gemma2Config(**tiny, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)),
    ]
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        folder = tmp_path / type(model).__name__
        cache = write_cache(folder / "hidden", model.eval(), dataset, kind="hidden")
        batch = whole(dataset, cache)
        _, logits = online(model, batch)
        source = cache.teacher(batch)
        found = kd_loss(torch.zeros_like(logits), TeacherLogits(logits))
        zeros = torch.zeros(*batch["input_ids"].shape, 4), torch.zeros(VOCAB, 4)
        torch.testing.assert_close(linear_kd_loss(*zeros, source), found)
        top = write_cache(folder / "top", model, dataset, k=3)
        values = logits.log_softmax(-1).topk(3).values
        torch.testing.assert_close(whole(dataset, top)["teacher_logprobs"], values, atol=2e-4, rtol=2e-4)


def test_a_vocabulary_above_65536_and_one_that_is_cut(tmp_path, make_llama, dataset):
    teacher = make_llama(3, vocab_size=70_000, tie_word_embeddings=False)
    batch = whole(dataset, write_cache(tmp_path / "a", teacher, dataset, k=9))
    logits = online(teacher, batch)[1]
    assert torch.equal(batch["teacher_ids"], logits.topk(9).indices) and batch["teacher_ids"].max() > 65_536
    cut = write_cache(tmp_path / "b", teacher, dataset, k=9, vocab_size=300)
    batch = whole(dataset, cut)
    assert cut.layout.id_bits == 9 and torch.equal(batch["teacher_ids"], logits[..., :300].topk(9).indices)
    expected = logits[..., :300].log_softmax(-1).topk(9).values
    torch.testing.assert_close(batch["teacher_logprobs"], expected, atol=1e-3, rtol=1e-4)
    total = torch.cat([batch["teacher_logprobs"], batch["teacher_tail"][..., None]], -1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-3, rtol=0)


def test_samples_are_drawn_from_the_tempered_teacher(tmp_path, teacher, dataset):
    draws = 4000
    cache = write_cache(tmp_path / "c", teacher, dataset, kind="samples", draws=draws, temperature=2.0, rows=2)
    batch = whole(dataset, cache)
    assert isinstance(cache.teacher(batch), TeacherSamples) and batch["input_ids"].shape[0] == 2
    torch.testing.assert_close(batch["teacher_weights"].sum(-1), torch.ones(2, LENGTH))
    p = (online(teacher, batch)[1] / 2.0).softmax(-1).double()
    counts = torch.zeros_like(p).scatter_add_(-1, batch["teacher_ids"], torch.ones(batch["teacher_ids"].shape).double())
    # Pearson's statistic: mean V - 1, variance about 2 V, over 32 positions
    chi = ((counts - draws * p) ** 2 / (draws * p)).sum(-1)
    assert abs(chi.mean() - (VOCAB - 1)) < 5 * (2 * VOCAB / chi.numel()) ** 0.5


def test_the_gradient_from_samples_is_unbiased(tmp_path, teacher, dataset):
    torch.manual_seed(0)
    student = torch.randn(1, LENGTH, VOCAB, requires_grad=True)

    def gradient(source):
        return torch.autograd.grad(kd_loss(student, source, reduction="sum"), student)[0].double()

    logits = online(teacher, collate([dataset[0]]))[1]
    error, seeds, draws = -gradient(TeacherLogits(logits)), 40, 50
    for seed in range(seeds):
        cache = write_cache(tmp_path / str(seed), teacher, dataset, kind="samples", draws=draws, seed=seed, rows=1)
        error += gradient(cache.teacher(whole(dataset, cache))) / seeds
    # An unbiased one of so many draws is off by its variance and no more.
    variance = (1 - logits.softmax(-1).square().sum(-1)).sum() / (seeds * draws)
    assert 0.8 < error.square().sum() / variance < 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_the_batches_shards_or_tiles(tmp_path, caches, teacher, dataset, monkeypatch, kind):
    monkeypatch.setattr("mohawk.teacher_cache.answers.TILE_BYTES", 4 * VOCAB * 5)  # five positions at once
    other = write_cache(tmp_path / "c", teacher, dataset, kind=kind, k=7, rows_per_shard=5, batch_size=1)
    first, second = whole(dataset, TeacherCache(caches / kind)), whole(dataset, other)
    for name, values in first.items():
        if values.is_floating_point():
            torch.testing.assert_close(second[name], values, atol=2 * ROUNDING, rtol=2 * ROUNDING)
        else:
            assert torch.equal(second[name], values)


def test_other_draws_with_another_seed(tmp_path, caches, teacher, dataset):
    other = write_cache(tmp_path / "c", teacher, dataset, kind="samples", seed=1)
    first = TeacherCache(caches / "samples")
    same = [(first.row(i)["teacher_ids"] == other.row(i)["teacher_ids"]).float().mean() for i in range(14)]
    assert max(same) < 0.2
    rows = [first.row(i)["teacher_ids"] for i in range(14)]
    assert not torch.equal(rows[0], rows[1])


def test_the_documents_of_a_row_are_answered_apart(tmp_path, dataset):
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    models = [
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            )
        ),
    ]
    for i, model in enumerate(models):
        cache = write_cache(tmp_path / str(i), model.eval(), dataset, k=5)
        for index in (0, 5):
            row, cached = dataset[index], cache.row(index)
            for segment in range(int(row["segment_ids"].max()) + 1):
                inside = row["segment_ids"] == segment
                logits = model(row["input_ids"][inside][None]).logits[0].float()
                expected = logits.log_softmax(-1).gather(-1, cached["teacher_ids"][inside])
                torch.testing.assert_close(cached["teacher_logprobs"][inside], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_any_position_can_be_read_by_itself(caches, kind):
    cache = TeacherCache(caches / kind)
    assert len(cache) == 14
    for index, position in ((0, 0), (5, 9), (13, 15), (-1, -1)):
        row = cache.row(index)
        one = cache.at(index, position)
        assert row.keys() == one.keys() and all(torch.equal(one[name], row[name][position]) for name in row)
    with pytest.raises(IndexError):
        cache.row(14)
    with pytest.raises(IndexError):
        cache.at(0, 16)


def test_rows_come_with_the_contracts_columns_also_from_workers(caches, dataset):
    from mohawk.training.batches import Batches

    cache = TeacherCache(caches / "top-k")
    rows = CachedRows(dataset, cache)
    rows[0]
    assert len(pickle.dumps(cache)) < 10_000  # no shard travels
    sampler = Batches(len(rows), rows=4, batch_size=4, steps=5, seed=0)
    loader = torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=1)
    seen = 0
    for batch, indices in zip(loader, sampler, strict=True):
        assert {name: (v.dtype, tuple(v.shape)) for name, v in batch.items() if "teacher" in name} == {
            "teacher_ids": (torch.int64, (4, LENGTH, 7)),
            "teacher_logprobs": (torch.float32, (4, LENGTH, 7)),
            "teacher_tail": (torch.float32, (4, LENGTH)),
        }
        source = cache.teacher(batch)
        assert isinstance(source, TeacherTopK)
        for row, index in enumerate(indices):
            assert torch.equal(batch["input_ids"][row], dataset[index]["input_ids"])
            assert torch.equal(source.ids[row], cache.row(index)["teacher_ids"])
            seen += 1
    assert seen == 20


def test_a_cache_may_end_before_the_dataset(tmp_path, teacher, dataset):
    cache = write_cache(tmp_path / "c", teacher, dataset, rows=5, k=2)
    rows = CachedRows(dataset, cache)
    assert len(rows) == 5
    with pytest.raises(IndexError):
        rows[5]


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_the_text_is_compared(caches, dataset, tmp_path):
    cache = TeacherCache(caches / "top-k")
    with pytest.raises(UserError) as error:
        CachedRows(PackedDataset(dataset.documents, LENGTH, seed=4), cache)
    one_line(error, "top-k", "data seed 3, here it is 4", "cache again")
    with pytest.raises(UserError) as error:
        CachedRows(PackedDataset(dataset.documents, 2 * LENGTH, seed=3), cache)
    one_line(error, "sequence length 16, here it is 32")
    with pytest.raises(UserError) as error:
        CachedRows(PackedDataset(dataset.documents, LENGTH, seed=3, tokens=160), cache)
    one_line(error, "14 rows", "here has 10")
    with pytest.raises(UserError) as error:
        CachedRows(PackedDataset(documents(tmp_path, seed=1), LENGTH, seed=3), cache)
    one_line(error, "another text", "row 0")

    class Changed(PackedDataset):
        """One token of one row that the constructor does not look at."""

        changed = False

        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.changed and index == 2:
                row["input_ids"][5] = (row["input_ids"][5] + 1) % VOCAB
            return row

    other = Changed(dataset.documents, LENGTH, seed=3)
    rows = CachedRows(other, cache)
    rows[2]
    other.changed = True
    rows[1]
    with pytest.raises(UserError, match="row 2 was cached from another text"):
        rows[2]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("top-k", {"temperature": 2.0}, ["temperature 1, here it is 2", "cache again"]),
        ("samples", {"temperature": 2.0}, ["temperature 1, here it is 2"]),
        ("samples", {"divergence": "jsd"}, ["samples", "jsd", "forward_kl"]),
        ("top-k", {"divergence": "mse"}, ["top-k", "mse", "hidden states"]),
        ("top-k", {"tokenizer_hash": "u"}, ["tokenizer t, here it is u"]),
        ("hidden", {"seed": 1}, ["seed 3, here it is 1"]),
        ("hidden", {"sequence_length": 17}, ["sequence length 16, here it is 17"]),
        ("hidden", {"teacher_hash": "x"}, ["teacher", "here it is x"]),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(caches, kind, given, words):
    cache = TeacherCache(caches / kind)
    with pytest.raises(UserError) as error:
        cache.check(**given)
    one_line(error, str(caches / kind), *words)


def test_what_fits_is_not_refused(caches, teacher):
    from mohawk.loading.model_hash import teacher_hash

    fits = {"sequence_length": 16, "seed": 3, "tokenizer_hash": "t", "temperature": 1.0}
    TeacherCache(caches / "top-k").check(**fits, divergence="jsd", teacher_hash=teacher_hash(teacher))
    TeacherCache(caches / "samples").check(**fits, divergence="forward_kl")
    TeacherCache(caches / "hidden").check(**fits | {"temperature": 7.0}, divergence="mse")
    with pytest.raises(UserError) as error:  # several mistakes are several lines
        TeacherCache(caches / "top-k").check(seed=0, temperature=3.0)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_when_its_shard_is_opened(cache, kind):
    found = cache(kind)
    path = found.folder / shard_name(1)
    raw = bytearray(path.read_bytes())
    raw[2 * found.layout.row.itemsize + 40] ^= 16
    path.write_bytes(raw)
    found = TeacherCache(found.folder)
    assert found.damage() == f"{path.name} is damaged"
    for index in range(14):
        if index // 4 != 1:
            found.row(index)
    for read in (lambda: found.row(6), lambda: found.row(7), lambda: found.at(4, 0)):
        with pytest.raises(UserError) as error:
            read()
        one_line(error, str(path), "row 2 is damaged (checksum ", "expected ", "mohawk cache")


def test_a_shard_of_another_temperature_is_refused_though_its_rows_are_whole(cache, tmp_path, teacher, dataset):
    found = cache()
    other = write_cache(tmp_path / "hot", teacher, dataset, k=7, temperature=2.0, rows_per_shard=4, batch_size=3)
    shutil.copy(other.folder / shard_name(1), found.folder / shard_name(1))
    found = TeacherCache(found.folder)
    found.row(3, dataset[3])
    for _ in range(2):  # nothing wrong is remembered as verified
        with pytest.raises(UserError) as error:
            found.row(5, dataset[5])
        one_line(error, str(found.folder / shard_name(1)), "not this cache's", "mohawk cache again")
    with pytest.raises(UserError, match="not this cache's"):
        CachedRows(dataset, found)


def test_a_shard_is_hashed_once(caches, dataset, monkeypatch):
    import mohawk.teacher_cache.reader as module

    seen = []
    verify = TeacherCache._verify
    monkeypatch.setattr(
        TeacherCache, "_verify", lambda self, shard, rows: (seen.append(shard), verify(self, shard, rows))
    )
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)  # so that each is closed and opened again
    found = TeacherCache(caches / "top-k")
    assert seen == []  # nothing is read before it is asked for
    for index in (0, 13, 1, 13, 5):
        found.row(index, dataset[index])
    pickle.loads(pickle.dumps(found)).row(0)
    assert seen == [0, 3, 1]


def test_a_damaged_head_is_found(cache):
    found = cache("hidden")
    raw = bytearray((found.folder / "head.bin").read_bytes())
    raw[77] ^= 1
    (found.folder / "head.bin").write_bytes(raw)
    with pytest.raises(UserError) as error:
        found.head()
    one_line(error, "head.bin", "damaged")


def test_missing_shortened_and_foreign_files_are_lines(cache, tmp_path):
    folder = cache().folder
    manifest = (folder / MANIFEST).read_text()
    shard = folder / shard_name(2)
    content = shard.read_bytes()

    def refused(*words):
        with pytest.raises(UserError) as error:
            TeacherCache(folder)
        one_line(error, *words)

    shard.write_bytes(content[:-1])
    refused("shard-00002.bin", f"{len(content) - 1} bytes, not {len(content)}", "mohawk cache")
    shard.unlink()
    refused("shard-00002.bin is missing")
    shard.write_bytes(content)
    (folder / MANIFEST).write_text(manifest[:-30])
    refused(MANIFEST, "damaged")
    (folder / MANIFEST).write_text(manifest.replace('"k": 7', '"k": 6'))
    refused(MANIFEST, "damaged")
    (folder / MANIFEST).write_text('{"files": {}}')
    refused(MANIFEST, "not of a teacher cache")
    (folder / MANIFEST).write_text(manifest.replace('"version": 1', '"version": 2'))
    refused("version 2", "update mohawk")
    (folder / MANIFEST).unlink()
    refused("no teacher cache")
    folder = tmp_path / "nowhere"
    refused("nowhere", "no teacher cache")


def test_the_manifest_says_what_a_reader_needs(caches, teacher, dataset):
    about = json.loads((caches / "top-k" / MANIFEST).read_text())
    assert (about["format"], about["version"], about["temperature"]) == ("mohawk teacher cache", 1, 1.0)
    assert about["layout"]["k"] == 7 and about["layout"]["vocab_size"] == VOCAB and about["id_bits"] == 9
    assert about["data"].keys() == {"rows", "sequence_length", "seed", "sha256"} and about["tokenizer"] == "t"
    assert re.fullmatch("[0-9a-f]{64}", about["data"]["sha256"]) and len(about["teacher"]["sha256"]) == 64
    shards = [name for name in about["files"] if name.startswith("shard-")]
    assert len(shards) == 4 and all(about["files"][name].keys() == {"bytes", "sha256"} for name in shards)
    cache = TeacherCache(caches / "top-k")
    assert cache.bytes_per_token == np.dtype([tuple(f) for f in about["record"]]).itemsize + 12 / LENGTH

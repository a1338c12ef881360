import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.data.packing import Documents, PackedDataset, collate, load_data, split_documents
from mohawk.data.text import TokenizedText, tokenize
from mohawk.errors import UserError


@pytest.fixture
def texts(tmp_path, tokenizer):
    """A function that tokenises documents given as strings, one file each."""

    def make(*documents: str) -> TokenizedText:
        folder = tmp_path / f"docs{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for i, document in enumerate(documents):
            (folder / f"{i:04}.txt").write_text(document)
        return tokenize(folder, tokenizer, cache=tmp_path / "cache")

    return make


def of_lengths(tmp_path, lengths, vocab=60000) -> Documents:
    """Documents of given token counts whose tokens are all different: 0, 1, 2, ..."""
    total = int(sum(lengths))
    np.arange(total, dtype="<u4").tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(tmp_path / "digests.npy", np.arange(len(lengths), dtype="<u8"))
    (tmp_path / "meta.json").write_text('{"source": "made", "dtype": "<u4"}')
    return split_documents([TokenizedText(tmp_path)])[0]


def check_row(row, documents: Documents, sequence_length: int) -> None:
    """Every promise that a packed row makes, checked token by token."""
    assert {v.dtype for v in row.values()} == {torch.int64}
    assert {tuple(v.shape) for v in row.values()} == {(sequence_length,)}
    ids, positions, segments, labels = (row[k].tolist() for k in ("input_ids", "position_ids", "segment_ids", "labels"))
    starts = set(documents.spans[:, 1].tolist())
    for i in range(sequence_length):
        first = i == 0 or segments[i] != segments[i - 1]
        assert positions[i] == (0 if first else positions[i - 1] + 1)
        assert labels[i] == (-100 if first or segments[i] == -1 else ids[i])
        if i and segments[i] != -1:
            assert segments[i] == segments[i - 1] + first
            # tokens are numbered, so a segment is one document's piece exactly when they count up
            assert first == (ids[i] in starts) and (first or ids[i] == ids[i - 1] + 1)
        elif i and segments[i - 1] == -1:
            assert segments[i] == -1  # padding only at the end


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    sequence_length=st.integers(2, 33),
    seed=st.integers(0, 5),
)
def test_every_token_is_in_exactly_one_row_of_each_epoch(tmp_path_factory, lengths, sequence_length, seed):
    documents = of_lengths(tmp_path_factory.mktemp("t"), lengths)
    dataset = PackedDataset(documents, sequence_length, tokens=2 * sum(lengths) + 2 * sequence_length, seed=seed)
    for epoch in range(2):
        seen = []
        for i in range(dataset.rows_per_epoch):
            row = dataset[epoch * dataset.rows_per_epoch + i]
            check_row(row, documents, sequence_length)
            seen += row["input_ids"][row["segment_ids"] >= 0].tolist()
        assert sorted(seen) == list(range(sum(lengths)))


def test_order_is_the_seeds_and_differs_between_epochs(tmp_path):
    documents = of_lengths(tmp_path, [7] * 50)

    def rows(seed, epochs=2):
        dataset = PackedDataset(documents, 16, tokens=350 * epochs, seed=seed)
        return [row["input_ids"].tolist() for row in dataset]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)
    first, second = rows(3)[:22], rows(3)[22:44]
    assert first != second
    assert PackedDataset(documents, 16, seed=3)[5]["input_ids"].tolist() == rows(3)[5]


def test_rows_end_where_the_budget_ends(tmp_path, caplog):
    documents = of_lengths(tmp_path, [10] * 10)
    assert len(PackedDataset(documents, 16)) == 7
    assert len(PackedDataset(documents, 16, tokens=33)) == 3
    with caplog.at_level("INFO", "mohawk.data.packing"):
        dataset = PackedDataset(documents, 16, tokens=2e3)
        list(dataset)
    assert len(dataset) == 125
    assert [r.message for r in caplog.records] == [
        "the text has 100 tokens and 2000 are asked for: it is read 17.9 times, reshuffled each time"
    ]
    with pytest.raises(IndexError):
        dataset[125]


def test_a_pickled_dataset_carries_no_tokens(tmp_path):
    documents = of_lengths(tmp_path, [1000] * 100)
    dataset = PackedDataset(documents, 64, seed=1)
    row = dataset[3]
    packed = pickle.dumps(dataset)
    assert len(packed) < 20_000  # the tokens alone are 400 kB
    assert all(torch.equal(pickle.loads(packed)[3][k], row[k]) for k in row)


def test_collate_stacks_rows(tmp_path):
    dataset = PackedDataset(of_lengths(tmp_path, [9, 30]), 8)
    batch = collate([dataset[0], dataset[2]])
    assert all(v.shape == (2, 8) for v in batch.values())
    assert torch.equal(batch["labels"][1], dataset[2]["labels"])


def test_packed_rows_attend_within_their_segments_only(tmp_path, texts, make_llama):
    """The rows' positions are what makes transformers' own attention block-diagonal."""
    text = texts("a first document, rather short", "another one", "and a third that is the longest of them")
    dataset = PackedDataset(split_documents([text])[0], 96)
    row = collate([dataset[0]])
    model = make_llama()
    with torch.no_grad():
        packed = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0]
        for segment in range(3):
            here = row["segment_ids"][0] == segment
            alone = model(row["input_ids"][:, here], use_cache=False).logits[0]
            torch.testing.assert_close(packed[here], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_a_row_needs_two_tokens(tmp_path, length):
    with pytest.raises(UserError, match="sequence_length: got"):
        PackedDataset(of_lengths(tmp_path, [9]), length)


def test_nothing_to_pack_is_an_error(tmp_path):
    _, held_out = split_documents(of_lengths(tmp_path, [9]).texts, 0)
    with pytest.raises(UserError, match="validation_share above 0"):
        PackedDataset(held_out, 8)


def read(documents: Documents, tokenizer) -> list[str]:
    return [tokenizer.decode(documents.texts[t].tokens[a:b].astype(int).tolist()) for t, a, b in documents.spans]


def test_held_out_documents_are_never_trained_on(texts, tokenizer):
    documents = [f"document {i} " + "word " * (i % 7 + 3) for i in range(200)]
    twice = [*documents, *documents[:60]]
    train, held_out = split_documents([texts(*twice), texts("one more", documents[7])], 0.1)
    kept, held = read(train, tokenizer), read(held_out, tokenizer)
    assert not set(kept) & set(held)
    assert sorted(kept + held) == sorted(d + "<eos>" for d in [*twice, "one more", documents[7]])
    share = held_out.tokens / (train.tokens + held_out.tokens)
    assert 0.05 <= share <= 0.125


def test_what_is_held_out_depends_on_the_text_alone(texts, tokenizer):
    documents = [f"document {i} " + "word " * 5 for i in range(100)]
    one = split_documents([texts(*documents)], 0.05)[1]
    other = split_documents([texts(*documents[::-1][:50]), texts(*documents[:50])], 0.05)[1]
    assert sorted(read(one, tokenizer)) == sorted(read(other, tokenizer))


def test_one_huge_document_gives_its_tail(texts, tokenizer):
    book = "".join(f"sentence {i}. " for i in range(400))
    train, held_out = split_documents([texts(book)], 0.1)
    assert read(train, tokenizer)[0] + read(held_out, tokenizer)[0] == book + "<eos>"
    assert held_out.tokens == int(0.1 * (train.tokens + held_out.tokens))


def test_copies_of_a_huge_document_lose_the_tail_that_is_held_out(texts, tokenizer):
    book = "".join(f"sentence {i}. " for i in range(400))
    train, held_out = split_documents([texts(book, "short", book)], 0.1)
    (tail,) = read(held_out, tokenizer)[-1:]
    assert len(tail) > 100 and (book + "<eos>").endswith(tail)
    assert not any(text.endswith(tail) for text in read(train, tokenizer))


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_share_out_of_range(texts, share):
    with pytest.raises(UserError, match="validation_share: got"):
        split_documents([texts("some text")], share)


def test_too_little_text_to_hold_out(texts):
    with pytest.raises(UserError, match="too little to hold out"):
        split_documents([texts("some text")], 0.01)


def test_load_data_keeps_the_other_source_apart(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("training text " * 50)
    (tmp_path / "other.txt").write_text("other text " * 50)
    data = load_data(
        [str(tmp_path / "train.txt")],
        tokenizer,
        evaluation=[str(tmp_path / "other.txt")],
        validation_share=0.2,
        cache=tmp_path / "cache",
    )
    assert "other" not in "".join(read(data.train, tokenizer) + read(data.held_out, tokenizer))
    assert read(data.evaluation, tokenizer) == ["other text " * 50 + "<eos>"]
    assert load_data([str(tmp_path / "train.txt")], tokenizer, validation_share=0).evaluation is None

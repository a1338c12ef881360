"""Key-value recall: the lists that are made, and what is counted on them."""

import pytest
import torch

from mohawk.errors import UserError
from mohawk.losses.heads import Head
from mohawk.measures.recall import PAIRS, recall_batches, recall_of


@pytest.fixture(scope="module")
def batches(tokenizer):
    return recall_batches(tokenizer, 2000, batch_size=2)


def test_every_value_asked_for_was_given_before(tokenizer, batches):
    assert sum((batch["segment_ids"] >= 0).sum().item() for batch in batches) >= 2000
    assert len(batches) > 1 and len({len(batch["input_ids"][0]) for batch in batches}) > 1  # rows of several lengths
    for batch in batches:
        for ids, segments, values, labels in zip(
            *(batch[name] for name in ("input_ids", "segment_ids", "values", "labels")), strict=True
        ):
            lines = tokenizer.decode(ids[segments >= 0]).splitlines()
            given, asked = lines[:PAIRS], lines[PAIRS:]
            assert sorted(given) == sorted(asked) and len(set(given)) == PAIRS
            for i, line in enumerate(asked):
                assert tokenizer.decode(ids[values == i]) == line.split(": ")[1]
            assert torch.equal(labels[values >= 0], ids[values >= 0]) and (labels[values < 0] == -100).all()
            assert (segments[values >= 0] == 0).all()


def test_the_same_seed_makes_the_same_lists(tokenizer, batches):
    again, other = recall_batches(tokenizer, 2000, batch_size=2), recall_batches(tokenizer, 2000, batch_size=2, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])


def test_what_is_counted(tokenizer, batches):
    """Hidden states that name the next token recall everything; one wrong token loses its value."""
    vocabulary = len(tokenizer)
    head = Head(torch.eye(vocabulary) * 20, None, 1.0, None)

    def knowing(batch):
        following = torch.roll(batch["input_ids"], -1, 1)
        return torch.nn.functional.one_hot(following, vocabulary).float()

    hidden = [knowing(batch) for batch in batches]
    found = recall_of(hidden, batches, head)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert found.values == rows * PAIRS
    assert found.accuracy == 1 and found.loss == pytest.approx(0, abs=1e-5)

    position = (batches[1]["values"][0] == 3).nonzero()[0, 0]
    hidden[1][0, position - 1] = 0
    spoilt = recall_of(hidden, batches, head)
    assert spoilt.accuracy == pytest.approx(1 - 1 / (rows * PAIRS))
    asked = sum((batch["values"] >= 0).sum().item() for batch in batches)
    assert spoilt.loss == pytest.approx(torch.tensor(vocabulary).log().item() / asked, rel=1e-3)

    hidden[0][0, 0] = 0  # a token of the list itself is nothing to recall
    assert recall_of(hidden, batches, head) == spoilt


def test_a_tokenizer_without_offsets():
    with pytest.raises(UserError, match="recall: this tokenizer gives no offsets"):
        recall_batches(object(), 100)

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.data.mixture import Mixture, chairman_order
from mohawk.data.packing import collate
from mohawk.errors import UserError


class Rows:
    """Rows of 4 tokens: which part they are of, and which row of it."""

    def __init__(self, part: int, count: int, weights: float | None = None, length: int = 4, **extra):
        self.part, self.count, self.weights, self.length, self.extra = part, count, weights, length, extra

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        row = {"input_ids": torch.full((self.length,), self.part), "labels": torch.full((self.length,), index)}
        if self.weights is not None:
            row["weights"] = torch.full((self.length,), self.weights)
        return {**row, **self.extra}


def parts_and_rows(mixture):
    rows = [mixture[i] for i in range(len(mixture))]
    assert all(row["source"] == row["input_ids"][0] for row in rows)
    return [(int(row["source"]), int(row["labels"][0])) for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=7),
    seed=st.integers(0, 5),
)
def test_every_prefix_has_its_share_to_less_than_a_row(weights, seed):
    weights = np.array(weights) / np.sum(weights)
    order = chairman_order(weights, 300, seed)
    counts = np.cumsum(np.eye(len(weights))[order], axis=0)
    owed = np.arange(1, 301)[:, None] * weights
    assert np.abs(counts - owed).max() <= (1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0) + 1e-6


def test_parts_are_read_in_order_and_again():
    mixture = Mixture([Rows(0, 3), Rows(1, 100)], [1, 3], rows=40, seed=1)
    seen = parts_and_rows(mixture)
    assert len(mixture) == len(seen) == 40
    assert [row for part, row in seen if part == 0] == [0, 1, 2] * 3 + [0]
    assert [row for part, row in seen if part == 1] == list(range(30))
    assert mixture[-1]["labels"].tolist() == mixture[39]["labels"].tolist()
    with pytest.raises(IndexError):
        mixture[40]
    assert len(Mixture([Rows(0, 3), Rows(1, 100)], [1, 3])) == 103


def test_beta_of_generated_data_and_ground_truth():
    for beta, expected in ((0.0, 0), (0.25, 25), (1.0, 100)):
        mixture = Mixture([Rows(0, 10), Rows(1, 10)], [beta, 1 - beta], rows=100)
        assert sum(part == 0 for part, _ in parts_and_rows(mixture)) == expected


def test_seed_decides_who_is_first():
    def orders(seed):
        return parts_and_rows(Mixture([Rows(k, 9) for k in range(4)], [1, 1, 1, 1], rows=12, seed=seed))

    assert orders(3) == orders(3)
    assert len({tuple(orders(seed)) for seed in range(6)}) > 1


def test_weights_are_scaled_and_rows_stack():
    mixture = Mixture([Rows(0, 4, weights=0.5), Rows(1, 4)], [1, 1], loss_weights=[3.0, 0.25], rows=4)
    batch = collate([mixture[i] for i in range(4)])
    assert batch["weights"].dtype == torch.float32 and batch["source"].dtype == torch.int64
    assert batch["source"].shape == (4,) and batch["weights"].shape == (4, 4)
    expected = torch.where(batch["source"] == 0, 1.5, 0.25)
    assert torch.equal(batch["weights"], expected[:, None].expand(4, 4))
    assert torch.equal(pickle.loads(pickle.dumps(mixture))[1]["weights"], mixture[1]["weights"])
    assert "source" not in mixture.datasets[0][0]


def test_a_part_of_no_weight_is_never_read():
    class Never(Rows):
        def __getitem__(self, index):
            raise AssertionError("read")

    assert {part for part, _ in parts_and_rows(Mixture([Rows(0, 4), Never(1, 0), Rows(2, 4)], [2, 0, 1]))} == {0, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([Rows(0, 1)], [1, 1]), "sampling_weights: got 2 for 1 data sources; give one for each"),
        (([Rows(0, 1)], [1], [1, 2]), "loss_weights: got 2 for 1 data sources; give one for each"),
        (([Rows(0, 1), Rows(1, 1)], [1, -1]), "sampling_weights: got -1; allowed: numbers of at least 0"),
        (([Rows(0, 1)], [1], [float("nan")]), "loss_weights: got nan; allowed: numbers of at least 0"),
        (([Rows(0, 1)], [0]), "sampling_weights: all are 0; give one data source more than that"),
        (([Rows(0, 1), Rows(1, 0)], [1, 1]), "data source 1 is empty; leave it out, or give it rows"),
        (([Rows(0, 1)], [1], None, 0), "rows: got 0; allowed: at least 1"),
        (
            ([Rows(0, 1), Rows(1, 1, length=5)], [1, 1]),
            "data source 1: column 'input_ids': shape (5,), but data source 0 has shape (4,)",
        ),
        (
            ([Rows(0, 1), Rows(1, 1, teacher=torch.tensor(1))], [1, 1]),
            "data source 1: column 'teacher': shape (), but data source 0 has none",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        Mixture(*arguments)
    assert str(error.value) == message

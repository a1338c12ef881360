"""Masked words: BERT's shares, nothing special, the same draw whenever a step is taken."""

import numpy as np
import pytest
import torch

from mohawk.data.masking import Masking
from mohawk.errors import UserError

WORDS, SPECIAL = np.arange(5, 1000), frozenset(range(5))


def masking(**options):
    return Masking(4, WORDS, SPECIAL, **options)


def batch(rows=400, length=100):
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    return {"input_ids": ids, "attention_mask": mask, "row": torch.arange(rows) + 7}


def test_shares_of_the_paper():
    given = batch()
    made = masking()(given, 3)
    ids, changed, labels = given["input_ids"], made["input_ids"], made["labels"]
    told = labels != -100
    assert "row" not in made
    assert torch.equal(changed[~told], ids[~told])
    assert torch.equal(labels[told], ids[told])
    assert not told[:, [0, -1]].any()
    assert not told[0, 50:].any()
    words = 400 * 98 - 49
    assert abs(told.sum() / words - 0.15) < 0.01
    masked = (changed == 4)[told].double().mean()
    kept = (changed == ids)[told].double().mean()
    assert abs(masked - 0.8) < 0.02
    assert abs(kept - 0.1) < 0.02
    assert changed.min() >= 2


def test_a_draw_is_of_seed_step_and_row_alone():
    given = batch(6)
    whole = masking(seed=1)(given, 5)
    again = masking(seed=1)({name: x[4:] for name, x in given.items()}, 5)
    assert torch.equal(whole["input_ids"][4:], again["input_ids"])
    assert torch.equal(whole["labels"][4:], again["labels"])
    for other in (masking(seed=2)(given, 5), masking(seed=1)(given, 6)):
        assert not torch.equal(whole["labels"], other["labels"])
    fixed = masking(dynamic=False)
    assert torch.equal(fixed(given, 0)["labels"], fixed(given, 9)["labels"])


def test_all_or_other_words():
    made = masking(share=1.0, masked=0.0, random=1.0)(given := batch(3), 0)
    told = made["labels"] != -100
    assert torch.equal(told, (given["attention_mask"] == 1) & (given["input_ids"] > 4))
    assert (made["input_ids"][told] > 4).all()
    assert (made["input_ids"] != given["input_ids"])[told].double().mean() > 0.9


def test_what_is_refused():
    for options in ({"share": 0.0}, {"share": 1.5}, {"masked": 0.8, "random": 0.3}, {"random": -0.1}):
        with pytest.raises(ValueError, match="masking: "):
            masking(**options)

    class Tokenizer:
        mask_token_id = None

    with pytest.raises(UserError, match="has no mask token"):
        Masking.of(Tokenizer())

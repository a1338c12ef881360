"""Which positions predict which tokens, by the words of the definition."""

import torch

from mohawk.data.next_tokens import IGNORED, next_labels, positions

MASKS = {
    "left": [0, 0, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 0, 0],
    "middle": [1, 1, 0, 1, 1, 1],
    "both": [0, 1, 1, 1, 0, 0],
    "none": [1, 1, 1, 1, 1, 1],
    "lone": [0, 0, 1, 0, 0, 0],
    "all": [0, 0, 0, 0, 0, 0],
}


def test_a_position_predicts_where_it_and_the_next_are_real():
    mask = torch.tensor(list(MASKS.values()))
    ids = torch.arange(10, 16).expand_as(mask)
    labels = ids.clone()
    labels[:, 3] = IGNORED
    found = next_labels({"input_ids": ids, "labels": labels, "attention_mask": mask})
    for row, kept in enumerate(mask.tolist()):
        for t in range(6):
            predicts = t < 5 and kept[t] and kept[t + 1] and labels[row, t + 1] != IGNORED
            assert found[row, t] == (ids[row, t + 1] if predicts else IGNORED), (row, t)
    assert positions(mask)[0].tolist() == [0, 0, 0, 1, 2, 3]
    assert positions(mask)[2].tolist() == [0, 1, 1, 2, 3, 4]


def test_no_document_predicts_the_next_one():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    labels = torch.arange(10, 17)[None]  # some datasets label a document's first token too
    found = next_labels({"labels": labels, "segment_ids": segments})
    assert found.tolist() == [[11, 12, IGNORED, 14, IGNORED, IGNORED, IGNORED]]


def test_a_mask_of_four_dimensions_is_its_makers_business():
    labels = torch.tensor([[1, 2, IGNORED]])
    assert next_labels({"labels": labels, "attention_mask": torch.zeros(1, 1, 3, 3)}).tolist() == [
        [2, IGNORED, IGNORED]
    ]

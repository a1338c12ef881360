"""F1 and the area under the ROC curve against values worked out by hand, by scikit-learn's definitions."""

import pytest
import torch

from mohawk.measures.classes import f1, roc_auc


def test_f1_of_two_classes_is_that_of_class_1():
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    predicted = torch.tensor([1, 0, 1, 1, 0, 0])  # 2 hits, 1 missed, 1 wrong
    assert f1(predicted, labels, 2) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1(torch.zeros(6).long(), labels, 2) == 0
    assert f1(torch.zeros(6).long(), torch.zeros(6).long(), 2) == 0


def test_f1_of_more_is_the_mean_over_the_classes_that_there_are():
    labels, predicted = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])
    # class 0: 1; class 1: 0; class 2: 2 * 1 / (2 * 1 + 1 + 1) = 1/2; class 3 is nowhere
    assert f1(predicted, labels, 4) == pytest.approx((1 + 0 + 0.5) / 3)


def test_area_of_two_classes():
    labels = torch.tensor([0, 0, 1, 1])
    p = torch.tensor([0.1, 0.4, 0.35, 0.8])
    assert roc_auc(torch.stack([1 - p, p], 1), labels) == pytest.approx(0.75)  # scikit-learn's own example
    tied = torch.tensor([0.5, 0.5, 0.5, 0.9])
    # of four pairs: (0.5, 0.5) twice a half, (0.9, 0.5) twice 1
    assert roc_auc(torch.stack([1 - tied, tied], 1), labels) == pytest.approx(0.75)


def test_area_of_three_classes_each_against_the_rest():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]])
    labels = torch.tensor([0, 1, 2, 0])
    # class 0: 0.6 and 0.3 against 0.2, 0.5: 1, 1, 1, 0; class 1: 0.5 against 0.3, 0.1, 0.3: all;
    # class 2: 0.4 against 0.1, 0.3, 0.4: 1, 1, a half
    assert roc_auc(p, labels) == pytest.approx((3 / 4 + 1 + 2.5 / 3) / 3)


def test_without_rows_of_a_class_there_is_none():
    assert roc_auc(torch.full((3, 2), 0.5), torch.ones(3).long()) is None

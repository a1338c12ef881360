"""How well classes are told: F1 and the area under the ROC curve, by scikit-learn's definitions."""

from __future__ import annotations

import torch
from torch import Tensor


def f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """F1 = 2 TP / (2 TP + FP + FN): of two classes that of class 1, of more the mean over classes (macro).

    predicted, labels: (rows,) int64. A class that is neither there nor predicted counts 0, as in
    `sklearn.metrics.f1_score(zero_division=0)`; of more than two classes, classes that are neither are left out.
    """
    scores = []
    for c in [1] if classes == 2 else range(classes):
        hits = int(((predicted == c) & (labels == c)).sum())
        wrong = int((predicted == c).sum() + (labels == c).sum()) - 2 * hits
        if classes == 2 or hits + wrong:
            scores.append(2 * hits / (2 * hits + wrong) if hits + wrong else 0.0)
    return sum(scores) / len(scores) if scores else 0.0


def roc_auc(probabilities: Tensor, labels: Tensor) -> float | None:
    """Area under the ROC curve: how often a row of a class has a higher probability of it than one of another, ties
    counting half (Mann and Whitney's U). Of two classes that of class 1, of more the mean over classes, each against
    the rest (`sklearn.metrics.roc_auc_score(multi_class="ovr", average="macro")`).

    probabilities: (rows, classes). labels: (rows,) int64. None where a class, or all others, have no row.
    """
    classes = probabilities.shape[1]
    areas = []
    for c in [1] if classes == 2 else range(classes):
        own = labels == c
        positive, negative = int(own.sum()), int((~own).sum())
        if not positive or not negative:
            return None
        _, group, sizes = torch.unique(probabilities[:, c], return_inverse=True, return_counts=True)
        ranks = (sizes.cumsum(0) - (sizes - 1) / 2)[group].double()  # ties share their mean rank
        areas.append((float(ranks[own].sum()) - positive * (positive + 1) / 2) / (positive * negative))
    return sum(areas) / len(areas)

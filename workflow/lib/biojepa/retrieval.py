"""Nearest-neighbour retrieval: whether cells of one perturbation find each other in an embedding.

Average precision of ranking the other cells of a perturbation before cells that do not carry it, by cosine,
as in Kalinin et al. (Nature Communications 2025), whose words these are: *activity* where the others are
control cells, *distinctiveness* where they are cells of other perturbations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ACTIVITY, DISTINCTIVENESS = "activity", "distinctiveness"
# Cosines that differ by less are ties: what remains is the order in which products were summed.
DECIMALS = 9


class Retrieval(NamedTuple):
    """Mean average precision of one perturbation, and that of a random order.

    Attributes
    ----------
    label
        The perturbation.
    kind
        :data:`ACTIVITY` or :data:`DISTINCTIVENESS`.
    value, chance
        Over its cells.
    """

    label: int
    kind: str
    value: float
    chance: float


def average_precisions(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Average precision of each query, (queries,).

    The mean over the positives of the precision among all that score at least as high; ties count for
    and against, as in scikit-learn's ``average_precision_score``.

    Parameters
    ----------
    positive, negative
        (queries, k) and (queries, m) similarity of what should and should not be found.
    """
    found = np.empty(len(positive))
    for query, (wanted, others) in enumerate(
        zip(np.sort(positive, axis=1), np.sort(negative, axis=1), strict=True)
    ):
        right = len(wanted) - np.searchsorted(wanted, wanted)
        wrong = len(others) - np.searchsorted(others, wanted)
        found[query] = (right / (right + wrong)).mean()
    return found


def expected_average_precision(positives: int, negatives: int) -> float:
    """Mean average precision of a random order without ties (Bestgen, 2015); NaN without positives."""
    total = positives + negatives
    if positives == 0:
        return float("nan")
    if negatives == 0:
        return 1.0
    harmonic = (1 / np.arange(1, total + 1)).sum()
    return float((harmonic + (positives - 1) / (total - 1) * (total - harmonic)) / total)


def retrieve(z: np.ndarray, labels: np.ndarray) -> Iterator[Retrieval]:
    """Yield the mean average precision (kNN-mAP) of every perturbation with at least two cells.

    Parameters
    ----------
    z
        (cells, dimensions), centred. A cell at the centre has cosine 0 with every other.
    labels
        (cells,) perturbation 0, 1, … of each cell, -1 for control.

    Yields
    ------
    First :data:`ACTIVITY`, then :data:`DISTINCTIVENESS`, each where there is something to tell it from.
    """
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    unit = np.divide(z, norm, out=np.zeros_like(z, dtype=np.float64), where=norm > 0)
    for label in np.unique(labels[labels >= 0]):
        own = np.flatnonzero(labels == label)
        if len(own) < 2:
            continue
        cosine = np.round(unit[own] @ unit.T, DECIMALS)
        # Every cell of the perturbation asks for the others, and not for itself.
        positive = cosine[:, own][~np.eye(len(own), dtype=bool)].reshape(len(own), -1)
        for kind, others in (
            (ACTIVITY, labels < 0),
            (DISTINCTIVENESS, (labels >= 0) & (labels != label)),
        ):
            if others.any():
                value = average_precisions(positive, cosine[:, others]).mean()
                chance = expected_average_precision(len(own) - 1, int(others.sum()))
                yield Retrieval(int(label), kind, float(value), chance)

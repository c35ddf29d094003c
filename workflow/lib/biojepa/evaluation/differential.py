"""Metrics over the genes that differ from control: Welch t of half B, Benjamini–Hochberg.

A prediction is a mean without cells, so it is ranked by the size of its change. Even a perfect one may
stay below 1 in ``pr_auc`` and ``overlap_at_n``: a large change of a noisy gene need not be significant.
The duplicate shows what is reachable.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from biojepa.evaluation.registry import pearson_rows, register
from biojepa.evaluation.truth import FoldTruth

MIN_SIGNIFICANT = 3


@register(
    "direction_match",
    "secondary",
    "max",
    "Share of the differentially expressed genes whose direction of change is right",
    "mean over significant g of sign(x̂ − c) = sign(x − c)",
)
def direction_match(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Count right signs among significant genes; NaN where no gene is significant."""
    right = np.sign(predicted - truth.control_mean) == np.sign(truth.delta_control)
    count = truth.significant.sum(axis=1)
    hits = (right & truth.significant).sum(axis=1)
    return np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)


@register(
    "spearman_lfc",
    "secondary",
    "max",
    "Rank correlation of log fold changes over the differentially expressed genes",
    "Spearman over significant g of x̂ − c and x − c",
)
def spearman_lfc(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Correlate ranks of log fold changes; NaN below three significant genes, 0 for no change."""
    change = predicted - truth.control_mean
    score = np.full(len(change), np.nan)
    for row, chosen in enumerate(truth.significant):
        if chosen.sum() < MIN_SIGNIFICANT:
            continue
        if np.ptp(change[row, chosen]) < truth.zero_norm:
            score[row] = 0.0
            continue
        first, second = (stats.rankdata(values[row, chosen]) for values in (change, truth.delta_control))
        score[row] = pearson_rows(first[None], second[None], truth.zero_norm)[0]
    return score


@register(
    "pr_auc",
    "secondary",
    "max",
    "Does a large predicted change point to the differentially expressed genes?",
    "average precision of |x̂ − c| for significant g; chance is the share of significant genes",
)
def pr_auc(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return average precision per perturbation; NaN where no or every gene is significant."""
    return average_precision_rows(_strength(predicted, truth), truth.significant)


def average_precision_rows(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the average precision of each row, tied scores entering together as in scikit-learn.

    NaN where no or every value is positive. Sums over the positives the precision among all scores that
    are at least as high: two searches in sorted scores, where sorting alone takes the time.
    """
    count, n = positives.sum(axis=1), scores.shape[1]
    result = np.full(len(scores), np.nan)
    ordered = np.sort(scores, axis=1)
    for row in np.flatnonzero((count > 0) & (count < n)):
        found = np.sort(scores[row, positives[row]])
        called = n - np.searchsorted(ordered[row], found, side="left")
        right = len(found) - np.searchsorted(found, found, side="left")
        result[row] = (right / called).mean()
    return result


@register(
    "overlap_at_n",
    "secondary",
    "max",
    "Share of the N differentially expressed genes among the N largest predicted changes",
    "|significant ∩ top N of |x̂ − c|| / N, N = number of significant g, ties at rank N counted in part",
)
def overlap_at_n(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return the expected overlap when ties at rank N are broken at random; NaN without such genes."""
    scores, positives = _strength(predicted, truth), truth.significant
    count = positives.sum(axis=1)
    ordered = np.sort(scores, axis=1)
    threshold = ordered[np.arange(len(scores)), -np.maximum(count, 1)][:, None]
    above, tied = scores > threshold, scores == threshold
    places = (count - above.sum(axis=1)) / tied.sum(axis=1)
    hits = (above & positives).sum(axis=1) + places * (tied & positives).sum(axis=1)
    return np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)


def _strength(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return the predicted absolute change against control, what float32 cannot tell from 0 as 0."""
    strength = np.abs(predicted - truth.control_mean)
    resolution = 2.0 * np.finfo(np.float32).eps * np.maximum(np.abs(truth.control_mean), 1e-6)
    return np.where(strength <= resolution, 0.0, strength)

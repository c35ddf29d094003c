"""Detection of genetic interactions: genes of a combination that its singles do not add up to.

Follows Ahlmann-Eltze et al. (2025), on the same 1,000 genes most expressed in control: a model calls an
interaction where its prediction differs from the additive one by more than a threshold, over all
combinations and genes at once. There, an interaction is true beyond the quantiles of an empirical null;
here, by its own standard error, so that a noisy gene does not count as one.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from biojepa.evaluation.legacy import EXPRESSED_GENES
from biojepa.evaluation.registry import register
from biojepa.evaluation.truth import FoldTruth

MAX_FALSE = 0.1
# The additive prediction is stored as float32, from sums in another order.
SAME_PREDICTION = 1e-4
MAX_THRESHOLDS = 2000
DRAWS_AT_ONCE = 256


@register(
    "interaction_tpr",
    "combination",
    "max",
    "Share of the genetic interactions found when at most one call in ten may be false",
    "largest TP / (TP + FN) over thresholds t with FP / (FP + TP) ≤ 0.1; called: |x̂ − a| > t, a = max(0, "
    "c + Σ(x_single − c)); true: x − a significant by z, called with its sign; 1,000 g of largest c",
    unit="model",
)
def interaction_tpr(predicted: np.ndarray, truth: FoldTruth, weights: np.ndarray) -> np.ndarray:
    """Return the share of true interactions found at 10 % false calls, NaN where nothing interacts.

    Pairs of combination and gene are pooled, combinations counted as often as the weighting says. What
    does not differ from the additive model is never called, so the additive model scores 0. Even a perfect
    prediction may stay below 1: a large difference of a noisy gene need not be significant.

    At most 2,000 thresholds are tried, those of true calls evenly spaced in rank.
    """
    result = np.full(len(weights), np.nan)
    rows, observed = true_interactions(truth)
    if not len(rows):
        return result
    columns = expressed_genes(truth)
    guess = _difference(predicted, truth, rows, columns)
    strength = np.abs(guess)
    called = strength > SAME_PREDICTION
    hits = called & (np.sign(guess) == observed)
    total = weights[:, rows] @ (observed != 0).sum(axis=1)
    result[total > 0] = 0.0
    thresholds = np.unique(strength[hits])
    if not len(thresholds):
        return result
    if len(thresholds) > MAX_THRESHOLDS:
        chosen = np.linspace(0, len(thresholds) - 1, MAX_THRESHOLDS).round().astype(int)
        thresholds = thresholds[chosen]
    # Calls and hits of each combination at each threshold, (combinations, thresholds).
    n_called = np.stack([_at_least(row, thresholds) for row in strength])
    n_hits = np.stack([_at_least(row[hit], thresholds) for row, hit in zip(strength, hits, strict=True)])
    for start in range(0, len(weights), DRAWS_AT_ONCE):
        block = slice(start, start + DRAWS_AT_ONCE)
        found, calls = weights[block][:, rows] @ n_hits, weights[block][:, rows] @ n_called
        # Calls are whole numbers: a share of exactly 0.1 must not depend on rounding.
        allowed = calls - found <= MAX_FALSE * calls + 1e-9
        best = np.where(allowed, found, 0.0).max(axis=1)
        np.divide(best, total[block], out=result[block], where=total[block] > 0)
    return result


def true_interactions(truth: FoldTruth) -> tuple[np.ndarray, np.ndarray]:
    """Return the combinations whose singles were all trained, and where they are not additive.

    x − a, x the mean of half B, has the variance of half B's mean plus that of the additive mean; z is
    compared with the normal distribution, Benjamini–Hochberg over the genes of a combination.

    Returns
    -------
    tuple
        Rows of the truth, (combinations,), and the sign of the interaction where it is significant, else
        0, (combinations, genes); genes are those of :func:`expressed_genes`.
    """
    if truth.additive_var is None:
        return np.array([], dtype=int), np.empty((0, 0))
    rows, columns = np.flatnonzero(np.isfinite(truth.additive[:, 0])), expressed_genes(truth)
    difference = _difference(truth.half_b, truth, rows, columns)
    variance = truth.floored(truth.var_b)[np.ix_(rows, columns)] / truth.n_b[rows, None]
    error = np.sqrt(variance + truth.additive_var[np.ix_(rows, columns)])
    z = np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)
    significant = stats.false_discovery_control(2.0 * stats.norm.sf(np.abs(z)), axis=1) < truth.fdr
    return rows, np.where(significant, np.sign(difference), 0.0)


def expressed_genes(truth: FoldTruth) -> np.ndarray:
    """Return the columns of the 1,000 genes most expressed in control, all where there are fewer."""
    return np.argsort(-truth.control_mean, kind="stable")[:EXPRESSED_GENES]


def _difference(values: np.ndarray, truth: FoldTruth, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return values minus the additive mean, (rows, columns); a mean of log1p values is never below 0."""
    place = np.ix_(rows, columns)
    return values[place] - np.maximum(truth.additive[place], 0.0)


def _at_least(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Count the values that reach each threshold."""
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="left").astype(float)

"""Metrics of the change against the training perturbed mean, and of the spread between perturbations."""

from __future__ import annotations

import numpy as np

from biojepa.evaluation.registry import cosine_rows, pearson_rows, register, row_norms
from biojepa.evaluation.truth import FoldTruth

DRAWS_AT_ONCE = 256


@register(
    "pearson_delta_perturbed_mean",
    "headline",
    "max",
    "Correlation of predicted and observed change against the mean of the training perturbations",
    "Pearson over g of x̂ − m and x − m",
)
def pearson_delta_perturbed_mean(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Correlate changes against the training perturbed mean; the mean baseline scores 0."""
    return pearson_rows(predicted - truth.perturbed_mean, truth.delta, truth.zero_norm)


@register(
    "weighted_r2_delta",
    "headline",
    "max",
    "Share of the change explained, genes weighted by how surely half A shows them changed",
    "1 − Σ w(Δ̂ − Δ)² / Σ wΔ², w = squared Welch t of half A against control, Σ w = 1",
)
def weighted_r2_delta(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Score explained change; the mean baseline scores 0 and worse guesses go below."""
    error = predicted - truth.half_b
    residual = np.einsum("pg,pg,pg->p", truth.weights, error, error)
    total = np.einsum("pg,pg,pg->p", truth.weights, truth.delta, truth.delta)
    ratio = np.divide(residual, total, out=np.full(len(total), np.nan), where=total > 0)
    return 1.0 - ratio


@register(
    "rank_l2",
    "headline",
    "max",
    "Discrimination: is the prediction nearer to its own truth than to those of other perturbations?",
    "share of the other n − 1 test truths of the fold farther in L2, ties ½, target genes left out",
)
def rank_l2(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Rank a prediction's own truth among the fold's truths by Euclidean distance; chance is 0.5."""
    # Distances do not depend on the origin; centring keeps the products below from cancelling.
    guess, observed = predicted - truth.perturbed_mean, truth.delta
    scale = np.einsum("pg,pg->p", guess, guess)[:, None] + np.diagonal(truth.delta_gram)[None]
    squares = scale - 2.0 * guess @ observed.T
    for row, columns in enumerate(truth.target_columns):
        squares[row] -= ((guess[row, columns] - observed[:, columns]) ** 2).sum(axis=1)
    return share_farther(squares, tolerance=1e-10 * scale.max(axis=1))


@register(
    "rank_cosine",
    "headline",
    "max",
    "Discrimination by direction of change alone",
    "share of the other n − 1 test truths of the fold farther in 1 − cos(Δ̂, Δ), ties ½, targets left out",
)
def rank_cosine(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Rank a prediction's own truth among the fold's truths by cosine of the changes; chance is 0.5."""
    guess, observed = predicted - truth.perturbed_mean, truth.delta
    product = guess @ observed.T
    guess_square = np.einsum("pg,pg->p", guess, guess)
    observed_square = np.tile(np.diagonal(truth.delta_gram), (len(guess), 1))
    for row, columns in enumerate(truth.target_columns):
        product[row] -= observed[:, columns] @ guess[row, columns]
        guess_square[row] -= (guess[row, columns] ** 2).sum()
        observed_square[row] -= (observed[:, columns] ** 2).sum(axis=1)
    norms = np.sqrt(np.maximum(guess_square, 0.0))[:, None], np.sqrt(np.maximum(observed_square, 0.0))
    defined = (norms[0] >= truth.zero_norm) & (norms[1] >= truth.zero_norm)
    cosine = np.divide(product, norms[0] * norms[1], out=np.zeros_like(product), where=defined)
    return share_farther(1.0 - cosine, tolerance=np.full(len(guess), 1e-10))


def share_farther(distances: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Return per row the share of the other columns that are farther than the diagonal, ties ½.

    Parameters
    ----------
    distances
        (n, n): row = prediction, column = truth; the diagonal is a prediction's own truth.
    tolerance
        (n,): differences up to this are ties (rounding).

    Returns
    -------
    numpy.ndarray
        (n,), NaN when there is no other truth to compare with.
    """
    n = len(distances)
    if n < 2:
        return np.full(n, np.nan)
    difference = distances - np.diagonal(distances)[:, None]
    farther = (difference > tolerance[:, None]).sum(axis=1)
    # The own truth is always tied with itself.
    tied = (np.abs(difference) <= tolerance[:, None]).sum(axis=1) - 1
    return (farther + 0.5 * tied) / (n - 1)


@register(
    "effect_slope",
    "headline",
    1.0,
    "Do predicted effect sizes grow as the observed ones do?",
    "slope of the least-squares line, with intercept, of ‖Δ̂‖ on ‖Δ‖ over p",
    unit="model",
)
def effect_slope(predicted: np.ndarray, truth: FoldTruth, weights: np.ndarray) -> np.ndarray:
    """Regress predicted on observed effect size; below 1 is shrunken. The mean baseline scores 0.

    Observed norms carry sampling noise, so a perfect model stays below 1: read it against the duplicate.
    """
    guess = np.linalg.norm(predicted - truth.perturbed_mean, axis=1)
    guess[guess < truth.zero_norm] = 0.0
    observed = np.linalg.norm(truth.delta, axis=1)
    share = _shares(weights)
    guess_mean, observed_mean = share @ guess, share @ observed
    covariance = share @ (guess * observed) - guess_mean * observed_mean
    variance = share @ observed**2 - observed_mean**2
    enough = variance > 1e-12 * (share @ observed**2)
    return np.divide(covariance, variance, out=np.full(len(share), np.nan), where=enough)


@register(
    "effect_cosine",
    "headline",
    "max",
    "Direction of the change, without centring over genes",
    "cos(x̂ − m, x − m)",
)
def effect_cosine(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return the cosine of predicted and observed change against the training perturbed mean."""
    return cosine_rows(predicted - truth.perturbed_mean, truth.delta, truth.zero_norm)


@register(
    "spread_ratio",
    "secondary",
    1.0,
    "Collapse: spread of the predictions between perturbations over that of the truth",
    "√ Σ_g Var_p(x̂) / √ Σ_g Var_p(x)",
    unit="model",
)
def spread_ratio(predicted: np.ndarray, truth: FoldTruth, weights: np.ndarray) -> np.ndarray:
    """Compare the spread between perturbations; near 0 the model predicts the same for all of them.

    The spread of the truth includes sampling noise: read it against the duplicate.
    """
    share, change = _shares(weights), predicted - truth.perturbed_mean
    spreads = [_spread(gram, share) for gram in (change @ change.T, truth.delta_gram)]
    defined = spreads[1] > truth.zero_norm
    return np.divide(spreads[0], spreads[1], out=np.full(len(share), np.nan), where=defined)


def _spread(gram: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the root of the summed variances over genes under each weighting, (draws,).

    ``gram`` holds the inner products of the changes, (perturbations, perturbations).
    """
    variance = share @ np.diagonal(gram)
    for start in range(0, len(share), DRAWS_AT_ONCE):
        # Neighbouring weightings are of one group of perturbations, often a small one.
        rows = share[start : start + DRAWS_AT_ONCE]
        used = np.flatnonzero((rows != 0).any(axis=0))
        inside = rows[:, used]
        square = np.einsum("dp,dp->d", inside @ gram[np.ix_(used, used)], inside)
        variance[start : start + DRAWS_AT_ONCE] -= square
    return np.sqrt(np.maximum(variance, 0.0))


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return weights (draws, perturbations) with rows summing to 1; NaN where a row is empty."""
    weights = np.asarray(weights, dtype=float)
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)


@register(
    "additive_l2_difference",
    "combination",
    "min",
    "Is the prediction nearer to a combination than the sum of its singles? Below 0 is better",
    "‖x̂ − x‖ − ‖max(c + Σ(x_single − c), 0) − x‖, combinations whose singles were all trained",
)
def additive_l2_difference(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Compare the L2 error with the additive model's, paired; NaN where no additive model exists.

    The sum is cut at 0 as all predictions are: a mean of log1p values cannot be negative.
    """
    additive = np.maximum(truth.additive, 0.0)
    return row_norms(predicted - truth.half_b) - row_norms(additive - truth.half_b)

"""Metrics of the uncertainty that a model states."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from biojepa.evaluation.registry import register
from biojepa.evaluation.truth import FoldTruth


def _register_coverage(level: int) -> None:
    """Register the coverage of the central ``level`` % interval."""

    @register(
        f"coverage_{level}",
        "uncertainty",
        level / 100.0,
        f"Share of genes whose observed mean lies in the central {level} % interval of the prediction",
        "mean over g of |x̂ − x| ≤ z·√(sd² + Var(x)/n), the truth's own sampling error included",
        needs_sd=True,
    )
    def coverage(predicted: np.ndarray, truth: FoldTruth, sd: np.ndarray) -> np.ndarray:
        half_width = stats.norm.ppf(0.5 + level / 200.0) * _predictive_sd(truth, sd)
        return (np.abs(predicted - truth.half_b) <= half_width).mean(axis=1)


for _level in (50, 80, 95):
    _register_coverage(_level)


@register(
    "crps",
    "uncertainty",
    "min",
    "Continuous ranked probability score of the predicted distribution of the mean, mean over genes",
    "s·[z(2Φ(z) − 1) + 2φ(z) − 1/√π], z = (x − x̂)/s, s² = sd² + Var(x)/n; |x − x̂| where s = 0",
    needs_sd=True,
)
def crps(predicted: np.ndarray, truth: FoldTruth, sd: np.ndarray) -> np.ndarray:
    """Score a normal prediction (Gneiting & Raftery 2007, eq. 21), sampling error of the truth added."""
    scale, error = _predictive_sd(truth, sd), truth.half_b - predicted
    z = np.divide(error, scale, out=np.zeros_like(error), where=scale > 0)
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    value = scale * (z * (2.0 * special.ndtr(z) - 1.0) + 2.0 * density - 1.0 / np.sqrt(np.pi))
    return np.where(scale > 0, value, np.abs(error)).mean(axis=1)


def _predictive_sd(truth: FoldTruth, sd: np.ndarray) -> np.ndarray:
    """Return the standard deviation expected between predicted mean and mean of half B's cells."""
    return np.sqrt(sd**2 + truth.var_b / truth.n_b[:, None])

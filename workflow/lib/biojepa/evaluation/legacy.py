"""Metrics for comparison with papers only: a constant prediction wins most of them.

Their truth is the mean of all cells, as in the papers, so it contains the duplicate's half.
"""

from __future__ import annotations

import numpy as np

from biojepa.evaluation.registry import pearson_rows, register, row_norms
from biojepa.evaluation.truth import FoldTruth

EXPRESSED_GENES = 1000


@register(
    "pearson_delta_control",
    "legacy",
    "max",
    "Correlation of changes against control; whatever all perturbations share counts as success",
    "Pearson over g of x̂ − c and x_all − c, all cells",
)
def pearson_delta_control(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Correlate changes against control over all genes, the truth being all cells."""
    change = truth.all_cells - truth.control_mean
    return pearson_rows(predicted - truth.control_mean, change, truth.zero_norm)


@register(
    "pearson_delta_control_top20",
    "legacy",
    "max",
    "The same on the 20 genes most surely changed",
    "Pearson over the 20 g of largest |Welch t| of all cells against control",
)
def pearson_delta_control_top20(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Correlate changes against control over each perturbation's 20 top genes."""
    first, second = (
        np.take_along_axis(values - truth.control_mean, truth.top_genes, axis=1)
        for values in (predicted, truth.all_cells)
    )
    return pearson_rows(first, second, truth.zero_norm)


@register(
    "l2_top1000",
    "legacy",
    "min",
    "Distance on the 1,000 genes most expressed in control",
    "‖x̂ − x_all‖ over the 1,000 g of largest c (all g where fewer)",
)
def l2_top1000(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return the Euclidean distance on the genes most expressed in control, truth all cells."""
    top = np.argsort(-truth.control_mean, kind="stable")[:EXPRESSED_GENES]
    return row_norms(predicted[:, top] - truth.all_cells[:, top])


@register("mse", "legacy", "min", "Mean squared error of expression", "mean over g of (x̂ − x_all)²")
def mse(predicted: np.ndarray, truth: FoldTruth) -> np.ndarray:
    """Return the mean squared error over all genes, the truth being all cells."""
    error = predicted - truth.all_cells
    return np.einsum("pg,pg->p", error, error) / error.shape[1]

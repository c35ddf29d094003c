"""Predictions that measured cells make of themselves: what a perfect experiment would score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from biojepa.contracts import CONTROL, PERTURBATION, TRAIN
from biojepa.evaluation.truth import collect_moments
from biojepa.splits import labels_in


def duplicates(
    cells_path: str | Path,
    split: pd.DataFrame,
    rows: np.ndarray,
    genes: Sequence[str],
    half_seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Let half A of the cells of a perturbation predict it.

    In the scheme context all is given as of the held-out context, which changes nothing for its own
    perturbations, the tested ones.

    Parameters
    ----------
    cells_path
        ``cells.h5ad``.
    split, rows
        The split table, and the positions of the labels to predict.
    genes
        Of the columns.
    half_seed
        Seed of the halves; the truth is half B of the same seed.
    facts
        Of ``split.json``, which names a held-out context.

    Returns
    -------
    ``duplicate``
        (rows, genes) mean log-expression of half A.
    ``interpolated_duplicate``
        α · half A + (1 - α) · mean of the training perturbations, per gene, with α = 1 - the
        Benjamini-Hochberg adjusted p of Welch's t of half A against control, the variance of half A no
        smaller than the control's: noise is replaced by the mean, signal is kept.
    """
    moments = collect_moments(cells_path, pd.Index(genes), half_seed, facts)
    labels = split[PERTURBATION].iloc[rows].tolist()
    _, variance, n = moments.of(labels, pd.Index(genes), "a")
    # Changes that are carried over to another context may lead below 0, where no mean log1p value is.
    mean = np.maximum(moments.relocated(labels, pd.Index(genes), "a"), 0.0)
    control, control_variance, control_n = moments.of([CONTROL], pd.Index(genes))
    training = moments.relocated(labels_in(split, TRAIN), pd.Index(genes)).mean(axis=0)
    p = stats.ttest_ind_from_stats(
        mean,
        np.sqrt(np.maximum(variance, control_variance)),
        n[:, None],
        control,
        np.sqrt(control_variance),
        control_n[:, None],
        equal_var=False,
    ).pvalue
    adjusted = stats.false_discovery_control(np.nan_to_num(p, nan=1.0), axis=1)
    alpha = 1 - adjusted
    return {
        "duplicate": mean,
        "interpolated_duplicate": alpha * mean + (1 - alpha) * np.maximum(training, 0.0),
    }

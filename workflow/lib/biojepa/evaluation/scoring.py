"""Score one prediction file, and check the two references against the cells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CATEGORIES, CATEGORY, EXACT, METRICS_COLUMNS, PERTURBATION, WHOLE_MODEL
from biojepa.errors import InputError
from biojepa.evaluation.metrics import METRICS, Metric
from biojepa.evaluation.predictions import Prediction, PredictionFile
from biojepa.evaluation.resampling import WholeModelScores
from biojepa.evaluation.statistics import CEILING, FLOOR
from biojepa.evaluation.truth import FoldTruth

LOGGER = logging.getLogger(__name__)
# Half A and the perturbed mean are stored as float32 and may be summed in another order elsewhere.
SAME_MEAN = 1e-4


def score_prediction(
    file: PredictionFile, prediction: Prediction, truth: FoldTruth, whole: WholeModelScores
) -> pd.DataFrame:
    """Apply every metric to one file; scores of a whole model are also kept in ``whole``.

    Returns
    -------
    pandas.DataFrame
        Columns of ``metrics.tsv``. A metric that is undefined for every perturbation of the fold, or
        that needs a standard deviation the model does not give, has no rows.
    """
    weightings = whole.weights(truth.perturbations, truth.categories)
    parts = []
    for metric in METRICS.values():
        if metric.unit == "model":
            if not weightings:
                continue
            stacked = metric.score(prediction.mean, truth, np.vstack(list(weightings.values())))
            for (scope, weights), values in zip(
                weightings.items(), np.split(stacked, len(weightings)), strict=True
            ):
                counted = _counted(metric, truth, weights[0]) if np.isfinite(values[0]) else []
                whole.add(file.model, metric.name, scope, values, (file.fold, file.seed), counted)
                if scope == ALL_CATEGORIES and np.isfinite(values[0]):
                    parts.append(_rows([WHOLE_MODEL], [ALL_CATEGORIES], metric.name, values[:1]))
            continue
        if metric.needs_sd and prediction.sd is None:
            continue
        extra = (prediction.sd,) if metric.needs_sd else ()
        values = metric.score(prediction.mean, truth, *extra)
        if np.isfinite(values).any():
            parts.append(_rows(truth.perturbations, truth.categories, metric.name, values))
    scores = pd.concat(parts, ignore_index=True)
    return scores.assign(model=file.model, fold=file.fold, seed=file.seed)[list(METRICS_COLUMNS)]


def _counted(metric: Metric, truth: FoldTruth, weights: np.ndarray) -> list[str]:
    """Return the perturbations of a group, those with weight, that a score of the whole model rests on."""
    counts = weights > 0
    if metric.role == "combination":
        counts = counts & np.isfinite(truth.additive).all(axis=1)
    return [truth.perturbations[row] for row in np.flatnonzero(counts)]


def _rows(
    perturbations: Sequence[str],
    categories: Sequence[str] | np.ndarray,
    metric: str,
    values: Sequence[float] | np.ndarray,
) -> pd.DataFrame:
    return pd.DataFrame(
        {PERTURBATION: perturbations, CATEGORY: categories, "metric": metric, "value": values}
    )


def sentinel(check: str, passed: bool | None, detail: str, kind: str = EXACT) -> dict[str, Any]:
    """Return one line of the report's list of checks; ``passed`` is None where nothing could be checked."""
    return {"check": check, "passed": passed, "detail": detail, "kind": kind}


def check_references(file: PredictionFile, prediction: Prediction, truth: FoldTruth) -> list[dict[str, Any]]:
    """Compare the files of ``duplicate`` and ``mean`` with what the cells say they are.

    Raises
    ------
    InputError
        If the duplicate is not half A: it may share cells with the truth, and the ceiling would be false.
        If the mean baseline is not the mean of the training perturbations: the floor would be.
    """
    if file.model == CEILING:
        off = float(np.abs(prediction.mean - truth.half_a).max())
        if off > SAME_MEAN:
            raise InputError(
                file.path,
                f"a duplicate that differs from the mean of half A by up to {off:.3g}",
                "the mean of half A of these cells",
                "use the same evaluate.half_seed and cells, then rerun embed",
            )
        return [sentinel(f"fold {file.fold}: duplicate and truth share no cell", True, "duplicate = half A")]
    if file.model == FLOOR:
        off = float(np.abs(prediction.mean - truth.perturbed_mean).max())
        if off > SAME_MEAN:
            raise InputError(
                file.path,
                f"a mean baseline that differs from the mean over training perturbations by up to {off:.3g}",
                "the unweighted mean of the training perturbations of these cells, the zero of every scale",
                "rerun the rule baselines: it saw other perturbations, or cells that were filtered since",
            )
        return [
            sentinel(
                f"fold {file.fold}: the mean baseline is the mean of training perturbations",
                True,
                f"largest difference {off:.2g}",
            )
        ]
    return []

"""Small tables of cells before and after the filters, whatever the number of cells: for people alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biojepa.contracts import (
    BATCH,
    BATCHES_COLUMNS,
    DISTRIBUTIONS_COLUMNS,
    GUIDE_UMIS_COLUMNS,
    LIBRARY_SIZE,
)
from biojepa.preprocess.annotate import N_GENES, PCT_MITO
from biojepa.preprocess.quality import DOUBLET_SCORE, Funnel

# Points of the curve of ranked guide UMIs, and bins of a distribution.
KNEE_POINTS, BINS = 500, 60
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
METRICS = (LIBRARY_SIZE, N_GENES, PCT_MITO)
QUALITY_FILTERS = frozenset(
    ("min_counts", "min_genes", "max_pct_mito", "mad_counts", "mad_genes", "mad_mito", "doublets")
)


def or_empty(table: pd.DataFrame | None, columns: Sequence[str]) -> pd.DataFrame:
    """Return these columns of a table, without rows where there is none."""
    return pd.DataFrame(columns=list(columns)) if table is None else table[list(columns)]


def ranked_umis(umis: pd.Series | None) -> pd.DataFrame:
    """Return guide UMIs by rank of the cell, most first, thinned evenly on a log scale.

    Parameters
    ----------
    umis
        ``(cells,)`` UMIs of all guides in each cell; None where guides were not counted.

    Returns
    -------
    pandas.DataFrame
        ``rank`` (1 is the cell with most) and ``guide_umis``, at most ``KNEE_POINTS`` rows; the first and
        the last rank are among them.
    """
    if umis is None or not len(umis):
        return pd.DataFrame(columns=list(GUIDE_UMIS_COLUMNS))
    ranked = np.sort(umis.to_numpy(dtype=np.float64))[::-1]
    rank = np.unique(np.geomspace(1, len(ranked), KNEE_POINTS).round().astype(np.int64))
    return pd.DataFrame(dict(zip(GUIDE_UMIS_COLUMNS, (rank, ranked[rank - 1]), strict=True)))


def _outcomes(funnel: Funnel) -> tuple[np.ndarray, np.ndarray]:
    """Tell which cells ``(cells,)`` have one perturbation, and which of these a filter of quality dropped."""
    quality = np.array([name in QUALITY_FILTERS for name in funnel.names] + [False])
    poor = quality[funnel.dropped_by]
    first = int(np.argmax(quality)) if quality.any() else len(quality)
    return (funnel.dropped_by < 0) | (funnel.dropped_by >= first), poor


def batch_table(obs: pd.DataFrame, funnel: Funnel) -> pd.DataFrame:
    """Return quantiles of the quality of each batch and the limits of its cells, as ``batches.tsv``.

    Quantiles are over the cells that have one perturbation, before any is dropped for its quality.
    """
    labelled, _ = _outcomes(funnel)
    codes, names = pd.factorize(obs[BATCH].to_numpy(), sort=True)
    cells = np.bincount(codes[labelled], minlength=len(names))
    kept = np.bincount(codes[funnel.keep], minlength=len(names))
    limits = funnel.limits.set_index(["metric", "batch"])
    rows = []
    for metric in METRICS:
        values = obs[metric].to_numpy(dtype=np.float64)
        known = labelled & np.isfinite(values)
        order = np.argsort(codes[known], kind="stable")
        ends = np.cumsum(np.bincount(codes[known], minlength=len(names)))
        parts = np.split(values[known][order], ends[:-1])
        for code, name in enumerate(names):
            part = parts[code]
            found = np.quantile(part, list(QUANTILES.values())) if len(part) else [np.nan] * len(QUANTILES)
            low, high = limits.loc[(metric, name)] if (metric, name) in limits.index else (np.nan, np.nan)
            rows.append((metric, name, cells[code], kept[code], *found, low, high))
    return pd.DataFrame(rows, columns=list(BATCHES_COLUMNS))


def _edges(metric: str, low: float, high: float) -> np.ndarray:
    """Return the ends of at most ``BINS`` bins from ``low`` to ``high``, or a little beyond."""
    if metric == N_GENES:
        # Bins of as many whole numbers each; else some would hold one more than others, and stand out.
        width = np.ceil((high - low + 1) / BINS)
        return low + width * np.arange(np.ceil((high - low + 1) / width) + 1)
    if low == high:
        return np.array([low, low + 1])
    edges = np.linspace(low, high, BINS + 1)
    if metric == LIBRARY_SIZE:
        edges = np.expm1(np.linspace(np.log1p(low), np.log1p(high), BINS + 1))
        edges[[0, -1]] = low, high  # as they are, not as logarithms leave them
    return edges


def distribution_table(obs: pd.DataFrame, funnel: Funnel) -> pd.DataFrame:
    """Return histograms of all cells, of those dropped for their quality and of those kept.

    Bins of counts are even on a log scale; a metric that is known of no cell has no rows.
    """
    _, poor = _outcomes(funnel)
    tables = []
    for metric in (*METRICS, DOUBLET_SCORE):
        values = obs[metric].to_numpy(dtype=np.float64) if metric in obs else np.empty(0)
        known = np.isfinite(values)
        if not known.any():
            continue
        low, high = values[known].min(), values[known].max()
        edges = _edges(metric, low, high)
        tables.append(
            pd.DataFrame(
                {
                    "metric": metric,
                    "bin_low": edges[:-1],
                    "bin_high": edges[1:],
                    "cells": np.histogram(values[known], edges)[0],
                    "cells_low_quality": np.histogram(values[known & poor], edges)[0],
                    "cells_kept": np.histogram(values[known & funnel.keep], edges)[0],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)[list(DISTRIBUTIONS_COLUMNS)]

"""Collect the observed means that the report draws, so that it needs no cells."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from biojepa.contracts import CATEGORY, N_CELLS, PERTURBATION
from biojepa.evaluation.truth import FoldTruth


def observed_means(truths: Sequence[FoldTruth]) -> ad.AnnData:
    """Stack the observed means of all folds over the union of their genes.

    Returns
    -------
    anndata.AnnData
        Rows perturbation × fold; X mean of half B, layers ``half_a`` and ``all``, float32, NaN for genes
        that a fold does not use; ``uns["perturbed_mean"]`` and ``uns["control_mean"]``: one array
        over the genes per fold, under ``fold<number>``.
    """
    genes = pd.Index(sorted(set().union(*(truth.genes for truth in truths))))
    blocks: dict[str, list[np.ndarray]] = {"half_b": [], "half_a": [], "all_cells": []}
    references: dict[str, dict[str, np.ndarray]] = {"perturbed_mean": {}, "control_mean": {}}
    obs = []
    for truth in truths:
        columns = genes.get_indexer(truth.genes)
        for name, parts in blocks.items():
            block = np.full((len(truth.perturbations), len(genes)), np.nan, dtype=np.float32)
            block[:, columns] = getattr(truth, name)
            parts.append(block)
        for name, arrays in references.items():
            arrays[f"fold{truth.fold}"] = np.full(len(genes), np.nan)
            arrays[f"fold{truth.fold}"][columns] = getattr(truth, name)
        obs.append(
            pd.DataFrame(
                {
                    PERTURBATION: truth.perturbations,
                    "fold": truth.fold,
                    CATEGORY: truth.categories,
                    N_CELLS: truth.n_a + truth.n_b,
                    "n_genes_seen": truth.n_genes_seen,
                    "n_significant": truth.significant.sum(axis=1),
                },
                index=[f"{label}|fold{truth.fold}" for label in truth.perturbations],
            )
        )
    stacked = {name: np.vstack(parts) for name, parts in blocks.items()}
    return ad.AnnData(
        X=stacked["half_b"],
        obs=pd.concat(obs).astype({CATEGORY: "category"}),
        var=pd.DataFrame(index=genes),
        layers={"half_a": stacked["half_a"], "all": stacked["all_cells"]},
        uns=references,
    )

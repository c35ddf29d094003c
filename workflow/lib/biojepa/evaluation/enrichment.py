"""Gene-set enrichment of predicted and observed changes, offline from a local GMT file.

Question: would someone who reads pathways off the prediction read the same ones off the experiment?
Genes are ranked by the change of mean log-expression against control; gseapy's prerank gives each
gene set a normalized enrichment score (NES; Subramanian et al. 2005).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from biojepa.contracts import ENRICHMENT_COLUMNS
from biojepa.errors import InputError
from biojepa.evaluation.settings import EnrichmentSettings
from biojepa.evaluation.truth import FoldTruth
from biojepa.gene_sets import read_gene_sets

MIN_SHARED_SETS = 5


def choose_gene_sets(path: str | Path, genes: pd.Index, settings: EnrichmentSettings) -> dict[str, list[str]]:
    """Read a GMT file, keep measured genes, and choose the gene sets to test.

    Parameters
    ----------
    path
        GMT file, see :func:`~biojepa.gene_sets.read_gene_sets`.
    genes
        Measured genes.
    settings
        Sizes and number of gene sets to keep: the largest within bounds, by measured genes.

    Returns
    -------
    dict
        Name → sorted measured genes, ordered by name.

    Raises
    ------
    InputError
        If a line is malformed, a name occurs twice, or no set has enough measured genes.
    """
    measured = set(genes)
    sets = {name: sorted(measured.intersection(members)) for name, members in read_gene_sets(path).items()}
    if not any(sets.values()):
        raise InputError(
            path,
            f"no gene in common with the {len(genes)} measured ones, e.g. {list(genes[:3])}",
            "gene symbols as in cells.h5ad",
            "use gene sets of the same organism and identifier type",
        )
    fitting = [name for name in sets if settings.min_size <= len(sets[name]) <= settings.max_size]
    if not fitting:
        raise InputError(
            path,
            f"no gene set with {settings.min_size} to {settings.max_size} measured genes",
            "at least one",
            "lower evaluate.enrichment.min_size, or give gene sets that cover these genes",
        )
    kept = sorted(fitting, key=lambda name: (-len(sets[name]), name))[: settings.max_sets]
    return {name: sets[name] for name in sorted(kept)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence gseapy's warnings about ties, which every sparse prediction causes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def enrichment_scores(
    changes: np.ndarray,
    genes: pd.Index,
    gene_sets: Mapping[str, Sequence[str]],
    settings: EnrichmentSettings,
    zero: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return NES and FDR of every gene set for every row of changes.

    Parameters
    ----------
    changes
        (profiles, genes): change of mean log-expression against control.
    gene_sets
        Name → genes, each with the size the settings ask for.
    zero
        A profile whose largest absolute change does not exceed this has no ranking: NES NaN.

    Returns
    -------
    tuple
        NES and FDR q-value, both (profiles, gene sets), in the order of ``gene_sets``.
    """
    import gseapy

    nes = np.full((len(changes), len(gene_sets)), np.nan)
    fdr = np.full_like(nes, np.nan)
    position = {name: column for column, name in enumerate(gene_sets)}
    sets = {name: list(members) for name, members in gene_sets.items()}
    for row, change in enumerate(changes):
        if np.abs(change).max() <= zero:
            continue
        with _quiet():
            table = gseapy.prerank(
                rnk=pd.Series(change, index=genes),
                gene_sets=sets,
                outdir=None,
                no_plot=True,
                min_size=settings.min_size,
                max_size=settings.max_size,
                permutation_num=settings.permutations,
                seed=settings.seed,
                threads=1,
                verbose=False,
            ).res2d
        columns = table["Term"].map(position).to_numpy()
        nes[row, columns] = table["NES"].to_numpy(dtype=float)
        fdr[row, columns] = table["FDR q-val"].to_numpy(dtype=float)
    return nes, fdr


def choose_perturbations(truths: Sequence[FoldTruth], limit: int) -> dict[int, list[int]]:
    """Choose the test perturbations to enrich: those with most changed genes in half A, ties by name.

    Returns
    -------
    dict
        Fold → rows of its truth, ascending; at most ``limit`` over all folds.
    """
    ranked = sorted(
        (-int(count), truth.perturbations[row], truth.fold, row)
        for truth in truths
        for row, count in enumerate(truth.n_significant_half_a)
    )[:limit]
    chosen: dict[int, list[int]] = {truth.fold: [] for truth in truths}
    for _, _, fold, row in sorted(ranked, key=lambda entry: (entry[2], entry[3])):
        chosen[fold].append(row)
    return chosen


def enrichment_table(
    model: str,
    seed: int,
    predicted: np.ndarray,
    observed: tuple[np.ndarray, np.ndarray],
    truth: FoldTruth,
    rows: Sequence[int],
    gene_sets: Mapping[str, Sequence[str]],
    settings: EnrichmentSettings,
) -> pd.DataFrame:
    """Return the enrichment of one model's predictions beside that of the truth.

    Parameters
    ----------
    predicted
        (perturbations, genes): predicted mean log-expression of the fold.
    observed
        NES and FDR of half B, (rows, gene sets).
    rows
        Rows of the truth to score.
    """
    # What float32 storage cannot tell from control is no ranking.
    resolution = 2.0 * float(np.finfo(np.float32).eps) * float(np.abs(truth.control_mean).max())
    changes = (predicted - truth.control_mean)[list(rows)]
    nes, _ = enrichment_scores(changes, truth.genes, gene_sets, settings, zero=resolution)
    names, n_sets = list(gene_sets), len(gene_sets)
    return pd.DataFrame(
        {
            "model": model,
            "fold": truth.fold,
            "seed": seed,
            "perturbation": np.repeat([truth.perturbations[row] for row in rows], n_sets),
            "category": np.repeat(truth.categories[list(rows)], n_sets),
            "gene_set": np.tile(np.array(names, dtype=object), len(rows)),
            "nes_pred": nes.ravel(),
            "nes_true": observed[0].ravel(),
            "fdr_true": observed[1].ravel(),
        }
    )[list(ENRICHMENT_COLUMNS)]


def pathway_correlation(table: pd.DataFrame) -> pd.DataFrame:
    """Return the Spearman correlation of predicted and observed NES per model and perturbation.

    0 where the prediction gives no ranking or one score for all sets; NaN below five shared gene sets.

    Returns
    -------
    pandas.DataFrame
        Columns of ``metrics.tsv`` with ``metric`` = ``pathway_correlation``.
    """
    keys = ["model", "fold", "seed", "perturbation", "category"]
    rows = []
    for key, group in table.groupby(keys, sort=False):
        known = group["nes_true"].notna()
        shared = known & group["nes_pred"].notna()
        value = np.nan
        if not group["nes_pred"].notna().any() and known.sum() >= MIN_SHARED_SETS:
            value = 0.0
        elif shared.sum() >= MIN_SHARED_SETS:
            pair = group.loc[shared, "nes_pred"], group.loc[shared, "nes_true"]
            constant = any(values.nunique() < 2 for values in pair)
            value = 0.0 if constant else float(stats.spearmanr(*pair).statistic)
        rows.append((*key, "pathway_correlation", value))
    return pd.DataFrame(rows, columns=[*keys, "metric", "value"])

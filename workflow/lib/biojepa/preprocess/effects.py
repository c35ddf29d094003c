"""What each perturbation did, as a description.

Everything here is computed on all cells, held-out ones included, and is for people: no number of
this module is fitted on or trained with. The flags it sets on cells may be applied to training
cells only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind_from_stats
from sklearn.decomposition import PCA

from biojepa.contracts import (
    CONTROL,
    GUIDE_ID,
    N_PERTURBED_GENES,
    PERTURBATION,
    PERTURBATION_TABLE_COLUMNS,
    PERTURBATION_TYPE,
)
from biojepa.guides import GUIDE_JOIN
from biojepa.labels import genes_of
from biojepa.preprocess.settings import PreprocessSettings

JOIN = ";"
SIGNIFICANT = 0.05
# Added to means per 10,000 before the ratio: one UMI in a hundred cells of 10,000 UMIs.
PSEUDO_CP10K = 0.01
EXPECTED_SIGN = {"CRISPRi": -1, "CRISPRa": 1}
WEAK, ONE_GUIDE, UNCHANGED, WRONG_WAY = "weak", "one_guide", "target_unchanged", "target_wrong_direction"
FLAG_WEAK, FLAG_WEAK_GUIDE = "flag_weak_perturbation", "flag_weak_guide"
# A guide is weak when it leaves more than 2^-0.5 = 71 % of its target (CRISPRi), or raises it by
# less than 41 % (CRISPRa), and enough transcripts were expected to tell.
WEAK_GUIDE_LOG2FC = 0.5
MIN_EXPECTED_DETECTIONS = 10
# Genes and cells that set the principal components; more changes an effect size by less than its noise.
PCA_GENES, PCA_CELLS = 2_000, 10_000


def describe_perturbations(cells: ad.AnnData, settings: PreprocessSettings) -> pd.DataFrame:
    """Return the rows of perturbations.tsv, one per perturbation in sorted order, without the control.

    For combinations, ``target_measured``, ``on_target_log2fc`` and ``on_target_p`` hold one value
    per gene of the label, joined by ``;``, empty where the gene is not measured.
    """
    labels = cells.obs[PERTURBATION].astype(str).to_numpy()
    rows_of = {str(name): np.flatnonzero(labels == name) for name in np.unique(labels)}
    control = rows_of.pop(CONTROL)
    guides = cells.obs[GUIDE_ID].astype(str).to_numpy()
    kinds = cells.obs[PERTURBATION_TYPE].astype(str).to_numpy()
    target = TargetExpression(cells, rows_of, settings.target_sum)
    sizes = effect_sizes(cells.X, rows_of, control, settings)
    degs = count_changed_genes(cells.X, rows_of, control)
    q_values = false_discovery_control([p for _, p in sizes.values()]) if sizes else np.array([])

    table = []
    for (name, rows), q in zip(rows_of.items(), q_values, strict=True):
        named = {guide for joined in set(guides[rows]) for guide in joined.split(GUIDE_JOIN) if guide}
        genes = genes_of(name)
        changes = [target.change(gene, rows, control) for gene in genes]
        size, p = sizes[name]
        table.append(
            {
                PERTURBATION: name,
                N_PERTURBED_GENES: len(genes),
                "n_cells": len(rows),
                "n_guides": len(named),
                "guides": GUIDE_JOIN.join(sorted(named)),
                "target_measured": JOIN.join(str(change is not None) for change in changes),
                "on_target_log2fc": JOIN.join("" if c is None else f"{c[0]:.6g}" for c in changes),
                "on_target_p": JOIN.join("" if c is None else f"{c[1]:.6g}" for c in changes),
                "effect_size": size,
                "effect_p": p,
                "effect_q": q,
                "n_deg": degs[name],
                "flag": JOIN.join(_flags(q, len(named), changes, kinds[rows[0]])),
            }
        )
    return pd.DataFrame(table, columns=list(PERTURBATION_TABLE_COLUMNS))


def _flags(q: float, n_guides: int, changes: list[tuple[float, float] | None], kind: str) -> list[str]:
    """Return what a reader should notice about a perturbation."""
    flags = [WEAK] if q >= SIGNIFICANT else []
    if n_guides == 1:
        flags.append(ONE_GUIDE)
    measured = [change for change in changes if change is not None]
    if any(p >= SIGNIFICANT for _, p in measured):
        flags.append(UNCHANGED)
    sign = EXPECTED_SIGN.get(kind, 0)
    if any(p < SIGNIFICANT and log2fc * sign < 0 for log2fc, p in measured):
        flags.append(WRONG_WAY)
    return flags


class TargetExpression:
    """Expression of the perturbed genes that are measured.

    Parameters
    ----------
    cells
        Log-normalized cells.
    labels
        Perturbations whose genes are wanted.
    target_sum
        Counts per cell of the normalization.
    """

    def __init__(self, cells: ad.AnnData, labels: Mapping[str, object], target_sum: float) -> None:
        genes = sorted({gene for label in labels for gene in genes_of(label)} & set(cells.var_names))
        columns = cells.var_names.get_indexer(genes)
        self._column = {gene: number for number, gene in enumerate(genes)}
        # On the scale of counts per 10,000, whatever the target sum.
        self._values = sparse.csc_matrix(cells.X[:, columns].expm1(), dtype=np.float64) * (1e4 / target_sum)

    def __contains__(self, gene: str) -> bool:
        """Tell whether a gene is measured."""
        return gene in self._column

    def values(self, gene: str) -> np.ndarray:
        """Return counts per 10,000 of a gene ``(cells,)``."""
        return self._values[:, [self._column[gene]]].toarray().ravel()

    def change(self, gene: str, rows: np.ndarray, control: np.ndarray) -> tuple[float, float] | None:
        """Return log2 fold change of means per 10,000 and two-sided Mann–Whitney p; None if not measured."""
        if gene not in self:
            return None
        values = self.values(gene)
        perturbed, reference = values[rows], values[control]
        log2fc = np.log2((perturbed.mean() + PSEUDO_CP10K) / (reference.mean() + PSEUDO_CP10K))
        if perturbed.max() == perturbed.min() == reference.max() == reference.min():
            return float(log2fc), 1.0
        p = mannwhitneyu(perturbed, reference, alternative="two-sided", method="asymptotic").pvalue
        return float(log2fc), float(p)


def effect_sizes(
    expression: sparse.csr_matrix,
    rows_of: Mapping[str, np.ndarray],
    control: np.ndarray,
    settings: PreprocessSettings,
) -> dict[str, tuple[float, float]]:
    """Return energy distance to the control and its permutation p-value for each perturbation.

    Cells are compared in principal components of their log-expression, at most ``effect_cells`` of
    a side. Sampling and permutations depend on seed and name alone, so that one perturbation more
    does not change the others.
    """
    scores = principal_components(expression, settings.effect_components, settings.seed)
    reference = scores[_sample(control, settings.effect_cells, settings.seed, CONTROL)]
    found = {}
    for name, rows in rows_of.items():
        perturbed = scores[_sample(rows, settings.effect_cells, settings.seed, name)]
        rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode()), 1])
        found[name] = energy_test(perturbed, reference, settings.permutations, rng)
    return found


def _sample(rows: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """Return at most ``most`` of the rows, drawn by seed and name."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(rng.choice(rows, most, replace=False))


def principal_components(expression: sparse.csr_matrix, n_components: int, seed: int) -> np.ndarray:
    """Return the leading principal components of log-expression ``(cells, components)``.

    They are fitted on the most variable genes and, in a large screen, on a sample of the cells.
    """
    n_cells, n_genes = expression.shape
    mean = np.asarray(expression.mean(axis=0)).ravel()
    square = np.asarray(expression.multiply(expression).mean(axis=0)).ravel()
    genes = np.sort(np.argsort(-(square - mean**2), kind="stable")[:PCA_GENES])
    part = expression[:, genes] if len(genes) < n_genes else expression
    fit_on = _sample(np.arange(n_cells), PCA_CELLS, seed, "principal components")
    n_components = min(n_components, len(genes), len(fit_on) - 1)
    pca = PCA(n_components, svd_solver="covariance_eigh").fit(part[fit_on].toarray().astype(np.float64))
    shift = pca.mean_ @ pca.components_.T
    return np.asarray(part @ pca.components_.T) - shift


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased squared-Euclidean energy distance between cells ``(n, d)`` and ``(m, d)``.

    2 E‖x−y‖² − E‖x−x'‖² − E‖y−y'‖² with E over pairs of different cells, as the E-distance of
    scPerturb (Peidli et al. 2024) without its bias. It equals twice the squared distance of the
    means less its expectation under noise, so it sees shifts and is around 0, also negative, for
    equal distributions. Unit: squared log-expression.
    """
    weights = np.concatenate([np.ones(len(x)), np.zeros(len(y))])[None]
    return float(_energy_of_splits(np.concatenate([x, y]), weights)[0])


def energy_test(
    x: np.ndarray, y: np.ndarray, permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the energy distance and p = (1 + permutations at least as large) / (1 + permutations)."""
    member = np.concatenate([np.ones(len(x)), np.zeros(len(y))])
    shuffled = rng.permuted(np.tile(member, (permutations, 1)), axis=1)
    distances = _energy_of_splits(np.concatenate([x, y]), np.vstack([member, shuffled]))
    observed, null = distances[0], distances[1:]
    return float(observed), float((1 + np.sum(null >= observed)) / (1 + permutations))


def _energy_of_splits(points: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return energy distances ``(splits,)`` of splits ``(splits, cells)`` of points ``(cells, d)``.

    With squared Euclidean distances all pairwise means follow from the two means and the mean
    squared norms, so no distance matrix is made.
    """
    points = points - points.mean(axis=0)
    norms = (points**2).sum(axis=1)
    n = member.sum(axis=1)
    m = member.shape[1] - n
    sum_x, norm_x = member @ points, member @ norms
    mean_x, mean_y = sum_x / n[:, None], (points.sum(axis=0) - sum_x) / m[:, None]
    square_x, square_y = norm_x / n, (norms.sum() - norm_x) / m
    between = square_x + square_y - 2 * (mean_x * mean_y).sum(axis=1)
    within_x = 2 * n / (n - 1) * (square_x - (mean_x**2).sum(axis=1))
    within_y = 2 * m / (m - 1) * (square_y - (mean_y**2).sum(axis=1))
    return 2 * between - within_x - within_y


def count_changed_genes(
    expression: sparse.csr_matrix, rows_of: Mapping[str, np.ndarray], control: np.ndarray
) -> dict[str, int]:
    """Count for each perturbation the genes with Benjamini–Hochberg adjusted p < 0.05.

    Welch's t on log-expression against all control cells, adjusted over the genes of one
    perturbation, with the variance of the perturbed cells taken to be no smaller than that of the
    control. Without that floor a rare gene that fifty cells miss by chance has variance 0 there and
    counts as changed.
    """
    mean_c, sd_c, n_c = _moments(expression, control)
    found = {}
    for name, rows in rows_of.items():
        mean, sd, n = _moments(expression, rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = ttest_ind_from_stats(mean, np.maximum(sd, sd_c), n, mean_c, sd_c, n_c, equal_var=False).pvalue
        # A gene that varies in neither group has no t.
        found[name] = int((false_discovery_control(np.nan_to_num(p, nan=1.0)) < SIGNIFICANT).sum())
    return found


def _moments(expression: sparse.csr_matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return mean and standard deviation ``(genes,)`` of some cells, and their number."""
    part = expression[rows].astype(np.float64)
    n = len(rows)
    mean = np.asarray(part.sum(axis=0)).ravel() / n
    square = np.asarray(part.multiply(part).sum(axis=0)).ravel() / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0) * n / (n - 1)), n


def cell_flags(
    cells: ad.AnnData, perturbations: pd.DataFrame, settings: PreprocessSettings
) -> dict[str, np.ndarray]:
    """Return flags of cells ``(cells,)``: perturbation without clear effect, guide that does not work.

    A guide is judged by its target in cells of single perturbations by CRISPRi or CRISPRa; a
    knock-out need not change the transcript. Cells with several guides carry the flag of any of them.
    """
    weak = set(perturbations.loc[perturbations["effect_q"] >= SIGNIFICANT, PERTURBATION])
    labels = cells.obs[PERTURBATION].astype(str)
    guides = cells.obs[GUIDE_ID].astype(str)
    bad = weak_guides(cells, settings.target_sum)
    by_guide = {joined: bool(bad & set(joined.split(GUIDE_JOIN))) for joined in guides.unique()}
    return {
        FLAG_WEAK: labels.isin(weak).to_numpy(),
        FLAG_WEAK_GUIDE: guides.map(by_guide).to_numpy(dtype=bool),
    }


def weak_guides(cells: ad.AnnData, target_sum: float) -> set[str]:
    """Return the guides whose target hardly changes although enough transcripts were expected."""
    obs = pd.DataFrame(
        {name: cells.obs[name].astype(str) for name in (PERTURBATION, GUIDE_ID, PERTURBATION_TYPE)}
    )
    control = np.flatnonzero((obs[PERTURBATION] == CONTROL).to_numpy())
    single = ((cells.obs[N_PERTURBED_GENES] == 1) & (obs[GUIDE_ID] != "")).to_numpy()
    target = TargetExpression(cells, dict.fromkeys(obs[PERTURBATION].unique()), target_sum)
    found = set()
    numbered = obs.assign(row=np.arange(len(obs)))[single]
    for (gene, guide, kind), group in numbered.groupby([PERTURBATION, GUIDE_ID, PERTURBATION_TYPE]):
        sign = EXPECTED_SIGN.get(kind, 0)
        if not sign or gene not in target or GUIDE_JOIN in guide:
            continue
        rows = group["row"].to_numpy()
        expected = np.mean(target.values(gene)[control] > 0) * len(rows)
        change = target.change(gene, rows, control)
        if (
            expected >= MIN_EXPECTED_DETECTIONS
            and change is not None
            and sign * change[0] < WEAK_GUIDE_LOG2FC
        ):
            found.add(guide)
    return found

"""Observed means of the test perturbations, and the references they are judged against.

All expression values are log1p of counts per ``target_sum`` of the library. Moments are collected
once per dataset, in one pass over the cells in bounded memory; folds are then put together from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse, stats

from biojepa.contracts import CATEGORY, CONTROL, GENE_SEPARATOR, PERTURBATION, TEST, TRAIN
from biojepa.errors import InputError
from biojepa.evaluation.splits import FoldSplit
from biojepa.halves import half_b

BLOCK_VALUES = 4_000_000
ZERO_NORM = 1e-6
TOP_GENES = 20


@dataclass(frozen=True)
class Moments:
    """Per-label sums over cells, kept apart for half A and half B.

    Attributes
    ----------
    labels
        Sorted perturbations and the control, (labels,).
    genes
        Gene symbols, (genes,).
    n_cells
        (labels, 2): cells in half A and half B.
    total, squares
        (labels, 2, genes): sum and sum of squares of the expression, float64.
    """

    labels: pd.Index
    genes: pd.Index
    n_cells: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    def of(self, labels: list[str], genes: pd.Index, halves: str = "ab") -> tuple[np.ndarray, ...]:
        """Return mean, variance and number of cells of the labels over half A, B or both.

        Returns
        -------
        tuple
            ``mean`` (labels, genes), ``variance`` (labels, genes; divided by n - 1, 0 for one cell)
            and ``n`` (labels,).
        """
        rows, columns = self.labels.get_indexer(pd.Index(labels)), self.genes.get_indexer(genes)
        which = [{"a": 0, "b": 1}[half] for half in halves]
        n = self.n_cells[rows][:, which].sum(axis=1)
        total = sum(self.total[rows[:, None], half, columns] for half in which)
        squares = sum(self.squares[rows[:, None], half, columns] for half in which)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / n[:, None]
            centred = np.maximum(squares - total * mean, 0.0)
        return mean, centred / np.maximum(n - 1, 1)[:, None], n


def collect_moments(cells_path: str | Path, genes: pd.Index, half_seed: int = 0) -> Moments:
    """Sum expression and its square per label and half, in one pass over ``cells.h5ad``.

    Parameters
    ----------
    cells_path
        Cells with CSR ``X``, log1p of counts per ``target_sum``.
    genes
        Genes to read; all must be in the file.
    half_seed
        Seed of the halves, the one the duplicate was made with.

    Raises
    ------
    InputError
        If genes are missing, X is not CSR, or a label has fewer than two cells.
    """
    with h5py.File(cells_path, "r") as file:
        obs = ad.io.read_elem(file["obs"])
        columns = _columns_of(pd.Index(ad.io.read_elem(file["var"]).index), genes, cells_path)
        label_of_cell = obs[PERTURBATION].astype(str).to_numpy()
        labels = pd.Index(sorted(set(label_of_cell)))
        if CONTROL not in labels:
            raise InputError(
                cells_path, f"no cell labelled {CONTROL!r}", "control cells", "rerun the preprocess stage"
            )
        halves = half_b(obs.index.to_numpy(), half_seed, label_of_cell)
        group = 2 * labels.get_indexer(label_of_cell) + halves
        n_cells = np.bincount(group, minlength=2 * len(labels)).reshape(-1, 2)
        if (n_cells == 0).any():
            lone = labels[(n_cells == 0).any(axis=1)][0]
            raise InputError(
                f"{cells_path}, perturbation {lone!r}",
                "one cell",
                "at least two, one per half",
                "raise min_cells_per_perturbation in the preprocess settings",
            )
        total = np.zeros((2 * len(labels), len(genes)))
        squares = np.zeros_like(total)
        for start, block in _row_blocks(file["X"], cells_path):
            present, row = np.unique(group[start : start + block.shape[0]], return_inverse=True)
            members = sparse.csr_matrix(
                (np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(present), len(row))
            )
            block = block[:, columns]
            for sums, values in ((total, block), (squares, block.multiply(block))):
                part = (members @ values).tocoo()
                sums[present[part.row], part.col] += part.data
    shape = (len(labels), 2, len(genes))
    return Moments(labels, pd.Index(genes), n_cells, total.reshape(shape), squares.reshape(shape))


def _columns_of(measured: pd.Index, genes: pd.Index, cells_path: str | Path) -> np.ndarray:
    """Return the column of each gene, or name those that the cells lack."""
    columns = measured.get_indexer(genes)
    if (columns < 0).any():
        lost = list(np.asarray(genes)[columns < 0])
        raise InputError(
            cells_path,
            f"{len(lost)} predicted genes not measured, e.g. {lost[:3]}",
            "every predicted gene among the genes of the cells",
            "predict genes of cells.h5ad only",
        )
    return columns


def _row_blocks(matrix: h5py.Group, cells_path: str | Path) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield first row and float64 rows of a stored CSR matrix, about 4 million values at a time."""
    if not isinstance(matrix, h5py.Group) or matrix.attrs.get("encoding-type") != "csr_matrix":
        raise InputError(
            f"{cells_path}, X",
            "a matrix that is not CSR",
            "CSR, as preprocess writes it",
            "rerun the preprocess stage",
        )
    pointers = matrix["indptr"][:].astype(np.int64)
    n_rows, n_columns = len(pointers) - 1, int(matrix.attrs["shape"][1])
    start = 0
    while start < n_rows:
        stop = int(np.searchsorted(pointers, pointers[start] + BLOCK_VALUES, side="right")) - 1
        stop = min(max(stop, start + 1), n_rows)
        span = slice(pointers[start], pointers[stop])
        parts = (
            matrix["data"][span].astype(np.float64),
            matrix["indices"][span],
            pointers[start : stop + 1] - pointers[start],
        )
        yield start, sparse.csr_matrix(parts, shape=(stop - start, n_columns))
        start = stop


@dataclass(frozen=True)
class FoldTruth:
    """Everything about one fold that a metric may look at.

    Arrays are float64, (perturbations, genes) or (genes,); rows are the fold's test perturbations.
    ``perturbed_mean`` is the unweighted mean over the means of the *training* perturbations (all of
    their cells); ``additive`` is NaN where not every gene of a combination was trained as a single.

    Attributes
    ----------
    half_a, half_b, all_cells
        Observed means; half B is the truth of all but the legacy metrics.
    var_a, var_b, var_all
        Variances between cells.
    """

    fold: int
    genes: pd.Index
    perturbations: list[str]
    categories: np.ndarray
    n_genes_seen: np.ndarray
    n_a: np.ndarray
    n_b: np.ndarray
    half_a: np.ndarray
    half_b: np.ndarray
    all_cells: np.ndarray
    var_a: np.ndarray
    var_b: np.ndarray
    var_all: np.ndarray
    control_mean: np.ndarray
    control_var: np.ndarray
    n_control: int
    perturbed_mean: np.ndarray
    additive: np.ndarray
    fdr: float = 0.05

    @cached_property
    def delta(self) -> np.ndarray:
        """Observed change of half B against the training perturbed mean, (perturbations, genes)."""
        return self.half_b - self.perturbed_mean

    @cached_property
    def delta_control(self) -> np.ndarray:
        """Observed change of half B against control, (perturbations, genes)."""
        return self.half_b - self.control_mean

    @cached_property
    def zero_norm(self) -> float:
        """Norm below which a change is no change: 1e-6, absolute or relative to the perturbed mean.

        Predictions are stored as float32 and may have been summed as such, so a predicted perturbed
        mean differs from the exact one by rounding, which must not be correlated with the truth.
        """
        return ZERO_NORM * max(1.0, float(np.linalg.norm(self.perturbed_mean)))

    @cached_property
    def weights(self) -> np.ndarray:
        """Squared Welch t of half A against control, each row summing to 1, (perturbations, genes)."""
        variance = self.floored(self.var_a)
        squared = (
            welch_t(self.half_a, variance, self.n_a, self.control_mean, self.control_var, self.n_control) ** 2
        )
        total = squared.sum(axis=1, keepdims=True)
        return np.divide(squared, total, out=np.zeros_like(squared), where=total > 0)

    @cached_property
    def significant(self) -> np.ndarray:
        """Genes whose half B differs from control, (perturbations, genes), by Welch t and BH < fdr."""
        return self._significant(self.half_b, self.var_b, self.n_b)

    @cached_property
    def n_significant_half_a(self) -> np.ndarray:
        """Number of genes whose half A differs from control, (perturbations,)."""
        return self._significant(self.half_a, self.var_a, self.n_a).sum(axis=1)

    @cached_property
    def top_genes(self) -> np.ndarray:
        """Columns of the 20 genes of largest |Welch t| of all cells against control, (perturbations, 20)."""
        n = self.n_a + self.n_b
        variance = self.floored(self.var_all)
        t = welch_t(self.all_cells, variance, n, self.control_mean, self.control_var, self.n_control)
        return np.argsort(-np.abs(t), axis=1, kind="stable")[:, :TOP_GENES]

    def floored(self, variance: np.ndarray) -> np.ndarray:
        """Variance of perturbed cells (perturbations, genes), no smaller than that of the controls.

        A rare gene that fifty cells miss by chance has variance 0 among them, so its t is huge: without
        the floor such genes carry most of the weight, and the duplicate, which is the half that chose
        them, scores worse than models do.
        """
        return np.maximum(variance, self.control_var)

    def _significant(self, mean: np.ndarray, variance: np.ndarray, n: np.ndarray) -> np.ndarray:
        variance = self.floored(variance)
        with np.errstate(invalid="ignore", divide="ignore"):
            p_values = stats.ttest_ind_from_stats(
                mean,
                np.sqrt(variance),
                n[:, None],
                self.control_mean[None],
                np.sqrt(self.control_var)[None],
                self.n_control,
                equal_var=False,
            ).pvalue
        # Where no cell of either group varies there is no error to compare a difference with.
        p_values = np.where((variance > 0) | (self.control_var > 0), p_values, 1.0)
        return stats.false_discovery_control(p_values, axis=1) < self.fdr

    @cached_property
    def target_columns(self) -> list[np.ndarray]:
        """Columns of the measured genes that each perturbation targets."""
        found = (
            self.genes.get_indexer(pd.Index(label.split(GENE_SEPARATOR))) for label in self.perturbations
        )
        return [columns[columns >= 0] for columns in found]


def welch_t(
    mean: np.ndarray,
    variance: np.ndarray,
    n: np.ndarray,
    reference_mean: np.ndarray,
    reference_variance: np.ndarray,
    reference_n: int,
) -> np.ndarray:
    """Return Welch's t per perturbation and gene, 0 where neither group varies."""
    error = np.sqrt(variance / n[:, None] + reference_variance / reference_n)
    difference = mean - reference_mean
    return np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)


def assemble_fold(moments: Moments, split: FoldSplit, genes: pd.Index, fdr: float = 0.05) -> FoldTruth:
    """Put the truth of one fold together from the moments of the dataset.

    Parameters
    ----------
    moments
        Moments of every label over at least ``genes``.
    split
        What the fold trains on and tests.
    genes
        The fold's genes, in the order of its predictions.
    fdr
        Level at which a gene counts as differentially expressed.
    """
    test, train = split.labels(TEST), split.labels(TRAIN)
    rows = split.table.loc[test]
    half_a, var_a, n_a = moments.of(test, genes, "a")
    half_b_mean, var_b, n_b = moments.of(test, genes, "b")
    all_cells, var_all, _ = moments.of(test, genes)
    control_mean, control_var, n_control = moments.of([CONTROL], genes)
    train_means = moments.of(train, genes)[0]
    return FoldTruth(
        fold=split.fold,
        genes=pd.Index(genes),
        perturbations=test,
        categories=rows[CATEGORY].to_numpy(dtype=object),
        n_genes_seen=rows["n_genes_seen"].to_numpy(),
        n_a=n_a,
        n_b=n_b,
        half_a=half_a,
        half_b=half_b_mean,
        all_cells=all_cells,
        var_a=var_a,
        var_b=var_b,
        var_all=var_all,
        control_mean=control_mean[0],
        control_var=control_var[0],
        n_control=int(n_control[0]),
        perturbed_mean=train_means.mean(axis=0),
        additive=_additive_means(test, train, train_means, control_mean[0]),
        fdr=fdr,
    )


def _additive_means(
    test: list[str], train: list[str], train_means: np.ndarray, control_mean: np.ndarray
) -> np.ndarray:
    """Return control plus the summed changes of the trained singles, NaN where one is not trained."""
    row = {label: position for position, label in enumerate(train)}
    additive = np.full((len(test), len(control_mean)), np.nan)
    for position, label in enumerate(test):
        partners = label.split(GENE_SEPARATOR)
        if len(partners) > 1 and all(partner in row for partner in partners):
            changes = train_means[[row[partner] for partner in partners]] - control_mean
            additive[position] = control_mean + changes.sum(axis=0)
    return additive

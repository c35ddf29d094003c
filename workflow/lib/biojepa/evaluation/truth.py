"""Observed means of the test perturbations, and the references they are judged against.

All expression values are log1p of counts per ``target_sum`` of the library. Moments are collected
once per dataset, in one pass over the cells in bounded memory; folds are then put together from them. A
fold that holds out a context has labels of its own, and moments of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse, stats

from biojepa.contracts import CATEGORY, CONTEXT, CONTROL, LEFT_OUT, TEST, TRAIN
from biojepa.errors import InputError
from biojepa.evaluation.splits import FoldSplit
from biojepa.halves import half_b
from biojepa.labels import genes_of, in_context
from biojepa.splits import cell_contexts, cell_labels

# Stands for the label of cells that a fold does not use.
NOWHERE = ""
BLOCK_VALUES = 4_000_000
ZERO_NORM = 1e-6
TOP_GENES = 20
_HALVES = {"a": 0, "b": 1}


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
    contexts, counts
        Where a context is held out, its name and then the others', and (labels, 2, contexts) cells of each
        label in each; else empty and None. ``control`` is then the control of the held-out context, and
        that of another is called ``control @ other``.
    """

    labels: pd.Index
    genes: pd.Index
    n_cells: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    contexts: tuple[str, ...] = ()
    counts: np.ndarray | None = None

    def of(self, labels: list[str], genes: pd.Index, halves: str = "ab") -> tuple[np.ndarray, ...]:
        """Return mean, variance and number of cells of the labels over half A, B or both.

        Returns
        -------
        tuple
            ``mean`` (labels, genes), ``variance`` (labels, genes; divided by n - 1, 0 for one cell)
            and ``n`` (labels,).
        """
        n = self._cells(labels, halves)
        total = self._summed(self.total, labels, genes, halves)
        squares = self._summed(self.squares, labels, genes, halves)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / n[:, None]
            centred = np.maximum(squares - total * mean, 0.0)
        return mean, centred / np.maximum(n - 1, 1)[:, None], n

    def means(self, labels: list[str], genes: pd.Index) -> np.ndarray:
        """Return the mean of the labels over all of their cells, (labels, genes)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._summed(self.total, labels, genes, "ab") / self._cells(labels, "ab")[:, None]

    def relocated(self, labels: list[str], genes: pd.Index, halves: str = "ab") -> np.ndarray:
        """Return means of the labels as of the held-out context, (labels, genes); plain means without one.

        Control of the held-out context, plus the difference of a label's mean to the mean of the controls
        of the contexts that its cells are in, weighted by these cells. For labels of the held-out context
        itself that is their mean.
        """
        means = self.means(labels, genes) if halves == "ab" else self.of(labels, genes, halves)[0]
        if self.counts is None:
            return means
        controls = self.means(self.controls, genes)
        return means + (controls[0] - self.reference_shares(labels, halves) @ controls)

    @property
    def controls(self) -> list[str]:
        """Labels of the control cells of each context, the held-out one first; else the control alone."""
        others = (in_context(CONTROL, name) for name in self.contexts[1:])
        return [CONTROL, *(label for label in others if label in self.labels)]

    def reference_shares(self, labels: list[str], halves: str = "ab") -> np.ndarray:
        """Share of each of ``controls`` in what the labels are compared with, (labels, controls).

        That of the cells of a label in each context. A context without control cells takes those of all
        contexts.
        """
        names = self.controls
        if self.counts is None:
            return np.ones((len(labels), 1))
        rows = self.labels.get_indexer(pd.Index(labels))
        n = self.counts[rows][:, [_HALVES[half] for half in halves]].sum(axis=1)
        share = n / n.sum(axis=1, keepdims=True)
        placed = [CONTROL, *(in_context(CONTROL, name) for name in self.contexts[1:])]
        has = np.isin(placed, names)
        n_controls = self._cells(names, "ab")
        return share[:, has] + share[:, ~has].sum(axis=1, keepdims=True) * n_controls / n_controls.sum()

    def _cells(self, labels: list[str], halves: str) -> np.ndarray:
        rows = self.labels.get_indexer(pd.Index(labels))
        return self.n_cells[rows][:, [_HALVES[half] for half in halves]].sum(axis=1)

    def _summed(self, sums: np.ndarray, labels: list[str], genes: pd.Index, halves: str) -> np.ndarray:
        """Add up sums (labels, 2, genes) over halves; whole rows first, since a gather is slow."""
        rows, columns = self.labels.get_indexer(pd.Index(labels)), self.genes.get_indexer(genes)
        found = sums[rows, _HALVES[halves[0]]]
        for half in halves[1:]:
            found += sums[rows, _HALVES[half]]
        return found if np.array_equal(columns, np.arange(sums.shape[2])) else found.take(columns, axis=1)


def collect_moments(
    cells_path: str | Path,
    genes: pd.Index,
    half_seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Moments:
    """Sum expression and its square per label and half, in one pass over ``cells.h5ad``.

    Parameters
    ----------
    cells_path
        Cells with CSR ``X``, log1p of counts per ``target_sum``.
    genes
        Genes to read; all must be in the file.
    half_seed
        Seed of the halves, the one the duplicate was made with.
    facts
        Of ``split.json``, for a fold that holds out a context; cells of the labels that it leaves out are
        not counted.

    Raises
    ------
    InputError
        If genes are missing, X is not CSR, or a label has fewer than two cells.
    """
    with h5py.File(cells_path, "r") as file:
        obs = ad.io.read_elem(file["obs"])
        columns = _columns_of(pd.Index(ad.io.read_elem(file["var"]).index), genes, cells_path)
        label_of_cell, contexts, place = _cell_groups(obs, facts or {})
        labels = pd.Index(sorted(set(label_of_cell) - {NOWHERE}))
        if CONTROL not in labels:
            raise InputError(
                cells_path, f"no cell labelled {CONTROL!r}", "control cells", "rerun the preprocess stage"
            )
        halves = half_b(obs.index.to_numpy(), half_seed, label_of_cell)
        counted = label_of_cell != NOWHERE
        group = np.where(counted, 2 * labels.get_indexer(label_of_cell) + halves, -1)
        n_cells = np.bincount(group[counted], minlength=2 * len(labels)).reshape(-1, 2)
        # One control cell of another context is enough to be part of a mean.
        needed = ~labels.str.startswith(in_context(CONTROL, ""))
        if (n_cells[needed] == 0).any():
            lone = labels[needed][(n_cells[needed] == 0).any(axis=1)][0]
            raise InputError(
                f"{cells_path}, perturbation {lone!r}",
                "one cell",
                "at least two, one per half",
                "raise min_cells_per_perturbation in the preprocess settings",
            )
        total = np.zeros((2 * len(labels), len(genes)))
        squares = np.zeros_like(total)
        for start, block in _row_blocks(file["X"], cells_path):
            of_block = group[start : start + block.shape[0]]
            if (of_block < 0).any():
                block, of_block = block[of_block >= 0], of_block[of_block >= 0]
            present, row = np.unique(of_block, return_inverse=True)
            members = sparse.csr_matrix(
                (np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(present), len(row))
            )
            block = block[:, columns]
            for sums, values in ((total, block), (squares, block.multiply(block))):
                part = (members @ values).tocoo()
                sums[present[part.row], part.col] += part.data
    shape = (len(labels), 2, len(genes))
    counts = None
    if place is not None:
        flat = group[counted] * len(contexts) + place[counted]
        counts = np.bincount(flat, minlength=2 * len(labels) * len(contexts)).reshape(len(labels), 2, -1)
    return Moments(
        labels, pd.Index(genes), n_cells, total.reshape(shape), squares.reshape(shape), contexts, counts
    )


def _cell_groups(
    obs: pd.DataFrame, facts: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Return the label by which each cell is summed, the contexts, and the position of each cell's in them.

    Where a context is held out, control cells of the others are apart, and cells of labels that have too
    few cells are nowhere.
    """
    label, context = cell_labels(obs, facts), cell_contexts(obs, facts)
    if context is None:
        return label, (), None
    held_out = str(facts[CONTEXT])
    names = (held_out, *sorted(set(context) - {held_out}))
    place = pd.Index(names).get_indexer(context)
    elsewhere = np.array([in_context(CONTROL, name) for name in names], dtype=object)[place]
    label = np.where((label == CONTROL) & (place > 0), elsewhere, label)
    return np.where(np.isin(label, list(facts.get(LEFT_OUT, ()))), NOWHERE, label), names, place


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
    additive_var
        Squared standard error of ``additive``, NaN where that is; None where there is no combination.
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
    additive_var: np.ndarray | None = None

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
        t = np.abs(welch_t(self.all_cells, variance, n, self.control_mean, self.control_var, self.n_control))
        return np.stack([_largest(row, min(TOP_GENES, t.shape[1])) for row in t])

    def floored(self, variance: np.ndarray) -> np.ndarray:
        """Variance of perturbed cells (perturbations, genes), no smaller than that of the controls.

        A rare gene that fifty cells miss by chance has variance 0 among them, so its t is huge: without
        the floor such genes carry most of the weight, and the duplicate, which is the half that chose
        them, scores worse than models do.
        """
        return np.maximum(variance, self.control_var)

    def _significant(self, mean: np.ndarray, variance: np.ndarray, n: np.ndarray) -> np.ndarray:
        variance = self.floored(variance)
        # A p-value above the level is never rejected, nor does its size change what is. A t distribution has
        # heavier tails than the normal, so a gene below the normal quantile is above the level for sure.
        t = np.abs(welch_t(mean, variance, n, self.control_mean, self.control_var, self.n_control))
        row, gene = np.nonzero(t >= stats.norm.isf(self.fdr / 2.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = stats.ttest_ind_from_stats(
                mean[row, gene],
                np.sqrt(variance[row, gene]),
                n[row],
                self.control_mean[gene],
                np.sqrt(self.control_var[gene]),
                self.n_control,
                equal_var=False,
            ).pvalue
        # Where no cell of either group varies, or one has a single cell, there is nothing to compare with.
        p_values = np.ones_like(t)
        p_values[row, gene] = np.nan_to_num(found, nan=1.0)
        return stats.false_discovery_control(p_values, axis=1) < self.fdr

    @cached_property
    def delta_gram(self) -> np.ndarray:
        """Inner products over genes of the observed changes, (perturbations, perturbations)."""
        return self.delta @ self.delta.T

    @cached_property
    def target_columns(self) -> list[np.ndarray]:
        """Columns of the measured genes that each perturbation targets."""
        found = (self.genes.get_indexer(pd.Index(genes_of(label))) for label in self.perturbations)
        return [columns[columns >= 0] for columns in found]


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Return the positions of the ``n`` largest values, largest first, the earlier of equal ones first."""
    candidates = np.flatnonzero(values >= np.partition(values, len(values) - n)[len(values) - n])
    return candidates[np.argsort(-values[candidates], kind="stable")[:n]]


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

    In the scheme context, control is that of the held-out context, and training perturbations are taken as
    of that context, see :meth:`Moments.relocated`.

    Parameters
    ----------
    moments
        Moments of every label over at least ``genes``; of the fold itself where it holds out a context.
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
    train_means = moments.relocated(train, genes)
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
        # Changes that are carried over to another context may lead below 0, where no mean log1p value is.
        perturbed_mean=np.maximum(train_means.mean(axis=0), 0.0),
        additive=_additive_means(test, train, train_means, control_mean[0]),
        fdr=fdr,
        additive_var=_additive_variances(moments, test, train, genes),
    )


def _additive_means(
    test: list[str], train: list[str], train_means: np.ndarray, control_mean: np.ndarray
) -> np.ndarray:
    """Return control plus the summed changes of the trained singles, NaN where one is not trained."""
    row = {label: position for position, label in enumerate(train)}
    additive = np.full((len(test), len(control_mean)), np.nan)
    for position, label in enumerate(test):
        partners = genes_of(label)
        if len(partners) > 1 and all(partner in row for partner in partners):
            changes = train_means[[row[partner] for partner in partners]] - control_mean
            additive[position] = control_mean + changes.sum(axis=0)
    return additive


def _additive_variances(
    moments: Moments, test: list[str], train: list[str], genes: pd.Index
) -> np.ndarray | None:
    """Return the squared standard errors of the additive means, (test, genes), None without combinations.

    c + Σ(x − c) over k trained singles has the variance Σ Var(x) / n + (k − 1)² Var(c) / n, each with the
    cells of its own group; the variance of a single is taken to be no smaller than that of control. Where
    singles are compared with the controls of other contexts, each of these counts by its coefficient.
    """
    trained, found = set(train), {}
    _, control_var, n_control = moments.of(moments.controls, genes)
    for position, label in enumerate(test):
        partners = genes_of(label)
        if len(partners) > 1 and trained.issuperset(partners):
            _, variance, n = moments.of(partners, genes)
            of_singles = (np.maximum(variance, control_var[0]) / n[:, None]).sum(axis=0)
            coefficients = -moments.reference_shares(partners).sum(axis=0)
            coefficients[0] += 1
            found[position] = of_singles + (coefficients**2 / n_control) @ control_var
    if not found:
        return None
    variances = np.full((len(test), len(genes)), np.nan)
    variances[list(found)] = np.stack(list(found.values()))
    return variances

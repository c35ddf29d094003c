"""Code genes by how they vary together in training cells, without a dense matrix of all cells and genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from biojepa.pairs import gene_moments, rows_of_matrix
from biojepa.prior_names import COEXPRESSION, TRAINING_CELLS
from biojepa.priors import PriorSource

OVERSAMPLED = 16
MAX_ROUNDS = 15
CONVERGED = 1e-6


def expression_loadings(matrix: h5py.Group, keep: np.ndarray, n_components: int = 64) -> np.ndarray:
    """Correlate every gene with the leading principal components of the kept cells.

    With Z the standardized expression of the kept cells, Z = U S Vᵀ, the loadings are V S / √n: the
    correlations of genes with component scores, so that products of loadings approximate correlations
    of genes. The subspace is found by block power iteration with oversampling (Halko et al. 2011); Z
    stays implicit, since centring commutes with the products. Cells are read in blocks, once per
    round. Peak memory is that of one block, and of about five arrays (genes, components).

    Parameters
    ----------
    matrix
        CSR group of log-expression, (cells, genes).
    keep
        (cells,) bool, cells that count.
    n_components
        Components at most.

    Returns
    -------
    (genes, components) float64, a row of zeros for a gene that does not vary.
    """
    n_genes, n = int(matrix.attrs["shape"][1]), int(keep.sum())
    mean, variance = gene_moments(matrix, keep, n_genes)
    varies = variance > 1e-12
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    size = min(n_components + OVERSAMPLED, int(varies.sum()))
    if size == 0 or n < 2:
        return np.zeros((n_genes, 1))
    start = np.random.default_rng(0).standard_normal((n_genes, size)) * varies[:, None]
    basis = np.linalg.qr(start)[0]
    before = np.zeros(min(n_components, size))
    for _ in range(MAX_ROUNDS):
        image = _correlate(matrix, keep, mean, scale, basis) / n
        values, rotation = np.linalg.eigh((basis.T @ image + image.T @ basis) / 2)
        order = np.argsort(-values)[:n_components]
        captured = np.maximum(values[order], 0)
        components = basis @ rotation[:, order]
        if np.abs(captured - before).max() <= CONVERGED * captured[0]:
            break
        before, basis = captured, np.linalg.qr(image)[0]
    # Rounding on a gene that does not vary would look like a code once it is scaled to unit length.
    loadings = np.where(varies[:, None], components * np.sqrt(captured), 0.0)
    largest = np.abs(loadings).argmax(axis=0)
    return loadings * np.where(loadings[largest, np.arange(loadings.shape[1])] < 0, -1.0, 1.0)


def _correlate(
    matrix: h5py.Group, keep: np.ndarray, mean: np.ndarray, scale: np.ndarray, basis: np.ndarray
) -> np.ndarray:
    """Multiply Zᵀ Z with ``basis`` (genes, columns), Z the standardized expression of the kept cells."""
    scaled = scale[:, None] * basis
    offset = mean @ scaled
    product = np.zeros_like(basis)
    total = np.zeros(basis.shape[1])
    for first, data, indices, indptr in rows_of_matrix(matrix):
        rows = sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, len(mean)))
        rows = rows[np.flatnonzero(keep[first : first + len(indptr) - 1])]
        scores = rows @ scaled - offset
        product += rows.T @ scores
        total += scores.sum(axis=0)
    return scale[:, None] * (product - mean[:, None] * total)


def coexpression_source(
    matrix: h5py.Group, names: Sequence[str], training: np.ndarray, dim: int, where: str | Path
) -> PriorSource:
    """Describe measured genes by their loadings on components of training cells.

    Parameters
    ----------
    matrix, names
        CSR group of log-expression and the genes of its columns.
    training
        (cells,) bool: controls and cells of training perturbations. No other cell changes a code.
    dim
        Components.
    where
        File, for messages.
    """
    loadings = expression_loadings(matrix, training, dim)
    position = {str(gene): row for row, gene in enumerate(names) if loadings[row].any()}

    def rows(genes: Sequence[str]) -> np.ndarray:
        return loadings[[position[gene] for gene in genes]]

    remedy = "set pair.coexpression to false"
    return PriorSource(COEXPRESSION, frozenset(position), rows, where, remedy=remedy, kind=TRAINING_CELLS)

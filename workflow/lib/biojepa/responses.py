"""Code genes by what perturbing them did in another screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from anndata.io import read_elem

from biojepa.contracts import CONTROL, GENE_SEPARATOR, PERTURBATION
from biojepa.errors import InputError
from biojepa.pairs import rows_of_matrix
from biojepa.priors import PriorSource


def mean_responses(cells_path: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Average what each single perturbation of a screen changes.

    Returns
    -------
    genes
        Genes perturbed on their own, sorted.
    changes
        ``(genes, measured genes)`` mean log-expression of their cells minus that of control, float64.

    Raises
    ------
    InputError
        When the screen has no control cell or no single perturbation.
    """
    with h5py.File(cells_path, "r") as file:
        label = read_elem(file["obs"])[PERTURBATION].astype(str).to_numpy()
        names = sorted({name for name in label if name != CONTROL and GENE_SEPARATOR not in name})
        if not names or not (label == CONTROL).any():
            raise InputError(
                cells_path,
                f"{len(names)} single perturbation(s) and {(label == CONTROL).sum()} control cell(s)",
                "some of both",
                "take the dataset out of the column responses",
            )
        position = {CONTROL: 0} | {name: row for row, name in enumerate(names, start=1)}
        owner = np.array([position.get(name, -1) for name in label])
        n_genes = int(file["X"].attrs["shape"][1])
        sums = np.zeros((len(names) + 1) * n_genes)
        for first, data, indices, indptr in rows_of_matrix(file["X"]):
            row = np.repeat(owner[first : first + len(indptr) - 1], np.diff(indptr))
            used = row >= 0
            flat, place = np.unique(row[used].astype(np.int64) * n_genes + indices[used], return_inverse=True)
            sums[flat] += np.bincount(place, weights=data[used].astype(np.float64))
    counts = np.bincount(owner[owner >= 0], minlength=len(names) + 1)
    means = sums.reshape(-1, n_genes) / counts[:, None]
    return tuple(names), means[1:] - means[0]


def response_source(dataset: str, cells_path: str | Path) -> PriorSource:
    """Describe genes by their mean response in another screen, in its principal components.

    Only cells of that other screen are read, so nothing of a held-out perturbation of this one is seen;
    that the two are different screens is checked with the config.

    Parameters
    ----------
    dataset
        Name of the other screen; the source is called ``responses_<dataset>``.
    cells_path
        Its ``cells.h5ad``.
    """
    genes, changes = mean_responses(cells_path)
    position = {gene: row for row, gene in enumerate(genes)}

    def rows(wanted: Sequence[str]) -> np.ndarray:
        return changes[[position[gene] for gene in wanted]]

    return PriorSource(f"responses_{dataset}", frozenset(genes), rows, cells_path, centred=True)

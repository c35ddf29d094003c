"""Read what the page shows; of ``cells.h5ad`` only columns of cells, and the expression of a sample."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse
from scipy.linalg import eigh

from biojepa.contracts import BATCH, CONTROL, LIBRARY_SIZE, PERTURBATION, PERTURBATION_TYPE
from biojepa.map import layout
from biojepa.qc_report.inputs import CellFacts

MEDIANS = (LIBRARY_SIZE, "n_genes", "pct_mito")
PHASE = "phase"
# Columns that the map can be coloured by, where the cells have them.
MAP_OBS = (PERTURBATION, BATCH, LIBRARY_SIZE, "pct_mito", "doublet_score", PHASE, "responding_posterior")
MAP_CELLS, MAP_GENES, MAP_COMPONENTS = 3_000, 2_000, 50
# Below this, cells of a perturbation that were spread over batches at random would hardly meet in one.
IMPROBABLE = 1e-3


def read_obs(path: str | Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read those of the columns ``(cells, columns)`` that the cells have; names of cells are not read."""
    with h5py.File(path, "r") as file:
        obs = file["obs"]
        return pd.DataFrame({name: read_elem(obs[name]) for name in columns if name in obs})


def read_cell_facts(path: str | Path) -> CellFacts:
    """Sum up the kept cells of ``cells.h5ad``."""
    obs = read_obs(path, (PERTURBATION, BATCH, PERTURBATION_TYPE, *MEDIANS))
    with h5py.File(path, "r") as file:
        n_genes = int(file["X"].attrs["shape"][1])
        flags = [name for name in file["obs"] if name.startswith("flag_")]
        flagged = {name: int(np.count_nonzero(read_elem(file["obs"][name]))) for name in flags}
        phases = pd.Series(read_elem(file["obs"][PHASE]) if PHASE in file["obs"] else [], dtype=object)
    control = (obs[PERTURBATION] == CONTROL).to_numpy()
    batch = obs[BATCH].astype("category")
    cells, controls = (
        values.value_counts().reindex(batch.cat.categories, fill_value=0)
        for values in (batch, batch[control])
    )
    return CellFacts(
        n_cells=len(obs),
        n_controls=int(control.sum()),
        n_genes=n_genes,
        medians={
            name: float(np.nanmedian(obs[name])) if obs[name].notna().any() else np.nan for name in MEDIANS
        },
        types=tuple(sorted({str(kind) for kind in obs[PERTURBATION_TYPE].unique()} - {"unknown"})),
        batches=pd.DataFrame({"cells": cells, "controls": controls}),
        in_one_batch=in_one_batch(obs[PERTURBATION][~control], batch[~control]),
        flags=flagged,
        phases={str(name): int(n) for name, n in phases.value_counts().items()},
    )


def in_one_batch(labels: pd.Series, batches: pd.Series) -> tuple[str, ...]:
    """Return the perturbations whose cells are all in one batch, and would hardly be so by chance.

    Parameters
    ----------
    labels, batches
        ``(cells,)`` of the perturbed cells.
    """
    label, names = pd.factorize(labels.astype(str).to_numpy(dtype=object), sort=True)
    batch, levels = pd.factorize(batches.astype(str).to_numpy(dtype=object), sort=True)
    counts = sparse.coo_array((np.ones(len(label)), (label, batch)), shape=(len(names), len(levels))).tocsr()
    share = np.bincount(batch, minlength=len(levels)) / max(len(batch), 1)
    cells, alone = np.asarray(counts.sum(axis=1)).ravel(), np.diff(counts.indptr) == 1
    found = []
    for at in np.flatnonzero(alone):
        in_batch = share[counts.indices[counts.indptr[at]]]
        if in_batch ** cells[at] < IMPROBABLE:
            found.append(str(names[at]))
    return tuple(found)


def read_cell_map(path: str | Path, seed: int, max_cells: int = MAP_CELLS) -> pd.DataFrame | None:
    """Lay a random sample of cells out by the principal components of their log-expression.

    Only the rows of the sample are read. Returns None where too few cells or genes are there for a map.
    """
    with h5py.File(path, "r") as file:
        group = file["X"]
        indptr = group["indptr"][:]
        n_cells, n_genes = (int(size) for size in group.attrs["shape"])
        size = min(max_cells, n_cells)
        chosen = np.sort(np.random.default_rng(seed).choice(n_cells, size=size, replace=False))
        ends = list(zip(indptr[chosen].tolist(), indptr[chosen + 1].tolist(), strict=True))
        data, indices = (
            np.concatenate([group[name][first:last] for first, last in ends]) for name in ("data", "indices")
        )
    lengths = np.concatenate([[0], np.cumsum([last - first for first, last in ends])])
    expression = sparse.csr_matrix((data, indices, lengths), shape=(size, n_genes))
    if size < 10 or n_genes < 3:
        return None
    places = layout(principal_components(expression), seed)
    return read_obs(path, MAP_OBS).iloc[chosen].reset_index(drop=True).assign(
        umap_1=places[:, 0], umap_2=places[:, 1]
    )  # fmt: skip


def principal_components(expression: sparse.csr_matrix) -> np.ndarray:
    """Return scores ``(cells, components)`` in the principal components of the most variable genes."""
    mean = np.asarray(expression.mean(axis=0), dtype=np.float64).ravel()
    square = np.asarray(expression.multiply(expression).mean(axis=0), dtype=np.float64).ravel()
    genes = np.sort(np.argsort(-(square - mean**2), kind="stable")[:MAP_GENES])
    centred = expression[:, genes].toarray().astype(np.float64) - mean[genes]
    n = min(MAP_COMPONENTS, len(genes) - 1, len(centred) - 1)
    _, components = eigh(centred.T @ centred, subset_by_index=[len(genes) - n, len(genes) - 1])
    return centred @ components[:, ::-1]

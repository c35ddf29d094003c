"""Lay an embedding out in two dimensions for a figure."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from biojepa.contracts import BATCH, CONTROL, EMBEDDING, PERTURBATION, SET
from biojepa.splits import cell_labels, read_facts, read_split

N_NEIGHBORS, N_EPOCHS = 15, 200


def map_embedding(
    embeddings_path: str | Path, split_path: str | Path, seed: int = 0, max_cells: int = 3000
) -> pd.DataFrame:
    """Compute a UMAP (McInnes et al. 2018) of a random sample of cells.

    Returns
    -------
    Columns ``cell``, ``umap_1``, ``umap_2``, ``perturbation``, ``set`` (control, train, val, test),
    ``batch``, in the order of the file; without the cells of labels that the fold leaves out.
    """
    embeddings = ad.read_h5ad(embeddings_path)
    split = read_split(split_path).set_index(PERTURBATION)[SET]
    rng = np.random.default_rng(seed)
    size = min(max_cells, embeddings.n_obs)
    chosen = np.sort(rng.choice(embeddings.n_obs, size=size, replace=False))
    shown = embeddings[chosen]
    places = layout(shown.obsm[EMBEDDING], seed)
    labels = pd.Series(cell_labels(shown.obs, read_facts(split_path)))
    sets = labels.map(split).mask(labels == CONTROL, CONTROL)
    table = pd.DataFrame(
        {
            "cell": shown.obs_names,
            "umap_1": places[:, 0],
            "umap_2": places[:, 1],
            PERTURBATION: labels.to_numpy(),
            SET: sets.to_numpy(),
            BATCH: shown.obs[BATCH].astype(str).to_numpy(),
        }
    )
    return table[sets.notna().to_numpy()]


def layout(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay points ``(n, d)`` out in two dimensions ``(n, 2)`` by UMAP (McInnes et al. 2018).

    Neighbours are exact and found here: for fewer than 4,096 points umap-learn measures all distances one
    by one in Python, which takes longer than the layout. 200 epochs, its number for large data, in place
    of 500: the map is for the eye. The same points and seed give the same layout on the same machine.
    """
    # Imported here because numba takes seconds to start, and no other module needs it.
    import umap
    from sklearn.neighbors import NearestNeighbors

    n_neighbors = min(N_NEIGHBORS, len(points) - 1)
    # As in umap-learn, a point is its own first neighbour.
    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(points)
    mapper = umap.UMAP(
        n_neighbors=n_neighbors,
        n_epochs=N_EPOCHS,
        random_state=seed,
        n_jobs=1,
        precomputed_knn=(indices, distances),
    )
    with warnings.catch_warnings():
        # That new points cannot be placed in the map later, which nobody wants to do.
        warnings.filterwarnings("ignore", message="precomputed_knn")
        return np.asarray(mapper.fit_transform(points))

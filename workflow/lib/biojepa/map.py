"""Lay an embedding out in two dimensions for a figure."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from biojepa.contracts import BATCH, CONTROL, EMBEDDING, PERTURBATION, SET
from biojepa.splits import cell_labels, read_facts, read_split


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

    The same points and seed give the same layout on the same machine.
    """
    # Imported here because numba takes seconds to start, and no other module needs it.
    import umap

    neighbours = min(15, len(points) - 1)
    return umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(points)

"""Write ``predictions.h5ad`` and ``embeddings.h5ad``: the files that every model hands on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from biojepa.contracts import (
    CONTEXT,
    EMBEDDING,
    N_CELLS,
    PERTURBATION,
    PREDICTED_CELLS,
    SD_LAYER,
    SET,
    TEST,
    VAL,
    Z_PRED,
    Z_TRUE,
)
from biojepa.files import atomic_path
from biojepa.labels import context_of
from biojepa.splits import cell_labels


def predicted_rows(split: pd.DataFrame) -> np.ndarray:
    """Positions in ``split`` of the labels that a predictions file holds: validation and test."""
    return np.flatnonzero(split[SET].isin((VAL, TEST)))


def write_predictions(
    path: str | Path,
    model: str,
    split: pd.DataFrame,
    rows: np.ndarray,
    n_cells: Mapping[str, int],
    genes: Sequence[str],
    expression: np.ndarray,
    provenance: Mapping[str, Any],
    sd: np.ndarray | None = None,
    z_pred: np.ndarray | None = None,
    z_true: np.ndarray | None = None,
    cells: tuple[Any, np.ndarray] | None = None,
) -> None:
    """Write predictions of one model.

    Parameters
    ----------
    path, model
        File, and name of the model.
    split, rows
        The split table, and the positions of the predicted labels in it.
    n_cells
        Cells of each label in the screen.
    genes
        Of the columns.
    expression
        (rows, genes) mean log-expression, not a change.
    provenance
        How it was made.
    sd
        (rows, genes) standard deviation of that mean.
    z_pred, z_true
        (rows, D) pooled embedding, predicted and observed.
    cells
        Predicted single cells, CSR (cells, genes), and (cells,) the position in ``rows`` of their labels.
    """
    shown = split.iloc[rows]
    obs = pd.DataFrame(
        {
            PERTURBATION: shown[PERTURBATION].to_numpy(str),
            CONTEXT: [context_of(label) for label in shown[PERTURBATION]],
            SET: shown[SET].to_numpy(str),
            N_CELLS: [int(n_cells.get(label, 0)) for label in shown[PERTURBATION]],
        },
        index=shown[PERTURBATION].to_numpy(str),
    )
    predictions = _laid_out(obs, genes, expression, sd, provenance)
    predictions.uns["model"] = model
    for slot, values in ((Z_PRED, z_pred), (Z_TRUE, z_true)):
        if values is not None:
            predictions.obsm[slot] = values.astype(np.float32)
    if cells is not None:
        predicted, owner = cells
        predictions.uns[PREDICTED_CELLS] = {"X": predicted.astype(np.float32), "row": owner.astype(np.int32)}
    with atomic_path(path) as temporary:
        predictions.write_h5ad(temporary)


def write_requested(
    path: str | Path,
    table: pd.DataFrame,
    genes: Sequence[str],
    expression: np.ndarray,
    sd: np.ndarray | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write what the config asked to predict.

    Parameters
    ----------
    table
        ``predictions.tsv``; its rows with a rank, those that were predicted, become ``obs``.
    genes
        Of the columns.
    expression, sd
        (ranked rows, genes) mean log-expression and its standard deviation, where there is one.
    provenance
        How it was made.
    """
    obs = table[table["rank"].notna()].copy()
    text = obs.select_dtypes(exclude=["number", "bool"]).columns
    obs[text] = obs[text].fillna("").astype(str).astype("category")
    obs = obs.astype({"rank": int, "heldout_n": float})
    obs.index = pd.Index(obs[PERTURBATION].to_numpy(str))
    content = _laid_out(obs, genes, expression, sd, provenance)
    with atomic_path(path) as temporary:
        content.write_h5ad(temporary, compression="gzip")


def _laid_out(
    obs: pd.DataFrame,
    genes: Sequence[str],
    expression: np.ndarray,
    sd: np.ndarray | None,
    provenance: Mapping[str, Any],
) -> ad.AnnData:
    """Put predicted means (rows, genes) and their uncertainty beside what they are of, float32."""
    if expression.shape != (len(obs), len(genes)):
        raise ValueError(f"expression has shape {expression.shape}; expected {(len(obs), len(genes))}")
    content = ad.AnnData(expression.astype(np.float32), obs, pd.DataFrame(index=pd.Index(genes, name="gene")))
    if sd is not None:
        content.layers[SD_LAYER] = sd.astype(np.float32)
    content.uns["provenance"] = json.dumps(dict(provenance), sort_keys=True)
    return content


def write_embeddings(
    path: str | Path, obs: pd.DataFrame, pooled: np.ndarray, provenance: Mapping[str, Any]
) -> None:
    """Write the pooled embedding (cells, D) of every cell, with the cells' ``obs``, for scanpy."""
    embeddings = ad.AnnData(obs=obs, obsm={EMBEDDING: pooled.astype(np.float32)})
    embeddings.uns["provenance"] = json.dumps(dict(provenance), sort_keys=True)
    with atomic_path(path) as temporary:
        embeddings.write_h5ad(temporary)


def cells_per_label(cells_path: str | Path, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Count the cells of each perturbation in ``cells.h5ad``, as the fold of ``facts`` labels them."""
    with h5py.File(cells_path, "r") as file:
        counts = Counter(cell_labels(ad.io.read_elem(file["obs"]), facts or {}).tolist())
    return dict(counts)

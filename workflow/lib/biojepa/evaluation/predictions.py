"""Read prediction files and refuse what is not a predicted mean log-expression of the right genes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import CONTEXT, PERTURBATION, PREDICTED_CELLS, PREDICTIONS_OBS, SD_LAYER, SET
from biojepa.errors import InputError
from biojepa.evaluation.splits import FoldSplit
from biojepa.evaluation.truth import FoldTruth

# Linear models go slightly below zero on genes that are hardly expressed; differences go far below.
LOWEST_MEAN = -0.5
# Total predicted over total control expression: a change has about 0, counts or CPM far more than 2.
TOTAL_RANGE = (0.5, 2.0)
FROM_CELLS = Path("made from the cells")


@dataclass(frozen=True)
class PredictionFile:
    """Where the predictions of one model, fold and seed are.

    ``path`` is ``FROM_CELLS`` for the two references that the evaluation makes from the cells itself.
    """

    model: str
    fold: int
    seed: int
    path: Path


@dataclass(frozen=True)
class Prediction:
    """Predicted mean log-expression, and its standard deviation where the model gives one.

    Both (perturbations, genes), rows and columns as in the fold's truth, float64.

    Attributes
    ----------
    cells, owner
        Predicted single cells, (cells, genes) float32, and the row of the truth that each belongs to,
        (cells,); where the model predicts cells and they were asked for.
    """

    mean: np.ndarray
    sd: np.ndarray | None = None
    cells: sparse.csr_matrix | None = None
    owner: np.ndarray | None = None


def genes_of_fold(files: Sequence[PredictionFile]) -> pd.Index:
    """Return the genes of a fold, which all models must predict, in the order of the first file.

    Raises
    ------
    InputError
        If a file has other genes than the first, listing missing and extra ones.
    """
    genes: pd.Index | None = None
    for file in files:
        found = _read_genes(file.path)
        if found.has_duplicates:
            raise InputError(
                f"{file.path}, var",
                f"gene {found[found.duplicated()][0]!r} twice",
                "unique genes",
                "name each gene once",
            )
        if genes is None:
            genes = found
            continue
        missing, extra = genes.difference(found), found.difference(genes)
        if len(missing) or len(extra):
            raise InputError(
                f"{file.path}, var",
                f"{len(missing)} genes missing {list(missing[:3])} and {len(extra)} extra {list(extra[:3])}",
                f"the {len(genes)} genes of {files[0].path}",
                f"predict the gene list of pairs.h5 of fold {file.fold} in every model",
            )
    if genes is None:
        raise InputError(
            "predictions", "no file", "at least one predictions.h5ad per fold", "list the models to score"
        )
    return genes


def _read_genes(path: Path) -> pd.Index:
    with h5py.File(path, "r") as file:
        return pd.Index(ad.io.read_elem(file["var"]).index.astype(str))


def read_prediction(
    file: PredictionFile, truth: FoldTruth, split: FoldSplit, with_cells: bool = False
) -> Prediction:
    """Read the test rows of a predictions file, in the order of the truth.

    Parameters
    ----------
    with_cells
        Whether to read predicted single cells too, where there are any.

    Raises
    ------
    InputError
        If columns or perturbations are missing, a row's ``set`` contradicts the split, or the values
        are not mean log-expression.
    """
    with h5py.File(file.path, "r") as stored:
        obs, values = ad.io.read_elem(stored["obs"]), ad.io.read_elem(stored["X"])
        genes = pd.Index(ad.io.read_elem(stored["var"]).index.astype(str))
        uns = stored.get("uns", {})
        provenance = ad.io.read_elem(uns["provenance"]) if "provenance" in uns else None
        layers = stored.get("layers", {})
        spread = ad.io.read_elem(layers[SD_LAYER]) if SD_LAYER in layers else None
        found = ad.io.read_elem(uns[PREDICTED_CELLS]) if with_cells and PREDICTED_CELLS in uns else None
    _check_rows(obs, file.path, split)
    _check_provenance(provenance, file.path, split)
    rows = pd.Index(obs[PERTURBATION].astype(str)).get_indexer(truth.perturbations)
    columns = genes.get_indexer(truth.genes)
    if (rows < 0).any():
        missing = [truth.perturbations[row] for row in np.flatnonzero(rows < 0)]
        raise InputError(
            f"{file.path}, obs",
            f"no row for {len(missing)} test perturbations, e.g. {missing[:3]}",
            f"every test perturbation of {split.path}",
            "predict all of them",
        )
    mean = _dense(values)[np.ix_(rows, columns)]
    check_log_expression(mean, truth, file.path)
    sd = None
    if spread is not None:
        sd = _dense(spread)[np.ix_(rows, columns)]
        if not np.isfinite(sd).all() or (sd < 0).any():
            raise InputError(
                f"{file.path}, layers[{SD_LAYER!r}]",
                "negative or missing values",
                "standard deviations",
                "leave the layer out where the model has none",
            )
    if found is None:
        return Prediction(mean, sd)
    place = np.full(len(obs), -1)
    place[rows] = np.arange(len(rows))
    owner = place[np.asarray(found["row"])]
    return Prediction(mean, sd, sparse.csr_matrix(found["X"])[owner >= 0][:, columns], owner[owner >= 0])


def predicts_cells(path: Path) -> bool:
    """Whether a predictions file holds single cells."""
    if path == FROM_CELLS:
        return False
    with h5py.File(path, "r") as file:
        return PREDICTED_CELLS in file.get("uns", {})


def _dense(values: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    dense = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    return dense.astype(np.float64)


def _check_rows(obs: pd.DataFrame, path: Path, split: FoldSplit) -> None:
    """Raise an InputError if the rows contradict the contract or the split."""
    absent = [column for column in PREDICTIONS_OBS if column not in obs]
    if absent:
        raise InputError(
            f"{path}, obs", f"columns {list(obs)}", f"also {absent}", "add them to the predictions"
        )
    labels = obs[PERTURBATION].astype(str)
    if labels.duplicated().any():
        raise InputError(
            f"{path}, obs",
            f"perturbation {labels[labels.duplicated()].iloc[0]!r} twice"
            f" (contexts {sorted(set(obs[CONTEXT].astype(str)))[:3]})",
            "one row per perturbation",
            "predict one context, called all",
        )
    known = split.table[SET].reindex(labels)
    declared = obs[SET].astype(str).to_numpy()
    wrong = np.flatnonzero(known.to_numpy() != declared)
    if len(wrong):
        label, row = labels.iloc[wrong[0]], wrong[0]
        in_split = known.iloc[row]
        raise InputError(
            f"{path}, perturbation {label!r}, obs column {SET!r}",
            repr(declared[row]),
            f"{in_split!r}, as in {split.path}"
            if isinstance(in_split, str)
            else f"a perturbation of {split.path}",
            "these predictions were made for another split; run the model again on this one",
        )


def _check_provenance(provenance: str | None, path: Path, split: FoldSplit) -> None:
    """Raise an InputError if the file says that it was made with another split; it need not say."""
    made_with = json.loads(provenance).get("split_sha256") if provenance else None
    if made_with is not None and made_with != split.info.get("sha256"):
        raise InputError(
            f"{path}, uns['provenance']",
            f"predictions made with a split of SHA-256 {made_with}",
            f"{split.info.get('sha256')}, that of {split.path}",
            "run the model again on this split; the other one may have trained on what this one tests",
        )


def check_log_expression(values: np.ndarray, truth: FoldTruth, path: str | Path) -> None:
    """Raise an InputError if values cannot be mean log-expression: missing, differences or counts."""
    fix = "write the predicted mean of log1p expression, neither counts nor a change against control"
    broken = ~np.isfinite(values)
    if broken.any():
        row, column = np.argwhere(broken)[0]
        raise InputError(
            f"{path}, perturbation {truth.perturbations[row]!r}, gene {truth.genes[column]!r}",
            str(values[row, column]),
            "a finite mean log-expression",
            fix,
        )
    if values.min() < LOWEST_MEAN:
        row, column = divmod(int(values.argmin()), values.shape[1])
        raise InputError(
            f"{path}, perturbation {truth.perturbations[row]!r}, gene {truth.genes[column]!r}",
            f"{values.min():.3g}",
            f"mean log-expression, at least {LOWEST_MEAN} (0 but for rounding)",
            fix,
        )
    ratio = float(values.mean() / max(truth.control_mean.mean(), 1e-12))
    if not TOTAL_RANGE[0] <= ratio <= TOTAL_RANGE[1]:
        raise InputError(
            f"{path}, X",
            f"a mean value {ratio:.3g} times that of the control cells",
            f"{TOTAL_RANGE[0]} to {TOTAL_RANGE[1]} times, as log-expression has",
            fix,
        )

"""Compare predicted with observed single cells: their spread, and the distance of the two clouds.

Observed are the cells of half B of a test perturbation. A model that predicts means alone is taken by
the convention of the field: control cells, moved by the predicted change and cut at 0, so that it
inherits the spread of the controls. ``no_change`` is then the controls themselves. The cells of
``duplicate`` are those of half A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import CATEGORY, CONTEXT, CONTROL, METRICS_COLUMNS, PERTURBATION
from biojepa.evaluation.predictions import Prediction
from biojepa.evaluation.registry import Metric
from biojepa.evaluation.settings import DistributionSettings
from biojepa.evaluation.splits import FoldSplit
from biojepa.evaluation.truth import FoldTruth
from biojepa.halves import half_b
from biojepa.pairs import rows_of_matrix
from biojepa.splits import cell_contexts, cell_labels

# A gene that few cells show has a variance that is mostly the luck of the draw.
MIN_DETECTED = 0.1
MIN_GENES = 5


def variance_ratio(predicted: np.ndarray, observed: np.ndarray, genes: np.ndarray | None = None) -> float:
    """Return the median over genes of predicted over observed variance between cells.

    The median, because a geometric mean is 0 as soon as one gene is constant in the predicted cells, and a
    ratio of sums is that of a few genes.

    Parameters
    ----------
    predicted, observed
        (cells, genes) log-expression, any numbers of cells.
    genes
        (genes,) bool: which to use; all where not given. Genes that do not vary in ``observed`` are left out.

    Returns
    -------
    float
        NaN below two cells on either side or five genes.
    """
    if min(len(predicted), len(observed)) < 2:
        return float("nan")
    spread = observed.var(axis=0, ddof=1)
    used = spread > 0
    if genes is not None:
        used &= genes
    if used.sum() < MIN_GENES:
        return float("nan")
    return float(np.median(predicted[:, used].var(axis=0, ddof=1) / spread[used]))


def energy_distance(
    predicted: np.ndarray, observed: np.ndarray, within_observed: float | None = None
) -> float:
    """Return the energy distance of two clouds of cells, unbiased and with plain Euclidean distances.

    2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖ (Székely & Rizzo 2013), the expectations as U-statistics: a cell is not
    compared with itself. 0 in expectation for cells of one distribution, so that it can be negative.

    Parameters
    ----------
    predicted, observed
        (cells, genes) log-expression.
    within_observed
        :func:`mean_distance_within` of ``observed``, where it is known.

    Returns
    -------
    float
        In units of log-expression; NaN below two cells on either side.
    """
    if min(len(predicted), len(observed)) < 2:
        return float("nan")
    if within_observed is None:
        within_observed = mean_distance_within(observed)
    between = float(_distances(predicted, observed).mean())
    return 2.0 * between - mean_distance_within(predicted) - within_observed


def mean_distance_within(cells: np.ndarray) -> float:
    """Return the mean Euclidean distance of different cells, NaN for one cell."""
    n = len(cells)
    if n < 2:
        return float("nan")
    distances = _distances(cells, cells)
    np.fill_diagonal(distances, 0.0)
    return float(distances.sum() / (n * (n - 1)))


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Euclidean distances, (first, second), by one matrix product of centred cells."""
    centre = second.mean(axis=0)
    first, second = first - centre, second - centre
    squares = [np.einsum("cg,cg->c", cells, cells) for cells in (first, second)]
    squared = squares[0][:, None] + squares[1] - 2.0 * (first @ second.T)
    return np.sqrt(np.maximum(squared, 0.0))


# Their values come from the cells of one perturbation, not from two arrays of means.
DISTRIBUTION_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "variance_ratio",
            "distribution",
            1.0,
            "Predicted over observed variance between cells; below 1 the predicted cells are too alike",
            "median over g, detected in 10 % of controls, of Var(predicted cells) / Var(cells of half B)",
            "perturbation",
        ),
        Metric(
            "energy_distance",
            "distribution",
            "min",
            "Distance between the clouds of predicted and observed cells; about 0 where they are the same",
            "2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖, X predicted cells, Y half B, Euclidean, unbiased",
            "perturbation",
        ),
    )
}


@dataclass(frozen=True)
class FoldCells:
    """A sample of the observed cells of one fold, CSR float32 (cells, genes), columns as in its truth.

    Attributes
    ----------
    controls
        Control cells, of the held-out context where the fold holds out one.
    half_a, half_b
        By row of the truth, for the rows that are scored.
    """

    controls: sparse.csr_matrix
    half_a: Mapping[int, sparse.csr_matrix]
    half_b: Mapping[int, sparse.csr_matrix]


def observed_cells(
    cells_path: str | Path,
    folds: Sequence[tuple[FoldSplit, FoldTruth]],
    chosen: Mapping[int, Sequence[int]],
    settings: DistributionSettings,
    half_seed: int = 0,
) -> dict[int, FoldCells]:
    """Sample the cells of the chosen test perturbations and the controls, in one pass over ``cells.h5ad``.

    Parameters
    ----------
    cells_path
        Cells with CSR ``X``, log1p of counts per ``target_sum``.
    folds
        Split and truth of each fold.
    chosen
        Fold → rows of its truth.
    settings
        Largest sample of a half and of the controls, and the seed of the choice, which depends on the names
        of the cells and not on their order.
    half_seed
        Seed of the halves, that of the truth.

    Returns
    -------
    dict
        Fold → its cells.
    """
    with h5py.File(cells_path, "r") as file:
        obs = ad.io.read_elem(file["obs"])
        measured = pd.Index(ad.io.read_elem(file["var"]).index.astype(str))
        names = obs.index.to_numpy(str)
        groups: dict[tuple[int, int, str], np.ndarray] = {}
        for split, truth in folds:
            labels = cell_labels(obs, split.info)
            in_b = half_b(names, half_seed, labels)
            contexts = cell_contexts(obs, split.info)
            control = labels == CONTROL
            if contexts is not None:
                control &= contexts == split.info[CONTEXT]
            groups[truth.fold, -1, "control"] = _sample(names, control, CONTROL, settings)
            for row in chosen[truth.fold]:
                label = truth.perturbations[row]
                for half, inside in (("a", ~in_b), ("b", in_b)):
                    members = (labels == label) & inside
                    groups[truth.fold, row, half] = _sample(names, members, f"{label} {half}", settings)
        wanted = np.unique(np.concatenate(list(groups.values())))
        stored = _read_rows(file["X"], wanted, len(measured))
    found = {}
    for _, truth in folds:
        matrix = stored[:, measured.get_indexer(truth.genes)]
        halves: dict[str, dict[int, sparse.csr_matrix]] = {"a": {}, "b": {}}
        for (fold, row, part), members in groups.items():
            if fold == truth.fold and row >= 0:
                halves[part][row] = matrix[np.searchsorted(wanted, members)]
        controls = matrix[np.searchsorted(wanted, groups[truth.fold, -1, "control"])]
        found[truth.fold] = FoldCells(controls, halves["a"], halves["b"])
    return found


def _sample(names: np.ndarray, members: np.ndarray, what: str, settings: DistributionSettings) -> np.ndarray:
    """Choose at most ``max_cells`` of the marked cells, sorted positions; the same for any order of cells."""
    positions = np.flatnonzero(members)
    if len(positions) > settings.max_cells:
        positions = positions[np.argsort(names[positions], kind="stable")]
        key = int.from_bytes(hashlib.blake2b(what.encode("utf-8"), digest_size=8).digest(), "little")
        rng = np.random.default_rng([settings.seed, key])
        positions = rng.choice(positions, settings.max_cells, replace=False)
    return np.sort(positions)


def _read_rows(matrix: h5py.Group, wanted: np.ndarray, n_columns: int) -> sparse.csr_matrix:
    """Read the sorted ``wanted`` rows of a stored CSR matrix, float32."""
    parts = []
    for first, data, indices, pointers in rows_of_matrix(matrix):
        n = len(pointers) - 1
        here = wanted[slice(*np.searchsorted(wanted, (first, first + n)))] - first
        if len(here):
            block = sparse.csr_matrix((data.astype(np.float32), indices, pointers), shape=(n, n_columns))
            parts.append(block[here])
    return sparse.vstack(parts, format="csr")


def moved_controls(controls: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Move control cells (cells, genes) by a change of the mean (genes,), cut at 0."""
    return np.maximum(controls + change, 0.0)


def distribution_scores(
    truth: FoldTruth,
    cells: FoldCells,
    predictions: Sequence[tuple[str, int, Callable[[], Prediction]]],
    duplicate: str,
    settings: DistributionSettings,
) -> pd.DataFrame:
    """Score the cells that each model predicts of one fold.

    Parameters
    ----------
    truth
        The fold.
    cells
        Observed cells of the rows to score.
    predictions
        Model, seed and what loads its prediction, one after the other.
    duplicate
        Name of the model whose cells are those of half A.
    settings
        Largest number of predicted cells, and the seed of their choice.

    Returns
    -------
    pandas.DataFrame
        Columns of ``metrics.tsv``.
    """
    controls = _dense(cells.controls)
    detected = (controls > 0).mean(axis=0) >= MIN_DETECTED
    observed = {row: _dense(found) for row, found in cells.half_b.items()}
    within = {row: mean_distance_within(found) for row, found in observed.items()}
    records = []
    for model, seed, load in predictions:
        prediction = load()
        for row, seen in observed.items():
            if model == duplicate:
                predicted = _dense(cells.half_a[row])
            elif prediction.cells is not None and prediction.owner is not None:
                predicted = _predicted_cells(prediction.cells, prediction.owner, row, settings)
            else:
                predicted = moved_controls(controls, prediction.mean[row] - truth.control_mean)
            values = {
                "variance_ratio": variance_ratio(predicted, seen, detected),
                "energy_distance": energy_distance(predicted, seen, within[row]),
            }
            place = {PERTURBATION: truth.perturbations[row], CATEGORY: truth.categories[row]}
            records += [
                {"model": model, "fold": truth.fold, "seed": seed, **place, "metric": name, "value": value}
                for name, value in values.items()
            ]
    return pd.DataFrame(records, columns=list(METRICS_COLUMNS))


def _predicted_cells(
    cells: sparse.csr_matrix, owner: np.ndarray, row: int, settings: DistributionSettings
) -> np.ndarray:
    members = np.flatnonzero(owner == row)
    if len(members) > settings.max_cells:
        rng = np.random.default_rng([settings.seed, row])
        members = np.sort(rng.choice(members, settings.max_cells, replace=False))
    return _dense(cells[members])


def _dense(cells: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(cells.toarray(), dtype=np.float64)

"""Check, cell by cell, that what training read holds nothing of a test perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np

from biojepa.contracts import CONTROL, PERTURBATION, TEST
from biojepa.evaluation.scoring import sentinel
from biojepa.evaluation.splits import FoldSplit
from biojepa.pairs import CONTROL_CODE
from biojepa.splits import LeakageError, require_same_split


def check_training_cells(
    pairs_path: str | Path, cells_path: str | Path, split: FoldSplit
) -> list[dict[str, Any]]:
    """Compare the cells of ``pairs.h5`` with ``cells.h5ad`` by name: their labels, and what is tested.

    ``pairs.h5`` is all that training sees of cells, so a test cell that hides there under another label,
    as a control say, is found here and nowhere else.

    Returns
    -------
    The outcome, for the report.

    Raises
    ------
    LeakageError
        Naming a cell that belongs to a test perturbation, that carries another label than in
        ``cells.h5ad`` or that is not in it, or when the file belongs to another split.
    """
    with h5py.File(pairs_path, "r") as file:
        names = file["names/cell_names"].asstr()[:]
        labels, codes = file["names/labels"].asstr()[:], file["cells/perturbation"][:]
        carried = np.where(codes == CONTROL_CODE, CONTROL, labels[codes])
        facts = dict(file.attrs)
    require_same_split(facts, split.path, pairs_path)
    with h5py.File(cells_path, "r") as file:
        obs = ad.io.read_elem(file["obs"])
    true = obs[PERTURBATION].astype(str).reindex(names)
    held_out = true.isin(split.labels(TEST)).to_numpy()
    if held_out.any():
        cell = names[held_out][0]
        raise LeakageError(
            f"{pairs_path}: {held_out.sum()} cell(s) of test perturbations were read by training, such as "
            f"{cell} of {true[cell]}. Fix: delete pairs.h5 and rerun from the pair stage"
        )
    wrong = (true.to_numpy() != carried) | true.isna().to_numpy()
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise LeakageError(
            f"{pairs_path}: {wrong.sum()} cell(s) carry another label than in {cells_path}, such as "
            f"{names[place]}: {carried[place]}, not {true.iloc[place]}. Fix: delete pairs.h5 and rerun from "
            "the pair stage"
        )
    return [
        sentinel(
            f"fold {split.fold}: no cell that training read belongs to a test perturbation",
            True,
            f"{len(names)} cells of pairs.h5 compared with cells.h5ad one by one; encoder, predictor, "
            "readout, scaling, PCA, early stopping and simple models read cells from that file alone",
        )
    ]


def check_all(
    pairs_paths: Sequence[str | Path], cells_path: str | Path, splits: Sequence[FoldSplit]
) -> list[dict[str, Any]]:
    """Run :func:`check_training_cells` for each fold; files in the order of the splits."""
    checks = zip(pairs_paths, splits, strict=True)
    return [
        row for pairs_path, split in checks for row in check_training_cells(pairs_path, cells_path, split)
    ]

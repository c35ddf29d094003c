"""Leave flagged cells out of training, and never out of what is selected or tested by.

``preprocess`` flags cells before anything is held out, so a flag may rest on cells that a fold holds out: a
guide is judged in all single perturbations that carry it, and a perturbation in all contexts. Here a flag is
used only where it rests on training cells and controls alone, with two exceptions. Whether an effect or a
disagreement of guides is significant is corrected for the number of perturbations or guides by
Benjamini–Hochberg over all of them (``effect_q``, ``q``), held-out ones included. And effects are measured in
principal components of all cells. Both change where a flag falls by little, and no expression of a held-out
cell goes into training by them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from biojepa.contracts import FLAG_PREFIX, PERTURBATION, SET, TRAIN, TRAINING_CELLS_COLUMNS
from biojepa.errors import InputError
from biojepa.labels import genes_of, perturbation_of

log = logging.getLogger(__name__)

# A mean over fewer cells says little, and what survives a flag by chance is not the perturbation either.
FEWEST_CELLS = 10
# Perturbations that training needs at least.
FEWEST_PERTURBATIONS = 2
ALL_TRAIN, SOME_TRAIN = "all cells train", "unflagged cells train"
LEAVES = f"leaves training: fewer than {FEWEST_CELLS} unflagged cells"
NOT_USED = "all cells train: its flags may rest on held-out cells"


def drop_flagged(
    obs: pd.DataFrame,
    label_of_cell: np.ndarray,
    split: pd.DataFrame,
    flags: Sequence[str],
    where: str | Path,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Find the cells of training perturbations that flags leave out of training.

    A perturbation with fewer than :data:`FEWEST_CELLS` cells without a flag leaves training altogether.
    Flags are not used for a perturbation that is held out in another context, nor for a combination of which
    a gene is held out as a single perturbation. Controls, which carry no perturbation that could have
    failed, and the cells of validation and test perturbations stay.

    Parameters
    ----------
    obs
        Of all cells of the screen, with the flags as columns of bool.
    label_of_cell
        ``(cells,)`` perturbation of each cell as ``split`` spells it.
    split
        ``split.tsv`` of the fold.
    flags
        Columns of ``obs``; a cell goes with any of them.
    where
        File to name in an error.

    Returns
    -------
    dropped
        ``(cells,)`` bool.
    table
        The rows of ``training_cells.tsv``.

    Raises
    ------
    InputError
        For a flag that the screen does not have, or when hardly a perturbation would be left.
    """
    flagged = {name: _flag(obs, name, where) for name in flags}
    held_out = set(split.loc[split[SET] != TRAIN, PERTURBATION])
    elsewhere = {perturbation_of(label) for label in held_out}
    training = split.loc[split[SET] == TRAIN, PERTURBATION].tolist()
    usable = [label for label in training if not _rests_on(label, elsewhere)]
    code = pd.Index(training).get_indexer(pd.Index(label_of_cell))
    of_usable = np.append(np.isin(training, usable), False)[code]  # -1, any other cell, reads the last
    n = len(training)

    def count(cells: np.ndarray) -> np.ndarray:
        return np.bincount(code[cells & (code >= 0)], minlength=n)

    marked = np.any([*flagged.values(), np.zeros(len(obs), dtype=bool)], axis=0) & of_usable
    n_cells, n_marked = count(code >= 0), count(marked)
    leaves = (n_marked > 0) & (n_cells - n_marked < FEWEST_CELLS)
    dropped = marked | np.append(leaves, False)[code]
    n_dropped = count(dropped)
    carries = np.any([count(cells) for cells in flagged.values()] or [np.zeros(n)], axis=0)
    consequence = np.select(
        [leaves, n_dropped > 0, carries & ~np.isin(training, usable)],
        [LEAVES, SOME_TRAIN, NOT_USED],
        ALL_TRAIN,
    )
    first, last = TRAINING_CELLS_COLUMNS[:2], TRAINING_CELLS_COLUMNS[2:]
    table = pd.DataFrame(
        {
            **dict(zip(first, (training, n_cells), strict=True)),
            **{name: count(cells) for name, cells in flagged.items()},
            **dict(zip(last, (n_dropped, n_cells - n_dropped, consequence), strict=True)),
        }
    )
    if flags:
        _report(table, where)
    return dropped, table


def _rests_on(label: str, held_out: set[str]) -> bool:
    """Whether a flag of a training perturbation may come from cells of the held-out ones."""
    genes = genes_of(label)
    # Of its own label only where that is held out in another context.
    return perturbation_of(label) in held_out or (len(genes) > 1 and bool(held_out.intersection(genes)))


def _flag(obs: pd.DataFrame, name: str, where: str | Path) -> np.ndarray:
    """Return a flag ``(cells,)`` bool; missing values are not flagged."""
    known = [column for column in obs.columns.astype(str) if column.startswith(FLAG_PREFIX)]
    known = [column for column in known if pd.api.types.is_bool_dtype(obs[column])]
    if name not in known:
        raise InputError(
            f"{where}, obs, config key pair.drop_flags",
            f"no flag {name}",
            f"one of {', '.join(known)}" if known else "flags, of which this screen has none",
            "correct pair.drop_flags, or rerun the preprocess stage if an older version made the cells",
        )
    return obs[name].astype("boolean").fillna(False).to_numpy(dtype=bool)


def _report(table: pd.DataFrame, where: str | Path) -> None:
    """Say what went, and stop where hardly anything is left."""
    log.info(
        "flags leave %d of %d cells of training perturbations out of training",
        table["n_left_out"].sum(),
        table["n_cells"].sum(),
    )
    for consequence in (LEAVES, NOT_USED):
        names = table.loc[table["consequence"] == consequence, PERTURBATION]
        if len(names):
            log.warning("%d perturbation(s), %s: %s", len(names), consequence, ", ".join(names))
    left = int((table["n_training_cells"] > 0).sum())
    if left < FEWEST_PERTURBATIONS:
        raise InputError(
            f"{where}, config key pair.drop_flags",
            f"{left} training perturbation(s) with {FEWEST_CELLS} or more cells that carry no flag",
            f"at least {FEWEST_PERTURBATIONS}",
            "name fewer flags",
        )

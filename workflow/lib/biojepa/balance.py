"""Tell how much perturbed cells and the controls they are paired with are alike.

The standardized mean difference (SMD) of a covariate is the difference of two means over
√((variance among perturbed cells + variance among all controls) / 2), the same before and after pairing
(Stuart 2010; Austin 2009). Magnitudes below 0.1 are usually called balanced.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from biojepa.contracts import (
    BALANCE_COLUMNS,
    BATCH,
    CELL_TYPE,
    LIBRARY_SIZE,
    POPULATION,
    STRATEGY,
)
from biojepa.controls import ControlPools, batch_levels
from biojepa.errors import InputError
from biojepa.pairs import CONTROL_CODE

CATEGORIES = (BATCH, CELL_TYPE)
NUMBERS = ("log_library_size", "n_genes", "pct_mito")


def pairing_balance(cells_path: str | Path, pairs_path: str | Path) -> pd.DataFrame:
    """Compare perturbed cells with all controls and with those they are paired with.

    Of training and validation cells alone, as ``pairs.h5`` has no others. Where training draws controls
    anew, the paired controls are what it draws on average; else they are the partners.

    Parameters
    ----------
    cells_path
        ``cells.h5ad``, whose ``obs`` gives the covariates; what it lacks is left out.
    pairs_path
        ``pairs.h5`` of a fold; expression is not read.

    Returns
    -------
    The rows of ``balance.tsv``.

    Raises
    ------
    InputError
        When ``pairs.h5`` has cells that ``cells.h5ad`` lacks.
    """
    with h5py.File(cells_path, "r") as file:
        obs = read_elem(file["obs"])
    with h5py.File(pairs_path, "r") as file:
        strategy = str(file.attrs.get(STRATEGY, POPULATION))
        names = file["names/cell_names"].asstr()[:]
        cells = {key: file[f"cells/{key}"][:] for key in ("perturbation", "batch", "partner")}
        context = file["cells/context"][:] if "context" in file["cells"] else None
    rows = pd.Index(obs.index.astype(str)).get_indexer(names)
    if (rows < 0).any():
        raise InputError(
            pairs_path,
            f"cell {names[rows < 0][0]}, which {cells_path} lacks",
            "cells of that file",
            "rerun the pair stage",
        )
    pools = None
    if strategy == POPULATION:
        pools = ControlPools.of(cells["perturbation"], batch_levels(cells["batch"], context))
    return balance_table(obs.iloc[rows], cells["perturbation"], cells["partner"], pools, strategy)


def balance_table(
    obs: pd.DataFrame,
    perturbation: np.ndarray,
    partner: np.ndarray,
    pools: ControlPools | None,
    strategy: str,
) -> pd.DataFrame:
    """Make the rows of ``balance.tsv``.

    Parameters
    ----------
    obs
        Covariates of the cells, in their order.
    perturbation, partner
        ``(cells,)`` code, control is -1, and position of the paired control.
    pools
        Where given, a cell is paired with all controls of its pool alike in place of ``partner``.
    strategy
        Name to write down.
    """
    perturbed = perturbation != CONTROL_CODE
    if pools is None:
        used = len(np.unique(partner[perturbed]))
    else:
        places = np.unique(pools.pool_of_cell[perturbed])
        used = len(np.unique(np.concatenate([pools.pools[place] for place in places]))) if len(places) else 0
    table = []
    for covariate, level, values in _covariates(obs):
        paired = values[partner] if pools is None else _pool_means(values, pools)[pools.pool_of_cell]
        own, control = values[perturbed], values[~perturbed]
        own_known, control_known = own[np.isfinite(own)], control[np.isfinite(control)]
        if not len(own_known) or not len(control_known):
            continue
        scale = np.sqrt((own_known.var() + control_known.var()) / 2)
        by_label = pd.DataFrame({"own": own, "paired": paired[perturbed]}).groupby(perturbation[perturbed])
        means = by_label.mean()
        after = means["own"] - means["paired"]
        mean, all_controls = own_known.mean(), control_known.mean()
        mean_paired = pd.Series(paired[perturbed]).mean()
        row = (
            strategy,
            covariate,
            level,
            len(own_known),
            len(control_known),
            used,
            mean,
            all_controls,
            mean_paired,
            _standardized(mean - all_controls, scale),
            _standardized(mean - mean_paired, scale),
            _standardized((means["own"] - all_controls).abs().mean(), scale),
            _standardized(after.abs().mean(), scale),
        )
        table.append(dict(zip(BALANCE_COLUMNS, row, strict=True)))
    return pd.DataFrame(table, columns=list(BALANCE_COLUMNS))


def _covariates(obs: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, level and values ``(cells,)`` float64 of each; a level is 1 where a cell has it, else 0."""
    for name in CATEGORIES:
        if name in obs:
            given = obs[name].astype(str).to_numpy()
            for level in sorted(set(given)):
                yield name, level, (given == level).astype(float)
    numbers = obs.assign(log_library_size=np.log(obs[LIBRARY_SIZE].to_numpy(float)))
    for name in NUMBERS:
        if name in numbers:
            yield name, "", numbers[name].to_numpy(float)


def _pool_means(values: np.ndarray, pools: ControlPools) -> np.ndarray:
    """Mean of the known values of each pool; missing where none is known."""
    return np.array([pd.Series(values[pool]).mean() for pool in pools.pools])


def _standardized(difference: float, scale: float) -> float:
    """Divide by the scale; equal constants do not differ, and unequal ones have no scale."""
    if abs(difference) < 1e-12:
        return 0.0
    return float(difference / scale) if scale > 0 else float("nan")

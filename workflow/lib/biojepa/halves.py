"""Split the cells of a perturbation into the half that predicts and the half that judges.

Half B of a test perturbation's cells is the truth of the headline metrics; half A is the technical
duplicate. Every stage that needs a half asks this module, so that the two never share a cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd


def half_b(
    obs_names: Sequence[str] | np.ndarray | pd.Index,
    seed: int = 0,
    labels: Sequence[str] | np.ndarray | pd.Series | None = None,
) -> np.ndarray:
    """Say which cells belong to half B.

    Cells are ordered by a hash of their name and the seed; the first half of that order is half A.
    The answer depends on the *set* of cells that carry a label, not on the order of the file, the
    dataset's other labels or the platform. Calling it on the cells of one perturbation gives the
    same halves as calling it on all cells with ``labels``.

    Parameters
    ----------
    obs_names
        Unique cell names, (cells,).
    seed
        Another seed gives other halves.
    labels
        Perturbation of each cell, (cells,); the halves are balanced within each. Without it, all
        cells are taken as one group.

    Returns
    -------
    numpy.ndarray
        Boolean, (cells,), True in half B. Within a label the halves differ by at most one cell;
        an odd cell falls to half B, so that a truth exists whenever there is a cell.

    Raises
    ------
    ValueError
        If a name occurs twice under one label, or the lengths differ.
    """
    names = np.asarray(obs_names, dtype=object)
    groups = np.zeros(len(names), dtype=np.int64)
    if labels is not None:
        if len(labels) != len(names):
            raise ValueError(f"{len(names)} cell names but {len(labels)} labels")
        groups = pd.factorize(np.asarray(labels, dtype=object))[0]
    hashes = _hash_names(names, seed)
    order = np.lexsort((hashes, groups))
    _check_distinct(names[order], groups[order], hashes[order])
    sizes = np.bincount(groups)
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    in_b = np.zeros(len(names), dtype=bool)
    in_b[order] = np.arange(len(names)) - start >= np.repeat(sizes // 2, sizes)
    return in_b


def _hash_names(names: np.ndarray, seed: int) -> np.ndarray:
    """Return a 64-bit hash per name, (cells,), the same on every platform and Python version."""
    salt = int(seed).to_bytes(8, "little", signed=True)
    digests = b"".join(
        hashlib.blake2b(str(name).encode("utf-8"), digest_size=8, salt=salt).digest() for name in names
    )
    return np.frombuffer(digests, dtype="<u8")


def _check_distinct(names: np.ndarray, groups: np.ndarray, hashes: np.ndarray) -> None:
    """Raise if two cells of one label hash alike: their halves would depend on the file's order.

    All (cells,), sorted by group and hash. Two different names collide once in 10**13 labels of
    1,000 cells.
    """
    alike = np.flatnonzero((groups[1:] == groups[:-1]) & (hashes[1:] == hashes[:-1]))
    if len(alike):
        first, second = names[alike[0]], names[alike[0] + 1]
        raise ValueError(f"cell names {first!r} and {second!r} are not distinct; cell names must be unique")

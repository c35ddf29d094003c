"""Compare cells of different batches: scores less the mean of their batch, permutations within batches.

Perturbations and guides are rarely spread evenly over batches, and what batches do must not pass for what
they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from biojepa.preprocess.effects import Scores

# Controls that say where a batch lies. With fewer, all its cells whose scores are known say it, if these are
# as many. A batch with fewer still is left where it is.
CENTRE_CELLS = 20
# Cells of a perturbation in a batch from which they are permuted among themselves. In a screen of hundreds of
# batches, a perturbation has a cell or two in each, and within them nothing would be left to permute.
STRATUM_CELLS = 10


class BatchCentred:
    """Scores of cells less the mean of their batch, so that batches no longer differ.

    The mean is that over the controls of the batch, which no perturbation shifts, where they are
    ``CENTRE_CELLS`` or more; else over all cells of the batch whose scores are known. With one batch, scores
    are what they were.

    Parameters
    ----------
    scores
        Of some cells, in principal components.
    batch
        ``(cells,)`` batch of every cell.
    control
        Control cells whose scores are known.
    """

    def __init__(self, scores: Scores, batch: pd.Series, control: np.ndarray) -> None:
        self._scores = scores
        self._batch = batch.astype("category").cat.codes.to_numpy(dtype=np.int32)
        everywhere = scores.of(control).mean(axis=0)
        n_batches = int(self._batch.max()) + 1
        self._shift = np.zeros((n_batches, len(everywhere)))
        if n_batches == 1:
            return
        of_control, of_all = self._by_batch(control), self._by_batch(scores.rows)
        for code in range(n_batches):
            rows = of_control[code] if len(of_control[code]) >= CENTRE_CELLS else of_all[code]
            if len(rows) >= CENTRE_CELLS:
                self._shift[code] = scores.of(rows).mean(axis=0) - everywhere

    def _by_batch(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return which of the rows are of each batch."""
        code = self._batch[rows]
        ends = np.cumsum(np.bincount(code, minlength=len(self._shift)))
        return np.split(rows[np.argsort(code, kind="stable")], ends[:-1])

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores of some of the cells ``(len(rows), components)``."""
        return self._scores.of(rows) - self.shift_of(rows)

    def shift_of(self, rows: np.ndarray) -> np.ndarray:
        """Return what :meth:`of` takes off the scores of some cells ``(len(rows), components)``."""
        return self._shift[self._batch[rows]]

    def weights_of(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what :meth:`biojepa.preprocess.effects.Scores.weights_of` does; batches are left in."""
        return self._scores.weights_of(directions)

    def strata(self, rows: np.ndarray) -> np.ndarray:
        """Return within what the cells may be permuted ``(len(rows),)``: batches, small ones together."""
        code = self._batch[rows]
        return np.where(np.bincount(code)[code] >= STRATUM_CELLS, code, -1)

    def strata_with_control(self, rows: np.ndarray, control: np.ndarray) -> np.ndarray:
        """Return the strata of cells and of controls they are compared with ``(len(rows) + len(control),)``.

        A batch is a stratum where it holds ``STRATUM_CELLS`` of the controls; the others are one together.
        Where that one has cells and fewer controls, it joins the stratum with most controls.
        """
        code = self._batch[np.concatenate([rows, control])]
        n_control = np.bincount(code[len(rows) :], minlength=len(self._shift))
        strata = np.where(n_control[code] >= STRATUM_CELLS, code, -1)
        if (strata == -1).any() and (strata[len(rows) :] == -1).sum() < STRATUM_CELLS <= n_control.max():
            strata[strata == -1] = n_control.argmax()
        return strata


def permute_within(
    code: np.ndarray, strata: np.ndarray | None, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Return ``n`` permutations ``(n, cells)`` of ``code`` ``(cells,)`` within strata ``(cells,)``."""
    permuted = np.tile(code, (n, 1))
    strata = np.zeros(len(code), dtype=np.int64) if strata is None else strata
    for stratum in np.unique(strata):
        here = np.flatnonzero(strata == stratum)
        permuted[:, here] = rng.permuted(permuted[:, here], axis=1)
    return permuted


def control_weights(strata: np.ndarray, n: int) -> np.ndarray | None:
    """Return weights of controls that give them the composition of the perturbed cells ``(cells,)``.

    The mean of controls in a stratum weighs as the perturbed cells there do, so that the difference of the
    two groups is made of differences within strata (direct standardization). The weights of the
    controls sum to 1, and do so too after a permutation within strata.

    Parameters
    ----------
    strata
        ``(cells,)`` of the perturbed cells and then of the controls.
    n
        Perturbed cells.

    Returns
    -------
    numpy.ndarray or None
        None with one stratum, where all controls weigh the same.
    """
    code = np.unique(strata, return_inverse=True)[1]
    if not code.any():
        return None
    perturbed, control = np.bincount(code[:n], minlength=code.max() + 1), np.bincount(code[n:])
    return (perturbed / (n * control))[code]

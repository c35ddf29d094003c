"""Guide counts whose truth is known."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass
class GuideCase:
    """Simulated guide counts.

    Attributes
    ----------
    counts
        ``(cells, guides)``, sparse.
    carried
        Whether a cell carries a guide, ``(cells, guides)``.
    background
        Mean ambient UMIs of each guide, ``(guides,)``.
    log2_mean, log2_sd
        Of the counts of carried guides, ``(guides,)``.
    """

    counts: sparse.csr_matrix
    carried: np.ndarray
    background: np.ndarray
    log2_mean: np.ndarray
    log2_sd: np.ndarray

    @property
    def names(self):
        return [f"g{guide}" for guide in range(len(self.background))]

    @property
    def targets(self):
        return {name: "control" if name == "g0" else f"T{name}" for name in self.names}


def simulate_guides(n_cells, n_guides, moi, dispersion, seed, background=(0.02, 1.0), log2_mean=(5.0, 7.0)):
    """Draw ambient UMIs as a gamma–Poisson with one factor per cell, and log-normal ones of carried guides.

    ``moi`` is the mean of the Poisson number of guides of a cell, or an exact number where it is an int.
    """
    rng = np.random.default_rng(seed)
    mean = np.exp(rng.uniform(*np.log(background), n_guides))
    middle, spread = rng.uniform(*log2_mean, n_guides), rng.uniform(1.0, 1.6, n_guides)
    factor = rng.gamma(1 / dispersion, dispersion, n_cells) if dispersion else np.ones(n_cells)
    counts = rng.poisson(factor[:, None] * mean)
    number = np.full(n_cells, moi) if isinstance(moi, int) else rng.poisson(moi, n_cells)
    order = np.argsort(rng.random((n_cells, n_guides)), axis=1)
    carried = np.zeros((n_cells, n_guides), dtype=bool)
    np.put_along_axis(carried, order, np.arange(n_guides) < number[:, None], axis=1)
    signal = np.rint(np.exp2(rng.normal(middle, spread, (n_cells, n_guides)))).astype(int)
    return GuideCase(sparse.csr_matrix(counts + carried * signal), carried, mean, middle, spread)

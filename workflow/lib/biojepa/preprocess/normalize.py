"""Depth normalization."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from biojepa.errors import InputError


def log_normalize(
    counts: sparse.csr_matrix, library_size: np.ndarray, target_sum: float, where: str = "library_size"
) -> sparse.csr_matrix:
    """Return log1p(counts / library size × target sum), CSR float32 ``(cells, genes)``.

    Parameters
    ----------
    counts
        Raw counts ``(cells, genes)``.
    library_size
        UMIs of each cell over its whole transcriptome ``(cells,)``, which may be more than the sum
        over the genes in ``counts``.
    target_sum
        Counts per cell after scaling, such as 10,000.
    where
        Name of the screen, for messages.

    Raises
    ------
    InputError
        When a library size is zero, negative or missing.
    """
    library_size = require_library_sizes(library_size, where)
    per_value = np.repeat(target_sum / library_size, np.diff(counts.indptr))
    values = np.log1p(counts.data * per_value).astype(np.float32)
    # Indices are shared with the counts: both matrices hold the same entries.
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def require_library_sizes(library_size: np.ndarray, where: str = "library_size") -> np.ndarray:
    """Return library sizes ``(cells,)`` as float64.

    Raises
    ------
    InputError
        When one is zero, negative or missing.
    """
    library_size = np.asarray(library_size, dtype=np.float64)
    wrong = ~(np.isfinite(library_size) & (library_size > 0))
    if wrong.any():
        raise InputError(
            where,
            f"{int(wrong.sum())} cells with a library size of 0 or less",
            "a positive number of UMIs",
            "set preprocess.min_counts to 1 or more, or correct `library_size_column`",
        )
    return library_size

"""What raw counts are, and what a matrix holds that are none."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from scipy import sparse

from biojepa.raw.matrix import BLOCK_ENTRIES

# The largest logarithm of a count: exp(20) is more molecules than a cell gives.
LARGEST_LOGARITHM = 20


def holds_counts(matrix: Any) -> bool:
    """Tell whether a matrix ``(cells, genes)`` holds whole numbers, none negative, some positive.

    It may be an array, a scipy matrix, or a matrix in an open AnnData file, which is read in blocks.
    """
    return not what_is_wrong(matrix)


def what_is_wrong(matrix: Any) -> str:
    """Say what keeps a matrix, as :func:`holds_counts` takes it, from being counts; empty: nothing."""
    values = matrix["data"] if isinstance(matrix, h5py.Group) else matrix
    values = values.data if sparse.issparse(values) else values
    values = values if isinstance(values, h5py.Dataset) else np.asarray(values)
    if wrong := wrong_type(values):
        return wrong
    some = False
    height = max(1, BLOCK_ENTRIES // max(values.shape[1] if values.ndim == 2 else 1, 1))
    for start in range(0, values.shape[0], height):
        part = values[start : start + height]
        if not are_counts(part):
            return describe(part)
        some = some or bool(np.any(part > 0))
    return "" if some else "nothing but zeros"


def wrong_type(matrix: Any) -> str:
    """Say why values of the type of a matrix cannot be counts, looking at none; empty: they may be."""
    dtype = (matrix["data"] if isinstance(matrix, h5py.Group) else matrix).dtype
    if dtype.kind == "b":
        return "truth values"
    return "" if dtype.kind in "iuf" else f"values of type {dtype}"


def are_counts(values: np.ndarray) -> bool:
    """Tell whether all values are whole numbers and none is negative."""
    if values.size and values.min() < 0:
        return False
    if np.issubdtype(values.dtype, np.integer):
        return True
    return bool(np.all(np.isfinite(values)) and np.all(values == np.rint(values)))


def describe(values: np.ndarray) -> str:
    """Say in words what values are that :func:`are_counts` refuses."""
    values = np.asarray(values).ravel()
    wrong = ~np.isfinite(values)
    if wrong.any():
        return f"{int(wrong.sum())} values that are not finite, such as {values[wrong][0]}"
    if (values < 0).any():
        return f"negative values, such as {values[values < 0][0]:g}"
    broken = values[values != np.rint(values)]
    shown = f"fractions, such as {broken[0]:g}"
    if values.max() < LARGEST_LOGARITHM:
        return f"{shown}, and nothing above {values.max():.3g}: log-normalized, by the looks of it"
    return f"{shown}: normalized, by the looks of it"


def to_counts(matrix: Any) -> sparse.csr_matrix:
    """Return counts as canonical CSR float32 ``(cells, genes)``: sorted, no duplicates, no zeros.

    What is so already is returned as it is.
    """
    counts = sparse.csr_matrix(matrix, dtype=np.float32)
    if counts.has_canonical_format and counts.indices.dtype == counts.indptr.dtype and counts.data.all():
        return counts
    # Files written in blocks may hold indices of 32 and pointers of 64 bits, which scipy cannot mix.
    counts = sparse.csr_matrix((counts.data, counts.indices, counts.indptr), shape=counts.shape)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts

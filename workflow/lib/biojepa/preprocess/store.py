"""Write ``cells.h5ad`` a block of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

from biojepa.contracts import COUNTS_LAYER
from biojepa.files import atomic_path
from biojepa.raw.matrix import CHUNK, CompressedRows

# Level 1: a third of the size of level 0 at a tenth of the time of the default.
GZIP: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
# Values of one cell repeat as whole numbers of four bytes; indices only differ in their low bytes.
GZIP_INDICES: dict[str, Any] = {**GZIP, "shuffle": True}
SLOTS = ("obsm", "varm", "obsp", "varp")


class CellsFile:
    """An open ``cells.h5ad`` that grows by blocks of cells.

    Expression and counts have the same entries, so that their indices are written once and the two matrices
    share them (hard links).

    Parameters
    ----------
    file
        Open for writing, empty.
    shape
        Cells and genes.
    n_entries
        Entries of all cells together.
    """

    def __init__(self, file: h5py.File, shape: tuple[int, int], n_entries: int) -> None:
        self._file, self._shape, self._end = file, shape, 0
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "layers", {})
        chunks = {"chunks": (max(1, min(CHUNK, n_entries)),)}
        groups = [file.create_group(name) for name in ("X", f"layers/{COUNTS_LAYER}")]
        for group in groups:
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
            group.create_dataset("data", (n_entries,), dtype=np.float32, **chunks, **GZIP)
        self._values = [group["data"] for group in groups]
        self._indices = groups[0].create_dataset(
            "indices", (n_entries,), dtype=np.int32, **chunks, **GZIP_INDICES
        )
        self._lengths: list[np.ndarray] = []
        self._groups = groups

    def append(self, expression: sparse.csr_matrix, counts: sparse.csr_matrix) -> None:
        """Add cells: expression and counts with the same indices, sorted."""
        part = slice(self._end, self._end + expression.nnz)
        self._indices[part] = expression.indices
        for dataset, matrix in zip(self._values, (expression, counts), strict=True):
            dataset[part] = matrix.data
        self._lengths.append(np.diff(expression.indptr))
        self._end = part.stop

    def expression(self) -> CompressedRows:
        """Return the expression written so far, to be read in blocks, and complete the two matrices."""
        lengths = np.concatenate([[0], *self._lengths])
        # Readers refuse indices of 32 and pointers of 64 bits, unless they have to be so.
        dtype = np.int32 if self._end <= np.iinfo(np.int32).max else np.int64
        indptr = np.cumsum(lengths, dtype=np.int64).astype(dtype)
        self._groups[0].create_dataset("indptr", data=indptr, **GZIP_INDICES)
        for name in ("indices", "indptr"):
            self._groups[1][name] = self._groups[0][name]
        return CompressedRows(self._values[0], self._indices, indptr, self._shape, self._file.filename)

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, str]) -> None:
        """Write the tables; the file is whole then."""
        for name in SLOTS:
            write_elem(self._file, name, {})
        for name, table in (("obs", obs), ("var", var)):
            write_elem(self._file, name, table, dataset_kwargs=GZIP)
        write_elem(self._file, "uns", uns)


@contextmanager
def cells_file(path: str | Path, shape: tuple[int, int], n_entries: int) -> Iterator[CellsFile]:
    """Open ``cells.h5ad`` for writing; it appears under its name when the block ends without an error."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        yield CellsFile(file, shape, n_entries)

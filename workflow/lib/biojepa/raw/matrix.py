"""Matrices of cells × genes that are read a block of cells at a time.

Memory follows the block and not the file. Whoever adds up over blocks does it entry by entry in the order of
the file (``np.add.at``), so that no result depends on how large a block is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import h5py
import numpy as np
from scipy import sparse

from biojepa.errors import InputError

# Entries of a block: about 100 MB with all that is made of it. Smaller is no slower.
BLOCK_ENTRIES = 1 << 21
# Entries that are put in order in memory, at about 40 bytes each.
SORTED_ENTRIES = 1 << 23
CHUNK = 1 << 16
ENTRY = np.dtype([("row", "<i4"), ("column", "<i4"), ("value", "<f4")])

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]


class RowBlocks(Protocol):
    """A matrix ``(cells, genes)`` that is read in blocks of rows."""

    shape: tuple[int, int]

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield the first row of each block, and its rows; those without any ``wanted`` cell are spared."""
        ...


class CompressedRows:
    """CSR, in memory or in a file.

    Parameters
    ----------
    data, indices
        Arrays, or datasets of an open HDF5 file.
    indptr
        ``(cells + 1,)``, in memory.
    shape
        Cells and genes.
    where
        File, for messages.
    entries
        Most entries of a block; a row is never cut.

    Raises
    ------
    InputError
        When the three parts disagree, or while reading, when an entry lies beyond the genes.
    """

    def __init__(
        self,
        data: Any,
        indices: Any,
        indptr: np.ndarray,
        shape: tuple[int, int],
        where: str | Path = "the matrix",
        entries: int | None = None,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self._data, self._indices, self._indptr, self._where = data, indices, indptr, where
        self._entries = entries or BLOCK_ENTRIES
        require_pointers(indptr, len(data), len(indices), self.shape[0], "cell", where)

    @classmethod
    def of(cls, matrix: sparse.csr_matrix, entries: int | None = None) -> CompressedRows:
        """Read a matrix in memory."""
        return cls(matrix.data, matrix.indices, matrix.indptr, matrix.shape, entries=entries)

    @classmethod
    def in_file(cls, group: h5py.Group, where: str | Path, entries: int | None = None) -> CompressedRows:
        """Read a ``csr_matrix`` of an open AnnData file."""
        return cls(group["data"], group["indices"], group["indptr"][:], shape_of(group), where, entries)

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield blocks of at most ``entries`` entries, see :class:`RowBlocks`."""
        for first, end in spans(self._indptr, self._entries):
            if wanted is not None and not wanted[first:end].any():
                continue
            pointers = self._indptr[first : end + 1]
            part = slice(int(pointers[0]), int(pointers[-1]))
            indices = self._indices[part].astype(np.int32, copy=False)
            if len(indices) and not 0 <= indices.min() <= indices.max() < self.shape[1]:
                raise InputError(
                    self._where,
                    f"an index of {indices.min() if indices.min() < 0 else indices.max()} "
                    f"among cells {first} to {end - 1}",
                    f"0 to {self.shape[1] - 1}",
                    "the file is damaged: fetch it again",
                )
            local = (pointers - pointers[0]).astype(np.int32)
            shape = (end - first, self.shape[1])
            yield first, sparse.csr_matrix((self._data[part], indices, local), shape=shape)


class UnreadRows:
    """A matrix of which only the shape is known, where tables are all that is wanted."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = (int(shape[0]), int(shape[1]))

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Refuse: whoever asked for tables alone must not read counts."""
        raise ValueError("the counts of this screen were not opened; only its tables can be read")


class DenseRows:
    """A dense matrix, in memory or in a file; ``entries`` bounds cells × genes of a block."""

    def __init__(self, matrix: Any, entries: int | None = None) -> None:
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self._matrix = matrix
        rows = max(1, (entries or BLOCK_ENTRIES) // max(self.shape[1], 1))
        # Whole chunks, or each would be unpacked several times, unless they hold very many cells.
        tall = (getattr(matrix, "chunks", None) or (1,))[0]
        self._rows = -(-rows // tall) * tall if tall <= 16 * rows else rows

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield blocks of whole rows, see :class:`RowBlocks`."""
        for first in range(0, self.shape[0], self._rows):
            if wanted is None or wanted[first : first + self._rows].any():
                yield first, sparse.csr_matrix(self._matrix[first : first + self._rows])


class StackedRows:
    """Matrices of the same genes below each other: the cells of one sample after those of another."""

    def __init__(self, parts: Sequence[RowBlocks]) -> None:
        self._parts = list(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield the blocks of each part, see :class:`RowBlocks`."""
        start = 0
        for part in self._parts:
            end = start + part.shape[0]
            for first, block in part.blocks(None if wanted is None else wanted[start:end]):
                yield start + first, block
            start = end


class SelectedRows:
    """Some rows of a matrix, as if there were no others.

    Parameters
    ----------
    matrix
        All rows.
    keep
        ``(rows,)`` bool.
    """

    def __init__(self, matrix: RowBlocks, keep: np.ndarray) -> None:
        self._matrix, self._keep = matrix, np.asarray(keep, dtype=bool)
        # Place of each row among those that are kept.
        self._place = np.cumsum(self._keep) - self._keep
        self.shape = (int(self._keep.sum()), matrix.shape[1])

    def blocks(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield what is kept of each block, see :class:`RowBlocks`; blocks of which nothing is are spared."""
        asked = self._keep.copy()
        if wanted is not None:
            asked[self._keep] = wanted
        for first, block in self._matrix.blocks(asked):
            kept = self._keep[first : first + block.shape[0]]
            if kept.any():
                yield int(self._place[first]), block[np.flatnonzero(kept)]


def shape_of(group: h5py.Group) -> tuple[int, int]:
    """Return rows and columns of a sparse matrix in an AnnData file."""
    n_rows, n_columns = group.attrs["shape"]
    return int(n_rows), int(n_columns)


def spans(indptr: np.ndarray, entries: int) -> Iterator[tuple[int, int]]:
    """Cut compressed rows (or columns) into spans ``first, end`` of at most ``entries`` entries each.

    One that is longer by itself is a span of its own.
    """
    first, n = 0, len(indptr) - 1
    while first < n:
        end = int(np.searchsorted(indptr, indptr[first] + entries, side="right")) - 1
        end = min(max(end, first + 1), n, first + entries)
        yield first, end
        first = end


def take_rows(matrix: RowBlocks, rows: np.ndarray) -> sparse.csr_matrix:
    """Return some rows, sorted, of a matrix ``(len(rows), genes)``; blocks without any are not read."""
    wanted = np.zeros(matrix.shape[0], dtype=bool)
    wanted[rows] = True
    parts = [
        block[np.flatnonzero(wanted[first : first + block.shape[0]])]
        for first, block in matrix.blocks(wanted)
    ]
    if not parts:
        return sparse.csr_matrix((0, matrix.shape[1]), dtype=np.float32)
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def require_pointers(
    indptr: np.ndarray, n_values: int, n_indices: int, n_lines: int, line: str, where: str | Path
) -> None:
    """Stop where the parts of a compressed matrix disagree; scipy would leave out what no pointer reaches.

    Parameters
    ----------
    indptr
        Where each row, or column, starts, and the end ``(n_lines + 1,)``.
    n_values, n_indices
        Lengths of the other two parts.
    n_lines
        Rows or columns.
    line
        What one of them is: cell or gene.
    where
        File, for messages.

    Raises
    ------
    InputError
        When they disagree.
    """
    n_entries = int(indptr[-1]) if len(indptr) else -1
    if len(indptr) == n_lines + 1 and n_entries == n_values == n_indices:
        if indptr[0] == 0 and not (indptr[1:] < indptr[:-1]).any():
            return
        raise InputError(
            where,
            f"pointers of {line}s that do not rise from 0 to {n_entries}",
            f"a {line} to start where the one before it ends",
            "the file is damaged: fetch it again",
        )
    raise InputError(
        where,
        f"{n_values} values, {n_indices} indices and {'row' if line == 'cell' else 'column'} pointers to "
        f"{n_entries} for {n_lines} {line}s",
        f"as many of each, and a pointer for each {line}",
        "the file is damaged: fetch it again",
    )


def column_entries(group: h5py.Group, where: str | Path, entries: int | None = None) -> Iterator[Entries]:
    """Yield row, column and value of the entries of a ``csc_matrix`` in an open file, block by block.

    Raises
    ------
    InputError
        When its parts disagree.
    """
    indptr = group["indptr"][:]
    require_pointers(indptr, len(group["data"]), len(group["indices"]), shape_of(group)[1], "gene", where)
    for first, end in spans(indptr, entries or BLOCK_ENTRIES):
        pointers = indptr[first : end + 1]
        part = slice(int(pointers[0]), int(pointers[-1]))
        yield group["indices"][part], np.repeat(np.arange(first, end), np.diff(pointers)), group["data"][part]


def rows_from_entries(
    entries: Iterator[Entries],
    n_entries: int,
    shape: tuple[int, int],
    stack: ExitStack,
    scratch: str | Path | None,
    where: str | Path,
    most: int | None = None,
    block: int | None = None,
) -> CompressedRows:
    """Put entries that come in any order into rows.

    What is more than ``most`` entries goes through files: entries are dealt into ranges of rows, which are
    put in order one after the other. The files take 20 bytes for an entry, memory about ``40 * most``.

    Parameters
    ----------
    entries
        Row, column and value of entries, in blocks.
    n_entries
        How many there are, to choose the ranges by.
    shape
        Cells and genes.
    stack
        Closes and removes the temporary files when it ends; the matrix cannot be read after that.
    scratch
        Folder for a folder of temporary files; None: that of the system.
    where
        File that is read, for messages.
    most, block
        Entries that are put in order at a time, and of the blocks that are read later.

    Raises
    ------
    InputError
        When an entry lies outside the matrix.
    """
    n_ranges = min(max(1, -(-n_entries // (most or SORTED_ENTRIES))), max(shape[0], 1))
    height = max(1, -(-shape[0] // n_ranges))
    if n_ranges == 1:
        parts = [_packed(part, shape, where) for part in entries]
        merged = np.concatenate(parts) if parts else np.zeros(0, dtype=ENTRY)
        return CompressedRows.of(_rows_of(merged, 0, shape[0], shape[1]), block)
    folder = Path(stack.enter_context(TemporaryDirectory(prefix=".rows-", dir=scratch)))
    names = [folder / f"rows{number}.bin" for number in range(-(-shape[0] // height))]
    for part in entries:
        packed = _packed(part, shape, where)
        place = packed["row"] // height
        packed = packed[np.argsort(place, kind="stable")]
        ends = np.cumsum(np.bincount(place, minlength=len(names)))
        for number, piece in enumerate(np.split(packed, ends[:-1])):
            if len(piece):
                with names[number].open("ab") as bucket:
                    piece.tofile(bucket)
    file = stack.enter_context(h5py.File(folder / "rows.h5", "w"))
    growing: dict[str, Any] = {"maxshape": (None,), "chunks": (CHUNK,)}
    data = file.create_dataset("data", (0,), dtype=np.float32, **growing)
    indices = file.create_dataset("indices", (0,), dtype=np.int32, **growing)
    lengths = []
    for number, name in enumerate(names):
        packed = np.fromfile(name, dtype=ENTRY) if name.exists() else np.zeros(0, dtype=ENTRY)
        name.unlink(missing_ok=True)
        rows = _rows_of(packed, number * height, min((number + 1) * height, shape[0]), shape[1])
        lengths.append(np.diff(rows.indptr))
        end = len(data)
        for dataset, values in ((data, rows.data), (indices, rows.indices)):
            dataset.resize(end + len(values), axis=0)
            dataset[end:] = values
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    return CompressedRows(data, indices, indptr, shape, where, block)


def _packed(entries: Entries, shape: tuple[int, int], where: str | Path) -> np.ndarray:
    """Return entries as records, all of them inside the matrix."""
    rows, columns, values = entries
    for name, places, size in (("cell", rows, shape[0]), ("gene", columns, shape[1])):
        if len(places) and not 0 <= places.min() <= places.max() < size:
            raise InputError(
                where,
                f"an entry of {name} {places.min() if places.min() < 0 else places.max()} (counted from 0)",
                f"0 to {size - 1}",
                "the file is damaged: fetch it again",
            )
    packed = np.empty(len(rows), dtype=ENTRY)
    packed["row"], packed["column"], packed["value"] = rows, columns, values
    return packed


def _rows_of(packed: np.ndarray, first: int, end: int, n_columns: int) -> sparse.csr_matrix:
    """Return the entries of the rows from ``first`` to ``end`` as CSR; repeated ones are added."""
    places = (packed["row"] - np.int32(first), packed["column"])
    return sparse.csr_matrix((packed["value"], places), shape=(end - first, n_columns))

"""Guides that lie apart from the count matrix: their counts, or what somebody else called in each cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.errors import InputError
from biojepa.labels import is_missing
from biojepa.raw.counts import are_counts, describe, to_counts
from biojepa.raw.matrix import BLOCK_ENTRIES
from biojepa.raw.parts import Parts
from biojepa.raw.tables import (
    column_names,
    delimiter_of,
    key_column,
    match_barcodes,
    no_match,
    read_table,
    readable,
    require_column,
    require_file,
    sample_barcodes,
)
from biojepa.raw.tenx import FEATURE_TYPES, GUIDE_TYPE, MATRIX_FILES

FEATURE_CALL, CALL_UMIS, CALL_JOIN = "feature_call", "num_umis", "|"
GUIDE_COLUMNS = ("guide", "guide_id", "guide_identity", "sgRNA", "feature", "feature_call", "protospacer")
COUNT_COLUMNS = ("count", "counts", "umi_count", "UMI_count", "umis", "n_umis", "num_umis")

GuideMatrix = tuple[np.ndarray, sparse.csr_matrix, list[str]]
# Guides, cells and counts ``(cells, guides)``; None where counts were not asked for.
GuideTable = tuple[pd.Index, pd.Index, sparse.csr_matrix | None]


def read_guide_counts(
    path: str | Path,
    barcodes: pd.Index,
    open_matrix: Callable[[Path], Parts],
    with_samples: bool = False,
    tables_only: bool = False,
) -> tuple[np.ndarray, sparse.csr_matrix | None, list[str]]:
    """Read guide counts that lie in a file or folder of their own.

    Parameters
    ----------
    path
        A 10x matrix (folder, ``matrix.mtx`` with the files beside it, or HDF5), a table with one row for
        each cell and guide (columns ``barcode``, ``guide`` and ``count``, or their usual other names), or a
        table of cells × guides or of guides × cells; CSV or TSV, by its name.
    barcodes
        Cells of the screen.
    open_matrix
        How a 10x matrix is opened.
    with_samples
        Whether barcodes start with the name of a sample.
    tables_only
        Whether to read the names of guides and cells and no count.

    Returns
    -------
    Names of the guides; counts ``(len(barcodes), guides)`` CSR float32, zero for a cell that the file lacks,
    or None with ``tables_only``; notes.

    Raises
    ------
    InputError
        When the file cannot be read, holds no counts, or shares no cell with the screen.
    """
    path = Path(path)
    if path.is_dir() or path.name.endswith((".h5", *MATRIX_FILES)):
        parts = open_matrix(path)
        names, cells, counts = _of_matrix(parts, tables_only)
    else:
        require_file(path, "guide_counts")
        names, cells, counts = _of_table(path, barcodes, with_samples, tables_only)
    _require_unique(names, f"{path}, guides")
    _require_unique(cells, f"{path}, barcodes")
    places, note = match_barcodes(barcodes, cells)
    found = places >= 0
    if not found.any():
        raise no_match(path, "barcode", barcodes, cells)
    notes = [f"guide counts of {len(names)} guides taken from {path.name}"]
    if note:
        notes.append(f"{note} with those of {path.name}")
    if lost := len(barcodes) - int(found.sum()):
        notes.append(f"{lost} of {len(barcodes)} cells have no guide counts in {path.name}: no guide")
    if other := len(cells) - int(found.sum()):
        notes.append(f"{other} of {len(cells)} barcodes of {path.name} are no cell of the screen")
    guides = names.to_numpy(dtype=object)
    if counts is None:
        return guides, None, notes
    take = sparse.csr_matrix(
        (np.ones(int(found.sum()), dtype=np.float32), (np.flatnonzero(found), places[found])),
        shape=(len(barcodes), len(cells)),
    )
    return guides, to_counts(take @ counts), notes


def _of_matrix(parts: Parts, tables_only: bool) -> GuideTable:
    """Return guides, cells and counts of a 10x matrix: its guides, or all features where it has no types."""
    types = parts.var[FEATURE_TYPES] if FEATURE_TYPES in parts.var else pd.Series(dtype=str)
    guides = np.flatnonzero(types == GUIDE_TYPE)
    columns = guides if len(guides) else np.arange(len(parts.var))
    names = pd.Index(parts.var.index[columns].astype(str)), pd.Index(parts.obs.index.astype(str))
    if tables_only:
        return *names, None
    blocks = [to_counts(block)[:, columns] for _, block in parts.counts.blocks()]
    return *names, sparse.csr_matrix(sparse.vstack(blocks, format="csr"))


def _of_table(path: Path, barcodes: pd.Index, with_samples: bool, tables_only: bool) -> GuideTable:
    """Return guides, cells and counts of a table, read a part at a time."""
    header = column_names(path, "guide_counts")
    guide = next((name for name in GUIDE_COLUMNS if name in header), "")
    count = next((name for name in COUNT_COLUMNS if name in header), "")
    without_counts = [name for name in header if name != count] if guide and count else header[:1]
    chunks = _chunks(path, header, without_counts if tables_only else None)
    first = next(chunks, None)
    if first is None or first.empty:
        raise InputError(path, "no rows", "counts of guides", "name another file in `guide_counts`")
    if guide and count:
        return _of_long_table(path, first, chunks, guide, "" if tables_only else count, with_samples)
    names: list[str] = []
    others = pd.Index(header[1:])
    parts = []
    for chunk in (first, *chunks):
        names.extend(chunk.iloc[:, 0].astype(str))
        if not tables_only:
            parts.append(sparse.csr_matrix(_numbers(chunk.iloc[:, 1:], path)))
    counts = None if tables_only else sparse.csr_matrix(sparse.vstack(parts, format="csr"))
    rows = pd.Index(names)
    # Whether cells are rows or columns, only their barcodes tell.
    in_rows, in_columns = (int((match_barcodes(barcodes, side)[0] >= 0).sum()) if side.is_unique else 0
                           for side in (rows, others))  # fmt: skip
    if in_columns > in_rows:
        return rows, others, None if counts is None else sparse.csr_matrix(counts.T)
    return others, rows, counts


def _chunks(path: Path, header: list[str], wanted: list[str] | None) -> Iterator[pd.DataFrame]:
    """Yield the wanted columns, None for all, of the rows of a table, in parts."""
    with readable(path):
        yield from pd.read_csv(
            path,
            sep=delimiter_of(path),
            encoding="utf-8-sig",
            keep_default_na=False,
            header=0,
            names=header,
            index_col=False,
            usecols=wanted,
            chunksize=max(1, BLOCK_ENTRIES // len(header)),
        )


def _of_long_table(
    path: Path,
    first: pd.DataFrame,
    rest: Iterator[pd.DataFrame],
    guide: str,
    count: str,
    with_samples: bool,
) -> GuideTable:
    """Return guides, cells and counts of a table of rows for cell and guide; ``count`` may be none."""
    key = key_column(first)
    places: tuple[dict[str, int], dict[str, int]] = ({}, {})
    entries: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = ([], [], [])
    for chunk in (first, *rest):
        cells = sample_barcodes(chunk, key, with_samples)
        for labels, known, part in zip((cells, chunk[guide].astype(str)), places, entries[:2], strict=True):
            codes, distinct = pd.factorize(np.asarray(labels, dtype=object))
            part.append(np.array([known.setdefault(name, len(known)) for name in distinct])[codes])
        if count:
            entries[2].append(_numbers(chunk[[count]], path).ravel())
    names = pd.Index(list(places[1])), pd.Index(list(places[0]))
    if not count:
        return *names, None
    cell, column, value = (np.concatenate(part) for part in entries)
    return *names, sparse.csr_matrix((value, (cell, column)), shape=(len(places[0]), len(places[1])))


def _numbers(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Return counts ``(rows, columns)`` float32, or say what is none."""
    for column in table.columns:
        if table[column].dtype.kind not in "iuf":
            words = pd.to_numeric(table[column], errors="coerce").isna()
            word = str(table.loc[words, column].iloc[0]) if words.any() else "truth values"
            raise InputError(f"{path}, column {column!r}", repr(word), "a count", "correct the value")
    values = table.to_numpy(dtype=np.float64)
    if not are_counts(values):
        raise InputError(path, describe(values), "whole numbers of 0 or more", "use raw UMI counts of guides")
    return values.astype(np.float32)


def read_guide_calls(path: str | Path, barcodes: pd.Index, with_samples: bool = False) -> GuideMatrix:
    """Read Cell Ranger's ``protospacer_calls_per_cell.csv``, or a table of that form.

    Columns are ``cell_barcode``, ``feature_call`` (guides joined by ``|``) and, where there, ``num_umis``
    (their UMIs, joined in the same way). Cells with no guide are not in the table, or have no call in it.
    https://www.10xgenomics.com/support/software/cell-ranger/latest/analysis/outputs/cr-crispr-overview

    Parameters
    ----------
    path
        CSV or TSV.
    barcodes
        Cells of the screen.
    with_samples
        Whether they start with the name of a sample.

    Returns
    -------
    Names of the guides; UMIs of called guides ``(len(barcodes), guides)`` CSR float32, all NaN where
    the table has no UMIs; notes.

    Raises
    ------
    InputError
        When the table cannot be read, a barcode is there twice, or none is a cell of the screen.
    """
    path = Path(path)
    # One row without a call would make decimals of all numbers of UMIs.
    table = read_table(path, "guide_calls", text=(FEATURE_CALL, CALL_UMIS))
    calls = require_column(table, FEATURE_CALL, path, "guide_calls")
    key = key_column(table)
    index = sample_barcodes(table, key, with_samples)
    _require_unique(index, f"{path}, column {key!r}")
    places, note = match_barcodes(barcodes, index)
    if not (places >= 0).any():
        raise no_match(path, key, barcodes, index)
    rows: list[int] = []
    guides: list[str] = []
    umis: list[float] = []
    with_umis = CALL_UMIS in table.columns
    given = calls.to_numpy(dtype=object)
    numbers = table[CALL_UMIS].astype(str).to_numpy(dtype=object) if with_umis else given
    for cell, place in zip(np.flatnonzero(places >= 0), places[places >= 0], strict=True):
        if is_missing(given[place]):
            continue
        names = str(given[place]).split(CALL_JOIN)
        values = numbers[place].split(CALL_JOIN) if with_umis else []
        if with_umis and (len(values) != len(names) or not all(value.strip().isdigit() for value in values)):
            raise InputError(
                f"{path}, cell {index[place]!r}",
                f"{len(names)} guides and {CALL_UMIS} {numbers[place]!r}",
                "a whole number for each guide, joined by |",
                "correct the row, or fetch the file again",
            )
        rows.extend([int(cell)] * len(names))
        guides.extend(name.strip() for name in names)
        umis.extend([max(int(value), 1) for value in values] if with_umis else [math.nan] * len(names))
    distinct, codes = np.unique(np.array(guides, dtype=object), return_inverse=True)
    shape = (len(barcodes), len(distinct))
    called = sparse.csr_matrix((np.array(umis, dtype=np.float32), (rows, codes)), shape=shape)
    notes = [f"guides of {len(np.unique(rows))} of {len(barcodes)} cells taken from {path.name}"]
    if not with_umis:
        notes.append(f"no column {CALL_UMIS} in {path.name}: guide UMIs of the cells are not known")
    if note:
        notes.append(f"{note} with those of {path.name}")
    if other := len(index) - int((places >= 0).sum()):
        notes.append(f"{other} of {len(index)} barcodes of {path.name} are no cell of the screen")
    return distinct, called, notes


def _require_unique(names: Sequence[str] | pd.Index, where: str) -> None:
    index = pd.Index(names)
    if index.has_duplicates:
        twice = index[index.duplicated()]
        raise InputError(
            where,
            f"{twice.nunique()} more than once, such as {twice[0]!r}",
            "each one once",
            "rename or remove the repeated ones",
        )

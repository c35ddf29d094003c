"""Read an AnnData file, in any of the shapes it has in the wild."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import pandas as pd
from anndata.io import read_elem

from biojepa.errors import InputError
from biojepa.raw.counts import to_counts, what_is_wrong, wrong_type
from biojepa.raw.matrix import CompressedRows, DenseRows, RowBlocks, UnreadRows, column_entries, shape_of
from biojepa.raw.parts import Parts, Reading, open_hdf5
from biojepa.raw.source import ScreenSource


def open_h5ad(path: Path, source: ScreenSource, how: Reading) -> Parts:
    """Open an AnnData file and find its raw counts."""
    if path.is_dir():
        raise InputError(path, "a folder", "an .h5ad file", "set `format` to 10x_mtx, or `path` to the file")
    file = open_hdf5(path, how)
    missing = {"obs", "var"} - set(file)
    if missing:
        raise InputError(
            path,
            f"an HDF5 file without {' and '.join(sorted(missing))}, so not an AnnData",
            "an .h5ad file",
            "leave `format` empty, so that the reader looks at what it is",
        )
    if _is_current(file):
        places, obs = _places_in_file(file), read_elem(file["obs"])
    else:
        # Backed, tables are read and the matrix is not.
        screen = ad.read_h5ad(path, backed="r" if how.tables_only else None)
        if how.tables_only:
            how.stack.callback(screen.file.close)
        places, obs = _places_in_memory(screen), screen.obs.copy()
    notes: list[str] = []
    where, matrix, var = _raw_counts(places, path, source.counts_layer, how.tables_only)
    others = [name for name, (one, _) in places.items() if name != where and not wrong_type(one)]
    if how.tables_only and not source.counts_layer and others:
        notes.append(
            f"raw counts are looked for in {where} first, then in {', '.join(others)}, when values are read"
        )
    elif where != "X":
        notes.append(f"raw counts taken from {where}")
    return Parts(_rows_in(matrix, path, how), obs, var().copy(), notes)


Places = dict[str, tuple[Any, Callable[[], pd.DataFrame]]]


def _is_current(file: h5py.File) -> bool:
    """Tell whether tables and sparse matrices say how they are encoded, as anndata writes them since 0.7."""
    matrices = [file["X"]] if "X" in file else []
    matrices += list(file["layers"].values()) if "layers" in file else []
    tables = [file["obs"], file["var"]]
    if "raw" in file:
        if not {"X", "var"} <= set(file["raw"]):
            return False
        matrices, tables = [*matrices, file["raw/X"]], [*tables, file["raw/var"]]
    described = [*tables, *(matrix for matrix in matrices if isinstance(matrix, h5py.Group))]
    kinds = {matrix.attrs.get("encoding-type") for matrix in matrices if isinstance(matrix, h5py.Group)}
    return all("encoding-type" in slot.attrs for slot in described) and kinds <= {"csr_matrix", "csc_matrix"}


def _places_in_file(file: h5py.File) -> Places:
    """Return the matrices of an open file, unread, and how to read the table of their genes."""

    def genes() -> pd.DataFrame:
        return read_elem(file["var"])

    places: Places = {"X": (file["X"], genes)} if "X" in file else {}
    for name in _layers_in_order(file.get("layers", {})):
        places[name] = (file["layers"][name], genes)
    if "raw" in file:
        places["raw"] = (file["raw/X"], lambda: read_elem(file["raw/var"]))
    return places


def _places_in_memory(screen: ad.AnnData) -> Places:
    """Return the matrices of a screen in memory, and the table of their genes."""
    places: Places = {"X": (screen.X, lambda: screen.var)} if screen.X is not None else {}
    for name in _layers_in_order(screen.layers):
        places[name] = (screen.layers[name], lambda: screen.var)
    if screen.raw is not None:
        places["raw"] = (screen.raw.X, lambda: screen.raw.var)
    return places


def _layers_in_order(layers: Iterable[str]) -> list[str]:
    return sorted(layers, key=lambda name: (name != "counts", name))


def _raw_counts(
    places: Places, path: Path, layer: str, tables_only: bool = False
) -> tuple[str, Any, Callable[[], pd.DataFrame]]:
    """Return where the raw counts are, the matrix, and how to read the table of its genes."""
    look = wrong_type if tables_only else what_is_wrong
    listed = ", ".join(repr(name) for name in places)
    if layer and layer not in places:
        raise InputError(
            path,
            f"no {layer!r} (there are: {listed})",
            "the place named by `counts_layer`",
            "set `counts_layer` to one of them",
        )
    wrong = {}
    for name in [layer] if layer else places:
        matrix, var = places[name]
        wrong[name] = look(matrix)
        if not wrong[name]:
            return name, matrix, var
    fractions = all("fractions" in found for found in wrong.values())
    seen = "; ".join(f"{name}: {found}" for name, found in wrong.items()) or "the file has no matrix"
    raise InputError(
        path,
        f"{'non-integer counts where raw counts are needed' if fractions else 'no raw counts'} ({seen})",
        "whole numbers of 0 or more: UMI counts before normalization",
        "point `counts_layer` at the raw counts, or use the file with raw counts",
    )


def _rows_in(matrix: Any, path: Path, how: Reading) -> RowBlocks:
    """Return a matrix, in memory or in a file, as blocks of rows."""
    if how.tables_only:
        return UnreadRows(shape_of(matrix) if isinstance(matrix, h5py.Group) else matrix.shape)
    if isinstance(matrix, h5py.Group):
        if matrix.attrs["encoding-type"] == "csc_matrix":
            return how.in_rows(
                column_entries(matrix, path, how.entries), len(matrix["data"]), shape_of(matrix), path
            )
        return CompressedRows.in_file(matrix, path, how.entries)
    if isinstance(matrix, h5py.Dataset):
        return DenseRows(matrix, how.entries)
    return CompressedRows.of(to_counts(matrix), how.entries)

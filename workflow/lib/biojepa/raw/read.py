"""From a file or folder to counts of genes, counts of guides and a table of cells."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from anndata.utils import make_index_unique
from scipy import sparse
from scipy.io import mminfo, mmread

from biojepa.contracts import GENE_ID
from biojepa.errors import InputError
from biojepa.raw.matrix import (
    BLOCK_ENTRIES,
    CompressedRows,
    DenseRows,
    Entries,
    RowBlocks,
    column_entries,
    rows_from_entries,
    shape_of,
    take_rows,
)
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import read_cell_metadata

GUIDE_COUNTS, GUIDE_NAMES, NOTES = "guide_counts", "guide_names", "notes"
FEATURE_TYPES = "feature_types"
GENE_TYPE, GUIDE_TYPE = "Gene Expression", "CRISPR Guide Capture"
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol", "feature_name")
GENE_ID_COLUMNS = (GENE_ID, "gene_ids", "ensembl_id", "ensemble_id", "ensembl", "feature_id")
ENSEMBL = r"^ENS[A-Z]*G\d+"


@dataclass
class RawScreen:
    """A screen whose counts are read a block of cells at a time.

    Parameters
    ----------
    counts
        Raw counts of all features of the file ``(cells, features)``.
    obs
        All columns of the file and of ``cell_metadata``.
    var
        Genes: unique symbols with ``gene_id``.
    genes, guides
        Positions of genes and of guides among the features; None: all features are genes.
    guide_names
        Names of the guides; None where the file has none.
    guide_counts
        ``(cells, guides)`` CSR where they lie apart from the genes.
    notes
        What had to be decided on the way.
    """

    counts: RowBlocks
    obs: pd.DataFrame
    var: pd.DataFrame
    genes: np.ndarray | None = None
    guides: np.ndarray | None = None
    guide_names: np.ndarray | None = None
    guide_counts: sparse.csr_matrix | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, screen: ad.AnnData, entries: int | None = None) -> RawScreen:
        """Read a screen in memory, as :func:`read_screen` returns it, in blocks of ``entries`` entries."""
        guides = screen.obsm.get(GUIDE_COUNTS)
        return cls(
            CompressedRows.of(to_counts(screen.X), entries),
            screen.obs,
            screen.var,
            guide_names=None if guides is None else np.asarray(screen.uns[GUIDE_NAMES], dtype=object),
            guide_counts=None if guides is None else sparse.csr_matrix(guides),
            notes=[str(note) for note in screen.uns.get(NOTES, [])],
        )

    @property
    def n_cells(self) -> int:
        """Cells of the file."""
        return len(self.obs)

    def blocks(
        self, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[int, sparse.csr_matrix, sparse.csr_matrix | None]]:
        """Yield the first cell of a block, its counts of genes, and those of guides where there are any.

        Both are canonical CSR float32. ``wanted`` ``(cells,)`` spares blocks without any such cell.
        """
        for first, block in self.counts.blocks(wanted):
            features = to_counts(block)
            genes = features if self.genes is None else features[:, self.genes]
            if self.guides is not None:
                yield first, genes, features[:, self.guides]
            elif self.guide_counts is not None:
                yield first, genes, self.guide_counts[first : first + features.shape[0]]
            else:
                yield first, genes, None

    def take(self, cells: np.ndarray) -> sparse.csr_matrix:
        """Return the counts of genes of some cells, in their sorted order, ``(len(cells), genes)``."""
        features = to_counts(take_rows(self.counts, cells))
        return features if self.genes is None else features[:, self.genes]


def read_screen(source: ScreenSource) -> ad.AnnData:
    """Read a screen into memory, for screens that fit; the pipeline uses :func:`open_screen`.

    Returns
    -------
    anndata.AnnData
        ``X`` raw counts ``(cells, genes)``, CSR float32; ``obs`` all columns of the file and of
        ``cell_metadata``; ``var`` unique gene symbols with ``gene_id``; where the file has guide
        features, ``obsm["guide_counts"]`` ``(cells, guides)`` CSR and ``uns["guide_names"]``;
        ``uns["notes"]`` what had to be decided on the way.

    Raises
    ------
    InputError
        When the file is missing or damaged, has no raw counts, or disagrees with its tables.
    """
    with open_screen(source) as opened:
        parts = [(genes, guides) for _, genes, guides in opened.blocks()]
    counts = sparse.csr_matrix(sparse.vstack([genes for genes, _ in parts], format="csr"))
    screen = ad.AnnData(X=counts, obs=opened.obs, var=opened.var)
    if opened.guide_names is not None:
        guides = sparse.vstack([guides for _, guides in parts], format="csr")
        screen.obsm[GUIDE_COUNTS] = sparse.csr_matrix(guides)
        screen.uns[GUIDE_NAMES] = opened.guide_names
    screen.uns[NOTES] = opened.notes
    return screen


@contextmanager
def open_screen(
    source: ScreenSource,
    scratch: str | Path | None = None,
    entries: int | None = None,
    most: int | None = None,
) -> Iterator[RawScreen]:
    """Open a screen of any size: its tables are read, its counts stay in the file.

    A CSR or dense matrix of an ``.h5ad`` is read in blocks of cells where it lies. A CSC matrix and a
    ``matrix.mtx``, in which the counts of a cell are scattered, are put into rows once, through temporary
    files. In memory are read: files in the layout that anndata wrote before version 0.7, and a
    ``matrix.mtx`` that is not a general coordinate matrix of numbers.

    Parameters
    ----------
    source
        What the file is.
    scratch
        Folder for temporary files, up to 20 bytes for an entry of the matrix; None: that of the system.
    entries
        Entries of a block; nothing that is read depends on it.
    most
        Entries that are put into rows at a time.

    Yields
    ------
    RawScreen
        Usable until the block ends.

    Raises
    ------
    InputError
        When the file is missing or damaged, has no raw counts, or disagrees with its tables.
    """
    path = Path(source.path)
    if not path.exists():
        raise InputError(
            path, "nothing there", "the raw data of the screen", "correct `source` in the dataset table"
        )
    with ExitStack() as stack:
        how = Reading(stack, scratch, entries, most)
        open_file = _open_10x if _format_of(source) == "10x_mtx" else _open_h5ad
        counts, obs, var, notes = open_file(path, source, how)
        if 0 in counts.shape:
            raise InputError(
                path,
                f"a matrix of shape {counts.shape}",
                "at least one cell and one gene",
                "use another file",
            )
        if counts.shape != (len(obs), len(var)):
            raise InputError(
                path,
                f"a matrix of {counts.shape[0]} cells × {counts.shape[1]} features, "
                f"and tables of {len(obs)} cells and {len(var)} features",
                "as many of each",
                "the file is damaged: fetch it again",
            )
        obs = _with_unique_barcodes(obs, source, notes)
        if source.cell_metadata:
            table = read_cell_metadata(source.cell_metadata, list(obs.index))
            obs = pd.concat([obs.drop(columns=[c for c in obs.columns if c in table.columns]), table], axis=1)
        yield _split_features(counts, obs, var, path, notes)


@dataclass
class Reading:
    """How large matrices are read: what is closed at the end, where temporary files go, sizes of blocks."""

    stack: ExitStack
    scratch: str | Path | None
    entries: int | None
    most: int | None

    def in_rows(
        self, entries: Iterator[Entries], n_entries: int, shape: tuple[int, int], where: Path
    ) -> CompressedRows:
        """Put entries in any order into rows."""
        return rows_from_entries(
            entries, n_entries, shape, self.stack, self.scratch, where, self.most, self.entries
        )


def _format_of(source: ScreenSource) -> str:
    path = Path(source.path)
    if source.format != "auto":
        return source.format
    if path.is_dir():
        return "10x_mtx"
    if path.suffix == ".h5ad":
        return "h5ad"
    raise InputError(
        path,
        "a file that is no .h5ad",
        "an .h5ad file or a 10x folder",
        "convert it, or set `format` in the dataset table",
    )


Parts = tuple[RowBlocks, pd.DataFrame, pd.DataFrame, list[str]]


def _open_h5ad(path: Path, source: ScreenSource, how: Reading) -> Parts:
    """Open an AnnData file and find its raw counts."""
    if path.is_dir():
        raise InputError(path, "a folder", "an .h5ad file", "set `format` to 10x_mtx, or `path` to the file")
    try:
        file = how.stack.enter_context(h5py.File(path))
    except OSError as error:
        raise InputError(
            path,
            f"a file that HDF5 cannot open ({error})",
            "a complete .h5ad file",
            "delete it and download it again",
        ) from error
    missing = {"obs", "var"} - set(file)
    if missing:
        raise InputError(
            path,
            f"an HDF5 file without {' and '.join(sorted(missing))}, so not an AnnData",
            "an .h5ad file",
            "convert it with scanpy, for example sc.read_10x_h5(…).write_h5ad(…)",
        )
    if _is_current(file):
        places, obs = _places_in_file(file), read_elem(file["obs"])
    else:
        screen = ad.read_h5ad(path)
        places, obs = _places_in_memory(screen), screen.obs.copy()
    notes: list[str] = []
    where, matrix, var = _raw_counts(places, path, source.counts_layer)
    if where != "X":
        notes.append(f"raw counts taken from {where}")
    return _rows_in(matrix, path, how), obs, var().copy(), notes


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


def _raw_counts(places: Places, path: Path, layer: str) -> tuple[str, Any, Callable[[], pd.DataFrame]]:
    """Return where the raw counts are, the matrix, and how to read the table of its genes."""
    listed = ", ".join(repr(name) for name in places)
    if layer and layer not in places:
        raise InputError(
            path,
            f"no {layer!r} (there are: {listed})",
            "the place named by `counts_layer`",
            "set `counts_layer` to one of them",
        )
    for name in [layer] if layer else places:
        matrix, var = places[name]
        if holds_counts(matrix):
            return name, matrix, var
    raise InputError(
        path,
        f"non-integer counts where raw counts are needed (looked at {layer or listed})",
        "whole numbers of 0 or more: UMI counts before normalization",
        "point `counts_layer` at the raw counts, or use the file with raw counts",
    )


def _rows_in(matrix: Any, path: Path, how: Reading) -> RowBlocks:
    """Return a matrix, in memory or in a file, as blocks of rows."""
    if isinstance(matrix, h5py.Group):
        if matrix.attrs["encoding-type"] == "csc_matrix":
            return how.in_rows(
                column_entries(matrix, how.entries), len(matrix["data"]), shape_of(matrix), path
            )
        return CompressedRows.in_file(matrix, path, how.entries)
    if isinstance(matrix, h5py.Dataset):
        return DenseRows(matrix, how.entries)
    return CompressedRows.of(to_counts(matrix), how.entries)


def holds_counts(matrix: Any) -> bool:
    """Tell whether a matrix ``(cells, genes)`` holds whole numbers, none negative, some positive.

    It may be an array, a scipy matrix, or a matrix in an open AnnData file, which is read in blocks.
    """
    values = matrix["data"] if isinstance(matrix, h5py.Group) else matrix
    values = values.data if sparse.issparse(values) else values
    values = values if isinstance(values, h5py.Dataset) else np.asarray(values)
    if values.dtype == bool:
        return False
    some = False
    height = max(1, BLOCK_ENTRIES // (values.shape[1] if values.ndim == 2 else 1))
    for start in range(0, values.shape[0], height):
        part = values[start : start + height]
        if not are_counts(part):
            return False
        some = some or bool(np.any(part > 0))
    return some


def are_counts(values: np.ndarray) -> bool:
    """Tell whether all values are whole numbers and none is negative."""
    if values.size and values.min() < 0:
        return False
    if np.issubdtype(values.dtype, np.integer):
        return True
    return bool(np.all(np.isfinite(values)) and np.all(values == np.rint(values)))


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


def _open_10x(folder: Path, source: ScreenSource, how: Reading) -> Parts:
    """Open the feature-barcode matrix folder of Cell Ranger (version 3, or 2 with genes.tsv)."""
    if not folder.is_dir():
        raise InputError(
            folder,
            "a file",
            "a folder with matrix.mtx, features.tsv and barcodes.tsv",
            "set `source` to the folder",
        )
    matrix_path = _member(folder, "matrix.mtx")
    features_path = _member(folder, "features.tsv", "genes.tsv")
    barcodes_path = _member(folder, "barcodes.tsv")
    try:
        n_features, n_barcodes, n_entries, *kind = mminfo(matrix_path)
        features = pd.read_csv(features_path, sep="\t", header=None, dtype=str, keep_default_na=False)
        barcodes = pd.read_csv(barcodes_path, sep="\t", header=None, dtype=str, keep_default_na=False)[0]
        if (n_features, n_barcodes) != (len(features), len(barcodes)):
            raise InputError(
                matrix_path,
                f"{n_features} × {n_barcodes} in the matrix, {len(features)} rows in "
                f"{features_path.name} and {len(barcodes)} in {barcodes_path.name}",
                "one row per feature and one column per barcode",
                "use the three files of the same run",
            )
        counts: RowBlocks
        if kind[0] == "coordinate" and kind[1] in ("integer", "real") and kind[2] == "general":
            entries = _mtx_entries(matrix_path, n_entries, how.entries)
            counts = how.in_rows(entries, n_entries, (n_barcodes, n_features), matrix_path)
        else:
            matrix = sparse.csr_matrix(sparse.coo_matrix(mmread(matrix_path)).T)
            if not holds_counts(matrix):
                raise _no_counts(matrix_path)
            counts = CompressedRows.of(to_counts(matrix), how.entries)
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(
            folder,
            f"a file that cannot be read ({error})",
            "the three complete files of a 10x folder",
            "fetch them again",
        ) from error
    var = pd.DataFrame(
        {GENE_ID: features[0].to_numpy()}, index=features[min(1, features.shape[1] - 1)].to_numpy()
    )
    if features.shape[1] > 2:
        var[FEATURE_TYPES] = features[2].to_numpy()
    return counts, pd.DataFrame(index=pd.Index(barcodes.to_numpy())), var, []


def _mtx_entries(path: Path, n_entries: int, entries: int | None) -> Iterator[Entries]:
    """Yield barcode, feature and count of the entries of a coordinate matrix, block by block.

    Raises
    ------
    InputError
        When a count is no count, or none is positive.
    ValueError
        When the file has another number of entries than its header says.
    """
    found, some = 0, False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            if not line.startswith(b"%") and line.strip():
                break
        blocks = pd.read_csv(
            file,
            sep=r"\s+",
            header=None,
            names=["feature", "barcode", "count"],
            dtype={"feature": np.int64, "barcode": np.int64, "count": np.float64},
            chunksize=entries or BLOCK_ENTRIES,
        )
        for block in blocks:
            values = block["count"].to_numpy()
            if not are_counts(values):
                raise _no_counts(path)
            some, found = some or bool(values.any()), found + len(block)
            yield block["barcode"].to_numpy() - 1, block["feature"].to_numpy() - 1, values
    if found != n_entries:
        raise ValueError(f"{found} entries in {path.name}, whose header says {n_entries}")
    if not some:
        raise _no_counts(path)


def _no_counts(path: Path) -> InputError:
    """Build the error for a matrix of a 10x folder that holds no counts."""
    return InputError(
        path,
        "non-integer counts where raw counts are needed",
        "whole numbers of 0 or more",
        "use the raw or filtered feature-barcode matrix, not a normalized one",
    )


def _member(folder: Path, *names: str) -> Path:
    """Return the file of a 10x folder, plain or gzipped, with or without a prefix (as on GEO)."""
    found = sorted(
        {path for name in names for path in [*folder.glob(f"*{name}"), *folder.glob(f"*{name}.gz")]}
    )
    if len(found) != 1:
        raise InputError(
            folder,
            f"{len(found)} files that end in {' or '.join(names)} (or .gz)"
            + (f": {', '.join(path.name for path in found)}" if found else ""),
            "exactly one",
            "put the three files of one run into a folder of their own",
        )
    return found[0]


def _with_unique_barcodes(obs: pd.DataFrame, source: ScreenSource, notes: list[str]) -> pd.DataFrame:
    obs.index = obs.index.astype(str)
    twice = int(obs.index.duplicated().sum())
    if not twice:
        return obs
    if source.cell_metadata:
        raise InputError(
            source.path,
            f"{twice} repeated barcodes, such as {obs.index[obs.index.duplicated()][0]!r}",
            "unique barcodes, because cell_metadata is joined by them",
            "add the sample or lane to the barcodes in both files",
        )
    notes.append(f"{twice} repeated barcodes got a number")
    obs.index = make_index_unique(obs.index)
    return obs


def _split_features(
    counts: RowBlocks, obs: pd.DataFrame, var: pd.DataFrame, path: Path, notes: list[str]
) -> RawScreen:
    """Tell genes from guides by ``feature_types`` and name the genes by unique symbols."""
    types = (
        var[FEATURE_TYPES].astype(str).to_numpy() if FEATURE_TYPES in var else np.full(len(var), GENE_TYPE)
    )
    is_gene, is_guide = types == GENE_TYPE, types == GUIDE_TYPE
    if not is_gene.any():
        raise InputError(
            f"{path}, {FEATURE_TYPES}",
            f"only {', '.join(sorted(set(types)))}",
            f"some {GENE_TYPE!r}",
            "correct the features",
        )
    for other in sorted(set(types[~is_gene & ~is_guide])):
        notes.append(f"{int((types == other).sum())} features of type {other!r} left out")
    screen = RawScreen(counts, obs, gene_names(var.loc[is_gene], notes), notes=notes)
    if not is_gene.all():
        screen.genes = np.flatnonzero(is_gene)
    if is_guide.any():
        names = var.index.astype(str)[is_guide]
        if names.has_duplicates:
            raise InputError(
                path,
                f"guide {names[names.duplicated()][0]!r} more than once",
                "unique guide names",
                "rename the guides",
            )
        screen.guides, screen.guide_names = np.flatnonzero(is_guide), names.to_numpy(dtype=object)
    return screen


def gene_names(var: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the table of genes: unique symbols as index and the column ``gene_id``.

    An index of Ensembl ids is replaced by a symbol column where there is one; a gene without a
    symbol keeps its id. A repeated symbol gets a number (``A``, ``A-1``), with a note.
    """
    index = pd.Index(var.index.astype(str))
    given = next((column for column in GENE_ID_COLUMNS if column in var), None)
    identifiers = index.to_numpy() if given is None else var[given].astype(str).to_numpy()
    symbols = index.to_numpy(dtype=object)
    column = next((column for column in SYMBOL_COLUMNS if column in var), None)
    if column and index.str.match(ENSEMBL).mean() > 0.5:
        named = var[column].astype(object).where(var[column].notna(), "").astype(str).str.strip().to_numpy()
        identifiers, symbols = index.to_numpy(), np.where(named == "", symbols, named)
        notes.append(f"gene symbols taken from column {column!r} of var")
    unique = pd.Index(symbols.astype(str))
    if unique.has_duplicates:
        notes.append(f"{int(unique.duplicated().sum())} repeated gene symbols got a number")
        unique = make_index_unique(unique)
    return pd.DataFrame({GENE_ID: identifiers.astype(str)}, index=unique)

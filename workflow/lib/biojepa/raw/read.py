"""From a file or folder to counts of genes, counts of guides and a table of cells."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from scipy import sparse
from scipy.io import mmread

from biojepa.contracts import GENE_ID
from biojepa.errors import InputError
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import read_cell_metadata

GUIDE_COUNTS, GUIDE_NAMES, NOTES = "guide_counts", "guide_names", "notes"
FEATURE_TYPES = "feature_types"
GENE_TYPE, GUIDE_TYPE = "Gene Expression", "CRISPR Guide Capture"
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol", "feature_name")
GENE_ID_COLUMNS = (GENE_ID, "gene_ids", "ensembl_id", "ensemble_id", "ensembl", "feature_id")
ENSEMBL = r"^ENS[A-Z]*G\d+"


def read_screen(source: ScreenSource) -> ad.AnnData:
    """Read a screen into memory.

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
    path = Path(source.path)
    if not path.exists():
        raise InputError(
            path, "nothing there", "the raw data of the screen", "correct `source` in the dataset table"
        )
    read = _read_10x if _format_of(source) == "10x_mtx" else _read_h5ad
    counts, obs, var, notes = read(path, source)
    if 0 in counts.shape:
        raise InputError(
            path, f"a matrix of shape {counts.shape}", "at least one cell and one gene", "use another file"
        )

    obs = _with_unique_barcodes(obs, source, notes)
    if source.cell_metadata:
        table = read_cell_metadata(source.cell_metadata, list(obs.index))
        obs = pd.concat([obs.drop(columns=[c for c in obs.columns if c in table.columns]), table], axis=1)
    screen = _split_features(counts, obs, var, path, notes)
    screen.uns[NOTES] = notes
    return screen


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


Parts = tuple[sparse.csr_matrix, pd.DataFrame, pd.DataFrame, list[str]]


def _read_h5ad(path: Path, source: ScreenSource) -> Parts:
    """Read an AnnData file and find its raw counts."""
    if path.is_dir():
        raise InputError(path, "a folder", "an .h5ad file", "set `format` to 10x_mtx, or `path` to the file")
    try:
        with h5py.File(path) as file:
            missing = {"obs", "var"} - set(file)
    except OSError as error:
        raise InputError(
            path,
            f"a file that HDF5 cannot open ({error})",
            "a complete .h5ad file",
            "delete it and download it again",
        ) from error
    if missing:
        raise InputError(
            path,
            f"an HDF5 file without {' and '.join(sorted(missing))}, so not an AnnData",
            "an .h5ad file",
            "convert it with scanpy, for example sc.read_10x_h5(…).write_h5ad(…)",
        )
    screen = ad.read_h5ad(path)
    notes: list[str] = []
    where, matrix, var = _raw_counts(screen, path, source.counts_layer)
    if where != "X":
        notes.append(f"raw counts taken from {where}")
    return to_counts(matrix), screen.obs.copy(), var.copy(), notes


def _raw_counts(screen: ad.AnnData, path: Path, layer: str) -> tuple[str, object, pd.DataFrame]:
    """Return where the raw counts are, the matrix, and the table of its genes."""
    places: dict[str, tuple[object, pd.DataFrame]] = {}
    if screen.X is not None:
        places["X"] = (screen.X, screen.var)
    for name in sorted(screen.layers, key=lambda name: (name != "counts", name)):
        places[name] = (screen.layers[name], screen.var)
    if screen.raw is not None:
        places["raw"] = (screen.raw.X, screen.raw.var)
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


def holds_counts(matrix: Any) -> bool:
    """Tell whether a matrix ``(cells, genes)`` holds whole numbers, none negative, some positive."""
    values = matrix.data if sparse.issparse(matrix) else np.asarray(matrix).ravel()
    if values.dtype == bool:
        return False
    block, some = 1 << 22, False
    for start in range(0, values.size, block):
        part = values[start : start + block]
        if not np.all(np.isfinite(part)) or np.any(part < 0) or np.any(part != np.rint(part)):
            return False
        some = some or bool(np.any(part > 0))
    return some


def to_counts(matrix: Any) -> sparse.csr_matrix:
    """Return counts as canonical CSR float32 ``(cells, genes)``: sorted, no duplicates, no zeros."""
    counts = sparse.csr_matrix(matrix, dtype=np.float32)
    # Files written in blocks may hold indices of 32 and pointers of 64 bits, which scipy cannot mix.
    counts = sparse.csr_matrix((counts.data, counts.indices, counts.indptr), shape=counts.shape)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _read_10x(folder: Path, source: ScreenSource) -> Parts:
    """Read the feature-barcode matrix folder of Cell Ranger (version 3, or 2 with genes.tsv)."""
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
        matrix = mmread(matrix_path)
        features = pd.read_csv(features_path, sep="\t", header=None, dtype=str, keep_default_na=False)
        barcodes = pd.read_csv(barcodes_path, sep="\t", header=None, dtype=str, keep_default_na=False)[0]
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(
            folder,
            f"a file that cannot be read ({error})",
            "the three complete files of a 10x folder",
            "fetch them again",
        ) from error
    if matrix.shape != (len(features), len(barcodes)):
        raise InputError(
            matrix_path,
            f"{matrix.shape[0]} × {matrix.shape[1]} in the matrix, {len(features)} rows in "
            f"{features_path.name} and {len(barcodes)} in {barcodes_path.name}",
            "one row per feature and one column per barcode",
            "use the three files of the same run",
        )
    counts = sparse.csr_matrix(sparse.coo_matrix(matrix).T)
    if not holds_counts(counts):
        raise InputError(
            matrix_path,
            "non-integer counts where raw counts are needed",
            "whole numbers of 0 or more",
            "use the raw or filtered feature-barcode matrix, not a normalized one",
        )
    var = pd.DataFrame(
        {GENE_ID: features[0].to_numpy()}, index=features[min(1, features.shape[1] - 1)].to_numpy()
    )
    if features.shape[1] > 2:
        var[FEATURE_TYPES] = features[2].to_numpy()
    return to_counts(counts), pd.DataFrame(index=pd.Index(barcodes.to_numpy())), var, []


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
    counts: sparse.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame, path: Path, notes: list[str]
) -> ad.AnnData:
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
    genes = gene_names(var.loc[is_gene], notes)
    screen = ad.AnnData(X=to_counts(counts[:, np.flatnonzero(is_gene)]), obs=obs, var=genes)
    if is_guide.any():
        names = var.index.astype(str)[is_guide]
        if names.has_duplicates:
            raise InputError(
                path,
                f"guide {names[names.duplicated()][0]!r} more than once",
                "unique guide names",
                "rename the guides",
            )
        screen.obsm[GUIDE_COUNTS] = to_counts(counts[:, np.flatnonzero(is_guide)])
        screen.uns[GUIDE_NAMES] = names.to_numpy(dtype=object)
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

"""From a file or folder to counts of genes, counts of guides and a table of cells."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from scipy import sparse

from biojepa.contracts import GENE_ID
from biojepa.errors import InputError
from biojepa.raw.counts import to_counts
from biojepa.raw.guide_files import read_guide_calls, read_guide_counts
from biojepa.raw.h5ad import open_h5ad
from biojepa.raw.matrix import CompressedRows, RowBlocks, SelectedRows, take_rows
from biojepa.raw.parts import Reading, damage_told, open_hdf5
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import SAMPLE, read_cell_metadata, require_column
from biojepa.raw.tenx import FEATURE_TYPES, GENE_TYPE, GUIDE_TYPE, is_10x_hdf5, open_10x
from biojepa.sample_files import HDF5, MTX, find_samples

log = logging.getLogger(__name__)

GUIDE_COUNTS, GUIDE_NAMES, NOTES, GENE_NOTES = "guide_counts", "guide_names", "notes", "gene_notes"
CALLED_GUIDES, CALLED_NAMES = "called_guides", "called_guide_names"
LEFT_OUT, SAMPLE_COLUMN = "left_out", "sample_column"
H5AD, MTX_FOLDER, H5_FILE = "h5ad", "10x_mtx", "10x_h5"
NOT_IN_METADATA = "not_in_cell_metadata"
# In whatever case. Those that may mean something else come last.
SYMBOL_COLUMNS = (
    "gene_symbol", "gene_symbols", "gene_name", "gene_names", "gene_short_name", "symbol", "symbols",
    "hgnc_symbol", "external_gene_name", "feature_name", "gene", "name",
)  # fmt: skip
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
    called_guides
        ``(cells, called guides)`` CSR, UMIs of the guides that somebody else called; None: nobody did.
    called_names
        Names of those guides.
    left_out
        Barcodes of the file that are no cells of the screen: number and reason, by filter of qc.tsv.
    sample_column
        Column of ``obs`` that tells several samples apart; empty for one sample.
    notes
        What had to be decided on the way.
    gene_notes
        Those of the notes that are about names of genes.
    where
        File or folder, for messages.
    """

    counts: RowBlocks
    obs: pd.DataFrame
    var: pd.DataFrame
    genes: np.ndarray | None = None
    guides: np.ndarray | None = None
    guide_names: np.ndarray | None = None
    guide_counts: sparse.csr_matrix | None = None
    called_guides: sparse.csr_matrix | None = None
    called_names: np.ndarray | None = None
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    sample_column: str = ""
    notes: list[str] = field(default_factory=list)
    gene_notes: list[str] = field(default_factory=list)
    where: Path | None = None

    @classmethod
    def of(cls, screen: ad.AnnData, entries: int | None = None) -> RawScreen:
        """Read a screen in memory, as :func:`read_screen` returns it, in blocks of ``entries`` entries."""
        guides, called = screen.obsm.get(GUIDE_COUNTS), screen.obsm.get(CALLED_GUIDES)
        return cls(
            CompressedRows.of(to_counts(screen.X), entries),
            screen.obs,
            screen.var,
            guide_names=None if guides is None else np.asarray(screen.uns[GUIDE_NAMES], dtype=object),
            guide_counts=None if guides is None else sparse.csr_matrix(guides),
            called_guides=None if called is None else sparse.csr_matrix(called),
            called_names=None if called is None else np.asarray(screen.uns[CALLED_NAMES], dtype=object),
            left_out={name: (int(n), str(why)) for name, (n, why) in screen.uns.get(LEFT_OUT, {}).items()},
            sample_column=str(screen.uns.get(SAMPLE_COLUMN, "")),
            notes=[str(note) for note in screen.uns.get(NOTES, [])],
            gene_notes=[str(note) for note in screen.uns.get(GENE_NOTES, [])],
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
        for first, block in self._blocks(wanted):
            features = to_counts(block)
            genes = features if self.genes is None else features[:, self.genes]
            if self.guide_counts is not None:
                yield first, genes, self.guide_counts[first : first + features.shape[0]]
            elif self.guides is not None:
                yield first, genes, features[:, self.guides]
            else:
                yield first, genes, None

    def take(self, cells: np.ndarray) -> sparse.csr_matrix:
        """Return the counts of genes of some cells, in their sorted order, ``(len(cells), genes)``."""
        with damage_told(self.where or Path("the matrix")):
            features = to_counts(take_rows(self.counts, cells))
        return features if self.genes is None else features[:, self.genes]

    def _blocks(self, wanted: np.ndarray | None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        blocks = self.counts.blocks(wanted)
        while True:
            with damage_told(self.where or Path("the matrix")):
                block = next(blocks, None)
            if block is None:
                return
            yield block


def read_screen(source: ScreenSource) -> ad.AnnData:
    """Read a screen into memory, for screens that fit; the pipeline uses :func:`open_screen`.

    Returns
    -------
    anndata.AnnData
        ``X`` raw counts ``(cells, genes)``, CSR float32; ``obs`` all columns of the file and of
        ``cell_metadata``; ``var`` unique gene symbols with ``gene_id``; where the file has guide
        features, ``obsm["guide_counts"]`` ``(cells, guides)`` CSR and ``uns["guide_names"]``; where guides
        were called elsewhere, ``obsm["called_guides"]`` and ``uns["called_guide_names"]``;
        ``uns["notes"]`` what had to be decided on the way, ``uns["gene_notes"]`` what of it is about
        names of genes.

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
    if opened.called_guides is not None:
        screen.obsm[CALLED_GUIDES], screen.uns[CALLED_NAMES] = opened.called_guides, opened.called_names
    if opened.left_out:
        screen.uns[LEFT_OUT] = opened.left_out
    if opened.sample_column:
        screen.uns[SAMPLE_COLUMN] = opened.sample_column
    screen.uns[NOTES], screen.uns[GENE_NOTES] = opened.notes, opened.gene_notes
    return screen


@contextmanager
def open_screen(
    source: ScreenSource,
    scratch: str | Path | None = None,
    entries: int | None = None,
    most: int | None = None,
    tables_only: bool = False,
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
    tables_only
        Whether tables and shapes are enough: no value of a matrix is read then, and ``counts`` can only be
        asked for its shape; of guide counts, the names of the guides are read. Values are not there to say
        which of several matrices holds counts: the first one of numbers is taken, where ``counts_layer``
        names none, and a note says so.

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
        how = Reading(stack, scratch, entries, most, tables_only)
        # A matrix of guides in the same folder is no sample of it.
        apart = [source.guide_counts] if source.guide_counts else []
        with damage_told(path):
            form, why = detect_format(source, how)
        log.info("%s is read as %s: %s", path, form, why)
        with damage_told(path):
            parts = (
                open_h5ad(path, source, how) if form == H5AD else open_10x(path, how, _kind_of(source), apart)
            )
        counts, obs, var, notes = parts.counts, parts.obs, parts.var, parts.notes
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
        samples = SAMPLE if form != H5AD and SAMPLE in obs else ""
        left_out = {}
        if source.cell_metadata:
            table, found, said = read_cell_metadata(source.cell_metadata, obs.index, bool(samples))
            notes += said
            if not found.all():
                name, n_without = Path(source.cell_metadata).name, int((~found).sum())
                left_out[NOT_IN_METADATA] = (n_without, f"barcodes without a row in {name}: no cells")
                counts, obs = SelectedRows(counts, found), obs[found]
            obs = pd.concat([obs.drop(columns=[c for c in obs.columns if c in table.columns]), table], axis=1)
        screen = _split_features(counts, obs, var, path, notes, source.gene_column)
        screen.left_out, screen.sample_column, screen.where = left_out, samples, path
        _add_guides(screen, source, how)
        for note in notes:
            log.info("%s: %s", path, note)
        yield screen


def _add_guides(screen: RawScreen, source: ScreenSource, how: Reading) -> None:
    """Read the counts and calls of guides that lie in files of their own."""
    index, samples = screen.obs.index, bool(screen.sample_column)
    if source.guide_counts:
        with damage_told(Path(source.guide_counts)):
            names, counts, said = read_guide_counts(
                source.guide_counts, index, lambda path: open_10x(path, how), samples, how.tables_only
            )
        if screen.guides is not None:
            said.append(f"the {len(screen.guides)} guides in the matrix left aside for them")
        screen.guides, screen.guide_names, screen.guide_counts = None, names, counts
        screen.notes += said
    if source.guide_calls:
        screen.called_names, screen.called_guides, said = read_guide_calls(source.guide_calls, index, samples)
        screen.notes += said


def detect_format(source: ScreenSource, how: Reading) -> tuple[str, str]:
    """Return the format of a screen and how it was told.

    What the dataset table says holds; otherwise a file is told by its content and a folder by its files.

    Raises
    ------
    InputError
        When it is nothing that can be read.
    """
    path = Path(source.path)
    if source.format != "auto":
        return source.format, "the dataset table says so"
    if path.is_dir():
        return _detect_folder(path, source.guide_counts)
    if path.stat().st_size and not h5py.is_hdf5(path) and path.suffix not in (".h5ad", ".h5"):
        raise InputError(
            path,
            "a file that is neither .h5ad nor 10x HDF5",
            "an .h5ad or .h5 file, or a folder with the three files of a 10x matrix",
            "give the folder it is in, convert it to .h5ad, or set `format` in the dataset table",
        )
    file = open_hdf5(path, how)
    if {"obs", "var"} <= set(file):
        return H5AD, "it has obs and var"
    if is_10x_hdf5(file):
        return H5_FILE, "it has barcodes and a matrix of features, as Cell Ranger writes them"
    kinds = {"mod": "a MuData file", "row_attrs": "a loom file", "assays": "an h5Seurat file"}
    kind = next((name for key, name in kinds.items() if key in file), "")
    raise InputError(
        path,
        f"{kind or 'an HDF5 file'} with {', '.join(sorted(file)) or 'nothing in it'}, "
        "so not an AnnData and not a 10x matrix",
        "an .h5ad file, or a feature-barcode matrix of Cell Ranger",
        "write its genes as .h5ad",
    )


def _detect_folder(path: Path, guide_counts: str) -> tuple[str, str]:
    samples, _ = find_samples(path, without=[guide_counts] if guide_counts else [])
    if not samples and (files := sorted(file.name for file in path.rglob("[!.]*.h5ad"))):
        raise InputError(
            path,
            f"a folder with {', '.join(files[:5])}",
            "one .h5ad file, or the files of a 10x matrix",
            "set `source` to the file; several are several datasets, or have to be joined",
        )
    kinds = {sample.kind for sample in samples}
    form = H5_FILE if kinds == {HDF5} else MTX_FOLDER
    return form, f"a folder with {len(samples)} 10x matri{'x' if len(samples) == 1 else 'ces'}"


def _kind_of(source: ScreenSource) -> str:
    """Return which files of a folder are to be read: those that the dataset table asks for, or any."""
    return {MTX_FOLDER: MTX, H5_FILE: HDF5}.get(source.format, "")


def _with_unique_barcodes(obs: pd.DataFrame, source: ScreenSource, notes: list[str]) -> pd.DataFrame:
    obs.index = obs.index.astype(str)
    twice = int(obs.index.duplicated().sum())
    if not twice:
        return obs
    joined = [name for name in ("cell_metadata", "guide_counts", "guide_calls") if getattr(source, name)]
    if joined:
        raise InputError(
            source.path,
            f"{twice} repeated barcodes, such as {obs.index[obs.index.duplicated()][0]!r}",
            f"unique barcodes, because {' and '.join(joined)} {'is' if len(joined) == 1 else 'are'} joined "
            "by them",
            "add the sample or lane to the barcodes in both files",
        )
    example = obs.index[obs.index.duplicated()][0]
    log.warning(
        "%s: %d repeated barcodes, such as %r, got a number; are these several samples, or cells that are "
        "there twice?",
        source.path,
        twice,
        example,
    )
    notes.append(f"{twice} repeated barcodes got a number")
    obs.index = make_index_unique(obs.index)
    return obs


def _split_features(
    counts: RowBlocks,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    path: Path,
    notes: list[str],
    gene_column: str = "",
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
    of_genes: list[str] = []
    genes = gene_names(var.loc[is_gene], of_genes, gene_column, path)
    notes += of_genes
    screen = RawScreen(counts, obs, genes, notes=notes, gene_notes=of_genes)
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


def gene_names(
    var: pd.DataFrame, notes: list[str], gene_column: str = "", where: str | Path = "var"
) -> pd.DataFrame:
    """Return the table of genes: unique symbols as index and the column ``gene_id``.

    An index of Ensembl ids or of numbers is replaced by a symbol column where there is one; a gene without a
    symbol keeps its id. A repeated symbol gets a number (``A``, ``A-1``), with a note.

    Parameters
    ----------
    var
        Table of genes, as the file has it.
    notes
        What is decided here is added to it.
    gene_column
        Column with symbols, whatever the index is; empty: look for one.
    where
        File, for messages.

    Raises
    ------
    InputError
        When there is no such column.
    """
    index = pd.Index(var.index.astype(str))
    given = _column_called(var, GENE_ID_COLUMNS)
    counted = _are_numbers(index)
    identifiers = index.to_numpy() if given is None else _names_in(var, given)
    names = index.to_numpy(dtype=object)
    column: str | None = None
    if gene_column:
        require_column(var, gene_column, where, "gene_column")
        column = gene_column
    elif counted or _are_ensembl(index):
        column = _column_called(var, SYMBOL_COLUMNS, symbols=True)
    if column is not None:
        if _are_ensembl(index):
            identifiers = index.to_numpy()
        # Numbers of rows are no names, so that genes without a symbol are better called by their id.
        spare = np.where(identifiers == "", names, identifiers) if counted else names
        named = _names_in(var, column)
        names = np.where(named == "", spare, named)
        notes.append(f"gene symbols taken from column {column!r} of var")
    elif counted and given is not None:
        names = np.where(identifiers == "", names, identifiers)
        notes.append(f"genes named by column {given!r} of var, since its index holds numbers")
    unique = pd.Index(names.astype(str))
    kind = "Ensembl ids" if _are_ensembl(unique) else "numbers" if _are_numbers(unique) else ""
    if kind:
        # Perturbations, networks and gene sets name genes by symbols: none of them would be found.
        note = f"genes are named by {kind}: if var has a column of symbols, name it in `gene_column`"
        log.warning("%s: %s", where, note)
        notes.append(note)
    if unique.has_duplicates:
        notes.append(f"{int(unique.duplicated().sum())} repeated gene symbols got a number")
        unique = make_index_unique(unique)
    return pd.DataFrame({GENE_ID: identifiers.astype(str)}, index=unique)


def _column_called(var: pd.DataFrame, usual: Sequence[str], symbols: bool = False) -> str | None:
    """Return the column with one of the usual names, in whatever case; with ``symbols``, one without ids."""
    folded = {str(column).casefold(): column for column in reversed(var.columns)}
    found = (folded[name] for name in map(str.casefold, usual) if name in folded)
    if not symbols:
        return next(found, None)
    named = ((column, pd.Index(_names_in(var, column))) for column in found)
    return next((column for column, names in named if not (_are_ensembl(names) or _are_numbers(names))), None)


def _names_in(var: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column as text ``(genes,)``, empty where missing."""
    return var[column].astype(object).where(var[column].notna(), "").astype(str).str.strip().to_numpy(object)


def _are_ensembl(names: pd.Index) -> bool:
    """Tell whether most names are Ensembl ids of genes."""
    return bool(names.str.match(ENSEMBL).mean() > 0.5)


def _are_numbers(names: pd.Index) -> bool:
    """Tell whether all names are numbers: of rows, or of genes at Entrez."""
    return bool(names.str.fullmatch(r"\d+").all())

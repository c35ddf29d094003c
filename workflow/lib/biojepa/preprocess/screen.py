"""The preprocess stage as one call, and how its files are written."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import (
    BATCH,
    CELL_TYPE,
    CELLS_OBS,
    COUNTS_LAYER,
    GUIDE_CALLS_COLUMNS,
    GUIDE_ID,
    GUIDES_PER_CELL_COLUMNS,
    LIBRARY_SIZE,
    PERTURBATION,
    PERTURBATION_TYPE,
)
from biojepa.files import write_tsv
from biojepa.labels import genes_of
from biojepa.preprocess.annotate import (
    GUIDE_SHARE,
    GUIDE_UMIS,
    N_COUNTS,
    N_GENES,
    PCT_MITO,
    annotate_cells,
)
from biojepa.preprocess.cell_cycle import GENES_FILE
from biojepa.preprocess.cell_tables import batch_table, distribution_table, or_empty, ranked_umis
from biojepa.preprocess.describe import describe_screen
from biojepa.preprocess.effects import Effects
from biojepa.preprocess.normalize import log_normalize, require_library_sizes
from biojepa.preprocess.quality import DOUBLET_SCORE, count_detected, filter_cells, filter_genes
from biojepa.preprocess.settings import PreprocessSettings
from biojepa.preprocess.store import cells_file
from biojepa.raw.read import RawScreen, open_screen
from biojepa.raw.source import ScreenSource

QC_OBS = (N_COUNTS, N_GENES, PCT_MITO, DOUBLET_SCORE, GUIDE_UMIS, GUIDE_SHARE)
PACKAGES = ("anndata", "h5py", "numpy", "pandas", "scikit-learn", "scipy")


@dataclass
class Tables:
    """Tables of the preprocess stage, each called after its file. Descriptive, used by no training.

    Parameters
    ----------
    qc
        One row per filter.
    perturbations
        One row per perturbation, over all its cells.
    guides
        One row per guide: its effect, and whether it agrees with the others of its perturbation.
    guide_calls, guides_per_cell, guide_umis
        Guides, outcome classes of cells, and ranked guide UMIs; without rows where no guides were counted.
    batches, distributions
        Quality of the cells of each batch, and of all, before and after the filters.
    """

    qc: pd.DataFrame
    perturbations: pd.DataFrame
    guides: pd.DataFrame
    guide_calls: pd.DataFrame
    guides_per_cell: pd.DataFrame
    guide_umis: pd.DataFrame
    batches: pd.DataFrame
    distributions: pd.DataFrame


@dataclass
class Preprocessed:
    """What the preprocess stage hands on.

    Parameters
    ----------
    cells
        Cells that passed, as the contract describes ``cells.h5ad``.
    tables
        What is written beside them.
    """

    cells: ad.AnnData
    tables: Tables

    @property
    def qc(self) -> pd.DataFrame:
        """Rows of qc.tsv."""
        return self.tables.qc

    @property
    def perturbations(self) -> pd.DataFrame:
        """Rows of perturbations.tsv."""
        return self.tables.perturbations

    @property
    def guides(self) -> pd.DataFrame:
        """Rows of guides.tsv."""
        return self.tables.guides


def preprocess_screen(
    screen: ad.AnnData | RawScreen,
    source: ScreenSource,
    settings: PreprocessSettings,
    inputs: Mapping[str, str] | None = None,
) -> Preprocessed:
    """Label, filter, normalize and describe a screen, and return its cells in memory.

    Parameters
    ----------
    screen
        Raw counts, from :func:`biojepa.raw.read_screen` or :func:`biojepa.raw.open_screen`.
    source
        What its columns mean.
    settings
        Thresholds.
    inputs
        SHA-256 of each input file by name, for the provenance.

    Raises
    ------
    InputError
        When columns, controls or cells are missing, or a filter leaves too little.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        tables = write_cells(screen, source, settings, path, inputs)
        return Preprocessed(ad.read_h5ad(path), tables)


def write_cells(
    screen: ad.AnnData | RawScreen,
    source: ScreenSource,
    settings: PreprocessSettings,
    path: str | Path,
    inputs: Mapping[str, str] | None = None,
    cell_cycle_genes: str | Path = GENES_FILE,
) -> Tables:
    """Label, filter, normalize and describe a screen of any size, and write ``cells.h5ad``.

    The counts are read three times, in blocks of cells: for sums over the genes of each cell, for the cells
    of each gene, and to be written; what is written is read once or twice more, see
    :mod:`biojepa.preprocess.describe`. Memory holds a block, tables of cells, and what effects need, see
    :mod:`biojepa.preprocess.effects`. No result depends on the size of the blocks.

    Parameters
    ----------
    screen, source, settings, inputs
        As in :func:`preprocess_screen`.
    path
        Where to write; the file appears when it is whole.
    cell_cycle_genes
        Table of the genes of S and G2/M.

    Returns
    -------
    The tables that go beside it.

    Raises
    ------
    InputError
        As :func:`preprocess_screen`.
    """
    screen = RawScreen.of(screen) if isinstance(screen, ad.AnnData) else screen
    where = source.path or source.dataset
    table = annotate_cells(screen, source, settings.guide_assignment)
    funnel = filter_cells(screen, table, settings, where)
    detected = count_detected(screen, funnel.keep)
    labels = table.obs[PERTURBATION].iloc[np.flatnonzero(funnel.keep)].unique()
    targets = screen.var.index.isin({gene for label in labels for gene in genes_of(str(label))})
    fewest = settings.min_cells_per_gene
    kept = filter_genes(detected, fewest, funnel, where, screen.gene_notes, targets)
    genes = np.flatnonzero(kept)

    obs = _contract_obs(table.obs.iloc[np.flatnonzero(funnel.keep)])
    var = screen.var.iloc[genes].copy()
    size = require_library_sizes(obs[LIBRARY_SIZE].to_numpy(), where)
    effects = Effects(obs, var.index, settings)
    with cells_file(path, (len(obs), len(var)), int(detected[genes].sum())) as file:
        first = 0
        for counts in _kept(screen, funnel.keep, genes):
            part = slice(first, first + counts.shape[0])
            expression = log_normalize(counts, size[part], settings.target_sum, where)
            file.append(expression, counts)
            effects.add(first, expression)
            first = part.stop
        found = describe_screen(obs, var.index, effects, file.expression(), settings, cell_cycle_genes)
        for name, values in found.columns.items():
            obs[name] = values
        of_panel = [note] if (note := table.notes.get("min_counts")) else []
        notes = [*screen.notes, *of_panel, *found.notes]
        file.finish(obs, var, {"provenance": provenance(source, settings, inputs or {}, notes)})
    return Tables(
        qc=funnel.table(),
        perturbations=found.perturbations,
        guides=found.guides,
        guide_calls=or_empty(table.guide_calls, GUIDE_CALLS_COLUMNS),
        guides_per_cell=or_empty(table.guides_per_cell, GUIDES_PER_CELL_COLUMNS),
        guide_umis=ranked_umis(table.obs.get(GUIDE_UMIS)),
        batches=batch_table(table.obs, funnel),
        distributions=distribution_table(table.obs, funnel),
    )


def _kept(screen: RawScreen, keep: np.ndarray, genes: np.ndarray) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of kept cells and genes in blocks, canonical CSR float32."""
    for first, block, _ in screen.blocks(keep):
        kept = keep[first : first + block.shape[0]]
        counts = block if kept.all() else block[np.flatnonzero(kept)]
        counts = counts if len(genes) == block.shape[1] else counts[:, genes]
        counts.sort_indices()
        yield counts


def _contract_obs(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the contract and of quality, words as categories in sorted order."""
    kept = obs[[*CELLS_OBS, *(name for name in QC_OBS if name in obs)]].copy()
    for name in (PERTURBATION, GUIDE_ID, PERTURBATION_TYPE, BATCH, CELL_TYPE):
        kept[name] = pd.Categorical(kept[name], categories=sorted(set(kept[name])))
    for name in (LIBRARY_SIZE, *QC_OBS):
        if name in kept and name != N_GENES:
            kept[name] = kept[name].astype(np.float64)
    return kept


def provenance(
    source: ScreenSource, settings: PreprocessSettings, inputs: Mapping[str, str], notes: list[str]
) -> str:
    """Return as JSON how the cells were made: files, versions, settings, and what was decided.

    Paths are reduced to names, so that the same input gives the same bytes on every machine.
    """
    described = asdict(source)
    for name in ("path", "cell_metadata", "guide_table", "guide_counts", "guide_calls"):
        described[name] = Path(described[name]).name if described[name] else ""
    packages = (*PACKAGES, "scanpy") if settings.doublets == "scrublet" else PACKAGES
    content = {
        "inputs": dict(inputs),
        "notes": notes,
        "settings": asdict(settings),
        "source": described,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    return json.dumps(content, sort_keys=True)


def write_preprocessed(
    result: Preprocessed,
    cells: str | Path,
    qc: str | Path,
    perturbations: str | Path,
    guides: str | Path,
    **others: str | Path,
) -> None:
    """Write cells.h5ad and its tables, others by name; equal results, equal bytes."""
    counts = sparse.csr_matrix(result.cells.layers[COUNTS_LAYER])
    with cells_file(cells, counts.shape, counts.nnz) as file:
        file.append(sparse.csr_matrix(result.cells.X), counts)
        file.expression()
        file.finish(result.cells.obs, result.cells.var, dict(result.cells.uns))
    _write_tables(result.tables, {"qc": qc, "perturbations": perturbations, "guides": guides, **others})


def _write_tables(tables: Tables, paths: Mapping[str, str | Path]) -> None:
    """Write the tables that ``paths`` names."""
    for name, path in paths.items():
        write_tsv(getattr(tables, name), path)


def preprocess_file(
    source: ScreenSource,
    settings: PreprocessSettings,
    cells: str | Path,
    qc: str | Path,
    perturbations: str | Path,
    guides: str | Path,
    inputs: Mapping[str, str] | None = None,
    cell_cycle_genes: str | Path = GENES_FILE,
    **others: str | Path,
) -> None:
    """Preprocess the screen that ``source`` names, whatever its size, and write its files.

    Temporary files, where a matrix has to be put into rows, lie beside ``cells`` and are removed.

    Parameters
    ----------
    source, settings, inputs
        As in :func:`preprocess_screen`.
    cells, qc, perturbations, guides
        Where to write.
    cell_cycle_genes
        Genes that tell the phases of the cell cycle, as :func:`write_cells` takes them.
    others
        Where to write other fields of :class:`Tables`, by name; those not named are not written.
    """
    folder = Path(cells).parent
    folder.mkdir(parents=True, exist_ok=True)
    with open_screen(source, folder) as screen:
        described = write_cells(screen, source, settings, cells, inputs, cell_cycle_genes)
    _write_tables(described, {"qc": qc, "perturbations": perturbations, "guides": guides, **others})

"""Write a simulated screen: the files a user would have, and the truth beside them."""

from __future__ import annotations

import dataclasses
import gzip
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import BATCH, GENE_ID
from biojepa.files import atomic_path, write_text
from biojepa.simulate.cells import NON_TARGETING
from biojepa.simulate.design import Screen, draw_screen
from biojepa.simulate.network import observe_edges
from biojepa.simulate.settings import ScreenParameters, SimulatorSettings
from biojepa.simulate.truth import truth_of_cells, truth_of_perturbations

logger = logging.getLogger(__name__)

FEATURE_TYPES = "feature_types"
GENE_EXPRESSION, GUIDE_CAPTURE = "Gene Expression", "CRISPR Guide Capture"
_HDF5 = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (1 << 17,)}
_GENES_PER_SIGNATURE = 50


@dataclass(frozen=True)
class ScreenFiles:
    """Paths of a simulated screen; the last two hold the truth, which no stage reads."""

    raw: Path
    guides: Path
    network: Path
    gene_sets: Path
    truth: Path
    truth_cells: Path

    @classmethod
    def in_folder(cls, folder: str | Path) -> ScreenFiles:
        """Name the files in a folder."""
        folder = Path(folder)
        return cls(
            raw=folder / "raw.h5ad",
            guides=folder / "guides.csv",
            network=folder / "network.tsv.gz",
            gene_sets=folder / "gene_sets.gmt",
            truth=folder / "truth.h5ad",
            truth_cells=folder / "truth_cells.tsv.gz",
        )


def simulate_screen(
    settings: SimulatorSettings,
    files: ScreenFiles | str | Path,
    seed: int | None = None,
    parameters: ScreenParameters | None = None,
) -> None:
    """Simulate a CRISPRi screen with one or two guides per cell and write its files.

    Counts are negative binomial around ``depth * share * exp(change + cycle + batch)``: the change
    in RNA content is absolute, so that normalization by library size shifts all genes of a strong
    perturbation a little, as it does in a real screen.

    Parameters
    ----------
    settings
        What the screen contains.
    files
        Where to write, or a folder for the usual names.
    seed
        Overrides ``settings.seed``.
    parameters
        Fitted on real screens; by default those of ``resources/simulator.json``.

    Raises
    ------
    InputError
        When the file of parameters is absent or incomplete.

    Notes
    -----
    ``raw.h5ad``: ``X`` UMI counts (CSR int32) of genes and guides, ``var["feature_types"]``,
    ``var["gene_id"]``, ``obs["batch"]``. ``guides.csv``: ``guide, target``. ``network.tsv.gz``:
    ``gene_a, gene_b``. ``gene_sets.gmt``: network modules and the genes up and down in each
    response programme. ``truth.h5ad`` and ``truth_cells.tsv.gz``: see :mod:`biojepa.simulate.truth`.
    """
    files = files if isinstance(files, ScreenFiles) else ScreenFiles.in_folder(files)
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    screen = draw_screen(settings, parameters or ScreenParameters.read())
    _write_guides(screen, files.guides)
    _write_network(screen, files.network)
    _write_gene_sets(screen, files.gene_sets)
    with atomic_path(files.truth) as temporary:
        truth_of_perturbations(screen).write_h5ad(temporary, compression="gzip")
    _write_gzip(truth_of_cells(screen), files.truth_cells)
    _write_raw(screen, files.raw)


def _write_raw(screen: Screen, path: Path) -> None:
    """Append blocks of counts to the file, so that memory does not grow with the cells."""
    genes, guides = screen.genes.names, screen.guides.names
    names = np.concatenate([genes, guides])
    ids = [f"SIMG{index + 1:011d}" for index in range(len(genes))] + guides.tolist()
    kinds = np.repeat([GENE_EXPRESSION, GUIDE_CAPTURE], [len(genes), len(guides)])
    var = pd.DataFrame({GENE_ID: ids, FEATURE_TYPES: pd.Categorical(kinds)}, index=names)
    lanes = np.array([f"batch{index + 1}" for index in range(screen.settings.n_batches)])
    batch = pd.Categorical(lanes[screen.plan.batch[: len(screen.barcodes)]], categories=lanes)
    obs = pd.DataFrame({BATCH: batch}, index=screen.barcodes)
    empty = sparse.csr_matrix((0, len(names)), dtype=np.int32)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        ad.io.write_elem(file, "obs", obs)
        ad.io.write_elem(file, "var", var)
        for slot in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            ad.io.write_elem(file, slot, {})
        # 64-bit row pointers: a few million cells of 8,000 genes pass 2^31 entries.
        ad.io.write_elem(file, "X", empty, dataset_kwargs={**_HDF5, "indptr_dtype": np.int64})
        counts = ad.io.sparse_dataset(file["X"])
        for block in screen.blocks():
            counts.append(block)
            logger.info("%d of %d barcodes", counts.shape[0], len(screen.barcodes))


def _write_guides(screen: Screen, path: Path) -> None:
    targets = screen.genes.names[screen.responses.targets]
    table = pd.DataFrame(
        {"guide": screen.guides.names, "target": np.append(targets, NON_TARGETING)[screen.guides.target]}
    )
    write_text(table.to_csv(index=False, lineterminator="\n"), path)


def _write_network(screen: Screen, path: Path) -> None:
    edges = observe_edges(screen.network, screen.settings.network_noise, screen.observed_network_stream())
    _write_gzip([pd.DataFrame(screen.genes.names[edges], columns=["gene_a", "gene_b"])], path)


def _write_gene_sets(screen: Screen, path: Path) -> None:
    """Write the modules, and the strongest genes of each programme as two signatures."""
    n_genes = screen.genes.n_nuclear
    names = screen.genes.names[:n_genes]
    sets = {
        f"MODULE_{index + 1:02d}": names[screen.network.module == index]
        for index in range(screen.settings.n_modules)
    }
    size = min(_GENES_PER_SIGNATURE, n_genes // 4)
    for index, loading in enumerate(screen.responses.loadings[:, :n_genes]):
        order = np.argsort(-loading, kind="stable")
        sets[f"PROGRAMME_{index + 1:02d}_UP"] = names[np.sort(order[:size])]
        sets[f"PROGRAMME_{index + 1:02d}_DOWN"] = names[np.sort(order[-size:])]
    lines = ["\t".join([name, "simulated", *members]) for name, members in sets.items()]
    write_text("\n".join(lines) + "\n", path)


def _write_gzip(tables: Iterable[pd.DataFrame], path: Path) -> None:
    """Write tables as one compressed TSV whose bytes hold neither the time nor a file name."""
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=6) as file,
    ):
        for index, table in enumerate(tables):
            table.to_csv(file, sep="\t", index=False, header=index == 0, lineterminator="\n")

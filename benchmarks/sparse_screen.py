"""Write a large screen fast, a block of cells at a time, and measure what is done with it.

The simulator of the pipeline draws every gene of every cell, which takes long for a million cells. Here the
UMIs of a cell are drawn one by one from a table of genes, so that time and memory follow the UMIs. Cells of a
perturbation lose most UMIs of their target and gain some of a programme of genes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from biojepa.files import atomic_path  # noqa: E402

if TYPE_CHECKING:
    from biojepa.raw import ScreenSource

TABLE = 1 << 16
MEASURED = "measured: "
CONTROL_LABEL = "non-targeting"
BLOCK = 5_000
# Neighbours of a gene in the network that is written beside the screen.
DEGREE = 6


@dataclass(frozen=True)
class SparseScreen:
    """What the screen contains.

    Parameters
    ----------
    n_cells, n_genes, n_perturbations
        Sizes; perturbations beyond the genes are pairs of neighbours in the list of genes.
    umis
        Median UMIs of a cell. 410 over 5,000 genes fill 8 % of the matrix.
    share_control
        Share of the cells that are controls.
    n_batches
        Batches, in blocks of cells as they come from the lanes of a sequencer.
    programme, gain
        Genes that a perturbation raises, and UMIs that they gain together in a cell, in the mean.
    knock_down
        Share of the target's UMIs that are lost.
    guides
        Guides of a perturbation, all of which do the same.
    seed
        Same settings, same file.
    """

    n_cells: int = 10_000
    n_genes: int = 5_000
    n_perturbations: int = 1_000
    umis: float = 410.0
    share_control: float = 0.1
    n_batches: int = 8
    programme: int = 30
    gain: float = 40.0
    knock_down: float = 0.75
    guides: int = 4
    seed: int = 0

    def labels(self) -> list[str]:
        """Return the perturbations: single genes first, then pairs."""
        singles = [f"G{gene:05d}" for gene in range(min(self.n_perturbations, self.n_genes))]
        pairs = [f"G{a:05d}+G{a + 1:05d}" for a in range(self.n_perturbations - len(singles))]
        return [*singles, *pairs]

    def write(self, folder: Path) -> None:
        """Write ``raw.h5ad`` and ``network.tsv``; 5,000 cells are held in memory at a time."""
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        share = rng.gamma(0.6, 1.0, self.n_genes) + 0.02
        table = np.repeat(np.arange(self.n_genes), rng.multinomial(TABLE, share / share.sum()))
        # Every gene is expressed, or a target would have nothing to lose.
        table = np.concatenate([np.arange(self.n_genes), table])[:TABLE].astype(np.int32)
        rng.shuffle(table)
        labels = self.labels()
        code = rng.integers(len(labels), size=self.n_cells)
        code[rng.random(self.n_cells) < self.share_control] = -1
        programmes = rng.integers(self.n_genes, size=(len(labels), self.programme), dtype=np.int32)
        targets = np.array(
            [[int(gene[1:]) for gene in (label + "+" + label).split("+")[:2]] for label in labels]
        )
        batch = np.arange(self.n_cells) * self.n_batches // self.n_cells
        obs = pd.DataFrame(
            {
                "gene": pd.Categorical.from_codes(code + 1, [CONTROL_LABEL, *labels]),
                "guide": self._guides(code, labels),
                "lane": pd.Categorical.from_codes(batch, [f"lane{lane}" for lane in range(self.n_batches)]),
            },
            index=[f"cell{cell}" for cell in range(self.n_cells)],
        )
        var = pd.DataFrame(index=[f"G{gene:05d}" for gene in range(self.n_genes)])
        with atomic_path(folder / "raw.h5ad") as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            ad.io.write_elem(file, "obs", obs)
            ad.io.write_elem(file, "var", var)
            for slot in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
                ad.io.write_elem(file, slot, {})
            empty = sparse.csr_matrix((0, self.n_genes), dtype=np.int32)
            # scipy cannot mix indices of 32 and pointers of 64 bits, so those only where they must be.
            most = self.n_cells * (self.umis + self.gain) * 1.1
            dtype = np.int32 if most < np.iinfo(np.int32).max else np.int64
            chunks = {"chunks": (1 << 16,), "indptr_dtype": dtype}
            ad.io.write_elem(file, "X", empty, dataset_kwargs=chunks)
            counts = ad.io.sparse_dataset(file["X"])
            for first in range(0, self.n_cells, BLOCK):
                counts.append(self._cells(rng, code[first : first + BLOCK], table, programmes, targets))
        ring = [
            (gene, (gene + step) % self.n_genes) for gene in range(self.n_genes) for step in range(1, DEGREE)
        ]
        lines = [f"G{a:05d}\tG{b:05d}\n" for a, b in ring]
        (folder / "network.tsv").write_text("gene_a\tgene_b\n" + "".join(lines), encoding="utf-8")

    def _guides(self, code: np.ndarray, labels: list[str]) -> pd.Categorical:
        """Return the guide of each cell; they are dealt out in turn, so that no draw of counts changes."""
        number = np.arange(len(code)) % self.guides
        names = [f"{label}_g{guide}" for label in (CONTROL_LABEL, *labels) for guide in range(self.guides)]
        return pd.Categorical.from_codes((code + 1) * self.guides + number, names)

    def _cells(
        self,
        rng: np.random.Generator,
        code: np.ndarray,
        table: np.ndarray,
        programmes: np.ndarray,
        targets: np.ndarray,
    ) -> sparse.csr_matrix:
        """Draw the counts of some cells ``(cells, genes)``; int32."""
        n = len(code)
        depth = rng.poisson(self.umis * rng.lognormal(0, 0.25, n))
        row = np.repeat(np.arange(n), depth)
        gene = table[rng.integers(TABLE, size=len(row), dtype=np.uint16)]
        target = np.where(code[:, None] >= 0, targets[code], -1)[row]
        hit = (gene == target[:, 0]) | (gene == target[:, 1])
        kept = ~(hit & (rng.random(len(row)) < self.knock_down))
        extra = np.where(code >= 0, rng.poisson(self.gain, n), 0)
        extra_row = np.repeat(np.arange(n), extra)
        extra_gene = programmes[code[extra_row], rng.integers(self.programme, size=len(extra_row))]
        rows, genes = np.concatenate([row[kept], extra_row]), np.concatenate([gene[kept], extra_gene])
        ones = np.ones(len(rows), dtype=np.int32)
        counts = sparse.csr_matrix((ones, (rows, genes)), shape=(n, self.n_genes))
        counts.sum_duplicates()
        return counts


def screen_source(folder: Path) -> ScreenSource:
    """Return what a table of datasets would say of the screen in ``folder``."""
    # Here, so that the memory of whoever does without it is not that of the import.
    from biojepa.raw import ScreenSource

    return ScreenSource(
        "simulated",
        str(folder / "raw.h5ad"),
        perturbation_column="gene",
        control_label=CONTROL_LABEL,
        guide_column="guide",
        batch_column="lane",
        perturbation_type="CRISPRi",
    )


def run_and_print(run: Callable[[], None]) -> None:
    """Run and print what it took, for :func:`measured` in the process that started this one."""
    wall, used = time.perf_counter(), time.process_time()
    run()
    facts = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - used}
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(MEASURED + json.dumps({**facts, "peak_gib": peak / 2**20}))


def measured(script: str, stage: str, folder: Path) -> dict[str, float]:
    """Run a stage of a script in a new process with one thread, and return what it took.

    Returns
    -------
    ``seconds``, ``processor_seconds`` without imports, and ``peak_gib``, the peak resident memory.
    """
    command = [sys.executable, script, "--stage", stage, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith(MEASURED))
    return json.loads(line.removeprefix(MEASURED))

"""Where in the cell cycle each cell is.

Scores of Tirosh et al. (2016, Science 352:189): the mean log-expression of genes of S phase, and of G2 and
mitosis, less that of genes that are expressed as much. As in ``scanpy.tl.score_genes_cell_cycle``, but that
the genes compared with are all of a bin of expression and not some drawn from it, so that no score hangs on a
draw. The two are the same where a bin holds no more genes than scanpy draws, and scanpy's is the noisier one
elsewhere. No label of a perturbation is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import G2M_SCORE, PHASE, S_SCORE
from biojepa.errors import InputError
from biojepa.files import read_tsv

log = logging.getLogger(__name__)

GENES_FILE = Path(__file__).resolve().parents[4] / "resources" / "cell_cycle_genes.tsv"
S, G2M, G1 = "S", "G2M", "G1"
PHASES = (G1, S, G2M)
# A mean of fewer genes is the noise of single genes more than a phase. Panels often hold two or three.
MIN_GENES = 5
# Bins of genes by mean expression, as in scanpy.
BINS = 25


def read_cell_cycle_genes(symbols: pd.Index, path: str | Path = GENES_FILE) -> dict[str, list[str]]:
    """Return for S and G2M the symbols of the screen that mark the phase.

    Parameters
    ----------
    symbols
        Genes of the screen. Human symbols, or those of the mouse, which are the same words in small letters;
        both the symbol of 2016 and the one in use since are known.
    path
        Table with the columns ``phase``, ``gene`` and ``renamed``.

    Raises
    ------
    InputError
        When the table lacks a column or a phase.
    """
    table = read_tsv(path)
    if not {"phase", "gene", "renamed"} <= set(table.columns) or set(table["phase"]) != {S, G2M}:
        raise InputError(
            path,
            f"columns {', '.join(map(str, table.columns))}",
            "columns phase (S or G2M), gene and renamed",
            "restore the file",
        )
    upper = dict(zip(symbols.astype(str).str.upper()[::-1], symbols[::-1], strict=True))
    found: dict[str, list[str]] = {S: [], G2M: []}
    for phase, *names in table[["phase", "gene", "renamed"]].fillna("").itertuples(index=False):
        present = [upper[name.upper()] for name in names if name.upper() in upper and name]
        found[phase].extend(present[:1])
    return found


class CellCycle:
    """Score cells that come in blocks.

    Parameters
    ----------
    genes
        ``(genes,)`` symbols of the columns.
    marks
        Genes of S and of G2M, from :func:`read_cell_cycle_genes`, at least one of each.
    mean
        ``(genes,)`` mean log-expression of all cells.
    n_cells
        All cells.
    """

    def __init__(
        self, genes: pd.Index, marks: Mapping[str, list[str]], mean: np.ndarray, n_cells: int
    ) -> None:
        self._weights = np.stack([score_weights(genes, marks[phase], mean) for phase in (S, G2M)], axis=1)
        self._scores = np.zeros((n_cells, 2))

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Score a block of cells, log-expression ``(some cells, genes)``."""
        self._scores[first : first + expression.shape[0]] = expression @ self._weights

    def columns(self) -> dict[str, np.ndarray | pd.Categorical]:
        """Return ``s_score``, ``g2m_score`` and ``phase`` of all cells ``(cells,)``.

        G1 where both scores are negative, else the phase of the higher one.
        """
        s, g2m = self._scores.T
        code = np.where((s < 0) & (g2m < 0), 0, np.where(g2m > s, 2, 1))
        return {
            S_SCORE: s,
            G2M_SCORE: g2m,
            PHASE: pd.Categorical(np.array(PHASES)[code], categories=list(PHASES)),
        }


def score_weights(genes: pd.Index, marked: list[str], mean: np.ndarray) -> np.ndarray:
    """Return the weights ``(genes,)`` whose product with the log-expression of a cell is its score.

    Parameters
    ----------
    genes
        ``(genes,)``.
    marked
        Some of them.
    mean
        ``(genes,)`` mean log-expression, by whose rank genes are put into bins.
    """
    size = max(1, int(np.round(len(genes) / (BINS - 1))))
    bins = pd.Series(mean).rank(method="min").to_numpy() // size
    is_marked = np.zeros(len(genes), dtype=bool)
    is_marked[genes.get_indexer(pd.Index(marked))] = True
    control = np.isin(bins, bins[is_marked]) & ~is_marked
    weights = is_marked / is_marked.sum()
    return weights - control / control.sum() if control.any() else weights


def cell_cycle_note(marks: Mapping[str, list[str]]) -> str:
    """Say in a line how many genes were found, and whether that is enough."""
    counts = ", ".join(f"{len(marks[phase])} of {phase}" for phase in (S, G2M))
    if enough_genes(marks):
        listed = "; ".join(f"{phase}: {', '.join(marks[phase])}" for phase in (S, G2M))
        return f"cell cycle: genes {counts} ({listed})"
    return f"cell cycle: genes {counts}; {MIN_GENES} of each are needed, so no scores"


def enough_genes(marks: Mapping[str, list[str]]) -> bool:
    """Tell whether there are genes enough to score both phases."""
    return all(len(marks[phase]) >= MIN_GENES for phase in (S, G2M))

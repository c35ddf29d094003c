"""Which guides a cell carries, from its guide UMI counts.

Two rules. *dominance* is for screens with one guide per cell: the top guide must hold a minimum
share of the guide UMIs of the cell. *threshold* is for cells that carry two or more guides by
design: every guide that reaches a minimum count and a minimum share of the top guide is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import CONTROL, GENE_SEPARATOR
from biojepa.errors import InputError
from biojepa.labels import genes_of

GUIDE_JOIN = ";"
ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES = "assigned", "no_guide", "too_many_guides"
DEFAULT_SHARE = {"dominance": 0.6, "threshold": 0.2}


@dataclass(frozen=True)
class GuideAssignment:
    """How guides are called.

    Parameters
    ----------
    method
        ``dominance``: one guide per cell (low multiplicity of infection). ``threshold``: all
        guides above a threshold, for cells with several guides by design.
    min_umis
        Fewest UMIs of a guide for it to be called.
    min_share
        dominance: smallest share of the guide UMIs of the cell on its top guide, default 0.6.
        threshold: smallest count relative to the top guide of the cell, default 0.2.
    max_guides
        threshold: cells with more called guides are dropped. Ignored by dominance.
    """

    method: str = "dominance"
    min_umis: int = 5
    min_share: float | None = None
    max_guides: int = 2

    def __post_init__(self) -> None:
        if self.method not in DEFAULT_SHARE:
            raise InputError(
                "config, preprocess.guide_assignment.method",
                repr(self.method),
                " or ".join(sorted(DEFAULT_SHARE)),
                "use dominance for one guide per cell, threshold for several",
            )
        if self.min_umis < 1 or self.max_guides < 1 or not 0 < self.share <= 1:
            raise InputError(
                "config, preprocess.guide_assignment",
                f"min_umis {self.min_umis}, min_share {self.share}, max_guides {self.max_guides}",
                "min_umis ≥ 1, 0 < min_share ≤ 1, max_guides ≥ 1",
                "correct the value that is out of range",
            )

    @property
    def share(self) -> float:
        """The share that applies: ``min_share`` or the default of the method."""
        return DEFAULT_SHARE[self.method] if self.min_share is None else self.min_share


def assign_guides(
    counts: sparse.csr_matrix,
    guide_names: Sequence[str],
    targets: Mapping[str, str],
    settings: GuideAssignment,
) -> pd.DataFrame:
    """Call the guides of each cell.

    Parameters
    ----------
    counts
        Guide UMI counts ``(cells, guides)``.
    guide_names
        Names of the columns of ``counts``.
    targets
        Normalized label of each guide: a gene, genes joined by ``+``, or ``control``.
    settings
        Rule and thresholds.

    Returns
    -------
    pandas.DataFrame
        One row per cell: ``status`` (assigned, no_guide, too_many_guides), ``guide_id`` (called
        guides, sorted, joined by ``;``), ``label`` (their target genes joined by ``+``; control
        guides count only when the cell has no other), ``guide_umis`` (of the whole cell) and
        ``guide_share`` (of the top guide).
    """
    counts = sparse.csr_matrix(counts)
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # A matrix without guides or without cells has no maximum.
    empty = 0 in counts.shape
    top = np.zeros(counts.shape[0]) if empty else counts.max(axis=1).toarray().ravel().astype(np.float64)
    share = np.divide(top, total, out=np.zeros_like(total), where=total > 0)

    status = np.full(counts.shape[0], ASSIGNED, dtype=object)
    status[top < settings.min_umis] = NO_GUIDE
    if settings.method == "dominance":
        status[(status == ASSIGNED) & (share < settings.share)] = TOO_MANY_GUIDES
        # From half of the UMIs on, two guides can tie; then neither dominates.
        floor = np.where(top > 0, top, np.inf)
    else:
        floor = np.maximum(settings.min_umis, settings.share * top)
    called = _at_least(counts, floor)
    n_called = np.diff(called.indptr)
    most = 1 if settings.method == "dominance" else settings.max_guides
    status[(status == ASSIGNED) & (n_called > most)] = TOO_MANY_GUIDES

    guide_id, label = _names_of_calls(called, status == ASSIGNED, list(guide_names), targets)
    return pd.DataFrame(
        {"status": status, "guide_id": guide_id, "label": label, "guide_umis": total, "guide_share": share}
    )


def _at_least(counts: sparse.csr_matrix, floor: np.ndarray) -> sparse.csr_matrix:
    """Return the entries of ``counts`` that reach the floor of their row, as a 0/1 matrix."""
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    keep = (counts.data >= floor[rows]) & (counts.data > 0)
    ones = np.ones(int(keep.sum()), dtype=np.int8)
    called = sparse.csr_matrix((ones, (rows[keep], counts.indices[keep])), shape=counts.shape)
    called.sort_indices()
    return called


def _names_of_calls(
    called: sparse.csr_matrix, assigned: np.ndarray, names: list[str], targets: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return guide ids and labels ``(cells,)`` of the called guides; None where not assigned."""
    guide_id = np.full(called.shape[0], None, dtype=object)
    label = np.full(called.shape[0], None, dtype=object)
    known: dict[tuple[int, ...], tuple[str, str]] = {}
    for cell in np.flatnonzero(assigned):
        guides = tuple(called.indices[called.indptr[cell] : called.indptr[cell + 1]].tolist())
        if guides not in known:
            genes = {gene for guide in guides for gene in genes_of(targets[names[guide]])}
            known[guides] = (
                GUIDE_JOIN.join(sorted(names[guide] for guide in guides)),
                GENE_SEPARATOR.join(sorted(genes)) if genes else CONTROL,
            )
        guide_id[cell], label[cell] = known[guides]
    return guide_id, label

"""Call guides by the rule of the settings, name what each cell carries, and count the outcome."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import CONTROL, GENE_SEPARATOR
from biojepa.guides.mixture import BLOCK, GuideFits, count_histograms, fit_guides
from biojepa.guides.settings import DOMINANCE, MIXTURE, GuideAssignment
from biojepa.labels import genes_of

GUIDE_JOIN = ";"
ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES = "assigned", "no_guide", "too_many_guides"
STATUSES = (NO_GUIDE, ASSIGNED, TOO_MANY_GUIDES)


@dataclass(frozen=True)
class GuideCalls:
    """What came of guide assignment, as three tables.

    Parameters
    ----------
    cells
        One row per cell, as :func:`assign_guides` returns it.
    guides
        One row per guide: ``guide``, ``target``, ``cells_counted`` (with a UMI of it), ``umis``,
        ``threshold`` (fewest UMIs to be called), ``cells_called``, ``cells_assigned`` (of those, with an
        accepted number of guides), ``cells_alone`` (with no other guide called). Then, for the mixture
        only and empty otherwise, the columns of :meth:`biojepa.guides.mixture.GuideFits.table`.
    classes
        One row for each ``status`` and ``n_guides`` (called guides of a cell; missing where two
        guides compete under dominance, which does not say how many there are): ``cells``, ``share``.
        Under the mixture, no_guide with a called guide is a cell of too much background.
    """

    cells: pd.DataFrame
    guides: pd.DataFrame
    classes: pd.DataFrame


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
        guides count only when the cell has no other), ``guide_umis`` (of the whole cell),
        ``guide_share`` (of the top guide) and ``n_guides`` (called; missing where two guides compete
        under dominance).

    Raises
    ------
    InputError
        When the mixture is to be fitted to values that are no counts.
    """
    return call_guides(counts, guide_names, targets, settings).cells


def call_guides(
    counts: sparse.csr_matrix,
    guide_names: Sequence[str],
    targets: Mapping[str, str],
    settings: GuideAssignment,
) -> GuideCalls:
    """Call the guides of each cell as :func:`assign_guides` does, and describe guides and cells."""
    counts, names = sparse.csr_matrix(counts), list(guide_names)
    n_cells, n_guides = counts.shape
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # A matrix without guides or without cells has no maximum.
    empty = 0 in counts.shape
    top = np.zeros(n_cells) if empty else counts.max(axis=1).toarray().ravel().astype(np.float64)
    share = np.divide(top, total, out=np.zeros_like(total), where=total > 0)

    fits: GuideFits | None = None
    threshold = np.full(n_guides, float(settings.min_umis))
    status = np.full(n_cells, ASSIGNED, dtype=object)
    if settings.method == DOMINANCE:
        # From half of the UMIs on, two guides can tie; then neither dominates.
        called = _at_least(counts, np.maximum(top, settings.min_umis), threshold)
        n_called = np.diff(called.indptr)
        dominates = (share >= settings.share) & (n_called == 1)
        status[(n_called > 0) & ~dominates] = TOO_MANY_GUIDES
    else:
        if settings.method == MIXTURE:
            fits = fit_guides(count_histograms(counts), settings.min_posterior, settings.min_umis)
            threshold = fits.threshold
            called = _at_least(counts, np.zeros(n_cells), threshold)
            # Elsewhere, such a cell would be one of two guides; here the rest is known to be background.
            on_called = np.asarray(called.sum(axis=1), dtype=np.float64).ravel()
            unclear = on_called < settings.share * total
        else:
            called = _at_least(counts, settings.share * top, threshold)
            unclear = np.zeros(n_cells, dtype=bool)
        n_called = np.diff(called.indptr)
        status[n_called > settings.max_guides] = TOO_MANY_GUIDES
        status[unclear] = NO_GUIDE
    status[n_called == 0] = NO_GUIDE

    assigned = status == ASSIGNED
    guide_id, label = _names_of_calls(called, assigned, names, targets)
    number = pd.Series(n_called, dtype="Int64")
    if settings.method == DOMINANCE:
        number[status == TOO_MANY_GUIDES] = pd.NA
    cells = pd.DataFrame(
        {
            "status": status,
            "guide_id": guide_id,
            "label": label,
            "guide_umis": total,
            "guide_share": share,
            "n_guides": number,
        }
    )
    guides = pd.DataFrame(
        {
            "guide": names,
            "target": [targets[name] for name in names],
            "cells_counted": _cells_with_a_count(counts),
            "umis": np.asarray(counts.sum(axis=0)).ravel().astype(np.int64),
            "threshold": threshold.astype(np.int64),
            "cells_called": _cells_of(called, np.ones(n_cells, dtype=bool)),
            "cells_assigned": _cells_of(called, assigned),
            "cells_alone": _cells_of(called, assigned & (n_called == 1)),
        }
    )
    fitted = GuideFits.empty_table(n_guides) if fits is None else fits.table()
    return GuideCalls(cells, pd.concat([guides, fitted], axis=1), _classes(cells))


def _classes(cells: pd.DataFrame) -> pd.DataFrame:
    """Count cells by status and number of called guides, fewest guides first."""
    table = cells.groupby(["status", "n_guides"], dropna=False).size().rename("cells").reset_index()
    table = table.sort_values(["n_guides", "status"], na_position="last", ignore_index=True)
    table["share"] = table["cells"] / max(len(cells), 1)
    return table


def _cells_with_a_count(counts: sparse.csr_matrix) -> np.ndarray:
    """Count the cells with a UMI of each guide ``(guides,)``."""
    cells = np.zeros(counts.shape[1], dtype=np.int64)
    for first in range(0, counts.nnz, BLOCK):
        block = slice(first, first + BLOCK)
        cells += np.bincount(counts.indices[block][counts.data[block] > 0], minlength=len(cells))
    return cells


def _cells_of(called: sparse.csr_matrix, cells: np.ndarray) -> np.ndarray:
    """Count, for each guide, the cells of a mask that it was called in ``(guides,)``."""
    kept = np.repeat(cells, np.diff(called.indptr))
    return np.bincount(called.indices[kept], minlength=called.shape[1])


def _blocks_of_rows(counts: sparse.csr_matrix) -> Iterator[slice]:
    """Yield runs of rows that hold about ``BLOCK`` entries together, a row or more each."""
    first = 0
    while first < counts.shape[0]:
        last = int(np.searchsorted(counts.indptr, counts.indptr[first] + BLOCK, side="right")) - 1
        last = max(last, first + 1)
        yield slice(first, last)
        first = last


def _at_least(
    counts: sparse.csr_matrix, floor_of_cell: np.ndarray, floor_of_guide: np.ndarray
) -> sparse.csr_matrix:
    """Return the entries of ``counts`` that reach the floors of their row and column."""
    values = [np.zeros(0, dtype=counts.dtype)]
    rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for block in _blocks_of_rows(counts):
        ends = counts.indptr[block.start : block.stop + 1]
        value, column = counts.data[ends[0] : ends[-1]], counts.indices[ends[0] : ends[-1]]
        row = np.repeat(np.arange(block.start, block.stop), np.diff(ends))
        keep = (value > 0) & (value >= floor_of_cell[row]) & (value >= floor_of_guide[column])
        values.append(value[keep])
        rows.append(row[keep])
        columns.append(column[keep])
    at = (np.concatenate(rows), np.concatenate(columns))
    called = sparse.csr_matrix((np.concatenate(values), at), shape=counts.shape)
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

"""What is known about each cell before any filter: perturbation, guide, batch, library size, mito."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.contracts import (
    BATCH,
    CELL_TYPE,
    CONTROL,
    DOSE,
    GUIDE_ID,
    IS_CONTROL,
    LIBRARY_SIZE,
    N_PERTURBED_GENES,
    PERTURBATION,
    PERTURBATION_TYPE,
)
from biojepa.errors import InputError
from biojepa.guides import ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES, GuideAssignment, call_guides
from biojepa.guides.settings import DOMINANCE, THRESHOLD
from biojepa.labels import control_names, genes_of, is_control_name, is_missing, normalize_label
from biojepa.preprocess.cell_labels import (
    listed,
    normalize_labels,
    other_controls,
    unread_labels,
    unsplit_labels,
)
from biojepa.raw.read import RawScreen
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import read_guide_table, require_column

log = logging.getLogger(__name__)

N_COUNTS, N_GENES, PCT_MITO = "n_counts", "n_genes", "pct_mito"
GUIDE_UMIS, GUIDE_SHARE = "guide_umis", "guide_share"
STATUS = "status"
NO_LIBRARY_SIZE = "no_library_size"
# Of the 13 mitochondrial genes that code for proteins. One or two say more about themselves than about what
# share of the transcripts of a cell is mitochondrial.
MIN_MITO_GENES = 5
# A screen of fewer genes looks like a part of the transcriptome.
PANEL_GENES = 2_000
# From this median of called guides on, nearly every cell has a combination of its own.
MANY_GUIDES = 3
MANY_GUIDES_FIX = (
    "in a screen of many guides in each cell (high multiplicity of infection), hardly two cells carry the "
    "same: lower preprocess.guide_assignment.max_guides, which drops cells with more, or give labels in "
    "`perturbation_column`"
)


@dataclass
class CellTable:
    """Cells before filtering.

    Parameters
    ----------
    obs
        Columns of the contract, ``n_counts``, ``n_genes``, ``pct_mito`` and ``status`` (assigned, no_guide,
        too_many_guides); ``perturbation`` is None and ``library_size`` NaN where unknown.
    missing_filter
        Name of the filter that drops cells without a perturbation: no_guide or unlabelled.
    notes
        What a reader of qc.tsv should know, by filter.
    rules
        What stands in the column threshold of qc.tsv, by filter, where it is not the rule of the settings.
    guide_calls, guides_per_cell
        Guides and classes of cells, see :class:`biojepa.guides.GuideCalls`; None where no guides were called.
    """

    obs: pd.DataFrame
    missing_filter: str
    notes: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    guide_calls: pd.DataFrame | None = None
    guides_per_cell: pd.DataFrame | None = None


@dataclass
class CellSums:
    """Sums over the genes of each cell, from one pass over the counts.

    Parameters
    ----------
    n_counts, mito
        ``(cells,)`` counts of all genes, and of mitochondrial ones.
    n_genes
        ``(cells,)`` detected genes.
    guides
        ``(cells, guides)`` CSR; without columns where they were not asked for.
    """

    n_counts: np.ndarray
    n_genes: np.ndarray
    mito: np.ndarray
    guides: sparse.csr_matrix


def sum_cells(screen: RawScreen, with_guides: bool = False) -> CellSums:
    """Read the counts once, in blocks of cells."""
    n_counts, mito = np.zeros((2, screen.n_cells))
    n_genes = np.zeros(screen.n_cells, dtype=np.int32)
    weights = np.stack([np.ones(len(screen.var)), is_mitochondrial(screen)], axis=1)
    guides = []
    for first, genes, of_guides in screen.blocks():
        part = slice(first, first + genes.shape[0])
        n_counts[part], mito[part] = (genes @ weights).T
        n_genes[part] = np.diff(genes.indptr)
        if with_guides and of_guides is not None:
            guides.append(of_guides)
    joined = sparse.vstack(guides, format="csr") if guides else (screen.n_cells, 0)
    return CellSums(n_counts, n_genes, mito, sparse.csr_matrix(joined))


def is_mitochondrial(screen: RawScreen) -> np.ndarray:
    """Tell which genes ``(genes,)`` are mitochondrial by their symbol."""
    return screen.var.index.str.upper().str.startswith("MT-").astype(bool)


def few_mito_genes(screen: RawScreen, source: ScreenSource) -> str:
    """Say why the mitochondrial share cannot be told; empty where it can, or a column says it."""
    names = screen.var.index[is_mitochondrial(screen)].astype(str).tolist()
    if source.mito_column or len(names) >= MIN_MITO_GENES:
        return ""
    found = f"{len(names)} MT- genes ({', '.join(names)})" if names else "no MT- genes"
    return (
        f"mitochondrial share unknown: no mito_column and {found}, of which {MIN_MITO_GENES} are needed; "
        "name the column that holds the share in mito_column"
    )


def panel_note(screen: RawScreen, source: ScreenSource) -> str:
    """Say that the depth may be that of a panel of genes; empty where a column says it, or genes are many."""
    n_genes = len(screen.var)
    if source.library_size_column or n_genes >= PANEL_GENES:
        return ""
    return (
        f"depth is the sum over {n_genes:,} genes; if the matrix is part of the transcriptome, name the "
        "column with the depth of the whole in library_size_column"
    )


def annotate_cells(screen: RawScreen, source: ScreenSource, guides: GuideAssignment) -> CellTable:
    """Put together what the file, its tables and the guide counts say about each cell.

    Raises
    ------
    InputError
        When a column is missing, no control is found, or most cells have no library size.
    """
    sums = sum_cells(screen, with_guides=True) if needs_guide_counts(screen, source) else None
    table = label_cells(screen, source, guides, None if sums is None else sums.guides)
    obs = screen.obs
    table.obs[BATCH] = batches_of(screen, source)
    by = source.batch_column or screen.sample_column or "nothing, so one"
    log.info("batches by %s: %d", by, table.obs[BATCH].nunique())
    table.obs[CELL_TYPE] = cell_types_of(obs, source)

    sums = sums or sum_cells(screen)
    table.obs[N_COUNTS] = sums.n_counts
    table.obs[N_GENES] = sums.n_genes
    table.obs[LIBRARY_SIZE] = library_sizes(obs, sums.n_counts, source)
    if np.isnan(table.obs[LIBRARY_SIZE]).any():
        table.notes[NO_LIBRARY_SIZE] = f"no positive number in column {source.library_size_column!r}"
    table.obs[PCT_MITO] = mitochondrial_percent(screen, sums, source)
    if note := panel_note(screen, source):
        log.warning("%s: %s", source.path or source.dataset, note)
        table.notes["min_counts"] = note
    if note := few_mito_genes(screen, source):
        # Without any, nothing is lost that the reader may count on; the line of the filter says it.
        if is_mitochondrial(screen).any():
            log.warning("%s: %s", source.path or source.dataset, note)
        table.notes["max_pct_mito"] = note
    return table


def needs_guide_counts(screen: RawScreen, source: ScreenSource) -> bool:
    """Tell whether perturbations are called from the counts of guides."""
    told = source.perturbation_column or screen.called_guides is not None
    return not told and screen.guide_names is not None


def label_cells(
    screen: RawScreen,
    source: ScreenSource,
    guides: GuideAssignment,
    guide_counts: sparse.csr_matrix | None = None,
) -> CellTable:
    """Say what perturbed each cell, without looking at the counts of genes.

    Parameters
    ----------
    screen, source, guides
        The screen, what its columns mean, and how guides are called.
    guide_counts
        ``(cells, guides)``; needed where :func:`needs_guide_counts` says so.

    Raises
    ------
    InputError
        When a column is missing, or no control is found.
    """
    if source.perturbation_column:
        table = _from_labels(screen, source)
    elif screen.called_guides is not None:
        table = _from_guide_calls(screen, source, guides)
    elif screen.guide_names is not None:
        if guide_counts is None:
            raise ValueError("perturbations of this screen are called from guide counts, which are missing")
        table = _from_guide_counts(screen, guide_counts, source, guides)
    elif source.guide_column and source.guide_table:
        table = _from_guide_column(screen, source)
    else:
        raise InputError(
            f"dataset table, row {source.dataset!r}",
            "no `perturbation_column`, and no guide counts in the file",
            "labels of cells, guide features in the matrix, `guide_counts`, `guide_calls`, or `guide_column` "
            "with `guide_table`",
            f"set `perturbation_column` to one of: {', '.join(map(str, screen.obs.columns)) or 'none'}",
        )
    known = table.obs[PERTURBATION]
    if not (known == CONTROL).any():
        raise InputError(
            source.path,
            "no control cells",
            "cells of an unperturbed control",
            "correct `control_label`, or use a screen with a control",
        )
    genes = {label: len(genes_of(label)) for label in known.dropna().unique()}
    table.obs[IS_CONTROL] = (known == CONTROL).to_numpy()
    table.obs[N_PERTURBED_GENES] = known.map(genes).fillna(0).astype(np.int32).to_numpy()
    table.obs[PERTURBATION_TYPE] = source.perturbation_type
    table.obs[DOSE] = np.nan
    return table


def batches_of(screen: RawScreen, source: ScreenSource) -> np.ndarray:
    """Return the batch of each cell as text ``(cells,)``: a column, else the sample, else ``all``."""
    column = source.batch_column or screen.sample_column
    return _text_column(screen.obs, column, source, "batch_column", "all")


def cell_types_of(obs: pd.DataFrame, source: ScreenSource) -> np.ndarray:
    """Return the cell type of each cell as text ``(cells,)``, ``unknown`` without a column."""
    return _text_column(obs, source.cell_type_column, source, "cell_type_column", "unknown")


def _from_labels(screen: RawScreen, source: ScreenSource) -> CellTable:
    """Take the perturbation of each cell from its label."""
    raw = require_column(screen.obs, source.perturbation_column, source.columns_in, "perturbation_column")
    controls = control_names(source.control_label)
    labels = normalize_labels(raw.tolist(), source.separator, controls, source.label_pattern)
    if not (labels == CONTROL).any():
        raise _no_control(
            f"{source.columns_in}, column {source.perturbation_column!r}", raw.tolist(), source, "labels"
        )
    obs = pd.DataFrame({PERTURBATION: labels}, index=screen.obs.index)
    guide_ids = _text_column(screen.obs, source.guide_column, source, "guide_column", default="", missing="")
    obs[GUIDE_ID] = _without_missing(guide_ids)
    obs[STATUS] = np.where(pd.isna(labels), NO_GUIDE, ASSIGNED)
    notes = []
    others = other_controls(raw.tolist(), controls)
    if others:
        notes.append(f"left out, add to `control_label` (joined by ;) to use: {listed(others)}")
    if unread := unread_labels(raw.tolist(), labels, others):
        notes.append(f"no perturbation in: {listed(unread)}")
    join, unsplit = unsplit_labels(labels)
    if unsplit:
        note = f"taken as single genes, set `separator` to {join} if they are combinations: {listed(unsplit)}"
        log.warning("%s, column %r: %s", source.path, source.perturbation_column, note)
        notes.append(note)
    return CellTable(obs, "unlabelled", {"unlabelled": "; ".join(notes)} if notes else {})


def _from_guide_counts(
    screen: RawScreen,
    counts: sparse.csr_matrix,
    source: ScreenSource,
    settings: GuideAssignment,
    names: list[str] | None = None,
) -> CellTable:
    """Call guides from their counts and translate them to targets."""
    if names is None:
        names = [] if screen.guide_names is None else [str(name) for name in screen.guide_names]
    targets = guide_targets(names, source)
    called = call_guides(counts, names, targets, settings)
    calls = called.cells
    obs = pd.DataFrame({PERTURBATION: calls["label"].to_numpy()}, index=screen.obs.index)
    obs[GUIDE_ID] = calls["guide_id"].fillna("").to_numpy()
    obs[STATUS] = calls["status"].to_numpy()
    obs[GUIDE_UMIS] = calls["guide_umis"].to_numpy()
    obs[GUIDE_SHARE] = calls["guide_share"].to_numpy()
    if not (obs[PERTURBATION] == CONTROL).any():
        many = said_of_many_guides(called.classes)
        raise InputError(
            source.path,
            f"no cell that carries control guides alone ({settings}){many}",
            "cells of an unperturbed control",
            MANY_GUIDES_FIX
            if many
            else "loosen preprocess.guide_assignment, or check the control guides in `guide_table`",
        )
    seen = {gene for label in obs[PERTURBATION].dropna().unique() for gene in genes_of(label)}
    unseen = sorted({gene for label in targets.values() for gene in genes_of(label)} - seen)
    notes = {"no_guide": f"targets without a cell: {', '.join(unseen)}"} if unseen else {}
    return CellTable(obs, "no_guide", notes, guide_calls=called.guides, guides_per_cell=called.classes)


def said_of_many_guides(classes: pd.DataFrame | None) -> str:
    """Say that cells carry so many guides that their labels hardly repeat; empty where they do not.

    Parameters
    ----------
    classes
        ``status``, ``n_guides`` and ``cells``, see :class:`biojepa.guides.GuideCalls`; None where no guides
        were called.
    """
    if classes is None:
        return ""
    # Cells with more guides than accepted count too: they are what such a screen is made of.
    known = classes[classes["n_guides"].fillna(0) > 0]
    number = np.repeat(known["n_guides"].to_numpy(dtype=np.int64), known["cells"].to_numpy(dtype=np.int64))
    if not len(number) or np.median(number) < MANY_GUIDES:
        return ""
    middle = np.median(number)
    return f"; cells with a guide carry a median of {middle:g} guides, and a label names the targets of all"


def _from_guide_calls(screen: RawScreen, source: ScreenSource, settings: GuideAssignment) -> CellTable:
    """Take the guides that somebody else called in each cell, and translate them to targets."""
    umis = sparse.csr_matrix(screen.called_guides)
    names = [str(name) for name in ([] if screen.called_names is None else screen.called_names)]
    # A call stands whatever its UMIs; only how many guides a cell may carry is for the settings to say.
    called = sparse.csr_matrix((np.ones_like(umis.data), umis.indices, umis.indptr), shape=umis.shape)
    most = 1 if settings.method == DOMINANCE else settings.max_guides
    rule = GuideAssignment(method=THRESHOLD, min_umis=1, min_share=1.0, max_guides=most)
    table = _from_guide_counts(screen, called, source, rule, names)
    # What was called elsewhere has no threshold that is known here, and UMIs only where the table has them.
    known = not np.isnan(umis.data).any()
    if known:
        total = np.asarray(umis.sum(axis=1), dtype=np.float64).ravel()
        top = umis.max(axis=1).toarray().ravel() if umis.shape[1] else np.zeros(len(total))
        table.obs[GUIDE_UMIS] = total
        table.obs[GUIDE_SHARE] = np.divide(top, total, out=np.zeros_like(total), where=total > 0)
    else:
        table.obs = table.obs.drop(columns=[GUIDE_UMIS, GUIDE_SHARE])
    if table.guide_calls is not None:
        unknown = pd.array([pd.NA] * len(names), dtype="Int64")
        sums = np.asarray(umis.sum(axis=0)).ravel()
        table.guide_calls["umis"] = sums.astype(np.int64) if known else unknown
        table.guide_calls["threshold"] = unknown
    table.rules = {
        NO_GUIDE: f"called in {Path(source.guide_calls).name or 'the screen'}",
        TOO_MANY_GUIDES: f"≤ {most} guide{'s' if most > 1 else ''}",
    }
    return table


def _from_guide_column(screen: RawScreen, source: ScreenSource) -> CellTable:
    """Translate the guide that the file names for each cell to its target; a cell may have none."""
    raw = require_column(screen.obs, source.guide_column, source.columns_in, "guide_column")
    text = raw.astype(object).where(raw.notna(), "").astype(str)
    guides = _without_missing(text.to_numpy(dtype=object))
    targets = guide_targets(sorted(set(guides) - {""}), source, every_target=False)
    labels = np.array([targets.get(guide) for guide in guides], dtype=object)
    obs = pd.DataFrame({PERTURBATION: labels, GUIDE_ID: guides}, index=screen.obs.index)
    obs[STATUS] = np.where(pd.isna(labels), NO_GUIDE, ASSIGNED)
    unread = unread_labels(text.where(text != "", None), labels)
    note = f"no guide, or a guide without a target, in: {listed(unread)}"
    return CellTable(obs, "unlabelled", {"unlabelled": note} if unread else {})


def guide_targets(names: list[str], source: ScreenSource, every_target: bool = True) -> dict[str, str]:
    """Return the normalized target of each guide, from ``guide_table`` or by ``label_pattern``.

    Parameters
    ----------
    names
        Guides.
    source
        The screen.
    every_target
        Whether every guide must have a target; otherwise one without is left out.

    Raises
    ------
    InputError
        When a guide has no target, or no guide targets the control.
    """
    if source.guide_table:
        table = read_guide_table(source.guide_table, every_target)
        where = source.guide_table
        missing = [name for name in names if name not in table.index]
        if missing:
            raise InputError(
                f"{where}, column guide",
                f"{len(missing)} of {len(names)} guides of the screen missing, such as {missing[0]!r}",
                "a row for every guide",
                "add the rows, or make the two spellings agree",
            )
        raw = table.loc[names].tolist()
    elif source.label_pattern:
        where, raw = f"dataset table, row {source.dataset!r}, column label_pattern", names
    else:
        raise InputError(
            f"dataset table, row {source.dataset!r}",
            "guides, but neither `guide_table` nor `label_pattern`",
            "a way from a guide to its target",
            "give a `guide_table` with columns guide and target",
        )
    controls = control_names(source.control_label)
    labels = [normalize_label(target, source.separator, controls, source.label_pattern) for target in raw]
    if CONTROL not in labels:
        raise _no_control(str(where), raw, source, "targets")
    # Another control than the one that was named is a mistake to tell, in any case.
    unknown = [
        name
        for name, label, target in zip(names, labels, raw, strict=True)
        if label is None and (every_target or not is_missing(target))
    ]
    if unknown:
        raise InputError(
            str(where),
            f"target {raw[names.index(unknown[0])]!r} of guide {unknown[0]!r}",
            "a gene or the control label",
            "correct it; several control labels are joined by ; in `control_label`",
        )
    return {name: label for name, label in zip(names, labels, strict=True) if label is not None}


def _no_control(where: str, raw: Iterable[object], source: ScreenSource, kind: str) -> InputError:
    """Build the error for a control label that matches nothing."""
    frequent = pd.Series(list(raw), dtype=object).dropna().astype(str).value_counts()
    wanted = repr(source.control_label) if source.control_label else "any of the usual control names"
    # Labels that are called like controls say more than the most frequent ones, which are perturbations.
    usual = [label for label in frequent.index if is_control_name(label.strip())]
    near = difflib.get_close_matches(source.control_label, list(frequent.index), n=1, cutoff=0.75)
    shown = usual or near
    listed = ", ".join(f"{label!r} ({frequent[label]})" for label in (shown or frequent.index)[:10])
    what = f"{kind} called like controls" if usual else f"nearest {kind}" if near else f"most frequent {kind}"
    hint = f"did you mean {shown[0]!r}? Set" if shown else "set"
    return InputError(
        where,
        f"nothing that matches the control label {wanted}; {what}: {listed or 'none at all'}",
        "control cells",
        f"{hint} `control_label` in the dataset table to the one that means control",
    )


def _text_column(
    obs: pd.DataFrame,
    column: str,
    source: ScreenSource,
    setting: str,
    default: str,
    missing: str = "unknown",
) -> np.ndarray:
    """Return a column as text ``(cells,)``: ``default`` without a column, ``missing`` for empty values."""
    if not column:
        return np.full(len(obs), default, dtype=object)
    values = require_column(obs, column, source.columns_in, setting)
    return values.astype(object).where(values.notna(), missing).astype(str).to_numpy(dtype=object)


def _without_missing(names: np.ndarray) -> np.ndarray:
    """Return names ``(cells,)`` with an empty text for those that say that there is none, such as ``NA``."""
    codes, distinct = pd.factorize(names)
    return np.array(["" if is_missing(name) else name for name in distinct], dtype=object)[codes]


def _number_column(obs: pd.DataFrame, column: str, source: ScreenSource, setting: str) -> np.ndarray:
    """Return a column as float64 ``(cells,)``; a word in it is an error, an empty field or ``NA`` NaN."""
    values = require_column(obs, column, source.columns_in, setting)
    numbers = pd.to_numeric(values.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    words = values[np.isnan(numbers)]
    words = words[[not is_missing(word) for word in words]]
    if len(words):
        raise InputError(
            f"{source.columns_in}, column {column!r}, cell {words.index[0]!r}",
            repr(words.iloc[0]),
            "a number",
            f"correct the value, or name another column in `{setting}`",
        )
    return numbers


def library_sizes(obs: pd.DataFrame, sums: np.ndarray, source: ScreenSource) -> np.ndarray:
    """Return the UMIs of each cell over its transcriptome ``(cells,)``: a column, or the sums given.

    NaN where the column has no positive number.

    Raises
    ------
    InputError
        When most cells have none, or have less than their counts in the matrix.
    """
    if not source.library_size_column:
        return sums
    column = source.library_size_column
    sizes = _number_column(obs, column, source, "library_size_column")
    known = np.isfinite(sizes) & (sizes > 0)
    where = f"{source.columns_in}, column {column!r}"
    wrong = np.flatnonzero(~known)
    if 2 * len(wrong) > len(sizes):
        raise InputError(
            where,
            f"no positive number for {len(wrong)} of {len(sizes)} cells, such as {obs.index[wrong[0]]!r}",
            "the UMIs of most cells",
            "name the column with total UMI counts in `library_size_column`, or leave it empty if the file "
            "holds the whole transcriptome",
        )
    sizes = np.where(known, sizes, np.nan)
    # A column of log counts or of gene numbers would pass every other check.
    if np.mean(sums[known] > sizes[known] * 1.001) > 0.5:
        raise InputError(
            where,
            f"values below the counts in the matrix (median {np.median(sizes[known]):.4g}, "
            f"of the matrix {np.median(sums[known]):.4g})",
            "UMIs over the whole transcriptome, at least the sum over the genes in the file",
            "name the column with total UMI counts in `library_size_column`, or leave it empty",
        )
    return sizes


def mitochondrial_percent(screen: RawScreen, sums: CellSums, source: ScreenSource) -> np.ndarray:
    """Return the mitochondrial share of each cell in percent ``(cells,)``, NaN where unknown.

    It is that of a column, or of the counts, where ``MIN_MITO_GENES`` genes or more are mitochondrial.
    """
    if source.mito_column:
        values = _number_column(screen.obs, source.mito_column, source, "mito_column")
        known = values[np.isfinite(values)]
        # Shares above 1 can only be percent, and a screen without one cell above 1 % does not exist.
        return values * 100 if known.size and known.max() <= 1 else values
    if is_mitochondrial(screen).sum() < MIN_MITO_GENES:
        return np.full(screen.n_cells, np.nan)
    some = sums.n_counts > 0
    return np.divide(100 * sums.mito, sums.n_counts, out=np.zeros_like(sums.mito), where=some)

"""Which cells and genes stay, and why the others went: one row of qc.tsv per filter.

No filter here looks at what a perturbation did to its cells: weak guides and cells that did not
respond are only flagged, so that the truth of a held-out perturbation is never edited.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import median_abs_deviation

from biojepa.contracts import BATCH, CONTROL, LIBRARY_SIZE, PERTURBATION, QC_COLUMNS
from biojepa.errors import InputError
from biojepa.guides import ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES, GuideAssignment
from biojepa.guides.settings import MIXTURE, THRESHOLD
from biojepa.labels import genes_of
from biojepa.preprocess.annotate import (
    MANY_GUIDES_FIX,
    N_GENES,
    NO_LIBRARY_SIZE,
    PCT_MITO,
    STATUS,
    CellTable,
    said_of_many_guides,
)
from biojepa.preprocess.settings import PreprocessSettings
from biojepa.raw.read import RawScreen

log = logging.getLogger(__name__)

DOUBLET_SCORE = "doublet_score"
OFF = "off"
LIMIT_COLUMNS = ("metric", "batch", "limit_low", "limit_high")
# The MAD of a few cells is noise; smaller batches get the limits of all cells.
MIN_CELLS_FOR_LIMITS = 50
# Scrublet needs neighbourhoods; below this a batch is left alone.
MIN_CELLS_FOR_DOUBLETS = 100
# A larger batch is dealt at random into parts, each scored on its own, so that memory and time are bounded.
MAX_CELLS_FOR_DOUBLETS = 50_000
# Entries of the batches that are read together: 0.3 GB.
BATCH_ENTRIES = 1 << 25
# Most variable genes in which doublets are looked for.
DOUBLET_GENES = 2_000


class Funnel:
    """Cells that are left, one row per filter, and which filter dropped each of the others.

    ``dropped_by`` ``(cells,)`` is the position of the filter in ``names``, -1 where the cell is left;
    ``limits`` holds the limits of the filters of quality, see :func:`cell_limits`.

    Parameters
    ----------
    n_cells
        Cells at the start.
    left_out
        Barcodes that the reader left out as no cells of the screen: number and reason, by filter.
    """

    def __init__(self, n_cells: int, left_out: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.keep = np.ones(n_cells, dtype=bool)
        self.dropped_by = np.full(n_cells, -1, dtype=np.int8)
        self.names: list[str] = []
        self.limits = pd.DataFrame(columns=list(LIMIT_COLUMNS))
        self.rows: list[dict[str, object]] = []
        before = n_cells + sum(n for n, _ in (left_out or {}).values())
        for name, (n, note) in (left_out or {}).items():
            row = (name, "has a row", before, n, before - n, note)
            self.rows.append(dict(zip(QC_COLUMNS, row, strict=True)))
            log.info("%s: %d of %d barcodes left out. %s", name, n, before, note)
            before -= n

    def drop(self, name: str, threshold: object, bad: np.ndarray, note: str = "") -> None:
        """Drop cells for which ``bad`` ``(cells,)`` holds; each counts for the first filter only."""
        before = int(self.keep.sum())
        self.dropped_by[self.keep & bad] = len(self.names)
        self.names.append(name)
        self.keep &= ~bad
        after = int(self.keep.sum())
        row = (name, str(threshold), before, before - after, after, note)
        self.rows.append(dict(zip(QC_COLUMNS, row, strict=True)))
        log.info("%s (%s): %d cells removed, %d left. %s", name, threshold, before - after, after, note)

    def skip(self, name: str, note: str = "") -> None:
        """Record a filter that did not apply."""
        self.drop(name, OFF, np.zeros(self.keep.size, dtype=bool), note)

    def table(self) -> pd.DataFrame:
        """Return the rows of qc.tsv."""
        return pd.DataFrame(self.rows, columns=list(QC_COLUMNS))


def filter_cells(screen: RawScreen, cells: CellTable, settings: PreprocessSettings, where: str) -> Funnel:
    """Apply the filters of cells in order.

    Parameters
    ----------
    screen
        The counts, which only doublets are looked for in.
    cells
        What is known about the cells; ``doublet_score`` is added where it is computed.
    settings
        Thresholds.
    where
        Name of the screen, for messages.

    Raises
    ------
    InputError
        When too few cells are left of the control or of every perturbation.
    """
    obs = cells.obs
    funnel = Funnel(len(obs), screen.left_out)
    status = obs[STATUS].to_numpy()
    calls = settings.guide_assignment
    by_guide = cells.missing_filter == NO_GUIDE
    missing = (status == NO_GUIDE) | ((status == ASSIGNED) & obs[PERTURBATION].isna().to_numpy())
    rule = _rule_of_calls(calls) if by_guide else "has a label"
    rule = cells.rules.get(cells.missing_filter, rule)
    funnel.drop(cells.missing_filter, rule, missing, cells.notes.get(cells.missing_filter, ""))
    if by_guide:
        rule = f"share ≥ {calls.share:g}" if calls.method == "dominance" else f"≤ {calls.max_guides} guides"
        funnel.drop(TOO_MANY_GUIDES, cells.rules.get(TOO_MANY_GUIDES, rule), status == TOO_MANY_GUIDES)

    size, genes = obs[LIBRARY_SIZE].to_numpy(), obs[N_GENES].to_numpy()
    if NO_LIBRARY_SIZE in cells.notes:
        funnel.drop(NO_LIBRARY_SIZE, "> 0 UMIs", np.isnan(size), cells.notes[NO_LIBRARY_SIZE])
    mito = obs[PCT_MITO].to_numpy()
    of_panel = cells.notes.get("min_counts", "")
    funnel.drop("min_counts", f"≥ {settings.min_counts} UMIs", size < settings.min_counts, of_panel)
    funnel.drop("min_genes", f"≥ {settings.min_genes} genes", genes < settings.min_genes)
    no_mito = cells.notes.get("max_pct_mito", "")
    if np.isnan(mito).all() and not no_mito:
        no_mito = "mitochondrial share unknown: mito_column is empty in every cell"
    if no_mito or settings.max_pct_mito is None:
        funnel.skip("max_pct_mito", no_mito)
    else:
        funnel.drop("max_pct_mito", f"≤ {settings.max_pct_mito:g} %", mito > settings.max_pct_mito)
    _filter_by_mad(funnel, obs, settings, no_mito)
    _filter_doublets(funnel, screen, obs, settings)
    filter_small_perturbations(
        funnel, obs[PERTURBATION], settings.min_cells_per_perturbation, where, cells.guides_per_cell
    )
    return funnel


def _rule_of_calls(calls: GuideAssignment) -> str:
    """Say from what on a guide is called, with every number that decides it."""
    parts = [calls.method]
    if calls.method == MIXTURE:
        parts.append(f"posterior ≥ {calls.min_posterior:g}")
    parts.append(f"≥ {calls.min_umis} UMIs")
    if calls.method == MIXTURE and calls.share > 0:
        parts.append(f"called share ≥ {calls.share:g}")
    if calls.method == THRESHOLD:
        parts.append(f"≥ {calls.share:g} of top guide")
    return ", ".join(parts)


def cell_limits(obs: pd.DataFrame, settings: PreprocessSettings, among: np.ndarray) -> pd.DataFrame:
    """Return the limits within which a cell of each batch is kept, fixed ones and those by MAD together.

    Parameters
    ----------
    obs
        Of all cells.
    settings
        Thresholds.
    among
        ``(cells,)`` cells that set the limits by MAD.

    Returns
    -------
    pandas.DataFrame
        ``metric`` (a column of ``obs``), ``batch``, ``limit_low``, ``limit_high`` in the unit of the
        metric; NaN without a limit.
    """
    fixed = {
        LIBRARY_SIZE: (float(settings.min_counts), np.inf),
        N_GENES: (float(settings.min_genes), np.inf),
        PCT_MITO: (-np.inf, np.inf if settings.max_pct_mito is None else settings.max_pct_mito),
    }
    batches, rows = obs[BATCH].to_numpy(), []
    for metric, (low, high) in fixed.items():
        values = obs[metric].to_numpy(dtype=np.float64)
        if np.isnan(values).all():
            high = np.inf  # nothing is known, so nothing is dropped
        logged = metric != PCT_MITO
        found: dict[object, tuple[float, float]] = {}
        if settings.mad_threshold is not None:
            found = mad_limits(np.log1p(values) if logged else values, batches, settings.mad_threshold, among)
        for batch in pd.unique(batches):
            below, above = found.get(batch, (-np.inf, np.inf))
            if logged:
                below, above = np.expm1(below), np.expm1(above)
            limits = (max(low, below) if logged else low, min(high, above))
            rows.append((metric, batch, *(limit if np.isfinite(limit) else np.nan for limit in limits)))
    return pd.DataFrame(rows, columns=list(LIMIT_COLUMNS))


def _filter_by_mad(funnel: Funnel, obs: pd.DataFrame, settings: PreprocessSettings, no_mito: str) -> None:
    """Drop outliers of their batch in library size, genes and mitochondrial share."""
    values = {
        "mad_counts": (np.log1p(obs[LIBRARY_SIZE].to_numpy()), "both"),
        "mad_genes": (np.log1p(obs[N_GENES].to_numpy()), "both"),
        "mad_mito": (obs[PCT_MITO].to_numpy(), "upper"),
    }
    batches = obs[BATCH].to_numpy()
    funnel.limits = cell_limits(obs, settings, funnel.keep)
    threshold = settings.mad_threshold
    small = pd.Series(batches[funnel.keep]).value_counts()
    n_small = int((small < MIN_CELLS_FOR_LIMITS).sum()) if len(small) > 1 else 0
    note = f"batches of fewer than {MIN_CELLS_FOR_LIMITS} cells, judged by all cells together: {n_small}"
    # All three limits are taken from the same cells, so that their order does not matter.
    outliers = {
        name: np.zeros(len(obs), dtype=bool)
        if threshold is None
        else mad_outliers(value, batches, threshold, side, funnel.keep)
        for name, (value, side) in values.items()
    }
    for name, (_, side) in values.items():
        if threshold is None or (name == "mad_mito" and no_mito):
            funnel.skip(name, no_mito if name == "mad_mito" else "")
        else:
            rule = f"{'≤' if side == 'upper' else 'within'} {threshold:g} MAD of the batch median"
            funnel.drop(name, rule, outliers[name], note if n_small else "")


def mad_outliers(
    values: np.ndarray,
    batches: np.ndarray,
    threshold: float,
    side: str = "both",
    among: np.ndarray | None = None,
) -> np.ndarray:
    """Tell which cells ``(cells,)`` lie outside median ± threshold × MAD of their batch.

    The MAD is not scaled to a standard deviation: 5 MAD are 3.4 standard deviations of a normal
    distribution. Where more than half of a batch has the same value, the MAD is 0 and says nothing;
    no cell is an outlier then. NaN is never an outlier. ``among`` restricts the cells that set the
    limits. Small batches are judged by all cells, see :func:`mad_limits`.
    """
    outlier = np.zeros(values.size, dtype=bool)
    for batch, (low, high) in mad_limits(values, batches, threshold, among).items():
        here = batches == batch
        outlier |= here & (values > high)
        if side == "both":
            outlier |= here & (values < low)
    return outlier


def mad_limits(
    values: np.ndarray, batches: np.ndarray, threshold: float, among: np.ndarray | None = None
) -> dict[object, tuple[float, float]]:
    """Return median ± threshold × MAD of each batch; a batch whose MAD is 0, or without values, has none.

    Batches with fewer than ``MIN_CELLS_FOR_LIMITS`` values take those of all cells together.
    """
    among = np.ones(values.size, dtype=bool) if among is None else among
    everywhere = values[among & np.isfinite(values)]
    limits: dict[object, tuple[float, float]] = {}
    codes, names = pd.factorize(batches)
    for code, name in enumerate(names):
        basis = values[(codes == code) & among & np.isfinite(values)]
        if not basis.size:
            continue
        basis = basis if basis.size >= MIN_CELLS_FOR_LIMITS else everywhere
        median, spread = float(np.median(basis)), float(median_abs_deviation(basis))
        if spread > 0:
            limits[name] = (median - threshold * spread, median + threshold * spread)
    return limits


def _filter_doublets(
    funnel: Funnel, screen: RawScreen, obs: pd.DataFrame, settings: PreprocessSettings
) -> None:
    """Drop doublets by Scrublet, each batch on its own, because doublets form within one.

    A batch of more than ``MAX_CELLS_FOR_DOUBLETS`` cells is scored in random parts of about equal size: each
    has the cell types of the batch in their shares, which is what simulated doublets need.
    """
    if settings.doublets == "none":
        funnel.skip("doublets")
        return
    score = np.full(len(obs), np.nan)
    doublet = np.zeros(len(obs), dtype=bool)
    notes = []
    for batch, part, n_parts, rows, counts in _batches(screen, obs, funnel.keep, settings.seed):
        if len(rows) < MIN_CELLS_FOR_DOUBLETS:
            notes.append(f"batch {batch} left alone ({len(rows)} cells)")
            continue
        name = f"batch {batch}" if n_parts == 1 else f"batch {batch}, part {part + 1}"
        if n_parts > 1 and part == 0:
            notes.append(
                f"batch {batch} scored in {n_parts} random parts (more than {MAX_CELLS_FOR_DOUBLETS:,} cells)"
            )
        score[rows], called = scrublet_scores(counts, settings.doublet_threshold, settings.seed)
        if called is None:
            notes.append(f"no threshold found in {name}")
        else:
            doublet[rows] = called
    obs[DOUBLET_SCORE] = score
    limit = settings.doublet_threshold
    rule = "scrublet, automatic" if limit is None else f"scrublet ≤ {limit:g}"
    funnel.drop("doublets", rule, doublet, "; ".join(notes))


def _batches(
    screen: RawScreen, obs: pd.DataFrame, keep: np.ndarray, seed: int
) -> Iterator[tuple[str, int, int, np.ndarray, sparse.csr_matrix]]:
    """Yield batch, number of the part, parts of the batch, kept cells of the part, and their counts of genes.

    As many parts as fit ``BATCH_ENTRIES`` are read in one pass; one that is larger is read by itself.
    """
    codes, names = pd.factorize(obs[BATCH].to_numpy())
    parts: list[tuple[str, int, int, np.ndarray]] = []
    for code, name in enumerate(names):
        rows = np.flatnonzero((codes == code) & keep)
        number = max(1, -(-len(rows) // MAX_CELLS_FOR_DOUBLETS))
        dealt = [rows]
        if number > 1:
            shuffled = np.random.default_rng([seed, code]).permutation(rows)
            dealt = [np.sort(part) for part in np.array_split(shuffled, number)]
        parts.extend((name, at, number, part) for at, part in enumerate(dealt))
    entries = [int(obs[N_GENES].to_numpy()[rows].sum(dtype=np.int64)) for *_, rows in parts]
    first = 0
    while first < len(parts):
        end, total = first + 1, entries[first]
        while end < len(parts) and total + entries[end] <= BATCH_ENTRIES:
            end, total = end + 1, total + entries[end]
        together = np.sort(np.concatenate([rows for *_, rows in parts[first:end]]))
        counts = screen.take(together)
        for name, at, number, rows in parts[first:end]:
            yield name, at, number, rows, counts[np.searchsorted(together, rows)]
        first = end


def scrublet_scores(
    counts: sparse.csr_matrix, threshold: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Score how much each cell looks like two (Scrublet, Wolock et al. 2019, as in scanpy).

    Parameters
    ----------
    counts
        Raw counts of one batch ``(cells, genes)``.
    threshold
        Score above which a cell is called; None lets Scrublet choose.
    seed
        Seed of the simulated doublets.

    Returns
    -------
    tuple of numpy.ndarray
        Scores ``(cells,)``, and calls ``(cells,)`` or None when no threshold was found.
    """
    import scanpy as sc  # imported here because it costs 2 s that other runs need not pay

    cells = ad.AnnData(
        X=counts[:, np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 3)]
    )
    if cells.n_vars > DOUBLET_GENES:
        logged = sc.pp.log1p(sc.pp.normalize_total(cells, copy=True), copy=True)
        sc.pp.highly_variable_genes(logged, n_top_genes=DOUBLET_GENES)
        cells = cells[:, logged.var["highly_variable"].to_numpy()].copy()
    # Scanpy's own way from counts keeps so few genes of a panel that its PCA fails.
    doublets = sc.pp.scrublet_simulate_doublets(cells, random_seed=seed)
    for part in (cells, doublets):
        sc.pp.normalize_total(part, target_sum=1e6)
    sc.pp.scrublet(
        cells,
        adata_sim=doublets,
        n_prin_comps=min(30, cells.n_obs - 1, cells.n_vars - 1),
        # Exact neighbours: the same result on every machine.
        use_approx_neighbors=False,
        threshold=threshold,
        random_state=seed,
        verbose=False,
    )
    called = cells.obs["predicted_doublet"].to_numpy(dtype=bool) if "predicted_doublet" in cells.obs else None
    return cells.obs[DOUBLET_SCORE].to_numpy(), called


def filter_small_perturbations(
    funnel: Funnel,
    labels: pd.Series,
    min_cells: int,
    where: str,
    guides_per_cell: pd.DataFrame | None = None,
) -> None:
    """Drop perturbations with too few cells; stop when the control or all others are among them.

    Where that is because cells carry many guides each, which ``guides_per_cell`` tells, the message says so.
    """
    counts = labels[funnel.keep].value_counts()
    n_control = int(counts.get(CONTROL, 0))
    others = counts.drop(CONTROL, errors="ignore")
    small = sorted(str(label) for label in others[others < min_cells].index)
    key = "preprocess.min_cells_per_perturbation"
    many = said_of_many_guides(guides_per_cell)
    if n_control < min_cells:
        raise InputError(
            where,
            f"{n_control} control cells after the filters{many}",
            f"at least {min_cells} ({key})",
            MANY_GUIDES_FIX if many else f"loosen the filters above, correct `control_label`, or lower {key}",
        )
    if len(small) == len(others):
        most = int(others.max()) if len(others) else 0
        raise InputError(
            where,
            f"at most {most} cells for each of {len(others)} perturbations after the filters{many}",
            f"at least {min_cells} cells ({key}) for some of them",
            MANY_GUIDES_FIX if many else f"lower {key}, loosen the filters, or check `perturbation_column`",
        )
    # Single perturbations first: those are missed, while combinations by accident are not.
    small.sort(key=lambda label: (len(genes_of(label)), label))
    n_combinations = sum(len(genes_of(label)) > 1 for label in small)
    shown = ", ".join(f"{label} ({others[label]})" for label in small[:10])
    more = f", and {len(small) - 10} more" if len(small) > 10 else ""
    note = f"{len(small)} perturbations, {n_combinations} of them combinations: {shown}{more}"
    note = note if small else "no perturbation lost"
    funnel.drop("min_cells_per_perturbation", f"≥ {min_cells} cells", labels.isin(small).to_numpy(), note)


def count_detected(screen: RawScreen, keep: np.ndarray) -> np.ndarray:
    """Count for each gene ``(genes,)`` the kept cells in which it is detected, in one pass."""
    detected = np.zeros(len(screen.var), dtype=np.int64)
    for first, genes, _ in screen.blocks(keep):
        kept = keep[first : first + genes.shape[0]]
        indices = genes.indices if kept.all() else genes[np.flatnonzero(kept)].indices
        detected += np.bincount(indices, minlength=len(detected))
    return detected


def filter_genes(
    detected: np.ndarray,
    min_cells: int,
    funnel: Funnel,
    where: str,
    notes: Sequence[str] = (),
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """Return which genes ``(genes,)`` are ``detected`` ``(genes,)`` in enough of the cells left.

    Of the perturbed genes, ``targets`` ``(genes,)``, one cell is enough: whether a perturbation took is seen
    in its target, however rare. What ``notes`` say of the names of genes stands in the line of the filter.

    Raises
    ------
    InputError
        When no gene is.
    """
    keep = detected >= min_cells
    if not keep.any():
        raise InputError(
            where,
            f"no gene detected in {min_cells} cells or more",
            "genes that are expressed",
            "lower preprocess.min_cells_per_gene, or check that the matrix holds counts of genes",
        )
    rare = np.zeros(keep.size, dtype=bool) if targets is None else targets & ~keep & (detected > 0)
    keep = keep | rare
    note = f"genes: {keep.size} before, {int((~keep).sum())} removed, {int(keep.sum())} after"
    if rare.any():
        note += f", among them {int(rare.sum())} perturbed genes in fewer cells"
    rule = f"≥ {min_cells} cells" if min_cells > 0 else OFF
    no_cell = np.zeros(funnel.keep.size, dtype=bool)
    funnel.drop("min_cells_per_gene", rule, no_cell, "; ".join([note, *notes]))
    return keep

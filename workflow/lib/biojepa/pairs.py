"""Write and read ``pairs.h5``: all that training sees, and nothing of a test perturbation.

The file holds the cells of the training and validation perturbations and the controls, the genes
chosen on training cells, the codes of *all* perturbed genes (they come from side information), and a
plan that pairs every cell with a control cell, see :mod:`biojepa.controls`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from biojepa.contracts import CONTEXT, SELECTED_ON, TARGET_SUM, TEST, TRAIN, TRAINED_ON, VAL
from biojepa.disk import free_bytes, full_disk_named, size_text
from biojepa.errors import InputError
from biojepa.hardware import available_memory
from biojepa.labels import genes_of
from biojepa.splits import LeakageError

log = logging.getLogger(__name__)

CONTROL_CODE = -1
BLOCK = 4096
BLOCK_ENTRIES = 1 << 24
# What is summed takes eight times its memory for a moment.
SUMMED_ENTRIES = 1 << 22
# What grows with all genes of all cells, and the share of the memory left that it may take.
EXPRESSION = ("data", "indices")
IN_MEMORY_SHARE = 0.25
FORMAT_VERSION = 2
# Training cells of a batch below which a gene's variance in it is mostly chance.
MIN_BATCH_CELLS = 100
# What a count that is read back may be off: single precision of expression and log library size, with room.
COUNT_ERROR, COUNT_RELATIVE_ERROR = 1e-3, 3e-6


@dataclass(frozen=True)
class Pairs:
    """The content of ``pairs.h5`` in memory.

    Attributes
    ----------
    genes
        Genes of the expression matrix.
    data, indices, indptr
        CSR matrix ``(cells, genes)`` of log1p(counts per target sum), float32.
    perturbation
        ``(cells,)`` position in ``labels``, -1 for control.
    batch
        ``(cells,)`` position in ``batches``.
    log_library_size
        ``(cells,)`` natural logarithm of the library size.
    partner
        ``(cells,)`` the control cell that the pairing strategy found for each cell; controls point to
        another control.
    labels, sets, categories
        All perturbations, test included, in the order of ``split.tsv``.
    types, type_code
        Types of perturbation in the screen, such as CRISPRi, and ``(labels,)`` the position of each
        label's in them. Like the labels, it is the design of the screen and no outcome.
    dose
        ``(labels,)`` float32, 1 where the screen gives none.
    perturbed_genes
        Genes of all labels, sorted; in a fold made for prediction, then the other genes that were asked
        for, sorted.
    codes
        Source name to ``(perturbed genes, dim)``, zero rows where a source does not cover the gene.
    n_cells
        ``(labels,)`` cells in this file, 0 for test perturbations.
    facts
        Attributes of the file: dataset, scheme, fold, seed, SHA-256 of the split, target sum of the
        expression, pairing strategy; in the scheme context, the held-out context.
    contexts, context
        In the scheme context, names, and ``(cells,)`` position of each cell's in them; else empty and
        ``None``.
    """

    genes: tuple[str, ...]
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    cell_names: tuple[str, ...]
    perturbation: np.ndarray
    batch: np.ndarray
    batches: tuple[str, ...]
    log_library_size: np.ndarray
    partner: np.ndarray
    labels: tuple[str, ...]
    sets: tuple[str, ...]
    categories: tuple[str, ...]
    types: tuple[str, ...]
    type_code: np.ndarray
    dose: np.ndarray
    perturbed_genes: tuple[str, ...]
    codes: Mapping[str, np.ndarray]
    facts: Mapping[str, object]
    contexts: tuple[str, ...] = ()
    context: np.ndarray | None = None

    @property
    def n_cells(self) -> np.ndarray:
        """Cells of each label in this file."""
        carried = self.perturbation[self.perturbation != CONTROL_CODE]
        return np.bincount(carried, minlength=len(self.labels))

    @property
    def membership(self) -> np.ndarray:
        """Multi-hot code of the perturbed genes, ``(labels, perturbed genes)`` float64."""
        return multi_hot(self.labels, self.perturbed_genes)

    def labels_of(self, *sets: str) -> np.ndarray:
        """Positions of the labels that belong to ``sets``."""
        return np.flatnonzero(np.isin(self.sets, sets))

    def cells_of(self, *sets: str, controls: bool = True) -> np.ndarray:
        """Positions of the cells whose perturbation belongs to ``sets``, with the controls if asked."""
        wanted = np.isin(self.perturbation, self.labels_of(*sets))
        return np.flatnonzero(wanted | (self.perturbation == CONTROL_CODE) if controls else wanted)

    def dense(self, cells: np.ndarray) -> np.ndarray:
        """Return rows as a dense matrix ``(len(cells), genes)``, float32."""
        out = np.zeros((len(cells), len(self.genes)), dtype=np.float32)
        for row, cell in enumerate(cells):
            span = slice(self.indptr[cell], self.indptr[cell + 1])
            out[row, self.indices[span]] = self.data[span]
        return out

    def pseudobulk(self) -> tuple[np.ndarray, np.ndarray]:
        """Average log-expression.

        In the scheme context both are given as of the held-out context, see :meth:`in_held_out_context`.

        Returns
        -------
        means
            ``(labels, genes)``; NaN for labels without cells, which are those of the test set.
        control
            ``(genes,)``
        """
        # Control, -1, becomes row 0.
        sums = self._sums(self.perturbation.astype(np.int64) + 1, len(self.labels) + 1)
        counts = np.append((self.perturbation == CONTROL_CODE).sum(), self.n_cells).astype(float)
        with np.errstate(invalid="ignore"):
            means = sums / np.where(counts > 0, counts, np.nan)[:, None]
        if self.context is None:
            return means[1:], means[0]
        sums = self._sums(self.context_of_controls(), len(self.contexts) + 1)
        return self.in_held_out_context(means[1:], sums[:-1])

    def _sums(self, owner: np.ndarray, n_owners: int) -> np.ndarray:
        """Sum the expression of the cells of each owner, ``(owners, genes)`` float64.

        Values are added one by one in the order of the cells, so that the size of a block changes nothing.
        """
        sums = np.zeros((n_owners, len(self.genes)))
        for first, end in runs_of_rows(self.indptr, len(owner), SUMMED_ENTRIES):
            bounds = self.indptr[first : end + 1]
            span = slice(int(bounds[0]), int(bounds[-1]))
            place = np.repeat(owner[first:end] * sums.shape[1], np.diff(bounds)) + self.indices[span]
            np.add.at(sums.reshape(-1), place, self.data[span].astype(np.float64))
        return sums

    def context_of_controls(self) -> np.ndarray:
        """Position in ``contexts`` of each control cell, ``(cells,)``; their number for all other cells."""
        if self.context is None:
            raise ValueError("this fold holds out no context")
        return np.where(self.perturbation == CONTROL_CODE, self.context, len(self.contexts)).astype(np.int64)

    def in_held_out_context(
        self, means: np.ndarray, control_sums: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Carry the changes that labels make in other contexts over to the held-out one.

        Parameters
        ----------
        means
            ``(labels, features)`` of the labels' cells, wherever these are.
        control_sums
            ``(contexts, features)`` sums over the control cells of each context.

        Returns
        -------
        means
            ``(labels, features)`` mean of the held-out context's controls, plus the difference of the
            label's mean to the mean of the controls of the contexts that its cells are in, weighted by
            these cells.
        control
            ``(features,)`` mean of the held-out context's controls.
        """
        if self.context is None:
            raise ValueError("this fold holds out no context")
        n_controls = np.bincount(self.context_of_controls(), minlength=len(self.contexts) + 1)[:-1]
        # Control, -1, becomes row 0, which is left out.
        flat = (self.perturbation.astype(np.int64) + 1) * len(self.contexts) + self.context
        counts = np.bincount(flat, minlength=(len(self.labels) + 1) * len(self.contexts))
        counts = counts.reshape(-1, len(self.contexts))[1:]
        held_out = self.contexts.index(str(self.facts[CONTEXT]))
        return relocate(means, counts, control_sums, n_controls, held_out)


def relocate(
    means: np.ndarray,
    counts: np.ndarray,
    control_sums: np.ndarray,
    n_controls: np.ndarray,
    held_out: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Give means as of one context: its controls plus what differs from the controls elsewhere.

    Parameters
    ----------
    means
        ``(labels, features)``; NaN for labels without cells.
    counts
        ``(labels, contexts)`` cells of each label in each context.
    control_sums, n_controls
        ``(contexts, features)`` sums over control cells, and their number ``(contexts,)``. A context
        without control cells borrows those of all contexts.
    held_out
        The context.

    Returns
    -------
    Relocated means ``(labels, features)``, and the mean of the controls ``(features,)``.
    """
    pooled = control_sums.sum(axis=0) / n_controls.sum()
    controls = np.where(
        n_controls[:, None] > 0, control_sums / np.maximum(n_controls, 1)[:, None], pooled[None]
    )
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return means + (controls[held_out] - share @ controls), controls[held_out]


def multi_hot(labels: Sequence[str], genes: Sequence[str]) -> np.ndarray:
    """Code labels by the genes they perturb, ``(labels, genes)`` of 0 and 1; control is all zero."""
    position = {gene: column for column, gene in enumerate(genes)}
    code = np.zeros((len(labels), len(genes)))
    for row, label in enumerate(labels):
        for gene in genes_of(label):
            if gene in position:
                code[row, position[gene]] = 1.0
    return code


def runs_of_rows(
    indptr: np.ndarray, block: int = BLOCK, entries: int = BLOCK_ENTRIES
) -> Iterator[tuple[int, int]]:
    """Cut the rows of a CSR matrix into runs, first and one past the last.

    A run has at most ``block`` rows and, unless one row alone has more, at most ``entries`` entries, which
    bounds memory where cells express many genes.
    """
    first = 0
    while first < len(indptr) - 1:
        full = int(np.searchsorted(indptr, indptr[first] + entries, side="right")) - 1
        end = min(first + block, max(full, first + 1), len(indptr) - 1)
        yield first, end
        first = end


def rows_of_matrix(
    matrix: h5py.Group, block: int = BLOCK, entries: int = BLOCK_ENTRIES
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Read a CSR group of an ``.h5ad`` in blocks of rows: first row, data, indices, local indptr.

    Blocks are those of :func:`runs_of_rows`.
    """
    indptr = matrix["indptr"][:]
    for first, end in runs_of_rows(indptr, block, entries):
        bounds = indptr[first : end + 1]
        span = slice(int(bounds[0]), int(bounds[-1]))
        yield first, matrix["data"][span], matrix["indices"][span], bounds - bounds[0]


def gene_moments(matrix: h5py.Group, keep: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each gene over the cells marked in ``keep`` ``(cells,)``, in one pass."""
    return gene_moments_of_groups(matrix, [keep], n_genes)[0]


def gene_moments_of_groups(
    matrix: h5py.Group, groups: Sequence[np.ndarray], n_genes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each gene over several groups of cells, which may overlap, in one pass.

    Sums are taken in the order of the cells, whatever the other groups and the blocks are, so that they
    agree to the last digit.

    Parameters
    ----------
    matrix
        CSR group of log-expression.
    groups
        One mask ``(cells,)`` for each group.
    n_genes
        Columns of the matrix.
    """
    codes = [np.where(keep, 0, -1) for keep in groups]
    moments = gene_moments_of_codes(matrix, codes, n_genes)
    # No cell at all has no code either.
    return [
        (mean[0], variance[0]) if len(mean) else (np.zeros(n_genes), np.zeros(n_genes))
        for mean, variance in moments
    ]


def gene_moments_of_codes(
    matrix: h5py.Group, codings: Sequence[np.ndarray], n_genes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each gene over cells of the same code, for several codings, in one pass.

    Parameters
    ----------
    matrix
        CSR group of log-expression.
    codings
        Codes ``(cells,)`` from 0 without a gap, -1 for cells of no group; memory grows with groups × genes.
    n_genes
        Columns of the matrix.

    Returns
    -------
    Mean and variance ``(groups, genes)`` of each coding.
    """
    sizes = [np.bincount(codes[codes >= 0]) for codes in codings]
    totals = [np.zeros(len(size) * n_genes) for size in sizes]
    squares = [np.zeros_like(total) for total in totals]
    for first, data, indices, indptr in rows_of_matrix(matrix):
        for codes, size, total, square in zip(codings, sizes, totals, squares, strict=True):
            code = codes[first : first + len(indptr) - 1]
            wanted = np.repeat(code >= 0, np.diff(indptr))
            values, place = data[wanted].astype(np.float64), indices[wanted]
            if len(size) > 1:
                place = place + np.repeat(code.astype(np.int64) * n_genes, np.diff(indptr))[wanted]
            np.add.at(total, place, values)
            np.add.at(square, place, values**2)
    moments = []
    for size, total, square in zip(sizes, totals, squares, strict=True):
        n = np.maximum(size, 1)[:, None]
        mean = total.reshape(-1, n_genes) / n
        moments.append((mean, np.maximum(square.reshape(-1, n_genes) / n - mean**2, 0)))
    return moments


def batches_that_choose(batch: np.ndarray, training: np.ndarray) -> np.ndarray | None:
    """Code the batches within which genes can be ranked: those with enough training cells.

    Parameters
    ----------
    batch
        ``(cells,)`` batch of each cell.
    training
        ``(cells,)`` bool, training cells and controls.

    Returns
    -------
    ``(cells,)`` code of the batch, -1 for all other cells; None with fewer than two such batches, where there
    is nothing to combine and genes are ranked over all training cells.
    """
    names, cells = np.unique(batch[training], return_counts=True)
    codes = pd.Index(names[cells >= MIN_BATCH_CELLS]).get_indexer(pd.Index(batch))
    return None if codes.max(initial=-1) < 1 else np.where(training, codes, -1)


def select_genes(
    mean: np.ndarray, variance: np.ndarray, n_genes: int, always: np.ndarray, n_bins: int = 20
) -> np.ndarray:
    """Choose the most variable genes, and always the perturbed ones.

    Genes are ranked by log(variance / mean) standardized among genes of similar mean (Satija et
    al. 2015), which needs only the moments of the training cells.

    Parameters
    ----------
    mean, variance
        ``(genes,)`` of log-expression over training cells.
    n_genes
        How many to keep; all of them when there are no more.
    always
        ``(genes,)`` bool, genes kept whatever their rank.

    Returns
    -------
    Sorted positions of the chosen genes.
    """
    if n_genes >= len(mean):
        return np.arange(len(mean))
    score = _standardized_dispersion(mean, variance, n_bins)
    score[always] = np.inf
    chosen = np.argsort(-score, kind="stable")[: max(n_genes, int(always.sum()))]
    return np.sort(chosen)


def select_genes_by_batch(
    mean: np.ndarray, variance: np.ndarray, n_genes: int, always: np.ndarray, n_bins: int = 20
) -> np.ndarray:
    """Choose the genes that are among the most variable ones in the most batches, and the perturbed ones.

    Ranked within each batch as by :func:`select_genes`, so that what differs between batches alone makes no
    gene variable. Genes that are among the first ``n_genes`` in more batches come first, then those with the
    lower median rank in these batches (Stuart et al. 2019; scanpy's ``seurat_v3_paper``).

    Parameters
    ----------
    mean, variance
        ``(batches, genes)`` of log-expression over training cells.
    n_genes, always
        As of :func:`select_genes`, which one batch agrees with.

    Returns
    -------
    Sorted positions of the chosen genes.
    """
    if n_genes >= mean.shape[1]:
        return np.arange(mean.shape[1])
    ranks = np.full(mean.shape, np.nan)
    for own, batch_mean, batch_variance in zip(ranks, mean, variance, strict=True):
        score = _standardized_dispersion(batch_mean, batch_variance, n_bins)
        first = np.argsort(-score, kind="stable")[:n_genes]
        first = first[np.isfinite(score[first])]
        own[first] = np.arange(len(first))
    n_batches = np.isfinite(ranks).sum(axis=0)
    median = np.full(len(n_batches), np.inf)
    median[n_batches > 0] = np.nanmedian(ranks[:, n_batches > 0], axis=0)
    # The last key is the first to sort by; what is left in the order of the genes.
    order = np.lexsort((median, -n_batches, ~always))
    return np.sort(order[: max(n_genes, int(always.sum()))])


def _standardized_dispersion(mean: np.ndarray, variance: np.ndarray, n_bins: int) -> np.ndarray:
    """Score genes ``(genes,)`` by their dispersion among genes of similar mean; -inf where not expressed."""
    expressed = (mean > 0) & (variance > 0)
    dispersion = np.full(len(mean), -np.inf)
    dispersion[expressed] = np.log(variance[expressed] / mean[expressed])
    ranks = np.argsort(np.argsort(mean[expressed], kind="stable"), kind="stable")
    bins = ranks * n_bins // max(len(ranks), 1)
    values = dispersion[expressed]
    score = np.full(len(mean), -np.inf)
    standardized = np.empty_like(values)
    for index in range(n_bins):
        inside = bins == index
        if inside.any():
            spread = values[inside].std()
            standardized[inside] = (values[inside] - values[inside].mean()) / (spread if spread > 0 else 1)
    score[expressed] = standardized
    return score


def match_controls(
    perturbation: np.ndarray,
    batch: np.ndarray,
    rng: np.random.Generator,
    context: np.ndarray | None = None,
) -> tuple[np.ndarray, list[int]]:
    """Draw for every cell a control cell of its own batch, and of its own context where one is given.

    Parameters
    ----------
    perturbation, batch, context
        ``(cells,)`` codes; control is -1.

    Returns
    -------
    partner
        ``(cells,)`` position of a control. A control never gets itself where its batch has another.
    orphan_batches
        Batches without any control (of a context), whose cells are matched to controls of all batches: of
        their context if it has any.
    """
    controls = np.flatnonzero(perturbation == CONTROL_CODE)
    partner = np.empty(len(perturbation), dtype=np.int32)
    orphans: set[int] = set()
    within = np.zeros(len(batch), dtype=np.int64) if context is None else context.astype(np.int64)
    n_batches = int(batch.max(initial=0)) + 1
    group = within * n_batches + batch
    for code in np.unique(group):
        cells = np.flatnonzero(group == code)
        pool = controls[group[controls] == code]
        if not len(pool):
            orphans.add(int(code) % n_batches)
            nearby = controls[within[controls] == code // n_batches]
            pool = nearby if len(nearby) else controls
        place = rng.integers(len(pool), size=len(cells))
        own = pool[place] == cells
        place[own] = (place[own] + 1) % len(pool)
        partner[cells] = pool[place]
    return partner, sorted(orphans)


def write_pairs(
    path: str | Path,
    matrix: h5py.Group,
    keep: np.ndarray,
    columns: np.ndarray,
    tables: Mapping[str, np.ndarray],
    design: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    codes: Mapping[str, np.ndarray],
    facts: Mapping[str, object],
) -> None:
    """Copy the kept rows and columns of ``cells.h5ad`` into ``pairs.h5``, a block of rows at a time.

    Parameters
    ----------
    path
        Where to write; the caller makes it atomic.
    matrix
        CSR group of log-expression.
    keep
        ``(cells of cells.h5ad,)`` bool.
    columns
        Positions of the chosen genes.
    tables
        ``perturbation``, ``batch``, ``log_library_size``, ``partner`` and, where one is held out,
        ``context`` for the kept cells.
    design
        ``type_code`` and ``dose`` of the labels.
    names
        ``genes``, ``cell_names``, ``batches``, ``labels``, ``sets``, ``categories``, ``types``,
        ``perturbed_genes`` and, where one is held out, ``contexts``.
    codes, facts
        As in :class:`Pairs`.
    """
    new_column = np.full(int(matrix.attrs["shape"][1]), -1, dtype=np.int32)
    new_column[columns] = np.arange(len(columns), dtype=np.int32)
    with h5py.File(path, "w") as file:
        file.attrs.update({"format_version": FORMAT_VERSION, **facts})
        cells = file.create_group("cells")
        growing = {"maxshape": (None,), "chunks": (1 << 16,), "compression": "lzf"}
        data = cells.create_dataset("data", (0,), dtype=np.float32, **growing)
        indices = cells.create_dataset("indices", (0,), dtype=np.int32, **growing)
        lengths = []
        for first, block_data, block_indices, indptr in rows_of_matrix(matrix):
            kept_rows = keep[first : first + len(indptr) - 1]
            wanted = np.repeat(kept_rows, np.diff(indptr)) & (new_column[block_indices] >= 0)
            row = np.repeat(np.arange(len(kept_rows)), np.diff(indptr))[wanted]
            lengths.append(np.bincount(row, minlength=len(kept_rows))[kept_rows])
            end = len(data)
            for dataset, values in ((data, block_data[wanted]), (indices, new_column[block_indices[wanted]])):
                dataset.resize(end + len(values), axis=0)
                dataset[end:] = values
        cells["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        for key, values in tables.items():
            cells[key] = values
        for key, values in design.items():
            file[f"design/{key}"] = values
        text = h5py.string_dtype()
        for key, values in names.items():
            file.create_dataset(f"names/{key}", data=np.array(values, dtype=object), dtype=text)
        for source, values in codes.items():
            file.create_dataset(f"codes/{source}", data=values.astype(np.float32))


def read_pairs(path: str | Path, in_memory: bool | None = None) -> Pairs:
    """Read ``pairs.h5``.

    Parameters
    ----------
    path
        The file.
    in_memory
        Whether to hold the expression in memory, or in a file without a name that is mapped: the system then
        keeps what is read often, and gives back what it must. What is read is the same. The file lies beside
        ``path``, or, where that cannot be written to, in the folder for temporary files. By default
        expression is mapped where it would take more than a quarter of the memory that is left, shared by
        the processes of a ``torchrun`` on this machine.

    Raises
    ------
    InputError
        When the file was written in another format, or neither memory nor disk has room for it.
    """
    with h5py.File(path, "r") as file:
        facts = {key: value.item() if hasattr(value, "item") else value for key, value in file.attrs.items()}
        if facts.get("format_version") != FORMAT_VERSION:
            raise InputError(
                path,
                f"format version {facts.get('format_version')}",
                str(FORMAT_VERSION),
                "rerun the pair stage",
            )
        names: dict[str, Any] = {key: tuple(values.asstr()[:]) for key, values in file["names"].items()}
        folder = _folder_to_map(Path(path), file, in_memory)
        cells: dict[str, Any] = {
            key: values[:] if folder is None or key not in EXPRESSION else _mapped(values, folder)
            for key, values in file["cells"].items()
        }
        design = {key: values[:] for key, values in file["design"].items()}
        codes = {key: values[:] for key, values in file["codes"].items()} if "codes" in file else {}
    return Pairs(**names, **cells, **design, codes=codes, facts=facts)


def _folder_to_map(path: Path, file: h5py.File, in_memory: bool | None) -> Path | None:
    """Choose where to unpack the expression, ``None`` to hold it in memory; see :func:`read_pairs`."""
    size = sum(file["cells"][key].size * file["cells"][key].dtype.itemsize for key in EXPRESSION)
    left = available_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if in_memory is None:
        in_memory = left is None or size * processes <= IN_MEMORY_SHARE * left
    if in_memory:
        return None
    folders = [path.resolve().parent, Path(tempfile.gettempdir())]
    writable = [folder for folder in folders if os.access(folder, os.W_OK)]
    roomy = [folder for folder in writable if free_bytes(folder) >= size * processes]
    if roomy:
        log.info("%s of expression in %s are mapped, not held in memory", size_text(size), path)
        return roomy[0]
    if left is not None and size * processes <= left:
        log.warning(
            "%s: %s of expression take much of the %s of memory that are left; no room to map them in %s",
            path, size_text(size), size_text(left), " or ".join(map(str, folders)),
        )  # fmt: skip
        return None
    raise InputError(
        path,
        f"{size_text(size)} of expression, "
        + ("" if left is None else f"{size_text(left)} of memory left, and ")
        + f"no room in {' or '.join(map(str, folders))}",
        "room for the expression in memory or on disk",
        "free some space, or name a folder with room in the environment variable TMPDIR",
    )


def _mapped(values: h5py.Dataset, folder: Path) -> np.ndarray:
    """Copy a dataset to a file that vanishes with the array, and map it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        with full_disk_named(folder, "the expression, unpacked while it is in use"):
            for first in range(0, len(values), BLOCK_ENTRIES):
                file.write(values[first : first + BLOCK_ENTRIES].tobytes())
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        # A private mapping, since torch warns of arrays that cannot be written; nothing is.
        return np.asarray(np.memmap(file, dtype=values.dtype, mode="c", shape=values.shape))


def target_sum_of(pairs: Pairs) -> float:
    """Return the counts per cell that the expression of a fold was scaled to.

    Raises
    ------
    InputError
        When the file does not say, because an older version made the cells or the pairs.
    """
    if TARGET_SUM not in pairs.facts:
        raise InputError(
            "pairs.h5",
            f"no attribute {TARGET_SUM}",
            "the counts per cell that expression was scaled to, as the preprocess stage writes them down",
            "rerun the preprocess and the pair stage",
        )
    return float(pairs.facts[TARGET_SUM])  # type: ignore[arg-type]


def counts_of(pairs: Pairs) -> np.ndarray:
    """Get back the counts that the expression was made of, for models of counts.

    ``expm1(expression) × library size / target sum``, rounded: expression is kept in single precision, which
    tells whole numbers apart up to 100,000 of one gene in one cell.

    Parameters
    ----------
    pairs
        As :func:`read_pairs` gives it.

    Returns
    -------
    Whole numbers int32 in the order of ``pairs.data``: the CSR matrix ``(cells, genes)`` of counts has the
    ``indices`` and ``indptr`` of ``pairs``.

    Raises
    ------
    InputError
        When the file does not say what expression was scaled to, or the result is no whole number.

    Examples
    --------
    >>> counts = scipy.sparse.csr_matrix((counts_of(pairs), pairs.indices, pairs.indptr))  # doctest: +SKIP
    >>> training, library = pairs.cells_of("train"), np.exp(pairs.log_library_size)  # doctest: +SKIP
    >>> counts[training], library[training]  # doctest: +SKIP
    """
    per_count = target_sum_of(pairs) / np.exp(pairs.log_library_size.astype(np.float64))
    counts = np.empty(len(pairs.data), dtype=np.int32)
    # In blocks, since double precision takes three times the memory of what is read and returned.
    for first in range(0, len(per_count), BLOCK):
        bounds = pairs.indptr[first : first + BLOCK + 1]
        span = slice(int(bounds[0]), int(bounds[-1]))
        exact = np.expm1(pairs.data[span].astype(np.float64))
        exact /= np.repeat(per_count[first : first + BLOCK], np.diff(bounds))
        counts[span] = np.rint(exact)
        off = np.abs(exact - counts[span]) > np.minimum(COUNT_ERROR + COUNT_RELATIVE_ERROR * exact, 0.5)
        if off.any():
            raise InputError(
                "pairs.h5",
                f"expression that is {exact[off][0]:.6g} counts of a gene in a cell",
                "whole numbers of counts",
                "give the screen as raw counts, or rerun the preprocess and the pair stage",
            )
    return counts


def refuse_leaked_pairs(pairs: Pairs) -> None:
    """Leakage sentinel: stop when the cells of a test perturbation are among those of ``pairs``.

    The pair stage leaves them out; this guards against a ``pairs.h5`` that was made in another way.

    Raises
    ------
    LeakageError
        Naming the perturbations.
    """
    leaked = [pairs.labels[label] for label in pairs.labels_of(TEST) if pairs.n_cells[label]]
    if leaked:
        raise LeakageError(
            f"training would see cells of {len(leaked)} test perturbation(s): {', '.join(leaked[:10])}. "
            "Fix: delete pairs.h5 and rerun the pair stage"
        )


def trainable_labels(pairs: Pairs) -> np.ndarray:
    """Positions of the training labels that have cells."""
    return np.intersect1d(pairs.labels_of(TRAIN), np.flatnonzero(pairs.n_cells))


def validation_labels(pairs: Pairs) -> np.ndarray:
    """Positions of the validation labels that have cells."""
    return np.intersect1d(pairs.labels_of(VAL), np.flatnonzero(pairs.n_cells))


def declare_use(
    pairs: Pairs,
    trained: Sequence[int] | np.ndarray,
    selected: Sequence[int] | np.ndarray,
    *earlier: Mapping[str, Any],
) -> dict[str, list[str]]:
    """Write down which labels a model has used, for the provenance of what it predicts.

    Parameters
    ----------
    pairs
        A fold.
    trained
        Positions of the labels that anything of the model was fitted to.
    selected
        Positions of the labels by which it was chosen or stopped.
    earlier
        Facts of the models that it took parts from, such as an encoder.

    Returns
    -------
    Sorted labels by the keys that ``evaluate`` compares with ``split.tsv``.
    """
    used = {}
    for key, labels in ((TRAINED_ON, trained), (SELECTED_ON, selected)):
        own = {pairs.labels[label] for label in labels}
        used[key] = sorted(own.union(*(facts.get(key, ()) for facts in earlier)))
    return used

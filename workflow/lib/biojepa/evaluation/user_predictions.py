"""Read predictions that were made elsewhere, and say all that is wrong with them at once.

A file is an ``.h5ad`` with genes as columns and log1p expression per ``target_sum`` as values. It has
one row per perturbation, the predicted mean, or many rows per perturbation, predicted single cells.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata

from biojepa.contracts import PERTURBATION, SD_LAYER, SELECTED_ON, SET, TEST, TRAINED_ON
from biojepa.errors import InputError
from biojepa.evaluation.predictions import LOWEST_MEAN, TOTAL_RANGE
from biojepa.evaluation.user_rows import Problems, has_cells, match_genes, match_labels, some
from biojepa.labels import spell_label

LOGGER = logging.getLogger(__name__)
BLOCK_VALUES = 4_000_000
# A mean of log1p of counts per target_sum adds up to at most target_sum counts; linear models overshoot.
TOTAL_COUNTS = 1.5
# Counts of the median perturbation over those of control, both from means of logarithms: about 1, and
# several times as many where the logarithm has base 2.
MOST_COUNTS = 2.5
# Genes are ordered as in control by any scale of expression; changes have no such order, and two signs.
SAME_ORDER = 0.8
NOT_NEGATIVE = 0.99
_SCALE = "write log1p of counts per preprocess.target_sum of each cell, or the mean of that over cells"


@dataclass(frozen=True)
class Wanted:
    """What predictions of one fold must hold, and what they are compared with.

    Attributes
    ----------
    split
        The split table, one row per perturbation.
    genes
        Genes of the fold, in the order of ``pairs.h5``.
    control
        (genes,) mean log-expression of the control cells.
    target_sum
        Counts per cell before log1p.
    split_sha256
        Checksum of the split.
    """

    split: pd.DataFrame
    genes: Sequence[str]
    control: np.ndarray
    target_sum: float
    split_sha256: str


@dataclass(frozen=True)
class UserPredictions:
    """Predictions made elsewhere, checked and put in the order of the split.

    Attributes
    ----------
    rows
        (labels,): positions in the split of the labels that were predicted.
    mean
        (labels, genes): predicted mean log-expression, float64.
    sd
        (labels, genes): standard deviation of that mean, where the file gives one.
    cells
        (cells, genes): predicted single cells, float32, a sample of them where they are many.
    owner
        (cells,): row of ``mean`` that each belongs to.
    declared
        What the provenance of the file says the model was fitted to and chosen by, where it says so.
    """

    rows: np.ndarray
    mean: np.ndarray
    sd: np.ndarray | None = None
    cells: sparse.csr_matrix | None = None
    owner: np.ndarray | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)


def read_user_predictions(
    path: str | Path, wanted: Wanted, max_cells: int = 100, seed: int = 0
) -> UserPredictions:
    """Read predictions made elsewhere for one fold.

    Rows of training perturbations, of control and of perturbations that the split does not have are
    left out, and so are genes that the fold does not use; the log says how many.

    Parameters
    ----------
    path
        An ``.h5ad``: ``obs["perturbation"]``, or the row names without such a column; gene symbols as
        column names; log-expression in ``X``. ``obs["set"]``, ``obs["context"]``, ``layers["sd"]`` and
        ``uns["provenance"]`` are optional.
    wanted
        What the fold needs.
    max_cells
        Predicted cells kept of each perturbation; the mean is over all of them.
    seed
        Of that choice.

    Raises
    ------
    InputError
        Naming all that is off: genes or test perturbations that are missing, a split that is not this
        one, rows that are neither means nor cells, values that are not log-expression.
    """
    path = Path(path)
    problems = Problems(path)
    with _opened(path) as file:
        obs, var = ad.io.read_elem(file["obs"]), ad.io.read_elem(file["var"])
        columns = match_genes(obs, var, wanted.genes, problems)
        declared = _check_origin(file, wanted, problems)
        position = match_labels(obs, wanted.split, problems)
        rows, owner = np.unique(position[position >= 0], return_inverse=True)
        lines = np.flatnonzero(position >= 0)
        labels = wanted.split[PERTURBATION].to_numpy(object)[rows]
        many = has_cells(obs, lines, owner, labels, problems)
        keep = _sample(owner, rows, max_cells, seed) if many else np.zeros(len(owner), dtype=bool)
        found = np.flatnonzero(columns >= 0)
        if len(lines) and len(found):
            sums = _add_up(file["X"], lines, owner, columns[found], keep, labels)
            shown = np.array(wanted.genes, dtype=object)[found]
            _check_values(sums, labels, shown, wanted.control[found], wanted.target_sum, many, problems)
        sd = _read_sd(file, lines, owner, columns, many, problems)
    problems.raise_if_any()
    LOGGER.info("%s: %s of %d perturbations", path, "cells" if many else "means", len(rows))
    if not many:
        return UserPredictions(rows, sums.mean, sd, declared=declared)
    return UserPredictions(rows, sums.mean, None, sums.cells, owner[keep], declared)


def _opened(path: Path) -> h5py.File:
    """Open an ``.h5ad``, or say that it is none."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            path, f"a file that HDF5 cannot open ({error})", "an .h5ad", "write it with AnnData.write_h5ad"
        ) from None
    lacking = [name for name in ("obs", "var", "X") if name not in file]
    if lacking:
        file.close()
        raise InputError(path, f"no {', '.join(lacking)}", "an .h5ad with obs, var and X", "write an AnnData")
    return file


def _check_origin(file: h5py.File, wanted: Wanted, problems: Problems) -> dict[str, Any]:
    """Refuse a file that says that it was made with another split, or fitted to what this one tests.

    It need not say anything.

    Returns
    -------
    dict
        The labels that it says the model was fitted to and chosen by.
    """
    uns = file.get("uns", {})
    declared = _read_provenance(uns, problems)
    made_with = declared.get("split_sha256")
    if "split_sha256" in uns:
        made_with = ad.io.read_elem(uns["split_sha256"])
    if made_with is not None and str(made_with) != wanted.split_sha256:
        problems.add(
            "uns, split_sha256",
            f"predictions made with a split of SHA-256 {made_with}",
            f"{wanted.split_sha256}, that of this fold",
            "a leak: the other split may train on what this one tests; fit the model on this fold's split",
        )
    known = set(wanted.split[PERTURBATION])
    tested = set(wanted.split.loc[wanted.split[SET] == TEST, PERTURBATION])
    said = {}
    for key in (TRAINED_ON, SELECTED_ON):
        if key not in declared:
            continue
        labels = declared[key].tolist() if isinstance(declared[key], np.ndarray) else declared[key]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            problems.add(
                f"uns, provenance, {key}",
                repr(labels)[:80],
                "a list of perturbations",
                "write their labels, or leave the key out where they are not known",
            )
            continue
        said[key] = [spell_label(label, known) for label in labels]
        leaked = sorted(tested & set(said[key]))
        if leaked:
            problems.add(
                f"uns, provenance, {key}",
                f"{len(leaked)} test perturbations of this fold, {some(leaked)}",
                "none of them",
                "a leak: fit and choose the model on the training and validation perturbations of this fold",
            )
    return said


def _read_provenance(uns: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Read ``uns["provenance"]``: JSON text or a group; empty where there is none or it cannot be read."""
    if "provenance" not in uns:
        return {}
    content = ad.io.read_elem(uns["provenance"])
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except json.JSONDecodeError as error:
            content = f"{content[:40]!r}, which is no JSON ({error})"
    if isinstance(content, Mapping):
        return dict(content)
    problems.add(
        "uns, provenance",
        content if isinstance(content, str) else repr(content)[:80],
        "a JSON object as text",
        'write it with json.dumps({"trained_on": [...]}), or leave it out',
    )
    return {}


def _sample(owner: np.ndarray, rows: np.ndarray, max_cells: int, seed: int) -> np.ndarray:
    """Mark at most ``max_cells`` lines of each perturbation, (lines,) bool."""
    keep = np.zeros(len(owner), dtype=bool)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(rows)))
    for members, row in zip(np.split(order, ends[:-1]), rows, strict=True):
        if len(members) > max_cells:
            rng = np.random.default_rng([seed, int(row)])
            members = rng.choice(members, max_cells, replace=False)
        keep[members] = True
    return keep


@dataclass
class _Sums:
    """What one pass over the values of a file gives; the genes are those that the file has."""

    mean: np.ndarray
    cells: sparse.csr_matrix
    whole_numbers: bool
    constant: np.ndarray
    n_rows: np.ndarray
    broken: int
    first_broken: tuple[str, int] | None


def _add_up(
    matrix: h5py.Group | h5py.Dataset,
    lines: np.ndarray,
    owner: np.ndarray,
    columns: np.ndarray,
    keep: np.ndarray,
    labels: np.ndarray,
) -> _Sums:
    """Average the lines of each label and keep the marked ones, in one pass in bounded memory."""
    total = np.zeros((len(labels), len(columns)))
    first = np.full(total.shape, np.nan, dtype=np.float32)
    constant, whole, broken, place = np.ones(len(labels), dtype=bool), True, 0, None
    kept = []
    for span, block in _blocks(matrix, lines, columns):
        finite = np.isfinite(block)
        if not finite.all():
            if place is None:
                row, gene = np.argwhere(~finite)[0]
                place = (str(labels[owner[span][row]]), int(gene))
            broken += int((~finite).sum())
            block = np.where(finite, block, 0.0)
        whole = whole and bool((block == np.rint(block)).all())
        for row, values in zip(owner[span], block, strict=True):
            total[row] += values
            stored = values.astype(np.float32)
            if np.isnan(first[row, 0]):
                first[row] = stored
            elif constant[row]:
                constant[row] = np.array_equal(first[row], stored)
        if keep[span].any():
            kept.append(sparse.csr_matrix(block[keep[span]].astype(np.float32)))
    n = np.bincount(owner, minlength=len(labels))
    cells = sparse.vstack(kept, format="csr") if kept else sparse.csr_matrix((0, len(columns)))
    return _Sums(total / n[:, None], cells, whole, constant, n, broken, place)


def _blocks(
    matrix: h5py.Group | h5py.Dataset, lines: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield which of the sorted ``lines`` a block holds, and their values (lines, columns) float64."""
    source: Any = matrix
    if isinstance(matrix, h5py.Group):
        source = ad.io.sparse_dataset(matrix)
        if source.format != "csr":
            source = ad.io.read_elem(matrix).tocsr()
    step = max(1, BLOCK_VALUES // max(int(source.shape[1]), 1))
    for start in range(0, int(source.shape[0]), step):
        span = slice(*np.searchsorted(lines, (start, start + step)))
        if span.start == span.stop:
            continue
        block = source[start : start + step]
        block = block[lines[span] - start]
        values = block[:, columns]
        yield span, np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)


def _check_values(
    sums: _Sums,
    labels: np.ndarray,
    genes: np.ndarray,
    control: np.ndarray,
    target_sum: float,
    many: bool,
    problems: Problems,
) -> None:
    """Refuse values that are missing, or counts, or changes, or of another scale.

    Of values of which some are missing, nothing else is said: it would be about what is left.
    """
    if sums.first_broken is not None:
        label, gene = sums.first_broken
        problems.add(
            "X",
            f"{sums.broken} missing or infinite values, the first for {label!r}, gene {genes[gene]!r}",
            "finite log-expression",
            "predict a number for every gene; control expression where the model has none",
        )
        return
    # Where some have one row, the mixture is the problem, and has been named.
    if many and sums.n_rows.min() > 1 and sums.constant.any():
        same = labels[sums.constant]
        problems.add(
            "X",
            f"{len(same)} perturbations whose rows are all the same, {some(same)}",
            "single cells that differ, where a perturbation has several rows",
            "write one row for each perturbation, its mean",
        )
    mean, highest = sums.mean, float(np.log1p(target_sum))
    row, column = np.unravel_index(int(mean.argmax()), mean.shape)
    where = f"{labels[row]!r}, gene {genes[column]!r}"
    ratio = float(mean.mean() / max(control.mean(), 1e-12))
    counts = np.expm1(np.minimum(mean, 50)).sum(axis=1)
    usual = float(np.median(counts) / max(np.expm1(control).sum(), 1e-12))
    if sums.whole_numbers and mean.max() > 0:
        problems.add("X", "whole numbers only, which are counts", "log-expression", _SCALE)
    elif mean.max() > highest:
        problems.add(
            "X",
            f"{mean.max():.4g} for {where}: counts or counts per million without a logarithm",
            f"at most {highest:.4g}, log1p of all {target_sum:g} counts",
            _SCALE,
        )
    elif ratio < TOTAL_RANGE[0] and _is_expression(mean, control):
        problems.add(
            "X",
            f"an average of {ratio:.2g} times that of control cells, with the same genes high and low",
            f"{TOTAL_RANGE[0]} to {TOTAL_RANGE[1]} times",
            f"another scale, such as a share of the total or a logarithm of base 10: {_SCALE}",
        )
    elif mean.min() < LOWEST_MEAN or ratio < TOTAL_RANGE[0]:
        problems.add(
            "X",
            f"a lowest mean of {mean.min():.3g} and an average of {ratio:.2g} times that of control cells, "
            "as changes against control have",
            f"expression: at least {LOWEST_MEAN} and {TOTAL_RANGE[0]} to {TOTAL_RANGE[1]} times",
            "add the control mean of these cells to the predicted changes",
        )
    elif ratio > TOTAL_RANGE[1] or counts.max() > TOTAL_COUNTS * target_sum or usual > MOST_COUNTS:
        problems.add(
            "X",
            f"an average of {ratio:.3g} times that of control cells, and {usual:.3g} times their counts",
            f"{TOTAL_RANGE[0]} to {TOTAL_RANGE[1]} times, about as many counts, and at most {target_sum:g}",
            f"another total than preprocess.target_sum, such as a million, or another base than e: {_SCALE}",
        )


def _is_expression(mean: np.ndarray, control: np.ndarray) -> bool:
    """Whether means (labels, genes) are expression on some scale, and no changes against control (genes,)."""
    order, usual = rankdata(mean.mean(axis=0)), rankdata(control)
    if not order.std() or not usual.std():
        return False
    same = np.corrcoef(order, usual)[0, 1] > SAME_ORDER
    return bool(same and (mean >= 0).mean() >= NOT_NEGATIVE)


def _read_sd(
    file: h5py.File,
    lines: np.ndarray,
    owner: np.ndarray,
    columns: np.ndarray,
    many: bool,
    problems: Problems,
) -> np.ndarray | None:
    """Read the standard deviation of predicted means, (labels, genes), where the file has one."""
    layers = file.get("layers", {})
    if SD_LAYER not in layers or not len(lines) or (columns < 0).any():
        return None
    if many:
        LOGGER.warning("%s: layers[%r] of single cells is not used", problems.path, SD_LAYER)
        return None
    sd = np.full((len(lines), len(columns)), np.nan)
    for span, block in _blocks(layers[SD_LAYER], lines, columns):
        sd[owner[span]] = block
    if not np.isfinite(sd).all() or (sd < 0).any():
        problems.add(
            f"layers[{SD_LAYER!r}]",
            "negative or missing values",
            "standard deviations of the predicted means",
            "leave the layer out where the model has none",
        )
    return sd

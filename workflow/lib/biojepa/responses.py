"""Code genes by what perturbing them did in another screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from biojepa.contracts import CONTROL, GENE_SEPARATOR, PERTURBATION
from biojepa.errors import InputError
from biojepa.other_screen import OtherScreen
from biojepa.pairs import rows_of_matrix
from biojepa.prior_names import OTHER_SCREEN_RESPONSES, RESPONSES
from biojepa.priors import PriorSource
from biojepa.splits import LeakageError

# Cells of the same name that are compared, and share of this screen's perturbed cells that may be the same.
COMPARED_CELLS = 500
LARGEST_OVERLAP = 0.01
# Counts of two cells with fewer genes in common may be proportional by chance.
MIN_SHARED_GENES = 5
# Looked for by content alone, cells with fewer are too easily alike.
MIN_HASHED_GENES = 10
MAX_CANDIDATES = 3


def mean_responses(cells_path: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Average what each single perturbation of a screen changes.

    Returns
    -------
    genes
        Genes perturbed on their own, sorted.
    changes
        ``(genes, measured genes)`` mean log-expression of their cells minus that of control, float64.

    Raises
    ------
    InputError
        When the screen has no control cell or no single perturbation.
    """
    with h5py.File(cells_path, "r") as file:
        label = read_elem(file["obs"])[PERTURBATION].astype(str).to_numpy()
        names = sorted({name for name in label if name != CONTROL and GENE_SEPARATOR not in name})
        if not names or not (label == CONTROL).any():
            raise InputError(
                cells_path,
                f"{len(names)} single perturbation(s) and {(label == CONTROL).sum()} control cell(s)",
                "some of both",
                "take the dataset out of the column responses",
            )
        position = {CONTROL: 0} | {name: row for row, name in enumerate(names, start=1)}
        owner = np.array([position.get(name, -1) for name in label])
        n_genes = int(file["X"].attrs["shape"][1])
        sums = np.zeros((len(names) + 1) * n_genes)
        for first, data, indices, indptr in rows_of_matrix(file["X"]):
            row = np.repeat(owner[first : first + len(indptr) - 1], np.diff(indptr))
            used = row >= 0
            flat, place = np.unique(row[used].astype(np.int64) * n_genes + indices[used], return_inverse=True)
            sums[flat] += np.bincount(place, weights=data[used].astype(np.float64))
    counts = np.bincount(owner[owner >= 0], minlength=len(names) + 1)
    means = sums.reshape(-1, n_genes) / counts[:, None]
    return tuple(names), means[1:] - means[0]


def read_other_screens(cells_path: str | Path, others: Mapping[str, str | Path]) -> dict[str, OtherScreen]:
    """Read what single perturbations change in other screens, for the baseline ``other_screen``.

    Parameters
    ----------
    cells_path
        ``cells.h5ad`` of this screen, read only to refuse its own cells among the others'.
    others
        Name of another screen to its ``cells.h5ad``; see :func:`mean_responses` for what it must hold.

    Raises
    ------
    LeakageError
        When another screen holds cells of this one.
    """
    screens = {}
    for name, path in others.items():
        refuse_same_cells(cells_path, path)
        perturbed, changes = mean_responses(path)
        with h5py.File(path, "r") as file:
            measured = tuple(read_elem(file["var"]).index.astype(str))
        screens[name] = OtherScreen(perturbed, measured, changes)
    return screens


def response_source(dataset: str, cells_path: str | Path) -> PriorSource:
    """Describe genes by their mean response in another screen, in its principal components.

    Only cells of that other screen are read, so nothing of a held-out perturbation of this one is seen;
    that the two are different screens is checked with the config and by :func:`refuse_same_cells`.

    Parameters
    ----------
    dataset
        Name of the other screen; the source is called ``responses_<dataset>``.
    cells_path
        Its ``cells.h5ad``.
    """
    genes, changes = mean_responses(cells_path)
    position = {gene: row for row, gene in enumerate(genes)}

    def rows(wanted: Sequence[str]) -> np.ndarray:
        return changes[[position[gene] for gene in wanted]]

    return PriorSource(
        f"{RESPONSES}{dataset}",
        frozenset(genes),
        rows,
        cells_path,
        centred=True,
        kind=OTHER_SCREEN_RESPONSES,
    )


def refuse_same_cells(cells_path: str | Path, other_path: str | Path) -> None:
    """Leakage sentinel: stop when another screen holds cells of this one, whatever file and cells are called.

    A copy of the experiment, or a part of it, would give away the responses of held-out perturbations.
    Cells are the same when they express the same genes with the same counts up to a factor, over the genes
    of both files, so that neither names, normalization nor filters of cells hide a copy. Controls may be
    shared: they hold no response.

    Parameters
    ----------
    cells_path, other_path
        ``cells.h5ad`` of this screen, and of the one whose responses are prior knowledge.

    Raises
    ------
    LeakageError
        When more than ``LARGEST_OVERLAP`` of this screen's perturbed cells are in the other, estimated on
        at most ``COMPARED_CELLS`` of them, those whose names are in both first.
    """
    with h5py.File(cells_path, "r") as own, h5py.File(other_path, "r") as other:
        obs, other_names = read_elem(own["obs"]), pd.Index(read_elem(other["obs"]).index)
        perturbed = np.flatnonzero((obs[PERTURBATION].astype(str) != CONTROL).to_numpy())
        genes = [pd.Index(read_elem(file["var"]).index) for file in (own, other)]
        common = genes[0].intersection(genes[1]).sort_values()
        columns = [index.get_indexer(common) for index in genes]
        named = perturbed[obs.index[perturbed].isin(other_names)]
        rng = np.random.default_rng(0)
        by_name = np.sort(rng.permutation(named)[:COMPARED_CELLS])
        at = other_names.get_indexer(obs.index[by_name])
        pairs = [(place, [match]) for place, match in zip(by_name, at, strict=True)]
        same_name = _count_same(own, other, columns, pairs)
        sample = np.sort(rng.permutation(perturbed)[:COMPARED_CELLS])
        pairs = _alike(own, other, columns, sample)
        same_content = _count_same(own, other, columns, pairs)
    overlap = max(
        same_name / max(len(by_name), 1) * len(named) / max(len(perturbed), 1),
        same_content / max(len(sample), 1),
    )
    if overlap > LARGEST_OVERLAP:
        raise LeakageError(
            f"{other_path} holds about {overlap:.0%} of the perturbed cells of {cells_path}: "
            f"{len(named)} have the same name, {same_name} of {len(by_name)} compared of these and "
            f"{same_content} of {len(sample)} compared by content alone have the same counts, "
            "so that responses of held-out perturbations would be given away. Fix: take that dataset out of "
            "the column responses"
        )


def _alike(
    own: h5py.File, other: h5py.File, columns: Sequence[np.ndarray], sample: np.ndarray
) -> list[tuple[int, list[int]]]:
    """Pair sampled cells with the cells of the other file that express the same common genes, if any.

    Cells are found by a hash of the genes they express, in one pass over each file.
    """
    code = np.random.default_rng(1).integers(1, 2**63, size=len(columns[0]), dtype=np.uint64)
    hashes = _expressed(own, columns[0], code)
    wanted: dict[int, list[int]] = {}
    for place in sample[hashes[sample] > 0]:
        wanted.setdefault(int(hashes[place]), []).append(int(place))
    found: dict[int, list[int]] = {}
    others = _expressed(other, columns[1], code)
    for match in np.flatnonzero(np.isin(others, np.array(list(wanted), dtype=np.uint64))):
        for place in wanted[int(others[match])]:
            if len(found.setdefault(place, [])) < MAX_CANDIDATES:
                found[place].append(int(match))
    return sorted(found.items())


def _expressed(file: h5py.File, columns: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Hash the common genes that each cell expresses, (cells,); 0 below ``MIN_HASHED_GENES`` of them."""
    weight = np.zeros(int(file["X"].attrs["shape"][1]), dtype=np.uint64)
    weight[columns] = code
    parts = [np.zeros(0, dtype=np.uint64)]
    for _, data, indices, indptr in rows_of_matrix(file["X"]):
        present = (data > 0) & (weight[indices] > 0)
        row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[present]
        totals = np.zeros(len(indptr) - 1, dtype=np.uint64)
        np.add.at(totals, row, weight[indices[present]])
        totals[np.bincount(row, minlength=len(totals)) < MIN_HASHED_GENES] = 0
        parts.append(totals)
    return np.concatenate(parts)


def _count_same(
    own: h5py.File,
    other: h5py.File,
    columns: Sequence[np.ndarray],
    pairs: Sequence[tuple[int, list[int]]],
) -> int:
    """Count the cells of this screen that are proportional to one of their candidates in the other."""
    return sum(
        any(
            _proportional(_counts(own, place, columns[0]), _counts(other, match, columns[1]))
            for match in matches
        )
        for place, matches in pairs
    )


def _counts(file: h5py.File, place: int, columns: np.ndarray) -> np.ndarray:
    """Read the counts of a cell over the genes of both files, up to a factor."""
    matrix = file["X"]
    first, end = matrix["indptr"][place : place + 2]
    dense = np.zeros(int(matrix.attrs["shape"][1]))
    dense[matrix["indices"][first:end]] = np.expm1(matrix["data"][first:end].astype(np.float64))
    return dense[columns]


def _proportional(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two cells express the same genes, in the same proportions to single precision."""
    expressed = one > 0
    if expressed.sum() < MIN_SHARED_GENES or not np.array_equal(expressed, other > 0):
        return False
    ratio = one[expressed] / other[expressed]
    return bool(ratio.max() <= (1 + 1e-3) * ratio.min())

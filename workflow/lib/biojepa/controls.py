"""Find a control cell for every cell of ``pairs.h5``: the pairing strategies.

==================  ===================================================================================
strategy            the control of a cell
==================  ===================================================================================
population          any of its batch, which training draws anew for every population of cells
random              any, whatever its batch
matched             one of its batch and cell type, among those nearest in sequencing depth
nearest             the nearest one of its batch, or of 20,000 of these, in principal components of training
                    cells and controls
optimal_transport   drawn from its row of the optimal transport plan between the cells of its perturbation
                    in a batch and the controls there, in the same components
==================  ===================================================================================

In the scheme context, all of them stay within the context of the cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from scipy import sparse

from biojepa.pairs import CONTROL_CODE, rows_of_matrix

# Cells that set the principal components at most; all cells are projected on them.
PCA_CELLS = 10_000
# Controls of a pool that a nearest one is looked for among at most: every cell is compared with all of them.
NEAREST_CONTROLS = 20_000
# Cells whose candidates are compared at once, which bounds memory.
BLOCK_OF_CELLS = 1 << 16
# Of the network simplex; the default of POT is too few for some problems of 512 cells a side.
MAX_ITERATIONS = 1_000_000


@dataclass(frozen=True)
class ControlPools:
    """The controls that each cell may be paired with.

    Attributes
    ----------
    pools
        Positions of control cells, sorted; one array for each pool.
    pool_of_cell
        ``(cells,)`` position in ``pools``.
    level
        ``(cells,)`` which of the levels the pool of a cell is of; 0 is the finest, which has no control for
        cells with another.
    """

    pools: tuple[np.ndarray, ...]
    pool_of_cell: np.ndarray
    level: np.ndarray

    @classmethod
    def of(cls, perturbation: np.ndarray, levels: Sequence[np.ndarray]) -> ControlPools:
        """Give each cell the controls that are like it at the finest level at which there are any.

        Parameters
        ----------
        perturbation
            ``(cells,)`` codes; control is -1.
        levels
            Codes ``(cells,)`` by which cells are alike, the finest first. All cells are alike at last.

        Raises
        ------
        ValueError
            Without a control cell.
        """
        controls = np.flatnonzero(perturbation == CONTROL_CODE)
        if not len(controls):
            raise ValueError("there is no control cell")
        pools: list[np.ndarray] = []
        pool_of_cell = np.full(len(perturbation), -1)
        level_of_cell = np.full(len(perturbation), -1)
        for level, codes in enumerate([*levels, np.zeros(len(perturbation), dtype=np.int64)]):
            waiting = np.flatnonzero(pool_of_cell < 0)
            wanted, group = np.unique(codes[waiting], return_inverse=True)
            order = controls[np.argsort(codes[controls], kind="stable")]
            first, end = (np.searchsorted(codes[order], wanted, side) for side in ("left", "right"))
            place = np.full(len(wanted), -1)
            for index in np.flatnonzero(end > first):
                place[index] = len(pools)
                pools.append(order[first[index] : end[index]])
            pool_of_cell[waiting] = place[group]
            level_of_cell[waiting[place[group] >= 0]] = level
        return cls(tuple(pools), pool_of_cell, level_of_cell)


def combine(*codes: np.ndarray | None) -> np.ndarray:
    """Give each combination of several codes ``(cells,)`` of 0 or more a code; None says nothing."""
    given = [code.astype(np.int64) for code in codes if code is not None]
    combined = np.zeros_like(given[0])
    for code in given:
        combined = combined * (int(code.max(initial=0)) + 1) + code
    return combined


def batch_levels(batch: np.ndarray, context: np.ndarray | None = None) -> list[np.ndarray]:
    """Codes of batch and context ``(cells,)``, then, for a batch without controls, of context alone."""
    return [combine(context, batch), *([] if context is None else [combine(context)])]


def draw_controls(pools: ControlPools, rng: np.random.Generator) -> np.ndarray:
    """Draw for every cell a control of its pool, all with the same probability.

    Returns
    -------
    ``(cells,)`` int32 position of the control; a control gets another one where its pool has one.
    """
    partner = np.empty(len(pools.pool_of_cell), dtype=np.int32)
    for number, pool in enumerate(pools.pools):
        cells = np.flatnonzero(pools.pool_of_cell == number)
        place = rng.integers(len(pool), size=len(cells))
        own = pool[place] == cells
        place[own] = (place[own] + 1) % len(pool)
        partner[cells] = pool[place]
    return partner


def match_depth(
    pools: ControlPools, log_library_size: np.ndarray, n_nearest: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw for every cell one of the controls of its pool that are nearest in depth.

    Parameters
    ----------
    pools
        Which controls a cell may have.
    log_library_size
        ``(cells,)`` natural logarithm.
    n_nearest
        How many of the nearest are drawn from; 1 takes the nearest.
    rng
        Of the draw.

    Returns
    -------
    ``(cells,)`` int32, as of :func:`draw_controls`.
    """
    partner = np.empty(len(log_library_size), dtype=np.int32)
    # The nearest ones are among so many on either side of where the cell would stand.
    offsets = np.arange(-n_nearest, n_nearest + 1)
    for number, pool in enumerate(pools.pools):
        ordered = pool[np.argsort(log_library_size[pool], kind="stable")]
        depth = log_library_size[ordered]
        members = np.flatnonzero(pools.pool_of_cell == number)
        for cells in _blocks(members, BLOCK_OF_CELLS):
            place = np.searchsorted(depth, log_library_size[cells])[:, None] + offsets
            outside = (place < 0) | (place >= len(pool))
            place = np.clip(place, 0, len(pool) - 1)
            gap = np.abs(depth[place] - log_library_size[cells][:, None])
            gap[outside] = np.inf
            gap[ordered[place] == cells[:, None]] = np.inf
            nearest = np.argsort(gap, axis=1, kind="stable")[:, :n_nearest]
            there = np.isfinite(np.take_along_axis(gap, nearest, axis=1)).sum(axis=1)
            chosen = nearest[np.arange(len(cells)), (rng.random(len(cells)) * there).astype(np.int64)]
            partner[cells] = ordered[place[np.arange(len(cells)), chosen]]
            # The only control of its pool has no other.
            partner[cells[there == 0]] = cells[there == 0]
    return partner


def nearest_controls(pools: ControlPools, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Take for every cell the control of its pool at the least Euclidean distance.

    Of a pool with more than :data:`NEAREST_CONTROLS` controls, so many are drawn once for all its cells,
    because the work grows with cells × controls.

    Parameters
    ----------
    pools
        Which controls a cell may have.
    scores
        ``(cells, components)``.
    rng
        Of the draw.

    Returns
    -------
    ``(cells,)`` int32, as of :func:`draw_controls`.
    """
    # Here and below, because the default strategy does without scikit-learn, which takes a second to import.
    from sklearn.neighbors import NearestNeighbors

    partner = np.empty(len(scores), dtype=np.int32)
    for number, every in enumerate(pools.pools):
        pool = every
        if len(every) > NEAREST_CONTROLS:
            pool = np.sort(rng.choice(every, NEAREST_CONTROLS, replace=False))
        index = NearestNeighbors(n_neighbors=min(2, len(pool)), algorithm="brute")
        index.fit(scores[pool].astype(np.float64))
        members = np.flatnonzero(pools.pool_of_cell == number)
        for cells in _blocks(members, BLOCK_OF_CELLS):
            found = pool[index.kneighbors(scores[cells].astype(np.float64), return_distance=False)]
            # A control is nearest to itself; -1 is the second nearest, or itself where it is alone.
            partner[cells] = np.where(found[:, 0] == cells, found[:, -1], found[:, 0])
    return partner


def transport_controls(
    pools: ControlPools,
    perturbation: np.ndarray,
    scores: np.ndarray,
    max_cells: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw for every perturbed cell a control from the exact optimal transport plan.

    Between the cells of one perturbation with the same pool and the controls of that pool, all of equal
    weight, the plan of least summed squared Euclidean distance is found by the network simplex of POT
    (Flamary et al. 2021). More than ``max_cells`` cells are dealt at random into parts of about equal size,
    and each part is transported from its own draw of at most ``max_cells`` controls. So memory is bounded
    by three arrays of ``max_cells`` × ``max_cells`` and time is linear in cells.

    Parameters
    ----------
    pools
        Which controls a cell may have.
    perturbation
        ``(cells,)`` codes; control is -1.
    scores
        ``(cells, components)``.
    max_cells
        Cells at most of a side of a plan.
    rng
        Of parts, subsamples and draws.

    Returns
    -------
    ``(cells,)`` int32, as of :func:`draw_controls`. Controls, which need no transport, get another control
    at random.

    Raises
    ------
    RuntimeError
        When the solver does not end.
    """
    # Here, because other strategies do without it, and it imports whatever array library is installed.
    import ot
    from scipy.spatial.distance import cdist

    partner = draw_controls(pools, rng)
    perturbed = np.flatnonzero(perturbation != CONTROL_CODE)
    problem = combine(pools.pool_of_cell[perturbed], perturbation[perturbed])
    order = np.argsort(problem, kind="stable")
    starts = np.flatnonzero(np.diff(problem[order], prepend=-1))
    for cells in np.split(perturbed[order], starts[1:]) if len(perturbed) else []:
        pool = pools.pools[pools.pool_of_cell[cells[0]]]
        for part in np.array_split(rng.permutation(cells), -(-len(cells) // max_cells)):
            side = rng.choice(pool, min(len(pool), max_cells), replace=False)
            plan = np.full((1, len(side)), 1 / len(side))  # of a lone cell there is no other
            if len(part) > 1:
                cost = cdist(scores[part].astype(np.float64), scores[side].astype(np.float64), "sqeuclidean")
                plan, facts = ot.emd([], [], cost, numItermax=MAX_ITERATIONS, log=True)
                if facts["warning"] is not None:
                    raise RuntimeError(f"optimal transport of {cost.shape} cells: {facts['warning']}")
            reached = np.cumsum(plan, axis=1)
            drawn = rng.random(len(part)) * reached[:, -1]
            partner[part] = side[(reached > drawn[:, None]).argmax(axis=1)]
    return partner


def principal_scores(
    matrix: h5py.Group,
    keep: np.ndarray,
    fitted: np.ndarray,
    columns: np.ndarray,
    n_components: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Project cells on principal components of the log-expression of others, in two passes over blocks.

    Parameters
    ----------
    matrix
        CSR group of log-expression, (cells, genes).
    keep
        ``(cells,)`` bool, cells to project.
    fitted
        ``(cells,)`` bool, cells that set centre and components: at most :data:`PCA_CELLS` of them, drawn.
    columns
        Genes that count.
    n_components
        Components at most.
    rng
        Of the draw.

    Returns
    -------
    ``(kept cells, components)`` float32.

    Raises
    ------
    ValueError
        With fewer than two cells or genes.
    """
    from sklearn.decomposition import PCA

    candidates = np.flatnonzero(fitted)
    chosen = np.zeros(len(fitted), dtype=bool)
    chosen[rng.choice(candidates, min(len(candidates), PCA_CELLS), replace=False)] = True
    sample = sparse.vstack(list(_selected(matrix, chosen, columns)), format="csr").astype(np.float64)
    size = min(n_components, min(sample.shape) - 1)
    if size < 1:
        raise ValueError(f"principal components need two cells and two genes; got {sample.shape}")
    pca = PCA(size, svd_solver="arpack", random_state=0).fit(sample)
    offset = pca.mean_ @ pca.components_.T
    parts = (rows @ pca.components_.T - offset for rows in _selected(matrix, keep, columns))
    return np.concatenate([part.astype(np.float32) for part in parts])


def _selected(matrix: h5py.Group, keep: np.ndarray, columns: np.ndarray) -> Iterator[sparse.csr_matrix]:
    """Yield the kept rows and columns of a matrix, a sparse block at a time."""
    n_genes = int(matrix.attrs["shape"][1])
    for first, data, indices, indptr in rows_of_matrix(matrix):
        rows = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, n_genes))
        yield rows[np.flatnonzero(keep[first : first + len(indptr) - 1])][:, columns]


def _blocks(cells: np.ndarray, size: int) -> list[np.ndarray]:
    return [cells[first : first + size] for first in range(0, len(cells), size)]

"""What an embedding holds of cells that training never saw, against PCA and an untrained encoder.

Cells of test perturbations, and control cells beside them, are embedded by the trained encoder, by the same
encoder with the weights that it started from, and by principal components of what the encoder reads:
log-expression, or its Pearson residuals. All are reduced to the same number of principal components, fitted
on training cells alone, so that what is measured does not depend on the number of dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biojepa.collapse import lidar, rankme, std_over_cells
from biojepa.contracts import (
    BATCH,
    IS_CONTROL,
    PERTURBATION,
    REPRESENTATION_COLUMNS,
    SET,
    TEST,
    TRAIN,
    WHOLE_MODEL,
)
from biojepa.embedding import Screen, columns_of_model, load_frozen
from biojepa.model.embedding import CellEmbedding
from biojepa.probes import principal_axes, probe_features
from biojepa.retrieval import ACTIVITY, retrieve
from biojepa.splits import read_facts, read_split, require_same_split
from biojepa.training import TrainedModel
from biojepa.training.trained import make_embedding

log = logging.getLogger(__name__)

DIMENSIONS = 50
# Bounds on the cells, so that a million of them cost no more than a few thousand.
MAX_HELD_OUT, MAX_PER_PERTURBATION, MAX_CONTROLS, MAX_FITTED = 3000, 100, 1000, 2000
# Of so many perturbations that this is more than their share, some are left out.
MIN_PER_PERTURBATION = 5
# Rows of a file that lie nearer to each other are read together with those between them.
GAP = 64
# The cells are the same for every model and seed.
SAMPLE_SEED = 0
HELD_OUT, WITH_CONTROLS = "test", "test and control"


@dataclass(frozen=True)
class Sample:
    """Cells on which embeddings are compared.

    Attributes
    ----------
    held_out
        Positions of cells of test perturbations, one perturbation after another, in random order within.
    controls
        Positions of control cells to judge them beside.
    fitted
        Positions of training cells, controls among them, that the principal axes are fitted on; none is
        of a perturbation that is held out.
    """

    held_out: np.ndarray
    controls: np.ndarray
    fitted: np.ndarray

    @property
    def judged(self) -> np.ndarray:
        """Held-out cells, then controls."""
        return np.concatenate([self.held_out, self.controls])


def sample_cells(
    groups: np.ndarray,
    is_control: np.ndarray,
    sets: np.ndarray,
    seed: int = 0,
    beside: np.ndarray | None = None,
) -> Sample:
    """Draw the cells to compare embeddings on, the same for the same arguments.

    Parameters
    ----------
    groups
        (cells,) position of each cell's perturbation, -1 for control.
    is_control
        (cells,) bool.
    sets
        (perturbations,) train, val or test.
    seed
        Of the draw.
    beside
        (cells,) bool, controls that are judged beside the held-out cells; all of them where ``None``.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(groups))
    set_of = np.append(sets, "")[groups]  # -1 reads the last
    tested = order[(set_of[order] == TEST) & ~is_control[order]]
    controls = order[(is_control if beside is None else beside)[order]]
    fitted = order[is_control[order] | (set_of[order] == TRAIN)]
    return Sample(
        _evenly(tested, groups, rng, MAX_PER_PERTURBATION, MAX_HELD_OUT),
        controls[:MAX_CONTROLS],
        fitted[:MAX_FITTED],
    )


def _evenly(
    cells: np.ndarray, groups: np.ndarray, rng: np.random.Generator, per_group: int, total: int
) -> np.ndarray:
    """Take of each group as many cells as fit: all groups the same number, where they have it."""
    names = np.unique(groups[cells])
    most = total // MIN_PER_PERTURBATION
    if len(names) > most:
        names = np.sort(rng.permutation(names)[:most])
        cells = cells[np.isin(groups[cells], names)]
    cells = cells[np.argsort(groups[cells], kind="stable")]
    counts = np.unique(groups[cells], return_counts=True)[1]
    share = next((n for n in range(per_group, 0, -1) if np.minimum(counts, n).sum() <= total), 0)
    place = np.arange(len(cells)) - np.repeat(np.cumsum(counts) - counts, counts)
    return cells[place < share]


def read_cells(path: str | Path, cells: np.ndarray, column_of: np.ndarray, n_columns: int) -> np.ndarray:
    """Read some rows of ``cells.h5ad``, (len(cells), n_columns) float32, without reading all.

    Parameters
    ----------
    path
        ``cells.h5ad``.
    cells
        Positions, in any order, each at most once.
    column_of
        (genes of the file,) column of each gene in the result, -1 for none.
    """
    order = np.argsort(cells)
    dense = np.zeros((len(cells), n_columns), dtype=np.float32)
    with h5py.File(path, "r") as file:
        matrix = file["X"]
        indptr = matrix["indptr"][:]
        for run in np.split(order, np.flatnonzero(np.diff(cells[order]) > GAP) + 1):
            if not len(run):
                continue
            start, end = indptr[cells[run[0]]], indptr[cells[run[-1]] + 1]
            data, columns = matrix["data"][start:end], column_of[matrix["indices"][start:end]]
            for row in run:
                span = slice(indptr[cells[row]] - start, indptr[cells[row] + 1] - start)
                wanted = columns[span] >= 0
                dense[row, columns[span][wanted]] = data[span][wanted]
    return dense


def untrained_embedding(model: TrainedModel, seed: int) -> CellEmbedding:
    """Make the embedding that a training with this seed starts from, its tokens not yet standardized.

    Architecture, and what is done to the inputs, are those of ``model``; the weights are those of the
    ablation ``untrained_predictor`` with the same seed.
    """
    settings = replace(model.settings, embedding="untrained")
    torch.manual_seed(seed)
    embedding = make_embedding(settings, len(model.genes)).to(model.control_tokens.device)
    embedding.take_inputs(model.embedding)
    return embedding.requires_grad_(False).eval()


@torch.no_grad()
def raw_tokens(
    embedding: CellEmbedding, expression: np.ndarray, log_library: np.ndarray, block: int = 1024
) -> Tensor:
    """Tokens (cells, T, D) before they are standardized, which would hide a collapse."""
    device = embedding.gene_mean.device
    x = torch.from_numpy(expression).to(device)
    library = torch.from_numpy(log_library.astype(np.float32)).to(device)
    parts = zip(x.split(block), library.split(block), strict=True)
    return torch.cat([embedding.raw_tokens(*part) for part in parts])


def components(fitted: Tensor, judged: Tensor, dimensions: int = DIMENSIONS) -> Tensor:
    """Principal components (judged cells, at most ``dimensions``) float64; centre and axes of ``fitted``.

    Parameters
    ----------
    fitted, judged
        (cells, features) of training cells, and of those to project.
    """
    centre = fitted.double().mean(dim=0)
    axes = principal_axes(fitted.double() - centre, dimensions)
    return torch.cat([(part.double() - centre) @ axes for part in judged.split(1024)])


@dataclass(frozen=True)
class ComparedCells:
    """All that embeddings are compared on, read once.

    Attributes
    ----------
    expression, log_library
        (cells, genes of the model) log-expression, and (cells,) natural log of the library size.
    judged, fitted
        Positions in them: held-out cells and then controls; training cells.
    labels
        (judged cells,) perturbation, -1 for controls.
    batch
        (judged cells,) batch code.
    """

    expression: np.ndarray
    log_library: np.ndarray
    judged: np.ndarray
    fitted: np.ndarray
    labels: np.ndarray
    batch: np.ndarray

    @classmethod
    def read(cls, model: TrainedModel, cells_path: str | Path, split_path: str | Path) -> ComparedCells:
        """Draw the cells of a fold and read them; see :func:`measure_representation` for errors.

        Where the fold holds out a context, the controls beside the held-out cells are of that context.
        """
        split, screen = read_split(split_path), Screen.read(cells_path, read_facts(split_path))
        groups, is_control = screen.groups(split), screen.obs[IS_CONTROL].to_numpy(bool)
        sample = sample_cells(groups, is_control, split[SET].to_numpy(str), SAMPLE_SEED, screen.controls)
        # A control may be judged and fitted on.
        needed = np.unique(np.concatenate([sample.judged, sample.fitted]))
        column_of = columns_of_model(model, cells_path, screen.genes)
        batch = pd.factorize(screen.obs[BATCH].astype(str), sort=True)[0].astype(np.int64)
        return cls(
            expression=read_cells(cells_path, needed, column_of, len(model.genes)),
            log_library=screen.log_library[needed],
            judged=np.searchsorted(needed, sample.judged),
            fitted=np.searchsorted(needed, sample.fitted),
            labels=np.where(is_control[sample.judged], -1, groups[sample.judged]),
            batch=batch[sample.judged],
        )

    @property
    def held_out(self) -> np.ndarray:
        """(judged cells,) bool, True for cells of test perturbations."""
        return self.labels >= 0


@dataclass(frozen=True)
class Features:
    """One embedding of the judged cells.

    Attributes
    ----------
    name
        ``trained``, ``untrained``, the same with ``_pooled``, or ``pca50``.
    z
        (judged cells, at most 50) principal components.
    spread
        Mean standard deviation over held-out cells of the tokens before standardization; ``None`` where
        the unit is another.
    """

    name: str
    z: Tensor
    spread: float | None


def embeddings(model: TrainedModel, cells: ComparedCells, seed: int) -> Iterator[Features]:
    """Embed the judged cells in every way, one after the other, so that memory holds one embedding."""
    judged, fitted = cells.judged, cells.fitted
    for name, embedding in (("trained", model.embedding), ("untrained", untrained_embedding(model, seed))):
        tokens = raw_tokens(embedding, cells.expression, cells.log_library)
        held_out = tokens[judged[cells.held_out]]
        spread, pooled_spread = std_over_cells(held_out), std_over_cells(held_out.mean(dim=1))
        if name == "untrained":
            embedding.fit_tokens(tokens, torch.from_numpy(fitted).to(tokens.device))
        tokens = (tokens - embedding.token_mean) / embedding.token_scale
        flat, pooled = tokens.flatten(1), tokens.mean(dim=1)
        yield Features(name, components(flat[fitted], flat[judged]), spread)
        yield Features(f"{name}_pooled", components(pooled[fitted], pooled[judged]), pooled_spread)
    device = model.control_tokens.device
    library = torch.from_numpy(cells.log_library.astype(np.float32)).to(device)
    x = model.embedding.transformed(torch.from_numpy(cells.expression).to(device), library)
    yield Features("pca50", components(x[fitted], x[judged]), None)


def measure(
    features: Features, cells: ComparedCells
) -> Iterator[tuple[str, str, int, float | None, float | None]]:
    """Yield metric, on which cells, perturbation (-1 for all), value and chance of one embedding."""
    z, device = features.z, features.z.device
    tested = torch.from_numpy(cells.held_out).to(device)
    classes, batch = (torch.from_numpy(codes).to(device) for codes in (cells.labels, cells.batch))
    if features.spread is not None:
        yield "std_cells", HELD_OUT, -1, features.spread, None
    yield "rankme", HELD_OUT, -1, rankme(z[tested]), None
    yield "lidar", HELD_OUT, -1, lidar(z[tested], classes[tested]), None
    for found in retrieve(z.cpu().numpy(), cells.labels):
        which = WITH_CONTROLS if found.kind == ACTIVITY else HELD_OUT
        yield f"knn_map_{found.kind}", which, found.label, found.value, found.chance
    depth = torch.from_numpy(cells.log_library[cells.judged]).to(device)
    probed = probe_features(z, classes, batch, depth)
    named, chance = probed["perturbation"], probed["perturbation_chance"]
    yield "probe_perturbation", HELD_OUT, -1, named, chance
    yield "probe_batch", WITH_CONTROLS, -1, probed["batch"], probed["batch_chance"]
    explained = probed["log_library_r2"]
    yield "probe_depth", WITH_CONTROLS, -1, explained, None if explained is None else 0.0


def measure_representation(
    model_path: str | Path,
    cells_path: str | Path,
    split_path: str | Path,
    run: dict[str, str | int],
    device: str = "cpu",
) -> pd.DataFrame:
    """Measure the embedding of a trained model, of its untrained twin, and of PCA, on the same cells.

    Parameters
    ----------
    model_path, cells_path, split_path
        ``model.pt``, ``cells.h5ad`` and ``split.tsv`` of one fold.
    run
        ``model``, ``fold`` and ``seed``, in this order; the untrained twin has the same seed.
    device
        ``cpu``, ``cuda`` or ``auto``.

    Returns
    -------
    Columns of ``representation.tsv``. A metric that is not defined on these cells has no value, such as
    the probe of the batch where there is one batch; below two test cells there is no row.

    Raises
    ------
    LeakageError
        When the model was trained with another split.
    InputError
        When the screen lacks a gene of the model.
    """
    model, split = load_frozen(model_path, device), read_split(split_path)
    require_same_split(model.facts, split_path, model_path)
    cells = ComparedCells.read(model, cells_path, split_path)
    n_cells = {HELD_OUT: int(cells.held_out.sum()), WITH_CONTROLS: len(cells.judged)}
    log.info("%d held-out cells, %d with controls", *n_cells.values())
    rows = []
    if n_cells[HELD_OUT] > 1:
        names = [*split[PERTURBATION].astype(str), WHOLE_MODEL]  # -1 reads the last
        rows = [
            (*run.values(), features.name, metric, which, n_cells[which], names[label], value, chance)
            for features in embeddings(model, cells, int(run["seed"]))
            for metric, which, label, value, chance in measure(features, cells)
        ]
    table = pd.DataFrame(rows, columns=list(REPRESENTATION_COLUMNS))
    return table.astype({"value": float, "chance": float})

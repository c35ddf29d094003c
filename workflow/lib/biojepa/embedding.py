"""Embed every cell of a screen with a trained model, a block of cells at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from biojepa.contracts import BATCH, CELL_TYPE, CONTEXT, CONTROL, IS_CONTROL, LIBRARY_SIZE, PERTURBATION
from biojepa.errors import InputError
from biojepa.halves import half_b
from biojepa.pairs import relocate, rows_of_matrix
from biojepa.predictions import predicted_rows, write_embeddings, write_predictions
from biojepa.provenance import environment
from biojepa.splits import cell_contexts, cell_labels, read_facts, read_split, require_same_split
from biojepa.training import TrainedModel, load_model
from biojepa.training.optimization import choose_device


def embed_screen(
    model: TrainedModel,
    cells_path: str | Path,
    genes: Sequence[str] | np.ndarray,
    log_library: np.ndarray,
    groups: np.ndarray,
    n_groups: int,
    block: int = 2048,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed all cells, test cells included.

    Parameters
    ----------
    model
        Trained; nothing of it changes here.
    cells_path
        ``cells.h5ad``, read in blocks of rows.
    genes
        Genes of its columns.
    log_library
        (cells,) natural log of the library size.
    groups
        (cells,) group whose mean tokens are wanted, -1 for none.
    n_groups
        Number of groups.

    Returns
    -------
    pooled
        (cells, D) mean over tokens of the standardized embedding, float32.
    means
        (n_groups, T, D) mean tokens of each group; NaN for an empty one.

    Raises
    ------
    InputError
        When the screen lacks a gene of the model.
    """
    column_of = columns_of_model(model, cells_path, genes)
    device = model.control_tokens.device
    pooled = np.empty((len(log_library), model.embedding.dim), dtype=np.float32)
    sums = torch.zeros(
        n_groups + 1, model.embedding.num_tokens, model.embedding.dim, dtype=torch.float64, device=device
    )
    owners = torch.from_numpy(np.where(groups < 0, n_groups, groups).astype(np.int64)).to(device)
    with h5py.File(cells_path, "r") as file, torch.no_grad():
        blocks = rows_of_matrix(file["X"], block)
        for first, data, indices, indptr in tqdm(
            blocks, "embed", total=-(-len(pooled) // block), mininterval=2, file=sys.stderr
        ):
            n = len(indptr) - 1
            wanted = column_of[indices] >= 0
            row = np.repeat(np.arange(n), np.diff(indptr))[wanted]
            dense = np.zeros((n, len(model.genes)), dtype=np.float32)
            dense[row, column_of[indices[wanted]]] = data[wanted]
            part = slice(first, first + n)
            library = torch.from_numpy(log_library[part].astype(np.float32)).to(device)
            tokens = model.embedding(torch.from_numpy(dense).to(device), library)
            pooled[part] = tokens.mean(dim=1).cpu().numpy()
            sums.index_add_(0, owners[part], tokens.double())
    counts = torch.bincount(owners, minlength=n_groups + 1).double()
    means = (sums / counts[:, None, None])[:n_groups]
    return pooled, means.float().cpu().numpy()


def columns_of_model(
    model: TrainedModel, cells_path: str | Path, genes: Sequence[str] | np.ndarray
) -> np.ndarray:
    """Position among the model's genes of each gene of a screen, (genes,), -1 where it uses it not.

    Raises
    ------
    InputError
        When the screen lacks a gene of the model.
    """
    position = {gene: column for column, gene in enumerate(genes)}
    missing = [gene for gene in model.genes if gene not in position]
    if missing:
        raise InputError(
            cells_path,
            f"{len(missing)} of the model's {len(model.genes)} genes missing, such as {missing[:3]}",
            "every gene that the model was trained on",
            "embed the screen that the model was trained on, or retrain",
        )
    column_of = np.full(len(genes), -1)
    column_of[[position[gene] for gene in model.genes]] = np.arange(len(model.genes))
    return column_of


@dataclass(frozen=True)
class Screen:
    """What embedding needs of ``cells.h5ad`` beside the expression itself.

    Attributes
    ----------
    obs
        Of the cells.
    genes
        (genes,) of the columns.
    labels
        (cells,) perturbation, as the split of the fold spells it.
    log_library
        (cells,) natural log of the library size.
    held_out, context
        Context that the fold holds out, and that of each cell, (cells,) text; None without one.
    """

    obs: pd.DataFrame
    genes: np.ndarray
    labels: np.ndarray
    log_library: np.ndarray
    held_out: str | None = None
    context: np.ndarray | None = None

    @classmethod
    def read(cls, path: str | Path, facts: Mapping[str, Any] | None = None) -> Screen:
        """Read all but the expression; ``facts`` of ``split.json`` say how the fold labels the cells."""
        with h5py.File(path, "r") as file:
            obs = ad.io.read_elem(file["obs"])
            genes = ad.io.read_elem(file["var"]).index.to_numpy(str)
        facts = facts or {}
        return cls(
            obs,
            genes,
            cell_labels(obs, facts),
            np.log(obs[LIBRARY_SIZE].to_numpy(np.float64)),
            facts.get(CONTEXT),
            cell_contexts(obs, facts),
        )

    @property
    def controls(self) -> np.ndarray:
        """Control cells that predictions start from, (cells,) bool: of a held-out context alone."""
        controls = self.labels == CONTROL
        return controls if self.context is None else controls & (self.context == self.held_out)

    def groups(self, split: pd.DataFrame) -> np.ndarray:
        """Position of each cell's label in the split table, -1 for control."""
        position = {label: row for row, label in enumerate(split[PERTURBATION])}
        return np.array([position.get(label, -1) for label in self.labels])

    def counts(self) -> dict[str, int]:
        """Cells of each label."""
        return dict(zip(*np.unique(self.labels, return_counts=True), strict=True))


@dataclass(frozen=True)
class Outputs:
    """What to write for one model: its name and files, and those of its oracle where it has one."""

    model: str
    embeddings: str | Path
    predictions: str | Path
    oracle: str | None = None
    oracle_predictions: str | Path = ""


def embed_and_predict(
    model_path: str | Path,
    cells_path: str | Path,
    split_path: str | Path,
    outputs: Outputs,
    half_seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write the embeddings, the predictions and, if asked, the oracle of one trained model.

    The oracle is what the readout makes of the *observed* tokens of half A of a perturbation's cells: it
    scores what the embedding and its readout keep, whatever the predictor does. Half B is the truth.

    Raises
    ------
    LeakageError
        When the model was trained with another split.
    """
    model, split = load_frozen(model_path, device), read_split(split_path)
    screen = Screen.read(cells_path, read_facts(split_path))
    require_same_split(model.facts, split_path, model_path)
    in_b = half_b(screen.obs.index.to_numpy(), half_seed, screen.labels)
    group = screen.groups(split)
    # Each half of a label is a group of its own: the oracle may see half A alone.
    halves = np.where(group < 0, -1, 2 * group + in_b)
    n_halves = 2 * len(split)
    pooled, means = _embed_groups(model, cells_path, screen, halves, n_halves)
    counts = np.bincount(halves[halves >= 0], minlength=n_halves).reshape(-1, 2)
    means = means.reshape(len(split), 2, *means.shape[1:])
    rows = predicted_rows(split)
    share = counts[rows] / counts[rows].sum(axis=1, keepdims=True)
    z_true = np.einsum("rh,rhtd->rd", share, means[rows]) / means.shape[2]

    expression, sd, tokens = model.predict(rows)
    provenance = {**environment(), **model.facts, "half_seed": half_seed}
    shared = {
        "split": split,
        "rows": rows,
        "n_cells": screen.counts(),
        "genes": model.genes,
        "z_true": z_true,
    }
    write_predictions(
        outputs.predictions,
        outputs.model,
        expression=expression,
        provenance={**provenance, "model": outputs.model},
        sd=sd,
        z_pred=tokens.mean(axis=1),
        **shared,
    )
    if outputs.oracle is not None:
        observed = torch.from_numpy(means[rows, 0]).to(model.control_tokens.device)
        # Relative to the controls, so that a bias of the readout cancels.
        change = model.readout.change(observed - model.control_tokens)
        write_predictions(
            outputs.oracle_predictions,
            outputs.oracle,
            expression=(model.control_expression + change).clamp(min=0).cpu().numpy(),
            provenance={**provenance, "model": outputs.oracle},
            **shared,
        )
    kept = [column for column in (PERTURBATION, IS_CONTROL, BATCH, CELL_TYPE) if column in screen.obs]
    write_embeddings(outputs.embeddings, screen.obs[kept], pooled, provenance)


def _embed_groups(
    model: TrainedModel, cells_path: str | Path, screen: Screen, groups: np.ndarray, n_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embed the screen as :func:`embed_screen` does; means as of the held-out context, where there is one.

    That changes nothing for groups of the held-out context itself; the others are compared with the
    controls of their own contexts, so that they can be set beside predictions that start from its controls.
    """
    if screen.context is None:
        return embed_screen(model, cells_path, screen.genes, screen.log_library, groups, n_groups)
    names = sorted(set(screen.context))
    place = pd.Index(names).get_indexer(screen.context)
    control = screen.labels == CONTROL
    everything = np.where(control, n_groups + place, groups)
    pooled, means = embed_screen(
        model, cells_path, screen.genes, screen.log_library, everything, n_groups + len(names)
    )
    n_controls = np.bincount(place[control], minlength=len(names))
    flat = means.reshape(len(means), -1).astype(np.float64)
    sums = np.nan_to_num(flat[n_groups:]) * n_controls[:, None]
    used = groups >= 0
    counts = np.bincount(groups[used] * len(names) + place[used], minlength=n_groups * len(names))
    counts = counts.reshape(n_groups, len(names))
    held_out = names.index(str(screen.held_out))
    moved, _ = relocate(flat[:n_groups], counts, sums, n_controls, held_out)
    return pooled, moved.reshape(n_groups, *means.shape[1:]).astype(np.float32)


def load_frozen(path: str | Path, device: str) -> TrainedModel:
    """Load with the number of threads that the model was trained with: sums depend on it."""
    model = load_model(path, str(choose_device(device)))
    torch.set_num_threads(model.settings.torch_threads)
    return model

"""Embed every cell of a screen with a trained model, a block of cells at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from biojepa.contracts import BATCH, CELL_TYPE, IS_CONTROL, LIBRARY_SIZE, PERTURBATION
from biojepa.errors import InputError
from biojepa.halves import half_b
from biojepa.pairs import rows_of_matrix
from biojepa.predictions import predicted_rows, write_embeddings, write_predictions
from biojepa.provenance import environment
from biojepa.splits import read_split
from biojepa.training import TrainedModel, load_model
from biojepa.training.optimization import choose_device



def embed_screen(
    model: TrainedModel,
    cells_path: str | Path,
    genes: Sequence[str],
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
    device = model.control_tokens.device
    pooled = np.empty((len(log_library), model.embedding.dim), dtype=np.float32)
    sums = torch.zeros(n_groups + 1, model.embedding.num_tokens, model.embedding.dim, dtype=torch.float64, device=device)
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


@dataclass(frozen=True)
class _Screen:
    """What both writers need of ``cells.h5ad`` beside the expression itself."""

    obs: pd.DataFrame
    genes: np.ndarray
    labels: np.ndarray
    log_library: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> _Screen:
        with h5py.File(path, "r") as file:
            obs = ad.io.read_elem(file["obs"])
            genes = ad.io.read_elem(file["var"]).index.to_numpy(str)
        labels = obs[PERTURBATION].astype(str).to_numpy()
        return cls(obs, genes, labels, np.log(obs[LIBRARY_SIZE].to_numpy(np.float64)))

    def groups(self, split: pd.DataFrame) -> np.ndarray:
        """Position of each cell's label in the split table, -1 for control."""
        position = {label: row for row, label in enumerate(split[PERTURBATION])}
        return np.array([position.get(label, -1) for label in self.labels])

    def counts(self) -> dict[str, int]:
        """Cells of each label."""
        return dict(zip(*np.unique(self.labels, return_counts=True), strict=True))


def embed_and_predict(
    model_path: str | Path,
    cells_path: str | Path,
    split_path: str | Path,
    embeddings_path: str | Path,
    predictions_path: str | Path,
    name: str,
    device: str = "cpu",
) -> None:
    """Write the embeddings and the predictions of one trained model."""
    model, split, screen = _load(model_path, device), read_split(split_path), _Screen.read(cells_path)
    pooled, means = embed_screen(
        model, cells_path, screen.genes, screen.log_library, screen.groups(split), len(split)
    )
    rows = predicted_rows(split)
    expression, sd, tokens = model.predict(rows)
    provenance = {**environment(), "model": name, **model.facts}
    write_predictions(
        predictions_path,
        name,
        split,
        rows,
        screen.counts(),
        model.genes,
        expression,
        provenance,
        sd=sd,
        z_pred=tokens.mean(axis=1),
        z_true=means[rows].mean(axis=1),
    )
    kept = [column for column in (PERTURBATION, IS_CONTROL, BATCH, CELL_TYPE) if column in screen.obs]
    write_embeddings(embeddings_path, screen.obs[kept], pooled, provenance)


def predict_by_oracle(
    model_path: str | Path,
    cells_path: str | Path,
    split_path: str | Path,
    predictions_path: str | Path,
    name: str,
    half_seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write what the readout makes of the *observed* tokens of half A of a perturbation's cells.

    It scores what the embedding and its readout keep, whatever the predictor does. Half B is the truth.
    """
    model, split, screen = _load(model_path, device), read_split(split_path), _Screen.read(cells_path)
    in_a = ~half_b(screen.obs.index.to_numpy(), half_seed, screen.labels)
    groups = np.where(in_a, screen.groups(split), -1)
    _, means = embed_screen(model, cells_path, screen.genes, screen.log_library, groups, len(split))
    rows = predicted_rows(split)
    observed = torch.from_numpy(means[rows]).to(model.control_tokens.device)
    # Relative to the controls, so that a bias of the readout cancels.
    change = model.readout.change(observed - model.control_tokens)
    expression = (model.control_expression + change).clamp(min=0).cpu().numpy()
    provenance = {**environment(), "model": name, **model.facts, "half_seed": half_seed}
    write_predictions(
        predictions_path,
        name,
        split,
        rows,
        screen.counts(),
        model.genes,
        expression,
        provenance,
        z_true=means[rows].mean(axis=1),
    )


def _load(path: str | Path, device: str) -> TrainedModel:
    """Load with the number of threads that the model was trained with: sums depend on it."""
    model = load_model(path, str(choose_device(device)))
    torch.set_num_threads(model.settings.torch_threads)
    return model

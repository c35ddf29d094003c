"""Train one model of one fold from ``pairs.h5``, and keep all that predicting needs."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biojepa.baselines import fit_linear_branch
from biojepa.collapse import statistics
from biojepa.contracts import TRAIN
from biojepa.model.embedding import CellEmbedding, PCAProjection
from biojepa.pairs import CONTROL_CODE, Pairs, refuse_leaked_pairs, trainable_labels, validation_labels
from biojepa.readout import calibrate_scale, fit_readout, gate
from biojepa.training.cells import CellStore, Populations, spread
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.encoder_stage import MONITOR_CELLS, train_encoder
from biojepa.training.optimization import choose_device
from biojepa.training.predictor_stage import LatentCells, train_predictor
from biojepa.training.settings import TrainSettings
from biojepa.training.trained import TrainedModel, make_embedding, make_predictor

log = logging.getLogger(__name__)


def _codes(pairs: Pairs, priors: str, seed: int) -> dict[str, np.ndarray]:
    """Take the codes as given, permuted among the genes that a source covers, or none."""
    if priors == "none":
        return {}
    if priors == "given":
        return dict(pairs.codes)
    rng = np.random.default_rng(seed)
    shuffled = {}
    for name, values in pairs.codes.items():
        covered = np.flatnonzero(values.any(axis=1))
        shuffled[name] = values.copy()
        shuffled[name][covered] = values[rng.permutation(covered)]
    return shuffled


def _fingerprint(pairs: Pairs, settings: TrainSettings, seed: int, encoder_from: TrainedModel | None) -> str:
    """Digest of all that determines a run, so that only its own checkpoint is continued."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update(
        json.dumps([dict(pairs.facts), seed, torch.__version__], sort_keys=True, default=str).encode()
    )
    arrays = [value for value in vars(pairs).values() if isinstance(value, np.ndarray)]
    arrays += [*pairs.codes.values()]
    if encoder_from is not None:
        arrays += [value.cpu().numpy() for value in encoder_from.embedding.state_dict().values()]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Fold:
    """What both stages see of a fold, on the device.

    Attributes
    ----------
    pairs
        With the codes that the settings ask for.
    train, validation
        Positions of labels.
    cells
        (N,) controls and cells of training perturbations.
    classes
        (cells of the store,) training perturbation 0…n-1 of each cell, -1 for all others.
    """

    pairs: Pairs
    store: CellStore
    train: np.ndarray
    validation: np.ndarray
    cells: Tensor
    classes: Tensor

    @classmethod
    def of(cls, pairs: Pairs, priors: str, seed: int, device: torch.device) -> _Fold:
        train = trainable_labels(pairs)
        number = np.full(len(pairs.labels) + 1, -1)
        number[train] = np.arange(len(train))
        return cls(
            pairs=replace(pairs, codes=_codes(pairs, priors, seed)),
            store=CellStore(pairs, device),
            train=train,
            validation=validation_labels(pairs),
            cells=torch.from_numpy(pairs.cells_of(TRAIN)).to(device),
            classes=torch.from_numpy(number[pairs.perturbation]).to(device),  # control, -1, reads the last
        )

    @property
    def monitored(self) -> Tensor:
        """Training cells that the collapse statistics are taken of, drawn evenly."""
        return spread(self.cells, MONITOR_CELLS)


@dataclass(frozen=True)
class _LinearBranch:
    """The additive kernel ridge in expression and in the latent space, for all labels.

    Attributes
    ----------
    expression, sd
        (labels, genes) Δ and its standard deviation.
    tokens
        (labels, T, D) change of the tokens.
    left_out
        The same, but for training labels what the other training labels say of them.
    weights
        Estimated weights of the kernels in expression space.
    """

    expression: Tensor
    sd: Tensor
    tokens: Tensor
    left_out: Tensor
    weights: dict[str, float]


def train_model(
    pairs: Pairs,
    settings: TrainSettings,
    seed: int = 0,
    encoder_from: TrainedModel | None = None,
    checkpoint_folder: str | Path | None = None,
) -> tuple[TrainedModel, pd.DataFrame, dict[str, Any]]:
    """Train embedding, linear branch, predictor and readout.

    Parameters
    ----------
    pairs
        A fold.
    settings, seed
        Of the run.
    encoder_from
        A model of the same fold and seed whose embedding is reused instead of training one.
    checkpoint_folder
        Where to keep the resume state; ``None`` keeps none.

    Returns
    -------
    model
        In evaluation mode.
    history
        One row per measurement: ``stage``, ``step``, losses, collapse statistics.
    metrics
        Device, seconds, cells per second, peak memory, collapse statistics, gate.

    Raises
    ------
    LeakageError
        When ``pairs`` carries cells of a test perturbation.
    CollapseError
        When the embedding has collapsed.
    """
    refuse_leaked_pairs(pairs)
    started = time.perf_counter()
    torch.set_num_threads(settings.torch_threads)
    device = choose_device(settings.device)
    fingerprint = _fingerprint(pairs, settings, seed, encoder_from)
    fold = _Fold.of(pairs, settings.priors, seed, device)

    checkpoint = Checkpoint(checkpoint_folder, "encoder", fingerprint)
    embedding, encoder_rows = _embedding(fold, settings, seed, encoder_from, checkpoint)
    encoder_seconds = time.perf_counter() - started
    tokens = embed(embedding, fold.store, torch.arange(len(fold.store), device=device))
    if encoder_from is None:
        embedding.fit_tokens(tokens[fold.cells])
        tokens = (tokens - embedding.token_mean) / embedding.token_scale

    token_means, control_tokens = _label_means(pairs, tokens)
    expression_means, control_expression = pairs.pseudobulk()
    observed = token_means[fold.validation]
    readout, penalty = fit_readout(
        lambda: ((tokens[part], fold.store.rows(part)) for part in fold.cells.split(4096)),
        observed,
        torch.from_numpy(expression_means[fold.validation]).float().to(device),
    )
    delta = expression_means - control_expression
    branch = _linear_branch(fold, delta, token_means - control_tokens) if settings.linear_branch else None

    membership = torch.from_numpy(pairs.membership).float().to(device)
    torch.manual_seed(seed)
    codes = {name: torch.from_numpy(values) for name, values in fold.pairs.codes.items()}
    seen = membership[fold.train].any(dim=0).cpu()
    predictor = make_predictor(settings, embedding, codes, seen).to(device)
    predictor_rows = train_predictor(
        predictor,
        Populations(pairs, device),
        LatentCells(tokens, membership, torch.zeros_like(token_means) if branch is None else branch.left_out),
        torch.from_numpy(fold.train).to(device),
        torch.from_numpy(fold.validation).to(device),
        observed,
        control_tokens,
        settings.predictor,
        seed,
        Checkpoint(checkpoint_folder, "predictor", fingerprint),
    )
    model = TrainedModel(
        settings=settings,
        facts=dict(pairs.facts),
        genes=pairs.genes,
        embedding=embedding,
        predictor=predictor,
        readout=readout,
        control_tokens=control_tokens,
        control_expression=torch.from_numpy(control_expression).float().to(device),
        membership=membership,
        labels=pairs.labels,
        sets=pairs.sets,
        linear_expression=None if branch is None else branch.expression,
        linear_tokens=None if branch is None else branch.tokens,
        linear_sd=None if branch is None else branch.sd,
        weight=1.0,
    )
    model.weight, t = _believe(model, fold.validation, delta[fold.validation])

    stages = {"encoder": encoder_rows, "predictor": predictor_rows}
    history = pd.DataFrame([{"stage": stage, **row} for stage, rows in stages.items() for row in rows])
    metrics = {
        **_effort(settings, device, encoder_seconds if encoder_rows else 0.0, time.perf_counter() - started),
        "n_training_cells": len(fold.cells),
        "n_training_perturbations": len(fold.train),
        "n_validation_perturbations": len(fold.validation),
        "parameters": sum(p.numel() for part in (embedding, predictor) for p in part.parameters()),
        "readout_penalty": penalty,
        "latent_weight": model.weight,
        "latent_weight_t": t,
        "linear_weights": {} if branch is None else branch.weights,
        "embedding": statistics(tokens[fold.monitored], fold.classes[fold.monitored]),
    }
    return model, history, metrics


def _linear_branch(fold: _Fold, delta: np.ndarray, token_change: Tensor) -> _LinearBranch:
    """Fit both ridges on the training labels; ``delta`` (labels, genes), ``token_change`` (labels, T, D)."""
    everything, device = np.arange(len(fold.pairs.labels)), token_change.device

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(device)

    expression = fit_linear_branch(fold.pairs, fold.train, delta[fold.train])
    latent = fit_linear_branch(fold.pairs, fold.train, token_change[fold.train].flatten(1).cpu().numpy())
    tokens = tensor(latent.predict(everything)).view_as(token_change)
    left_out = tokens.clone()
    left_out[fold.train] = tensor(latent.leave_one_out()).view(-1, *tokens.shape[1:])
    return _LinearBranch(
        expression=tensor(expression.predict(everything)),
        sd=tensor(expression.standard_deviation(everything)),
        tokens=tokens,
        left_out=left_out,
        weights={**expression.weights, "noise": expression.noise},
    )


def _effort(
    settings: TrainSettings, device: torch.device, encoder_seconds: float, seconds: float
) -> dict[str, Any]:
    """Say what the training ran on and what it took; cells per second are those of the encoder stage."""
    drawn = settings.encoder.steps * settings.encoder.batch_size
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "torch_threads": settings.torch_threads,
        "seconds": round(seconds, 2),
        "encoder_seconds": round(encoder_seconds, 2),
        "cells_per_second": round(drawn / encoder_seconds) if encoder_seconds else None,
        "peak_memory_mb": _peak_memory(device),
    }


def _embedding(
    fold: _Fold,
    settings: TrainSettings,
    seed: int,
    encoder_from: TrainedModel | None,
    checkpoint: Checkpoint,
) -> tuple[CellEmbedding, list[dict[str, float]]]:
    """Make the frozen embedding: reuse, train, project or leave as initialized."""
    store, cells = fold.store, fold.cells
    if encoder_from is not None:
        same_split = encoder_from.facts["split_sha256"] == fold.pairs.facts["split_sha256"]
        if not same_split or encoder_from.genes != fold.pairs.genes:
            raise ValueError("the encoder to reuse was trained on another split or other genes")
        return encoder_from.embedding.to(store.device), []
    torch.manual_seed(seed)
    embedding = make_embedding(settings, len(fold.pairs.genes)).to(store.device)
    mean, scale = store.moments(cells)
    embedding.fit_inputs(mean, scale, store.log_library[cells])
    body = embedding.body
    if isinstance(body, PCAProjection):
        inputs = [embedding.inputs(store.rows(c), store.log_library[c])[0] for c in cells.split(4096)]
        body.fit(torch.cat(inputs))
        return embedding.eval(), []
    if settings.embedding == "untrained":
        return embedding.requires_grad_(False).eval(), []
    return embedding, train_encoder(store, embedding, cells, fold.classes, settings.encoder, seed, checkpoint)


@torch.no_grad()
def embed(embedding: CellEmbedding, store: CellStore, cells: Tensor, block: int = 1024) -> Tensor:
    """Embed cells of the store, (cells, T, D)."""
    embedding.eval()
    return torch.cat([embedding(store.rows(part), store.log_library[part]) for part in cells.split(block)])


def _label_means(pairs: Pairs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean tokens of each label (labels, T, D), NaN without cells, and of the controls (T, D)."""
    owner = torch.from_numpy(pairs.perturbation.astype(np.int64)).to(tokens.device) - CONTROL_CODE
    sums = torch.zeros(len(pairs.labels) + 1, *tokens.shape[1:], dtype=torch.float64, device=tokens.device)
    sums.index_add_(0, owner, tokens.double())
    counts = torch.bincount(owner, minlength=len(sums)).double()
    means = (sums / counts[:, None, None]).float()
    return means[1:], means[0]


def _believe(model: TrainedModel, validation: np.ndarray, observed: np.ndarray) -> tuple[float, float | None]:
    """Weigh the latent prediction by validation perturbations: gate it, or scale it where it is alone."""
    if not len(validation):
        return (0.0 if model.linear_expression is not None else 1.0), 0.0
    latent = model.latent_change(validation).cpu().numpy()
    if model.linear_expression is None:
        return calibrate_scale(latent, observed), None
    linear = model.linear_expression[torch.as_tensor(validation)].cpu().numpy()
    return gate(latent, observed - linear)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"

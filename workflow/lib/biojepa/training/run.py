"""Train one model of one fold from ``pairs.h5``, and keep all that predicting needs."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biojepa.baselines import fit_linear_branch
from biojepa.collapse import statistics
from biojepa.contracts import TRAIN
from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.linear import AdditiveKernelRidge
from biojepa.model.biojepa import BioJEPA, BioJEPAConfig
from biojepa.model.embedding import CellEmbedding, PCAProjection
from biojepa.pairs import CONTROL_CODE, Pairs, trainable_labels, validation_labels
from biojepa.readout import Readout, calibrate_scale, fit_readout, gate
from biojepa.training.cells import CellStore, Populations
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.encoder_stage import MONITOR_CELLS, EncoderSettings, train_encoder
from biojepa.training.optimization import choose_device
from biojepa.training.predictor_stage import LatentCells, PredictorSettings, train_predictor

log = logging.getLogger(__name__)

EMBEDDINGS = ("jepa", "pca", "untrained")
PRIORS = ("given", "shuffled", "none")
FORMAT_VERSION = 1
PCA_TOKENS = (8, 8)


@dataclass(frozen=True)
class TrainSettings:
    """What to train.

    Attributes
    ----------
    embedding
        ``jepa``, ``pca`` (64 components of the training cells) or ``untrained`` (the encoder as
        initialized).
    linear_branch
        Whether the latent predictor adds to an additive kernel ridge, gated on validation
        perturbations, or stands alone.
    priors
        ``given``, ``shuffled`` among the genes, or ``none``.
    encoder, predictor
        Of the two stages.
    device
        ``auto``, ``cpu`` or ``cuda``.
    torch_threads
        CPU threads. Part of the settings because sums depend on it in the last digit.
    """

    embedding: str = "jepa"
    linear_branch: bool = True
    priors: str = "given"
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    predictor: PredictorSettings = field(default_factory=PredictorSettings)
    device: str = "auto"
    torch_threads: int = 2

    def __post_init__(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"embedding is {self.embedding!r}; expected one of {EMBEDDINGS}")
        if self.priors not in PRIORS:
            raise ValueError(f"priors is {self.priors!r}; expected one of {PRIORS}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainSettings:
        """Build from nested mappings, as the config and a checkpoint give them."""
        parts = dict(config)
        encoder = dict(parts.pop("encoder", {}))
        if "hidden" in encoder:
            encoder["hidden"] = tuple(encoder["hidden"])
        predictor = PredictorSettings(**parts.pop("predictor", {}))
        return cls(encoder=EncoderSettings(**encoder), predictor=predictor, **parts)


@dataclass
class TrainedModel:
    """A trained model, ready to embed cells and to predict perturbations.

    Attributes
    ----------
    settings, facts
        What made it; ``facts`` are those of ``pairs.h5``.
    embedding, predictor, readout
        The frozen embedding, the latent predictor, and expression from tokens.
    control_tokens
        (T, D) mean of all controls.
    control_expression
        (genes,) mean log-expression of all controls.
    membership, labels, sets
        Of all labels of the fold.
    linear_expression, linear_tokens, linear_sd
        What the linear branch says of each label: (labels, genes), (labels, T, D), (labels, genes);
        ``None`` without a linear branch.
    weight
        The gate of the latent prediction, or its scale where it stands alone.
    """

    settings: TrainSettings
    facts: dict[str, Any]
    genes: tuple[str, ...]
    embedding: CellEmbedding
    predictor: BioJEPA
    readout: Readout
    control_tokens: Tensor
    control_expression: Tensor
    membership: Tensor
    labels: tuple[str, ...]
    sets: tuple[str, ...]
    linear_expression: Tensor | None
    linear_tokens: Tensor | None
    linear_sd: Tensor | None
    weight: float

    @torch.no_grad()
    def predict(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Predict labels of the fold.

        Returns
        -------
        expression
            (len(labels), genes) mean log-expression.
        sd
            (len(labels), genes) its uncertainty, or ``None``.
        tokens
            (len(labels), T, D) predicted standardized tokens.
        """
        index = torch.as_tensor(labels, device=self.control_tokens.device)
        context = self.control_tokens.expand(len(index), -1, -1)
        change = self.weight * self._token_change(index)
        expression, tokens, sd = self.control_expression + self.readout.change(change), context + change, None
        if self.linear_expression is not None:
            expression = expression + self.linear_expression[index]
            tokens = tokens + self.linear_tokens[index]
            sd = self.linear_sd[index].cpu().numpy()
        # A mean of log1p values cannot be negative.
        return expression.clamp(min=0).cpu().numpy(), sd, tokens.cpu().numpy()

    def latent_change(self, labels: np.ndarray) -> Tensor:
        """Change of expression (len(labels), genes) that the latent predictor alone says, unweighted."""
        index = torch.as_tensor(labels, device=self.control_tokens.device)
        return self.readout.change(self._token_change(index))

    @torch.no_grad()
    def _token_change(self, index: Tensor) -> Tensor:
        context = self.control_tokens.expand(len(index), -1, -1)
        return self.predictor.eval().change(context, self.membership[index])

    def save(self, path: str | Path) -> None:
        """Write weights, arrays and the settings that made them; tensors and plain values only."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings) | {"encoder": _plain(asdict(self.settings.encoder))},
            "facts": self.facts,
            "genes": list(self.genes),
            "labels": list(self.labels),
            "sets": list(self.sets),
            "sources": {name: getattr(self.predictor.perturbation, f"codes_{name}") for name in self._sources},
            "seen": self.predictor.perturbation.seen,
            "embedding": self.embedding.state_dict(),
            "predictor": self.predictor.state_dict(),
            "readout": {"weight": self.readout.weight, "bias": self.readout.bias},
            "arrays": {name: getattr(self, name) for name in _ARRAYS},
            "weight": self.weight,
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    @property
    def _sources(self) -> tuple[str, ...]:
        return self.predictor.perturbation.sources


_ARRAYS = (
    "control_tokens",
    "control_expression",
    "membership",
    "linear_expression",
    "linear_tokens",
    "linear_sd",
)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def load_model(path: str | Path, device: str = "cpu") -> TrainedModel:
    """Read ``model.pt``.

    Raises
    ------
    InputError
        When the file is not a model of this version.
    """
    content = torch.load(path, map_location=device, weights_only=True)
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            path, f"format version {content.get('format_version')}", str(FORMAT_VERSION), "rerun the train stage"
        )
    settings = TrainSettings.from_config(content["settings"])
    embedding = _make_embedding(settings, len(content["genes"])).to(device)
    embedding.load_state_dict(content["embedding"])
    predictor = _make_predictor(settings, embedding, content["sources"], content["seen"]).to(device)
    predictor.load_state_dict(content["predictor"])
    return TrainedModel(
        settings=settings,
        facts=content["facts"],
        genes=tuple(content["genes"]),
        embedding=embedding.requires_grad_(False).eval(),
        predictor=predictor.requires_grad_(False).eval(),
        readout=Readout(**content["readout"]),
        labels=tuple(content["labels"]),
        sets=tuple(content["sets"]),
        weight=content["weight"],
        **content["arrays"],
    )


def _make_embedding(settings: TrainSettings, n_genes: int) -> CellEmbedding:
    if settings.embedding == "pca":
        return CellEmbedding(PCAProjection(n_genes, *PCA_TOKENS))
    return CellEmbedding(settings.encoder.build(n_genes))


def _make_predictor(
    settings: TrainSettings, embedding: CellEmbedding, codes: Mapping[str, Tensor], seen: Tensor
) -> BioJEPA:
    p = settings.predictor
    # Beside the linear branch no gene has a learned token: the predictor is trained on leave-one-out
    # residuals, where a token would learn a gene's whole effect, and add it again to a linear branch
    # that has seen the gene.
    config = BioJEPAConfig(
        p.width,
        p.depth,
        p.heads,
        p.dropout,
        p.condition_dim,
        p.source_dropout,
        learned_genes=not settings.linear_branch,
        interaction=p.interaction,
    )
    return BioJEPA(embedding.num_tokens, embedding.dim, codes, seen, config)


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


def _fingerprint(pairs: Pairs, settings: TrainSettings, seed: int) -> str:
    """Digest of all that determines a run, so that only its own checkpoint is continued."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update(json.dumps([dict(pairs.facts), seed, torch.__version__], sort_keys=True, default=str).encode())
    for array in (pairs.data, pairs.indices, pairs.perturbation, *pairs.codes.values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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
    """
    started = time.perf_counter()
    torch.set_num_threads(settings.torch_threads)
    device = choose_device(settings.device)
    codes = _codes(pairs, settings.priors, seed)
    print_of_run = _fingerprint(pairs, settings, seed)
    store = CellStore(pairs, device)
    train, validation = trainable_labels(pairs), validation_labels(pairs)
    cells = torch.from_numpy(pairs.cells_of(TRAIN)).to(device)
    classes = _classes(pairs, train, device)

    embedding, rows = _embedding(pairs, store, cells, classes, settings, seed, encoder_from, checkpoint_folder, print_of_run)
    encoder_seconds = time.perf_counter() - started
    tokens = embed(embedding, store, torch.arange(len(store), device=device))
    if encoder_from is None:
        embedding.fit_tokens(tokens[cells])
        tokens = (tokens - embedding.token_mean) / embedding.token_scale

    token_means, control_tokens = _label_means(pairs, tokens)
    expression_means, control_expression = pairs.pseudobulk()
    observed = {
        "tokens": token_means[validation],
        "expression": torch.from_numpy(expression_means[validation]).float().to(device),
    }
    readout, penalty = fit_readout(
        lambda: ((tokens[part], store.rows(part)) for part in cells.split(4096)),
        observed["tokens"],
        observed["expression"],
    )

    branch: AdditiveKernelRidge | None = None
    baseline = torch.zeros(len(pairs.labels), *control_tokens.shape, device=device)
    linear_tokens = linear_expression = linear_sd = None
    everything = np.arange(len(pairs.labels))
    if settings.linear_branch:
        coded = Pairs(**{**pairs.__dict__, "codes": codes})
        branch = fit_linear_branch(coded, train, expression_means[train] - control_expression)
        latent_branch = fit_linear_branch(coded, train, (token_means[train] - control_tokens).flatten(1).cpu().numpy())
        linear_expression = branch.predict(everything)
        linear_sd = branch.standard_deviation(everything)
        linear_tokens = torch.from_numpy(latent_branch.predict(everything)).float().to(device).view_as(baseline)
        baseline = linear_tokens.clone()
        baseline[train] = torch.from_numpy(latent_branch.leave_one_out()).float().to(device).view_as(baseline[train])

    membership = torch.from_numpy(pairs.membership).float().to(device)
    seen = membership[train].any(dim=0)
    torch.manual_seed(seed)
    predictor = _make_predictor(
        settings, embedding, {name: torch.from_numpy(values) for name, values in codes.items()}, seen.cpu()
    ).to(device)
    predictor_rows = train_predictor(
        predictor,
        Populations(pairs, device),
        LatentCells(tokens, membership, baseline),
        torch.from_numpy(train).to(device),
        torch.from_numpy(validation).to(device),
        observed["tokens"],
        control_tokens,
        settings.predictor,
        seed,
        Checkpoint(checkpoint_folder, "predictor", print_of_run),
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
        linear_expression=None if branch is None else torch.from_numpy(linear_expression).float().to(device),
        linear_tokens=linear_tokens,
        linear_sd=None if branch is None else torch.from_numpy(linear_sd).float().to(device),
        weight=1.0,
    )
    model.weight, t = _believe(model, validation, expression_means[validation] - control_expression)

    history = pd.DataFrame(
        [{"stage": "encoder", **row} for row in rows] + [{"stage": "predictor", **row} for row in predictor_rows]
    )
    monitored = cells[torch.linspace(0, len(cells) - 1, min(MONITOR_CELLS, len(cells))).long().to(device)]
    seconds = time.perf_counter() - started
    metrics = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "torch_threads": settings.torch_threads,
        "seconds": round(seconds, 2),
        "encoder_seconds": round(encoder_seconds, 2) if encoder_from is None else 0.0,
        "cells_per_second": round(len(rows) and settings.encoder.steps * settings.encoder.batch_size / encoder_seconds),
        "peak_memory_mb": _peak_memory(device),
        "n_training_cells": len(cells),
        "n_training_perturbations": len(train),
        "n_validation_perturbations": len(validation),
        "parameters": sum(p.numel() for m in (embedding, predictor) for p in m.parameters()),
        "readout_penalty": penalty,
        "latent_weight": model.weight,
        "latent_weight_t": t,
        "linear_weights": {} if branch is None else {**branch.weights, "noise": branch.noise},
        "embedding": statistics(tokens[monitored], classes[monitored]),
    }
    return model, history, metrics


def _classes(pairs: Pairs, train: np.ndarray, device: torch.device) -> Tensor:
    """Number the training perturbations 0…n-1 for each cell, -1 for controls and validation cells."""
    number = np.full(len(pairs.labels) + 1, -1)
    number[train] = np.arange(len(train))
    return torch.from_numpy(number[pairs.perturbation]).to(device)  # control, -1, reads the last entry


def _embedding(
    pairs: Pairs,
    store: CellStore,
    cells: Tensor,
    classes: Tensor,
    settings: TrainSettings,
    seed: int,
    encoder_from: TrainedModel | None,
    checkpoint_folder: str | Path | None,
    fingerprint: str,
) -> tuple[CellEmbedding, list[dict[str, float]]]:
    """Make the frozen embedding: reuse, train, project or leave as initialized."""
    if encoder_from is not None:
        if encoder_from.facts["split_sha256"] != pairs.facts["split_sha256"] or encoder_from.genes != pairs.genes:
            raise ValueError("the encoder to reuse was trained on another split or other genes")
        return encoder_from.embedding.to(store.device), []
    torch.manual_seed(seed)
    embedding = _make_embedding(settings, len(pairs.genes)).to(store.device)
    mean, scale = store.moments(cells)
    embedding.fit_inputs(mean, scale, store.log_library[cells])
    if settings.embedding == "pca":
        inputs = [embedding.inputs(store.rows(c), store.log_library[c])[0] for c in cells.split(4096)]
        embedding.body.fit(torch.cat(inputs))
        return embedding.eval(), []
    if settings.embedding == "untrained":
        return embedding.requires_grad_(False).eval(), []
    partner = torch.from_numpy(pairs.partner.astype(np.int64)).to(store.device)
    checkpoint = Checkpoint(checkpoint_folder, "encoder", fingerprint)
    rows = train_encoder(store, embedding, cells, classes, partner, settings.encoder, seed, checkpoint)
    return embedding, rows


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


def _believe(model: TrainedModel, validation: np.ndarray, observed: np.ndarray) -> tuple[float, float]:
    """Weigh the latent prediction by validation perturbations: gate it, or scale it where it is alone."""
    if not len(validation):
        return (0.0 if model.linear_expression is not None else 1.0), 0.0
    latent = model.latent_change(validation).cpu().numpy()
    if model.linear_expression is None:
        return calibrate_scale(latent, observed), float("nan")
    linear = model.linear_expression[torch.as_tensor(validation)].cpu().numpy()
    return gate(latent, observed - linear)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"

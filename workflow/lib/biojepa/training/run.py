"""Train one model of one fold from ``pairs.h5``, and keep all that predicting needs."""

from __future__ import annotations

import copy
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

from biojepa.collapse import statistics
from biojepa.contracts import TRAIN
from biojepa.linear_branch import LeftOut, LinearBranch, fit_branch
from biojepa.model.biojepa import BioJEPA
from biojepa.model.embedding import SUMMED_CELLS, CellEmbedding, PCAProjection
from biojepa.pairs import (
    CONTROL_CODE,
    Pairs,
    declare_use,
    refuse_leaked_pairs,
    target_sum_of,
    trainable_labels,
    validation_labels,
)
from biojepa.probes import MAX_CELLS, linear_probes
from biojepa.readout import Readout, calibrate_scale, fit_readout, gate
from biojepa.training.cells import CellStore, Populations, spread
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.distributed import world_size
from biojepa.training.encoder_stage import MONITOR_CELLS, train_encoder
from biojepa.training.joint_stage import train_joint
from biojepa.training.optimization import Execution, choose_device, deterministic_algorithms
from biojepa.training.predictor_stage import LatentCells, train_predictor
from biojepa.training.settings import TrainSettings
from biojepa.training.trained import TrainedModel, make_embedding, make_predictor

log = logging.getLogger(__name__)

MIN_GATED = 3
GATE_FOLDS = 3
SCALE_PSEUDO = 4.0


def prior_codes(pairs: Pairs, priors: str, seed: int) -> dict[str, np.ndarray]:
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
    named = [dict(pairs.facts), pairs.genes, pairs.labels, pairs.sets, list(pairs.codes), pairs.types]
    digest.update(json.dumps([named, seed, torch.__version__], sort_keys=True, default=str).encode())
    arrays = [value for value in vars(pairs).values() if isinstance(value, np.ndarray)]
    arrays += [*pairs.codes.values()]
    if encoder_from is not None:
        arrays += [value.cpu().numpy() for value in encoder_from.embedding.state_dict().values()]
    for array in arrays:
        # Its bytes are read where they lie: those of mapped expression may be more than memory holds.
        digest.update(np.ascontiguousarray(array).data)
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
            pairs=replace(pairs, codes=prior_codes(pairs, priors, seed)),
            store=CellStore(pairs, device),
            train=train,
            validation=validation_labels(pairs),
            cells=torch.from_numpy(pairs.cells_of(TRAIN)).to(device),
            classes=torch.from_numpy(number[pairs.perturbation]).to(device),  # control, -1, reads the last
        )

    @property
    def learned_labels(self) -> np.ndarray:
        """Labels whose cells or means teach: those of ``cells``, and those of ``train``."""
        owner = self.pairs.perturbation[self.cells.cpu().numpy()]
        return np.union1d(owner[owner != CONTROL_CODE], self.train)

    @property
    def controls(self) -> Tensor:
        """Control cells."""
        return self.cells[self.classes[self.cells] < 0]

    @property
    def monitored(self) -> Tensor:
        """Training cells that the collapse statistics are taken of, drawn evenly."""
        return spread(self.cells, MONITOR_CELLS)


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
    DivergenceError
        When a loss or a statistic is not finite any more.
    InputError
        When the encoder reads residuals of counts, and ``pairs`` does not say what they were scaled to.
    ValueError
        When ``encoder_from`` is of another split, of other genes, or of another kind or size.
    """
    refuse_leaked_pairs(pairs)
    started = time.perf_counter()
    torch.set_num_threads(settings.torch_threads)
    device = choose_device(settings.device)
    fingerprint = _fingerprint(pairs, settings, seed, encoder_from)
    fold = _Fold.of(pairs, settings.priors, seed, device)

    execution = Execution.of(settings, device, checkpoint_folder)
    embedding = _prepare(fold, settings, seed, encoder_from)
    codes = {name: torch.from_numpy(values).float() for name, values in fold.pairs.codes.items()}
    torch.manual_seed(seed)
    predictor = make_predictor(
        settings,
        embedding,
        codes,
        torch.from_numpy(pairs.membership[fold.train].any(axis=0)),
        len(pairs.types),
        bool((pairs.dose != 1).any()),
    ).to(device)
    jointly = settings.stages == "joint" and settings.embedding == "jepa" and encoder_from is None
    encoder_rows: list[dict[str, float]] = []
    checkpoint = Checkpoint(checkpoint_folder, "encoder", fingerprint)
    with deterministic_algorithms(settings.deterministic):
        began = time.perf_counter()
        if encoder_from is None:
            learner = predictor if jointly else None
            encoder_rows = _learn_embedding(fold, settings, seed, embedding, learner, checkpoint, execution)
        encoder_seconds = time.perf_counter() - began
        tokens = embed(embedding, fold.store, torch.arange(len(fold.store), device=device))
        # A jointly trained encoder keeps the scale that its own predictor learned, but for nobody else.
        if not jointly and (encoder_from is None or encoder_from.settings.stages == "joint"):
            # Undone first, because not every model of a joint config was trained jointly.
            tokens.mul_(embedding.token_scale).add_(embedding.token_mean)
            embedding.fit_tokens(tokens, fold.cells)
            tokens.sub_(embedding.token_mean).div_(embedding.token_scale)

        summary = _Summary.of(fold, tokens)
        readout, penalty = fit_readout(
            lambda: ((tokens[part], fold.store.rows(part)) for part in fold.cells.split(4096)),
            summary.tokens[fold.validation],
            torch.from_numpy(summary.expression[fold.validation]).float().to(device),
        )
        branch, left_out = (
            _linear_branch(fold, summary, readout, settings) if settings.linear_branch else (None, None)
        )
        model = TrainedModel(
            settings=settings,
            facts={
                **pairs.facts,
                **declare_use(
                    pairs,
                    fold.learned_labels,
                    fold.validation,
                    *([encoder_from.facts] if encoder_from is not None else []),
                ),
            },
            genes=pairs.genes,
            embedding=embedding,
            predictor=predictor,
            readout=readout,
            control_tokens=summary.control_tokens,
            control_expression=torch.from_numpy(summary.control_expression).float().to(device),
            labels=pairs.labels,
            sets=pairs.sets,
            perturbed_genes=pairs.perturbed_genes,
            types=pairs.types,
            type_code=pairs.type_code,
            dose=pairs.dose,
            branch=branch,
            weight=1.0,
            blended=jointly and branch is not None,
        )
        latent = _Latent(fold, summary, tokens, left_out, seed, checkpoint_folder, fingerprint, execution)
        predictor_rows, t = latent.weigh(model) if jointly else latent.train_and_weigh(model)
        if branch is not None:
            # The branch learned from tokens of cells that the encoder was trained on, whose changes are a
            # little too large.
            said = model.change(*model.asked(fold.validation))
            model.scale = calibrate_scale(said, summary.delta[fold.validation], SCALE_PSEUDO)

    for row in predictor_rows:
        execution.tracker.add("predictor", row)
    stages = {"joint" if jointly else "encoder": encoder_rows, "predictor": predictor_rows}
    history = pd.DataFrame([{"stage": stage, **row} for stage, rows in stages.items() for row in rows])
    probed = spread(fold.cells, MAX_CELLS)
    metrics = {
        **_effort(settings, device, time.perf_counter() - started),
        "encoder_seconds": round(encoder_seconds, 2),
        # Of this session: a resumed run has drawn the earlier cells before.
        "cells_per_second": round(
            (settings.encoder.steps - checkpoint.resumed_at)
            * min(settings.encoder.batch_size, len(fold.cells))
            / encoder_seconds
        )
        if encoder_rows
        else None,
        "precision": execution.precision,
        "compile_seconds": round(sum(execution.compile_seconds), 2) if execution.compile_seconds else None,
        "n_training_cells": len(fold.cells),
        "n_training_perturbations": len(fold.train),
        "n_validation_perturbations": len(fold.validation),
        "parameters": sum(p.numel() for part in (embedding, predictor) for p in part.parameters()),
        "readout_penalty": penalty,
        "latent_weight": model.weight,
        "latent_weight_t": t,
        "scale": model.scale,
        "linear_weights": {} if branch is None else {**branch.weights, "noise": branch.noise},
        # Before they are standardized, which would hide a collapse.
        "embedding": statistics(
            tokens[fold.monitored] * embedding.token_scale + embedding.token_mean,
            fold.classes[fold.monitored],
        ),
        "probes": linear_probes(
            tokens[probed],
            fold.classes[probed],
            torch.from_numpy(pairs.batch.astype(np.int64)).to(device)[probed],
            fold.store.log_library[probed],
            fold.store.rows(probed),
        ),
    }
    return model, history, metrics


@dataclass(frozen=True)
class _Summary:
    """Means over cells of one fold.

    Attributes
    ----------
    tokens, control_tokens
        (labels, T, D), NaN without cells, and (T, D) of the controls.
    expression, control_expression
        (labels, genes), NaN without cells, and (genes,).
    """

    tokens: Tensor
    control_tokens: Tensor
    expression: np.ndarray
    control_expression: np.ndarray

    @classmethod
    def of(cls, fold: _Fold, tokens: Tensor) -> _Summary:
        return cls(*label_means(fold.pairs, tokens), *fold.pairs.pseudobulk())

    @property
    def delta(self) -> np.ndarray:
        """Change of expression (labels, genes)."""
        return self.expression - self.control_expression


def _linear_branch(
    fold: _Fold, summary: _Summary, readout: Readout, settings: TrainSettings
) -> tuple[LinearBranch, LeftOut]:
    change = summary.tokens[fold.train] - summary.control_tokens
    return fit_branch(
        fold.pairs,
        fold.train,
        summary.delta[fold.train],
        change.flatten(1).double().cpu().numpy(),
        summary.control_expression,
        _variance_of_controls(fold).double().cpu().numpy(),
        readout.weight.double().cpu().numpy(),
        settings.latent_share,
    )


def _variance_of_controls(fold: _Fold) -> Tensor:
    """Variance (genes,) of the expression of control cells, that within contexts where one is held out."""
    controls = fold.controls
    if fold.pairs.context is None:
        return fold.store.moments(controls)[1].square()
    place = torch.from_numpy(fold.pairs.context.astype(np.int64)).to(controls.device)[controls]
    parts = [controls[place == code] for code in place.unique()]
    within = [len(part) * fold.store.moments(part)[1].square() for part in parts]
    return torch.stack(within).sum(dim=0) / len(controls)


@dataclass(frozen=True)
class _Latent:
    """Train the latent predictor, and decide how much of what it says to believe.

    With a linear branch the predictor learns what is left of the training labels when each is predicted
    from the others, and its weight is that of held-out labels: the validation ones, or, where there are
    fewer than three, training labels in turn (cross-fitting).
    """

    fold: _Fold
    summary: _Summary
    tokens: Tensor
    left_out: LeftOut | None
    seed: int
    checkpoint_folder: str | Path | None
    fingerprint: str
    execution: Execution

    def train_and_weigh(self, model: TrainedModel) -> tuple[list[dict[str, float]], float | None]:
        """Train ``model.predictor`` in place and set ``model.weight``; return history and t statistic."""
        fold = self.fold
        if self.left_out is not None and len(fold.validation) < MIN_GATED:
            return self._cross_fit(model, self.left_out)
        rows = self._train(model, fold.train, fold.validation)
        return rows, self.weigh(model)[1]

    def weigh(self, model: TrainedModel) -> tuple[list[dict[str, float]], float | None]:
        """Set ``model.weight`` by the validation labels; return no history, and the t statistic."""
        asked = model.asked(self.fold.validation)
        observed, latent = self.summary.delta[self.fold.validation], model.latent_change(*asked)
        if model.branch is None:
            model.weight = calibrate_scale(latent, observed)
            return [], None
        linear = model.linear_change(asked[0])
        # A predictor trained jointly knows the whole change, so it takes the place of the linear branch.
        addition = latent - linear if model.blended else latent
        model.weight, t = gate(addition, observed - linear)
        return [], t

    def _cross_fit(self, model: TrainedModel, left_out: LeftOut) -> tuple[list[dict[str, float]], float]:
        fold, start = self.fold, copy.deepcopy(model.predictor)
        turns = np.random.default_rng(self.seed).permutation(len(fold.train)) % GATE_FOLDS
        addition, rows, best = np.zeros_like(left_out.expression), [], []
        for turn in range(GATE_FOLDS):
            out = turns == turn
            model.predictor = copy.deepcopy(start)
            history = self._train(model, fold.train[~out], fold.train[out], f"predictor{turn}")
            addition[out] = model.latent_change(*model.asked(fold.train[out]))
            rows += [{"turn": turn, **row} for row in history]
            best.append(_best_step(history))
        model.weight, t = gate(addition, self.summary.delta[fold.train] - left_out.expression)
        model.predictor = start
        if model.weight:
            rows += self._train(model, fold.train, fold.train[:0], stop_after=int(np.median(best)))
        model.predictor.requires_grad_(False).eval()
        return rows, t

    def _train(
        self,
        model: TrainedModel,
        train: np.ndarray,
        validation: np.ndarray,
        name: str = "predictor",
        stop_after: int | None = None,
    ) -> list[dict[str, float]]:
        pairs, device = self.fold.pairs, self.tokens.device
        baseline = torch.zeros_like(self.summary.tokens)
        if model.branch is not None and self.left_out is not None:
            said = model.branch.token_change(pairs.membership, pairs.codes)
            said[self.fold.train] = self.left_out.tokens
            baseline = torch.from_numpy(said).float().to(device).view_as(baseline)
        return train_predictor(
            model.predictor,
            Populations(pairs, device),
            LatentCells(
                self.tokens,
                torch.from_numpy(pairs.membership).float(),
                torch.from_numpy(pairs.type_code.astype(np.int64)),
                torch.from_numpy(pairs.dose),
                baseline,
            ),
            torch.from_numpy(train),
            torch.from_numpy(validation).to(device),
            self.summary.tokens[validation],
            self.summary.control_tokens,
            model.settings.predictor,
            self.seed,
            Checkpoint(self.checkpoint_folder, name, self.fingerprint),
            stop_after,
            self.execution,
        )


def _best_step(history: list[dict[str, float]]) -> int:
    """Step of the least validation loss, 0 where none is below that of no change."""
    best = min(history, key=lambda row: row["val_loss"])
    return int(best["step"]) if best["val_loss"] < best["val_loss_start"] else 0


def _effort(settings: TrainSettings, device: torch.device, seconds: float) -> dict[str, Any]:
    """Say what the training ran on and what it took."""
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "torch_threads": settings.torch_threads,
        "processes": world_size(),
        "seconds": round(seconds, 2),
        "peak_memory_mb": _peak_memory(device),
    }


def _prepare(
    fold: _Fold, settings: TrainSettings, seed: int, encoder_from: TrainedModel | None
) -> CellEmbedding:
    """Take over the embedding of another model, or make one and fit the standardization of its inputs."""
    if encoder_from is not None:
        same_split = encoder_from.facts["split_sha256"] == fold.pairs.facts["split_sha256"]
        if not same_split or encoder_from.genes != fold.pairs.genes:
            raise ValueError("the encoder to reuse was trained on another split or other genes")
        wanted = make_embedding(settings, len(fold.pairs.genes)).state_dict()
        shapes = {name: tuple(values.shape) for name, values in wanted.items()}
        found = {name: tuple(v.shape) for name, v in encoder_from.embedding.state_dict().items()}
        if shapes != found:
            raise ValueError(
                f"the encoder to reuse is {encoder_from.settings.embedding} of another size or kind than "
                f"these settings ({settings.embedding}) make; reuse it with the settings it was trained with"
            )
        return copy.deepcopy(encoder_from.embedding).to(fold.store.device)
    torch.manual_seed(seed)
    embedding = make_embedding(settings, len(fold.pairs.genes)).to(fold.store.device)
    store, cells = fold.store, fold.cells
    if embedding.residuals is not None:
        target_sum = target_sum_of(fold.pairs)
        embedding.residuals.fit(store.gene_shares(cells, target_sum), target_sum, len(cells))
    moments = store.moments(cells, transform=embedding.transformed)
    embedding.fit_inputs(*moments, store.log_library[cells])
    return embedding


def _learn_embedding(
    fold: _Fold,
    settings: TrainSettings,
    seed: int,
    embedding: CellEmbedding,
    predictor: BioJEPA | None,
    checkpoint: Checkpoint,
    execution: Execution,
) -> list[dict[str, float]]:
    """Train the embedding in place, with the predictor where one is given; or project, or leave it be."""
    store, cells = fold.store, fold.cells
    body = embedding.body
    if isinstance(body, PCAProjection):
        inputs = [embedding.inputs(store.rows(c), store.log_library[c])[0] for c in cells.split(4096)]
        body.fit(torch.cat(inputs))
    if settings.embedding != "jepa":
        embedding.requires_grad_(False).eval()
        return []
    if predictor is None:
        return train_encoder(
            store, embedding, cells, fold.classes, settings.encoder, seed, checkpoint, execution
        )
    return train_joint(
        store,
        embedding,
        predictor,
        Populations(fold.pairs, store.device),
        cells,
        fold.classes,
        torch.from_numpy(fold.pairs.membership).float(),
        torch.from_numpy(fold.pairs.type_code.astype(np.int64)),
        torch.from_numpy(fold.pairs.dose),
        torch.from_numpy(fold.train),
        settings,
        seed,
        checkpoint,
        execution,
    )


@torch.no_grad()
def embed(embedding: CellEmbedding, store: CellStore, cells: Tensor, block: int = 1024) -> Tensor:
    """Embed cells of the store, (cells, T, D)."""
    embedding.eval()
    # Filled part by part: of a million cells the tokens are two gigabytes, which would be there twice.
    tokens = torch.empty(len(cells), embedding.num_tokens, embedding.dim, device=cells.device)
    for place in range(0, len(cells), block):
        part = cells[place : place + block]
        tokens[place : place + block] = embedding(store.rows(part), store.log_library[part])
    return tokens


def label_means(pairs: Pairs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean tokens of each label (labels, T, D), NaN without cells, and of the controls (T, D).

    In the scheme context both are given as of the held-out context, as by :meth:`Pairs.pseudobulk`.
    """
    owner = torch.from_numpy(pairs.perturbation.astype(np.int64)).to(tokens.device) - CONTROL_CODE
    sums = _token_sums(tokens, owner, len(pairs.labels) + 1)
    counts = torch.bincount(owner, minlength=len(sums)).double()
    means = sums / counts[:, None, None]
    if pairs.context is None:
        means = means.float()
        return means[1:], means[0]
    place = torch.from_numpy(pairs.context_of_controls()).to(tokens.device)
    of_controls = _token_sums(tokens, place, len(pairs.contexts) + 1)[:-1]
    relocated = pairs.in_held_out_context(
        means[1:].flatten(1).cpu().numpy(), of_controls.flatten(1).cpu().numpy()
    )
    labels, control = (torch.from_numpy(part).float().to(tokens.device) for part in relocated)
    return labels.view(-1, *tokens.shape[1:]), control.view(tokens.shape[1:])


def _token_sums(tokens: Tensor, owner: Tensor, n_owners: int) -> Tensor:
    """Sum the tokens (cells, T, D) of each owner, (owners, T, D) float64."""
    sums = torch.zeros(n_owners, *tokens.shape[1:], dtype=torch.float64, device=tokens.device)
    for place in range(0, len(tokens), SUMMED_CELLS):
        part = slice(place, place + SUMMED_CELLS)
        sums.index_add_(0, owner[part], tokens[part].double())
    return sums


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"

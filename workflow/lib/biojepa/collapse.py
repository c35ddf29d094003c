"""See a collapse that a loss curve does not show.

Statistics are taken over *cells*, per token position and pooled. Flattening cells and positions
first would report health for an encoder that maps every cell to the same distinct tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from biojepa.errors import StoppedRun

MIN_STD_OVER_CELLS = 0.05
MIN_RANK = 2.0
# Of the standard deviation over cells that the same encoder had before training. On the simulated demo and
# on Norman tiny, collapsed encoders have 0.13 to 0.43 and healthy ones 0.83 or more
# (benchmarks/collapse_in_training.py).
MIN_SHARE_OF_UNTRAINED = 0.5
# What float32 leaves between equal cells, relative to their size: no variation at all.
ROUNDING = 1e-6


class CollapseError(StoppedRun):
    """The embedding has collapsed; the message says which statistic fell and what to change."""


class DivergenceError(StoppedRun):
    """The loss or the weights are not finite any more."""


_SLOWER = "Lower train.encoder.learning_rate or train.predictor.learning_rate."


def refuse_divergence(loss: float, step: int, stage: str) -> None:
    """Stop a run whose loss is not finite.

    Raises
    ------
    DivergenceError
        Naming stage and step.
    """
    if not math.isfinite(loss):
        raise DivergenceError(
            f"The training of the {stage} diverged by step {step}: the loss is {loss}. {_SLOWER}"
        )


def std_over_cells(tokens: Tensor) -> float:
    """Mean over positions and dimensions of the standard deviation over cells; tokens (cells, T, D)."""
    return float(tokens.std(dim=0).mean())


def rankme(pooled: Tensor) -> float:
    """Effective rank of pooled embeddings (cells, D): exp of the entropy of the singular values.

    RankMe (Garrido et al., ICML 2023), of centred embeddings, between 1 and D. Zero for a constant.
    """
    z = pooled.double()
    centred = z - z.mean(dim=0)
    if float(centred.norm()) <= ROUNDING * float(z.norm()):
        return 0.0
    singular = torch.linalg.svdvals(centred)
    share = singular / singular.sum()
    return float(torch.exp(-(share * torch.log(share.clamp(min=1e-12))).sum()))


def lidar(pooled: Tensor, classes: Tensor, delta: float = 1e-3) -> float:
    """Effective rank of what distinguishes classes, LiDAR (Thilak et al., ICLR 2024).

    The between-class covariance is whitened by the within-class covariance, both over cells; the result
    is the exponential of the entropy of its eigenvalues. Zero for a constant, and for classes that do
    not differ.

    Parameters
    ----------
    pooled
        (cells, D)
    classes
        (cells,) class of each cell, such as its training perturbation.
    delta
        Added to the diagonal of the within-class covariance, relative to its mean.
    """
    z = pooled.double()
    if float((z - z.mean(dim=0)).norm()) <= ROUNDING * float(z.norm()):
        return 0.0
    names, index = classes.unique(return_inverse=True)
    counts = torch.bincount(index).double()
    means = torch.zeros(len(names), z.shape[1], dtype=z.dtype, device=z.device)
    means.index_add_(0, index, z)
    means /= counts[:, None]
    residual = z - means[index]
    within = residual.T @ residual / len(z)
    scale = within.diagonal().mean().clamp(min=1e-12)
    within = within + delta * scale * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    centred = means - means.mean(dim=0)
    values, vectors = torch.linalg.eigh(within)
    whitened = centred @ (vectors / values.sqrt()) / max(len(names) - 1, 1) ** 0.5
    eigenvalues = torch.linalg.svdvals(whitened).square()
    if float(eigenvalues.sum()) <= 1e-12:
        return 0.0
    share = eigenvalues / eigenvalues.sum()
    return float(torch.exp(-(share * torch.log(share.clamp(min=1e-12))).sum()))


def statistics(tokens: Tensor, classes: Tensor) -> dict[str, float]:
    """Measure an embedding (cells, T, D).

    Parameters
    ----------
    tokens
        (cells, T, D)
    classes
        (cells,) training perturbation of each cell, -1 for controls, which LiDAR leaves out.
    """
    pooled = tokens.mean(dim=1)
    perturbed = classes >= 0
    return {
        "std_cells": std_over_cells(tokens),
        "std_cells_pooled": float(pooled.std(dim=0).mean()),
        "rankme": rankme(pooled),
        "lidar": lidar(pooled[perturbed], classes[perturbed]) if perturbed.any() else 0.0,
    }


def refuse_collapse(measured: Mapping[str, float], untrained: Mapping[str, float], step: int) -> None:
    """Stop a collapsed run.

    The floor of the standard deviation over cells is relative as well as absolute: dropout and
    imperfect optimization keep a collapsed encoder from mapping all cells to exactly one point, and
    what remains is spread over many directions, so that RankMe alone reports health.

    Parameters
    ----------
    measured
        :func:`statistics` of the encoder now; ``std_cells_student`` of the one that is trained, where
        another is kept.
    untrained
        The same, of the same cells, before the first step.
    step
        Steps done.

    Raises
    ------
    CollapseError
        When the standard deviation over cells or the effective rank is below its floor.
    DivergenceError
        When a statistic is not finite.
    """
    if not all(math.isfinite(value) for value in measured.values()):
        found = ", ".join(f"{name} {value}" for name, value in measured.items())
        raise DivergenceError(f"The training diverged by step {step}: {found}. {_SLOWER}")
    # Of the student too: a running average follows a collapse late.
    spread = min(measured["std_cells"], measured.get("std_cells_student", math.inf))
    at_start = untrained["std_cells"]
    advice = (
        "Use train.encoder.regularizer: per_token (not flat) and train.encoder.regularized: context, raise "
        "train.encoder.variance, or lower train.encoder.learning_rate."
    )
    begin = f"The embedding collapsed by step {step}:"
    if spread < MIN_STD_OVER_CELLS:
        raise CollapseError(
            f"{begin} the standard deviation over cells is {spread:.4f}, below {MIN_STD_OVER_CELLS}; "
            f"every cell gets the same tokens. {advice}"
        )
    if spread < MIN_SHARE_OF_UNTRAINED * at_start:
        raise CollapseError(
            f"{begin} the standard deviation over cells fell from {at_start:.3f} before training to "
            f"{spread:.3f}, which is {spread / at_start:.0%}, below {MIN_SHARE_OF_UNTRAINED:.0%}; cells get "
            f"nearly the same tokens. {advice}"
        )
    if measured["rankme"] < MIN_RANK:
        raise CollapseError(
            f"{begin} its effective rank (RankMe) is {measured['rankme']:.2f}, below {MIN_RANK}; cells "
            f"differ along one direction only. {advice}"
        )

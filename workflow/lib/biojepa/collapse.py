"""See a collapse that a loss curve does not show.

Statistics are taken over *cells*, per token position and pooled. Flattening cells and positions
first would report health for an encoder that maps every cell to the same distinct tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_STD_OVER_CELLS = 0.05
MIN_RANK = 2.0
# What float32 leaves between equal cells, relative to their size: no variation at all.
ROUNDING = 1e-6


class CollapseError(RuntimeError):
    """The embedding has collapsed; the message says which statistic fell and what to change."""


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


def refuse_collapse(measured: dict[str, float], step: int) -> None:
    """Stop a collapsed run.

    Raises
    ------
    CollapseError
        When the standard deviation over cells or the effective rank is below its floor.
    """
    advice = (
        "Use regularizer: per_token (not flat), raise train.encoder.variance, or lower the learning rate."
    )
    if measured["std_cells"] < MIN_STD_OVER_CELLS:
        raise CollapseError(
            f"The embedding collapsed by step {step}: the standard deviation over cells is "
            f"{measured['std_cells']:.4f}, below {MIN_STD_OVER_CELLS}; every cell gets the same tokens. "
            f"{advice}"
        )
    if measured["rankme"] < MIN_RANK:
        raise CollapseError(
            f"The embedding collapsed by step {step}: its effective rank (RankMe) is "
            f"{measured['rankme']:.2f}, below {MIN_RANK}; cells differ along one direction only. {advice}"
        )

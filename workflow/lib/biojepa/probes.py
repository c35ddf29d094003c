"""Linear probes: what can be read out of a frozen embedding of cells.

A probe is fitted on every other cell and judged on those between, all of them training cells, so it says
what the embedding holds and nothing about perturbations that were held out. All are in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CELLS = 3000
MAX_DIMENSIONS = 256
PCA_DIMENSIONS = 64
# Of the mean variance, added to the within-class covariance of the discriminant.
SHRINKAGE = 0.1
# Of the mean variance of a feature: penalties of the regression, chosen by generalized cross-validation.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def linear_probes(
    tokens: Tensor,
    classes: Tensor,
    batch: Tensor,
    log_library: Tensor,
    expression: Tensor | None = None,
) -> dict[str, float | None]:
    """Probe an embedding for the perturbation, the batch and the depth of cells.

    The judged cells are not those the probe was fitted on, but an encoder with an action term has seen
    their labels: its ``perturbation`` says how well the term did its work, and no more.

    Parameters
    ----------
    tokens
        (cells, T, D) frozen embedding.
    classes
        (cells,) training perturbation of each cell, -1 for controls.
    batch
        (cells,) batch codes.
    log_library
        (cells,) log library size.
    expression
        (cells, genes) log-expression, to judge the embedding against 64 principal components of it.

    Returns
    -------
    ``perturbation`` and ``batch``, balanced accuracy of naming them, each with the accuracy ``_chance`` of
    guessing; ``log_library_r2``; with ``expression`` also ``perturbation_pca``. ``None`` where there is
    nothing to tell apart.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected (cells, T, D)")
    for name, values in (("classes", classes), ("batch", batch), ("log_library", log_library)):
        if values.shape != tokens.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {tuple(tokens.shape[:1])}")
    place = torch.linspace(0, len(tokens) - 1, min(MAX_CELLS, len(tokens)), device=tokens.device).long()
    classes, batch, z = classes[place], batch[place], _leading(tokens[place].flatten(1), MAX_DIMENSIONS)
    found = probe_features(z, classes, batch, log_library[place])
    if expression is not None:
        perturbed = classes >= 0
        components = _leading(expression[place], PCA_DIMENSIONS)
        found["perturbation_pca"] = _discriminant_accuracy(components[perturbed], classes[perturbed])[0]
    return found


def probe_features(z: Tensor, classes: Tensor, batch: Tensor, log_library: Tensor) -> dict[str, float | None]:
    """Probe features that are few already; see :func:`linear_probes`.

    Parameters
    ----------
    z
        (cells, dimensions) float64. The probes are fitted on the first, third, … cell and judged on the
        others.
    classes, batch, log_library
        (cells,) as in :func:`linear_probes`.
    """
    perturbed = classes >= 0
    named, chance = _discriminant_accuracy(z[perturbed], classes[perturbed])
    batches, batch_chance = _discriminant_accuracy(z, batch)
    return {
        "perturbation": named,
        "perturbation_chance": chance,
        "batch": batches,
        "batch_chance": batch_chance,
        "log_library_r2": _ridge_r2(z, log_library),
    }


def principal_axes(x: Tensor, dimensions: int) -> Tensor:
    """Leading principal axes of centred features (cells, features), (features, at most ``dimensions``).

    They come from the smaller of the two Gram matrices, so that many features cost no more than many
    cells. The largest weight of an axis is positive, and axes without variance are left out.
    """
    if x.shape[1] <= len(x):
        values, vectors = torch.linalg.eigh(x.T @ x)
        values, axes = values.flip(0)[:dimensions], vectors.flip(1)[:, :dimensions]
        kept = _varying(values)
        axes = axes[:, kept]
    else:
        values, left = torch.linalg.eigh(x @ x.T)
        values, left = values.flip(0)[:dimensions], left.flip(1)[:, :dimensions]
        kept = _varying(values)
        axes = x.T @ (left[:, kept] / values[kept].sqrt())
    largest = axes.abs().argmax(dim=0)
    return axes * axes[largest, torch.arange(axes.shape[1], device=axes.device)].sign()


def _varying(values: Tensor) -> Tensor:
    return values > 1e-9 * values[0].clamp(min=1e-30)


def _halves(cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.arange(cells, device=device)
    return index[::2], index[1::2]


def _leading(x: Tensor, dimensions: int) -> Tensor:
    """Principal components (cells, at most ``dimensions``) of features; the axes are of the fitting half."""
    x = x.double()
    x = x - x[::2].mean(dim=0)
    if x.shape[1] <= dimensions:
        return x
    return x @ principal_axes(x[::2], dimensions)


def _discriminant_accuracy(z: Tensor, classes: Tensor) -> tuple[float | None, float | None]:
    """Balanced accuracy of a linear discriminant with equal priors, and of guessing.

    Classes that lack a cell in one of the halves are left out.
    """
    fitted, judged = _halves(len(z), z.device)
    present = classes[fitted].unique()
    present = present[torch.isin(present, classes[judged].unique())]
    if len(present) < 2:
        return None, None
    fitted, judged = (part[torch.isin(classes[part], present)] for part in (fitted, judged))
    own, asked = (torch.searchsorted(present, classes[part]) for part in (fitted, judged))
    counts = torch.bincount(own, minlength=len(present)).double()
    means = torch.zeros(len(present), z.shape[1], dtype=z.dtype, device=z.device).index_add_(
        0, own, z[fitted]
    )
    means /= counts[:, None]
    residual = z[fitted] - means[own]
    within = residual.T @ residual / len(fitted)
    mean_variance = within.diagonal().mean().clamp(min=1e-12)
    within = within + SHRINKAGE * mean_variance * torch.eye(len(within), dtype=z.dtype, device=z.device)
    weight = torch.linalg.solve(within, means.T)
    score = z[judged] @ weight - (means.T * weight).sum(dim=0) / 2
    right = (score.argmax(dim=1) == asked).double()
    hits = torch.zeros(len(present), dtype=z.dtype, device=z.device).index_add_(0, asked, right)
    return float((hits / torch.bincount(asked, minlength=len(present))).mean()), 1 / len(present)


def _ridge_r2(z: Tensor, y: Tensor) -> float | None:
    """R² of a ridge regression on cells that it was not fitted on."""
    fitted, judged = _halves(len(z), z.device)
    y = y.double()
    centre, mean = z[fitted].mean(dim=0), y[fitted].mean()
    total = (y[judged] - y[judged].mean()).square().sum()
    if not len(judged) or float(total) <= 0:
        return None
    left, singular, right = torch.linalg.svd(z[fitted] - centre, full_matrices=False)
    target = left.T @ (y[fitted] - mean)
    best, weight = float("inf"), torch.zeros_like(centre)
    n = len(fitted)
    for penalty in PENALTIES:
        added = penalty * singular.square().mean()
        kept = singular.square() / (singular.square() + added).clamp(min=1e-30)
        residual = (y[fitted] - mean - left @ (kept * target)).square().sum()
        score = float(residual / (n - 1 - kept.sum()).clamp(min=1e-9) ** 2)
        if score < best:
            best = score
            weight = right.T @ (kept / singular.clamp(min=1e-12) * target)
    error = (y[judged] - mean - (z[judged] - centre) @ weight).square().sum()
    return float(1 - error / total)

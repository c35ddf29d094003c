"""Linear models from perturbation codes to expression changes: baselines, and BioJEPA's linear branch.

All take Δ, the change of mean log-expression against control, of training perturbations, and predict
Δ of any label. Nothing here sees a cell of a test perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from biojepa.optimizers import LBFGS

JITTER = 1e-6
# A thousand times the variance of the targets: a trial step of the search beyond it would leave a kernel
# that the jitter cannot keep positive definite.
MAX_LOG_WEIGHT = 7.0


@dataclass(frozen=True)
class Components:
    """Kernels between perturbations, each a way in which two of them may resemble each other.

    With M the multi-hot code ``(labels, genes)`` and C a source's gene codes, the effect of a label is
    the sum over its genes of u_g, so every kernel is M k Mᵀ for a kernel k between genes:

    - ``mean``: k = 1, all genes share an average effect, which counts twice for a pair of genes;
    - ``shared``: an effect common to all perturbed cells, counted once;
    - ``gene``: k = I, the gene's own effect, known only where training perturbed it;
    - ``prior``: k = average over the sources of C Cᵀ, so that unseen genes borrow from their neighbours;
      or, with ``separate``, one kernel per source, ``prior_<source>``.
    """

    matrices: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls, membership: np.ndarray, codes: Mapping[str, np.ndarray], separate: bool = False
    ) -> Components:
        """Build the kernels of ``membership`` ``(labels, genes)`` and source codes ``(genes, dim)``."""
        return cls({name: x @ x.T for name, x in feature_maps(membership, codes, separate).items()})

    def weighted(self, weights: Mapping[str, float], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Sum the kernels with their weights, for the given rows and columns of labels."""
        return sum(weights[name] * matrix[np.ix_(rows, columns)] for name, matrix in self.matrices.items())


def feature_maps(
    membership: np.ndarray, codes: Mapping[str, np.ndarray], separate: bool = False
) -> dict[str, np.ndarray]:
    """Features ``(labels, dim)`` whose products are the kernels of :class:`Components`.

    Parameters
    ----------
    membership
        ``(labels, genes)`` multi-hot code.
    codes
        Source name to ``(genes, dim)``.
    separate
        One entry per source instead of their average.
    """
    size = membership.sum(axis=1, keepdims=True).astype(float)
    features = {"mean": size, "shared": (size > 0).astype(float), "gene": np.asarray(membership, dtype=float)}
    sources = {f"prior_{name}": membership @ np.asarray(values, float) for name, values in codes.items()}
    if separate:
        return features | sources
    if sources:
        features["prior"] = np.hstack(list(sources.values())) / np.sqrt(len(sources))
    return features


@dataclass
class AdditiveKernelRidge:
    """Gaussian-process regression on sums of gene effects; weights by marginal likelihood.

    The prior over the effect of a label is a weighted sum of :class:`Components`, the noise of a
    pseudobulk falls as 1 / cells. Weights and noise maximize the marginal likelihood of the training
    perturbations (Rasmussen & Williams 2006, eq. 5.8), all output dimensions together, with a weak
    log-normal prior that keeps a useless component finite. It is ridge regression on the codes whose
    penalties are estimated instead of searched, which matters when perturbations are few.

    After :meth:`fit`: ``weights``, ``noise``, ``log_weights`` (as searched), ``labels``, ``dual``
    ``(n, outputs)``, ``inverse`` ``(n, n)`` of the noisy kernel, ``output_variance`` ``(outputs,)``.
    """

    components: Components
    weights: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0

    def fit(
        self,
        labels: np.ndarray,
        targets: np.ndarray,
        n_cells: np.ndarray,
        begin: np.ndarray | None = None,
    ) -> AdditiveKernelRidge:
        """Estimate the weights and condition on the training perturbations.

        Parameters
        ----------
        labels
            ``(n,)`` positions of the training labels.
        targets
            ``(n, outputs)`` their Δ.
        n_cells
            ``(n,)`` cells behind each.
        begin
            ``log_weights`` of a similar fit to begin the search at; it saves time.
        """
        if len(labels) != len(targets) or len(labels) != len(n_cells):
            raise ValueError(f"{len(labels)} labels, {len(targets)} targets, {len(n_cells)} cell counts")
        self.labels, self.targets = np.asarray(labels), np.asarray(targets, dtype=float)
        relative_noise = np.median(n_cells) / np.maximum(n_cells, 1)
        names = list(self.components.matrices)
        parts = torch.tensor(
            np.stack([self.components.matrices[name][np.ix_(labels, labels)] for name in names])
        )
        # Each kernel on the scale of the outputs, so that one start suits every dataset.
        scale = torch.clamp(parts.diagonal(dim1=1, dim2=2).mean(dim=1), min=JITTER)
        outer = torch.tensor(self.targets @ self.targets.T / self.targets.shape[1])
        size = max(float(outer.diagonal().mean()), 1e-30)
        outer, parts = outer / size, parts / scale[:, None, None]
        diagonal = torch.tensor(relative_noise)
        expected = -1.0
        first = np.full(len(names) + 1, expected) if begin is None else begin
        log_weights = torch.tensor(first, dtype=torch.float64, requires_grad=True)

        def covariance() -> torch.Tensor:
            weights = log_weights.clamp(max=MAX_LOG_WEIGHT).exp()
            ridge = weights[-1] * diagonal + JITTER
            return (weights[:-1, None, None] * parts).sum(dim=0) + torch.diag(ridge)

        optimizer = LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

        def negative_log_likelihood() -> torch.Tensor:
            optimizer.zero_grad()
            factor = torch.linalg.cholesky(covariance())
            fit_term = torch.cholesky_solve(outer, factor).diagonal().sum() / 2
            loss = factor.diagonal().log().sum() + fit_term + 0.01 * (log_weights - expected).square().sum()
            loss.backward()
            return loss

        optimizer.step(negative_log_likelihood)
        found = log_weights.detach().clamp(max=MAX_LOG_WEIGHT)
        self.log_weights, weights = found.numpy(), found.exp()
        self.weights = {
            name: float(weight * size / unit)
            for name, weight, unit in zip(names, weights, scale, strict=False)
        }
        self.noise = float(weights[-1] * size)
        kernel = self.components.weighted(self.weights, self.labels, self.labels)
        kernel = kernel + np.diag(self.noise * relative_noise + JITTER * size)
        self.inverse = np.linalg.inv(kernel)
        self.dual = self.inverse @ self.targets
        # Outputs differ in scale; the leave-one-out residuals say how much (Rasmussen & Williams, 5.10-12).
        self.output_variance = (self.dual**2 / np.diag(self.inverse)[:, None]).mean(axis=0)
        return self

    def predict(self, labels: np.ndarray) -> np.ndarray:
        """Return Δ ``(len(labels), outputs)``."""
        return self.components.weighted(self.weights, labels, self.labels) @ self.dual

    def leave_one_out(self) -> np.ndarray:
        """Predict every training perturbation from the others, ``(n, outputs)``, in closed form."""
        return self.targets - self.dual / np.diag(self.inverse)[:, None]

    def standard_deviation(self, labels: np.ndarray) -> np.ndarray:
        """Uncertainty of the predicted Δ, ``(len(labels), outputs)``, without the noise of a measurement."""
        cross = self.components.weighted(self.weights, labels, self.labels)
        own = np.diag(self.components.weighted(self.weights, labels, labels))
        variance = np.maximum(own - np.einsum("ij,jk,ik->i", cross, self.inverse, cross), 0)
        return np.sqrt(variance[:, None] * self.output_variance)


class ComponentwiseKernelRidge:
    """Additive kernel ridge of each principal direction of the targets, weighed on its own.

    One set of weights for all outputs must compromise between directions that the priors explain and
    directions that are noise or a gene's own. Here the leading directions of the training targets get
    weights of their own, and what is left shares one set (a linear model of coregionalization with the
    principal directions as its basis; Bonilla et al. 2007 estimate the basis too).

    Parameters
    ----------
    components
        Kernels between labels.
    n_leading
        Directions with weights of their own.
    """

    def __init__(self, components: Components, n_leading: int = 8) -> None:
        self.components, self.n_leading = components, n_leading

    def fit(self, labels: np.ndarray, targets: np.ndarray, n_cells: np.ndarray) -> ComponentwiseKernelRidge:
        """Fit one :class:`AdditiveKernelRidge` per leading direction and one for the rest."""
        left, singular, right = np.linalg.svd(np.asarray(targets, dtype=float), full_matrices=False)
        scores = left * singular
        joint = AdditiveKernelRidge(self.components).fit(labels, scores, n_cells)
        leading = min(self.n_leading, max(len(singular) - 1, 0))
        groups = [slice(k, k + 1) for k in range(leading)] + [slice(leading, None)]
        self.parts = [
            (
                AdditiveKernelRidge(self.components).fit(labels, scores[:, g], n_cells, joint.log_weights),
                right[g],
            )
            for g in groups
        ]
        return self

    def predict(self, labels: np.ndarray) -> np.ndarray:
        """Return the predicted targets ``(len(labels), outputs)``."""
        return sum(part.predict(labels) @ basis for part, basis in self.parts)

    def leave_one_out(self) -> np.ndarray:
        """Predict every training label from the others, ``(n, outputs)``, with the basis kept."""
        return sum(part.leave_one_out() @ basis for part, basis in self.parts)


def ridge(
    features: np.ndarray, targets: np.ndarray, new_features: np.ndarray, penalties: Sequence[float]
) -> np.ndarray:
    """Ridge regression with an unpenalized intercept; the penalty has the least leave-one-out error.

    The leave-one-out error is exact and closed-form (PRESS), on training perturbations alone.

    Parameters
    ----------
    features, targets
        ``(n, features)``, ``(n, outputs)`` of training perturbations.
    new_features
        ``(m, features)``
    penalties
        Candidates, in units of the mean squared norm of the centred features.

    Returns
    -------
    ``(m, outputs)``
    """
    centre, offset = features.mean(axis=0), targets.mean(axis=0)
    X, Y = features - centre, targets - offset
    if not np.any(X):
        return np.repeat(offset[None], len(new_features), axis=0)
    left, singular, right = np.linalg.svd(X, full_matrices=False)
    unit = (X**2).sum() / len(X)
    errors = []
    for penalty in penalties:
        shrink = singular**2 / (singular**2 + penalty * unit)
        fitted = left @ (shrink[:, None] * (left.T @ Y))
        leverage = (left**2) @ shrink + 1 / len(X)
        errors.append((((Y - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]) ** 2).sum())
    best = penalties[int(np.argmin(errors))]
    gain = singular / (singular**2 + best * unit)
    return offset + (new_features - centre) @ (right.T @ (gain[:, None] * (left.T @ Y)))


def nearest_neighbours(
    features: np.ndarray, targets: np.ndarray, new_features: np.ndarray, k: int
) -> np.ndarray:
    """Average the targets of the ``k`` most similar training perturbations, by cosine of their codes.

    A label without any code has no neighbour and gets the mean of all training perturbations.
    """

    def unit(values: np.ndarray) -> np.ndarray:
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    similarity = unit(new_features) @ unit(features).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    prediction = targets[nearest].mean(axis=1)
    prediction[~new_features.any(axis=1)] = targets.mean(axis=0)
    return prediction


def bilinear(
    means: np.ndarray,
    target_columns: Sequence[Sequence[int]],
    new_target_columns: Sequence[Sequence[int]],
    n_components: int = 10,
    penalty: float = 0.1,
) -> tuple[np.ndarray, int]:
    """Fit the linear model of Ahlmann-Eltze et al. (Nature Methods 2025).

    With Y the training pseudobulk ``(genes, perturbations)``, row-centred, G its K leading gene scores
    and P the sum of the G rows of a perturbation's measured targets (zero where none is measured):
    W = (GᵀG + λI)⁻¹ Gᵀ Y Pᵀ (P Pᵀ + λI)⁻¹, prediction G W p + row mean.

    Parameters
    ----------
    means
        ``(perturbations, genes)`` Δ of training perturbations.
    target_columns, new_target_columns
        Columns of the measured target genes, of training and of new perturbations.

    Returns
    -------
    prediction
        ``(new perturbations, genes)``
    n_without_target
        New perturbations of which no target is measured: they get the row mean.
    """
    Y = means.T
    row_mean = Y.mean(axis=1, keepdims=True)
    Y = Y - row_mean
    left, singular, _ = np.linalg.svd(Y, full_matrices=False)
    k = min(n_components, len(singular))
    G = left[:, :k] * singular[:k]

    def target_scores(columns: Sequence[Sequence[int]]) -> np.ndarray:
        return np.stack([G[list(c)].sum(axis=0) if len(c) else np.zeros(k) for c in columns], axis=1)

    P, new_P = target_scores(target_columns), target_scores(new_target_columns)
    identity = penalty * np.eye(k)
    W = np.linalg.solve(G.T @ G + identity, G.T @ Y @ P.T) @ np.linalg.inv(P @ P.T + identity)
    prediction = G @ W @ new_P + row_mean
    return prediction.T, sum(not len(columns) for columns in new_target_columns)

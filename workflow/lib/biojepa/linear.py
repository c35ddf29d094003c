"""Linear models from perturbation codes to expression changes: baselines, and BioJEPA's linear branch.

All take Δ, the change of mean log-expression against control, of training perturbations, and predict
Δ of any label. Nothing here sees a cell of a test perturbation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from biojepa.neighbours import blocks
from biojepa.optimizers import LBFGS

log = logging.getLogger(__name__)

JITTER = 1e-6
# A thousand times the variance of the targets: a trial step of the search beyond it would leave a kernel
# that the jitter cannot keep positive definite.
MAX_LOG_WEIGHT = 7.0
EXPECTED_LOG_WEIGHT = -1.0
# Training labels that say the weights, and labels that are predicted at a time.
SEARCHED = 1000
ASKED_AT_A_TIME = 1000
# Multiplications from which on it may pay to leave out zeros, and how many entries there must be for each one
# that is not zero.
MANY = 1 << 28
SPARSE = 20
# What is added to the diagonal of a kernel that rounding left indefinite, in units of its mean, tenfold each
# time.
MORE_JITTER = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


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

    Kernels are products of features and computed for the labels that are asked for: those of all pairs of
    10,000 labels are 800 MB each.

    Attributes
    ----------
    features
        Name of the kernel to ``(labels, dim)``.
    """

    features: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls, membership: np.ndarray, codes: Mapping[str, np.ndarray], separate: bool = False
    ) -> Components:
        """Build the kernels of ``membership`` ``(labels, genes)`` and source codes ``(genes, dim)``."""
        return cls(feature_maps(membership, codes, separate))

    def kernel(self, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return one kernel ``(len(rows), len(columns))`` between the given labels."""
        x = self.features[name]
        return product(x[rows], x[columns].T)

    def weighted(self, weights: Mapping[str, float], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Sum the kernels with their weights, for the given rows and columns of labels."""
        total = np.zeros((len(rows), len(columns)))
        for name in self.features:
            kernel = self.kernel(name, rows, columns)
            kernel *= weights[name]
            total += kernel
        return total

    def variance(self, weights: Mapping[str, float], rows: np.ndarray) -> np.ndarray:
        """Return the diagonal of :meth:`weighted`, ``(len(rows),)``."""
        return sum(weights[name] * (x[rows] ** 2).sum(axis=1) for name, x in self.features.items())


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
    membership = np.asarray(membership, dtype=float)
    size = membership.sum(axis=1, keepdims=True)
    features = {"mean": size, "shared": (size > 0).astype(float), "gene": membership}
    sources = {
        f"prior_{name}": product(membership, np.asarray(values, float)) for name, values in codes.items()
    }
    if separate:
        return features | sources
    if sources:
        features["prior"] = np.hstack(list(sources.values())) / np.sqrt(len(sources))
    return features


def product(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return ``x @ values`` ``(n, outputs)``, without the zeros of ``x`` ``(n, dim)`` where they are many.

    The multi-hot code of 10,000 perturbations has a thousand zeros for each one, and its products would
    take longer than all else that is done with them.
    """
    if x.size * values.shape[1] < MANY:
        return x @ values
    if np.count_nonzero(x) * SPARSE > x.size:
        return x @ values
    row, column = np.nonzero(x)
    entries = torch.from_numpy(np.stack([row, column]))
    code = torch.sparse_coo_tensor(entries, torch.from_numpy(x[row, column]), x.shape, check_invariants=True)
    return (code @ torch.from_numpy(np.ascontiguousarray(values))).numpy()


@dataclass
class AdditiveKernelRidge:
    """Gaussian-process regression on sums of gene effects; weights by marginal likelihood.

    The prior over the effect of a label is a weighted sum of :class:`Components`, the noise of a
    pseudobulk falls as 1 / cells. Weights and noise maximize the marginal likelihood of the training
    perturbations (Rasmussen & Williams 2006, eq. 5.8), all output dimensions together, with a weak
    log-normal prior that keeps a useless component finite. It is ridge regression on the codes whose
    penalties are estimated instead of searched, which matters when perturbations are few.

    A handful of weights needs no more than a thousand perturbations, so of more than ``SEARCHED`` a
    random part says them: each step of the search takes their cube. All of them are conditioned on.

    After :meth:`fit`: ``weights``, ``noise``, ``log_weights`` (as searched), ``labels``, ``targets``,
    ``dual`` ``(n, outputs)``, ``inverse_diagonal`` ``(n,)`` of the noisy kernel's inverse,
    ``noise_variance`` ``(n,)`` that the kernel has on its diagonal, ``output_variance`` ``(outputs,)``.
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
        self.search(labels, targets, n_cells, begin)
        factor = noisy_factor(self.components, self.weights, self.labels, self.noise_variance)
        self.dual = torch.cholesky_solve(torch.from_numpy(self.targets), factor).numpy()
        self.inverse_diagonal = torch.cholesky_inverse(factor, out=factor).diagonal().numpy().copy()
        # Outputs differ in scale; the leave-one-out residuals say how much (Rasmussen & Williams, 5.10-12).
        self.output_variance = (self.dual**2 / self.inverse_diagonal[:, None]).mean(axis=0)
        return self

    def search(
        self,
        labels: np.ndarray,
        targets: np.ndarray,
        n_cells: np.ndarray,
        begin: np.ndarray | None = None,
    ) -> AdditiveKernelRidge:
        """Estimate the weights alone; parameters are those of :meth:`fit`."""
        if len(labels) != len(targets) or len(labels) != len(n_cells):
            raise ValueError(f"{len(labels)} labels, {len(targets)} targets, {len(n_cells)} cell counts")
        self.labels, self.targets = np.asarray(labels), np.ascontiguousarray(targets, dtype=float)
        relative_noise = np.median(n_cells) / np.maximum(n_cells, 1)
        part = np.arange(len(labels))
        if len(part) > SEARCHED:
            part = np.sort(np.random.default_rng(0).permutation(part)[:SEARCHED])
        names, asked = list(self.components.features), self.labels[part]
        kernels = torch.from_numpy(np.stack([self.components.kernel(n, asked, asked) for n in names]))
        # Each kernel on the scale of the outputs, so that one start suits every dataset.
        scale = kernels.diagonal(dim1=1, dim2=2).mean(dim=1)
        said = scale > 0
        scale = scale.clamp(min=JITTER)
        seen = torch.from_numpy(self.targets[part] / np.sqrt(max(self.targets.shape[1], 1)))
        if seen.shape[1] > len(seen):  # The likelihood asks for Y Yᵀ alone: Y = (Q R)ᵀ gives Rᵀ R.
            seen = torch.linalg.qr(seen.T, mode="r").R.T.contiguous()
        size = max(float(seen.square().sum(dim=1).mean()), 1e-30)
        likelihood = _Likelihood(
            kernels / scale[:, None, None], torch.from_numpy(relative_noise[part]), seen / np.sqrt(size)
        )
        found = likelihood.maximize(begin).clamp(max=MAX_LOG_WEIGHT)
        self.log_weights, weights = found.numpy(), found.exp()
        self.weights = {
            # A source that covers none of the searched labels has no weight that anything would speak for.
            name: float(weight * size / unit) if told else 0.0
            for name, weight, unit, told in zip(names, weights, scale, said, strict=False)
        }
        self.noise = float(weights[-1] * size)
        self.noise_variance = self.noise * relative_noise + JITTER * size
        return self

    def predict(self, labels: np.ndarray) -> np.ndarray:
        """Return Δ ``(len(labels), outputs)``."""
        parts = [
            self.components.weighted(self.weights, labels[part], self.labels) @ self.dual
            for part in blocks(len(labels), ASKED_AT_A_TIME)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.targets.shape[1]))

    def leave_one_out(self) -> np.ndarray:
        """Predict every training perturbation from the others, ``(n, outputs)``, in closed form."""
        return self.targets - self.dual / self.inverse_diagonal[:, None]

    def standard_deviation(self, labels: np.ndarray) -> np.ndarray:
        """Uncertainty of the predicted Δ, ``(len(labels), outputs)``, without the noise of a measurement."""
        factor = noisy_factor(self.components, self.weights, self.labels, self.noise_variance)
        variance = [
            posterior_variance(
                factor,
                self.components.weighted(self.weights, labels[part], self.labels),
                self.components.variance(self.weights, labels[part]),
            )
            for part in blocks(len(labels), ASKED_AT_A_TIME)
        ]
        return np.sqrt(np.concatenate([*variance, np.zeros(0)])[:, None] * self.output_variance)


def noisy_factor(
    components: Components, weights: Mapping[str, float], labels: np.ndarray, noise_variance: np.ndarray
) -> torch.Tensor:
    """Cholesky factor ``(n, n)``, lower, of the weighted kernel of ``labels`` plus their noise.

    The search has seen a thousand labels to be positive definite. Where rounding leaves the kernel of more of
    them indefinite, the smallest of ``MORE_JITTER`` that helps is added to its diagonal.

    Raises
    ------
    numpy.linalg.LinAlgError
        When none helps: then something is not a number.
    """
    kernel = torch.from_numpy(components.weighted(weights, labels, labels))
    kernel.diagonal().add_(torch.from_numpy(noise_variance))
    unit, before = kernel.diagonal().mean(), 0.0
    for jitter in (0.0, *MORE_JITTER):
        kernel.diagonal().add_((jitter - before) * unit)
        factor, wrong = torch.linalg.cholesky_ex(kernel)
        if not wrong:
            if jitter:
                log.warning("kernel of %d labels: %g of its diagonal added to it", len(labels), jitter)
            return factor
        before = jitter
    raise np.linalg.LinAlgError(
        f"the kernel of {len(labels)} training perturbations is not positive definite "
        f"(mean of its diagonal {float(unit):.3g})"
    )


def posterior_variance(factor: torch.Tensor, cross: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Variance ``(m,)`` of a Gaussian process after its training labels are known.

    Parameters
    ----------
    factor
        See :func:`noisy_factor`.
    cross
        ``(m, n)`` kernel between asked and training labels.
    prior
        ``(m,)`` variance before.
    """
    explained = torch.linalg.solve_triangular(factor, torch.from_numpy(cross).T, upper=False)
    return np.maximum(prior - explained.square().sum(dim=0).numpy(), 0)


@dataclass(frozen=True)
class _Likelihood:
    """Marginal likelihood of targets under a sum of kernels, with its gradient in closed form.

    By automatic differentiation a fit to a thousand labels took twice as long.

    Attributes
    ----------
    kernels
        ``(kernels, n, n)``
    noise
        ``(n,)`` variance of the noise of each label, up to its weight.
    targets
        ``(n, outputs)``, divided by the square root of ``outputs``.
    """

    kernels: torch.Tensor
    noise: torch.Tensor
    targets: torch.Tensor

    def maximize(self, begin: np.ndarray | None) -> torch.Tensor:
        """Return the logarithms of the best weights, ``(kernels + 1,)``, that of the noise last."""
        first = np.full(len(self.kernels) + 1, EXPECTED_LOG_WEIGHT) if begin is None else begin
        log_weights = torch.tensor(first, dtype=torch.float64)
        optimizer = LBFGS([log_weights], max_iter=100, line_search_fn="strong_wolfe")

        def evaluate() -> torch.Tensor:
            loss, log_weights.grad = self.loss(log_weights)
            return loss

        optimizer.step(evaluate)
        return log_weights

    def loss(self, log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log likelihood per output, up to a constant, with the weak prior; and its gradient.

        With K = L Lᵀ the covariance and Y the targets, the loss is log|L| + tr(Yᵀ K⁻¹ Y) / 2, and its
        derivative by K is (K⁻¹ - K⁻¹ Y Yᵀ K⁻¹) / 2 (Rasmussen & Williams 2006, eq. 5.9).
        """
        weights = log_weights.clamp(max=MAX_LOG_WEIGHT).exp()
        covariance = torch.tensordot(weights[:-1], self.kernels, dims=1)
        covariance.diagonal().add_(weights[-1] * self.noise + JITTER)
        factor = torch.linalg.cholesky(covariance)
        explained = torch.cholesky_solve(self.targets, factor)
        away = log_weights - EXPECTED_LOG_WEIGHT
        loss = factor.diagonal().log().sum() + (self.targets * explained).sum() / 2
        by_covariance = torch.cholesky_inverse(factor).addmm_(explained, explained.T, alpha=-1).div_(2)
        by_weight = torch.cat(
            [
                torch.mv(self.kernels.flatten(1), by_covariance.flatten()),
                (by_covariance.diagonal() * self.noise).sum()[None],
            ]
        )
        gradient = by_weight * weights * (log_weights <= MAX_LOG_WEIGHT)
        return loss + 0.01 * away.square().sum(), gradient + 0.02 * away


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
        joint = AdditiveKernelRidge(self.components).search(labels, scores, n_cells)
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

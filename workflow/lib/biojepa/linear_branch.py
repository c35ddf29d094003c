"""The linear branch of BioJEPA: additive models in two spaces, for any combination of coded genes.

Two views of the same training perturbations are averaged. One is kernel ridge on the change of
expression. The other is kernel ridge on the change of the frozen embedding, one per leading direction,
read out as expression. Their errors differ, so the average is better than the worse of them. What a
perturbation does to its own target gene is modelled apart, because no similarity between genes can tell
it. ``docs/decisions.md`` has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
import torch

from biojepa.baselines import fit_linear_branch
from biojepa.linear import (
    ASKED_AT_A_TIME,
    AdditiveKernelRidge,
    Components,
    ComponentwiseKernelRidge,
    feature_maps,
    noisy_factor,
    posterior_variance,
    product,
)
from biojepa.neighbours import blocks
from biojepa.pairs import Pairs

MIN_TARGETS = 3


@dataclass(frozen=True)
class OwnTarget:
    """What a perturbation does to its own target beyond what others do to that gene.

    Attributes
    ----------
    column
        ``(perturbed genes,)`` column of the gene in the expression matrix, -1 where it is not measured.
    change
        ``(perturbed genes,)`` excess change of log-expression.
    """

    column: np.ndarray
    change: np.ndarray

    @classmethod
    def fit(
        cls,
        pairs: Pairs,
        train: np.ndarray,
        delta: np.ndarray,
        control: np.ndarray,
        cell_variance: np.ndarray,
    ) -> OwnTarget:
        """Estimate by empirical Bayes.

        A gene never perturbed in training gets the typical excess: a constant, or a constant times its
        expression in controls, whichever fits the training targets better, shrunken by 1 - 1/t² and
        dropped below t = 1. A trained one gets the posterior mean between that and its own.

        Parameters
        ----------
        pairs, train, delta
            Fold, positions of the training labels, and their Δ ``(n, genes)``.
        control, cell_variance
            ``(genes,)`` mean log-expression of controls, and its variance over single cells.
        """
        position = {gene: column for column, gene in enumerate(pairs.genes)}
        column = np.array([position.get(gene, -1) for gene in pairs.perturbed_genes], dtype=np.int64)
        membership = pairs.membership[train]
        row, gene = np.nonzero(membership * (column >= 0))
        if len(np.unique(gene)) < MIN_TARGETS:
            return cls(column, np.zeros(len(column)))
        target = column[gene]
        total = delta.sum(axis=0)
        excess = delta[row, target] - (total[target] - delta[row, target]) / max(len(delta) - 1, 1)
        n_cells = pairs.n_cells[train][row].astype(float)
        # One number per gene, from all labels that carry it.
        genes, index = np.unique(gene, return_inverse=True)
        weight = np.bincount(index, n_cells)
        own = np.bincount(index, n_cells * excess) / weight
        noise = cell_variance[column[genes]] / weight
        measured = column >= 0
        shapes = [np.where(measured, values[column], 0.0) for values in (np.ones_like(control), control)]
        _, typical = min((_typical(shape, shape[genes], own) for shape in shapes), key=lambda fit: fit[0])
        change = typical.copy()
        between = max(float(((own - change[genes]) ** 2 - noise).mean()), 0.0)
        trust = between / np.maximum(between + noise, 1e-12)
        change[genes] += trust * (own - change[genes])
        return cls(column, change)

    def without(self, pairs: Pairs, train: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """Replace each training label's change of its own targets by what the other labels do there."""
        rest = delta.copy()
        row, gene = np.nonzero(pairs.membership[train] * (self.column >= 0))
        target = self.column[gene]
        rest[row, target] = (delta.sum(axis=0)[target] - delta[row, target]) / max(len(delta) - 1, 1)
        return rest


def _typical(shape: np.ndarray, fitted: np.ndarray, own: np.ndarray) -> tuple[float, np.ndarray]:
    """Squared error of ``own`` ≈ slope · ``fitted``, and the shrunken slope times ``shape``."""
    energy = max(float(fitted @ fitted), 1e-12)
    slope = float(fitted @ own) / energy
    error = float(((own - slope * fitted) ** 2).sum())
    t_squared = slope**2 * energy * (len(own) - 1) / max(error, 1e-12)
    return error, slope * max(0.0, 1 - 1 / max(t_squared, 1e-12)) * shape


@dataclass(frozen=True)
class LinearBranch:
    """A fitted branch, reduced to linear maps of :func:`~biojepa.linear.feature_maps`.

    Attributes
    ----------
    separate
        Whether each prior source has a weight of its own.
    trained
        Positions of the perturbed genes that training carries: only these have effects of their own.
    expression, tokens
        Name of a feature map to ``(dim, genes)`` and to ``(dim, T·D)``; of the map ``gene`` the rows of
        trained genes.
    own_column, own_change
        See :class:`OwnTarget`.
    share
        Weight of the latent view, 0 to 1.
    train, noise_variance, output_variance, weights, noise
        Multi-hot codes ``(n, perturbed genes)`` of the training labels, bool, and what else the ridge on
        expression needs to say how uncertain it is.
    """

    separate: bool
    trained: np.ndarray
    expression: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    own_column: np.ndarray
    own_change: np.ndarray
    share: float
    train: np.ndarray
    noise_variance: np.ndarray
    output_variance: np.ndarray
    weights: dict[str, float]
    noise: float

    def token_change(self, membership: np.ndarray, codes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Change of the tokens ``(labels, T·D)`` of ``membership`` ``(labels, genes)``; zero for control."""
        return self._apply(self.tokens, membership, codes)

    def change(
        self, membership: np.ndarray, codes: Mapping[str, np.ndarray], readout: np.ndarray
    ) -> np.ndarray:
        """Change of log-expression ``(labels, genes)``; ``readout`` is ``(T·D, genes)``."""
        direct = self._apply(self.expression, membership, codes)
        return self._combine(direct, self.token_change(membership, codes) @ readout, membership)

    def _apply(
        self, maps: Mapping[str, np.ndarray], membership: np.ndarray, codes: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        features = feature_maps(membership, codes, self.separate)
        features["gene"] = features["gene"][:, self.trained]
        return reduce(np.add, (product(features[name], values) for name, values in maps.items()))

    def _combine(self, direct: np.ndarray, latent: np.ndarray, membership: np.ndarray) -> np.ndarray:
        change = (1 - self.share) * direct + self.share * latent
        row, gene = np.nonzero(membership * (self.own_column >= 0))
        column = self.own_column[gene]
        # The readout blurs one gene's own change over its programme, so the direct view is taken there.
        change[row, column] = direct[row, column] + self.own_change[gene]
        return change

    def uncertainty(self, codes: Mapping[str, np.ndarray]) -> Uncertainty:
        """Prepare to say how uncertain predictions of any label are; it takes the cube of the labels."""
        trained = Components.of(self.train, codes, self.separate)
        factor = noisy_factor(trained, self.weights, np.arange(len(self.train)), self.noise_variance)
        return Uncertainty(self, trained, codes, factor)

    def state(self) -> dict[str, Any]:
        """Return the content as plain values and arrays."""
        return {key.name: getattr(self, key.name) for key in fields(self)}


@dataclass(frozen=True)
class Uncertainty:
    """Says how uncertain the ridge on expression is.

    It is made when it is needed, since the factor of 10,000 training labels is 800 MB, more than all else
    that a model's file holds.

    Attributes
    ----------
    branch
        The fitted branch.
    trained
        Kernels of its training labels.
    codes
        Source name to ``(perturbed genes, dim)``.
    factor
        See :func:`~biojepa.linear.noisy_factor`.
    """

    branch: LinearBranch
    trained: Components
    codes: Mapping[str, np.ndarray]
    factor: torch.Tensor

    def standard_deviation(self, membership: np.ndarray) -> np.ndarray:
        """Return ``(labels, genes)`` for multi-hot codes, without the noise of a measurement."""
        parts = [self._variance(membership[part]) for part in blocks(len(membership), ASKED_AT_A_TIME)]
        variance = np.concatenate([*parts, np.zeros(0)])
        return np.sqrt(variance[:, None] * self.branch.output_variance)

    def _variance(self, membership: np.ndarray) -> np.ndarray:
        own, weights = feature_maps(membership, self.codes, self.branch.separate), self.branch.weights
        kernels = (w * product(own[name], self.trained.features[name].T) for name, w in weights.items())
        prior = sum(w * (own[name] ** 2).sum(axis=1) for name, w in weights.items())
        return posterior_variance(self.factor, reduce(np.add, kernels), prior)


@dataclass(frozen=True)
class LeftOut:
    """What the other training labels say of each: expression ``(n, genes)`` and tokens ``(n, T·D)``."""

    expression: np.ndarray
    tokens: np.ndarray


def fit_branch(
    pairs: Pairs,
    train: np.ndarray,
    delta: np.ndarray,
    token_change: np.ndarray,
    control: np.ndarray,
    cell_variance: np.ndarray,
    readout: np.ndarray,
    share: float = 0.5,
) -> tuple[LinearBranch, LeftOut]:
    """Fit both views on the training labels.

    Parameters
    ----------
    pairs, train
        Fold, with the codes to use, and positions of the training labels.
    delta, token_change
        ``(n, genes)`` and ``(n, T·D)`` changes of the training labels against control.
    control, cell_variance
        See :meth:`OwnTarget.fit`.
    readout
        ``(T·D, genes)``
    share
        Weight of the latent view.

    Returns
    -------
    The branch, and the leave-one-out predictions of the training labels. Weights, directions and the
    own-target effects of the latter are those of all training labels.
    """
    own = OwnTarget.fit(pairs, train, delta, control, cell_variance)
    direct = fit_linear_branch(pairs, train, own.without(pairs, train, delta))
    latent = ComponentwiseKernelRidge(direct.components).fit(train, token_change, pairs.n_cells[train])
    separate = "prior" not in direct.components.features and bool(pairs.codes)
    membership = pairs.membership[train]
    features = feature_maps(membership, pairs.codes, separate)
    trained = np.flatnonzero(membership.any(axis=0))
    features["gene"] = features["gene"][:, trained]
    branch = LinearBranch(
        separate=separate,
        trained=trained,
        expression=_maps(features, [(direct, None)]),
        tokens=_maps(features, latent.parts),
        own_column=own.column,
        own_change=own.change,
        share=share,
        train=membership.astype(bool),
        noise_variance=direct.noise_variance,
        output_variance=direct.output_variance,
        weights=direct.weights,
        noise=direct.noise,
    )
    tokens = latent.leave_one_out()
    return branch, LeftOut(branch._combine(direct.leave_one_out(), tokens @ readout, membership), tokens)


def _maps(
    features: Mapping[str, np.ndarray], parts: Sequence[tuple[AdditiveKernelRidge, np.ndarray | None]]
) -> dict[str, np.ndarray]:
    """Sum the weights of the features over the parts: prediction = Σ features · map."""
    return {
        name: reduce(
            np.add,
            (
                part.weights[name] * product(x.T, part.dual if basis is None else part.dual @ basis)
                for part, basis in parts
            ),
        )
        for name, x in features.items()
    }

"""The simple models that a deep one must beat, fitted together because each takes a moment.

Every function answers the same question from the same input, so that a report compares like with
like: given the training perturbations of a fold, what is Δ of the others?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from biojepa.additive_network import fit_additive_network
from biojepa.contracts import OTHER_SCREEN, WITHOUT_TARGET
from biojepa.labels import genes_of, is_combination, perturbation_of
from biojepa.linear import AdditiveKernelRidge, Components, bilinear, nearest_neighbours, ridge
from biojepa.other_screen import OtherScreen, predict_from_screens
from biojepa.pairs import Pairs, refuse_leaked_pairs, trainable_labels, validation_labels

log = logging.getLogger(__name__)

PENALTIES = tuple(np.logspace(-3, 3, 13))


@dataclass(frozen=True)
class TrainingData:
    """What a baseline may use.

    Attributes
    ----------
    pairs
        Codes and labels of all perturbations; cells of none of the test ones.
    train
        ``(n,)`` positions of the training labels.
    delta
        ``(n, genes)`` their Δ against control.
    validation, validation_delta
        The same of the validation labels, for early stopping alone.
    neighbours
        For ``knn``.
    seed
        For the randomized controls, and the start of ``mlp``.
    screens
        Name to responses in another screen, for ``other_screen``.
    """

    pairs: Pairs
    train: np.ndarray
    delta: np.ndarray
    validation: np.ndarray
    validation_delta: np.ndarray
    neighbours: int = 5
    seed: int = 0
    screens: Mapping[str, OtherScreen] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        neighbours: int = 5,
        seed: int = 0,
        screens: Mapping[str, OtherScreen] | None = None,
    ) -> TrainingData:
        """Take Δ of the training and validation perturbations from ``pairs``."""
        means, control = pairs.pseudobulk()
        train, validation = trainable_labels(pairs), validation_labels(pairs)
        changes = means[train] - control, means[validation] - control
        return cls(pairs, train, changes[0], validation, changes[1], neighbours, seed, screens or {})

    def features(self) -> np.ndarray:
        """Concatenate the prior codes of a label's genes, summed over its genes, ``(labels, dim)``.

        Each source is divided by the square root of its mean squared norm, so that none dominates by
        scale. Without a source there is a single column of zeros.
        """
        parts = [self.pairs.membership @ values for values in self.pairs.codes.values()]
        if not parts:
            return np.zeros((len(self.pairs.labels), 1))
        return np.hstack([part / max(np.sqrt((part**2).sum(axis=1).mean()), 1e-12) for part in parts])

    def target_columns(self, labels: np.ndarray) -> list[list[int]]:
        """Columns of the expression matrix that hold a label's target genes."""
        position = {gene: column for column, gene in enumerate(self.pairs.genes)}
        names = [genes_of(self.pairs.labels[label]) for label in labels]
        return [[position[gene] for gene in genes if gene in position] for genes in names]


@dataclass(frozen=True)
class Prediction:
    """Predicted Δ ``(labels, genes)`` of all labels, and its standard deviation where the model has one.

    ``facts`` go into the provenance of the predictions.
    """

    delta: np.ndarray
    sd: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _no_change(data: TrainingData) -> Prediction:
    """Predict control."""
    return Prediction(np.zeros((len(data.pairs.labels), data.delta.shape[1])))


def _mean(data: TrainingData) -> Prediction:
    """Predict the unweighted mean over training perturbations."""
    return Prediction(np.repeat(data.delta.mean(axis=0)[None], len(data.pairs.labels), axis=0))


def _target_only(data: TrainingData) -> Prediction:
    """Predict control, but the target gene by the average change of a measured target in training."""
    columns = data.target_columns(np.arange(len(data.pairs.labels)))
    changes = [data.delta[i, c] for i, label in enumerate(data.train) for c in columns[label]]
    delta = np.zeros((len(data.pairs.labels), data.delta.shape[1]))
    for row, targets in enumerate(columns):
        delta[row, targets] = np.mean(changes) if changes else 0.0
    return Prediction(delta)


def _singles(data: TrainingData) -> dict[str, np.ndarray]:
    names = [data.pairs.labels[label] for label in data.train]
    return {perturbation_of(name): data.delta[i] for i, name in enumerate(names) if not is_combination(name)}


def _additive(data: TrainingData) -> Prediction:
    """Add up the partners' effects where each was trained as a single; a missing one adds nothing.

    A label none of whose genes was trained as a single gets the training mean.
    """
    singles, mean = _singles(data), data.delta.mean(axis=0)
    rows = []
    for label in data.pairs.labels:
        known = [singles[gene] for gene in genes_of(label) if gene in singles]
        rows.append(np.sum(known, axis=0) if known else mean)
    return Prediction(np.stack(rows))


def _matching_mean(data: TrainingData) -> Prediction:
    """Average the training perturbations that share a gene with the label, after Systema's baseline."""
    membership = data.pairs.membership
    shared = membership @ membership[data.train].T > 0
    mean = data.delta.mean(axis=0)
    return Prediction(np.stack([data.delta[row].mean(axis=0) if row.any() else mean for row in shared]))


def _linear(data: TrainingData) -> Prediction:
    """Bilinear model of Ahlmann-Eltze et al. on the measured target genes."""
    columns = data.target_columns(np.arange(len(data.pairs.labels)))
    delta, missing = bilinear(data.delta, [columns[label] for label in data.train], columns)
    log.info(
        "linear: %d of %d perturbations have a measured target, the others get the mean",
        len(columns) - missing,
        len(columns),
    )
    without = [label for label, targets in zip(data.pairs.labels, columns, strict=True) if not targets]
    return Prediction(delta, facts={WITHOUT_TARGET: without})


def _multihot(data: TrainingData) -> Prediction:
    """Ridge on the multi-hot code of the perturbed genes: additive and shrunken."""
    code = data.pairs.membership
    return Prediction(ridge(code[data.train], data.delta, code, PENALTIES))


def _ridge(data: TrainingData) -> Prediction:
    """Ridge on all prior codes together."""
    features = data.features()
    return Prediction(ridge(features[data.train], data.delta, features, PENALTIES))


def _knn(data: TrainingData) -> Prediction:
    """Nearest training perturbations by all prior codes together."""
    features = data.features()
    return Prediction(nearest_neighbours(features[data.train], data.delta, features, data.neighbours))


def _kernel_ridge(data: TrainingData) -> Prediction:
    """Additive kernel ridge on the perturbed genes and all priors: half of BioJEPA's linear branch."""
    model = fit_linear_branch(data.pairs, data.train, data.delta)
    everything = np.arange(len(data.pairs.labels))
    return Prediction(model.predict(everything), model.standard_deviation(everything))


def _mlp(data: TrainingData) -> Prediction:
    """Additive network on the perturbed genes and all priors."""
    pairs = data.pairs
    known = (data.train, data.delta, data.validation, data.validation_delta)
    return Prediction(fit_additive_network(pairs.membership, pairs.codes, *known, seed=data.seed))


def _other_screen(data: TrainingData) -> Prediction:
    """Take the responses of the same genes in other screens, scaled to this one."""
    pairs = data.pairs
    known = (pairs.membership, pairs.perturbed_genes, pairs.genes)
    return Prediction(predict_from_screens(data.screens, *known, data.train, data.delta))


def _shuffled_labels(data: TrainingData) -> Prediction:
    """Kernel ridge on training labels that were shuffled: what the pipeline scores without any signal."""
    order = np.random.default_rng(data.seed).permutation(len(data.train))
    return _kernel_ridge(replace(data, delta=data.delta[order]))


def _random_codes(data: TrainingData) -> Prediction:
    """Ridge on random codes of the genes: features without meaning."""
    rng = np.random.default_rng(data.seed)
    codes = {"random": rng.standard_normal((len(data.pairs.perturbed_genes), 64))}
    return _ridge(replace(data, pairs=replace(data.pairs, codes=codes)))


BASELINES: dict[str, Callable[[TrainingData], Prediction]] = {
    "no_change": _no_change,
    "mean": _mean,
    "target_only": _target_only,
    "additive": _additive,
    "matching_mean": _matching_mean,
    "linear": _linear,
    "multihot": _multihot,
    "ridge": _ridge,
    "kernel_ridge": _kernel_ridge,
    "knn": _knn,
    "shuffled_labels": _shuffled_labels,
    "random_codes": _random_codes,
    "mlp": _mlp,
    OTHER_SCREEN: _other_screen,
}


def fit_linear_branch(pairs: Pairs, train: np.ndarray, targets: np.ndarray) -> AdditiveKernelRidge:
    """Fit the additive kernel ridge on ``targets`` ``(len(train), outputs)`` of the training labels.

    The prior sources are averaged, unless weighing them one by one lowers the leave-one-out error of
    the training labels by more than a standard error: with a few dozen perturbations the separate
    weights overfit, and with a clear best source the average dilutes it (``docs/decisions.md``).
    """
    n_cells = pairs.n_cells[train]
    averaged = AdditiveKernelRidge(Components.of(pairs.membership, pairs.codes)).fit(train, targets, n_cells)
    if len(pairs.codes) < 2:
        return averaged
    components = Components.of(pairs.membership, pairs.codes, separate=True)
    separate = AdditiveKernelRidge(components).fit(train, targets, n_cells)
    errors = [((model.leave_one_out() - targets) ** 2).sum(axis=1) for model in (averaged, separate)]
    gain = errors[0] - errors[1]
    return separate if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)) else averaged


def fit_baselines(
    pairs: Pairs,
    names: Sequence[str],
    neighbours: int = 5,
    seed: int = 0,
    screens: Mapping[str, OtherScreen] | None = None,
) -> dict[str, Prediction]:
    """Fit the named baselines and predict Δ of every label of ``pairs``, test ones included.

    Parameters
    ----------
    pairs
        The fold.
    names
        Baselines to fit.
    neighbours, seed
        As in :class:`TrainingData`.
    screens
        Name to responses in another screen; ``other_screen`` needs at least one.

    Raises
    ------
    ValueError
        Naming an unknown baseline and those that exist, or when ``other_screen`` has no other screen.
    LeakageError
        When ``pairs`` carries cells of a test perturbation.
    """
    refuse_leaked_pairs(pairs)
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; there are {sorted(BASELINES)}")
    if OTHER_SCREEN in names and not screens:
        raise ValueError(f"{OTHER_SCREEN} needs the responses of another screen, and none was given")
    data = TrainingData.of(pairs, neighbours, seed, screens)
    return {name: BASELINES[name](data) for name in names}

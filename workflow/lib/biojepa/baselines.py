"""The simple models that a deep one must beat, fitted together because each takes a moment.

Every function answers the same question from the same input, so that a report compares like with
like: given the training perturbations of a fold, what is Δ of the others?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from biojepa.contracts import GENE_SEPARATOR
from biojepa.linear import AdditiveKernelRidge, Components, bilinear, nearest_neighbours, ridge
from biojepa.pairs import Pairs, refuse_leaked_pairs, trainable_labels

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
    neighbours
        For ``knn``.
    seed
        For the randomized controls.
    """

    pairs: Pairs
    train: np.ndarray
    delta: np.ndarray
    neighbours: int = 5
    seed: int = 0

    @classmethod
    def of(cls, pairs: Pairs, neighbours: int = 5, seed: int = 0) -> TrainingData:
        """Take Δ of the training perturbations from ``pairs``."""
        means, control = pairs.pseudobulk()
        train = trainable_labels(pairs)
        return cls(pairs, train, means[train] - control, neighbours, seed)

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
        names = [self.pairs.labels[label].split(GENE_SEPARATOR) for label in labels]
        return [[position[gene] for gene in genes if gene in position] for genes in names]


@dataclass(frozen=True)
class Prediction:
    """Predicted Δ ``(labels, genes)`` of all labels, and its standard deviation where the model has one."""

    delta: np.ndarray
    sd: np.ndarray | None = None


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
    return {name: data.delta[i] for i, name in enumerate(names) if GENE_SEPARATOR not in name}


def _additive(data: TrainingData) -> Prediction:
    """Add up the partners' effects where each was trained as a single; a missing one adds nothing.

    A label none of whose genes was trained as a single gets the training mean.
    """
    singles, mean = _singles(data), data.delta.mean(axis=0)
    rows = []
    for label in data.pairs.labels:
        known = [singles[gene] for gene in label.split(GENE_SEPARATOR) if gene in singles]
        rows.append(np.sum(known, axis=0) if known else mean)
    return Prediction(np.stack(rows))


def _matching_mean(data: TrainingData) -> Prediction:
    """Average the training perturbations that share a gene with the label (Systema's baseline)."""
    membership = data.pairs.membership
    shared = membership @ membership[data.train].T > 0
    mean = data.delta.mean(axis=0)
    return Prediction(np.stack([data.delta[row].mean(axis=0) if row.any() else mean for row in shared]))


def _linear(data: TrainingData) -> Prediction:
    """Bilinear model of Ahlmann-Eltze et al. on the measured target genes."""
    columns = data.target_columns(np.arange(len(data.pairs.labels)))
    delta, missing = bilinear(data.delta, [columns[label] for label in data.train], columns)
    if missing:
        log.info(
            "linear: %d of %d perturbations have no measured target and get the mean", missing, len(columns)
        )
    return Prediction(delta)


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
    pairs: Pairs, names: Sequence[str], neighbours: int = 5, seed: int = 0
) -> dict[str, Prediction]:
    """Fit the named baselines and predict Δ of every label of ``pairs``, test ones included.

    Raises
    ------
    ValueError
        Naming an unknown baseline and those that exist.
    LeakageError
        When ``pairs`` carries cells of a test perturbation.
    """
    refuse_leaked_pairs(pairs)
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; there are {sorted(BASELINES)}")
    data = TrainingData.of(pairs, neighbours, seed)
    return {name: BASELINES[name](data) for name in names}

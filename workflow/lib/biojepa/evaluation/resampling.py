"""Bootstrap samples of perturbations and of the seeds within them, and means over them.

The unit is the perturbation. A model that was trained from several seeds brings a second source of
chance: every bootstrap sample draws perturbations, and for each fold as many seeds as there are, with
replacement. A seed stands for one training, which serves all test perturbations of its fold at once. The
same draws serve every model and metric, so that differences and ratios of models are paired.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CATEGORIES, CATEGORIES, CATEGORY, OTHER_CONTEXT, PERTURBATION
from biojepa.labels import perturbation_of

MIN_WHOLE_MODEL = 5
# Keeps the draws of seeds apart from those of perturbations, which start from the number of their group.
SEED_STREAM = 1000
SEEN, UNSEEN = "seen genes", "unseen genes"
SCOPES = {
    ALL_CATEGORIES: CATEGORIES,
    **{category: (category,) for category in CATEGORIES if category != OTHER_CONTEXT},
    SEEN: ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo"),
    UNSEEN: ("single",),
    # Behind the others, whose draws depend on their place.
    OTHER_CONTEXT: (OTHER_CONTEXT,),
}


@dataclass(frozen=True)
class Scope:
    """A group of test perturbations and its bootstrap draws.

    Attributes
    ----------
    name, categories
        ``all``, a category, or a group of categories, and what it holds.
    perturbations
        Unique perturbations, sorted, (n,).
    counts
        (draws, n): how often each perturbation occurs in each bootstrap sample.
    seed
        Seed of the bootstrap, from which the draws of training seeds follow too.
    """

    name: str
    categories: tuple[str, ...]
    perturbations: pd.Index
    counts: np.ndarray
    seed: int = 0

    @cached_property
    def n_units(self) -> int:
        """Number of perturbations, one in several contexts counted once."""
        return units_of(self.perturbations)[0]

    def training_counts(self, trainings: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return how often each training occurs in each bootstrap sample, (draws, trainings).

        Parameters
        ----------
        trainings
            Fold and seed of each training of one model. Seeds are drawn within a fold, by their rank, so
            that models with as many seeds share the draws.
        """
        return _training_counts(len(self.counts), self.seed, tuple(trainings))


@lru_cache(maxsize=256)
def _training_counts(draws: int, seed: int, trainings: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Draw seeds within each fold, (draws, trainings); kept, since every metric and model asks for them."""
    counts = np.ones((draws, len(trainings)))
    folds = np.array([fold for fold, _ in trainings])
    for fold in np.unique(folds):
        inside = np.flatnonzero(folds == fold)
        ranked = inside[np.argsort([trainings[place][1] for place in inside])]
        if len(ranked) > 1:
            rng = np.random.default_rng([seed, SEED_STREAM, int(fold), len(ranked)])
            share = np.full(len(ranked), 1 / len(ranked))
            counts[:, ranked] = rng.multinomial(len(ranked), share, size=draws)
    counts.flags.writeable = False
    return counts


def make_scopes(tested: pd.DataFrame, draws: int, seed: int) -> dict[str, Scope]:
    """Draw bootstrap samples within every non-empty group of categories.

    Parameters
    ----------
    tested
        Columns ``perturbation`` and ``category``: the test perturbations of all folds.
    draws, seed
        Number of samples; a group's draws depend on the seed and the group alone.
    """
    scopes = {}
    for position, (name, categories) in enumerate(SCOPES.items()):
        members = pd.Index(sorted(set(tested.loc[tested[CATEGORY].isin(categories), PERTURBATION])))
        if len(members):
            counts = draw_counts(members, draws, np.random.default_rng([seed, position]))
            scopes[name] = Scope(name, tuple(categories), members, counts, seed)
    return scopes


def draw_counts(members: pd.Index, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draw perturbations with replacement: how often each member occurs, (draws, n).

    A perturbation that was tested in several contexts is drawn as one: what it does in one of them says
    much of what it does in another, and an interval that took them for independent would be too narrow.
    """
    units, owner = units_of(members)
    drawn = rng.multinomial(units, np.full(units, 1 / units), size=draws).astype(float)
    return drawn[:, owner]


def units_of(members: Iterable[str]) -> tuple[int, np.ndarray]:
    """Count the perturbations behind labels that may name contexts, and number the one of each label."""
    names, owner = np.unique([perturbation_of(str(label)) for label in members], return_inverse=True)
    return len(names), owner


@dataclass
class WholeModelScores:
    """Scores of metrics that need all perturbations at once, with their bootstrap draws.

    ``values[model, metric, scope]`` holds one array (1 + draws,) per training, that is, fold and seed: the
    value itself, then the value of every bootstrap sample of the scope. ``counted[metric, scope]`` holds
    the perturbations that any of them rests on.
    """

    scopes: dict[str, Scope]
    values: dict[tuple[str, str, str], dict[tuple[int, int], np.ndarray]] = field(default_factory=dict)
    counted: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def weights(self, perturbations: Sequence[str], categories: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weightings (1 + draws, perturbations) of a fold's rows for each scope it serves.

        A scope with fewer than 5 of the fold's perturbations has no slope worth the name.
        """
        weightings = {}
        for name, scope in self.scopes.items():
            inside = np.isin(categories.astype(str), scope.categories)
            if inside.sum() < MIN_WHOLE_MODEL:
                continue
            rows = scope.perturbations.get_indexer(pd.Index(perturbations))
            drawn = np.where(inside, scope.counts[:, np.maximum(rows, 0)], 0.0)
            weightings[name] = np.vstack([inside.astype(float), drawn])
        return weightings

    def add(
        self,
        model: str,
        metric: str,
        scope: str,
        values: np.ndarray,
        training: tuple[int, int],
        counted: Collection[str] = (),
    ) -> None:
        """Keep the scores of one training (fold and seed), and which perturbations they rest on."""
        self.values.setdefault((model, metric, scope), {})[training] = values
        self.counted.setdefault((metric, scope), set()).update(counted)

    def pooled(self, model: str, metric: str, scope: Scope) -> np.ndarray:
        """Return the mean over folds and seeds, (1 + draws,); NaN where nothing was scored.

        The first value is the plain mean; a bootstrap sample weighs the trainings that it drew.
        """
        found = self.values.get((model, metric, scope.name))
        if not found:
            return np.full(1 + len(scope.counts), np.nan)
        rows = np.vstack(list(found.values()))
        weights = np.ones_like(rows)
        weights[:, 1:] = scope.training_counts(list(found)).T
        return nan_mean(rows, weights)

    def n(self, metric: str, scope: Scope) -> int:
        """Return the number of perturbations that a metric rests on in a scope."""
        return len(self.counted.get((metric, scope.name), ()))


def nan_mean(rows: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the column means over what is defined, NaN where nothing is; weights are (rows, columns)."""
    defined = np.isfinite(rows).astype(float)
    if weights is not None:
        defined = defined * weights
    total = (np.where(np.isfinite(rows), rows, 0.0) * defined).sum(axis=0)
    count = defined.sum(axis=0)
    return np.divide(total, count, out=np.full(rows.shape[1], np.nan), where=count > 0)


def bootstrap_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean of every column in every bootstrap sample, over what is defined.

    Parameters
    ----------
    values
        (n, columns), NaN where undefined.
    counts
        (draws, n).

    Returns
    -------
    numpy.ndarray
        (draws, columns), NaN for a sample in which nothing is defined.
    """
    defined = np.isfinite(values)
    total = counts @ np.where(defined, values, 0.0)
    number = counts @ defined.astype(float)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


@dataclass(frozen=True)
class SeededScores:
    """Scores of one model that was trained from several seeds, by perturbation and training.

    Attributes
    ----------
    values
        (n, trainings), NaN where a training did not score a perturbation.
    folds
        (trainings,): the fold of each.
    weights
        (draws, trainings): how often each bootstrap sample drew a training.
    """

    values: np.ndarray
    folds: np.ndarray
    weights: np.ndarray

    @cached_property
    def even(self) -> bool:
        """Whether all seeds of a fold scored the same perturbations.

        Then each sample draws as many trainings for a perturbation as there are, and its sums are linear.
        """
        defined = np.isfinite(self.values)
        inside = (defined[:, self.folds == fold] for fold in np.unique(self.folds))
        return all(bool((block.all(axis=1) == block.any(axis=1)).all()) for block in inside)

    def totals(self, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the sum of the scores of every sample, (draws,), where ``even``.

        Parameters
        ----------
        counts
            (draws, n): how often each sample drew a perturbation.
        chosen
            (n,): perturbations to sum over.
        """
        defined = np.isfinite(self.values) & chosen[:, None]
        shares = np.where(defined, self.values, 0.0) / np.maximum(defined.sum(axis=1, keepdims=True), 1)
        return np.einsum("dt,dt->d", counts @ shares, self.weights)

    def drawn(self) -> np.ndarray:
        """Return the score of every perturbation in every sample, the mean over the trainings drawn.

        Returns
        -------
        numpy.ndarray
            (draws, n), NaN where no training was drawn that scored the perturbation.
        """
        return bootstrap_means(self.values.T, self.weights)


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean of each sample over its perturbations, where values differ between samples.

    Parameters
    ----------
    values, counts
        Both (draws, n); NaN where undefined.

    Returns
    -------
    numpy.ndarray
        (draws,), NaN for a sample in which nothing is defined.
    """
    defined = np.isfinite(values)
    total = (counts * np.where(defined, values, 0.0)).sum(axis=1)
    number = (counts * defined).sum(axis=1)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def interval(draws: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval of every column, NaN where a column has no defined draw."""
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    bounds = np.full((2, draws.shape[1]), np.nan)
    defined = np.isfinite(draws)
    complete = defined.all(axis=0)
    partial = defined.any(axis=0) & ~complete
    # The same values, but nanpercentile takes its columns one by one.
    if complete.any():
        bounds[:, complete] = np.percentile(draws[:, complete], tails, axis=0)
    if partial.any():
        bounds[:, partial] = np.nanpercentile(draws[:, partial], tails, axis=0)
    return bounds[0], bounds[1]
